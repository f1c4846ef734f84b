// Included once per instruction set: a conv 3x3 with stride 1 by Winograd's tiles of 2 lines of W outputs, W 2 or 4, in 8 or
// 6 multiplications per two outputs for 18.
//
// A tile comes from inputs d, 4 lines of W + 2: y = A'((G g G') * (B'd B))A, where * is, at each of the points, a matrix
// product over channels. Along an axis F(2, 3) interpolates at 0, 1, -1 and infinity, F(4, 3) at 0, a, -a, 1/a, -1/a and
// infinity; a = 3/2 keeps rounding low (DESIGN.md, Static plans), which F(4, 3) along both axes would not.
// A task makes the points of its weights: kept ones would be 16 or 24 floats for 9, more to read.

constexpr int64_t kMostTiles = 64;  // of a task
constexpr int64_t kDeep = 64;       // channels at a time: all points take some 1 MB, a common L2 cache

// What changes the values along an axis, in place: 3 weights and W + 2 inputs to points, points to W outputs.
template <int W>
struct Axis;

template <>
struct Axis<2> {
    static inline void weights(vec *g) {
        const vec outer = (g[0] + g[2]) * 0.5f, middle = g[1] * 0.5f;
        g[3] = g[2], g[1] = outer + middle, g[2] = outer - middle;
    }
    static inline void inputs(vec *d) {
        const vec middle = d[1];
        d[0] -= d[2], d[1] += d[2], d[2] -= middle, d[3] = middle - d[3];
    }
    static inline void outputs(vec *m) { m[0] += m[1] + m[2], m[1] -= m[2] + m[3]; }
};

template <>
struct Axis<4> {
    static constexpr double a = 1.5, b = 1 / a, aa = a * a, bb = b * b;
    static constexpr float kA = a, kB = b, kAA = aa, kBB = bb, kAAA = aa * a, kBBB = bb * b, kBoth = aa + bb;
    static constexpr float kFirst = 1 / (2 * aa * (aa - bb)), kSecond = 1 / (2 * bb * (bb - aa));

    static inline void weights(vec *g) {
        const vec first = (g[0] + g[2] * kAA) * kFirst, second = (g[0] + g[2] * kBB) * kSecond;
        const vec odd_first = g[1] * (kA * kFirst), odd_second = g[1] * (kB * kSecond);
        g[5] = g[2], g[1] = first + odd_first, g[2] = first - odd_first;
        g[3] = second + odd_second, g[4] = second - odd_second;
    }
    static inline void inputs(vec *d) {
        const vec first = d[4] - d[2] * kBB, second = d[4] - d[2] * kAA;
        const vec odd_first = d[3] * kA - d[1] * kB, odd_second = d[3] * kB - d[1] * kA;
        d[0] += d[4] - d[2] * kBoth, d[5] += d[1] - d[3] * kBoth;
        d[1] = first + odd_first, d[2] = first - odd_first;
        d[3] = second + odd_second, d[4] = second - odd_second;
    }
    static inline void outputs(vec *m) {
        const vec first = m[1] + m[2], odd_first = m[1] - m[2], second = m[3] + m[4], odd_second = m[3] - m[4];
        m[0] += first + second;
        m[1] = odd_first * kA + odd_second * kB;
        m[2] = first * kAA + second * kBB;
        m[3] = odd_first * kAAA + odd_second * kBBB + m[5];
    }
};

// Changes 4 lines of P values: each of the first `columns` columns, then every line.
template <int P, typename Down, typename Across>
inline void both_ways(vec (&d)[4][P], int columns, Down down, Across across) {
    UNROLL for (int k = 0; k < columns; ++k) {
        vec column[4] = {d[0][k], d[1][k], d[2][k], d[3][k]};
        down(column);
        UNROLL for (int i = 0; i < 4; ++i) d[i][k] = column[i];
    }
    UNROLL for (int i = 0; i < 4; ++i) across(d[i]);
}

// f(index, line, column) of everything in such lines. Two loops: one of 24 would not be unrolled whole.
template <int P, typename F>
inline void each_point(F f) {
    UNROLL for (int i = 0; i < 4; ++i)
        UNROLL for (int j = 0; j < P; ++j) f(i * P + j, i, j);
}

