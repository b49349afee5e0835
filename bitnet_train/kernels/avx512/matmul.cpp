// Products of codes (tokens, or gradients quantised by row) with ternary codes.
#include "panels.h"

namespace {

constexpr int MOST_ROWS = 96;

struct Output {
    const float *scale_b, *bias;
    void* out;
    int type;
    int64_t n;
};

// ((product * scale_a) * scale_b) + bias, each rounded to float32, then once to the output's type.
inline void finish(const Output& o, float scale_a, int64_t row, int64_t column, __mmask16 mask, __m512i product) {
    __m512 y = _mm512_mul_ps(_mm512_cvtepi32_ps(product), _mm512_set1_ps(scale_a));
    if (o.scale_b) y = _mm512_mul_ps(y, _mm512_maskz_loadu_ps(mask, o.scale_b + column));
    if (o.bias) y = _mm512_add_ps(y, _mm512_maskz_loadu_ps(mask, o.bias + column));
    store16(o.out, row * o.n + column, o.type, mask, y);
}

// Rows of the left operand: signed codes, `stride` bytes apart, with a scale and a compensation each.
struct Left {
    const int8_t* codes;
    int64_t stride;
    const float* scale;
    const int32_t* start;
};

template <int R>
void tile(const Left& a, int64_t first, const uint8_t* panel, int64_t groups, const Output& o, int64_t row,
          int64_t column) {
    __m512i acc[R][4];
#pragma GCC unroll 6
    for (int r = 0; r < R; r++)
#pragma GCC unroll 4
        for (int j = 0; j < 4; j++) acc[r][j] = _mm512_set1_epi32(a.start[first + r]);
    multiply<R>(a.codes + first * a.stride, a.stride, 4, panel, groups, acc);
#pragma GCC unroll 6
    for (int r = 0; r < R; r++)
#pragma GCC unroll 4
        for (int j = 0; j < 4; j++) {
            const int64_t c = column + 16 * j;
            if (c < o.n) finish(o, a.scale[first + r], row + r, c, first_lanes(o.n - c), acc[r][j]);
        }
}

// `count` rows of the left operand, from row `row` of the output on, times one panel.
void tiles(const Left& a, int64_t count, const uint8_t* panel, int64_t groups, const Output& o, int64_t row,
           int64_t column) {
    for (int64_t first = 0; first < count; first += ROWS) switch (std::min<int64_t>(ROWS, count - first)) {
            case 1: tile<1>(a, first, panel, groups, o, row + first, column); break;
            case 2: tile<2>(a, first, panel, groups, o, row + first, column); break;
            case 3: tile<3>(a, first, panel, groups, o, row + first, column); break;
            case 4: tile<4>(a, first, panel, groups, o, row + first, column); break;
            case 5: tile<5>(a, first, panel, groups, o, row + first, column); break;
            default: tile<6>(a, first, panel, groups, o, row + first, column);
        }
}

// out (m, n) = codes (m, k) @ b, scaled; b is (n, k) if `transposed`, else (k, n). Codes come in chunks of rows, which
// stay in a core's cache with a panel: load(first, count, buffer, stride, scale) returns those rows, `stride` set to
// their distance, either where they are or in `buffer`, whose rows are `stride` bytes long and zero from k on.
template <class Load>
void multiply_by_chunks(const int8_t* b, int64_t transposed, const Output& o, int64_t m, int64_t k, int threads, Load load) {
    const int64_t groups = div_up(k, 4), panels = div_up(o.n, COLUMNS), size = groups * 4 * COLUMNS;
    const int64_t padded = div_up(k, 64) * 64;
    const int64_t cached = std::min<int64_t>(MOST_ROWS, std::max<int64_t>(ROWS, (1 << 18) / padded));
    const int64_t chunk = div_up(std::min(cached, div_up(m, 4 * threads)), ROWS) * ROWS, chunks = div_up(m, chunk);
    // Few rows are shared out by panels, too.
    const int64_t shares = std::min(panels, chunks >= 2 * threads ? 1 : div_up(4 * threads, chunks));
    uint8_t* packed = (uint8_t*)scratch<2>(panels * size);
#pragma omp parallel num_threads(threads)
    {
#pragma omp for schedule(static)
        for (int64_t p = 0; p < panels; p++)
            (transposed ? pack_transposed : pack_rows)(b, k, o.n, p * COLUMNS, packed + p * size);
        int8_t* buffer = (int8_t*)scratch<4>(chunk * padded);
        float scale[MOST_ROWS + ROWS];
        int32_t start[MOST_ROWS + ROWS];
#pragma omp for schedule(dynamic)
        for (int64_t work = 0; work < chunks * shares; work++) {
            const int64_t first = work / shares * chunk, count = std::min(chunk, m - first), share = work % shares;
            int64_t stride = padded;
            const int8_t* codes = load(first, count, buffer, stride, scale);
            for (int64_t r = 0; r < count; r++) start[r] = compensation(codes + r * stride, k);
            const Left left{codes, stride, scale, start};
            for (int64_t p = share * panels / shares; p < (share + 1) * panels / shares; p++)
                tiles(left, count, packed + p * size, groups, o, first, p * COLUMNS);
        }
    }
}

// One token at a time against the rows of b (n, k), unpacked: generation reads each weight once.
void few_rows(const int8_t* a, const float* scale, const int8_t* b, const Output& o, int64_t m, int64_t k, int threads) {
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
            finish(o, scale[row], row, c, 1, _mm512_set1_epi32(product));
        }
}

