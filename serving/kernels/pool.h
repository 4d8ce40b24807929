// Threads for the kernels. Unlike OpenMP's, the one that asks waits for the work to be done and not for the others to
// come: on a machine or in a container whose processors are busy elsewhere, whoever runs does what there is to do.

#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <thread>

class Pool {
  public:
    // One of the process, never destroyed: its threads end with the process.
    static Pool& shared() {
        static Pool* pool = new Pool;
        return *pool;
    }

    // Calls work(i) for each i below `count` (16 million at most), on this thread and `threads` − 1 others. Not reentrant.
    template <class F>
    void run(long count, long threads, F&& work) {
        if (threads < 2 || count < 2) {
            for (long i = 0; i < count; ++i) work(i);
            return;
        }
        for (; others_ < threads - 1; ++others_) std::thread([this] { serve(); }).detach();
        call_.store([](void* context, long i) { (*(std::remove_reference_t<F>*)context)(i); }, std::memory_order_relaxed);
        context_.store((void*)&work, std::memory_order_relaxed);
        done_.store(0, std::memory_order_relaxed);
        const uint64_t round = (state_.load(std::memory_order_relaxed) >> 48) + 1;
        state_.store(round << 48 | (uint64_t)count << 24, std::memory_order_release);
        { std::lock_guard<std::mutex> lock(mutex_); }  // who has just found nothing to do is now asleep, and is woken
        wake_.notify_all();
        help();
        for (int spins = 0; done_.load(std::memory_order_acquire) < count; ++spins) rest(spins);
    }

  private:
    // Takes what there is to take. The round, its count and the next index are one word: a late thread that read an
    // older round cannot take an index of this one, and what it takes belongs to a `call_` that cannot have changed.
    void help() {
        for (;;) {
            uint64_t state = state_.load(std::memory_order_acquire);
            const long next = state & 0xffffff, count = state >> 24 & 0xffffff;
            if (next >= count) return;
            const auto call = call_.load(std::memory_order_relaxed);
            void* context = context_.load(std::memory_order_relaxed);
            if (!state_.compare_exchange_weak(state, state + 1, std::memory_order_acq_rel)) continue;
            call(context, next);
            done_.fetch_add(1, std::memory_order_release);
        }
    }

    void serve() {
        for (uint64_t seen = 0;;) {
            for (int spins = 0; spins < SPINS && state_.load(std::memory_order_acquire) >> 48 == seen; ++spins) pause();
            if (state_.load(std::memory_order_acquire) >> 48 == seen) {
                std::unique_lock<std::mutex> lock(mutex_);
                wake_.wait(lock, [&] { return state_.load(std::memory_order_acquire) >> 48 != seen; });
            }
            seen = state_.load(std::memory_order_acquire) >> 48;
            help();
        }
    }

    static void pause() {
#if defined(__x86_64__)
        __builtin_ia32_pause();
#endif
    }

    static void rest(int spins) {
        if (spins < SPINS) pause();
        else std::this_thread::yield();
    }

    static constexpr int SPINS = 2000;  // some tens of microseconds: the time between two layers

    std::atomic<uint64_t> state_{0};  // round · 2^48 + count · 2^24 + next
    std::atomic<long> done_{0};
    std::atomic<void (*)(void*, long)> call_{nullptr};
    std::atomic<void*> context_{nullptr};
    std::mutex mutex_;
    std::condition_variable wake_;
    long others_ = 0;
};
