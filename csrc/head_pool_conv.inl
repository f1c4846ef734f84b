// Included once per instruction set: the conv 4x4 stride 2 pad 1 forward, to its input and to its weights.
//
// Convs read the weights as they lie, [output, input, 4, 4]: one scalar against a run of 16 columns. What is packed is the
// other operand, in panels that fit the L2 cache and are shared by all rows. With lanes, a run is 16 images at one
// position, so that a padded copy of the map serves as it is; without, each run of each tap is copied together.

constexpr int64_t kPanel = 40 << 10;  // floats in a panel

inline void read_run(const View &v, int64_t at, int64_t step, int64_t count, float *out) {
    if (v.dtype == NITRO_F32) {
        const float *x = static_cast<const float *>(v.data) + at;
        if (step == 1) {
            for (int64_t i = 0; i < count; ++i) out[i] = x[i];
        } else {
            for (int64_t i = 0; i < count; ++i) out[i] = x[i * step];
        }
        return;
    }
    const uint16_t *x = static_cast<const uint16_t *>(v.data) + at;
    if (v.dtype == NITRO_BF16) {
        for (int64_t i = 0; i < count; ++i) out[i] = from_bf16(x[i * step]);
    } else {
        for (int64_t i = 0; i < count; ++i) out[i] = from_f16(x[i * step]);
    }
}

inline void write_run(const View &v, int64_t at, int64_t step, int64_t count, const float *in, int64_t in_step) {
    if (v.dtype == NITRO_F32) {
        float *x = static_cast<float *>(v.data) + at;
        for (int64_t i = 0; i < count; ++i) x[i * step] = in[i * in_step];
        return;
    }
    uint16_t *x = static_cast<uint16_t *>(v.data) + at;
    if (v.dtype == NITRO_BF16) {
        for (int64_t i = 0; i < count; ++i) x[i * step] = to_bf16(in[i * in_step]);
    } else {
        for (int64_t i = 0; i < count; ++i) x[i * step] = to_f16(in[i * in_step]);
    }
}

inline void zero(float *p, int64_t count) { __builtin_memset(p, 0, count * sizeof(float)); }

inline void copy16(float *to, const float *from) {
    for (int64_t i = 0; i < kLanes; i += VECTOR) store(to + i, load(from + i));
}

// A run of at most 16 floats, copied as 16: what is too much is overwritten by the next, so runs go in rising order.
struct Run {
    int64_t to, from;
};

// The runs that gather positions [0, height) x [0, width) of `images` maps, columns [m, m_end) of them, out of padded
// planes: image_step and row_step apart.
int64_t plan_runs(int64_t height, int64_t width, int64_t m, int64_t m_end, int64_t image_step, int64_t row_step,
                  Run *runs) {
    int64_t count = 0;
    const int64_t area = height * width;
    for (int64_t at = m; at < m_end;) {
        const int64_t b = at / area, y = at % area / width, x = at % width;
        const int64_t size = smaller(smaller(width - x, m_end - at), kLanes);
        runs[count++] = {at - m, b * image_step + y * row_step + x};
        at += size;
    }
    return count;
}

inline void gather(const Run *runs, int64_t count, const float *from, float *to) {
    for (int64_t i = 0; i < count; ++i) copy16(to + runs[i].to, from + runs[i].from);
}

// Lanes: [images of the block] of one value at (channel, y, x), from images that are far apart.
inline void read_lanes(const View &v, int64_t at, int64_t images, int64_t block, float *out) {
    read_run(v, at, v.image, images, out);
    for (int64_t b = images; b < block; ++b) out[b] = 0;
}

struct Shape {
    int64_t channels, height, width;  // of the conv's input
};

struct Panel {
    float *data;
    const int64_t *run;  // of the columns in it
    int64_t step;        // from one channel to the next
    int64_t tap[16];
};

// Channels [c, c_end) padded by zeros, [channel][y][x][lane].
void pack_lanes(const View &x, const Shape &s, const Columns &m, int64_t c, int64_t c_end, float *out) {
    const int64_t w = 2 * (s.width / 2) + 2, h = 2 * (s.height / 2) + 2;
    for (int64_t i = c; i < c_end; ++i)
        for (int64_t y = 0; y < h; ++y)
            for (int64_t k = 0; k < w; ++k, out += m.block) {
                if (y < 1 || y > s.height || k < 1 || k > s.width)
                    zero(out, m.block);
                else
                    read_lanes(x, i * x.channel + (y - 1) * x.y + (k - 1) * x.x, m.images, m.block, out);
            }
}

