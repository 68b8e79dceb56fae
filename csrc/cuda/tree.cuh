// What tree_attention's kernels share: which keys a row sees, a head spread over the lanes of a warp, scores.
#pragma once

#include "common.cuh"
#include "knowedit/tree_attention.h"

namespace knowedit {

// owner: [rows], -1 before; the segment of each row. One block a segment.
static __global__ void claim_rows(TreeAttention p, int32_t* owner) {
    const Segment s = p.segments[blockIdx.x];
    if (s.query_row < 0) return;
    for (int64_t i = threadIdx.x; i < s.length && s.query_row + i < p.rows; i += blockDim.x)
        owner[s.query_row + i] = static_cast<int32_t>(blockIdx.x);
}

// Calls see(first key row, its position, count) for the keys that the row at `position` of segment `s` sees, nearest
// segment first.
template <typename F>
__device__ __forceinline__ void for_each_run(const TreeAttention& p, Segment s, int position, F see) {
    const int oldest = p.window > 0 && p.window <= position ? position - static_cast<int>(p.window) + 1 : 0;
    const int most = static_cast<int>(p.segment_count);
    int limit = position + 1;
    for (int step = 0; step <= most; ++step) {  // bounded: a bad table must not hang
        const int begin = max(s.position, oldest), end = min(s.position + s.length, limit);
        if (end > begin) see(s.kv_row + (begin - s.position), begin, end - begin);
        limit = min(limit, s.position);
        if (s.parent < 0 || limit <= oldest) return;
        s = p.segments[s.parent];
    }
}

// Heads of q, or of a tensor shaped like it, in rows; those of k and v.
template <typename T>
struct Heads {
    const T* base;
    int64_t row, head;  // strides, in elements

    __device__ const T* at(int64_t r, int64_t h) const { return base + r * row + h * head; }
};
template <typename T>
__device__ __forceinline__ Heads<T> queries(const TreeAttention& p) {
    return {static_cast<const T*>(p.q), p.q_row, p.q_head};
}
template <typename T>
__device__ __forceinline__ Heads<T> keys(const TreeAttention& p) {
    return {static_cast<const T*>(p.k), p.k_row, p.k_head};
}
template <typename T>
__device__ __forceinline__ Heads<T> values(const TreeAttention& p) {
    return {static_cast<const T*>(p.v), p.v_row, p.v_head};
}

// A lane's share of one head: elements lane, lane + 32, ...; zero beyond the head.
template <typename T, int N>
struct Share {
    using C = Compute<T>;
    C at[N];

    __device__ __forceinline__ void load(const T* from, int size) {
#pragma unroll
        for (int n = 0; n < N; ++n) at[n] = element(n) < size ? C(widen(from[element(n)])) : C(0);
    }
    __device__ __forceinline__ void clear() { scale(0); }
    __device__ __forceinline__ void scale(C factor) {
#pragma unroll
        for (int n = 0; n < N; ++n) at[n] = factor == 0 ? C(0) : at[n] * factor;
    }
    __device__ __forceinline__ void add(C weight, const T* from, int size) {
#pragma unroll
        for (int n = 0; n < N; ++n)
            if (element(n) < size) at[n] += weight * widen(from[element(n)]);
    }
    __device__ __forceinline__ void store(T* to, int size) const {
#pragma unroll
        for (int n = 0; n < N; ++n)
            if (element(n) < size) narrow(at[n], to + element(n));
    }
    // product[b] = this . from[b * stride], in every lane; that of b = 0 for b >= count. B at a time, so that their
    // reductions overlap.
    template <int B>
    __device__ __forceinline__ void dots(const T* from, int64_t stride, int64_t count, int size,
                                         C (&product)[B]) const {
#pragma unroll
        for (int b = 0; b < B; ++b) {
            const T* here = from + (b < count ? b * stride : 0);
            product[b] = 0;
#pragma unroll
            for (int n = 0; n < N; ++n)
                if (element(n) < size) product[b] += at[n] * widen(here[element(n)]);
        }
#pragma unroll
        for (int offset = kWarp / 2; offset; offset /= 2)
#pragma unroll
            for (int b = 0; b < B; ++b) product[b] += __shfl_xor_sync(kAllLanes, product[b], offset);
    }

  private:
    __device__ static __forceinline__ int element(int n) { return static_cast<int>(threadIdx.x) % kWarp + n * kWarp; }
};

// The score of a product q.k, and in `slope` its derivative by it.
template <typename C>
__device__ __forceinline__ C score(const TreeAttention& p, C product, C& slope) {
    slope = static_cast<C>(p.scale);
    const C plain = product * slope;
    if (!(p.softcap > 0)) return plain;
    const C cap = static_cast<C>(p.softcap), bent = tanh(plain / cap);
    slope *= 1 - bent * bent;
    return cap * bent;
}

// What is added to a head's scores of keys from `position` on; null where nothing is.
template <typename C>
__device__ __forceinline__ const C* bias(const TreeAttention& p, int64_t head, int64_t position) {
    return p.bias ? static_cast<const C*>(p.bias) + head * p.positions + position : nullptr;
}

// What a head's softmax starts from: its sink, whose weight is 1, or nothing.
template <typename C>
__device__ __forceinline__ void begin(const TreeAttention& p, int64_t head, C& top, C& total) {
    if (p.sinks) top = static_cast<const C*>(p.sinks)[head], total = 1;
}

// Calls f(T{}, std::integral_constant<int, N>{}) for the element type and the elements a lane holds of a head.
template <typename T, typename F>
void for_width(int64_t head_dim, const char* op, F f) {
    if (head_dim <= 32) return f(T{}, std::integral_constant<int, 1>{});
    if (head_dim <= 64) return f(T{}, std::integral_constant<int, 2>{});
    if (head_dim <= 96) return f(T{}, std::integral_constant<int, 3>{});
    if (head_dim <= 128) return f(T{}, std::integral_constant<int, 4>{});
    if (head_dim <= 256) return f(T{}, std::integral_constant<int, 8>{});
    throw std::invalid_argument(std::string(op) + " on CUDA: head dimension " + std::to_string(head_dim) +
                                " is above 256");
}
template <typename F>
void for_type_and_width(const TreeAttention& p, const char* op, F f) {
    switch (p.dtype) {
        case DType::Float32:
            return for_width<float>(p.head_dim, op, f);
        case DType::Float64:
            return for_width<double>(p.head_dim, op, f);
        case DType::BFloat16:
            return for_width<__nv_bfloat16>(p.head_dim, op, f);
        case DType::Float16:
            return for_width<__half>(p.head_dim, op, f);
    }
}

inline void claim_rows(const TreeAttention& p, int32_t* owner, const char* op, cudaStream_t stream) {
    check(cudaMemsetAsync(owner, 0xff, p.rows * sizeof(int32_t), stream), op);
    void (*const kernel)(TreeAttention, int32_t*) = claim_rows;
    launch(op, {blocks_for(p.segment_count, 1, op), kWarp, 0, stream}, kernel, p, owner);
}

}  // namespace knowedit
