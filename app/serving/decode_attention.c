// Attention of new tokens, each over the keys and values that its row of the cache has.
//
// They differ in length and nothing is padded: what a token gets depends on its own numbers alone, in one order of
// sums, whatever else is in the batch. Axes: b tokens, r rows, h heads, g key-value heads, l positions, d size of a
// head.
// Built by decode_attention.py.

#include <float.h>
#include <math.h>
#include <omp.h>
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

// keys, values: (r, g, l, d) with strides in elements of r and g; query, output: (b, h, d) without gaps.
// cached: of each token its row; lengths: how many positions of it. scratch: `longest` numbers a thread.
#define ATTEND(NUMBER)                                                                                              \
    void attend_##NUMBER(NUMBER *output, const NUMBER *query, const NUMBER *keys, const NUMBER *values,             \
                         const int64_t *cached, const int64_t *lengths, int64_t tokens, int64_t heads, int64_t groups, int64_t size,         \
                         int64_t row_stride, int64_t head_stride, float scale, float *scratch, int64_t longest,     \
                         int threads) {                                                                             \
        _Pragma("omp parallel for num_threads(threads) schedule(static)") for (int64_t i = 0; i < tokens * heads;     \
                                                                               i++) {                               \
            int64_t token = i / heads, head = i % heads, length = lengths[token];                                         \
            int64_t begin = cached[token] * row_stride + head / (heads / groups) * head_stride;                               \
            const NUMBER *key = keys + begin, *value = values + begin, *asked = query + (token * heads + head) * size; \
            float *weights = scratch + omp_get_thread_num() * longest, wide[MAX_SIZE], sums[MAX_SIZE];                                 \
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
            NUMBER *found = output + (token * heads + head) * size;                                                   \
            for (int64_t d = 0; d < size; d++) found[d] = narrowed_##NUMBER(sums[d] / total);                       \
        }                                                                                                           \
    }

ATTEND(float)
ATTEND(bfloat16)
