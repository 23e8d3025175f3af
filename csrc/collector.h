// The rows of a tile taken into an online softmax, their large entries collected in a list and
// redone from the inputs: softmax_collect_ and softmax_compact_online_.
//
// One read and one write of the tile, one exponential per logit.
#pragma once

#include <algorithm>
#include <limits>
#include <tuple>
#include <vector>

#include "tile.h"

namespace orpo {

constexpr float kMostMoved = 64;  // MOST_MOVED of constants.py
constexpr int64_t kBlock = 128;   // is looked through only where its maximum is large enough

// x <- exp(x - reference), rounded; the sum of what was written.
template <class T>
ORPO_CLONES Real<T> exponentiate(T* x, int64_t n, Real<T> reference) {
    using R = Real<T>;
    map(x, n, [reference](R z) ORPO_INLINE_LAMBDA { return orpo::exp(z - reference); });
    return sum(x, n, [](R e) ORPO_INLINE_LAMBDA { return e; });
}

template <class T>
ORPO_CLONES Real<T> largest(const T* x, int64_t n) {
    return maximum(x, n);
}

// For each block of at most kChunk elements, whether it holds one above the limit.
template <class T>
ORPO_CLONES void find_blocks(const T* x, int64_t n, Real<T> limit, bool* found) {
    for (int64_t first = 0; first < n; first += kBlock) {
        found[first / kBlock] = maximum(x + first, n - first < kBlock ? n - first : kBlock) > limit;
    }
}

template <class T, class F>
void for_each_above(const T* x, int64_t n, Real<T> limit, F f) {
    bool found[kChunk / kBlock];
    for (int64_t begin = 0; begin < n; begin += kChunk) {
        const int64_t end = std::min(begin + kChunk, n);
        find_blocks(x + begin, end - begin, limit, found);
        for (int64_t first = begin; first < end; first += kBlock) {
            if (!found[(first - begin) / kBlock]) continue;
            for (int64_t i = first; i < std::min(first + kBlock, end); ++i) {
                const Real<T> value = widen_one(x[i]);
                if (value > limit) f(i, value);
            }
        }
    }
}

// Raw logits, bias added, to e = exp(z - reference) and dz/draw.
template <class R>
ORPO_CLONES void exponentiate(const Transform<R>& transform, int64_t n, R reference, R* z,
                              R* slope) {
    const R scale = transform.scale, cap = transform.cap, inner = transform.inner;
    if (cap == R(0)) {
#pragma omp simd
        for (int64_t i = 0; i < n; ++i) {
            z[i] = orpo::exp(z[i] * scale - reference);
            slope[i] = scale;
        }
    } else {
#pragma omp simd
        for (int64_t i = 0; i < n; ++i) {
            const auto capped = orpo::tanh(z[i] * inner);
            z[i] = orpo::exp(cap * capped.value - reference);
            slope[i] = capped.slope * scale;
        }
    }
}

// x <- e * x; the sum of e.
template <class R>
ORPO_CLONES R multiply(const R* e, int64_t n, R* x) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) x[i] *= e[i];
    return sum(e, n, [](R each) ORPO_INLINE_LAMBDA { return each; });
}

template <class T>
ORPO_CLONES Real<T> dot(const T* x, const Real<T>* y, int64_t n) {
    using R = Real<T>;
    R total = 0;
#pragma omp simd reduction(+ : total)
    for (int64_t i = 0; i < n; ++i) total += static_cast<R>(widen_one(x[i])) * y[i];
    return total;
}

template <class R>
struct Entry {
    int32_t column;
    R e, value;  // exp(z - reference), and times dz/draw
};

// The entries of the rows of one task, row by row.
template <class R>
struct Collected {
    std::vector<int64_t> counts;
    std::vector<Entry<R>> entries;
    std::vector<R> hidden;  // of the row at hand, widened
};

// From `first` on, the entries above the limit, the largest if they are too many, in their order.
template <class R>
void choose(R limit, int64_t most, size_t first, std::vector<Entry<R>>* entries) {
    const auto begin = entries->begin() + static_cast<std::ptrdiff_t>(first);
    entries->erase(
        std::remove_if(begin, entries->end(),
                       [limit](const Entry<R>& entry) { return !(entry.value > limit); }),
        entries->end());
    if (entries->end() - begin <= most) return;
    std::nth_element(begin, begin + most, entries->end(), [](const auto& x, const auto& y) {
        return x.value != y.value ? x.value > y.value : x.column < y.column;
    });
    entries->erase(begin + most, entries->end());
    std::sort(begin, entries->end(),
              [](const auto& x, const auto& y) { return x.column < y.column; });
}

// What one look at a row finds.
template <class R>
struct Look {
    R reference, total, known;  // sum of e of the tile, and of all that is known of the row
};

template <class T>
struct Collector {
    using R = Real<T>;

    Matrix tile;
    Labels labels;
    Transform<R> transform;
    std::optional<Matrix> hidden, weight;  // rows of both in T
    bool online, store;
    R *row_max, *sum_exp, *rescale;
    const R* others;  // null: nothing

