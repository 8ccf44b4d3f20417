/* Near keys of a few rows, for one instruction set: values of VL cells side by side in a column, one column after the
 * other. All steps are then products and sums of whole vectors; a key by itself would need shuffles in each of them.
 */
#pragma once

#include "near.h"
#include "panels.h"

/* `radix` columns, `step` apart, become the sums and differences that `radix` steps of the transform make of them. */
INLINE void transform_some(float *x, int64_t step, int radix) {
    vf v[8];
#pragma GCC unroll 8
    for (int i = 0; i < radix; i++)
        v[i] = v_load(x + i * step * VL);
#pragma GCC unroll 3
    for (int apart = 1; apart < radix; apart *= 2)
#pragma GCC unroll 8
        for (int i = 0; i < radix; i++)
            if (!(i & apart)) {
                vf sum = v_add(v[i], v[i + apart]);
                v[i + apart] = v_sub(v[i], v[i + apart]);
                v[i] = sum;
            }
#pragma GCC unroll 8
    for (int i = 0; i < radix; i++)
        v_store(x + i * step * VL, v[i]);
}

INLINE void transform_pass(float *x, int64_t n, int64_t step, int radix) {
    for (int64_t i = 0; i < n; i += radix * step)
        for (int64_t j = i; j < i + step; j++)
            transform_some(x + j * VL, step, radix);
}

/* Transform each `size` of `n` columns, as `transform` does but for the factor of 1 / sqrt(size). */
static void transform_columns(float *x, int64_t n, int64_t size) {
    for (int64_t step = 1; step < size;) {
        int64_t left = size / step;
        if (left >= 8)
            transform_pass(x, n, step, 8);
        else if (left == 4)
            transform_pass(x, n, step, 4);
        else
            transform_pass(x, n, step, 2);
        step *= left >= 8 ? 8 : left;
    }
}

/* Write the turns of VL positions as columns; where there are none, those of no angle. */
static void turns_of(const struct window *w, const int32_t *positions, int64_t n, float *rows, float *columns) {
    int64_t room = round_up(w->n_dims, VL);
    for (int64_t i = 0; i < VL; i++) {
        bool known = i < n && positions[i] >= 0 && positions[i] < w->n_turns;
        const float *from = known ? w->turns + positions[i] * w->n_dims : w->still;
        int64_t j = 0;
        for (; j + VL <= w->n_dims; j += VL)
            v_store(rows + i * room + j, v_load(from + j));
        for (; j < w->n_dims; j++)
            rows[i * room + j] = from[j];
    }
    for (int64_t j = 0; j < w->n_dims; j += VL)
        transpose((const uint32_t *)rows + j, room, (uint32_t *)columns + j * VL, VL);
}

/* Turn the columns of VL cells: pairs lie `apart`, and follow each other after `step`. */
INLINE void turn_pairs(float *x, const float *turns, int64_t pairs, int64_t step, int64_t apart) {
    for (int64_t i = 0; i < pairs; i++, x += step * VL, turns += step * VL) {
        vf a = v_load(x), b = v_load(x + apart * VL), c = v_load(turns), s = v_load(turns + apart * VL);
        v_store(x, v_sub(v_mul(a, c), v_mul(b, s)));
        v_store(x + apart * VL, v_fma(b, c, v_mul(a, s)));
    }
}

static void turn_columns(const struct window *w, float *x, const float *turns) {
    int64_t half = w->n_dims / 2;
    if (w->halves)
        turn_pairs(x, turns, half, 1, half);
    else
        turn_pairs(x, turns, half, 2, 1);
}

/* Write the keys of up to VL cells as columns. */
static void key_columns(const struct attention *a, const char *k, int64_t n, int64_t ahead, float *rows, float *columns) {
    int64_t room = round_up(a->k_size, VL), bytes = row_bytes(a->types, a->k->type, a->k_size);
    for (int64_t i = 0; i < VL; i++) {
        for (int64_t at = 0; ahead && at < bytes; at += 64)
            __builtin_prefetch(k + i * (int64_t)a->k->nb[1] + ahead + at, 0, 2);
        if (i < n)
            unpack(a->types, a->k->type, k + i * (int64_t)a->k->nb[1], rows + i * room, a->k_size);
        else
            memset(rows + i * room, 0, (size_t)a->k_size * 4);
    }
    for (int64_t j = 0; j < a->k_size; j += VL)
        transpose((const uint32_t *)rows + j, room, (uint32_t *)columns + j * VL, VL);
}

#ifdef ISA_VNNI
/* Likewise from bytes as `pack_key_bytes` writes them, and the scales of their blocks. */
static void byte_columns(const uint32_t *bytes, const float *scales, int64_t scale_step, int64_t n, float *columns) {
    for (int64_t block = 0; block < n / 32; block++) {
        vf scale = v_load(scales + block * scale_step), bias = v_mul(scale, v_set(-128.0f));
        for (int64_t w = block * 8; w < block * 8 + 8; w++) {
            __m512i four = _mm512_loadu_si512(bytes + w * 16);
#pragma GCC unroll 4
            for (int i = 0; i < 4; i++) {
                __m512i one = _mm512_and_si512(_mm512_srli_epi32(four, (unsigned)(8 * i)), _mm512_set1_epi32(255));
                v_store(columns + (w * 4 + i) * VL, v_fma(_mm512_cvtepi32_ps(one), scale, bias));
            }
        }
    }
}
#endif

/* The scores of VL cells for the rows of a strip, each of `size` values. */
INLINE void column_dots(int rows, const float *columns, const float *queries, int64_t size, float *scores, int64_t step) {
    vf sums[12];
#pragma GCC unroll 6
    for (int r = 0; r < rows; r++)
        sums[r] = sums[r + 6] = v_set(0.0f);
    for (int64_t i = 0; i < size; i += 2) { /* two sums each, so that one need not wait for the other */
        vf first = v_load(columns + i * VL), second = v_load(columns + (i + 1) * VL);
#pragma GCC unroll 6
        for (int r = 0; r < rows; r++) {
            sums[r] = v_fma(first, v_set(queries[r * size + i]), sums[r]);
            sums[r + 6] = v_fma(second, v_set(queries[r * size + i + 1]), sums[r + 6]);
        }
    }
#pragma GCC unroll 6
    for (int r = 0; r < rows; r++)
        v_store(scores + r * step, v_add(sums[r], sums[r + 6]));
}

static void near_dots(int rows, const float *columns, const float *queries, int64_t size, float *scores, int64_t step) {
    switch (rows) { /* a constant in each call, so that the sums are registers */
#define ROWS(n) case n: column_dots(n, columns, queries, size, scores, step); break;
    ROWS(1) ROWS(2) ROWS(3) ROWS(4) ROWS(5) ROWS(6)
#undef ROWS
    }
}
