// A head spread over the eight lanes of a group, four groups a warp, in pieces of 16 bytes.
#pragma once

#include <cstring>

#include "common.cuh"

namespace knowedit {

constexpr int kLanes = 8;
constexpr int kGroups = kWarp / kLanes;

template <typename T>
constexpr int kEach = 16 / static_cast<int>(sizeof(T));  // numbers of a piece

// N pieces a lane: piece n of lane l holds numbers (n * kLanes + l) * kEach on, zero beyond the head. Whole: every
// piece lies within the head or beyond it, and at a multiple of 16 bytes.
template <typename T, int N, bool Whole>
struct Pieces {
    using C = Compute<T>;
    static constexpr int kStep = kLanes * kEach<T>;
    C at[N][kEach<T>];

    // Where this lane's first piece begins, in numbers.
    __device__ static __forceinline__ int first() { return static_cast<int>(threadIdx.x) % kLanes * kEach<T>; }

    // from, to: where this lane's first piece begins; left: numbers from there to the end of the head.
    __device__ __forceinline__ void load(const T* from, int left) {
#pragma unroll
        for (int n = 0; n < N; ++n) {
            T x[kEach<T>];
            read(x, from + n * kStep, left - n * kStep);
#pragma unroll
            for (int e = 0; e < kEach<T>; ++e) at[n][e] = widen(x[e]);
        }
    }
    __device__ __forceinline__ void clear() {
#pragma unroll
        for (int n = 0; n < N; ++n)
#pragma unroll
            for (int e = 0; e < kEach<T>; ++e) at[n][e] = 0;
    }
    __device__ __forceinline__ void scale(C factor) {
#pragma unroll
        for (int n = 0; n < N; ++n)
#pragma unroll
            for (int e = 0; e < kEach<T>; ++e) at[n][e] *= factor;
    }
    // This lane's part of the product with another head.
    __device__ __forceinline__ C product(const T* from, int left) const {
        C sum = 0;
#pragma unroll
        for (int n = 0; n < N; ++n) {
            T x[kEach<T>];
            read(x, from + n * kStep, left - n * kStep);
#pragma unroll
            for (int e = 0; e < kEach<T>; ++e) sum += at[n][e] * widen(x[e]);
        }
        return sum;
    }
    __device__ __forceinline__ void add(C weight, const T* from, int left) {
#pragma unroll
        for (int n = 0; n < N; ++n) {
            T x[kEach<T>];
            read(x, from + n * kStep, left - n * kStep);
#pragma unroll
            for (int e = 0; e < kEach<T>; ++e) at[n][e] += weight * widen(x[e]);
        }
    }
    __device__ __forceinline__ void store(T* to, int left) const {
#pragma unroll
        for (int n = 0; n < N; ++n, to += kStep, left -= kStep) {
            T x[kEach<T>];
#pragma unroll
            for (int e = 0; e < kEach<T>; ++e) narrow(at[n][e], x + e);
            if constexpr (Whole) {
                if (left > 0) {
                    float4 bits;
                    memcpy(&bits, x, 16);
                    *reinterpret_cast<float4*>(to) = bits;
                }
            } else {
#pragma unroll
                for (int e = 0; e < kEach<T>; ++e)
                    if (e < left) to[e] = x[e];
            }
        }
    }

  private:
    __device__ static __forceinline__ void read(T (&x)[kEach<T>], const T* from, int left) {
        memset(x, 0, sizeof x);
        if constexpr (Whole) {
            if (left > 0) {
                const float4 bits = *reinterpret_cast<const float4*>(from);
                memcpy(x, &bits, 16);
            }
        } else {
#pragma unroll
            for (int e = 0; e < kEach<T>; ++e)
                if (e < left) x[e] = from[e];
        }
    }
};

// The lanes of this thread's group.
__device__ __forceinline__ unsigned group_lanes() {
    constexpr unsigned all = (1u << kLanes) - 1;
    return all << (threadIdx.x % kWarp / kLanes * kLanes);
}

// The sums over a group, in each of its lanes; B at a time, so that they overlap.
template <int B, typename C>
__device__ __forceinline__ void sum_over_group(C (&x)[B], unsigned lanes) {
#pragma unroll
    for (int offset = kLanes / 2; offset; offset /= 2)
#pragma unroll
        for (int b = 0; b < B; ++b) x[b] += __shfl_xor_sync(lanes, x[b], offset);
}

}  // namespace knowedit