// Points of `count` weights of each tap; taps are `tap` floats apart, points `point`.
template <int W>
void points_of_weights(const float *weights, int64_t tap, int64_t count, float *points, int64_t point) {
    constexpr int P = W + 2;
    for (int64_t i = 0; i < count; i += VECTOR) {
        vec g[4][P] = {};
        UNROLL for (int t = 0; t < 9; ++t) g[t / 3][t % 3] = load(weights + t * tap + i);
        both_ways(g, 3, [](vec *v) { Axis<2>::weights(v); }, [](vec *v) { Axis<W>::weights(v); });
        each_point<P>([&](int k, int y, int x) { store(points + k * point + i, g[y][x]); });
    }
}

// Points of channels [c, c + depth) under the tiles [from, from + count): [tile][channel] every `point` floats.
template <int W>
void points_of_inputs(const Matmul &p, int64_t from, int64_t count, int64_t c, int64_t depth, float *points, int64_t point) {
    constexpr int P = W + 2;
    for (int64_t t = 0; t < count; ++t, points += depth) {
        const int64_t y = (from + t) / (p.line / W) * 2, x = (from + t) % (p.line / W) * W;
        const float *at = p.a + y * p.y_step + x * p.x_step + c;
        for (int64_t i = 0; i < depth; i += VECTOR) {
            vec d[4][P];
            each_point<P>([&](int, int y, int x) { d[y][x] = load(at + y * p.y_tap + x * p.x_tap + i); });
            both_ways(d, P, [](vec *v) { Axis<2>::inputs(v); }, [](vec *v) { Axis<W>::inputs(v); });
            each_point<P>([&](int k, int y, int x) { store(points + k * point + i, d[y][x]); });
        }
    }
}

template <int W>
void conv3_by(const Matmul &p, int64_t task) {
    constexpr int P = W + 2;
    const int64_t tiles = p.rows / (2 * W), blocks = (tiles + p.row_block - 1) / p.row_block;
    const int64_t width = 16 * p.units;
    // Tasks that follow each other read the same part of the map, unless its weights are much the larger part.
    const bool share_map = 2 * p.rows > 9 * p.panels * width;
    const int64_t which = share_map ? task % p.panels : task / blocks;
    const int64_t from = (share_map ? task / p.panels : task % blocks) * p.row_block;
    const int64_t count = smaller(p.row_block, tiles - from), deep = smaller(kDeep, p.channels);
    // A cache line more than is needed: points a power of two apart would share few lines of the caches.
    const int64_t sum = (count + kMostRows) * width + 16, input = count * deep + 16, weight = deep * width + 16;
    float *sums = scratch(4 * P * (sum + input + weight) + 2 * W * width), *inputs = sums + 4 * P * sum;
    float *weights = inputs + 4 * P * input, *out = weights + 4 * P * weight;
    const float *b = p.b + which * 9 * p.channels * width, *rows[kMostTiles + kMostRows];
    for (int64_t c = 0; c < p.channels; c += deep) {
        const int64_t depth = smaller(deep, p.channels - c);
        points_of_inputs<W>(p, from, count, c, depth, inputs, input);
        points_of_weights<W>(b + c * width, p.channels * width, depth * width, weights, weight);
        for (int64_t r = 0; r < count + kMostRows; ++r) rows[r] = inputs + smaller(r, count - 1) * depth;
        for (int64_t k = 0; k < 4 * P; ++k) {
            const int64_t point = k * input;
            multiply(rows, count, &point, 1, depth, weights + k * weight, width, p.units, sums + k * sum, width, c > 0);
        }
    }
    for (int64_t t = 0; t < count; ++t) {
        for (int64_t i = 0; i < width; i += VECTOR) {
            vec m[4][P];
            each_point<P>([&](int k, int y, int x) { m[y][x] = load(sums + k * sum + t * width + i); });
            both_ways(m, P, [](vec *v) { Axis<2>::outputs(v); }, [](vec *v) { Axis<W>::outputs(v); });
            UNROLL for (int k = 0; k < 2 * W; ++k) store(out + k * width + i, m[k / W][k % W]);
        }
        const int64_t row = (from + t) / (p.line / W) * 2 * p.line + (from + t) % (p.line / W) * W;
        for (int64_t k = 0; k < 2 * W; ++k) store_row(p, which, row + k / W * p.line + k % W, out + k * width);
    }
}

void conv3(const Matmul &p, int64_t task) { (p.tile == 4 ? conv3_by<4> : conv3_by<2>)(p, task); }
