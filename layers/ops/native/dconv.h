/* DConv with given kernels: y[o][p] = sum over taps of kernels[group(o)][t][p] x[channel(o)][p + t]; see dconv_reference.py.
 *
 * Bound by memory: every kernel is read once. A unit is a kernel with the channels that it serves, or a channel with the kernels
 * that it has; units share nothing, so that threads share nothing. A band of rows of one channel has a padded copy. */
#ifndef SURGEON_DCONV_H
#define SURGEON_DCONV_H

#include "gemm.h"
#include "window.h"

typedef struct {
    Window s;
    int64_t n, units, channels, kernels; /* channels and kernels of a unit; one of them is 1 */
    int64_t band, scratch;
} Dconv;

typedef struct {
    const float *x, *kernels;
    float *y;
    const float *grad;
    float *gx, *gkernels; /* null: not wanted */
} DconvTensors;

#if defined(__AVX512F__) || defined(__aarch64__)
enum { DCONV_VECTORS = 24 };
#else
enum { DCONV_VECTORS = 12 };
#endif
/* DCONV_VECTORS: of a whole output channel, that registers hold. DCONV_BAND_BYTES: it stays in the first-level cache. DCONV_AHEAD: pixels
 * by which those of a tap are asked for before, each tap's for itself: the hardware foresees nothing beyond a page, nor a jump from tap to
 * tap. They come into the second-level cache only (`far`): few requests of the first can wait at a time. A kernel of DCONV_SMALL
 * floats, which the first-level cache holds with the next, is asked for in the order of memory while the one before is read. */
enum { DCONV_BAND_BYTES = 1 << 14, DCONV_AHEAD = 400, DCONV_SMALL = 1 << 11 };

/* A whole output channel, all of it in registers: its kernel is read from end to end, as the hardware foresees. */
INLINE void dconv_whole(const int vectors, int64_t taps, int64_t last, const int64_t *place, const float *x, const float *k,
                        int64_t size, float *y) {
    vec sum[DCONV_VECTORS];
    UNROLLED for (int v = 0; v < vectors; v++) sum[v] = (vec){0};
    for (int64_t t = 0; t < taps; t++, k += size) {
        const float *in = x + place[t];
        UNROLLED for (int v = 0; v < vectors; v++) {
            const int64_t at = v < vectors - 1 ? v * LANES : last;
            sum[v] = plus(sum[v], load(k + at), load(in + at));
        }
    }
    UNROLLED for (int v = 0; v < vectors; v++) store(y + (v < vectors - 1 ? v * LANES : last), sum[v]);
}

/* Some vectors of a row of one output channel, the last of them at `last`: k the kernels of the first tap there, `size` apart, x the
 * padded pixel under the window's first tap; `ahead` of k, memory is asked for. `known`: the number of taps, or 0. */
INLINE void dconv_vectors(const int vectors, const int known, const int small, int64_t taps, int64_t last, const int64_t *place,
                          const float *x, const float *k, int64_t size, int64_t ahead, float *y) {
    const int64_t many = known ? known : taps;
    const float *next = k + ahead;
    vec sum[LINE / LANES];
    UNROLLED for (int v = 0; v < vectors; v++) sum[v] = (vec){0};
    UNROLLED for (int64_t t = 0; t < many; t++, k += size) {
        const float *in = x + place[t];
        if (small)
            __builtin_prefetch(next + t * LINE);
        else
            far(k + ahead);
        UNROLLED for (int v = 0; v < vectors; v++) {
            const int64_t at = v < vectors - 1 ? v * LANES : last;
            sum[v] = plus(sum[v], load(k + at), load(in + at));
        }
    }
    UNROLLED for (int v = 0; v < vectors; v++) store(y + (v < vectors - 1 ? v * LANES : last), sum[v]);
}

/* A row from the kernel's pixel q on, at least a vector long; its last vector may overlap the one before. Of a small kernel the next
 * one is asked for in the order of memory, of others the pixels that this tap has next. */
INLINE void dconv_row_of(const int known, const int small, int64_t width, int64_t taps, const int64_t *place, const float *x,
                         const float *k, int64_t size, int64_t q, float *y) {
    enum { VECS = LINE / LANES };
    const int64_t others = (taps - 1) * size;
    for (int64_t j = 0; j < width; j += LINE) {
        int64_t last = width - j - LANES;
        int64_t ahead = small ? others + size + (taps - 1) * (q + j) : q + j + DCONV_AHEAD < size ? DCONV_AHEAD : DCONV_AHEAD + others;
        switch (least(ceil_div(width - j, LANES), VECS)) {
#define CASE(V, LAST) case V: dconv_vectors(V, known, small, taps, LAST, place, x + j, k + j, size, ahead, y + j); break;
            CASE(VECS, least(last, (VECS - 1) * LANES))
#if LANES == 4
            CASE(3, last) CASE(2, last)
#endif
#if LANES <= 8
            CASE(1, last)
#endif
#undef CASE
        }
    }
}

