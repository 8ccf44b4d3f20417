/* Attention of a few query rows straight from whole numbers, for one instruction set that multiplies bytes (VNNI).
 *
 * Where K and V are blocks of whole numbers with a scale, they are not turned into floats to be rounded again. K's bytes
 * are multiplied by the queries, rounded to 15 bits and split into two bytes, hi * 128 +
 * lo; the sums are exact, and each block's is then multiplied by its scale. V's bytes become floats in registers, and the
 * scales are multiplied into the weights.
 */
#pragma once

#include "attend.h"

#ifdef ISA_VNNI

enum { FEW_STRIP = 6 };   /* rows whose sums of 64 values of V stay in registers */
enum { FEW_CHUNK = 256 }; /* most cells at a time */
enum { FEW_BYTES = 160 << 10 }; /* of K and V at a time, for all heads: as many again are on their way into the core's cache */
enum { QUERY_LIMIT = 127 * 128 }; /* so that neither byte overflows */

/* Memory of one piece, in words. */
struct few_layout {
    int64_t n_rows, k_words, k_blocks, v_blocks, v_padded, chunk;
    int64_t high, low, bias, query_scale, k_bytes, k_scales, v_scales, scores, weights, out, sum, greatest, row, seen, total;
};

INLINE struct few_layout few_layout(const struct attention *a, const struct attention_piece *p) {
    struct few_layout l;
    int64_t at = 0;
    l.n_rows = (p->stop_head - p->first_head) * (p->stop_token - p->first_token) * a->group;
    l.k_words = round_up(a->k_size, 64) / 4;
    l.k_blocks = a->k_size / 32;
    l.v_blocks = a->v_size / 32;
    l.v_padded = a->v_padded;
    l.chunk = FEW_CHUNK;
    while (l.chunk > 32 && l.chunk * (int64_t)(a->k->nb[1] + a->v->nb[1]) > FEW_BYTES)
        l.chunk /= 2;
#define PLACE(field, n) (l.field = at, at += round_up(n, 16))
    PLACE(high, l.n_rows * l.k_words);
    PLACE(low, l.n_rows * l.k_words);
    PLACE(bias, l.n_rows * l.k_blocks);
    PLACE(query_scale, l.n_rows);
    PLACE(k_bytes, FEW_CHUNK * l.k_words);
    PLACE(k_scales, l.k_blocks * FEW_CHUNK);
    PLACE(v_scales, l.v_blocks * FEW_CHUNK);
    PLACE(scores, FEW_STRIP * FEW_CHUNK);
    PLACE(weights, FEW_STRIP * l.v_blocks * FEW_CHUNK);
    PLACE(out, l.n_rows * l.v_padded);
    PLACE(sum, l.n_rows);
    PLACE(greatest, l.n_rows);
    PLACE(row, 16 * 16 > a->k_size ? 16 * 16 : a->k_size);
    PLACE(seen, p->stop_token - p->first_token);
#undef PLACE
    l.total = at;
    return l;
}

/* Whether a piece is computed here: few enough rows that unpacking K and V would be most of the work. */
INLINE bool is_few(const struct attention *a, const struct attention_piece *p) {
    return (p->stop_token - p->first_token) * a->group <= 2 * FEW_STRIP && !a->exact && has_integers(a->k->type) &&
           has_integers(a->v->type);
}

/* Round a row of queries; `bias` takes back what reading K's bytes as 128 too much adds to each block's sum. Where a
 * query is not a number, neither is its scale, so that the failure is seen in the result. */
