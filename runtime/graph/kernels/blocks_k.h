/* Weights' blocks as bytes with scales, for one instruction set: value = scale * (byte - zero) + min.
 *
 * A scale, and a min in types that have one, stand for `sub_block` values. The layouts are those of ggml-common.h.
 * Products multiply the bytes as they are, or as floats. Blocks are read 64 values at a time, a chunk, and their scales
 * for 256 values at a time, a group: one block, or eight of 32.
 */
#pragma once

#include "blocks.h"

enum { TYPE_Q2_K = 10, TYPE_Q3_K = 11, TYPE_Q4_K = 12, TYPE_Q5_K = 13, TYPE_Q6_K = 14, TYPE_IQ4_XS = 23, TYPE_MXFP4 = 39 };

/* Whether blocks of a type are bytes with scales. */
INLINE bool is_bytes(int type) {
    return has_integers(type) || type == TYPE_Q4_1 || type == TYPE_Q5_1 || (type >= TYPE_Q2_K && type <= TYPE_Q6_K) ||
           type == TYPE_IQ4_XS || type == TYPE_MXFP4;
}

INLINE bool has_mins(int type) {
    return type == TYPE_Q4_1 || type == TYPE_Q5_1 || type == TYPE_Q2_K || type == TYPE_Q4_K || type == TYPE_Q5_K;
}

INLINE int sub_block(int type) { return type == TYPE_Q2_K || type == TYPE_Q3_K || type == TYPE_Q6_K ? 16 : 32; }

/* The byte that stands for 0 in a type without mins. */
INLINE int zero_byte(int type) {
    switch (type) {
    case TYPE_Q4_0: return 8;
    case TYPE_Q5_0: return 16;
    case TYPE_Q3_K: return 4;
    case TYPE_Q6_K: return 32;
    case TYPE_MXFP4: return 12;
    case TYPE_Q8_0: case TYPE_IQ4_NL: case TYPE_IQ4_XS: return 128;
    default: return 0;
    }
}

/* Values and bytes of a block. */
INLINE int block_values(int type) { return (type >= TYPE_Q2_K && type <= TYPE_Q6_K) || type == TYPE_IQ4_XS ? 256 : 32; }

INLINE int block_size(int type) {
    switch (type) {
    case TYPE_Q4_0: case TYPE_IQ4_NL: return 18;
    case TYPE_Q4_1: return 20;
    case TYPE_Q5_0: return 22;
    case TYPE_Q5_1: return 24;
    case TYPE_Q8_0: return 34;
    case TYPE_Q2_K: return 84;
    case TYPE_Q3_K: return 110;
    case TYPE_Q4_K: return 144;
    case TYPE_Q5_K: return 176;
    case TYPE_Q6_K: return 210;
    case TYPE_IQ4_XS: return 136;
    default: return 17; /* TYPE_MXFP4 */
    }
}

/* Call `what(TYPE)` for a type of bytes, so that each becomes code of its own. */
#define FOR_BYTES(type, what) \
    switch (type) { \
    case TYPE_Q4_0: what(TYPE_Q4_0); break; \
    case TYPE_Q4_1: what(TYPE_Q4_1); break; \
    case TYPE_Q5_0: what(TYPE_Q5_0); break; \
    case TYPE_Q5_1: what(TYPE_Q5_1); break; \
    case TYPE_Q8_0: what(TYPE_Q8_0); break; \
    case TYPE_Q2_K: what(TYPE_Q2_K); break; \
    case TYPE_Q3_K: what(TYPE_Q3_K); break; \
    case TYPE_Q4_K: what(TYPE_Q4_K); break; \
    case TYPE_Q5_K: what(TYPE_Q5_K); break; \
    case TYPE_Q6_K: what(TYPE_Q6_K); break; \
    case TYPE_IQ4_NL: what(TYPE_IQ4_NL); break; \
    case TYPE_IQ4_XS: what(TYPE_IQ4_XS); break; \
    default: what(TYPE_MXFP4); \
    }

typedef uint8_t b64 __attribute__((vector_size(64)));  /* passed by address, as not every processor has them */
typedef uint64_t q64 __attribute__((vector_size(64)));

