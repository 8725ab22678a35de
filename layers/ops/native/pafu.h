/* PAFU: y[p] = K[index[p]] * x at p, the kernel being another at every pixel; see pafu_reference.py for the shapes.
 *
 * Work is done in chunks of output rows. The input under a chunk is copied once into a zero-padded frame, channels last, in which
 * the patch of a pixel is a run of channels for every tap. Pixels are sorted by kernel; lanes are output channels, and a few pixels
 * of one kernel are summed up together, their patches read where they lie. A piece of the kernel (some taps, or some channels of
 * one) stays in the first-level cache while it multiplies a run of pixels, before the next. The sum of a pixel runs over pieces,
 * taps and channels in the same order wherever the pixel falls: results do not depend on chunks, tasks and threads. */
#ifndef SURGEON_PAFU_H
#define SURGEON_PAFU_H

#include "gemm.h"

#if defined(__AVX512F__) || defined(__aarch64__)
enum { PAFU_PIXELS = 6, PAFU_VECTORS = 4 };
#else
enum { PAFU_PIXELS = 6, PAFU_VECTORS = 2 };
#endif
/* PAFU_DEPTH: numbers of a patch at a time, whose part of a packed kernel takes 16 KiB of the first-level cache. PAFU_RUN: pixels that
 * it multiplies there, whose sums take another 12 KiB at most. AHEAD: floats by which rows that are turned are asked for before; the
 * hardware does not foresee so many. KERNEL_AHEAD: floats of the next kernel that are asked for with every 16 numbers of a patch.
 * GAP: floats between the taps of a packed kernel, which would otherwise be whole pages apart and share a set of the cache. */
enum { PAFU_DEPTH = 4096 / (PAFU_VECTORS * LANES), PAFU_RUN = 8 * PAFU_PIXELS, AHEAD = 64, KERNEL_AHEAD = 2 * LINE, GAP = LINE };

typedef struct {
    int64_t h, w, c, outputs, groups, lh, lw, sh, sw, dh, dw;
    int64_t n; /* kernels, the first at `kernel`, the others at `further`, one after another */
    int64_t last_0, last_others; /* 1: the channels of the first kernel, of the others, are last in memory, else the taps */
    int64_t segment;               /* pixels of a task at most, which packs its kernel once */
    int64_t plane;                 /* pixels of a whole map of the output */
    int64_t images, rows, columns; /* of the chunk's output */
    int64_t height, width;         /* of its frame */
    int64_t first, inside, across, top, left; /* input rows from `first`, `inside` many, `across` columns, at (top, left) of it */
    int64_t last;  /* 1: x, y and the gradient are channels last */
    int64_t parts;   /* of the images, each sorted for itself: their gradients of the input share nothing */
} Pafu;

typedef struct {
    const float *x, *kernel, *further, *grad; /* x from the first image of the chunk on, grad from its first row, too */
    const int64_t *index;            /* of the chunk's pixels */
    int64_t *bounds, *order, *start; /* where a part's and kernel's pixels begin; of the sorted, outputs and patches */
    int64_t *runs;                   /* kernel, first and end of sorted pixels, `segment` pixels at most */
    float *frame, *y, *g, *gframe;   /* channels last: the frame, the chunk's output, its gradient, that of the frame */
    float *out, *gx;                 /* the output as `grad`, the gradient of the input as `x` */
    float *gkernel, *gfurther, *gscores; /* null: not wanted; gradients of kernels are channels last, scores (pixel, n) */
} PafuTensors;

/* ---- in and out of channels last ------------------------------------------------------------------------------------------ */

/* Where pixels lie that have their channels last: those of a row `step` apart. */
typedef struct {
    int64_t columns, row, step; /* pixels of a row, distances of rows and of pixels */
} Places;

enum { PLACES = 256 }; /* pixels at a time, whose places are found once for all channels */

