// The kernels, once per instruction set, and the choice among them. All of them give the same bits.
//
// -DSJD2_MAX_WIDTH=128 or 256 leaves out the wider ones, for tests.

#include "kernels.h"

#include <math.h>
#include <string.h>

#include "sjd2.h"

#if defined(__x86_64__)
#include <immintrin.h>
#ifndef SJD2_MAX_WIDTH
#define SJD2_MAX_WIDTH 512
#endif
#define SJD2_WIDTH 128
#else
#define SJD2_MAX_WIDTH 0
#define SJD2_WIDTH 0
#endif

#define SJD2_ISA baseline
#include "core.h"
#include "lanes.h"
#include "rows.h"
#include "dims.h"
#undef SJD2_ISA
#undef SJD2_WIDTH

#if SJD2_MAX_WIDTH >= 256
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2")
#endif
#define SJD2_ISA avx2
#define SJD2_WIDTH 256
#include "core.h"
#include "lanes.h"
#include "rows.h"
#include "dims.h"
#undef SJD2_ISA
#undef SJD2_WIDTH
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif

#if SJD2_MAX_WIDTH >= 512
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,prefer-vector-width=512")
#endif
#define SJD2_ISA avx512
#define SJD2_WIDTH 512
#include "core.h"
#include "lanes.h"
#include "rows.h"
#include "dims.h"
#undef SJD2_ISA
#undef SJD2_WIDTH
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif

namespace sjd2 {

static const Kernels &choose() {
#if SJD2_MAX_WIDTH >= 256
    __builtin_cpu_init();
#endif
#if SJD2_MAX_WIDTH >= 512
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl"))
        return avx512::kernels;
#endif
#if SJD2_MAX_WIDTH >= 256
    if (__builtin_cpu_supports("avx2")) return avx2::kernels;
#endif
    return baseline::kernels;
}

const Kernels &kernels() {
    static const Kernels &chosen = choose();
    return chosen;
}

}  // namespace sjd2
