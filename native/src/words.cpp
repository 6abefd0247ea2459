#include "words.hpp"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <thread>

namespace penstock {

namespace {
using Clock = std::chrono::steady_clock;
using Micros = std::chrono::microseconds;

constexpr int SPINS = 400;  // a few microseconds: who carries may need this very core
constexpr Micros FIRST_SLEEP{20}, LONGEST_SLEEP{200};

static_assert(std::atomic_ref<std::int64_t>::is_always_lock_free);  // other processes know no lock of this one

std::int64_t read(std::int64_t* word) { return std::atomic_ref(*word).load(std::memory_order_acquire); }
}  // namespace

StepWords::StepWords(std::int64_t* done, std::vector<std::int64_t*> loads, double patience_s)
    : done_(done), base_(done ? read(done) : 0), patience_s_(patience_s) {
    for (std::int64_t* word : loads) loads_.push_back({word, false});
}

void StepWords::written(int layer) {
    if (done_) std::atomic_ref(*done_).store(base_ + layer + 1, std::memory_order_release);
}

void StepWords::await(int layer) {
    for (std::size_t i = 0; i < loads_.size(); i++) {
        Load& load = loads_[i];
        if (load.bad || in_place(load.word, layer)) continue;
        load.bad = true;
        bad_.push_back(static_cast<int>(i));
    }
}

bool StepWords::in_place(std::int64_t* word, int layer) {
    auto waits = [&](std::int64_t seen) { return seen >= 0 && seen <= layer; };
    std::int64_t seen = read(word);
    if (!waits(seen)) return seen >= 0;
    auto begin = Clock::now();
    auto waited_s = [&] { return std::chrono::duration<double>(Clock::now() - begin).count(); };
    for (int i = 0; i < SPINS && waits(seen); i++) {
#if defined(__x86_64__)
        __builtin_ia32_pause();
#endif
        seen = read(word);
    }
    for (Micros sleep = FIRST_SLEEP; waits(seen) && waited_s() < patience_s_; sleep = std::min(2 * sleep, LONGEST_SLEEP)) {
        std::this_thread::sleep_for(sleep);
        seen = read(word);
    }
    patience_s_ -= waited_s();
    return seen > layer;
}

}  // namespace penstock
