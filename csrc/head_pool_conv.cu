// The first convs of all sampled heads: one grouped implicit GEMM on tensor cores, 95 % of a head's arithmetic.
//
// A tile is 128 output positions of an entry by N of its heads' channels; a step is 32 of the 16 C products of each: 8
// channels of x by the 4 columns of one row of the kernel. The steps of all tiles of all entries form one line, and
// every block takes an equal part of it (stream-K): small maps of many channels keep no multiprocessor waiting. A tile
// that several blocks share is added up by the last of them to arrive, always in the order of the line.
//
// fp32 accuracy from TF32: x = hi + lo, two TF32 numbers that keep 22 bits or more, and x y ~ hi hi + hi lo + lo hi,
// off by 2^-21 or less of a product. 16-bit features have no lo. Tensor cores do not round to nearest as they add, so
// they add up one step and fp32 registers the steps; else errors would grow with C instead of its root.
#include "common/cuda.cuh"
#include "common/native.h"
#include "common/tensor_core.cuh"
#include "head_pool.h"

using namespace nitro;

namespace {

constexpr int kThreads = 256;
constexpr int kPositions = 128;  // of a tile
constexpr int kEntries = 32;     // of one launch

struct Entry {
    const void *feature;
    const float *weight;            // [rows, width, channels, 4, 4]
    float *out;                     // [positions, columns]
    int64_t begin;                  // its first step on the line
    int64_t by_image, by_channel;   // strides of the feature
    int64_t by_row, by_column;
    int first_tile, steps;          // steps of one tile
    int channels, height, width, rows;
    int dtype, vectors;             // vectors: four channels are one aligned run of memory
};

struct Work {
    Entry entry[kEntries];
    const int64_t *index;           // [entries, heads]
    float *partial;
    int *arrived;
    int64_t steps, batch;
    int entries, heads, head_width, columns;  // columns: heads * head_width
};
static_assert(sizeof(Work) <= 4096, "what a launch can pass");

struct Tile {
    int entry, index, column;       // index among all tiles; first column
    int64_t begin, end;             // on the line
    int64_t position;               // the first
    int64_t positions;              // of the entry

    template <int N> __device__ static Tile at(const Work &work, int64_t step) {
        Tile tile;
        tile.entry = 0;
        while (tile.entry + 1 < work.entries && work.entry[tile.entry + 1].begin <= step) ++tile.entry;
        const Entry &entry = work.entry[tile.entry];
        const int64_t local = (step - entry.begin) / entry.steps;
        const int across = (work.columns + N - 1) / N;
        tile.begin = entry.begin + local * entry.steps;
        tile.end = tile.begin + entry.steps;
        tile.index = entry.first_tile + int(local);
        tile.position = local / across * kPositions;
        tile.column = int(local % across) * N;
        tile.positions = work.batch * (entry.height / 2) * (entry.width / 2);
        return tile;
    }
};

// Matrices of a step in shared memory, twice: one is multiplied while the next is written.
template <int N> struct Buffer {
    static constexpr int kFeatures = kPositions * kMatrixRow, kWeights = N * kMatrixRow;
    static constexpr int kBytes = 2 * (kFeatures + kWeights);
    char *features[2], *weights[2];  // hi, lo

    __device__ explicit Buffer(char *base)
        : features{base, base + kFeatures}, weights{base + 2 * kFeatures, base + 2 * kFeatures + kWeights} {}
};

__device__ void store_split(char *const (&matrix)[2], int place, const float (&v)[4], bool low) {
    Pack<float, 4> hi, lo;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        hi.v[i] = to_tf32(v[i]);
        lo.v[i] = to_tf32(v[i] - hi.v[i]);
    }
    *reinterpret_cast<Pack<float, 4> *>(matrix[0] + place) = hi;
    if (low) *reinterpret_cast<Pack<float, 4> *>(matrix[1] + place) = lo;
}

