#include <float.h>
#include <immintrin.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

/* PANEL rows, or channels, of BLOCK tokens, or rows, have their sums in registers, in vectors of LANES numbers. */
#ifdef __AVX512F__
enum { LANES = 16, BLOCK = 8 };
#else
enum { LANES = 8, BLOCK = 2 };
#endif
enum { PANEL = 32, VECTORS = PANEL / LANES, CHUNK = 128 };
/* Rows that read the cache together: with more, their scores and sums would push the cache out of the processor. */
enum { PART = 2 * PANEL };

#define INLINE static inline __attribute__((always_inline))
#define PAIRS __attribute__((target("avx512f,avx512bf16")))

typedef float lanes __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef int32_t ints __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef int32_t pair __attribute__((aligned(2), may_alias)); /* two adjacent bfloat16 numbers */

/* Strides count numbers, not bytes. Cached numbers are float32, or bfloat16 where `half` is set; where `pairs` is set
   too, the processor multiplies them two at a time, and queries are (panels, key_width / 2, PANEL, 2) bfloat16. Else
   queries are (panels, key_width, PANEL) float32. Rows beyond the last are zeros. */
typedef struct {
    const void *queries, *keys, *values, *norms; /* norms may be NULL */
    const float *mask;                           /* additive, or NULL */
    float *sums, *tops, *totals; /* (batch, spans, padded rows, padded value width), and two without the width */
    int64_t half, pairs, threads, batch, spans, tokens, rows, key_width, value_width;
    int64_t key_batch, key_row, value_batch, value_row;
    int64_t norm_batch, norm_row, group; /* a norm belongs to `group` rows */
    int64_t mask_batch, mask_row, masks; /* row r reads row r % masks of the mask */
    int64_t failed;                      /* set where memory did not suffice */
} job;

/* What is read next, while something else is multiplied: BLOCK rows of the keys and of the values. */
typedef struct {
    const char *keys, *values;
    int64_t key_row, value_row; /* in bytes */
} ahead;

INLINE void fetch(const ahead *next, int64_t step)
{
    int64_t line = step * BLOCK / 16; /* a step reads up to four bytes of BLOCK rows, a line has 64 */
    if (step % (16 / BLOCK) == 0)
        __builtin_prefetch(next->keys + line % BLOCK * next->key_row + line / BLOCK * 64, 0, 3);
    if (step % (16 / BLOCK) == 1)
        __builtin_prefetch(next->values + line % BLOCK * next->value_row + line / BLOCK * 64, 0, 2);
}

/* scores[t][r] = sum over w of keys[t][w] * queries[w][r], for `count` tokens and the rows of one panel. */
INLINE void score(int count, int64_t width, const float *keys, int64_t key_row, const float *queries, float *scores,
                  int64_t score_row, const ahead *next)
{
    lanes sum[BLOCK][VECTORS];
    for (int t = 0; t < count; t++)
        for (int v = 0; v < VECTORS; v++)
            sum[t][v] = (lanes){0};
    for (int64_t w = 0; w < width; w++) {
        lanes query[VECTORS];
        for (int v = 0; v < VECTORS; v++)
            query[v] = *(const lanes *)(queries + w * PANEL + v * LANES);
        fetch(next, w);
        for (int t = 0; t < count; t++)
            for (int v = 0; v < VECTORS; v++)
                sum[t][v] += keys[t * key_row + w] * query[v];
    }
    for (int t = 0; t < count; t++)
        for (int v = 0; v < VECTORS; v++)
            *(lanes *)(scores + t * score_row + v * LANES) = sum[t][v];
}

