// The CUDA launchers. A group that fits one block's shared memory is read once, by the block that holds it. Larger ones
// take three launches, like the Triton version: moments (or sums) of slices, so that one image fills the machine; their
// merge per group, in fp64 and in a fixed order; and the elementwise rest.
#include "common/cuda.cuh"
#include "common/native.h"
#include "group_norm_silu.h"

using namespace nitro;

namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32;
constexpr int kHolders = 512;  // threads of a block that holds a group
constexpr int kAhead = 4;      // loads a thread has under way

// How a tensor is cut. A pack is V neighbours in memory: positions, or channels if these are innermost. A block takes
// one of `splits` slices of the rows of `columns` neighbouring columns; a row is a pack of positions, or one position.
struct Cut {
    int64_t channels, positions, groups;
    int64_t rows, across;  // packs of a channel, channels; or positions, packs of a position
    int64_t splits;
    int columns;           // a power of two up to 32, so that warps read runs of memory
    float *partial;        // what slices hand over, [3, batch, splits, channels]
    int64_t stride;        // from one of these to the next
};

// Blocks that a multiprocessor should hold, for loads enough under way; eight channels a thread take more registers.
template <int V, bool LAST> constexpr int resident = LAST && V == 8 ? 2 : 3;

__device__ int64_t slice_begin(const Cut &cut, int64_t split) { return cut.rows * split / cut.splits; }

// The packs of one thread: K channels each, the same ones in every pack.
template <int V, bool LAST> struct Lane {
    static constexpr int K = LAST ? V : 1;
    int64_t image, split, channel;  // the first of K
    int64_t at, step, count;        // in elements, in elements, in packs

    __device__ explicit Lane(const Cut &cut) {
        const int64_t blocks = (cut.across + cut.columns - 1) / cut.columns, block = blockIdx.x / cut.splits;
        split = blockIdx.x % cut.splits;
        image = block / blocks;
        const int64_t column = block % blocks * cut.columns + threadIdx.x % cut.columns;
        const int64_t first = slice_begin(cut, split) + threadIdx.x / cut.columns, end = slice_begin(cut, split + 1);
        const int together = kThreads / cut.columns;
        channel = column * K;
        count = column < cut.across && first < end ? (end - first + together - 1) / together : 0;
        step = together * (LAST ? cut.channels : V);
        at = image * cut.channels * cut.positions +
             (LAST ? first * cut.channels + channel : channel * cut.positions + first * V);
    }
};

template <typename T, int V>
__device__ Pack<T, V> load_pack(const void *base, int64_t at) {
    return *reinterpret_cast<const Pack<T, V> *>(static_cast<const T *>(base) + at);
}

template <typename T, int V>
__device__ void store_pack(void *base, int64_t at, const Pack<T, V> &pack) {
    *reinterpret_cast<Pack<T, V> *>(static_cast<T *>(base) + at) = pack;
}

struct Moments {
    float n = 0, mean = 0, m2 = 0;
    __device__ void merge(const Moments &other) {  // Chan
        const float total = n + other.n;
        if (total == 0) return;
        const float share = other.n / total, delta = other.mean - mean;
        mean += delta * share;
        m2 += other.m2 + delta * delta * n * share;
        n = total;
    }
    __device__ Moments across(int mask) const {
        Moments other;
        other.n = from_lane_xor(n, mask);
        other.mean = from_lane_xor(mean, mask);
        other.m2 = from_lane_xor(m2, mask);
        return other;
    }
};

struct Sums {  // of dz, dz xhat, xhat
    float dz = 0, dot = 0, hat = 0;
    __device__ void merge(const Sums &other) {
        dz += other.dz;
        dot += other.dot;
        hat += other.hat;
    }
    __device__ Sums across(int mask) const {
        Sums other;
        other.dz = from_lane_xor(dz, mask);
        other.dot = from_lane_xor(dot, mask);
        other.hat = from_lane_xor(hat, mask);
        return other;
    }
};

