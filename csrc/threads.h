// A loop over independent units on several threads. Nothing outlives the call: no pool to fork, unload or share.
#ifndef SJD2_THREADS_H
#define SJD2_THREADS_H

#include <stdint.h>

#include <atomic>
#include <thread>

namespace sjd2 {

constexpr int64_t MAX_THREADS = 64;
constexpr int64_t WORTH_A_THREAD = 200000;  // nanoseconds of work: several times what it costs to start a thread

inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

// work(unit, worker) for every unit below `units`, worker < min(threads, MAX_THREADS); the caller is worker 0.
// `nanoseconds` is a guess of what a unit costs: little work stays on the calling thread.
template <class Work>
void parallel(int64_t units, double nanoseconds, int64_t threads, const Work &work) noexcept {
    const double worth = nanoseconds * (double)units / (double)WORTH_A_THREAD;
    const int64_t workers = least(least(threads, MAX_THREADS), least(units, worth < 64.0 ? (int64_t)worth : 64));
    if (workers <= 1) {
        for (int64_t unit = 0; unit < units; ++unit) work(unit, 0);
        return;
    }
    std::atomic<int64_t> next{0};
    const int64_t share = units / (workers * 8) + 1;
    const auto run = [&](int64_t worker) {
        for (int64_t begin; (begin = next.fetch_add(share)) < units;)
            for (int64_t unit = begin; unit < least(begin + share, units); ++unit) work(unit, worker);
    };
    std::thread helpers[MAX_THREADS];
    int64_t started = 1;
    try {
        for (; started < workers; ++started) helpers[started] = std::thread(run, started);
    } catch (...) {
        // The system gives no more threads: those that run, at least this one, do the work.
    }
    run(0);
    for (int64_t helper = 1; helper < started; ++helper) helpers[helper].join();
}

}  // namespace sjd2
#endif
