// Words in memory between one step and the threads that carry keys and values meanwhile, here or in another process.
//
// Knows words and layers, counted over the whole model from 0. Knows no pool and nobody who carries.
#pragma once
#include <cstdint>
#include <vector>

namespace penstock {

class StepWords {
public:
    // done: the step's base, counted up by one for each layer whose keys and values are written; null: nobody listens.
    // loads: of each load that the step reads, how many layers are in place; negative: it failed.
    // patience_s: what the step waits for all of them together.
    StepWords(std::int64_t* done, std::vector<std::int64_t*> loads, double patience_s);

    bool awaits() const { return !loads_.empty(); }

    // By one member of the team, after all members have written the layer.
    void written(int layer);
    // By one member, before any reads the layer: returns when each load has it in place or is bad.
    void await(int layer);

    // Indices of loads that failed or came too late. What the step computed from them means nothing.
    const std::vector<int>& bad() const { return bad_; }

private:
    struct Load {
        std::int64_t* word;
        bool bad;
    };
    bool in_place(std::int64_t* word, int layer);

    std::int64_t* done_;
    std::int64_t base_;
    std::vector<Load> loads_;
    std::vector<int> bad_;
    double patience_s_;  // what is left of it
};

}  // namespace penstock
