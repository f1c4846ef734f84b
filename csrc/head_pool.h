// Sampled discriminator heads: [conv 4x4 stride 2 pad 1 -> GroupNorm -> SiLU] repeated -> mean logit.  fp32 arithmetic.
//
// An entry is a feature map and the `heads` rows of its level's stack that read it. Its images are cut into blocks; what
// a block computes is a matrix [heads * width, columns] per layer, a column being one output position of one image.
// nitrokernels/ops/head_pool.py decides the blocks and the offsets (_plan), the native side only follows.
#pragma once
#include <stdint.h>

struct HeadPoolEntry {
    int64_t level, channels, height, width;  // of the feature map
    int64_t dtype;                           // NitroDtype
    int64_t channels_last;                   // memory order of the map: 0 NCHW, 1 NHWC
    int64_t block;                           // images per block
    int64_t lanes;                           // column order: 0 (image, position), 1 (position, image of the block)
    int64_t offset, block_size;              // floats: where its blocks begin in workspace and scratch, size of each
};

struct HeadPoolLevel {
    int64_t first, depth, rows, channels;  // first of its layers in conv, norm_weight, norm_bias; layers; P; C
};

struct HeadPoolParams {
    const void *const *features;      // [entries] of [batch, C_e, H_e, W_e], dtype
    const HeadPoolEntry *entry;       // [entries]
    const HeadPoolLevel *level;       // [levels]
    const int64_t *index;             // [entries, heads]
    const float *const *conv;         // [layers of all levels] of [P, width, C or width, 4, 4]
    const float *const *norm_weight;  // likewise of [P, width]
    const float *const *norm_bias;    // likewise
    const float *const *logit_weight; // [levels] of [P, width]
    const float *const *logit_bias;   // [levels] of [P]
    float *workspace;                 // conv outputs and statistics: written by the forward pass, read by the others
    float *scratch;                   // of the same layout: gradients of the conv outputs, sums per block
    float *logits;                    // forward: [batch, entries * heads]
    const float *grad;                // backward: the gradient of logits
    void *const *out;                 // rows: gradients of conv, norm_weight, norm_bias, logit_weight, logit_bias
                                      // features: [entries], as the maps are laid out
    const int64_t *wanted;            // features: [entries] 0 or 1
    int64_t entries, levels, batch, heads, head_width, groups;
};

// All return 0, or 1 for a row index outside its stack.
int head_pool_cpu(const HeadPoolParams &p, int threads);
int head_pool_rows_cpu(const HeadPoolParams &p, int threads);
int head_pool_features_cpu(const HeadPoolParams &p, int threads);

// The first conv alone, on CUDA: conv 4x4 stride 2 pad 1 of every entry with the rows of its stack that `index` names.
struct HeadPoolConvEntry {
    int64_t channels, height, width, rows;  // of the feature map; P of its stack
    int64_t dtype, channels_last;           // NitroDtype; 0 NCHW, 1 NHWC
};

struct HeadPoolConvParams {
    const int64_t *index;             // [entries, heads], on the device; a row outside its stack stops the kernel
    const void *const *features;      // [entries] of [batch, C_e, H_e, W_e]
    const HeadPoolConvEntry *entry;   // [entries]
    const float *const *conv;         // [entries] of [P, width, C, 4, 4], aligned to 16 bytes: the stacks themselves
    float *const *out;                // [entries] of [batch, H_e / 2, W_e / 2, heads * width]
    float *partial;                   // scratch, 2 blocks 128 tile floats
    int32_t *arrived;                 // [tiles of all entries] zeros, and zeros again afterwards
    int64_t entries, batch, heads, head_width;
    int64_t tile;    // columns of a tile: 64, 96 or 128
    int64_t blocks;  // of the launch: as many as the GPU holds at once
};

int head_pool_conv_cuda(const HeadPoolConvParams &p, void *stream);  // cudaError_t
