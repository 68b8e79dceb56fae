// The operations of cuda/mma.cuh on the CPU: every lane sees all lanes' operands and computes its own results.
#pragma once

#include "simt.h"

namespace knowedit {
namespace simt_mma {

template <typename E, int A, int B>
struct Operands {
    E a[A], b[B];
};

template <typename T>
inline float half_of(uint32_t pair, int upper) {
    T x;
    x.bits = static_cast<uint16_t>(pair >> (16 * upper));
    return widen(x);
}

inline float tf32_of(uint32_t bits) { return bits_float(bits & ~0x1fffu); }

// c[i] of a 16x8 tile += sum over k of A(row, k) B(k, column).
template <int depth, typename L, typename GetA, typename GetB>
void accumulate(float (&c)[4], const L& all, GetA a, GetB b) {
    const int g = simt::lane() / 4, t = simt::lane() % 4;
    for (int i = 0; i < 4; ++i) {
        const int row = g + (i >= 2 ? 8 : 0), column = 2 * t + i % 2;
        for (int k = 0; k < depth; ++k) c[i] += a(all, row, k) * b(all, k, column);
    }
}

}  // namespace simt_mma

template <typename T>
inline void mma_16x8x16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    using Give = simt_mma::Operands<uint32_t, 4, 2>;
    const simt::Lanes<Give> all("mma_16x8x16", kAllLanes, {{a[0], a[1], a[2], a[3]}, {b[0], b[1]}}, 0);
    simt_mma::accumulate<16>(
        c, all,
        [](const auto& all, int row, int k) {
            const Give give = all[row % 8 * 4 + k % 8 / 2];
            return simt_mma::half_of<T>(give.a[row / 8 + k / 8 * 2], k % 2);
        },
        [](const auto& all, int k, int column) {
            const Give give = all[column * 4 + k % 8 / 2];
            return simt_mma::half_of<T>(give.b[k / 8], k % 2);
        });
}

inline void mma_16x8x8_tf32(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    using Give = simt_mma::Operands<uint32_t, 4, 2>;
    const simt::Lanes<Give> all("mma_16x8x8_tf32", kAllLanes, {{a[0], a[1], a[2], a[3]}, {b[0], b[1]}}, 0);
    simt_mma::accumulate<8>(
        c, all,
        [](const auto& all, int row, int k) {
            const Give give = all[row % 8 * 4 + k % 4];
            return simt_mma::tf32_of(give.a[row / 8 + k / 4 * 2]);
        },
        [](const auto& all, int k, int column) {
            const Give give = all[column * 4 + k % 4];
            return simt_mma::tf32_of(give.b[k / 4]);
        });
}

inline void mma_8x8x4(double (&c)[2], double a, double b) {
    using Give = simt_mma::Operands<double, 1, 1>;
    const simt::Lanes<Give> all("mma_8x8x4", kAllLanes, {{a}, {b}}, 0);
    const int g = simt::lane() / 4, t = simt::lane() % 4;
    for (int i = 0; i < 2; ++i)
        for (int k = 0; k < 4; ++k) c[i] = fma(all[g * 4 + k].a[0], all[(2 * t + i) * 4 + k].b[0], c[i]);
}

inline uint32_t to_tf32(float x) {
    const uint32_t bits = float_bits(x);
    return (bits & 0x7f800000u) == 0x7f800000u ? bits : (bits + 0x1000u) & ~0x1fffu;
}

template <int matrices, bool transposed>
inline void load_matrices(uint32_t (&to)[matrices], const void* row) {
    struct alignas(16) Row {  // the undefined-behaviour sanitizer reports addresses not aligned so
        uint16_t element[8];
    };
    Row mine{};
    if (simt::lane() < 8 * matrices) mine = *static_cast<const Row*>(row);  // read here, so that it is this lane's read
    const simt::Lanes<Row> all("load_matrices", kAllLanes, mine, 0);
    const int g = simt::lane() / 4, t = simt::lane() % 4;
    for (int i = 0; i < matrices; ++i) {
        const auto element = [&](int r, int c) -> uint32_t {
            return transposed ? all[8 * i + c].element[r] : all[8 * i + r].element[c];
        };
        to[i] = element(g, 2 * t) | element(g, 2 * t + 1) << 16;
    }
}

template <int bytes>
inline void copy_async(void* to, const void* from, bool valid) {
    static_assert(bytes == 4 || bytes == 8 || bytes == 16);
    simt::copy_later(to, from, valid ? bytes : 0, valid ? 0 : bytes);
}
inline void commit_copies() { simt::commit_copies(); }
template <int pending>
inline void await_copies() {
    simt::await_copies(pending);
}

}  // namespace knowedit
