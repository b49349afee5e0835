// Shared by the kernels: 16-lane loads and stores of float32 and bfloat16, and the work that a thread team splits.
#pragma once
#include <immintrin.h>
#include <omp.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>

enum Type { FLOAT32 = 0, BFLOAT16 = 1 };

inline int64_t div_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

inline __mmask16 first_lanes(int64_t n) { return n >= 16 ? 0xFFFF : (__mmask16)((1u << std::max<int64_t>(n, 0)) - 1); }

// A scratch buffer that grows and is kept by the calling thread: fresh pages cost more than the work on them.
template <int slot> inline void* scratch(size_t bytes) {
    struct Buffer {
        void* at = nullptr;
        size_t size = 0;
        ~Buffer() { std::free(at); }
    };
    static thread_local Buffer buffer;
    if (bytes > buffer.size) {
        std::free(buffer.at);
        buffer.size = div_up(bytes, 4096) * 4096;
        buffer.at = std::aligned_alloc(64, buffer.size);
    }
    return buffer.at;
}

inline __m512 load16(const void* base, int64_t index, int type, __mmask16 mask) {
    if (type == FLOAT32) return _mm512_maskz_loadu_ps(mask, (const float*)base + index);
    __m256i half = _mm256_maskz_loadu_epi16(mask, (const uint16_t*)base + index);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}

// Round half to even, as PyTorch does; the hardware's conversion would flush denormals.
inline __m256i to_bf16(__m512 x) {
    __m512i bits = _mm512_castps_si512(x);
    __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    __m512i rounded = _mm512_srli_epi32(_mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7FFF))), 16);
    __mmask16 nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
    return _mm512_cvtepi32_epi16(_mm512_mask_set1_epi32(rounded, nan, 0x7FC0));
}

inline void store16(void* base, int64_t index, int type, __mmask16 mask, __m512 x) {
    if (type == FLOAT32)
        _mm512_mask_storeu_ps((float*)base + index, mask, x);
    else
        _mm256_mask_storeu_epi16((uint16_t*)base + index, mask, to_bf16(x));
}

inline __m512 absolute(__m512 x) { return _mm512_abs_ps(x); }

// Largest magnitude with NaN kept: max_ps would drop it, integer order of the magnitudes' bits does not.
inline __m512i max_bits(__m512i so_far, __m512 x) {
    return _mm512_max_epi32(so_far, _mm512_castps_si512(absolute(x)));
}

inline float as_float(int32_t bits) {
    float x;
    std::memcpy(&x, &bits, 4);
    return x;
}

// round(x) half to even in each lane, as int32 of int8 range.
inline __m512i nearest(__m512 x) { return _mm512_cvt_roundps_epi32(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }

inline void store_codes(int8_t* to, __mmask16 mask, __m512i codes) {
    _mm_mask_storeu_epi8(to, mask, _mm512_cvtsepi32_epi8(codes));
}
