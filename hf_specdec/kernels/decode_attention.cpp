// Attention of a few queries over many keys, as fast as memory delivers keys and values: each is read once, in place.
// Flash-decoding (https://pytorch.org/blog/flash-decoding/) on a CPU: chunks of keys with a running
// softmax (Milakov and Gimelshein, 2018, arXiv 1805.02867), divided among threads by row, K/V head and, if these are
// few, range of keys.
//
// All queries that share a K/V head are "lanes" of one vector: scores are [key][lane]. With AVX-512 BF16, both products
// use its dot products of pairs; otherwise bfloat16 is widened to float. Built and called by compiled_attention.py.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>
#if defined(__AVX512BF16__)
#include <immintrin.h>
#endif

namespace {

constexpr int LANES = 16;   // lanes of one vector
constexpr int CHUNK = 256;  // keys whose scores are held at a time; their keys and values stay in the L2 cache
constexpr int BLOCK = 8;    // keys whose scores are summed side by side
constexpr int SLICE = 32;   // columns of values summed side by side,
constexpr int MOST = 12;    // for at most this many lanes: 24 sums, in 32 registers
constexpr int AHEAD = 32;   // keys to fetch before they are needed: the processor's own prefetch looks less far ahead
constexpr float NONE = -std::numeric_limits<float>::infinity();

typedef float Floats __attribute__((vector_size(4 * LANES)));
typedef int32_t Ints __attribute__((vector_size(4 * LANES)));

struct BFloat16 {
    uint16_t bits;
};

inline float widen(float x) { return x; }
inline float widen(BFloat16 x) {
    const uint32_t bits = uint32_t(x.bits) << 16;
    float out;
    std::memcpy(&out, &bits, sizeof out);
    return out;
}

inline void narrow(float x, float& out) { out = x; }
inline void narrow(float x, BFloat16& out) {  // to the nearest, ties to even
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    out.bits = x != x ? 0x7fc0 : uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

inline Floats all(float x) { return Floats{} + x; }
inline Floats larger(Floats a, Floats b) { return a > b ? a : b; }

// 2^x for x <= 0 (the polynomial of Cephes' exp2f, relative error below 2e-7); 0 below normal numbers and for -inf.
inline Floats exp2_of(Floats x) {
    const float ROUNDS = 12582912.0f;  // 1.5 * 2^23: adding it rounds a float to an integer, in the low bits
    const Floats clamped = larger(x, all(-126.0f)), shifted = clamped + ROUNDS, f = clamped - (shifted - ROUNDS);
    Floats p = all(1.535336188319500e-4f);
    p = p * f + 1.339887440266574e-3f;
    p = p * f + 9.618437357674640e-3f;
    p = p * f + 5.550332471162809e-2f;
    p = p * f + 2.402264791363012e-1f;
    p = p * f + 6.931472028550421e-1f;
    p = p * f + 1.0f;
    const Ints exponent = ((Ints)shifted - 0x4b400000) << 23;
    return x < -126.0f ? Floats{} : (Floats)((Ints)p + exponent);
}

// Sizes passed from Python. Strides are in elements; columns, and keys of the mask, are contiguous.
struct Sizes {
    int64_t rows, kv_heads, groups, queries, keys, width, value_width;
    int64_t q_row, q_head, q_position, k_row, k_head, k_position, v_row, v_head, v_position, m_row, m_query;
    int64_t lanes() const { return groups * queries; }
    int64_t blocks() const { return (lanes() + LANES - 1) / LANES; }
};

// Up to LANES lanes of one row and K/V head.
template <typename T>
struct Block {
    const T *query, *key, *value;
    const uint8_t* mask;  // [queries][keys], or null
    int64_t first;        // lane; lane l is query l % queries of head l / queries of the group
    int lanes;
};

struct State {
    Floats maximum = all(NONE), sum = {};  // sum of exp2(score - maximum)
};

// [width][LANES], or as pairs of bfloat16: [width / 2][LANES][2].
template <typename T>
void pack_queries(const Block<T>& block, const Sizes& s, float* packed) {
    std::fill_n(packed, s.width * LANES, 0.0f);
    for (int lane = 0; lane < block.lanes; lane++) {
        const int64_t l = block.first + lane;
        const T* query = block.query + l / s.queries * s.q_head + l % s.queries * s.q_position;
        for (int64_t d = 0; d < s.width; d++) {
#if defined(__AVX512BF16__)
            if constexpr (sizeof(T) == 2) {
                reinterpret_cast<uint16_t*>(packed)[(d / 2 * LANES + lane) * 2 + d % 2] = query[d].bits;
                continue;
            }
#endif
            packed[d * LANES + lane] = widen(query[d]);
        }
    }
}

template <typename T, int N>
inline void score(const T* key, int64_t stride, int64_t width, const float* packed, Floats* scores) {
    Floats sums[N] = {};
#if defined(__AVX512BF16__)
    if constexpr (sizeof(T) == 2) {
        for (int64_t d = 0; d < width; d += 2) {
            const __m512bh query = (__m512bh)_mm512_loadu_ps(packed + d / 2 * LANES);
            for (int i = 0; i < N; i++) {
                int32_t pair;
                std::memcpy(&pair, key + i * stride + d, sizeof pair);
                sums[i] = (Floats)_mm512_dpbf16_ps((__m512)sums[i], query, (__m512bh)_mm512_set1_epi32(pair));
            }
        }
        std::copy_n(sums, N, scores);
        return;
    }
#endif
    for (int64_t d = 0; d < width; d++) {
        Floats query;
        std::memcpy(&query, packed + d * LANES, sizeof query);
        for (int i = 0; i < N; i++) sums[i] += query * widen(key[i * stride + d]);
    }
    std::copy_n(sums, N, scores);
}

// If the product with values takes pairs, packs the weights of two keys into pairs: [keys / 2][LANES][2].
template <typename T>
void pack_weights(Floats* weights, int keys) {
#if defined(__AVX512BF16__)
    if constexpr (sizeof(T) == 2) {
        alignas(64) int16_t order[2 * LANES];
        for (int i = 0; i < 2 * LANES; i++) order[i] = int16_t(i / 2 + i % 2 * LANES);
        const __m512i interleaved = _mm512_load_si512(order);
        for (int key = 0; key < keys; key += 2) {
            const __m512 second = key + 1 < keys ? (__m512)weights[key + 1] : _mm512_setzero_ps();
            const __m512i both = (__m512i)_mm512_cvtne2ps_pbh(second, (__m512)weights[key]);
            weights[key / 2] = (Floats)_mm512_permutexvar_epi16(interleaved, both);
        }
    }
#endif
}

// out[lane][column] += weights[key][lane] * value[key][column], for N lanes and one slice of columns.
template <int N, typename T>
inline void add_slice(const T* value, int64_t stride, int keys, const float* weights, float* out, int64_t width) {
#if defined(__AVX512BF16__)
    if constexpr (sizeof(T) == 2) {
        // Unpacking interleaves two keys within each 128 bits; the sums are put in order at the end.
        const __m512i FIRST = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
        const __m512i SECOND = _mm512_setr_epi32(8, 9, 10, 11, 24, 25, 26, 27, 12, 13, 14, 15, 28, 29, 30, 31);
        __m512 sums[N][2] = {};
        for (int key = 0; key < keys; key += 2, weights += LANES) {
            const __m512i one = _mm512_loadu_si512(value + key * stride);
            const __m512i two = key + 1 < keys ? _mm512_loadu_si512(value + (key + 1) * stride) : _mm512_setzero_si512();
            const __m512bh low = (__m512bh)_mm512_unpacklo_epi16(one, two);
            const __m512bh high = (__m512bh)_mm512_unpackhi_epi16(one, two);
            for (int i = 0; i < N; i++) {
                const __m512bh pair = (__m512bh)_mm512_set1_ps(weights[i]);
                sums[i][0] = _mm512_dpbf16_ps(sums[i][0], low, pair);
                sums[i][1] = _mm512_dpbf16_ps(sums[i][1], high, pair);
            }
        }
        for (int i = 0; i < N; i++) {
            float* to = out + i * width;
            const __m512 first = _mm512_permutex2var_ps(sums[i][0], FIRST, sums[i][1]);
            const __m512 second = _mm512_permutex2var_ps(sums[i][0], SECOND, sums[i][1]);
            _mm512_storeu_ps(to, _mm512_add_ps(_mm512_loadu_ps(to), first));
            _mm512_storeu_ps(to + LANES, _mm512_add_ps(_mm512_loadu_ps(to + LANES), second));
        }
        return;
    }
#endif
    Floats sums[N][2];
    for (int i = 0; i < N; i++) std::memcpy(sums[i], out + i * width, sizeof sums[i]);
    for (int key = 0; key < keys; key++, weights += LANES) {
        float wide[SLICE];
        for (int d = 0; d < SLICE; d++) wide[d] = widen(value[key * stride + d]);
        Floats v[2];
        std::memcpy(v, wide, sizeof v);
        for (int i = 0; i < N; i++)
            for (int half = 0; half < 2; half++) sums[i][half] += v[half] * weights[i];
    }
    for (int i = 0; i < N; i++) std::memcpy(out + i * width, sums[i], sizeof sums[i]);
}

template <int N, typename T>
void add_values(int lanes, const T* value, int64_t stride, int keys, const float* weights, float* out, int64_t width) {
    if constexpr (N > 1)
        if (lanes < N) return add_values<N - 1>(lanes, value, stride, keys, weights, out, width);
    for (int64_t d = 0; d < width; d += SLICE) add_slice<N>(value + d, stride, keys, weights, out + d, width);
}

template <typename T>
inline void fetch(const T* rows, int64_t stride, int64_t width) {
    for (int i = 0; i < BLOCK; i++)
        for (int64_t d = 0; d < width; d += 64 / int64_t(sizeof(T))) __builtin_prefetch(rows + i * stride + d, 0, 2);
}

// Sets bit `lane` of bits[key] if the lane attends to the key. Returns whether any does.
template <typename T>
bool attending(const Block<T>& block, const Sizes& s, int64_t begin, int keys, uint16_t* bits) {
    std::fill_n(bits, keys, uint16_t(0));
    for (int lane = 0; lane < block.lanes; lane++) {
        const uint8_t* mask = block.mask + (block.first + lane) % s.queries * s.m_query + begin;
        for (int i = 0; i < keys; i++) bits[i] |= uint16_t(mask[i] << lane);
    }
    uint16_t any = 0;
    for (int i = 0; i < keys; i++) any |= bits[i];
    return any != 0;
}

// Lets one block see `keys` more keys: their scores, the softmax so far, and the values into `out` [lane][column].
template <typename T>
void see(const Block<T>& block, const Sizes& s, int64_t begin, int keys, float scale, const float* packed, State& state,
         float* out) {
    uint16_t bits[CHUNK];
    if (block.mask && !attending(block, s, begin, keys, bits)) return;
    const T* key = block.key + begin * s.k_position;
    const T* value = block.value + begin * s.v_position;
    Floats scores[CHUNK];
    int done = 0;
    for (; done + BLOCK <= keys; done += BLOCK) {
        fetch(key + (done + AHEAD) * s.k_position, s.k_position, s.width);
        fetch(value + done * s.v_position, s.v_position, s.value_width);
        score<T, BLOCK>(key + done * s.k_position, s.k_position, s.width, packed, scores + done);
    }
    for (; done < keys; done++) score<T, 1>(key + done * s.k_position, s.k_position, s.width, packed, scores + done);

    const Ints BITS = {1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768};
    Floats maximum = state.maximum;
    for (int i = 0; i < keys; i++) {
        scores[i] *= scale;
        if (block.mask) scores[i] = (BITS & int32_t(bits[i])) != 0 ? scores[i] : all(NONE);
        maximum = larger(maximum, scores[i]);
    }
    const Floats base = maximum == NONE ? Floats{} : maximum;  // lanes that have seen nothing yet: any number will do
    const Floats kept = exp2_of(state.maximum - base);
    Floats sum = state.sum * kept;
    for (int i = 0; i < keys; i++) {
        scores[i] = exp2_of(scores[i] - base);
        sum += scores[i];
    }
    state.maximum = maximum;
    state.sum = sum;
    for (int lane = 0; lane < block.lanes; lane++)
        if (kept[lane] != 1.0f)
            for (int64_t d = 0; d < s.value_width; d++) out[lane * s.value_width + d] *= kept[lane];
    pack_weights<T>(scores, keys);
    const int first = block.lanes > MOST ? LANES / 2 : block.lanes;
    const float* weights = reinterpret_cast<const float*>(scores);
    add_values<MOST>(first, value, s.v_position, keys, weights, out, s.value_width);
    if (first < block.lanes)
        add_values<MOST>(block.lanes - first, value, s.v_position, keys, weights + first, out + first * s.value_width,
                         s.value_width);
}

template <typename T>
void attend(const T* query, const T* key, const T* value, const uint8_t* mask, T* out, const Sizes& s, float scale,
            int threads) {
    const int64_t blocks = s.blocks(), heads = s.rows * s.kv_heads, chunks = (s.keys + CHUNK - 1) / CHUNK;
    // Split the keys into parts of two or more chunks, until every thread has work.
    const int64_t parts = std::max<int64_t>(1, std::min<int64_t>((threads + heads - 1) / heads, chunks / 2));
    std::vector<float> sums(heads * parts * blocks * LANES * s.value_width);
    std::vector<State> states(heads * parts * blocks);

#pragma omp parallel num_threads(threads)
    {
        std::vector<float> packed(blocks * s.width * LANES);
        std::vector<float> merged(s.value_width);
#pragma omp for schedule(static)
        for (int64_t task = 0; task < heads * parts; task++) {
            const int64_t row = task / parts / s.kv_heads, head = task / parts % s.kv_heads, part = task % parts;
            const auto block = [&](int64_t b) {
                return Block<T>{query + row * s.q_row + head * s.groups * s.q_head,
                                key + row * s.k_row + head * s.k_head,
                                value + row * s.v_row + head * s.v_head,
                                mask ? mask + row * s.m_row : nullptr,
                                b * LANES,
                                int(std::min<int64_t>(LANES, s.lanes() - b * LANES))};
            };
            for (int64_t b = 0; b < blocks; b++) pack_queries(block(b), s, packed.data() + b * s.width * LANES);
            for (int64_t c = chunks * part / parts; c < chunks * (part + 1) / parts; c++)
                for (int64_t b = 0; b < blocks; b++)
                    see(block(b), s, c * CHUNK, int(std::min<int64_t>(CHUNK, s.keys - c * CHUNK)), scale,
                        packed.data() + b * s.width * LANES, states[task * blocks + b],
                        sums.data() + (task * blocks + b) * LANES * s.value_width);
        }
#pragma omp for schedule(static)
        for (int64_t item = 0; item < heads * s.lanes(); item++) {
            const int64_t head = item / s.lanes(), lane = item % s.lanes(), at = lane % LANES;
            const auto index = [&](int64_t part) { return (head * parts + part) * blocks + lane / LANES; };
            float maximum = NONE, total = 0.0f;
            for (int64_t part = 0; part < parts; part++) maximum = std::max(maximum, states[index(part)].maximum[at]);
            std::fill(merged.begin(), merged.end(), 0.0f);
            for (int64_t part = 0; part < parts; part++) {
                const State& state = states[index(part)];
                if (state.maximum[at] == NONE) continue;
                const float weight = std::exp2(state.maximum[at] - maximum);
                const float* sum = sums.data() + (index(part) * LANES + at) * s.value_width;
                total += weight * state.sum[at];
                for (int64_t d = 0; d < s.value_width; d++) merged[d] += weight * sum[d];
            }
            // [row][query][head][column]; queries that attend to nothing get zeros, as in PyTorch.
            const int64_t row = head / s.kv_heads, of_row = head % s.kv_heads * s.groups + lane / s.queries;
            T* to = out + ((row * s.queries + lane % s.queries) * s.kv_heads * s.groups + of_row) * s.value_width;
            for (int64_t d = 0; d < s.value_width; d++) narrow(total == 0.0f ? 0.0f : merged[d] / total, to[d]);
        }
    }
}

}  // namespace

// scale: factor of the scores, times log2(e).
extern "C" void decode_attention(const void* query, const void* key, const void* value, const uint8_t* mask, void* out,
                                 const Sizes* sizes, int is_half, float scale, int threads) {
    if (is_half)
        attend((const BFloat16*)query, (const BFloat16*)key, (const BFloat16*)value, mask, (BFloat16*)out, *sizes, scale,
               threads);
    else
        attend((const float*)query, (const float*)key, (const float*)value, mask, (float*)out, *sizes, scale, threads);
}
