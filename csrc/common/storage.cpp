// Conversions of whole runs, compiled once per instruction set.
#include "storage.h"

#include "float.h"

namespace nitro {

NITRO_CLONES void bf16_to_f32(const uint16_t *__restrict from, float *__restrict to, int64_t n) {
    for (int64_t i = 0; i < n; ++i) to[i] = from_bf16(from[i]);
}

NITRO_CLONES void f32_to_bf16(const float *__restrict from, uint16_t *__restrict to, int64_t n) {
    for (int64_t i = 0; i < n; ++i) to[i] = to_bf16(from[i]);
}

// float.h's fp16 conversions branch; these say the same with selections.
NITRO_CLONES void f16_to_f32(const uint16_t *__restrict from, float *__restrict to, int64_t n) {
    for (int64_t i = 0; i < n; ++i) {
        const uint32_t sign = (from[i] & 0x8000u) << 16, magnitude = from[i] & 0x7fffu;
        const float tiny = static_cast<float>(static_cast<int32_t>(magnitude)) * 5.9604644775390625e-8f;
        uint32_t subnormal;
        std::memcpy(&subnormal, &tiny, 4);
        const uint32_t normal = (magnitude << 13) + (magnitude >= 0x7c00u ? 0x70000000u : 0x38000000u);
        const uint32_t use = 0u - static_cast<uint32_t>(magnitude < 0x400u);  // a mask: no branch to vectorise
        const uint32_t bits = (subnormal & use) | (normal & ~use) | sign;
        float f;
        std::memcpy(&f, &bits, 4);
        to[i] = f;
    }
}

NITRO_CLONES void f32_to_f16(const float *__restrict from, uint16_t *__restrict to, int64_t n) {
    for (int64_t i = 0; i < n; ++i) {
        uint32_t bits;
        std::memcpy(&bits, from + i, 4);
        const uint32_t sign = (bits >> 16) & 0x8000u, magnitude = bits & 0x7fffffffu;
        float small;
        std::memcpy(&small, &magnitude, 4);
        small += 0.5f;  // fp32 addition rounds a subnormal
        uint32_t subnormal;
        std::memcpy(&subnormal, &small, 4);
        uint32_t half = (magnitude + 0xfffu + ((magnitude >> 13) & 1u) - 0x38000000u) >> 13;
        half = magnitude < 0x38800000u ? subnormal - 0x3f000000u : half;
        half = magnitude >= 0x477ff000u ? 0x7c00u : half;
        half = magnitude > 0x7f800000u ? 0x7e00u : half;
        to[i] = static_cast<uint16_t>(half | sign);
    }
}

}  // namespace nitro
