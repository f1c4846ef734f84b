// Included once per instruction set: the same convs in 9 multiplications for 16, or 15 for 32, where columns are enough.
//
// Over the four phases of its padded input, the parities of y and x, a conv 4x4 stride 2 is four of 2x2 stride 1, and
// Winograd's F(2xW, 2x2) makes a tile of 2 lines of W outputs out of 3 lines of W + 1 inputs d by one product per phase and
// point, 3 (W + 1) of them, and only additions and a few scales:
//     y = narrow(widen(g) * differ(d))    dg = narrow(widen(dy) * differ(d))    dd = differ^T(widen(g) * widen(dy))
// Each of the points is a matrix product, so the transforms stand outside of it and cost little. They work on 16 floats side
// by side: 16 images with lanes, 16 channels without, and those are transposed to stand in rows of columns.

// Along an axis, between W outputs, 2 weights or W + 1 inputs and the W + 1 points, in place: widen goes from outputs or
// weights to points, narrow from points to outputs or weights, differ from inputs to points, differ_back is its transpose.
template <int W>
struct Axis;

template <>
struct Axis<2> {  // points 0, -1 and infinity
    static inline void widen(vec *g) { g[2] = g[1], g[1] = g[0] + g[1]; }
    static inline void narrow(vec *m) { m[0] += m[1], m[1] += m[2]; }
    static inline void differ(vec *d) { d[0] -= d[1], d[2] -= d[1]; }
    static inline void differ_back(vec *m) { m[1] = m[1] - m[0] - m[2]; }
    static inline void widen_weights(vec *g) { widen(g); }
    static inline void narrow_weights(vec *m) { narrow(m); }
};

template <>
struct Axis<4> {  // points a, -a, b, -b and infinity: rounding grows by 1.68, with Axis<2> by 1.41 (as in DESIGN.md)
    static constexpr float a = 1.25f, b = 0.375f, aa = a * a, bb = b * b, all = aa + bb, both = aa * bb;
    static constexpr float kFirst = 1 / (2 * a * (aa - bb)), kSecond = -1 / (2 * b * (aa - bb)), kOdd = 1 / (2 * (aa - bb));

    static inline void widen(vec *y) {
        const vec even = y[0] + y[2] * aa, odd = (y[1] + y[3] * aa) * a, even2 = y[0] + y[2] * bb;
        const vec odd2 = (y[1] + y[3] * bb) * b;
        y[4] = y[3], y[0] = even + odd, y[1] = even - odd, y[2] = even2 + odd2, y[3] = even2 - odd2;
    }
    static inline void narrow(vec *m) {
        const vec sum = m[0] + m[1], difference = (m[0] - m[1]) * a, sum2 = m[2] + m[3], difference2 = (m[2] - m[3]) * b;
        m[0] = sum + sum2, m[1] = difference + difference2, m[2] = sum * aa + sum2 * bb;
        m[3] = difference * aa + difference2 * bb + m[4];
    }
    static inline void differ(vec *d) {
        const vec even = d[3] - d[1] * bb, odd = (d[2] - d[0] * bb) * a, even2 = d[3] - d[1] * aa;
        const vec odd2 = (d[2] - d[0] * aa) * b;
        d[4] += d[0] * both - d[2] * all;
        d[0] = even + odd, d[1] = even - odd, d[2] = even2 + odd2, d[3] = even2 - odd2;
    }
    static inline void differ_back(vec *m) {
        const vec sum = m[0] + m[1], difference = (m[0] - m[1]) * a, sum2 = m[2] + m[3], difference2 = (m[2] - m[3]) * b;
        m[0] = m[4] * both - difference * bb - difference2 * aa, m[1] = -sum * bb - sum2 * aa;
        m[2] = difference + difference2 - m[4] * all, m[3] = sum + sum2;
    }
    static inline void widen_weights(vec *g) {
        const vec odd = g[1] * kOdd, first = g[0] * kFirst, second = g[0] * kSecond;
        g[4] = g[1], g[0] = odd + first, g[1] = odd - first, g[2] = second - odd, g[3] = -second - odd;
    }
    static inline void narrow_weights(vec *m) {
        const vec even = (m[0] + m[1]) - (m[2] + m[3]);
        m[0] = (m[0] - m[1]) * kFirst + (m[2] - m[3]) * kSecond, m[1] = even * kOdd + m[4];
    }
};