// Merges what the threads of a block have of the same channels: thread t < columns * K gets the block's channel t.
template <typename State, int K>
__device__ State merge_block(State (&state)[K], int columns) {
    for (int mask = columns; mask < 32; mask *= 2) {
#pragma unroll
        for (int k = 0; k < K; ++k) state[k].merge(state[k].across(mask));
    }
    State *shared = dynamic_shared<State>();
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, size = columns * K;
    if (lane < columns) {
#pragma unroll
        for (int k = 0; k < K; ++k) shared[warp * size + lane * K + k] = state[k];
    }
    __syncthreads();
    State total;
    if (threadIdx.x < size)
        for (int w = 0; w < kWarps; ++w) total.merge(shared[w * size + threadIdx.x]);
    return total;
}

// Where thread t < columns * K of a block writes what it merged; -1: nowhere.
template <int V, bool LAST>
__device__ int64_t partial_at(const Cut &cut, const Lane<V, LAST> &lane) {
    const int size = cut.columns * lane.K;
    const int64_t blocks = (cut.across + cut.columns - 1) / cut.columns;
    const int64_t channel = blockIdx.x / cut.splits % blocks * size + threadIdx.x;
    if (threadIdx.x >= size || channel >= cut.channels) return -1;
    return (lane.image * cut.splits + lane.split) * cut.channels + channel;
}

// What a channel's numbers are measured from, so that a large mean takes no digits from the rest: its first one.
template <typename T, bool LAST>
__device__ float pivot_of(const GroupNormSiluFwdParams &p, int64_t image, int64_t channel) {
    const int64_t at = image * p.channels * p.positions + channel * (LAST ? 1 : p.positions);
    return to_float(static_cast<const T *>(p.x)[at]);
}

// partial: means of x - pivot, m2s, pivots.
template <typename T, int V, bool LAST>
__global__ void __launch_bounds__(kThreads, (resident<V, LAST>))
group_norm_silu_moments(GroupNormSiluFwdParams p, Cut cut) {
    constexpr int K = Lane<V, LAST>::K;
    const Lane<V, LAST> lane(cut);
    float n = 0, pivot[K] = {}, mean[K] = {}, m2[K] = {};
    if (lane.count > 0) {
#pragma unroll
        for (int k = 0; k < K; ++k) pivot[k] = pivot_of<T, LAST>(p, lane.image, lane.channel + k);
    }
    for (int64_t i = 0; i < lane.count; i += kAhead) {
        const int valid = lane.count - i < kAhead ? int(lane.count - i) : kAhead;
        Pack<T, V> pack[kAhead];
#pragma unroll
        for (int u = 0; u < kAhead; ++u)
            if (u < valid) pack[u] = load_pack<T, V>(p.x, lane.at + (i + u) * lane.step);
        const float size = float(valid * (V / K)), share = size / (n + size);
#pragma unroll
        for (int k = 0; k < K; ++k) {
            float sum = 0, square = 0;
#pragma unroll
            for (int u = 0; u < kAhead; ++u) {
#pragma unroll
                for (int j = k; j < V; j += K) sum += u < valid ? to_float(pack[u].v[j]) - pivot[k] : 0.0f;
            }
            const float own = sum / size;
#pragma unroll
            for (int u = 0; u < kAhead; ++u) {
#pragma unroll
                for (int j = k; j < V; j += K) {
                    const float away = u < valid ? to_float(pack[u].v[j]) - pivot[k] - own : 0.0f;
                    square += away * away;
                }
            }
            const float delta = own - mean[k];
            mean[k] += delta * share;
            m2[k] += square + delta * delta * n * share;
        }
        n += size;
    }
    Moments state[K];
#pragma unroll
    for (int k = 0; k < K; ++k) {
        state[k].n = n;
        state[k].mean = mean[k];
        state[k].m2 = m2[k];
    }
    const Moments total = merge_block(state, cut.columns);
    const int64_t to = partial_at(cut, lane);
    if (to < 0) return;
    cut.partial[to] = total.mean;
    cut.partial[cut.stride + to] = total.m2;
    cut.partial[2 * cut.stride + to] = pivot_of<T, LAST>(p, lane.image, to % cut.channels);
}

