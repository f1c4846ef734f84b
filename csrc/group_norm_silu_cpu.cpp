// Positions innermost: one task per (image, group) does its statistics and then its elements. Channels innermost:
// group_norm_silu_last.inl. No sum depends on the number of threads.
#include "group_norm_silu.h"

#include <algorithm>
#include <cmath>
#include <memory>
#include <type_traits>
#include <vector>

#include "common/float.h"
#include "common/math.h"
#include "common/native.h"
#include "common/storage.h"

using namespace nitro;

namespace {

constexpr int64_t BLOCK = 2048;  // elements of a run that are worked on at a time
typedef float Lanes __attribute__((vector_size(64)));  // reductions are spelled out: -O3 keeps the order of a plain sum

NITRO_INLINE void load(Lanes &v, const float *x) { std::memcpy(&v, x, sizeof v); }

NITRO_INLINE double total(const Lanes &v) {
    double sum = 0;
    for (int i = 0; i < 16; ++i) sum += v[i];
    return sum;
}

// out: sum of x - pivot, sum of its squares.
NITRO_CLONES void deviations(const float *x, int64_t n, float pivot, double *out) {
    Lanes s[4] = {}, q[4] = {};
    int64_t i = 0;
    for (; i + 64 <= n; i += 64)
        for (int k = 0; k < 4; ++k) {
            Lanes d;
            load(d, x + i + 16 * k);
            d -= pivot;
            s[k] += d;
            q[k] += d * d;
        }
    for (; i + 16 <= n; i += 16) {
        Lanes d;
        load(d, x + i);
        d -= pivot;
        s[0] += d;
        q[0] += d * d;
    }
    out[0] = total((s[0] + s[1]) + (s[2] + s[3]));
    out[1] = total((q[0] + q[1]) + (q[2] + q[3]));
    for (; i < n; ++i) {
        const float d = x[i] - pivot;
        out[0] += d;
        out[1] += static_cast<double>(d) * d;
    }
}

NITRO_INLINE float silu_of(float z) { return z / one_plus_exp_minus(z); }

// y = act((x - pivot) scale + offset)
NITRO_CLONES void apply(const float *x, float *__restrict y, int64_t n, float pivot, float scale, float offset,
                        bool silu) {
    if (silu) {
#pragma GCC unroll 2
        for (int64_t i = 0; i < n; ++i) y[i] = silu_of((x[i] - pivot) * scale + offset);
    } else {
        for (int64_t i = 0; i < n; ++i) y[i] = (x[i] - pivot) * scale + offset;
    }
}

// Moments of a group from blocks of it. Each block is measured against the mean of the block before: squared steps
// between neighbouring means add up to at most four times the group's own m2, so nothing cancels, however large the mean.
struct Moments {
    double count = 0, mean = 0, m2 = 0;

    // n numbers whose deviations from pivot add up to s, their squares to q.
    void add(double n, double pivot, double s, double q) {
        const double step = pivot + s / n - mean, all = count + n;
        m2 += std::max(0.0, q - s * s / n) + step * step * (count * n / all);
        mean += step * (n / all);
        count = all;
    }
    double rstd(double eps) const { return 1.0 / std::sqrt(m2 / count + eps); }
};

// What one channel does to x: xhat = (x - pivot) rstd + rest, z = xhat weight + bias. pivot is the group's mean less the
// channel's shift, rounded; rest makes up for the rounding.
struct Channel {
    float pivot, rstd, rest, weight, bias;

