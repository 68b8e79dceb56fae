#include "knowedit/restore_rows.h"

#include <cstring>
#include <type_traits>

#include "half.h"
#include "parallel.h"

namespace knowedit {
namespace {

constexpr int64_t kGrain = 64;              // rows a thread takes at a time
constexpr int64_t kWorthThreads = 1 << 20;  // elements below which starting threads costs more than it brings

template <typename T, typename S>
void move_row(T* to, const S* from, int64_t width, bool add) {
    using Sum = std::conditional_t<std::is_same_v<T, double> || std::is_same_v<S, double>, double, float>;
    if (add) {
        for (int64_t c = 0; c < width; ++c)
            narrow(static_cast<Sum>(widen(to[c])) + static_cast<Sum>(widen(from[c])), to + c);
    } else if constexpr (std::is_same_v<T, S>) {
        std::memcpy(to, from, width * sizeof(T));
    } else {
        for (int64_t c = 0; c < width; ++c) narrow(static_cast<Sum>(from[c]), to + c);
    }
}

template <typename T, typename S>
void move_rows(const RestoreRows& p, int threads) {
    parallel_for(p.count, kGrain, threads, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i)
            move_row(static_cast<T*>(p.hidden) + p.rows[i] * p.hidden_row,
                     static_cast<const S*>(p.source) + p.source_rows[i] * p.source_row, p.width, p.add);
    });
}

template <typename T>
void from_any(const RestoreRows& p, int threads) {
    if (p.source_dtype == p.hidden_dtype) return move_rows<T, T>(p, threads);
    if (p.source_dtype == DType::Float64) return move_rows<T, double>(p, threads);
    move_rows<T, float>(p, threads);
}

}  // namespace

void restore_rows_cpu(const RestoreRows& p, int threads) {
    if (p.count * p.width < kWorthThreads) threads = 1;
    switch (p.hidden_dtype) {
        case DType::Float32:
            return from_any<float>(p, threads);
        case DType::Float64:
            return from_any<double>(p, threads);
        case DType::BFloat16:
            return from_any<BFloat16>(p, threads);
        case DType::Float16:
            return from_any<Float16>(p, threads);
    }
}

}  // namespace knowedit
