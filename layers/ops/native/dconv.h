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

enum { DCONV_BAND_BYTES = 1 << 17 };

/* A row of one output channel: `k` its kernels, taps `size` apart, `x` the padded pixel under its first tap. Whole vectors are read
 * up to `k_end`, and written up to `y_end`: what they write beyond the row, the next row writes over. Sums start at `start`. */
static void dconv_row(int64_t width, int64_t taps, const int64_t *place, const float *x, const float *k, int64_t size,
                      const float *k_end, float *y, const float *y_end, float start) {
    for (int64_t j = 0; j < width; j += LANES) {
        if (width >= LANES) j = least(j, width - LANES); /* the last block overlaps the one before */
        int64_t lanes = k + (taps - 1) * size + j + LANES <= k_end ? LANES : width - j;
        vec even = splat(start), odd = {0};
        int64_t t = 0;
        for (; t + 1 < taps; t += 2) {
            even += load_first(k + t * size + j, lanes) * load(x + place[t] + j);
            odd += load_first(k + (t + 1) * size + j, lanes) * load(x + place[t + 1] + j);
        }
        if (t < taps) even += load_first(k + t * size + j, lanes) * load(x + place[t] + j);
        store_first(y + j, even + odd, y + j + LANES <= y_end ? LANES : width - j);
    }
}

/* gk[t][j] = or += x[j + t] g[j]. */
static void dconv_kernel_row(int64_t width, int64_t taps, const int64_t *place, const float *x, const float *g, int64_t size,
                             float *gk, int add) {
    for (int64_t t = 0; t < taps; t++) {
        const float *in = x + place[t];
        float *restrict out = gk + t * size;
        if (add)
            for (int64_t j = 0; j < width; j++) out[j] += in[j] * g[j];
        else
            for (int64_t j = 0; j < width; j++) out[j] = in[j] * g[j];
    }
}

/* gx[j + t] += k[t][j] g[j]. */
static void dconv_input_row(int64_t width, int64_t lw, int64_t taps, const int64_t *place, const float *k, const float *g,
                            int64_t size, float *gx) {
    for (int64_t v = 0; v < lw; v++)
        for (int64_t t = v; t < taps; t += lw) {
            const float *by = k + t * size;
            float *restrict out = gx + place[t];
            for (int64_t j = 0; j < width; j++) out[j] += by[j] * g[j];
        }
}

static void dconv_unit(const Dconv *d, const DconvTensors *t, float *scratch, int64_t unit, int backward) {
    const Window *s = &d->s;
    int64_t pixels = s->oh * s->ow, taps = s->lh * s->lw, many = d->channels * d->kernels;
    const float *kernels = t->kernels + unit * d->kernels * taps * pixels;
    const float *k_end = t->kernels + d->n * d->units * d->kernels * taps * pixels;
    int64_t *place = (int64_t *)take(&scratch, 2 * taps);
    int64_t floats = padded_floats(padded(s, 0, d->band), 1);
    float *x = take(&scratch, floats), *gx = take(&scratch, floats);
    for (int64_t i0 = 0; i0 < s->oh; i0 += d->band) {
        int64_t i1 = least(i0 + d->band, s->oh);
        Padded p = padded(s, i0, i1);
        tap_places(s, p, place);
        for (int64_t c = 0; c < d->channels; c++) {
            int64_t channel = unit * d->channels + c, plane = channel * s->h * s->w;
            if (!backward || t->gkernels) window_copy(s, p, 1, (float *)t->x + plane, x, 0);
            if (backward && t->gx) memset(gx, 0, (size_t)padded_floats(p, 1) * 4);
            for (int64_t r = 0; r < d->kernels; r++)
                for (int64_t i = i0; i < i1; i++) {
                    int64_t at = (i - i0) * s->sh * p.row, o = (unit * many + c * d->kernels + r) * pixels + i * s->ow;
                    int64_t own = r * taps * pixels + i * s->ow;
                    if (!backward) {
                        dconv_row(s->ow, taps, place, x + at, kernels + own, pixels, k_end, t->y + o,
                                  t->y + o + pixels - i * s->ow, 0);
                        continue;
                    }
                    if (t->gkernels)
                        dconv_kernel_row(s->ow, taps, place, x + at, t->grad + o, pixels,
                                         t->gkernels + unit * d->kernels * taps * pixels + own, c > 0);
                    if (t->gx) dconv_input_row(s->ow, s->lw, taps, place, kernels + own, t->grad + o, pixels, gx + at);
                }
            if (backward && t->gx) window_copy(s, p, 1, t->gx + plane, gx, 1);
        }
    }
}

/* ---- kernels made from features, one an output channel: weight * features + static ---------------------------------------- */

