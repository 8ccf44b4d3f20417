/* Products of weights with many rows by dot products of bytes, for one instruction set that has them.
 *
 * The weight's bytes are multiplied as they are stored; rows are rounded to bytes, 32 values to a scale. The whole
 * numbers' sums over a sub-block are exact. They are multiplied by both scales and summed up as floats.
 */
#pragma once

#include "blocks_k.h"
#include "kernels.h"
#include "panels.h"

#if defined(ISA_AVX512) || defined(ISA_AVX2)
#define HAS_BYTES 1

#if defined(ISA_AVX512)
enum { BYTE_MR = 6 }; /* sums, and whole numbers' sums, are 24 of 32 registers */
typedef __m512i vi;
INLINE vi i_load(const void *p) { return _mm512_loadu_si512(p); }
INLINE vi i_set(int32_t x) { return _mm512_set1_epi32(x); }
INLINE vi i_add(vi a, vi b) { return _mm512_add_epi32(a, b); }
INLINE vf i_float(vi x) { return _mm512_cvtepi32_ps(x); }
INLINE vi pairs_add(vi a, vi b) { return _mm512_add_epi16(a, b); }
INLINE vi pairs_of(vi bytes, vi signed_bytes) { return _mm512_maddubs_epi16(bytes, signed_bytes); }
INLINE vi pairs_sum(vi pairs) { return _mm512_madd_epi16(pairs, _mm512_set1_epi16(1)); }
#else
enum { BYTE_MR = 3 }; /* 12 of 16 */
typedef __m256i vi;
INLINE vi i_load(const void *p) { return _mm256_loadu_si256(p); }
INLINE vi i_set(int32_t x) { return _mm256_set1_epi32(x); }
INLINE vi i_add(vi a, vi b) { return _mm256_add_epi32(a, b); }
INLINE vf i_float(vi x) { return _mm256_cvtepi32_ps(x); }
INLINE vi pairs_add(vi a, vi b) { return _mm256_add_epi16(a, b); }
INLINE vi pairs_of(vi bytes, vi signed_bytes) { return _mm256_maddubs_epi16(bytes, signed_bytes); }
INLINE vi pairs_sum(vi pairs) { return _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)); }
#endif

/* How many words' products are summed up at a time: `sum` plus those of four bytes of each. With VNNI, one instruction.
 * Otherwise products of bytes up to 127 are added in pairs to 16 bits, as many as cannot overflow; 0: not even one. */
#if defined(ISA_VNNI) || defined(ISA_AVX_VNNI)
INLINE int words_at_a_time(int type) { (void)type; return 1; }
#else
INLINE int words_at_a_time(int type) {
    switch (type) {
    case TYPE_Q8_0: case TYPE_IQ4_NL: case TYPE_IQ4_XS: return 0; /* bytes up to 255 */
    case TYPE_Q6_K: return 2;                                     /* up to 63 */
    case TYPE_Q5_0: case TYPE_Q5_1: case TYPE_Q5_K: case TYPE_MXFP4: return 4;
    default: return 8; /* up to 15 */
    }
}
#endif

INLINE vi dot(vi sum, int words, const uint32_t *panel, const uint32_t *x) {
#if defined(ISA_VNNI)
    (void)words;
    return _mm512_dpbusd_epi32(sum, i_load(panel), i_set((int32_t)*x));
#elif defined(ISA_AVX_VNNI)
    (void)words;
    return _mm256_dpbusd_avx_epi32(sum, i_load(panel), i_set((int32_t)*x));
#else
    vi pairs = pairs_of(i_load(panel), i_set((int32_t)x[0]));
#pragma GCC unroll 8
    for (int w = 1; w < words; w++)
        pairs = pairs_add(pairs, pairs_of(i_load(panel + w * PANEL), i_set((int32_t)x[w])));
    return i_add(sum, pairs_sum(pairs));
#endif
}

