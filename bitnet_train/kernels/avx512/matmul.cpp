// int8 matmuls on VNNI: vpdpbusd multiplies unsigned by signed bytes, four to an int32, without saturation.
//
// The left operand is signed, so it is shifted by 128 to unsigned and the accumulators start at -128 * (column sums of
// the right operand). The right operand is packed into panels of 64 columns, [k / 4][column][k % 4]; a tile of 6 rows
// and 64 columns keeps its 24 accumulators in registers, and its result is scaled while it is there, so that int32
// products never go through memory.
#include "common.h"

namespace {

constexpr int ROWS = 6, COLUMNS = 64, BLOCK = 128;

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

// Columns [n0, n0 + 64) of b (k, n), row-major, into a panel.
void pack_rows(const int8_t* b, int64_t k, int64_t n, int64_t n0, int8_t* panel) {
    const __mmask64 mask = first_bytes(n - n0);
    for (int64_t i = 0; i < k; i += 4, panel += 4 * COLUMNS) {
        __m512i row[4], out[4];
        for (int r = 0; r < 4; r++)
            row[r] = i + r < k ? _mm512_maskz_loadu_epi8(mask, b + (i + r) * n + n0) : _mm512_setzero_si512();
        interleave4(row[0], row[1], row[2], row[3], out);
        for (int r = 0; r < 4; r++) _mm512_store_si512(panel + 64 * r, out[r]);
    }
}

// Rows [n0, n0 + 64) of b (n, k), row-major, into a panel: the transpose of the above.
void pack_transposed(const int8_t* b, int64_t k, int64_t n, int64_t n0, int8_t* panel) {
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
            _mm512_store_si512(panel + 64 * j, v);
        }
    if (i < k) {
        std::memset(panel, 0, 4 * COLUMNS);
        for (int64_t c = 0; c < std::min<int64_t>(COLUMNS, n - n0); c++)
            std::memcpy(panel + 4 * c, base + c * k + i, k - i);
    }
}

// -128 * the sum of each of the panel's columns over `groups` groups of four.
inline void compensation(const int8_t* panel, int64_t groups, __m512i out[4]) {
    const __m512i ones = _mm512_set1_epi8(1);
    __m512i sum[4] = {};
    for (int64_t i = 0; i < groups; i++)
        for (int j = 0; j < 4; j++) sum[j] = _mm512_dpbusd_epi32(sum[j], ones, _mm512_load_si512(panel + 256 * i + 64 * j));
    for (int j = 0; j < 4; j++) out[j] = _mm512_slli_epi32(_mm512_sub_epi32(_mm512_setzero_si512(), sum[j]), 7);
}

// acc += unsigned bytes of a x signed bytes of b. As assembly because GCC 12 copies the intrinsic's accumulator around
// until it spills, which halves the rate.
inline void multiply_add(__m512i& acc, __m512i a, __m512i b) { __asm__("vpdpbusd %2, %1, %0" : "+v"(acc) : "v"(a), "v"(b)); }

// acc[r][j] += a (R rows, unsigned, `stride` apart, groups `step` apart) x panel, over `groups` groups of four.
template <int R>
inline void multiply(const uint8_t* a, int64_t stride, int64_t step, const int8_t* panel, int64_t groups,
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
            for (int j = 0; j < 4; j++) multiply_add(acc[r][j], av, b[j]);
        }
    }
}

// R rows of a (m, k) made unsigned, each padded to a multiple of 64.
inline void pack_left(const int8_t* a, int64_t k, int64_t stride, int rows, uint8_t* to) {
    const __m512i flip = _mm512_set1_epi8((char)0x80);
    for (int r = 0; r < rows; r++)
        for (int64_t i = 0; i < k; i += 64) {
            __m512i v = _mm512_maskz_loadu_epi8(first_bytes(k - i), a + r * k + i);
            _mm512_store_si512(to + r * stride + i, _mm512_xor_si512(v, flip));
        }
}

struct Output {
    const float *scale_a, *scale_b, *bias;
    void* out;
    int type;
    int64_t n;
};