// A block per group: the mean first, then m2 around it.
__global__ void __launch_bounds__(kThreads) group_norm_silu_merge(GroupNormSiluFwdParams p, Cut cut) {
    const int64_t width = cut.channels / cut.groups, group = blockIdx.x % cut.groups, image = blockIdx.x / cut.groups;
    const double size = double(width) * cut.positions, per_row = double(cut.positions / cut.rows);
    double centre = 0;
    for (int pass = 0; pass < 2; ++pass) {
        double total = 0;
        for (int64_t i = threadIdx.x; i < width * cut.splits; i += kThreads) {
            const int64_t split = i / width, channel = group * width + i % width;
            const int64_t at = (image * cut.splits + split) * cut.channels + channel;
            const double n = per_row * (slice_begin(cut, split + 1) - slice_begin(cut, split));
            const double shift = p.shift ? p.shift[image * cut.channels + channel] : 0.0f;
            const double away = cut.partial[2 * cut.stride + at] - centre + shift + cut.partial[at];
            total += pass == 0 ? n * away : cut.partial[cut.stride + at] + n * away * away;
        }
        total = block_sum(total) / size;
        if (pass == 0) {
            centre = total;
        } else if (threadIdx.x == 0) {
            p.mean[blockIdx.x] = float(centre);
            p.rstd[blockIdx.x] = float(1.0 / sqrt(total + p.eps));
        }
    }
}

__device__ float silu_of(float z) { return __fdividef(z, 1.0f + __expf(-z)); }

__device__ float silu_slope(float z) {
    const float s = __fdividef(1.0f, 1.0f + __expf(-z));
    return s * (1.0f + z * (1.0f - s));
}

// What K channels of an image are normalised with.
template <int K> struct Scale {
    float centre[K], rstd[K], weight[K], bias[K];  // xhat = (x - centre) rstd, z = weight xhat + bias

    template <typename Params>
    __device__ Scale(const Params &p, int64_t image, int64_t channel) {
        const int64_t width = p.channels / p.groups;
#pragma unroll
        for (int k = 0; k < K; ++k) {
            const int64_t group = image * p.groups + (channel + k) / width;
            const float shift = p.shift ? p.shift[image * p.channels + channel + k] : 0.0f;
            centre[k] = p.mean[group] - shift;
            rstd[k] = p.rstd[group];
            weight[k] = p.weight ? p.weight[channel + k] : 1.0f;
            bias[k] = p.bias ? p.bias[channel + k] : 0.0f;
        }
    }
    __device__ float hat(int k, float x) const { return (x - centre[k]) * rstd[k]; }
    __device__ float z(int k, float hat) const { return hat * weight[k] + bias[k]; }
    __device__ float dz(int k, float hat, float dy, int64_t silu) const {
        return silu ? dy * silu_slope(z(k, hat)) : dy;
    }
};

template <typename T, int V, bool LAST>
__global__ void __launch_bounds__(kThreads, (resident<V, LAST>))
group_norm_silu_apply(GroupNormSiluFwdParams p, Cut cut) {
    constexpr int K = Lane<V, LAST>::K;
    const Lane<V, LAST> lane(cut);
    if (lane.count == 0) return;
    const Scale<K> scale(p, lane.image, lane.channel);
    for (int64_t i = 0; i < lane.count; i += kAhead) {
        Pack<T, V> pack[kAhead];
#pragma unroll
        for (int u = 0; u < kAhead; ++u)
            if (i + u < lane.count) pack[u] = load_pack<T, V>(p.x, lane.at + (i + u) * lane.step);
#pragma unroll
        for (int u = 0; u < kAhead; ++u) {
            if (i + u >= lane.count) break;
#pragma unroll
            for (int j = 0; j < V; ++j) {
                const int k = j % K;
                const float z = scale.z(k, scale.hat(k, to_float(pack[u].v[j])));
                pack[u].v[j] = from_float<T>(p.silu ? silu_of(z) : z);
            }
            store_pack(p.y, lane.at + (i + u) * lane.step, pack[u]);
        }
    }
}

// A group of which one block holds all packs in shared memory.
template <int V, bool LAST> struct Group {
    int width, packs, across, down;  // channels; packs; packs of a position, of a channel
    int64_t image, first, base;      // first channel, offset of the first element
    int64_t channels;

    template <typename Params> __device__ explicit Group(const Params &p) {
        channels = p.channels;
        width = int(channels / p.groups);
        packs = int(width * p.positions / V);
        across = width / V;
        down = int(p.positions / V);
        image = blockIdx.x / p.groups;
        first = blockIdx.x % p.groups * width;
        base = image * channels * p.positions + first * (LAST ? 1 : p.positions);
    }
    __device__ int channel_of(int i) const { return LAST ? i % across * V : i / down; }  // of pack i, in the group
    __device__ int64_t offset_of(int i) const {
        return base + (LAST ? i / across * channels + i % across * V : int64_t(i) * V);
    }
};

