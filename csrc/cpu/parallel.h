// A parallel loop on threads that live for one call: no pool, so nothing survives a fork, and no OpenMP runtime.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <exception>
#include <mutex>
#include <system_error>
#include <thread>
#include <vector>

namespace knowedit {

// Calls work(begin, end) over [0, count) in blocks of `grain`, on the caller and up to threads - 1 helpers.
// The first exception is rethrown once all have stopped.
template <typename Work>
void parallel_for(int64_t count, int64_t grain, int threads, const Work& work) {
    std::atomic<int64_t> next{0};
    std::exception_ptr error;
    std::mutex error_lock;
    auto drain = [&] {
        try {
            for (int64_t begin; (begin = next.fetch_add(grain)) < count;) work(begin, std::min(begin + grain, count));
        } catch (...) {
            next = count;
            std::lock_guard<std::mutex> hold(error_lock);
            if (!error) error = std::current_exception();
        }
    };
    const int64_t blocks = (count + grain - 1) / grain;
    std::vector<std::thread> helpers;
    helpers.reserve(std::max(threads, 1));
    try {
        for (int64_t i = 1; i < std::min<int64_t>(threads, blocks); ++i) helpers.emplace_back(drain);
    } catch (const std::system_error&) {
        // No more threads to be had: those that started share the work.
    }
    drain();
    for (auto& helper : helpers) helper.join();
    if (error) std::rethrow_exception(error);
}

}  // namespace knowedit
