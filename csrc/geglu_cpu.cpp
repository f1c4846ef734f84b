// One pass over each row, in blocks that stay in the first cache.
#include "geglu.h"

#include <algorithm>

#include "common/float.h"
#include "common/math.h"
#include "common/native.h"
#include "common/storage.h"

using namespace nitro;

namespace {

constexpr int64_t BLOCK = 1024;

// The normal distribution function.
NITRO_INLINE float cdf_of(float g) { return 0.5f + 0.5f * erf_of(g * 0.707106781f); }

NITRO_CLONES void forward(const float *a, const float *g, int64_t n, float *__restrict y) {
    for (int64_t i = 0; i < n; ++i) y[i] = a[i] * (g[i] * cdf_of(g[i]));
}

NITRO_CLONES void backward(const float *dy, const float *a, const float *g, int64_t n, float *__restrict da,
                           float *__restrict dg) {
    for (int64_t i = 0; i < n; ++i) {
        const float cdf = cdf_of(g[i]), pdf = 0.398942280f * exp_of(-0.5f * g[i] * g[i]);
        da[i] = dy[i] * (g[i] * cdf);
        dg[i] = dy[i] * a[i] * (cdf + g[i] * pdf);
    }
}

void forward_rows(const GegluFwdParams &p, int64_t begin, int64_t end) {
    float a[BLOCK], g[BLOCK], out[BLOCK];
    for (int64_t r = begin; r < end; ++r)
        for (int64_t i = 0; i < p.size; i += BLOCK) {
            const int64_t n = std::min(BLOCK, p.size - i), at = 2 * r * p.size + i, to = r * p.size + i;
            float *y = target(p.y, p.dtype, to, out);
            forward(read(p.x, p.dtype, at, n, a), read(p.x, p.dtype, at + p.size, n, g), n, y);
            write(p.y, p.dtype, to, n, y);
        }
}

void backward_rows(const GegluBwdParams &p, int64_t begin, int64_t end) {
    float dy[BLOCK], a[BLOCK], g[BLOCK], a_out[BLOCK], g_out[BLOCK];
    for (int64_t r = begin; r < end; ++r)
        for (int64_t i = 0; i < p.size; i += BLOCK) {
            const int64_t n = std::min(BLOCK, p.size - i), at = 2 * r * p.size + i;
            float *da = target(p.dx, p.dtype, at, a_out), *dg = target(p.dx, p.dtype, at + p.size, g_out);
            backward(read(p.dy, p.dtype, r * p.size + i, n, dy), read(p.x, p.dtype, at, n, a),
                     read(p.x, p.dtype, at + p.size, n, g), n, da, dg);
            write(p.dx, p.dtype, at, n, da);
            write(p.dx, p.dtype, at + p.size, n, dg);
        }
}

template <class Params, class Rows>
int run(const Params &p, int threads, Rows rows) {
    if (p.dtype < NITRO_F32 || p.dtype > NITRO_BF16) return 1;
    const int64_t worth = std::max<int64_t>(1, (p.rows * p.size) >> 16);
    const int64_t count = std::min({worth, p.rows, static_cast<int64_t>(threads)});
    parallel(count, static_cast<int>(count),
             [&](int64_t k) { rows(p, p.rows * k / count, p.rows * (k + 1) / count); });
    return 0;
}

}  // namespace

int geglu_fwd_cpu(const GegluFwdParams &p, int threads) { return run(p, threads, forward_rows); }
int geglu_bwd_cpu(const GegluBwdParams &p, int threads) { return run(p, threads, backward_rows); }

NITRO_CPU_OP(geglu_fwd_cpu, GegluFwdParams);
NITRO_CPU_OP(geglu_bwd_cpu, GegluBwdParams);