// What one thread fetches of a tile: 4 channels by 4 columns at one position, and N / 32 runs of 4 weights.
template <int N, typename T> struct Fetcher {
    const Entry &entry;
    int64_t base;              // offset of the image and the first channel
    int row, column;           // in the map, of the patch's corner; outside of it row is -4
    const float *weight[N / 32];  // of the first channel and kernel row; or null
    T x[4][4];                 // [channel, column]; converted late, when they have arrived
    float w[N / 32][4];

    __device__ int half() const { return threadIdx.x % 2; }          // which 4 of the 8 channels
    __device__ int weight_channel() const { return threadIdx.x % 8; }

    __device__ Fetcher(const Work &work, const Tile &tile) : entry(work.entry[tile.entry]) {
        const int64_t position = tile.position + threadIdx.x / 2;
        const int across = entry.width / 2, down = entry.height / 2;
        const int64_t line = position / across, image = line / down;
        row = position < tile.positions ? 2 * int(line % down) - 1 : -4;
        column = 2 * int(position % across) - 1;
        base = image * entry.by_image + 4 * half() * entry.by_channel;
#pragma unroll
        for (int i = 0; i < N / 32; ++i) {
            const int at = tile.column + threadIdx.x / 8 + 32 * i;
            weight[i] = nullptr;
            if (at >= work.columns) continue;
            const int64_t head = work.index[int64_t(tile.entry) * work.heads + at / work.head_width];
            if (head < 0 || head >= entry.rows) __trap();
            weight[i] = entry.weight + ((head * work.head_width + at % work.head_width) * entry.channels +
                                        weight_channel()) * 16;
        }
    }

    __device__ void load_features(int first, int y) {
        const T *map = static_cast<const T *>(entry.feature) + base + first * entry.by_channel + y * entry.by_row;
        const bool inside = y >= 0 && y < entry.height;
        const int left = entry.channels - first - 4 * half();  // channels there are
#pragma unroll
        for (int k = 0; k < 4; ++k) {
            const bool there = inside && column + k >= 0 && column + k < entry.width;
            const T *pixel = map + (column + k) * entry.by_column;
            if (entry.vectors) {
                Pack<T, 4> pack = {};
                if (there && left > 0) pack = *reinterpret_cast<const Pack<T, 4> *>(pixel);
#pragma unroll
                for (int c = 0; c < 4; ++c) x[c][k] = pack.v[c];
            } else {
#pragma unroll
                for (int c = 0; c < 4; ++c) x[c][k] = there && c < left ? pixel[c * entry.by_channel] : T(0.0f);
            }
        }
    }

    __device__ void load(int step) {
        const int first = step / 4 * 8, y = step % 4;  // channel, row of the kernel
        load_features(first, row + y);
#pragma unroll
        for (int i = 0; i < N / 32; ++i) {
            Pack<float, 4> run = {};
            if (weight[i] && first + weight_channel() < entry.channels)
                run = *reinterpret_cast<const Pack<float, 4> *>(weight[i] + first * 16 + y * 4);
#pragma unroll
            for (int k = 0; k < 4; ++k) w[i][k] = run.v[k];
        }
    }

    template <int PRODUCTS> __device__ void store(const Buffer<N> &to) const {
#pragma unroll
        for (int c = 0; c < 4; ++c) {
            const float v[4] = {to_float(x[c][0]), to_float(x[c][1]), to_float(x[c][2]), to_float(x[c][3])};
            store_split(to.features, place_of(threadIdx.x / 2, 4 * half() + c), v, PRODUCTS == 3);
        }
#pragma unroll
        for (int i = 0; i < N / 32; ++i)
            store_split(to.weights, place_of(threadIdx.x / 8 + 32 * i, weight_channel()), w[i], PRODUCTS > 1);
        publish_matrices();
    }
};