// Everything at once.
template <typename T, int V, bool LAST>
__global__ void __launch_bounds__(kHolders, 2) group_norm_silu_hold(GroupNormSiluFwdParams p) {
    const Group<V, LAST> group(p);
    const float *shift = p.shift ? p.shift + group.image * p.channels + group.first : nullptr;
    Pack<T, V> *held = dynamic_shared<Pack<T, V>>();
    const auto value = [&](int i, int j, int channel) {
        return to_float(held[i].v[j]) + (shift ? shift[channel + (LAST ? j : 0)] : 0.0f);
    };

#pragma unroll 4
    for (int i = threadIdx.x; i < group.packs; i += kHolders) held[i] = load_pack<T, V>(p.x, group.offset_of(i));
    float sum = 0, rest = 0, square = 0;  // threads only ever touch the packs they loaded
    for (int i = threadIdx.x; i < group.packs; i += kHolders) {
        const int channel = group.channel_of(i);
#pragma unroll
        for (int j = 0; j < V; ++j) sum += value(i, j, channel);
    }
    const double size = double(group.width) * p.positions;
    const float centre = float(block_sum(sum) / size);
    for (int i = threadIdx.x; i < group.packs; i += kHolders) {
        const int channel = group.channel_of(i);
#pragma unroll
        for (int j = 0; j < V; ++j) {
            const float away = value(i, j, channel) - centre;
            rest += away;  // what rounding a large mean left
            square += away * away;
        }
    }
    const double off = block_sum(rest) / size, variance = block_sum(square) / size - off * off;
    const float mean = float(centre + off), rstd = float(1.0 / sqrt(variance + p.eps));
    if (threadIdx.x == 0) {
        p.mean[blockIdx.x] = mean;
        p.rstd[blockIdx.x] = rstd;
    }
    for (int i = threadIdx.x; i < group.packs; i += kHolders) {
        const int channel = group.channel_of(i);
        Pack<T, V> out;
#pragma unroll
        for (int j = 0; j < V; ++j) {
            const int64_t c = group.first + channel + (LAST ? j : 0);
            const float hat = (value(i, j, channel) - mean) * rstd;
            const float z = hat * (p.weight ? p.weight[c] : 1.0f) + (p.bias ? p.bias[c] : 0.0f);
            out.v[j] = from_float<T>(p.silu ? silu_of(z) : z);
        }
        store_pack(p.y, group.offset_of(i), out);
    }
}

