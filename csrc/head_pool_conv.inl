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

template <int W>
inline void gather_by(const Run *runs, int64_t count, const float *from, float *to) {
    for (int64_t i = 0; i < count; ++i) __builtin_memcpy(to + runs[i].to, from + runs[i].from, 4 * W);
}

inline void gather(const Run *runs, int64_t count, int64_t width, const float *from, float *to) {
    if (width <= 4) return gather_by<4>(runs, count, from, to);
    if (width <= 8) return gather_by<8>(runs, count, from, to);
    gather_by<16>(runs, count, from, to);
}

struct Shape {
    int64_t channels, height, width;  // of the conv's input
};

// Where the runs of a matrix begin in padded lanes, positions `stride` apart in y and x.
void plan_lanes(const Columns &m, int64_t width, int64_t padded_width, int64_t stride, int64_t *run) {
    for (int64_t i = 0; i < m.count() / kLanes; ++i) {
        const int64_t at = i * kLanes / m.block;
        run[i] = (at / width * stride * padded_width + at % width * stride) * m.block + i * kLanes % m.block;
    }
}

struct Panel {
    float *data;
    const int64_t *run;  // of the columns in it
    int64_t step;        // from one channel to the next
    int64_t tap[16];
};

// Walks the values (channel, y, x) of a map through its copy padded by zeros on every side.
struct Padded {
    int64_t height, width, step;  // of the map; between neighbours
    int64_t x = 0, y = 0, at;

    Padded(const Shape &s, int64_t step)
        : height(s.height), width(s.width), step(step), at((row() + 1) * step) {}
    int64_t row() const { return 2 * (width / 2) + 2; }
    int64_t plane() const { return (2 * (height / 2) + 2) * row() * step; }
    void next() {
        at += step;
        if (++x < width) return;
        x = 0;
        at += (row() - width) * step;
        if (++y < height) return;
        y = 0;
        at += plane() - height * row() * step;
    }
};

// Channels [c, c_end) padded by zeros, [channel][y][x][lane]. NCHW maps are 16x16 transpositions of image by (channel, y, x).
void pack_lanes(const View &v, const Shape &s, const Columns &m, int64_t c, int64_t c_end, float *out) {
    const int64_t area = s.height * s.width, count = (c_end - c) * area;
    zero(out, (c_end - c) * Padded(s, m.block).plane());
    if (v.x != 1 || v.channel != area) {
        Padded to(s, m.block);
        for (int64_t i = c; i < c_end; ++i)
            for (int64_t y = 0; y < s.height; ++y)
                for (int64_t x = 0; x < s.width; ++x, to.next())
                    read_run(v, i * v.channel + y * v.y + x * v.x, v.image, m.images, out + to.at);
        return;
    }
    alignas(64) float square[256];
    for (int64_t b = 0; b < m.block; b += kLanes) {
        Padded to(s, m.block);
        for (int64_t i = 0; i < count; i += kLanes) {
            const int64_t size = smaller(kLanes, count - i);
            for (int64_t r = 0; r < kLanes; ++r) {
                const int64_t from = (b + r) * v.image + c * area + i;
                if (b + r >= m.images) {
                    zero(square + r * kLanes, kLanes);
                } else if (size == kLanes && v.dtype == NITRO_F32) {
                    const float *x = static_cast<const float *>(v.data) + from;
                    __builtin_prefetch(x + 8 * kLanes);  // 16 images are more streams than the processor follows
                    copy16(square + r * kLanes, x);
                } else {
                    read_run(v, from, 1, size, square + r * kLanes);
                }
            }
            transpose16(square);
            for (int64_t k = 0; k < size; ++k, to.next()) copy16(out + to.at + b, square + k * kLanes);
        }
    }
}