// sums += the steps first to last - 1 of a tile of features T.
template <int N, bool EXACT, typename T>
__device__ void accumulate(const Work &work, const Tile &tile, int first, int last, float (&sums)[N / 2]) {
    constexpr int PRODUCTS = !EXACT ? 1 : sizeof(T) == 4 ? 3 : 2;
    char *shared = dynamic_shared<char>();
    Fetcher<N, T> fetcher(work, tile);
    fetcher.load(first);
    fetcher.template store<PRODUCTS>(Buffer<N>(shared));
    __syncthreads();
    for (int step = first; step < last; ++step) {
        const Buffer<N> now(shared + (step - first) % 2 * Buffer<N>::kBytes);
        const Buffer<N> next(shared + (step - first + 1) % 2 * Buffer<N>::kBytes);
        const bool more = step + 1 < last;
        if (more) fetcher.load(step + 1);
        float fresh[N / 2];
        begin_multiply();
        if (PRODUCTS == 3) multiply<N>(fresh, now.features[1], now.weights[0], false);
        if (PRODUCTS > 1) multiply<N>(fresh, now.features[0], now.weights[1], PRODUCTS == 3);
        multiply<N>(fresh, now.features[0], now.weights[0], PRODUCTS > 1);
        end_multiply();
        if (more) fetcher.template store<PRODUCTS>(next);
        await_multiply<N>(fresh);
#pragma unroll
        for (int i = 0; i < N / 2; ++i) sums[i] += fresh[i];
        __syncthreads();  // next is written, now is read
    }
}

// The block that has a step of the line.
__device__ int64_t owner_of(const Work &work, int64_t step) { return ((step + 1) * gridDim.x - 1) / work.steps; }

// A block shares at most two tiles with others: the one it begins with (0) and one that it is the first to work on (1).
template <int N> __device__ Pack<float, 4> *partial_of(const Work &work, int64_t block, bool is_first) {
    return reinterpret_cast<Pack<float, 4> *>(work.partial) + (2 * block + is_first) * (N / 8) * kThreads + threadIdx.x;
}

// Hands over this block's part of a tile. True for the last block to do so: sums is then the whole.
template <int N> __device__ bool combine(const Work &work, const Tile &tile, float (&sums)[N / 2]) {
    const int64_t first = owner_of(work, tile.begin), last = owner_of(work, tile.end - 1);
    Pack<float, 4> *own = partial_of<N>(work, blockIdx.x, blockIdx.x == first);
#pragma unroll
    for (int i = 0; i < N / 8; ++i)
        own[i * kThreads] = {sums[4 * i], sums[4 * i + 1], sums[4 * i + 2], sums[4 * i + 3]};
    int *is_last = reinterpret_cast<int *>(dynamic_shared<char>() + 2 * Buffer<N>::kBytes);
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) {
        *is_last = atomicAdd(work.arrived + tile.index, 1) == last - first;
        if (*is_last) work.arrived[tile.index] = 0;  // as it was found
    }
    __syncthreads();
    if (!*is_last) return false;
    __threadfence();
#pragma unroll
    for (int i = 0; i < N / 2; ++i) sums[i] = 0;
    for (int64_t block = first; block <= last; ++block) {
        const Pack<float, 4> *part = partial_of<N>(work, block, block == first);
#pragma unroll
        for (int i = 0; i < N / 8; ++i) {
#pragma unroll
            for (int k = 0; k < 4; ++k) sums[4 * i + k] += load_shared_by_blocks(&part[i * kThreads].v[k]);
        }
    }
    return true;
}

template <int N> __device__ void write_tile(const Work &work, const Tile &tile, const float (&sums)[N / 2]) {
    const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
    float *out = work.entry[tile.entry].out;
#pragma unroll
    for (int lower = 0; lower < 2; ++lower) {
        const int64_t position = tile.position + threadIdx.x / 32 * 16 + 8 * lower + g;
        if (position >= tile.positions) continue;
#pragma unroll
        for (int j = 0; j < N / 8; ++j) {
            const int column = tile.column + 8 * j + 2 * t;  // columns come in multiples of 8
            if (column < work.columns)
                *reinterpret_cast<Pack<float, 2> *>(out + position * work.columns + column) = {
                    sums[4 * j + 2 * lower], sums[4 * j + 2 * lower + 1]};
        }
    }
}