/* 32 bytes of each place. */
INLINE void join32(const uint8_t *first, const uint8_t *last, b64 *out) {
#if defined(ISA_AVX512)
    __m512i low = _mm512_castsi256_si512(_mm256_loadu_si256((const void *)first));
    *out = (b64)_mm512_inserti64x4(low, _mm256_loadu_si256((const void *)last), 1);
#else
    memcpy(out, first, 32);
    memcpy((char *)out + 32, last, 32);
#endif
}

/* 16 bytes of a place twice, and 16 of another twice. */
INLINE void twice16(const uint8_t *first, const uint8_t *last, b64 *out) {
#if defined(ISA_AVX512)
    __m512i low = _mm512_broadcast_i32x4(_mm_loadu_si128((const void *)first));
    *out = (b64)_mm512_mask_broadcast_i32x4(low, 0xff00, _mm_loadu_si128((const void *)last));
#else
    for (int i = 0; i < 4; i++)
        memcpy((char *)out + 16 * i, i < 2 ? first : last, 16);
#endif
}

/* Bits of the first 32 bytes moved up `a` places, of the last `b`: both up, or both down by negative numbers. What comes
 * from a neighbouring byte is to be masked. */
INLINE void move_bits(b64 *bytes, int a, int b) {
    uint64_t up = (uint64_t)(a > 0 ? a : -a), then = (uint64_t)(b > 0 ? b : -b);
    const q64 places = {up, up, up, up, then, then, then, then};
    *bytes = (b64)(a > 0 || b > 0 ? (q64)*bytes << places : (q64)*bytes >> places);
}

/* The nibbles of 32 bytes: the low ones are the first 32 values, the high ones the last. */
INLINE void nibbles64(const uint8_t *bytes, b64 *out) {
    join32(bytes, bytes, out);
    move_bits(out, 0, -4);
    *out &= 15;
}

/* The nibbles of two times 16 bytes. */
INLINE void two_nibbles(const uint8_t *first, const uint8_t *last, b64 *out) {
    const q64 places = {0, 0, 4, 4, 0, 0, 4, 4};
    twice16(first, last, out);
    *out = (b64)((q64)*out >> places) & 15;
}

/* The fifth bits of two times 32 values. */
INLINE void two_fifths(const uint8_t *first, const uint8_t *last, b64 *out) {
    uint32_t bits[2];
    memcpy(bits, first, 4);
    memcpy(bits + 1, last, 4);
#if defined(ISA_AVX512)
    *out = (b64)_mm512_maskz_set1_epi8((__mmask64)bits[1] << 32 | bits[0], 16);
#else
    for (int i = 0; i < 4; i++) {
        b16 some = fifth_bits(bits[i / 2] >> i % 2 * 16);
        memcpy((char *)out + 16 * i, &some, 16);
    }
#endif
}

/* What each nibble stands for in a table. */
INLINE void look_up(const uint8_t *table, b64 *nibbles) {
#if defined(ISA_AVX512)
    __m512i four = _mm512_broadcast_i32x4(_mm_loadu_si128((const void *)table));
    *nibbles = (b64)_mm512_shuffle_epi8(four, (__m512i)*nibbles);
#else
    for (int i = 0; i < 4; i++) {
        b16 some = b_load((const char *)nibbles + 16 * i);
#if defined(ISA_AVX2)
        some = (b16)_mm_shuffle_epi8((__m128i)b_load(table), (__m128i)some);
#else
        for (int j = 0; j < 16; j++)
            some[j] = table[some[j]];
#endif
        memcpy((char *)nibbles + 16 * i, &some, 16);
    }
#endif
}

/* IQ4_NL's and IQ4_XS's values, 128 added; MXFP4's (E2M1, OCP Microscaling Formats 1.0), doubled, 12 added. */
static const uint8_t iq4_table[16] = {1, 24, 45, 63, 79, 93, 106, 118, 129, 141, 153, 166, 181, 197, 217, 241};
static const uint8_t mxfp4_table[16] = {12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0};

