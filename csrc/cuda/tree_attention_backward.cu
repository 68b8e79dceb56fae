// Two kernels, in which whoever owns a result computes all of it, so that it does not depend on the order of threads:
// one warp a (row, head) for dq and the row's softmax; one warp a (key row, kv head) for dk and dv, which finds the
// segments that see its key by walking up from those that may, as the rows do.
//     dp = grad.v     ds = p (dp - sum p dp) dscore/d(q.k)     dq = sum ds k     dk = sum ds q     dv = sum p grad
// Run on the CPU in the tests (testing/simt.h); not yet run on a GPU.
#include "tree.cuh"

namespace knowedit {
namespace {

constexpr const char* kOp = "tree_attention_backward";
constexpr int kRowBlock = 128;
constexpr int kBatch = 2;    // keys, or queries, taken together
constexpr int kKeyRows = 8;  // a block's, one for each warp
constexpr int kKeyBlock = kKeyRows * kWarp;

template <typename T>
__device__ __forceinline__ Heads<T> gradients(const TreeAttentionBackward& b) {
    return {static_cast<const T*>(b.grad), b.grad_row, b.grad_head};
}

// ---- dq ----

// Running softmax of a row, without its values.
template <typename C>
struct Normaliser {
    C top = -INFINITY, total = 0, mean = 0;  // mean: of dp, times total

    __device__ __forceinline__ void see(C score, C dp) {
        if (score > top) {
            const C keep = exp(top - score);
            top = score, total *= keep, mean *= keep;
        }
        const C weight = exp(score - top);
        total += weight, mean += weight * dp;
    }
};

template <typename T, int N>
__global__ void __launch_bounds__(kRowBlock, 1) row_gradients(TreeAttentionBackward b, const int32_t* owner) {
    using C = Compute<T>;
    const TreeAttention& p = b.forward;
    const int64_t warp = (blockIdx.x * int64_t{kRowBlock} + threadIdx.x) / kWarp;
    if (warp >= p.rows * p.heads) return;
    const int64_t row = warp / p.heads, head = warp % p.heads, kv_head = head / (p.heads / p.kv_heads);
    const int size = static_cast<int>(p.head_dim), line = owner[row];
    Share<T, N> dq;
    dq.clear();
    if (line >= 0) {
        Share<T, N> q, grad;
        q.load(queries<T>(p).at(row, head), size);
        grad.load(gradients<T>(b).at(row, head), size);
        const Segment s = p.segments[line];
        const int here = s.position + static_cast<int>(row - s.query_row);
        // Calls take(score, slope, dp, key) for every key the row sees.
        const auto for_each_key = [&](auto take) {
            for_each_run(p, s, here, [&](int64_t first, int64_t position, int64_t count) {
                const C* shift = bias<C>(p, head, position);
                for (int64_t j = 0; j < count; j += kBatch) {
                    const T* key = keys<T>(p).at(first + j, kv_head);
                    C product[kBatch], dp[kBatch];
                    q.dots(key, p.k_row, count - j, size, product);
                    grad.dots(values<T>(p).at(first + j, kv_head), p.v_row, count - j, size, dp);
#pragma unroll
                    for (int i = 0; i < kBatch; ++i) {
                        if (j + i >= count) break;
                        C slope;
                        const C s = score(p, product[i], slope);
                        take(shift ? s + shift[j + i] : s, slope, dp[i], key + i * p.k_row);
                    }
                }
            });
        };
        Normaliser<C> normaliser;
        begin(p, head, normaliser.top, normaliser.total);
        for_each_key([&](C score, C, C dp, const T*) { normaliser.see(score, dp); });
        const C log_total = normaliser.top + log(normaliser.total), mean = normaliser.mean / normaliser.total;
        for_each_key([&](C score, C slope, C dp, const T* key) {
            dq.add(exp(score - log_total) * (dp - mean) * slope, key, size);
        });
        C* stats = static_cast<C*>(b.stats) + 2 * warp;  // log of the sum of the weights, mean of dp
        if (threadIdx.x % kWarp == 0) stats[0] = log_total, stats[1] = mean;
    }
    dq.store(static_cast<T*>(b.dq) + warp * p.head_dim, size);
}

// ---- dk and dv ----

// Calls found(s) for each segment s through which rows of segment `asking` see one of the `kv_count` key rows from
// `key`.
template <typename F>
__device__ __forceinline__ void for_each_view(const TreeAttention& p, const Segment& asking, int64_t key,
                                              int64_t kv_count, F found) {
    if (asking.query_row < 0) return;
    Segment s = asking;
    int64_t limit = INT64_MAX;
    for (int64_t step = 0; step <= p.segment_count; ++step) {
        const int64_t end = min(int64_t{s.length}, limit - s.position);  // of the rows of s in sight
        if (key < s.kv_row + end && key + kv_count > s.kv_row) found(s);
        limit = min(limit, int64_t{s.position});
        if (s.parent < 0) return;
        s = p.segments[s.parent];
    }
}

// What the lanes hold of one key row: its key, value and their gradients.
template <typename T, int N>
struct Key {
    using C = Compute<T>;
    Share<T, N> k, v, dk, dv;

