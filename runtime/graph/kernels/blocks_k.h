/* Weights' blocks as bytes with scales, for one instruction set: value = scale * (byte - zero) + min.
 *
 * A scale, and a min in types that have one, stand for `sub_block` values. The layouts are those of ggml-common.h.
 * Products multiply the bytes as they are, or as floats.
 */
#pragma once

#include "blocks.h"

enum { TYPE_Q2_K = 10, TYPE_Q3_K = 11, TYPE_Q4_K = 12, TYPE_Q5_K = 13, TYPE_Q6_K = 14, TYPE_IQ4_XS = 23, TYPE_MXFP4 = 39 };

typedef uint8_t b32 __attribute__((vector_size(32)));

/* Macros, as functions must not pass such vectors where the processor may not have them. */
#define LOAD32(name, p) \
    b32 name; \
    memcpy(&name, p, 32)
#define STORE32(p, vector) \
    do { \
        b32 stored = vector; \
        memcpy(p, &stored, 32); \
    } while (0)

INLINE void store_values(uint8_t *p, struct values32 values) {
    memcpy(p, &values.first, 16);
    memcpy(p + 16, &values.last, 16);
}

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

/* Eight scales and eight mins of 6 bits in 12 bytes, as Q4_K and Q5_K have them. */
INLINE void six_bits(const uint8_t *packed, float d, float dmin, float *scales, float *mins) {
    uint32_t words[3], split[4];
    uint8_t bytes[16];
    memcpy(words, packed, 12);
    split[0] = words[0] & 0x3f3f3f3f;
    split[1] = (words[2] & 0x0f0f0f0f) | (words[0] >> 2 & 0x30303030);
    split[2] = words[1] & 0x3f3f3f3f;
    split[3] = (words[2] >> 4 & 0x0f0f0f0f) | (words[1] >> 2 & 0x30303030);
    memcpy(bytes, split, 16);
    for (int i = 0; i < 8; i++) {
        scales[i] = d * (float)bytes[i];
        mins[i] = -dmin * (float)bytes[i + 8];
    }
}

INLINE void bytes_q4_k(const uint8_t *block, uint8_t *values, float *scales, float *mins) {
    six_bits(block + 4, half(block), half(block + 2), scales, mins);
    for (int i = 0; i < 4; i++) {
        LOAD32(both, block + 16 + 32 * i);
        STORE32(values + 64 * i, both & 15);
        STORE32(values + 64 * i + 32, both >> 4);
    }
}

INLINE void bytes_q5_k(const uint8_t *block, uint8_t *values, float *scales, float *mins) {
    LOAD32(fifth, block + 16);
    six_bits(block + 4, half(block), half(block + 2), scales, mins);
    for (int i = 0; i < 4; i++) {
        LOAD32(both, block + 48 + 32 * i);
        STORE32(values + 64 * i, (both & 15) | (fifth << 4 & 16));
        STORE32(values + 64 * i + 32, both >> 4 | (fifth << 3 & 16));
        fifth >>= 2;
    }
}

INLINE void bytes_q6_k(const uint8_t *block, uint8_t *values, float *scales) {
    float d = half(block + 208);
    for (int i = 0; i < 16; i++)
        scales[i] = d * (float)(int8_t)block[192 + i];
    for (int i = 0; i < 2; i++) {
        LOAD32(first, block + 64 * i);
        LOAD32(second, block + 64 * i + 32);
        LOAD32(high, block + 128 + 32 * i);
        STORE32(values + 128 * i, (first & 15) | (high << 4 & 48));
        STORE32(values + 128 * i + 32, (second & 15) | (high << 2 & 48));
        STORE32(values + 128 * i + 64, first >> 4 | (high & 48));
        STORE32(values + 128 * i + 96, second >> 4 | (high >> 2 & 48));
    }
}

INLINE void bytes_q3_k(const uint8_t *block, uint8_t *values, float *scales) {
    float d = half(block + 108);
    for (int i = 0; i < 16; i++) { /* scales of 6 bits: nibbles, and two bits of each in the last four bytes */
        int low = i < 8 ? block[96 + i] & 15 : block[88 + i] >> 4;
        scales[i] = d * (float)((low | (block[104 + i % 4] >> i / 4 * 2 & 3) << 4) - 32);
    }
    LOAD32(third, block);
    for (int i = 0; i < 2; i++) {
        LOAD32(low, block + 32 + 32 * i);
        for (int j = 0; j < 4; j++) {
            STORE32(values + 128 * i + 32 * j, (low & 3) | (third << 2 & 4));
            low >>= 2;
            third >>= 1;
        }
    }
}

