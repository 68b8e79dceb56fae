// One warp a (row, head): the lanes share the head dimension, and the softmax runs along the chain of segments.
// Compiled in CI; not yet run on a GPU.
#include "common.cuh"
#include "knowedit/tree_attention.h"

namespace knowedit {
namespace {

constexpr const char* kOp = "tree_attention";
constexpr int kBlock = 128;
constexpr int kBatch = 4;  // keys taken together, so that their reductions overlap

__global__ void claim_rows(TreeAttention p, int32_t* owner) {  // owner: [rows], -1 before
    const int line = blockIdx.x;
    const Segment s = p.segments[line];
    if (s.query_row < 0) return;
    for (int64_t i = threadIdx.x; i < s.length && s.query_row + i < p.rows; i += blockDim.x)
        owner[s.query_row + i] = line;
}

// One lane's share of a head: elements lane, lane + 32, ...
template <typename T, int N>
struct Row {
    using C = Compute<T>;
    C q[N], sum[N] = {};
    C top = -INFINITY, total = 0;  // running maximum and sum of the weights

    __device__ void see(const TreeAttention& p, const T* k, const T* v, int64_t count, int lane) {
        for (int64_t j = 0; j < count; j += kBatch) {
            C score[kBatch];
            for (int b = 0; b < kBatch; ++b) {
                score[b] = 0;
                for (int n = 0; n < N; ++n) {
                    const int c = lane + n * kWarp;
                    if (j + b < count && c < p.head_dim) score[b] += q[n] * widen(k[(j + b) * p.k_row + c]);
                }
            }
            for (int offset = kWarp / 2; offset; offset /= 2)
                for (int b = 0; b < kBatch; ++b) score[b] += __shfl_xor_sync(kAllLanes, score[b], offset);
            C highest = top;
            for (int b = 0; b < kBatch; ++b) {
                score[b] *= static_cast<C>(p.scale);
                if (p.softcap > 0) score[b] = static_cast<C>(p.softcap) * tanh(score[b] / static_cast<C>(p.softcap));
                if (j + b < count && score[b] > highest) highest = score[b];
            }
            const C keep = top == highest ? C(1) : exp(top - highest);
            top = highest, total *= keep;
            for (int n = 0; n < N; ++n) sum[n] *= keep;
            for (int b = 0; b < kBatch && j + b < count; ++b) {
                const C weight = exp(score[b] - top);
                total += weight;
                for (int n = 0; n < N; ++n) {
                    const int c = lane + n * kWarp;
                    if (c < p.head_dim) sum[n] += weight * widen(v[(j + b) * p.v_row + c]);
                }
            }
        }
    }
};

template <typename T, int N>
__global__ void attend(TreeAttention p, const int32_t* owner) {
    const int64_t warp = (blockIdx.x * int64_t{blockDim.x} + threadIdx.x) / kWarp;
    const int lane = threadIdx.x % kWarp;
    if (warp >= p.rows * p.heads) return;
    const int64_t row = warp / p.heads, head = warp % p.heads, kv_head = head / (p.heads / p.kv_heads);
    const T* q = static_cast<const T*>(p.q) + row * p.q_row + head * p.q_head;
    const T* k = static_cast<const T*>(p.k) + kv_head * p.k_head;
    const T* v = static_cast<const T*>(p.v) + kv_head * p.v_head;
    T* out = static_cast<T*>(p.out) + warp * p.head_dim;

    Row<T, N> state;
    for (int n = 0; n < N; ++n) {
        const int c = lane + n * kWarp;
        state.q[n] = c < p.head_dim ? widen(q[c]) : Compute<T>(0);
    }
    const int line = owner[row];
    if (line >= 0) {
        Segment s = p.segments[line];
        const int64_t position = s.position + row - s.query_row;
        const int64_t oldest = p.window > 0 ? position - p.window + 1 : 0;
        int64_t limit = position + 1;
        for (int64_t step = 0; step <= p.segment_count; ++step) {  // bounded: a bad table must not hang
            const int64_t begin = max(int64_t{s.position}, oldest), end = min(int64_t{s.position} + s.length, limit);
            const int64_t first = s.kv_row + begin - s.position;
            if (end > begin) state.see(p, k + first * p.k_row, v + first * p.v_row, end - begin, lane);
            limit = min(limit, int64_t{s.position});
            if (s.parent < 0 || limit <= oldest) break;
            s = p.segments[s.parent];
        }
    }
    for (int n = 0; n < N; ++n) {
        const int c = lane + n * kWarp;
        if (c < p.head_dim) narrow(line >= 0 ? state.sum[n] / state.total : Compute<T>(0), out + c);
    }
}

template <typename T, int N>
void launch_width(const TreeAttention& p, const int32_t* owner, cudaStream_t stream) {
    const unsigned blocks = blocks_for(p.rows * p.heads, kBlock / kWarp, kOp);
    launch(kOp, {blocks, kBlock, 0, stream}, attend<T, N>, p, owner);
}

template <typename T>
void launch_for_width(const TreeAttention& p, const int32_t* owner, cudaStream_t stream) {
    if (p.head_dim <= 32) return launch_width<T, 1>(p, owner, stream);
    if (p.head_dim <= 64) return launch_width<T, 2>(p, owner, stream);
    if (p.head_dim <= 96) return launch_width<T, 3>(p, owner, stream);
    if (p.head_dim <= 128) return launch_width<T, 4>(p, owner, stream);
    if (p.head_dim <= 256) return launch_width<T, 8>(p, owner, stream);
    throw std::invalid_argument("tree_attention on CUDA: head dimension " + std::to_string(p.head_dim) +
                                " is above 256");
}

}  // namespace

void tree_attention_cuda(const TreeAttention& p, int32_t* owner, int device, void* stream) {
    if (p.rows == 0) return;
    const DeviceGuard guard(device, kOp);
    const auto on = static_cast<cudaStream_t>(stream);
    check(cudaMemsetAsync(owner, 0xff, p.rows * sizeof(int32_t), on), kOp);
    launch(kOp, {blocks_for(p.segment_count, 1, kOp), kWarp, 0, on}, claim_rows, p, owner);
    switch (p.dtype) {
        case DType::Float32:
            launch_for_width<float>(p, owner, on);
            break;
        case DType::Float64:
            launch_for_width<double>(p, owner, on);
            break;
        case DType::BFloat16:
            launch_for_width<__nv_bfloat16>(p, owner, on);
            break;
        case DType::Float16:
            launch_for_width<__half>(p, owner, on);
            break;
    }
}

}  // namespace knowedit
