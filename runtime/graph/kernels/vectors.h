/* Vectors of floats for one instruction set: VL lanes, and no more operations than the kernels need.
 *
 * The file that includes this has chosen the instruction set with `#pragma GCC target` and one of the macros below;
 * without one, plain loops over four lanes remain, which compilers turn into NEON, SSE2 or whatever there is.
 */
#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>

#if defined(ISA_AVX512) || defined(ISA_AVX2)
#include <immintrin.h>
#endif

#define INLINE static inline __attribute__((always_inline))

INLINE uint32_t float_bits(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    return bits;
}

INLINE float bits_float(uint32_t bits) {
    float x;
    memcpy(&x, &bits, 4);
    return x;
}

/* Half precision, without any instruction for it (for scales and tails). */
INLINE float half_to_float(uint16_t h) {
    uint32_t sign = (uint32_t)(h & 0x8000) << 16, rest = h & 0x7fff;
    if (rest >= 0x7c00) /* infinities and NaN */
        return bits_float(sign | 0x7f800000 | (rest & 0x3ff) << 13);
    /* Moved to the exponent's place, a half reads 2^-112 times its value; subnormals come out right as well. */
    return bits_float(sign | float_bits(bits_float(rest << 13) * 0x1p112f));
}

INLINE float bfloat_to_float(uint16_t b) { return bits_float((uint32_t)b << 16); }

/* 16 bytes; `v_lanes` makes floats of VL of them, from the one numbered `from`, read as signed. */
typedef uint8_t b16 __attribute__((vector_size(16)));

INLINE b16 b_load(const void *p) {
    b16 b;
    memcpy(&b, p, 16);
    return b;
}

#if defined(ISA_AVX512)

enum { VL = 16 };
typedef __m512 vf;
INLINE vf v_load(const float *p) { return _mm512_loadu_ps(p); }
INLINE void v_store(float *p, vf x) { _mm512_storeu_ps(p, x); }
INLINE vf v_set(float x) { return _mm512_set1_ps(x); }
INLINE vf v_add(vf a, vf b) { return _mm512_add_ps(a, b); }
INLINE vf v_sub(vf a, vf b) { return _mm512_sub_ps(a, b); }
INLINE vf v_mul(vf a, vf b) { return _mm512_mul_ps(a, b); }
INLINE vf v_div(vf a, vf b) { return _mm512_div_ps(a, b); }
INLINE vf v_fma(vf a, vf b, vf c) { return _mm512_fmadd_ps(a, b, c); }
INLINE vf v_max(vf a, vf b) { return _mm512_max_ps(a, b); }
INLINE vf v_min(vf a, vf b) { return _mm512_min_ps(a, b); }
INLINE vf v_round(vf a) { return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
INLINE vf v_scale2(vf a, vf n) { return _mm512_scalef_ps(a, n); } /* a times 2 to the n, for whole n */
INLINE vf v_halves(const uint16_t *p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const void *)p)); }
INLINE vf v_bfloats(const uint16_t *p) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const void *)p)), 16));
}
INLINE void v_store_halves(uint16_t *p, vf x) {
    _mm256_storeu_si256((void *)p, _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
/* Whole numbers from -128 to 127. */
INLINE void v_store_bytes(int8_t *p, vf x) { _mm_storeu_si128((void *)p, _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(x))); }
INLINE vf v_abs(vf a) { return _mm512_abs_ps(a); }
INLINE vf v_floor(vf a) { return _mm512_floor_ps(a); }
/* Each lane gets that of the lane 2^k away, the two trading places. */
INLINE vf v_flip(vf a, int k) {
    return k == 0   ? _mm512_permute_ps(a, 0xb1)
           : k == 1 ? _mm512_permute_ps(a, 0x4e)
           : k == 2 ? _mm512_shuffle_f32x4(a, a, 0xb1)
                    : _mm512_shuffle_f32x4(a, a, 0x4e);
}
INLINE vf v_even(vf a) { return _mm512_moveldup_ps(a); } /* each even lane twice, */
INLINE vf v_odd(vf a) { return _mm512_movehdup_ps(a); }  /* each odd one */
INLINE vf v_lanes(b16 b, int from) { (void)from; return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32((__m128i)b)); }
INLINE float v_max_lane(vf a) { return _mm512_reduce_max_ps(a); }
INLINE float v_sum(vf a) { return _mm512_reduce_add_ps(a); }
/* The sums of 16 vectors: pairs of lanes of two vectors are added again and again. */
INLINE vf v_sums(const float *p) {
    __m512d four[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        vf a = v_load(p + i * 64), b = v_load(p + i * 64 + 16), c = v_load(p + i * 64 + 32), d = v_load(p + i * 64 + 48);
        __m512d ab = _mm512_castps_pd(v_add(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b)));
        __m512d cd = _mm512_castps_pd(v_add(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d)));
        four[i] = _mm512_castps_pd(v_add(_mm512_castpd_ps(_mm512_unpacklo_pd(ab, cd)), _mm512_castpd_ps(_mm512_unpackhi_pd(ab, cd))));
    }
    vf x[4], y[2];
    for (int i = 0; i < 4; i++)
        x[i] = _mm512_castpd_ps(four[i]);
    for (int i = 0; i < 2; i++)
        y[i] = v_add(_mm512_shuffle_f32x4(x[2 * i], x[2 * i + 1], 0x88), _mm512_shuffle_f32x4(x[2 * i], x[2 * i + 1], 0xdd));
    return v_add(_mm512_shuffle_f32x4(y[0], y[1], 0x88), _mm512_shuffle_f32x4(y[0], y[1], 0xdd));
}