enum { BYTE_STRETCH = 768 }; /* of the shared dimension, at most */

/* What the multiplication must know of a weight's type. */
struct byte_kind {
    int sub, words; /* values of a sub-block; words whose products are summed up at a time */
    bool mins;
};

INLINE struct byte_kind byte_kind(int type) {
    int most = sub_block(type) / 4, words = words_at_a_time(type);
    return (struct byte_kind){sub_block(type), words < most ? words : most, has_mins(type)};
}

/* Rows of x as bytes, BYTE_MR to a strip, for each 32 values: the rows' bytes, four to a word; a scale for each; and for
 * each sub-block of the weight's type what takes back its zero byte, a whole number, or in a type with mins the sum of
 * the values. In words. */
enum { STRIP_SCALES = 8 * BYTE_MR, STRIP_SUMS = 9 * BYTE_MR };

INLINE int64_t strip_block(struct byte_kind kind) { return STRIP_SUMS + 32 / kind.sub * BYTE_MR; }

/* The greatest of 32 values' bits without their signs. */
INLINE uint32_t greatest_bits(const float *x) {
#if defined(ISA_AVX512)
    __m512i sizes = _mm512_max_epu32(_mm512_slli_epi32(i_load(x), 1), _mm512_slli_epi32(i_load(x + 16), 1));
    return _mm512_reduce_max_epu32(sizes) >> 1;
#else
    __m256i sizes = _mm256_slli_epi32(i_load(x), 1);
    for (int i = 8; i < 32; i += 8)
        sizes = _mm256_max_epu32(sizes, _mm256_slli_epi32(i_load(x + i), 1));
    __m128i four = _mm_max_epu32(_mm256_castsi256_si128(sizes), _mm256_extracti128_si256(sizes, 1));
    four = _mm_max_epu32(four, _mm_unpackhi_epi64(four, four));
    return (uint32_t)_mm_cvtsi128_si32(_mm_max_epu32(four, _mm_shuffle_epi32(four, 1))) >> 1;
#endif
}

/* 16 values times `up`, rounded. */
INLINE __m128i rounded(const float *x, float up) {
#if defined(ISA_AVX512)
    return _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(v_mul(v_load(x), v_set(up))));
#else
    __m256i low = _mm256_cvtps_epi32(v_mul(v_load(x), v_set(up))), high = _mm256_cvtps_epi32(v_mul(v_load(x + 8), v_set(up)));
    __m256i both = _mm256_permute4x64_epi64(_mm256_packs_epi32(low, high), 0xd8);
    return _mm_packs_epi16(_mm256_castsi256_si128(both), _mm256_extracti128_si256(both, 1));
#endif
}

INLINE int32_t sum16(__m128i bytes) {
    __m128i sums = _mm_sad_epu8(_mm_xor_si128(bytes, _mm_set1_epi8((char)0x80)), _mm_setzero_si128());
    return _mm_cvtsi128_si32(sums) + _mm_extract_epi16(sums, 4) - 16 * 128;
}

/* Round 32 values to bytes, and sum up the first and the last 16; return the scale, NaN if a value is not finite. */
INLINE float round_bytes(const float *x, int8_t *bytes, int32_t *sums) {
    uint32_t most = greatest_bits(x);
    bool finite = most < 0x7f800000;
    /* Below 1.5e-36, 127 / most may overflow. */
    float up = finite && most > 0x04000000 ? 127.0f / bits_float(most) : 0.0f;
    __m128i first = rounded(x, up), last = rounded(x + 16, up);
    _mm_storeu_si128((__m128i *)bytes, first);
    _mm_storeu_si128((__m128i *)(bytes + 16), last);
    sums[0] = sum16(first);
    sums[1] = sum16(last);
    return finite ? bits_float(most) / 127.0f : NAN;
}

