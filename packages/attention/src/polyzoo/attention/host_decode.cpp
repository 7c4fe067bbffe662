// Attention of a few queries over many keys, at the speed of the host's memory.
//
// Keys lie in blocks `(pairs, keys, D)`, a pair being a batch item and a key head; all of them are
// visible. A task is one pair of one block: it walks the keys once, with a running maximum, and
// leaves an unfinished state (maximum, sum, weighted values) that the caller joins with the others.
// Any number of threads may call `work` on one Job: tasks are handed out by a counter.

#include <cstddef>
#include <cstdint>
#include <cstring>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

#ifndef ELEMENT
#error "ELEMENT: 0 float, 1 bfloat16, 2 float16"
#endif
#ifndef DIM
#error "DIM: channels of keys and values, a multiple of 16"
#endif

namespace {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;  // SSE, NEON
#endif
constexpr int kSteps = DIM / kLanes;
constexpr int kTile = 256;  // keys whose scores are held at once; their keys and values fit in L2
constexpr int kPairSteps = kSteps % 2 == 0 ? 2 : 1;

typedef float Floats __attribute__((vector_size(4 * kLanes)));
typedef int32_t Ints __attribute__((vector_size(4 * kLanes)));

#if ELEMENT == 0
typedef float Element;
inline Floats load(const Element* p) {
    Floats out;
    std::memcpy(&out, p, sizeof out);
    return out;
}
#elif ELEMENT == 1
typedef uint16_t Element;
typedef uint16_t Halves __attribute__((vector_size(2 * kLanes)));
typedef uint32_t Words __attribute__((vector_size(4 * kLanes)));
inline Floats load(const Element* p) {
    Halves half;
    std::memcpy(&half, p, sizeof half);
    Words wide = __builtin_convertvector(half, Words) << 16;
    Floats out;
    std::memcpy(&out, &wide, sizeof out);
    return out;
}
#else
typedef _Float16 Element;
inline Floats load(const Element* p) {
#if defined(__AVX512F__)
    __m256i half;
    std::memcpy(&half, p, sizeof half);
    return (Floats)_mm512_cvtph_ps(half);
#elif defined(__AVX2__) && defined(__F16C__)
    __m128i half;
    std::memcpy(&half, p, sizeof half);
    return (Floats)_mm256_cvtph_ps(half);
#else
    Floats out;
    for (int i = 0; i < kLanes; ++i) out[i] = (float)p[i];
    return out;
#endif
}
#endif

inline float total(Floats x) {
#if defined(__AVX512F__)
    return _mm512_reduce_add_ps((__m512)x);
#elif defined(__AVX2__)
    __m256 wide = (__m256)x;
    __m128 sum = _mm_add_ps(_mm256_castps256_ps128(wide), _mm256_extractf128_ps(wide, 1));
    sum = _mm_add_ps(sum, _mm_movehl_ps(sum, sum));
    return _mm_cvtss_f32(_mm_add_ss(sum, _mm_movehdup_ps(sum)));
#else
    float sum = 0;
    for (int i = 0; i < kLanes; ++i) sum += x[i];
    return sum;
#endif
}

// e^x for x <= 0: 2^n * 2^f with |f| <= 1/2 and a polynomial for 2^f; error below 2e-7, relative.
inline Floats exponential(Floats x) {
    const Floats lowest = Floats{} - 87.0f;
    x = x < lowest ? lowest : x;
    Floats scaled = x * 1.44269504088896341f;
    Ints whole = __builtin_convertvector(scaled - 0.5f, Ints);  // rounds towards zero
    Floats f = x - __builtin_convertvector(whole, Floats) * 0.693359375f;
    f = f + __builtin_convertvector(whole, Floats) * 2.12194440e-4f;
    Floats p = Floats{} + 1.9875691500e-4f;
    p = p * f + 1.3981999507e-3f;
    p = p * f + 8.3334519073e-3f;
    p = p * f + 4.1665795894e-2f;
    p = p * f + 1.6666665459e-1f;
    p = p * f + 5.0000001201e-1f;
    p = p * f * f + f + 1.0f;
    Ints bits = (whole + 127) << 23;
    Floats power;
    std::memcpy(&power, &bits, sizeof power);
    return p * power;
}

// R queries of one pair over one block.
template <int R>
void attend(const Element* keys, const Element* values, long count, const float* q, float* out,
            float* top, float* sum) {
    alignas(64) float scores[R][kTile];
    float best[R], weight[R];
    for (int r = 0; r < R; ++r) {
        best[r] = -__builtin_inff();
        weight[r] = 0;
        std::memset(out + r * DIM, 0, DIM * sizeof(float));
    }
    for (long start = 0; start < count; start += kTile) {
        const int here = (int)(count - start < kTile ? count - start : kTile);
        const Element* k = keys + start * DIM;
        for (int j = 0; j < here; ++j, k += DIM) {
            // Values are read in strips of channels later, which memory does not like: fetch whole
            // rows now, beside the keys.
            const char* row = (const char*)(values + (start + j) * DIM);
            for (size_t byte = 0; byte < DIM * sizeof(Element); byte += 64)
                __builtin_prefetch(row + byte, 0, 2);
            Floats dot[R] = {};
            for (int c = 0; c < kSteps; ++c) {
                Floats part = load(k + c * kLanes);
                for (int r = 0; r < R; ++r) {
                    Floats query;
                    std::memcpy(&query, q + r * DIM + c * kLanes, sizeof query);
                    dot[r] += part * query;
                }
            }
            for (int r = 0; r < R; ++r) scores[r][j] = total(dot[r]);
        }
        for (int r = 0; r < R; ++r) {
            float highest = best[r];
            for (int j = 0; j < here; ++j) highest = scores[r][j] > highest ? scores[r][j] : highest;
            const float shrink = best[r] == highest ? 1.0f : exponential(Floats{} + (best[r] - highest))[0];
            Floats added = {};
            const int padded = (here + kLanes - 1) / kLanes * kLanes;
            for (int j = here; j < padded; ++j) scores[r][j] = -__builtin_inff();
            for (int j = 0; j < padded; j += kLanes) {
                Floats s;
                std::memcpy(&s, &scores[r][j], sizeof s);
                Floats e = exponential(s - highest);
                for (int i = here - j; i < kLanes; ++i) e[i] = 0;
                std::memcpy(&scores[r][j], &e, sizeof e);
                added += e;
            }
            weight[r] = weight[r] * shrink + total(added);
            best[r] = highest;
            if (shrink != 1.0f)
                for (int c = 0; c < DIM; ++c) out[r * DIM + c] *= shrink;
        }
        for (int c = 0; c < kSteps; c += kPairSteps) {  // sums of some channels stay in registers
            const Element* v = values + start * DIM + c * kLanes;
            Floats acc[R][kPairSteps];
            std::memset(acc, 0, sizeof acc);
            for (int j = 0; j < here; ++j, v += DIM) {
                for (int s = 0; s < kPairSteps; ++s) {
                    Floats part = load(v + s * kLanes);
                    for (int r = 0; r < R; ++r) acc[r][s] += part * scores[r][j];
                }
            }
            for (int r = 0; r < R; ++r)
                for (int s = 0; s < kPairSteps; ++s) {
                    float* at = out + r * DIM + (c + s) * kLanes;
                    Floats old;
                    std::memcpy(&old, at, sizeof old);
                    old += acc[r][s];
                    std::memcpy(at, &old, sizeof old);
                }
        }
    }
    for (int r = 0; r < R; ++r) {
        top[r] = best[r];
        sum[r] = weight[r];
    }
}

}  // namespace

