// The CPU launcher: all named rows of all tensors are one run of elements, split evenly over threads.
#include "indexed_adamw.h"

#include <algorithm>
#include <cmath>

#include "common/float.h"
#include "common/native.h"

// No fused multiply-adds but the two written below: PyTorch's kernels round everything else separately.
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC optimize("fp-contract=off")
#endif

using namespace nitro;

namespace {

struct Shape {
    int64_t stack, size, count;
};

// What a step needs besides the moments, as PyTorch rounds it: scalars in double, then to float once.
struct Scalars {
    float decay, weight, beta2, weight_sq, eps;  // the same for every row
    float rate, root;                            // -lr / (1 - beta1^n) and sqrt(1 - beta2^n) of a row's own step n
};

NITRO_CLONES void update(float *__restrict p, const float *__restrict g, float *__restrict m, float *__restrict v,
                         int64_t size, Scalars s) {
    const bool small = __builtin_fabsf(s.weight) < 0.5f;  // torch.lerp starts from the nearer end
    const float weight = small ? s.weight : s.weight - 1.0f;
    for (int64_t i = 0; i < size; ++i) {
        const float gi = g[i], mi = m[i];
        const float average = __builtin_fmaf(weight, gi - mi, small ? mi : gi);
        const float square = __builtin_fmaf(s.weight_sq * gi, gi, v[i] * s.beta2);
        const float denominator = __builtin_sqrtf(square) / s.root + s.eps;
        m[i] = average;
        v[i] = square;
        p[i] = p[i] * s.decay + (s.rate * average) / denominator;
    }
}

// Elements begin .. end - 1 of all named rows laid end to end.
void run_piece(const IndexedAdamwParams &p, const Shape *shapes, int64_t begin, int64_t end) {
    Scalars s;
    s.decay = static_cast<float>(1 - p.lr * p.weight_decay);
    s.weight = static_cast<float>(1 - p.beta1);
    s.beta2 = static_cast<float>(p.beta2);
    s.weight_sq = static_cast<float>(1 - p.beta2);
    s.eps = static_cast<float>(p.eps);
    int64_t start = 0, known = -1;  // first element of the tensor; the step the row scalars are of
    for (int64_t t = 0; t < p.tensors && start < end; ++t) {
        const int64_t size = shapes[t].size, length = size * shapes[t].count;
        if (length > 0 && begin < start + length) {
            for (int64_t j = std::max<int64_t>(0, begin - start) / size; j < shapes[t].count; ++j) {
                const int64_t from = std::max<int64_t>(0, begin - start - j * size);
                const int64_t to = std::min(size, end - start - j * size);
                if (from >= to) break;
                const int64_t row = p.rows[t][j], at = row * size + from, n = p.step[t][row];
                if (n != known) {
                    known = n;
                    s.rate = static_cast<float>(-(p.lr / (1 - std::pow(p.beta1, static_cast<double>(n)))));
                    s.root = static_cast<float>(std::pow(1 - std::pow(p.beta2, static_cast<double>(n)), 0.5));
                }
                update(p.param[t] + at, p.grad[t] + at, p.exp_avg[t] + at, p.exp_avg_sq[t] + at, to - from, s);
            }
        }
        start += length;
    }
}

}  // namespace

int indexed_adamw_cpu(const IndexedAdamwParams &p, int threads) {
    const Shape *shapes = reinterpret_cast<const Shape *>(p.shapes);
    int64_t total = 0;
    for (int64_t t = 0; t < p.tensors; ++t) {
        total += shapes[t].size * shapes[t].count;
        for (int64_t j = 0; j < shapes[t].count; ++j)
            if (p.rows[t][j] < 0 || p.rows[t][j] >= shapes[t].stack) return 1;
    }
    for (int64_t t = 0; t < p.tensors; ++t)
        for (int64_t j = 0; j < shapes[t].count; ++j) ++p.step[t][p.rows[t][j]];
    const int64_t worth = total >> 16;  // a thread costs about what 64 k elements do
    const int64_t count = std::max<int64_t>(1, std::min(worth, static_cast<int64_t>(threads)));
    nitro::parallel(count, static_cast<int>(count),
                    [&](int64_t k) { run_piece(p, shapes, total * k / count, total * (k + 1) / count); });
    return 0;
}

NITRO_CPU_OP(indexed_adamw_cpu, IndexedAdamwParams);