/* The same of pairs of bfloat16 numbers. */
PAIRS INLINE void score_pairs(int count, int64_t width, const uint16_t *keys, int64_t key_row, const uint16_t *queries,
                              float *scores, int64_t score_row, const ahead *next)
{
    __m512 sum[BLOCK][2];
    for (int t = 0; t < count; t++)
        sum[t][0] = sum[t][1] = _mm512_setzero_ps();
    for (int64_t w = 0; w < width; w += 2) {
        __m512bh low = (__m512bh)_mm512_loadu_si512(queries + w * PANEL);
        __m512bh high = (__m512bh)_mm512_loadu_si512(queries + w * PANEL + PANEL);
        fetch(next, w / 2);
        for (int t = 0; t < count; t++) {
            __m512bh key = (__m512bh)_mm512_set1_epi32(*(const pair *)(keys + t * key_row + w));
            sum[t][0] = _mm512_dpbf16_ps(sum[t][0], key, low);
            sum[t][1] = _mm512_dpbf16_ps(sum[t][1], key, high);
        }
    }
    for (int t = 0; t < count; t++) {
        _mm512_storeu_ps(scores + t * score_row, sum[t][0]);
        _mm512_storeu_ps(scores + t * score_row + 16, sum[t][1]);
    }
}

PAIRS static void score_block(int64_t width, const uint16_t *keys, int64_t key_row, const uint16_t *queries,
                              float *scores, int64_t score_row, const ahead *next)
{
    score_pairs(BLOCK, width, keys, key_row, queries, scores, score_row, next);
}

PAIRS static void score_token(int64_t width, const uint16_t *keys, int64_t key_row, const uint16_t *queries,
                              float *scores, int64_t score_row, const ahead *next)
{
    score_pairs(1, width, keys, key_row, queries, scores, score_row, next);
}

/* sums[r][w] += sum over t of weights[t][r] * strip[t][w], for BLOCK rows and the PANEL channels of a strip. */
INLINE void add(int64_t tokens, const float *weights, int64_t weight_row, const float *strip, float *sums,
                int64_t sum_row)
{
    lanes sum[BLOCK][VECTORS];
    for (int r = 0; r < BLOCK; r++)
        for (int v = 0; v < VECTORS; v++)
            sum[r][v] = *(lanes *)(sums + r * sum_row + v * LANES);
    for (int64_t t = 0; t < tokens; t++) {
        lanes value[VECTORS];
        for (int v = 0; v < VECTORS; v++)
            value[v] = *(const lanes *)(strip + t * PANEL + v * LANES);
        for (int r = 0; r < BLOCK; r++)
            for (int v = 0; v < VECTORS; v++)
                sum[r][v] += weights[t * weight_row + r] * value[v];
    }
    for (int r = 0; r < BLOCK; r++)
        for (int v = 0; v < VECTORS; v++)
            *(lanes *)(sums + r * sum_row + v * LANES) = sum[r][v];
}

/* The same of pairs of tokens: weights[t / 2][r][t % 2] and strip[t / 2][w][t % 2]. */
PAIRS static void add_pairs(int64_t tokens, const uint16_t *weights, int64_t weight_row, const uint16_t *strip,
                            float *sums, int64_t sum_row)
{
    __m512 sum[BLOCK][2];
    for (int r = 0; r < BLOCK; r++) {
        sum[r][0] = _mm512_loadu_ps(sums + r * sum_row);
        sum[r][1] = _mm512_loadu_ps(sums + r * sum_row + 16);
    }
    for (int64_t t = 0; t < tokens; t += 2) {
        __m512bh low = (__m512bh)_mm512_loadu_si512(strip + t * PANEL);
        __m512bh high = (__m512bh)_mm512_loadu_si512(strip + t * PANEL + PANEL);
        for (int r = 0; r < BLOCK; r++) {
            __m512bh weight = (__m512bh)_mm512_set1_epi32(*(const pair *)(weights + t * weight_row + 2 * r));
            sum[r][0] = _mm512_dpbf16_ps(sum[r][0], weight, low);
            sum[r][1] = _mm512_dpbf16_ps(sum[r][1], weight, high);
        }
    }
    for (int r = 0; r < BLOCK; r++) {
        _mm512_storeu_ps(sums + r * sum_row, sum[r][0]);
        _mm512_storeu_ps(sums + r * sum_row + 16, sum[r][1]);
    }
}

