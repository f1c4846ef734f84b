// The CPU launcher: one pass over each image, split over threads when there is enough to do.
#include "renoise.h"

#include <algorithm>

#include "common/float.h"
#include "common/native.h"

using namespace nitro;

namespace {

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
    nitro::parallel(count, count, [&](int64_t k) { run_images(p, p.batch * k / count, p.batch * (k + 1) / count); });
    return 0;
}

NITRO_CPU_OP(renoise_cpu, RenoiseParams);
