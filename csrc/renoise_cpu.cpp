// The CPU launcher: one pass over each image, split over threads when there is enough to do.
#include "renoise.h"

#include <algorithm>
#include <cstring>
#include <thread>
#include <vector>

#include "common/dtype.h"

// The compiler makes one version per instruction set and picks at run time; baseline where it cannot.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define NITRO_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define NITRO_CLONES
#endif

namespace {

inline float from_bf16(uint16_t h) {
    uint32_t bits = static_cast<uint32_t>(h) << 16;
    float f;
    std::memcpy(&f, &bits, 4);
    return f;
}

inline uint16_t to_bf16(float f) {
    uint32_t bits;
    std::memcpy(&bits, &f, 4);
    uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;  // to nearest even
    bool nan = (bits & 0x7fffffffu) > 0x7f800000u;
    return static_cast<uint16_t>(nan ? ((bits >> 16) | 0x40u) : rounded);
}

inline float from_f16(uint16_t h) {
    uint32_t sign = static_cast<uint32_t>(h & 0x8000u) << 16, exponent = (h >> 10) & 0x1fu, mantissa = h & 0x3ffu;
    uint32_t bits;
    if (exponent == 0) {  // zero and subnormals, exact in fp32
        float f = static_cast<float>(mantissa) * 5.9604644775390625e-8f;
        std::memcpy(&bits, &f, 4);
        bits |= sign;
    } else {
        bits = sign | ((exponent == 31 ? 255u : exponent + 112u) << 23) | (mantissa << 13);
    }
    float f;
    std::memcpy(&f, &bits, 4);
    return f;
}

inline uint16_t to_f16(float f) {
    uint32_t bits;
    std::memcpy(&bits, &f, 4);
    uint32_t sign = (bits >> 16) & 0x8000u, magnitude = bits & 0x7fffffffu;
    if (magnitude > 0x7f800000u) return static_cast<uint16_t>(sign | 0x7e00u);   // NaN
    if (magnitude >= 0x477ff000u) return static_cast<uint16_t>(sign | 0x7c00u);  // rounds to infinity
    if (magnitude < 0x38800000u) {                                              // subnormal: let fp32 addition round
        float a;
        std::memcpy(&a, &magnitude, 4);
        a += 0.5f;
        uint32_t r;
        std::memcpy(&r, &a, 4);
        return static_cast<uint16_t>(sign | (r - 0x3f000000u));
    }
    uint32_t rounded = magnitude + 0xfffu + ((magnitude >> 13) & 1u);
    return static_cast<uint16_t>(sign | ((rounded - 0x38000000u) >> 13));
}

NITRO_CLONES void run_f32(const float *x, const float *e, const float *n, float *x0, float *y, int64_t size,
                          const float *c) {
    const float alpha = c[0], sigma = c[1], alpha_next = c[2], sigma_next = c[3];
    for (int64_t i = 0; i < size; ++i) {
        float v = (x[i] - sigma * e[i]) / alpha;
        x0[i] = v;
        y[i] = alpha_next * v + sigma_next * n[i];
    }
}

NITRO_CLONES void run_bf16(const uint16_t *x, const uint16_t *e, const uint16_t *n, float *x0, uint16_t *y,
                           int64_t size, const float *c) {
    const float alpha = c[0], sigma = c[1], alpha_next = c[2], sigma_next = c[3];
    for (int64_t i = 0; i < size; ++i) {
        float v = (from_bf16(x[i]) - sigma * from_bf16(e[i])) / alpha;
        x0[i] = v;
        y[i] = to_bf16(alpha_next * v + sigma_next * from_bf16(n[i]));
    }
}

void run_f16(const uint16_t *x, const uint16_t *e, const uint16_t *n, float *x0, uint16_t *y, int64_t size,
             const float *c) {
    const float alpha = c[0], sigma = c[1], alpha_next = c[2], sigma_next = c[3];
    for (int64_t i = 0; i < size; ++i) {
        float v = (from_f16(x[i]) - sigma * from_f16(e[i])) / alpha;
        x0[i] = v;
        y[i] = to_f16(alpha_next * v + sigma_next * from_f16(n[i]));
    }
}

void run_images(const RenoiseParams &p, int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
        const float c[4] = {p.coefficients[b], p.coefficients[p.batch + b], p.coefficients[2 * p.batch + b],
                            p.coefficients[3 * p.batch + b]};
        const int64_t at = b * p.size;
        if (p.dtype == NITRO_F32) {
            run_f32(static_cast<const float *>(p.x_t) + at, static_cast<const float *>(p.eps) + at,
                    static_cast<const float *>(p.noise) + at, p.x0 + at, static_cast<float *>(p.x_next) + at, p.size,
                    c);
        } else {
            auto run = p.dtype == NITRO_BF16 ? run_bf16 : run_f16;
            run(static_cast<const uint16_t *>(p.x_t) + at, static_cast<const uint16_t *>(p.eps) + at,
                static_cast<const uint16_t *>(p.noise) + at, p.x0 + at, static_cast<uint16_t *>(p.x_next) + at, p.size,
                c);
        }
    }
}

}  // namespace

int renoise_cpu(const RenoiseParams &p, int threads) {
    if (p.dtype < NITRO_F32 || p.dtype > NITRO_BF16) return 1;
    const int64_t worth = (p.batch * p.size) >> 18;  // a thread costs about what 256 k elements do
    const int count = static_cast<int>(std::max<int64_t>(1, std::min({worth, p.batch, static_cast<int64_t>(threads)})));
    std::vector<std::thread> pool;
    for (int k = 1; k < count; ++k)
        pool.emplace_back(run_images, std::cref(p), p.batch * k / count, p.batch * (k + 1) / count);
    run_images(p, 0, p.batch / count);
    for (auto &t : pool) t.join();
    return 0;
}
