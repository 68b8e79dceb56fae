// 16-bit rows on Hopper: one warp brings x by TMA, two warpgroups multiply by wgmma what has come. One block a 128 x
// 256 tile of the triangle, over all rows (panels_sm90.h), alone or in pairs that share what they read on the right
// (ring_sm90.h). Compiled in CI, its addresses and the order of its waiting tested by csrc/testing; not yet run on a
// GPU, and used only where asked for.
#include <algorithm>

#include "knowedit/moment_update.h"
#include "ring_sm90.h"
#ifndef KNOWEDIT_SIMT
#include <cudaTypedefs.h>

#include "hopper.cuh"
#else
#include "common.cuh"
#endif

namespace knowedit {
namespace {

constexpr const char* kOp = "moment_update";

bool runs_sm90a([[maybe_unused]] int device) {
#ifdef KNOWEDIT_SM90A
    int major = 0;
    check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device), kOp);
    return major == 9;
#else
    return false;
#endif
}

}  // namespace

bool moment_update_has_wgmma(const MomentUpdate& params, int device) {
    return sm90::tma_reads(params) && runs_sm90a(device);
}

}  // namespace knowedit

#ifndef KNOWEDIT_SIMT
namespace knowedit {
namespace sm90 {
namespace {

constexpr int kConsumers = kConsumerWarps * kWarp;
constexpr int kThreads = kConsumers + kGroupThreads;  // the last warpgroup brings x
constexpr size_t kMemory = kAlign + kStages * kStageBytes + kBarriers * sizeof(uint64_t);
static_assert(kMemory <= 227 << 10);  // of a block on sm_90

#ifdef __CUDA_ARCH_FEAT_SM90_ALL
// The stages and their barriers behind them, at the same place in both blocks of a cluster.
template <int blocks>
struct Ring {
    unsigned char* memory;
    uint32_t base;
    int rank;  // of the block in its cluster

    __device__ Ring() : memory(dynamic_shared<unsigned char>()), rank(blocks == 1 ? 0 : blockIdx.x % blocks) {
        memory += (kAlign - shared_address(memory) % kAlign) % kAlign;
        base = shared_address(memory);
    }
    __device__ uint32_t stage(int64_t step) const { return base + stage_of(step) * kStageBytes; }
    __device__ uint32_t barrier(int number) const { return base + kStages * kStageBytes + number * 8; }

    __device__ void init(int number, int arrivals) const { init_barrier(barrier(number), arrivals); }
    __device__ void await(int number, uint32_t parity) const { sm90::await<(blocks > 1)>(barrier(number), parity); }
    __device__ void meet_all() const {
        if constexpr (blocks > 1)
            meet_cluster();
        else
            __syncthreads();
    }
};

template <int blocks>
struct Bringer : Ring<blocks> {
    const CUtensorMap* x;
    Tile at;

