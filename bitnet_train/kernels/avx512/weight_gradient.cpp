// dW from the codes of the input and gradients quantised by blocks of 128 tokens.
#include <vector>

#include "panels.h"

namespace {

constexpr int BLOCK = 128, BAND = 8 * ROWS;

// Up to 16 columns of the gradient, from column j of part p on: row n0 and the following of dW.
struct Strip {
    int64_t p, j, n0;
};

// The gradient's codes of `rows` columns, in bands of 48, [column / 48][token / 4][column % 48][token % 4], and for each
// block of 128 tokens and column the scale and -128 * the sum of the codes.
struct GradientCodes {
    int8_t* codes;
    float* scale;
    int32_t* start;
    int64_t rows, groups;
};

// Tokens [begin, end), one block, of the strip's columns times by (m), to rows `to.rows` of `to` from `at` on.
void quantise_block(const Parts& grad, const float* by, const Strip& strip, int64_t begin, int64_t end, int64_t at,
                    const GradientCodes& to) {
    alignas(64) float values[BLOCK][16];
    const int64_t width = grad.widths[strip.p];
    const __mmask16 mask = first_lanes(width - strip.j);
    __m512i largest = _mm512_setzero_si512();
    for (int64_t t = begin; t < end; t++) {
        const __m512 v = _mm512_mul_ps(load16(grad.at[strip.p], t * width + strip.j, grad.type, mask), _mm512_set1_ps(by[t]));
        _mm512_store_ps(values[t - begin], v);
        largest = max_bits(largest, v);
    }
    const __m512 m = _mm512_castsi512_ps(largest);
    const __mmask16 finite = _mm512_cmp_epi32_mask(largest, _mm512_set1_epi32(0x7F800000), _MM_CMPINT_LT);
    const __m512 floored = _mm512_max_ps(m, _mm512_set1_ps(1e-30f)), span = _mm512_set1_ps(127.0f);
    // (1 / m) * 127 as in rows.h
    const __m512 multiplier = _mm512_maskz_mul_ps(finite, _mm512_div_ps(_mm512_set1_ps(1.0f), floored), span);
    const __m512 nan = _mm512_set1_ps(std::numeric_limits<float>::quiet_NaN());
    const int64_t place = begin / BLOCK * to.rows + at;
    _mm512_mask_storeu_ps(to.scale + place, mask, _mm512_mask_div_ps(nan, finite, floored, span));

    // Columns past the band's end lie at the beginning of the next.
    const int64_t inside = std::min<int64_t>(16, BAND - at % BAND), step = 4 * BAND;
    const __mmask16 here = mask & first_lanes(inside), beyond = mask & ~here;
    int8_t* codes = to.codes + at / BAND * to.groups * step + begin / 4 * step;
    int8_t *first = codes + at % BAND * 4, *second = codes + to.groups * step - inside * 4;
    const __m512i byte = _mm512_set1_epi32(0xFF);
    __m512i sum = _mm512_setzero_si512();
    for (int64_t t = begin; t < end; t += 4, first += step, second += step) {
        __m512i four = _mm512_setzero_si512();
        for (int r = 3; r >= 0; r--) {
            __m512i code = _mm512_setzero_si512();
            if (t + r < end) code = nearest(_mm512_mul_ps(_mm512_load_ps(values[t + r - begin]), multiplier));
            sum = _mm512_add_epi32(sum, code);
            four = _mm512_or_si512(_mm512_slli_epi32(four, 8), _mm512_and_si512(code, byte));
        }
        _mm512_mask_storeu_epi32(first, here, four);
        if (beyond) _mm512_mask_storeu_epi32(second, beyond, four);
    }
    const __m512i start = _mm512_slli_epi32(_mm512_sub_epi32(_mm512_setzero_si512(), sum), 7);
    _mm512_mask_storeu_epi32(to.start + place, mask, start);
}

// One block's products, scaled, added to the totals. A function of its own, as GCC 12 spills accumulators in a loop.
template <int R>
__attribute__((noinline)) void add_block(const int8_t* a, const uint8_t* panel, const int32_t* start, int64_t groups,
                                         const float* scale, float* total) {
    __m512i acc[R][4];
#pragma GCC unroll 6
    for (int r = 0; r < R; r++)
#pragma GCC unroll 4
        for (int j = 0; j < 4; j++) acc[r][j] = _mm512_set1_epi32(start[r]);
    multiply<R>(a, 4, 4 * BAND, panel, groups, acc);
#pragma GCC unroll 6
    for (int r = 0; r < R; r++) {
        const __m512 by = _mm512_set1_ps(scale[r]);
#pragma GCC unroll 4
        for (int j = 0; j < 4; j++) {
            float* to = total + COLUMNS * r + 16 * j;
            const __m512 product = _mm512_mul_ps(_mm512_cvtepi32_ps(acc[r][j]), by);
            _mm512_store_ps(to, _mm512_add_ps(_mm512_load_ps(to), product));
        }
    }
}

void add_block(int64_t rows, const int8_t* a, const uint8_t* panel, const int32_t* start, int64_t groups,
               const float* scale, float* total) {
    switch (rows) {
        case 1: return add_block<1>(a, panel, start, groups, scale, total);
        case 2: return add_block<2>(a, panel, start, groups, scale, total);
        case 3: return add_block<3>(a, panel, start, groups, scale, total);
        case 4: return add_block<4>(a, panel, start, groups, scale, total);
        case 5: return add_block<5>(a, panel, start, groups, scale, total);
        default: return add_block<6>(a, panel, start, groups, scale, total);
    }
}

// `rows` rows of `left` from `first` on, a band or what is left of it, times a panel, to dW (.., k) at `out`. Blocks are
// the outer loop: a block's part of the panel, of the band and the totals fit into the first cache together.
void gradient_band(const GradientCodes& left, int64_t first, int64_t rows, const uint8_t* panel, int64_t tokens, float* out,
                   int64_t k, int64_t column) {
    alignas(64) float total[BAND][COLUMNS] = {};
    const int8_t* codes = left.codes + first / BAND * left.groups * 4 * BAND;
    for (int64_t block = 0; block * BLOCK < tokens; block++) {
        const int64_t groups = div_up(std::min<int64_t>(BLOCK, tokens - block * BLOCK), 4), group = block * BLOCK / 4;
        const int64_t place = block * left.rows + first;
        for (int64_t r = 0; r < rows; r += ROWS)
            add_block(std::min<int64_t>(ROWS, rows - r), codes + group * 4 * BAND + r * 4, panel + group * 4 * COLUMNS,
                      left.start + place + r, groups, left.scale + place + r, total[r]);
    }
    for (int64_t r = 0; r < rows; r++)
        for (int j = 0; j < 4; j++) {
            const int64_t c = column + 16 * j;
            if (c < k) _mm512_mask_storeu_ps(out + r * k + c, first_lanes(k - c), _mm512_load_ps(total[r] + 16 * j));
        }
}

}  // namespace

