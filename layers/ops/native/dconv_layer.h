/* DConv with kernels made from features, one an output channel: y[o][p] = sum over taps of k[o][t][p] x[channel(o)][p + t], where
 * k[o][t] = weight[o][t] * features + fixed[o][t]; see layers/sekg/reference.py.
 *
 * A tile of pixels has its features, and below them a row of ones: `fixed` is one more column of the weight. They lie in panels of a
 * few vectors of pixels, which stay in the first-level cache while they are multiplied with the weights of some outputs; those stay in
 * the second-level cache meanwhile. The kernels filter the input at once. */
#ifndef SURGEON_DCONV_LAYER_H
#define SURGEON_DCONV_LAYER_H

#include "dconv.h"

typedef struct {
    Window s;
    int64_t n, c, outputs, features;
    int64_t bands, band, tile;  /* bands of an image, output rows of a band and of a tile */
    int64_t chunk;              /* outputs whose kernels, or their gradients, are multiplied at once */
    int64_t forward, backward;  /* floats of scratch of a call */
    int64_t wide;               /* features, rounded up: a row of the gradient of the weight */
} DconvLayer;

typedef struct {
    const float *x, *features, *weight, *weight_back, *bias; /* weights packed by dconv_layer_pack; bias may be null */
    float *y;
    const float *grad;
    float *gx, *gfeatures, *gweight, *gfixed; /* null: not wanted; the last two are partial sums of the caller's */
} DconvLayerTensors;

enum { LAYER_PIXELS = 256, LAYER_ROWS = 72 };

typedef struct {
    float *x, *features, *kernels, *gx, *gfeatures, *packed, *turned; /* of kernels, later the gradients */
    int64_t *place;
} LayerScratch;

static int64_t layer_row(const DconvLayer *d) { return spaced(d->tile * d->s.ow); }

/* Lays out the scratch from `at`, and returns what it takes in floats. */
static int64_t layer_layout(const DconvLayer *d, float *at, int backward, LayerScratch *w) {
    float *next = at;
    int64_t row = layer_row(d), taps = d->s.lh * d->s.lw, image = padded_floats(padded(&d->s, 0, d->band), d->c);
    w->place = (int64_t *)take(&next, 2 * taps);
    w->x = take(&next, image);
    w->features = take(&next, (d->features + 16) * row);
    w->kernels = take(&next, d->chunk * taps * (backward ? row : VECTORS * LANES));
    if (backward) {
        w->gx = take(&next, image);
        w->gfeatures = take(&next, d->features * row);
        w->packed = take(&next, d->chunk * taps * row);
        w->turned = take(&next, (d->wide + 16) * row);
    }
    return next - at;
}

/* Fills in what follows from the sizes. Of the shapes only, not of the number of threads. */
void dconv_layer_plan(DconvLayer *d) {
    LayerScratch unused;
    cut_bands(&d->s, d->n, d->c, &d->band, &d->bands);
    d->tile = even_part(d->band, most(1, LAYER_PIXELS / d->s.ow));
    d->chunk = even_part(d->outputs, most(1, LAYER_ROWS / (d->s.lh * d->s.lw)));
    d->wide = round_up(d->features);
    d->forward = layer_layout(d, NULL, 0, &unused);
    d->backward = layer_layout(d, NULL, 1, &unused);
}

/* weight (O * taps, features + 1), the last column being `fixed`, packed for both directions. */
void dconv_layer_pack(const DconvLayer *d, const float *weight, float *on, float *back) {
    int64_t taps = d->s.lh * d->s.lw, depth = d->features + 1;
    for (int64_t o = 0; o < d->outputs; o += d->chunk) {
        int64_t rows = least(d->chunk, d->outputs - o) * taps;
        if (on) pack(weight + o * taps * depth, depth, 1, rows, depth, on + o * taps * depth);
        if (back) pack(weight + o * taps * depth, 1, depth, d->features, rows, back + o * taps * d->features);
    }
}

/* ---- pixels of several rows in one vector ----------------------------------------------------------------------------------- */

/* LANES pixels in order, from pixel q of a band on: where each row of them is read, and its lanes; of the second row none if there is
 * one alone. */
typedef struct {
    int64_t many, at[LANES];
    ivec in[LANES];
} Pixels;

static void pixels_from(const Window *s, Padded p, int64_t q, Pixels *to) {
    int64_t line = q / s->ow, column = q % s->ow;
    ivec lane;
    for (int i = 0; i < LANES; i++) lane[i] = i;
    to->many = 0;
    for (int64_t first = 0; first < LANES; line++, column = 0) {
        int64_t end = least(LANES, first + s->ow - column);
        if (to->many && line * s->sh >= p.rows) break; /* below the band */
        to->at[to->many] = line * s->sh * p.row + column - first;
        to->in[to->many++] = (lane >= (ivec){0} + (int32_t)first) & (lane < (ivec){0} + (int32_t)end);
        first = end;
    }
    if (to->many == 1) to->at[1] = to->at[0], to->in[1] = (ivec){0};
}