INLINE void few_query(const float *row, int64_t n, int8_t *high, int8_t *low, int32_t *bias, float *scale) {
    vf most = v_set(0.0f), finite = v_set(0.0f);
    for (int64_t i = 0; i < n; i += 16) {
        most = v_max(most, _mm512_abs_ps(v_load(row + i)));
        finite = v_fma(v_load(row + i), v_set(0.0f), finite);
    }
    float greatest = v_max_lane(most);
    vf up = v_set(greatest > 0.0f ? QUERY_LIMIT / greatest : 0.0f);
    *scale = greatest / QUERY_LIMIT + v_sum(finite);
    for (int64_t i = 0; i < n; i += 32) {
        __m512i total = _mm512_setzero_si512();
        for (int64_t j = i; j < i + 32; j += 16) {
            __m512i q = _mm512_cvtps_epi32(v_mul(v_load(row + j), up));
            __m512i h = _mm512_srai_epi32(_mm512_add_epi32(q, _mm512_set1_epi32(64)), 7);
            _mm_storeu_si128((__m128i *)(high + j), _mm512_cvtepi32_epi8(h));
            _mm_storeu_si128((__m128i *)(low + j), _mm512_cvtepi32_epi8(_mm512_sub_epi32(q, _mm512_slli_epi32(h, 7))));
            total = _mm512_add_epi32(total, q);
        }
        bias[i / 32] = 128 * _mm512_reduce_add_epi32(total);
    }
}

INLINE void few_queries(const struct attention *a, const struct attention_piece *p, const struct few_layout *l,
                        uint32_t *memory) {
    float scale = query_scale(a), *row = (float *)memory + l->row;
    int64_t at = 0;
    memset(memory + l->high, 0, (size_t)(l->bias - l->high) * 4);
    for (int64_t head = p->first_head; head < p->stop_head; head++)
        for (int64_t token = p->first_token; token < p->stop_token; token++)
            for (int64_t g = 0; g < a->group; g++, at++) {
                const float *q = query_row(a, p->stream, token, head * a->group + g);
                for (int64_t i = 0; i < a->k_size; i++)
                    row[i] = q[i] * scale;
                few_query(row, a->k_size, (int8_t *)(memory + l->high + at * l->k_words),
                          (int8_t *)(memory + l->low + at * l->k_words), (int32_t *)memory + l->bias + at * l->k_blocks,
                          (float *)memory + l->query_scale + at);
            }
}

/* Scales of up to 16 cells' blocks, each cell's `step` bytes after the other's, as floats. */
INLINE void few_scales(const char *cells, int64_t step, int64_t block_bytes, int64_t blocks, int64_t n, float *scales) {
    for (int64_t block = 0; block < blocks; block++, cells += block_bytes) {
        __m128i first = _mm_setzero_si128(), last = first;
#define HALF(i) (i < n ? *(const uint16_t *)(cells + (i)*step) : 0)
#define PUT(i) \
    first = _mm_insert_epi16(first, HALF(i), i); \
    last = _mm_insert_epi16(last, HALF(i + 8), i);
        PUT(0) PUT(1) PUT(2) PUT(3) PUT(4) PUT(5) PUT(6) PUT(7)
#undef PUT
#undef HALF
        v_store(scales + block * FEW_CHUNK, _mm512_cvtph_ps(_mm256_set_m128i(last, first)));
    }
}

/* Write the bytes of up to 16 cells' K, 128 added, such that four of each cell lie side by side: `k_words` vectors. */
INLINE void few_keys(int type, const char *cells, int64_t step, int64_t block_bytes, int64_t blocks, int64_t n,
                     int64_t ahead, uint32_t *room, uint32_t *keys) {
    for (int64_t block = 0; block < blocks; block += 2) {
        for (int64_t i = 0; i < 16; i++) {
            __m512i both = _mm512_setzero_si512();
            if (i < n) {
                const uint8_t *at = (const uint8_t *)cells + i * step + block * block_bytes;
                __builtin_prefetch(at + ahead, 0, 2);
                struct values32 one = integers(type, at), two = one;
                if (block + 1 < blocks)
                    two = integers(type, at + block_bytes);
                both = _mm512_inserti64x4(
                    _mm512_castsi256_si512(_mm256_set_m128i((__m128i)one.last, (__m128i)one.first)),
                    _mm256_set_m128i((__m128i)two.last, (__m128i)two.first), 1);
                both = _mm512_xor_si512(both, _mm512_set1_epi8((char)0x80));
            }
            _mm512_store_si512(room + i * 16, both);
        }
        transpose(room, 16, keys + block * 8 * 16, 16);
    }
}