INLINE void places_of(Places s, int64_t p, int64_t count, int64_t *place) {
    int64_t at = p % s.columns, next = p / s.columns * s.row + at * s.step;
    for (int64_t i = 0; i < count; i++) {
        const int64_t ends = ++at == s.columns;
        place[i] = next;
        next += ends ? s.row - (s.columns - 1) * s.step : s.step;
        at = ends ? 0 : at;
    }
}

/* to[place(p) + f] = from[f][p]. */
static void to_last(const float *from, int64_t from_row, int64_t rows, int64_t pixels, float *to, Places s) {
    int64_t places[PLACES];
    for (int64_t first = 0; first < pixels; first += PLACES) {
        if (pixels >= LANES) first = least(first, pixels - LANES); /* the last block overlaps the one before */
        const int64_t end = least(first + PLACES, pixels);
        places_of(s, first, end - first, places);
        for (int64_t f = 0; f < rows; f += LANES) {
            if (rows >= LANES) f = least(f, rows - LANES);
            int64_t high = least(LANES, rows - f);
            for (int64_t p = first; p < end; p += LANES) {
                if (pixels >= LANES) p = least(p, end - LANES);
                const int64_t wide = least(LANES, end - p), *place = places + p - first;
                if (wide == LANES && high == LANES) {
                    vec v[LANES];
                    UNROLLED for (int i = 0; i < LANES; i++) {
                        v[i] = load(from + (f + i) * from_row + p);
                        __builtin_prefetch(from + (f + i) * from_row + p + AHEAD);
                    }
                    if (p + 2 * LANES <= end) UNROLLED for (int i = 0; i < LANES; i++) __builtin_prefetch(to + place[LANES + i] + f, 1);
                    turn(v);
                    UNROLLED for (int i = 0; i < LANES; i++) store(to + place[i] + f, v[i]);
                } else
                    for (int64_t i = 0; i < wide; i++)
                        for (int64_t r = 0; r < high; r++) to[place[i] + f + r] = from[(f + r) * from_row + p + i];
            }
        }
    }
}

/* to[f][p] (+)= from[place(p) + f]. */
static void from_last(const float *from, Places s, int64_t rows, int64_t pixels, float *to, int64_t to_row, const int add) {
    int64_t places[PLACES];
    for (int64_t first = 0; first < pixels; first += PLACES) {
        if (!add && pixels >= LANES) first = least(first, pixels - LANES);
        const int64_t end = least(first + PLACES, pixels);
        places_of(s, first, end - first, places);
        for (int64_t f = 0; f < rows; f += LANES) {
            if (!add && rows >= LANES) f = least(f, rows - LANES);
            int64_t high = least(LANES, rows - f);
            for (int64_t p = first; p < end; p += LANES) {
                if (!add && pixels >= LANES) p = least(p, end - LANES);
                const int64_t wide = least(LANES, end - p), *place = places + p - first;
                if (wide == LANES && high == LANES) {
                    vec v[LANES];
                    UNROLLED for (int i = 0; i < LANES; i++) v[i] = load(from + place[i] + f);
                    turn(v);
                    UNROLLED for (int i = 0; i < LANES; i++) {
                        float *at = to + (f + i) * to_row + p;
                        store(at, add ? load(at) + v[i] : v[i]);
                    }
                } else
                    for (int64_t i = 0; i < wide; i++)
                        for (int64_t r = 0; r < high; r++) {
                            float *at = to + (f + r) * to_row + p + i, value = from[place[i] + f + r];
                            *at = add ? *at + value : value;
                        }
            }
        }
    }
}

/* ---- what Python calls before: the frame, the order of the pixels ----------------------------------------------------------- */

typedef void PafuWork(const Pafu *, const PafuTensors *, float *scratch, int64_t task);

/* Tasks from `first` to `end`, one after another: a call from Python takes as long as a small one. */
void pafu_tasks(const Pafu *a, const PafuTensors *t, float *scratch, PafuWork *work, int64_t first, int64_t end) {
    for (int64_t task = first; task < end; task++) work(a, t, scratch, task);
}

