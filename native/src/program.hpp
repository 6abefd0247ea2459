// A model as a list of operations over buffers, recorded once; a step is one call that runs the list over a batch.
//
// Knows operations, buffers, threads and the places of keys and values. Knows no model family: what the operations
// are, and in which order, is told by the layers of `penstock.nn`. Owns activations; weights and pools belong to the
// caller, who keeps them alive.
#pragma once
#include <algorithm>
#include <chrono>
#include <limits>
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "choose.hpp"
#include "kernels.hpp"
#include "numbers.hpp"
#include "team.hpp"
#include "words.hpp"

namespace penstock {

// One step, as the runner's arrays hold it. R rows of T tokens in all. Outputs are the tokens whose hidden states are
// read, ascending; null: all of them.
struct Batch {
    int num_tokens, num_rows;
    const std::int64_t* token_ids;     // [T]
    const std::int64_t* positions;     // [T]
    const std::int64_t* query_start;   // [R + 1]
    const std::int64_t* start;         // [R]
    std::vector<const std::int32_t*> tables;  // per KV group, [R][table_width]
    std::vector<std::size_t> table_width;
    const std::int64_t* outputs;  // [num_outputs] or null
    int num_outputs;
};

struct Pool {  // of one layer
    char* data;
    std::size_t block_bytes;  // K and V of all heads
    int num_kv_heads, head_dim;
    int group;   // of block tables
    int window;  // 0: none
    KVFormat format;
    int layer;  // as StepWords counts them
};

// How each row of a batch chooses its token.
struct Choosing {
    std::vector<Wish> wishes;
    std::vector<RowEdits> edits;  // empty: none for all rows
    std::vector<float*> raw;      // where a row's scores go before they are edited, [weight.n], or null; empty: nowhere
};

// Buffers are rows of a width, float32 (the residual stream) or bf16, padded so that no stride is a power of two.
enum class Kind : int { F32 = 0, BF16 = 1 };

class Program {
public:
    Program(const Kernels& kernels, Team& team, int max_tokens);

    int buffer(Kind kind, int width);
    int width(int buffer) const { return buffers_.at(buffer).width; }

    // ---- recording; ids of buffers ----
    void embed(const bf16* table, int width, int to);                 // table [tokens][width]
    void embed_packed(const Weight& weight, int to);                  // rows of a packed matrix, as tied embeddings are
    void rms_norm(int from, const float* weight, int width, float eps, int to);
    void linear(const Weight& weight, int from, int to);              // to: bf16, rounded
    void linear_add(const Weight& weight, int from, int to);          // to: float32, added
    void linear_silu_mul(const Weight& weight, int from, int to);     // columns: 16 of gate, 16 of up, ...
    // qkv rows: heads of q, of k, of v. Norms (where given) and rope in place, keys and values into the pool.
    // cos, sin: [num_positions][rotary / 2].
    void heads(int qkv, int num_heads, const Pool& pool, const float* q_norm, const float* k_norm, float eps,
               const float* cos, const float* sin, int rotary, int num_positions);
    void attend(int qkv, int num_heads, const Pool& pool, float scale, int to);  // scale: times log2(e)

    // ---- running ----
    // Keys and values of a layer are written in `heads` and read in `attend`: there the words are told and asked.
    // Behind the last `attend` no operation reads another token's row: from there on only the rows of outputs exist.
    // Throws for outputs that are not ascending tokens of the batch, or of a program whose end looks at all tokens.
    void run(const Batch& batch, StepWords& words);
    // The first rows of a bf16 buffer, [num_rows][width]: of tokens, or of outputs if it is written from there on.
    void read(int buffer, int num_rows, bf16* out) const;
    // No part of the recorded list; hidden [num_rows][weight.k]. All scores, float32 [num_rows][weight.n] ...
    void head(const Weight& weight, const bf16* hidden, int num_rows, float* out);
    // ... or the chosen tokens [num_rows] alone. Greedy rows keep no scores; of the others SCORE_ROWS are held at once.
    void choose(const Weight& weight, const bf16* hidden, int num_rows, const Choosing& how, std::int64_t* tokens);

    // (operation, seconds since the last clear_seconds), waiting for the slowest member included. The last is `choose`.
    std::vector<std::pair<std::string, double>> seconds() const;
    void clear_seconds();

private:
    struct Buffer {
        Kind kind;
        int width;
        std::size_t stride;  // elements
        std::unique_ptr<char, void (*)(void*)> data;
        float* f32(std::size_t row) const { return reinterpret_cast<float*>(data.get()) + row * stride; }
        bf16* half(std::size_t row) const { return reinterpret_cast<bf16*>(data.get()) + row * stride; }
    };
    enum class What { EMBED, NORM, LINEAR, LINEAR_ADD, LINEAR_SILU_MUL, HEADS, ATTEND, QUANTIZE };
    struct Op {
        What what;
        int from = -1, to = -1;
        Weight weight{};
        const bf16* table = nullptr;
        int width = 0, num_heads = 0, rotary = 0;
        float eps = 0, scale = 0;
        const float *gamma = nullptr, *q_norm = nullptr, *k_norm = nullptr, *cos = nullptr, *sin = nullptr;
        Pool pool{};
        int ints = -1;  // int8 form of its input
        int rotation = 0;  // of that, as Weight has it
        int num_rows = 0;      // in this step: of its result
        bool narrows = false;  // in this step: it reads all tokens, and its result has the rows of outputs only
        double seconds = 0;
    };
    struct Ints {  // int8 rows with their scales
        std::size_t stride;
        std::unique_ptr<char, void (*)(void*)> data;
        std::vector<float> scale;
        std::vector<std::int32_t> sums;
        std::size_t sums_stride;
    };
    struct Queries {  // neighbouring tokens of one row that attend, and the first row of their results
        int row, token, position, num_tokens, to;
    };
    struct Task : Queries {  // one KV head; one span of the context, or all of them (-1)
        int head, span;
    };
    struct Run {  // tokens of one row that lie in one KV block
        int row, token, position, num_tokens;
    };
    struct Attention {  // of a step and a KV group, the same for all its layers
        std::vector<Task> tasks;
        int num_spans = 1;
        std::vector<float> partial;  // results of tasks that are one span each
    };

