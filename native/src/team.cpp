#include "team.hpp"

#include <pthread.h>
#include <sched.h>

#include <stdexcept>
#include <string>
#include <system_error>

namespace penstock {

namespace {
constexpr int SPINS = 4000;  // some 40 us: longer than the barriers of a step last, shorter than anybody notices

inline void pause() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
}

void wait_while(std::atomic<std::uint32_t>& value, std::uint32_t old) {
    for (int i = 0; i < SPINS; i++) {
        if (value.load(std::memory_order_acquire) != old) return;
        pause();
    }
    while (value.load(std::memory_order_acquire) == old) value.wait(old, std::memory_order_acquire);
}
}  // namespace

Team::Team(int size, const std::vector<int>& cpus) : size_(size) {
    try {
        for (int member = 1; member < size; member++) {
            int cpu = member < static_cast<int>(cpus.size()) ? cpus[member] : -1;
            threads_.emplace_back([this, member, cpu] { work(member, cpu); });
        }
    } catch (const std::system_error&) {
        std::string begun = std::to_string(threads_.size() + 1);
        leave();
        throw std::runtime_error("the system gives no more than " + begun + " of " + std::to_string(size) + " threads");
    }
}

Team::~Team() { leave(); }

void Team::leave() {
    leaving_.store(true);
    generation_.fetch_add(1, std::memory_order_release);
    generation_.notify_all();
    for (auto& thread : threads_) thread.join();
}

void Team::work(int member, int cpu) {
    if (cpu >= 0) {
        cpu_set_t set;
        CPU_ZERO(&set);
        CPU_SET(cpu, &set);
        pthread_setaffinity_np(pthread_self(), sizeof set, &set);  // fails harmlessly where it is not allowed
    }
    pthread_setname_np(pthread_self(), "penstock-native");
    std::uint32_t seen = 0;
    for (;;) {
        wait_while(generation_, seen);
        seen++;
        if (leaving_.load()) return;
        (*job_)(member);
        if (finished_.fetch_add(1, std::memory_order_acq_rel) + 2 == static_cast<std::uint32_t>(size_))
            finished_.notify_one();
    }
}

void Team::run(const std::function<void(int)>& f) {
    if (size_ == 1) return f(0);
    job_ = &f;
    finished_.store(0, std::memory_order_relaxed);
    generation_.fetch_add(1, std::memory_order_release);
    generation_.notify_all();
    f(0);
    std::uint32_t done;
    while ((done = finished_.load(std::memory_order_acquire)) + 1 != static_cast<std::uint32_t>(size_))
        wait_while(finished_, done);
}

void Team::meet() {
    if (size_ == 1) return;
    std::uint32_t phase = phase_.load(std::memory_order_acquire);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == size_) {
        arrived_.store(0, std::memory_order_relaxed);
        phase_.store(phase + 1, std::memory_order_release);
        phase_.notify_all();
    } else {
        wait_while(phase_, phase);
    }
}

}  // namespace penstock
