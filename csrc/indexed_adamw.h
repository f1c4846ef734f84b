// AdamW on the named rows of several stacked tensors. fp32 arithmetic, in torch.optim.AdamW's order of operations.
#pragma once
#include <stdint.h>

struct IndexedAdamwParams {
    float *const *param;         // one [P, size] per tensor
    const float *const *grad;    // one [P, size] per tensor
    float *const *exp_avg;       // one [P, size] per tensor
    float *const *exp_avg_sq;    // one [P, size] per tensor
    int64_t *const *step;        // one [P] per tensor, incremented
    const int64_t *const *rows;  // one [count] per tensor, no repeats
    const int64_t *shapes;       // [tensors, 3]: P, size, count
    int64_t tensors;
    double lr, beta1, beta2, eps, weight_decay;
};

// Returns 0, or 1 before it writes anything if a row is not in 0 .. P - 1.
int indexed_adamw_cpu(const IndexedAdamwParams &p, int threads);
