// Tables of segments, random tensors over them, and tree attention with its gradients as a loop in double.
#pragma once

#include <algorithm>

#include "cases.h"
#include "knowedit/tree_attention.h"

namespace cases {

using knowedit::Segment;
using knowedit::TreeAttention;

struct Tree {
    std::vector<Segment> segments;
    int64_t rows, kv_rows;
};

// Any table the contract allows: gaps, views of the same keys, frozen and empty segments, any order of lines.
inline Tree random_tree(std::mt19937& random, int most, int longest) {
    const auto draw = [&](int low, int high) { return std::uniform_int_distribution<int>(low, high)(random); };
    std::vector<Segment> made;
    int row = 0, kv_rows = 0;
    for (int i = 0, count = draw(1, most); i < count; ++i) {
        const int length = draw(0, longest);
        const bool views = kv_rows > length && draw(0, 4) == 0, frozen = draw(0, 4) == 0;
        Segment s{frozen ? -1 : row, views ? draw(0, kv_rows - length) : kv_rows, draw(0, 9), length, draw(-1, i - 1)};
        kv_rows += views ? 0 : length, row += frozen ? 0 : length;
        made.push_back(s);
    }
    std::vector<int> place(made.size());
    for (size_t i = 0; i < place.size(); ++i) place[i] = static_cast<int>(i);
    std::shuffle(place.begin(), place.end(), random);
    std::vector<Segment> lines(made.size());
    for (size_t i = 0; i < made.size(); ++i) {
        lines[place[i]] = made[i];
        if (made[i].parent >= 0) lines[place[i]].parent = place[made[i].parent];
    }
    return {lines, row + draw(0, 2), kv_rows + draw(0, 2)};
}

struct Shape {
    int64_t heads, kv_heads, head_dim;
    int64_t window = 0;
    double softcap = 0, scale = 0.3;
    bool sinks = false, bias = false;
    bool whole = false;  // strides of whole pieces of 16 bytes, as torch's are
};

// Tensors for a tree, with strides of their own; key rows that nobody sees are NaN.
template <typename T>
struct Problem {
    Tree tree;
    Shape shape;
    std::vector<T> q, k, v;
    std::vector<std::conditional_t<std::is_same_v<T, double>, double, float>> sinks;  // [heads], or empty
    decltype(sinks) bias;                                                             // [heads, positions], or empty
    TreeAttention params;

    Problem(const Tree& tree, const Shape& s, std::mt19937& random) : tree(tree), shape(s) {
        const int64_t pad = s.whole ? 8 : 2, row = s.heads * s.head_dim + (s.whole ? 8 : 3);
        const int64_t kv_head = s.head_dim + pad, kv_row = s.kv_heads * kv_head;
        q = normal<T>(extent(tree.rows, row, s.heads * s.head_dim), random);
        k = normal<T>(extent(tree.kv_rows, kv_row, kv_row - pad), random);
        v = normal<T>(extent(tree.kv_rows, kv_row, kv_row - pad), random);
        std::normal_distribution<float> sink(0, 2);
        for (int64_t h = 0; h < s.heads && s.sinks; ++h) sinks.push_back(sink(random));
        int64_t positions = 0;
        for (const Segment& line : tree.segments) positions = std::max<int64_t>(positions, line.position + line.length);
        for (int64_t i = 0; i < s.heads * positions && s.bias; ++i) bias.push_back(sink(random));
        params = {q.data(),
                  k.data(),
                  v.data(),
                  nullptr,
                  this->tree.segments.data(),
                  dtype<T>(),
                  tree.rows,
                  s.heads,
                  s.kv_heads,
                  s.head_dim,
                  static_cast<int64_t>(this->tree.segments.size()),
                  row,
                  s.head_dim,
                  kv_row,
                  kv_head,
                  kv_row,
                  kv_head,
                  s.scale,
                  s.window,
                  s.softcap,
                  sinks.empty() ? nullptr : sinks.data(),
                  bias.empty() ? nullptr : bias.data(),
                  positions};
        const std::vector<char> seen = seen_keys();
        for (int64_t r = 0; r < tree.kv_rows; ++r)
            for (int64_t c = 0; c < kv_row - pad && !seen[r]; ++c)
                knowedit::narrow(NAN, &k[r * kv_row + c]), knowedit::narrow(NAN, &v[r * kv_row + c]);
    }
    Problem(const Problem&) = delete;

    std::vector<char> seen_keys() const {
        std::vector<char> seen(tree.kv_rows);
        for_each_query([&](int64_t, const std::vector<int64_t>& keys, const std::vector<int64_t>&) {
            for (int64_t key : keys) seen[key] = 1;
        });
        return seen;
    }

    // Calls f(row of q, key rows it sees, their positions) for every row of a segment.
    template <typename F>
    void for_each_query(F f) const {
        for (const Segment& asking : tree.segments) {
            for (int64_t i = 0; i < asking.length && asking.query_row >= 0; ++i) {
                const int64_t position = asking.position + i;
                std::vector<int64_t> keys, positions;
                int64_t limit = position + 1;
                for (const Segment* s = &asking; s; s = s->parent < 0 ? nullptr : &tree.segments[s->parent]) {
                    for (int64_t j = s->position; j < s->position + s->length; ++j)
                        if (j < limit && (shape.window == 0 || position - shape.window < j))
                            keys.push_back(s->kv_row + j - s->position), positions.push_back(j);
                    limit = std::min<int64_t>(limit, s->position);
                }
                f(asking.query_row + i, keys, positions);
            }
        }
    }

