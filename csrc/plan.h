// A plan: instructions over fixed addresses, run by one native call. See nitrokernels/plan.py, which writes them.
//
// Maps are rows of channels (NHWC), one image at a time. Each instruction splits into tasks that write disjoint parts of
// its output and sum in an order of their own, so results do not depend on the number of threads.
#pragma once
#include <stdint.h>

struct PlanParams {
    const int64_t *code;  // [count, kPlanWords]
    int64_t first, last;  // instructions to run
};

namespace nitro::plan {

constexpr int64_t kPlanWords = 24;

enum Kind { kMatmul = 0, kNorm = 1, kMap = 2, kLayerNorm = 3, kKeys = 4, kAttention = 5, kCombine = 6, kConv3 = 7, kLevels = 8 };
enum Activation { kNone = 0, kSilu = 1, kGelu = 2, kQuickGelu = 3, kGeglu = 4, kRelu = 5 };

// c[row, n] = act(sum over taps and channels of a[row + tap, channel] * b[tap, channel, n] + bias[n]) + residual[row, n]:
// a linear layer (one tap) or a conv over a padded map (kernel * kernel taps). kConv3 is the same for kernel 3, stride 1, an
// even number of lines, channels in 16s; its `row_block` counts tiles of 2 lines of `tile` outputs, at most 64.
struct Matmul {
    int64_t kind, tasks;
    const float *a;
    int64_t rows, line, x_step, y_step;  // output row r reads from a + r / line * y_step + r % line * x_step
    int64_t kernel, x_tap, y_tap, channels;
    const float *b;  // [panels, kernel * kernel * channels, 16 * units]; for GEGLU a panel is 16 values, then 16 gates
    int64_t units, panels;
    const float *bias;  // [panels * 16 * units] or null
    const float *residual;
    int64_t residual_step;
    float *c;
    int64_t c_step, columns, activation;
    int64_t row_block;  // a task is this many rows of one panel
    int64_t tile;       // 2 or 4, a divisor of `line`; read by kConv3 only
};

// scale[c], shift[c] such that group_norm(x)[row, c] = x[row, c] * scale[c] + shift[c].
struct Norm {
    int64_t kind, tasks;
    const float *x;
    int64_t x_step, rows, channels, groups;
    double eps;
    const float *weight, *bias;
    float *scale, *shift;
};

// out[y, x] = act(in[y / zoom, x / zoom] * scale + shift); with a border of zeros around it if `border`. With a scale, act
// is SiLU or nothing.
struct Map {
    int64_t kind, tasks;
    const float *x;
    int64_t x_step, height, width, channels, zoom;  // of the output
    const float *scale, *shift;                     // [channels] or null
    int64_t activation;
    float *out;  // first element inside the border
    int64_t out_x, out_y, border;
};

struct LayerNorm {
    int64_t kind, tasks;
    const float *x;
    int64_t x_step, rows, channels;
    double eps;
    const float *weight, *bias;
    float *out;
    int64_t out_step;
};

// Keys [keys, heads * dim] become [heads, panels of 64, dim, 64], values [heads, keys, dim16]; both padded with zeros.
struct Keys {
    int64_t kind, tasks;
    const float *k, *v;
    int64_t k_step, v_step, keys, heads, dim;
    float *packed_k, *packed_v;
};

struct Attention {
    int64_t kind, tasks;
    const float *q;
    int64_t q_step, rows;
    const float *packed_k, *packed_v;
    int64_t keys, heads, dim;
    double scale;
    int64_t causal;
    float *out;
    int64_t out_step, row_block;
};

// A positive and a negative prompt's attention [rows, channels], as nitrokernels/ops/nag_combine.py defines it.
struct Combine {
    int64_t kind, tasks;
    const float *positive, *negative;
    int64_t rows, channels;
    const float *how;  // scale, tau, alpha, keep: read when the plan runs
    float *out;
};

// out[i] = the level 0 .. 255 of a value, clamped to [-1, 1], halves to even; wrong[task] = how many are NaN.
struct Levels {
    int64_t kind, tasks;
    const float *x;
    int64_t count;
    uint8_t *out;
    float *wrong;
};

// Working memory of the calling thread, 64-byte aligned; the next call takes it back.
float *scratch(int64_t floats);

// What each instruction set provides.
struct Kernels {
    void (*matmul)(const Matmul &, int64_t task);
    void (*norm)(const Norm &, int64_t task);
    void (*map)(const Map &, int64_t task);
    void (*layer_norm)(const LayerNorm &, int64_t task);
    void (*keys)(const Keys &, int64_t task);
    void (*attention)(const Attention &, int64_t task);
    void (*combine)(const Combine &, int64_t task);
    void (*conv3)(const Matmul &, int64_t task);
    void (*levels)(const Levels &, int64_t task);
};

extern const Kernels kernels_base;
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
extern const Kernels kernels_avx2, kernels_avx512;
#endif

}  // namespace nitro::plan
