// One block a row: first right^T x, then y gains left times that. Compiled in CI and run on the CPU by csrc/testing;
// not yet run on a GPU.
#include "common.cuh"
#include "knowedit/low_rank_rows.h"

namespace knowedit {
namespace {

constexpr const char* kOp = "low_rank_rows";
constexpr int kThreads = 256;
constexpr int kRanks = 4;  // taken together, so that x is read once for them

template <typename C>
struct Partial {  // sums of the block's warps
    C of[kRanks][kThreads / kWarp];
};

// T: of y and x; F: of the factors. Dynamic shared memory: [rank] sums.
template <typename T, typename F>
__global__ void __launch_bounds__(kThreads) add_products(LowRankRows p) {
    using C = Compute<T>;
    const int64_t row = blockIdx.x, edit = p.index[row];
    if (edit == -1) return;
    T* y = static_cast<T*>(p.y) + row * p.y_row;
    if (edit < 0 || edit >= p.edits) {
        for (int64_t o = threadIdx.x; o < p.d_out; o += kThreads) narrow(static_cast<C>(NAN), y + o);
        return;
    }
    const T* x = static_cast<const T*>(p.x) + row * p.x_row;
    const F* left = static_cast<const F*>(p.left) + edit * p.left_strides.edit;
    const F* right = static_cast<const F*>(p.right) + edit * p.right_strides.edit;
    C* inner = dynamic_shared<C>();
    auto& partial = block_shared<Partial<C>>();
    const int lane = static_cast<int>(threadIdx.x) % kWarp, warp = static_cast<int>(threadIdx.x) / kWarp;

    for (int64_t first = 0; first < p.rank; first += kRanks) {
        C sum[kRanks] = {};
        for (int64_t i = threadIdx.x; i < p.d_in; i += kThreads) {
            const C value = widen(x[i]);
            const F* at = right + i * p.right_strides.width + first * p.right_strides.rank;
#pragma unroll
            for (int j = 0; j < kRanks; ++j)
                if (first + j < p.rank) sum[j] += value * static_cast<C>(widen(at[j * p.right_strides.rank]));
        }
#pragma unroll
        for (int j = 0; j < kRanks; ++j) {
            for (int offset = kWarp / 2; offset; offset /= 2) sum[j] += __shfl_xor_sync(kAllLanes, sum[j], offset);
            if (lane == 0) partial.of[j][warp] = sum[j];
        }
        __syncthreads();
        if (threadIdx.x < kRanks && first + threadIdx.x < p.rank) {
            C total = 0;
            for (const C part : partial.of[threadIdx.x]) total += part;
            inner[first + threadIdx.x] = total;
        }
        __syncthreads();
    }
    for (int64_t o = threadIdx.x; o < p.d_out; o += kThreads) {
        C sum = 0;
        for (int64_t k = 0; k < p.rank; ++k)
            sum += static_cast<C>(widen(left[o * p.left_strides.width + k * p.left_strides.rank])) * inner[k];
        narrow(static_cast<C>(widen(y[o])) + sum, y + o);
    }
}

template <typename T, typename F>
void run(const LowRankRows& p, cudaStream_t stream) {
    const size_t shared = static_cast<size_t>(p.rank) * sizeof(Compute<T>);
    launch(kOp, {blocks_for(p.rows, 1, kOp), kThreads, shared, stream}, add_products<T, F>, p);
}

template <typename T>
void with_factors(const LowRankRows& p, cudaStream_t stream) {
    if (p.factor_dtype == p.dtype) return run<T, T>(p, stream);
    run<T, float>(p, stream);
}

}  // namespace

void low_rank_rows_cuda(const LowRankRows& p, int device, void* stream) {
    if (p.rows == 0 || p.d_out == 0 || p.rank == 0) return;
    const DeviceGuard guard(device, kOp);
    const auto on = static_cast<cudaStream_t>(stream);
    switch (p.dtype) {
        case DType::Float32:
            return with_factors<float>(p, on);
        case DType::Float64:
            return with_factors<double>(p, on);
        case DType::BFloat16:
            return with_factors<__nv_bfloat16>(p, on);
        case DType::Float16:
            return with_factors<__half>(p, on);
    }
}

}  // namespace knowedit
