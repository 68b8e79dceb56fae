// The inner loop of tree attention: one query row against the keys it sees, compiled once per instruction set.
#pragma once

#include <cstdint>

namespace knowedit {

template <typename T>
struct Attend {
    const T* q;           // [d]
    const T* k;           // key j is k + k_at[j], [d]
    const T* v;           // value j is v + v_at[j], [d]
    const int64_t* k_at;  // [count]
    const int64_t* v_at;  // [count]
    int64_t count;        // keys seen, at least 1
    int64_t d;
    T scale;
    T softcap;                // 0: none
    T sink;                   // a score without a value; -inf: none
    const T* bias;            // added to scores, by position; null: none
    const int64_t* position;  // [count], of the keys
    T* scores;                // scratch, [count + kScorePadding]
    T* out;                   // [d]
};

constexpr int64_t kScorePadding = 16;

template <typename T>
struct AttendBackward {
    Attend<T> forward;       // out: the gradient in q; scores: scratch, [3 * padded]
    int64_t padded;          // at least count + kScorePadding
    const T* up;             // [d], the gradient in the row's output
    const int64_t* grad_at;  // [count]
    int64_t live;            // keys and values whose grad_at is below it get no gradient
    T* dk;                   // the gradient in key j is added to dk + grad_at[j]
    T* dv;                   // and that in value j to dv + grad_at[j]
};

struct AttendBodies {
    void (*f32)(const Attend<float>&);
    void (*f64)(const Attend<double>&);
    void (*backward_f32)(const AttendBackward<float>&);
    void (*backward_f64)(const AttendBackward<double>&);
};

extern const AttendBodies attend_baseline;
#ifdef KNOWEDIT_X86
extern const AttendBodies attend_avx2;
extern const AttendBodies attend_avx512;
#endif

}  // namespace knowedit
