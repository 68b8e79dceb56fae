// restore_rows' kernels against indexing in double.
#include "knowedit/restore_rows.h"
#include "simt.h"
#include "strided.h"

using namespace knowedit;

namespace {

template <typename T, typename S>
void check(int64_t width, int64_t count, bool add) {
    std::mt19937 random(static_cast<unsigned>(width * 8 + count));
    const int64_t rows = count + 3, row_stride = width + 5, sources = 4, source_stride = width + 2;
    auto hidden = cases::normal<T>(rows * row_stride, random);
    const auto source = cases::normal<S>((sources - 1) * source_stride + width, random);
    std::vector<int64_t> to(rows), from(count);
    for (int64_t i = 0; i < rows; ++i) to[i] = i;
    std::shuffle(to.begin(), to.end(), random);
    to.resize(count), to.shrink_to_fit();
    for (int64_t& row : from) row = static_cast<int64_t>(random() % sources);

    std::vector<double> truth = cases::wide(hidden);
    for (int64_t i = 0; i < count; ++i)
        for (int64_t c = 0; c < width; ++c) {
            double& x = truth[to[i] * row_stride + c];
            x = (add ? x : 0) + cases::value(source[from[i] * source_stride + c]);
        }
    RestoreRows p{hidden.data(), to.data(),  source.data(), from.data(), cases::dtype<T>(), cases::dtype<S>(), count,
                  width,         row_stride, source_stride, add};
    restore_rows_cuda(p, 1, &random);
    const double tolerance = std::is_same_v<T, S> && !add ? 0 : cases::epsilon<T>();
    cases::require_close(hidden, truth, tolerance, add ? "a sum" : "a copy", 0);
    for (const simt::Launch& launch : simt::launches()) cases::require(launch.stream == &random && launch.device == 1);
}

template <typename T>
void check_sources() {
    for (const bool add : {false, true})
        for (const int64_t width : {1, 7, 300}) {
            check<T, T>(width, 3, add);
            check<T, float>(width, 1, add);
            check<T, double>(width, 4, add);
        }
}

}  // namespace

KNOWEDIT_CASE(restore_rows_moves_and_adds) {
    check_sources<float>(), check_sources<double>(), check_sources<BFloat16>(), check_sources<Float16>();
    cases::require(simt::device() == 0);
}

KNOWEDIT_CASE(restore_rows_launches) {
    RestoreRows p{};
    restore_rows_cuda(p, 0, nullptr);
    cases::require(simt::launches().empty(), "nothing to do, nothing launched");
    float x = 0;
    int64_t row = 0;
    p = {&x, &row, &x, &row, DType::Float32, DType::Float32, 1, 1, 1, 1, true};
    simt::fail_next_launch(cudaErrorInvalidValue);
    cases::require_contains(cases::error_of([&] { restore_rows_cuda(p, 0, nullptr); }),
                            "restore_rows on CUDA: invalid");
    p.count = int64_t{1} << 31;
    cases::require_contains(cases::error_of([&] { restore_rows_cuda(p, 0, nullptr); }),
                            "restore_rows on CUDA: 2147483648");
}

KNOWEDIT_CASE(restore_rows_beyond_32_bit_offsets) {
    cases::FarApart<float> hidden(2), source(3);
    source.at(2, 1) = 5;
    const int64_t to = 1, from = 2;
    constexpr int64_t stride = cases::FarApart<float>::kStride;
    restore_rows_cuda(
        {hidden.data(), &to, source.data(), &from, DType::Float32, DType::Float32, 1, 2, stride, stride, true}, 0,
        nullptr);
    cases::require(hidden.at(1, 1) == 5 && hidden.at(1, 0) == 0 && hidden.at(0, 1) == 0, "a row far away");
}