// The reverse, without padding: `lanes` [channel][y][x][lane] into channels [c, c_end) of v.
void write_lanes(const float *lanes, const Shape &s, const Columns &m, int64_t c, int64_t c_end, const View &v) {
    const int64_t area = s.height * s.width, count = (c_end - c) * area;
    alignas(64) float square[256];
    for (int64_t b = 0; b < m.images; b += kLanes)
        for (int64_t i = 0; i < count; i += kLanes) {
            const int64_t size = smaller(kLanes, count - i);
            if (v.x == 1 && v.channel == area) {
                for (int64_t k = 0; k < size; ++k) copy16(square + k * kLanes, lanes + (i + k) * m.block + b);
                transpose16(square);
                for (int64_t r = 0; r < kLanes && b + r < m.images; ++r) {
                    const int64_t to = (b + r) * v.image + c * area + i;
                    if (size == kLanes && v.dtype == NITRO_F32)
                        copy16(static_cast<float *>(v.data) + to, square + r * kLanes);
                    else
                        write_run(v, to, 1, size, square + r * kLanes, 1);
                }
                continue;
            }
            for (int64_t k = i; k < i + size; ++k) {
                const int64_t to = (c + k / area) * v.channel + k % area / s.width * v.y + k % s.width * v.x;
                write_run(v, to + b * v.image, v.image, smaller(kLanes, m.images - b), lanes + k * m.block + b, 1);
            }
        }
}

// even[i] = x[2 i], odd[i] = x[2 i + 1] for 2 i < count; both have room for 16 more.
void deinterleave(const float *x, int64_t count, float *even, float *odd) {
    int64_t i = 0;
#if VECTOR == 16
    const ivec evens = {0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30};
    for (; i + 2 * VECTOR <= count; i += 2 * VECTOR) {
        const vec a = load(x + i), b = load(x + i + VECTOR);
        store(even + i / 2, __builtin_shuffle(a, b, evens));
        store(odd + i / 2, __builtin_shuffle(a, b, evens + 1));
    }
#endif
    for (; i < count; i += 2) {
        even[i / 2] = x[i];
        odd[i / 2] = x[i + 1];
    }
}

// One channel of all images of the block padded by zeros, [image][y][column parity][column / 2]. `work` holds a map.
void split_columns(const View &x, const Shape &s, int64_t images, int64_t c, float *work, float *out) {
    const int64_t half = s.width / 2 + 1, h = 2 * (s.height / 2) + 2;
    const bool plain = x.dtype == NITRO_F32 && x.x == 1 && x.y == s.width && s.width % 2 == 0;
    float *odd = work + s.height * half + kLanes;
    for (int64_t b = 0; b < images; ++b) {
        const int64_t map = b * x.image + c * x.channel;
        if (plain) deinterleave(static_cast<const float *>(x.data) + map, s.height * s.width, work, odd);
        for (int64_t y = 0; y < h; ++y, out += 2 * half) {
            if (y < 1 || y > s.height) {
                zero(out, 2 * half);
            } else if (plain) {  // runs of 16, as in gather(): the second half overwrites what the first wrote too much
                const int64_t from = (y - 1) * (half - 1);
                for (int64_t k = 0; k < half - 1; k += kLanes) copy16(out + 1 + k, odd + from + k);
                for (int64_t k = 0; k < half - 1; k += kLanes) copy16(out + half + k, work + from + k);
                out[0] = out[2 * half - 1] = 0;
            } else {
                work[0] = work[s.width + 1] = 0;
                read_run(x, map + (y - 1) * x.y, x.x, s.width, work + 1);
                for (int64_t k = 0; k < half; ++k) {
                    out[k] = work[2 * k];
                    out[half + k] = work[2 * k + 1];
                }
            }
        }
    }
}

