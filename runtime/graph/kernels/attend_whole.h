/* Scores of many rows from K's whole numbers, for an instruction set that multiplies pairs of 16-bit numbers (VNNI); a
 * part of attend.h.
 */
#pragma once

enum { WHOLE_ROWS = 6 };              /* 12 of 32 registers are whole sums, 12 their sums in floats */

/* Round a row of queries. Where one is not a number, neither is the scale, so that the failure is seen in the result. */
INLINE void round_whole(const struct attend_layout *l, const struct side *side, uint32_t *memory, int64_t at,
                        const float *row, int64_t n, int32_t limit) {
    int16_t *to = (int16_t *)(memory + side->queries + at * l->k_words);
    vf most = v_set(0.0f), finite = v_set(0.0f);
    for (int64_t i = 0; i < n; i += 16) {
        most = v_max(most, _mm512_abs_ps(v_load(row + i)));
        finite = v_fma(v_load(row + i), v_set(0.0f), finite);
    }
    float greatest = v_max_lane(most);
    vf up = v_set(greatest > 0.0f ? (float)limit / greatest : 0.0f);
    ((float *)memory)[side->query_scales + at] = greatest / (float)limit + v_sum(finite);
    for (int64_t i = 0; i < n; i += 32) {
        __m512i first = _mm512_cvtps_epi32(v_mul(v_load(row + i), up));
        __m512i last = _mm512_cvtps_epi32(v_mul(v_load(row + i + 16), up));
        _mm256_storeu_si256((__m256i *)(to + i), _mm512_cvtepi32_epi16(first));
        _mm256_storeu_si256((__m256i *)(to + i + 16), _mm512_cvtepi32_epi16(last));
        ((float *)memory)[side->query_sums + at * (n / 32) + i / 32] = (float)_mm512_reduce_add_epi32(_mm512_add_epi32(first, last));
    }
}

INLINE void pack_whole_of(int type, const struct attention *a, const struct attend_layout *l, uint32_t *memory,
                          const char *k, int64_t n, int64_t ahead) {
    int64_t step = (int64_t)a->k->nb[1], block_bytes = a->types[type].block_bytes, blocks = a->k_size / 32;
    uint32_t *rows = memory + l->row;
    float *scales = (float *)memory + l->far.k_scales, *minima = (float *)memory + l->far.k_minima;
    for (int64_t cell = 0; cell < round_up(n, PANEL); cell += 16) {
        for (int64_t block = 0; block < blocks; block++) {
            uint16_t halves[16] = {0}, least[16] = {0};
            for (int64_t i = 0; i < 16; i++) {
                __m512i values = _mm512_setzero_si512();
                if (cell + i < n) {
                    const uint8_t *at = (const uint8_t *)k + (cell + i) * step + block * block_bytes;
                    if (ahead)
                        __builtin_prefetch(at + ahead * step, 0, 2);
                    struct values32 both = integers(type, at);
                    values = _mm512_cvtepi8_epi16(_mm256_set_m128i((__m128i)both.last, (__m128i)both.first));
                    memcpy(halves + i, at, 2);
                    memcpy(least + i, at + 2, 2);
                }
                _mm512_storeu_si512(rows + i * 16, values);
            }
            transpose(rows, 16, memory + l->far.k_panels + cell / PANEL * l->k_room * PANEL + block * 16 * PANEL + cell % PANEL,
                      PANEL);
            v_store(scales + block * l->chunk + cell, v_halves(halves));
            if (has_minimum(type))
                v_store(minima + block * l->chunk + cell, v_halves(least));
        }
    }
}

/* Write a chunk's K of one head as panels of pairs of 16-bit numbers, and its blocks' scales. */
INLINE void pack_whole_keys(const struct attention *a, const struct attend_layout *l, uint32_t *memory, const char *k,
                            int64_t n, int64_t ahead) {
    switch (a->k->type) { /* one call for each, so that each becomes a loop of its own */
    case TYPE_Q8_0: pack_whole_of(TYPE_Q8_0, a, l, memory, k, n, ahead); break;
    case TYPE_Q4_0: pack_whole_of(TYPE_Q4_0, a, l, memory, k, n, ahead); break;
    case TYPE_Q4_1: pack_whole_of(TYPE_Q4_1, a, l, memory, k, n, ahead); break;
    case TYPE_Q5_0: pack_whole_of(TYPE_Q5_0, a, l, memory, k, n, ahead); break;
    case TYPE_Q5_1: pack_whole_of(TYPE_Q5_1, a, l, memory, k, n, ahead); break;
    default: pack_whole_of(TYPE_IQ4_NL, a, l, memory, k, n, ahead);
    }
}

