// y = a gelu(gate), x = [a, gate] along the last dimension.  gelu(g) = g (1 + erf(g / sqrt 2)) / 2.  fp32 arithmetic.
#pragma once
#include <stdint.h>

struct GegluFwdParams {
    const void *x;  // [rows, 2 * size], dtype
    void *y;        // [rows, size], dtype
    int64_t rows;
    int64_t size;
    int64_t dtype;  // NitroDtype
};

struct GegluBwdParams {
    const void *dy;  // [rows, size], dtype
    const void *x;   // [rows, 2 * size], dtype
    void *dx;        // [rows, 2 * size], dtype
    int64_t rows;
    int64_t size;
    int64_t dtype;  // NitroDtype
};

// 0 or an error code.
int geglu_fwd_cpu(const GegluFwdParams &p, int threads);
int geglu_bwd_cpu(const GegluBwdParams &p, int threads);
