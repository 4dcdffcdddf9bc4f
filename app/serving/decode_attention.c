// Attention of one new token a row over the keys and values that its row has cached; and the storing of new ones.
//
// Rows differ in length and nothing is padded: what a row gets depends on its own numbers alone, in one order of
// sums, whatever else is in the batch. Axes: b rows, h heads, g key-value heads, l positions, d size of a head.
// Built by decode_attention.py.

#include <float.h>
#include <math.h>
#include <stdint.h>
#include <string.h>

typedef uint16_t bfloat16;

static inline float widened_float(float number) { return number; }

static inline float widened_bfloat16(bfloat16 number) {
    uint32_t bits = (uint32_t)number << 16;
    float wide;
    memcpy(&wide, &bits, sizeof wide);
    return wide;
}

static inline float narrowed_float(float number) { return number; }

static inline bfloat16 narrowed_bfloat16(float number) { // to the nearest, ties to even
    uint32_t bits;
    memcpy(&bits, &number, sizeof bits);
    return (bfloat16)((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16);
}

#define MAX_SIZE 512

// keys, values: (b, g, l, d) with strides in elements of b and g; query, output: (b, h, d) without gaps.
// scratch: `longest` numbers for each of `b * h`.
#define ATTEND(NUMBER)                                                                                              \
    void attend_##NUMBER(NUMBER *output, const NUMBER *query, const NUMBER *keys, const NUMBER *values,             \
                         const int64_t *lengths, int64_t rows, int64_t heads, int64_t groups, int64_t size,         \
                         int64_t row_stride, int64_t head_stride, float scale, float *scratch, int64_t longest,     \
                         int threads) {                                                                             \
        _Pragma("omp parallel for num_threads(threads) schedule(static)") for (int64_t i = 0; i < rows * heads;     \
                                                                               i++) {                               \
            int64_t row = i % rows, head = i / rows, length = lengths[row];                                         \
            int64_t begin = row * row_stride + head / (heads / groups) * head_stride;                               \
            const NUMBER *key = keys + begin, *value = values + begin, *asked = query + (row * heads + head) * size; \
            float *weights = scratch + i * longest, wide[MAX_SIZE], sums[MAX_SIZE];                                 \
            float largest = -FLT_MAX, total = 0;                                                                    \
            for (int64_t d = 0; d < size; d++) {                                                                    \
                wide[d] = widened_##NUMBER(asked[d]) * scale;                                                       \
                sums[d] = 0;                                                                                        \
            }                                                                                                       \
            for (int64_t l = 0; l < length; l++) {                                                                  \
                float product = 0;                                                                                  \
                _Pragma("omp simd reduction(+ : product)") for (int64_t d = 0; d < size; d++) product +=            \
                    wide[d] * widened_##NUMBER(key[l * size + d]);                                                  \
                weights[l] = product;                                                                               \
                largest = product > largest ? product : largest;                                                    \
            }                                                                                                       \
            _Pragma("omp simd reduction(+ : total)") for (int64_t l = 0; l < length; l++) {                         \
                weights[l] = expf(weights[l] - largest);                                                            \
                total += weights[l];                                                                                \
            }                                                                                                       \
            for (int64_t l = 0; l < length; l++) {                                                                  \
                _Pragma("omp simd") for (int64_t d = 0; d < size; d++) sums[d] +=                                   \
                    weights[l] * widened_##NUMBER(value[l * size + d]);                                             \
            }                                                                                                       \
            NUMBER *found = output + (row * heads + head) * size;                                                   \
            for (int64_t d = 0; d < size; d++) found[d] = narrowed_##NUMBER(sums[d] / total);                       \
        }                                                                                                           \
    }

ATTEND(float)
ATTEND(bfloat16)
