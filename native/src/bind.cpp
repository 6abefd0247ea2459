// The Python face of the native kernels: packed weights, a team of threads, and programs. Knows no torch: arrays come
// as buffers, bf16 as uint16. Everything that takes time releases the interpreter's lock.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <sys/mman.h>

#include <algorithm>
#include <cstring>
#include <functional>
#include <memory>
#include <optional>
#include <stdexcept>
#include <vector>

#include "arena.hpp"
#include "ceilings.hpp"
#include "cpu.hpp"
#include "pack.hpp"
#include "pages.hpp"
#include "program.hpp"

namespace nb = nanobind;
using namespace nb::literals;
using namespace penstock;

namespace {

template <class T> using Matrix = nb::ndarray<const T, nb::ndim<2>, nb::device::cpu>;
template <class T> using Array = nb::ndarray<const T, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
template <class T> using Table = nb::ndarray<T, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Tables = std::vector<Table<const std::int32_t>>;
using Tokens = nb::ndarray<std::int64_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

std::size_t up(std::size_t n, std::size_t to) { return (n + to - 1) / to * to; }

const Kernels& kernels_named(const std::string& name) {
    for (const Kernels* kernels : usable_kernels())
        if (name == kernels->name) return *kernels;
    throw std::invalid_argument("this machine or build has no kernels called " + name);
}

// Packed bytes and what belongs to them. Filled in pieces of whole blocks, then only read.
class PackedWeight {
public:
    PackedWeight(int format, int n, int k, std::shared_ptr<Arena> arena)
        : bytes_(packed_bytes(static_cast<Format>(format), n, k)) {
        weight_.format = static_cast<Format>(format);
        bool groups = weight_.format == Format::INT4 || weight_.format == Format::W4A8;
        weight_.n = n, weight_.k = k;
        weight_.n_pad = static_cast<int>(up(n, COLUMNS)), weight_.k_pad = static_cast<int>(up(k, groups ? GROUP : K_ALIGN));
        if (char* at = arena ? arena->take(bytes_) : nullptr) data_ = std::shared_ptr<char>(std::move(arena), at);
        else data_ = pages(bytes_);  // no arena, or it is full
        weight_.data = data_.get();
        if (weight_.format != Format::BF16) {
            scale_.assign(groups ? static_cast<std::size_t>(weight_.n_pad) * (weight_.k_pad / GROUP) : weight_.n_pad, 0.0f);
            weight_.scale = scale_.data();
        }
        if (weight_.format == Format::W8A8) {
            sums_.assign(weight_.n_pad, 0);
            weight_.sums = sums_.data();
        }
    }
    PackedWeight(const PackedWeight&) = delete;

    const Weight& weight() const { return weight_; }
    std::size_t num_bytes() const { return bytes_ + scale_.size() * 4 + sums_.size() * 4; }

    void set_bias(Array<float> bias) {
        if (static_cast<int>(bias.shape(0)) != weight_.n) throw std::invalid_argument("bias and weight differ in size");
        bias_.assign(weight_.n_pad, 0.0f);
        std::copy_n(bias.data(), weight_.n, bias_.data());
        weight_.bias = bias_.data();
    }

    // bf16 rows, quantized on the way, into blocks of 16 output columns from column `begin` on: every block, or only
    // each `every`-th. Without a team on the calling thread; several threads may fill different blocks at once.
    void fill(Team* team, int begin, Matrix<std::uint16_t> rows, int every) {
        int num = static_cast<int>(rows.shape(0)), blocks = static_cast<int>(up(num, COLUMNS)) / COLUMNS;
        if (every < 1 || (every > 1 && num % COLUMNS)) throw std::invalid_argument("the rows do not fit the weight");
        if (every > 1) check(begin, static_cast<std::size_t>(blocks - 1) * every * COLUMNS + COLUMNS, rows.shape(1));
        else check(begin, rows.shape(0), rows.shape(1));
        if (rows.stride(1) != 1) throw std::invalid_argument("rows must be contiguous");
        const bf16* from = rows.data();
        std::size_t stride = rows.stride(0);
        auto fill = [&](int first, int last) {
            for (int block = first; block < last; block++) {
                int at = block * COLUMNS;
                fill_block(begin + at * every, std::min(COLUMNS, num - at), from + at * stride, stride);
            }
        };
        nb::gil_scoped_release unlocked;
        if (!team) return fill(0, blocks);
        team->run([&](int member) { fill(blocks * member / team->size(), blocks * (member + 1) / team->size()); });
    }

