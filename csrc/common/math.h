// Elementary functions for one float each, free of branches and calls, so that loops over them vectorise.
#pragma once
#include <stdint.h>

#include <cstring>

#define NITRO_INLINE inline __attribute__((always_inline))

namespace nitro {

// exp to 1 ulp. Below -87 and above 88 it stays at their values: normal numbers, finite.
NITRO_INLINE float exp_of(float x) {
    x = x > 88.0f ? 88.0f : x;
    x = x < -87.0f ? -87.0f : x;
    const float shifted = x * 1.44269504f + 12582912.0f;  // 1.5 * 2^23: the integer nearest x / ln 2 in the low bits
    const float n = shifted - 12582912.0f;
    const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;  // ln 2 in two parts, the first one exact in products
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * (r * r) + r + 1.0f;
    uint32_t bits;
    std::memcpy(&bits, &shifted, 4);
    bits = (bits - 0x4b400000u + 127u) << 23;
    float power;
    std::memcpy(&power, &bits, 4);
    return p * power;
}

NITRO_INLINE float sigmoid_of(float x) { return 1.0f / (1.0f + exp_of(-x)); }

// erf to 1 ulp: a polynomial near zero, 1 - exp(polynomial) beyond. Both sides are computed, one is taken.
NITRO_INLINE float erf_of(float x) {
    const float s = x * x, t = x < 0.0f ? -x : x;
    float near = -5.96761703e-4f;
    near = near * s + 4.99119423e-3f;
    near = near * s - 2.67681349e-2f;
    near = near * s + 1.12819925e-1f;
    near = near * s - 3.76125336e-1f;
    near = near * s + 1.28379166e-1f;
    near = near * t + t;
    const float capped = t > 4.0f ? 4.0f : t;  // erf(4) rounds to 1
    float far = -1.72853470e-5f * capped + 3.83197126e-4f;
    far = far * (capped * capped) + (-3.88396438e-3f * capped + 2.42546219e-2f);
    far = far * capped - 1.06777877e-1f;
    far = far * capped - 6.34846687e-1f;
    far = far * capped - 1.28717512e-1f;
    far = far * capped - capped;
    far = 1.0f - exp_of(far);
    const float size = t > 0.927734375f ? far : near;
    return x < 0.0f ? -size : (x != x ? x : size);
}

}  // namespace nitro
