// target_logprob's kernels against a loop in double.
#include "knowedit/target_logprob.h"
#include "strided.h"

using namespace knowedit;
using cases::require;

namespace {

struct Problem {
    int64_t rows, width, vocab, count;
    int64_t pad = 0, offset = 0;
    bool bias = false;
    double softcap = 0;
    int64_t pieces = 0;  // 0: as many as there should be
};

// [rows, count]; NaN where a target is no token.
template <typename T>
std::vector<double> reference(const Problem& s, cases::Strided<T>& hidden, cases::Strided<T>& weight,
                              cases::Strided<T>& bias, const std::vector<int64_t>& targets) {
    std::vector<double> out;
    for (int64_t r = 0; r < s.rows; ++r) {
        std::vector<double> logits(s.vocab);
        double total = 0, top = -INFINITY;
        for (int64_t t = 0; t < s.vocab; ++t) {
            for (int64_t c = 0; c < s.width; ++c) logits[t] += hidden.value(r, c) * weight.value(t, c);
            if (s.bias) logits[t] += bias.value(0, t);
            if (s.softcap > 0) logits[t] = s.softcap * std::tanh(logits[t] / s.softcap);
            top = std::fmax(top, logits[t]);
        }
        for (double logit : logits) total += std::exp(logit - top);
        for (int64_t j = 0; j < s.count; ++j) {
            const int64_t target = targets[r * s.count + j];
            out.push_back(target < 0 || target >= s.vocab ? NAN : logits[target] - top - std::log(total));
        }
    }
    return out;
}

// Out: of the log-probabilities. Products of halves are exact in float, so they are held to the same.
template <typename T, typename Out>
void check(const Problem& s, double tolerance) {
    std::mt19937 random(static_cast<unsigned>(s.rows * 1000 + s.vocab));
    cases::Strided<T> hidden(s.rows, s.width, s.pad, s.offset), weight(s.vocab, s.width, s.pad, s.offset);
    cases::Strided<T> bias(1, s.vocab);
    hidden.fill(random), weight.fill(random, 1 / std::sqrt(double(s.width))), bias.fill(random);
    std::vector<int64_t> targets(s.rows * s.count);
    for (auto& target : targets) target = static_cast<int64_t>(random() % s.vocab);
    targets.front() = s.vocab - 1;
    if (targets.size() > 2) targets[1] = s.vocab, targets[2] = -1;

    auto out = cases::unwritten<Out>(targets.size());
    const int64_t pieces = s.pieces ? s.pieces : target_logprob_pieces(s.rows, s.vocab);
    auto parts = cases::unwritten<Out>(pieces * s.rows * 2);
    target_logprob_cuda({hidden.data(), weight.data(), s.bias ? bias.data() : nullptr, targets.data(), out.data(),
                         cases::dtype<T>(), s.rows, s.width, s.vocab, s.count, hidden.stride, weight.stride, s.softcap},
                        parts.data(), pieces, 0, nullptr);
    auto truth = reference(s, hidden, weight, bias, targets);
    for (size_t i = 0; i < truth.size(); ++i)
        if (std::isnan(truth[i])) {
            require(std::isnan(out[i]), "target ", targets[i], " of ", s.vocab, " gives ", out[i]);
            truth[i] = out[i] = 0;
        }
    cases::require_close(out, truth, tolerance, "log-probabilities");
}

void check_all(const Problem& problem) {
    check<BFloat16, float>(problem, 3e-6);
    check<Float16, float>(problem, 3e-6);
    check<float, float>(problem, 2e-6);
    check<double, double>(problem, 1e-14);
}

}  // namespace

KNOWEDIT_CASE(target_logprob_smallest) { check_all({1, 1, 1, 1}); }
KNOWEDIT_CASE(target_logprob_two_tiles) { check_all({3, 8, 130, 1, 8, 0, true}); }
KNOWEDIT_CASE(target_logprob_odd_width) { check_all({5, 37, 257, 3, 0, 0, true, 2.0}); }
KNOWEDIT_CASE(target_logprob_many_rows) { check_all({130, 72, 300, 1, 0, 8}); }
KNOWEDIT_CASE(target_logprob_unaligned) { check_all({2, 40, 129, 2, 3, 1, true}); }

KNOWEDIT_CASE(target_logprob_pieces_of_several_tiles) {
    for (int64_t pieces : {1, 2, 3}) check_all({7, 20, 128 * 4 + 5, 2, 4, 0, true, 0, pieces});
}

KNOWEDIT_CASE(target_logprob_rows_beyond_32_bits) {
    cases::FarApart<float> hidden(2), weight(2);
    hidden.at(0, 0) = 1, hidden.at(1, 0) = 2, weight.at(0, 0) = 0.5, weight.at(1, 0) = -0.5;
    const std::vector<int64_t> targets = {0, 1};
    auto out = cases::unwritten<float>(2), parts = cases::unwritten<float>(4);
    target_logprob_cuda({hidden.data(), weight.data(), nullptr, targets.data(), out.data(), DType::Float32, 2, 1, 2, 1,
                         hidden.kStride, weight.kStride, 0},
                        parts.data(), 1, 0, nullptr);
    cases::require_close(out, {-std::log1p(std::exp(-1.0)), -std::log1p(std::exp(2.0))}, 1e-6, "far apart");
}

KNOWEDIT_CASE(target_logprob_launch) {
    require(target_logprob_pieces(1, 50257) == 393, "a piece for each tile of the vocabulary");
    require(target_logprob_pieces(5760, 50257) == 23 && target_logprob_pieces(128 * 1024, 50257) == 1, "fewer pieces");
    require(target_logprob_pieces(1, 1) == 1 && target_logprob_pieces(0, 50257) == 393, "at least one");
    float none[1] = {};
    target_logprob_cuda({none, none, nullptr, nullptr, none, DType::Float32, 0, 4, 4, 1, 4, 4, 0}, none, 1, 0, nullptr);
}
