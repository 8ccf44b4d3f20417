/* The matrix product that everything here is made of: a strip of a few rows times a panel of columns.
 *
 * The shared dimension is counted in words of 32 bits: one float, or two bfloat16 (`bf`), whose products are summed by
 * one instruction. A strip has up to MR rows of words, as they come. A panel has PANEL = 2 * VL columns; its words lie
 * one step of the shared dimension after the other, so that a step reads two vectors and a word of each row:
 *
 *     out[r][c] += sum over w of strip[r][w] * panel[w][c]
 */
#pragma once

#include "vectors.h"

enum { PANEL = 2 * VL };

#if defined(ISA_AVX512)
enum { MR = 12 }; /* 24 of 32 registers are sums */
#elif defined(ISA_AVX2)
enum { MR = 6 }; /* 12 of 16 */
#else
enum { MR = 8 };
#endif

INLINE int64_t round_up(int64_t n, int64_t step) { return (n + step - 1) / step * step; }

/* Words of `n` values. */
INLINE int64_t words_of(int64_t n, int bf) { return bf ? (n + 1) / 2 : n; }

INLINE vf mac(vf sum, uint32_t word, vf column, int bf) {
#ifdef ISA_BF16
    if (bf)
        return _mm512_dpbf16_ps(sum, (__m512bh)_mm512_set1_epi32((int)word), (__m512bh)column);
#endif
    (void)bf;
    return v_fma(v_set(bits_float(word)), column, sum);
}

/* The sums start from `out` times each row's `factor`, or from 0 where there is none. */
INLINE void multiply_rows(int rows, const uint32_t *strip, int64_t strip_step, const uint32_t *panel, int64_t words,
                          float *out, int64_t out_step, const float *factor, int bf) {
    vf sums[MR][2];
#pragma GCC unroll 12
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 2
        for (int c = 0; c < 2; c++)
            sums[r][c] = factor ? v_mul(v_set(factor[r]), v_load(out + r * out_step + c * VL)) : v_set(0.0f);
    for (int64_t w = 0; w < words; w++) {
        vf left = v_load((const float *)panel + w * PANEL), right = v_load((const float *)panel + w * PANEL + VL);
#pragma GCC unroll 12
        for (int r = 0; r < rows; r++) {
            uint32_t word = strip[r * strip_step + w];
            sums[r][0] = mac(sums[r][0], word, left, bf);
            sums[r][1] = mac(sums[r][1], word, right, bf);
        }
    }
#pragma GCC unroll 12
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 2
        for (int c = 0; c < 2; c++)
            v_store(out + r * out_step + c * VL, sums[r][c]);
}

INLINE void multiply(int rows, const uint32_t *strip, int64_t strip_step, const uint32_t *panel, int64_t words,
                     float *out, int64_t out_step, const float *factor, int bf) {
    switch (rows) { /* a constant in each call, so that the sums are registers */
#define ROWS(n) case n: multiply_rows(n, strip, strip_step, panel, words, out, out_step, factor, bf); break;
    ROWS(1) ROWS(2) ROWS(3) ROWS(4) ROWS(5) ROWS(6)
#if !defined(ISA_AVX2)
    ROWS(7) ROWS(8)
#endif
#if defined(ISA_AVX512)
    ROWS(9) ROWS(10) ROWS(11) ROWS(12)
#endif
#undef ROWS
    }
}

/* Round floats to words; an odd last value is followed by 0. `words` may be the same memory as `values`. */
INLINE void to_words(const float *values, int64_t n, uint32_t *words, int bf) {
    if (!bf) {
        memmove(words, values, (size_t)n * 4);
        return;
    }
#ifdef ISA_BF16
    int64_t i = 0;
    for (; i + 2 * VL <= n; i += 2 * VL)
        _mm512_storeu_si512(words + i / 2, (__m512i)_mm512_cvtne2ps_pbh(v_load(values + i + VL), v_load(values + i)));
    for (; i < n; i += VL) {
        __mmask16 mask = n - i >= VL ? 0xffff : (__mmask16)((1 << (n - i)) - 1);
        __m256i pairs = (__m256i)_mm512_cvtneps_pbh(_mm512_maskz_loadu_ps(mask, values + i));
        _mm256_mask_storeu_epi16(words + i / 2, (__mmask16)(mask | (mask << 1 & -(n & 1))), pairs);
    }
#endif
}