// y [rows, columns] = conv of x; `weights` [rows, channels, 4, 4] of one head after the other, each of `head_width` rows.
void direct_forward(const View &x, const Shape &s, const Columns &m, const float *const *weights, int64_t heads,
                  int64_t head_width, float *y) {
    Arena arena;
    const int64_t columns = m.count(), runs = columns / kLanes, out_w = s.width / 2;
    const int64_t padded_w = 2 * out_w + 2, padded_h = 2 * (s.height / 2) + 2, half = out_w + 1;
    int64_t *run = reinterpret_cast<int64_t *>(arena.floats(2 * runs));
    int64_t *straight = reinterpret_cast<int64_t *>(arena.floats(2 * runs));
    for (int64_t i = 0; i < runs; ++i) straight[i] = i * kLanes;
    Panel panel;
    auto sweep = [&](int64_t from, int64_t count, int64_t c, int64_t c_end) {
        for (int64_t h = 0; h < heads; ++h) {
            const Product product = {weights[h] + c * 16, s.channels * 16, 16, panel.data, panel.run, panel.step, panel.tap,
                                     c_end - c, y + h * head_width * columns + from * kLanes, straight, columns, c > 0,
                                     chunk_of(s.channels * 16), filters_are_far(head_width, s.channels)};
            multiply<kWindow>(product, head_width, count);
        }
    };
    if (m.lanes) {
        const int64_t plane = padded_h * padded_w * m.block;
        const int64_t group = smaller(s.channels, kPanel / plane > 1 ? kPanel / plane : 1);
        panel = {arena.floats(group * plane), run, plane, {}};
        for (int64_t t = 0; t < 16; ++t) panel.tap[t] = (t / 4 * padded_w + t % 4) * m.block;
        plan_lanes(m, out_w, padded_w, 2, run);
        for (int64_t c = 0; c < s.channels; c += group) {
            const int64_t c_end = smaller(c + group, s.channels);
            pack_lanes(x, s, m, c, c_end, panel.data);
            sweep(0, runs, c, c_end);
        }
        return;
    }
    constexpr int64_t kRuns = 12;
    run = straight;
    const int64_t valid = m.images * m.area, pitch = (smaller(runs, kRuns) + 1) * kLanes;
    const int64_t group = smaller(s.channels, kPanel / (16 * pitch));
    panel = {arena.floats(group * 16 * pitch), run, 16 * pitch, {}};
    for (int64_t t = 0; t < 16; ++t) panel.tap[t] = t * pitch;
    const int64_t image_step = padded_h * 2 * half;
    float *work = arena.floats(2 * (s.height * half + kLanes)), *planes = arena.floats(m.images * image_step);
    Run *plan = reinterpret_cast<Run *>(arena.floats(4 * kRuns * kLanes + 4));
    zero(panel.data, group * 16 * pitch);  // columns past the last are garbage, but numbers
    for (int64_t from = 0; from < runs; from += kRuns) {
        const int64_t count = smaller(kRuns, runs - from), end = smaller(valid, (from + count) * kLanes);
        const int64_t parts =
            plan_runs(s.height / 2, out_w, from * kLanes, end, image_step, 4 * half, plan);
        for (int64_t c = 0; c < s.channels; c += group) {
            const int64_t c_end = smaller(c + group, s.channels);
            for (int64_t i = c; i < c_end; ++i) {
                split_columns(x, s, m.images, i, work, planes);
                for (int64_t t = 0; t < 16; ++t) {
                    const float *tap = planes + t / 4 * 2 * half + (t % 2) * half + t % 4 / 2;
                    gather(plan, parts, out_w, tap, panel.data + ((i - c) * 16 + t) * pitch);
                }
            }
            sweep(from, count, c, c_end);
        }
    }
    if (valid < columns)
        for (int64_t r = 0; r < heads * head_width; ++r) zero(y + r * columns + valid, columns - valid);
}

// The input positions (y, x) whose y + 1 and x + 1 have given parities: each such class sees 2x2 of the 4x4 taps.
struct Class {
    int64_t y, x, h, w, tap;  // first row and column of it, how many, its first tap
    int64_t area() const { return h * w; }
};

Class class_of(const Shape &s, int k) {
    const int64_t py = k / 2, px = k % 2, h = s.height / 2, w = s.width / 2;
    return {1 - py, 1 - px, py ? s.height - h : h, px ? s.width - w : w, py * 4 + px};
}

// Filters of 24 channels that all classes take in turn: 24 KB.
constexpr int64_t kAtOnce = 16;

