// orpo_kernels::softmax_stats: per row, max z and sum of exp(z - max) without the label columns; on
// request the sum of z, with them.
//
// One read of the tile. A chunk is looked at twice while it is in the first-level cache: for its
// maximum, then for its sum; the sum so far is rescaled when the maximum grows. A row belongs to
// one thread, so the result does not depend on their number.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "tile.h"

namespace {

using namespace orpo;

template <class R>
struct Stats {
    R max, sum, logit_sum;
};

template <class T>
ORPO_CLONES void accumulate(const T* x, int64_t n, Stats<Real<T>>* stats) {
    using R = Real<T>;
    const R top = maximum(x, n);
    if (top > stats->max || top != top) {  // a nan stays: nothing is larger
        stats->sum *= orpo::exp(stats->max - top);
        stats->max = top;
    }
    const R max = stats->max;
    stats->sum += sum(x, n, [max](R z) ORPO_INLINE_LAMBDA { return orpo::exp(z - max); });
}

template <class T>
ORPO_CLONES Real<T> total(const T* x, int64_t n) {
    return sum(x, n, [](Real<T> z) ORPO_INLINE_LAMBDA { return z; });
}

// Whether a label of the row is among the n columns from `first` on; -inf there when `z` is given.
template <class R>
bool exclude_labels(const Labels& labels, int64_t row, int64_t first, int64_t n, R* z) {
    bool found = false;
    for (int64_t set = 0; set < labels.sets; ++set) {
        const int64_t i = labels.column(set, row) - first;
        if (i < 0 || i >= n) continue;
        found = true;
        if (z) z[i] = -std::numeric_limits<R>::infinity();
    }
    return found;
}

template <bool kWithLogitSum, class T>
Stats<Real<T>> row_stats(const T* x, int64_t columns, int64_t row, const Labels& labels,
                         const Transform<Real<T>>& transform) {
    using R = Real<T>;
    // Lowest, not -inf: a row of labels and -inf only must give exp(-inf), not a difference of
    // infs.
    Stats<R> stats{std::numeric_limits<R>::lowest(), R(0), R(0)};
    const bool identity = transform.identity();
    for (int64_t first = 0; first < columns; first += kChunk) {
        const int64_t n = std::min(kChunk, columns - first);
        if (identity && !exclude_labels<R>(labels, row, first, n, nullptr)) {
            if constexpr (kWithLogitSum) stats.logit_sum += total(x + first, n);
            accumulate(x + first, n, &stats);
            continue;
        }
        R z[kChunk];
        widen_all(x + first, n, z);
        if (!transform.bias.empty()) add(transform.bias.data() + first, n, z);
        if (!identity) apply(transform, n, z);
        if constexpr (kWithLogitSum) stats.logit_sum += total(z, n);
        exclude_labels(labels, row, first, n, z);
        accumulate(z, n, &stats);
    }
    return stats;
}

std::tuple<Tensor, Tensor, Tensor> softmax_stats(const Tensor& logits, std::optional<Tensor> bias,
                                                 const Tensor& labels, int64_t first_column,
                                                 double logit_scale, std::optional<double> softcap,
                                                 bool with_logit_sum) {
    const Matrix tile = matrix(logits, "logits");
    const Labels columns = labels_of(labels, tile.rows, first_column);
    const ScalarType wide = accumulation_dtype(tile.dtype);
    Tensor row_max = torch::stable::new_empty(logits, {tile.rows}, wide);
    Tensor sum_exp = torch::stable::new_empty(logits, {tile.rows}, wide);
    Tensor logit_sum = torch::stable::new_empty(logits, {with_logit_sum ? tile.rows : 0}, wide);
    const auto run = [&](auto element, auto asked) {
        using T = decltype(element);
        using R = Real<T>;
        constexpr bool kAsked = decltype(asked)::value;
        const Transform<R> transform(bias, tile.columns, logit_scale, softcap);
        R* max = row_max.mutable_data_ptr<R>();
        R* sum = sum_exp.mutable_data_ptr<R>();
        R* total_z = logit_sum.mutable_data_ptr<R>();
        over_rows(tile.rows, tile.columns, [&](int64_t r) {
            const T* row = tile.row<T>(r);
            const auto stats = row_stats<kAsked>(row, tile.columns, r, columns, transform);
            max[r] = stats.max;
            sum[r] = stats.sum;
            if constexpr (kAsked) total_z[r] = stats.logit_sum;
        });
    };
    dispatch(tile.dtype, "logits", [&](auto element) {
        if (with_logit_sum) {
            run(element, std::true_type{});
        } else {
            run(element, std::false_type{});
        }
    });
    return {row_max, sum_exp, logit_sum};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(orpo_kernels, CPU, m) {
    m.impl("softmax_stats", TORCH_BOX(&softmax_stats));
}