    // E in place of the row if it is stored; entries above `share` of what is known are appended,
    // and of a row with a transform some below it.
    Look<R> look(int64_t r, R share, std::vector<Entry<R>>* entries) const {
        T* x = tile.row<T>(r);
        const R before = row_max[r], top = maximum_of(x, r);
        const R reference = top > before || top != top ? top : before;
        rescale[r] = orpo::exp(before - reference);
        // What the limit is a share of: part of the final sum, so no entry above it is missed.
        R known = sum_exp[r] * rescale[r];
        if (others) known += orpo::exp(std::min(others[r] - reference, R(60)));
        R total;
        if (!transform.identity()) {
            total = transformed(x, r, reference, known, share, entries);
        } else if (store) {
            total = exponentials(x, reference, known, share, entries);
        } else {
            std::vector<T> copy(x, x + tile.columns);
            total = exponentials(copy.data(), reference, known, share, entries);
        }
        return {reference, total, online ? known + total : known};
    }

    // The entries from `first` on become 0 in the tile.
    void take_out(int64_t r, size_t first, const std::vector<Entry<R>>& entries) const {
        T* x = tile.row<T>(r);
        for (size_t i = first; i < entries.size(); ++i) x[entries[i].column] = T{};
    }

    // Redoes the entries [first, last), all there are of row r, and adds the row to its sums.
    void finish(int64_t r, Look<R> look, size_t first, size_t last, Collected<R>* collected) const {
        if (hidden && last > first) look.total += redo(r, look.reference, first, last, collected);
        if (!online) return;
        row_max[r] = look.reference;
        sum_exp[r] = sum_exp[r] * rescale[r] + look.total;
    }

  private:
    // Calls f(i) for the label columns among the n from `begin` on, counted from there.
    template <class F>
    void for_each_label(int64_t r, int64_t begin, int64_t n, F f) const {
        for (int64_t set = 0; set < labels.sets; ++set) {
            const int64_t i = labels.column(set, r) - begin;
            if (i >= 0 && i < n) f(i);
        }
    }

    // Without the label columns; those of a tile without transform become -inf. Not asked for, the
    // lowest number.
    R maximum_of(T* x, int64_t r) const {
        constexpr R lowest = std::numeric_limits<R>::lowest();
        constexpr R nothing = -std::numeric_limits<R>::infinity();
        if (transform.identity()) {
            for_each_label(r, 0, tile.columns, [&](int64_t i) { x[i] = narrow_one<T>(nothing); });
        }
        if (!online) return lowest;
        if (transform.identity()) {
            return tile.columns ? std::max(lowest, largest(x, tile.columns)) : lowest;
        }
        R top = lowest, z[kChunk];
        for (int64_t begin = 0; begin < tile.columns; begin += kChunk) {
            const int64_t n = std::min(kChunk, tile.columns - begin);
            load(x, begin, n, z);
            apply(transform, n, z);
            for_each_label(r, begin, n, [&](int64_t i) { z[i] = nothing; });
            const R here = largest(z, n);
            if (here > top || here != here) top = here;
        }
        return top;
    }

    void load(const T* x, int64_t begin, int64_t n, R* z) const {
        widen_all(x + begin, n, z);
        if (!transform.bias.empty()) add(transform.bias.data() + begin, n, z);
    }

    // A row without transform: what is summed is rounded, as it is where it is stored.
    R exponentials(T* x, R reference, R known, R share, std::vector<Entry<R>>* entries) const {
        R total = 0;
        for (int64_t begin = 0; begin < tile.columns; begin += kChunk) {
            total += exponentiate(x + begin, std::min(kChunk, tile.columns - begin), reference);
        }
        const R limit = share * (online ? known + total : known);
        if (limit < std::numeric_limits<R>::infinity()) {
            for_each_above(x, tile.columns, limit, [&](int64_t i, R e) {
                entries->push_back({static_cast<int32_t>(i), e, e});
            });
        }
        return total;
    }

    R transformed(T* x, int64_t r, R reference, R known, R share,
                  std::vector<Entry<R>>* entries) const {
        R total = 0, e[kChunk], value[kChunk];
        for (int64_t begin = 0; begin < tile.columns; begin += kChunk) {
            const int64_t n = std::min(kChunk, tile.columns - begin);
            load(x, begin, n, e);
            exponentiate(transform, n, reference, e, value);
            for_each_label(r, begin, n, [&](int64_t i) { e[i] = value[i] = R(0); });
            total += multiply(e, n, value);
            const R limit = share * (online ? known + total : known);
            for_each_above(value, n, limit, [&](int64_t i, R entry) {
                entries->push_back({static_cast<int32_t>(begin + i), e[i], entry});
            });
            if (store) narrow_all(value, n, x + begin);
        }
        return total;
    }

