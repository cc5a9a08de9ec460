"""Attention to flat components on a CPU: a C kernel that the system compiler builds on the user's machine.

**A compiler runs on first use**: ``CC``, or ``cc`` (GCC 10 or newer, or clang), once, and what it builds is kept where
PyTorch keeps its extensions. The environment variable ``MEA_CPU_KERNEL=off`` forbids it, and so does
``"cpu_kernel": false`` in the section ``mea`` of config.json. Then, without a compiler, and on other processors than
those with AVX2 or AVX-512, plain products do the work (`key_scores`, `softmax`, `weighted_values` of decode_mea.py, the
readable reference).

Plain products write every logit to memory, and their kernels are made for larger matrices. This one is FlashAttention's
online softmax with Flash-Decoding's split over the cache (split-KV): it takes the cache in KV tiles that stay in L2,
fetches the next rows while it multiplies, and reads each cached number once for 64 query rows. Its source is
decode_cpu.c, embedded below, for this file needs nothing but torch and is copied into every checkpoint that uses it.

Shapes: B batch, T cached tokens, Q new tokens, R query rows (Hq * Q), H key/value heads, W a cached width.
"""

import ctypes
import hashlib
import os
import platform
import re
import shlex
import shutil
import subprocess
import tempfile
import warnings
from contextlib import suppress
from functools import cache, partial
from pathlib import Path

import torch

# As in the kernel: rows that are multiplied together, rows that read a KV tile together, and tokens of that tile.
PANEL, QUERY_TILE, KV_TILE = 32, 64, 128
CPU_FLAGS = {  # For what PyTorch finds in the processor.
    "AVX2": ("-mavx2", "-mfma"),
    "AVX512": ("-mavx2", "-mfma", "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"),
}
COMPILER_FLAGS = ("-O3", "-ffp-contract=fast", "-fno-math-errno", "-fPIC")
_SECONDS = 120
_SWITCH = {"on": True, "1": True, "off": False, "0": False}

