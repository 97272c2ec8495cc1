// Checks of what comes across the C boundary. Each op makes all of them before it writes anything.
#ifndef SJD2_CHECKS_H
#define SJD2_CHECKS_H

#include <stdint.h>

#include <initializer_list>

#include "sjd2.h"

#define SJD2_REQUIRE(condition, status) \
    do {                                \
        if (!(condition)) return status; \
    } while (0)

#define SJD2_REQUIRE_STRUCT(params)                                        \
    SJD2_REQUIRE((params) != nullptr, SJD2_ERROR_NULL);                    \
    SJD2_REQUIRE((params)->size == sizeof(*(params)), SJD2_ERROR_STRUCT)

namespace sjd2 {

constexpr int64_t LARGEST = INT64_C(1) << 46;     // elements of an array
constexpr int64_t LARGEST_SIZE = INT64_C(1) << 30;  // of one dimension
constexpr int64_t LARGEST_VOCAB = INT64_C(1) << 24; // counts of ids are exact in float32

// Whether an array of these dimensions can exist.
inline bool sizes(std::initializer_list<int64_t> dimensions) {
    int64_t product = 1;
    for (const int64_t size : dimensions) {
        if (size < 0 || size > LARGEST_SIZE || product > LARGEST / (size > 1 ? size : 1)) return false;
        product *= size > 1 ? size : 1;
    }
    return true;
}

// Whether arrays of `count` elements are there; empty ones need no memory.
inline bool given(int64_t count, std::initializer_list<const void *> pointers) {
    if (count == 0) return true;
    for (const void *pointer : pointers)
        if (!pointer) return false;
    return true;
}

// Whether all values lie in [low, high).
template <class T>
bool within(const T *values, int64_t count, int64_t low, int64_t high) {
    bool good = true;
    for (int64_t i = 0; i < count; ++i) good &= (values[i] >= low) & (values[i] < high);
    return good;
}

inline bool known_type(int64_t type) { return type >= SJD2_FLOAT32 && type <= SJD2_BFLOAT16; }

inline int64_t bytes_of(int64_t type) { return type == SJD2_FLOAT32 ? 4 : 2; }

}  // namespace sjd2
#endif