/* Likewise of near keys, which are rounded to 14 bits: finer than any block of a cache is. */
INLINE void pack_whole_near(const struct attention *a, const struct attend_layout *l, uint32_t *memory, const char *k,
                            const int32_t *positions, int64_t n) {
    int64_t step = (int64_t)a->k->nb[1], blocks = a->k_size / 32;
    uint32_t *rows = memory + l->row;
    float *x = (float *)memory + l->key, *scales = (float *)memory + l->near.k_scales;
    for (int64_t cell = 0; cell < round_up(n, PANEL); cell += 16) {
        for (int64_t i = 0; i < 16; i++) {
            if (cell + i < n)
                near_key(a, k + (cell + i) * step, positions[cell + i], x);
            else
                memset(x, 0, (size_t)a->k_size * 4);
            for (int64_t block = 0; block < blocks; block++) {
                vf first = v_load(x + block * 32), last = v_load(x + block * 32 + 16);
                float most = v_max_lane(v_max(v_abs(first), v_abs(last)));
                vf up = v_set(most > 0.0f ? NEAR_LIMIT / most : 0.0f);
                __m512i both = _mm512_castsi256_si512(_mm512_cvtepi32_epi16(_mm512_cvtps_epi32(v_mul(first, up))));
                both = _mm512_inserti64x4(both, _mm512_cvtepi32_epi16(_mm512_cvtps_epi32(v_mul(last, up))), 1);
                _mm512_storeu_si512(rows + (block * 16 + i) * 16, both);
                scales[block * l->chunk + cell + i] = most / NEAR_LIMIT;
            }
        }
        for (int64_t block = 0; block < blocks; block++)
            transpose(rows + block * 256, 16,
                      memory + l->near.k_panels + cell / PANEL * l->k_room * PANEL + block * 16 * PANEL + cell % PANEL,
                      PANEL);
    }
}

/* `minima` is NULL where blocks have none; the scales of blocks are `step` apart. */
INLINE void multiply_whole_rows(int rows, const uint32_t *queries, int64_t words, const uint32_t *panel,
                                const float *scales, const float *minima, int64_t step, const float *query_scales,
                                const float *query_sums, float *out, int64_t out_step) {
    vf totals[WHOLE_ROWS][2];
#pragma GCC unroll 6
    for (int r = 0; r < rows; r++)
        totals[r][0] = totals[r][1] = v_set(0.0f);
    for (int64_t first = 0; first < words; first += 16, scales += step) {
        __m512i sums[WHOLE_ROWS][2];
#pragma GCC unroll 6
        for (int r = 0; r < rows; r++)
            sums[r][0] = sums[r][1] = _mm512_setzero_si512();
        for (int64_t w = first; w < first + 16; w++) {
            __m512i left = _mm512_loadu_si512(panel + w * PANEL), right = _mm512_loadu_si512(panel + w * PANEL + VL);
#pragma GCC unroll 6
            for (int r = 0; r < rows; r++) {
                __m512i query = _mm512_set1_epi32((int)queries[r * words + w]);
                sums[r][0] = _mm512_dpwssd_epi32(sums[r][0], left, query);
                sums[r][1] = _mm512_dpwssd_epi32(sums[r][1], right, query);
            }
        }
#pragma GCC unroll 6
        for (int r = 0; r < rows; r++)
#pragma GCC unroll 2
            for (int c = 0; c < 2; c++)
                totals[r][c] = v_fma(_mm512_cvtepi32_ps(sums[r][c]), v_load(scales + c * VL), totals[r][c]);
        if (minima == NULL)
            continue;
#pragma GCC unroll 6
        for (int r = 0; r < rows; r++)
#pragma GCC unroll 2
            for (int c = 0; c < 2; c++)
                totals[r][c] = v_fma(v_load(minima + first / 16 * step + c * VL),
                                     v_set(query_sums[r * (words / 16) + first / 16]), totals[r][c]);
    }
#pragma GCC unroll 6
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 2
        for (int c = 0; c < 2; c++)
            v_store(out + r * out_step + c * VL, v_mul(totals[r][c], v_set(query_scales[r])));
}

/* The scores of rows [at, at + n) and a chunk's cells. */
INLINE void multiply_whole(const struct attention *a, const struct attend_layout *l, const struct side *side,
                           uint32_t *memory, int64_t at, int n, int64_t n_cells) {
    const float *floats = (const float *)memory;
    const float *minima = side == &l->far && has_minimum(a->k->type) ? floats + side->k_minima : NULL;
    for (int64_t c = 0; c < n_cells; c += PANEL)
        for (int from = 0; from < n; from += WHOLE_ROWS) {
            int rows = n - from < WHOLE_ROWS ? n - from : WHOLE_ROWS;
            switch (rows) { /* a constant in each call, so that the sums are registers */
#define ROWS(r) \
    case r: \
        multiply_whole_rows(r, memory + side->queries + (at + from) * l->k_words, l->k_words, \
                            memory + side->k_panels + c * l->k_room, floats + side->k_scales + c, minima ? minima + c : NULL, \
                            l->chunk, floats + side->query_scales + at + from, \
                            floats + side->query_sums + (at + from) * (l->k_words / 16), \
                            (float *)memory + side->scores + from * l->chunk + c, l->chunk); \
        break;
                ROWS(1) ROWS(2) ROWS(3) ROWS(4) ROWS(5) ROWS(6)
#undef ROWS
            }
        }
}