extern "C" {

struct Job {
    const float* q;  // (pairs, rows, DIM), multiplied by the scale
    const void* const* keys;
    const void* const* values;
    const long* lengths;  // keys of each block
    const long* strides;  // elements from one pair to the next, for each block
    long blocks;
    long pairs;
    long rows;
    float* out;  // (blocks, pairs, rows, DIM), not divided by the sums
    float* top;  // (blocks, pairs, rows)
    float* sum;  // (blocks, pairs, rows)
    long next;   // the next task to hand out; starts at 0
};

void work(Job* job) {
    const long tasks = job->blocks * job->pairs;
    for (;;) {
        const long task = __atomic_fetch_add(&job->next, 1, __ATOMIC_RELAXED);
        if (task >= tasks) return;
        const long block = task / job->pairs, pair = task % job->pairs;
        const long offset = pair * job->strides[block];
        const Element* keys = (const Element*)job->keys[block] + offset;
        const Element* values = (const Element*)job->values[block] + offset;
        for (long row = 0; row < job->rows;) {
            const long place = task * job->rows + row;
            const float* q = job->q + (pair * job->rows + row) * DIM;
            float *out = job->out + place * DIM, *top = job->top + place, *sum = job->sum + place;
            const long left = job->rows - row, count = job->lengths[block];
            if (left >= 4) {
                attend<4>(keys, values, count, q, out, top, sum);
                row += 4;
            } else if (left >= 2) {
                attend<2>(keys, values, count, q, out, top, sum);
                row += 2;
            } else {
                attend<1>(keys, values, count, q, out, top, sum);
                row += 1;
            }
        }
    }
}
}
