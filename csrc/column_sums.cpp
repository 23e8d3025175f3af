// orpo_kernels::column_sums: coefficients^T tile, (C,) in the dtype of the coefficients.
//
// One read of the tile. Threads divide the columns, in chunks of fixed size, and the rows are
// added in order: the result does not depend on the number of threads.
#include <torch/csrc/stable/library.h>

#include "tile.h"

namespace {

using namespace orpo;

// Rows per partial sum: float32 sums of thousands of rows keep their digits.
constexpr int64_t kRows = 64;

template <class T, class R>
ORPO_CLONES void add_row(const T* x, int64_t n, R coefficient, R* sums) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) sums[i] += coefficient * static_cast<R>(widen_one(x[i]));
}

template <class T, class R>
void sum_columns(const Matrix& tile, const R* coefficients, int64_t stride, int64_t first,
                 int64_t n, R* sums) {
    std::fill(sums, sums + n, R(0));
    for (int64_t start = 0; start < tile.rows; start += kRows) {
        R partial[kChunk] = {};
        const int64_t stop = std::min(start + kRows, tile.rows);
        for (int64_t r = start; r < stop; ++r) {
            add_row(tile.row<T>(r) + first, n, coefficients[r * stride], partial);
        }
        add(partial, n, sums);
    }
}

Tensor column_sums(const Tensor& tile_tensor, const Tensor& coefficients) {
    const Matrix tile = matrix(tile_tensor, "tile");
    STD_TORCH_CHECK(
        coefficients.dim() == 1 && coefficients.size(0) == tile.rows && coefficients.is_cpu(),
        "coefficients must be (R,) = (", tile.rows, ",) on the CPU, got ", coefficients.numel(),
        " elements");
    const ScalarType wide = coefficients.scalar_type();
    STD_TORCH_CHECK(wide == accumulation_dtype(wide),
                    "coefficients must be float32 or float64, got ",
                    torch::headeronly::toString(wide));
    Tensor sums = torch::stable::new_empty(coefficients, {tile.columns}, wide);
    const int64_t stride = coefficients.stride(0);
    const int64_t chunks = (tile.columns + kChunk - 1) / kChunk;
    const auto run = [&](auto element, auto sum_element) {
        using T = decltype(element);
        using R = decltype(sum_element);
        R* out = sums.mutable_data_ptr<R>();
        const R* values = coefficients.const_data_ptr<R>();
        over_rows(chunks, kChunk * tile.rows, [&](int64_t chunk) {
            const int64_t first = chunk * kChunk;
            const int64_t n = std::min(kChunk, tile.columns - first);
            sum_columns<T>(tile, values, stride, first, n, out + first);
        });
    };
    dispatch(tile.dtype, "tile", [&](auto element) {
        if (wide == ScalarType::Double) {
            run(element, double{});
        } else {
            run(element, float{});
        }
    });
    return sums;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(orpo_kernels, CPU, m) { m.impl("column_sums", TORCH_BOX(&column_sums)); }
