// Rows are cut into units: up to kUnitRows rows of one edit, wherever they are. Threads take units in turn; a row's
// result depends on nothing else, so neither does the op's on the number of threads.
#include "knowedit/low_rank_rows.h"

#include <algorithm>
#include <type_traits>
#include <vector>

#include "half.h"
#include "isa.h"
#include "parallel.h"

namespace knowedit {
namespace {

constexpr int64_t kUnitRows = 8;
constexpr int64_t kGrain = 16;              // units a thread takes at a time
constexpr int64_t kLine = 16;               // elements of a component copied at a time: a cache line
constexpr int64_t kWorthThreads = 1 << 21;  // multiply-adds below which starting threads costs more than it brings

struct Unit {
    int64_t edit;
    const int64_t* rows;
    int64_t count;
};

inline void run(const LowRankBodies& bodies, const LowRank<float>& a) { bodies.f32(a); }
inline void run(const LowRankBodies& bodies, const LowRank<double>& a) { bodies.f64(a); }

// One edit's factor as components [rank, width] of the compute type C, each contiguous: in place, or copied.
template <typename F, typename C>
class Components {
  public:
    Components(const void* factor, const FactorStrides& strides, int64_t width, int64_t rank)
        : factor(static_cast<const F*>(factor)), strides(strides), width(width), rank(rank) {}

    const C* of(int64_t edit) {
        const F* from = factor + edit * strides.edit;
        if constexpr (std::is_same_v<F, C>)
            if (strides.width == 1 || width == 1) return from;
        if (edit != copied_edit) copy(from);
        copied_edit = edit;
        return copied.data();
    }

    int64_t step() const { return copied_edit < 0 ? strides.rank : width; }

  private:
    void copy(const F* from) {
        copied.resize(rank * width);
        for (int64_t first = 0; first < width; first += kLine)
            for (int64_t k = 0; k < rank; ++k)
                for (int64_t i = first; i < std::min(first + kLine, width); ++i)
                    copied[k * width + i] = static_cast<C>(widen(from[i * strides.width + k * strides.rank]));
    }

    const F* factor;
    FactorStrides strides;
    int64_t width, rank;
    int64_t copied_edit = -1;  // stays -1 when components are used in place
    std::vector<C> copied;
};

template <typename T, typename F>
class Worker {
  public:
    explicit Worker(const LowRankRows& params)
        : p(params),
          bodies(low_rank_bodies()),
          left(p.left, p.left_strides, p.d_out, p.rank),
          right(p.right, p.right_strides, p.d_in, p.rank),
          inner(kTileRows * p.rank) {
        if (kWidens) wide.resize(kUnitRows * (p.d_in + p.d_out));
    }

    void operator()(const Unit& unit) {
        LowRank<C> a{};
        a.left = left.of(unit.edit), a.left_step = left.step();
        a.right = right.of(unit.edit), a.right_step = right.step();
        a.rows = unit.count, a.rank = p.rank, a.d_in = p.d_in, a.d_out = p.d_out;
        a.inner = inner.data();
        if constexpr (kWidens) {
            a.x = wide.data(), a.x_row = p.d_in, a.at = kInOrder;
            a.y = wide.data() + kUnitRows * p.d_in, a.y_row = p.d_out;
            for (int64_t n = 0; n < unit.count; ++n) {
                const T *x = static_cast<const T*>(p.x) + unit.rows[n] * p.x_row, *y = row_of_y(unit, n);
                for (int64_t i = 0; i < p.d_in; ++i) wide[n * p.d_in + i] = widen(x[i]);
                for (int64_t i = 0; i < p.d_out; ++i) a.y[n * p.d_out + i] = widen(y[i]);
            }
            run(bodies, a);
            for (int64_t n = 0; n < unit.count; ++n)
                for (int64_t i = 0; i < p.d_out; ++i) narrow(a.y[n * p.d_out + i], row_of_y(unit, n) + i);
        } else {
            a.x = static_cast<const T*>(p.x), a.x_row = p.x_row, a.at = unit.rows;
            a.y = static_cast<T*>(p.y), a.y_row = p.y_row;
            run(bodies, a);
        }
    }

  private:
    using C = std::conditional_t<std::is_same_v<T, double>, double, float>;  // compute type
    static constexpr bool kWidens = !std::is_same_v<T, C>;
    static constexpr int64_t kInOrder[kUnitRows] = {0, 1, 2, 3, 4, 5, 6, 7};

    T* row_of_y(const Unit& unit, int64_t n) const { return static_cast<T*>(p.y) + unit.rows[n] * p.y_row; }

    const LowRankRows& p;
    const LowRankBodies& bodies;
    Components<F, C> left, right;
    std::vector<C> inner, wide;  // wide: a unit's rows of x and y
};

// Rows in the order of their edits (a counting sort: equal ones stay in order), and where each edit's begin.
struct ByEdit {
    std::vector<int64_t> begin, rows;

    explicit ByEdit(const LowRankRows& p) : begin(p.edits + 1), rows(p.rows) {
        for (int64_t row = 0; row < p.rows; ++row)
            if (p.index[row] >= 0) ++begin[p.index[row] + 1];
        for (int64_t edit = 0; edit < p.edits; ++edit) begin[edit + 1] += begin[edit];
        std::vector<int64_t> next = begin;
        for (int64_t row = 0; row < p.rows; ++row)
            if (p.index[row] >= 0) rows[next[p.index[row]]++] = row;
    }

    std::vector<Unit> units() const {
        std::vector<Unit> found;
        for (size_t edit = 0; edit + 1 < begin.size(); ++edit)
            for (int64_t first = begin[edit]; first < begin[edit + 1]; first += kUnitRows)
                found.push_back(
                    {static_cast<int64_t>(edit), &rows[first], std::min(kUnitRows, begin[edit + 1] - first)});
        return found;
    }
};

template <typename T, typename F>
void add_all(const LowRankRows& p, int threads) {
    const ByEdit sorted(p);
    const std::vector<Unit> units = sorted.units();
    if (sorted.begin.back() * p.rank * (p.d_in + p.d_out) < kWorthThreads) threads = 1;
    parallel_for(static_cast<int64_t>(units.size()), kGrain, threads, [&](int64_t begin, int64_t end) {
        Worker<T, F> worker(p);
        for (int64_t i = begin; i < end; ++i) worker(units[i]);
    });
}

template <typename T>
void with_factors(const LowRankRows& p, int threads) {
    if (p.factor_dtype == p.dtype) return add_all<T, T>(p, threads);
    add_all<T, float>(p, threads);
}

}  // namespace

void low_rank_rows_cpu(const LowRankRows& p, int threads) {
    if (p.rank == 0 || p.d_out == 0) return;
    switch (p.dtype) {
        case DType::Float32:
            return with_factors<float>(p, threads);
        case DType::Float64:
            return with_factors<double>(p, threads);
        case DType::BFloat16:
            return with_factors<BFloat16>(p, threads);
        case DType::Float16:
            return with_factors<Float16>(p, threads);
    }
}

}  // namespace knowedit
