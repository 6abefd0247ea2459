#include "ceilings.hpp"

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <vector>

#include "pack.hpp"

namespace penstock {

namespace {
constexpr int ROUNDS = 5;
constexpr double LEAST_SECONDS = 0.2;

double now() {
    return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

struct Free {
    void operator()(void* p) const { std::free(p); }
};

std::unique_ptr<char, Free> zeros(std::size_t bytes) {
    std::size_t size = (bytes + 4095) / 4096 * 4096;
    std::unique_ptr<char, Free> data(static_cast<char*>(std::aligned_alloc(4096, size)));
    if (!data) throw std::bad_alloc();
    std::memset(data.get(), 0, size);
    return data;
}

std::uint64_t sum_of(const std::uint64_t* p, std::size_t n) {
    std::uint64_t sum[16] = {};
    for (std::size_t i = 0; i + 16 <= n; i += 16) {
        __builtin_prefetch(p + i + 512, 0, 0);
        __builtin_prefetch(p + i + 520, 0, 0);
        for (int j = 0; j < 16; j++) sum[j] += p[i + j];
    }
    for (int j = 1; j < 16; j++) sum[0] += sum[j];
    return sum[0];
}

// Seconds that the team needs for f(member), the best of some rounds; those of a moment would all fall to a neighbour.
template <class F>
double best_of(Team& team, F f) {
    double best = 1e30, end = now() + LEAST_SECONDS;
    for (int round = 0; round < ROUNDS || now() < end; round++) {
        double begin = now();
        team.run(f);
        best = std::min(best, now() - begin);
    }
    return best;
}
}  // namespace

double read_rate(Team& team, std::size_t bytes) {
    auto data = zeros(bytes);
    std::size_t words = bytes / 8 / team.size();
    std::vector<std::uint64_t> sums(team.size() * 8);
    double seconds = best_of(team, [&](int member) {
        sums[member * 8] = sum_of(reinterpret_cast<const std::uint64_t*>(data.get()) + member * words, words);
    });
    volatile std::uint64_t kept = sums[0];
    static_cast<void>(kept);
    return static_cast<double>(words) * 8 * team.size() / seconds;
}

double product_rate(const Kernels& kernels, Team& team, Format format) {
    constexpr int K = 256, COLS = 32, REPEATS = 200;  // 16 KiB of bf16 weights
    int rows = kernels.rows_at_once;
    double seconds = best_of(team, [&](int) {
        auto data = zeros(packed_bytes(format, COLS, K));
        auto activations = zeros(static_cast<std::size_t>(rows) * (K + 32) * 2);
        std::vector<float> scale(COLS * (K / GROUP) + COLS, 1.0f), row_scale(rows, 1.0f), c(static_cast<std::size_t>(rows) * COLS);
        std::vector<std::int32_t> sums(COLS, 0), row_sums(static_cast<std::size_t>(rows) * (K / GROUP), 0);
        std::vector<bf16> exponents(COLS / COLUMNS * 32, 0);
        std::vector<RareWeights> rare(COLS / COLUMNS, {nullptr, 0});
        Weight weight{format, COLS, K, COLS, K, data.get(), scale.data(), sums.data(), nullptr, exponents.data(), rare.data()};
        bool ints = format == Format::W8A8 || format == Format::W4A8;
        Rows a{activations.get(), static_cast<std::size_t>(ints ? K + 64 : K + 32), ints ? row_scale.data() : nullptr,
               ints ? row_sums.data() : nullptr, K / GROUP};
        for (int i = 0; i < REPEATS; i++) kernels.gemm(weight, a, rows, 0, COLS, c.data(), COLS);
    });
    return 2.0 * rows * K * COLS * REPEATS * team.size() / seconds;
}

}  // namespace penstock