/* Write a row into its place in a strip. */
INLINE void convert_row_bytes(struct byte_kind kind, int zero, const float *x, int64_t n_in, uint32_t *strip, int64_t row) {
    for (int64_t i = 0; i < n_in; i += 32, strip += strip_block(kind)) {
        int32_t sums[2];
        float scale = round_bytes(x + i, (int8_t *)(strip + 8 * row), sums);
        if (kind.sub == 32)
            sums[0] += sums[1];
        strip[STRIP_SCALES + row] = float_bits(scale);
        for (int s = 0; s < 32 / kind.sub; s++)
            strip[STRIP_SUMS + s * BYTE_MR + row] =
                kind.mins ? float_bits(scale * (float)sums[s]) : (uint32_t)(-zero * sums[s]);
    }
}

/* A tile of the weight's bytes: per panel its words, scales and mins; and rows on their way there. In words. */
struct byte_layout {
    int64_t stretch, scales, mins, panel, row, row_scales, row_mins, edge, total;
};

enum { BYTE_ROW = 256 + 64 }; /* bytes from one row to the next, so that they do not compete in the cache */

INLINE struct byte_layout byte_layout(const struct product *p, const struct product_piece *piece) {
    int type = p->weight->type;
    int64_t stretches = (p->n_in + BYTE_STRETCH - 1) / BYTE_STRETCH;
    struct byte_layout l = {.stretch = round_up((p->n_in + stretches - 1) / stretches, 256)};
    int64_t panels = (piece->stop_column - piece->first_column + PANEL - 1) / PANEL, subs = l.stretch / sub_block(type);
    l.scales = l.stretch / 4 * PANEL;
    l.mins = l.scales + subs * PANEL;
    l.panel = l.mins + (has_mins(type) ? subs * PANEL : 0);
    l.row = panels * l.panel;
    l.row_scales = l.row + VL * BYTE_ROW / 4;
    l.row_mins = l.row_scales + VL * 16;
    l.edge = l.row_mins + VL * 16;
    l.total = l.edge + (piece->stop_row - piece->first_row) * PANEL;
    return l;
}

/* Write rows' scales (or mins), 16 apart, as columns of a panel. */
INLINE void pack_scales(const uint32_t *rows, int64_t n, uint32_t *panel, int column) {
    for (int64_t s = 0; s < n; s += VL) {
        uint32_t turned[VL * VL];
        transpose(rows + s, 16, turned, VL);
        for (int64_t i = 0; i < VL && s + i < n; i++)
            memcpy(panel + (s + i) * PANEL + column, turned + i * VL, VL * 4);
    }
}

static void read_bytes(int type, const uint8_t *group, int64_t n, uint8_t *bytes, float *scales, float *mins) {
#define OF(type) read_group(type, group, n, bytes, scales, mins)
    FOR_BYTES(type, OF) /* so that each becomes code of its own */
#undef OF
}

/* Unpack values [first, first + n) of some of the weight's rows into panels; missing rows of the last one are 0. */
static void pack_weight_bytes(const struct product *p, const struct byte_layout *l, uint32_t *memory, int64_t from, int64_t to,
                       int64_t first, int64_t n) {
    const struct tensor *w = p->weight;
    const struct block_type *type = &p->types[w->type];
    struct byte_kind kind = byte_kind(w->type);
    int64_t group_bytes = 256 / type->block * type->block_bytes;
    uint32_t *row = memory + l->row, *scales = memory + l->row_scales, *mins = memory + l->row_mins;
    for (int64_t column = from; column < round_up(to - from, PANEL) + from; column += VL)
        for (int64_t k = first; k < first + n; k += 256) {
            int64_t values = first + n - k < 256 ? first + n - k : 256, at = k - first;
            uint32_t *panel = memory + (column - from) / PANEL * l->panel + (column - from) % PANEL;
            for (int64_t i = 0; i < VL; i++) {
                uint8_t *bytes = (uint8_t *)row + i * BYTE_ROW;
                float *scale = (float *)scales + i * 16, *min = (float *)mins + i * 16;
                if (column + i < to) {
                    const uint8_t *row_start = (const uint8_t *)w->data + (column + i) * (int64_t)w->nb[1];
                    const uint8_t *group = row_start + k / type->block * type->block_bytes;
                    for (int64_t line = 0; line < group_bytes; line += 64) /* the row's next group */
                        __builtin_prefetch(group + group_bytes + line);
                    read_bytes(w->type, group, values, bytes, scale, min);
                } else {
                    memset(bytes, 0, 256);
                    memset(scale, 0, 64);
                    memset(min, 0, 64);
                }
            }
            pack_columns(row, BYTE_ROW / 4, values / 4, panel + at / 4 * PANEL, 0);
            pack_scales(scales, values / kind.sub, panel + l->scales + at / kind.sub * PANEL, 0);
            if (kind.mins)
                pack_scales(mins, values / kind.sub, panel + l->mins + at / kind.sub * PANEL, 0);
        }
}