    // Columns that are quantized already: int8 rows with float32 scales [rows][groups], groups of 128 or one. Block i of
    // 16 rows becomes columns begin + 16 * step * i and following.
    void fill_quantized(Team& team, int begin, int step, Matrix<std::int8_t> rows, Matrix<float> scales) {
        check_quantized(begin, step, rows.shape(0), rows.shape(1), scales);
        if (rows.stride(1) != 1) throw std::invalid_argument("rows must be contiguous");
        const std::int8_t* from = rows.data();
        std::size_t stride = rows.stride(0);
        fill_blocks(team, begin, step, static_cast<int>(rows.shape(0)), scales, [&](int row, int count, int to) {
            pack_integers(to, count, from + row * stride, stride);
        });
    }

    // The same from 4-bit integers as compressed-tensors packs them: whole words of 8, as bytes.
    void fill_nibbles(Team& team, int begin, int step, Table<const std::uint8_t> rows, Matrix<float> scales) {
        check_quantized(begin, step, rows.shape(0), static_cast<std::size_t>(weight_.k), scales);
        std::size_t stride = rows.shape(1), k = static_cast<std::size_t>(weight_.k);
        if (!is_grouped() || stride != up(k, 8) / 2) throw std::invalid_argument("the words do not fit the weight");
        const std::uint8_t* from = rows.data();
        fill_blocks(team, begin, step, static_cast<int>(rows.shape(0)), scales, [&](int row, int count, int to) {
            std::vector<std::int8_t> integers(count * k);
            for (int j = 0; j < count; j++) unpack_nibbles(from + (row + j) * stride, weight_.k, integers.data() + j * k);
            pack_integers(to, count, integers.data(), k);
        });
    }

    // Rows as they are computed with, float32 [n][k].
    void unpack(Table<float> out) const {
        if (static_cast<int>(out.shape(0)) != weight_.n || static_cast<int>(out.shape(1)) != weight_.k)
            throw std::invalid_argument("the result has another shape than the weight");
        for (int row = 0; row < weight_.n; row++) unpack_row(weight_, row, out.data() + static_cast<std::size_t>(row) * weight_.k);
    }

private:
    bool is_grouped() const { return weight_.format == Format::INT4 || weight_.format == Format::W4A8; }

    void check(int begin, std::size_t num, std::size_t k) const {
        bool fits = begin >= 0 && begin % COLUMNS == 0 && begin + static_cast<long>(num) <= weight_.n;
        bool whole = num % COLUMNS == 0 || begin + static_cast<long>(num) == weight_.n;
        if (!fits || !whole || static_cast<int>(k) != weight_.k) throw std::invalid_argument("the rows do not fit the weight");
    }

    void check_quantized(int begin, int step, std::size_t num, std::size_t k, const Matrix<float>& scales) const {
        if (weight_.format == Format::BF16) throw std::invalid_argument("a bf16 weight takes bf16 rows");
        bool whole = num % COLUMNS == 0 || (step == 1 && begin + static_cast<long>(num) == weight_.n);
        long last = begin + COLUMNS * step * (static_cast<long>(up(num, COLUMNS)) / COLUMNS - 1);
        bool fits = begin >= 0 && begin % COLUMNS == 0 && step > 0 && num > 0 && last < weight_.n;
        if (!fits || !whole || static_cast<int>(k) != weight_.k) throw std::invalid_argument("the rows do not fit the weight");
        std::size_t groups = is_grouped() ? up(weight_.k, GROUP) / GROUP : 1;
        if (scales.shape(0) != num || scales.shape(1) != groups) throw std::invalid_argument("the scales do not match the weight");
    }

    // pack(row, count, column) for every block of the rows, by the team, and its scales.
    template <class Pack>
    void fill_blocks(Team& team, int begin, int step, int num, const Matrix<float>& scales, const Pack& pack) {
        int blocks = static_cast<int>(up(num, COLUMNS)) / COLUMNS, groups = static_cast<int>(scales.shape(1));
        const float* scale = scales.data();
        std::int64_t row_stride = scales.stride(0), group_stride = scales.stride(1);
        nb::gil_scoped_release unlocked;
        team.run([&](int member) {
            int first = blocks * member / team.size(), last = blocks * (member + 1) / team.size();
            for (int block = first; block < last; block++) {
                int row = block * COLUMNS, count = std::min(COLUMNS, num - row), to = begin + block * step * COLUMNS;
                pack(row, count, to);
                for (int j = 0; j < count; j++)
                    for (int g = 0; g < groups; g++) set_scale(to + j, g, scale[(row + j) * row_stride + g * group_stride]);
            }
        });
    }

