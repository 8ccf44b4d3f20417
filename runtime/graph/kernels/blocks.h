/* Values of every type that ggml stores, as floats: `unpack` reads a row, with vectors where the type is a common one.
 *
 * The layouts are those of ggml-common.h; the others are left to ggml's own functions.
 */
#pragma once

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

/* The 32 nibbles of 16 bytes: the low ones are the first 16 values, the high ones the last. */
INLINE void nibbles(const uint8_t *bytes, int8_t *values) {
    for (int i = 0; i < 16; i++) {
        values[i] = bytes[i] & 15;
        values[i + 16] = bytes[i] >> 4;
    }
}

/* 32 values of 5 bits: nibbles, and their fifth bits in one word. */
INLINE void fives(const uint8_t *bytes, const uint8_t *high, int8_t *values) {
    uint32_t bits;
    memcpy(&bits, high, 4);
    nibbles(bytes, values);
    for (int i = 0; i < 32; i++)
        values[i] |= (int8_t)((bits >> i & 1) << 4);
}

/* out = d * values + m, for 32 values. */
INLINE void scaled(const int8_t *values, float d, float m, float *out) {
    for (int i = 0; i < 32; i += VL)
        v_store(out + i, v_fma(v_bytes(values + i), v_set(d), v_set(m)));
}

static const int8_t iq4_nl_values[16] = {-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113};

INLINE int64_t unpack_block32(int type, const uint8_t *block, float *out) {
    int8_t values[32];
    float d = half(block);
    switch (type) {
    case TYPE_Q8_0:
        for (int i = 0; i < 32; i += VL)
            v_store(out + i, v_mul(v_bytes((const int8_t *)block + 2 + i), v_set(d)));
        return 34;
    case TYPE_Q4_0:
        nibbles(block + 2, values);
        scaled(values, d, -8.0f * d, out);
        return 18;
    case TYPE_Q4_1:
        nibbles(block + 4, values);
        scaled(values, d, half(block + 2), out);
        return 20;
    case TYPE_Q5_0:
        fives(block + 6, block + 2, values);
        scaled(values, d, -16.0f * d, out);
        return 22;
    case TYPE_Q5_1:
        fives(block + 8, block + 4, values);
        scaled(values, d, half(block + 2), out);
        return 24;
    default: /* TYPE_IQ4_NL */
        nibbles(block + 2, values);
        for (int i = 0; i < 32; i++)
            values[i] = iq4_nl_values[values[i]];
        scaled(values, d, 0.0f, out);
        return 18;
    }
}

INLINE void unpack_blocks32(int type, const char *row, float *out, int64_t n) {
    const uint8_t *block = (const uint8_t *)row;
    for (int64_t i = 0; i < n; i += 32)
        block += unpack_block32(type, block, out + i);
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