/* Whether all indices name one of n kernels. */
int64_t pafu_in_range(const int64_t *index, int64_t count, int64_t n) {
    uint64_t most_of_all = 0;
    for (int64_t i = 0; i < count; i++) most_of_all = (uint64_t)index[i] > most_of_all ? (uint64_t)index[i] : most_of_all;
    return most_of_all < (uint64_t)n;
}

/* The frame of one image of the chunk. */
void pafu_frame(const Pafu *a, const PafuTensors *t, float *scratch, int64_t task) {
    (void)scratch;
    const int64_t image = task, c = a->c, size = a->h * a->w, row = a->width * c;
    float *frame = t->frame + image * a->height * row;
    const float *x = t->x + image * c * size;
    memset(frame, 0, (size_t)(a->top * row) * 4);
    memset(frame + (a->top + a->inside) * row, 0, (size_t)((a->height - a->top - a->inside) * row) * 4);
    for (int64_t r = 0; r < a->inside; r++) {
        float *to = frame + (a->top + r) * row;
        memset(to, 0, (size_t)(a->left * c) * 4);
        memset(to + (a->left + a->across) * c, 0, (size_t)((a->width - a->left - a->across) * c) * 4);
        if (a->last) memcpy(to + a->left * c, x + (a->first + r) * a->w * c, (size_t)(a->across * c) * 4);
    }
    float *inner = frame + a->top * row + a->left * c;
    if (!a->last && a->across == a->w)
        to_last(x + a->first * a->w, size, c, a->inside * a->w, inner, (Places){a->w, row, c});
    else if (!a->last)
        for (int64_t r = 0; r < a->inside; r++)
            to_last(x + (a->first + r) * a->w, size, c, a->across, inner + r * row, (Places){a->w, row, c});
}

/* Sort the pixels of every part by kernel; returns the number of runs of one kernel. */
int64_t pafu_sort(const Pafu *a, const PafuTensors *t) {
    int64_t pixels = a->rows * a->columns, *next = t->bounds, keys = a->parts * a->n;
    memset(next, 0, (size_t)(keys + 1) * sizeof *next);
    for (int64_t b = 0, p = 0; b < a->images; b++)
        for (int64_t key = b * a->parts / a->images * a->n, end = p + pixels; p < end; p++) next[key + t->index[p]]++;
    for (int64_t i = 0, sum = 0; i <= keys; i++) {
        int64_t count = next[i];
        next[i] = sum;
        sum += count;
    }
    for (int64_t b = 0, p = 0; b < a->images; b++)
        for (int64_t i = 0, key = b * a->parts / a->images * a->n; i < a->rows; i++)
            for (int64_t j = 0; j < a->columns; j++, p++) {
                int64_t at = next[key + t->index[p]]++;
                t->order[at] = p * a->outputs;
                t->start[at] = ((b * a->height + i * a->sh) * a->width + j * a->sw) * a->c;
            }
    for (int64_t i = keys; i > 0; i--) next[i] = next[i - 1];
    next[0] = 0;
    for (int64_t i = 0, end = a->images * pixels; i < PAFU_PIXELS; i++) /* asked for ahead, but of no account */
        t->order[end + i] = t->start[end + i] = 0;
    int64_t runs = 0;
    for (int64_t i = 0; i < keys; i++)
        for (int64_t p = 0, count = next[i + 1] - next[i], pieces = ceil_div(count, a->segment); p < pieces; p++, runs++) {
            int64_t *run = t->runs + 3 * runs;
            run[0] = i % a->n, run[1] = next[i] + count * p / pieces, run[2] = next[i] + count * (p + 1) / pieces;
        }
    t->runs[3 * runs] = 0; /* the kernel after the last, asked for ahead */
    return runs;
}

/* ---- a piece of a kernel, and the pixels that it multiplies ----------------------------------------------------------------- */

typedef struct {
    int64_t tap, taps, channel, channels; /* of a patch: some taps with all channels, or one with some */
} Piece;

