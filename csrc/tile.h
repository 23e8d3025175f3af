// What the tile operations share: checked views of their arguments, the transform of the logits,
// and the division of the work. Definitions: orpo_kernels/engine/tiles.py.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <cstdint>
#include <optional>
#include <vector>

#include "exp.h"
#include "number.h"
#include "simd.h"

namespace orpo {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Elements handled at a time: they stay in the first-level cache from one loop to the next.
constexpr int64_t kChunk = 2048;
// Logits per task of the thread pool: tens of microseconds.
constexpr int64_t kGrain = 65536;

// Calls f(T{}) with the element type of the tensor.
template <class F>
void dispatch(ScalarType dtype, const char* name, F f) {
    switch (dtype) {
        case ScalarType::Float:
            return f(float{});
        case ScalarType::Double:
            return f(double{});
        case ScalarType::BFloat16:
            return f(BFloat16{});
        case ScalarType::Half:
            return f(Half{});
        default:
            STD_TORCH_CHECK(false, name, " must be float32, float64, bfloat16 or float16, got ",
                            torch::headeronly::toString(dtype));
    }
}

inline ScalarType accumulation_dtype(ScalarType dtype) {
    return dtype == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// A matrix whose rows are contiguous, at any distance.
struct Matrix {
    void* data;
    ScalarType dtype;
    int64_t rows, columns, row_stride;

    template <class T>
    T* row(int64_t r) const {
        return static_cast<T*>(data) + r * row_stride;
    }
};

// The caller writes through it only where the schema says so.
inline Matrix matrix(const Tensor& tensor, const char* name) {
    STD_TORCH_CHECK(tensor.dim() == 2 && tensor.is_cpu(), name,
                    " must be a matrix on the CPU, got one of ", tensor.dim(), " dimensions");
    const int64_t columns = tensor.size(1);
    STD_TORCH_CHECK(columns <= 1 || tensor.stride(1) == 1, name,
                    " must have contiguous rows, got strides (", tensor.stride(0), ", ",
                    tensor.stride(1), ")");
    return {tensor.data_ptr(), tensor.scalar_type(), tensor.size(0), columns, tensor.stride(0)};
}

// Label sets of the rows, relative to the tile.
struct Labels {
    const int64_t* data;
    int64_t sets, set_stride, row_stride, first_column;

    // Column of the tile, outside [0, columns) when the label lies in another tile or is -1.
    int64_t column(int64_t set, int64_t row) const {
        return data[set * set_stride + row * row_stride] - first_column;
    }
};

inline Labels labels_of(const Tensor& labels, int64_t rows, int64_t first_column) {
    STD_TORCH_CHECK(labels.dim() == 2 && labels.size(1) == rows && labels.is_cpu(),
                    "labels must be (K, R) = (K, ", rows, ") on the CPU, got ", labels.numel(),
                    " elements in ", labels.dim(), " dimensions");
    return {labels.const_data_ptr<int64_t>(), labels.size(0), labels.stride(0), labels.stride(1),
            first_column};
}

template <class T, class R>
ORPO_CLONES void widen_all(const T* x, int64_t n, R* wide) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) wide[i] = static_cast<R>(widen_one(x[i]));
}

template <class T, class R>
ORPO_CLONES void narrow_all(const R* wide, int64_t n, T* x) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) x[i] = narrow_one<T>(wide[i]);
}

// z = softcap(scale * (tile + bias)) in the accumulation dtype R.
template <class R>
struct Transform {
    std::vector<R> bias;  // empty, or one per column
    R scale, cap;         // cap 0: none
    R inner;              // scale / cap

    Transform(const std::optional<Tensor>& bias_tensor, int64_t columns, double logit_scale,
              std::optional<double> softcap)
        : scale(static_cast<R>(logit_scale)),
          cap(static_cast<R>(softcap.value_or(0.0))),
          inner(static_cast<R>(softcap ? logit_scale / *softcap : 0.0)) {
        if (!bias_tensor) return;
        STD_TORCH_CHECK(bias_tensor->dim() == 1 && bias_tensor->size(0) == columns &&
                            bias_tensor->is_cpu() && (columns <= 1 || bias_tensor->stride(0) == 1),
                        "bias must be (C,) = (", columns, ",), contiguous, on the CPU, got ",
                        bias_tensor->numel(), " elements in ", bias_tensor->dim(), " dimensions");
        bias.resize(columns);
        dispatch(bias_tensor->scalar_type(), "bias", [&](auto element) {
            using T = decltype(element);
            widen_all(static_cast<const T*>(bias_tensor->const_data_ptr()), columns, bias.data());
        });
    }

    bool identity() const { return bias.empty() && scale == R(1) && cap == R(0); }
};

// z += bias of the columns from `column` on.
template <class R>
ORPO_CLONES void add(const R* bias, int64_t n, R* z) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) z[i] += bias[i];
}

// z <- softcap(scale * z), the bias added already.
template <class R>
ORPO_CLONES void apply(const Transform<R>& transform, int64_t n, R* z) {
    const R scale = transform.scale, cap = transform.cap, inner = transform.inner;
    if (cap == R(0)) {
#pragma omp simd
        for (int64_t i = 0; i < n; ++i) z[i] *= scale;
    } else {
#pragma omp simd
        for (int64_t i = 0; i < n; ++i) z[i] = cap * orpo::tanh(z[i] * inner).value;
    }
}

// Asks for n elements before they are needed.
template <class T>
inline void prefetch(const T* x, int64_t n) {
#if defined(__GNUC__)
    for (int64_t i = 0; i < n; i += 64 / static_cast<int64_t>(sizeof(T))) __builtin_prefetch(x + i);
#else
    static_cast<void>(x), static_cast<void>(n);
#endif
}

template <class F>
void over_rows(int64_t rows, int64_t columns, const F& f) {
    const int64_t grain = std::max<int64_t>(1, kGrain / std::max<int64_t>(1, columns));
    torch::stable::parallel_for(0, rows, grain, [&](int64_t begin, int64_t end) {
        for (int64_t row = begin; row < end; ++row) f(row);
    });
}

}  // namespace orpo
