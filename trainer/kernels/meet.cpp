// Processes of one machine that wait for one another, awake: to fall asleep and be woken takes longer than most waits last.

#include <sched.h>

#include <chrono>

namespace {

constexpr long LINE = 8;  // longs: each one's turn lies in a cache line of its own

}  // namespace

extern "C" {

// Says in memory that all share that `rank` has come to `turn`, and waits until all have; whether they did within `wait_us`.
// What each wrote before is then seen by all.
int meet(long* turns, long ranks, long rank, long turn, long wait_us) {
    const auto begun = std::chrono::steady_clock::now();
    __atomic_store_n(&turns[rank * LINE], turn, __ATOMIC_RELEASE);
    for (long other = 0; other < ranks; ++other)
        while (__atomic_load_n(&turns[other * LINE], __ATOMIC_ACQUIRE) < turn) {
            if (std::chrono::steady_clock::now() - begun > std::chrono::microseconds(wait_us)) return 0;
            sched_yield();  // where there are more ranks than cores, the one that is waited for gets this one
        }
    return 1;
}

}  // extern "C"
