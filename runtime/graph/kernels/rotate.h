/* Cached keys rotated in place, for one instruction set: a row of the cache is one cell's heads.
 *
 * Of each head as much is unpacked as its rotary values' blocks hold. Where llama.cpp has put a Hadamard transform behind
 * the rotation, that is undone and done again: the transform is its own inverse.
 */
#pragma once

#include "blocks.h"
#include "kernels.h"

/* One step of the transform: each value and the one 2^k lanes away become their sum and difference. */
#define STEP(x, k) v_fma(x, v_load(signs[k]), v_flip(x, k))

/* Transform each `size` of `n` values, as multiplication by the orthonormal Walsh-Hadamard matrix in natural order. */
static void transform(float *x, int64_t n, int64_t size) {
    static const float signs[4][16] = {
        {1, -1, 1, -1, 1, -1, 1, -1, 1, -1, 1, -1, 1, -1, 1, -1},
        {1, 1, -1, -1, 1, 1, -1, -1, 1, 1, -1, -1, 1, 1, -1, -1},
        {1, 1, 1, 1, -1, -1, -1, -1, 1, 1, 1, 1, -1, -1, -1, -1},
        {1, 1, 1, 1, 1, 1, 1, 1, -1, -1, -1, -1, -1, -1, -1, -1},
    };
    const vf scale = v_set(1.0f / sqrtf((float)size));
    for (int64_t i = 0; i < n; i += VL) {
        vf v = v_mul(v_load(x + i), scale);
        v = STEP(v, 0);
        v = STEP(v, 1);
        if (VL > 4)
            v = STEP(v, 2);
        if (VL > 8)
            v = STEP(v, 3);
        v_store(x + i, v);
    }
    for (int64_t step = VL; step < size; step *= 2)
        for (int64_t i = 0; i < n; i += 2 * step)
            for (int64_t j = i; j < i + step; j += VL) {
                vf a = v_load(x + j), b = v_load(x + j + step);
                v_store(x + j, v_add(a, b));
                v_store(x + j + step, v_sub(a, b));
            }
}

/* Turn `n` values by a table of n / 2 turns; see turns.h. */
INLINE void turn(float *x, const float *turns, int64_t n, bool halves) {
    int64_t half = n / 2, i = 0;
    if (halves) {
        for (; i + VL <= half; i += VL) {
            vf a = v_load(x + i), b = v_load(x + half + i), c = v_load(turns + i), s = v_load(turns + half + i);
            v_store(x + i, v_sub(v_mul(a, c), v_mul(b, s)));
            v_store(x + half + i, v_fma(b, c, v_mul(a, s)));
        }
        for (; i < half; i++) {
            float a = x[i], b = x[half + i];
            x[i] = a * turns[i] - b * turns[half + i];
            x[half + i] = b * turns[i] + a * turns[half + i];
        }
        return;
    }
    static const float signs[16] = {-1, 1, -1, 1, -1, 1, -1, 1, -1, 1, -1, 1, -1, 1, -1, 1};
    for (; i + VL <= n; i += VL) {
        vf v = v_load(x + i), t = v_load(turns + i);
        v_store(x + i, v_fma(v, v_even(t), v_mul(v_mul(v_flip(v, 0), v_odd(t)), v_load(signs))));
    }
    for (; i < n; i += 2) {
        float a = x[i], b = x[i + 1];
        x[i] = a * turns[i] - b * turns[i + 1];
        x[i + 1] = b * turns[i] + a * turns[i + 1];
    }
}

#if defined(ISA_AVX512) || defined(ISA_AVX2)
INLINE void pack_halves(const float *x, char *out, int64_t n) {
    uint16_t *values = (uint16_t *)out;
    int64_t i = 0;
    for (; i + VL <= n; i += VL)
        v_store_halves(values + i, v_load(x + i));
    for (; i < n; i++)
        values[i] = _cvtss_sh(x[i], _MM_FROUND_TO_NEAREST_INT);
}

/* Write a half-precision scale; returns the place behind it. */
INLINE char *put_half(char *out, float x) {
    uint16_t bits = _cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT);
    memcpy(out, &bits, 2);
    return out + 2;
}

/* As ggml does: the greatest of a block's magnitudes is 127. */
INLINE void pack_q8_0(const float *x, char *out, int64_t n) {
    for (int64_t i = 0; i < n; i += 32, out += 34) {
        vf most = v_set(0.0f);
        for (int j = 0; j < 32; j += VL)
            most = v_max(most, v_abs(v_load(x + i + j)));
        float d = v_max_lane(most) / 127.0f, inverse = d != 0.0f ? 1.0f / d : 0.0f;
        put_half(out, d);
        for (int j = 0; j < 32; j += VL)
            v_store_bytes((int8_t *)out + 2 + j, v_round(v_mul(v_load(x + i + j), v_set(inverse))));
    }
}