# Embedded from decode_cpu.c by `make kernel`: edit it there.
SOURCE = r"""/* Attention of absorbed queries to cached components: FlashAttention's online softmax, with
   Flash-Decoding's split over the cache (split-KV).

   A worker takes the rows of one query tile and one split of the tokens, and goes through them by KV tiles. For each
   row it keeps the largest score so far (row_max), the sum of exp(score - row_max) (row_sum), and the values weighted
   by the same; when a tile raises the maximum, both sums shrink by exp(old maximum - new maximum). decode_cpu_mea.py
   combines the splits and divides by row_sum.

   `make kernel` embeds this file in decode_cpu_mea.py, which has the system compiler build it on the user's machine. */

#include <float.h>
#include <immintrin.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

/* The sums of BLOCK tokens by PANEL rows, or of BLOCK rows by PANEL channels, stay in registers of LANES numbers. */
#ifdef __AVX512F__
enum { LANES = 16, BLOCK = 8 };
#else
enum { LANES = 8, BLOCK = 2 };
#endif
enum { PANEL = 32, VECTORS = PANEL / LANES };
/* Tokens of a KV tile, and rows that read it together: scores and outputs of more would evict the KV tile from L2. */
enum { KV_TILE = 128, QUERY_TILE = 2 * PANEL };

#define INLINE static inline __attribute__((always_inline))
#define PAIRS __attribute__((target("avx512f,avx512bf16")))

typedef float lanes __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef int32_t ints __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef int32_t pair __attribute__((aligned(2), may_alias)); /* two adjacent bfloat16 numbers */

/* Strides count numbers, not bytes. Cached numbers are float32, or bfloat16 where `bfloat16` is set; where `pairs` is
   set too, the processor multiplies them two at a time, and queries are (panels, key_width / 2, PANEL, 2) bfloat16.
   Else queries are (panels, key_width, PANEL) float32. Rows beyond the last are zeros.

   decode_cpu_mea.py reads its own declaration of this struct from this text: fields are pointers or int64_t. */
typedef struct {
    const void *queries, *keys, *values, *norms; /* norms may be NULL */
    const float *mask;                           /* additive, or NULL */
    float *outputs;                              /* (batch, splits, padded rows, padded value width) */
    float *row_max, *row_sum;                    /* (batch, splits, padded rows) */
    int64_t bfloat16, pairs, threads, batch, splits, tokens, rows, key_width, value_width;
    int64_t key_batch, key_row, value_batch, value_row;
    int64_t norm_batch, norm_row, group;     /* a norm belongs to `group` rows */
    int64_t mask_batch, mask_row, mask_rows; /* row r reads row r % mask_rows of the mask */
    int64_t failed;                          /* set where memory did not suffice */
} job;

/* BLOCK rows of the keys and of the values, to be fetched while others are multiplied. */
typedef struct {
    const char *keys, *values;
    int64_t key_row, value_row; /* in bytes */
} upcoming;

INLINE void prefetch(const upcoming *next, int64_t step)
{
    int64_t line = step * BLOCK / 16; /* a step reads up to four bytes of BLOCK rows, a line has 64 */
    if (step % (16 / BLOCK) == 0)
        __builtin_prefetch(next->keys + line % BLOCK * next->key_row + line / BLOCK * 64, 0, 3);
    if (step % (16 / BLOCK) == 1)
        __builtin_prefetch(next->values + line % BLOCK * next->value_row + line / BLOCK * 64, 0, 2);
}

/* scores[t][r] = sum over w of keys[t][w] * queries[w][r], for `count` tokens and the rows of one panel. */
INLINE void score(int count, int64_t width, const float *keys, int64_t key_row, const float *queries, float *scores,
                  int64_t score_row, const upcoming *next)
{
    lanes sum[BLOCK][VECTORS];
    for (int t = 0; t < count; t++)
        for (int v = 0; v < VECTORS; v++)
            sum[t][v] = (lanes){0};
    for (int64_t w = 0; w < width; w++) {
        lanes query[VECTORS];
        for (int v = 0; v < VECTORS; v++)
            query[v] = *(const lanes *)(queries + w * PANEL + v * LANES);
        prefetch(next, w);
        for (int t = 0; t < count; t++)
            for (int v = 0; v < VECTORS; v++)
                sum[t][v] += keys[t * key_row + w] * query[v];
    }
    for (int t = 0; t < count; t++)
        for (int v = 0; v < VECTORS; v++)
            *(lanes *)(scores + t * score_row + v * LANES) = sum[t][v];
}

/* The same for pairs of bfloat16 numbers. */
PAIRS INLINE void score_pairs(int count, int64_t width, const uint16_t *keys, int64_t key_row, const uint16_t *queries,
                              float *scores, int64_t score_row, const upcoming *next)
{
    __m512 sum[BLOCK][2];
    for (int t = 0; t < count; t++)
        sum[t][0] = sum[t][1] = _mm512_setzero_ps();
    for (int64_t w = 0; w < width; w += 2) {
        __m512bh low = (__m512bh)_mm512_loadu_si512(queries + w * PANEL);
        __m512bh high = (__m512bh)_mm512_loadu_si512(queries + w * PANEL + PANEL);
        prefetch(next, w / 2);
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
                              float *scores, int64_t score_row, const upcoming *next)
{
    score_pairs(BLOCK, width, keys, key_row, queries, scores, score_row, next);
}

PAIRS static void score_token(int64_t width, const uint16_t *keys, int64_t key_row, const uint16_t *queries,
                              float *scores, int64_t score_row, const upcoming *next)
{
    score_pairs(1, width, keys, key_row, queries, scores, score_row, next);
}

/* outputs[r][w] += sum over t of weights[t][r] * strip[t][w], for BLOCK rows and the PANEL channels of a strip. */
INLINE void accumulate(int64_t tokens, const float *weights, int64_t weight_row, const float *strip, float *outputs,
                       int64_t output_row)
{
    lanes sum[BLOCK][VECTORS];
    for (int r = 0; r < BLOCK; r++)
        for (int v = 0; v < VECTORS; v++)
            sum[r][v] = *(lanes *)(outputs + r * output_row + v * LANES);
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
            *(lanes *)(outputs + r * output_row + v * LANES) = sum[r][v];
}

/* The same for pairs of tokens: weights[t / 2][r][t % 2] and strip[t / 2][w][t % 2]. */
PAIRS static void accumulate_pairs(int64_t tokens, const uint16_t *weights, int64_t weight_row, const uint16_t *strip,
                                   float *outputs, int64_t output_row)
{
    __m512 sum[BLOCK][2];
    for (int r = 0; r < BLOCK; r++) {
        sum[r][0] = _mm512_loadu_ps(outputs + r * output_row);
        sum[r][1] = _mm512_loadu_ps(outputs + r * output_row + 16);
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
        _mm512_storeu_ps(outputs + r * output_row, sum[r][0]);
        _mm512_storeu_ps(outputs + r * output_row + 16, sum[r][1]);
    }
}

/* The larger of two, and the first where it is not a number. */
INLINE lanes maximum(lanes x, lanes y)
{
    ints less = x < y;
    return (lanes)((less & (ints)y) | (~less & (ints)x));
}

/* exp(x) for x <= 0, to 2e-7 of its size: 2^n times the polynomial of Cephes' expf in |x - n ln 2| <= ln 2 / 2. */
INLINE lanes exponential(lanes x)
{
    const float shift = 12582912.0f; /* 1.5 * 2^23: adding it rounds to a whole number, kept in the lowest bits */
    x = maximum(x, (lanes){0} - 87.0f);
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

INLINE float to_float(uint16_t number)
{
    uint32_t bits = (uint32_t)number << 16;
    float wide;
    memcpy(&wide, &bits, 4);
    return wide;
}

/* One row of cached numbers as float32. */
INLINE void to_floats(const uint16_t *cached, int64_t width, float *wide)
{
    for (int64_t w = 0; w < width; w++)
        wide[w] = to_float(cached[w]);
}

/* Copy up to PANEL channels of the values into a strip, as `accumulate` or `accumulate_pairs` reads it, with zeros
   behind the last one: in the cache they lie a whole row apart, and would evict each other from L1. */
INLINE void pack_values(const job *j, const char *values, int64_t tokens, int channels, float *strip)
{
    static const uint16_t zeros[PANEL];
    const uint16_t *narrow_values = (const uint16_t *)values;
    int64_t row = j->value_row;
    if (channels < PANEL)
        memset(strip, 0, sizeof(float) * KV_TILE * PANEL);
    for (int64_t t = 0; t < tokens; t += j->pairs ? 2 : 1)
        if (j->pairs) {
            const uint16_t *even = narrow_values + t * row, *odd = t + 1 < tokens ? even + row : zeros;
            for (int w = 0; w < channels; w++)
                ((uint32_t *)strip)[t / 2 * PANEL + w] = even[w] | (uint32_t)odd[w] << 16;
        } else if (j->bfloat16) {
            to_floats(narrow_values + t * row, channels, strip + t * PANEL);
        } else {
            memcpy(strip + t * PANEL, (const float *)values + t * row, sizeof(float) * channels);
        }
}

/* Apply norms and mask to the scores (tokens, padded) of `tokens` tokens from `start` on and `rows` rows from `first`
 * on. */
static void apply_norms_and_mask(const job *j, int64_t b, int64_t first, int64_t rows, int64_t start, int64_t tokens,
                                 float *scores, int64_t padded)
{
    const uint16_t *narrow_norms = j->norms;
    const float *norms = j->norms;
    for (int64_t t = 0; t < tokens && norms; t++) {
        int64_t offset = b * j->norm_batch + (start + t) * j->norm_row;
        for (int64_t r = 0; r < rows; r++) {
            int64_t norm = offset + (first + r) / j->group;
            scores[t * padded + r] *= j->bfloat16 ? to_float(narrow_norms[norm]) : norms[norm];
        }
    }
    for (int64_t r = 0; r < rows && j->mask; r++) {
        const float *mask = j->mask + b * j->mask_batch + (first + r) % j->mask_rows * j->mask_row + start;
        for (int64_t t = 0; t < tokens; t++)
            scores[t * padded + r] += mask[t];
    }
}

/* Online softmax of LANES rows: scores become exp(score - maximum), with the maximum and the sum brought up to date.
   Returns what earlier sums shrink by, exp(old maximum - new maximum). */
INLINE lanes online_softmax_lanes(int64_t tokens, float *scores, int64_t padded, float *row_max, float *row_sum)
{
    lanes old_max = *(lanes *)row_max, new_max = old_max, sum = {0};
    for (int64_t t = 0; t < tokens; t++)
        new_max = maximum(*(lanes *)(scores + t * padded), new_max);
    for (int64_t t = 0; t < tokens; t++) {
        lanes weight = exponential(*(lanes *)(scores + t * padded) - new_max);
        sum += weight;
        *(lanes *)(scores + t * padded) = weight;
    }
    lanes rescale = exponential(old_max - new_max);
    *(lanes *)row_max = new_max;
    *(lanes *)row_sum = *(lanes *)row_sum * rescale + sum;
    return rescale;
}

/* Weights of LANES rows as `accumulate_pairs` reads them, rounded to the nearest bfloat16. */
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

/* The rows of one sequence from `first` on, what they have got from one split of its tokens, and scratch memory. */
typedef struct {
    int64_t b, first, rows, padded, channels; /* channels: the value width, padded like the rows */
    const char *queries;
    float *outputs, *row_max, *row_sum;
    float *scores, *strip, *wide; /* (KV_TILE, padded), (KV_TILE, PANEL), (BLOCK, key width) */
    uint16_t *narrowed;           /* (KV_TILE / 2, padded, 2) */
} query_tile;

/* Scores of `count` tokens from `start` on. */
static void score_tile(const job *j, const query_tile *q, const char *key, const char *value, int64_t start,
                       int64_t count)
{
    int64_t width = j->key_width, size = j->bfloat16 ? 2 : 4, row = j->key_row * size, panel = width * PANEL;
    for (int64_t r = 0; r < q->padded; r += PANEL)
        for (int64_t t = 0, block; t < count; t += block) {
            const char *key_block = key + t * row;
            float *scores = q->scores + t * q->padded + r;
            const float *queries = (const float *)q->queries + r / PANEL * panel;
            const uint16_t *narrow_queries = (const uint16_t *)q->queries + r / PANEL * panel;
            upcoming next = {key_block + BLOCK * row, value + t * j->value_row * size, row, j->value_row * size};
            block = count - t < BLOCK ? 1 : BLOCK;
            if (j->pairs) {
                if (block > 1)
                    score_block(width, (const uint16_t *)key_block, j->key_row, narrow_queries, scores, q->padded,
                                &next);
                else
                    score_token(width, (const uint16_t *)key_block, j->key_row, narrow_queries, scores, q->padded,
                                &next);
                continue;
            }
            const float *keys = (const float *)key_block;
            int64_t key_row = j->key_row;
            if (j->bfloat16) {
                for (int64_t i = 0; i < block; i++)
                    to_floats((const uint16_t *)key_block + i * j->key_row, width, q->wide + i * width);
                keys = q->wide;
                key_row = width;
            }
            if (block > 1)
                score(BLOCK, width, keys, key_row, queries, scores, q->padded, &next);
            else
                score(1, width, keys, key_row, queries, scores, q->padded, &next);
        }
    apply_norms_and_mask(j, q->b, q->first, q->rows, start, count, q->scores, q->padded);
}

/* Scores of a KV tile become weights, and the outputs so far shrink to the new maximum. */
static void online_softmax(const job *j, const query_tile *q, int64_t count)
{
    for (int64_t r = 0; r < q->padded; r += LANES) {
        lanes rescale = online_softmax_lanes(count, q->scores + r, q->padded, q->row_max + r, q->row_sum + r);
        for (int i = 0; i < LANES; i++)
            if (rescale[i] != 1.0f)
                for (int64_t w = 0; w < q->channels; w += LANES)
                    *(lanes *)(q->outputs + (r + i) * q->channels + w) *= rescale[i];
        if (j->pairs)
            narrow(count, q->scores + r, q->padded, q->narrowed + 2 * r);
    }
}

/* Add the weighted values of `count` tokens to the outputs. */
static void accumulate_tile(const job *j, const query_tile *q, const char *value, int64_t count)
{
    for (int64_t w = 0; w < j->value_width; w += PANEL) {
        const char *column = value + w * (j->bfloat16 ? 2 : 4);
        if (j->value_width - w < PANEL)
            pack_values(j, column, count, j->value_width - w, q->strip);
        else
            pack_values(j, column, count, PANEL, q->strip);
        for (int64_t r = 0; r < q->padded; r += BLOCK) {
            float *outputs = q->outputs + r * q->channels + w;
            if (j->pairs)
                accumulate_pairs(count, q->narrowed + 2 * r, q->padded, (const uint16_t *)q->strip, outputs,
                                 q->channels);
            else
                accumulate(count, q->scores + r, q->padded, q->strip, outputs, q->channels);
        }
    }
}

static int64_t in_panels(int64_t number) { return (number + PANEL - 1) / PANEL * PANEL; }

static int attend_split(const job *j, int64_t b, int64_t first, int64_t split)
{
    int64_t rows = j->rows - first < QUERY_TILE ? j->rows - first : QUERY_TILE, size = j->bfloat16 ? 2 : 4;
    int64_t offset = (b * j->splits + split) * in_panels(j->rows) + first;
    query_tile q = {
        .b = b, .first = first, .rows = rows, .padded = in_panels(rows), .channels = in_panels(j->value_width)};
    q.queries = (const char *)j->queries + (b * in_panels(j->rows) + first) * j->key_width * (j->pairs ? 2 : 4);
    q.outputs = j->outputs + offset * q.channels;
    q.row_max = j->row_max + offset;
    q.row_sum = j->row_sum + offset;
    int64_t numbers = KV_TILE * (q.padded + q.padded / 2 + PANEL) + BLOCK * in_panels(j->key_width);
    q.scores = aligned_alloc(64, sizeof(float) * numbers);
    if (!q.scores)
        return 1;
    q.narrowed = (uint16_t *)(q.scores + KV_TILE * q.padded);
    q.strip = q.scores + KV_TILE * (q.padded + q.padded / 2);
    q.wide = q.strip + KV_TILE * PANEL;
    memset(q.outputs, 0, sizeof(float) * q.padded * q.channels);
    memset(q.row_sum, 0, sizeof(float) * q.padded);
    for (int64_t r = 0; r < q.padded; r++)
        q.row_max[r] = -FLT_MAX;

    int64_t tiles = (j->tokens + KV_TILE - 1) / KV_TILE, end = tiles * (split + 1) / j->splits * KV_TILE;
    for (int64_t start = tiles * split / j->splits * KV_TILE; start < end && start < j->tokens; start += KV_TILE) {
        int64_t count = j->tokens - start < KV_TILE ? j->tokens - start : KV_TILE;
        const char *key = (const char *)j->keys + (b * j->key_batch + start * j->key_row) * size;
        const char *value = (const char *)j->values + (b * j->value_batch + start * j->value_row) * size;
        score_tile(j, &q, key, value, start, count);
        online_softmax(j, &q, count);
        accumulate_tile(j, &q, value, count);
    }
    free(q.scores);
    return 0;
}

int multiplies_pairs(void) { return __builtin_cpu_supports("avx512bf16") != 0; }

/* OpenMP of the process, without a compiler's help: every OpenMP library has these. */
void GOMP_parallel(void (*work)(void *), void *data, unsigned threads, unsigned flags);
int omp_get_thread_num(void);
int omp_get_num_threads(void);

static void worker(void *data)
{
    job *j = data;
    int64_t query_tiles = (j->rows + QUERY_TILE - 1) / QUERY_TILE, splits = j->splits;
    for (int64_t unit = omp_get_thread_num(); unit < j->batch * query_tiles * splits; unit += omp_get_num_threads())
        if (attend_split(j, unit / splits / query_tiles, unit / splits % query_tiles * QUERY_TILE, unit % splits))
            j->failed = 1;
}

/* Fill the job's outputs, row_max and row_sum for every split of every sequence; return whether memory was short. */
int attend(job *j)
{
    GOMP_parallel(worker, j, j->threads, 0);
    return j->failed;
}
"""
# End of decode_cpu.c.