// The tiles of a conv, W outputs wide; a column of these products is one tile of one image.
struct Tiles {
    int64_t wide, h, w, images, block, lanes;
    int64_t columns() const { return round_up(h * w * block, kLanes); }
    int64_t pitch() const { return columns() + kLanes; }  // rows 2^n apart would share few lines of the caches
    int64_t point(int64_t rows) const { return rows * pitch() + kLanes; }
    int64_t step() const { return lanes ? block : kLanes; }  // between neighbours in a plane of values side by side
    int64_t row() const { return (2 * wide * w + 2) * step(); }  // of a padded plane
    int64_t plane() const { return (4 * h + 2) * row(); }
    int64_t planes() const { return lanes ? 1 : images; }
    bool whole() const { return lanes || images * h * w == columns(); }
    // f(column, image, y, x, at): every 16 side by side, at image `at` of the block with lanes.
    template <typename F>
    void each(F f) const {
        for (int64_t b = 0; b < planes(); ++b)
            for (int64_t y = 0; y < h; ++y)
                for (int64_t x = 0; x < w; ++x)
                    for (int64_t at = 0; at < step(); at += kLanes)
                        f(lanes ? (y * w + x) * block + at : (b * h + y) * w + x, b, y, x, at);
    }
};

Tiles tiles_of(const Shape &s, const Columns &m, int wide) {
    return {wide, s.height / 4, s.width / 2 / wide, m.images, m.block, m.lanes};
}

constexpr int points_of(int wide) { return 3 * (wide + 1); }

constexpr int64_t kDeep = 4 * kLanes;  // 16 channels in 4 phases

// Changes 3 lines of points: each of the first `columns` columns, then every line.
template <int P, typename Down, typename Across>
inline void both_ways(vec (&d)[3][P], int columns, Down down, Across across) {
    UNROLL for (int k = 0; k < columns; ++k) {
        vec column[3] = {d[0][k], d[1][k], d[2][k]};
        down(column);
        UNROLL for (int i = 0; i < 3; ++i) d[i][k] = column[i];
    }
    UNROLL for (int i = 0; i < 3; ++i) across(d[i]);
}

#define ALONG(W, change) [](vec *v) { Axis<W>::change(v); }
#define LINES(count, width) \
    UNROLL for (int i = 0; i < count; ++i) UNROLL for (int j = 0; j < width; ++j)
#define PARTS for (int64_t part = 0; part < kLanes; part += VECTOR)

template <int W>
inline void widen(const float *from, int64_t row, int64_t step, float *to, int64_t point) {
    PARTS {
        vec y[3][W + 1] = {};
        LINES(2, W) y[i][j] = load(from + i * row + j * step + part);
        both_ways(y, W, ALONG(2, widen), ALONG(W, widen));
        LINES(3, W + 1) store(to + (i * (W + 1) + j) * point + part, y[i][j]);
    }
}

template <int W>
inline void widen_weights(const float *from, int64_t row, int64_t step, float *to, int64_t point) {
    PARTS {
        vec g[3][W + 1] = {};
        LINES(2, 2) g[i][j] = load(from + i * row + j * step + part);
        both_ways(g, 2, ALONG(2, widen), ALONG(W, widen_weights));
        LINES(3, W + 1) store(to + (i * (W + 1) + j) * point + part, g[i][j]);
    }
}

template <int W>
inline void narrow(const float *from, int64_t point, float *to, int64_t row, int64_t step) {
    PARTS {
        vec m[3][W + 1];
        LINES(3, W + 1) m[i][j] = load(from + (i * (W + 1) + j) * point + part);
        both_ways(m, W + 1, ALONG(2, narrow), ALONG(W, narrow));
        LINES(2, W) store(to + i * row + j * step + part, m[i][j]);
    }
}

template <int W>
inline void narrow_weights(const float *from, int64_t point, float *to, int64_t row, int64_t step) {
    PARTS {
        vec m[3][W + 1];
        LINES(3, W + 1) m[i][j] = load(from + (i * (W + 1) + j) * point + part);
        both_ways(m, W + 1, ALONG(2, narrow), ALONG(W, narrow_weights));
        LINES(2, 2) store(to + i * row + j * step + part, m[i][j]);
    }
}

template <int W>
inline void differ(const float *from, int64_t row, int64_t step, float *to, int64_t point) {
    PARTS {
        vec d[3][W + 1];
        LINES(3, W + 1) d[i][j] = load(from + i * row + j * step + part);
        both_ways(d, W + 1, ALONG(2, differ), ALONG(W, differ));
        LINES(3, W + 1) store(to + (i * (W + 1) + j) * point + part, d[i][j]);
    }
}

