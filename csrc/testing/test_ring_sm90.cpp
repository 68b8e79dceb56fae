// Who waits for whom in moment_update by wgmma, without a GPU: cuda/ring_sm90.h itself, on a model of what barriers,
// TMA and wgmma promise (PTX ISA, "mbarrier", "cp.async.bulk.tensor", "wgmma.wait_group"). Warps and copies go on in an
// order drawn by seed; products read their operands when they are issued and when they are waited for, and find other
// rows, or rows that change between, if anything goes on too early. A block that has ended must not be written to.
#include <functional>
#include <memory>

#include "../cuda/ring_sm90.h"
#include "cases.h"
#include "fiber.h"

using namespace knowedit::sm90;
using cases::require;

namespace {

// Mistakes that have to be found.
enum Fault { kNone, kReleasesUnread, kForgetsTheOther, kExpectsTooFew, kEndsEarly, kBringsOwnHalf };

struct Box {
    int64_t column = -1, row = -1;
    bool operator==(const Box& o) const { return column == o.column && row == o.row; }
};

struct Barrier {
    int arrivals = 0, pending = 0;
    int64_t bytes = 0, phases = 0;

    void arrive() {
        require(--pending >= 0, "more arrivals than the barrier counts");
        settle();
    }
    void come(int64_t count) { bytes -= count, settle(); }
    void settle() {
        if (pending == 0 && bytes == 0) ++phases, pending = arrivals;
    }
};

struct Block {
    Tile at;
    Barrier barriers[kBarriers], warps;
    Box boxes[kStages][kBoxes];
    int reading[kStages] = {};
    int running = 0;
};

struct Transfer {
    int block, stage, box, barrier;
    Box what;
};

class Cluster {
  public:
    Cluster(uint64_t seed, int count, Fault fault) : fault(fault), random(seed) {
        // The two halves of a square: the lower one may lie outside the triangle.
        for (int64_t block = 0; block < count; ++block) blocks.push_back({}), blocks.back().at = tile(block, 100);
    }

    void add(int block, std::function<void()> body) {
        ++blocks[block].running, ++running;
        threads.push_back(std::make_unique<Thread>());
        threads.back()->block = block, threads.back()->body = std::move(body);
    }

    // Until all have ended.
    void run() {
        static Cluster* started;
        started = this;
        for (auto& thread : threads) {
            thread->stack.resize(simt::kStack);
            thread->fiber.start(thread->stack.data(), [] { started->begin(); });
        }
        while (true) {
            std::vector<size_t> able;
            for (size_t i = 0; i < threads.size(); ++i)
                if (!threads[i]->done && threads[i]->ready()) able.push_back(i);
            const size_t choices = able.size() + transfers.size();
            if (!choices) break;
            const size_t choice = random() % choices;
            if (choice < able.size()) {
                now = threads[able[choice]].get();
                home.switch_to(now->fiber);
            } else {
                deliver(choice - able.size());
            }
            if (!error.empty()) cases::fail(error);
        }
        for (auto& thread : threads) thread->fiber.stop();
        require(running == 0, running, " warps wait for ever");
    }

    void wait_until(std::function<bool()> ready) {
        now->ready = std::move(ready);
        now->fiber.switch_to(home);
    }
    void pause() {
        wait_until([] { return true; });
    }

    const Fault fault;
    std::vector<Block> blocks;
    std::vector<Transfer> transfers;
    Barrier all;  // of the cluster
    int running = 0;

  private:
    struct Thread {
        simt::Fiber fiber;
        std::vector<char> stack;
        std::function<void()> body;
        std::function<bool()> ready = [] { return true; };
        int block = 0;
        bool done = false;
    };

    void begin() {
        now->fiber.arrive(home);
        try {
            now->body();
        } catch (const std::exception& wrong) {
            error = wrong.what();
        }
        now->done = true, --running, --blocks[now->block].running;
        now->fiber.switch_to(home);
    }

    void deliver(size_t number) {
        const Transfer t = transfers[number];
        transfers.erase(transfers.begin() + static_cast<std::ptrdiff_t>(number));
        Block& block = blocks[t.block];
        require(block.running > 0, "a copy comes to a block that has ended");
        require(block.reading[t.stage] == 0, "a copy comes while its stage is read");
        block.boxes[t.stage][t.box] = t.what;
        block.barriers[t.barrier].come(kBoxBytes);
    }

    std::mt19937_64 random;
    std::vector<std::unique_ptr<Thread>> threads;
    Thread* now = nullptr;
    simt::Fiber home;
    std::string error;
};

// One warp of a block (of consumers, all lanes at once).
struct Machine {
    Cluster& cluster;
    int rank;
    bool masked;
    int64_t multiplied = 0, awaited = 0, summed = 0;  // steps

    Block& block() { return cluster.blocks[rank]; }
    bool in_pairs() const { return cluster.blocks.size() > 1; }

    void init(int number, int arrivals) {
        if (cluster.fault == kForgetsTheOther && number >= kStages) arrivals = kConsumerWarps;
        block().barriers[number] = {arrivals, arrivals};
    }
    void await(int number, uint32_t parity) { wait(block().barriers[number], parity); }
    void wait(Barrier& barrier, int64_t parity) {
        cluster.wait_until([&barrier, parity] { return barrier.phases % 2 != parity; });
    }
    void meet(Barrier& barrier) {
        const int64_t phase = barrier.phases % 2;
        barrier.arrive();
        wait(barrier, phase);
    }

