// run_kernels [--seeds N] [NAME...]: runs the cases whose name begins with one of those given (all but the broken ones
// when none is), each under N seeds of the scheduler, and says which failed.
#include <cstdio>
#include <cstdlib>

#include "cases.h"
#include "simt.h"

namespace {

bool chosen(const std::string& name, const std::vector<std::string>& wanted) {
    if (wanted.empty()) return name.rfind("broken_", 0) != 0;
    for (const std::string& start : wanted)
        if (name.rfind(start, 0) == 0) return true;
    return false;
}

}  // namespace

int main(int count, char** arguments) {
    uint64_t seeds = 3;
    std::vector<std::string> wanted(arguments + 1, arguments + count);
    if (wanted.size() >= 2 && wanted[0] == "--seeds") {
        seeds = std::strtoull(wanted[1].c_str(), nullptr, 10);
        wanted.erase(wanted.begin(), wanted.begin() + 2);
    }
    int failed = 0, run = 0;
    for (const cases::Case& test : cases::all()) {
        if (!chosen(test.name, wanted)) continue;
        ++run;
        uint64_t seed = 0;
        try {
            for (; seed < seeds; ++seed) {
                simt::set_seed(seed);
                simt::launches().clear();
                test.body(seed);
            }
            std::printf("ok %s\n", test.name);
        } catch (const std::exception& error) {
            ++failed;
            std::printf("FAILED %s, seed %llu: %s\n", test.name, static_cast<unsigned long long>(seed), error.what());
        }
        std::fflush(stdout);
    }
    std::printf("%d run, %d failed\n", run, failed);
    return failed || !run;
}
