// Tensor cores and asynchronous copies, sm_80 and newer. One line of PTX each on the device; with KNOWEDIT_SIMT plain
// loops over the same fragments. All 32 lanes take part. Within a warp, g = lane / 4 and t = lane % 4.
//
//             A (row, column)                            B (row, column)          C, D (row, column)
//  16x8x16    a[0] (g, 2t) a[1] (g+8, 2t)                b[0] (2t, g)             c[0], c[1] (g, 2t), (g, 2t+1)
//             a[2] (g, 2t+8) a[3] (g+8, 2t+8)            b[1] (2t+8, g)           c[2], c[3] (g+8, 2t), (g+8, 2t+1)
//             each with its neighbour in the next column / row (B) in the upper half
//  16x8x8     a[0] (g, t) a[1] (g+8, t)                  b[0] (t, g)              as above
//             a[2] (g, t+4) a[3] (g+8, t+4)              b[1] (t+4, g)
//  8x8x4      a (g, t)                                   b (t, g)                 c[0], c[1] (g, 2t), (g, 2t+1)
#pragma once

#include "common.cuh"

namespace knowedit {

// D = A B + C in place in c, bfloat16 or float16 products summed in float32.
template <typename T>
__device__ __forceinline__ void mma_16x8x16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);
// float32 products of operands that to_tf32 has rounded (the lower 13 bits are not read).
__device__ __forceinline__ void mma_16x8x8_tf32(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);
__device__ __forceinline__ void mma_8x8x4(double (&c)[2], double a, double b);
// To the nearest with 10 bits of mantissa, ties away from zero; as bits.
__device__ __forceinline__ uint32_t to_tf32(float x);

// `matrices` 8x8 matrices of 16-bit elements from shared memory: lane 8 i + r gives the address of row r of matrix i
// (16 bytes, aligned so); to[i] is the lane's pair (g, 2t), (g, 2t+1) of it, or of its transpose. Lanes from 8 *
// matrices on may give any valid address.
template <int matrices, bool transposed = false>
__device__ __forceinline__ void load_matrices(uint32_t (&to)[matrices], const void* row);

// `bytes` (4, 8 or 16) to shared memory, both sides aligned so. Where !valid the destination becomes zero and nothing
// is read. It is there after await_copies, for the calling thread; a barrier makes it so for the block.
template <int bytes>
__device__ __forceinline__ void copy_async(void* to, const void* from, bool valid = true);
__device__ __forceinline__ void commit_copies();  // closes a group
template <int pending>
__device__ __forceinline__ void await_copies();  // until at most `pending` groups are under way

}  // namespace knowedit

#ifdef KNOWEDIT_SIMT
#include "../testing/simt_mma.h"
#else

namespace knowedit {

template <>
__device__ __forceinline__ void mma_16x8x16<__nv_bfloat16>(float (&c)[4], const uint32_t (&a)[4],
                                                           const uint32_t (&b)[2]) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

template <>
__device__ __forceinline__ void mma_16x8x16<__half>(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

__device__ __forceinline__ void mma_16x8x8_tf32(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    asm volatile(
        "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

__device__ __forceinline__ void mma_8x8x4(double (&c)[2], double a, double b) {
    asm volatile("mma.sync.aligned.m8n8k4.row.col.f64.f64.f64.f64 {%0, %1}, {%2}, {%3}, {%0, %1};"
                 : "+d"(c[0]), "+d"(c[1])
                 : "d"(a), "d"(b));
}

__device__ __forceinline__ uint32_t to_tf32(float x) {
    uint32_t bits;
    asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(x));
    return bits;
}

template <int matrices, bool transposed>
__device__ __forceinline__ void load_matrices(uint32_t (&to)[matrices], const void* row) {
    static_assert(matrices == 1 || matrices == 2 || matrices == 4);
    const auto at = static_cast<uint32_t>(__cvta_generic_to_shared(row));
    if constexpr (matrices == 4 && transposed)
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                     : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                     : "r"(at)
                     : "memory");
    else if constexpr (matrices == 4)
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                     : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                     : "r"(at)
                     : "memory");
    else if constexpr (matrices == 2 && transposed)
        asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
                     : "=r"(to[0]), "=r"(to[1])
                     : "r"(at)
                     : "memory");
    else if constexpr (matrices == 2)
        asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
                     : "=r"(to[0]), "=r"(to[1])
                     : "r"(at)
                     : "memory");
    else if constexpr (transposed)
        asm volatile("ldmatrix.sync.aligned.m8n8.x1.trans.shared.b16 {%0}, [%1];" : "=r"(to[0]) : "r"(at) : "memory");
    else
        asm volatile("ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%0}, [%1];" : "=r"(to[0]) : "r"(at) : "memory");
}

template <int bytes>
__device__ __forceinline__ void copy_async(void* to, const void* from, bool valid) {
    static_assert(bytes == 4 || bytes == 8 || bytes == 16);
    const auto at = static_cast<uint32_t>(__cvta_generic_to_shared(to));
    const int read = valid ? bytes : 0;
    if constexpr (bytes == 16)  // past the first-level cache
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(at), "l"(from), "r"(read) : "memory");
    else
        asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(at), "l"(from), "n"(bytes), "r"(read)
                     : "memory");
}

__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

template <int pending>
__device__ __forceinline__ void await_copies() {
    asm volatile("cp.async.wait_group %0;" ::"n"(pending) : "memory");
}

}  // namespace knowedit
#endif
