// The harness itself: barriers, warp operations, atomics, asynchronous copies; and mistakes that it has to find.
#include "../cuda/mma.cuh"
#include "cases.h"

using namespace knowedit;
using cases::require;

namespace {

constexpr int kBlock = 70;  // two warps and a part of one
int64_t index() { return int64_t{blockIdx.x} * blockDim.x + threadIdx.x; }

struct Line {
    int at[kBlock];
};

template <bool barrier>
__global__ void reverse(int* data) {
    Line& line = block_shared<Line>();
    line.at[threadIdx.x] = data[index()];
    if (barrier) __syncthreads();
    data[index()] = line.at[kBlock - 1 - threadIdx.x];
}

template <bool barrier>
void check_reverse() {
    std::vector<int> data(3 * kBlock);
    for (size_t i = 0; i < data.size(); ++i) data[i] = static_cast<int>(i);
    launch("reverse", {3, kBlock, 0, nullptr}, reverse<barrier>, data.data());
    for (int i = 0; i < 3 * kBlock; ++i) {
        const int block = i / kBlock, expected = block * kBlock + kBlock - 1 - i % kBlock;
        require(data[i] == expected, "element ", i, " is ", data[i], ", not ", expected);
    }
}

__global__ void past_shared_memory(int* out) {
    Line& line = block_shared<Line>();
    int* first = line.at;
    first[threadIdx.x + 1] = 1;  // the last thread: one beyond the end
    __syncthreads();
    *out = first[threadIdx.x];
}

__global__ void past_dynamic_memory(float* out) {
    float* shared = dynamic_shared<float>();
    shared[threadIdx.x] = 1;
    *out = shared[blockDim.x];
}

__global__ void unwritten_shared(float* out) { out[threadIdx.x] = dynamic_shared<float>()[threadIdx.x]; }

template <bool atomic>
__global__ void count_threads(int* total) {
    if (atomic)
        atomicAdd(total, 1);
    else
        *total += 1;
}

__global__ void count_in_shared(int* total, bool fenced) {
    int& here = block_shared<int>();
    if (threadIdx.x == 0) here = 0;
    if (fenced) __syncthreads();
    atomicAdd(&here, 1);
    __syncthreads();
    if (threadIdx.x == 0) total[blockIdx.x] = here;
}

__global__ void barrier_for_some() {
    if (threadIdx.x < 40) __syncthreads();
}

__global__ void two_barriers() {
    if (threadIdx.x < 40)
        __syncthreads();
    else
        __syncthreads();
}

__global__ void shuffle_for_some(int* out) {
    if (threadIdx.x < 20) out[threadIdx.x] = __shfl_sync(kAllLanes, int(threadIdx.x), 0);
}

__global__ void shuffle_from_outside(int* out) {
    if (threadIdx.x < 16) out[threadIdx.x] = __shfl_xor_sync(0xffffu, int(threadIdx.x), 16);
}

__global__ void shuffles(int* out) {  // [9, 32]
    const int lane = threadIdx.x, half = lane / 16;
    int row = 0;
    auto put = [&](int x) { out[row++ * kWarp + lane] = x; };
    put(__shfl_sync(kAllLanes, lane, 5));
    put(__shfl_sync(kAllLanes, lane, 3, 8));
    put(__shfl_xor_sync(kAllLanes, lane, 9));
    put(__shfl_up_sync(kAllLanes, lane, 3));
    put(__shfl_down_sync(kAllLanes, lane, 3, 16));
    put(static_cast<int>(__ballot_sync(kAllLanes, lane % 3 == 0)));
    // Halves of a warp go their own way and exchange values more than once.
    int sum = lane;
    for (int step = 0; step <= half * 2; ++step) sum += __shfl_xor_sync(0xffffu << 16 * half, sum, 1 << step);
    put(sum);
    __syncwarp();
    put(__reduce_add_sync(kAllLanes, lane));
    put(__any_sync(kAllLanes, lane == 7) + 2 * __all_sync(kAllLanes, lane < 31));
}

template <bool awaited>
__global__ void copies(const float* from, float* to, int count) {
    float* here = dynamic_shared<float>();
    copy_async<4>(here + threadIdx.x, from + threadIdx.x, static_cast<int>(threadIdx.x) < count);
    commit_copies();
    copy_async<4>(here + blockDim.x + threadIdx.x, from, true);
    commit_copies();
    if (awaited) await_copies<1>();
    to[threadIdx.x] = here[threadIdx.x];
    await_copies<0>();
    to[blockDim.x + threadIdx.x] = here[blockDim.x + threadIdx.x];
}

template <bool awaited>
void check_copies() {
    std::vector<float> from(50, 2.0f), to = cases::unwritten<float>(128);
    launch("copies", {1, 64, 128 * sizeof(float), nullptr}, copies<awaited>, from.data(), to.data(), 50);
    for (int i = 0; i < 128; ++i) {
        const float expected = i < 50 || i >= 64 ? 2.0f : 0.0f;
        require(to[i] == expected, "element ", i, " is ", to[i], ", not ", expected);
    }
}

__global__ void shuffle_between(int* out, bool fenced) {
    Line& line = block_shared<Line>();
    line.at[threadIdx.x] = __shfl_xor_sync(kAllLanes, int(threadIdx.x), 1);
    __shfl_xor_sync(kAllLanes, 0, 1);
    if (fenced) __syncwarp();
    out[threadIdx.x] = line.at[threadIdx.x ^ 1];
}

__global__ void write_ends(float* out) { out[blockIdx.x + (threadIdx.x ? 1 : 0)] = 1; }

}  // namespace

