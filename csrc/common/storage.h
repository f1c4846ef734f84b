// Tensors of any storage type as runs of fp32: ops compute on floats only, and fp32 storage is used in place.
#pragma once
#include <stdint.h>

#include "common/native.h"

namespace nitro {

void bf16_to_f32(const uint16_t *from, float *to, int64_t n);
void f16_to_f32(const uint16_t *from, float *to, int64_t n);
void f32_to_bf16(const float *from, uint16_t *to, int64_t n);
void f32_to_f16(const float *from, uint16_t *to, int64_t n);

// Elements [at, at + n) of `base`: themselves, or converted into `room`.
inline const float *read(const void *base, int64_t dtype, int64_t at, int64_t n, float *room) {
    if (dtype == NITRO_F32) return static_cast<const float *>(base) + at;
    (dtype == NITRO_BF16 ? bf16_to_f32 : f16_to_f32)(static_cast<const uint16_t *>(base) + at, room, n);
    return room;
}

// Where to compute elements that `write` then stores: their own place, or `room`.
inline float *target(void *base, int64_t dtype, int64_t at, float *room) {
    return dtype == NITRO_F32 ? static_cast<float *>(base) + at : room;
}

inline void write(void *base, int64_t dtype, int64_t at, int64_t n, const float *room) {
    if (dtype == NITRO_F32) return;
    (dtype == NITRO_BF16 ? f32_to_bf16 : f32_to_f16)(room, static_cast<uint16_t *>(base) + at, n);
}

}  // namespace nitro
