// One warp a (row, head): the lanes share the head, and the softmax runs along the chain of segments.
// Run on the CPU in the tests (testing/simt.h); not yet run on a GPU.
#include "tree.cuh"

namespace knowedit {
namespace {

constexpr const char* kOp = "tree_attention";
constexpr int kBlock = 128;

// The weighted sum of the values seen so far.
template <typename T, int N>
struct Softmax {
    using C = Compute<T>;
    static constexpr int kBatch = N > 4 ? 2 : 4;  // keys taken together
    Share<T, N> sum;
    C top = -INFINITY, total = 0;  // largest score, sum of the weights relative to it

    // shift: what is added to the scores, or null
    __device__ __forceinline__ void see(const TreeAttention& p, const C (&product)[kBatch], int64_t count,
                                        const C* shift, const T* v, int64_t stride) {
        C scores[kBatch], highest = top, slope;
#pragma unroll
        for (int b = 0; b < kBatch; ++b) {
            scores[b] = score(p, product[b], slope);
            if (shift && b < count) scores[b] += shift[b];
            if (b < count && scores[b] > highest) highest = scores[b];
        }
        const C keep = top == highest ? C(1) : exp(top - highest);
        top = highest, total *= keep, sum.scale(keep);
#pragma unroll
        for (int b = 0; b < kBatch; ++b) {
            if (b >= count) break;
            const C weight = exp(scores[b] - top);
            total += weight;
            sum.add(weight, v + b * stride, static_cast<int>(p.head_dim));
        }
    }
};

template <typename T, int N>
__global__ void __launch_bounds__(kBlock, 1) attend(TreeAttention p, const int32_t* owner) {
    const int64_t warp = (blockIdx.x * int64_t{kBlock} + threadIdx.x) / kWarp;
    if (warp >= p.rows * p.heads) return;
    const int64_t row = warp / p.heads, head = warp % p.heads, kv_head = head / (p.heads / p.kv_heads);
    const int size = static_cast<int>(p.head_dim), line = owner[row];
    Softmax<T, N> softmax;
    softmax.sum.clear();
    if (line >= 0) {
        Share<T, N> q;
        q.load(queries<T>(p).at(row, head), size);
        begin(p, head, softmax.top, softmax.total);
        const Segment s = p.segments[line];
        for_each_run(p, s, s.position + row - s.query_row, [&](int64_t first, int64_t position, int64_t count) {
            constexpr int kBatch = Softmax<T, N>::kBatch;
            const Compute<T>* shift = bias<Compute<T>>(p, head, position);
            for (int64_t j = 0; j < count; j += kBatch) {
                Compute<T> product[kBatch];
                q.dots(keys<T>(p).at(first + j, kv_head), p.k_row, count - j, size, product);
                softmax.see(p, product, count - j, shift ? shift + j : nullptr, values<T>(p).at(first + j, kv_head),
                            p.v_row);
            }
        });
        softmax.sum.scale(1 / softmax.total);
    }
    softmax.sum.store(static_cast<T*>(p.out) + warp * p.head_dim, size);
}

}  // namespace

void tree_attention_cuda(const TreeAttention& p, int32_t* owner, int device, void* stream) {
    if (p.rows == 0 || p.heads == 0) return;
    const DeviceGuard guard(device, kOp);
    const auto on = static_cast<cudaStream_t>(stream);
    const Grid grid{blocks_for(p.rows * p.heads, kBlock / kWarp, kOp), kBlock, 0, on};
    for_type_and_width(p, kOp, [&](auto type, auto width) {
        claim_rows(p, owner, kOp, on);
        launch(kOp, grid, attend<decltype(type), decltype(width)::value>, p, owner);
    });
}

}  // namespace knowedit
