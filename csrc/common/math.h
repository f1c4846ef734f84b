// Elementary functions for one float each, free of branches and calls, so that loops over them vectorise.
#pragma once
#include <stdint.h>

#include <cstring>

#define NITRO_INLINE inline __attribute__((always_inline))

namespace nitro {

NITRO_INLINE uint32_t bits_of(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    return bits;
}

NITRO_INLINE float float_of(uint32_t bits) {
    float x;
    std::memcpy(&x, &bits, 4);
    return x;
}

// exp to 1 ulp. Beyond +-87 it stays at its values there: normal numbers. NaN counts as +-87; callers multiply by x.
// The limit is an integer minimum because compilers turn one of floats into branches, and those into masked code.
NITRO_INLINE float exp_of(float x) {
    const uint32_t magnitude = bits_of(x) & 0x7fffffffu, limit = 0x42ae0000u;
    x = float_of((magnitude < limit ? magnitude : limit) | (bits_of(x) & 0x80000000u));
    const float shifted = x * 1.44269504f + 12582912.0f;  // 1.5 * 2^23: the integer nearest x / ln 2 in the low bits
    const float n = shifted - 12582912.0f;
    const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;  // ln 2 in two parts, the first one exact in products
    float p = 1.381446490995586e-3f;
    p = p * r + 8.368780836462975e-3f;
    p = p * r + 4.166839271783829e-2f;
    p = p * r + 1.666665196418762e-1f;
    p = p * r + 4.999999403953552e-1f;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
    return float_of(bits_of(p) + (bits_of(shifted) << 23));  // times 2^n
}

// 1 + exp(-x), x kept within +-87, in fewer steps than exp_of: exp(-x) loses 1e-8 |x| of its value, 1 ulp at 10. NaN
// counts as +-87.
NITRO_INLINE float one_plus_exp_minus(float x) {
    int32_t ordered = static_cast<int32_t>(bits_of(x));
    ordered = ordered < 0x42ae0000 ? ordered : 0x42ae0000;  // as signed integers only the positive floats are in order
    uint32_t bits = static_cast<uint32_t>(ordered);         // as unsigned ones the negative come last
    x = float_of(bits < 0xc2ae0000u ? bits : 0xc2ae0000u);
    const float shifted = 12582912.0f - x * 1.44269504f, n = shifted - 12582912.0f;
    const float r = x * 1.44269504f + n;  // exp(-x) = 2^n 2^-r, |r| <= 1/2: 2^-r to 1e-7
    float p = 9.67151299e-3f - r * 1.32647273e-3f;
    p = 5.55073358e-2f - r * p;
    p = 2.40222424e-1f - r * p;
    p = 6.93147004e-1f - r * p;
    p = 1.0f - r * p;
    return 1.0f + float_of(bits_of(p) + (bits_of(shifted) << 23));
}

// erf to 1 ulp: a polynomial near zero, 1 - exp(polynomial) beyond. Both sides are computed, one is taken.
NITRO_INLINE float erf_of(float x) {
    const uint32_t sign = bits_of(x) & 0x80000000u, magnitude = bits_of(x) & 0x7fffffffu, limit = 0x40800000u;
    const float t = float_of(magnitude), s = x * x;
    float near = -5.96761703e-4f;
    near = near * s + 4.99119423e-3f;
    near = near * s - 2.67681349e-2f;
    near = near * s + 1.12819925e-1f;
    near = near * s - 3.76125336e-1f;
    near = near * s + 1.28379166e-1f;
    near = near * t + t;
    const float u = float_of(magnitude < limit ? magnitude : limit);  // erf(4) rounds to 1
    float far = (-1.72853470e-5f * u + 3.83197126e-4f) * (u * u) + (-3.88396438e-3f * u + 2.42546219e-2f);
    far = far * u - 1.06777877e-1f;
    far = far * u - 6.34846687e-1f;
    far = far * u - 1.28717512e-1f;
    far = 1.0f - exp_of(far * u - u);
    return float_of(bits_of(t > 0.927734375f ? far : near) | sign);
}

}  // namespace nitro