/* The scores of 16 cells for one row. */
INLINE vf few_scores(const uint32_t *keys, const float *k_scales, const uint32_t *high, const uint32_t *low,
                     const int32_t *bias, int64_t blocks, float scale) {
    vf total = v_set(0.0f);
    for (int64_t block = 0; block < blocks; block++) {
        __m512i h = _mm512_setzero_si512(), l = _mm512_set1_epi32(-bias[block]);
#pragma GCC unroll 8
        for (int w = 0; w < 8; w++) {
            __m512i k = _mm512_load_si512(keys + (block * 8 + w) * 16);
            h = _mm512_dpbusd_epi32(h, k, _mm512_set1_epi32((int)high[block * 8 + w]));
            l = _mm512_dpbusd_epi32(l, k, _mm512_set1_epi32((int)low[block * 8 + w]));
        }
        vf sum = _mm512_cvtepi32_ps(_mm512_add_epi32(_mm512_slli_epi32(h, 7), l));
        total = v_fma(sum, v_load(k_scales + block * FEW_CHUNK), total);
    }
    return v_mul(total, v_set(scale));
}

/* Add the weighted values of a chunk's cells to `out`: 64 values (or the last 32) of `rows` rows. */
INLINE void few_values_rows(int rows, int halves, int type, const char *cells, int64_t step, int64_t block_bytes,
                            int64_t n, int64_t ahead, const float *weights, int64_t row_weights, float *out,
                            int64_t out_step, const float *factor) {
    vf sums[FEW_STRIP][4];
#pragma GCC unroll 6
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
        for (int c = 0; c < 2 * halves; c++)
            sums[r][c] = v_mul(v_load(out + r * out_step + c * 16), v_set(factor[r]));
    for (int64_t i = 0; i < n; i++) {
        const uint8_t *block = (const uint8_t *)cells + i * step;
        __builtin_prefetch(block + ahead, 0, 2);
        vf values[4];
#pragma GCC unroll 2
        for (int c = 0; c < halves; c++) {
            struct values32 both = integers(type, block + c * block_bytes);
            values[2 * c] = v_lanes(both.first, 0);
            values[2 * c + 1] = v_lanes(both.last, 0);
        }
#pragma GCC unroll 6
        for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
            for (int c = 0; c < 2 * halves; c++)
                sums[r][c] = v_fma(values[c], v_set(weights[r * row_weights + c / 2 * FEW_CHUNK + i]), sums[r][c]);
    }
#pragma GCC unroll 6
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
        for (int c = 0; c < 2 * halves; c++)
            v_store(out + r * out_step + c * 16, sums[r][c]);
}

INLINE void few_values_of(int type, int rows, int halves, const char *cells, int64_t step, int64_t block_bytes, int64_t n,
                          int64_t ahead, const float *weights, int64_t row_weights, float *out, int64_t out_step,
                          const float *factor) {
    switch (rows * 2 + halves - 1) { /* constants in each call, so that the sums are registers */
#define CASE(r, h) \
    case r * 2 + h - 1: \
        few_values_rows(r, h, type, cells, step, block_bytes, n, ahead, weights, row_weights, out, out_step, factor); \
        break;
        CASE(1, 1) CASE(2, 1) CASE(3, 1) CASE(4, 1) CASE(5, 1) CASE(6, 1)
        CASE(1, 2) CASE(2, 2) CASE(3, 2) CASE(4, 2) CASE(5, 2) CASE(6, 2)
#undef CASE
    }
}