/* Chunk `i` of a group of blocks of 32, of which it is blocks 2i and 2i + 1; the last of a row may lack the second. */
INLINE void chunk_of_32(int type, const uint8_t *group, int i, bool both, b64 *out) {
    const uint8_t *first = group + 2 * i * block_size(type), *last = both ? first + block_size(type) : first;
    b64 fifths;
    switch (type) {
    case TYPE_Q4_1: two_nibbles(first + 4, last + 4, out); break;
    case TYPE_Q5_0: case TYPE_Q5_1: {
        int at = type == TYPE_Q5_0 ? 2 : 4;
        two_nibbles(first + at + 4, last + at + 4, out);
        two_fifths(first + at, last + at, &fifths);
        *out |= fifths;
        break;
    }
    case TYPE_Q8_0:
        join32(first + 2, last + 2, out);
        *out ^= 128;
        break;
    case TYPE_MXFP4:
        two_nibbles(first + 1, last + 1, out);
        look_up(mxfp4_table, out);
        break;
    default: /* Q4_0, IQ4_NL */
        two_nibbles(first + 2, last + 2, out);
        if (type == TYPE_IQ4_NL)
            look_up(iq4_table, out);
    }
}

/* Chunk `i` of a group; `i` and `type` are constants. */
INLINE void chunk_of(int type, const uint8_t *group, int i, bool both, b64 *out) {
    b64 high;
    int half = i / 2, odd = i % 2; /* in Q2_K, Q3_K and Q6_K, of 128 values */
    switch (type) {
    case TYPE_Q4_K: nibbles64(group + 16 + 32 * i, out); break;
    case TYPE_Q5_K:
        nibbles64(group + 48 + 32 * i, out);
        join32(group + 16, group + 16, &high);
        move_bits(&high, 4 - 2 * i, 3 - 2 * i);
        *out |= high & 16;
        break;
    case TYPE_Q6_K:
        join32(group + 64 * half, group + 64 * half + 32, out);
        join32(group + 128 + 32 * half, group + 128 + 32 * half, &high);
        move_bits(out, -4 * odd, -4 * odd);
        move_bits(&high, 4 - 4 * odd, 2 - 4 * odd);
        *out = (*out & 15) | (high & 48);
        break;
    case TYPE_Q3_K:
        join32(group + 32 + 32 * half, group + 32 + 32 * half, out);
        join32(group, group, &high);
        move_bits(out, -4 * odd, -2 - 4 * odd);
        move_bits(&high, 2 - 2 * i, 1 - 2 * i);
        *out = (*out & 3) | (high & 4);
        break;
    case TYPE_Q2_K:
        join32(group + 16 + 32 * half, group + 16 + 32 * half, out);
        move_bits(out, -4 * odd, -2 - 4 * odd);
        *out &= 3;
        break;
    case TYPE_IQ4_XS:
        two_nibbles(group + 8 + 32 * i, group + 24 + 32 * i, out);
        look_up(iq4_table, out);
        break;
    default: chunk_of_32(type, group, i, both, out);
    }
}

/* A group's scales and mins, 16 of each; in types with sub-blocks of 32 half of them mean nothing. */
struct scales {
    vf scale[16 / VL], min[16 / VL];
};

/* d times whole numbers. */
INLINE void times(uint64_t low, uint64_t high, float d, vf *out) {
    typedef uint64_t q16 __attribute__((vector_size(16)));
    b16 bytes = (b16)(q16){low, high};
    for (int i = 0; i < 16; i += VL)
        out[i / VL] = v_mul(v_set(d), v_lanes(bytes, i & 15));
}

INLINE uint64_t word64(const uint8_t *p) {
    uint64_t word;
    memcpy(&word, p, 8);
    return word;
}

INLINE uint32_t word32(const uint8_t *p) {
    uint32_t word;
    memcpy(&word, p, 4);
    return word;
}

#define EACH(byte) (0x0101010101010101u * (byte)) /* a word of eight such bytes */

/* Eight scales and eight mins of 6 bits in 12 bytes, as Q4_K and Q5_K have them: the first four of each, and then the
 * last four's low bits, whose high ones are beside the first four. */