    // Adds what rows [begin, end) of q give, in head `head`; the key is at `position`.
    __device__ __forceinline__ void take(const TreeAttentionBackward& b, int64_t begin, int64_t end, int64_t head,
                                         int64_t position) {
        const TreeAttention& p = b.forward;
        const C* at = bias<C>(p, head, position);
        const C shift = at ? *at : C(0);
        const int size = static_cast<int>(p.head_dim);
        for (int64_t row = begin; row < end; row += kBatch) {
            const T *q = queries<T>(p).at(row, head), *grad = gradients<T>(b).at(row, head);
            C product[kBatch], dp[kBatch];
            k.dots(q, p.q_row, end - row, size, product);
            v.dots(grad, b.grad_row, end - row, size, dp);
#pragma unroll
            for (int i = 0; i < kBatch; ++i) {
                if (row + i >= end) break;
                const C* stats = static_cast<const C*>(b.stats) + 2 * ((row + i) * p.heads + head);
                C slope;
                const C weight = exp(score(p, product[i], slope) + shift - stats[0]);
                dv.add(weight, grad + i * b.grad_row, size);
                dk.add(weight * (dp[i] - stats[1]) * slope, q + i * p.q_row, size);
            }
        }
    }
};

struct Votes {
    unsigned of[kKeyRows];
};

// Of each block of key rows the lines of the table that may see one of them: the first, and the one behind the last.
// Short where lines that see the same keys lie near each other; a block then looks at few of them, not at all.
struct Lines {
    int32_t *first, *after;