/* The next piece behind `p`, of which `taps` 0 is before the first; its taps are 0 behind the last. */
static Piece next_piece(const Pafu *a, Piece p) {
    int64_t taps = a->lh * a->lw, channels = a->c / a->groups, part = even_part(channels, PAFU_DEPTH);
    int64_t many = part < channels ? 1 : even_part(taps, most(1, PAFU_DEPTH / channels));
    int64_t tap = p.tap, channel = p.channel + p.channels;
    if (channel >= channels) tap += p.taps, channel = 0;
    return (Piece){tap, least(many, taps - tap), channel, least(part, channels - channel)};
}

static const float *kernel_of(const Pafu *a, const PafuTensors *t, int64_t i) {
    return i ? t->further + (i - 1) * a->outputs * (a->c / a->groups) * a->lh * a->lw : t->kernel;
}

/* Rows of `row` outputs from o on, of which there are `count`, for every number of a patch of kernel i: taps, in them channels. All
 * at once: rows of the kernel are read from end to end, as the hardware foresees. */
static void pack_kernel(const Pafu *a, const PafuTensors *t, int64_t i, int64_t o, int64_t count, int64_t row, float *to) {
    int64_t taps = a->lh * a->lw, channels = a->c / a->groups, size = taps * channels;
    Places last = {channels, channels * row + GAP, row}, first = {taps, row, channels * row + GAP};
    if (count < row) memset(to, 0, (size_t)(size * row + taps * GAP) * 4);
    to_last(kernel_of(a, t, i) + o * size, size, count, size, to, (i ? a->last_others : a->last_0) ? last : first);
}

typedef struct {
    const float *at, *end;
} Ahead; /* what will be packed next, from where nobody has asked for it yet */

typedef struct {
    const float *frame;     /* from the first channel of the piece on */
    const int64_t *start;   /* of the pixels' patches */
    const int64_t *place;   /* of the piece's taps */
    int64_t taps, channels;
    const float *packed;
    Ahead ahead;
    const float *next;      /* where the next patches to be multiplied are, seen as `frame` and `start` */
    const int64_t *next_start;
} Patches;

INLINE void multiply_block(const int pixels, const int vectors, const Patches *b, float *sums, int first) {
    const float *packed = b->packed;
    Ahead ahead = b->ahead;
    vec sum[PAFU_PIXELS][PAFU_VECTORS];
    UNROLLED for (int r = 0; r < pixels; r++) UNROLLED for (int v = 0; v < vectors; v++)
        sum[r][v] = first ? (vec){0} : load(sums + (r * vectors + v) * LANES);
    for (int64_t u = 0; u < b->taps; u++) {
        const float *x[PAFU_PIXELS], *next[PAFU_PIXELS];
        UNROLLED for (int r = 0; r < pixels; r++) x[r] = b->frame + b->start[r] + b->place[u];
        UNROLLED for (int r = 0; r < pixels; r++) next[r] = b->next + b->next_start[r] + b->place[u];
        for (int64_t c0 = 0; c0 < b->channels; c0 += 16) {
            const int64_t c1 = least(c0 + 16, b->channels);
            UNROLLED for (int r = 0; r < pixels; r++) __builtin_prefetch(next[r] + c0); /* unforeseen: the pixels are sorted */
            UNROLLED for (int i = 0; i < KERNEL_AHEAD; i += LINE) far(ahead.at + i);
            ahead.at = ahead.at + KERNEL_AHEAD < ahead.end ? ahead.at + KERNEL_AHEAD : ahead.end;
            for (int64_t c = c0; c < c1; c++, packed += vectors * LANES) {
                vec k[PAFU_VECTORS];
                UNROLLED for (int v = 0; v < vectors; v++) k[v] = held(load(packed + v * LANES));
                UNROLLED for (int r = 0; r < pixels; r++) {
                    vec in = held(splat(x[r][c]));
                    UNROLLED for (int v = 0; v < vectors; v++) sum[r][v] = plus(sum[r][v], in, k[v]);
                }
            }
        }
        packed += GAP;
    }
    UNROLLED for (int r = 0; r < pixels; r++) UNROLLED for (int v = 0; v < vectors; v++)
        store(sums + (r * vectors + v) * LANES, sum[r][v]);
}