// Added to what is there: tiles overlap.
template <int W>
inline void differ_back(const float *from, int64_t point, float *to, int64_t row, int64_t step) {
    PARTS {
        vec d[3][W + 1];
        LINES(3, W + 1) d[i][j] = load(from + (i * (W + 1) + j) * point + part);
        both_ways(d, W + 1, ALONG(2, differ_back), ALONG(W, differ_back));
        LINES(3, W + 1) {
            float *at = to + i * row + j * step + part;
            store(at, load(at) + d[i][j]);
        }
    }
}

// A transposed 16x16 square, and many: [count][columns][16] out of [count][16][pitch] or the reverse.
inline void turn(const float *from, int64_t from_row, float *to, int64_t to_row) {
    alignas(64) float square[256];
    UNROLL for (int64_t i = 0; i < kLanes; ++i) copy16(square + i * kLanes, from + i * from_row);
    transpose16(square);
    UNROLL for (int64_t i = 0; i < kLanes; ++i) copy16(to + i * to_row, square + i * kLanes);
}

void side_by_side(const float *rows, int64_t count, int64_t step, int64_t columns, int64_t pitch, float *out,
                  int64_t out_step) {
    for (int64_t i = 0; i < count; ++i)
        for (int64_t k = 0; k < columns; k += kLanes)
            turn(rows + i * step + k, pitch, out + i * out_step + k * kLanes, kLanes);
}

void in_rows(const float *values, int64_t count, int64_t step, int64_t columns, float *out, int64_t out_step,
             int64_t pitch) {
    for (int64_t i = 0; i < count; ++i)
        for (int64_t k = 0; k < columns; k += kLanes)
            turn(values + i * step + k * kLanes, kLanes, out + i * out_step + k, pitch);
}

// Between a map and its padded planes with 16 channels from c side by side: copy(plane, map offset) for each 16 positions.
template <typename F>
void each_square(const View &v, const Shape &s, const Tiles &t, int64_t c, F copy) {
    for (int64_t b = 0; b < t.images; ++b)
        for (int64_t i = 0, y = 0, x = 0; i < s.height * s.width; i += kLanes) {
            int64_t plane[kLanes], map[kLanes];
            for (int64_t k = 0; k < kLanes; ++k) {
                plane[k] = b * t.plane() + (y + 1) * t.row() + (x + 1) * kLanes;
                map[k] = b * v.image + c * v.channel + y * v.y + x * v.x;
                if (++x == s.width) x = 0, ++y;
            }
            copy(plane, map);
        }
}

// differ of channels [c, c + 16): [point][phase][channel][column], or [point][phase][column][channel] if `across`.
template <int W>
void tiles_of_input(const View &x, const Shape &s, const Columns &m, int64_t c, bool across, float *out) {
    Arena arena;
    const Tiles t = tiles_of(s, m, W);
    const int64_t pitch = t.pitch(), row = t.row(), step = t.step(), point = t.point(kDeep);
    const bool turned = across == (t.lanes != 0);
    float *planes = arena.floats(t.planes() * t.plane()), *values = turned ? arena.floats(points_of(W) * point) : out;
    auto transform = [&](float *to, int64_t column_step) {
        t.each([&](int64_t column, int64_t b, int64_t ty, int64_t tx, int64_t at) {
            const float *from = planes + b * t.plane() + 4 * ty * row + 2 * W * tx * step + at;
            UNROLL for (int k = 0; k < 4; ++k)
                differ<W>(from + k / 2 * row + k % 2 * step, 2 * row, 2 * step,
                          to + k * kLanes * pitch + column * column_step, point);
        });
    };
    if (t.lanes) {
        for (int64_t i = 0; i < kLanes; ++i) {
            pack_lanes(x, s, m, c + i, c + i + 1, planes);
            transform(values + i * pitch, 1);
        }
    } else {
        zero(planes, t.images * t.plane());
        alignas(64) float square[256];
        each_square(x, s, t, c, [&](const int64_t *plane, const int64_t *map) {
            const bool plain = x.x == 1 && x.y == s.width;
            if (plain && x.dtype == NITRO_F32)  // 16 planes are many streams
                for (int64_t r = 0; r < kLanes; ++r)
                    __builtin_prefetch(static_cast<const float *>(x.data) + map[0] + r * x.channel + 3 * kLanes);
            for (int64_t r = 0; r < kLanes; ++r)
                read_run(x, plain ? map[0] + r * x.channel : map[r], plain ? 1 : x.channel, kLanes, square + r * kLanes);
            if (plain) transpose16(square);
            for (int64_t r = 0; r < kLanes; ++r) copy16(planes + plane[r], square + r * kLanes);
        });
        if (!t.whole()) zero(values, points_of(W) * point);  // columns of no tile
        transform(values, kLanes);
    }
    if (!turned) return;
    for (int64_t p = 0; p < points_of(W) * point; p += point) {
        if (t.lanes)
            side_by_side(values + p, 4, kLanes * pitch, t.columns(), pitch, out + p, kLanes * pitch);
        else
            in_rows(values + p, 4, kLanes * pitch, t.columns(), out + p, kLanes * pitch, pitch);
    }
}