// ((product * scale_a) * scale_b) + bias, each rounded to float32, then once to the output's type.
inline void finish(const Output& o, int64_t row, int64_t column, __mmask16 mask, __m512i product) {
    __m512 y = _mm512_mul_ps(_mm512_cvtepi32_ps(product), _mm512_set1_ps(o.scale_a[row]));
    if (o.scale_b) y = _mm512_mul_ps(y, _mm512_maskz_loadu_ps(mask, o.scale_b + column));
    if (o.bias) y = _mm512_add_ps(y, _mm512_maskz_loadu_ps(mask, o.bias + column));
    store16(o.out, row * o.n + column, o.type, mask, y);
}

template <int R>
void tile(const uint8_t* a, int64_t stride, const int8_t* panel, const __m512i* start, int64_t groups, const Output& o,
          int64_t row, int64_t column) {
    __m512i acc[R][4];
#pragma GCC unroll 6
    for (int r = 0; r < R; r++)
#pragma GCC unroll 4
        for (int j = 0; j < 4; j++) acc[r][j] = start[j];
    multiply<R>(a, stride, 4, panel, groups, acc);
#pragma GCC unroll 6
    for (int r = 0; r < R; r++)
#pragma GCC unroll 4
        for (int j = 0; j < 4; j++) {
            const int64_t c = column + 16 * j;
            if (c < o.n) finish(o, row + r, c, first_lanes(o.n - c), acc[r][j]);
        }
}

void tiles(int rows, const uint8_t* a, int64_t stride, const int8_t* panel, const __m512i* start, int64_t groups,
           const Output& o, int64_t row, int64_t column) {
    switch (rows) {
        case 1: return tile<1>(a, stride, panel, start, groups, o, row, column);
        case 2: return tile<2>(a, stride, panel, start, groups, o, row, column);
        case 3: return tile<3>(a, stride, panel, start, groups, o, row, column);
        case 4: return tile<4>(a, stride, panel, start, groups, o, row, column);
        case 5: return tile<5>(a, stride, panel, start, groups, o, row, column);
        default: return tile<6>(a, stride, panel, start, groups, o, row, column);
    }
}

// One token at a time against the rows of b (n, k), unpacked: generation reads each weight once.
void few_rows(const int8_t* a, const int8_t* b, const Output& o, int64_t m, int64_t k, int threads) {
    const __m512i flip = _mm512_set1_epi8((char)0x80), bias128 = flip;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t c = 0; c < o.n; c++)
        for (int64_t row = 0; row < m; row++) {
            __m512i acc = _mm512_setzero_si512(), shift = _mm512_setzero_si512();
            for (int64_t i = 0; i < k; i += 64) {
                const __mmask64 mask = first_bytes(k - i);
                const __m512i w = _mm512_maskz_loadu_epi8(mask, b + c * k + i);
                const __m512i x = _mm512_xor_si512(_mm512_maskz_loadu_epi8(mask, a + row * k + i), flip);
                acc = _mm512_dpbusd_epi32(acc, x, w);
                shift = _mm512_dpbusd_epi32(shift, bias128, w);
            }
            const int32_t product = _mm512_reduce_add_epi32(_mm512_sub_epi32(acc, shift));
            finish(o, row, c, 1, _mm512_set1_epi32(product));
        }
}