/* Call a function for a number of pixels (or of outputs) and of vectors. */
#if defined(__AVX512F__) || defined(__aarch64__)
#define EACH_WIDTH(R, CALL) CALL(R, 1) CALL(R, 2) CALL(R, 3) CALL(R, 4)
#else
#define EACH_WIDTH(R, CALL) CALL(R, 1) CALL(R, 2)
#endif
#define EACH_BLOCK(CALL) \
    EACH_WIDTH(1, CALL) EACH_WIDTH(2, CALL) EACH_WIDTH(3, CALL) EACH_WIDTH(4, CALL) EACH_WIDTH(5, CALL) EACH_WIDTH(6, CALL)

/* Rows of `vectors` vectors, one a pixel: the first piece's, or more onto them. */
static void multiply(int64_t pixels, int64_t vectors, const Patches *b, float *sums, int first) {
    switch (pixels * 8 + vectors) {
#define CALL(R, V) case R * 8 + V: multiply_block(R, V, b, sums, first); return;
        EACH_BLOCK(CALL)
#undef CALL
    }
}

/* The sums of pixels, to or, if `add`, onto the rows of `to` that begin at `at`; of the last vector only `last` lanes. */
static void keep_sums(const float *sums, int64_t pixels, int64_t vectors, float *to, const int64_t *at, int64_t last, int add) {
    for (int64_t r = 0; r < pixels; r++)
        for (int64_t v = 0; v < vectors; v++, sums += LANES) {
            float *row = to + at[r] + v * LANES;
            int64_t lanes = v == vectors - 1 ? last : LANES;
            store_first(row, add ? load(sums) + load_first(row, lanes) : load(sums), lanes);
        }
}

static void pafu_places(const Pafu *a, int64_t *place) {
    for (int64_t u = 0; u < a->lh; u++)
        for (int64_t v = 0; v < a->lw; v++) *place++ = (u * a->dh * a->width + v * a->dw) * a->c;
}

/* A block of output channels of one group. */
typedef struct {
    int64_t group, first, many, vectors, last; /* the first, how many, in how many vectors, of the last how many lanes */
} Outputs;

static Outputs outputs_of(const Pafu *a, int64_t block) {
    int64_t outputs = a->outputs / a->groups, count = ceil_div(outputs, LANES), width = even_part(count, PAFU_VECTORS);
    int64_t blocks = ceil_div(count, width), group = block / blocks, v = block % blocks * width, vectors = least(width, count - v);
    int64_t many = least(vectors * LANES, outputs - v * LANES);
    return (Outputs){group, group * outputs + v * LANES, many, vectors, many - (vectors - 1) * LANES};
}

/* Into how many of them the work of a pixel is cut. */
int64_t pafu_blocks(const Pafu *a) {
    int64_t count = ceil_div(a->outputs / a->groups, LANES);
    return a->groups * ceil_div(count, even_part(count, PAFU_VECTORS));
}

/* The patches of pixels that start at `start`, for a piece of the packed kernel. */
static Patches patches_of(const Pafu *a, const PafuTensors *t, Outputs o, Piece p, const int64_t *place, const float *packed,
                          const int64_t *start) {
    int64_t inputs = a->c / a->groups;
    const float *frame = t->frame + o.group * inputs + p.channel;
    const float *piece = packed + (p.tap * inputs + p.channel) * o.vectors * LANES + p.tap * GAP;
    return (Patches){frame, start, place + p.tap, p.taps, p.channels, piece, {NULL, NULL}, frame, NULL};
}

