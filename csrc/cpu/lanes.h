// SIMD vectors of the compiler's own kind, for the files that are built once per instruction set. Everything is local
// to the file that includes this: the linker must not share code between the builds.
#pragma once

#include <cstdint>
#include <cstring>

namespace knowedit {
namespace {

template <typename T, int W>
struct Simd {
    typedef T Vec __attribute__((vector_size(W * sizeof(T))));
};
template <typename T, int W>
using Vec = typename Simd<T, W>::Vec;

template <int W, typename T>
inline Vec<T, W> load(const T* from) {
    Vec<T, W> x;
    std::memcpy(&x, from, sizeof(x));
    return x;
}

template <typename V, typename T>
inline void store(T* to, const V& x) {
    std::memcpy(to, &x, sizeof(x));
}

// Adds halves until four lanes are left.
template <typename T>
inline Vec<T, 4> fold(Vec<T, 4> x) {
    return x;
}
template <typename T>
inline Vec<T, 4> fold(Vec<T, 8> x) {
    return __builtin_shufflevector(x, x, 0, 1, 2, 3) + __builtin_shufflevector(x, x, 4, 5, 6, 7);
}
template <typename T>
inline Vec<T, 4> fold(Vec<T, 16> x) {
    return fold<T>(__builtin_shufflevector(x, x, 0, 1, 2, 3, 4, 5, 6, 7) +
                   __builtin_shufflevector(x, x, 8, 9, 10, 11, 12, 13, 14, 15));
}

}  // namespace
}  // namespace knowedit

// KNOWEDIT_NAME(attend) is attend_avx2 in the build for avx2.
#define KNOWEDIT_JOIN(a, b) a##_##b
#define KNOWEDIT_JOIN_EXPANDED(a, b) KNOWEDIT_JOIN(a, b)
#define KNOWEDIT_NAME(name) KNOWEDIT_JOIN_EXPANDED(name, KNOWEDIT_ISA)