#elif defined(ISA_AVX2)

enum { VL = 8 };
typedef __m256 vf;
INLINE vf v_load(const float *p) { return _mm256_loadu_ps(p); }
INLINE void v_store(float *p, vf x) { _mm256_storeu_ps(p, x); }
INLINE vf v_set(float x) { return _mm256_set1_ps(x); }
INLINE vf v_add(vf a, vf b) { return _mm256_add_ps(a, b); }
INLINE vf v_sub(vf a, vf b) { return _mm256_sub_ps(a, b); }
INLINE vf v_mul(vf a, vf b) { return _mm256_mul_ps(a, b); }
INLINE vf v_div(vf a, vf b) { return _mm256_div_ps(a, b); }
INLINE vf v_fma(vf a, vf b, vf c) { return _mm256_fmadd_ps(a, b, c); }
INLINE vf v_max(vf a, vf b) { return _mm256_max_ps(a, b); }
INLINE vf v_min(vf a, vf b) { return _mm256_min_ps(a, b); }
INLINE vf v_round(vf a) { return _mm256_round_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
INLINE vf v_scale2(vf a, vf n) {
    __m256i exponent = _mm256_cvtps_epi32(_mm256_max_ps(n, _mm256_set1_ps(-126.0f)));
    __m256 power = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(exponent, _mm256_set1_epi32(127)), 23));
    return _mm256_mul_ps(a, power);
}
INLINE vf v_halves(const uint16_t *p) { return _mm256_cvtph_ps(_mm_loadu_si128((const void *)p)); }
INLINE vf v_bfloats(const uint16_t *p) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const void *)p)), 16));
}
INLINE void v_store_halves(uint16_t *p, vf x) {
    _mm_storeu_si128((void *)p, _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
INLINE void v_store_bytes(int8_t *p, vf x) {
    __m256i wide = _mm256_cvtps_epi32(x);
    __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(wide), _mm256_extracti128_si256(wide, 1));
    _mm_storel_epi64((void *)p, _mm_packs_epi16(words, words));
}
INLINE vf v_abs(vf a) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), a); }
INLINE vf v_floor(vf a) { return _mm256_floor_ps(a); }
INLINE vf v_flip(vf a, int k) {
    return k == 0   ? _mm256_permute_ps(a, 0xb1)
           : k == 1 ? _mm256_permute_ps(a, 0x4e)
                    : _mm256_permute2f128_ps(a, a, 1);
}
INLINE vf v_even(vf a) { return _mm256_moveldup_ps(a); }
INLINE vf v_odd(vf a) { return _mm256_movehdup_ps(a); }
INLINE vf v_lanes(b16 b, int from) {
    __m128i lanes = from ? _mm_unpackhi_epi64((__m128i)b, (__m128i)b) : (__m128i)b;
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(lanes));
}
INLINE float v_max_lane(vf a) {
    __m128 x = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    x = _mm_max_ps(x, _mm_movehl_ps(x, x));
    return _mm_cvtss_f32(_mm_max_ss(x, _mm_movehdup_ps(x)));
}
INLINE float v_sum(vf a) {
    __m128 x = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    x = _mm_add_ps(x, _mm_movehl_ps(x, x));
    return _mm_cvtss_f32(_mm_add_ss(x, _mm_movehdup_ps(x)));
}
/* The sums of 8 vectors. */
INLINE vf v_sums(const float *p) {
    vf x[2];
    for (int i = 0; i < 2; i++)
        x[i] = _mm256_hadd_ps(_mm256_hadd_ps(v_load(p + i * 32), v_load(p + i * 32 + 8)),
                              _mm256_hadd_ps(v_load(p + i * 32 + 16), v_load(p + i * 32 + 24)));
    return v_add(_mm256_permute2f128_ps(x[0], x[1], 0x20), _mm256_permute2f128_ps(x[0], x[1], 0x31));
}

