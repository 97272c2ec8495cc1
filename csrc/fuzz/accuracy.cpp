// How far core.h is from the exact functions: prints the largest error of each as "name value" lines.
//
//   c++ -O2 -ffp-contract=off -I csrc csrc/fuzz/accuracy.cpp -o accuracy && ./accuracy 1     (every float; minutes)
//   ./accuracy 1021                                                                          (every 1021st)
#include <math.h>
#include <stdio.h>
#include <stdlib.h>

#include "core.h"

using namespace sjd2::scalar;

// Distance in units of the last place of the exact value.
static double ulps(float got, double exact) {
    int exponent;
    frexp(exact, &exponent);
    return fabs(got - exact) / ldexp(1.0, (exponent > -125 ? exponent : -125) - 24);
}

static void raise_to(double *worst, double error) {
    if (!(error <= *worst)) *worst = error;
}

int main(int count, char **arguments) {
    const uint32_t stride = count > 1 ? (uint32_t)strtoul(arguments[1], nullptr, 10) : 1021u;
    double log_error = 0, exp_error = 0, exponential = 0, gumbel = 0, angle_error = 0, halves = 0;
    for (uint64_t bits = 1; bits < 0x7f800000u; bits += stride) {
        const float x = float_of((uint32_t)bits);
        raise_to(&log_error, ulps(log_of(x), log((double)x)));
        if (x < 87.3f) raise_to(&exp_error, ulps(exp_of(-x), exp(-(double)x)));
        if (x <= 6.2831855f) {
            float s, c;
            sin_cos(x, &s, &c);
            raise_to(&angle_error, fmax(fabs(s - sin((double)x)), fabs(c - cos((double)x))));
        }
    }
    for (uint64_t bits = 0; bits < 0x80000000u; bits += stride) {
        const float u = uniform_of((uint32_t)bits);
        const double exact = -log1p(-fmax((double)u, ldexp(1.0, -33)));
        raise_to(&exponential, ulps(exponential_of(u), exact));
        raise_to(&gumbel, fabs(gumbel_of(u) + log(exact)));
    }
    for (uint32_t h = 0; h < 0x10000u; ++h) {  // every half and every bfloat comes back
        const float x = float_of_half((uint16_t)h), y = float_of_bfloat((uint16_t)h);
        if (x == x) raise_to(&halves, half_of_float(x) != h);
        if (y == y) raise_to(&halves, bfloat_of_float(y) != h);
    }
    printf("log_ulp %.3f\nexp_ulp %.3f\nexponential_ulp %.3f\n", log_error, exp_error, exponential);
    printf("gumbel_absolute %.3g\nangle_absolute %.3g\nhalf_round_trip_failures %g\n", gumbel, angle_error, halves);
    return 0;
}
