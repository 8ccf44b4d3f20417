/* Values of every type that ggml stores, as floats: `unpack` reads a row, with vectors where the type is a common one.
 *
 * The layouts are those of ggml-common.h; the others are left to ggml's own functions.
 */
#pragma once

#include <stdbool.h>

#include "ggml_tensor.h"
#include "vectors.h"

enum { TYPE_Q4_0 = 2, TYPE_Q4_1 = 3, TYPE_Q5_0 = 6, TYPE_Q5_1 = 7, TYPE_Q8_0 = 8, TYPE_IQ4_NL = 20 };

#if defined(ISA_AVX512) || defined(ISA_AVX2)
INLINE float half(const void *p) {
    uint16_t h;
    memcpy(&h, p, 2);
    return _cvtsh_ss(h);
}
#else
INLINE float half(const void *p) {
    uint16_t h;
    memcpy(&h, p, 2);
    return half_to_float(h);
}
#endif

/* 32 values of a block: the first 16 and the last. */
struct values32 {
    b16 first, last;
};

/* The 32 nibbles of 16 bytes: the low ones are the first 16 values, the high ones the last. */
INLINE struct values32 nibbles(const uint8_t *bytes) {
    b16 both = b_load(bytes);
    return (struct values32){both & 15, both >> 4};
}

/* 16 where a bit of `bits` is set, otherwise 0. */
INLINE b16 fifth_bits(uint32_t bits) {
    const b16 which = {1, 2, 4, 8, 16, 32, 64, 128, 1, 2, 4, 8, 16, 32, 64, 128};
#if defined(ISA_AVX512) || defined(ISA_AVX2)
    const __m128i byte = _mm_set_epi64x(0x0101010101010101, 0);
    b16 spread = (b16)_mm_shuffle_epi8(_mm_cvtsi32_si128((int)bits), byte);
#else
    uint64_t halves[2] = {(bits & 255) * 0x0101010101010101u, (bits >> 8 & 255) * 0x0101010101010101u};
    b16 spread = b_load(halves);
#endif
    return (b16)((spread & which) == which) & 16;
}

/* 32 values of 5 bits: nibbles, and their fifth bits in one word. */
INLINE struct values32 fives(const uint8_t *bytes, const uint8_t *high) {
    struct values32 values = nibbles(bytes);
    uint32_t bits;
    memcpy(&bits, high, 4);
    values.first |= fifth_bits(bits);
    values.last |= fifth_bits(bits >> 16);
    return values;
}

/* What IQ4_NL's nibbles stand for. */
INLINE b16 iq4_nl(b16 nibble) {
    const int8_t table[16] = {-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113};
#if defined(ISA_AVX512) || defined(ISA_AVX2)
    return (b16)_mm_shuffle_epi8((__m128i)b_load(table), (__m128i)nibble);
#else
    for (int i = 0; i < 16; i++)
        nibble[i] = (uint8_t)table[nibble[i]];
    return nibble;
#endif
}

/* out = d * values + m. */
INLINE void scaled(struct values32 values, float d, float m, float *out) {
    for (int i = 0; i < 16; i += VL) {
        v_store(out + i, v_fma(v_lanes(values.first, i), v_set(d), v_set(m)));
        v_store(out + 16 + i, v_fma(v_lanes(values.last, i), v_set(d), v_set(m)));
    }
}

/* The whole numbers of a block of 32, which follow its scale (two bytes) and, of some types, its minimum (two more). */
INLINE struct values32 integers(int type, const uint8_t *block) {
    struct values32 values;
    switch (type) {
    case TYPE_Q4_0:
        values = nibbles(block + 2);
        return (struct values32){values.first - 8, values.last - 8};
    case TYPE_Q4_1:
        return nibbles(block + 4);
    case TYPE_Q5_0:
        values = fives(block + 6, block + 2);
        return (struct values32){values.first - 16, values.last - 16};
    case TYPE_Q5_1:
        return fives(block + 8, block + 4);
    case TYPE_IQ4_NL:
        values = nibbles(block + 2);
        return (struct values32){iq4_nl(values.first), iq4_nl(values.last)};
    default: /* TYPE_Q8_0 */
        return (struct values32){b_load(block + 2), b_load(block + 18)};
    }
}

/* Whether a value is a whole number times its block's scale, and whether the block's minimum is added to that. */
INLINE bool has_minimum(int type) { return type == TYPE_Q4_1 || type == TYPE_Q5_1; }
INLINE bool has_integers(int type) {
    return type == TYPE_Q8_0 || type == TYPE_Q4_0 || type == TYPE_Q5_0 || type == TYPE_IQ4_NL;
}

/* Bytes of a block of a type that `integers` reads. */
INLINE int64_t block_bytes32(int type) {
    switch (type) {
    case TYPE_Q8_0: return 34;
    case TYPE_Q4_1: return 20;
    case TYPE_Q5_0: return 22;
    case TYPE_Q5_1: return 24;
    default: return 18; /* TYPE_Q4_0, TYPE_IQ4_NL */
    }
}

INLINE void unpack_block32(int type, const uint8_t *block, float *out) {
    scaled(integers(type, block), half(block), has_minimum(type) ? half(block + 2) : 0.0f, out);
}

INLINE void unpack_blocks32(int type, const char *row, float *out, int64_t n) {
    const uint8_t *block = (const uint8_t *)row;
    for (int64_t i = 0; i < n; i += 32, block += block_bytes32(type))
        unpack_block32(type, block, out + i);
}

INLINE void unpack_plain(int type, const char *row, float *out, int64_t n) {
    int64_t i = 0;
    if (type == TYPE_F32) {
        memcpy(out, row, (size_t)n * 4);
        return;
    }
    const uint16_t *values = (const uint16_t *)row;
    for (; i + VL <= n; i += VL)
        v_store(out + i, type == TYPE_F16 ? v_halves(values + i) : v_bfloats(values + i));
    for (; i < n; i++)
        out[i] = type == TYPE_F16 ? half_to_float(values[i]) : bfloat_to_float(values[i]);
}

/* Bytes of `n` values, a whole number of blocks. */
INLINE int64_t row_bytes(const struct block_type *types, int type, int64_t n) {
    if (type == TYPE_F32)
        return n * 4;
    if (type == TYPE_F16 || type == TYPE_BF16)
        return n * 2;
    return n / types[type].block * types[type].block_bytes;
}

/* Write the first `n` values of a row as floats; `n` is a whole number of blocks. */
static void unpack(const struct block_type *types, int type, const char *row, float *out, int64_t n) {
    switch (type) { /* one call for each, so that each becomes a loop of its own */
    case TYPE_F32: unpack_plain(TYPE_F32, row, out, n); break;
    case TYPE_F16: unpack_plain(TYPE_F16, row, out, n); break;
    case TYPE_BF16: unpack_plain(TYPE_BF16, row, out, n); break;
    case TYPE_Q8_0: unpack_blocks32(TYPE_Q8_0, row, out, n); break;
    case TYPE_Q4_0: unpack_blocks32(TYPE_Q4_0, row, out, n); break;
    case TYPE_Q4_1: unpack_blocks32(TYPE_Q4_1, row, out, n); break;
    case TYPE_Q5_0: unpack_blocks32(TYPE_Q5_0, row, out, n); break;
    case TYPE_Q5_1: unpack_blocks32(TYPE_Q5_1, row, out, n); break;
    case TYPE_IQ4_NL: unpack_blocks32(TYPE_IQ4_NL, row, out, n); break;
    default: types[type].dequantise(row, out, n);
    }
}