    void set_scale(int column, int group, float value) {
        if (!is_grouped()) scale_[column] = value;
        else scale_[(static_cast<std::size_t>(column / COLUMNS) * (weight_.k_pad / GROUP) + group) * COLUMNS + column % COLUMNS] = value;
    }

    void fill_block(int column, int count, const bf16* from, std::size_t stride) {
        int k = weight_.k;
        if (weight_.format == Format::BF16) {
            pack_bf16(from, stride, nullptr, count, k, 0, COLUMNS, block_of(column));
            return;
        }
        int groups = is_grouped() ? (k + GROUP - 1) / GROUP : 1;
        std::vector<std::int8_t> integers(static_cast<std::size_t>(count) * k);
        std::vector<float> scales(static_cast<std::size_t>(count) * groups);
        if (is_grouped()) quantize_int4(from, stride, count, k, integers.data(), scales.data());
        else quantize_int8(from, stride, count, k, integers.data(), scales.data());
        pack_integers(column, count, integers.data(), k);
        for (int j = 0; j < count; j++)
            for (int g = 0; g < groups; g++) set_scale(column + j, g, scales[static_cast<std::size_t>(j) * groups + g]);
    }

    void pack_integers(int begin, int count, const std::int8_t* rows, std::size_t stride) {
        if (is_grouped()) pack_int4(weight_.format, rows, stride, nullptr, count, weight_.k, 0, COLUMNS, block_of(begin));
        else pack_int8(weight_.format, rows, stride, nullptr, count, weight_.k, 0, COLUMNS, block_of(begin),
                       sums_.empty() ? nullptr : sums_.data() + begin);
    }

    void* block_of(int column) {
        return data_.get() + column / COLUMNS * packed_bytes(weight_.format, COLUMNS, weight_.k);
    }

    std::size_t bytes_;
    std::shared_ptr<char> data_;
    Weight weight_{};
    std::vector<float> scale_, bias_;
    std::vector<std::int32_t> sums_;
};

// A float32 vector that a program may read in whole sixteens.
std::vector<float> padded(Array<float> values) {
    std::vector<float> copy(up(values.shape(0), COLUMNS), 0.0f);
    std::copy_n(values.data(), values.shape(0), copy.data());
    return copy;
}

// The edits of N rows: flat lists, row r has [starts[r], starts[r + 1]) of each. Copied and checked once.
class Edits {
public:
    template <class T> using List = std::vector<T>;

    Edits(int vocab_size, Array<std::int64_t> bias_starts, Array<std::int64_t> bias_ids, Array<float> bias,
          Array<bool> limited, Array<std::int64_t> allowed_starts, Array<std::int64_t> allowed_ids,
          Array<std::int64_t> banned_starts, Array<std::int64_t> banned_ids, Array<std::int64_t> occurred_starts,
          Array<std::int64_t> occurred_ids, Array<float> counts, Table<const float> penalties)
        : bias_ids_(ids(bias_ids, vocab_size)), allowed_ids_(ids(allowed_ids, vocab_size)),
          banned_ids_(ids(banned_ids, vocab_size)), occurred_ids_(ids(occurred_ids, vocab_size)), bias_(list(bias)), counts_(list(counts)) {
        std::size_t num_rows = limited.shape(0);
        bool fits = bias_.size() == bias_ids_.size() && counts_.size() == occurred_ids_.size() &&
                    penalties.shape(0) == num_rows && penalties.shape(1) == 3;
        if (!fits) throw std::invalid_argument("the lists of edits do not match");
        check(bias_starts, num_rows, bias_ids_.size()), check(allowed_starts, num_rows, allowed_ids_.size());
        check(banned_starts, num_rows, banned_ids_.size()), check(occurred_starts, num_rows, occurred_ids_.size());
        auto span = [](const Array<std::int64_t>& starts, std::size_t r) { return starts.data()[r + 1] - starts.data()[r]; };
        static const std::int64_t NOTHING = 0;  // a list that allows no token is not "no list"
        for (std::size_t r = 0; r < num_rows; r++) {
            const float* factors = penalties.data() + 3 * r;
            const std::int64_t* allowed = allowed_ids_.empty() ? &NOTHING : allowed_ids_.data() + allowed_starts.data()[r];
            rows_.push_back({bias_ids_.data() + bias_starts.data()[r], bias_.data() + bias_starts.data()[r], span(bias_starts, r),
                             limited.data()[r] ? allowed : nullptr, span(allowed_starts, r),
                             banned_ids_.data() + banned_starts.data()[r], span(banned_starts, r),
                             occurred_ids_.data() + occurred_starts.data()[r], counts_.data() + occurred_starts.data()[r],
                             span(occurred_starts, r), factors[0], factors[1], factors[2]});
        }
    }
    Edits(const Edits&) = delete;

