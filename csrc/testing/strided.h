// Matrices as ops get them: rows with a stride, at any alignment, amid memory that is not theirs.
#pragma once

#include <sys/mman.h>

#include "cases.h"

namespace cases {

// `rows` rows of `width` numbers, `pad` numbers between them and `offset` before; NaN wherever nobody wrote.
template <typename T>
struct Strided {
    int64_t rows, width, stride, offset;
    std::vector<T> memory;

    Strided(int64_t rows, int64_t width, int64_t pad = 0, int64_t offset = 0)
        : rows(rows),
          width(width),
          stride(width + pad),
          offset(offset),
          memory(unwritten<T>(offset + (rows - 1) * stride + width)) {}

    T* data() { return memory.data() + offset; }
    T& at(int64_t row, int64_t column) { return data()[row * stride + column]; }
    double value(int64_t row, int64_t column) { return cases::value(at(row, column)); }

    Strided& fill(std::mt19937& random, double scale = 1) {
        const std::vector<T> numbers = normal<T>(rows * width, random, scale);
        for (int64_t i = 0; i < rows * width; ++i) at(i / width, i % width) = numbers[i];
        return *this;
    }
};

// Two or three rows so far apart that an offset of 32 bits does not reach the second; only pages in use take memory.
template <typename T>
struct FarApart {
    static constexpr int64_t kStride = (int64_t{1} << 31) + 8;
    size_t bytes;
    void* memory;

    explicit FarApart(int64_t rows) : bytes(((rows - 1) * kStride + 4096) * sizeof(T)) {
        memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        require(memory != MAP_FAILED, "no address space for ", bytes, " bytes");
    }
    ~FarApart() { munmap(memory, bytes); }
    FarApart(const FarApart&) = delete;
    FarApart& operator=(const FarApart&) = delete;

    T* data() { return static_cast<T*>(memory); }
    T& at(int64_t row, int64_t column) { return data()[row * kStride + column]; }
};

}  // namespace cases
