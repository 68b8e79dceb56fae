// Built several times with different -m flags (see CMakeLists.txt); KNOWEDIT_ISA names the build. Everything but the
// table at the end is local, and no standard template is used: the linker must not share code between the builds.
//
// Both products go through tiles of N rows, so that a factor is read once for N rows. How a row is summed does not
// depend on its tile.
#include "low_rank.h"

#include "lanes.h"

namespace knowedit {
namespace {

// inner[n][k] = x_n . right_k for N rows and K components.
template <int W, int N, int K, typename T>
inline void dots(const LowRank<T>& a, const int64_t* at, int64_t k) {
    const T *right = a.right + k * a.right_step, *x[N];
    for (int n = 0; n < N; ++n) x[n] = a.x + at[n] * a.x_row;
    Vec<T, W> sum[N][K] = {};
    int64_t i = 0;
    for (; i + W <= a.d_in; i += W) {
        Vec<T, W> component[K];
        for (int c = 0; c < K; ++c) component[c] = load<W>(right + c * a.right_step + i);
        for (int n = 0; n < N; ++n) {
            const Vec<T, W> value = load<W>(x[n] + i);
            for (int c = 0; c < K; ++c) sum[n][c] += value * component[c];
        }
    }
    for (int n = 0; n < N; ++n)
        for (int c = 0; c < K; ++c) {
            const Vec<T, 4> part = fold<T>(sum[n][c]);
            T total = (part[0] + part[1]) + (part[2] + part[3]);
            for (int64_t j = i; j < a.d_in; ++j) total += x[n][j] * right[c * a.right_step + j];
            a.inner[n * a.rank + k + c] = total;
        }
}

// y_n[from:] += sum_k inner[n][k] left_k[from:] for N rows, U vectors of W lanes at a time, then fewer.
template <int W, int U, int N, typename T>
inline void mix(const LowRank<T>& a, const int64_t* at, int64_t from) {
    T* y[N];
    for (int n = 0; n < N; ++n) y[n] = a.y + at[n] * a.y_row;
    for (; from + W * U <= a.d_out; from += W * U) {
        Vec<T, W> sum[N][U] = {};
        for (int64_t k = 0; k < a.rank; ++k) {
            const T* left = a.left + k * a.left_step + from;
            for (int u = 0; u < U; ++u) {
                const Vec<T, W> component = load<W>(left + u * W);
                for (int n = 0; n < N; ++n) sum[n][u] += a.inner[n * a.rank + k] * component;
            }
        }
        for (int n = 0; n < N; ++n)
            for (int u = 0; u < U; ++u) {
                T* to = y[n] + from + u * W;
                store(to, load<W>(to) + sum[n][u]);
            }
    }
    if constexpr (U > 1) {
        mix<W, U / 2, N>(a, at, from);
    } else {
        for (; from < a.d_out; ++from)
            for (int n = 0; n < N; ++n) {
                T sum = 0;
                for (int64_t k = 0; k < a.rank; ++k) sum += a.inner[n * a.rank + k] * a.left[k * a.left_step + from];
                y[n][from] += sum;
            }
    }
}

template <int W, int N, typename T>
void tile(const LowRank<T>& a, int64_t row) {
    constexpr int K = KNOWEDIT_LANES > 8 ? 4 : 2;  // N * K sums stay in registers
    const int64_t* at = a.at + row;
    int64_t k = 0;
    for (; k + K <= a.rank; k += K) dots<W, N, K>(a, at, k);
    for (; k < a.rank; ++k) dots<W, N, 1>(a, at, k);
    mix<W, K, N>(a, at, 0);
}

template <int W, typename T>
void low_rank(const LowRank<T>& a) {
    int64_t row = 0;
    for (; row + kTileRows <= a.rows; row += kTileRows) tile<W, kTileRows>(a, row);
    for (; row < a.rows; ++row) tile<W, 1>(a, row);
}

void low_rank_f32(const LowRank<float>& a) { low_rank<KNOWEDIT_LANES>(a); }
void low_rank_f64(const LowRank<double>& a) { low_rank<(KNOWEDIT_LANES > 8 ? 8 : KNOWEDIT_LANES)>(a); }

}  // namespace

extern const LowRankBodies KNOWEDIT_NAME(low_rank);
const LowRankBodies KNOWEDIT_NAME(low_rank) = {low_rank_f32, low_rank_f64};

}  // namespace knowedit
