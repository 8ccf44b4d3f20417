/* Rotations by tables: a turn is the cosine and the sine of a pair's angle. A table has n_dims of them for a position, side
 * by side where a pair is two neighbours, and in halves where it is a value of each half.
 */
#pragma once

#include <math.h>
#include <stdbool.h>
#include <stdint.h>

/* Write the turn of pair `i` of `half`, scaled. */
static inline void put_turn(float *turns, int64_t half, bool halves, int64_t i, double angle, double scale) {
    turns[halves ? i : 2 * i] = (float)(cos(angle) * scale);
    turns[halves ? half + i : 2 * i + 1] = (float)(sin(angle) * scale);
}

/* The angle from one factor's rotation to another's, as the difference of those that ggml computes in floats for the
 * same position: what comes out is as if it had been rotated by `after` from the first, with what ggml rounds. */
static inline double angle_between(float theta, float before, float after) {
    return (double)(theta / after) - (double)(theta / before);
}
