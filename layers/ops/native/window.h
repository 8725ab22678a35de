/* A padded copy of some rows of an image, in which the taps of neighboring pixels are neighbors, whatever stride and dilation.
 *
 * [channel][row][column mod stride][column / stride], zero where the padding is. */
#ifndef SURGEON_WINDOW_H
#define SURGEON_WINDOW_H

#include "lanes.h"

typedef struct {
    int64_t h, w, oh, ow, lh, lw, sh, sw, ph, pw, dh, dw;
} Window;

typedef struct {
    int64_t top, rows;           /* of the padded image: its first row, and how many */
    int64_t part, row, plane;    /* floats of a residue class of columns, of a row, of a channel */
} Padded;

INLINE int64_t rows_in(const Window *s, int64_t rows) { return (rows - 1) * s->sh + (s->lh - 1) * s->dh + 1; }

/* What lies under the output rows i0 to i1. */
static Padded padded(const Window *s, int64_t i0, int64_t i1) {
    Padded p;
    int64_t columns = (s->ow - 1) * s->sw + (s->lw - 1) * s->dw + 1;
    p.top = i0 * s->sh - s->ph;
    p.rows = rows_in(s, i1 - i0);
    p.part = ceil_div(columns, s->sw);
    p.row = p.part * s->sw;
    p.plane = spaced(p.rows * p.row);
    return p;
}

INLINE int64_t padded_floats(Padded p, int64_t channels) { return channels * p.plane + LANES; }

enum { BAND_BYTES = 1 << 20, LEAST_TASKS = 8 };

/* How many rows of the output make a band, whose padded copy should stay in the second-level cache, and how many bands there are of an
 * image. Of the shapes only, not of the number of threads. Bands that are no neighbors share no row of x. */
static void cut_bands(const Window *s, int64_t images, int64_t channels, int64_t *band, int64_t *bands) {
    int64_t reach = ceil_div((s->lh - 1) * s->dh, s->sh) + 1;
    int64_t fits = (BAND_BYTES / (4 * channels * padded(s, 0, 1).row) - (s->lh - 1) * s->dh - 1) / s->sh + 1;
    int64_t spread_over = ceil_div(s->oh, ceil_div(LEAST_TASKS, most(images, 1)));
    *band = even_part(s->oh, least(s->oh, most(reach, least(fits, spread_over))));
    if (*band < reach) *band = least(s->oh, reach);
    *bands = ceil_div(s->oh, *band);
}

/* Where the taps are, seen from a pixel: (l_h, l_w) in order. */
static void tap_places(const Window *s, Padded p, int64_t *place) {
    for (int64_t u = 0; u < s->lh; u++)
        for (int64_t v = 0; v < s->lw; v++)
            *place++ = u * s->dh * p.row + (v * s->dw % s->sw) * p.part + v * s->dw / s->sw;
}

/* Zeros, which `window_rows` leaves around what it copies. */
static void window_clear(Padded p, int64_t channels, float *inner) {
    memset(inner, 0, (size_t)padded_floats(p, channels) * 4);
}

/* Copy the rows of x (C, H, W) there. */
static void window_rows(const Window *s, Padded p, int64_t channels, const float *x, float *inner) {
    int64_t columns = (s->ow - 1) * s->sw + (s->lw - 1) * s->dw + 1, width = most(0, least(s->w, columns - s->pw));
    int64_t first = least(p.rows, most(0, -p.top)), end = most(first, least(p.rows, s->h - p.top)); /* rows of p inside x */
    for (int64_t c = 0; c < channels; c++, inner += p.plane) {
        const float *in = x + (c * s->h + p.top + first) * s->w, *ahead = in + s->h * s->w;
        for (int64_t r = first; r < end; r++, in += s->w, ahead += s->w) {
            float *row = inner + r * p.row;
            for (int64_t j = 0; j < width && c + 1 < channels; j += 16) __builtin_prefetch(ahead + j);
            if (s->sw == 1) {
                copy_floats(row + s->pw, in, width);
                continue;
            }
            for (int64_t q = 0; q < s->sw; q++) { /* columns j of x, padded columns j + pw = q mod sw */
                int64_t j = ((q - s->pw) % s->sw + s->sw) % s->sw;
                for (float *at = row + q * p.part + (j + s->pw) / s->sw; j < width; j += s->sw) *at++ = in[j];
            }
        }
    }
}

/* Both. */
static void window_copy(const Window *s, Padded p, int64_t channels, const float *x, float *inner) {
    window_clear(p, channels, inner);
    window_rows(s, p, channels, x, inner);
}

/* Add what lies there to the rows of x. */
static void window_add(const Window *s, Padded p, int64_t channels, const float *inner, float *x) {
    int64_t columns = (s->ow - 1) * s->sw + (s->lw - 1) * s->dw + 1, width = most(0, least(s->w, columns - s->pw));
    for (int64_t c = 0; c < channels; c++)
        for (int64_t r = most(0, -p.top); r < p.rows && p.top + r < s->h; r++) {
            float *restrict out = x + (c * s->h + p.top + r) * s->w;
            for (int64_t q = 0; q < s->sw; q++) {
                int64_t j = ((q - s->pw) % s->sw + s->sw) % s->sw;
                const float *at = inner + c * p.plane + r * p.row + q * p.part + (j + s->pw) / s->sw;
                for (; j < width; j += s->sw) out[j] += *at++;
            }
        }
}

#endif
