// Each thread has some of the kv heads and goes through all units (see units.h): no two threads add to the same keys,
// and the result does not depend on how many there are. Probabilities are computed again.
#include <algorithm>
#include <limits>
#include <vector>

#include "isa.h"
#include "parallel.h"
#include "units.h"

namespace knowedit {
namespace {

inline void run(const AttendBodies& bodies, const AttendBackward<float>& b) { bodies.backward_f32(b); }
inline void run(const AttendBodies& bodies, const AttendBackward<double>& b) { bodies.backward_f64(b); }

template <typename T>
class Worker {
  public:
    explicit Worker(const TreeAttentionBackward& params)
        : g(params), p(params.forward), bodies(attend_bodies()), group(p.heads / p.kv_heads) {}

    void operator()(const Unit& unit, int64_t first_head, int64_t end_head) {  // kv heads
        keys.collect(p, unit);
        keys.place(p.k_row, p.v_row, false);
        grad_at.resize(keys.row.size());
        for (size_t j = 0; j < keys.row.size(); ++j) grad_at[j] = keys.row[j] * p.kv_heads * p.head_dim;
        padded = static_cast<int64_t>(keys.row.size()) + kScorePadding;
        scratch.resize(3 * padded);
        for (int64_t i = 0; i < unit.count; ++i)
            for (int64_t head = first_head * group; head < end_head * group; ++head) row(unit, i, head, head / group);
    }

  private:
    void row(const Unit& unit, int64_t i, int64_t head, int64_t kv_head) {
        const int64_t query = p.segments[unit.line].query_row + unit.first + i;
        const auto [begin, end] = keys.seen(p, unit, i);
        AttendBackward<T> b{};
        b.forward.q = static_cast<const T*>(p.q) + query * p.q_row + head * p.q_head;
        b.forward.k = static_cast<const T*>(p.k) + kv_head * p.k_head;
        b.forward.v = static_cast<const T*>(p.v) + kv_head * p.v_head;
        b.forward.k_at = keys.k_at.data() + begin, b.forward.v_at = keys.v_at.data() + begin;
        b.forward.count = end - begin, b.forward.d = p.head_dim;
        b.forward.scale = static_cast<T>(p.scale), b.forward.softcap = static_cast<T>(p.softcap);
        b.forward.sink = p.sinks ? static_cast<const T*>(p.sinks)[head] : -std::numeric_limits<T>::infinity();
        b.forward.bias = p.bias ? static_cast<const T*>(p.bias) + head * p.positions : nullptr;
        b.forward.position = keys.position.data() + begin;
        b.forward.scores = scratch.data(), b.padded = padded;
        b.forward.out = static_cast<T*>(g.dq) + (query * p.heads + head) * p.head_dim;
        b.up = static_cast<const T*>(g.grad) + query * g.grad_row + head * g.grad_head;
        b.grad_at = grad_at.data() + begin, b.live = g.frozen * p.kv_heads * p.head_dim;
        b.dk = static_cast<T*>(g.dk) + kv_head * p.head_dim;
        b.dv = static_cast<T*>(g.dv) + kv_head * p.head_dim;
        run(bodies, b);
    }

    const TreeAttentionBackward& g;
    const TreeAttention& p;
    const AttendBodies& bodies;
    const int64_t group;  // heads a kv head
    Keys keys;
    std::vector<int64_t> grad_at;
    std::vector<T> scratch;
    int64_t padded = 0;
};

template <typename T>
void add_all(const TreeAttentionBackward& g, int threads) {
    const TreeAttention& p = g.forward;
    const int64_t kv_size = g.kv_rows * p.kv_heads * p.head_dim;
    std::fill_n(static_cast<T*>(g.dq), p.rows * p.heads * p.head_dim, T(0));
    std::fill_n(static_cast<T*>(g.dk), kv_size, T(0));
    std::fill_n(static_cast<T*>(g.dv), kv_size, T(0));
    std::vector<Unit> units;
    const int64_t pairs = cut(p, units);
    if (threads < 1 || pairs * p.heads * p.head_dim * 5 < kWorthThreads) threads = 1;
    parallel_for(p.kv_heads, (p.kv_heads + threads - 1) / threads, threads, [&](int64_t begin, int64_t end) {
        Worker<T> worker(g);
        for (const Unit& unit : units) worker(unit, begin, end);
    });
}

}  // namespace

void tree_attention_backward_cpu(const TreeAttentionBackward& params, int threads) {
    params.forward.dtype == DType::Float64 ? add_all<double>(params, threads) : add_all<float>(params, threads);
}

}  // namespace knowedit
