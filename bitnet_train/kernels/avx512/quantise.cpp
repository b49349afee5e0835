// Quantisers: tokens (with residual and RMSNorm), master weights.
#include "rows.h"

extern "C" {

// x (m, k) [+ delta] -> stream in the type of x (written only with delta), RMSNorm if norm is given, codes, scale, rstd.
void quantise_tokens(const void* x, int x_type, const void* delta, int delta_type, void* stream, const float* norm,
                     float eps, int8_t* codes, float* scale, float* rstd, int64_t m, int64_t k, int threads) {
    // One token at a time is no work to share.
    threads = (int)std::min<int64_t>(threads, m);
#pragma omp parallel num_threads(threads)
    {
        float* row = (float*)scratch<0>(sizeof(float) * k);
#pragma omp for schedule(static)
        for (int64_t i = 0; i < m; i++) {
            __m512 squares0 = _mm512_setzero_ps(), squares1 = _mm512_setzero_ps();
            __m512i largest = _mm512_setzero_si512();
            for (int64_t j = 0; j < k; j += 16) {
                __mmask16 mask = first_lanes(k - j);
                __m512 v = load16(x, i * k + j, x_type, mask);
                if (delta) {
                    v = _mm512_add_ps(v, load16(delta, i * k + j, delta_type, mask));
                    store16(stream, i * k + j, x_type, mask, v);
                    if (x_type == BFLOAT16) v = load16(stream, i * k + j, x_type, mask);
                }
                _mm512_mask_storeu_ps(row + j, mask, v);
                if (!norm)
                    largest = max_bits(largest, v);
                else if (j & 16)
                    squares1 = _mm512_fmadd_ps(v, v, squares1);
                else
                    squares0 = _mm512_fmadd_ps(v, v, squares0);
            }
            if (norm) {
                float mean = _mm512_reduce_add_ps(_mm512_add_ps(squares0, squares1)) / (float)k;
                rstd[i] = 1.0f / std::sqrt(mean + eps);
                const __m512 r = _mm512_set1_ps(rstd[i]);
                for (int64_t j = 0; j < k; j += 16) {
                    __mmask16 mask = first_lanes(k - j);
                    __m512 v = _mm512_mul_ps(_mm512_maskz_loadu_ps(mask, row + j), r);
                    v = _mm512_mul_ps(v, _mm512_maskz_loadu_ps(mask, norm + j));
                    _mm512_mask_storeu_ps(row + j, mask, v);
                    largest = max_bits(largest, v);
                }
            }
            RowScale s = row_scale(_mm512_reduce_max_epi32(largest), 1e-5f);
            scale[i] = s.scale;
            write_codes(row, k, s.multiplier, codes + i * k);
        }
    }
}

// Mean of |w| of each of `groups` equal spans of `size` weights: summed in float64, rounded once, at least `floor`.
void absolute_means(const float* w, float* means, float floor, int64_t groups, int64_t size, int threads) {
    // Spans of a fixed length, so that the number of threads does not change the order of the sum.
    const int64_t span = 1 << 16, spans = div_up(size, span);
    double* parts = (double*)scratch<1>(sizeof(double) * groups * spans);
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t s = 0; s < groups * spans; s++) {
        const int64_t begin = (s % spans) * span, end = std::min(size, begin + span);
        const float* at = w + (s / spans) * size;
        __m512d low = _mm512_setzero_pd(), high = _mm512_setzero_pd();
        for (int64_t i = begin; i < end; i += 16) {
            __m512 v = absolute(_mm512_maskz_loadu_ps(first_lanes(end - i), at + i));
            low = _mm512_add_pd(low, _mm512_cvtps_pd(_mm512_castps512_ps256(v)));
            high = _mm512_add_pd(high, _mm512_cvtps_pd(_mm512_extractf32x8_ps(v, 1)));
        }
        parts[s] = _mm512_reduce_add_pd(_mm512_add_pd(low, high));
    }
    for (int64_t g = 0; g < groups; g++) {
        double sum = 0.0;
        for (int64_t s = 0; s < spans; s++) sum += parts[g * spans + s];
        const float mean = (float)(sum / (double)size);
        means[g] = mean < floor ? floor : mean;  // NaN stays
    }
}

// codes = (w / scale > threshold) - (w / scale < -threshold), one scale for each of `groups` spans of `size` weights.
void ternarise(const float* w, const float* scale, float threshold, int8_t* codes, int64_t groups, int64_t size,
               int threads) {
    const int64_t span = 1 << 14, spans = div_up(size, span);
    const __m512 up = _mm512_set1_ps(threshold), down = _mm512_set1_ps(-threshold);
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t s = 0; s < groups * spans; s++) {
        const int64_t first = (s / spans) * size, begin = (s % spans) * span, end = std::min(size, begin + span);
        const __m512 by = _mm512_set1_ps(scale[s / spans]);
        for (int64_t i = first + begin; i < first + end; i += 16) {
            __mmask16 mask = first_lanes(first + end - i);
            __m512 ratio = _mm512_div_ps(_mm512_maskz_loadu_ps(mask, w + i), by);
            __mmask16 positive = _mm512_cmp_ps_mask(ratio, up, _CMP_GT_OQ);
            __mmask16 negative = _mm512_cmp_ps_mask(ratio, down, _CMP_LT_OQ);
            __m128i code = _mm_mask_set1_epi8(_mm_maskz_set1_epi8(positive, 1), negative, -1);
            _mm_mask_storeu_epi8(codes + i, mask, code);
        }
    }
}

}  // extern "C"