typedef struct {
    Window s;
    int64_t n, c, outputs, features;
    int64_t bands, band, chunk, scratch; /* chunk: outputs whose kernels are made by one product */
} DconvLayer;

typedef struct {
    const float *x, *features, *weight, *fixed, *bias; /* weight packed by dconv_layer_pack; bias may be null */
    float *y;
} DconvLayerTensors;

enum { LAYER_BAND_BYTES = 1 << 20, LAYER_PIXELS = 256, LAYER_ROWS = 72 };

void dconv_layer_plan(DconvLayer *d) {
    const Window *s = &d->s;
    int64_t taps = s->lh * s->lw;
    int64_t fits = (LAYER_BAND_BYTES / (4 * d->c * padded(s, 0, 1).row) - (s->lh - 1) * s->dh - 1) / s->sh + 1;
    d->band = even_part(s->oh, most(1, least(fits, LAYER_PIXELS / s->ow)));
    d->bands = ceil_div(s->oh, d->band);
    d->chunk = even_part(d->outputs, most(1, LAYER_ROWS / taps));
    int64_t row = round_up(d->band * s->ow) + 16;
    d->scratch = round_up(2 * taps) + round_up(padded_floats(padded(s, 0, d->band), d->c)) + (d->features + d->chunk * taps) * row + 64;
}

void dconv_layer_pack(const DconvLayer *d, const float *weight, float *to) {
    int64_t taps = d->s.lh * d->s.lw;
    for (int64_t o = 0; o < d->outputs; o += d->chunk)
        pack(weight + o * taps * d->features, d->features, 1, least(d->chunk, d->outputs - o) * taps, d->features,
             to + o * taps * d->features);
}

void dconv_layer_forward(const DconvLayer *d, const DconvLayerTensors *t, float *scratch, int64_t task) {
    const Window *s = &d->s;
    int64_t n = task / d->bands, i0 = task % d->bands * d->band, i1 = least(i0 + d->band, s->oh);
    int64_t pixels = s->oh * s->ow, taps = s->lh * s->lw, count = (i1 - i0) * s->ow, row = round_up(d->band * s->ow) + 16;
    Padded p = padded(s, i0, i1);
    int64_t *place = (int64_t *)take(&scratch, 2 * taps);
    float *x = take(&scratch, padded_floats(p, d->c));
    float *features = take(&scratch, d->features * row), *k = take(&scratch, d->chunk * taps * row);
    const float *k_end = k + d->chunk * taps * row;
    tap_places(s, p, place);
    window_copy(s, p, d->c, (float *)t->x + n * d->c * s->h * s->w, x, 0);
    for (int64_t f = 0; f < d->features; f++) {
        memcpy(features + f * row, t->features + (n * d->features + f) * pixels + i0 * s->ow, (size_t)count * 4);
        memset(features + f * row + count, 0, (size_t)(row - count) * 4);
    }
    for (int64_t first = 0; first < d->outputs; first += d->chunk) {
        int64_t end = least(first + d->chunk, d->outputs), rows = (end - first) * taps;
        for (int64_t r = 0; r < rows; r++)
            for (int64_t q = 0; q < count; q += LANES) store(k + r * row + q, splat(t->fixed[first * taps + r]));
        gemm(rows, ceil_div(count, LANES) * LANES, d->features, t->weight + first * taps * d->features, features, row, k, row, 1);
        for (int64_t o = first; o < end; o++) {
            float *y = t->y + (n * d->outputs + o) * pixels;
            const float *in = x + o / (d->outputs / d->c) * p.plane;
            for (int64_t i = i0; i < i1; i++)
                dconv_row(s->ow, taps, place, in + (i - i0) * s->sh * p.row, k + (o - first) * taps * row + (i - i0) * s->ow, row,
                          k_end, y + i * s->ow, y + i1 * s->ow, t->bias ? t->bias[o] : 0);
        }
    }
}

/* ---- kernels given, again ------------------------------------------------------------------------------------------------- */

/* Fills in the rows of a band and the scratch of a call. */
void dconv_plan(Dconv *d) {
    int64_t row = 4 * padded(&d->s, 0, 1).row, taps = d->s.lh * d->s.lw;
    int64_t rows = (DCONV_BAND_BYTES / row - (d->s.lh - 1) * d->s.dh - 1) / d->s.sh + 1;
    d->band = least(d->s.oh, most(rows, most(1, (d->s.lh - 1) * d->s.dh)));
    d->scratch = round_up(2 * taps) + 2 * round_up(padded_floats(padded(&d->s, 0, d->band), 1)) + 64;
}

/* Units from `first` to `end`, of all images. */
void dconv_run(const Dconv *d, const DconvTensors *t, float *scratch, int64_t first, int64_t end, int64_t backward) {
    for (int64_t unit = first; unit < end; unit++) dconv_unit(d, t, scratch, unit, (int)backward);
}

#endif