/* Write VL rows of VL words as VL columns. */
#if defined(ISA_AVX512)
INLINE void transpose(const uint32_t *in, int64_t in_step, uint32_t *out, int64_t out_step) {
    __m512i a[16], b[16];
#pragma GCC unroll 16
    for (int i = 0; i < 16; i++)
        a[i] = _mm512_loadu_si512(in + i * in_step);
#pragma GCC unroll 8
    for (int i = 0; i < 16; i += 2) {
        b[i] = _mm512_unpacklo_epi32(a[i], a[i + 1]);
        b[i + 1] = _mm512_unpackhi_epi32(a[i], a[i + 1]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 16; i += 4) {
        a[i] = _mm512_unpacklo_epi64(b[i], b[i + 2]);
        a[i + 1] = _mm512_unpackhi_epi64(b[i], b[i + 2]);
        a[i + 2] = _mm512_unpacklo_epi64(b[i + 1], b[i + 3]);
        a[i + 3] = _mm512_unpackhi_epi64(b[i + 1], b[i + 3]);
    }
    /* a[4g + c], quarter q: column 4q + c of rows 4g to 4g + 3 */
#pragma GCC unroll 4
    for (int c = 0; c < 4; c++) {
        __m512i even = _mm512_shuffle_i32x4(a[c], a[4 + c], 0x88), odd = _mm512_shuffle_i32x4(a[c], a[4 + c], 0xdd);
        __m512i even2 = _mm512_shuffle_i32x4(a[8 + c], a[12 + c], 0x88), odd2 = _mm512_shuffle_i32x4(a[8 + c], a[12 + c], 0xdd);
        _mm512_storeu_si512(out + c * out_step, _mm512_shuffle_i32x4(even, even2, 0x88));
        _mm512_storeu_si512(out + (4 + c) * out_step, _mm512_shuffle_i32x4(odd, odd2, 0x88));
        _mm512_storeu_si512(out + (8 + c) * out_step, _mm512_shuffle_i32x4(even, even2, 0xdd));
        _mm512_storeu_si512(out + (12 + c) * out_step, _mm512_shuffle_i32x4(odd, odd2, 0xdd));
    }
}
#elif defined(ISA_AVX2)
INLINE void transpose(const uint32_t *in, int64_t in_step, uint32_t *out, int64_t out_step) {
    vf a[8], b[8];
#pragma GCC unroll 8
    for (int i = 0; i < 8; i++)
        a[i] = v_load((const float *)in + i * in_step);
#pragma GCC unroll 4
    for (int i = 0; i < 8; i += 2) {
        b[i] = _mm256_unpacklo_ps(a[i], a[i + 1]);
        b[i + 1] = _mm256_unpackhi_ps(a[i], a[i + 1]);
    }
#pragma GCC unroll 2
    for (int i = 0; i < 8; i += 4) {
        a[i] = _mm256_shuffle_ps(b[i], b[i + 2], 0x44);
        a[i + 1] = _mm256_shuffle_ps(b[i], b[i + 2], 0xee);
        a[i + 2] = _mm256_shuffle_ps(b[i + 1], b[i + 3], 0x44);
        a[i + 3] = _mm256_shuffle_ps(b[i + 1], b[i + 3], 0xee);
    }
#pragma GCC unroll 4
    for (int c = 0; c < 4; c++) {
        v_store((float *)out + c * out_step, _mm256_permute2f128_ps(a[c], a[4 + c], 0x20));
        v_store((float *)out + (4 + c) * out_step, _mm256_permute2f128_ps(a[c], a[4 + c], 0x31));
    }
}
#else
INLINE void transpose(const uint32_t *in, int64_t in_step, uint32_t *out, int64_t out_step) {
    for (int i = 0; i < VL; i++)
        for (int j = 0; j < VL; j++)
            out[j * out_step + i] = in[i * in_step + j];
}
#endif

/* Write VL rows, `words` words each (with room for a multiple of VL), as VL columns of a panel, from its `column`. */
INLINE void pack_columns(const uint32_t *rows, int64_t step, int64_t words, uint32_t *panel, int column) {
    for (int64_t w = 0; w < words; w += VL)
        transpose(rows + w, step, panel + w * PANEL + column, PANEL);
}

/* Write two rows of floats (one if not `bf`) as one step of consecutive panels, `panel_words` apart. */
INLINE void pack_step(const float *first, const float *second, int64_t n, uint32_t *step, int64_t panel_words, int bf) {
    for (int64_t i = 0; i < n; i += VL) {
        uint32_t *out = step + i / PANEL * panel_words + i % PANEL;
#ifdef ISA_BF16
        if (bf) {
            static const uint16_t order[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                               8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
            __m512i both = (__m512i)_mm512_cvtne2ps_pbh(v_load(second + i), v_load(first + i));
            _mm512_storeu_si512(out, _mm512_permutexvar_epi16(_mm512_loadu_si512(order), both));
            continue;
        }
#endif
        (void)second, (void)bf;
        v_store((float *)out, v_load(first + i));
    }
}
