/* Products of weights with a few rows, as when a text is written: each row of the weight is read once, straight from its
 * blocks. For an instruction set that multiplies bytes (VNNI).
 */
#pragma once

#include "multiply_bytes.h"

#if defined(ISA_VNNI)
enum { FEW_PRODUCT_ROWS = 4 }; /* at most: beyond, packing the weight costs less */

/* A group of 256 values of a row of x: bytes, the scale for each of the weight's scales, and the sums of the values, times
 * what the weight's zero byte takes back. In words. */
enum { GROUP_SCALES = 64, GROUP_SUMS = 80, GROUP_WORDS = 96 };

INLINE int64_t few_row_words(int64_t n_in) { return (n_in + 255) / 256 * GROUP_WORDS; }

INLINE void convert_few(int type, const float *x, int64_t n_in, uint32_t *words) {
    const int subs = 32 / sub_block(type);
    float zero = has_mins(type) ? 1.0f : (float)-zero_byte(type);
    memset(words, 0, (size_t)few_row_words(n_in) * 4);
    for (int64_t i = 0; i < n_in; i += 32) {
        uint32_t *group = words + i / 256 * GROUP_WORDS;
        int32_t sums[2];
        float scale = round_bytes(x + i, (int8_t *)group + i % 256, sums);
        if (subs == 1)
            sums[0] += sums[1];
        for (int s = 0; s < subs; s++) {
            float sum = zero * scale * (float)sums[s];
            memcpy(group + GROUP_SCALES + i % 256 / 32 * subs + s, &scale, 4);
            memcpy(group + GROUP_SUMS + i % 256 / 32 * subs + s, &sum, 4);
        }
    }
}

/* Which scale each lane of chunk `i` has. */
INLINE __m512i scale_lanes(int type, int i) {
    const __m512i eights = _mm512_set_epi32(1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0);
    const __m512i fours = _mm512_set_epi32(3, 3, 3, 3, 2, 2, 2, 2, 1, 1, 1, 1, 0, 0, 0, 0);
    return sub_block(type) == 32 ? i_add(eights, i_set(2 * i)) : i_add(fours, i_set(4 * i));
}

/* Multiply `n` values, 256 or those that a row ends with, of `rows` rows; `rows`, and 256, are constants. `n_scales` are
 * read, which is faster with all of a group: x is 0 where they mean nothing. */
INLINE void multiply_group(int type, int rows, const uint8_t *group, int64_t n, int n_scales, const uint32_t *x,
                           int64_t x_step, vf (*sums)[2]) {
    struct scales weight;
    vf scales[FEW_PRODUCT_ROWS];
    scales_of(type, group, n_scales, &weight);
#pragma GCC unroll 4
    for (int r = 0; r < rows; r++) {
        const float *at = (const float *)x + r * x_step;
        scales[r] = v_mul(weight.scale[0], v_load(at + GROUP_SCALES));
        if (has_mins(type) || zero_byte(type))
            sums[r][1] = v_fma(has_mins(type) ? weight.min[0] : weight.scale[0], v_load(at + GROUP_SUMS), sums[r][1]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        b64 chunk;
        if (64 * i >= n)
            return;
        chunk_of(type, group, i, 64 * i + 32 < n, &chunk);
#pragma GCC unroll 4
        for (int r = 0; r < rows; r++) {
            vi whole = _mm512_dpbusd_epi32(i_set(0), (vi)chunk, i_load(x + r * x_step + 16 * i));
            sums[r][0] = v_fma(i_float(whole), _mm512_permutexvar_ps(scale_lanes(type, i), scales[r]), sums[r][0]);
        }
    }
}

INLINE void multiply_few_rows(int type, int rows, const struct product *p, int64_t first, int64_t stop) {
    const struct tensor *w = p->weight;
    const uint8_t *end = (const uint8_t *)w->data + p->n_out * (int64_t)w->nb[1];
    int64_t x_step = few_row_words(p->n_in), whole = p->n_in / 256 * 256, rest = p->n_in - whole;
    for (int64_t column = first; column < stop; column++) {
        const uint8_t *group = (const uint8_t *)w->data + column * (int64_t)w->nb[1];
        const uint32_t *x = p->words;
        vf sums[FEW_PRODUCT_ROWS][2];
#pragma GCC unroll 4
        for (int r = 0; r < rows; r++)
            sums[r][0] = sums[r][1] = v_set(0.0f);
        for (int64_t k = 0; k < whole; k += 256, group += group_size(type), x += GROUP_WORDS)
            multiply_group(type, rows, group, 256, 8, x, x_step, sums);
        if (block_values(type) == 32 && rest > 0 && group + group_size(type) <= end)
            multiply_group(type, rows, group, rest, 8, x, x_step, sums);
        else if (block_values(type) == 32 && rest > 0)
            multiply_group(type, rows, group, rest, (int)rest / 32, x, x_step, sums);
#pragma GCC unroll 4
        for (int r = 0; r < rows; r++)
            ((float *)(p->out + r * (int64_t)p->out_step))[column] = v_sum(v_add(sums[r][0], sums[r][1]));
    }
}

static bool is_few_product(const struct product *p) {
    return p->n_rows <= FEW_PRODUCT_ROWS && !p->exact && is_bytes(p->weight->type);
}

static int64_t few_words(const struct product *p) { return p->n_rows * few_row_words(p->n_in); }

static void convert_few_rows(const struct product *p, uint32_t *words) {
    for (int64_t r = 0; r < p->n_rows; r++) {
        const float *x = (const float *)(p->x + r * (int64_t)p->x_step);
#define OF(type) convert_few(type, x, p->n_in, words + r * few_row_words(p->n_in))
        FOR_BYTES(p->weight->type, OF)
#undef OF
    }
}

static void multiply_few(const struct product *p, int64_t first, int64_t stop) {
    switch (p->n_rows) {
#define OF_1(type) multiply_few_rows(type, 1, p, first, stop)
#define OF_2(type) multiply_few_rows(type, 2, p, first, stop)
#define OF_3(type) multiply_few_rows(type, 3, p, first, stop)
#define OF_4(type) multiply_few_rows(type, 4, p, first, stop)
    case 1: FOR_BYTES(p->weight->type, OF_1) break;
    case 2: FOR_BYTES(p->weight->type, OF_2) break;
    case 3: FOR_BYTES(p->weight->type, OF_3) break;
    case 4: FOR_BYTES(p->weight->type, OF_4) break;
    }
}
#endif