/* Multiply a strip by a panel; `kind` is a constant, so that the sums are registers. */
INLINE void multiply_bytes_as(struct byte_kind kind, const uint32_t *strip, const struct byte_layout *l,
                              const uint32_t *panel, int64_t n, float *out, int64_t out_step, bool carried) {
    const float *scales = (const float *)panel + l->scales, *mins = (const float *)panel + l->mins;
    vf sums[BYTE_MR][2];
#pragma GCC unroll 6
    for (int r = 0; r < BYTE_MR; r++)
        for (int c = 0; c < 2; c++)
            sums[r][c] = carried ? v_load(out + r * out_step + c * VL) : v_set(0.0f);
    for (int64_t block = 0; block < n / 32; block++, strip += strip_block(kind))
#pragma GCC unroll 2
        for (int s = 0; s < 32 / kind.sub; s++, panel += kind.sub / 4 * PANEL, scales += PANEL, mins += PANEL) {
            const uint32_t *zeros = strip + STRIP_SUMS + s * BYTE_MR;
            vi whole[BYTE_MR][2];
#pragma GCC unroll 6
            for (int r = 0; r < BYTE_MR; r++)
                whole[r][0] = whole[r][1] = i_set(kind.mins ? 0 : (int32_t)zeros[r]);
#pragma GCC unroll 8
            for (int w = 0; w < kind.sub / 4; w += kind.words)
#pragma GCC unroll 6
                for (int r = 0; r < BYTE_MR; r++)
#pragma GCC unroll 2
                    for (int c = 0; c < 2; c++)
                        whole[r][c] = dot(whole[r][c], kind.words, panel + w * PANEL + c * VL,
                                          strip + r * 8 + s * kind.sub / 4 + w);
#pragma GCC unroll 6
            for (int r = 0; r < BYTE_MR; r++) {
                vf scale = v_set(bits_float(strip[STRIP_SCALES + r]));
#pragma GCC unroll 2
                for (int c = 0; c < 2; c++) {
                    sums[r][c] = v_fma(i_float(whole[r][c]), v_mul(scale, v_load(scales + c * VL)), sums[r][c]);
                    if (kind.mins)
                        sums[r][c] = v_fma(v_set(bits_float(zeros[r])), v_load(mins + c * VL), sums[r][c]);
                }
            }
        }
#pragma GCC unroll 6
    for (int r = 0; r < BYTE_MR; r++)
        for (int c = 0; c < 2; c++)
            v_store(out + r * out_step + c * VL, sums[r][c]);
}