// One channel of all images of the block padded by zeros, [image][y][column parity][column / 2].
void split_columns(const View &x, const Shape &s, int64_t images, int64_t c, float *row, float *out) {
    const int64_t half = s.width / 2 + 1, h = 2 * (s.height / 2) + 2;
    for (int64_t b = 0; b < images; ++b)
        for (int64_t y = 0; y < h; ++y, out += 2 * half) {
            if (y < 1 || y > s.height) {
                zero(out, 2 * half);
                continue;
            }
            row[0] = row[s.width + 1] = 0;
            read_run(x, b * x.image + c * x.channel + (y - 1) * x.y, x.x, s.width, row + 1);
            for (int64_t k = 0; k < half; ++k) {
                out[k] = row[2 * k];
                out[half + k] = row[2 * k + 1];
            }
        }
}

// y [rows, columns] = conv of x; `weights` [rows, channels, 4, 4] of one head after the other, each of `head_width` rows.
void conv_forward(const View &x, const Shape &s, const Columns &m, const float *const *weights, int64_t heads,
                  int64_t head_width, float *y) {
    Arena arena;
    const int64_t columns = m.count(), runs = columns / kLanes, out_w = s.width / 2;
    const int64_t padded_w = 2 * out_w + 2, padded_h = 2 * (s.height / 2) + 2, half = out_w + 1;
    int64_t *run = reinterpret_cast<int64_t *>(arena.floats(2 * runs));
    Panel panel;
    auto sweep = [&](int64_t from, int64_t count, int64_t c, int64_t c_end) {
        for (int64_t h = 0; h < heads; ++h) {
            const Product product = {weights[h] + c * 16, s.channels * 16, 16, panel.data, panel.run, panel.step, panel.tap,
                                     c_end - c, y + h * head_width * columns + from * kLanes, columns, c > 0};
            multiply<kWindow>(product, head_width, count);
        }
    };
    if (m.lanes) {
        const int64_t plane = padded_h * padded_w * m.block;
        const int64_t group = smaller(s.channels, kPanel / plane > 1 ? kPanel / plane : 1);
        panel = {arena.floats(group * plane), run, plane, {}};
        for (int64_t t = 0; t < 16; ++t) panel.tap[t] = (t / 4 * padded_w + t % 4) * m.block;
        for (int64_t i = 0; i < runs; ++i) {
            const int64_t at = i * kLanes / m.block;
            run[i] = (at / out_w * 2 * padded_w + at % out_w * 2) * m.block + i * kLanes % m.block;
        }
        for (int64_t c = 0; c < s.channels; c += group) {
            const int64_t c_end = smaller(c + group, s.channels);
            pack_lanes(x, s, m, c, c_end, panel.data);
            sweep(0, runs, c, c_end);
        }
        return;
    }
    constexpr int64_t kRuns = 18;
    for (int64_t i = 0; i < runs; ++i) run[i] = i * kLanes;
    const int64_t valid = m.images * m.area, pitch = (smaller(runs, kRuns) + 1) * kLanes;
    const int64_t group = smaller(s.channels, kPanel / (16 * pitch));
    panel = {arena.floats(group * 16 * pitch), run, 16 * pitch, {}};
    for (int64_t t = 0; t < 16; ++t) panel.tap[t] = t * pitch;
    const int64_t image_step = padded_h * 2 * half;
    float *row = arena.floats(padded_w + s.width), *planes = arena.floats(m.images * image_step);
    Run *plan = reinterpret_cast<Run *>(arena.floats(4 * kRuns * kLanes + 4));
    zero(panel.data, group * 16 * pitch);  // columns past the last are garbage, but numbers
    for (int64_t from = 0; from < runs; from += kRuns) {
        const int64_t count = smaller(kRuns, runs - from), end = smaller(valid, (from + count) * kLanes);
        const int64_t parts =
            plan_runs(s.height / 2, out_w, from * kLanes, end, image_step, 4 * half, plan);
        for (int64_t c = 0; c < s.channels; c += group) {
            const int64_t c_end = smaller(c + group, s.channels);
            for (int64_t i = c; i < c_end; ++i) {
                split_columns(x, s, m.images, i, row, planes);
                for (int64_t t = 0; t < 16; ++t) {
                    const float *tap = planes + t / 4 * 2 * half + (t % 2) * half + t % 4 / 2;
                    gather(plan, parts, tap, panel.data + ((i - c) * 16 + t) * pitch);
                }
            }
            sweep(from, count, c, c_end);
        }
    }
    if (valid < columns)
        for (int64_t r = 0; r < heads * head_width; ++r) zero(y + r * columns + valid, columns - valid);
}

