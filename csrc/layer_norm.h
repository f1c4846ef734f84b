// y = (x - mean) rstd weight + bias, mean and variance over each row.
#pragma once
#include <stdint.h>

struct LayerNormFwdParams {
    const void *x;        // [rows, size], dtype
    const float *weight;  // [size] or null
    const float *bias;    // [size] or null
    void *y;              // [rows, size], dtype
    float *mean;          // [rows]
    float *rstd;          // [rows]
    int64_t rows;
    int64_t size;
    double eps;
    int64_t dtype;  // NitroDtype
};

struct LayerNormBwdParams {
    const void *dy;       // [rows, size], dtype
    const void *x;        // [rows, size], dtype
    const float *weight;  // [size] or null
    const float *mean;    // [rows]
    const float *rstd;    // [rows]
    void *dx;             // [rows, size], dtype
    float *dweight;       // [size]
    float *dbias;         // [size]
    int64_t rows;
    int64_t size;
    int64_t dtype;  // NitroDtype
};

// 0 or an error code.
int layer_norm_fwd_cpu(const LayerNormFwdParams &p, int threads);
int layer_norm_bwd_cpu(const LayerNormBwdParams &p, int threads);