    void arrive(int number, int at) {
        cluster.pause();
        if (cluster.fault == kForgetsTheOther && at != rank) return;
        require(cluster.blocks[at].running > 0, "an arrival comes to a block that has ended");
        cluster.blocks[at].barriers[number].arrive();
    }
    void arrive_expecting(int number, int bytes) {
        cluster.pause();
        block().barriers[number].bytes += cluster.fault == kExpectsTooFew ? bytes - kBoxBytes : bytes;
        block().barriers[number].arrive();
    }
    void copy(int64_t step, int box) { send(rank, step, box); }
    void copy_to_both(int64_t step, int box) {
        for (int to = 0; to < 2; ++to)
            if (cluster.fault != kBringsOwnHalf || to == rank) send(to, step, box);
    }
    void send(int to, int64_t step, int box) {
        cluster.pause();
        cluster.transfers.push_back(
            {to, stage_of(step), box, full(step), {box_column(block().at, box), step * kDepth}});
    }

    void multiply(int64_t step) {
        if (masked) meet(block().warps);
        cluster.pause();
        require(step == multiplied++, "step ", step, " is multiplied out of turn");
        look(step);
        ++block().reading[stage_of(step)];
    }
    template <int pending>
    void await_products() {
        cluster.pause();
        if (cluster.fault == kReleasesUnread && pending == 1) return;
        for (; multiplied - awaited > pending; ++awaited) {
            look(awaited);
            --block().reading[stage_of(awaited)];
        }
    }
    void look(int64_t step) {
        for (int box = 0; box < kBoxes; ++box)
            require(block().boxes[stage_of(step)][box] == Box{box_column(block().at, box), step * kDepth}, "step ",
                    step, ": box ", box, " holds something else");
    }
    void flush() {
        require(awaited == multiplied, "sums are read before they are there");
        summed = multiplied;
    }
};

template <int blocks>
void run(uint64_t seed, int64_t steps, int64_t together, bool masked, Fault fault = kNone) {
    Cluster cluster(seed, blocks, fault);
    const int all = blocks * (kConsumerWarps + 1);
    cluster.all = {all, all};
    for (int rank = 0; rank < blocks; ++rank) {
        cluster.blocks[rank].warps = {kConsumerWarps, kConsumerWarps};
        for (int warp = 0; warp <= kConsumerWarps; ++warp)
            cluster.add(rank, [&cluster, rank, warp, steps, together, masked] {
                Machine machine{cluster, rank, masked};
                if (warp == 0) start_barriers<blocks>(machine);
                machine.meet(cluster.all);  // __syncthreads for a block alone
                if (warp < kConsumerWarps) {
                    consume<blocks>(machine, steps, together);
                    require(machine.summed == steps, machine.summed, " of ", steps, " steps are in the sums");
                } else {
                    bring<blocks>(machine, steps);
                }
                if (blocks > 1 && cluster.fault != kEndsEarly) machine.meet(cluster.all);
            });
    }
    cluster.run();
}

template <int blocks>
std::string found(Fault fault) {
    return cases::error_of([&] {
        for (uint64_t seed = 0; seed < 50; ++seed) run<blocks>(seed, 11, 4, false, fault);
    });
}

}  // namespace

KNOWEDIT_CASE(ring_waits_for_what_it_needs) {
    if (cases::kRaces) return;  // a model: its memory is no GPU's
    for (int64_t steps : {1, 2, 4, 5, 13})
        for (int64_t together : {1, 3, 100})
            for (bool masked : {false, true})
                for (uint64_t order = 0; order < 5; ++order) {
                    run<1>(100 * seed + order, steps, together, masked);
                    run<2>(100 * seed + order, steps, together, masked);
                }
}

KNOWEDIT_CASE(ring_mistakes_are_found) {
    if (seed || cases::kRaces) return;
    cases::require_contains(found<1>(kReleasesUnread), "while its stage is read");
    cases::require_contains(found<2>(kReleasesUnread), "while its stage is read");
    cases::require_contains(found<1>(kExpectsTooFew), "holds something else");
    const std::string forgot = found<2>(kForgetsTheOther);
    require(forgot.find("holds something else") != std::string::npos || forgot.find("is read") != std::string::npos,
            forgot);
    cases::require_contains(found<2>(kEndsEarly), "a block that has ended");
    cases::require_contains(found<2>(kBringsOwnHalf), "wait for ever");
}

KNOWEDIT_CASE(ring_blocks_of_a_pair_share_what_lies_on_the_right) {
    if (seed) return;
    for (int64_t width : {8, 200, 256, 257, 1000})
        for (int64_t i = 0; i < tile_count(width); i += 2) {
            const Tile upper = tile(i, width), lower = tile(i + 1, width);
            require(upper.row + kTileRows == lower.row && tile_count(width) % 2 == 0, "tiles ", i, " of ", width);
            int brought[2] = {};
            for (int box = 0; box < kBoxes; ++box) {
                require(shared(box) == (box_column(upper, box) == box_column(lower, box)) ||
                            upper.column == upper.row,  // on the diagonal the left lies on the right too
                        "box ", box);
                if (shared(box)) ++brought[bringer(box)];
            }
            require(brought[0] == 2 && brought[1] == 2, "each brings half");
        }
}
