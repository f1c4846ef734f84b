// x0 = (x_t - sigma eps) / alpha;  x_next = alpha_next x0 + sigma_next noise.  fp32 arithmetic.
#pragma once
#include <stdint.h>

struct RenoiseParams {
    const void *x_t;            // [batch, size], dtype
    const void *eps;            // [batch, size], dtype
    const void *noise;          // [batch, size], dtype
    const float *coefficients;  // [4, batch]: alpha, sigma, alpha_next, sigma_next
    float *x0;                  // [batch, size], fp32
    void *x_next;               // [batch, size], dtype
    int64_t batch;
    int64_t size;               // elements of one image, in one run of memory
    int64_t dtype;              // NitroDtype
};

// Both return 0 or an error code; neither allocates.
int renoise_cpu(const RenoiseParams &p, int threads);
int renoise_cuda(const RenoiseParams &p, void *stream);  // cudaError_t