/* Of at most `rows` rows, or, if that is 0, of as many as there are. */
INLINE vec load_pixels(const int rows, const float *x, const Pixels *at) {
    if (rows == 1) return load(x + at->at[0]);
    ivec v = ((ivec)load(x + at->at[0]) & at->in[0]) | ((ivec)load(x + at->at[1]) & at->in[1]);
    for (int64_t i = 2; i < at->many && !rows; i++) v |= (ivec)load(x + at->at[i]) & at->in[i];
    return (vec)v;
}

/* ---- forward ------------------------------------------------------------------------------------------------------------------ */

/* A tile's pixels are cut into panels of so many vectors, of the last of which some lanes may be empty. */
INLINE int64_t panel_vectors(int64_t count) { return even_part(ceil_div(count, LANES), VECTORS); }

/* The features of a tile, and ones, panel after panel: [feature][vector][lane], zero where there is no pixel. */
static void layer_features(const DconvLayer *d, const float *features, int64_t count, float *to) {
    int64_t pixels = d->s.oh * d->s.ow, all = round_up_to(count, LANES), width = panel_vectors(count) * LANES;
    for (int64_t f = 0; f <= d->features; f++, features += pixels) {
        if (f + ROWS_AHEAD < d->features) ask_for(features + ROWS_AHEAD * pixels, count);
        for (int64_t q = 0; q < all; q += width) {
            int64_t row = least(width, all - q), here = least(row, count - q);
            float *panel = to + q * (d->features + 1) + f * row;
            if (f < d->features) {
                copy_floats(panel, features + q, here);
                if (here < row) memset(panel + here, 0, (size_t)(row - here) * 4);
            } else
                for (int64_t i = 0; i < row; i += LANES) store(panel + i, splat(1));
        }
    }
}

/* y of one output, for some vectors of pixels, each of at most `rows` rows (0: of any number): `left` pixels, from `kernels`
 * [tap][vector][lane]. */
INLINE void filter_vectors(const int vectors, const int rows, int64_t taps, const int64_t *place, const float *x, const Pixels *pixels,
                           const float *kernels, float bias, float *y, int64_t left) {
    vec sum[VECTORS];
    UNROLLED for (int v = 0; v < vectors; v++) sum[v] = splat(bias);
    for (int64_t t = 0; t < taps; t++, kernels += vectors * LANES)
        UNROLLED for (int v = 0; v < vectors; v++)
            sum[v] = plus(sum[v], load(kernels + v * LANES), load_pixels(rows, x + place[t], pixels + v));
    UNROLLED for (int v = 0; v < vectors - 1; v++) store(y + v * LANES, sum[v]);
    store_first(y + (vectors - 1) * LANES, sum[vectors - 1], left - (vectors - 1) * LANES);
}

static void layer_filter(int64_t vectors, int64_t rows, int64_t taps, const int64_t *place, const float *x, const Pixels *pixels,
                         const float *kernels, float bias, float *y, int64_t left) {
    switch (vectors * 4 + rows) {
#define CASE(V, R) case V * 4 + R: filter_vectors(V, R, taps, place, x, pixels, kernels, bias, y, left); break;
#define CASES(V) CASE(V, 0) CASE(V, 1) CASE(V, 2)
        CASES(1) CASES(2) CASES(3)
#undef CASES
#undef CASE
    }
}

void dconv_layer_forward(const DconvLayer *d, const DconvLayerTensors *t, float *scratch, int64_t task) {
    const Window *s = &d->s;
    LayerScratch w;
    layer_layout(d, scratch, 0, &w);
    int64_t n = task / d->bands, i0 = task % d->bands * d->band, i1 = least(i0 + d->band, s->oh);
    int64_t pixels = s->oh * s->ow, taps = s->lh * s->lw, depth = d->features + 1, multiplier = d->outputs / d->c;
    Padded p = padded(s, i0, i1);
    tap_places(s, p, w.place);
    window_copy(s, p, d->c, t->x + n * d->c * s->h * s->w, w.x);
    for (int64_t first = i0; first < i1; first += d->tile) {
        int64_t count = (least(first + d->tile, i1) - first) * s->ow, start = first * s->ow;
        int64_t all = ceil_div(count, LANES), width = panel_vectors(count);
        layer_features(d, t->features + n * d->features * pixels + start, count, w.features);
        for (int64_t o = 0; o < d->outputs; o += d->chunk) {
            int64_t many = least(d->chunk, d->outputs - o);
            for (int64_t v = 0; v < all; v += width) {
                int64_t vectors = least(width, all - v), rows = 1, q = v * LANES;
                Pixels at[VECTORS];
                Operands by = {w.features + q * depth, vectors * LANES, LANES, w.kernels, vectors * LANES, LANES};
                product(many * taps, vectors, depth, t->weight + o * taps * depth, by, LANES, 0);
                for (int64_t i = 0; i < vectors; i++) {
                    pixels_from(s, p, (first - i0) * s->ow + q + i * LANES, at + i);
                    rows = most(rows, at[i].many);
                }
                if (rows > 2) rows = 0;
                for (int64_t r = 0; r < many; r++)
                    layer_filter(vectors, rows, taps, w.place, w.x + (o + r) / multiplier * p.plane, at,
                                 w.kernels + r * taps * vectors * LANES, t->bias ? t->bias[o + r] : 0,
                                 t->y + (n * d->outputs + o + r) * pixels + start + q, count - q);
            }
        }
    }
}

