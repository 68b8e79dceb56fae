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
    const Vec<T, 4> ab = __builtin_shufflevector(a, b, 0, 4, 2, 6) + __builtin_shufflevector(a, b, 1, 5, 3, 7);
    const Vec<T, 4> cd = __builtin_shufflevector(c, d, 0, 4, 2, 6) + __builtin_shufflevector(c, d, 1, 5, 3, 7);
    return __builtin_shufflevector(ab, cd, 0, 1, 4, 5) + __builtin_shufflevector(ab, cd, 2, 3, 6, 7);
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

// out[from:d] = factor * sum_j weight[j] v_j[from:d], U vectors of W lanes at a time, then fewer and narrower ones.
template <int W, int U, typename T>
inline void mix(const Attend<T>& a, T factor, int64_t from) {
    for (; from + W * U <= a.d; from += W * U) {
        Vec<T, W> sum[U] = {};
        for (int64_t j = 0; j < a.count; ++j) {
            const T weight = a.scores[j];
            const T* value = a.v + a.v_at[j] + from;
            for (int u = 0; u < U; ++u) sum[u] += weight * load<W>(value + u * W);
        }
        for (int u = 0; u < U; ++u) store(a.out + from + u * W, sum[u] * factor);
    }
    if (from == a.d) return;
    if constexpr (U > 1) {
        mix<W, U / 2>(a, factor, from);
    } else if constexpr (W > 4) {
        mix<W / 2, 1>(a, factor, from);
    } else {
        for (; from < a.d; ++from) {
            T sum = 0;
            for (int64_t j = 0; j < a.count; ++j) sum += a.scores[j] * a.v[a.v_at[j] + from];
            a.out[from] = sum * factor;
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

template <int W, typename T>
void attend(const Attend<T>& a) {
    int64_t j = 0;
    for (; j < a.count; j += 4) {  // a short last group repeats the last key
        const int64_t last = a.count - 1;
        const T* key[4];
        for (int64_t i = 0; i < 4; ++i) key[i] = a.k + a.k_at[j + i < last ? j + i : last];
        Vec<T, 4> sum{};
        dots<W>(a.q, key, 0, a.d, sum);
        store(a.scores + j, sum * a.scale);
    }
    Vec<T, W> top = Vec<T, W>{} - (T)INFINITY;
    for (j = a.count; j % W; ++j) a.scores[j] = -INFINITY;
    for (j = 0; j < a.count; j += W) {
        Vec<T, W> x = load<W>(a.scores + j);
        if (a.softcap > 0) {
            const Vec<T, W> bent = tanh_lanes<W>(x / a.softcap) * a.softcap;
            x = x == (T)-INFINITY ? x : bent;
            store(a.scores + j, x);
        }
        top = x > top ? x : top;
    }
    T highest = top[0];
    for (int i = 1; i < W; ++i) highest = top[i] > highest ? top[i] : highest;
    Vec<T, W> total{};
    for (j = 0; j < a.count; j += W) {
        const Vec<T, W> weight = exp_lanes<W>(load<W>(a.scores + j) - highest);
        store(a.scores + j, weight);
        total += weight;
    }
    const Vec<T, 4> part = fold<T>(total);
    mix<W, 4>(a, T(1) / ((part[0] + part[1]) + (part[2] + part[3])), 0);
}

void attend_f32(const Attend<float>& a) { attend<KNOWEDIT_LANES>(a); }
void attend_f64(const Attend<double>& a) { attend<(KNOWEDIT_LANES > 8 ? 8 : KNOWEDIT_LANES)>(a); }

}  // namespace

extern const AttendBodies KNOWEDIT_NAME(attend);
const AttendBodies KNOWEDIT_NAME(attend) = {attend_f32, attend_f64};

}  // namespace knowedit
