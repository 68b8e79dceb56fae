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

// pick: four of the eight lanes of x and y, x's first. halved: the lower half plus the upper one.
#if __has_builtin(__builtin_shufflevector)  // Clang, and GCC from 12 on
template <typename T, int A, int B, int C, int D>
inline Vec<T, 4> pick(Vec<T, 4> x, Vec<T, 4> y) {
    return __builtin_shufflevector(x, y, A, B, C, D);
}
template <typename T>
inline Vec<T, 4> halved(Vec<T, 8> x) {
    return __builtin_shufflevector(x, x, 0, 1, 2, 3) + __builtin_shufflevector(x, x, 4, 5, 6, 7);
}
template <typename T>
inline Vec<T, 8> halved(Vec<T, 16> x) {
    return __builtin_shufflevector(x, x, 0, 1, 2, 3, 4, 5, 6, 7) +
           __builtin_shufflevector(x, x, 8, 9, 10, 11, 12, 13, 14, 15);
}
#else  // GCC 11
template <typename T, int A, int B, int C, int D>
inline Vec<T, 4> pick(Vec<T, 4> x, Vec<T, 4> y) {
    typedef decltype(x < y) Lanes;  // integers as wide as T
    return __builtin_shuffle(x, y, Lanes{A, B, C, D});
}
template <typename T, int W>
inline Vec<T, W / 2> sum_of_halves(Vec<T, W> x) {
    Vec<T, W / 2> half[2];
    std::memcpy(half, &x, sizeof(x));
    return half[0] + half[1];
}
template <typename T>
inline Vec<T, 4> halved(Vec<T, 8> x) {
    return sum_of_halves<T, 8>(x);
}
template <typename T>
inline Vec<T, 8> halved(Vec<T, 16> x) {
    return sum_of_halves<T, 16>(x);
}
#endif

// Adds halves until four lanes are left.
template <typename T>
inline Vec<T, 4> fold(Vec<T, 4> x) {
    return x;
}
template <typename T>
inline Vec<T, 4> fold(Vec<T, 8> x) {
    return halved<T>(x);
}
template <typename T>
inline Vec<T, 4> fold(Vec<T, 16> x) {
    return halved<T>(halved<T>(x));
}

}  // namespace
}  // namespace knowedit

// KNOWEDIT_NAME(attend) is attend_avx2 in the build for avx2.
#define KNOWEDIT_JOIN(a, b) a##_##b
#define KNOWEDIT_JOIN_EXPANDED(a, b) KNOWEDIT_JOIN(a, b)
#define KNOWEDIT_NAME(name) KNOWEDIT_JOIN_EXPANDED(name, KNOWEDIT_ISA)