/* A row of one output channel, or several whose pixels follow each other; from the kernel's pixel q on. */
static void dconv_row(int64_t width, int64_t taps, const int64_t *place, const float *x, const float *k, int64_t size, int64_t q,
                      float *y) {
    if (width < LANES) {
        vec sum = {0};
        for (int64_t t = 0; t < taps; t++) sum = plus(sum, load_first(k + t * size, width), load(x + place[t]));
        store_first(y, sum, width);
        return;
    }
    if (width == size && size <= DCONV_VECTORS * LANES) {
        switch (ceil_div(size, LANES)) {
#define CASE(V) case V: dconv_whole(V, taps, size - LANES, place, x, k, size, y); return;
            CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6) CASE(7) CASE(8) CASE(9) CASE(10) CASE(11) CASE(12)
#if defined(__AVX512F__) || defined(__aarch64__)
            CASE(13) CASE(14) CASE(15) CASE(16) CASE(17) CASE(18) CASE(19) CASE(20) CASE(21) CASE(22) CASE(23) CASE(24)
#endif
#undef CASE
        }
    }
    switch ((taps == 9) * 2 + (taps * size <= DCONV_SMALL)) {
#define CASE(NINE, SMALL) case NINE * 2 + SMALL: dconv_row_of(9 * NINE, SMALL, width, taps, place, x, k, size, q, y); break;
        CASE(0, 0) CASE(0, 1) CASE(1, 0) CASE(1, 1)
#undef CASE
    }
}

/* Whether rows are long enough to be read from the padded copy, each by itself. */
static int whole_rows(const Window *s) { return s->ow >= LANES; }

/* Of the padded rows one copy for each column of the window, in which the pixels of several output rows follow each other. */
typedef struct {
    int64_t part; /* floats of every sh-th row of one of them */
} Flat;

static Flat flat(const Window *s, int64_t rows) { return (Flat){spaced((rows + (s->lh - 1) * s->dh / s->sh) * s->ow)}; }

static void flat_places(const Window *s, Flat f, int64_t *place) {
    for (int64_t u = 0; u < s->lh; u++)
        for (int64_t v = 0; v < s->lw; v++) *place++ = (v * s->sh + u * s->dh % s->sh) * f.part + u * s->dh / s->sh * s->ow;
}

static void flat_copy(const Window *s, Padded p, Flat f, const float *from, float *to) {
    for (int64_t v = 0; v < s->lw; v++) {
        const float *column = from + (v * s->dw % s->sw) * p.part + v * s->dw / s->sw;
        for (int64_t q = 0; q < s->sh; q++, to += f.part) {
            float *out = to;
            for (int64_t r = q; r < p.rows; r += s->sh, out += s->ow) /* the next row writes over what this one has too much */
                for (int64_t j = 0; j < s->ow; j += LANES) store(out + j, load(column + r * p.row + j));
        }
    }
}

/* A row backward: gx[j + t] += k[t][j] g[j], and gk[t][j] = or += x[j + t] g[j], which may take the place of k; its sums over j are
 * added to sums[t][lane], if wanted. Columns come outside of everything: a sum must have been stored long before its neighbor, which
 * overlaps it, is loaded. */
INLINE void dconv_back_row(const int input, const int kernel, const int total, int64_t width, int64_t lw, int64_t taps,
                           const int64_t *place, const float *x, const float *g, const float *k, float *gx, float *gk, int64_t size,
                           int add, float *sums) {
    for (int64_t v = 0; v < lw; v++)
        for (int64_t t = v; t < taps; t += lw) {
            const float *by = k + t * size, *in = x + place[t];
            float *out = gx + place[t], *to = gk + t * size;
            vec sum[2] = {{0}, {0}};
            int64_t j = 0;
#define STEP(I)                                                                                       \
    {                                                                                                 \
        vec grad = load(g + j + I * LANES);                                                           \
        if (input) store(out + j + I * LANES, plus(load(out + j + I * LANES), load(by + j + I * LANES), grad)); \
        if (kernel) {                                                                                 \
            vec product = load(in + j + I * LANES) * grad;                                            \
            if (total) sum[I] += product;                                                             \
            store(to + j + I * LANES, add ? load(to + j + I * LANES) + product : product);            \
        }                                                                                             \
    }
            for (; j + 2 * LANES <= width; j += 2 * LANES) {
                STEP(0)
                STEP(1)
            }
            for (; j + LANES <= width; j += LANES) STEP(0)
#undef STEP
            for (int64_t i = 0; j < width; i++, j++) {
                if (input) out[j] += by[j] * g[j];
                if (!kernel) continue;
                float product = in[j] * g[j];
                if (total) sum[1][i] += product;
                to[j] = add ? to[j] + product : product;
            }
            if (total) store(sums + t * LANES, load(sums + t * LANES) + (sum[0] + sum[1]));
        }
}

