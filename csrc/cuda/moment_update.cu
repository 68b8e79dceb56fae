// One block a 128 x 128 tile of the triangle, over all rows. Compiled in CI and run on the CPU by csrc/testing; not yet
// run on a GPU.
#include <algorithm>

#include "knowedit/moment_update.h"
#include "knowedit/triangle.h"
#include "tile.cuh"

namespace knowedit {
namespace {

constexpr const char* kOp = "moment_update";

// Panels of x in shared memory: rows of 128 columns, padded so that eight rows read at one column lie in different
// banks.
constexpr int kPanelPitch = kTile * 2 + kPiece;

// True after the step (of `rows` rows) at which the sums go to acc.
__device__ inline bool sums_end(const MomentUpdate& p, int64_t step, int64_t steps, int rows) {
    return step + 1 == steps || (step + 1) % (p.sum_rows / rows) == 0;
}

__device__ inline bool counts(const MomentUpdate& p, int64_t row) { return row < p.rows && (!p.mask || p.mask[row]); }

// Fragments of 16 rows (of x: the depth of the product) and 16 columns, as the left or the right operand.
__device__ inline void load_left(uint32_t (&to)[4], const unsigned char* panel, int column, int lane) {
    load_matrices<4, true>(to, panel + (lane / 16 * 8 + lane % 8) * kPanelPitch + (column + lane / 8 % 2 * 8) * 2);
}
__device__ inline void load_right(uint32_t (&to)[4], const unsigned char* panel, int column, int lane) {
    load_matrices<4, true>(to, panel + (lane / 8 % 2 * 8 + lane % 8) * kPanelPitch + (column + lane / 16 * 8) * 2);
}

// acc gains a block's sums, which start again from zero.
template <typename A, typename Lot>
__device__ inline void flush(const MomentUpdate& p, float (&sum)[4][Lot::kColumns][4], const TilePlace& place,
                             const Lot& lot) {
    A* acc = static_cast<A*>(p.acc);
#pragma unroll
    for (int i = 0; i < 8; ++i) {
        const int64_t row = place.row * kTile + lot.row(i);
#pragma unroll
        for (int n = 0; n < Lot::kColumns; ++n)
#pragma unroll
            for (int e = 0; e < 2; ++e) {
                const int64_t column = place.column * kTile + lot.column(n, e);
                float& value = sum[i / 2][n][i % 2 * 2 + e];
                if (row < p.width && column <= row) acc[row * p.acc_row + column] += static_cast<A>(value);
                value = 0;
            }
    }
}

template <typename Lot>
__device__ inline void flush(const MomentUpdate& p, float (&sum)[4][Lot::kColumns][4], const TilePlace& place,
                             const Lot& lot) {
    if (p.acc_dtype == DType::Float64)
        flush<double>(p, sum, place, lot);
    else
        flush<float>(p, sum, place, lot);
}

// ---- bfloat16 and float16 ----

constexpr int kHalfRows = 32;  // rows of a step
constexpr int kHalfPanel = kHalfRows * kPanelPitch;
constexpr size_t kHalfMemory = static_cast<size_t>(kStages) * 2 * kHalfPanel;

template <typename T, int Threads>
__device__ inline void copy_panel(unsigned char* to, const MomentUpdate& p, int64_t first, int64_t column,
                                  bool aligned) {
    constexpr int most = kPiece / static_cast<int>(sizeof(T)), pieces = kTile / most;
    const T* x = static_cast<const T*>(p.x);
    for (int i = static_cast<int>(threadIdx.x); i < kHalfRows * pieces; i += Threads) {
        const int row = i / pieces, piece = i % pieces;
        const int64_t from = column + piece * most;
        const int valid = counts(p, first + row) ? inside(from, p.width, most) : 0;
        copy_piece(to + row * kPanelPitch + piece * kPiece, valid ? x + (first + row) * p.x_row + from : x, valid,
                   aligned);
    }
}

template <typename T>
__global__ void __launch_bounds__(Share<4>::kThreads) update_halves(MomentUpdate p) {
    using Lot = Share<4>;
    unsigned char* memory = dynamic_shared<unsigned char>();
    const Lot lot;
    const TilePlace place = triangle_tile(blockIdx.x, tiles(p.width));
    const bool aligned = in_pieces(p.x, p.x_row * sizeof(T));
    const int64_t steps = (p.rows + kHalfRows - 1) / kHalfRows;

    float sum[4][Lot::kColumns][4] = {};
    const auto copy = [&](int64_t step, int stage) {
        unsigned char* to = memory + stage * 2 * kHalfPanel;
        copy_panel<T, Lot::kThreads>(to, p, step * kHalfRows, place.row * kTile, aligned);
        copy_panel<T, Lot::kThreads>(to + kHalfPanel, p, step * kHalfRows, place.column * kTile, aligned);
    };
    const auto use = [&](int64_t step, int stage) {
        const unsigned char* panels = memory + stage * 2 * kHalfPanel;
#pragma unroll
        for (int k = 0; k < kHalfRows; k += 16) {
            const unsigned char *a = panels + k * kPanelPitch, *b = a + kHalfPanel;
            uint32_t left[4][4];
#pragma unroll
            for (int m = 0; m < 4; ++m) load_left(left[m], a, lot.top + m * 16, lot.lane);
#pragma unroll
            for (int n = 0; n < Lot::kColumns; n += 2) {
                uint32_t right[4];
                load_right(right, b, lot.left + n * 8, lot.lane);
                multiply_pair<T>(sum, n, left, right);
            }
        }
        if (sums_end(p, step, steps, kHalfRows)) flush(p, sum, place, lot);
    };
    staged(steps, copy, use);
}

// ---- float32: x = high + middle + low, each a bfloat16, is exact; so are their products in float ----

constexpr int kWholeRows = 16;
constexpr int kParts = 3;
constexpr int kWholePanel = kWholeRows * kPanelPitch;
constexpr size_t kWholeMemory = size_t{2} * 2 * kParts * kWholePanel;  // buffers, operands
constexpr int kRun = 8;                                                // consecutive numbers a thread splits

// A thread's numbers of a panel on their way from x to shared memory.
struct Carried {
    float at[kRun];