    const std::vector<RowEdits>& rows() const { return rows_; }

private:
    template <class T> static List<T> list(const Array<T>& values) { return {values.data(), values.data() + values.shape(0)}; }

    static List<std::int64_t> ids(const Array<std::int64_t>& values, int vocab_size) {
        List<std::int64_t> found = list(values);
        for (std::int64_t id : found)
            if (id < 0 || id >= vocab_size) throw std::invalid_argument("a token id outside of the vocabulary");
        return found;
    }

    static void check(const Array<std::int64_t>& starts, std::size_t num_rows, std::size_t num_ids) {
        bool fits = starts.shape(0) == num_rows + 1 && starts.data()[0] == 0 &&
                    starts.data()[num_rows] == static_cast<std::int64_t>(num_ids) &&
                    std::is_sorted(starts.data(), starts.data() + num_rows + 1);
        if (!fits) throw std::invalid_argument("the starts of edits do not match their lists");
    }

    List<std::int64_t> bias_ids_, allowed_ids_, banned_ids_, occurred_ids_;
    List<float> bias_, counts_;
    List<RowEdits> rows_;
};

// What N rows ask for when their tokens are chosen: as the arrays say at that time.
struct Asked {
    Asked(Array<float> temperature, Array<std::int64_t> top_k, Array<double> top_p, Array<double> min_p,
          Array<std::uint64_t> seeds, Array<std::int64_t> positions, const Edits* edits)
        : num_rows(temperature.shape(0)), edits(edits), temperature_(std::move(temperature)), top_k_(std::move(top_k)),
          top_p_(std::move(top_p)), min_p_(std::move(min_p)), seeds_(std::move(seeds)), positions_(std::move(positions)) {
        for (std::size_t length : {top_k_.shape(0), top_p_.shape(0), min_p_.shape(0), seeds_.shape(0), positions_.shape(0),
                                   edits ? edits->rows().size() : num_rows})
            if (length != num_rows) throw std::invalid_argument("the arrays of what rows ask for differ in length");
    }
    std::vector<Wish> wishes() const {
        std::vector<Wish> found;
        for (std::size_t r = 0; r < num_rows; r++)
            found.push_back({temperature_.data()[r], top_k_.data()[r], top_p_.data()[r], min_p_.data()[r], seeds_.data()[r],
                             positions_.data()[r]});
        return found;
    }
    std::size_t num_rows;
    const Edits* edits;

private:
    Array<float> temperature_;
    Array<std::int64_t> top_k_;
    Array<double> top_p_, min_p_;
    Array<std::uint64_t> seeds_;
    Array<std::int64_t> positions_;
};

// Tokens from scores [N][vocab_size] that somebody else computed.
void choose_from(const std::string& kernels, Table<const float> scores, const Asked& asked,
                 Tokens tokens) {
    std::size_t num_rows = scores.shape(0), size = scores.shape(1);
    if (asked.num_rows != num_rows || tokens.shape(0) != num_rows || size == 0)
        throw std::invalid_argument("the arrays to choose from do not match");
    const Kernels& table = kernels_named(kernels);
    std::vector<Wish> wishes = asked.wishes();
    nb::gil_scoped_release unlocked;
    RowChooser chooser;
    std::vector<float> row(up(size, NOISE_GROUP));
    for (std::size_t r = 0; r < num_rows; r++) {
        std::copy_n(scores.data() + r * size, size, row.data());
        if (asked.edits) edit_scores(asked.edits->rows()[r], row.data(), static_cast<int>(size));
        tokens.data()[r] = chooser.choose(table, row.data(), static_cast<int>(size), wishes[r]);
    }
}

std::int64_t* word_at(std::uintptr_t address) {
    if (address % alignof(std::int64_t)) throw std::invalid_argument("a word's address is a multiple of 8");
    return reinterpret_cast<std::int64_t*>(address);
}

class BoundProgram {
public:
    BoundProgram(const std::string& kernels, Team& team, int max_tokens)
        : kernels_(kernels_named(kernels)), program_(kernels_, team, max_tokens) {}