    // The entries [first, last) from the inputs; what that adds to the sum of the row.
    R redo(int64_t r, R reference, size_t first, size_t last, Collected<R>* collected) const {
        constexpr size_t kAhead = 4;  // rows of the weight asked for before they are needed
        const int64_t n = hidden->columns;
        collected->hidden.resize(n);
        widen_all(hidden->row<const T>(r), n, collected->hidden.data());
        double added = 0;
        for (size_t i = first; i < last; ++i) {
            Entry<R>& entry = collected->entries[i];
            if (i + kAhead < collected->entries.size()) {
                prefetch(weight->row<const T>(collected->entries[i + kAhead].column), n);
            }
            R z = dot(weight->row<const T>(entry.column), collected->hidden.data(), n);
            R slope = transform.scale;
            if (!transform.bias.empty()) z += transform.bias[entry.column];
            if (transform.cap == R(0)) {
                z *= transform.scale;
            } else {
                const auto capped = orpo::tanh(z * transform.inner);
                z = transform.cap * capped.value;
                slope *= capped.slope;
            }
            const R least = entry.e / kMostMoved, most = entry.e * kMostMoved;
            const R e = std::min(std::max(orpo::exp(z - reference), least), most);
            added += static_cast<double>(e) - entry.e;
            entry.value = e * slope;
        }
        return static_cast<R>(added);
    }
};

// One figure per row.
template <class R>
const R* per_row(const Tensor& tensor, int64_t rows, const char* name) {
    STD_TORCH_CHECK(tensor.dim() == 1 && tensor.size(0) == rows && tensor.is_cpu() &&
                        (rows <= 1 || tensor.stride(0) == 1),
                    name, " must be (R,) = (", rows, ",), contiguous, on the CPU, got ",
                    tensor.numel(), " elements in ", tensor.dim(), " dimensions");
    return tensor.const_data_ptr<R>();
}

// One list in the order of the rows: offsets (R + 1), columns, values.
template <class R>
std::tuple<Tensor, Tensor, Tensor> joined(const std::vector<Collected<R>>& tasks,
                                          const Tensor& like, int64_t rows) {
    size_t count = 0;
    for (const auto& task : tasks) count += task.entries.size();
    const auto size = static_cast<int64_t>(count);
    Tensor offsets = torch::stable::new_empty(like, {rows + 1}, ScalarType::Long);
    Tensor columns = torch::stable::new_empty(like, {size}, ScalarType::Int);
    Tensor values = torch::stable::new_empty(like, {size}, like.scalar_type());
    int64_t* offset = offsets.mutable_data_ptr<int64_t>();
    int32_t* column = columns.mutable_data_ptr<int32_t>();
    R* value = values.mutable_data_ptr<R>();
    *offset = 0;
    for (const auto& task : tasks) {
        for (const int64_t each : task.counts) offset[1] = *offset + each, ++offset;
        for (const auto& entry : task.entries) *column++ = entry.column, *value++ = entry.value;
    }
    return {offsets, columns, values};
}

// hidden and weight of a tile, both or neither.
inline std::pair<std::optional<Matrix>, std::optional<Matrix>> inputs_of(
    const Matrix& tile, const std::optional<Tensor>& hidden, const std::optional<Tensor>& weight) {
    STD_TORCH_CHECK(hidden.has_value() == weight.has_value(), "hidden and weight go together");
    if (!hidden) return {};
    const Matrix rows = matrix(*hidden, "hidden"), entries = matrix(*weight, "weight");
    STD_TORCH_CHECK(rows.rows == tile.rows && entries.rows == tile.columns &&
                        rows.columns == entries.columns && rows.dtype == tile.dtype &&
                        entries.dtype == tile.dtype,
                    "hidden must be (R, H) and weight (C, H), in the dtype of logits (R, C) = (",
                    tile.rows, ", ", tile.columns, "), got (", rows.rows, ", ", rows.columns,
                    ") and (", entries.rows, ", ", entries.columns, ")");
    return {rows, entries};
}

// The collector of a tile in T, its arguments checked; `rescale` is (R,) to be written.
template <class T>
Collector<T> collector_of(const Matrix& tile, const std::optional<Tensor>& bias,
                          const Tensor& labels, int64_t first_column, const Tensor& row_max,
                          const Tensor& sum_exp, const std::optional<Tensor>& others,
                          const std::optional<Tensor>& hidden, const std::optional<Tensor>& weight,
                          double logit_scale, std::optional<double> softcap, bool online,
                          bool store, const Tensor& rescale) {
    using R = Real<T>;
    const ScalarType wide = accumulation_dtype(tile.dtype);
    for (const Tensor& each : {row_max, sum_exp, others.value_or(row_max)}) {
        STD_TORCH_CHECK(each.scalar_type() == wide, "row_max, sum_exp and others must be ",
                        torch::headeronly::toString(wide));
    }
    const auto [rows, entries] = inputs_of(tile, hidden, weight);
    return {tile,
            labels_of(labels, tile.rows, first_column),
            Transform<R>(bias, tile.columns, logit_scale, softcap),
            rows,
            entries,
            online,
            store,
            const_cast<R*>(per_row<R>(row_max, tile.rows, "row_max")),
            const_cast<R*>(per_row<R>(sum_exp, tile.rows, "sum_exp")),
            rescale.mutable_data_ptr<R>(),
            others ? per_row<R>(*others, tile.rows, "others") : nullptr};
}

}  // namespace orpo
