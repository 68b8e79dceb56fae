// One block's 128 x 128 tile of a matrix product: who holds which element, and A B^T for operands read along k.
#pragma once

#include "common.cuh"
#include "mma.cuh"

namespace knowedit {

constexpr int kTile = 128;

__host__ __device__ constexpr int64_t tiles(int64_t size) { return (size + kTile - 1) / kTile; }

// Warps share a tile, two below each other and Warps / 2 beside each other, and lanes share a warp's part as mma.sync
// has it: element (m, n, e) of the sums sum[4][kColumns][4] is that of row(2 m + e / 2) and column(n, e % 2).
template <int Warps>
struct Share {
    static constexpr int kThreads = Warps * kWarp;
    static constexpr int kSlices = Warps / 2;             // warps beside each other
    static constexpr int kColumns = kTile / kSlices / 8;  // eights of columns of a warp

    int lane = static_cast<int>(threadIdx.x) % kWarp;
    int slice = static_cast<int>(threadIdx.x) / kWarp % kSlices;
    int top = static_cast<int>(threadIdx.x) / kWarp / kSlices * (kTile / 2);
    int left = slice * kColumns * 8;

    __device__ int row(int i) const { return top + i * 8 + lane / 4; }                     // i < 8
    __device__ int column(int n, int e) const { return left + n * 8 + lane % 4 * 2 + e; }  // n < kColumns, e < 2
};

// ---- operands in shared memory ----

constexpr int kPiece = 16;  // bytes copied at once

__host__ __device__ inline bool in_pieces(const void* base, int64_t stride_bytes) {
    return reinterpret_cast<uintptr_t>(base) % kPiece == 0 && stride_bytes % kPiece == 0;
}

// Copies `valid` elements (0 .. 16 bytes) and zeros up to 16 bytes; asynchronously where that can be.
template <typename T>
__device__ inline void copy_piece(unsigned char* to, const T* from, int valid, bool aligned) {
    constexpr int most = kPiece / static_cast<int>(sizeof(T));
    if (aligned && (valid == 0 || valid == most)) return copy_async<kPiece>(to, from, valid != 0);
    T* at = reinterpret_cast<T*>(to);
#pragma unroll
    for (int e = 0; e < most; ++e) {
        if (e < valid)
            at[e] = from[e];
        else
            narrow(0.0f, at + e);
    }
}

// How many of `most` elements from `first` on lie before `end`.
__device__ inline int inside(int64_t first, int64_t end, int most) {
    const int64_t left = end - first;
    return left <= 0 ? 0 : left < most ? static_cast<int>(left) : most;
}

// 128 rows of A or B, of which `rows` exist, read along k.
template <typename T>
struct Rows {
    const T* base;
    int64_t stride, rows;
    bool aligned;
};

// ---- the products ----

// Shared memory of one stage: 64 bytes of k of 128 + 128 rows. Rows are padded to 80, so that eight of them read at one
// k lie in different banks.
constexpr int kStageBytes = 64;
constexpr int kPitch = kStageBytes + kPiece;
constexpr int kStages = 3;  // so that two blocks fit a multiprocessor of sm_80
constexpr int kOperand = kTile * kPitch;
constexpr size_t kTileMemory = static_cast<size_t>(kStages) * 2 * kOperand;

template <typename T>
constexpr int kDepth = kStageBytes / static_cast<int>(sizeof(T));  // k of a stage

template <typename T, int Threads>
__device__ inline void copy_rows(unsigned char* to, const Rows<T>& from, int64_t k, int64_t depth) {
    constexpr int pieces = kStageBytes / kPiece, most = kPiece / static_cast<int>(sizeof(T));
    for (int i = static_cast<int>(threadIdx.x); i < kTile * pieces; i += Threads) {
        const int row = i / pieces, piece = i % pieces;
        const int valid = row < from.rows ? inside(k + piece * most, depth, most) : 0;
        copy_piece(to + row * kPitch + piece * kPiece,
                   valid ? from.base + row * from.stride + k + piece * most : from.base, valid, from.aligned);
    }
}

// Runs `steps` steps over kStages buffers: copy(step, buffer) starts the copies of a step, use(step, buffer) reads them
// once those of all threads are there. Every step begins with a barrier.
template <typename Copy, typename Use>
__device__ inline void staged(int64_t steps, Copy copy, Use use) {
    for (int step = 0; step < kStages - 1; ++step) {
        if (step < steps) copy(step, step);
        commit_copies();
    }
    for (int64_t step = 0; step < steps; ++step) {
        await_copies<kStages - 2>();
        __syncthreads();  // also: nobody reads the buffer filled next any more
        const int64_t next = step + kStages - 1;
        if (next < steps) copy(next, static_cast<int>(next % kStages));
        commit_copies();
        use(step, static_cast<int>(step % kStages));
    }
}

// Columns n and n + 1 of the sums (eights) gain left * right, right being the fragments of both.
template <typename T, int Columns>
__device__ inline void multiply_pair(float (&sum)[4][Columns][4], int n, const uint32_t (&left)[4][4],
                                     const uint32_t (&right)[4]) {
    const uint32_t first[2] = {right[0], right[1]}, second[2] = {right[2], right[3]};
#pragma unroll
    for (int m = 0; m < 4; ++m) {
        mma_16x8x16<T>(sum[m][n], left[m], first);
        mma_16x8x16<T>(sum[m][n + 1], left[m], second);
    }
}

// bfloat16 and float16: tensor cores, float sums.
template <typename T>
struct Product {
    static constexpr int kWarps = 4;
    using Sum = float;
    using Lot = Share<kWarps>;