/* The larger of two, and the first where it is not a number. */
INLINE lanes larger(lanes x, lanes y)
{
    ints less = x < y;
    return (lanes)((less & (ints)y) | (~less & (ints)x));
}

/* exp(x) for x <= 0, to 2e-7 of its size: 2^n times the polynomial of Cephes' expf in |x - n ln 2| <= ln 2 / 2. */
INLINE lanes exponential(lanes x)
{
    const float shift = 12582912.0f; /* 1.5 * 2^23: adding it rounds to a whole number, kept in the lowest bits */
    x = larger(x, (lanes){0} - 87.0f);
    lanes shifted = x * 1.44269504088896341f + shift, whole = shifted - shift;
    ints power = (ints)shifted - 0x4B400000;
    x = x - whole * 0.693359375f + whole * 2.12194440e-4f;
    lanes series = x * 1.9875691500e-4f + 1.3981999507e-3f;
    series = series * x + 8.3334519073e-3f;
    series = series * x + 4.1665795894e-2f;
    series = series * x + 1.6666665459e-1f;
    series = series * x + 5.0000001201e-1f;
    return (series * x * x + x + 1.0f) * (lanes)((power + 127) << 23);
}

INLINE float widened(uint16_t number)
{
    uint32_t bits = (uint32_t)number << 16;
    float wide;
    memcpy(&wide, &bits, 4);
    return wide;
}

/* One row of cached numbers as float32. */
INLINE void widen(const uint16_t *cached, int64_t width, float *wide)
{
    for (int64_t w = 0; w < width; w++)
        wide[w] = widened(cached[w]);
}

/* Values of up to PANEL channels next to each other, as `add` or `add_pairs` reads them, zeros behind the last one: in
   the cache they lie a row apart, where they would push each other out of the nearest memory. */
INLINE void take(const job *j, const char *values, int64_t tokens, int channels, float *strip)
{
    static const uint16_t zeros[PANEL];
    const uint16_t *half = (const uint16_t *)values;
    int64_t row = j->value_row;
    if (channels < PANEL)
        memset(strip, 0, sizeof(float) * CHUNK * PANEL);
    for (int64_t t = 0; t < tokens; t += j->pairs ? 2 : 1)
        if (j->pairs) {
            const uint16_t *even = half + t * row, *odd = t + 1 < tokens ? even + row : zeros;
            for (int w = 0; w < channels; w++)
                ((uint32_t *)strip)[t / 2 * PANEL + w] = even[w] | (uint32_t)odd[w] << 16;
        } else if (j->half) {
            widen(half + t * row, channels, strip + t * PANEL);
        } else {
            memcpy(strip + t * PANEL, (const float *)values + t * row, sizeof(float) * channels);
        }
}

/* Norms and mask on the scores (tokens, padded) of `tokens` tokens from `start` on and `rows` rows from `first` on. */
static void adjust(const job *j, int64_t b, int64_t first, int64_t rows, int64_t start, int64_t tokens, float *scores,
                   int64_t padded)
{
    const uint16_t *half_norms = j->norms;
    const float *norms = j->norms;
    for (int64_t t = 0; t < tokens && norms; t++) {
        int64_t at = b * j->norm_batch + (start + t) * j->norm_row;
        for (int64_t r = 0; r < rows; r++) {
            int64_t norm = at + (first + r) / j->group;
            scores[t * padded + r] *= j->half ? widened(half_norms[norm]) : norms[norm];
        }
    }
    for (int64_t r = 0; r < rows && j->mask; r++) {
        const float *mask = j->mask + b * j->mask_batch + (first + r) % j->masks * j->mask_row + start;
        for (int64_t t = 0; t < tokens; t++)
            scores[t * padded + r] += mask[t];
    }
}