// The gradient dy [rows, columns] padded by zeros: [row][image][y][x], or [row][y][x][lane].
void pad_gradient(const float *dy, const Columns &m, int64_t h, int64_t w, float *out) {
    if (m.lanes) {
        zero(out, (h + 2) * (w + 2) * m.block);
        for (int64_t y = 0; y < h; ++y)
            for (int64_t i = 0; i < w * m.block; i += kLanes)
                copy16(out + ((y + 1) * (w + 2) + 1) * m.block + i, dy + y * w * m.block + i);
        return;
    }
    zero(out, m.images * (h + 2) * (w + 2));
    for (int64_t b = 0; b < m.images; ++b, out += (h + 2) * (w + 2))
        for (int64_t y = 0; y < h; ++y)
            for (int64_t k = 0; k < w; ++k) out[(y + 1) * (w + 2) + 1 + k] = dy[m.at(b, y * w + k)];
}

// Gradient to channels [c, c_end) of the conv's input, from dy [heads * head_width, columns]. The input position (y, x)
// belongs to one of four classes by the parities of y + 1 and x + 1; each class sees 2x2 of the 4x4 taps.
void conv_to_input(const float *dy, const Shape &s, const Columns &m, const float *const *weights, int64_t heads,
                   int64_t head_width, int64_t c, int64_t c_end, const View &out) {
    Arena arena;
    const int64_t h = s.height / 2, w = s.width / 2, row = w + 2, lanes = m.lanes ? m.block : 1;
    const int64_t plane = (h + 2) * row * m.block, depth = c_end - c;
    struct Class {
        int64_t y, x, h, w, columns;  // first input row and column of it, how many
    } classes[4];
    int64_t widest = 0;
    for (int k = 0; k < 4; ++k) {
        const int64_t py = k / 2, px = k % 2;
        Class &at = classes[k] = {1 - py, 1 - px, py ? s.height - h : h, px ? s.width - w : w, 0};
        at.columns = m.lanes ? at.h * at.w * m.block : m.images * at.h * at.w;
        if (at.columns > widest) widest = at.columns;
    }
    const int64_t all_runs = (widest + kLanes - 1) / kLanes, block_runs = smaller(all_runs, m.lanes ? 48 : 6);
    const int64_t pitch = (block_runs + 1) * kLanes;
    const int64_t per_row = m.lanes ? plane : 16 * pitch;
    int64_t group = kPanel / per_row > 1 ? kPanel / per_row : 1;
    group = smaller(group, head_width);
    float *panel = arena.floats(group * per_row), *padded = m.lanes ? nullptr : arena.floats(plane);
    float *sum = arena.floats(4 * depth * pitch);
    if (!m.lanes) zero(panel, group * per_row);
    int64_t *run = reinterpret_cast<int64_t *>(arena.floats(2 * block_runs));
    Run *plan = reinterpret_cast<Run *>(arena.floats(4 * 4 * (block_runs * kLanes + 1)));
    int64_t parts[4], tap[4], shift[4];
    for (int t = 0; t < 4; ++t) {
        shift[t] = -(t / 2 * row + t % 2) * lanes;
        tap[t] = m.lanes ? shift[t] : t * pitch;
    }
    for (int64_t from = 0; from < all_runs; from += block_runs) {
        const int64_t m0 = from * kLanes;
        auto end = [&](int k) { return smaller(classes[k].columns, m0 + block_runs * kLanes); };
        // Position j of a class reads the padded gradient at j + 1, and j begins at 1 where the parity is even.
        auto origin = [&](int k) { return (classes[k].y + 1) * row + classes[k].x + 1; };
        for (int k = 0; k < 4 && !m.lanes; ++k)
            parts[k] = end(k) <= m0 ? 0
                                    : plan_runs(classes[k].h, classes[k].w, m0, end(k), (h + 2) * row, row,
                                                plan + k * (block_runs * kLanes + 1));
        for (int64_t n = 0; n < heads * head_width;) {
            const int64_t head = n / head_width, i = n % head_width, rows = smaller(group, head_width - i);
            for (int64_t r = 0; r < rows; ++r) {
                const float *from_row = dy + (n + r) * m.count();
                if (m.lanes) {
                    pad_gradient(from_row, m, h, w, panel + r * plane);
                    continue;
                }
                pad_gradient(from_row, m, h, w, padded);
                for (int k = 0; k < 4; ++k)
                    for (int t = 0; t < 4; ++t)
                        gather(plan + k * (block_runs * kLanes + 1), parts[k], padded + origin(k) + shift[t],
                               panel + r * per_row + (k * 4 + t) * pitch);
            }
            for (int64_t at = 0; at < depth; at += 8)
                for (int k = 0; k < 4; ++k) {
                    if (end(k) <= m0) continue;
                    const int64_t count = (end(k) - m0 + kLanes - 1) / kLanes;
                    for (int64_t v = 0; v < count; ++v) {
                        const int64_t j = (m0 + v * kLanes) / m.block;
                        run[v] = !m.lanes ? v * kLanes
                                          : (j / classes[k].w * row + j % classes[k].w + origin(k)) * m.block +
                                                (m0 + v * kLanes) % m.block;
                    }
                    const Product product = {weights[head] + (i * s.channels + c + at) * 16 + k / 2 * 4 + k % 2,
                                             16,
                                             s.channels * 16,
                                             panel + (m.lanes ? 0 : k * 4 * pitch),
                                             run,
                                             per_row,
                                             tap,
                                             rows,
                                             sum + (k * depth + at) * pitch,
                                             pitch,
                                             n > 0};
                    multiply<kParity>(product, smaller(8, depth - at), count);
                }
            n += rows;
        }
        for (int64_t i = 0; i < depth; ++i)
            for (int k = 0; k < 4; ++k) {
                const Class &q = classes[k];
                const float *value = sum + (k * depth + i) * pitch;
                for (int64_t at = m0; at < end(k);) {
                    const int64_t j = m.lanes ? at / m.block : at % (q.h * q.w), y = j / q.w, x = j % q.w;
                    const int64_t to = (c + i) * out.channel + (q.y + 2 * y) * out.y + (q.x + 2 * x) * out.x;
                    if (m.lanes) {
                        const int64_t b = at % m.block, size = smaller(m.block - b, end(k) - at);
                        const int64_t real = b < m.images ? smaller(size, m.images - b) : 0;
                        write_run(out, to + b * out.image, out.image, real, value + at - m0, 1);
                        at += size;
                    } else {
                        const int64_t size = smaller(q.w - x, end(k) - at), b = at / (q.h * q.w);
                        write_run(out, to + b * out.image, 2 * out.x, size, value + at - m0, 1);
                        at += size;
                    }
                }
            }
    }
}

