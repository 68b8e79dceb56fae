// Eight lanes a (row, head), four heads of a row a warp: the lanes share the head in pieces of 16 bytes, and the
// softmax runs along the chain of segments. Run on the CPU in the tests (testing/simt.h); not yet run on a GPU.
#include "pieces.cuh"
#include "tree.cuh"

namespace knowedit {
namespace {

constexpr const char* kOp = "tree_attention";
constexpr int kBlock = 128;
constexpr int kRows = kBlock / kWarp;  // a block's, one for each warp

// The weighted sum of the values seen so far.
template <typename T, int N, bool Whole>
struct Softmax {
    using C = Compute<T>;
    static constexpr int kBatch = N > 8 ? 1 : N > 4 ? 2 : 4;  // keys taken together
    Pieces<T, N, Whole> sum;
    C top = -INFINITY, total = 0;  // largest score, sum of the weights relative to it

    // Values from v on, `count` of them at least one. shift: what is added to the scores, or null; left: see `Pieces`.
    __device__ __forceinline__ void see(const TreeAttention& p, const C (&product)[kBatch], int count, const C* shift,
                                        const T* v, int left) {
        C scores[kBatch], highest = top, slope;
#pragma unroll
        for (int b = 0; b < kBatch; ++b) {
            scores[b] = score(p, product[b], slope);
            if (shift && b < count) scores[b] += shift[b];
            if (b >= count) scores[b] = -INFINITY;
            highest = max(highest, scores[b]);
        }
        const C keep = top == highest ? C(1) : exp(top - highest);
        top = highest, total *= keep, sum.scale(keep);
#pragma unroll
        for (int b = 0; b < kBatch; ++b) {
            if (b >= count) break;
            const C weight = exp(scores[b] - top);
            total += weight;
            sum.add(weight, v + b * p.v_row, left);
        }
    }
};

template <typename T, int N, bool Whole>
__global__ void __launch_bounds__(kBlock, 1) attend(TreeAttention p, const int32_t* owner) {
    using Head = Pieces<T, N, Whole>;
    using Values = Softmax<T, N, Whole>;
    constexpr int kBatch = Values::kBatch;
    const int thread = static_cast<int>(threadIdx.x), heads = static_cast<int>(p.heads);
    const int64_t row = int64_t{blockIdx.x} * kRows + thread / kWarp;
    const int head = static_cast<int>(blockIdx.y) * kGroups + thread % kWarp / kLanes;
    if (row >= p.rows || head >= heads) return;
    const int kv_head = p.heads == p.kv_heads ? head : head / (heads / static_cast<int>(p.kv_heads));
    const int first = Head::first(), left = static_cast<int>(p.head_dim) - first, line = owner[row];
    const unsigned lanes = group_lanes();
    Values softmax;
    softmax.sum.clear();
    if (line >= 0) {
        Head q;
        q.load(queries<T>(p).at(row, head) + first, left);
        begin(p, head, softmax.top, softmax.total);
        const Segment s = p.segments[line];
        const T *keys_of_head = keys<T>(p).at(0, kv_head) + first,
                *values_of_head = values<T>(p).at(0, kv_head) + first;
        for_each_run(p, s, s.position + static_cast<int>(row - s.query_row), [&](int key, int position, int count) {
            const T *k = keys_of_head + key * p.k_row, *v = values_of_head + key * p.v_row;
            const Compute<T>* shift = bias<Compute<T>>(p, head, position);
            for (; count > 0; count -= kBatch, k += kBatch * p.k_row, v += kBatch * p.v_row) {
                Compute<T> product[kBatch];
#pragma unroll
                for (int b = 0; b < kBatch; ++b) product[b] = q.product(b < count ? k + b * p.k_row : k, left);
                sum_over_group(product, lanes);
                softmax.see(p, product, count, shift, v, left);
                if (shift) shift += kBatch;
            }
        });
        softmax.sum.scale(1 / softmax.total);
    }
    softmax.sum.store(static_cast<T*>(p.out) + (row * p.heads + head) * p.head_dim + first, left);
}

// Whether every piece of 16 bytes lies within a head or beyond it, at a multiple of 16 bytes.
template <typename T>
bool whole(const TreeAttention& p) {
    const int64_t strides = p.q_row | p.q_head | p.k_row | p.k_head | p.v_row | p.v_head | p.head_dim;
    const auto places = reinterpret_cast<uintptr_t>(p.q) | reinterpret_cast<uintptr_t>(p.k) |
                        reinterpret_cast<uintptr_t>(p.v) | reinterpret_cast<uintptr_t>(p.out);
    return strides % kEach<T> == 0 && places % 16 == 0;
}

// The pieces a lane holds of heads up to HeadDim.
template <typename T, int HeadDim>
using PiecesOf = std::integral_constant<int, (HeadDim + kLanes * kEach<T> - 1) / (kLanes * kEach<T>)>;

// Calls f(T{}, pieces a lane holds, whether they are whole).
template <typename T, typename F>
void for_pieces(const TreeAttention& p, F f) {
    if (p.head_dim > 256)
        throw std::invalid_argument(std::string(kOp) + " on CUDA: head dimension " + std::to_string(p.head_dim) +
                                    " is above 256");
    if (!whole<T>(p)) return f(T{}, PiecesOf<T, 256>{}, std::false_type{});
    if (p.head_dim <= 64) return f(T{}, PiecesOf<T, 64>{}, std::true_type{});
    if (p.head_dim <= 128) return f(T{}, PiecesOf<T, 128>{}, std::true_type{});
    return f(T{}, PiecesOf<T, 256>{}, std::true_type{});
}

}  // namespace

void tree_attention_cuda(const TreeAttention& p, int32_t* owner, int device, void* stream) {
    if (p.rows == 0 || p.heads == 0) return;
    const DeviceGuard guard(device, kOp);
    const auto on = static_cast<cudaStream_t>(stream);
    const Grid grid{{blocks_for(p.rows, kRows, kOp), blocks_for(p.heads, kGroups, kOp)}, kBlock, 0, on};
    const auto run = [&](auto type, auto pieces, auto aligned) {
        claim_rows(p, owner, kOp, on);
        launch(kOp, grid, attend<decltype(type), decltype(pieces)::value, decltype(aligned)::value>, p, owner);
    };
    switch (p.dtype) {
        case DType::Float32:
            return for_pieces<float>(p, run);
        case DType::Float64:
            return for_pieces<double>(p, run);
        case DType::BFloat16:
            return for_pieces<__nv_bfloat16>(p, run);
        case DType::Float16:
            return for_pieces<__half>(p, run);
    }
}

}  // namespace knowedit