// Gradient to channels [c, c_end) of the conv's input, from dy [heads * head_width, columns], with lanes.
void lanes_to_input(const float *dy, const Shape &s, const Columns &m, const float *const *weights, int64_t heads,
                    int64_t head_width, int64_t c, int64_t c_end, const View &out) {
    Arena arena;
    const int64_t h = s.height / 2, w = s.width / 2, row = w + 2, plane = (h + 2) * row * m.block, area = s.height * s.width;
    const int64_t group = smaller(head_width, kPanel / plane > 1 ? kPanel / plane : 1);
    // The input of a layer above the first is laid out as lanes already.
    const bool direct = out.image == 1 && out.dtype == NITRO_F32;
    float *panel = arena.floats(group * plane), *map = direct ? nullptr : arena.floats((c_end - c) * area * m.block);
    float *sum = direct ? static_cast<float *>(out.data) + c * out.channel : map;
    const int64_t sum_row = direct ? out.channel : area * m.block;
    int64_t *from[4], *to[4], tap[4];
    for (int t = 0; t < 4; ++t) tap[t] = -(t / 2 * row + t % 2) * m.block;
    for (int k = 0; k < 4; ++k) {
        const Class q = class_of(s, k);
        const int64_t runs = q.area() * m.block / kLanes;
        from[k] = reinterpret_cast<int64_t *>(arena.floats(2 * runs));
        to[k] = reinterpret_cast<int64_t *>(arena.floats(2 * runs));
        for (int64_t i = 0; i < runs; ++i) {
            const int64_t j = i * kLanes / m.block, lane = i * kLanes % m.block, y = j / q.w, x = j % q.w;
            from[k][i] = ((q.y + y + 1) * row + q.x + x + 1) * m.block + lane;
            to[k][i] = ((q.y + 2 * y) * s.width + q.x + 2 * x) * m.block + lane;
        }
    }
    zero(panel, group * plane);
    for (int64_t n = 0; n < heads * head_width;) {
        const int64_t head = n / head_width, i = n % head_width, rows = smaller(group, head_width - i);
        for (int64_t r = 0; r < rows; ++r)
            for (int64_t y = 0; y < h; ++y)
                for (int64_t k = 0; k < w * m.block; k += kLanes)
                    copy16(panel + r * plane + ((y + 1) * row + 1) * m.block + k,
                           dy + (n + r) * m.count() + y * w * m.block + k);
        for (int64_t at = 0; at < c_end - c; at += 24)
            for (int64_t r = 0; r < rows; r += kAtOnce)
                for (int k = 0; k < 4; ++k) {
                    const Class q = class_of(s, k);
                    const Product product = {weights[head] + ((i + r) * s.channels + c + at) * 16 + q.tap, 16, s.channels * 16,
                                             panel + r * plane, from[k], plane, tap, smaller(kAtOnce, rows - r),
                                             sum + at * sum_row, to[k], sum_row, n + r > 0, chunk_of(heads * head_width * 4)};
                    multiply<kParity>(product, smaller(24, c_end - c - at), q.area() * m.block / kLanes);
                }
        n += rows;
    }
    if (!direct) write_lanes(map, s, m, c, c_end, out);
}

