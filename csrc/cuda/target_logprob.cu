// A block takes 128 rows over a piece of the vocabulary, 128 tokens at a time; a second kernel joins the pieces.
// Compiled in CI and run on the CPU by csrc/testing; not yet run on a GPU.
#include <algorithm>

#include "knowedit/target_logprob.h"
#include "tile.cuh"

namespace knowedit {
namespace {

constexpr const char* kOp = "target_logprob";
constexpr int64_t kBlocks = 1024;  // wanted at least: some for each multiprocessor of any GPU
constexpr int kJoinBlock = 128;

// log sum exp as it grows: the maximum, and the sum of exp(x - maximum).
template <typename S>
struct Running {
    S top = -INFINITY, total = 0;

    __device__ void join(S other_top, S other_total) {
        const S higher = fmax(top, other_top);
        total = total * (top == higher ? S(1) : exp(top - higher)) +
                other_total * (other_top == higher ? S(1) : exp(other_top - higher));
        top = higher;
    }
};

template <typename S>
__device__ inline S quad_max(S x) {
    x = fmax(x, __shfl_xor_sync(kAllLanes, x, 1));
    return fmax(x, __shfl_xor_sync(kAllLanes, x, 2));
}

template <typename S>
__device__ inline S quad_sum(S x) {
    x += __shfl_xor_sync(kAllLanes, x, 1);
    return x + __shfl_xor_sync(kAllLanes, x, 2);
}

template <typename S, int Slices>
struct Partial {  // of the rows of a tile, one for each of the warps beside each other
    S top[Slices][kTile], total[Slices][kTile];
};

// One lane's sums of products become logits: -inf beyond the vocabulary.
template <typename T, typename S, typename Lot>
__device__ inline void to_logits(const TargetLogprob& p, S (&sum)[4][Lot::kColumns][4], int64_t token, const Lot& lot) {
    const T* bias = static_cast<const T*>(p.bias);
    const S cap = static_cast<S>(p.softcap);
#pragma unroll
    for (int n = 0; n < Lot::kColumns; ++n)
#pragma unroll
        for (int e = 0; e < 2; ++e) {
            const int64_t at = token + lot.column(n, e);
            const S shift = bias && at < p.vocab ? static_cast<S>(widen(bias[at])) : S(0);
#pragma unroll
            for (int i = 0; i < 8; ++i) {
                S& logit = sum[i / 2][n][i % 2 * 2 + e];
                logit += shift;
                if (cap > 0) logit = cap * tanh(logit / cap);
                if (at >= p.vocab) logit = -INFINITY;
            }
        }
}

// Writes the logits of the targets that lie in this tile, and each row's maximum and sum over the warp's columns.
template <typename S, typename Lot>
__device__ inline void look(const TargetLogprob& p, const S (&sum)[4][Lot::kColumns][4], int64_t first_row,
                            int64_t token, const Lot& lot, Partial<S, Lot::kSlices>& partial) {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
        const auto logit = [&](int n, int e) { return sum[i / 2][n][i % 2 * 2 + e]; };
        const int64_t row = first_row + lot.row(i);
        for (int64_t j = 0; row < p.rows && j < p.count; ++j) {
            const int64_t target = p.targets[row * p.count + j] - token;
            if (target < lot.left || target >= lot.left + Lot::kColumns * 8) continue;
#pragma unroll
            for (int n = 0; n < Lot::kColumns; ++n)
#pragma unroll
                for (int e = 0; e < 2; ++e)
                    if (lot.column(n, e) == target) static_cast<S*>(p.out)[row * p.count + j] = logit(n, e);
        }
        S top = -INFINITY, total = 0;
#pragma unroll
        for (int n = 0; n < Lot::kColumns; ++n) top = fmax(top, fmax(logit(n, 0), logit(n, 1)));
        top = quad_max(top);
#pragma unroll
        for (int n = 0; n < Lot::kColumns; ++n)
#pragma unroll
            for (int e = 0; e < 2; ++e) total += logit(n, e) == -INFINITY ? S(0) : exp(logit(n, e) - top);
        total = quad_sum(total);
        if (lot.lane % 4 == 0) partial.top[lot.slice][lot.row(i)] = top, partial.total[lot.slice][lot.row(i)] = total;
    }
}

// parts: [rows, pieces, 2]; grid: row tiles x pieces.
template <typename T>
__global__ void __launch_bounds__(Share<Product<T>::kWarps>::kThreads)
    scan_vocabulary(TargetLogprob p, typename Product<T>::Sum* parts, int64_t tiles_a_piece) {
    using Lot = typename Product<T>::Lot;
    using S = typename Product<T>::Sum;
    auto& partial = block_shared<Partial<S, Lot::kSlices>>();
    unsigned char* memory = dynamic_shared<unsigned char>();
    const Lot lot;
    const int64_t first_row = int64_t{blockIdx.x} * kTile;
    const int64_t first = blockIdx.y * tiles_a_piece, count = min(tiles_a_piece, tiles(p.vocab) - first);
    const int64_t depth = max((p.width + kDepth<T> - 1) / kDepth<T>, int64_t{1});  // steps a tile

    const T *hidden = static_cast<const T*>(p.hidden), *weight = static_cast<const T*>(p.weight);
    const bool hidden_aligned = in_pieces(hidden, p.hidden_row * sizeof(T));
    const bool weight_aligned = in_pieces(weight, p.weight_row * sizeof(T));
    const Rows<T> rows{hidden + first_row * p.hidden_row, p.hidden_row, p.rows - first_row, hidden_aligned};

    S sum[4][Lot::kColumns][4] = {};
    Running<S> mine;  // of row threadIdx.x
    const auto copy = [&](int64_t step, int stage) {
        const int64_t token = (first + step / depth) * kTile, k = step % depth * kDepth<T>;
        unsigned char* to = memory + stage * 2 * kOperand;
        copy_rows<T, Lot::kThreads>(to, rows, k, p.width);
        copy_rows<T, Lot::kThreads>(
            to + kOperand, Rows<T>{weight + token * p.weight_row, p.weight_row, p.vocab - token, weight_aligned}, k,
            p.width);
    };
    const auto use = [&](int64_t step, int stage) {
        const unsigned char* from = memory + stage * 2 * kOperand;
        Product<T>::multiply(sum, from, from + kOperand, lot);
        if ((step + 1) % depth) return;
        const int64_t token = (first + step / depth) * kTile;
        to_logits<T>(p, sum, token, lot);
        look(p, sum, first_row, token, lot, partial);
#pragma unroll
        for (auto& m : sum)
#pragma unroll
            for (auto& n : m)
#pragma unroll
                for (S& e : n) e = 0;
        __syncthreads();
        if (threadIdx.x < kTile)
            for (int slice = 0; slice < Lot::kSlices; ++slice)
                mine.join(partial.top[slice][threadIdx.x], partial.total[slice][threadIdx.x]);
    };
    staged(count * depth, copy, use);

    const int64_t row = first_row + threadIdx.x;
    if (threadIdx.x < kTile && row < p.rows) {
        S* to = parts + (row * gridDim.y + blockIdx.y) * 2;
        to[0] = mine.top, to[1] = mine.total;
    }
}

// One warp a row: from the logits of the targets in out to log-probabilities.
template <typename S>
__global__ void join_pieces(TargetLogprob p, const S* parts, int64_t pieces) {
    const int64_t row = (blockIdx.x * int64_t{blockDim.x} + threadIdx.x) / kWarp;
    const int lane = static_cast<int>(threadIdx.x) % kWarp;
    if (row >= p.rows) return;
    Running<S> all;
    for (int64_t piece = lane; piece < pieces; piece += kWarp) {
        const S* part = parts + (row * pieces + piece) * 2;
        all.join(part[0], part[1]);
    }
    for (int offset = kWarp / 2; offset; offset /= 2) {
        const S top = __shfl_xor_sync(kAllLanes, all.top, offset);
        const S total = __shfl_xor_sync(kAllLanes, all.total, offset);
        all.join(top, total);
    }
    S* out = static_cast<S*>(p.out) + row * p.count;
    for (int64_t j = lane; j < p.count; j += kWarp) {
        const int64_t target = p.targets[row * p.count + j];
        out[j] = target >= 0 && target < p.vocab ? out[j] - all.top - log(all.total) : S(NAN);
    }
}

template <typename T>
void run(const TargetLogprob& p, void* workspace, int64_t wanted, cudaStream_t stream) {
    using S = typename Product<T>::Sum;
    S* parts = static_cast<S*>(workspace);
    const int64_t tiles_a_piece = (tiles(p.vocab) + wanted - 1) / wanted;
    const auto pieces = static_cast<unsigned>((tiles(p.vocab) + tiles_a_piece - 1) / tiles_a_piece);
    const dim3 blocks(blocks_for(p.rows, kTile, kOp), pieces);
    launch(kOp, {blocks, Share<Product<T>::kWarps>::kThreads, kTileMemory, stream}, scan_vocabulary<T>, p, parts,
           tiles_a_piece);
    launch(kOp, {blocks_for(p.rows, kJoinBlock / kWarp, kOp), kJoinBlock, 0, stream}, join_pieces<S>, p, parts,
           int64_t{pieces});
}

}  // namespace

int64_t target_logprob_pieces(int64_t rows, int64_t vocab) {
    const int64_t down = std::max<int64_t>(tiles(rows), 1);
    return std::max<int64_t>(std::min((kBlocks + down - 1) / down, tiles(vocab)), 1);
}

void target_logprob_cuda(const TargetLogprob& p, void* parts, int64_t pieces, int device, void* stream) {
    if (p.rows == 0 || p.count == 0) return;
    const DeviceGuard guard(device, kOp);
    const auto on = static_cast<cudaStream_t>(stream);
    switch (p.dtype) {
        case DType::Float32:
            return run<float>(p, parts, pieces, on);
        case DType::Float64:
            return run<double>(p, parts, pieces, on);
        case DType::BFloat16:
            return run<__nv_bfloat16>(p, parts, pieces, on);
        case DType::Float16:
            return run<__half>(p, parts, pieces, on);
    }
}

}  // namespace knowedit