extern "C" {

// out (n, k) = sum over blocks of 128 tokens of scale[block] * (codes of grad * by).T @ x; by (m), x (m, k), and grad
// (m, n) lies in parts (m, widths[p]) side by side.
void block_weight_gradient(const void* const* parts, const int64_t* widths, int count, int type, const float* by,
                           const int8_t* x, float* out, int64_t m, int64_t n, int64_t k, int threads) {
    const Parts grad{parts, widths, count, type};
    const int64_t groups = div_up(m, 4), blocks = div_up(m, BLOCK), panels = div_up(k, COLUMNS);
    const int64_t size = groups * 4 * COLUMNS;
    std::vector<Strip> strips;
    for (int64_t p = 0, first = 0; p < count; first += widths[p++])
        for (int64_t j = 0; j < widths[p]; j += 16) strips.push_back({p, j, first + j});
    // Rows of dW at a time: as many as have their codes in the cores' caches.
    const int64_t at_once = std::max<int64_t>(16, (int64_t)threads * (1 << 19) / (groups * 4) / 16 * 16);
    const int64_t together = std::min<int64_t>(at_once / 16, strips.size()), most = together * 16;
    uint8_t* packed = (uint8_t*)scratch<2>(panels * size);
    const GradientCodes left{(int8_t*)scratch<5>(div_up(most, BAND) * BAND * groups * 4),
                             (float*)scratch<6>(sizeof(float) * blocks * most),
                             (int32_t*)scratch<3>(sizeof(int32_t) * blocks * most), most, groups};
#pragma omp parallel num_threads(threads)
    {
#pragma omp for schedule(static) nowait
        for (int64_t p = 0; p < panels; p++) pack_rows(x, m, k, p * COLUMNS, packed + p * size);
        for (int64_t s = 0; s < (int64_t)strips.size(); s += together) {
            const int64_t last = std::min<int64_t>(s + together, strips.size()), n0 = strips[s].n0;
            const int64_t rows = (last < (int64_t)strips.size() ? strips[last].n0 : n) - n0;
#pragma omp for schedule(static)
            for (int64_t work = 0; work < blocks * (last - s); work++) {
                const int64_t block = work / (last - s);
                const Strip& strip = strips[s + work % (last - s)];
                quantise_block(grad, by, strip, block * BLOCK, std::min(m, (block + 1) * BLOCK), strip.n0 - n0, left);
            }
            const int64_t bands = div_up(rows, BAND);
#pragma omp for schedule(dynamic)
            for (int64_t work = 0; work < panels * bands; work++) {
                const int64_t p = work / bands, first = work % bands * BAND;
                gradient_band(left, first, std::min<int64_t>(BAND, rows - first), packed + p * size, m, out + (n0 + first) * k,
                              k, p * COLUMNS);
            }
        }
    }
}

}  // extern "C"
