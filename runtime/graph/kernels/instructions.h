/* Everything that is compiled once for each instruction set. The including file has named it; see avx2.c for one. */
#include "attend.h"
#include "multiply_weights.h"

#ifdef ISA_BF16
#define HAS_BFLOAT true
#else
#define HAS_BFLOAT false
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
    }
