// int8 matmuls on VNNI: vpdpbusd multiplies unsigned by signed bytes, four to an int32, without saturation.
//
// The right operand is shifted by 128 to unsigned and packed into panels of 64 columns, [k / 4][column][k % 4]; the
// accumulators start at -128 * (row sums of the left operand). A tile of 6 rows and 64 columns keeps its 24 accumulators
// in registers, and its result is scaled while it is there, so that int32 products never go through memory.
#pragma once
#include "rows.h"

constexpr int ROWS = 6, COLUMNS = 64;

// 4 rows of 64 bytes -> 64 groups of 4 bytes, in order.
inline void interleave4(__m512i r0, __m512i r1, __m512i r2, __m512i r3, __m512i out[4]) {
    __m512i low01 = _mm512_unpacklo_epi8(r0, r1), high01 = _mm512_unpackhi_epi8(r0, r1);
    __m512i low23 = _mm512_unpacklo_epi8(r2, r3), high23 = _mm512_unpackhi_epi8(r2, r3);
    __m512i a = _mm512_unpacklo_epi16(low01, low23), b = _mm512_unpackhi_epi16(low01, low23);
    __m512i c = _mm512_unpacklo_epi16(high01, high23), d = _mm512_unpackhi_epi16(high01, high23);
    // Lane l of a, b, c, d holds columns 16 l + 0, 4, 8, 12: a transpose of 128-bit lanes.
    __m512i ab0 = _mm512_shuffle_i32x4(a, b, 0x44), ab1 = _mm512_shuffle_i32x4(a, b, 0xEE);
    __m512i cd0 = _mm512_shuffle_i32x4(c, d, 0x44), cd1 = _mm512_shuffle_i32x4(c, d, 0xEE);
    out[0] = _mm512_shuffle_i32x4(ab0, cd0, 0x88);
    out[1] = _mm512_shuffle_i32x4(ab0, cd0, 0xDD);
    out[2] = _mm512_shuffle_i32x4(ab1, cd1, 0x88);
    out[3] = _mm512_shuffle_i32x4(ab1, cd1, 0xDD);
}

inline __mmask64 first_bytes(int64_t n) { return n >= 64 ? ~0ull : (n <= 0 ? 0 : (1ull << n) - 1); }

// Signed bytes plus 128.
inline __m512i to_unsigned(__m512i x) { return _mm512_xor_si512(x, _mm512_set1_epi8((char)0x80)); }

// Columns [n0, n0 + 64) of b (k, n), row-major, into a panel.
inline void pack_rows(const int8_t* b, int64_t k, int64_t n, int64_t n0, uint8_t* panel) {
    const __mmask64 mask = first_bytes(n - n0);
    for (int64_t i = 0; i < k; i += 4, panel += 4 * COLUMNS) {
        __m512i row[4], out[4];
        for (int r = 0; r < 4; r++)
            row[r] = i + r < k ? _mm512_maskz_loadu_epi8(mask, b + (i + r) * n + n0) : _mm512_setzero_si512();
        interleave4(row[0], row[1], row[2], row[3], out);
        for (int r = 0; r < 4; r++) _mm512_store_si512(panel + 64 * r, to_unsigned(out[r]));
    }
}

// Rows [n0, n0 + 64) of b (n, k), row-major, into a panel: the transpose of the above.
inline void pack_transposed(const int8_t* b, int64_t k, int64_t n, int64_t n0, uint8_t* panel) {
    __m512i offsets[4];
    __mmask16 present[4];
    for (int j = 0; j < 4; j++) {
        present[j] = first_lanes(n - n0 - 16 * j);
        const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
        offsets[j] = _mm512_mullo_epi32(_mm512_add_epi32(_mm512_set1_epi32(16 * j), lane), _mm512_set1_epi32((int)k));
    }
    const int8_t* base = b + n0 * k;
    int64_t i = 0;
    for (; i + 4 <= k; i += 4, panel += 4 * COLUMNS)
        for (int j = 0; j < 4; j++) {
            __m512i v = _mm512_mask_i32gather_epi32(_mm512_setzero_si512(), present[j], offsets[j], base + i, 1);
            _mm512_store_si512(panel + 64 * j, to_unsigned(v));
        }
    if (i < k) {
        std::memset(panel, 0, 4 * COLUMNS);
        for (int64_t c = 0; c < std::min<int64_t>(COLUMNS, n - n0); c++)
            for (int64_t r = i; r < k; r++) panel[4 * c + r - i] = (uint8_t)(base[c * k + r] + 128);
    }
}

// -128 * the sum of k bytes.
inline int32_t compensation(const int8_t* row, int64_t k) {
    const __m512i ones = _mm512_set1_epi8(1);
    __m512i sum = _mm512_setzero_si512();
    for (int64_t i = 0; i < k; i += 64)
        sum = _mm512_dpbusd_epi32(sum, ones, _mm512_maskz_loadu_epi8(first_bytes(k - i), row + i));
    return -128 * _mm512_reduce_add_epi32(sum);
}

// acc += unsigned bytes of a x signed bytes of b. As assembly because GCC 12 copies the intrinsic's accumulator around
// until it spills, which halves the rate.
inline void multiply_add(__m512i& acc, __m512i a, __m512i b) { __asm__("vpdpbusd %2, %1, %0" : "+v"(acc) : "v"(a), "v"(b)); }

// acc[r][j] += a (R rows, signed, `stride` apart, groups `step` apart) x panel, over `groups` groups of four.
template <int R>
inline void multiply(const int8_t* a, int64_t stride, int64_t step, const uint8_t* panel, int64_t groups,
                     __m512i acc[R][4]) {
    for (int64_t i = 0; i < groups; i++) {
        __m512i b[4];
#pragma GCC unroll 4
        for (int j = 0; j < 4; j++) b[j] = _mm512_load_si512(panel + 256 * i + 64 * j);
#pragma GCC unroll 6
        for (int r = 0; r < R; r++) {
            int32_t four;
            std::memcpy(&four, a + r * stride + i * step, 4);
            const __m512i av = _mm512_set1_epi32(four);
#pragma GCC unroll 4
            for (int j = 0; j < 4; j++) multiply_add(acc[r][j], b[j], av);
        }
    }
}

// A matrix (m, n) that lies in parts (m, widths[p]) side by side.
struct Parts {
    const void* const* at;
    const int64_t* widths;
    int count, type;

    int64_t width() const {
        int64_t n = 0;
        for (int p = 0; p < count; p++) n += widths[p];
        return n;
    }
};