    Program& program() { return program_; }

    const float* keep(const std::optional<Array<float>>& values) {
        if (!values) return nullptr;
        kept_.push_back(std::make_unique<std::vector<float>>(padded(*values)));
        return kept_.back()->data();
    }

    int pool(Table<std::uint8_t> bytes, int num_kv_heads, int head_dim, int group, int window, int format, int layer) {
        if (format < 0 || format > static_cast<int>(KVFormat::INT8)) throw std::invalid_argument("no such KV format");
        std::size_t wanted = 2 * num_kv_heads * kv_head_bytes(static_cast<KVFormat>(format), head_dim);
        if (bytes.shape(1) != wanted) throw std::invalid_argument("a block of the pool has another size than its heads need");
        if (head_dim % COLUMNS != 0 || head_dim > 256) throw std::invalid_argument("head sizes are multiples of 16 up to 256");
        if (reinterpret_cast<std::uintptr_t>(bytes.data()) % 64) throw std::invalid_argument("the pool is not aligned to 64 bytes");
        pools_.push_back({reinterpret_cast<char*>(bytes.data()), bytes.shape(1), num_kv_heads, head_dim, group, window,
                          static_cast<KVFormat>(format), layer});
        num_blocks_.push_back(bytes.shape(0));
        return static_cast<int>(pools_.size()) - 1;
    }
    const Pool& pool_of(int number) const { return pools_.at(number); }

    // done and loads are addresses of words (words.hpp), none: 0 and empty. Indices of loads that were bad.
    std::vector<int> run(const Array<std::int64_t>& token_ids, const Array<std::int64_t>& positions, const Array<std::int64_t>& query_start,
                         const Array<std::int64_t>& start, const Tables& tables, const std::optional<Array<std::int64_t>>& outputs,
                         std::uintptr_t done, const std::vector<std::uintptr_t>& loads, double patience_s) {
        Batch batch = batch_of(token_ids, positions, query_start, start, tables, outputs);
        StepWords words(word_at(done), words_of(loads), patience_s);
        nb::gil_scoped_release unlocked;
        program_.run(batch, words);
        return words.bad();
    }

    void choose(const PackedWeight& w, Table<const std::uint16_t> hidden, const Asked& asked, const Array<std::int64_t>& raw_rows,
                const Table<float>& raw, const Tokens& tokens) {
        if (static_cast<int>(hidden.shape(1)) != w.weight().k) throw std::invalid_argument("hidden and weight do not match");
        Choosing how = choosing(w, hidden.shape(0), asked, raw_rows, raw, tokens);
        nb::gil_scoped_release unlocked;
        program_.choose(w.weight(), hidden.data(), static_cast<int>(hidden.shape(0)), how, tokens.data());
    }