INLINE void scales_q4_k(const uint8_t *packed, float d, float dmin, struct scales *out) {
    uint64_t a = word32(packed), b = word32(packed + 4), c = word32(packed + 8);
    uint64_t scale = (a & 0x3f3f3f3f) | ((c & 0x0f0f0f0f) | (a >> 2 & 0x30303030)) << 32;
    uint64_t min = (b & 0x3f3f3f3f) | ((c >> 4 & 0x0f0f0f0f) | (b >> 2 & 0x30303030)) << 32;
    times(scale, 0, d, out->scale);
    times(min, 0, -dmin, out->min);
}

/* 16 scales of 6 bits: nibbles, and two bits of each in the last four bytes. */
INLINE void scales_q3_k(const uint8_t *packed, float d, struct scales *out) {
    uint64_t low = word64(packed), high = word32(packed + 8);
    uint64_t first = (low & EACH(15)) | ((high | high << 30) & EACH(3)) << 4;
    uint64_t last = (low >> 4 & EACH(15)) | ((high >> 4 | high >> 6 << 32) & EACH(3)) << 4;
    /* Bytes from 0 to 63, of which 32 is taken without carrying: the top bit is set on the way. */
    times(((first | EACH(128)) - EACH(32)) ^ EACH(128), ((last | EACH(128)) - EACH(32)) ^ EACH(128), d, out->scale);
}

/* Eight scales of 6 bits: nibbles one after the other, and two bits of each in a word of their own. */
INLINE void scales_iq4_xs(const uint8_t *block, float d, struct scales *out) {
    uint64_t low = word32(block + 4), high = word32(block) >> 16;
    low = (low | low << 16) & 0x0000ffff0000ffffu;
    low = (low | low << 8) & 0x00ff00ff00ff00ffu;
    low = (low | low << 4) & EACH(15);
    high = (high | high << 24) & 0x000000ff000000ffu;
    high = (high | high << 12) & 0x000f000f000f000fu;
    high = (high | high << 6) & EACH(3);
    times((((low | high << 4) | EACH(128)) - EACH(32)) ^ EACH(128), 0, d, out->scale);
}

/* Half-precision numbers of up to eight blocks, `step` bytes apart, and zeros. */
INLINE void halves_of(const uint8_t *p, int step, int n, vf *out) {
#if defined(ISA_AVX512)
    if (n == 8) {
#define AT(i) (short)(p[i * step] | p[i * step + 1] << 8)
        __m128i all = _mm_set_epi16(AT(7), AT(6), AT(5), AT(4), AT(3), AT(2), AT(1), AT(0));
#undef AT
        out[0] = _mm512_cvtph_ps(_mm256_zextsi128_si256(all));
        return;
    }
#endif
    uint16_t halves[16] = {0};
    for (int i = 0; i < n; i++)
        memcpy(halves + i, p + i * step, 2);
    for (int i = 0; i < 16; i += VL)
        out[i / VL] = v_halves(halves + i);
}

/* Likewise pairs of a scale and a min. */
INLINE void pairs_of_halves(const uint8_t *p, int step, int n, struct scales *out) {
#if defined(ISA_AVX512)
    if (n == 8) {
#define AT(i) (int)word32(p + i * step)
        __m256i both = _mm256_set_epi32(AT(7), AT(6), AT(5), AT(4), AT(3), AT(2), AT(1), AT(0));
#undef AT
        out->scale[0] = _mm512_cvtph_ps(_mm256_zextsi128_si256(_mm256_cvtepi32_epi16(both)));
        out->min[0] = _mm512_cvtph_ps(_mm256_zextsi128_si256(_mm256_cvtepi32_epi16(_mm256_srli_epi32(both, 16))));
        return;
    }
#endif
    halves_of(p, step, n, out->scale);
    halves_of(p + 2, step, n, out->min);
}