static void multiply_bytes_strip(struct byte_kind kind, const uint32_t *strip, const struct byte_layout *l,
                                 const uint32_t *panel, int64_t n, float *out, int64_t out_step, bool carried) {
#define AS(sub_, words_, mins_) \
    if (kind.sub == sub_ && kind.words == words_ && kind.mins == mins_) \
        multiply_bytes_as((struct byte_kind){sub_, words_, mins_}, strip, l, panel, n, out, out_step, carried)
#if defined(ISA_VNNI) || defined(ISA_AVX_VNNI)
    AS(32, 1, false);
    AS(32, 1, true);
    AS(16, 1, false);
    AS(16, 1, true);
#else
    AS(32, 8, false); /* Q4_0 */
    AS(32, 8, true);  /* Q4_1, Q4_K */
    AS(32, 4, false); /* Q5_0, MXFP4 */
    AS(32, 4, true);  /* Q5_1, Q5_K */
    AS(16, 4, false); /* Q3_K */
    AS(16, 4, true);  /* Q2_K */
    AS(16, 2, false); /* Q6_K */
#endif
#undef AS
}

/* Multiply all rows by a packed tile. Where a panel or a strip is not whole, the result goes through `edge` or `rest`. */
static void multiply_tile_bytes(const struct product *p, const struct product_piece *piece, const struct byte_layout *l,
                                uint32_t *memory, int64_t first, int64_t n) {
    struct byte_kind kind = byte_kind(p->weight->type);
    for (int64_t column = piece->first_column; column < piece->stop_column; column += PANEL) {
        const uint32_t *panel = memory + (column - piece->first_column) / PANEL * l->panel;
        bool whole = piece->stop_column - column >= PANEL;
        int64_t out_step = whole ? (int64_t)p->out_step / 4 : PANEL;
        float *out = whole ? (float *)(p->out + piece->first_row * (int64_t)p->out_step) + column : (float *)memory + l->edge;
        for (int64_t row = piece->first_row; row < piece->stop_row; row += BYTE_MR, out += BYTE_MR * out_step) {
            const uint32_t *strip = p->words + row / BYTE_MR * p->strip_words + first / 32 * strip_block(kind);
            float rest[BYTE_MR * PANEL];
            int64_t rows = piece->stop_row - row;
            if (rows >= BYTE_MR) {
                multiply_bytes_strip(kind, strip, l, panel, n, out, out_step, first > 0);
                continue;
            }
            for (int64_t r = 0; r < BYTE_MR; r++)
                memcpy(rest + r * PANEL, out + (r < rows ? r : 0) * out_step, PANEL * 4);
            multiply_bytes_strip(kind, strip, l, panel, n, rest, PANEL, first > 0);
            for (int64_t r = 0; r < rows; r++)
                memcpy(out + r * out_step, rest + r * PANEL, PANEL * 4);
        }
    }
}

static void multiply_weight_bytes(const struct product *p, const struct product_piece *piece, float *scratch) {
    struct byte_layout l = byte_layout(p, piece);
    uint32_t *memory = (uint32_t *)scratch;
    for (int64_t k = 0; k < p->n_in; k += l.stretch) {
        int64_t n = p->n_in - k < l.stretch ? p->n_in - k : l.stretch;
        pack_weight_bytes(p, &l, memory, piece->first_column, piece->stop_column, k, n);
        multiply_tile_bytes(p, piece, &l, memory, k, n);
    }
    write_edge(p, piece, scratch + l.edge, PANEL);
}

/* The last strip is filled up with zeros. */
static void convert_rows_bytes(const struct product *p, int64_t first, int64_t stop) {
    struct byte_kind kind = byte_kind(p->weight->type);
    int zero = zero_byte(p->weight->type);
    if (stop == p->n_rows && stop % BYTE_MR)
        memset(p->words + stop / BYTE_MR * p->strip_words, 0, (size_t)p->strip_words * 4);
    for (int64_t row = first; row < stop; row++)
        convert_row_bytes(kind, zero, (const float *)(p->x + row * (int64_t)p->x_step), p->n_in,
                          p->words + row / BYTE_MR * p->strip_words, row % BYTE_MR);
}

#else
#define HAS_BYTES 0
enum { BYTE_MR = 1 };
INLINE int words_at_a_time(int type) { (void)type; return 0; }
#endif
