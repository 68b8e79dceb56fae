// Built several times with different -m flags (see CMakeLists.txt); KNOWEDIT_ISA names the build. Everything but the
// table at the end is local, and no standard template is used: the linker must not share code between the builds.
#include "attend.h"

#include <cmath>

#include "lanes.h"

namespace knowedit {
namespace {

// Four vectors to the vector of their four sums.
template <typename T>
inline Vec<T, 4> sums(Vec<T, 4> a, Vec<T, 4> b, Vec<T, 4> c, Vec<T, 4> d) {
    const Vec<T, 4> ab = pick<T, 0, 4, 2, 6>(a, b) + pick<T, 1, 5, 3, 7>(a, b);
    const Vec<T, 4> cd = pick<T, 0, 4, 2, 6>(c, d) + pick<T, 1, 5, 3, 7>(c, d);
    return pick<T, 0, 1, 4, 5>(ab, cd) + pick<T, 2, 3, 6, 7>(ab, cd);
}

// sum[i] += q[from:d] . key[i][from:d] for four keys.
template <int W, typename T>
inline void dots(const T* q, const T* const* key, int64_t from, int64_t d, Vec<T, 4>& sum) {
    if (from + W <= d) {
        Vec<T, W> a{}, b{}, c{}, e{};
        for (; from + W <= d; from += W) {
            const Vec<T, W> x = load<W>(q + from);
            a += x * load<W>(key[0] + from);
            b += x * load<W>(key[1] + from);
            c += x * load<W>(key[2] + from);
            e += x * load<W>(key[3] + from);
        }
        sum += sums<T>(fold<T>(a), fold<T>(b), fold<T>(c), fold<T>(e));
    }
    if constexpr (W > 4) {
        if (from < d) dots<W / 2>(q, key, from, d, sum);
    } else {
        for (; from < d; ++from)
            for (int i = 0; i < 4; ++i) sum[i] += q[from] * key[i][from];
    }
}

// to[j] = factor * x.row_j for the rows at `at`; up to three more entries of `to` are written.
template <int W, typename T>
inline void products(const T* x, const T* rows, const int64_t* at, int64_t count, int64_t d, T factor, T* to) {
    for (int64_t j = 0; j < count; j += 4) {  // a short last group repeats the last row
        const int64_t last = count - 1;
        const T* row[4];
        for (int64_t i = 0; i < 4; ++i) row[i] = rows + at[j + i < last ? j + i : last];
        Vec<T, 4> sum{};
        dots<W>(x, row, 0, d, sum);
        store(to + j, sum * factor);
    }
}

// out[from:d] = factor * sum_j weight[j] row_j[from:d], U vectors of W lanes at a time, then fewer and narrower ones.
template <int W, int U, typename T>
inline void mix(const T* weight, const T* rows, const int64_t* at, int64_t count, int64_t d, T factor, T* out,
                int64_t from) {
    for (; from + W * U <= d; from += W * U) {
        Vec<T, W> sum[U] = {};
        for (int64_t j = 0; j < count; ++j) {
            const T* row = rows + at[j] + from;
            for (int u = 0; u < U; ++u) sum[u] += weight[j] * load<W>(row + u * W);
        }
        for (int u = 0; u < U; ++u) store(out + from + u * W, sum[u] * factor);
    }
    if (from == d) return;
    if constexpr (U > 1) {
        mix<W, U / 2>(weight, rows, at, count, d, factor, out, from);
    } else if constexpr (W > 4) {
        mix<W / 2, 1>(weight, rows, at, count, d, factor, out, from);
    } else {
        for (; from < d; ++from) {
            T sum = 0;
            for (int64_t j = 0; j < count; ++j) sum += weight[j] * rows[at[j] + from];
            out[from] = sum * factor;
        }
    }
}

// e^x for x <= 0, within 2 ulp: 2^n e^r with |r| <= ln 2 / 2 and a degree-6 polynomial; 0 becomes 1e-38 far out.
template <int W>
inline Vec<float, W> exp_lanes(Vec<float, W> x) {
    typedef int32_t Int __attribute__((vector_size(W * 4)));
    x = x < -87.0f ? Vec<float, W>{} - 87.0f : x;
    const float rounder = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
    const Vec<float, W> n = (x * 1.44269504088896341f + rounder) - rounder;
    const Vec<float, W> r = (x - n * 0.693359375f) - n * -2.12194440e-4f;
    Vec<float, W> p = r * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * (r * r) + r + 1.0f;
    const Int power = (__builtin_convertvector(n, Int) + 127) << 23;
    return p * (Vec<float, W>)power;
}
template <int W>
inline Vec<double, W> exp_lanes(Vec<double, W> x) {
    for (int i = 0; i < W; ++i) x[i] = std::exp(x[i]);
    return x;
}

// tanh: an odd polynomial near 0, where 1 - 2 / (e^2x + 1) would cancel.
template <int W>
inline Vec<float, W> tanh_lanes(Vec<float, W> x) {
    const Vec<float, W> size = x < 0.0f ? -x : x, z = x * x;
    const Vec<float, W> decay = exp_lanes<W>(size * -2.0f);
    const Vec<float, W> far = (1.0f - decay) / (1.0f + decay);
    Vec<float, W> p = z * -5.70498872745e-3f + 2.06390887954e-2f;
    p = p * z - 5.37397155531e-2f;
    p = p * z + 1.33314422036e-1f;
    p = p * z - 3.33332819422e-1f;
    return size < 0.625f ? p * z * x + x : (x < 0.0f ? -far : far);
}
template <int W>
inline Vec<double, W> tanh_lanes(Vec<double, W> x) {
    for (int i = 0; i < W; ++i) x[i] = std::tanh(x[i]);
    return x;
}

// scores[j] = scale * q.k_j, bent when there is a softcap; -inf in the padding.
template <int W, typename T>
inline void score(const Attend<T>& a) {
    products<W>(a.q, a.k, a.k_at, a.count, a.d, a.scale, a.scores);
    for (int64_t j = a.count; j % W; ++j) a.scores[j] = -INFINITY;
    if (a.softcap == 0) return;
    for (int64_t j = 0; j < a.count; j += W) {
        const Vec<T, W> x = load<W>(a.scores + j), bent = tanh_lanes<W>(x / a.softcap) * a.softcap;
        store(a.scores + j, x == (T)-INFINITY ? x : bent);
    }
}

// Scores become e^(score + bias - highest); their sum, with the sink's, is returned.
template <int W, typename T>
inline T exponentiate(const Attend<T>& a) {
    if (a.bias)
        for (int64_t j = 0; j < a.count; ++j) a.scores[j] += a.bias[a.position[j]];
    Vec<T, W> top = Vec<T, W>{} - (T)INFINITY;
    for (int64_t j = 0; j < a.count; j += W) {
        const Vec<T, W> x = load<W>(a.scores + j);
        top = x > top ? x : top;
    }
    T highest = top[0];
    for (int i = 1; i < W; ++i) highest = top[i] > highest ? top[i] : highest;
    const bool sunk = a.sink > -(T)INFINITY;
    if (sunk && a.sink > highest) highest = a.sink;
    Vec<T, W> total{};
    for (int64_t j = 0; j < a.count; j += W) {
        const Vec<T, W> weight = exp_lanes<W>(load<W>(a.scores + j) - highest);
        store(a.scores + j, weight);
        total += weight;
    }
    const Vec<T, 4> part = fold<T>(total);
    const T sum = (part[0] + part[1]) + (part[2] + part[3]);
    return sunk ? sum + exp_lanes<4>(Vec<T, 4>{} + (a.sink - highest))[0] : sum;
}

template <int W, typename T>
void attend(const Attend<T>& a) {
    score<W>(a);
    const T factor = T(1) / exponentiate<W>(a);
    mix<W, 4>(a.scores, a.v, a.v_at, a.count, a.d, factor, a.out, 0);
}

// to[0:d] += weight * x
template <int W, typename T>
inline void add(T weight, const T* x, int64_t d, T* to) {
    int64_t c = 0;
    for (; c + W <= d; c += W) store(to + c, load<W>(to + c) + weight * load<W>(x + c));
    for (; c < d; ++c) to[c] += weight * x[c];
}

// With p = softmax(s) (a sink's share is nobody's): dv_j += p_j up, ds_j = p_j (up.v_j - sum_i p_i up.v_i), dq = sum_j
// ds_j s'_j k_j, dk_j += ds_j s'_j q.
template <int W, typename T>
void attend_backward(const AttendBackward<T>& b) {
    const Attend<T>& a = b.forward;
    T *const p = a.scores, *const slope = p + b.padded, *const ds = slope + b.padded;
    score<W>(a);
    for (int64_t j = 0; j < a.count; ++j) {
        const T bent = a.softcap == 0 ? T(0) : p[j] / a.softcap;
        slope[j] = a.scale * (1 - bent * bent);
    }
    const T factor = T(1) / exponentiate<W>(a);
    products<W>(b.up, a.v, a.v_at, a.count, a.d, T(1), ds);
    T mean = 0;
    for (int64_t j = 0; j < a.count; ++j) {
        p[j] *= factor;
        mean += p[j] * ds[j];
    }
    for (int64_t j = 0; j < a.count; ++j) {
        ds[j] = p[j] * (ds[j] - mean) * slope[j];
        if (b.grad_at[j] < b.live) continue;
        add<W>(ds[j], a.q, a.d, b.dk + b.grad_at[j]);
        add<W>(p[j], b.up, a.d, b.dv + b.grad_at[j]);
    }
    mix<W, 4>(ds, a.k, a.k_at, a.count, a.d, T(1), a.out, 0);
}

constexpr int kDoubles = KNOWEDIT_LANES > 8 ? 8 : KNOWEDIT_LANES;

void attend_f32(const Attend<float>& a) { attend<KNOWEDIT_LANES>(a); }
void attend_f64(const Attend<double>& a) { attend<kDoubles>(a); }
void attend_backward_f32(const AttendBackward<float>& b) { attend_backward<KNOWEDIT_LANES>(b); }
void attend_backward_f64(const AttendBackward<double>& b) { attend_backward<kDoubles>(b); }

}  // namespace

extern const AttendBodies KNOWEDIT_NAME(attend);
const AttendBodies KNOWEDIT_NAME(attend) = {attend_f32, attend_f64, attend_backward_f32, attend_backward_f64};

}  // namespace knowedit
