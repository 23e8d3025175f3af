// orpo_kernels::csr_matmul_: accumulator += S @ weight, S given row by row by its entries.
//
// A row of the weight is read once per entry, a row of the accumulator belongs to one thread.
#include <torch/csrc/stable/library.h>

#include "tile.h"

namespace {

using namespace orpo;

constexpr int64_t kAhead = 4;  // rows of the weight asked for before they are needed

template <class T, class R>
ORPO_CLONES void add_scaled(const T* x, int64_t n, R factor, R* sums) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) sums[i] += factor * static_cast<R>(widen_one(x[i]));
}

template <class R>
void multiply(const Matrix& sums, const int64_t* offsets, const int32_t* columns, const R* values,
              const Matrix& weight) {
    dispatch(weight.dtype, "weight", [&](auto element) {
        using T = decltype(element);
        const int64_t count = offsets[sums.rows], n = sums.columns;
        const int64_t grain = std::max<int64_t>(1, sums.rows * 16 / std::max<int64_t>(1, count));
        torch::stable::parallel_for(0, sums.rows, grain, [&](int64_t begin, int64_t end) {
            for (int64_t r = begin; r < end; ++r) {
                for (int64_t i = offsets[r]; i < offsets[r + 1]; ++i) {
                    if (i + kAhead < count) prefetch(weight.row<T>(columns[i + kAhead]), n);
                    add_scaled(weight.row<const T>(columns[i]), n, values[i], sums.row<R>(r));
                }
            }
        });
    });
}

void csr_matmul_(const Tensor& accumulator, const Tensor& offsets, const Tensor& columns,
                 const Tensor& values, const Tensor& weight_tensor) {
    const Matrix sums = matrix(accumulator, "accumulator"),
                 weight = matrix(weight_tensor, "weight");
    STD_TORCH_CHECK(weight.columns == sums.columns,
                    "weight must be (C, H) and accumulator (R, H), ", "got widths ", weight.columns,
                    " and ", sums.columns);
    STD_TORCH_CHECK(offsets.dim() == 1 && offsets.size(0) == sums.rows + 1 && offsets.is_cpu() &&
                        offsets.is_contiguous() && columns.is_cpu() && columns.is_contiguous() &&
                        values.is_cpu() && values.is_contiguous() &&
                        columns.numel() == values.numel(),
                    "offsets must be (R + 1,) = (", sums.rows + 1,
                    ",), columns and values of one length, contiguous, on the CPU");
    STD_TORCH_CHECK(
        values.scalar_type() == sums.dtype && sums.dtype == accumulation_dtype(sums.dtype),
        "values and accumulator must be float32, or both float64");
    const int64_t* starts = offsets.const_data_ptr<int64_t>();
    const int32_t* index = columns.const_data_ptr<int32_t>();
    STD_TORCH_CHECK(starts[0] == 0 && starts[sums.rows] == columns.numel(),
                    "offsets must run from 0 to the number of entries, ", columns.numel());
    const auto inside = [&](int32_t column) { return column >= 0 && column < weight.rows; };
    STD_TORCH_CHECK(std::all_of(index, index + columns.numel(), inside),
                    "columns must lie in [0, C) = [0, ", weight.rows, ")");
    if (sums.dtype == ScalarType::Double) {
        multiply(sums, starts, index, values.const_data_ptr<double>(), weight);
    } else {
        multiply(sums, starts, index, values.const_data_ptr<float>(), weight);
    }
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(orpo_kernels, CPU, m) { m.impl("csr_matmul_", TORCH_BOX(&csr_matmul_)); }