/* Halves of E8M0 scales, as MXFP4's table is doubled, of up to eight blocks, and zeros. */
INLINE void exponents_of(const uint8_t *p, int step, int n, vf *out) {
#if defined(ISA_AVX512)
    if (n == 8) {
#define AT(i) p[i * step]
        __m512i exponents = _mm512_zextsi256_si512(_mm256_set_epi32(AT(7), AT(6), AT(5), AT(4), AT(3), AT(2), AT(1), AT(0)));
#undef AT
        __m512i normal = _mm512_slli_epi32(_mm512_sub_epi32(exponents, _mm512_set1_epi32(1)), 23);
        __m512i small = _mm512_sllv_epi32(_mm512_set1_epi32(0x00200000), exponents);
        __mmask16 is_small = _mm512_cmplt_epu32_mask(exponents, _mm512_set1_epi32(2));
        out[0] = _mm512_maskz_mov_ps(0xff, _mm512_castsi512_ps(_mm512_mask_mov_epi32(normal, is_small, small)));
        return;
    }
#endif
    float scales[16] = {0};
    for (int i = 0; i < n; i++) {
        uint32_t exponent = p[i * step];
        scales[i] = bits_float(exponent < 2 ? 0x00200000u << exponent : (exponent - 1) << 23);
    }
    for (int i = 0; i < 16; i += VL)
        out[i / VL] = v_load(scales + i);
}

/* The scales of a group, of which `n` blocks of 32 are there. */
INLINE void scales_of(int type, const uint8_t *group, int n, struct scales *out) {
    switch (type) {
    case TYPE_Q4_K: case TYPE_Q5_K: scales_q4_k(group + 4, half(group), half(group + 2), out); break;
    case TYPE_Q6_K: times(word64(group + 192), word64(group + 200), half(group + 208), out->scale); break;
    case TYPE_Q3_K: scales_q3_k(group + 96, half(group + 108), out); break;
    case TYPE_Q2_K: {
        uint64_t first = word64(group), last = word64(group + 8);
        times(first & EACH(15), last & EACH(15), half(group + 80), out->scale);
        times(first >> 4 & EACH(15), last >> 4 & EACH(15), -half(group + 82), out->min);
        break;
    }
    case TYPE_IQ4_XS: scales_iq4_xs(group, half(group), out); break;
    case TYPE_MXFP4: exponents_of(group, block_size(type), n, out->scale); break;
    case TYPE_Q4_1: case TYPE_Q5_1: pairs_of_halves(group, block_size(type), n, out); break;
    default: halves_of(group, block_size(type), n, out->scale);
    }
}

/* Bytes of a group. */
INLINE int group_size(int type) { return 256 / block_values(type) * block_size(type); }

/* Read `n` values of a group, a multiple of 32: chunks, and 16 scales and mins. */
INLINE void read_group(int type, const uint8_t *group, int64_t n, uint8_t *bytes, float *scale, float *min) {
    struct scales scales;
    scales_of(type, group, (int)n / 32, &scales);
    for (int i = 0; i < 16; i += VL) {
        v_store(scale + i, scales.scale[i / VL]);
        if (has_mins(type))
            v_store(min + i, scales.min[i / VL]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        b64 chunk;
        if (64 * i >= n)
            return;
        chunk_of(type, group, i, 64 * i + 32 < n, &chunk);
        memcpy(bytes + 64 * i, &chunk, 64);
    }
}

INLINE void unpack_bytes(int type, const char *row, float *out, int64_t n) {
    uint8_t bytes[256], zero = (uint8_t)zero_byte(type);
    float scales[16], mins[16];
    for (int64_t at = 0; at < n; at += 256, row += group_size(type)) {
        int64_t some = n - at < 256 ? n - at : 256;
        read_group(type, (const uint8_t *)row, some, bytes, scales, mins);
        for (int i = 0; i < some; i += 16) {
            vf d = v_set(scales[i / sub_block(type)]), m = v_set(has_mins(type) ? mins[i / sub_block(type)] : 0.0f);
            for (int j = 0; j < 16; j += VL)
                v_store(out + at + i + j, v_fma(v_lanes(b_load(bytes + i) - zero, j), d, m));
        }
    }
}

/* Write `n` values of a weight's row, a whole number of blocks, as floats. */
static void unpack_weights(const struct block_type *types, int type, const char *row, float *out, int64_t n) {
    switch (type) {
#define CASE(type) case type: unpack_bytes(type, row, out, n); break
    CASE(TYPE_Q2_K); CASE(TYPE_Q3_K); CASE(TYPE_Q4_K); CASE(TYPE_Q5_K); CASE(TYPE_Q6_K); CASE(TYPE_IQ4_XS);
    CASE(TYPE_MXFP4);
#undef CASE
    default: unpack(types, type, row, out, n);
    }
}
