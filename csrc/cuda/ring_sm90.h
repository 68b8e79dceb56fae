// Who waits for whom in moment_update_sm90.cu: one warp brings stages of x, eight consume them. A block's stages are
// used round and round; each has a barrier `full`, whose phase ends when its bytes have come, and a barrier `empty`,
// whose phase ends when all that read it are done. In a cluster of two blocks, which have the same columns on the
// right, each block brings half of those to both: then a stage is empty when the consumers of both blocks are done with
// theirs.
//
// `Machine` is what does it: PTX on the GPU, a model of it in testing/test_moment_update_sm90.cpp.
#pragma once

#include "panels_sm90.h"

#ifdef __CUDACC__
#define KNOWEDIT_ON_DEVICE __device__ __forceinline__
#else
#define KNOWEDIT_ON_DEVICE inline
#endif

namespace knowedit {
namespace sm90 {

constexpr int kConsumerWarps = kTileRows / kGroupRows * kGroupThreads / 32;
constexpr int kBarriers = 2 * kStages;

// Numbers of a step's barriers in a block, and the parity of the phase that it is about.
KNOWEDIT_ANYWHERE constexpr int stage_of(int64_t step) { return static_cast<int>(step % kStages); }
KNOWEDIT_ANYWHERE constexpr int full(int64_t step) { return stage_of(step); }
KNOWEDIT_ANYWHERE constexpr int empty(int64_t step) { return kStages + stage_of(step); }
KNOWEDIT_ANYWHERE constexpr uint32_t parity(int64_t step) { return static_cast<uint32_t>(step / kStages % 2); }

// Whether both blocks of a cluster read what is in this box, and which of them brings it.
KNOWEDIT_ANYWHERE constexpr bool shared(int box) { return box >= kLeftBoxes; }
KNOWEDIT_ANYWHERE constexpr int bringer(int box) { return (box - kLeftBoxes) * 2 / (kBoxes - kLeftBoxes); }

// One thread of each block, before all meet.
template <int blocks, typename Machine>
KNOWEDIT_ON_DEVICE void start_barriers(Machine& machine) {
    for (int stage = 0; stage < kStages; ++stage) {
        machine.init(full(stage), 1);
        machine.init(empty(stage), blocks * kConsumerWarps);
    }
}

template <int blocks, typename Machine>
KNOWEDIT_ON_DEVICE void bring(Machine& machine, int64_t steps) {
    for (int64_t step = 0; step < steps; ++step) {
        machine.await(empty(step), parity(step) ^ 1);
        // The other block's boxes may come before this: a phase does not end before its arrivals.
        machine.arrive_expecting(full(step), kStageBytes);
        for (int box = 0; box < kBoxes; ++box)
            if (blocks == 1 || !shared(box))
                machine.copy(step, box);
            else if (bringer(box) == machine.rank)
                machine.copy_to_both(step, box);
    }
}

// together: steps until the sums go to acc.
template <int blocks, typename Machine>
KNOWEDIT_ON_DEVICE void consume(Machine& machine, int64_t steps, int64_t together) {
    const auto release = [&](int64_t step) {
        for (int block = 0; block < blocks; ++block) machine.arrive(empty(step), block);
    };
    for (int64_t first = 0; first < steps; first += together) {
        const int64_t end = first + together < steps ? first + together : steps;
        for (int64_t step = first; step < end; ++step) {
            machine.await(full(step), parity(step));
            machine.multiply(step);
            machine.template await_products<1>();  // those of the step before are done
            if (step > first) release(step - 1);
        }
        machine.template await_products<0>();
        release(end - 1);
        machine.flush();
    }
}

}  // namespace sm90
}  // namespace knowedit
