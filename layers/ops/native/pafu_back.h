/* The gradients of PAFU, on the chunks, frames and sorted pixels of pafu.h. Everything is summed up in an order that follows from
 * the shapes alone. */
#ifndef SURGEON_PAFU_BACK_H
#define SURGEON_PAFU_BACK_H

#include "pafu.h"

enum { PAFU_PATCHES = 128 }; /* pixels at a time whose patches, of one tap and some channels, stay in the first-level cache */

/* The gradient of the output of one image, from (O, P, Q) to channels last. */
void pafu_gradient(const Pafu *a, const PafuTensors *t, float *scratch, int64_t task) {
    int64_t pixels = a->rows * a->columns, image = task;
    (void)scratch;
    to_last(t->grad + image * a->outputs * a->plane, a->plane, a->outputs, pixels, t->g + image * pixels * a->outputs,
            (Places){pixels, 0, a->outputs});
}

/* ---- of the kernels: gk[o][tap][c] += sum over pixels of g[p][o] x[p + tap][c] ---------------------------------------------- */

INLINE void kernel_block(const int outputs, const int vectors, const PafuTensors *t, int64_t first, int64_t end,
                         const float *g, const float *x, float *gk, int64_t gk_row, int64_t last) {
    vec sum[PAFU_PIXELS][PAFU_VECTORS];
    UNROLLED for (int r = 0; r < outputs; r++) UNROLLED for (int v = 0; v < vectors; v++) sum[r][v] = (vec){0};
    for (int64_t p = first; p < end; p++) {
        const float *in = x + t->start[p], *by = g + t->order[p];
        vec patch[PAFU_VECTORS];
        UNROLLED for (int v = 0; v < vectors; v++) patch[v] = held(load(in + v * LANES));
        UNROLLED for (int r = 0; r < outputs; r++) {
            vec grad = held(splat(by[r]));
            UNROLLED for (int v = 0; v < vectors; v++) sum[r][v] = plus(sum[r][v], grad, patch[v]);
        }
    }
    UNROLLED for (int r = 0; r < outputs; r++) UNROLLED for (int v = 0; v < vectors; v++) {
        float *at = gk + r * gk_row + v * LANES;
        int64_t lanes = v == vectors - 1 ? last : LANES;
        store_first(at, sum[r][v] + load_first(at, lanes), lanes);
    }
}

static void kernel_block_of(int64_t outputs, int64_t vectors, const PafuTensors *t, int64_t first, int64_t end,
                            const float *g, const float *x, float *gk, int64_t gk_row, int64_t last) {
    switch (outputs * 8 + vectors) {
#define CALL(R, V) case R * 8 + V: kernel_block(R, V, t, first, end, g, x, gk, gk_row, last); return;
        EACH_BLOCK(CALL)
#undef CALL
    }
}

/* Kernel i and a tap of it, all channels. */
void pafu_kernel_gradient(const Pafu *a, const PafuTensors *t, float *scratch, int64_t task) {
    int64_t i = task / (a->lh * a->lw), tap = task % (a->lh * a->lw);
    int64_t *place = (int64_t *)take(&scratch, 2 * a->lh * a->lw), inputs = a->c / a->groups, outputs = a->outputs / a->groups;
    int64_t taps = a->lh * a->lw, count = ceil_div(inputs, LANES), width = even_part(count, PAFU_VECTORS);
    int64_t row = taps * inputs, high = even_part(outputs, PAFU_PIXELS);
    float *gk = (i ? t->gfurther + (i - 1) * a->outputs * row : t->gkernel) + tap * inputs;
    pafu_places(a, place);
    for (int64_t part = 0; part < a->parts; part++) {
        int64_t begin = t->bounds[part * a->n + i], end = t->bounds[part * a->n + i + 1];
        int64_t run = even_part(most(1, end - begin), PAFU_PATCHES);
        for (int64_t g = 0; g < a->groups; g++)
            for (int64_t v = 0; v < count; v += width)
                for (int64_t p = begin; p < end; p += run)
                    for (int64_t o = 0; o < outputs; o += high) {
                        int64_t vectors = least(width, count - v), all = g * outputs + o;
                        int64_t last = least(LANES, inputs - (v + vectors - 1) * LANES);
                        kernel_block_of(least(high, outputs - o), vectors, t, p, least(p + run, end), t->g + all,
                                        t->frame + place[tap] + g * inputs + v * LANES, gk + all * row + v * LANES, row, last);
                    }
    }
}

/* ---- of the input: gx[p + tap][c] += sum over outputs of g[p][o] k[o][tap][c] ------------------------------------------------ */

/* Into how many blocks of channels the gradient of the input is cut. */
int64_t pafu_input_blocks(const Pafu *a) {
    int64_t count = ceil_div(a->c / a->groups, LANES);
    return a->groups * ceil_div(count, even_part(count, PAFU_VECTORS));
}