static void dconv_back(int64_t width, int64_t lw, int64_t taps, const int64_t *place, const float *x, const float *g, const float *k,
                       float *gx, float *gk, int64_t size, int add, float *sums) {
    switch ((gx != NULL) * 4 + (gk != NULL) * 2 + (sums != NULL)) {
#define CASE(X, K, S) \
    case X * 4 + K * 2 + S: dconv_back_row(X, K, S, width, lw, taps, place, x, g, k, gx, gk, size, add, sums); break;
        CASE(0, 1, 0) CASE(0, 1, 1) CASE(1, 0, 0) CASE(1, 1, 0) CASE(1, 1, 1)
#undef CASE
    }
}

static void dconv_unit(const Dconv *d, const DconvTensors *t, float *scratch, int64_t unit, int fresh, int backward) {
    const Window *s = &d->s;
    const int whole = whole_rows(s);
    int64_t pixels = s->oh * s->ow, taps = s->lh * s->lw, many = d->channels * d->kernels;
    const float *kernels = t->kernels + unit * d->kernels * taps * pixels;
    int64_t *place = (int64_t *)take(&scratch, 2 * taps);
    int64_t floats = padded_floats(padded(s, 0, d->band), 1);
    float *x = take(&scratch, floats), *gx = take(&scratch, floats), *apart = take(&scratch, s->lw * s->sh * flat(s, d->band).part);
    for (int64_t i0 = 0; i0 < s->oh; i0 += d->band) {
        int64_t rows = least(d->band, s->oh - i0);
        Padded p = padded(s, i0, i0 + rows);
        Flat f = flat(s, rows);
        if (backward || whole)
            tap_places(s, p, place);
        else
            flat_places(s, f, place);
        for (int64_t c = 0; c < d->channels; c++) {
            int64_t channel = unit * d->channels + c, plane = channel * s->h * s->w;
            if (!backward || t->gkernels) {
                if (fresh || d->band < s->oh) window_clear(p, 1, x);
                window_rows(s, p, 1, t->x + plane, x);
                fresh = 0;
            }
            if (!backward && !whole) flat_copy(s, p, f, x, apart);
            for (int64_t q = 0; q < s->h * s->w && q < 1024; q += LINE) far(t->x + plane + s->h * s->w + q);
            if (backward && t->gx) memset(gx, 0, (size_t)padded_floats(p, 1) * 4);
            for (int64_t r = 0; r < d->kernels; r++) {
                int64_t o = (unit * many + c * d->kernels + r) * pixels + i0 * s->ow, own = r * taps * pixels + i0 * s->ow;
                if (!backward && !whole)
                    dconv_row(rows * s->ow, taps, place, apart, kernels + own, pixels, i0 * s->ow, t->y + o);
                for (int64_t i = 0, q = 0; i < rows && !backward && whole; i++, q += s->ow)
                    dconv_row(s->ow, taps, place, x + i * s->sh * p.row, kernels + own + q, pixels, i0 * s->ow + q,
                              t->y + o + q);
                for (int64_t i = 0; i < rows && backward; i++) {
                    int64_t at = i * s->sh * p.row, row = i * s->ow;
                    dconv_back(s->ow, s->lw, taps, place, x + at, t->grad + o + row, kernels + own + row, t->gx ? gx + at : NULL,
                               t->gkernels ? t->gkernels + unit * d->kernels * taps * pixels + own + row : NULL, pixels, c > 0, NULL);
                }
            }
            if (backward && t->gx) window_add(s, p, 1, gx, t->gx + plane);
        }
    }
}

/* Fills in the rows of a band and the scratch of a call. */
void dconv_plan(Dconv *d) {
    int64_t row = 4 * (padded(&d->s, 0, 1).row + (whole_rows(&d->s) ? 0 : d->s.lw * d->s.ow)), taps = d->s.lh * d->s.lw;
    int64_t rows = (DCONV_BAND_BYTES / row - (d->s.lh - 1) * d->s.dh - 1) / d->s.sh + 1;
    d->band = least(d->s.oh, most(rows, most(1, (d->s.lh - 1) * d->s.dh)));
    d->scratch = round_up(2 * taps) + 2 * round_up(padded_floats(padded(&d->s, 0, d->band), 1)) +
                 round_up(d->s.lw * d->s.sh * flat(&d->s, d->band).part) + 64;
}

/* Units from `first` to `end`, of all images. */
void dconv_run(const Dconv *d, const DconvTensors *t, float *scratch, int64_t first, int64_t end, int64_t backward) {
    for (int64_t unit = first; unit < end; unit++) dconv_unit(d, t, scratch, unit, unit == first, (int)backward);
}

#endif