// Backward, everything at once: warps sum channels from shared memory, then every thread has its packs.
template <typename T, int V, bool LAST>
__global__ void __launch_bounds__(kHolders, 2) group_norm_silu_hold_dx(GroupNormSiluBwdParams p) {
    const Group<V, LAST> group(p);
    Pack<T, V> *x = dynamic_shared<Pack<T, V>>(), *dy = x + group.packs;
#pragma unroll 2
    for (int i = threadIdx.x; i < group.packs; i += kHolders) {
        x[i] = load_pack<T, V>(p.x, group.offset_of(i));
        dy[i] = load_pack<T, V>(p.dy, group.offset_of(i));
    }
    __syncthreads();

    const float mean = p.mean[blockIdx.x], rstd = p.rstd[blockIdx.x];
    const int64_t row = group.image * p.channels;
    const auto hat_of = [&](T value, int64_t channel) {
        return (to_float(value) - (mean - (p.shift ? p.shift[row + channel] : 0.0f))) * rstd;
    };
    const auto dz_of = [&](T value, float hat, float weight, int64_t channel) {
        const float z = hat * weight + (p.bias ? p.bias[channel] : 0.0f);
        return to_float(value) * (p.silu ? silu_slope(z) : 1.0f);
    };

    const int lane = threadIdx.x % 32;
    double dzs = 0, dots = 0;
    for (int c = threadIdx.x / 32; c < group.width; c += kHolders / 32) {
        const int64_t channel = group.first + c;
        const float weight = p.weight ? p.weight[channel] : 1.0f;
        Sums sums;
        for (int q = lane; q < p.positions; q += 32) {
            const int at = LAST ? q * group.width + c : int(c * p.positions) + q;
            const float hat = hat_of(x[at / V].v[at % V], channel);
            const float dz = dz_of(dy[at / V].v[at % V], hat, weight, channel);
            sums.dz += dz;
            sums.dot += dz * hat;
            sums.hat += hat;
        }
        for (int mask = 16; mask > 0; mask /= 2) sums.merge(sums.across(mask));
        if (lane != 0) continue;
        p.dbias[row + channel] = sums.dz;
        p.dweight[row + channel] = sums.dot;
        p.dshift[row + channel] = sums.hat;  // for now
        dzs += double(weight) * sums.dz;
        dots += double(weight) * sums.dot;
    }
    const double size = double(group.width) * p.positions;
    const double a = block_sum(dzs) / size, b = block_sum(dots) / size;
    if (lane == 0) {
        for (int c = threadIdx.x / 32; c < group.width; c += kHolders / 32) {
            const int64_t channel = group.first + c, at = row + channel;
            const double weight = p.weight ? p.weight[channel] : 1.0f;
            p.dshift[at] = float(rstd * (weight * p.dbias[at] - p.positions * a - b * p.dshift[at]));
        }
    }

    for (int i = threadIdx.x; i < group.packs; i += kHolders) {
        const int first = group.channel_of(i);
        Pack<T, V> out;
#pragma unroll
        for (int j = 0; j < V; ++j) {
            const int64_t channel = group.first + first + (LAST ? j : 0);
            const float weight = p.weight ? p.weight[channel] : 1.0f, hat = hat_of(x[i].v[j], channel);
            const float dz = dz_of(dy[i].v[j], hat, weight, channel);
            out.v[j] = from_float<T>(rstd * (weight * dz - float(a) - hat * float(b)));
        }
        store_pack(p.dx, group.offset_of(i), out);
    }
}

// each(x, dy, where) for all packs of a lane; some are loaded before the first is used.
template <typename T, int V, bool LAST, typename Each>
__device__ void for_both(const GroupNormSiluBwdParams &p, const Lane<V, LAST> &lane, const Each &each) {
    constexpr int kBoth = kAhead / 2;
    for (int64_t i = 0; i < lane.count; i += kBoth) {
        Pack<T, V> x[kBoth], dy[kBoth];
#pragma unroll
        for (int u = 0; u < kBoth; ++u) {
            if (i + u >= lane.count) break;
            x[u] = load_pack<T, V>(p.x, lane.at + (i + u) * lane.step);
            dy[u] = load_pack<T, V>(p.dy, lane.at + (i + u) * lane.step);
        }
#pragma unroll
        for (int u = 0; u < kBoth; ++u) {
            if (i + u >= lane.count) break;
            each(x[u], dy[u], lane.at + (i + u) * lane.step);
        }
    }
}

// partial: sums of dz, dz xhat and xhat.
template <typename T, int V, bool LAST>
__global__ void __launch_bounds__(kThreads, (resident<V, LAST>))
group_norm_silu_sums(GroupNormSiluBwdParams p, Cut cut) {
    constexpr int K = Lane<V, LAST>::K;
    const Lane<V, LAST> lane(cut);
    Sums state[K];
    if (lane.count > 0) {
        const Scale<K> scale(p, lane.image, lane.channel);
        for_both<T>(p, lane, [&](const Pack<T, V> &x, const Pack<T, V> &dy, int64_t) {
#pragma unroll
            for (int j = 0; j < V; ++j) {
                const int k = j % K;
                const float hat = scale.hat(k, to_float(x.v[j])), dz = scale.dz(k, hat, to_float(dy.v[j]), p.silu);
                state[k].dz += dz;
                state[k].dot += dz * hat;
                state[k].hat += hat;
            }
        });
    }
    const Sums total = merge_block(state, cut.columns);
    const int64_t to = partial_at(cut, lane);
    if (to < 0) return;
    cut.partial[to] = total.dz;
    cut.partial[cut.stride + to] = total.dot;
    cut.partial[2 * cut.stride + to] = total.hat;
}

