#include "knowedit/null.h"

#include <algorithm>

#include "half.h"
#include "parallel.h"

namespace knowedit {
namespace {

constexpr int64_t kGrain = 64;              // rows a thread takes at a time
constexpr int64_t kWorthThreads = 1 << 20;  // elements below which starting threads costs more than it brings

template <typename T>
void copy(const Null& p, int threads) {
    parallel_for(p.rows, kGrain, threads, [&](int64_t begin, int64_t end) {
        for (int64_t row = begin; row < end; ++row)
            std::copy_n(static_cast<const T*>(p.x) + row * p.x_row, p.width, static_cast<T*>(p.out) + row * p.width);
    });
}

}  // namespace

void null_cpu(const Null& p, int threads) {
    if (p.rows * p.width < kWorthThreads) threads = 1;
    switch (p.dtype) {
        case DType::Float32:
            return copy<float>(p, threads);
        case DType::Float64:
            return copy<double>(p, threads);
        case DType::BFloat16:
            return copy<BFloat16>(p, threads);
        case DType::Float16:
            return copy<Float16>(p, threads);
    }
}

}  // namespace knowedit