def _job_fields(source: str) -> list[tuple[str, type]]:
    """Return the fields of the kernel's struct `job`, pointers and int64_t, as ctypes wants them.

    The C text is the only list of them, so the two sides cannot disagree.
    """
    body = source.partition("} job;")[0].rpartition("typedef struct {")[2]
    fields: list[tuple[str, type]] = []
    for declaration in re.sub(r"/\*.*?\*/", "", body, flags=re.DOTALL).split(";")[:-1]:
        first, *others = declaration.split(",")
        kind, name = first.rsplit(maxsplit=1)
        for declarator in (name, *map(str.strip, others)):
            if declarator.startswith("*"):
                fields.append((declarator[1:], ctypes.c_void_p))
            else:
                fields.append((declarator, {"int64_t": ctypes.c_int64}[kind.strip()]))
    return fields


class _Job(ctypes.Structure):
    """The struct `job` of the kernel; fields that are not given are NULL or 0."""

    __slots__ = ()  # A name that is no field is an error.
    _fields_ = _job_fields(SOURCE)


def library() -> ctypes.CDLL | None:
    """Return the kernel, built on first use; None where it is forbidden or there is none for this machine.

    Raises:
        ValueError: The environment variable ``MEA_CPU_KERNEL`` says neither on nor off.
    """
    return _compiled() if _allowed() else None