// grad (m, width) * by (m) of the tokens of one block and of columns [j, j + 16), which are columns [n0, n0 + 16) of
// all parts, to unsigned codes, in tiles of 6 columns: [column / 6][token / 4][column % 6][token % 4], and one scale per
// column.
void quantise_block(const void* grad, int type, const float* by, int64_t begin, int64_t end, int64_t width, int64_t j,
                    int64_t n0, int64_t groups, uint8_t* left, float* scale) {
    alignas(64) float values[BLOCK][16];
    const __mmask16 mask = first_lanes(width - j);
    __m512i largest = _mm512_setzero_si512();
    for (int64_t t = begin; t < end; t++) {
        const __m512 v = _mm512_mul_ps(load16(grad, t * width + j, type, mask), _mm512_set1_ps(by[t]));
        _mm512_store_ps(values[t - begin], v);
        largest = max_bits(largest, v);
    }
    const __m512 m = _mm512_castsi512_ps(largest);
    const __mmask16 finite = _mm512_cmp_epi32_mask(largest, _mm512_set1_epi32(0x7F800000), _MM_CMPINT_LT);
    const __m512 floored = _mm512_max_ps(m, _mm512_set1_ps(1e-30f)), span = _mm512_set1_ps(127.0f);
    // (1 / m) * 127 as in quantise.cpp
    const __m512 multiplier = _mm512_maskz_mul_ps(finite, _mm512_div_ps(_mm512_set1_ps(1.0f), floored), span);
    const __m512 nan = _mm512_set1_ps(std::numeric_limits<float>::quiet_NaN());
    _mm512_mask_storeu_ps(scale + n0, mask, _mm512_mask_div_ps(nan, finite, floored, span));

    alignas(64) int32_t at[16];
    for (int c = 0; c < 16; c++) at[c] = (int32_t)((n0 + c) / ROWS * groups * ROWS + (n0 + c) % ROWS);
    const __m512i where = _mm512_load_si512(at), byte = _mm512_set1_epi32(0xFF), shift = _mm512_set1_epi32(128);
    for (int64_t t = begin; t < end; t += 4) {
        __m512i four = _mm512_setzero_si512();
        for (int r = 3; r >= 0; r--) {
            __m512i code = shift;
            if (t + r < end)
                code = _mm512_add_epi32(nearest(_mm512_mul_ps(_mm512_load_ps(values[t + r - begin]), multiplier)), shift);
            four = _mm512_or_si512(_mm512_slli_epi32(four, 8), _mm512_and_si512(code, byte));
        }
        _mm512_mask_i32scatter_epi32(left + t / 4 * ROWS * 4, mask, where, four, 4);
    }
}

// One block's products, scaled, added to the totals.
template <int R>
void add_block(const uint8_t* a, const int8_t* panel, const __m512i* start, int64_t groups,
                                         const float* scale, float* total) {
    __m512i acc[R][4];
#pragma GCC unroll 6
    for (int r = 0; r < R; r++)
#pragma GCC unroll 4
        for (int j = 0; j < 4; j++) acc[r][j] = start[j];
    multiply<R>(a, 4, ROWS * 4, panel, groups, acc);
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

// Rows [row, row + R) and columns [column, column + 64) of dW, block after block in float32.
template <int R>
void gradient_tile(const uint8_t* left, const int8_t* panel, const __m512i* starts, const float* scale, float* out,
                   int64_t tokens, int64_t n, int64_t k, int64_t row, int64_t column) {
    alignas(64) float total[R][COLUMNS] = {};
    for (int64_t block = 0; block * BLOCK < tokens; block++) {
        const int64_t groups = div_up(std::min<int64_t>(BLOCK, tokens - block * BLOCK), 4), first = block * BLOCK / 4;
        add_block<R>(left + first * ROWS * 4, panel + first * 4 * COLUMNS, starts + 4 * block, groups,
                     scale + block * n + row, total[0]);
    }
    for (int r = 0; r < R; r++)
        for (int j = 0; j < 4; j++) {
            const int64_t c = column + 16 * j;
            if (c < k) _mm512_mask_storeu_ps(out + (row + r) * k + c, first_lanes(k - c), _mm512_load_ps(total[r] + 16 * j));
        }
}

}  // namespace

