// orpo_kernels::compact_weight_gradient: rows of the weight gradient from packed kept entries.
//
// The entries are sorted by column (they are few), then a row of the gradient is summed where it
// stays in the first-level cache, the tail first, the entries in the order of their rows, and
// written once. It belongs to one thread: the result does not depend on their number.
#include <torch/csrc/stable/library.h>

#include "tile.h"

namespace {

using namespace orpo;

constexpr int64_t kAlignment = 16;  // of the parts of an item
constexpr int64_t kAhead = 4;       // rows of hidden states asked for before they are needed

template <class T, class R>
ORPO_CLONES void subtract_scaled(const T* x, int64_t n, R factor, R* sums) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) sums[i] -= factor * static_cast<R>(widen_one(x[i]));
}

// out <- a x + b y.
template <class T, class R>
ORPO_CLONES void combine(const R* x, R a, const R* y, R b, int64_t n, T* out) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) out[i] = narrow_one<T>(a * x[i] + b * y[i]);
}

// Compressed rows, in the bytes of a store.
template <class R>
struct Item {
    const int32_t *offsets, *columns;
    const R* values;
};

template <class R>
Item<R> item_of(const Tensor& store, const Tensor& table, int64_t item, int64_t rows) {
    STD_TORCH_CHECK(table.dim() == 2 && table.size(1) == 2 && table.is_cpu() &&
                        table.is_contiguous() && item >= 0 && item < table.size(0),
                    "table must be (items, 2) on the CPU and have row ", item);
    const int64_t* entry = table.const_data_ptr<int64_t>() + 2 * item;
    const auto* bytes = static_cast<const uint8_t*>(store.const_data_ptr());
    const auto aligned = [](int64_t size) {
        return (size + kAlignment - 1) / kAlignment * kAlignment;
    };
    const int64_t start = entry[0], lists = start + aligned(4 * (rows + 1));
    STD_TORCH_CHECK(entry[1] >= 0 && start >= 0 && lists <= store.numel(), "item ", item,
                    " is not in the store");
    const auto* offsets = reinterpret_cast<const int32_t*>(bytes + start);
    const int64_t count = offsets[rows], values = lists + aligned(4 * count);
    STD_TORCH_CHECK(count >= 0 && values + count * static_cast<int64_t>(sizeof(R)) <= store.numel(),
                    "item ", item, " is not in the store");
    return {offsets, reinterpret_cast<const int32_t*>(bytes + lists),
            reinterpret_cast<const R*>(bytes + values)};
}

// The entries of some columns, column by column.
template <class R>
struct ByColumn {
    std::vector<int64_t> starts;  // (C + 1)
    std::vector<int32_t> rows;
    std::vector<R> factors;

    ByColumn(const Item<R>& item, int64_t row_count, int64_t first, int64_t columns,
             const R* coefficients, int64_t stride)
        : starts(columns + 1) {
        const auto inside = [&](int64_t i) {
            return item.columns[i] >= first && item.columns[i] < first + columns;
        };
        const int64_t count = item.offsets[row_count];
        for (int64_t i = 0; i < count; ++i) starts[columns] += inside(i);
        rows.resize(starts[columns]), factors.resize(starts[columns]);
        std::vector<int64_t> next(columns + 1);
        for (int64_t i = 0; i < count; ++i) {
            if (inside(i)) ++next[item.columns[i] - first + 1];
        }
        for (int64_t c = 0; c < columns; ++c) next[c + 1] += next[c];
        std::copy(next.begin(), next.end(), starts.begin());
        for (int64_t r = 0; r < row_count; ++r) {
            for (int64_t i = item.offsets[r]; i < item.offsets[r + 1]; ++i) {
                if (!inside(i)) continue;
                const int64_t place = next[item.columns[i] - first]++;
                rows[place] = static_cast<int32_t>(r);
                factors[place] = item.values[i] * coefficients[r * stride];
            }
        }
    }
};

// The tail by column: sums (G, C) and the row of each group (G, W), G = 1 or 2.
template <class R>
struct Tail {
    Matrix sums, rows;

    template <class T>
    void write(int64_t column, int64_t n, T* out) const {
        const int64_t last = std::min<int64_t>(1, sums.rows - 1);
        const R b = last == 0 ? R(0) : sums.row<const R>(1)[column];
        combine(rows.row<const R>(0), sums.row<const R>(0)[column], rows.row<const R>(last), b, n,
                out);
    }
};