// widen of dy [rows, m.count()]: [point][row][column].
template <int W>
void tiles_of_output(const float *dy, const Shape &s, const Columns &m, int64_t rows, float *out) {
    Arena arena;
    const Tiles t = tiles_of(s, m, W);
    const int64_t pitch = t.pitch(), count = m.count(), row = s.width / 2 * t.step(), wide_step = pitch * kLanes;
    float *values = arena.floats(t.lanes ? 0 : count * kLanes), *wide = arena.floats(t.lanes ? 0 : points_of(W) * wide_step);
    if (!t.whole()) zero(wide, points_of(W) * wide_step);
    for (int64_t n = 0; n < rows; n += t.lanes ? 1 : kLanes) {
        const float *from = t.lanes ? dy + n * count : values;
        if (!t.lanes) side_by_side(dy + n * count, 1, 0, count, count, values, 0);
        t.each([&](int64_t column, int64_t b, int64_t ty, int64_t tx, int64_t at) {
            widen<W>(from + (b * m.area + W * tx) * t.step() + 2 * ty * row + at, row, t.step(),
                     t.lanes ? out + n * pitch + column : wide + column * kLanes, t.lanes ? t.point(rows) : wide_step);
        });
        if (!t.lanes) in_rows(wide, points_of(W), wide_step, t.columns(), out + n * pitch, t.point(rows), pitch);
    }
}

// widen of 16 filters `stride` apart: at each point and phase, 16 numbers side by side. Those `next` further on are fetched.
template <int W>
inline void points_of_weights(const float *weights, int64_t stride, int64_t next, float *out, int64_t point, int64_t phase) {
    alignas(64) float square[256];
    if (next)
        for (int64_t i = 0; i < kLanes; ++i) __builtin_prefetch(weights + next + i * stride);
    turn(weights, stride, square, kLanes);
    UNROLL for (int k = 0; k < 4; ++k)
        widen_weights<W>(square + (k / 2 * 4 + k % 2) * kLanes, 8 * kLanes, 2 * kLanes, out + k * phase, point);
}

// Offsets of rows or columns at equal distance.
int64_t *evenly(Arena &arena, int64_t count, int64_t step) {
    int64_t *at = reinterpret_cast<int64_t *>(arena.floats(2 * count));
    for (int64_t i = 0; i < count; ++i) at[i] = i * step;
    return at;
}