KNOWEDIT_CASE(simt_barrier) { check_reverse<true>(); }
KNOWEDIT_CASE(broken_missing_barrier) { check_reverse<false>(); }

KNOWEDIT_CASE(simt_copies_arrive_when_awaited) { check_copies<true>(); }
KNOWEDIT_CASE(broken_copies_not_awaited) { check_copies<false>(); }

KNOWEDIT_CASE(simt_atomics) {
    std::vector<int> total(1);
    launch("count", {5, kBlock, 0, nullptr}, count_threads<true>, total.data());
    require(total[0] == 5 * kBlock, total[0]);
    std::vector<int> each(3, -1);
    launch("count", {3, kBlock, 0, nullptr}, count_in_shared, each.data(), true);
    for (int count : each) require(count == kBlock, count);
}
KNOWEDIT_CASE(broken_race) {  // the order of threads cannot show it: found by -fsanitize=thread
    std::vector<int> total(1);
    launch("count", {1, kBlock, 0, nullptr}, count_threads<false>, total.data());
}
KNOWEDIT_CASE(simt_warp_barrier_orders_memory) {
    std::vector<int> out(kWarp);
    launch("shuffle_between", {1, kWarp, 0, nullptr}, shuffle_between, out.data(), true);
    for (int i = 0; i < kWarp; ++i) require(out[i] == i, out[i]);
}
KNOWEDIT_CASE(broken_shuffle_is_no_barrier) {
    std::vector<int> out(kWarp);
    launch("shuffle_between", {1, kWarp, 0, nullptr}, shuffle_between, out.data(), false);
}
KNOWEDIT_CASE(broken_race_between_blocks) {
    std::vector<float> out(4);
    launch("write_ends", {3, 2, 0, nullptr}, write_ends, out.data());
}
KNOWEDIT_CASE(broken_missing_barrier_before_atomics) {
    std::vector<int> each(3, -1);
    launch("count", {3, kBlock, 0, nullptr}, count_in_shared, each.data(), false);
    for (int count : each) require(count == kBlock, count);
}

KNOWEDIT_CASE(broken_shared_overflow) {
    int out = 0;
    launch("past_shared_memory", {1, kBlock, 0, nullptr}, past_shared_memory, &out);
}
KNOWEDIT_CASE(broken_dynamic_overflow) {
    float out = 0;
    launch("past_dynamic_memory", {1, 33, 33 * sizeof(float), nullptr}, past_dynamic_memory, &out);
}