template <class R>
void add_entries(const Matrix& block, const ByColumn<R>& entries, const Matrix& hidden,
                 const std::optional<Tail<R>>& tail) {
    dispatch(block.dtype, "block", [&](auto out_element) {
        using Out = decltype(out_element);
        dispatch(hidden.dtype, "hidden", [&](auto element) {
            using T = decltype(element);
            const int64_t n = block.columns, count = entries.starts.back();
            const int64_t grain = std::max<int64_t>(1, kGrain / std::max<int64_t>(1, n));
            torch::stable::parallel_for(0, block.rows, grain, [&](int64_t begin, int64_t end) {
                std::vector<R> sums(n);
                for (int64_t c = begin; c < end; ++c) {
                    const int64_t first = entries.starts[c], last = entries.starts[c + 1];
                    if (!tail && first == last) continue;
                    Out* out = block.row<Out>(c);
                    if (tail && first == last) {
                        tail->write(c, n, out);
                        continue;
                    }
                    if (tail) {
                        tail->write(c, n, sums.data());
                    } else {
                        widen_all(out, n, sums.data());
                    }
                    for (int64_t i = first; i < last; ++i) {
                        if (i + kAhead < count) {
                            prefetch(hidden.row<const T>(entries.rows[i + kAhead]), n);
                        }
                        subtract_scaled(hidden.row<const T>(entries.rows[i]), n, entries.factors[i],
                                        sums.data());
                    }
                    narrow_all(sums.data(), n, out);
                }
            });
        });
    });
}

template <class R>
void run(const Matrix& block, const Tensor& store, const Tensor& table, int64_t item,
         int64_t first_column, const Tensor& coefficients, const Matrix& hidden,
         const std::optional<Tensor>& tail, const std::optional<Tensor>& tail_rows) {
    const ByColumn<R> entries(item_of<R>(store, table, item, hidden.rows), hidden.rows,
                              first_column, block.rows, coefficients.const_data_ptr<R>(),
                              coefficients.stride(0));
    std::optional<Tail<R>> tails;
    if (tail) {
        tails = Tail<R>{matrix(*tail, "tail"), matrix(*tail_rows, "tail_rows")};
        STD_TORCH_CHECK(tails->sums.rows == tails->rows.rows &&
                            (tails->sums.rows == 1 || tails->sums.rows == 2) &&
                            tails->sums.columns == block.rows &&
                            tails->rows.columns == block.columns &&
                            tail->scalar_type() == coefficients.scalar_type() &&
                            tail_rows->scalar_type() == coefficients.scalar_type(),
                        "tail must be (G, C) and tail_rows (G, W), G = 1 or 2, of block (C, W) = (",
                        block.rows, ", ", block.columns, "), in the dtype of the coefficients");
    }
    add_entries(block, entries, hidden, tails);
}

void compact_weight_gradient(const Tensor& block_tensor, const Tensor& store, const Tensor& table,
                             int64_t item, int64_t first_column, const Tensor& coefficients,
                             const Tensor& hidden_tensor, std::optional<Tensor> tail,
                             std::optional<Tensor> tail_rows) {
    const Matrix block = matrix(block_tensor, "block"), hidden = matrix(hidden_tensor, "hidden");
    STD_TORCH_CHECK(tail.has_value() == tail_rows.has_value(), "tail and tail_rows go together");
    STD_TORCH_CHECK(hidden.columns == block.columns, "hidden must be (R, W) and block (C, W), got ",
                    "widths ", hidden.columns, " and ", block.columns);
    STD_TORCH_CHECK(
        coefficients.dim() == 1 && coefficients.size(0) == hidden.rows && coefficients.is_cpu(),
        "coefficients must be (R,) = (", hidden.rows, ",) on the CPU, got ", coefficients.numel(),
        " elements");
    STD_TORCH_CHECK(store.is_cpu() && store.is_contiguous() && store.dim() == 1,
                    "store must be bytes in a row, on the CPU");
    const ScalarType wide = coefficients.scalar_type();
    STD_TORCH_CHECK(tail.has_value() || block.dtype == wide,
                    "without a tail block is added to, and has the dtype of the coefficients");
    if (wide == ScalarType::Double) {
        run<double>(block, store, table, item, first_column, coefficients, hidden, tail, tail_rows);
    } else {
        STD_TORCH_CHECK(wide == ScalarType::Float, "coefficients must be float32 or float64, got ",
                        torch::headeronly::toString(wide));
        run<float>(block, store, table, item, first_column, coefficients, hidden, tail, tail_rows);
    }
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(orpo_kernels, CPU, m) {
    m.impl("compact_weight_gradient", TORCH_BOX(&compact_weight_gradient));
}
