/* Everything that is compiled once for each instruction set. The including file has named it; see avx2.c for one. */
#include "attend_few.h"
#include "multiply_few.h"
#include "multiply_weights.h"
#include "rotate.h"

static void attend(const struct attention *a, const struct attention_piece *piece, float *scratch) {
    if (is_few(a, piece)) {
        attend_few(a, piece, scratch);
        return;
    }
#ifdef ISA_BF16
    if (!a->exact) {
        attend_as(a, piece, scratch, 1);
        return;
    }
#endif
    attend_as(a, piece, scratch, 0);
}

static int64_t attention_scratch(const struct attention *a, const struct attention_piece *piece) {
    if (is_few(a, piece))
        return few_layout(a, piece).total;
#ifdef ISA_BF16
    if (!a->exact)
        return attend_layout(a, piece, 1).total;
#endif
    return attend_layout(a, piece, 0).total;
}

#ifdef ISA_BF16
#define HAS_BFLOAT true
#else
#define HAS_BFLOAT false
#endif

#ifdef ISA_VNNI
#define FEW_PRODUCTS \
    .is_few_product = is_few_product, .few_words = few_words, .convert_few = convert_few_rows, .multiply_few = multiply_few,
#else
#define FEW_PRODUCTS
#endif

#define INSTRUCTION_SET(set, label) \
    const struct instruction_set set = { \
        .name = label, \
        .runs_here = runs_here, \
        .has_bfloat = HAS_BFLOAT, \
        .attention_scratch = attention_scratch, \
        .attend = attend, \
        .rows_of_strip = rows_of_strip, \
        .words_of_strip = words_of_strip, \
        .convert_rows = convert_rows, \
        .product_scratch = product_scratch, \
        .multiply_weights = multiply_weights, \
        .min_rows = min_rows, \
        .rotate_row = rotate_row, \
        FEW_PRODUCTS \
    }
