// orpo_kernels::accumulate_: accumulator <- rescale * accumulator + alpha * partial.
//
// One read of the partial, one read and write of the accumulator. A row belongs to one thread, so
// the result does not depend on their number.
#include <torch/csrc/stable/library.h>

#include "tile.h"

namespace {

using namespace orpo;

template <class T, class R>
ORPO_CLONES void add_scaled(const T* x, int64_t n, R alpha, R rescale, R* sums) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) {
        sums[i] = sums[i] * rescale + alpha * static_cast<R>(widen_one(x[i]));
    }
}

template <class R>
void accumulate(const Matrix& sums, const Matrix& partial, const std::optional<Tensor>& rescale,
                R alpha) {
    const R* factors = rescale ? rescale->const_data_ptr<R>() : nullptr;
    const int64_t stride = rescale ? rescale->stride(0) : 0;
    dispatch(partial.dtype, "partial", [&](auto element) {
        using T = decltype(element);
        over_rows(sums.rows, sums.columns, [&](int64_t r) {
            const R factor = factors ? factors[r * stride] : R(1);
            add_scaled(partial.row<const T>(r), sums.columns, alpha, factor, sums.row<R>(r));
        });
    });
}

void accumulate_(const Tensor& accumulator, const Tensor& partial_tensor,
                 std::optional<Tensor> rescale, double alpha) {
    const Matrix sums = matrix(accumulator, "accumulator");
    const Matrix partial = matrix(partial_tensor, "partial");
    STD_TORCH_CHECK(sums.dtype == accumulation_dtype(sums.dtype),
                    "accumulator must be float32 or float64, got ",
                    torch::headeronly::toString(sums.dtype));
    STD_TORCH_CHECK(partial.rows == sums.rows && partial.columns == sums.columns,
                    "partial must be (R, H) = (", sums.rows, ", ", sums.columns, "), got (",
                    partial.rows, ", ", partial.columns, ")");
    STD_TORCH_CHECK(!rescale || (rescale->dim() == 1 && rescale->size(0) == sums.rows &&
                                 rescale->is_cpu() && rescale->scalar_type() == sums.dtype),
                    "rescale must be (R,) = (", sums.rows,
                    ",) in the dtype of the accumulator, on the CPU, got ",
                    rescale ? rescale->numel() : 0, " elements");
    if (sums.dtype == ScalarType::Double) {
        accumulate<double>(sums, partial, rescale, alpha);
    } else {
        accumulate<float>(sums, partial, rescale, static_cast<float>(alpha));
    }
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(orpo_kernels, CPU, m) { m.impl("accumulate_", TORCH_BOX(&accumulate_)); }