#else

enum { VL = 4 };
typedef float vf __attribute__((vector_size(16)));
#define LANES(expression) \
    vf r = {0}; \
    for (int i = 0; i < VL; i++) \
        r[i] = (expression); \
    return r
INLINE vf v_load(const float *p) {
    vf x;
    memcpy(&x, p, sizeof x);
    return x;
}
INLINE void v_store(float *p, vf x) { memcpy(p, &x, sizeof x); }
INLINE vf v_set(float x) { return (vf){x, x, x, x}; }
INLINE vf v_add(vf a, vf b) { return a + b; }
INLINE vf v_sub(vf a, vf b) { return a - b; }
INLINE vf v_mul(vf a, vf b) { return a * b; }
INLINE vf v_div(vf a, vf b) { return a / b; }
INLINE vf v_fma(vf a, vf b, vf c) { return a * b + c; }
INLINE vf v_max(vf a, vf b) { LANES(a[i] > b[i] ? a[i] : b[i]); }
INLINE vf v_min(vf a, vf b) { LANES(a[i] < b[i] ? a[i] : b[i]); }
INLINE vf v_round(vf a) { /* adding 1.5 * 2^23 leaves no bits for a fraction; for |a| < 2^22 */
    const vf big = v_set(0x1.8p23f);
    volatile vf sum = a + big;
    return sum - big;
}
INLINE vf v_scale2(vf a, vf n) { LANES(a[i] * bits_float((uint32_t)((int32_t)(n[i] > -126.0f ? n[i] : -126.0f) + 127) << 23)); }
INLINE vf v_halves(const uint16_t *p) { LANES(half_to_float(p[i])); }
INLINE vf v_bfloats(const uint16_t *p) { LANES(bfloat_to_float(p[i])); }
INLINE vf v_flip(vf a, int k) { LANES(a[(i ^ 1 << k) % VL]); }
INLINE vf v_even(vf a) { LANES(a[i & ~1]); }
INLINE vf v_odd(vf a) { LANES(a[i | 1]); }
INLINE vf v_lanes(b16 b, int from) { LANES((float)(int8_t)b[from + i]); }
INLINE float v_max_lane(vf a) {
    float x = a[0] > a[1] ? a[0] : a[1], y = a[2] > a[3] ? a[2] : a[3];
    return x > y ? x : y;
}
INLINE float v_sum(vf a) { return (a[0] + a[2]) + (a[1] + a[3]); }
/* The sums of 4 vectors. */
INLINE vf v_sums(const float *p) { LANES(v_sum(v_load(p + i * VL))); }
#undef LANES

#endif

/* 2 to the x for x <= 0, NaN for NaN; below 2^-126 it may be anything from 0 to 2^-126. Minimax polynomials on
 * [-1/2, 1/2]: the relative error is 8e-8 with `precise`, and otherwise 8e-5, well below what rounding to bfloat16 adds. */
INLINE vf v_exp2(vf x, int precise) {
    x = v_max(v_set(-150.0f), x); /* in this order, as it returns the second where one is NaN */
    vf n = v_round(x), f = v_sub(x, n), y;
    if (precise) {
        y = v_fma(f, v_set(1.32764718e-3f), v_set(9.67554133e-3f));
        y = v_fma(f, y, v_set(5.55071327e-2f));
        y = v_fma(f, y, v_set(2.40221197e-1f));
        y = v_fma(f, y, v_set(6.93146967e-1f));
        y = v_fma(f, y, v_set(1.00000007f));
    } else {
        y = v_fma(f, v_set(5.51716672e-2f), v_set(2.42611122e-1f));
        y = v_fma(f, y, v_set(6.93260986e-1f));
        y = v_fma(f, y, v_set(9.99928074e-1f));
    }
    return v_scale2(y, n);
}