    // run, then choose from what it leaves in the buffer `states`.
    std::vector<int> step(const Array<std::int64_t>& token_ids, const Array<std::int64_t>& positions, const Array<std::int64_t>& query_start,
                          const Array<std::int64_t>& start, const Tables& tables, const std::optional<Array<std::int64_t>>& outputs,
                          std::uintptr_t done, const std::vector<std::uintptr_t>& loads, double patience_s, int states,
                          const PackedWeight& w, const Asked& asked, const Array<std::int64_t>& raw_rows, const Table<float>& raw,
                          const Tokens& tokens) {
        Batch batch = batch_of(token_ids, positions, query_start, start, tables, outputs);
        StepWords words(word_at(done), words_of(loads), patience_s);
        int num_rows = batch.outputs ? batch.num_outputs : batch.num_tokens;
        if (program_.width(states) != w.weight().k) throw std::invalid_argument("states and weight do not match");
        Choosing how = choosing(w, num_rows, asked, raw_rows, raw, tokens);
        nb::gil_scoped_release unlocked;
        program_.run(batch, words);
        states_.resize(static_cast<std::size_t>(num_rows) * w.weight().k);
        program_.read(states, num_rows, states_.data());
        program_.choose(w.weight(), states_.data(), num_rows, how, tokens.data());
        return words.bad();
    }

private:
    static Batch batch_of(const Array<std::int64_t>& token_ids, const Array<std::int64_t>& positions, const Array<std::int64_t>& query_start,
                          const Array<std::int64_t>& start, const Tables& tables, const std::optional<Array<std::int64_t>>& outputs) {
        Batch batch{static_cast<int>(token_ids.shape(0)), static_cast<int>(start.shape(0)), token_ids.data(),
                    positions.data(), query_start.data(), start.data(), {}, {}, nullptr, 0};
        if (positions.shape(0) != token_ids.shape(0) || query_start.shape(0) != start.shape(0) + 1)
            throw std::invalid_argument("the arrays of a batch do not match");
        for (const auto& table : tables) {
            if (table.shape(0) != start.shape(0)) throw std::invalid_argument("a block table has another number of rows");
            batch.tables.push_back(table.data());
            batch.table_width.push_back(table.shape(1));
        }
        if (outputs) {
            const std::int64_t *first = outputs->data(), *end = first + outputs->shape(0);
            bool ascending = std::adjacent_find(first, end, std::greater_equal<>()) == end;
            std::int64_t num_tokens = query_start.data()[start.shape(0)];
            if (!ascending || (first != end && (*first < 0 || end[-1] >= num_tokens || num_tokens != batch.num_tokens)))
                throw std::invalid_argument("outputs are tokens of the batch, in ascending order");
            batch.outputs = first, batch.num_outputs = static_cast<int>(end - first);
        }
        return batch;
    }

    static std::vector<std::int64_t*> words_of(const std::vector<std::uintptr_t>& loads) {
        std::vector<std::int64_t*> words;
        for (std::uintptr_t address : loads) {
            if (address == 0) throw std::invalid_argument("a load has no word");
            words.push_back(word_at(address));
        }
        return words;
    }

    static Choosing choosing(const PackedWeight& w, std::size_t num_rows, const Asked& asked, const Array<std::int64_t>& raw_rows,
                             const Table<float>& raw, const Tokens& tokens) {
        std::size_t n = w.weight().n;
        bool fits = asked.num_rows == num_rows && tokens.shape(0) == num_rows && raw.shape(0) == raw_rows.shape(0) && raw.shape(1) == n;
        if (!fits) throw std::invalid_argument("the arrays to choose from do not match");
        Choosing how{asked.wishes(), asked.edits ? asked.edits->rows() : std::vector<RowEdits>{}, {}};
        if (raw_rows.shape(0)) how.raw.assign(num_rows, nullptr);
        for (std::size_t i = 0; i < raw_rows.shape(0); i++) how.raw.at(raw_rows.data()[i]) = raw.data() + i * n;
        return how;
    }

    const Kernels& kernels_;
    Program program_;
    std::vector<std::unique_ptr<std::vector<float>>> kept_;
    std::vector<Pool> pools_;
    std::vector<std::size_t> num_blocks_;
    std::vector<bf16> states_;  // of a step's outputs
};

}  // namespace