    __device__ Bringer(const Ring<blocks>& ring, const CUtensorMap* x, const Tile& at)
        : Ring<blocks>(ring), x(x), at(at) {}
    __device__ void arrive_expecting(int number, int bytes) const {
        sm90::arrive_expecting(this->barrier(number), bytes);
    }
    __device__ void copy(int64_t step, int box) const {
        copy_box(this->stage(step) + box * kBoxBytes, x, static_cast<int>(box_column(at, box)),
                 static_cast<int>(step * kDepth), this->barrier(full(step)));
    }
    __device__ void copy_to_both(int64_t step, int box) const {
        copy_box_to(3, this->stage(step) + box * kBoxBytes, x, static_cast<int>(box_column(at, box)),
                    static_cast<int>(step * kDepth), this->barrier(full(step)));
    }
};

// Rows of a step that do not count become zero on both sides (0 x NaN is no zero), before any warpgroup reads them.
__device__ inline void clear_masked(const MomentUpdate& p, int64_t first, unsigned char* stage) {
    constexpr int pieces = kRowBytes / 16;  // a row's 16 bytes keep within its 128
    const int piece = static_cast<int>(threadIdx.x) % pieces;
    for (int row = static_cast<int>(threadIdx.x) / pieces; row < kDepth; row += kConsumers / pieces) {
        if (first + row >= p.rows || p.mask[first + row]) continue;
#pragma unroll
        for (int box = 0; box < kBoxes; ++box)
            *reinterpret_cast<uint4*>(stage + box * kBoxBytes + row * kRowBytes + piece * 16) = make_uint4(0, 0, 0, 0);
    }
    publish_stores();
    meet<1, kConsumers>();
}

// Which of a thread's sums is number i of its first (0) or second (1) row.
__device__ constexpr int of_row(int half, int i) { return i / 2 * 4 + half * 2 + i % 2; }

// acc gains a warpgroup's sums, which start again from zero. (row, column): its first element. What acc holds is read
// kBatch elements at a time, so that they are on their way together.
template <typename A>
__device__ inline void flush(const MomentUpdate& p, float (&sum)[kSums], int64_t row, int64_t column) {
    constexpr int kBatch = 16;
    const int thread = static_cast<int>(threadIdx.x) % kGroupThreads;
    row += sum_row(thread, 0), column += sum_column(thread, 0);
    A* to = static_cast<A*>(p.acc) + row * p.acc_row + column;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const int64_t r = row + half * 8;
        // Of the thread's elements of this row, those in the triangle come first.
        const int within = r < p.width ? static_cast<int>(r - column < kTileColumns ? r - column : kTileColumns) : -1;
#pragma unroll
        for (int first = 0; first < kSums / 2; first += kBatch) {
            A before[kBatch];
#pragma unroll
            for (int i = 0; i < kBatch; ++i)
                if (sum_column(0, of_row(half, first + i)) <= within)
                    before[i] = to[sum_column(0, of_row(half, first + i))];
#pragma unroll
            for (int i = 0; i < kBatch; ++i) {
                float& value = sum[of_row(half, first + i)];
                if (sum_column(0, of_row(half, first + i)) <= within)
                    to[sum_column(0, of_row(half, first + i))] = before[i] + static_cast<A>(value);
                value = 0;
            }
        }
        to += 8 * p.acc_row;
    }
}

template <typename T, int blocks>
struct Consumer : Ring<blocks> {
    const MomentUpdate& p;
    Tile at;
    int group, lane;
    float sum[kSums] = {};

    __device__ Consumer(const Ring<blocks>& ring, const MomentUpdate& p, const Tile& at, int warp)
        : Ring<blocks>(ring),
          p(p),
          at(at),
          group(warp * kWarp / kGroupThreads),
          lane(static_cast<int>(threadIdx.x) % kWarp) {}

    __device__ __forceinline__ void arrive(int number, int block) const {
        if (lane != 0) return;
        if constexpr (blocks > 1)
            arrive_at(this->barrier(number), block);
        else
            sm90::arrive(this->barrier(number));
    }
    __device__ __forceinline__ void multiply(int64_t step) {
        if (p.mask) clear_masked(p, step * kDepth, this->memory + stage_of(step) * kStageBytes);
        const uint32_t stage = this->stage(step);
        begin_multiplying();
#pragma unroll
        for (int k = 0; k < kDepth / 16; ++k)
            sm90::multiply<T>(sum, descriptor(stage + left_offset(group, k)), descriptor(stage + right_offset(k)));
        commit_products();
    }
    template <int pending>
    __device__ __forceinline__ void await_products() {
        sm90::await_products<pending>();
    }
    __device__ __forceinline__ void flush() {
        settle(sum);
        const int64_t row = at.row + group * kGroupRows;
        if (p.acc_dtype == DType::Float64)
            sm90::flush<double>(p, sum, row, at.column);
        else
            sm90::flush<float>(p, sum, row, at.column);
        settle(sum);
    }
};
#endif

// blocks: of a cluster, whose tiles lie above each other.
template <typename T, int blocks>
__global__ void __launch_bounds__(kThreads, 1) update(const __grid_constant__ CUtensorMap x, MomentUpdate p) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
    const Tile at = tile(blockIdx.x, p.width);
    if (blocks == 1 && at.row >= p.width) return;  // in a cluster it brings its half of what the other reads
    const Ring<blocks> ring;
    const int64_t steps = (p.rows + kDepth - 1) / kDepth;
    if (threadIdx.x == 0) {
        start_barriers<blocks>(ring);
        publish_barriers();
    }
    ring.meet_all();
    const int warp = __shfl_sync(kAllLanes, static_cast<int>(threadIdx.x) / kWarp, 0);  // for all it is uniform
    if (warp < kConsumerWarps) {
        more_registers<232>();
        Consumer<T, blocks> consumer(ring, p, at, warp);
        consume<blocks>(consumer, steps, p.sum_rows / kDepth);
    } else {
        fewer_registers<40>();
        Bringer<blocks> bringer(ring, &x, at);
        if (threadIdx.x == kConsumers) bring<blocks>(bringer, steps);
    }
    if (blocks > 1) ring.meet_all();  // the other block writes here until it is done
#else
    __trap();  // not the code for this GPU: moment_update_has_wgmma says so beforehand
#endif
}

// The driver's function, without linking the driver.
PFN_cuTensorMapEncodeTiled_v12000 encoder() {
    void* found = nullptr;
    cudaDriverEntryPointQueryResult result;
#if CUDART_VERSION >= 12050
    check(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault, &result), kOp);
#else
    check(cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &found, cudaEnableDefault, &result), kOp);
