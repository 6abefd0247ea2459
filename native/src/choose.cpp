#include "choose.hpp"

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>

namespace penstock {

namespace {
constexpr float INF = std::numeric_limits<float>::infinity();
constexpr int OPENED = 64;      // best groups looked at for top_p before the whole row is
constexpr int NUM_BUCKETS = 2048;

// Philox4x32-10 of counter (position, index, purpose, 0) and key seed: words 0 and 1. Salmon et al. 2011.
enum Purpose : std::uint32_t { FIRST = 0, REST = 1 };
struct Words {
    std::uint32_t word0, word1;
};
Words philox(std::uint64_t seed, std::int64_t position, std::uint32_t index, std::uint32_t purpose) {
    std::uint32_t c0 = static_cast<std::uint32_t>(position), c1 = index, c2 = purpose, c3 = 0;
    std::uint32_t k0 = static_cast<std::uint32_t>(seed), k1 = static_cast<std::uint32_t>(seed >> 32);
    for (int round = 0; round < 10; round++) {
        std::uint64_t product0 = 0xD2511F53ull * c0, product1 = 0xCD9E8D57ull * c2;
        c0 = static_cast<std::uint32_t>(product1 >> 32) ^ c1 ^ k0;
        c2 = static_cast<std::uint32_t>(product0 >> 32) ^ c3 ^ k1;
        c1 = static_cast<std::uint32_t>(product1), c3 = static_cast<std::uint32_t>(product0);
        k0 += 0x9E3779B9u, k1 += 0xBB67AE85u;
    }
    return {c0, c1};
}
double exponential(std::uint32_t word) { return -std::log((static_cast<double>(word >> 8) + 0.5) * 0x1p-24); }
float gumbel_of(double time) { return static_cast<float>(-std::log(time)); }

// No token's noise is outside of these (see philox.py).
const float LOWEST_GUMBEL = static_cast<float>(-std::log(25 * std::log(2.0) * (1 + 1.0 / NOISE_GROUP)) - 1e-3);
const float HIGHEST_GUMBEL = static_cast<float>(-std::log(0x1p-25 / NOISE_GROUP * (1 - 0x1p-20)) + 1e-3);
}  // namespace

void edit_scores(const RowEdits& edits, float* scores, int vocab_size) {
    for (std::int64_t i = 0; i < edits.num_bias; i++) scores[edits.bias_ids[i]] += edits.bias[i];
    if (edits.allowed_ids) {
        std::vector<float> kept(edits.num_allowed);
        for (std::int64_t i = 0; i < edits.num_allowed; i++) kept[i] = scores[edits.allowed_ids[i]];
        std::fill(scores, scores + vocab_size, -INF);
        for (std::int64_t i = 0; i < edits.num_allowed; i++) scores[edits.allowed_ids[i]] = kept[i];
    }
    for (std::int64_t i = 0; i < edits.num_banned; i++) scores[edits.banned_ids[i]] = -INF;
    for (std::int64_t i = 0; i < edits.num_occurred; i++) {
        float& score = scores[edits.occurred_ids[i]];
        float scaled = score > 0 ? score / edits.repetition : score * edits.repetition;
        score = scaled - edits.frequency * edits.counts[i] - edits.presence * (edits.counts[i] > 0 ? 1.0f : 0.0f);
    }
}

std::int64_t RowChooser::choose(const Kernels& kernels, float* scores, int vocab_size, const Wish& wish) {
    vocab_size_ = vocab_size, num_groups_ = (vocab_size + NOISE_GROUP - 1) / NOISE_GROUP;
    std::fill(scores + vocab_size, scores + num_groups_ * NOISE_GROUP, -INF);
    peaks_.resize(num_groups_);
    if (kernels.peaks(scores, num_groups_, peaks_.data())) return NOT_A_NUMBER;
    float best = *std::max_element(peaks_.begin(), peaks_.end());
    if (best == -INF) return NO_TOKEN;
    if (best == INF) {  // equals above all others
        for (int i = 0; i < num_groups_ * NOISE_GROUP; i++) scores[i] = scores[i] == INF ? 0.0f : -INF;
        kernels.peaks(scores, num_groups_, peaks_.data());
        best = 0;
    }
    std::int64_t group = std::find(peaks_.begin(), peaks_.end(), best) - peaks_.begin();
    const float* tokens = scores + group * NOISE_GROUP;
    std::int64_t best_id = std::find(tokens, tokens + NOISE_GROUP, best) - scores;
    if (wish.is_greedy()) return best_id;
    return perturbed_best(scores, best, best_id, floor_of(kernels, scores, best, wish), wish);
}

// The lowest score that the filters keep; -inf where nothing filters.
float RowChooser::floor_of(const Kernels& kernels, const float* scores, float best, const Wish& wish) {
    float floor = -INF;
    bool has_k = wish.top_k > 0 && wish.top_k < vocab_size_, has_p = wish.top_p < 1;
    if (has_k) {
        std::int64_t k = wish.top_k;
        float reach = -std::numeric_limits<float>::max();
        if (k <= num_groups_) {  // the k-th best group bounds the k-th best token from below
            ordered_ = peaks_;
            std::nth_element(ordered_.begin(), ordered_.begin() + (k - 1), ordered_.end(), std::greater<>());
            reach = std::max(reach, ordered_[k - 1]);
        }
        gather(scores, reach);
        auto at = values_.begin() + (std::min<std::int64_t>(k, values_.size()) - 1);
        std::nth_element(values_.begin(), at, values_.end(), std::greater<>());
        floor = *at;
        if (has_p) {
            values_.erase(std::partition(values_.begin(), values_.end(), [&](float v) { return v >= floor; }), values_.end());
            std::sort(values_.begin(), values_.end(), std::greater<>());
            double total = 0;
            for (float v : values_) total += std::exp((static_cast<double>(v) - best) / wish.temperature);
            floor = nucleus_of_sorted(wish.top_p * total, 0, best, wish.temperature);
        }
    } else if (has_p) {
        floor = wide_nucleus(kernels, scores, best, wish);
    }
    if (wish.min_p > 0) {
        double exact = best + static_cast<double>(wish.temperature) * std::log(wish.min_p);
        float low = static_cast<float>(exact);
        if (low < exact) low = std::nextafter(low, INF);
        floor = std::max(floor, low);
    }
    return floor;
}

// values_: the finite scores that reach `reach`.
void RowChooser::gather(const float* scores, float reach) {
    values_.clear();
    for (int g = 0; g < num_groups_; g++) {
        if (peaks_[g] < reach) continue;
        const float* tokens = scores + static_cast<std::size_t>(g) * NOISE_GROUP;
        for (int i = 0; i < NOISE_GROUP; i++)
            if (tokens[i] >= reach && tokens[i] > -INF) values_.push_back(tokens[i]);
    }
}

// values_, sorted, `above` the mass of what is over them: the last one over which there is less than `wanted`.
float RowChooser::nucleus_of_sorted(double wanted, double above, float best, float temperature) const {
    float floor = values_.front();
    for (float v : values_) {
        if (above >= wanted) break;
        floor = v;
        above += std::exp((static_cast<double>(v) - best) / temperature);
    }
    return floor;
}

// top_p over the whole row. The best groups mostly hold enough. Where they do not, one pass deals the mass to buckets
// of equal width below the best score, and only the bucket of the cut is sorted.
float RowChooser::wide_nucleus(const Kernels& kernels, const float* scores, float best, const Wish& wish) {
    weights_.resize(static_cast<std::size_t>(num_groups_) * NOISE_GROUP);
    double total = kernels.weigh(scores, num_groups_, best, 1.0f / wish.temperature, weights_.data());
    double wanted = wish.top_p * total;
    int opened = std::min(OPENED, (num_groups_ + 3) / 4);
    ordered_ = peaks_;
    std::nth_element(ordered_.begin(), ordered_.begin() + (opened - 1), ordered_.end(), std::greater<>());
    gather(scores, ordered_[opened - 1]);
    double held = 0;
    for (float v : values_) held += std::exp((static_cast<double>(v) - best) / wish.temperature);
    if (held > wanted * (1 + 1e-5)) {
        std::sort(values_.begin(), values_.end(), std::greater<>());
        return nucleus_of_sorted(wanted, 0, best, wish.temperature);
    }
    // All tokens below this together hold less than 1 - top_p: the best one alone weighs 1.
    double depth = wish.temperature * (std::log(vocab_size_ / (1 - wish.top_p)) + 1);
    float low = static_cast<float>(best - depth), per = static_cast<float>(NUM_BUCKETS / depth);
    auto bucket_of = [&](float score) { return std::min(NUM_BUCKETS - 1, static_cast<int>((best - score) * per)); };
    mass_.assign(NUM_BUCKETS, 0.0);
    for (int g = 0; g < num_groups_; g++) {
        if (peaks_[g] < low) continue;
        std::size_t begin = static_cast<std::size_t>(g) * NOISE_GROUP;
        for (std::size_t i = begin; i < begin + NOISE_GROUP; i++)
            if (scores[i] >= low) mass_[bucket_of(scores[i])] += weights_[i];
    }
    double above = 0;
    int cut = 0;
    while (cut < NUM_BUCKETS - 1 && above + mass_[cut] < wanted) above += mass_[cut++];
    values_.clear();
    for (int g = 0; g < num_groups_; g++) {
        if (peaks_[g] < low) continue;
        const float* tokens = scores + static_cast<std::size_t>(g) * NOISE_GROUP;
        for (int i = 0; i < NOISE_GROUP; i++)
            if (tokens[i] >= low && bucket_of(tokens[i]) == cut) values_.push_back(tokens[i]);
    }
    if (values_.empty()) return low;
    std::sort(values_.begin(), values_.end(), std::greater<>());
    return nucleus_of_sorted(wanted, above, best, wish.temperature);
}

// argmax over tokens with score >= floor of (score - best) / temperature + gumbel. Of a group of tokens first only the
// earliest arrival is drawn, which bounds the noise of all of them; groups that could still win are opened.
std::int64_t RowChooser::perturbed_best(const float* scores, float best, std::int64_t best_id, float floor, const Wish& wish) {
    float temperature = wish.temperature, bound = -INF;
    auto rest_of = [&](std::int64_t token) {
        return exponential(philox(wish.seed, wish.position, static_cast<std::uint32_t>(token), REST).word0);
    };
    open_.clear();
    for (int g = 0; g < num_groups_; g++) {
        if (peaks_[g] < floor || !((peaks_[g] - best) / temperature >= LOWEST_GUMBEL - HIGHEST_GUMBEL)) continue;
        Words words = philox(wish.seed, wish.position, static_cast<std::uint32_t>(g), FIRST);
        Open open{g, static_cast<int>(words.word1 % NOISE_GROUP), exponential(words.word0) / NOISE_GROUP, 0};
        open.highest = gumbel_of(open.arrival);
        float score = scores[static_cast<std::size_t>(g) * NOISE_GROUP + open.first];
        if (score >= floor) bound = std::max(bound, (score - best) / temperature + open.highest);
        if (best_id / NOISE_GROUP == g && best_id % NOISE_GROUP != open.first)
            bound = std::max(bound, gumbel_of(open.arrival + rest_of(best_id)));
        open_.push_back(open);
    }
    std::int64_t winner = best_id;
    float largest = -INF;
    for (const Open& open : open_) {
        if (!((peaks_[open.group] - best) / temperature + open.highest >= bound)) continue;
        float deepest = temperature * (bound - open.highest) + best;
        deepest -= 1e-5f * (std::fabs(best) + 32 * temperature);  // more than the rounding of either side
        float reach = std::max(deepest, floor);
        std::int64_t begin = static_cast<std::int64_t>(open.group) * NOISE_GROUP;
        for (int i = 0; i < NOISE_GROUP; i++) {
            float score = scores[begin + i];
            if (!(score >= reach) || score == -INF) continue;
            double time = i == open.first ? open.arrival : open.arrival + rest_of(begin + i);
            float perturbed = (score - best) / temperature + gumbel_of(time);
            if (perturbed > largest) largest = perturbed, winner = begin + i;  // ids ascend: of equals the lowest stays
        }
    }
    return winner;
}

}  // namespace penstock