/* The one of 32 values, of which `low` is the least and `high` the greatest, that is farthest from 0; the first of two. */
INLINE float farthest(const float *x, float low, float high) {
    if (high != -low)
        return high > -low ? high : low;
    while (*x != low && *x != high && high == high)
        x++;
    return *x;
}

/* As ggml does: whole numbers from 0 to `top`, over the range of a block's values if the type has a minimum, otherwise so
 * that the value farthest from 0 is the least of them. The low four bits of all 32 come last, the fifth before them. */
INLINE void pack_nibbles(int type, const float *x, char *out, int64_t n) {
    const float top = type == TYPE_Q5_0 || type == TYPE_Q5_1 ? 31.0f : 15.0f, middle = (top + 1.0f) / 2.0f;
    for (int64_t i = 0; i < n; i += 32, x += 32) {
        vf low = v_load(x), high = low;
        for (int j = VL; j < 32; j += VL) {
            low = v_min(low, v_load(x + j));
            high = v_max(high, v_load(x + j));
        }
        float least = -v_max_lane(v_sub(v_set(0.0f), low)), most = v_max_lane(high), d, zero = 0.0f, half = middle + 0.5f;
        if (has_minimum(type)) {
            d = (most - least) / top;
            zero = least;
            half = 0.5f;
        } else {
            d = farthest(x, least, most) / -middle;
        }
        float inverse = d != 0.0f ? 1.0f / d : 0.0f;
        int8_t bytes[32];
        for (int j = 0; j < 32; j += VL) {
            vf scaled = v_mul(v_sub(v_load(x + j), v_set(zero)), v_set(inverse));
            v_store_bytes(bytes + j, v_min(v_floor(v_add(scaled, v_set(half))), v_set(top)));
        }
        b16 first = b_load(bytes), last = b_load(bytes + 16), low_bits = (first & 15) | (b16)(last << 4);
        out = put_half(out, d);
        if (has_minimum(type))
            out = put_half(out, zero);
        if (top == 31.0f) {
            uint32_t fifths = (uint32_t)_mm_movemask_epi8((__m128i)(first << 3)) |
                              (uint32_t)_mm_movemask_epi8((__m128i)(last << 3)) << 16;
            memcpy(out, &fifths, 4);
            out += 4;
        }
        memcpy(out, &low_bits, 16);
        out += 16;
    }
}
#endif

/* Write `n` values, a whole number of blocks, as `unpack` reads them. */
static void pack(const struct block_type *types, int type, const float *x, char *row, int64_t n) {
    switch (type) {
    case TYPE_F32: memcpy(row, x, (size_t)n * 4); break;
#if defined(ISA_AVX512) || defined(ISA_AVX2)
    case TYPE_F16: pack_halves(x, row, n); break;
    case TYPE_Q8_0: pack_q8_0(x, row, n); break;
    case TYPE_Q4_0: pack_nibbles(TYPE_Q4_0, x, row, n); break;
    case TYPE_Q4_1: pack_nibbles(TYPE_Q4_1, x, row, n); break;
    case TYPE_Q5_0: pack_nibbles(TYPE_Q5_0, x, row, n); break;
    case TYPE_Q5_1: pack_nibbles(TYPE_Q5_1, x, row, n); break;
#endif
    default: types[type].quantise(x, row, n);
    }
}

static void rotate_row(const struct block_type *types, const struct rotation *r, const struct key_cache *cache,
                       const float *turns, char *row, float *x) {
    int64_t n = rotated_values(types, r, cache), head_bytes = row_bytes(types, cache->type, cache->head_size);
    bool whole = n == cache->head_size; /* the heads are then unpacked together */
    int64_t together = whole ? cache->n_heads : 1;
    for (int64_t head = 0; head < cache->n_heads; head += together) {
        char *values = row + head * head_bytes;
        unpack(types, cache->type, values, x, n * together);
        if (cache->hadamard)
            transform(x, n * together, cache->hadamard);
        for (int64_t i = 0; i < together; i++)
            turn(x + i * n, turns, r->n_dims, r->halves);
        if (cache->hadamard)
            transform(x, n * together, cache->hadamard);
        pack(types, cache->type, x, values, n * together);
    }
}