    double at(const std::vector<T>& from, int64_t row_stride, int64_t head_stride, int64_t row, int64_t head,
              int64_t c) const {
        return value(from[row * row_stride + head * head_stride + c]);
    }
    double query(int64_t row, int64_t head, int64_t c) const {
        return at(q, params.q_row, params.q_head, row, head, c);
    }
    double key(int64_t row, int64_t head, int64_t c) const { return at(k, params.k_row, params.k_head, row, head, c); }
    double val(int64_t row, int64_t head, int64_t c) const { return at(v, params.v_row, params.v_head, row, head, c); }

    // Calls f(row, head, kv head, keys, probability of each, d score / d q.k of each).
    template <typename F>
    void for_each_softmax(F f) const {
        for_each_query([&](int64_t row, const std::vector<int64_t>& keys, const std::vector<int64_t>& positions) {
            for (int64_t h = 0; h < shape.heads; ++h) {
                const int64_t kv = h / (shape.heads / shape.kv_heads);
                std::vector<double> p, slope;
                double top = -INFINITY, total = 0;
                for (size_t j = 0; j < keys.size(); ++j) {
                    double dot = 0;
                    for (int64_t c = 0; c < shape.head_dim; ++c) dot += query(row, h, c) * key(keys[j], kv, c);
                    double score = shape.scale * dot, rise = shape.scale;
                    if (shape.softcap > 0) {
                        const double bent = std::tanh(score / shape.softcap);
                        score = shape.softcap * bent, rise *= 1 - bent * bent;
                    }
                    if (!bias.empty()) score += bias[h * params.positions + positions[j]];
                    p.push_back(score), slope.push_back(rise), top = std::max(top, score);
                }
                if (!sinks.empty()) top = std::max<double>(top, sinks[h]), total = std::exp(sinks[h] - top);
                for (double& x : p) total += x = std::exp(x - top);
                for (double& x : p) x /= total;
                f(row, h, kv, keys, p, slope);
            }
        });
    }

    std::vector<double> attention() const {
        std::vector<double> out(tree.rows * shape.heads * shape.head_dim);
        for_each_softmax([&](int64_t row, int64_t h, int64_t kv, const std::vector<int64_t>& keys,
                             const std::vector<double>& p, const std::vector<double>&) {
            for (size_t j = 0; j < keys.size(); ++j)
                for (int64_t c = 0; c < shape.head_dim; ++c)
                    out[(row * shape.heads + h) * shape.head_dim + c] += p[j] * val(keys[j], kv, c);
        });
        return out;
    }

    struct Gradients {
        std::vector<double> q, k, v;
    };
    Gradients gradients(const std::vector<T>& up) const {  // up: contiguous
        const int64_t d = shape.head_dim;
        Gradients to{std::vector<double>(tree.rows * shape.heads * d),
                     std::vector<double>(tree.kv_rows * shape.kv_heads * d),
                     std::vector<double>(tree.kv_rows * shape.kv_heads * d)};
        for_each_softmax([&](int64_t row, int64_t h, int64_t kv, const std::vector<int64_t>& keys,
                             const std::vector<double>& p, const std::vector<double>& slope) {
            const T* grad = up.data() + (row * shape.heads + h) * d;
            std::vector<double> dp(keys.size());
            double mean = 0;
            for (size_t j = 0; j < keys.size(); ++j) {
                for (int64_t c = 0; c < d; ++c) dp[j] += value(grad[c]) * val(keys[j], kv, c);
                mean += p[j] * dp[j];
            }
            for (size_t j = 0; j < keys.size(); ++j) {
                const double ds = p[j] * (dp[j] - mean) * slope[j];
                const int64_t at = (keys[j] * shape.kv_heads + kv) * d;
                for (int64_t c = 0; c < d; ++c) {
                    to.q[(row * shape.heads + h) * d + c] += ds * key(keys[j], kv, c);
                    to.k[at + c] += ds * query(row, h, c);
                    to.v[at + c] += p[j] * value(grad[c]);
                }
            }
        });
        return to;
    }

  private:
    static int64_t extent(int64_t rows, int64_t stride, int64_t width) {
        return rows ? (rows - 1) * stride + width : 0;
    }
};

// Within `tolerance` of the largest element (of 1 where all are smaller: terms that cancel are).
template <typename T>
void require_near(const std::vector<T>& got, const std::vector<double>& truth, double tolerance, const char* what) {
    double largest = 1;
    for (double x : truth) largest = std::max(largest, std::abs(x));
    require_close(got, truth, tolerance, what, largest);
}

// Trees small and large, head sizes that do not fill a warp, grouped heads, windows, soft-caps: calls
// check(tree, shape, random).
template <typename F>
void for_each_problem(F check) {
    std::mt19937 random(11);
    const Shape shapes[] = {{1, 1, 1},
                            {2, 2, 5, 2, 0, .3, true},
                            {4, 2, 33, 0, 1.5},
                            {5, 1, 64, 3, 0.5, 1.0, false, false, true},
                            {2, 1, 96, 0, 0, 1, false, false, true},
                            {1, 1, 127, 1, 30.0, .3, true},
                            {2, 1, 200},
                            {1, 1, 256, 4, 0, .3, false, false, true},
                            {4, 2, 9, 0, 0, .3, false, true},
                            {2, 1, 40, 3, 1.5, .3, true, true, true}};
    for (const Shape& shape : shapes) {
        check(random_tree(random, 8, 6), shape, random);
        check(random_tree(random, 3, 9), shape, random);
    }
    // A shared ancestor and more segments than a block looks at in one go.
    Tree wide{{{0, 0, 0, 5, -1}}, 5, 5};
    for (int i = 0; i < 300; ++i) {
        wide.segments.push_back({static_cast<int>(wide.rows), static_cast<int>(wide.kv_rows), 1 + i % 4, i % 2, 0});
        wide.rows += i % 2, wide.kv_rows += i % 2;
    }
    check(wide, {2, 1, 3}, random);
}

}  // namespace cases