// The 4x4 patches of channels [c, c + count) under every column: [column][channel][16], zero past the last column.
void pack_patches(const View &x, const Shape &s, const Columns &m, int64_t c, int64_t count, float *plane, float *out) {
    const int64_t h = s.height / 2, w = s.width / 2, padded_w = 2 * w + 2, step = count * 16;
    for (int64_t b = 0; b < m.block; ++b)
        for (int64_t i = 0; i < count; ++i) {
            if (b >= m.images) {
                for (int64_t at = 0; at < m.area; ++at) zero(out + m.at(b, at) * step + i * 16, 16);
                continue;
            }
            for (int64_t y = 0; y < 2 * h + 2; ++y) {
                float *row = plane + y * padded_w;
                row[0] = row[padded_w - 1] = 0;
                if (y < 1 || y > s.height)
                    zero(row, padded_w);
                else
                    read_run(x, b * x.image + (c + i) * x.channel + (y - 1) * x.y, x.x, s.width, row + 1);
            }
            for (int64_t y = 0; y < h; ++y)
                for (int64_t k = 0; k < w; ++k) {
                    float *to = out + m.at(b, y * w + k) * step + i * 16;
                    const float *from = plane + 2 * y * padded_w + 2 * k;
                    UNROLL for (int t = 0; t < 4; ++t) __builtin_memcpy(to + 4 * t, from + t * padded_w, 16);
                }
        }
    for (int64_t at = m.block * m.area; at < m.count(); ++at) zero(out + at * step, step);
}