// The same with b packed four codes to a byte: byte j of row c holds code + 1 of columns j, q + j, 2q + j and 3q + j.
template <int M>
void few_packed_rows(const int8_t* a, const float* scale, const uint8_t* b, const Output& o, int64_t k, int threads) {
    const int64_t quarter = div_up(k, 4);
    const __m512i two_bits = _mm512_set1_epi8(3);
    // Starting a thread takes as long as some 50 kB of weights.
    threads = (int)std::max<int64_t>(1, std::min<int64_t>(threads, o.n * quarter >> 16));
    // Every stored code is one too large, which adds the row's sum to each product.
    int32_t surplus[M];
    for (int row = 0; row < M; row++) surplus[row] = compensation(a + row * k, k) / -128;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t c = 0; c < o.n; c++) {
        __m512i acc[M];
        for (int row = 0; row < M; row++) acc[row] = _mm512_setzero_si512();
        for (int64_t j = 0; j < quarter; j += 64) {
            const __m512i four = _mm512_maskz_loadu_epi8(first_bytes(quarter - j), b + c * quarter + j);
#pragma GCC unroll 4
            for (int part = 0; part < 4; part++) {
                const int64_t column = part * quarter + j;
                const __mmask64 mask = first_bytes(std::min(quarter - j, k - column));
                const __m512i w = _mm512_and_si512(_mm512_srli_epi16(four, 2 * part), two_bits);
                for (int row = 0; row < M; row++)
                    acc[row] = _mm512_dpbusd_epi32(acc[row], w, _mm512_maskz_loadu_epi8(mask, a + row * k + column));
            }
        }
        for (int row = 0; row < M; row++)
            finish(o, scale[row], row, c, 1, _mm512_set1_epi32(_mm512_reduce_add_epi32(acc[row]) - surplus[row]));
    }
}

// Row i of `grad` times by (n), as codes; returns their scale. `row` has room for n floats.
float quantise_gradient_row(const Parts& grad, int64_t i, const float* by, int64_t n, float* row, int8_t* codes) {
    __m512i largest = _mm512_setzero_si512();
    for (int64_t p = 0, first = 0; p < grad.count; first += grad.widths[p++])
        for (int64_t j = 0; j < grad.widths[p]; j += 16) {
            const __mmask16 mask = first_lanes(grad.widths[p] - j);
            __m512 v = load16(grad.at[p], i * grad.widths[p] + j, grad.type, mask);
            v = _mm512_mul_ps(v, _mm512_maskz_loadu_ps(mask, by + first + j));
            _mm512_mask_storeu_ps(row + first + j, mask, v);
            largest = max_bits(largest, v);
        }
    const RowScale s = row_scale(_mm512_reduce_max_epi32(largest), 1e-30f);
    write_codes(row, n, s.multiplier, codes);
    return s.scale;
}

}  // namespace

