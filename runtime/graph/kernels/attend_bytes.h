/* Scores from the bytes of K, for an instruction set that multiplies bytes (VNNI); a part of attend_few.h.
 *
 * The queries are rounded to 15 bits and split into two bytes, hi * 128 + lo. The sums of a block are then exact, and are
 * multiplied by its scale.
 */
#pragma once

enum { QUERY_LIMIT = 127 * 128 }; /* so that neither byte overflows */

/* Where row `at` of the queries keeps its bytes, the blocks' biases, and its scale. */
INLINE uint32_t *query_at(const struct few_layout *l, uint32_t *memory, int64_t at) {
    return memory + l->queries + at * (2 * l->k_words + l->k_blocks + 1);
}

/* Round a row of queries. The bias takes back what reading K's bytes as 128 too much adds to each block's sum. Where a
 * query is not a number, neither is the scale, so that the failure is seen in the result. */
INLINE void round_query(const struct few_layout *l, uint32_t *memory, int64_t at, const float *row, int64_t n) {
    int8_t *high = (int8_t *)query_at(l, memory, at), *low = high + 4 * l->k_words;
    int32_t *bias = (int32_t *)(low + 4 * l->k_words);
    vf most = v_set(0.0f), finite = v_set(0.0f);
    for (int64_t i = 0; i < n; i += 16) {
        most = v_max(most, _mm512_abs_ps(v_load(row + i)));
        finite = v_fma(v_load(row + i), v_set(0.0f), finite);
    }
    float greatest = v_max_lane(most), scale = greatest / QUERY_LIMIT + v_sum(finite);
    vf up = v_set(greatest > 0.0f ? QUERY_LIMIT / greatest : 0.0f);
    memset(high, 0, (size_t)l->k_words * 8);
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
    memcpy(bias + l->k_blocks, &scale, 4);
}

/* Write the bytes of up to 16 cells' K, 128 added, such that four of each cell lie side by side. */
INLINE void pack_key_bytes_of(int type, const char *cells, int64_t step, int64_t ahead, int64_t block_bytes, int64_t blocks,
                          int64_t n, uint32_t *room, uint32_t *bytes) {
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
        transpose(room, 16, bytes + block * 8 * 16, 16);
    }
}

/* Likewise of cells [first, first + n) of a chunk. */
INLINE void pack_key_bytes(const struct attention *a, const struct few_layout *l, uint32_t *memory, const char *cells,
                       int64_t first, int64_t n, int64_t ahead) {
    int64_t step = (int64_t)a->k->nb[1], block_bytes = a->types[a->k->type].block_bytes;
    uint32_t *room = memory + l->row, *bytes = memory + l->bytes + first * l->k_words;
    switch (a->k->type) { /* one call for each, so that each becomes a loop of its own */
    case TYPE_Q8_0: pack_key_bytes_of(TYPE_Q8_0, cells, step, ahead, block_bytes, l->k_blocks, n, room, bytes); break;
    case TYPE_Q4_0: pack_key_bytes_of(TYPE_Q4_0, cells, step, ahead, block_bytes, l->k_blocks, n, room, bytes); break;
    case TYPE_Q5_0: pack_key_bytes_of(TYPE_Q5_0, cells, step, ahead, block_bytes, l->k_blocks, n, room, bytes); break;
    default: pack_key_bytes_of(TYPE_IQ4_NL, cells, step, ahead, block_bytes, l->k_blocks, n, room, bytes);
    }
}

/* The scores of 16 cells for one row. */
INLINE vf multiply_16(const uint32_t *bytes, const float *scales, const uint32_t *high, int64_t words, int64_t blocks) {
    const uint32_t *low = high + words;
    const int32_t *bias = (const int32_t *)(low + words);
    vf total = v_set(0.0f);
    for (int64_t block = 0; block < blocks; block++) {
        __m512i h = _mm512_setzero_si512(), l = _mm512_set1_epi32(-bias[block]);
#pragma GCC unroll 8
        for (int w = 0; w < 8; w++) {
            __m512i k = _mm512_load_si512(bytes + (block * 8 + w) * 16);
            h = _mm512_dpbusd_epi32(h, k, _mm512_set1_epi32((int)high[block * 8 + w]));
            l = _mm512_dpbusd_epi32(l, k, _mm512_set1_epi32((int)low[block * 8 + w]));
        }
        vf sum = _mm512_cvtepi32_ps(_mm512_add_epi32(_mm512_slli_epi32(h, 7), l));
        total = v_fma(sum, v_load(scales + block * FEW_CHUNK), total);
    }
    return v_mul(total, v_set(bits_float((uint32_t)bias[blocks])));
}

/* The scores of a chunk's cells for rows [at, at + rows). */
INLINE void score_bytes(const struct few_layout *l, uint32_t *memory, int64_t at, int rows, int64_t n, float *scores) {
    for (int r = 0; r < rows; r++)
        for (int64_t i = 0; i < n; i += 16)
            v_store(scores + r * FEW_CHUNK + i,
                    multiply_16(memory + l->bytes + i * l->k_words, (float *)memory + l->k_scales + i,
                                query_at(l, memory, at + r), l->k_words, l->k_blocks));
}
