// A row is read into the first cache once; its moments take two passes there. Rows are cut into a number of parts that
// does not depend on the threads, so neither do the sums over rows.
#include "layer_norm.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "common/float.h"
#include "common/math.h"
#include "common/native.h"
#include "common/storage.h"

using namespace nitro;

namespace {

typedef float Lanes __attribute__((vector_size(64)));  // reductions are spelled out: -O3 keeps the order of a plain sum

NITRO_INLINE void load(Lanes &v, const float *x) { std::memcpy(&v, x, sizeof v); }

NITRO_INLINE float total(const Lanes &v) {
    float half[8];
    for (int i = 0; i < 8; ++i) half[i] = v[i] + v[i + 8];
    return ((half[0] + half[4]) + (half[1] + half[5])) + ((half[2] + half[6]) + (half[3] + half[7]));
}

// Mean, and 1 / sqrt(variance + eps) from deviations around it, whose own sum makes up for the mean's rounding.
NITRO_INLINE void moments(const float *x, int64_t n, float eps, float *mean, float *rstd) {
    Lanes s[4] = {}, q[4] = {};
    int64_t i = 0;
    for (; i + 64 <= n; i += 64)
        for (int k = 0; k < 4; ++k) {
            Lanes v;
            load(v, x + i + 16 * k);
            s[k] += v;
        }
    float sum = total((s[0] + s[1]) + (s[2] + s[3]));
    for (; i < n; ++i) sum += x[i];
    const float pivot = sum / static_cast<float>(n);
    for (int k = 0; k < 4; ++k) s[k] = Lanes{};
    for (i = 0; i + 64 <= n; i += 64)
        for (int k = 0; k < 4; ++k) {
            Lanes v;
            load(v, x + i + 16 * k);
            v -= pivot;
            s[k] += v;
            q[k] += v * v;
        }
    float rest = total((s[0] + s[1]) + (s[2] + s[3])), square = total((q[0] + q[1]) + (q[2] + q[3]));
    for (; i < n; ++i) {
        const float d = x[i] - pivot;
        rest += d;
        square += d * d;
    }
    rest /= static_cast<float>(n);
    *mean = pivot + rest;
    *rstd = 1.0f / std::sqrt(std::max(0.0f, square / static_cast<float>(n) - rest * rest) + eps);
}

NITRO_CLONES void forward(const float *x, int64_t n, const float *__restrict weight, const float *__restrict bias,
                          float eps, float *__restrict y, float *mean, float *rstd) {
    moments(x, n, eps, mean, rstd);
    const float m = *mean, r = *rstd;
    for (int64_t i = 0; i < n; ++i) y[i] = (x[i] - m) * r * weight[i] + bias[i];
}

// dx = rstd (weight dy - s1 - xhat s2), s1 and s2 the means of weight dy and weight dy xhat; dweight and dbias grow.
NITRO_CLONES void backward(const float *dy, const float *x, int64_t n, const float *__restrict weight, float m, float r,
                           float *__restrict dx, float *__restrict dweight, float *__restrict dbias) {
    Lanes a[2] = {}, b[2] = {};
    int64_t i = 0;
    for (; i + 32 <= n; i += 32)
        for (int k = 0; k < 2; ++k) {
            Lanes d, h, w;
            load(d, dy + i + 16 * k);
            load(h, x + i + 16 * k);
            load(w, weight + i + 16 * k);
            d *= w;
            h = (h - m) * r;
            a[k] += d;
            b[k] += d * h;
        }
    float s1 = total(a[0] + a[1]), s2 = total(b[0] + b[1]);
    for (; i < n; ++i) {
        const float d = dy[i] * weight[i];
        s1 += d;
        s2 += d * ((x[i] - m) * r);
    }
    s1 /= static_cast<float>(n);
    s2 /= static_cast<float>(n);
    for (i = 0; i < n; ++i) {
        const float h = (x[i] - m) * r;
        dx[i] = r * (weight[i] * dy[i] - s1 - h * s2);
        dweight[i] += dy[i] * h;
        dbias[i] += dy[i];
    }
}

std::vector<float> filled(const float *from, int64_t n, float otherwise) {
    return from ? std::vector<float>(from, from + n) : std::vector<float>(n, otherwise);
}

}  // namespace

int layer_norm_fwd_cpu(const LayerNormFwdParams &p, int threads) {
    if (p.dtype < NITRO_F32 || p.dtype > NITRO_BF16) return 1;
    const std::vector<float> weight = filled(p.weight, p.size, 1.0f), bias = filled(p.bias, p.size, 0.0f);
    const int64_t worth = std::max<int64_t>(1, (p.rows * p.size) >> 16);
    const int64_t count = std::min({worth, p.rows, static_cast<int64_t>(threads)});
    parallel(count, static_cast<int>(count), [&](int64_t k) {
        std::vector<float> room(2 * p.size);
        for (int64_t r = p.rows * k / count; r < p.rows * (k + 1) / count; ++r) {
            float *y = target(p.y, p.dtype, r * p.size, room.data() + p.size);
            forward(read(p.x, p.dtype, r * p.size, p.size, room.data()), p.size, weight.data(), bias.data(),
                    static_cast<float>(p.eps), y, p.mean + r, p.rstd + r);
            write(p.y, p.dtype, r * p.size, p.size, y);
        }
    });
    return 0;
}

int layer_norm_bwd_cpu(const LayerNormBwdParams &p, int threads) {
    if (p.dtype < NITRO_F32 || p.dtype > NITRO_BF16) return 1;
    const std::vector<float> weight = filled(p.weight, p.size, 1.0f);
    const int64_t parts = std::max<int64_t>(1, std::min<int64_t>(16, p.rows / 64));
    std::vector<float> partial(2 * (parts - 1) * p.size);
    std::fill(p.dweight, p.dweight + p.size, 0.0f);
    std::fill(p.dbias, p.dbias + p.size, 0.0f);
    const auto dweight = [&](int64_t k) { return k == 0 ? p.dweight : partial.data() + 2 * (k - 1) * p.size; };
    const auto dbias = [&](int64_t k) { return k == 0 ? p.dbias : dweight(k) + p.size; };
    parallel(parts, static_cast<int>(std::min<int64_t>(parts, threads)), [&](int64_t k) {
        std::vector<float> room(3 * p.size);
        for (int64_t r = p.rows * k / parts; r < p.rows * (k + 1) / parts; ++r) {
            const int64_t at = r * p.size;
            float *dx = target(p.dx, p.dtype, at, room.data() + p.size);
            backward(read(p.dy, p.dtype, at, p.size, room.data() + 2 * p.size),
                     read(p.x, p.dtype, at, p.size, room.data()), p.size, weight.data(), p.mean[r], p.rstd[r], dx,
                     dweight(k), dbias(k));
            write(p.dx, p.dtype, at, p.size, dx);
        }
    });
    for (int64_t k = 1; k < parts; ++k)
        for (int64_t i = 0; i < p.size; ++i) {
            p.dweight[i] += dweight(k)[i];
            p.dbias[i] += dbias(k)[i];
        }
    return 0;
}

NITRO_CPU_OP(layer_norm_fwd_cpu, LayerNormFwdParams);
NITRO_CPU_OP(layer_norm_bwd_cpu, LayerNormBwdParams);