def _allowed() -> bool:
    """Return whether the user lets a kernel be built and used; asked at each step, for it may be set late."""
    switch = os.environ.get("MEA_CPU_KERNEL", "on")
    if switch not in _SWITCH:
        raise ValueError(f"MEA_CPU_KERNEL is one of {', '.join(_SWITCH)}, not {switch!r}")
    return _SWITCH[switch]


@cache
def _compiled() -> ctypes.CDLL | None:
    """Return the compiled kernel; None where there is none for this machine, with one warning if a compiler failed."""
    flags = CPU_FLAGS.get(torch.backends.cpu.get_cpu_capability())
    command = (os.environ.get("CC") or "").strip() or "cc"
    if flags is None or platform.system() != "Linux":
        return None
    try:
        compiler = shlex.split(command)
        if shutil.which(compiler[0]) is None:
            return None
        return _build([*compiler, *COMPILER_FLAGS, *flags])
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        said = error.stderr if isinstance(error, subprocess.CalledProcessError) else str(error)
        reason = next((line for line in said.splitlines() if "error" in line), said.strip())
        warnings.warn(
            f"cached components are read by plain products, {command} built no kernel: {reason}", stacklevel=3
        )
        return None


@cache
def _multiplies_pairs() -> bool:
    """Return whether the processor multiplies pairs of bfloat16 numbers."""
    code = library()
    return code is not None and bool(code.multiplies_pairs())