#define VALUES_OF(name, type) \
    static void name(int rows, int halves, const char *cells, int64_t step, int64_t block_bytes, int64_t n, \
                     int64_t ahead, const float *weights, int64_t row_weights, float *out, int64_t out_step, \
                     const float *factor) { \
        few_values_of(type, rows, halves, cells, step, block_bytes, n, ahead, weights, row_weights, out, out_step, factor); \
    }
VALUES_OF(few_values_q8_0, TYPE_Q8_0)
VALUES_OF(few_values_q4_0, TYPE_Q4_0)
VALUES_OF(few_values_q5_0, TYPE_Q5_0)
VALUES_OF(few_values_iq4_nl, TYPE_IQ4_NL)

/* Pack a chunk's K of one head, with its scales and V's. Each place asks for the same one in the next chunk, `ahead`:
 * one at a time, as a core waits for some twenty lines at once, and stands still if it is to wait for more. */
INLINE void few_pack(const struct attention *a, const struct few_layout *l, uint32_t *memory, const char *k, const char *v,
                     int64_t n, int64_t ahead) {
    int64_t k_step = (int64_t)a->k->nb[1], v_step = (int64_t)a->v->nb[1], k_block = a->types[a->k->type].block_bytes;
    int64_t v_block = a->types[a->v->type].block_bytes;
    for (int64_t i = 0; i < n; i += 16, k += 16 * k_step, v += 16 * v_step) {
        int64_t some = n - i < 16 ? n - i : 16;
        uint32_t *keys = memory + l->k_bytes + i * l->k_words, *room = memory + l->row;
        switch (a->k->type) { /* one call for each, so that each becomes a loop of its own */
        case TYPE_Q8_0: few_keys(TYPE_Q8_0, k, k_step, k_block, l->k_blocks, some, ahead, room, keys); break;
        case TYPE_Q4_0: few_keys(TYPE_Q4_0, k, k_step, k_block, l->k_blocks, some, ahead, room, keys); break;
        case TYPE_Q5_0: few_keys(TYPE_Q5_0, k, k_step, k_block, l->k_blocks, some, ahead, room, keys); break;
        default: few_keys(TYPE_IQ4_NL, k, k_step, k_block, l->k_blocks, some, ahead, room, keys);
        }
        float *k_scales = (float *)memory + l->k_scales + i, *v_scales = (float *)memory + l->v_scales + i;
        if (some == 16) {
            few_scales(k, k_step, k_block, l->k_blocks, 16, k_scales);
            few_scales(v, v_step, v_block, l->v_blocks, 16, v_scales);
        } else {
            few_scales(k, k_step, k_block, l->k_blocks, some, k_scales);
            few_scales(v, v_step, v_block, l->v_blocks, some, v_scales);
        }
    }
}