extern "C" {

// out (m, n) = (a (m, k) @ b) * scale_a (m) * scale_b (n) + bias (n); b is (n, k) if `transposed`, else (k, n).
// bias may be null.
void int8_matmul(const int8_t* a, const int8_t* b, int64_t transposed, const float* scale_a, const float* scale_b,
                 const float* bias, void* out, int type, int64_t m, int64_t n, int64_t k, int threads) {
    const Output o{scale_b, bias, out, type, n};
    if (m <= 4 && transposed) return few_rows(a, scale_a, b, o, m, k, threads);
    multiply_by_chunks(b, transposed, o, m, k, threads,
                       [&](int64_t first, int64_t count, int8_t* buffer, int64_t& stride, float* scale) {
                           std::memcpy(scale, scale_a + first, sizeof(float) * count);
                           if (k % 4 == 0) {
                               stride = k;
                               return a + first * k;
                           }
                           // The last group of four would reach into the next row.
                           for (int64_t r = 0; r < count; r++) {
                               std::memcpy(buffer + r * stride, a + (first + r) * k, k);
                               std::memset(buffer + r * stride + k, 0, stride - k);
                           }
                           return (const int8_t*)buffer;
                       });
}

// As int8_matmul with b packed, for m of one to four.
void packed_matmul(const int8_t* a, const uint8_t* b, const float* scale_a, const float* scale_b, const float* bias,
                   void* out, int type, int64_t m, int64_t n, int64_t k, int threads) {
    const Output o{scale_b, bias, out, type, n};
    switch (m) {
        case 1: return few_packed_rows<1>(a, scale_a, b, o, k, threads);
        case 2: return few_packed_rows<2>(a, scale_a, b, o, k, threads);
        case 3: return few_packed_rows<3>(a, scale_a, b, o, k, threads);
        case 4: return few_packed_rows<4>(a, scale_a, b, o, k, threads);
    }
}

// codes (n, k) of packed (n, ceil(k / 4)).
void unpack_codes(const uint8_t* packed, int8_t* codes, int64_t n, int64_t k, int threads) {
    const int64_t quarter = div_up(k, 4);
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t c = 0; c < n; c++)
        for (int64_t j = 0; j < quarter; j += 64) {
            const __m512i four = _mm512_maskz_loadu_epi8(first_bytes(quarter - j), packed + c * quarter + j);
            for (int part = 0; part < 4; part++) {
                const int64_t column = part * quarter + j;
                const __m512i w = _mm512_and_si512(_mm512_srli_epi16(four, 2 * part), _mm512_set1_epi8(3));
                _mm512_mask_storeu_epi8(codes + c * k + column, first_bytes(std::min(quarter - j, k - column)),
                                        _mm512_sub_epi8(w, _mm512_set1_epi8(1)));
            }
        }
}

// out (m, n) = codes (m, k) @ b * scale of the code's row, of the codes of grad (m, k) * by (k); b as above.
void gradient_matmul(const void* const* parts, const int64_t* widths, int count, int grad_type, const float* by,
                     const int8_t* b, int64_t transposed, void* out, int type, int64_t m, int64_t n, int64_t k, int threads) {
    const Parts grad{parts, widths, count, grad_type};
    multiply_by_chunks(b, transposed, Output{nullptr, nullptr, out, type, n}, m, k, threads,
                       [&](int64_t first, int64_t count, int8_t* buffer, int64_t& stride, float* scale) {
                           float* row = (float*)scratch<0>(sizeof(float) * k);
                           for (int64_t r = 0; r < count; r++) {
                               int8_t* codes = buffer + r * stride;
                               scale[r] = quantise_gradient_row(grad, first + r, by, k, row, codes);
                               std::memset(codes + k, 0, stride - k);
                           }
                           return (const int8_t*)buffer;
                       });
}

}  // extern "C"