KNOWEDIT_CASE(simt_shared_memory_starts_as_nan) {
    std::vector<float> out(8);
    launch("unwritten_shared", {1, 8, 32, nullptr}, unwritten_shared, out.data());
    for (float x : out) require(std::isnan(x), x);
}

KNOWEDIT_CASE(simt_barriers_that_diverge) {
    const Grid grid{2, kBlock, 0, nullptr};
    std::string error = cases::error_of([&] { launch("toy", grid, barrier_for_some); });
    cases::require_contains(error, "toy: thread (");
    cases::require_contains(error, "waits in __syncthreads");
    cases::require_contains(error, "has ended");
    error = cases::error_of([&] { launch("toy", grid, two_barriers); });
    cases::require_contains(error, "toy: thread (");
    std::vector<int> out(kBlock);
    error = cases::error_of([&] { launch("toy", grid, shuffle_for_some, out.data()); });
    cases::require_contains(error, "waits in a shuffle");
    error = cases::error_of([&] { launch("toy", grid, shuffle_from_outside, out.data()); });
    cases::require_contains(error, "which is not in the mask");
}

KNOWEDIT_CASE(simt_warp_operations) {
    std::vector<int> out(9 * kWarp, -1);
    launch("shuffles", {1, kWarp, 0, nullptr}, shuffles, out.data());
    for (int lane = 0; lane < kWarp; ++lane) {
        int expected[9] = {5,
                           lane / 8 * 8 + 3,
                           lane ^ 9,
                           lane < 3 ? lane : lane - 3,
                           lane % 16 < 13 ? lane + 3 : lane,
                           0x49249249,
                           0,
                           496,
                           1};
        const int span = lane < 16 ? 2 : 8;
        for (int other = lane / span * span; other < lane / span * span + span; ++other) expected[6] += other;
        for (int row = 0; row < 9; ++row)
            require(out[row * kWarp + lane] == expected[row], "row ", row, " lane ", lane, " is ",
                    out[row * kWarp + lane], ", not ", expected[row]);
    }
}

KNOWEDIT_CASE(simt_launches_are_recorded_and_refused) {
    std::vector<int> data(2 * kBlock);
    void* const stream = &data;
    {
        const DeviceGuard guard(2, "toy");
        launch("toy", {2, kBlock, 0, stream}, reverse<true>, data.data());
        launch("toy", {0, kBlock, 0, stream}, reverse<true>, data.data());  // nothing to do
    }
    require(simt::launches().size() == 1 && simt::device() == 0);
    const simt::Launch& only = simt::launches()[0];
    require(only.stream == stream && only.device == 2 && only.grid.x == 2 && only.block.x == kBlock);
    simt::fail_next_launch(cudaErrorInvalidValue);
    std::string error = cases::error_of([&] { launch("toy", {2, kBlock, 0, stream}, reverse<true>, data.data()); });
    cases::require_contains(error, "toy on CUDA: invalid argument");
    error = cases::error_of([&] { launch("toy", {1, 1025, 0, stream}, reverse<true>, data.data()); });
    cases::require_contains(error, "toy on CUDA: invalid configuration");
    error = cases::error_of([&] { launch("toy", {1, 32, 200 << 10, stream}, reverse<true>, data.data()); });
    cases::require_contains(error, "toy on CUDA: invalid argument");
    error = cases::error_of([] { const DeviceGuard guard(9, "toy"); });
    cases::require_contains(error, "toy on CUDA: ");
}

KNOWEDIT_CASE(simt_blocks_for_counts_beyond_32_bits) {
    require(blocks_for(0, 7, "toy") == 0 && blocks_for(1, 7, "toy") == 1 && blocks_for(15, 7, "toy") == 3);
    require(blocks_for(int64_t{1} << 31, 256, "toy") == 1u << 23);
    require(blocks_for(INT32_MAX, 1, "toy") == INT32_MAX);
    require(blocks_for(INT64_MAX, INT64_MAX, "toy") == 1);
    const std::string error = cases::error_of([] { blocks_for(int64_t{1} << 31, 1, "toy"); });
    cases::require_contains(error, "toy on CUDA: 2147483648 blocks are needed");
}
