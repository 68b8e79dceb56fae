// Threads take units (see units.h) in turn; a unit's result depends on nothing else, so neither does the op's on the
// number of threads.
#include "knowedit/tree_attention.h"

#include <algorithm>
#include <cstring>
#include <limits>
#include <type_traits>
#include <vector>

#include "half.h"
#include "isa.h"
#include "parallel.h"
#include "units.h"

namespace knowedit {
namespace {

constexpr int64_t kGrain = 8;              // units a thread takes at a time
constexpr int64_t kNearCache = 512 << 10;  // bytes of keys and values that may be gone through row by row

template <typename T>
using Compute = std::conditional_t<std::is_same_v<T, double>, double, float>;

inline void run(const AttendBodies& bodies, const Attend<float>& a) { bodies.f32(a); }
inline void run(const AttendBodies& bodies, const Attend<double>& a) { bodies.f64(a); }

template <typename T>
class Worker {
  public:
    explicit Worker(const TreeAttention& params) : p(params), bodies(attend_bodies()) {
        if (kWidens) row.resize(2 * p.head_dim);
    }

    void operator()(const Unit& unit) {
        keys.collect(p, unit);
        keys.place(kWidens ? p.head_dim : p.k_row, kWidens ? p.head_dim : p.v_row, kWidens);
        scores.resize(keys.row.size() + kScorePadding);
        const int64_t bytes = 2 * keys.row.size() * p.kv_heads * p.head_dim * sizeof(T);
        if constexpr (!kWidens)
            if (bytes <= kNearCache) return by_row(unit);
        by_head(unit);
    }

  private:
    using C = Compute<T>;
    static constexpr bool kWidens = !std::is_same_v<T, C>;

    // Few keys: they stay in the near cache for all heads, and q, k, v and out are walked through in order.
    void by_row(const Unit& unit) {
        const Segment& s = p.segments[unit.line];
        for (int64_t i = 0; i < unit.count; ++i) {
            if (i + 1 < unit.count) {
                const int64_t next = unit.first + i + 1;
                prefetch(p.q, (s.query_row + next) * p.q_row, p.heads);
                prefetch(p.k, (s.kv_row + next) * p.k_row, p.kv_heads);
                prefetch(p.v, (s.kv_row + next) * p.v_row, p.kv_heads);
            }
            for (int64_t head = 0; head < p.heads; ++head)
                attend_row(unit, head, i, head_of(p.k, head, p.k_head), head_of(p.v, head, p.v_head));
        }
    }

    // Many keys, or keys to widen: one kv head at a time.
    void by_head(const Unit& unit) {
        const int64_t group = p.heads / p.kv_heads;
        const C *k = nullptr, *v = nullptr;
        for (int64_t head = 0; head < p.heads; ++head) {
            if (head % group == 0) {
                k = panel(head_of(p.k, head, p.k_head), p.k_row, k_wide);
                v = panel(head_of(p.v, head, p.v_head), p.v_row, v_wide);
            }
            for (int64_t i = 0; i < unit.count; ++i) attend_row(unit, head, i, k, v);
        }
    }

    const T* head_of(const void* base, int64_t head, int64_t stride) const {
        return static_cast<const T*>(base) + head / (p.heads / p.kv_heads) * stride;
    }

    // A hint only: it assumes that a row's heads lie together.
    void prefetch(const void* base, int64_t at, int64_t heads) const {
        const char* from = reinterpret_cast<const char*>(static_cast<const T*>(base) + at);
        for (size_t b = 0; b < heads * p.head_dim * sizeof(T); b += 64) __builtin_prefetch(from + b, 0, 2);
    }

    void attend_row(const Unit& unit, int64_t head, int64_t i, const C* k, const C* v) {
        const Segment& s = p.segments[unit.line];
        const int64_t query = s.query_row + unit.first + i;
        const auto [begin, end] = keys.seen(p, unit, i);
        const T* q = static_cast<const T*>(p.q) + query * p.q_row + head * p.q_head;
        T* out = static_cast<T*>(p.out) + (query * p.heads + head) * p.head_dim;
        Attend<C> a{};
        a.k = k, a.v = v, a.k_at = keys.k_at.data() + begin, a.v_at = keys.v_at.data() + begin;
        a.count = end - begin, a.d = p.head_dim;
        a.scale = static_cast<C>(p.scale), a.softcap = static_cast<C>(p.softcap), a.scores = scores.data();
        a.sink = p.sinks ? static_cast<const C*>(p.sinks)[head] : -std::numeric_limits<C>::infinity();
        a.bias = p.bias ? static_cast<const C*>(p.bias) + head * p.positions : nullptr;
        a.position = keys.position.data() + begin;
        if constexpr (kWidens) {
            for (int64_t c = 0; c < p.head_dim; ++c) row[c] = widen(q[c]);
            a.q = row.data(), a.out = row.data() + p.head_dim;
            run(bodies, a);
            for (int64_t c = 0; c < p.head_dim; ++c) narrow(a.out[c], out + c);
        } else {
            a.q = q, a.out = out;
            run(bodies, a);
        }
    }

    // The unit's rows of one kv head in the compute type: where they are, or widened into `wide`.
    const C* panel(const T* base, int64_t stride, std::vector<C>& wide) {
        if constexpr (kWidens) {
            wide.resize(keys.row.size() * p.head_dim);
            for (size_t j = 0; j < keys.row.size(); ++j) {
                const T* from = base + keys.row[j] * stride;
                C* to = wide.data() + j * p.head_dim;
                for (int64_t c = 0; c < p.head_dim; ++c) to[c] = widen(from[c]);
            }
            return wide.data();
        } else {
            return base;
        }
    }

    const TreeAttention& p;
    const AttendBodies& bodies;
    Keys keys;
    std::vector<C> row, scores, k_wide, v_wide;  // row: q and out of one head, [2, head_dim]
};

template <typename T>
void attend_all(const TreeAttention& p, const std::vector<Unit>& units, int threads) {
    parallel_for(static_cast<int64_t>(units.size()), kGrain, threads, [&](int64_t begin, int64_t end) {
        Worker<T> worker(p);
        for (int64_t i = begin; i < end; ++i) worker(units[i]);
    });
}

// Rows of no segment.
void zero_idle_rows(const TreeAttention& p) {
    std::vector<char> busy(p.rows);
    for (int64_t line = 0; line < p.segment_count; ++line) {
        const Segment& s = p.segments[line];
        if (s.query_row >= 0) std::fill_n(busy.begin() + s.query_row, s.length, 1);
    }
    const int64_t size = p.heads * p.head_dim * (p.dtype == DType::Float64 ? 8 : p.dtype == DType::Float32 ? 4 : 2);
    for (int64_t row = 0; row < p.rows; ++row)
        if (!busy[row]) std::memset(static_cast<char*>(p.out) + row * size, 0, size);
}

}  // namespace

void tree_attention_cpu(const TreeAttention& p, int threads) {
    zero_idle_rows(p);
    std::vector<Unit> units;
    const int64_t pairs = cut(p, units);
    if (pairs * p.heads * p.head_dim * 2 < kWorthThreads) threads = 1;
    switch (p.dtype) {
        case DType::Float32:
            return attend_all<float>(p, units, threads);
        case DType::Float64:
            return attend_all<double>(p, units, threads);
        case DType::BFloat16:
            return attend_all<BFloat16>(p, units, threads);
        case DType::Float16:
            return attend_all<Float16>(p, units, threads);
    }
}

}  // namespace knowedit