INLINE void bytes_q2_k(const uint8_t *block, uint8_t *values, float *scales, float *mins) {
    float d = half(block + 80), dmin = half(block + 82);
    for (int i = 0; i < 16; i++) {
        scales[i] = d * (float)(block[i] & 15);
        mins[i] = -dmin * (float)(block[i] >> 4);
    }
    for (int i = 0; i < 2; i++) {
        LOAD32(low, block + 16 + 32 * i);
        for (int j = 0; j < 4; j++) {
            STORE32(values + 128 * i + 32 * j, low & 3);
            low >>= 2;
        }
    }
}

INLINE void bytes_iq4_xs(const uint8_t *block, uint8_t *values, float *scales) {
    float d = half(block);
    uint16_t high;
    memcpy(&high, block + 2, 2);
    for (int i = 0; i < 8; i++) {
        int low = block[4 + i / 2] >> i % 2 * 4 & 15;
        scales[i] = d * (float)((low | (high >> 2 * i & 3) << 4) - 32);
        struct values32 both = nibbles(block + 8 + 16 * i);
        store_values(values + 32 * i, (struct values32){iq4_nl(both.first) ^ 128, iq4_nl(both.last) ^ 128});
    }
}

/* What MXFP4's nibbles stand for (E2M1, OCP Microscaling Formats 1.0), doubled, 12 added. */
INLINE b16 mxfp4(b16 nibble) {
    const uint8_t table[16] = {12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0};
#if defined(ISA_AVX512) || defined(ISA_AVX2)
    return (b16)_mm_shuffle_epi8((__m128i)b_load(table), (__m128i)nibble);
#else
    for (int i = 0; i < 16; i++)
        nibble[i] = table[nibble[i]];
    return nibble;
#endif
}

/* 2 to the (exponent - 128): half of an E8M0 scale, as the table is doubled. */
INLINE float mxfp4_scale(uint8_t exponent) {
    return bits_float(exponent < 2 ? 0x00200000u << exponent : (uint32_t)(exponent - 1) << 23);
}

/* Read one block of 32. */
INLINE void bytes_32(int type, const uint8_t *block, uint8_t *values, float *scale, float *min) {
    struct values32 both;
    uint8_t zero = (uint8_t)zero_byte(type);
    switch (type) {
    case TYPE_Q4_1: both = nibbles(block + 4); break;
    case TYPE_Q5_1: both = fives(block + 8, block + 4); break;
    case TYPE_MXFP4:
        both = nibbles(block + 1);
        store_values(values, (struct values32){mxfp4(both.first), mxfp4(both.last)});
        *scale = mxfp4_scale(block[0]);
        return;
    default:
        both = integers(type, block);
        both = (struct values32){both.first + zero, both.last + zero};
    }
    store_values(values, both);
    *scale = half(block);
    if (has_mins(type))
        *min = half(block + 2);
}

INLINE void bytes_of_block(int type, const uint8_t *block, uint8_t *values, float *scales, float *mins) {
    switch (type) {
    case TYPE_Q2_K: bytes_q2_k(block, values, scales, mins); break;
    case TYPE_Q3_K: bytes_q3_k(block, values, scales); break;
    case TYPE_Q4_K: bytes_q4_k(block, values, scales, mins); break;
    case TYPE_Q5_K: bytes_q5_k(block, values, scales, mins); break;
    case TYPE_Q6_K: bytes_q6_k(block, values, scales); break;
    case TYPE_IQ4_XS: bytes_iq4_xs(block, values, scales); break;
    default: bytes_32(type, block, values, scales, mins);
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

INLINE void unpack_bytes(int type, const char *row, float *out, int64_t n) {
    uint8_t values[256];
    float scales[16], mins[16];
    const uint8_t *block = (const uint8_t *)row;
    uint8_t zero = (uint8_t)zero_byte(type);
    for (int64_t at = 0; at < n; at += block_values(type), block += block_size(type)) {
        bytes_of_block(type, block, values, scales, mins);
        for (int i = 0; i < block_values(type); i += 16) {
            vf d = v_set(scales[i / sub_block(type)]), m = v_set(has_mins(type) ? mins[i / sub_block(type)] : 0.0f);
            for (int j = 0; j < 16; j += VL)
                v_store(out + at + i + j, v_fma(v_lanes(b_load(values + i) - zero, j), d, m));
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