#endif
    if (result != cudaDriverEntryPointSuccess || !found)
        throw std::runtime_error(
            "moment_update on CUDA: this driver has no cuTensorMapEncodeTiled (CUDA 12 brought it)");
    return reinterpret_cast<PFN_cuTensorMapEncodeTiled_v12000>(found);
}

CUtensorMap encoded(const MomentUpdate& p) {
    static const PFN_cuTensorMapEncodeTiled_v12000 encode = encoder();
    const TensorMap map = tensor_map(p);
    const cuuint64_t size[2] = {map.size[0], map.size[1]}, stride[1] = {map.stride};
    const cuuint32_t every[2] = {1, 1};
    const auto type = p.x_dtype == DType::Float16 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
    CUtensorMap to;
    const CUresult status =
        encode(&to, type, 2, const_cast<void*>(p.x), size, stride, map.box, every, CU_TENSOR_MAP_INTERLEAVE_NONE,
               CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    if (status != CUDA_SUCCESS)
        throw std::runtime_error("moment_update on CUDA: cuTensorMapEncodeTiled refuses x [" + std::to_string(p.rows) +
                                 ", " + std::to_string(p.width) + "] (driver error " + std::to_string(status) + ")");
    return to;
}

template <typename T, int blocks>
void start(const MomentUpdate& p, void* stream) {
    const auto kernel = update<T, blocks>;
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(kMemory)), kOp);
    cudaLaunchAttribute cluster;
    cluster.id = cudaLaunchAttributeClusterDimension;
    cluster.val.clusterDim = {blocks, 1, 1};
    cudaLaunchConfig_t config{};
    config.gridDim = blocks_for(tile_count(p.width), 1, kOp);
    config.blockDim = kThreads;
    config.dynamicSmemBytes = kMemory;
    config.stream = static_cast<cudaStream_t>(stream);
    config.attrs = &cluster;
    config.numAttrs = blocks > 1;
    check(cudaLaunchKernelEx(&config, kernel, encoded(p), p), kOp);
    check(cudaGetLastError(), kOp);
}

template <typename T>
void start(const MomentUpdate& p, bool in_pairs, void* stream) {
    in_pairs ? start<T, 2>(p, stream) : start<T, 1>(p, stream);
}

}  // namespace
}  // namespace sm90

void moment_update_wgmma_cuda(const MomentUpdate& params, bool in_pairs, int device, void* stream) {
    if (params.rows == 0 || params.width == 0) return;
    const DeviceGuard guard(device, kOp);
    if (!moment_update_has_wgmma(params, device))
        throw std::invalid_argument(
            "moment_update on CUDA: wgmma needs a Hopper GPU, code for sm_90a in this build, and "
            "bfloat16 or float16 rows that lie 16-byte aligned");
    MomentUpdate p = params;
    p.sum_rows = (std::max<int64_t>(p.sum_rows, 1) + sm90::kDepth - 1) / sm90::kDepth * sm90::kDepth;
    if (p.x_dtype == DType::BFloat16)
        sm90::start<__nv_bfloat16>(p, in_pairs, stream);
    else
        sm90::start<__half>(p, in_pairs, stream);
}

}  // namespace knowedit
#endif
