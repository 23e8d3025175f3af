// Element types of a tile, their conversions, and loops over them that the compiler vectorises.
//
// Arithmetic is in Real<T>: float, or double for double. A 16-bit tile is read and written as pairs
// in 32-bit words, so that halves never change lanes: a third faster than widening in order.
#pragma once

#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

#include "simd.h"

namespace orpo {

struct BFloat16 {
    uint16_t bits;
};

struct Half {
    uint16_t bits;
};

template <class T>
using Real = std::conditional_t<std::is_same_v<T, double>, double, float>;

template <class To, class From>
ORPO_INLINE To bit_cast(From from) {
    static_assert(sizeof(To) == sizeof(From));
    To to;
    std::memcpy(&to, &from, sizeof(to));
    return to;
}

// All ones where the condition holds. Bit masks instead of ?: keep the loops free of branches.
ORPO_INLINE uint32_t mask(bool condition) { return -static_cast<uint32_t>(condition); }

ORPO_INLINE float select(uint32_t mask, float yes, float no) {
    return bit_cast<float>((bit_cast<uint32_t>(yes) & mask) | (bit_cast<uint32_t>(no) & ~mask));
}

// ---- one element ----

// From the low (High = false) or the high 16 bits of a word.
template <class T, bool High>
ORPO_INLINE float widen(uint32_t word) {
    if constexpr (std::is_same_v<T, BFloat16>) {
        return bit_cast<float>(High ? word & 0xffff0000u : word << 16);
    } else {
        const uint32_t sign = High ? word & 0x80000000u : (word & 0x8000u) << 16;
        const uint32_t shifted = (High ? word >> 3 : word << 13) & 0x0fffe000u;
        // 2^112 moves the exponent bias from 15 to 127 and makes subnormals normal.
        const float finite = bit_cast<float>(shifted) * 0x1p112f;
        const uint32_t special = mask(shifted >= 0x0f800000u) & 0x7f800000u;  // inf, nan
        return bit_cast<float>(bit_cast<uint32_t>(finite) | special | sign);
    }
}

// Rounded to nearest even, in the high 16 bits of a word; the low bits are garbage.
template <class T>
ORPO_INLINE uint32_t narrow_high(float value) {
    const uint32_t bits = bit_cast<uint32_t>(value);
    if constexpr (std::is_same_v<T, BFloat16>) {
        // A nan whose 16 low bits are 0, as every nan of a 16-bit tile, stays one.
        return bits + 0x7fffu + ((bits >> 16) & 1u);
    } else {
        const uint32_t sign = bits & 0x80000000u, magnitude = bits & 0x7fffffffu;
        // Subnormal halves: adding 0.5 leaves the rounded multiple of 2^-24 in the low bits.
        const uint32_t small = bit_cast<uint32_t>(bit_cast<float>(magnitude) + 0.5f) - 0x3f000000u;
        const uint32_t normal = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
        const uint32_t is_small = mask(magnitude < 0x38800000u);
        const uint32_t is_large = mask(magnitude >= 0x477ff000u);  // rounds to 65,536 or more
        const uint32_t is_nan = mask(magnitude > 0x7f800000u);
        uint32_t half = (small & is_small) | (normal & ~is_small);
        half = (0x7c00u & is_large) | (half & ~is_large) | (0x200u & is_nan);
        return (half << 16) | sign;
    }
}

template <class T>
ORPO_INLINE Real<T> widen_one(T value) {
    if constexpr (sizeof(T) == 2) {
        return widen<T, false>(value.bits);
    } else {
        return value;
    }
}

template <class T, class R>
ORPO_INLINE T narrow_one(R value) {
    if constexpr (sizeof(T) == 2) {
        const float single = static_cast<float>(value);
        const float quiet = select(mask(single != single), bit_cast<float>(0x7fc00000u), single);
        return T{static_cast<uint16_t>(narrow_high<T>(quiet) >> 16)};
    } else {
        return static_cast<T>(value);
    }
}

// ---- loops over n elements ----

template <class T>
ORPO_INLINE uint32_t load_pair(const T* x) {
    uint32_t word;
    std::memcpy(&word, x, sizeof(word));
    return word;
}

// Which element of a pair is in the low bits does not matter to a sum or an elementwise map.
template <class T, class F>
ORPO_INLINE Real<T> sum_terms(const T* x, int64_t n, F f) {
    Real<T> total = 0;
    if constexpr (sizeof(T) == 2) {
#pragma omp simd reduction(+ : total)
        for (int64_t i = 0; i < n / 2; ++i) {
            const uint32_t word = load_pair(x + 2 * i);
            total += f(widen<T, false>(word)) + f(widen<T, true>(word));
        }
        if (n % 2) total += f(widen_one(x[n - 1]));
    } else {
#pragma omp simd reduction(+ : total)
        for (int64_t i = 0; i < n; ++i) total += f(x[i]);
    }
    return total;
}

// In partial sums: where the compiler does not vectorise, one running sum would lose digits.
template <class T, class F>
ORPO_INLINE Real<T> sum(const T* x, int64_t n, F f) {
    constexpr int64_t kTerms = 256;
    Real<T> total = 0;
    for (int64_t first = 0; first < n; first += kTerms) {
        total += sum_terms(x + first, n - first < kTerms ? n - first : kTerms, f);
    }
    return total;
}

template <class T, class F>
ORPO_INLINE void map(T* x, int64_t n, F f) {
    if constexpr (sizeof(T) == 2) {
#pragma omp simd
        for (int64_t i = 0; i < n / 2; ++i) {
            uint32_t word = load_pair(x + 2 * i);
            const uint32_t low = narrow_high<T>(f(widen<T, false>(word)));
            const uint32_t high = narrow_high<T>(f(widen<T, true>(word)));
            word = (low >> 16) | (high & 0xffff0000u);
            std::memcpy(x + 2 * i, &word, sizeof(word));
        }
        if (n % 2) x[n - 1] = narrow_one<T>(f(widen_one(x[n - 1])));
    } else {
#pragma omp simd
        for (int64_t i = 0; i < n; ++i) x[i] = f(x[i]);
    }
}

// In integers, where the order is the same once the magnitude of negative numbers is complemented:
// vectorises without leave to ignore nan. A positive nan is larger than everything.
template <class T>
ORPO_INLINE Real<T> maximum(const T* x, int64_t n) {
    using Bits = std::conditional_t<sizeof(T) == 2, int16_t,
                                    std::conditional_t<sizeof(T) == 4, int32_t, int64_t>>;
    constexpr int sign_bit = 8 * sizeof(T) - 1;
    constexpr Bits magnitude = std::numeric_limits<Bits>::max();
    Bits top = std::numeric_limits<Bits>::min();
#pragma omp simd reduction(max : top)
    for (int64_t i = 0; i < n; ++i) {
        Bits key;
        std::memcpy(&key, x + i, sizeof(key));
        key = static_cast<Bits>(key ^ ((key >> sign_bit) & magnitude));
        top = key > top ? key : top;
    }
    return widen_one(bit_cast<T>(static_cast<Bits>(top ^ ((top >> sign_bit) & magnitude))));
}

}  // namespace orpo