    template <class Params>
    Channel(const Params &p, int64_t b, int64_t c, double mean, double rstd_)
        : rstd(static_cast<float>(rstd_)), weight(p.weight ? p.weight[c] : 1.0f), bias(p.bias ? p.bias[c] : 0.0f) {
        const double centre = mean - (p.shift ? p.shift[b * p.channels + c] : 0.0f);
        pivot = static_cast<float>(centre);
        rest = static_cast<float>((pivot - centre) * rstd_);
    }
};

void forward_group(const GroupNormSiluFwdParams &p, int64_t b, int64_t g) {
    const int64_t width = p.channels / p.groups, c0 = g * width, base = (b * p.channels + c0) * p.positions;
    const int64_t runs = p.shift ? width : 1, length = p.shift ? p.positions : width * p.positions;
    float room[BLOCK], out[BLOCK];
    Moments moments;
    for (int64_t r = 0; r < runs; ++r)
        for (int64_t i = 0; i < length; i += BLOCK) {
            const int64_t n = std::min(BLOCK, length - i);
            const float *x = read(p.x, p.dtype, base + r * length + i, n, room);
            const float shift = p.shift ? p.shift[b * p.channels + c0 + r] : 0.0f;
            double s[2];
            float pivot = static_cast<float>(moments.mean - shift);
            if (moments.count == 0) {
                deviations(x, n, x[0], s);
                pivot = x[0] + static_cast<float>(s[0] / n);
            }
            deviations(x, n, pivot, s);
            moments.add(n, static_cast<double>(pivot) + shift, s[0], s[1]);
        }
    const double rstd = moments.rstd(p.eps);
    p.mean[b * p.groups + g] = static_cast<float>(moments.mean);
    p.rstd[b * p.groups + g] = static_cast<float>(rstd);
    for (int64_t r = 0; r < width; ++r) {
        const Channel k(p, b, c0 + r, moments.mean, rstd);
        const float scale = static_cast<float>(rstd * k.weight), offset = k.rest * k.weight + k.bias;
        for (int64_t i = 0; i < p.positions; i += BLOCK) {
            const int64_t at = base + r * p.positions + i, n = std::min(BLOCK, p.positions - i);
            float *y = target(p.y, p.dtype, at, out);
            apply(read(p.x, p.dtype, at, n, room), y, n, k.pivot, scale, offset, p.silu);
            write(p.y, p.dtype, at, n, y);
        }
    }
}

// What backward needs of a channel. t = x - pivot, z = t scale + offset, dx = dz slope - base - t bend.
struct Slopes {
    float pivot, scale, offset, slope = 0, base = 0, bend = 0;

    explicit Slopes(const Channel &k) : pivot(k.pivot), scale(k.rstd * k.weight), offset(k.rest * k.weight + k.bias) {}

