// Included once per instruction set: a conv 3x3 with stride 1 by Winograd's F(2x2, 3x3), 16 multiplications for 36.
//
// A tile of 2x2 outputs comes from 4x4 inputs d: y = A'((G g G') * (B'd B))A, where * is, at each of 16 points, a matrix
// product over channels. Along either axis
//     G g = (g0, (g0 + g1 + g2) / 2, (g0 - g1 + g2) / 2, g2)    B'd = (d0 - d2, d1 + d2, d2 - d1, d1 - d3)
//     A'm = (m0 + m1 + m2, m1 - m2 - m3)
// A task makes the points of its weights: kept ones would be 16 floats for 9, more to read.

constexpr int64_t kMostTiles = 64;  // of a task
constexpr int64_t kDeep = 64;       // channels at a time, so that all points stay in an L2 cache of 1 MB

// f changes four values: those of each column, then those of each row.
template <typename F>
inline void both_ways(vec (&d)[4][4], F f) {
    UNROLL for (int k = 0; k < 4; ++k) f(d[0][k], d[1][k], d[2][k], d[3][k]);
    UNROLL for (int k = 0; k < 4; ++k) f(d[k][0], d[k][1], d[k][2], d[k][3]);
}

// Points of `count` weights of each tap; taps are `tap` floats apart, points `point`.
void points_of_weights(const float *weights, int64_t tap, int64_t count, float *points, int64_t point) {
    for (int64_t i = 0; i < count; i += VECTOR) {
        vec g[4][4] = {};
        UNROLL for (int t = 0; t < 9; ++t) g[t / 3][t % 3] = load(weights + t * tap + i);
        both_ways(g, [](vec &a, vec &b, vec &c, vec &d) {
            const vec outer = (a + c) * 0.5f, middle = b * 0.5f;
            d = c, b = outer + middle, c = outer - middle;
        });
        UNROLL for (int k = 0; k < 16; ++k) store(points + k * point + i, g[k / 4][k % 4]);
    }
}

// Points of channels [c, c + depth) under the tiles [from, from + count): [tile][channel] every `point` floats.
void points_of_inputs(const Matmul &p, int64_t from, int64_t count, int64_t c, int64_t depth, float *points, int64_t point) {
    for (int64_t t = 0; t < count; ++t, points += depth) {
        const int64_t y = (from + t) / (p.line / 2) * 2, x = (from + t) % (p.line / 2) * 2;
        const float *at = p.a + y * p.y_step + x * p.x_step + c;
        for (int64_t i = 0; i < depth; i += VECTOR) {
            vec d[4][4];
            UNROLL for (int k = 0; k < 16; ++k) d[k / 4][k % 4] = load(at + k / 4 * p.y_tap + k % 4 * p.x_tap + i);
            both_ways(d, [](vec &a, vec &b, vec &c, vec &d) {
                const vec middle = b;
                a -= c, b += c, c -= middle, d = middle - d;
            });
            UNROLL for (int k = 0; k < 16; ++k) store(points + k * point + i, d[k / 4][k % 4]);
        }
    }
}

void conv3(const Matmul &p, int64_t task) {
    const int64_t tiles = p.rows / 4, blocks = (tiles + p.row_block - 1) / p.row_block, which = task / blocks;
    const int64_t from = task % blocks * p.row_block, count = smaller(p.row_block, tiles - from);
    const int64_t width = 16 * p.units, deep = smaller(kDeep, p.channels);
    // A cache line more than is needed: points a power of two apart would share few lines of the caches.
    const int64_t sum = (count + kMostRows) * width + 16, input = count * deep + 16, weight = deep * width + 16;
    float *sums = scratch(16 * (sum + input + weight) + 4 * width), *inputs = sums + 16 * sum;
    float *weights = inputs + 16 * input, *out = weights + 16 * weight;
    const float *b = p.b + which * 9 * p.channels * width, *rows[kMostTiles + kMostRows];
    for (int64_t c = 0; c < p.channels; c += deep) {
        const int64_t depth = smaller(deep, p.channels - c);
        points_of_inputs(p, from, count, c, depth, inputs, input);
        points_of_weights(b + c * width, p.channels * width, depth * width, weights, weight);
        for (int64_t r = 0; r < count + kMostRows; ++r) rows[r] = inputs + smaller(r, count - 1) * depth;
        for (int64_t k = 0; k < 16; ++k) {
            const int64_t point = k * input;
            multiply(rows, count, &point, 1, depth, weights + k * weight, width, p.units, sums + k * sum, width, c > 0);
        }
    }
    for (int64_t t = 0; t < count; ++t) {
        for (int64_t i = 0; i < width; i += VECTOR) {
            vec m[4][4];
            UNROLL for (int k = 0; k < 16; ++k) m[k / 4][k % 4] = load(sums + k * sum + t * width + i);
            both_ways(m, [](vec &a, vec &b, vec &c, vec &d) { a += b + c, b -= c + d; });
            UNROLL for (int k = 0; k < 4; ++k) store(out + k * width + i, m[k / 2][k % 2]);
        }
        const int64_t row = (from + t) / (p.line / 2) * 2 * p.line + (from + t) % (p.line / 2) * 2;
        for (int64_t k = 0; k < 4; ++k) store_row(p, which, row + k / 2 * p.line + k % 2, out + k * width);
    }
}
