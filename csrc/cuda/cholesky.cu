// Right-looking, in panels of 256 columns, each in blocks of 64: the block on the diagonal, the rows below it, the rest
// of the panel; then the triangle behind the panel. Compiled in CI and run on the CPU by csrc/testing; not yet run on a
// GPU.
#include <algorithm>
#include <type_traits>

#include "knowedit/cholesky.h"
#include "knowedit/triangle.h"
#include "tile.cuh"

namespace knowedit {
namespace {

constexpr const char* kOp = "cholesky";
constexpr int kBlock = 64;
constexpr int kPanel = 256;  // columns; fewer would move the triangle behind it through memory more often
constexpr int kBlockPitch = kBlock + 1;

template <typename T>
__device__ inline T* matrix(const Cholesky& p) {
    return static_cast<T*>(p.a);
}

// ---- the block on the diagonal ----

constexpr int kFactorThreads = 256;

template <typename T>
__global__ void __launch_bounds__(kFactorThreads) factor_block(Cholesky p, int64_t first) {
    struct Memory {
        T at[kBlock][kBlockPitch];
    };
    if (p.failure->order) return;
    auto& block = block_shared<Memory>().at;
    const int size = p.width - first < kBlock ? static_cast<int>(p.width - first) : kBlock;
    const int row = static_cast<int>(threadIdx.x) % kBlock, lead = static_cast<int>(threadIdx.x) / kBlock;
    constexpr int step = kFactorThreads / kBlock;
    T* a = matrix<T>(p) + first * p.row + first;
    for (int i = lead; i < size; i += step)
        if (row <= i) block[i][row] = a[i * p.row + row];  // here `row` runs along a row of a
    // Columns stay without their root until the end, so that one barrier a column will do.
    for (int k = 0; k < size; ++k) {
        __syncthreads();
        const T pivot = block[k][k];
        if (!(pivot > 0)) {
            if (threadIdx.x == 0) p.failure->order = first + k + 1, p.failure->pivot = pivot;
            return;
        }
        for (int column = k + 1 + lead; column <= row && row < size; column += step)
            block[row][column] -= block[row][k] * block[column][k] / pivot;
    }
    __syncthreads();
    for (int i = lead; i < size; i += step)
        if (row <= i) a[i * p.row + row] = block[i][row] / sqrt(block[row][row]);
}

// ---- the rows below it: X L^T = A, four lanes a row ----

constexpr int kSolveThreads = 128;
constexpr int kRowLanes = 4;
constexpr int kSolveRows = kSolveThreads / kRowLanes;

template <typename T>
__global__ void __launch_bounds__(kSolveThreads) solve_rows(Cholesky p, int64_t first) {
    struct Memory {
        T lower[kBlock][kBlockPitch], inverse[kBlock];
    };
    if (p.failure->order) return;
    auto& memory = block_shared<Memory>();
    for (int i = static_cast<int>(threadIdx.x); i < kBlock * kBlock; i += kSolveThreads) {
        const int r = i / kBlock, c = i % kBlock;
        if (c > r) continue;
        const T value = matrix<T>(p)[(first + r) * p.row + first + c];
        memory.lower[r][c] = value;
        if (c == r) memory.inverse[r] = 1 / value;
    }
    __syncthreads();
    const int lane = static_cast<int>(threadIdx.x) % kRowLanes;
    const int64_t row = first + kBlock + int64_t{blockIdx.x} * kSolveRows + threadIdx.x / kRowLanes;
    const bool there = row < p.width;  // all lanes shuffle
    T* a = matrix<T>(p) + (there ? row : first) * p.row + first;
    T x[kBlock / kRowLanes];  // columns lane, lane + 4, ...
#pragma unroll
    for (int m = 0; m < kBlock / kRowLanes; ++m) x[m] = a[m * kRowLanes + lane];
#pragma unroll
    for (int k = 0; k < kBlock; ++k) {
        const T solved = __shfl_sync(kAllLanes, x[k / kRowLanes], k % kRowLanes, kRowLanes) * memory.inverse[k];
        if (lane == k % kRowLanes) x[k / kRowLanes] = solved;
#pragma unroll
        for (int m = k / kRowLanes; m < kBlock / kRowLanes; ++m) {
            const int column = m * kRowLanes + lane;
            if (column > k) x[m] -= solved * memory.lower[column][k];
        }
    }
#pragma unroll
    for (int m = 0; m < kBlock / kRowLanes; ++m)
        if (there) a[m * kRowLanes + lane] = x[m];
}

// ---- what is behind: a[r][c] -= sum over k of a[r][k] a[c][k], c <= r ----

struct Behind {
    int64_t start, columns;  // rows start .. width; columns start .. start + columns
    int64_t from, depth;     // k from .. from + depth
};

// The products: of float rows those of their TF32 parts.
template <typename T>
using Multiply = std::conditional_t<std::is_same_v<T, float>, SplitProduct, Product<T>>;

// Tiles of the triangle where blockIdx.y is alone, of the first columns otherwise.
template <typename T>
__global__ void __launch_bounds__(Multiply<T>::Lot::kThreads)
    subtract_product(Cholesky p, Behind behind, bool triangle) {
    using Lot = typename Multiply<T>::Lot;
    if (p.failure->order) return;
    const int64_t size = p.width - behind.start;
    const TilePlace place =
        triangle ? triangle_tile(blockIdx.x, tiles(size)) : TilePlace{int64_t{blockIdx.x}, int64_t{blockIdx.y}};
    if (place.column > place.row) return;
    unsigned char* memory = dynamic_shared<unsigned char>();
    const Lot lot;
    const T* panel = matrix<T>(p) + behind.start * p.row + behind.from;
    const bool aligned = in_pieces(panel, p.row * static_cast<int64_t>(sizeof(T)));
    const auto rows = [&](int64_t tile) {
        return Rows<T>{panel + tile * kTile * p.row, p.row, size - tile * kTile, aligned};
    };
    const Rows<T> left = rows(place.row), right = rows(place.column);

    T sum[4][Lot::kColumns][4] = {};
    const auto copy = [&](int64_t step, int stage) {
        unsigned char* to = memory + stage * 2 * kOperand;
        copy_rows<T, Lot::kThreads>(to, left, step * kDepth<T>, behind.depth);
        copy_rows<T, Lot::kThreads>(to + kOperand, right, step * kDepth<T>, behind.depth);
    };
    const auto use = [&](int64_t, int stage) {
        const unsigned char* from = memory + stage * 2 * kOperand;
        Multiply<T>::multiply(sum, from, from + kOperand, lot);
    };
    staged((behind.depth + kDepth<T> - 1) / kDepth<T>, copy, use);
#pragma unroll
    for (int i = 0; i < 8; ++i) {
        const int64_t row = place.row * kTile + lot.row(i);
#pragma unroll
        for (int n = 0; n < Lot::kColumns; ++n)
#pragma unroll
            for (int e = 0; e < 2; ++e) {
                const int64_t column = place.column * kTile + lot.column(n, e);
                if (row < size && column <= row && column < behind.columns)
                    matrix<T>(p)[(behind.start + row) * p.row + behind.start + column] -= sum[i / 2][n][i % 2 * 2 + e];
            }
    }
}

template <typename T>
void subtract(const Cholesky& p, const Behind& behind, cudaStream_t stream) {
    const int64_t size = p.width - behind.start, down = tiles(size), across = tiles(behind.columns);
    const bool triangle = behind.columns == size;
    const dim3 blocks = triangle ? dim3(blocks_for(triangle_tiles(down), 1, kOp))
                                 : dim3(blocks_for(down, 1, kOp), static_cast<unsigned>(across));
    launch(kOp, {blocks, Multiply<T>::Lot::kThreads, kTileMemory, stream}, subtract_product<T>, p, behind, triangle);
}

template <typename T>
void factor(const Cholesky& p, cudaStream_t on) {
    for (int64_t panel = 0; panel < p.width; panel += kPanel) {
        const int64_t end = std::min(panel + kPanel, p.width);
        for (int64_t first = panel; first < end; first += kBlock) {
            const int64_t next = first + kBlock;
            launch(kOp, {1, kFactorThreads, 0, on}, factor_block<T>, p, first);
            if (next >= p.width) break;
            launch(kOp, {blocks_for(p.width - next, kSolveRows, kOp), kSolveThreads, 0, on}, solve_rows<T>, p, first);
            if (next < end) subtract<T>(p, {next, end - next, first, kBlock}, on);
        }
        if (end < p.width) subtract<T>(p, {end, p.width - end, panel, kPanel}, on);
    }
}

}  // namespace

void cholesky_cuda(const Cholesky& p, int device, void* stream) {
    if (p.dtype != DType::Float64 && p.dtype != DType::Float32)
        throw std::invalid_argument("cholesky on CUDA: matrices are float64 or float32");
    const DeviceGuard guard(device, kOp);
    const auto on = static_cast<cudaStream_t>(stream);
    check(cudaMemsetAsync(p.failure, 0, sizeof(CholeskyFailure), on), kOp);
    if (p.dtype == DType::Float64)
        factor<double>(p, on);
    else
        factor<float>(p, on);
}

}  // namespace knowedit