/* The images of one part, and one block of channels: two of them share nothing. Kernels have their channels last. */
void pafu_input_gradient(const Pafu *a, const PafuTensors *t, float *scratch, int64_t task) {
    const int64_t all = pafu_input_blocks(a), part = task / all, block = task % all;
    int64_t *place = (int64_t *)take(&scratch, 2 * a->lh * a->lw), inputs = a->c / a->groups, outputs = a->outputs / a->groups;
    int64_t taps = a->lh * a->lw, count = ceil_div(inputs, LANES), width = even_part(count, PAFU_VECTORS);
    int64_t blocks = ceil_div(count, width), group = block / blocks, v = block % blocks * width, vectors = least(width, count - v);
    int64_t many = least(vectors * LANES, inputs - v * LANES), last = many - (vectors - 1) * LANES, row = vectors * LANES;
    const int64_t none = 0;
    pafu_places(a, place);
    memset(scratch, 0, (size_t)(outputs * row) * 4);
    for (int64_t i = 0; i < a->n; i++) {
        int64_t begin = t->bounds[part * a->n + i], end = t->bounds[part * a->n + i + 1];
        int64_t pixels = even_part(most(1, end - begin), PAFU_PIXELS);
        for (int64_t tap = 0; tap < taps && begin < end; tap++) {
            const float *k = kernel_of(a, t, i) + (group * outputs * taps + tap) * inputs + v * LANES;
            float *gx = t->gframe + place[tap] + group * inputs + v * LANES;
            for (int64_t o = 0; o < outputs; o++) memcpy(scratch + o * row, k + o * taps * inputs, (size_t)many * 4);
            for (int64_t o = 0, deep = even_part(outputs, DEPTH); o < outputs; o += deep)
                for (int64_t q = begin; q < end; q += pixels) {
                    float sums[PAFU_PIXELS * PAFU_VECTORS * LANES] __attribute__((aligned(64)));
                    const float *g = t->g + group * outputs + o;
                    Patches b = {g, t->order + q, &none, 1, least(deep, outputs - o), scratch + o * row, {g, g}, g, t->order + q + pixels};
                    int64_t here = least(pixels, end - q);
                    for (int64_t r = 0; r < here; r++)
                        for (int64_t u = 0; u < vectors; u++) __builtin_prefetch(gx + t->start[q + r] + u * LANES, 1);
                    multiply(here, vectors, &b, sums, 1);
                    keep_sums(sums, here, vectors, gx, t->start + q, last, 1);
                }
        }
    }
}

/* Add the gradient of the frame of one image to that of x. */
void pafu_input_add(const Pafu *a, const PafuTensors *t, float *scratch, int64_t task) {
    int64_t row = a->width * a->c, size = a->h * a->w, image = task;
    const float *inner = t->gframe + (image * a->height + a->top) * row + a->left * a->c;
    float *gx = t->gx + image * a->c * size;
    (void)scratch;
    for (int64_t r = 0; r < a->inside; r++) {
        const float *from = inner + r * row;
        float *to = gx + (a->first + r) * a->w * (a->last ? a->c : 1);
        if (a->last)
            for (int64_t j = 0; j < a->across * a->c; j++) to[j] += from[j];
        else
            from_last(from, (Places){a->across, 0, a->c}, a->c, a->across, to, size, 1);
    }
}

/* ---- of the selection: s[p][i] = <g[p], K_i * x at p> ----------------------------------------------------------------------- */

INLINE float total(vec v) {
    float sum = 0;
    for (int i = 0; i < LANES; i++) sum += v[i];
    return sum;
}

/* <g, sums> of one pixel. */
INLINE float score(int64_t vectors, const float *sums, const float *g, int64_t last) {
    vec dot = (vec){0};
    for (int64_t v = 0; v < vectors; v++) {
        int64_t lanes = v == vectors - 1 ? last : LANES; /* the others' sums are zero times the input, which may be infinite */
        dot += first_lanes(load(sums + v * LANES), lanes) * load_first(g + v * LANES, lanes);
    }
    return total(dot);
}

/* Of a kernel, and of so many sorted pixels, whatever was selected there. */
int64_t pafu_score_pieces(const Pafu *a) { return ceil_div(a->images * a->rows * a->columns, a->segment); }

void pafu_score_gradient(const Pafu *a, const PafuTensors *t, float *scratch, int64_t task) {
    const int64_t pieces = pafu_score_pieces(a), i = task / pieces, first = task % pieces * a->segment;
    const int64_t end = least(first + a->segment, a->images * a->rows * a->columns), part = even_part(end - first, PAFU_PIXELS);
    int64_t *place = (int64_t *)take(&scratch, 2 * a->lh * a->lw);
    float *scores = take(&scratch, end - first), sums[PAFU_RUN * PAFU_VECTORS * LANES] __attribute__((aligned(64)));
    pafu_places(a, place);
    memset(scores, 0, (size_t)(end - first) * 4);
    for (int64_t block = 0; block < pafu_blocks(a); block++) {
        Outputs o = outputs_of(a, block);
        Ahead ahead = kernel_ahead(a, t, i, least(block + 1, pafu_blocks(a) - 1));
        pack_kernel(a, t, i, o.first, o.many, o.vectors * LANES, scratch);
        for (int64_t q = first, run = PAFU_RUN / PAFU_PIXELS * part; q < end; q += run) {
            int64_t count = least(run, end - q);
            multiply_run(a, t, o, place, scratch, q, count, part, sums, t->g + o.first, &ahead);
            for (int64_t r = 0; r < count; r++)
                scores[q - first + r] += score(o.vectors, sums + r * o.vectors * LANES, t->g + o.first + t->order[q + r], o.last);
        }
    }
    for (int64_t q = first; q < end; q++) t->gscores[t->order[q] / a->outputs * a->n + i] = scores[q - first];
}

#endif
