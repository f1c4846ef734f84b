// Named rows of a stacked tensor from a Philox-4x32-10 stream of (seed, row, element); their optimizer state to zero.
#pragma once
#include <stdint.h>

struct RefreshRowsParams {
    float *param;         // [P, size]
    float *exp_avg;       // [P, size] or null
    float *exp_avg_sq;    // [P, size] or null
    int64_t *step;        // [P] or null
    const int64_t *rows;  // [count], in range, no repeats
    int64_t count;
    int64_t size;         // elements of one row
    int64_t seed;         // the key; the counter is (element / 4, row)
    double low, high;     // both exact in fp32
    double span;          // high - low, rounded to fp32
};

// Returns 0; does not allocate.
int refresh_rows_cpu(const RefreshRowsParams &p, int threads);
