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
#include <memory>
#include <optional>
#include <stdexcept>
#include <vector>

#include "arena.hpp"
#include "ceilings.hpp"
#include "cpu.hpp"
#include "packed_weight.hpp"
#include "program.hpp"

namespace nb = nanobind;
using namespace nb::literals;
using namespace penstock;

namespace {

const Kernels& kernels_named(const std::string& name) {
    for (const Kernels* kernels : usable_kernels())
        if (name == kernels->name) return *kernels;
    throw std::invalid_argument("this machine or build has no kernels called " + name);
}

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
        static const std::int64_t NONE = 0;  // an empty array may have no address, which would mean all
        if (outputs) {
            batch.num_outputs = static_cast<int>(outputs->shape(0));
            batch.outputs = batch.num_outputs ? outputs->data() : &NONE;
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
        .def(nb::init<int, int, int, std::shared_ptr<Arena>, int>(), "format"_a, "n"_a, "k"_a, "arena"_a.none() = nb::none(),
             "rotation"_a = 0)
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
                p.program().embed(table.data(), static_cast<int>(table.shape(1)), to);
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
                if (sin.shape(0) != cos.shape(0) || sin.shape(1) != cos.shape(1)) throw std::invalid_argument("cos and sin differ in size");
                p.program().heads(qkv, num_heads, p.pool_of(pool), p.keep(q_norm), p.keep(k_norm), eps, cos.data(), sin.data(),
                                  rotary, static_cast<int>(cos.shape(0)));
            }, "qkv"_a, "num_heads"_a, "pool"_a, "q_norm"_a.none(), "k_norm"_a.none(), "eps"_a, "cos"_a.noconvert(),
             "sin"_a.noconvert(), nb::keep_alive<1, 8>(), nb::keep_alive<1, 9>())
        .def("attend", [](BoundProgram& p, int qkv, int num_heads, int pool, float scale, int to) {
                p.program().attend(qkv, num_heads, p.pool_of(pool), scale, to);
            }, "qkv"_a, "num_heads"_a, "pool"_a, "scale"_a, "to"_a)
        .def("run", &BoundProgram::run, "token_ids"_a, "positions"_a, "query_start"_a, "start"_a, "tables"_a,
             "outputs"_a.none() = nb::none(), "done"_a = 0, "loads"_a = std::vector<std::uintptr_t>(), "patience_s"_a = 0.0)
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
