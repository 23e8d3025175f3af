// orpo_kernels::column_sums: coefficients^T tile, (C,) in the dtype of the coefficients; of several
// rows of coefficients (G, R) as many, (G, C).
//
// One read of the tile. Threads divide it into blocks of fixed size, whose sums are added in order:
// the result does not depend on the number of threads.
#include <torch/csrc/stable/library.h>

#include "tile.h"

namespace {

using namespace orpo;

// Rows per partial sum: float32 sums of thousands of rows keep their digits.
constexpr int64_t kRows = 64;
// Rows of a task: of a weight (V, H) there are many, and few columns.
constexpr int64_t kBlockRows = 1024;

template <class T, class R>
ORPO_CLONES void add_row(const T* x, int64_t n, R coefficient, R* sums) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) sums[i] += coefficient * static_cast<R>(widen_one(x[i]));
}

template <class R>
struct Coefficients {
    const R* data;
    int64_t groups, stride, row_stride;
};

// Sums (G, n) of rows [begin, end) and n columns from `first` on.
template <class T, class R>
void sum_block(const Matrix& tile, const Coefficients<R>& coefficients, int64_t begin, int64_t end,
               int64_t first, int64_t n, int64_t pitch, R* sums) {
    std::vector<R> partial(coefficients.groups * n);
    for (int64_t start = begin; start < end; start += kRows) {
        std::fill(partial.begin(), partial.end(), R(0));
        const int64_t stop = std::min(start + kRows, end);
        for (int64_t r = start; r < stop; ++r) {
            for (int64_t g = 0; g < coefficients.groups; ++g) {
                const R factor =
                    coefficients.data[g * coefficients.stride + r * coefficients.row_stride];
                add_row(tile.row<T>(r) + first, n, factor, partial.data() + g * n);
            }
        }
        for (int64_t g = 0; g < coefficients.groups; ++g) {
            add(partial.data() + g * n, n, sums + g * pitch);
        }
    }
}

template <class T, class R>
void sum_columns(const Matrix& tile, const Coefficients<R>& coefficients, R* out) {
    const int64_t chunks = (tile.columns + kChunk - 1) / kChunk;
    const int64_t blocks = std::max<int64_t>(1, (tile.rows + kBlockRows - 1) / kBlockRows);
    const int64_t size = coefficients.groups * tile.columns;
    std::vector<R> sums(blocks * size);
    const int64_t cells = kChunk * std::min(tile.rows, kBlockRows);
    over_rows(blocks * chunks, cells, [&](int64_t i) {
        const int64_t block = i / chunks, first = i % chunks * kChunk;
        const int64_t end = std::min((block + 1) * kBlockRows, tile.rows);
        sum_block<T>(tile, coefficients, block * kBlockRows, end, first,
                     std::min(kChunk, tile.columns - first), tile.columns,
                     sums.data() + block * size + first);
    });
    for (int64_t block = 1; block < blocks; ++block) {
        add(sums.data() + block * size, size, sums.data());
    }
    std::copy_n(sums.data(), size, out);
}

Tensor column_sums(const Tensor& tile_tensor, const Tensor& coefficients) {
    const Matrix tile = matrix(tile_tensor, "tile");
    const int64_t dim = coefficients.dim();
    STD_TORCH_CHECK(
        (dim == 1 || dim == 2) && coefficients.size(dim - 1) == tile.rows && coefficients.is_cpu(),
        "coefficients must be (R,) or (G, R), R = ", tile.rows, ", on the CPU, got ",
        coefficients.numel(), " elements");
    const ScalarType wide = coefficients.scalar_type();
    STD_TORCH_CHECK(wide == accumulation_dtype(wide),
                    "coefficients must be float32 or float64, got ",
                    torch::headeronly::toString(wide));
    const int64_t groups = dim == 1 ? 1 : coefficients.size(0);
    Tensor sums = dim == 1 ? torch::stable::new_empty(coefficients, {tile.columns}, wide)
                           : torch::stable::new_empty(coefficients, {groups, tile.columns}, wide);
    const auto run = [&](auto element, auto sum_element) {
        using T = decltype(element);
        using R = decltype(sum_element);
        const Coefficients<R> values{coefficients.const_data_ptr<R>(), groups,
                                     dim == 1 ? 0 : coefficients.stride(0),
                                     coefficients.stride(dim - 1)};
        sum_columns<T>(tile, values, sums.mutable_data_ptr<R>());
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
