// One row of scores to one token: edits, filters, noise, argmax. No sort of the vocabulary.
//
// The definitions are those of `penstock/nn/kernels/sampling.py`, whose reference this gives the same tokens as, but
// where float rounding decides a top_p cut; noise is that of `philox.py`. Knows one row; no batch and no threads.
#pragma once
#include <cstdint>
#include <vector>

#include "kernels.hpp"

namespace penstock {

constexpr std::int64_t NOT_A_NUMBER = -1, NO_TOKEN = -2;  // in place of a token: NaN in the row; every token forbidden

// What a row asks for. Off: temperature 0 (greedy), top_k 0, top_p 1, min_p 0.
struct Wish {
    float temperature;
    std::int64_t top_k;
    double top_p, min_p;
    std::uint64_t seed;
    std::int64_t position;  // absolute, of the token being chosen
    bool is_greedy() const { return temperature < 1e-5f; }
};

// How scores change before anything looks at them, in this order. Ids are inside the vocabulary, each once per list.
struct RowEdits {
    const std::int64_t* bias_ids;
    const float* bias;
    std::int64_t num_bias;
    const std::int64_t* allowed_ids;  // null: all
    std::int64_t num_allowed;
    const std::int64_t* banned_ids;
    std::int64_t num_banned;
    const std::int64_t* occurred_ids;
    const float* counts;  // in the output; 0: in the prompt alone
    std::int64_t num_occurred;
    float repetition, frequency, presence;
    bool empty() const { return num_bias == 0 && !allowed_ids && num_banned == 0 && num_occurred == 0; }
};

void edit_scores(const RowEdits& edits, float* scores, int vocab_size);

class RowChooser {
public:
    // scores: NOISE_GROUP-aligned row of vocab_size scores, writable, with room up to a multiple of NOISE_GROUP.
    std::int64_t choose(const Kernels& kernels, float* scores, int vocab_size, const Wish& wish);

private:
    float floor_of(const Kernels& kernels, const float* scores, float best, const Wish& wish);
    void gather(const float* scores, float reach);
    float nucleus_of_sorted(double wanted, double above, float best, float temperature) const;
    float wide_nucleus(const Kernels& kernels, const float* scores, float best, const Wish& wish);
    std::int64_t perturbed_best(const float* scores, float best, std::int64_t best_id, float floor, const Wish& wish);

    struct Open {
        int group, first;
        double arrival;
        float highest;
    };
    int vocab_size_ = 0, num_groups_ = 0;
    std::vector<float> peaks_, ordered_, values_, weights_;
    std::vector<double> mass_;
    std::vector<Open> open_;
};

}  // namespace penstock