template <int W>
void tiles_forward(const View &x, const Shape &s, const Columns &m, const float *const *weights, int64_t heads,
                   int64_t head_width, float *y) {
    Arena arena;
    const Tiles t = tiles_of(s, m, W);
    const int64_t columns = t.columns(), pitch = t.pitch(), count = m.count(), rows = heads * head_width;
    const int64_t row = s.width / 2 * t.step(), filters = head_width * kDeep + kLanes, wide_step = pitch * kLanes;
    const int64_t *run = evenly(arena, columns / kLanes, kLanes), *tap = evenly(arena, 16, pitch);
    float *input = arena.floats(points_of(W) * t.point(kDeep)), *points = arena.floats(points_of(W) * filters);
    float *sum = arena.floats(points_of(W) * t.point(rows));
    const int64_t next = filters_are_far(head_width, s.channels) ? 4 * s.channels * 16 : 0;
    for (int64_t c = 0; c < s.channels; c += kLanes) {
        tiles_of_input<W>(x, s, m, c, false, input);
        for (int64_t h = 0; h < heads; ++h) {
            for (int64_t n = 0; n < head_width; ++n)
                points_of_weights<W>(weights[h] + (n * s.channels + c) * 16, 16, next, points + n * kDeep, filters, kLanes);
            for (int64_t p = 0; p < points_of(W); ++p)
                multiply<kPacked>({points + p * filters, kDeep, 16, input + p * t.point(kDeep), run, 16 * pitch, tap,
                                   kDeep / 16, sum + p * t.point(rows) + h * head_width * pitch, run, pitch, c > 0,
                                   chunk_of(s.channels * 4)},
                                  head_width, columns / kLanes);
        }
    }
    float *values = arena.floats(t.lanes ? 0 : count * kLanes), *wide = arena.floats(t.lanes ? 0 : points_of(W) * wide_step);
    zero(values, t.lanes ? 0 : count * kLanes);
    for (int64_t n = 0; n < rows; n += t.lanes ? 1 : kLanes) {
        float *to = t.lanes ? y + n * count : values;
        if (!t.lanes) side_by_side(sum + n * pitch, points_of(W), t.point(rows), columns, pitch, wide, wide_step);
        t.each([&](int64_t column, int64_t b, int64_t ty, int64_t tx, int64_t at) {
            narrow<W>(t.lanes ? sum + n * pitch + column : wide + column * kLanes, t.lanes ? t.point(rows) : wide_step,
                      to + (b * m.area + W * tx) * t.step() + 2 * ty * row + at, row, t.step());
        });
        if (!t.lanes) in_rows(values, 1, 0, count, y + n * count, 0, count);
    }
}

// Gradient to channels [c, c_end) of the conv's input.
template <int W>
void tiles_to_input(const float *dy, const Shape &s, const Columns &m, const float *const *weights, int64_t heads,
                    int64_t head_width, int64_t c, int64_t c_end, const View &out) {
    Arena arena;
    const Tiles t = tiles_of(s, m, W);
    const int64_t columns = t.columns(), pitch = t.pitch(), point = t.point(kDeep), rows = heads * head_width;
    const int64_t most = 64, filters = kDeep * most + kLanes, area = s.height * s.width * t.step();
    const int64_t *run = evenly(arena, columns / kLanes, kLanes), *tap = evenly(arena, 16, pitch);
    float *wide = arena.floats(points_of(W) * t.point(rows)), *points = arena.floats(points_of(W) * filters);
    float *sum = arena.floats(points_of(W) * point);
    float *planes = arena.floats(t.planes() * t.plane()), *map = arena.floats(t.lanes ? kLanes * area : points_of(W) * point);
    tiles_of_output<W>(dy, s, m, rows, wide);
    const int64_t next = filters_are_far(head_width, s.channels) ? 4 * 16 : 0;
    for (; c < c_end; c += kLanes) {
        for (int64_t n = 0; n < rows; n += most) {
            const int64_t some = smaller(most, rows - n);
            for (int64_t k = n; k < n + some; k += kLanes)
                for (int64_t i = 0; i < kLanes; ++i)
                    points_of_weights<W>(weights[k / head_width] + (k % head_width * s.channels + c + i) * 16,
                                         s.channels * 16, next, points + i * most + k - n, filters, kLanes * most);
            for (int64_t p = 0; p < points_of(W); ++p)
                multiply<kPacked>({points + p * filters, most, 16, wide + p * t.point(rows) + n * pitch, run, 16 * pitch, tap,
                                   some / 16, sum + p * point, run, pitch, n > 0, chunk_of(rows)},
                                  kDeep, columns / kLanes);
        }
        auto transform = [&](const float *from, int64_t column_step) {
            zero(planes, t.planes() * t.plane());
            t.each([&](int64_t column, int64_t b, int64_t ty, int64_t tx, int64_t at) {
                float *to = planes + b * t.plane() + 4 * ty * t.row() + 2 * W * tx * t.step() + at;
                UNROLL for (int k = 0; k < 4; ++k)
                    differ_back<W>(from + k * kLanes * pitch + column * column_step, point,
                                   to + k / 2 * t.row() + k % 2 * t.step(), 2 * t.row(), 2 * t.step());
            });
        };
        if (t.lanes) {
            // The input of a layer above the first is laid out as lanes already.
            const bool direct = out.image == 1 && out.dtype == NITRO_F32;
            for (int64_t i = 0; i < kLanes; ++i) {
                transform(sum + i * pitch, 1);
                float *to = direct ? static_cast<float *>(out.data) + (c + i) * out.channel : map + i * area;
                for (int64_t y = 0; y < s.height; ++y)
                    for (int64_t k = 0; k < s.width * t.step(); k += kLanes)
                        copy16(to + y * s.width * t.step() + k, planes + (y + 1) * t.row() + t.step() + k);
            }
            if (!direct) write_lanes(map, s, m, c, c + kLanes, out);
            continue;
        }
        for (int64_t p = 0; p < points_of(W) * point; p += point)
            side_by_side(sum + p, 4, kLanes * pitch, columns, pitch, map + p, kLanes * pitch);
        transform(map, kLanes);
        alignas(64) float square[256];
        each_square(out, s, t, c, [&](const int64_t *plane, const int64_t *at) {
            const bool plain = out.x == 1 && out.y == s.width;
            for (int64_t r = 0; r < kLanes; ++r) copy16(square + r * kLanes, planes + plane[r]);
            if (plain) transpose16(square);
            for (int64_t r = 0; r < kLanes; ++r)
                write_run(out, plain ? at[0] + r * out.channel : at[r], plain ? 1 : out.channel, kLanes,
                          square + r * kLanes, 1);
        });
    }
}

