/* The kernels in plain C, for any processor. */
#include "instructions.h"

static bool runs_here(void) { return true; }

INSTRUCTION_SET(plain_set, "plain C");
