// exp and tanh for loops the compiler vectorises: no branches, no tables, no library calls.
#pragma once

#include <cmath>

#include "number.h"

namespace orpo {

// e^x within 2 ulp for x <= 71, subnormal results included; 0 from -104 down (-inf too), nan for
// nan. Above 71 it saturates near 2^103: a softmax asks only for x <= 0.
//
//     x = k ln 2 + r, |r| <= ln 2 / 2,    e^x = 2^k (1 + r + r^2 q(r)),  q minimax of degree 4
ORPO_INLINE float exp(float x) {
    constexpr float kLowest = -104.0f, kLog2E = 1.44269504f;
    constexpr float kLn2High = 0.693359375f, kLn2Low = -2.12194440e-4f;  // k * high is exact
    // Adding 1.5 * 2^23 rounds to an integer and leaves it in the low bits of the sum; the rest of
    // the shift makes these bits the exponent field of 2^(k + 24), in range for subnormal results.
    constexpr int32_t kField = 127 + 24;
    constexpr float kShift = 0x1.8p23f + kField;
    constexpr int32_t kShiftBits = 0x4b400000;

    x = select(mask(x < kLowest), kLowest, x);
    const float shifted = x * kLog2E + kShift;
    const float k = shifted - kShift;
    const float r = (x - k * kLn2High) - k * kLn2Low;
    float q = 1.381454e-3f;
    q = q * r + 8.368745e-3f;
    q = q * r + 4.166839e-2f;
    q = q * r + 1.6666521e-1f;
    q = q * r + 4.9999994e-1f;
    const float p = (q * r + 1.0f) * r + 1.0f;
    int32_t field = bit_cast<int32_t>(shifted);
    field = field < kShiftBits + 254 ? field : kShiftBits + 254;
    return p * bit_cast<float>(static_cast<uint32_t>(field) << 23) * 0x1p-24f;
}

ORPO_INLINE double exp(double x) { return std::exp(x); }

// tanh(u) and its derivative 1 - tanh(u)^2, the latter without cancellation.
struct Tanh {
    float value, slope;
};

ORPO_INLINE Tanh tanh(float u) {
    const uint32_t sign = bit_cast<uint32_t>(u) & 0x80000000u;
    const float a = bit_cast<float>(bit_cast<uint32_t>(u) ^ sign);
    const float e = exp(-2.0f * a), d = 1.0f / (1.0f + e);
    const float square = u * u;
    float q = -5.6669363e-3f;
    q = q * square + 2.0606142e-2f;
    q = q * square - 5.3729996e-2f;
    q = q * square + 1.3331331e-1f;
    q = q * square - 3.3333278e-1f;
    const float small = a + a * square * q;
    const float magnitude = select(mask(a < 0.625f), small, (1.0f - e) * d);
    return {bit_cast<float>(bit_cast<uint32_t>(magnitude) | sign), 4.0f * e * d * d};
}

struct TanhDouble {
    double value, slope;
};

ORPO_INLINE TanhDouble tanh(double u) {
    const double e = std::exp(-2.0 * std::fabs(u)), d = 1.0 / (1.0 + e);
    return {std::tanh(u), 4.0 * e * d * d};
}

}  // namespace orpo