    __device__ void load(const MomentUpdate& p, int64_t first, int64_t column, bool aligned) {
        const int64_t row = first + threadIdx.x / (kTile / kRun);
        column += threadIdx.x % (kTile / kRun) * kRun;
        const int valid = counts(p, row) ? inside(column, p.width, kRun) : 0;
        const float* from = static_cast<const float*>(p.x) + (valid ? row * p.x_row + column : 0);
        if (valid == kRun && aligned) {
            const float4 low = *reinterpret_cast<const float4*>(from),
                         high = *reinterpret_cast<const float4*>(from + 4);
            at[0] = low.x, at[1] = low.y, at[2] = low.z, at[3] = low.w;
            at[4] = high.x, at[5] = high.y, at[6] = high.z, at[7] = high.w;
        } else {
#pragma unroll
            for (int e = 0; e < kRun; ++e) at[e] = e < valid ? from[e] : 0.0f;
        }
    }

    __device__ void store(unsigned char* panel) {
        panel += threadIdx.x / (kTile / kRun) * kPanelPitch + threadIdx.x % (kTile / kRun) * kRun * 2;
#pragma unroll
        for (int part = 0; part < kParts; ++part) {
            struct alignas(kPiece) {
                __nv_bfloat16 at[kRun];
            } rounded;
#pragma unroll
            for (int e = 0; e < kRun; ++e) {
                rounded.at[e] = __float2bfloat16_rn(at[e]);
                at[e] -= __bfloat162float(rounded.at[e]);
            }
            memcpy(panel + part * kWholePanel, &rounded, sizeof rounded);
        }
    }
};

// The products of parts below 2^-24 of the whole are left out. The largest are summed on their own, so that the tensor
// cores' truncation falls on 16 products at a time and the running sums are rounded to nearest.
template <typename Lot>
__device__ inline void multiply_parts(float (&sum)[4][Lot::kColumns][4], const unsigned char* a, const unsigned char* b,
                                      const Lot& lot) {
#pragma unroll
    for (int n = 0; n < Lot::kColumns; n += 2) {
        uint32_t right[kParts][4];
#pragma unroll
        for (int part = 0; part < kParts; ++part)
            load_right(right[part], b + part * kWholePanel, lot.left + n * 8, lot.lane);
#pragma unroll
        for (int m = 0; m < 4; ++m) {
            uint32_t left[kParts][4];
#pragma unroll
            for (int part = 0; part < kParts; ++part)
                load_left(left[part], a + part * kWholePanel, lot.top + m * 16, lot.lane);
            float large[2][4] = {}, small[2][4] = {};
            const auto add = [&](float (&to)[2][4], int i, int j) {
#pragma unroll
                for (int h = 0; h < 2; ++h) {
                    const uint32_t half[2] = {right[j][2 * h], right[j][2 * h + 1]};
                    mma_16x8x16<__nv_bfloat16>(to[h], left[i], half);
                }
            };
            add(small, 2, 0), add(small, 1, 1), add(small, 0, 2), add(large, 0, 0), add(small, 1, 0), add(small, 0, 1);
#pragma unroll
            for (int h = 0; h < 2; ++h)
#pragma unroll
                for (int e = 0; e < 4; ++e) sum[m][n + h][e] += large[h][e], sum[m][n + h][e] += small[h][e];
        }
    }
}

__global__ void __launch_bounds__(Share<8>::kThreads) update_whole(MomentUpdate p) {
    using Lot = Share<8>;
    static_assert(Lot::kThreads * kRun == kWholeRows * kTile);
    unsigned char* memory = dynamic_shared<unsigned char>();
    const Lot lot;
    const TilePlace place = triangle_tile(blockIdx.x, tiles(p.width));
    const bool aligned = in_pieces(p.x, p.x_row * sizeof(float));
    const int64_t steps = (p.rows + kWholeRows - 1) / kWholeRows;

    float sum[4][Lot::kColumns][4] = {};
    Carried a, b;
    const auto load = [&](int64_t step) {
        a.load(p, step * kWholeRows, place.row * kTile, aligned);
        b.load(p, step * kWholeRows, place.column * kTile, aligned);
    };
    const auto operand = [&](int64_t step, int which) {
        return memory + (step % 2 * 2 + which) * kParts * kWholePanel;
    };
    const auto store = [&](int64_t step) { a.store(operand(step, 0)), b.store(operand(step, 1)); };
    load(0), store(0);
    for (int64_t step = 0; step < steps; ++step) {
        __syncthreads();
        if (step + 1 < steps) load(step + 1);
        multiply_parts(sum, operand(step, 0), operand(step, 1), lot);
        if (step + 1 < steps) store(step + 1);
        if (sums_end(p, step, steps, kWholeRows)) flush(p, sum, place, lot);
    }
}

}  // namespace

void moment_update_cuda(const MomentUpdate& params, int device, void* stream) {
    if (params.rows == 0 || params.width == 0) return;
    MomentUpdate p = params;
    p.sum_rows = (std::max<int64_t>(p.sum_rows, 1) + kHalfRows - 1) / kHalfRows * kHalfRows;
    const DeviceGuard guard(device, kOp);
    const auto on = static_cast<cudaStream_t>(stream);
    const unsigned blocks = blocks_for(triangle_tiles(tiles(p.width)), 1, kOp);
    switch (p.x_dtype) {
        case DType::Float32:
            return launch(kOp, {blocks, Share<8>::kThreads, kWholeMemory, on}, update_whole, p);
        case DType::BFloat16:
            return launch(kOp, {blocks, Share<4>::kThreads, kHalfMemory, on}, update_halves<__nv_bfloat16>, p);
        case DType::Float16:
            return launch(kOp, {blocks, Share<4>::kThreads, kHalfMemory, on}, update_halves<__half>, p);
        case DType::Float64:
            throw std::invalid_argument("moment_update on CUDA: float64 rows are multiplied by the vendor's GEMM");
    }
}

}  // namespace knowedit
