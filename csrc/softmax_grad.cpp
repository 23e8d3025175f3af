// orpo_kernels::softmax_grad_: tile <- exp(z - reference) * dz/dtile, label columns 0.
//
// One read and one write of the tile. z - reference <= 0 outside the label columns, which are
// overwritten afterwards.
#include <torch/csrc/stable/library.h>

#include "tile.h"

namespace {

using namespace orpo;

template <class T>
ORPO_CLONES void exponentiate(T* x, int64_t n, Real<T> reference) {
    using R = Real<T>;
    map(x, n, [reference](R z) ORPO_INLINE_LAMBDA { return orpo::exp(z - reference); });
}

// The same for any transform: raw logits, bias added, to exp(z - reference) * slope.
template <class R>
ORPO_CLONES void exponentiate(const Transform<R>& transform, int64_t n, R reference, R* z) {
    const R scale = transform.scale, cap = transform.cap, inner = transform.inner;
    if (cap == R(0)) {
#pragma omp simd
        for (int64_t i = 0; i < n; ++i) z[i] = orpo::exp(z[i] * scale - reference) * scale;
    } else {
#pragma omp simd
        for (int64_t i = 0; i < n; ++i) {
            const auto capped = orpo::tanh(z[i] * inner);
            z[i] = orpo::exp(cap * capped.value - reference) * (capped.slope * scale);
        }
    }
}

template <class T, class Out>
void row_grad(const T* x, int64_t columns, Real<T> reference, const Transform<Real<T>>& transform,
              Out* out) {
    using R = Real<T>;
    for (int64_t first = 0; first < columns; first += kChunk) {
        const int64_t n = std::min(kChunk, columns - first);
        R z[kChunk];
        widen_all(x + first, n, z);
        if (!transform.bias.empty()) add(transform.bias.data() + first, n, z);
        exponentiate(transform, n, reference, z);
        narrow_all(z, n, out + first);
    }
}

template <class Out>
void clear_labels(const Labels& labels, int64_t row, int64_t columns, Out* out) {
    for (int64_t set = 0; set < labels.sets; ++set) {
        const int64_t column = labels.column(set, row);
        if (column >= 0 && column < columns) out[column] = Out{};
    }
}

void softmax_grad_(const Tensor& logits, std::optional<Tensor> bias, const Tensor& labels,
                   int64_t first_column, const Tensor& reference, double logit_scale,
                   std::optional<double> softcap, std::optional<Tensor> out) {
    const Matrix tile = matrix(logits, "logits"), target = matrix(out.value_or(logits), "out");
    STD_TORCH_CHECK(target.rows == tile.rows && target.columns == tile.columns,
                    "out must be (R, C) = (", tile.rows, ", ", tile.columns, "), got (",
                    target.rows, ", ", target.columns, ")");
    STD_TORCH_CHECK(reference.dim() == 1 && reference.size(0) == tile.rows && reference.is_cpu(),
                    "reference must be (R,) = (", tile.rows, ",) on the CPU, got ",
                    reference.numel(), " elements");
    const Labels columns = labels_of(labels, tile.rows, first_column);
    const int64_t stride = reference.stride(0);
    dispatch(tile.dtype, "logits", [&](auto element) {
        using T = decltype(element);
        using R = Real<T>;
        const Transform<R> transform(bias, tile.columns, logit_scale, softcap);
        const R* references = reference.const_data_ptr<R>();
        const bool in_place = target.data == tile.data && target.row_stride == tile.row_stride &&
                              target.dtype == tile.dtype;
        dispatch(target.dtype, "out", [&](auto out_element) {
            using Out = decltype(out_element);
            over_rows(tile.rows, tile.columns, [&](int64_t r) {
                if (in_place && transform.identity()) {
                    exponentiate(tile.row<T>(r), tile.columns, references[r * stride]);
                } else {
                    row_grad<T, Out>(tile.row<T>(r), tile.columns, references[r * stride],
                                     transform, target.row<Out>(r));
                }
                clear_labels(columns, r, tile.columns, target.row<Out>(r));
            });
        });
    });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(orpo_kernels, CPU, m) {
    m.impl("softmax_grad_", TORCH_BOX(&softmax_grad_));
}