/* exp(score - top) of LANES rows, with `top` and `total` brought up to date; returns what earlier sums shrink to. */
INLINE lanes weigh(int64_t tokens, float *scores, int64_t padded, float *top, float *total)
{
    lanes before = *(lanes *)top, most = before, sum = {0};
    for (int64_t t = 0; t < tokens; t++)
        most = larger(*(lanes *)(scores + t * padded), most);
    for (int64_t t = 0; t < tokens; t++) {
        lanes weight = exponential(*(lanes *)(scores + t * padded) - most);
        sum += weight;
        *(lanes *)(scores + t * padded) = weight;
    }
    lanes kept = exponential(before - most);
    *(lanes *)top = most;
    *(lanes *)total = *(lanes *)total * kept + sum;
    return kept;
}

/* Weights of LANES rows as `add_pairs` reads them, rounded to the nearest bfloat16. */
INLINE void narrow(int64_t tokens, const float *weights, int64_t padded, uint16_t *narrowed)
{
    for (int64_t t = 0; t < tokens; t += 2) {
        ints even = *(const ints *)(weights + t * padded), odd = {0};
        if (t + 1 < tokens)
            odd = *(const ints *)(weights + (t + 1) * padded);
        even = (even + 0x7fff + (even >> 16 & 1)) >> 16 & 0xffff;
        odd = (odd + 0x7fff + (odd >> 16 & 1)) & ~0xffff;
        *(ints *)(narrowed + t * padded) = even | odd;
    }
}

/* What the part of the rows of one sequence that starts at row `first` works with, for one span of its tokens. */
typedef struct {
    int64_t b, first, rows, padded, channels; /* channels: the value width, padded like the rows */
    const char *queries;
    float *sums, *tops, *totals;
    float *scores, *strip, *wide; /* (CHUNK, padded), (CHUNK, PANEL), (BLOCK, key width) */
    uint16_t *narrowed;           /* (CHUNK / 2, padded, 2) */
} part;

/* Scores of `count` tokens from `start` on. */
static void score_chunk(const job *j, const part *p, const char *key, const char *value, int64_t start, int64_t count)
{
    int64_t width = j->key_width, size = j->half ? 2 : 4, row = j->key_row * size, panel = width * PANEL;
    for (int64_t r = 0; r < p->padded; r += PANEL)
        for (int64_t t = 0, block; t < count; t += block) {
            const char *own = key + t * row;
            float *scores = p->scores + t * p->padded + r;
            const float *queries = (const float *)p->queries + r / PANEL * panel;
            const uint16_t *half_queries = (const uint16_t *)p->queries + r / PANEL * panel;
            ahead next = {own + BLOCK * row, value + t * j->value_row * size, row, j->value_row * size};
            block = count - t < BLOCK ? 1 : BLOCK;
            if (j->pairs) {
                if (block > 1)
                    score_block(width, (const uint16_t *)own, j->key_row, half_queries, scores, p->padded, &next);
                else
                    score_token(width, (const uint16_t *)own, j->key_row, half_queries, scores, p->padded, &next);
                continue;
            }
            const float *keys = (const float *)own;
            int64_t key_row = j->key_row;
            if (j->half) {
                for (int64_t i = 0; i < block; i++)
                    widen((const uint16_t *)own + i * j->key_row, width, p->wide + i * width);
                keys = p->wide;
                key_row = width;
            }
            if (block > 1)
                score(BLOCK, width, keys, key_row, queries, scores, p->padded, &next);
            else
                score(1, width, keys, key_row, queries, scores, p->padded, &next);
        }
    adjust(j, p->b, p->first, p->rows, start, count, p->scores, p->padded);
}

/* Scores become weights, and the sums so far shrink to the new maximum. */
static void weigh_chunk(const job *j, const part *p, int64_t count)
{
    for (int64_t r = 0; r < p->padded; r += LANES) {
        lanes kept = weigh(count, p->scores + r, p->padded, p->tops + r, p->totals + r);
        for (int i = 0; i < LANES; i++)
            if (kept[i] != 1.0f)
                for (int64_t w = 0; w < p->channels; w += LANES)
                    *(lanes *)(p->sums + (r + i) * p->channels + w) *= kept[i];
        if (j->pairs)
            narrow(count, p->scores + r, p->padded, p->narrowed + 2 * r);
    }
}