// The same without lanes.
void direct_to_input(const float *dy, const Shape &s, const Columns &m, const float *const *weights, int64_t heads,
                   int64_t head_width, int64_t c, int64_t c_end, const View &out) {
    Arena arena;
    const int64_t h = s.height / 2, w = s.width / 2, row = w + 2, plane = (h + 2) * row, depth = c_end - c;
    Class classes[4];
    int64_t widest = 0, columns[4];
    for (int k = 0; k < 4; ++k) {
        classes[k] = class_of(s, k);
        columns[k] = m.images * classes[k].area();
        if (columns[k] > widest) widest = columns[k];
    }
    const int64_t all_runs = (widest + kLanes - 1) / kLanes, block_runs = smaller(all_runs, 6);
    const int64_t pitch = (block_runs + 1) * kLanes, group = smaller(kPanel / (16 * pitch), head_width);
    const int64_t most_runs = block_runs * kLanes + 1;
    float *panel = arena.floats(group * 16 * pitch), *padded = arena.floats(m.images * plane);
    float *sum = arena.floats(4 * depth * pitch);
    zero(panel, group * 16 * pitch);
    zero(padded, m.images * plane);
    int64_t straight[6] = {0, kLanes, 2 * kLanes, 3 * kLanes, 4 * kLanes, 5 * kLanes}, tap[4], parts[4];
    for (int t = 0; t < 4; ++t) tap[t] = t * pitch;
    Run *plan = reinterpret_cast<Run *>(arena.floats(4 * 4 * most_runs));
    for (int64_t m0 = 0; m0 < all_runs * kLanes; m0 += block_runs * kLanes) {
        int64_t size[4];  // columns of each class in this block
        for (int k = 0; k < 4; ++k) {
            size[k] = smaller(columns[k] - m0, block_runs * kLanes);
            parts[k] = plan_runs(classes[k].h, classes[k].w, m0, m0 + size[k], plane, row, plan + k * most_runs);
        }
        for (int64_t n = 0; n < heads * head_width;) {
            const int64_t head = n / head_width, i = n % head_width, rows = smaller(group, head_width - i);
            for (int64_t r = 0; r < rows; ++r) {
                const float *from = dy + (n + r) * m.count();
                for (int64_t b = 0; b < m.images; ++b)
                    for (int64_t y = 0; y < h; ++y)
                        for (int64_t x = 0; x < w; ++x) padded[b * plane + (y + 1) * row + x + 1] = *from++;
                for (int k = 0; k < 4; ++k)
                    for (int t = 0; t < 4; ++t)  // the first position of a class and tap (0, 0) meet at dy's own
                        gather(plan + k * most_runs, parts[k], classes[k].w,
                               padded + (classes[k].y + 1 - t / 2) * row + classes[k].x + 1 - t % 2,
                               panel + (r * 16 + k * 4 + t) * pitch);
            }
            for (int64_t at = 0; at < depth; at += 24)
                for (int64_t r = 0; r < rows; r += kAtOnce)
                    for (int k = 0; k < 4; ++k) {
                        if (size[k] <= 0) continue;
                        const Product product = {weights[head] + ((i + r) * s.channels + c + at) * 16 + classes[k].tap,
                                                 16, s.channels * 16, panel + (r * 16 + k * 4) * pitch, straight, 16 * pitch,
                                                 tap, smaller(kAtOnce, rows - r), sum + (k * depth + at) * pitch, straight,
                                                 pitch, n + r > 0, chunk_of(heads * head_width * 4)};
                        multiply<kParity>(product, smaller(24, depth - at), (size[k] + kLanes - 1) / kLanes);
                    }
            n += rows;
        }
        for (int64_t i = 0; i < depth; ++i)
            for (int k = 0; k < 4; ++k) {
                const Class &q = classes[k];
                const float *value = sum + (k * depth + i) * pitch;
                for (int64_t at = 0; at < size[k];) {
                    const int64_t b = (m0 + at) / q.area(), y = (m0 + at) % q.area() / q.w, x = (m0 + at) % q.w;
                    const int64_t count = smaller(q.w - x, size[k] - at);
                    const int64_t to = (c + i) * out.channel + (q.y + 2 * y) * out.y + (q.x + 2 * x) * out.x;
                    write_run(out, to + b * out.image, 2 * out.x, count, value + at, 1);
                    at += count;
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

// With lanes: out [rows][channel * 16] (+)= gradient to the weights of the channels packed in `planes`, 4 rows by 4 taps at a
// time, each a sum over runs that ends in one sum over lanes. `dy` [rows, columns].
void lanes_to_weights(const float *dy, const float *planes, const int64_t *run, const Columns &m, int64_t plane,
                      int64_t row_step, int64_t rows, int64_t channels, float *out, int64_t out_row, bool add) {
    const int64_t columns = m.count();
    for (int64_t n = 0; n < rows; n += 4)
        for (int64_t i = 0; i < channels * 4; ++i) {
            const float *x = planes + i / 4 * plane + i % 4 * row_step, *a = dy + n * columns;
            vec sum[16] = {};
            for (int64_t v = 0; v < columns / kLanes; ++v, a += kLanes)
                for (int64_t part = 0; part < kLanes; part += VECTOR) {
                    vec taps[4];
                    UNROLL for (int t = 0; t < 4; ++t) taps[t] = load(x + run[v] + t * m.block + part);
                    UNROLL for (int r = 0; r < 4; ++r) {
                        const vec d = load(a + r * columns + part);
                        UNROLL for (int t = 0; t < 4; ++t) sum[4 * r + t] += d * taps[t];
                    }
                }
            alignas(64) float total[16];
            sum_each(sum, total);
            for (int r = 0; r < 4; ++r) {
                vec4 &to = *reinterpret_cast<vec4 *>(out + (n + r) * out_row + i * 4);
                const vec4 value = *reinterpret_cast<vec4 *>(total + 4 * r);
                to = add ? to + value : value;
            }
        }
}