// A block per group, a warp per channel. means: of weight dz and of weight dz xhat, [2, batch, groups].
__global__ void __launch_bounds__(kThreads) group_norm_silu_finish(GroupNormSiluBwdParams p, Cut cut, float *means) {
    const int64_t width = cut.channels / cut.groups, group = blockIdx.x % cut.groups, image = blockIdx.x / cut.groups;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const auto channel_sum = [&](int which, int64_t channel) {
        double total = 0;
        for (int64_t split = lane; split < cut.splits; split += 32)
            total += cut.partial[which * cut.stride + (image * cut.splits + split) * cut.channels + channel];
        for (int mask = 16; mask > 0; mask /= 2) total += from_lane_xor(total, mask);
        return total;
    };
    double dzs = 0, dots = 0;
    for (int64_t c = warp; c < width; c += kWarps) {
        const int64_t channel = group * width + c, to = image * cut.channels + channel;
        const double weight = p.weight ? p.weight[channel] : 1.0f;
        const double dz = channel_sum(0, channel), dot = channel_sum(1, channel);
        if (lane != 0) continue;
        p.dbias[to] = float(dz);
        p.dweight[to] = float(dot);
        dzs += weight * dz;
        dots += weight * dot;
    }
    const double size = double(width) * cut.positions;
    const double a = block_sum(dzs) / size, b = block_sum(dots) / size;
    if (threadIdx.x == 0) {
        means[blockIdx.x] = float(a);
        means[gridDim.x + blockIdx.x] = float(b);
    }
    for (int64_t c = warp; c < width; c += kWarps) {
        const int64_t channel = group * width + c;
        const double weight = p.weight ? p.weight[channel] : 1.0f;
        const double dz = channel_sum(0, channel), hat = channel_sum(2, channel);
        if (lane == 0)
            p.dshift[image * cut.channels + channel] =
                float(p.rstd[blockIdx.x] * (weight * dz - cut.positions * a - b * hat));
    }
}

template <typename T, int V, bool LAST>
__global__ void __launch_bounds__(kThreads, (resident<V, LAST>))
group_norm_silu_dx(GroupNormSiluBwdParams p, Cut cut, const float *means, int64_t count) {
    constexpr int K = Lane<V, LAST>::K;
    const Lane<V, LAST> lane(cut);
    if (lane.count == 0) return;
    const Scale<K> scale(p, lane.image, lane.channel);
    float a[K], b[K];
#pragma unroll
    for (int k = 0; k < K; ++k) {
        const int64_t group = lane.image * p.groups + (lane.channel + k) / (p.channels / p.groups);
        a[k] = means[group];
        b[k] = means[count + group];
    }
    for_both<T>(p, lane, [&](Pack<T, V> x, const Pack<T, V> &dy, int64_t at) {
#pragma unroll
        for (int j = 0; j < V; ++j) {
            const int k = j % K;
            const float hat = scale.hat(k, to_float(x.v[j])), dz = scale.dz(k, hat, to_float(dy.v[j]), p.silu);
            x.v[j] = from_float<T>(scale.rstd[k] * (scale.weight[k] * dz - a[k] - hat * b[k]));
        }
        store_pack(p.dx, at, x);
    });
}

// The host's part: how to cut, which instance to launch.

// Packs side by side in a warp: at least 128 bytes where there are as many, and no lane idle where 32 or fewer divide.
int columns_for(int64_t across) {
    int columns = 32;
    while (columns > 8 && across % columns != 0) columns /= 2;
    while (columns > 1 && columns / 2 >= across) columns /= 2;
    return columns;
}

template <int V, bool LAST, typename Params>
Cut make_cut(const Params &p, float *partial, int64_t splits) {
    Cut cut = {p.channels, p.positions, p.groups};
    cut.rows = LAST ? p.positions : p.positions / V;
    cut.across = LAST ? p.channels / V : p.channels;
    cut.splits = splits < cut.rows ? splits : cut.rows;
    cut.columns = LAST ? columns_for(cut.across) : 1;
    cut.partial = partial;
    cut.stride = p.batch * cut.splits * p.channels;
    return cut;
}

template <typename Params>
int64_t blocks_of(const Params &p, const Cut &cut) {
    return p.batch * ((cut.across + cut.columns - 1) / cut.columns) * cut.splits;
}

