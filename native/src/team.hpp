// A team of threads that runs one function at a time and meets at barriers inside it.
//
// The caller is member 0. Waiting spins for some tens of microseconds, then sleeps: a neighbour that needs the core
// costs a wake-up, not a time slice, and an idle engine uses no processor time.
#pragma once
#include <atomic>
#include <functional>
#include <thread>
#include <vector>

namespace penstock {

class Team {
public:
    // cpus: one per member to pin the members 1.. to; empty: not pinned. The caller's own affinity stays as it is.
    Team(int size, const std::vector<int>& cpus);
    ~Team();
    Team(const Team&) = delete;
    Team& operator=(const Team&) = delete;

    int size() const { return size_; }

    // f(member) on every member; returns when all have returned. Not from inside f.
    void run(const std::function<void(int)>& f);

    // Inside `run`: nobody returns before everybody has come.
    void meet();

private:
    void leave();
    void work(int member, int cpu);

    const int size_;
    const std::function<void(int)>* job_ = nullptr;
    alignas(64) std::atomic<std::uint32_t> generation_{0};
    alignas(64) std::atomic<std::uint32_t> finished_{0};
    alignas(64) std::atomic<int> arrived_{0};
    alignas(64) std::atomic<std::uint32_t> phase_{0};
    std::atomic<bool> leaving_{false};
    std::vector<std::thread> threads_;
};

// Units of work [0, total) dealt to a team's members: each takes its own share first, in order, then what the others
// have left. Which member computes a unit never changes its result.
class Deal {
public:
    explicit Deal(int size) : taken_(size) {}

    void reset(int total) {
        total_ = total;
        for (auto& taken : taken_) taken.n.store(0, std::memory_order_relaxed);
    }
    // The next unit for a member, or -1. `exhausted`: how many shares it has seen empty; starts at 0.
    int next(int member, int size, int& exhausted) {
        for (; exhausted < size; exhausted++) {
            int owner = (member + exhausted) % size;
            int begin = static_cast<int>(static_cast<long>(total_) * owner / size);
            int end = static_cast<int>(static_cast<long>(total_) * (owner + 1) / size);
            if (begin == end) continue;
            int unit = begin + taken_[owner].n.fetch_add(1, std::memory_order_relaxed);
            if (unit < end) return unit;
        }
        return -1;
    }

private:
    struct alignas(64) Taken {
        std::atomic<int> n{0};
    };
    int total_ = 0;
    std::vector<Taken> taken_;  // by member
};

}  // namespace penstock