// EXACT: fp32 accuracy; otherwise plain TF32.
template <int N, bool EXACT>
__global__ void __launch_bounds__(kThreads) head_pool_conv(const __grid_constant__ Work work) {
    const int64_t begin = work.steps * blockIdx.x / gridDim.x, end = work.steps * (blockIdx.x + 1) / gridDim.x;
    for (int64_t step = begin; step < end;) {
        const Tile tile = Tile::at<N>(work, step);
        const int64_t stop = tile.end < end ? tile.end : end;
        const int first = int(step - tile.begin), last = int(stop - tile.begin);
        float sums[N / 2] = {};
        switch (work.entry[tile.entry].dtype) {
            case NITRO_F32: accumulate<N, EXACT, float>(work, tile, first, last, sums); break;
            case NITRO_F16: accumulate<N, EXACT, __half>(work, tile, first, last, sums); break;
            default: accumulate<N, EXACT, __nv_bfloat16>(work, tile, first, last, sums);
        }
        const bool whole = step == tile.begin && stop == tile.end;
        if (whole || combine<N>(work, tile, sums)) write_tile<N>(work, tile, sums);
        step = stop;
    }
}

Work make_work(const HeadPoolConvParams &p, int64_t from, int64_t to) {
    Work work = {};
    work.index = p.index + from * p.heads;
    work.partial = p.partial;
    work.arrived = p.arrived;
    work.batch = p.batch;
    work.entries = int(to - from);
    work.heads = int(p.heads);
    work.head_width = int(p.head_width);
    work.columns = int(p.heads * p.head_width);
    int tiles = 0;
    for (int64_t e = from; e < to; ++e) {
        const HeadPoolConvEntry &map = p.entry[e];
        const int64_t size = map.dtype == NITRO_F32 ? 4 : 2, area = map.height * map.width;
        Entry &entry = work.entry[e - from];
        entry.feature = p.features[e];
        entry.weight = p.conv[e];
        entry.out = p.out[e];
        entry.begin = work.steps;
        entry.by_image = map.channels * area;
        entry.by_channel = map.channels_last ? 1 : area;
        entry.by_row = map.channels_last ? map.channels * map.width : map.width;
        entry.by_column = map.channels_last ? map.channels : 1;
        entry.first_tile = tiles;
        entry.steps = int((map.channels + 7) / 8 * 4);
        entry.channels = int(map.channels);
        entry.height = int(map.height);
        entry.width = int(map.width);
        entry.rows = int(map.rows);
        entry.dtype = int(map.dtype);
        entry.vectors = map.channels_last && map.channels % 4 == 0 && is_aligned(entry.feature, 4 * size);
        const int64_t down = (p.batch * (map.height / 2) * (map.width / 2) + kPositions - 1) / kPositions;
        const int64_t count = down * ((work.columns + p.tile - 1) / p.tile);
        tiles += int(count);
        work.steps += count * entry.steps;
    }
    return work;
}

template <int N> cudaError_t run(const HeadPoolConvParams &p, cudaStream_t stream) {
    cudaError_t error = cudaSuccess;
    for (int64_t from = 0; from < p.entries && error == cudaSuccess; from += kEntries) {
        const Work work = make_work(p, from, from + kEntries < p.entries ? from + kEntries : p.entries);
        const int64_t blocks = p.blocks < work.steps ? p.blocks : work.steps;
        error = launch(head_pool_conv<N, true>, blocks, kThreads, 2 * Buffer<N>::kBytes + 16, stream, work);
    }
    return error;
}

}  // namespace

int head_pool_conv_cuda(const HeadPoolConvParams &p, void *stream) {
    const auto s = static_cast<cudaStream_t>(stream);
    switch (p.tile) {
        case 64: return run<64>(p, s);
        case 96: return run<96>(p, s);
        case 128: return run<128>(p, s);
    }
    return cudaErrorInvalidValue;
}

NITRO_CUDA_OP(head_pool_conv_cuda, HeadPoolConvParams);
