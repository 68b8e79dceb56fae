// The inner loop of low_rank_rows: some rows under one edit, compiled once per instruction set.
#pragma once

#include <cstdint>

namespace knowedit {

// y_n += sum_k (x_n . right_k) left_k
template <typename T>
struct LowRank {
    const T* x;         // row n is x + at[n] * x_row, [d_in]
    T* y;               // row n is y + at[n] * y_row, [d_out]
    const int64_t* at;  // [rows]
    const T* right;     // component k is right + k * right_step, [d_in]
    const T* left;      // component k is left + k * left_step, [d_out]
    int64_t x_row, y_row, right_step, left_step;
    int64_t rows, rank, d_in, d_out;
    T* inner;  // scratch, [kTileRows, rank]
};

constexpr int64_t kTileRows = 4;

struct LowRankBodies {
    void (*f32)(const LowRank<float>&);
    void (*f64)(const LowRank<double>&);
};

extern const LowRankBodies low_rank_baseline;
#ifdef KNOWEDIT_X86
extern const LowRankBodies low_rank_avx2;
extern const LowRankBodies low_rank_avx512;
#endif

}  // namespace knowedit