/* Floats of scratch, for what multiplies and for the gradients. */
int64_t pafu_scratch(const Pafu *a) {
    int64_t taps = a->lh * a->lw, most_rows = most(a->c / a->groups * taps, a->outputs / a->groups);
    return round_up(2 * taps) + a->segment + most_rows * PAFU_VECTORS * LANES + taps * GAP + 64;
}

/* The whole sums of sorted pixels, `count` of them from `first` on and in blocks of `part`, for one block of output channels. The rows
 * that they are for are asked for in time, those of `rows` that begin at the pixels' outputs, and meanwhile what lies ahead. */
static void multiply_run(const Pafu *a, const PafuTensors *t, Outputs o, const int64_t *place, const float *packed, int64_t first,
                         int64_t count, int64_t part, float *sums, const float *rows, Ahead *ahead) {
    const int64_t *start = t->start + first, *order = t->order + first;
    Piece p = next_piece(a, (Piece){0}), next;
    for (int begin = 1; p.taps > 0; p = next, begin = 0) {
        Patches b = patches_of(a, t, o, p, place, packed, start);
        next = next_piece(a, p);
        const int last = next.taps == 0;
        for (int64_t q = 0; q < count; q += part, b.start += part) {
            int64_t here = least(part, count - q);
            b.next_start = b.start + here;
            if (q + here == count) { /* the same pixels' next piece, or the next pixels' first */
                b.next += place[last ? 0 : next.tap] - place[p.tap] + (last ? 0 : next.channel) - p.channel;
                if (!last) b.next_start = start;
            }
            for (int64_t r = 0; r < here && last; r++)
                for (int64_t v = 0; v < o.vectors; v++) __builtin_prefetch(rows + order[q + r] + v * LANES);
            b.ahead = *ahead;
            multiply(here, o.vectors, &b, sums + q * o.vectors * LANES, begin);
            ahead->at += least(ahead->end - ahead->at, p.taps * ceil_div(p.channels, 16) * KERNEL_AHEAD);
        }
    }
}

static Ahead kernel_ahead(const Pafu *a, const PafuTensors *t, int64_t i, int64_t block) {
    const int64_t size = a->lh * a->lw * (a->c / a->groups);
    Outputs o = outputs_of(a, block);
    const float *rows = kernel_of(a, t, i) + o.first * size;
    return (Ahead){rows, rows + o.many * size};
}

/* A run of sorted pixels of one kernel, and one block of output channels. */
void pafu_forward(const Pafu *a, const PafuTensors *t, float *scratch, int64_t task) {
    const int64_t blocks = pafu_blocks(a), *run_of = t->runs + task / blocks * 3;
    int64_t i = run_of[0], first = run_of[1], end = run_of[2], part = even_part(end - first, PAFU_PIXELS);
    int64_t *place = (int64_t *)take(&scratch, 2 * a->lh * a->lw);
    float sums[PAFU_RUN * PAFU_VECTORS * LANES] __attribute__((aligned(64)));
    Outputs o = outputs_of(a, task % blocks);
    Ahead ahead = kernel_ahead(a, t, t->runs[(task + 1) / blocks * 3], (task + 1) % blocks);
    pafu_places(a, place);
    pack_kernel(a, t, i, o.first, o.many, o.vectors * LANES, scratch);
    for (int64_t q = first, run = PAFU_RUN / PAFU_PIXELS * part; q < end; q += run) {
        int64_t count = least(run, end - q);
        multiply_run(a, t, o, place, scratch, q, count, part, sums, t->y + o.first, &ahead);
        keep_sums(sums, count, o.vectors, t->y + o.first, t->order + q, o.last, 0);
    }
}

/* The chunk's output of one image, from channels last to (O, P, Q). */
void pafu_output(const Pafu *a, const PafuTensors *t, float *scratch, int64_t task) {
    int64_t pixels = a->rows * a->columns, image = task;
    (void)scratch;
    from_last(t->y + image * pixels * a->outputs, (Places){pixels, 0, a->outputs}, a->outputs, pixels,
              t->out + image * a->outputs * a->plane, a->plane, 0);
}

#endif
