// What one task of head_pool works on, and the functions each instruction set provides.
#pragma once
#include <stddef.h>

#include "head_pool.h"

namespace nitro::head_pool {

constexpr int64_t kLanes = 16;  // columns come in runs of 16, whatever the vector width

inline int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }
inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// Working memory of a function: taken from a stack that each thread keeps, given back when the Arena goes.
class Arena {
  public:
    Arena();
    ~Arena();
    Arena(const Arena &) = delete;
    float *floats(int64_t count);  // 64-byte aligned, with 64 bytes to spare behind them

  private:
    size_t chunk_, offset_;  // where the stack stood
};

// The columns of a block: which of them is position `at` of image b.
struct Columns {
    int64_t images, block, area, lanes;
    int64_t count() const { return lanes ? area * block : round_up(block * area, kLanes); }
    int64_t at(int64_t b, int64_t position) const { return lanes ? position * block + b : b * area + position; }
};

// Element (image, channel, y, x) of a map in memory.
struct View {
    void *data;
    int64_t dtype, image, channel, y, x;  // strides in elements
};

// One block of images of one entry.
struct Block {
    const HeadPoolParams *p;
    int64_t entry, first_image, images;
    float *y, *dy;  // its part of workspace and of scratch

    const HeadPoolEntry &e() const { return p->entry[entry]; }
    const HeadPoolLevel &level() const { return p->level[e().level]; }
    int64_t row(int64_t head) const { return p->index[entry * p->heads + head]; }
    int64_t height(int64_t layer) const { return e().height >> layer; }  // of the layer's input
    int64_t width(int64_t layer) const { return e().width >> layer; }
    int64_t channels(int64_t layer) const { return layer == 0 ? e().channels : p->head_width; }
    int64_t outputs() const { return p->heads * p->head_width; }
    Columns columns(int64_t layer) const {
        return {images, e().block, height(layer + 1) * width(layer + 1), e().lanes};
    }
    // Inside a block: the matrices [outputs, columns] of all layers, then [2, layers, heads * groups, block] (mean and
    // reciprocal deviation; workspace), then [2, layers, outputs] and [outputs] (sums over the block for the gradients of
    // norm_weight, norm_bias and logit_weight; scratch).
    int64_t matrix(int64_t layer) const {
        int64_t at = 0;
        for (int64_t l = 0; l < layer; ++l) at += outputs() * columns(l).count();
        return at;
    }
    int64_t statistic(int64_t which, int64_t layer, int64_t head) const {
        const int64_t depth = level().depth;
        return matrix(depth) + ((which * depth + layer) * p->heads + head) * p->groups * e().block;
    }
    int64_t sum(int64_t which, int64_t layer, int64_t head) const {
        const int64_t depth = level().depth;
        return statistic(2, 0, 0) + ((which * depth + layer) * p->heads + head) * p->head_width;
    }
    const float *conv(int64_t layer, int64_t head) const {
        return p->conv[level().first + layer] + row(head) * p->head_width * channels(layer) * 16;
    }
    View feature(void *data) const {
        const int64_t c = e().channels, h = e().height, w = e().width;
        const int64_t bytes = e().dtype == 0 ? 4 : 2;
        void *first = static_cast<char *>(data) + first_image * c * h * w * bytes;
        if (e().channels_last) return {first, e().dtype, c * h * w, 1, w * c, c};
        return {first, e().dtype, c * h * w, h * w, w, 1};
    }
    // A matrix row per channel, as the map that the next layer reads.
    View activation(float *matrix, int64_t layer) const {
        const Columns c = columns(layer);
        const int64_t w = width(layer + 1);
        if (c.lanes) return {matrix, 0, 1, c.count(), w * c.block, c.block};
        return {matrix, 0, c.area, c.count(), w, 1};
    }
};

struct Kernels {
    void (*forward)(const Block &block, int64_t head, int64_t head_end);
    void (*backward)(const Block &block, int64_t head, int64_t head_end);  // fills block.dy
    // Gradient of the layer's weights for input channels c .. c_end, over all blocks of one entry; `first` says for each
    // head whether to write or to add.
    void (*weights)(const Block *blocks, int64_t count, int64_t layer, int64_t c, int64_t c_end, float *out,
                    const bool *first);
    void (*features)(const Block &block, int64_t c, int64_t c_end);
};

extern const Kernels kernels_base, kernels_avx2, kernels_avx512;

}  // namespace nitro::head_pool