/* Score, weigh and sum rows [at, at + rows) of a head over the packed cells. */
INLINE void few_strip(const struct attention *a, const struct attention_piece *p, const struct few_layout *l,
                      uint32_t *memory, int64_t at, int rows, int64_t first_row, int64_t head, int64_t first_cell,
                      const char *v, int64_t n, int64_t ahead) {
    float *floats = (float *)memory, *scores = floats + l->scores, factor[FEW_STRIP];
    for (int r = 0; r < rows; r++) {
        int64_t row = at + r - first_row, token = row / a->group;
        for (int64_t i = 0; i < n; i += 16)
            v_store(scores + r * FEW_CHUNK + i,
                    few_scores(memory + l->k_bytes + i * l->k_words, floats + l->k_scales + i,
                               memory + l->high + (at + r) * l->k_words, memory + l->low + (at + r) * l->k_words,
                               (int32_t *)memory + l->bias + (at + r) * l->k_blocks, l->k_blocks,
                               floats[l->query_scale + at + r]));
        const uint16_t *mask = ((int32_t *)memory)[l->seen + token] == SEEN
                                   ? NULL
                                   : mask_row(a, p->stream, p->first_token + token) + first_cell;
        factor[r] = weigh(scores + r * FEW_CHUNK, n, mask, alibi_slope(a, head * a->group + row % a->group), a->softcap,
                          floats + l->greatest + at + r, floats + l->sum + at + r, (uint32_t *)scores + r * FEW_CHUNK, 0);
        float *weights = floats + l->weights + r * l->v_blocks * FEW_CHUNK;
        for (int64_t block = 0; block < l->v_blocks; block++)
            for (int64_t i = 0; i < n; i += 16)
                v_store(weights + block * FEW_CHUNK + i,
                        v_mul(v_load(scores + r * FEW_CHUNK + i), v_load(floats + l->v_scales + block * FEW_CHUNK + i)));
    }
    int64_t v_block = a->types[a->v->type].block_bytes;
    for (int64_t block = 0; block < l->v_blocks; block += 2) {
        int halves = block + 1 < l->v_blocks ? 2 : 1;
        const char *cells = v + block * v_block;
        const float *weights = floats + l->weights + block * FEW_CHUNK;
        float *out = floats + l->out + at * l->v_padded + block * 32;
        int64_t step = (int64_t)a->v->nb[1], row_weights = l->v_blocks * FEW_CHUNK;
        switch (a->v->type) {
        case TYPE_Q8_0: few_values_q8_0(rows, halves, cells, step, v_block, n, ahead, weights, row_weights, out, l->v_padded, factor); break;
        case TYPE_Q4_0: few_values_q4_0(rows, halves, cells, step, v_block, n, ahead, weights, row_weights, out, l->v_padded, factor); break;
        case TYPE_Q5_0: few_values_q5_0(rows, halves, cells, step, v_block, n, ahead, weights, row_weights, out, l->v_padded, factor); break;
        default: few_values_iq4_nl(rows, halves, cells, step, v_block, n, ahead, weights, row_weights, out, l->v_padded, factor);
        }
    }
}

INLINE void attend_few(const struct attention *a, const struct attention_piece *p, float *scratch) {
    struct few_layout l = few_layout(a, p);
    uint32_t *memory = (uint32_t *)scratch;
    int64_t head_rows = (p->stop_token - p->first_token) * a->group;
    memset(scratch + l.out, 0, (size_t)(l.greatest - l.out) * 4);
    for (int64_t i = 0; i < l.n_rows; i++)
        scratch[l.greatest + i] = -INFINITY;
    few_queries(a, p, &l, memory);
    for (int64_t cell = p->first_cell; cell < p->stop_cell; cell += l.chunk) {
        int64_t n = p->stop_cell - cell < l.chunk ? p->stop_cell - cell : l.chunk;
        if (!look(a, p, (int32_t *)memory + l.seen, cell, n))
            continue;
        for (int64_t head = p->first_head; head < p->stop_head; head++) {
            const char *k = cell_of(a->k, p->stream, head, cell), *v = cell_of(a->v, p->stream, head, cell);
            int64_t first_row = (head - p->first_head) * head_rows;
            bool next = cell + 2 * l.chunk <= a->n_cells;
            few_pack(a, &l, memory, k, v, n, next ? l.chunk * (int64_t)a->k->nb[1] : 0);
            int64_t strips = (head_rows + FEW_STRIP - 1) / FEW_STRIP, strip = (head_rows + strips - 1) / strips;
            for (int64_t at = 0; at < head_rows; at += strip) {
                int rows = (int)(head_rows - at < strip ? head_rows - at : strip);
                few_strip(a, p, &l, memory, first_row + at, rows, first_row, head, cell, v, n,
                          next ? l.chunk * (int64_t)a->v->nb[1] : 0);
            }
        }
    }
    finish_rows(a, p, scratch + l.out, scratch + l.sum, scratch + l.greatest);
}

#endif