NB_MODULE(_native, m) {
    nb::set_leak_warnings(false);  // what is alive at exit is what its user kept alive
    m.attr("KV_BLOCK") = KV_BLOCK;
    m.attr("COLUMNS") = COLUMNS;
    m.def("kernels", [] {
        std::vector<std::string> names;
        for (const Kernels* kernels : usable_kernels()) names.emplace_back(kernels->name);
        return names;
    });

    // Give the whole pages inside an array back to the system; what is read there afterwards is zero.
    m.def("release", [](Table<std::uint16_t> array) {
        constexpr std::uintptr_t PAGE = 4096;
        auto begin = reinterpret_cast<std::uintptr_t>(array.data()), end = begin + array.nbytes();
        begin = (begin + PAGE - 1) / PAGE * PAGE, end = end / PAGE * PAGE;
        if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_DONTNEED);
    }, "array"_a.noconvert());

    nb::class_<Team>(m, "Team")
        .def(nb::init<int, const std::vector<int>&>(), "size"_a, "cpus"_a)
        .def_prop_ro("size", &Team::size);

    m.def("read_rate", [](Team& team, std::size_t bytes) {
        nb::gil_scoped_release unlocked;
        return read_rate(team, bytes);
    }, "team"_a, "bytes"_a);
    m.def("product_rate", [](const std::string& kernels, Team& team, int format) {
        nb::gil_scoped_release unlocked;
        return product_rate(kernels_named(kernels), team, static_cast<Format>(format));
    }, "kernels"_a, "team"_a, "format"_a);

    nb::class_<Arena>(m, "Arena")
        .def(nb::new_([](std::size_t bytes) { return std::make_shared<Arena>(bytes); }), "num_bytes"_a)
        .def("finish", &Arena::finish, nb::call_guard<nb::gil_scoped_release>())
        .def_prop_ro("taken_bytes", &Arena::taken_bytes);

    nb::class_<PackedWeight>(m, "PackedWeight")
        .def(nb::init<int, int, int, std::shared_ptr<Arena>>(), "format"_a, "n"_a, "k"_a, "arena"_a.none() = nb::none())
        .def("fill", &PackedWeight::fill, "team"_a.none(), "begin"_a, "rows"_a.noconvert(), "every"_a = 1)
        .def("fill_quantized", &PackedWeight::fill_quantized, "team"_a, "begin"_a, "step"_a, "rows"_a.noconvert(),
             "scales"_a.noconvert())
        .def("fill_nibbles", &PackedWeight::fill_nibbles, "team"_a, "begin"_a, "step"_a, "rows"_a.noconvert(),
             "scales"_a.noconvert())
        .def("unpack", &PackedWeight::unpack, "out"_a.noconvert())
        .def("set_bias", &PackedWeight::set_bias, "bias"_a.noconvert())
        .def_prop_ro("n", [](const PackedWeight& w) { return w.weight().n; })
        .def_prop_ro("k", [](const PackedWeight& w) { return w.weight().k; })
        .def_prop_ro("num_bytes", &PackedWeight::num_bytes);

    nb::class_<Edits>(m, "Edits")
        .def(nb::init<int, Array<std::int64_t>, Array<std::int64_t>, Array<float>, Array<bool>, Array<std::int64_t>,
                      Array<std::int64_t>, Array<std::int64_t>, Array<std::int64_t>, Array<std::int64_t>, Array<std::int64_t>,
                      Array<float>, Table<const float>>(),
             "vocab_size"_a, "bias_starts"_a.noconvert(), "bias_ids"_a.noconvert(), "bias"_a.noconvert(), "limited"_a.noconvert(),
             "allowed_starts"_a.noconvert(), "allowed_ids"_a.noconvert(), "banned_starts"_a.noconvert(),
             "banned_ids"_a.noconvert(), "occurred_starts"_a.noconvert(), "occurred_ids"_a.noconvert(), "counts"_a.noconvert(),
             "penalties"_a.noconvert());

    nb::class_<Asked>(m, "Asked")
        .def(nb::init<Array<float>, Array<std::int64_t>, Array<double>, Array<double>, Array<std::uint64_t>,
                      Array<std::int64_t>, const Edits*>(),
             "temperature"_a.noconvert(), "top_k"_a.noconvert(), "top_p"_a.noconvert(), "min_p"_a.noconvert(),
             "seeds"_a.noconvert(), "positions"_a.noconvert(), "edits"_a.none(), nb::keep_alive<1, 8>());
    m.def("choose_from", &choose_from, "kernels"_a, "scores"_a.noconvert(), "asked"_a, "tokens"_a.noconvert());

    nb::class_<BoundProgram>(m, "Program")
        .def(nb::init<const std::string&, Team&, int>(), "kernels"_a, "team"_a, "max_tokens"_a, nb::keep_alive<1, 3>())
        .def("buffer", [](BoundProgram& p, int kind, int width) { return p.program().buffer(static_cast<Kind>(kind), width); },
             "kind"_a, "width"_a)
        .def("pool", &BoundProgram::pool, "bytes"_a.noconvert(), "num_kv_heads"_a, "head_dim"_a, "group"_a, "window"_a,
             "format"_a, "layer"_a = 0, nb::keep_alive<1, 2>())
        .def("embed_bf16", [](BoundProgram& p, Table<const std::uint16_t> table, int to) {
                p.program().embed(table.data(), Kind::BF16, static_cast<int>(table.shape(1)), to);
            }, "table"_a.noconvert(), "to"_a, nb::keep_alive<1, 2>())
        .def("embed_packed", [](BoundProgram& p, const PackedWeight& w, int to) { p.program().embed_packed(w.weight(), to); },
             "weight"_a, "to"_a, nb::keep_alive<1, 2>())
        .def("rms_norm", [](BoundProgram& p, int from, Array<float> weight, float eps, int to) {
                p.program().rms_norm(from, p.keep(weight), static_cast<int>(weight.shape(0)), eps, to);
            }, "source"_a, "weight"_a.noconvert(), "eps"_a, "to"_a)
        .def("linear", [](BoundProgram& p, const PackedWeight& w, int from, int to) { p.program().linear(w.weight(), from, to); },
             "weight"_a, "source"_a, "to"_a, nb::keep_alive<1, 2>())
        .def("linear_add", [](BoundProgram& p, const PackedWeight& w, int from, int to) { p.program().linear_add(w.weight(), from, to); },
             "weight"_a, "source"_a, "to"_a, nb::keep_alive<1, 2>())
        .def("linear_silu_mul", [](BoundProgram& p, const PackedWeight& w, int from, int to) { p.program().linear_silu_mul(w.weight(), from, to); },
             "weight"_a, "source"_a, "to"_a, nb::keep_alive<1, 2>())
        .def("heads", [](BoundProgram& p, int qkv, int num_heads, int pool, std::optional<Array<float>> q_norm,
                         std::optional<Array<float>> k_norm, float eps, Table<const float> cos, Table<const float> sin) {
                int rotary = 2 * static_cast<int>(cos.shape(1));
                p.program().heads(qkv, num_heads, p.pool_of(pool), p.keep(q_norm), p.keep(k_norm), eps, cos.data(), sin.data(), rotary);
            }, "qkv"_a, "num_heads"_a, "pool"_a, "q_norm"_a.none(), "k_norm"_a.none(), "eps"_a, "cos"_a.noconvert(),
             "sin"_a.noconvert(), nb::keep_alive<1, 8>(), nb::keep_alive<1, 9>())
        .def("attend", [](BoundProgram& p, int qkv, int num_heads, int pool, float scale, int to) {
                p.program().attend(qkv, num_heads, p.pool_of(pool), scale, to);
            }, "qkv"_a, "num_heads"_a, "pool"_a, "scale"_a, "to"_a)
        .def("run", &BoundProgram::run, "token_ids"_a, "positions"_a, "query_start"_a, "start"_a, "tables"_a, "outputs"_a.none() = nb::none(),
             "done"_a = 0, "loads"_a = std::vector<std::uintptr_t>(), "patience_s"_a = 0.0)
        .def("step", &BoundProgram::step, "token_ids"_a, "positions"_a, "query_start"_a, "start"_a, "tables"_a, "outputs"_a.none(),
             "done"_a, "loads"_a, "patience_s"_a, "states"_a, "weight"_a, "asked"_a, "raw_rows"_a.noconvert(), "raw"_a.noconvert(),
             "tokens"_a.noconvert())
        .def("read", [](BoundProgram& p, int buffer, Table<std::uint16_t> out) {
                p.program().read(buffer, static_cast<int>(out.shape(0)), out.data());
            }, "buffer"_a, "out"_a.noconvert())
        .def("head", [](BoundProgram& p, const PackedWeight& w, Table<const std::uint16_t> hidden, Table<float> out) {
                bool fits = hidden.shape(0) == out.shape(0) && static_cast<int>(hidden.shape(1)) == w.weight().k &&
                            static_cast<int>(out.shape(1)) == w.weight().n;
                if (!fits) throw std::invalid_argument("hidden, weight and result do not match");
                nb::gil_scoped_release unlocked;
                p.program().head(w.weight(), hidden.data(), static_cast<int>(hidden.shape(0)), out.data());
            }, "weight"_a, "hidden"_a.noconvert(), "out"_a.noconvert())
        .def("choose", &BoundProgram::choose, "weight"_a, "hidden"_a.noconvert(), "asked"_a, "raw_rows"_a.noconvert(),
             "raw"_a.noconvert(), "tokens"_a.noconvert())
        .def("seconds", [](BoundProgram& p) { return p.program().seconds(); })
        .def("clear_seconds", [](BoundProgram& p) { p.program().clear_seconds(); });
}
