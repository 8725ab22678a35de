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

/* DCONV_BAND_BYTES: it and its sums stay in the first-level cache. DCONV_AHEAD: floats by which kernels are asked for before: the
 * hardware foresees nothing beyond a page, nor a jump from tap to tap. */
enum { DCONV_BAND_BYTES = 1 << 14, DCONV_AHEAD = 1024 };

/* Some rows of one output channel, `many` taps of it: kernels are read from end to end, as the hardware foresees. `k` the kernels of
 * the first of these taps, `size` apart; x the padded pixel under the window's first tap, of rows `step` apart. The sum of the taps
 * before lies in `sums`, in whole vectors; the last taps' goes to y, also in whole vectors, where a row writes over what the row
 * before it wrote too much, up to `y_end`. */
INLINE void dconv_taps(const int many, int64_t rows, int64_t width, const int64_t *place, const float *x, int64_t step, const float *k,
                       int64_t size, const float *k_end, float *sums, float *y, const float *y_end, int first) {
    for (int64_t i = 0; i < rows; i++, x += step, k += width)
        for (int64_t j = 0; j < width; j += LANES, sums += LANES) {
            int64_t lanes = k + (many - 1) * size + j + LANES <= k_end ? LANES : width - j;
            vec sum = first ? (vec){0} : load(sums);
            UNROLLED for (int t = 0; t < many; t++) __builtin_prefetch(k + t * size + j + DCONV_AHEAD);
            UNROLLED for (int t = 0; t < many; t++) sum = plus(sum, load_first(k + t * size + j, lanes), load(x + place[t] + j));
            if (!y)
                store(sums, sum);
            else
                store_first(y + i * width + j, sum, y + i * width + j + LANES <= y_end ? LANES : width - j);
        }
}

enum { TAPS_AT_ONCE = 3 };

static void dconv_rows(int64_t rows, int64_t width, int64_t taps, const int64_t *place, const float *x, int64_t step, const float *k,
                       int64_t size, const float *k_end, float *sums, float *y, const float *y_end) {
    for (int64_t t = 0, many; t < taps; t += many, k += many * size, place += many) {
        many = least(TAPS_AT_ONCE, taps - t);
        float *to = t + many == taps ? y : NULL;
        switch (many) {
#define CASE(MANY) case MANY: dconv_taps(MANY, rows, width, place, x, step, k, size, k_end, sums, to, y_end, t == 0); break;
            CASE(1) CASE(2) CASE(3)
#undef CASE
        }
    }
}

/* gk[t][j] = or += x[j + t] g[j]. */
static void dconv_kernel_row(int64_t width, int64_t taps, const int64_t *place, const float *x, const float *g, int64_t size,
                             float *gk, int add) {
    for (int64_t t = 0; t < taps; t++) {
        const float *in = x + place[t];
        float *restrict out = gk + t * size;
        int64_t j = 0;
        for (; j + LANES <= width; j += LANES) {
            vec product = load(in + j) * load(g + j);
            store(out + j, add ? load(out + j) + product : product);
        }
        for (; j < width; j++) out[j] = add ? out[j] + in[j] * g[j] : in[j] * g[j];
    }
}

/* gx[j + t] += k[t][j] g[j]. */
static void dconv_input_row(int64_t width, int64_t lw, int64_t taps, const int64_t *place, const float *k, const float *g,
                            int64_t size, float *gx) {
    for (int64_t v = 0; v < lw; v++)
        for (int64_t t = v; t < taps; t += lw) {
            const float *by = k + t * size;
            float *restrict out = gx + place[t];
            int64_t j = 0;
            for (; j + LANES <= width; j += LANES) store(out + j, plus(load(out + j), load(by + j), load(g + j)));
            for (; j < width; j++) out[j] += by[j] * g[j];
        }
}

static void dconv_unit(const Dconv *d, const DconvTensors *t, float *scratch, int64_t unit, int backward) {
    const Window *s = &d->s;
    int64_t pixels = s->oh * s->ow, taps = s->lh * s->lw, many = d->channels * d->kernels;
    const float *kernels = t->kernels + unit * d->kernels * taps * pixels;
    const float *k_end = t->kernels + d->n * d->units * d->kernels * taps * pixels;
    int64_t *place = (int64_t *)take(&scratch, 2 * taps);
    int64_t floats = padded_floats(padded(s, 0, d->band), 1);
    float *x = take(&scratch, floats), *gx = take(&scratch, floats), *sums = take(&scratch, d->band * round_up(s->ow));
    for (int64_t i0 = 0; i0 < s->oh; i0 += d->band) {
        int64_t rows = least(d->band, s->oh - i0);
        Padded p = padded(s, i0, i0 + rows);
        tap_places(s, p, place);
        for (int64_t c = 0; c < d->channels; c++) {
            int64_t channel = unit * d->channels + c, plane = channel * s->h * s->w;
            if (!backward || t->gkernels) window_copy(s, p, 1, t->x + plane, x);
            for (int64_t q = 0; q < s->h * s->w && q < DCONV_AHEAD; q += 16) __builtin_prefetch(t->x + plane + s->h * s->w + q);
            if (backward && t->gx) memset(gx, 0, (size_t)padded_floats(p, 1) * 4);
            for (int64_t r = 0; r < d->kernels; r++) {
                int64_t o = (unit * many + c * d->kernels + r) * pixels + i0 * s->ow, own = r * taps * pixels + i0 * s->ow;
                if (!backward)
                    dconv_rows(rows, s->ow, taps, place, x, s->sh * p.row, kernels + own, pixels, k_end, sums, t->y + o,
                               t->y + o + rows * s->ow);
                for (int64_t i = 0; i < rows && backward; i++) {
                    int64_t at = i * s->sh * p.row, row = i * s->ow;
                    if (t->gkernels)
                        dconv_kernel_row(s->ow, taps, place, x + at, t->grad + o + row, pixels,
                                         t->gkernels + unit * d->kernels * taps * pixels + own + row, c > 0);
                    if (t->gx) dconv_input_row(s->ow, s->lw, taps, place, kernels + own + row, t->grad + o + row, pixels, gx + at);
                }
            }
            if (backward && t->gx) window_add(s, p, 1, gx, t->gx + plane);
        }
    }
}

/* Fills in the rows of a band and the scratch of a call. */
void dconv_plan(Dconv *d) {
    int64_t row = 4 * padded(&d->s, 0, 1).row, taps = d->s.lh * d->s.lw;
    int64_t rows = (DCONV_BAND_BYTES / row - (d->s.lh - 1) * d->s.dh - 1) / d->s.sh + 1;
    d->band = least(d->s.oh, most(rows, most(1, (d->s.lh - 1) * d->s.dh)));
    d->scratch = round_up(2 * taps) + 2 * round_up(padded_floats(padded(&d->s, 0, d->band), 1)) + d->band * round_up(d->s.ow) + 64;
}

/* Units from `first` to `end`, of all images. */
void dconv_run(const Dconv *d, const DconvTensors *t, float *scratch, int64_t first, int64_t end, int64_t backward) {
    for (int64_t unit = first; unit < end; unit++) dconv_unit(d, t, scratch, unit, (int)backward);
}

#endif