def _build(compiler: list[str]) -> ctypes.CDLL:
    """Compile the kernel and keep it if the directory can be written to, or load what was compiled before."""
    key = hashlib.sha256("\0".join((SOURCE, *compiler)).encode()).hexdigest()[:16]
    file = _extensions() / f"mea_decode_{key}" / "decode.so"
    with suppress(OSError):  # not there, not whole, or of another system that shares the directory
        return ctypes.CDLL(str(file))
    with _scratch(file.parent) as scratch:
        source, made = Path(scratch) / "decode.c", Path(scratch) / "decode.so"
        source.write_text(SOURCE)
        command = [*compiler, "-shared", "-o", str(made), str(source)]
        subprocess.run(command, check=True, capture_output=True, text=True, errors="replace", timeout=_SECONDS)
        loaded = ctypes.CDLL(str(made))  # stays when the file goes
        with suppress(OSError):
            made.replace(file)
    return loaded


def _extensions() -> Path:
    """Return where PyTorch keeps extensions that it builds; beneath ``~`` itself where nobody has a home."""
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(os.environ.get("TORCH_EXTENSIONS_DIR") or f"{home}/torch_extensions")


def _scratch(directory: Path) -> tempfile.TemporaryDirectory:
    """Make a directory in another one, or where that cannot be written to, wherever temporary files go."""
    if directory.parts[0] == "~":
        return tempfile.TemporaryDirectory()
    try:
        directory.mkdir(parents=True, exist_ok=True)
        return tempfile.TemporaryDirectory(dir=directory)
    except OSError:
        return tempfile.TemporaryDirectory()