extern "C" {

// out (m, n) = (a (m, k) @ b) * scale_a (m) * scale_b (n) + bias (n); b is (n, k) if `transposed`, else (k, n).
// scale_b and bias may be null.
void int8_matmul(const int8_t* a, const int8_t* b, int64_t transposed, const float* scale_a, const float* scale_b,
                 const float* bias, void* out, int type, int64_t m, int64_t n, int64_t k, int threads) {
    const Output o{scale_a, scale_b, bias, out, type, n};
    if (m <= 4 && transposed) return few_rows(a, b, o, m, k, threads);
    const int64_t groups = div_up(k, 4), panels = div_up(n, COLUMNS), size = groups * 4 * COLUMNS;
    const int64_t chunk = ROWS * 64, chunks = div_up(m, chunk), stride = div_up(k, 64) * 64;
    int8_t* packed = (int8_t*)scratch<2>(panels * size);
    __m512i* starts = (__m512i*)scratch<3>(panels * 4 * sizeof(__m512i));
#pragma omp parallel num_threads(threads)
    {
#pragma omp for schedule(static)
        for (int64_t p = 0; p < panels; p++) {
            (transposed ? pack_transposed : pack_rows)(b, k, n, p * COLUMNS, packed + p * size);
            compensation(packed + p * size, groups, starts + 4 * p);
        }
        uint8_t* left = (uint8_t*)scratch<4>(ROWS * stride);
#pragma omp for schedule(dynamic)
        for (int64_t work = 0; work < chunks * panels; work++) {
            const int64_t p = work % panels, begin = (work / panels) * chunk, end = std::min(m, begin + chunk);
            for (int64_t row = begin; row < end; row += ROWS) {
                const int rows = (int)std::min<int64_t>(ROWS, end - row);
                pack_left(a + row * k, k, stride, rows, left);
                tiles(rows, left, stride, packed + p * size, starts + 4 * p, groups, o, row, p * COLUMNS);
            }
        }
    }
}

// out (n, k) = sum over blocks of 128 tokens of scale[block] * (codes of grad * by).T @ x; by (m), x (m, k), and grad
// (m, n) lies in parts (m, widths[p]) side by side.
void block_weight_gradient(const void* const* parts, const int64_t* widths, int count, int type, const float* by,
                           const int8_t* x, float* out, int64_t m, int64_t n, int64_t k, int threads) {
    const int64_t groups = div_up(m, 4), blocks = div_up(m, BLOCK), panels = div_up(k, COLUMNS), tiles = div_up(n, ROWS);
    const int64_t size = groups * 4 * COLUMNS, left_size = groups * 4 * ROWS;
    int8_t* packed = (int8_t*)scratch<2>(panels * size);
    __m512i* starts = (__m512i*)scratch<3>(panels * blocks * 4 * sizeof(__m512i));
    // 16 columns are quantised at a time, so the last tiles may reach past n.
    uint8_t* left = (uint8_t*)scratch<5>(left_size * (tiles + 3));
    float* scale = (float*)scratch<6>(sizeof(float) * blocks * n);
#pragma omp parallel num_threads(threads)
    {
#pragma omp for schedule(static) nowait
        for (int64_t p = 0; p < panels; p++) {
            pack_rows(x, m, k, p * COLUMNS, packed + p * size);
            for (int64_t b = 0; b < blocks; b++) {
                const int64_t in_block = div_up(std::min<int64_t>(BLOCK, m - b * BLOCK), 4);
                compensation(packed + p * size + b * BLOCK * COLUMNS, in_block, starts + 4 * (p * blocks + b));
            }
        }
        for (int64_t p = 0, first = 0; p < count; first += widths[p++]) {
            const int64_t strips = div_up(widths[p], 16);
#pragma omp for schedule(static) nowait
            for (int64_t work = 0; work < blocks * strips; work++) {
                const int64_t b = work / strips, j = work % strips * 16;
                quantise_block(parts[p], type, by, b * BLOCK, std::min(m, (b + 1) * BLOCK), widths[p], j, first + j,
                               groups, left, scale + b * n);
            }
        }
#pragma omp barrier
        const int64_t chunk = 16, chunks = div_up(tiles, chunk);
#pragma omp for schedule(dynamic)
        for (int64_t work = 0; work < panels * chunks; work++) {
            const int64_t p = work / chunks, first = work % chunks * chunk;
            for (int64_t t = first; t < std::min(tiles, first + chunk); t++) {
                const int64_t row = t * ROWS, column = p * COLUMNS;
                const uint8_t* a = left + t * left_size;
                const int8_t* b = packed + p * size;
                const __m512i* s = starts + 4 * p * blocks;
                switch (std::min<int64_t>(ROWS, n - row)) {
                    case 1: gradient_tile<1>(a, b, s, scale, out, m, n, k, row, column); break;
                    case 2: gradient_tile<2>(a, b, s, scale, out, m, n, k, row, column); break;
                    case 3: gradient_tile<3>(a, b, s, scale, out, m, n, k, row, column); break;
                    case 4: gradient_tile<4>(a, b, s, scale, out, m, n, k, row, column); break;
                    case 5: gradient_tile<5>(a, b, s, scale, out, m, n, k, row, column); break;
                    default: gradient_tile<6>(a, b, s, scale, out, m, n, k, row, column);
                }
            }
        }
    }
}

}  // extern "C"
