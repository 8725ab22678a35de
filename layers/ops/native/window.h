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
    p.plane = round_up(p.rows * p.row) + 16;
    return p;
}

INLINE int64_t padded_floats(Padded p, int64_t channels) { return channels * p.plane + LANES; }

/* Where the taps are, seen from a pixel: (l_h, l_w) in order. */
static void tap_places(const Window *s, Padded p, int64_t *place) {
    for (int64_t u = 0; u < s->lh; u++)
        for (int64_t v = 0; v < s->lw; v++)
            *place++ = u * s->dh * p.row + (v * s->dw % s->sw) * p.part + v * s->dw / s->sw;
}

/* Copy the rows of x (C, H, W) there; `back`: add them to x instead. */
static void window_copy(const Window *s, Padded p, int64_t channels, float *x, float *inner, int back) {
    int64_t columns = (s->ow - 1) * s->sw + (s->lw - 1) * s->dw + 1;
    int64_t width = most(0, least(s->w, columns - s->pw));
    if (!back) memset(inner, 0, (size_t)padded_floats(p, channels) * 4);
    for (int64_t c = 0; c < channels; c++)
        for (int64_t r = 0; r < p.rows; r++) {
            int64_t y = p.top + r;
            if (y < 0 || y >= s->h) continue;
            float *out = x + (c * s->h + y) * s->w, *in = inner + c * p.plane + r * p.row;
            for (int64_t q = 0; q < s->sw; q++) { /* columns j of x, padded columns j + pw = q mod sw */
                int64_t j = ((q - s->pw) % s->sw + s->sw) % s->sw;
                float *at = in + q * p.part + (j + s->pw) / s->sw;
                if (back)
                    for (; j < width; j += s->sw) out[j] += *at++;
                else if (s->sw == 1)
                    memcpy(at, out, (size_t)width * 4);
                else
                    for (; j < width; j += s->sw) *at++ = out[j];
            }
        }
}

#endif