    // s1 and s2: the group's means of weight dz and weight dz xhat.
    Slopes(const Channel &k, double s1, double s2) : Slopes(k) {
        slope = k.rstd * k.weight;
        base = static_cast<float>(k.rstd * (s1 + s2 * k.rest));
        bend = static_cast<float>(static_cast<double>(k.rstd) * k.rstd * s2);
    }
};

// dz = dy act'(z)
template <bool SILU>
NITRO_INLINE float gradient_at(float dy, float z) {
    if (!SILU) return dy;
    const float s = 1.0f / one_plus_exp_minus(z);
    return dy * (s * (1.0f + z * (1.0f - s)));
}

template <bool SILU>
NITRO_INLINE void gradient_of_run(const float *dy, const float *x, int64_t n, const Slopes &k, float *__restrict dz) {
    for (int64_t i = 0; i < n; ++i) dz[i] = gradient_at<SILU>(dy[i], (x[i] - k.pivot) * k.scale + k.offset);
}

// dz of a run of one channel, short enough for the first cache; out += sums of dz, dz t, t.
NITRO_CLONES void gradient_sums(const float *dy, const float *x, int64_t n, const Slopes k, bool silu, float *dz,
                                double *out) {
    silu ? gradient_of_run<true>(dy, x, n, k, dz) : gradient_of_run<false>(dy, x, n, k, dz);
    Lanes a[2] = {}, b[2] = {}, c[2] = {};
    int64_t i = 0;
    for (; i + 32 <= n; i += 32)
        for (int l = 0; l < 2; ++l) {
            Lanes d, t;
            load(d, dz + i + 16 * l);
            load(t, x + i + 16 * l);
            t -= k.pivot;
            a[l] += d;
            b[l] += d * t;
            c[l] += t;
        }
    out[0] += total(a[0] + a[1]);
    out[1] += total(b[0] + b[1]);
    out[2] += total(c[0] + c[1]);
    for (; i < n; ++i) {
        const float t = x[i] - k.pivot;
        out[0] += dz[i];
        out[1] += static_cast<double>(dz[i]) * t;
        out[2] += t;
    }
}

// dz -> dx
NITRO_CLONES void finish(const float *x, int64_t n, const Slopes k, float *__restrict dz) {
    for (int64_t i = 0; i < n; ++i) dz[i] = dz[i] * k.slope - k.base - (x[i] - k.pivot) * k.bend;
}

// Sums of dz, dz t, t of a channel -> of dz, dz xhat, xhat.
void sums_of_hats(const Channel &k, int64_t positions, double *dz, double *dots, double *hats) {
    *dots = k.rstd * *dots + k.rest * *dz;
    *hats = k.rstd * *hats + static_cast<double>(k.rest) * positions;
}

// s1 and s2 of a group from its channels' sums [3, n], and what the parameters of these channels get.
void finish_group(const GroupNormSiluBwdParams &p, int64_t b, int64_t g, const double *sums, int64_t n, double *s1,
                  double *s2) {
    const int64_t width = p.channels / p.groups, c0 = g * width;
    const double size = static_cast<double>(width * p.positions), rstd = p.rstd[b * p.groups + g];
    *s1 = *s2 = 0;
    for (int64_t c = 0; c < width; ++c) {
        const double weight = p.weight ? p.weight[c0 + c] : 1.0f;
        *s1 += weight * sums[c] / size;
        *s2 += weight * sums[n + c] / size;
    }
    for (int64_t c = 0; c < width; ++c) {
        const double weight = p.weight ? p.weight[c0 + c] : 1.0f;
        const int64_t at = b * p.channels + c0 + c;
        p.dbias[at] = static_cast<float>(sums[c]);
        p.dweight[at] = static_cast<float>(sums[n + c]);
        p.dshift[at] = static_cast<float>(rstd * (weight * sums[c] - p.positions * *s1 - *s2 * sums[2 * n + c]));
    }
}

// fp32 keeps dz where dx will be; 16-bit storage has no room for it and computes it again.
void backward_group(const GroupNormSiluBwdParams &p, int64_t b, int64_t g) {
    const int64_t width = p.channels / p.groups, c0 = g * width, base = (b * p.channels + c0) * p.positions;
    const float mean = p.mean[b * p.groups + g], rstd = p.rstd[b * p.groups + g];
    float room[BLOCK], dy_room[BLOCK], out[BLOCK];
    std::vector<double> sums(3 * width);
    double s1 = 0, s2 = 0;
    for (int64_t step = 0; step < 2 * width; ++step) {  // the second time backwards: the end is still in the cache
        const bool first = step < width;
        const int64_t r = first ? step : 2 * width - 1 - step;
        if (step == width) finish_group(p, b, g, sums.data(), width, &s1, &s2);
        const Channel k(p, b, c0 + r, mean, rstd);
        const Slopes slopes(k, s1, s2);
        double s[3] = {};
        for (int64_t i = 0; i < p.positions; i += BLOCK) {
            const int64_t at = base + r * p.positions + i, n = std::min(BLOCK, p.positions - i);
            const float *x = read(p.x, p.dtype, at, n, room);
            float *dx = target(p.dx, p.dtype, at, out);
            if (first || p.dtype != NITRO_F32)
                gradient_sums(read(p.dy, p.dtype, at, n, dy_room), x, n, slopes, p.silu, dx, s);
            if (first) continue;
            finish(x, n, slopes, dx);
            write(p.dx, p.dtype, at, n, dx);
        }
        if (!first) continue;
        sums_of_hats(k, p.positions, s, s + 1, s + 2);
        for (int j = 0; j < 3; ++j) sums[j * width + r] = s[j];
    }
}

#include "group_norm_silu_last.inl"

template <class Params, class Group, class Last>
int run(const Params &p, void *out, int threads, Group group, Last last) {
    if (p.dtype < NITRO_F32 || p.dtype > NITRO_BF16) return 1;
    const int64_t size = p.batch * p.channels * p.positions, worth = std::max<int64_t>(1, size >> 16);
    prefer_huge_pages(out, size * (p.dtype == NITRO_F32 ? 4 : 2));
    const int count = static_cast<int>(std::min<int64_t>(worth, threads));
    if (p.last)
        last(p, count);
    else
        parallel(p.batch * p.groups, count, [&](int64_t k) { group(p, k / p.groups, k % p.groups); });
    return 0;
}

}  // namespace

int group_norm_silu_fwd_cpu(const GroupNormSiluFwdParams &p, int threads) {
    return run(p, p.y, threads, forward_group, forward_last);
}

int group_norm_silu_bwd_cpu(const GroupNormSiluBwdParams &p, int threads) {
    return run(p, p.dx, threads, backward_group, backward_last);
}

NITRO_CPU_OP(group_norm_silu_fwd_cpu, GroupNormSiluFwdParams);
NITRO_CPU_OP(group_norm_silu_bwd_cpu, GroupNormSiluBwdParams);