/* ---- backward ----------------------------------------------------------------------------------------------------------------- */

/* What the gradient of `many` outputs' kernels, from output o on, gives to features and weight. */
static void layer_kernel_gradients(const DconvLayer *d, const DconvLayerTensors *t, const LayerScratch *w, int64_t o, int64_t many,
                                   int64_t count) {
    int64_t row = layer_row(d), taps = d->s.lh * d->s.lw, rows = many * taps, from = o * taps;
    if (t->gfeatures)
        gemm(d->features, count, rows, t->weight_back + from * d->features, w->kernels, row, w->gfeatures, row, o > 0);
    if (t->gweight) {
        pack(w->kernels, row, 1, rows, count, w->packed);
        gemm(rows, d->wide, count, w->packed, w->turned, d->wide + 16, t->gweight + from * d->wide, d->wide, 1);
    }
}

/* A tile: rows first to end of the band that begins with row i0. */
static void layer_backward_tile(const DconvLayer *d, const DconvLayerTensors *t, const LayerScratch *w, Padded p, int64_t n, int64_t i0,
                                int64_t first, int64_t end) {
    const Window *s = &d->s;
    const int kernels = t->gfeatures || t->gweight || t->gfixed;
    int64_t pixels = s->oh * s->ow, taps = s->lh * s->lw, depth = d->features + 1, row = layer_row(d), step = s->sh * p.row;
    int64_t count = (end - first) * s->ow, start = first * s->ow;
    layer_features(d, t->features + n * d->features * pixels + start, count, w->features);
    int64_t all = round_up_to(count, LANES), width = panel_vectors(count) * LANES;
    for (int64_t q = 0; q < all && t->gweight; q += width) {
        int64_t here = least(width, all - q);
        transpose(w->features + q * depth, here, d->features, here, w->turned + q * (d->wide + 16), d->wide + 16);
    }
    for (int64_t o = 0; o < d->outputs; o += d->chunk) {
        int64_t many = least(d->chunk, d->outputs - o);
        for (int64_t q = 0; q < all && t->gx; q += width) {
            int64_t here = least(width, all - q);
            Operands by = {w->features + q * depth, here, LANES, w->kernels + q, row, LANES};
            product(many * taps, here / LANES, depth, t->weight + o * taps * depth, by, LANES, 0);
        }
        for (int64_t r = 0; r < many; r++) {
            const float *grad = t->grad + (n * d->outputs + o + r) * pixels + start;
            float *own = w->kernels + r * taps * row;
            if (o + r + 1 < d->outputs) ask_for(grad + pixels, count);
            int64_t at = (o + r) / (d->outputs / d->c) * p.plane + (first - i0) * step;
            for (int64_t i = 0, q = 0; i < end - first; i++, q += s->ow, at += step)
                dconv_back(s->ow, s->lw, taps, w->place, w->x + at, grad + q, own + q, t->gx ? w->gx + at : NULL,
                           kernels ? own + q : NULL, row, 0, t->gfixed ? t->gfixed + (o + r) * taps * LANES : NULL);
        }
        if (kernels) layer_kernel_gradients(d, t, w, o, many, count);
    }
    if (t->gfeatures) copy_rows(w->gfeatures, row, d->features, count, t->gfeatures + n * d->features * pixels + start, pixels, 1);
}

/* Tasks from `first` to `end` whose band is even (odd: 1): those share no row of the gradient of x. */
void dconv_layer_backward(const DconvLayer *d, const DconvLayerTensors *t, float *scratch, int64_t first, int64_t end, int64_t odd) {
    const Window *s = &d->s;
    LayerScratch w;
    layer_layout(d, scratch, 1, &w);
    for (int64_t task = first; task < end; task++) {
        int64_t n = task / d->bands, band = task % d->bands, i0 = band * d->band, i1 = least(i0 + d->band, s->oh);
        if (band % 2 != odd) continue;
        Padded p = padded(s, i0, i1);
        tap_places(s, p, w.place);
        if (t->gfeatures || t->gweight || t->gfixed) window_copy(s, p, d->c, t->x + n * d->c * s->h * s->w, w.x);
        if (t->gx) memset(w.gx, 0, (size_t)padded_floats(p, d->c) * 4);
        for (int64_t row = i0; row < i1; row += d->tile)
            layer_backward_tile(d, t, &w, p, n, i0, row, least(row + d->tile, i1));
        if (t->gx) window_add(s, p, d->c, w.gx, t->gx + n * d->c * s->h * s->w);
    }
}

#endif