    __device__ void widen(int64_t block, int64_t line) const {
        atomicMin(first + block, static_cast<int32_t>(line));
        atomicMax(after + block, static_cast<int32_t>(line) + 1);
    }
};

// A thread a line. Blocks are counted from the first row that is not frozen.
static __global__ void find_lines(TreeAttentionBackward b, Lines lines) {
    const TreeAttention& p = b.forward;
    const int64_t line = blockIdx.x * int64_t{blockDim.x} + threadIdx.x;
    if (line >= p.segment_count) return;
    for_each_view(p, p.segments[line], b.frozen, b.kv_rows - b.frozen, [&](const Segment& s) {
        const int64_t first = max(s.kv_row - b.frozen, int64_t{0}), after = s.kv_row + s.length - b.frozen;
        for (int64_t block = first / kKeyRows; block * kKeyRows < after; ++block) lines.widen(block, line);
    });
}

template <typename T, int N>
__global__ void __launch_bounds__(kKeyBlock, 1) key_gradients(TreeAttentionBackward b, Lines lines) {
    const TreeAttention& p = b.forward;
    Votes& votes = block_shared<Votes>();
    const int warp = static_cast<int>(threadIdx.x) / kWarp, size = static_cast<int>(p.head_dim);
    const int64_t first = b.frozen + blockIdx.x * int64_t{kKeyRows}, row = first + warp, head = blockIdx.y;
    const int64_t group = p.heads / p.kv_heads;
    Key<T, N> key;
    if (row < b.kv_rows) {
        key.k.load(keys<T>(p).at(row, head), size);
        key.v.load(values<T>(p).at(row, head), size);
    }
    key.dk.clear(), key.dv.clear();
    const int64_t after = lines.after[blockIdx.x];
    for (int64_t start = lines.first[blockIdx.x]; start < after; start += kKeyBlock) {
        // Which of the next segments see a row of this block: a thread looks at one.
        const int64_t mine = start + threadIdx.x;
        bool sees = false;
        if (mine < after) for_each_view(p, p.segments[mine], first, kKeyRows, [&](const Segment&) { sees = true; });
        const unsigned vote = __ballot_sync(kAllLanes, sees);
        if (threadIdx.x % kWarp == 0) votes.of[warp] = vote;
        __syncthreads();
        for (int word = 0; word < kKeyRows && row < b.kv_rows; ++word) {
            for (unsigned left = votes.of[word]; left; left &= left - 1) {
                const Segment asking = p.segments[start + word * kWarp + __ffs(static_cast<int>(left)) - 1];
                for_each_view(p, asking, row, 1, [&](const Segment& s) {
                    const int64_t position = s.position + row - s.kv_row;
                    int64_t begin = max(int64_t{0}, position - asking.position);
                    int64_t end = min(int64_t{asking.length}, p.rows - asking.query_row);
                    if (p.window > 0) end = min(end, position + p.window - asking.position);
                    for (int64_t h = head * group; h < (head + 1) * group; ++h)
                        key.take(b, asking.query_row + begin, asking.query_row + end, h, position);
                });
            }
        }
        __syncthreads();
    }
    if (row < b.kv_rows) {
        const int64_t at = (row * p.kv_heads + head) * p.head_dim;
        key.dk.store(static_cast<T*>(b.dk) + at, size);
        key.dv.store(static_cast<T*>(b.dv) + at, size);
    }
}

}  // namespace

void tree_attention_backward_cuda(const TreeAttentionBackward& b, int32_t* owner, int device, void* stream) {
    const TreeAttention& p = b.forward;
    const DeviceGuard guard(device, kOp);
    const auto on = static_cast<cudaStream_t>(stream);
    const Grid rows{blocks_for(p.rows * p.heads, kRowBlock / kWarp, kOp), kRowBlock, 0, on};
    const int64_t live = b.kv_rows - b.frozen, blocks = (live + kKeyRows - 1) / kKeyRows;
    const Grid keys{{blocks_for(live, kKeyRows, kOp), static_cast<unsigned>(p.kv_heads)}, kKeyBlock, 0, on};
    const Lines lines{owner + p.rows, owner + p.rows + blocks};
    for_type_and_width(p, kOp, [&](auto type, auto width) {
        using T = decltype(type);
        constexpr int N = decltype(width)::value;
        if (p.rows) claim_rows(p, owner, kOp, on);
        for (void* none : {b.dk, b.dv})
            check(cudaMemsetAsync(none, 0, b.frozen * p.kv_heads * p.head_dim * sizeof(T), on), kOp);
        check(cudaMemsetAsync(lines.first, 0x7f, blocks * sizeof(int32_t), on), kOp);
        check(cudaMemsetAsync(lines.after, 0, blocks * sizeof(int32_t), on), kOp);
        void (*const find)(TreeAttentionBackward, Lines) = find_lines;
        launch(kOp, {blocks_for(p.segment_count, kRowBlock, kOp), kRowBlock, 0, on}, find, b, lines);
        launch(kOp, rows, row_gradients<T, N>, b, owner);
        launch(kOp, keys, key_gradients<T, N>, b, lines);
    });
}

}  // namespace knowedit
