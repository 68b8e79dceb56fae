// run_kernels [--seeds N] [WHAT...]: runs the cases of the files test_WHAT.cpp or the cases named WHAT (all but the
// broken ones when nothing is given), each under N seeds of the scheduler, and says which failed.
#include <cstdio>
#include <cstdlib>

#include "cases.h"
#include "simt.h"

namespace {

bool chosen(const cases::Case& test, const std::vector<std::string>& wanted) {
    const std::string name = test.name, file = test.file.substr(test.file.find_last_of('/') + 1);
    const bool sound = name.rfind("broken_", 0) != 0;
    for (const std::string& what : wanted)
        if (name == what || (sound && file == "test_" + what + ".cpp")) return true;
    return wanted.empty() && sound;
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
        if (!chosen(test, wanted)) continue;
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