// Gradient to the weights of 16 channels: `wide` from tiles_of_output with `rows` rows, `input` from tiles_of_input across.
template <int W>
void tiles_to_weights(const float *wide, int64_t rows, const float *input, const Tiles &t, int64_t head_width, float *out,
                      int64_t out_row, bool add) {
    Arena arena;
    const int64_t filters = head_width * kDeep + kLanes;
    const int64_t *from = evenly(arena, 4, kLanes * t.pitch()), *to = evenly(arena, 16, kLanes);
    float *sum = arena.floats(points_of(W) * filters);
    for (int64_t p = 0; p < points_of(W); ++p)
        multiply<kPacked>({wide + p * t.point(rows), t.pitch(), 16, input + p * t.point(kDeep), from, 16 * kLanes, to,
                           t.columns() / 16, sum + p * filters, to, kDeep, false, chunk_of(t.columns())},
                          head_width, 4);
    alignas(64) float square[256];
    const bool past = !add && filters_are_far(head_width, out_row / 16) && reinterpret_cast<uintptr_t>(out) % 64 == 0;
    for (int64_t n = 0; n < head_width; ++n) {
        for (int k = 0; k < 4; ++k)
            narrow_weights<W>(sum + n * kDeep + k * kLanes, filters, square + (k / 2 * 4 + k % 2) * kLanes, 8 * kLanes,
                              2 * kLanes);
        transpose16(square);
        for (int64_t i = 0; i < 256; i += VECTOR) {
            float *at = out + n * out_row + i;
            if (past)
                store_past(at, load(square + i));
            else
                store(at, add ? load(at) + load(square + i) : load(square + i));
        }
    }
    if (past) fence();
}

// How wide the tiles are, 4 or 2, or 0 for none. Fewer rows do not pay for the transforms of their input, fewer columns not
// for those of the weights; where a map is one tile, its differences cost digits that the few products of a direct conv do
// not.
int tiles_for(const Shape &s, const Columns &m, int64_t rows, int64_t head_width) {
    const bool paid = s.channels % 16 == 0 && head_width % 16 == 0 && s.height % 4 == 0 && s.width % 4 == 0 &&
                      rows >= 32 && m.area >= 16 && m.block * m.area >= 128;
    return !paid ? 0 : s.width % 8 ? 2 : 4;
}

void conv_forward(const View &x, const Shape &s, const Columns &m, const float *const *weights, int64_t heads,
                  int64_t head_width, float *y) {
    const int wide = tiles_for(s, m, heads * head_width, head_width);
    const auto conv = wide == 4 ? tiles_forward<4> : wide == 2 ? tiles_forward<2> : direct_forward;
    conv(x, s, m, weights, heads, head_width, y);
}

void conv_to_input(const float *dy, const Shape &s, const Columns &m, const float *const *weights, int64_t heads,
                   int64_t head_width, int64_t c, int64_t c_end, const View &out) {
    const int wide = tiles_for(s, m, heads * head_width, head_width);
    const auto direct = m.lanes ? lanes_to_input : direct_to_input;
    const auto conv = wide == 4 ? tiles_to_input<4> : wide == 2 ? tiles_to_input<2> : direct;
    conv(dy, s, m, weights, heads, head_width, c, c_end, out);
}
