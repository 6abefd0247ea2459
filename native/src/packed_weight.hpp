// A projection as Python fills it: packed bytes and what belongs to them. Knows no torch: arrays come as buffers, bf16 as
// uint16. Everything that takes time releases the interpreter's lock.
#pragma once
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <algorithm>
#include <atomic>
#include <memory>
#include <stdexcept>
#include <utility>
#include <vector>

#include "arena.hpp"
#include "pack.hpp"
#include "pages.hpp"
#include "program.hpp"

namespace penstock {

namespace nb = nanobind;

template <class T> using Matrix = nb::ndarray<const T, nb::ndim<2>, nb::device::cpu>;
template <class T> using Array = nb::ndarray<const T, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
template <class T> using Table = nb::ndarray<T, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Tables = std::vector<Table<const std::int32_t>>;
using Tokens = nb::ndarray<std::int64_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

// Packed bytes and what belongs to them. Filled in pieces of whole blocks, then only read.
class PackedWeight {
public:
    PackedWeight(int format, int n, int k, std::shared_ptr<Arena> arena, int rotation)
        : bytes_(packed_bytes(static_cast<Format>(format), n, k)) {
        weight_.format = static_cast<Format>(format);
        bool groups = weight_.format == Format::INT4 || weight_.format == Format::W4A8;
        if (rotation && !(wants_ints(weight_) && can_rotate(k, rotation)))
            throw std::invalid_argument("columns are rotated in whole blocks of 16 to 128, where activations are integers");
        weight_.n = n, weight_.k = k, weight_.rotation = rotation;
        weight_.n_pad = static_cast<int>(up(n, COLUMNS)), weight_.k_pad = static_cast<int>(up(k, groups ? GROUP : K_ALIGN));
        if (char* at = arena ? arena->take(bytes_) : nullptr) data_ = std::shared_ptr<char>(std::move(arena), at);
        else data_ = pages(bytes_);  // no arena, or it is full
        weight_.data = data_.get();
        if (weight_.format == Format::BF12) {
            std::size_t blocks = weight_.n_pad / COLUMNS;
            exponents_.assign(blocks * 32, 0), rare_.resize(blocks), rare_of_.assign(blocks, {nullptr, 0});
            weight_.exponents = exponents_.data(), weight_.rare = rare_of_.data();
        } else if (weight_.format != Format::BF16) {
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
    std::size_t num_bytes() const {
        std::size_t rare = 0;
        for (const RareWeights& of_block : rare_of_) rare += of_block.num;
        return bytes_ + scale_.size() * 4 + sums_.size() * 4 + exponents_.size() * 2 + rare * sizeof(RareWeight);
    }

    void set_bias(Array<float> bias) {
        if (static_cast<int>(bias.shape(0)) != weight_.n) throw std::invalid_argument("bias and weight differ in size");
        bias_.assign(weight_.n_pad, 0.0f);
        std::copy_n(bias.data(), weight_.n, bias_.data());
        weight_.bias = bias_.data();
    }

    // bf16 rows, quantized on the way, into blocks of 16 output columns from column `begin` on: every block, or only
    // each `every`-th. Without a team on the calling thread; several threads may fill different blocks at once. Throws
    // std::domain_error for a weight that is to be quantized and is NaN or infinite; the others are filled.
    void fill(Team* team, int begin, Matrix<std::uint16_t> rows, int every) {
        int num = static_cast<int>(rows.shape(0)), blocks = static_cast<int>(up(num, COLUMNS)) / COLUMNS;
        if (every < 1 || (every > 1 && num % COLUMNS)) throw std::invalid_argument("the rows do not fit the weight");
        if (every > 1) check(begin, static_cast<std::size_t>(blocks - 1) * every * COLUMNS + COLUMNS, rows.shape(1));
        else check(begin, rows.shape(0), rows.shape(1));
        if (rows.stride(1) != 1) throw std::invalid_argument("rows must be contiguous");
        const bf16* from = rows.data();
        std::size_t stride = rows.stride(0);
        std::atomic<bool> good = true;
        auto fill = [&](int first, int last) {
            for (int block = first; block < last; block++) {
                int at = block * COLUMNS;
                if (!fill_block(begin + at * every, std::min(COLUMNS, num - at), from + at * stride, stride)) good = false;
            }
        };
        nb::gil_scoped_release unlocked;
        if (!team) fill(0, blocks);
        else team->run([&](int member) { fill(blocks * member / team->size(), blocks * (member + 1) / team->size()); });
        if (!good) throw std::domain_error("a weight is not a finite number, and has no integer");
    }

    // Columns that are quantized already, and rotated where the weight says so: int8 rows with float32 scales [rows][groups], groups of 128 or one. Block i of
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
        if (weight_.format == Format::BF16 || weight_.format == Format::BF12)
            throw std::invalid_argument("a bf16 weight takes bf16 rows");
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

    // False where a weight has no integer.
    bool fill_block(int column, int count, const bf16* from, std::size_t stride) {
        int k = weight_.k;
        if (weight_.format == Format::BF16) {
            pack_bf16(from, stride, count, k, block_of(column));
            return true;
        }
        if (weight_.format == Format::BF12) {
            std::size_t block = column / COLUMNS;
            pack_bf12(from, stride, count, k, block_of(column), exponents_.data() + block * 32, rare_[block]);
            rare_of_[block] = {rare_[block].data(), static_cast<int>(rare_[block].size())};
            return true;
        }
        int groups = is_grouped() ? (k + GROUP - 1) / GROUP : 1;
        std::vector<std::int8_t> integers(static_cast<std::size_t>(count) * k);
        std::vector<float> scales(static_cast<std::size_t>(count) * groups);
        auto quantize = is_grouped() ? quantize_int4 : quantize_int8;
        std::vector<bf16> rotated;
        if (weight_.rotation) {
            rotated.resize(static_cast<std::size_t>(count) * k);
            for (int j = 0; j < count; j++)
                rotate(from + j * stride, k, weight_.rotation, &rotated[static_cast<std::size_t>(j) * k]);
            from = rotated.data(), stride = k;
        }
        if (!quantize(from, stride, count, k, integers.data(), scales.data())) return false;
        pack_integers(column, count, integers.data(), k);
        for (int j = 0; j < count; j++)
            for (int g = 0; g < groups; g++) set_scale(column + j, g, scales[static_cast<std::size_t>(j) * groups + g]);
        return true;
    }

    void pack_integers(int begin, int count, const std::int8_t* rows, std::size_t stride) {
        if (is_grouped()) pack_int4(weight_.format, rows, stride, count, weight_.k, block_of(begin));
        else pack_int8(weight_.format, rows, stride, count, weight_.k, block_of(begin), sums_.empty() ? nullptr : &sums_[begin]);
    }

    void* block_of(int column) {
        return data_.get() + column / COLUMNS * packed_bytes(weight_.format, COLUMNS, weight_.k);
    }

    std::size_t bytes_;
    std::shared_ptr<char> data_;
    Weight weight_{};
    std::vector<float> scale_, bias_;
    std::vector<std::int32_t> sums_;
    std::vector<bf16> exponents_;
    std::vector<std::vector<RareWeight>> rare_;  // by block
    std::vector<RareWeights> rare_of_;
};

}  // namespace penstock