template <typename T, int V, bool LAST>
cudaError_t forward(const GroupNormSiluFwdCudaParams &c, cudaStream_t stream) {
    const GroupNormSiluFwdParams &p = c.op;
    const int64_t groups = p.batch * p.groups;
    if (c.splits == 0) {
        const size_t bytes = p.channels / p.groups * p.positions * sizeof(T);
        return launch(group_norm_silu_hold<T, V, LAST>, groups, kHolders, bytes, stream, p);
    }
    const Cut cut = make_cut<V, LAST>(p, c.partial, c.splits);
    const int64_t blocks = blocks_of(p, cut);
    const size_t shared = kWarps * cut.columns * Lane<V, LAST>::K * sizeof(Moments);
    cudaError_t error = launch(group_norm_silu_moments<T, V, LAST>, blocks, kThreads, shared, stream, p, cut);
    if (error == cudaSuccess) error = launch(group_norm_silu_merge, groups, kThreads, 0, stream, p, cut);
    if (error == cudaSuccess)
        error = launch(group_norm_silu_apply<T, V, LAST>, blocks, kThreads, 0, stream, p, cut);
    return error;
}

template <typename T, int V, bool LAST>
cudaError_t backward(const GroupNormSiluBwdCudaParams &c, cudaStream_t stream) {
    const GroupNormSiluBwdParams &p = c.op;
    const int64_t groups = p.batch * p.groups;
    if (c.splits == 0) {
        const size_t bytes = 2 * (p.channels / p.groups * p.positions * sizeof(T));
        return launch(group_norm_silu_hold_dx<T, V, LAST>, groups, kHolders, bytes, stream, p);
    }
    float *means = c.partial;
    const Cut cut = make_cut<V, LAST>(p, c.partial + 2 * groups, c.splits);
    const int64_t blocks = blocks_of(p, cut);
    const size_t shared = kWarps * cut.columns * Lane<V, LAST>::K * sizeof(Sums);
    cudaError_t error = launch(group_norm_silu_sums<T, V, LAST>, blocks, kThreads, shared, stream, p, cut);
    if (error == cudaSuccess) error = launch(group_norm_silu_finish, groups, kThreads, 0, stream, p, cut, means);
    if (error == cudaSuccess)
        error = launch(group_norm_silu_dx<T, V, LAST>, blocks, kThreads, 0, stream, p, cut,
                       static_cast<const float *>(means), groups);
    return error;
}

template <typename T, int V, bool LAST>
cudaError_t run(const GroupNormSiluFwdCudaParams &c, cudaStream_t stream) {
    return forward<T, V, LAST>(c, stream);
}
template <typename T, int V, bool LAST>
cudaError_t run(const GroupNormSiluBwdCudaParams &c, cudaStream_t stream) {
    return backward<T, V, LAST>(c, stream);
}

template <typename T, typename Params>
cudaError_t choose(const Params &c, bool aligned, cudaStream_t stream) {
    constexpr int V = 16 / sizeof(T);
    const auto &p = c.op;
    const int64_t run_length = !p.last ? p.positions : c.splits ? p.channels : p.channels / p.groups;
    const bool wide = aligned && run_length % V == 0;
    if (p.last) return wide ? run<T, V, true>(c, stream) : run<T, 1, true>(c, stream);
    return wide ? run<T, V, false>(c, stream) : run<T, 1, false>(c, stream);
}

template <typename Params>
int dispatch(const Params &c, bool aligned, void *stream) {
    const auto s = static_cast<cudaStream_t>(stream);
    switch (c.op.dtype) {
        case NITRO_F32: return choose<float>(c, aligned, s);
        case NITRO_F16: return choose<__half>(c, aligned, s);
        case NITRO_BF16: return choose<__nv_bfloat16>(c, aligned, s);
    }
    return cudaErrorInvalidValue;
}

}  // namespace

int group_norm_silu_fwd_cuda(const GroupNormSiluFwdCudaParams &c, void *stream) {
    return dispatch(c, is_aligned(c.op.x, 16) && is_aligned(c.op.y, 16), stream);
}

int group_norm_silu_bwd_cuda(const GroupNormSiluBwdCudaParams &c, void *stream) {
    return dispatch(c, is_aligned(c.op.x, 16) && is_aligned(c.op.dy, 16) && is_aligned(c.op.dx, 16), stream);
}

NITRO_CUDA_OP(group_norm_silu_fwd_cuda, GroupNormSiluFwdCudaParams);
NITRO_CUDA_OP(group_norm_silu_bwd_cuda, GroupNormSiluBwdCudaParams);