/* Adds the weighted values of `count` tokens. */
static void add_chunk(const job *j, const part *p, const char *value, int64_t count)
{
    for (int64_t w = 0; w < j->value_width; w += PANEL) {
        const char *column = value + w * (j->half ? 2 : 4);
        if (j->value_width - w < PANEL)
            take(j, column, count, j->value_width - w, p->strip);
        else
            take(j, column, count, PANEL, p->strip);
        for (int64_t r = 0; r < p->padded; r += BLOCK) {
            float *sums = p->sums + r * p->channels + w;
            if (j->pairs)
                add_pairs(count, p->narrowed + 2 * r, p->padded, (const uint16_t *)p->strip, sums, p->channels);
            else
                add(count, p->scores + r, p->padded, p->strip, sums, p->channels);
        }
    }
}

static int64_t in_panels(int64_t number) { return (number + PANEL - 1) / PANEL * PANEL; }

static int attend_span(const job *j, int64_t b, int64_t first, int64_t span)
{
    int64_t rows = j->rows - first < PART ? j->rows - first : PART, size = j->half ? 2 : 4;
    int64_t at = (b * j->spans + span) * in_panels(j->rows) + first;
    part p = {.b = b, .first = first, .rows = rows, .padded = in_panels(rows), .channels = in_panels(j->value_width)};
    p.queries = (const char *)j->queries + (b * in_panels(j->rows) + first) * j->key_width * (j->pairs ? 2 : 4);
    p.sums = j->sums + at * p.channels;
    p.tops = j->tops + at;
    p.totals = j->totals + at;
    int64_t numbers = CHUNK * (p.padded + p.padded / 2 + PANEL) + BLOCK * in_panels(j->key_width);
    p.scores = aligned_alloc(64, sizeof(float) * numbers);
    if (!p.scores)
        return 1;
    p.narrowed = (uint16_t *)(p.scores + CHUNK * p.padded);
    p.strip = p.scores + CHUNK * (p.padded + p.padded / 2);
    p.wide = p.strip + CHUNK * PANEL;
    memset(p.sums, 0, sizeof(float) * p.padded * p.channels);
    memset(p.totals, 0, sizeof(float) * p.padded);
    for (int64_t r = 0; r < p.padded; r++)
        p.tops[r] = -FLT_MAX;

    int64_t chunks = (j->tokens + CHUNK - 1) / CHUNK, end = chunks * (span + 1) / j->spans * CHUNK;
    for (int64_t start = chunks * span / j->spans * CHUNK; start < end && start < j->tokens; start += CHUNK) {
        int64_t count = j->tokens - start < CHUNK ? j->tokens - start : CHUNK;
        const char *key = (const char *)j->keys + (b * j->key_batch + start * j->key_row) * size;
        const char *value = (const char *)j->values + (b * j->value_batch + start * j->value_row) * size;
        score_chunk(j, &p, key, value, start, count);
        weigh_chunk(j, &p, count);
        add_chunk(j, &p, value, count);
    }
    free(p.scores);
    return 0;
}

int multiplies_pairs(void) { return __builtin_cpu_supports("avx512bf16") != 0; }

/* OpenMP of the process, without a compiler's help: every OpenMP library has these. */
void GOMP_parallel(void (*work)(void *), void *data, unsigned threads, unsigned flags);
int omp_get_thread_num(void);
int omp_get_num_threads(void);

static void take_turns(void *data)
{
    job *j = data;
    int64_t parts = (j->rows + PART - 1) / PART, spans = j->spans;
    for (int64_t unit = omp_get_thread_num(); unit < j->batch * parts * spans; unit += omp_get_num_threads())
        if (attend_span(j, unit / spans / parts, unit / spans % parts * PART, unit % spans))
            j->failed = 1;
}

/* Sums of values weighed by exp(logit - top), and what to divide them by, of every span of every sequence. */
int attend(job *j)
{
    GOMP_parallel(take_turns, j, j->threads, 0);
    return j->failed;
}
