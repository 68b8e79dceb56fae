// The operations of cuda/mma.cuh on the CPU: every lane sees all lanes' operands and computes its own results.
#pragma once

#include "simt.h"

namespace knowedit {
namespace simt_mma {

struct Operands {  // of a lane
    uint32_t a[4], b[2];
};
struct DoubleOperands {
    double a, b;
};

// Adds the lane's part of the product of what all lanes gave (simt_mma.cpp).
void add_bfloat16(float (&c)[4], const simt::Lanes<Operands>& all);
void add_float16(float (&c)[4], const simt::Lanes<Operands>& all);
void add_tf32(float (&c)[4], const simt::Lanes<Operands>& all);
void add_double(double (&c)[2], const simt::Lanes<DoubleOperands>& all);

}  // namespace simt_mma

template <typename T>
inline void mma_16x8x16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    const simt::Lanes<simt_mma::Operands> all("mma_16x8x16", kAllLanes, {{a[0], a[1], a[2], a[3]}, {b[0], b[1]}}, 0);
    if (std::is_same_v<T, __half>)
        simt_mma::add_float16(c, all);
    else
        simt_mma::add_bfloat16(c, all);
}

inline void mma_16x8x8_tf32(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    simt_mma::add_tf32(c, {"mma_16x8x8_tf32", kAllLanes, {{a[0], a[1], a[2], a[3]}, {b[0], b[1]}}, 0});
}

inline void mma_8x8x4(double (&c)[2], double a, double b) {
    simt_mma::add_double(c, {"mma_8x8x4", kAllLanes, {a, b}, 0});
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
