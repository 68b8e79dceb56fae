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
    T softcap;  // 0: none
    T* scores;  // scratch, [count + kScorePadding]
    T* out;     // [d]
};

constexpr int64_t kScorePadding = 16;

struct AttendBodies {
    void (*f32)(const Attend<float>&);
    void (*f64)(const Attend<double>&);
};

extern const AttendBodies attend_baseline;
#ifdef KNOWEDIT_X86
extern const AttendBodies attend_avx2;
extern const AttendBodies attend_avx512;
#endif

}  // namespace knowedit