    static __device__ void multiply(Sum (&sum)[4][Lot::kColumns][4], const unsigned char* a, const unsigned char* b,
                                    const Lot& lot) {
        for (int k = 0; k < kStageBytes; k += 32) {  // 16 elements
            uint32_t left[4][4];
#pragma unroll
            for (int m = 0; m < 4; ++m)
                load_matrices<4>(left[m], a + (lot.top + m * 16 + lot.lane % 16) * kPitch + k + lot.lane / 16 * 16);
#pragma unroll
            for (int n = 0; n < Lot::kColumns; n += 2) {
                uint32_t right[4];
                const int row = lot.left + n * 8 + lot.lane / 16 * 8 + lot.lane % 8;
                load_matrices<4>(right, b + row * kPitch + k + lot.lane / 8 % 2 * 16);
                multiply_pair<T>(sum, n, left, right);
            }
        }
    }
};

// float: fused multiply-adds, in the order of k.
template <>
struct Product<float> {
    static constexpr int kWarps = 8;
    using Sum = float;
    using Lot = Share<kWarps>;

    static __device__ void multiply(Sum (&sum)[4][Lot::kColumns][4], const unsigned char* a, const unsigned char* b,
                                    const Lot& lot) {
#pragma unroll 1
        for (int k = 0; k < kStageBytes; k += kPiece) {
            float4 left[8];
#pragma unroll
            for (int i = 0; i < 8; ++i) left[i] = *reinterpret_cast<const float4*>(a + lot.row(i) * kPitch + k);
#pragma unroll
            for (int n = 0; n < Lot::kColumns; ++n)
#pragma unroll
                for (int e = 0; e < 2; ++e) {
                    const float4 right = *reinterpret_cast<const float4*>(b + lot.column(n, e) * kPitch + k);
#pragma unroll
                    for (int i = 0; i < 8; ++i) {
                        float& at = sum[i / 2][n][i % 2 * 2 + e];
                        at = fmaf(left[i].x, right.x, at), at = fmaf(left[i].y, right.y, at);
                        at = fmaf(left[i].z, right.z, at), at = fmaf(left[i].w, right.w, at);
                    }
                }
        }
    }
};

// double: tensor cores, which round as fused multiply-adds do.
template <>
struct Product<double> {
    static constexpr int kWarps = 8;
    using Sum = double;
    using Lot = Share<kWarps>;

    static __device__ void multiply(Sum (&sum)[4][Lot::kColumns][4], const unsigned char* a, const unsigned char* b,
                                    const Lot& lot) {
        const int row = lot.lane / 4, at = lot.lane % 4 * static_cast<int>(sizeof(double));
#pragma unroll
        for (int k = 0; k < kStageBytes; k += 32) {  // 4 elements
            double left[8];
#pragma unroll
            for (int i = 0; i < 8; ++i)
                left[i] = *reinterpret_cast<const double*>(a + (lot.top + i * 8 + row) * kPitch + k + at);
#pragma unroll
            for (int n = 0; n < Lot::kColumns; ++n) {
                const double right = *reinterpret_cast<const double*>(b + (lot.left + n * 8 + row) * kPitch + k + at);
#pragma unroll
                for (int i = 0; i < 8; ++i) {
                    double (&to)[4] = sum[i / 2][n];
                    double pair[2] = {to[i % 2 * 2], to[i % 2 * 2 + 1]};
                    mma_8x8x4(pair, left[i], right);
                    to[i % 2 * 2] = pair[0], to[i % 2 * 2 + 1] = pair[1];
                }
            }
        }
    }
};

// float as the sum of two TF32 numbers each, on tensor cores; the product of the lower ones, below 2^-22 of the whole,
// is left out. Eight k are summed on their own, so that the tensor cores' truncation does not add up.
struct SplitProduct {
    static constexpr int kWarps = 8;
    using Sum = float;
    using Lot = Share<kWarps>;

    struct Parts {
        uint32_t high, low;

        __device__ explicit Parts(const unsigned char* from) {
            const float x = *reinterpret_cast<const float*>(from);
            high = to_tf32(x), low = to_tf32(x - __uint_as_float(high));
        }
    };

    static __device__ void multiply(Sum (&sum)[4][Lot::kColumns][4], const unsigned char* a, const unsigned char* b,
                                    const Lot& lot) {
        const int row = lot.lane / 4, at = lot.lane % 4 * 4;
        a += (lot.top + row) * kPitch + at, b += (lot.left + row) * kPitch + at;
#pragma unroll 1
        for (int k = 0; k < kStageBytes; k += 32) {  // 8 elements
#pragma unroll
            for (int top = 0; top < 4; top += 2) {  // two m at a time, for the sake of registers
                uint32_t high[2][4], low[2][4];
#pragma unroll
                for (int i = 0; i < 8; ++i) {
                    const Parts x(a + ((top + i / 4) * 16 + i % 2 * 8) * kPitch + k + i / 2 % 2 * 16);
                    high[i / 4][i % 4] = x.high, low[i / 4][i % 4] = x.low;
                }
#pragma unroll
                for (int n = 0; n < Lot::kColumns; ++n) {
                    const Parts x(b + n * 8 * kPitch + k), y(b + n * 8 * kPitch + k + 16);
                    const uint32_t upper[2] = {x.high, y.high}, lower[2] = {x.low, y.low};
#pragma unroll
                    for (int m = 0; m < 2; ++m) {
                        float product[4] = {};
                        mma_16x8x8_tf32(product, low[m], upper);
                        mma_16x8x8_tf32(product, high[m], lower);
                        mma_16x8x8_tf32(product, high[m], upper);
#pragma unroll
                        for (int e = 0; e < 4; ++e) sum[top + m][n][e] += product[e];
                    }
                }
            }
        }
    }
};

}  // namespace knowedit
