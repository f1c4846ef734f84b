// y = silu((x + shift - mean) rstd weight + bias), mean and variance over each group of channels of an image.
#pragma once
#include <stdint.h>

struct GroupNormSiluFwdParams {
    const void *x;        // [batch, channels, positions] or, last, [batch, positions, channels]; dtype
    const float *weight;  // [channels] or null
    const float *bias;    // [channels] or null
    const float *shift;   // [batch, channels] or null
    void *y;              // like x
    float *mean;          // [batch, groups], of x + shift
    float *rstd;          // [batch, groups]
    int64_t batch;
    int64_t channels;
    int64_t positions;
    int64_t groups;
    double eps;
    int64_t silu;   // 0 or 1
    int64_t last;   // 1: channels are innermost in memory
    int64_t dtype;  // NitroDtype
};

struct GroupNormSiluBwdParams {
    const void *dy;       // like x
    const void *x;        // [batch, channels, positions] or, last, [batch, positions, channels]; dtype
    const float *weight;  // [channels] or null
    const float *bias;    // [channels] or null
    const float *shift;   // [batch, channels] or null
    const float *mean;    // [batch, groups]
    const float *rstd;    // [batch, groups]
    void *dx;             // like x
    float *dweight;       // [batch, channels], to be summed over the batch
    float *dbias;         // [batch, channels], to be summed over the batch
    float *dshift;        // [batch, channels]
    int64_t batch;
    int64_t channels;
    int64_t positions;
    int64_t groups;
    int64_t silu;   // 0 or 1
    int64_t last;   // 1: channels are innermost in memory
    int64_t dtype;  // NitroDtype
};

// 0 or an error code.
int group_norm_silu_fwd_cpu(const GroupNormSiluFwdParams &p, int threads);
int group_norm_silu_bwd_cpu(const GroupNormSiluBwdParams &p, int threads);

// CUDA: splits 0 keeps a group in one block's shared memory, 96 KiB at most (x; or x and dy). Otherwise each channel's
// positions are cut into at most `splits` slices, and `partial` is scratch of 3 batch splits channels + 2 batch groups
// floats.
struct GroupNormSiluFwdCudaParams {
    GroupNormSiluFwdParams op;
    float *partial;
    int64_t splits;
};

struct GroupNormSiluBwdCudaParams {
    GroupNormSiluBwdParams op;
    float *partial;
    int64_t splits;
};

// cudaError_t.
int group_norm_silu_fwd_cuda(const GroupNormSiluFwdCudaParams &p, void *stream);
int group_norm_silu_bwd_cuda(const GroupNormSiluBwdCudaParams &p, void *stream);
