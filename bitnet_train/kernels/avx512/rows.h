// Absmax codes of one row in float32: what all quantisers of tokens and of gradients by row share.
#pragma once
#include "common.h"

// scale and multiplier of one row from the bits of its largest magnitude; multiplier 0 and scale NaN if not finite.
// PyTorch computes 127.0 / m as (1 / m) * 127, with two roundings, and so must everything that wants the same codes.
struct RowScale {
    float multiplier, scale;
};
inline RowScale row_scale(int32_t bits, float floor) {
    float m = as_float(bits);
    if (!std::isfinite(m)) return {0.0f, std::numeric_limits<float>::quiet_NaN()};
    m = std::max(m, floor);
    return {(1.0f / m) * 127.0f, m / 127.0f};
}

inline void write_codes(const float* row, int64_t n, float multiplier, int8_t* codes) {
    const __m512 by = _mm512_set1_ps(multiplier);
    for (int64_t k = 0; k < n; k += 16) {
        __mmask16 mask = first_lanes(n - k);
        __m512i code = nearest(_mm512_mul_ps(_mm512_maskz_loadu_ps(mask, row + k), by));
        store_codes(codes + k, mask, code);
    }
}