    struct Place {  // a piece of attention: a task and the span of the context that begins there
        int unit, span_begin;
    };
    struct Course {  // of a member through its pieces: places of a head's keys, or values, in the order of reading
        std::vector<const char*> heads;
        std::size_t used = 0, asked = 0;  // of heads: read, and asked for
        Place now{-1, 0}, end{-1, 0};     // the piece at `used`, and the first that is not in heads
    };

    static constexpr int SCORE_ROWS = 64;  // weights read once for as many rows cost no more than computing with them

    Rows head_rows(const Weight& weight, const bf16* hidden, int num_rows);
    void choose_some(const Weight& weight, const Rows& rows, const Choosing& how, int begin, int end, std::int64_t* tokens);
    void record_linear(What what, const Weight& weight, int from, int to);
    int ints_for(int width);
    int quantized(const Weight& weight, int from);
    void quantize(const bf16* row, int width, int rotation, Ints& to, int at, int member);
    int columns_per_unit(const Weight& weight) const;
    int units(const Op& op) const;
    char* scratch(int member, std::size_t bytes);
    Rows input(const Op& op) const;
    void perform(const Op& op, const Batch& batch, int member, Deal& deal);
    template <class Then>
    void product(const Weight& weight, const Rows& rows, int num_rows, int member, Deal& deal, Then then);
    void run_heads(const Batch& batch, const Op& op, const Run& run, int head);
    void end_recording();
    void check_outputs(const Batch& batch) const;
    void find_queries(const Batch& batch, bool of_outputs);
    void gather_outputs(const Batch& batch, int member);
    Attention& plan_of(const Op& op) { return attention_[{op.pool.group, op.narrows}]; }
    void plan_attention(const Batch& batch, const Op& op);
    AttendPiece piece_of(const Batch& batch, const Op& op, const Task& task) const;
    static int first_seen(const Op& op, const Task& task);
    static int num_blocks(const Op& op, const Task& task, int span_begin);
    Place start_of(const Op& op, int unit);
    Place after(const Op& op, Place place);
    void look_ahead(const Batch& batch, const Op& op, Course& course, Place place, AttendPiece& piece);
    void attend_tasks(const Batch& batch, const Op& op, int member, Deal& deal);
    void merge_spans(const Op& op, int member);
    void finish(const Op& op, const Task& task, const float* out, const float* sum);

    const Kernels& kernels_;
    Team& team_;
    int max_tokens_;
    int num_positions_ = std::numeric_limits<int>::max();  // that every table of cos and sin has
    std::vector<Buffer> buffers_;
    std::vector<Ints> ints_;
    std::map<int, int> ints_of_;  // width -> ints_
    std::vector<Op> ops_;
    std::vector<Deal> deals_;
    Deal head_deal_, choosing_;
    std::vector<bf16> head_rows_;
    std::unique_ptr<char, void (*)(void*)> scores_{nullptr, nullptr};
    std::size_t scores_bytes_ = 0;
    std::vector<int> stored_;                 // of each row being chosen for: its place in scores_, or -1
    std::vector<float> tops_;                 // of greedy rows, per member: what Kernels::best gathers
    std::vector<std::int32_t> tops_at_;
    std::vector<RowChooser> choosers_;        // per member
    std::vector<std::vector<char>> scratch_;  // per member
    std::vector<Course> courses_;             // per member
    std::map<std::pair<int, bool>, Attention> attention_;  // by KV group, of all tokens or of outputs
    std::vector<Queries> queries_;            // what plan_attention plans
    int last_attend_ = -1;                    // where rows narrow to those of outputs
    std::vector<int> carried_;                // buffers written before it and read after it
    std::vector<Run> runs_;                   // of the step
    double choosing_seconds_ = 0;
};

inline double now() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }  // s

inline bool wants_ints(const Weight& weight) { return weight.format == Format::W8A8 || weight.format == Format::W4A8; }

inline Rows from_row(const Rows& rows, int row) {
    std::size_t size = rows.scale ? 1 : 2;
    return {static_cast<const char*>(rows.data) + row * rows.stride * size, rows.stride,
            rows.scale ? rows.scale + row : nullptr, rows.sums ? rows.sums + row * rows.sums_stride : nullptr,
            rows.sums_stride};
}

// Units of columns; for each, all rows in pieces whose results lie in L1 until `then(row, column, width, c)`.
template <class Then>
void Program::product(const Weight& weight, const Rows& rows, int num_rows, int member, Deal& deal, Then then) {
    int columns = columns_per_unit(weight), exhausted = 0;
    float* c = reinterpret_cast<float*>(scratch(member, sizeof(float) * kernels_.rows_at_once * columns));
    for (int unit; (unit = deal.next(member, team_.size(), exhausted)) >= 0;) {
        int column = unit * columns, width = std::min(columns, weight.n_pad - column);
        for (int row = 0; row < num_rows; row += kernels_.rows_at_once) {
            int now = std::min(kernels_.rows_at_once, num_rows - row);
            kernels_.gemm(weight, from_row(rows, row), now, column, width, c, columns);
            for (int r = 0; r < now; r++) then(row + r, column, width, c + r * columns);
        }
    }
}

}  // namespace penstock
