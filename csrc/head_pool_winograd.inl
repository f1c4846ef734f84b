// Included once per instruction set: the same convs in 9 multiplications for 16, where there are columns enough.
//
// Over the four phases of its padded input, the parities of y and x, a conv 4x4 stride 2 is four of 2x2 stride 1, and
// Winograd's F(2x2, 2x2) makes a tile of 2x2 outputs out of 3x3 inputs d by 9 products per phase and only additions:
//     y = narrow(widen(g) * differ(d))    dg = narrow(widen(dy) * differ(d))    dd = differ^T(widen(g) * widen(dy))
// Along either axis widen(g) = (g0, g0 + g1, g1), narrow(m) = (m0 + m1, m1 + m2), differ(d) = (d0 - d1, d1, d2 - d1). Each of
// the 9 points is a matrix product, so the transforms stand outside of it and cost little. They work on 16 floats side by
// side: 16 images with lanes, 16 channels without, and those are transposed to stand in rows of columns.

// The tiles of a conv; a column of these products is one tile of one image.
struct Tiles {
    int64_t h, w, images, block, lanes;
    int64_t columns() const { return round_up(h * w * block, kLanes); }
    int64_t pitch() const { return columns() + kLanes; }  // rows 2^n apart would share few lines of the caches
    int64_t point(int64_t rows) const { return rows * pitch() + kLanes; }
    int64_t step() const { return lanes ? block : kLanes; }  // between neighbours in a plane of values side by side
    int64_t row() const { return (4 * w + 2) * step(); }     // of a padded plane
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

Tiles tiles_of(const Shape &s, const Columns &m) { return {s.height / 4, s.width / 4, m.images, m.block, m.lanes}; }

constexpr int64_t kDeep = 4 * kLanes;  // 16 channels in 4 phases

inline void widen(const float *from, int64_t row, int64_t step, float *to, int64_t point) {
    for (int64_t part = 0; part < kLanes; part += VECTOR) {
        vec g[3][2];
        UNROLL for (int j = 0; j < 2; ++j) {
            g[0][j] = load(from + j * step + part);
            g[2][j] = load(from + row + j * step + part);
            g[1][j] = g[0][j] + g[2][j];
        }
        UNROLL for (int i = 0; i < 3; ++i) {
            store(to + 3 * i * point + part, g[i][0]);
            store(to + (3 * i + 1) * point + part, g[i][0] + g[i][1]);
            store(to + (3 * i + 2) * point + part, g[i][1]);
        }
    }
}

inline void narrow(const float *from, int64_t point, float *to, int64_t row, int64_t step) {
    for (int64_t part = 0; part < kLanes; part += VECTOR) {
        vec m[3][2];
        UNROLL for (int i = 0; i < 3; ++i) {
            const vec middle = load(from + (3 * i + 1) * point + part);
            m[i][0] = load(from + 3 * i * point + part) + middle;
            m[i][1] = load(from + (3 * i + 2) * point + part) + middle;
        }
        UNROLL for (int j = 0; j < 2; ++j) {
            store(to + j * step + part, m[0][j] + m[1][j]);
            store(to + row + j * step + part, m[1][j] + m[2][j]);
        }
    }
}

inline void differ(const float *from, int64_t row, int64_t step, float *to, int64_t point) {
    for (int64_t part = 0; part < kLanes; part += VECTOR) {
        vec d[3][3];
        UNROLL for (int j = 0; j < 3; ++j) {
            d[1][j] = load(from + row + j * step + part);
            d[0][j] = load(from + j * step + part) - d[1][j];
            d[2][j] = load(from + 2 * row + j * step + part) - d[1][j];
        }
        UNROLL for (int i = 0; i < 3; ++i) {
            store(to + 3 * i * point + part, d[i][0] - d[i][1]);
            store(to + (3 * i + 1) * point + part, d[i][1]);
            store(to + (3 * i + 2) * point + part, d[i][2] - d[i][1]);
        }
    }
}

// The transpose of differ, added to what is there: tiles overlap.
inline void differ_back(const float *from, int64_t point, float *to, int64_t row, int64_t step) {
    for (int64_t part = 0; part < kLanes; part += VECTOR) {
        vec d[3][3];
        UNROLL for (int i = 0; i < 3; ++i) {
            d[i][0] = load(from + 3 * i * point + part);
            d[i][2] = load(from + (3 * i + 2) * point + part);
            d[i][1] = load(from + (3 * i + 1) * point + part) - d[i][0] - d[i][2];
        }
        UNROLL for (int j = 0; j < 3; ++j) {
            d[1][j] = d[1][j] - d[0][j] - d[2][j];
            UNROLL for (int i = 0; i < 3; ++i) {
                float *at = to + i * row + j * step + part;
                store(at, load(at) + d[i][j]);
            }
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
        for (int64_t i = 0; i < s.height * s.width; i += kLanes) {
            int64_t plane[kLanes], map[kLanes];
            for (int64_t k = 0; k < kLanes; ++k) {
                const int64_t y = (i + k) / s.width, x = (i + k) % s.width;
                plane[k] = b * t.plane() + (y + 1) * t.row() + (x + 1) * kLanes;
                map[k] = b * v.image + c * v.channel + y * v.y + x * v.x;
            }
            copy(plane, map);
        }
}

// differ of channels [c, c + 16): [point][phase][channel][column], or [point][phase][column][channel] if `across`.
void tiles_of_input(const View &x, const Shape &s, const Columns &m, int64_t c, bool across, float *out) {
    Arena arena;
    const Tiles t = tiles_of(s, m);
    const int64_t pitch = t.pitch(), row = t.row(), step = t.step(), point = t.point(kDeep);
    const bool turned = across == (t.lanes != 0);
    float *planes = arena.floats(t.planes() * t.plane()), *values = turned ? arena.floats(9 * point) : out;
    auto transform = [&](float *to, int64_t column_step) {
        t.each([&](int64_t column, int64_t b, int64_t ty, int64_t tx, int64_t at) {
            const float *from = planes + b * t.plane() + 4 * (ty * row + tx * step) + at;
            UNROLL for (int k = 0; k < 4; ++k)
                differ(from + k / 2 * row + k % 2 * step, 2 * row, 2 * step,
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
            for (int64_t r = 0; r < kLanes; ++r)
                read_run(x, plain ? map[0] + r * x.channel : map[r], plain ? 1 : x.channel, kLanes, square + r * kLanes);
            if (plain) transpose16(square);
            for (int64_t r = 0; r < kLanes; ++r) copy16(planes + plane[r], square + r * kLanes);
        });
        if (!t.whole()) zero(values, 9 * point);  // columns of no tile
        transform(values, kLanes);
    }
    if (!turned) return;
    for (int64_t p = 0; p < 9 * point; p += point) {
        if (t.lanes)
            side_by_side(values + p, 4, kLanes * pitch, t.columns(), pitch, out + p, kLanes * pitch);
        else
            in_rows(values + p, 4, kLanes * pitch, t.columns(), out + p, kLanes * pitch, pitch);
    }
}

// widen of dy [rows, m.count()]: [point][row][column].
void tiles_of_output(const float *dy, const Shape &s, const Columns &m, int64_t rows, float *out) {
    Arena arena;
    const Tiles t = tiles_of(s, m);
    const int64_t pitch = t.pitch(), count = m.count(), row = s.width / 2 * t.step(), wide_step = pitch * kLanes;
    float *values = arena.floats(t.lanes ? 0 : count * kLanes), *wide = arena.floats(t.lanes ? 0 : 9 * wide_step);
    if (!t.whole()) zero(wide, 9 * wide_step);
    for (int64_t n = 0; n < rows; n += t.lanes ? 1 : kLanes) {
        const float *from = t.lanes ? dy + n * count : values;
        if (!t.lanes) side_by_side(dy + n * count, 1, 0, count, count, values, 0);
        t.each([&](int64_t column, int64_t b, int64_t ty, int64_t tx, int64_t at) {
            widen(from + (b * m.area + 2 * tx) * t.step() + 2 * ty * row + at, row, t.step(),
                  t.lanes ? out + n * pitch + column : wide + column * kLanes, t.lanes ? t.point(rows) : wide_step);
        });
        if (!t.lanes) in_rows(wide, 9, wide_step, t.columns(), out + n * pitch, t.point(rows), pitch);
    }
}

// widen of 16 filters `stride` apart: at each point and phase, 16 numbers side by side.
inline void points_of_weights(const float *weights, int64_t stride, float *out, int64_t point, int64_t phase) {
    alignas(64) float square[256];
    turn(weights, stride, square, kLanes);
    UNROLL for (int k = 0; k < 4; ++k)
        widen(square + (k / 2 * 4 + k % 2) * kLanes, 8 * kLanes, 2 * kLanes, out + k * phase, point);
}

// Offsets of rows or columns at equal distance.
int64_t *evenly(Arena &arena, int64_t count, int64_t step) {
    int64_t *at = reinterpret_cast<int64_t *>(arena.floats(2 * count));
    for (int64_t i = 0; i < count; ++i) at[i] = i * step;
    return at;
}

void tiles_forward(const View &x, const Shape &s, const Columns &m, const float *const *weights, int64_t heads,
                   int64_t head_width, float *y) {
    Arena arena;
    const Tiles t = tiles_of(s, m);
    const int64_t columns = t.columns(), pitch = t.pitch(), count = m.count(), rows = heads * head_width;
    const int64_t row = s.width / 2 * t.step(), filters = head_width * kDeep + kLanes, wide_step = pitch * kLanes;
    const int64_t *run = evenly(arena, columns / kLanes, kLanes), *tap = evenly(arena, 16, pitch);
    float *input = arena.floats(9 * t.point(kDeep)), *points = arena.floats(9 * filters);
    float *sum = arena.floats(9 * t.point(rows));
    for (int64_t c = 0; c < s.channels; c += kLanes) {
        tiles_of_input(x, s, m, c, false, input);
        for (int64_t h = 0; h < heads; ++h) {
            for (int64_t n = 0; n < head_width; ++n)
                points_of_weights(weights[h] + (n * s.channels + c) * 16, 16, points + n * kDeep, filters, kLanes);
            for (int64_t p = 0; p < 9; ++p)
                multiply<kPacked>({points + p * filters, kDeep, 16, input + p * t.point(kDeep), run, 16 * pitch, tap,
                                   kDeep / 16, sum + p * t.point(rows) + h * head_width * pitch, run, pitch, c > 0,
                                   chunk_of(s.channels * 4)},
                                  head_width, columns / kLanes);
        }
    }
    float *values = arena.floats(t.lanes ? 0 : count * kLanes), *wide = arena.floats(t.lanes ? 0 : 9 * wide_step);
    zero(values, t.lanes ? 0 : count * kLanes);
    for (int64_t n = 0; n < rows; n += t.lanes ? 1 : kLanes) {
        float *to = t.lanes ? y + n * count : values;
        if (!t.lanes) side_by_side(sum + n * pitch, 9, t.point(rows), columns, pitch, wide, wide_step);
        t.each([&](int64_t column, int64_t b, int64_t ty, int64_t tx, int64_t at) {
            narrow(t.lanes ? sum + n * pitch + column : wide + column * kLanes, t.lanes ? t.point(rows) : wide_step,
                   to + (b * m.area + 2 * tx) * t.step() + 2 * ty * row + at, row, t.step());
        });
        if (!t.lanes) in_rows(values, 1, 0, count, y + n * count, 0, count);
    }
}

// Gradient to channels [c, c_end) of the conv's input.
void tiles_to_input(const float *dy, const Shape &s, const Columns &m, const float *const *weights, int64_t heads,
                    int64_t head_width, int64_t c, int64_t c_end, const View &out) {
    Arena arena;
    const Tiles t = tiles_of(s, m);
    const int64_t columns = t.columns(), pitch = t.pitch(), point = t.point(kDeep), rows = heads * head_width;
    const int64_t most = 64, filters = kDeep * most + kLanes, area = s.height * s.width * t.step();
    const int64_t *run = evenly(arena, columns / kLanes, kLanes), *tap = evenly(arena, 16, pitch);
    float *wide = arena.floats(9 * t.point(rows)), *points = arena.floats(9 * filters), *sum = arena.floats(9 * point);
    float *planes = arena.floats(t.planes() * t.plane()), *map = arena.floats(t.lanes ? kLanes * area : 9 * point);
    tiles_of_output(dy, s, m, rows, wide);
    for (; c < c_end; c += kLanes) {
        for (int64_t n = 0; n < rows; n += most) {
            const int64_t some = smaller(most, rows - n);
            for (int64_t k = n; k < n + some; k += kLanes)
                for (int64_t i = 0; i < kLanes; ++i)
                    points_of_weights(weights[k / head_width] + (k % head_width * s.channels + c + i) * 16, s.channels * 16,
                                      points + i * most + k - n, filters, kLanes * most);
            for (int64_t p = 0; p < 9; ++p)
                multiply<kPacked>({points + p * filters, most, 16, wide + p * t.point(rows) + n * pitch, run, 16 * pitch, tap,
                                   some / 16, sum + p * point, run, pitch, n > 0, chunk_of(rows)},
                                  kDeep, columns / kLanes);
        }
        auto transform = [&](const float *from, int64_t column_step) {
            zero(planes, t.planes() * t.plane());
            t.each([&](int64_t column, int64_t b, int64_t ty, int64_t tx, int64_t at) {
                float *to = planes + b * t.plane() + 4 * (ty * t.row() + tx * t.step()) + at;
                UNROLL for (int k = 0; k < 4; ++k)
                    differ_back(from + k * kLanes * pitch + column * column_step, point,
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
        for (int64_t p = 0; p < 9 * point; p += point)
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
void tiles_to_weights(const float *wide, int64_t rows, const float *input, const Tiles &t, int64_t head_width, float *out,
                      int64_t out_row, bool add) {
    Arena arena;
    const int64_t filters = head_width * kDeep + kLanes;
    const int64_t *from = evenly(arena, 4, kLanes * t.pitch()), *to = evenly(arena, 16, kLanes);
    float *sum = arena.floats(9 * filters);
    for (int64_t p = 0; p < 9; ++p)
        multiply<kPacked>({wide + p * t.point(rows), t.pitch(), 16, input + p * t.point(kDeep), from, 16 * kLanes, to,
                           t.columns() / 16, sum + p * filters, to, kDeep, false, chunk_of(t.columns())},
                          head_width, 4);
    alignas(64) float square[256];
    for (int64_t n = 0; n < head_width; ++n) {
        for (int k = 0; k < 4; ++k)
            narrow(sum + n * kDeep + k * kLanes, filters, square + (k / 2 * 4 + k % 2) * kLanes, 8 * kLanes, 2 * kLanes);
        transpose16(square);
        for (int64_t i = 0; i < 256; i += VECTOR) {
            float *at = out + n * out_row + i;
            store(at, add ? load(at) + load(square + i) : load(square + i));
        }
    }
}

// Fewer rows do not pay for the transforms of their input, fewer columns not for those of the weights; where a map is one
// tile, its differences cost digits that the few products of a direct conv do not.
bool by_tiles(const Shape &s, const Columns &m, int64_t rows, int64_t head_width) {
    return s.channels % 16 == 0 && head_width % 16 == 0 && s.height % 4 == 0 && s.width % 4 == 0 && rows >= 32 &&
           m.area >= 16 && m.block * m.area >= 128;
}

void conv_forward(const View &x, const Shape &s, const Columns &m, const float *const *weights, int64_t heads,
                  int64_t head_width, float *y) {
    const auto conv = by_tiles(s, m, heads * head_width, head_width) ? tiles_forward : direct_forward;
    conv(x, s, m, weights, heads, head_width, y);
}

void conv_to_input(const float *dy, const Shape &s, const Columns &m, const float *const *weights, int64_t heads,
                   int64_t head_width, int64_t c, int64_t c_end, const View &out) {
    const auto direct = m.lanes ? lanes_to_input : direct_to_input;
    const auto conv = by_tiles(s, m, heads * head_width, head_width) ? tiles_to_input : direct;
    conv(dy, s, m, weights, heads, head_width, c, c_end, out);
}