def readable(*cached: torch.Tensor) -> bool:
    """Return whether `attend_on_cpu` reads a cache of such tensors on this machine."""
    dtypes = {tensor.dtype for tensor in cached}
    return dtypes in ({torch.float32}, {torch.bfloat16}) and library() is not None


def attend_on_cpu(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    norms: torch.Tensor | None,
    mask: torch.Tensor | None,
) -> torch.Tensor | None:
    """Return what absorbed queries get from flat components, softmax(queries keysᵀ · norms + mask) values.

    Products of bfloat16 numbers are summed in float32; where the processor multiplies them in pairs, weights are
    rounded to bfloat16 first. A row that sees nothing gets the average of all, and a mask does not hide a score that is
    not a number.

    Args:
        queries: (B, 1, R, key width), scaled, in the dtype of the keys; the rows of a query head lie together.
        keys: (B, 1, T, key width), float32 or bfloat16; see `readable`.
        values: (B, 1, T, value width), the same.
        norms: 1/rms of every composed key, (B, T, H), the same, or None.
        mask: (B or 1, Hq or 1, Q, T), boolean where a token is seen, or additive; or None. It is not checked.

    Returns:
        (B, 1, R, value width), in the dtype of the queries; None where there is no memory to work in.
    """
    code = library()
    assert code is not None
    batch, _, rows, key_width = queries.shape
    tokens, value_width = values.shape[2:]
    bfloat16 = keys.dtype == torch.bfloat16
    pairs = bfloat16 and key_width % 2 == 0 and _multiplies_pairs()
    keys, values = (side if side.stride(-1) == 1 else side.contiguous() for side in (keys, values))
    packed = _packed(queries, pairs)
    threads = torch.get_num_threads()
    units = max(1, batch * -(-rows // QUERY_TILE))  # fewer than there are threads are divided by tokens
    splits = min(-(-threads // units), -(-tokens // KV_TILE))
    padded_rows, padded_width = (-(-number // PANEL) * PANEL for number in (rows, value_width))
    new = partial(torch.empty, dtype=torch.float32, device="cpu")  # whatever a caller has made the defaults
    outputs = new(batch, splits, padded_rows, padded_width)
    row_max, row_sum = new(2, batch, splits, padded_rows)
    job = _Job(
        queries=packed.data_ptr(),
        keys=keys.data_ptr(),
        values=values.data_ptr(),
        outputs=outputs.data_ptr(),
        row_max=row_max.data_ptr(),
        row_sum=row_sum.data_ptr(),
        bfloat16=bfloat16,
        pairs=pairs,
        threads=threads,
        batch=batch,
        splits=splits,
        tokens=tokens,
        rows=rows,
        key_width=key_width,
        value_width=value_width,
        key_batch=keys.stride(0),
        key_row=keys.stride(2),
        value_batch=values.stride(0),
        value_row=values.stride(2),
    )
    if norms is not None:
        norms = norms if norms.stride(-1) == 1 else norms.contiguous()
        job.norms, job.norm_batch, job.norm_row = norms.data_ptr(), norms.stride(0), norms.stride(1)
        job.group = rows // norms.shape[-1]
    if mask is not None:
        if not mask.is_floating_point():
            mask = new(mask.shape).zero_().masked_fill_(~mask, torch.finfo(torch.float32).min)
        mask = mask.float().flatten(1, 2).contiguous()  # (B or 1, rows that differ, T or more)
        job.mask, job.mask_row, job.mask_rows = mask.data_ptr(), mask.stride(1), mask.shape[1]
        job.mask_batch = mask.stride(0) if mask.shape[0] > 1 else 0
    if code.attend(ctypes.byref(job)):
        return None
    if splits > 1:
        outputs, row_sum = _combine_splits(outputs, row_max, row_sum)
    output = outputs[:, :, :rows, :value_width] / row_sum[:, :, :rows, None]  # (B, 1, R, value width)
    return output.to(queries.dtype)


def _combine_splits(
    outputs: torch.Tensor, row_max: torch.Tensor, row_sum: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Add up splits (dimension 1), each rescaled to the largest maximum, as Flash-Decoding does.

    Args:
        outputs: (B, splits, rows, width), not yet divided by the sums.
        row_max: (B, splits, rows).
        row_sum: (B, splits, rows).

    Returns:
        Outputs (B, 1, rows, width) and sums (B, 1, rows).
    """
    rescale = (row_max - row_max.amax(1, keepdim=True)).exp()
    return (rescale[..., None] * outputs).sum(1, keepdim=True), (rescale * row_sum).sum(1, keepdim=True)


def _packed(queries: torch.Tensor, pairs: bool) -> torch.Tensor:
    """Return the rows in panels, filled up with zeros, as the kernel reads them."""
    rows, missing = queries[:, 0], -queries.shape[2] % PANEL
    padded = torch.nn.functional.pad(rows, (0, 0, 0, missing)) if missing else rows
    panels = padded.unflatten(1, (-1, PANEL))  # (B, panels, PANEL, key width)
    if pairs:
        return panels.unflatten(-1, (-1, 2)).transpose(2, 3).contiguous()
    return panels.float().mT.contiguous()
