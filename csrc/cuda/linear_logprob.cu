// Passes over scores: log-sum-exp and log-prob of every token, and the scores turned into their own gradient in place.
//
// The products around them (scores = weight hidden^T, and the two of the gradients) are cuBLAS's, called in bindings.cpp.
// Scores lie transposed, a column a token (kernels.h says how). So neighbouring threads take neighbouring tokens, a
// warp reads 512 bytes in a row, and each thread carries its own tokens' sums down the vocabulary: no alignment depends
// on V, which may well be odd (GPT-2's is 50,257). Both passes are bound by memory: one read, and one read and write.
// Sums have a fixed order (threads, chunks, lanes; no atomics), so a run repeats bit for bit.

#include <limits>

#include "common.cuh"

namespace ldalign_cuda {
namespace {

// Rows a thread has in flight. Double's exp takes the registers, and float16's conversions some of them.
template <typename T>
constexpr int kUnroll = 4;
template <>
constexpr int kUnroll<double> = 1;
template <>
constexpr int kUnroll<__half> = 3;
constexpr int64_t kRowsEach = 4;                 // rows a thread should have at least
constexpr int64_t kBlocks = 6 * 132;             // blocks to aim for: two waves of three on each of an H100's 132

// 16 bytes of scores: one load, one store.
template <typename T>
struct alignas(16) Pack {
    static constexpr int size = 16 / sizeof(T);
    T item[size];
};

// How a block's threads share the scores: `across` of them side by side, each with one pack of columns, and
// kThreads / across on top of each other, each with every so many-th row of the block's chunk of the vocabulary.
struct Tiling {
    int across;
    int64_t columns;  // of packs, in blocks
    int64_t chunks, rows;

    Tiling(int64_t V, int64_t n, int64_t pack) {
        across = 1;
        while (across < kWarp && across * pack < n) across *= 2;
        columns = ceil_div(n, across * pack);
        const int64_t most = ceil_div(V, kThreads / across * kRowsEach);
        chunks = kBlocks > columns ? kBlocks / columns : 1;
        chunks = chunks < most ? chunks : most;
        rows = ceil_div(V, chunks);
        chunks = ceil_div(V, rows);  // none empty
    }
    dim3 grid() const { return dim3(static_cast<unsigned>(columns), static_cast<unsigned>(chunks)); }
};

// A thread's place in that: its first column, its first row, the end of its rows.
struct Place {
    int64_t column, row, end;
    int down;  // rows from one of the thread's rows to its next

    __device__ Place(int across, int pack, int64_t rows, int64_t V) {
        column = (static_cast<int64_t>(blockIdx.x) * across + threadIdx.x % across) * pack;
        down = kThreads / across;
        row = blockIdx.y * rows + threadIdx.x / across;
        end = blockIdx.y * rows + rows;
        end = end < V ? end : V;
    }
};

template <typename W>
constexpr W kLowest = std::numeric_limits<W>::lowest();
template <typename W>
constexpr W kInfinity = std::numeric_limits<W>::infinity();

// The lowest finite number, not -inf: -inf - -inf is NaN, and a score of -inf (float16 may overflow) is no error.
template <typename W>
__device__ Stats<W> no_scores() {
    return {kLowest<W>, W(0)};
}

template <typename W>
__device__ Stats<W> merge(Stats<W> a, Stats<W> b) {
    const W largest = fmax(a.largest, b.largest);
    return {largest, a.total * exp(a.largest - largest) + b.total * exp(b.largest - largest)};
}

// Takes `count` rows into the statistics of a pack of columns: one exp a score, one more for all of them.
// fmax passes over a NaN; its exp brings it into the sum.
template <int count, typename T, typename W>
__device__ void take(const T* z, int64_t step, Stats<W> (&stats)[Pack<T>::size]) {
    Pack<T> pack[count];
#pragma unroll
    for (int u = 0; u < count; ++u) pack[u] = *reinterpret_cast<const Pack<T>*>(z + u * step);
#pragma unroll
    for (int i = 0; i < Pack<T>::size; ++i) {
        W largest = stats[i].largest;
#pragma unroll
        for (int u = 0; u < count; ++u) largest = fmax(largest, widen(pack[u].item[i]));
        W total = stats[i].total * exp(stats[i].largest - largest);
#pragma unroll
        for (int u = 0; u < count; ++u) total += exp(widen(pack[u].item[i]) - largest);
        stats[i] = {largest, total};
    }
}

// First half of logprob(): partial[column * chunks + chunk], the statistics of each chunk of the vocabulary.
template <typename T>
__global__ void __launch_bounds__(kThreads, 3)
    chunk_stats(Scores<T> s, int across, int64_t rows, int64_t chunks, Stats<Wide<T>>* partial) {
    using W = Wide<T>;
    constexpr int pack = Pack<T>::size;
    __shared__ Stats<W> of_thread[pack][kThreads];

    const Place at(across, pack, rows, s.V);
    Stats<W> stats[pack];
#pragma unroll
    for (int i = 0; i < pack; ++i) stats[i] = no_scores<W>();
    if (at.column < s.n) {
        const int64_t step = at.down * s.ld;
        const T* z = s.z + at.row * s.ld + at.column;
        int64_t row = at.row;
        for (; row + (kUnroll<T> - 1) * at.down < at.end; row += kUnroll<T> * at.down, z += kUnroll<T> * step)
            take<kUnroll<T>>(z, step, stats);
        for (; row < at.end; row += at.down, z += step) take<1>(z, step, stats);
    }
#pragma unroll
    for (int i = 0; i < pack; ++i) of_thread[i][threadIdx.x] = stats[i];
    __syncthreads();

    const int mine = threadIdx.x;  // now a column of the block's
    const int64_t column = static_cast<int64_t>(blockIdx.x) * across * pack + mine;
    if (mine < across * pack && column < s.n) {
        Stats<W> all = no_scores<W>();
        for (int thread = mine / pack; thread < kThreads; thread += across)
            all = merge(all, of_thread[mine % pack][thread]);
        partial[column * chunks + blockIdx.y] = all;
    }
}

// Second half: one warp a column brings the chunks together.
template <typename T>
__global__ void __launch_bounds__(kThreads, 3) finish_logprob(
    Scores<T> s, int64_t chunks, const Stats<Wide<T>>* partial, const int64_t* target, int64_t ignore_index,
    Wide<T>* logp, Wide<T>* lse) {
    using W = Wide<T>;
    const int64_t column = static_cast<int64_t>(blockIdx.x) * (kThreads / kWarp) + threadIdx.x / kWarp;
    const int lane = threadIdx.x % kWarp;
    Stats<W> all = no_scores<W>();
    if (column < s.n)
        for (int64_t chunk = lane; chunk < chunks; chunk += kWarp) all = merge(all, partial[column * chunks + chunk]);
    for (int offset = kWarp / 2; offset > 0; offset /= 2) {
        Stats<W> other;
        other.largest = __shfl_xor_sync(0xffffffff, all.largest, offset);
        other.total = __shfl_xor_sync(0xffffffff, all.total, offset);
        all = merge(all, other);
    }
    if (column < s.n && lane == 0) {
        const W log_total = log(all.total);
        lse[column] = all.largest + log_total;
        const int64_t word = target[column];
        if (word == ignore_index) {
            logp[column] = 0;
        } else {
            assert(word >= 0 && word < s.V && "target out of range: must be in [0, V) or ignore_index");
            // Not z - lse: at scores of 1e4 the difference of the two large numbers comes first, and is exact.
            logp[column] = (widen(s.z[word * s.ld + column]) - all.largest) - log_total;
        }
    }
}

template <int count, typename T, typename W>
__device__ void turn(
    T* z, int64_t step, int word, int down, const int (&target)[Pack<T>::size], const W (&lse)[Pack<T>::size],
    const W (&coefficient)[Pack<T>::size]) {
    Pack<T> pack[count];
#pragma unroll
    for (int u = 0; u < count; ++u) pack[u] = *reinterpret_cast<const Pack<T>*>(z + u * step);
#pragma unroll
    for (int u = 0; u < count; ++u) {
#pragma unroll
        for (int i = 0; i < Pack<T>::size; ++i) {
            const W here = word + u * down == target[i] ? W(1) : W(0);
            const W p = exp(widen(pack[u].item[i]) - lse[i]);
            pack[u].item[i] = narrow<T>(coefficient[i] * (here - p));
        }
        *reinterpret_cast<Pack<T>*>(z + u * step) = pack[u];
    }
}

template <typename T>
__global__ void __launch_bounds__(kThreads, 3) turn_scores(
    Scores<T> s, int across, int64_t rows, int64_t first, const int64_t* target, const Wide<T>* lse,
    const Wide<T>* coefficient) {
    using W = Wide<T>;
    constexpr int pack = Pack<T>::size;
    const Place at(across, pack, rows, s.V);
    if (at.column >= s.n) return;

    int word[pack];
    W lse_of[pack], c[pack];
#pragma unroll
    for (int i = 0; i < pack; ++i) {
        const int64_t column = at.column + i;
        word[i] = column < s.n ? static_cast<int>(target[column]) : -1;
        c[i] = word[i] < 0 ? W(0) : coefficient[column];
        // A row that counts for nothing must give 0 and not 0 * inf, whatever its lse is: exp(z - inf) = 0.
        lse_of[i] = c[i] == 0 ? kInfinity<W> : lse[column];
    }
    const int64_t step = at.down * s.ld;
    T* z = s.z + at.row * s.ld + at.column;
    int64_t row = at.row;
    for (; row + (kUnroll<T> - 1) * at.down < at.end; row += kUnroll<T> * at.down, z += kUnroll<T> * step)
        turn<kUnroll<T>>(z, step, static_cast<int>(first + row), at.down, word, lse_of, c);
    for (; row < at.end; row += at.down, z += step)
        turn<1>(z, step, static_cast<int>(first + row), at.down, word, lse_of, c);
}

// One block a pair: the two sums, then the coefficient for each of the pair's rows.
template <typename W>
__global__ void __launch_bounds__(kThreads, 3) pair_rows(
    const W* logp, const int64_t* start, const W* reference, const W* weight, W beta, W scale,
    LossOptions<W> options, W* sums, W* coefficient) {
    const int64_t pair = blockIdx.x;
    const int64_t begin = start[2 * pair], middle = start[2 * pair + 1], end = start[2 * pair + 2];
    __shared__ W of_real, of_generated;

    W real = 0, generated = 0;
    for (int64_t row = begin + threadIdx.x; row < middle; row += kThreads) real += logp[row];
    for (int64_t row = middle + threadIdx.x; row < end; row += kThreads) generated += logp[row];
    real = block_sum(real);
    generated = block_sum(generated);
    if (threadIdx.x == 0) {
        sums[2 * pair] = real;
        sums[2 * pair + 1] = generated;
        const W tokens = static_cast<W>(middle > begin ? middle - begin : 1);
        const W by_real = options.length_normalised ? tokens : W(1);
        const W by_generated = options.length_normalised && end > middle ? static_cast<W>(end - middle) : W(1);
        const W delta = (real - reference[2 * pair]) / by_real - (generated - reference[2 * pair + 1]) / by_generated;
        const W c = -scale * beta * weight[pair] * pull(beta * delta, beta, options.ipo, options.label_smoothing);
        of_real = c / by_real - scale * options.nll / tokens;
        of_generated = -c / by_generated;
    }
    __syncthreads();
    for (int64_t row = begin + threadIdx.x; row < end; row += kThreads)
        coefficient[row] = row < middle ? of_real : of_generated;
}

}  // namespace

int64_t stats_chunks(int64_t V, int64_t n, int64_t element_size) { return Tiling(V, n, 16 / element_size).chunks; }

template <typename T>
void logprob(
    Scores<T> scores, const int64_t* target, int64_t ignore_index, Stats<Wide<T>>* partial, Wide<T>* logp, Wide<T>* lse,
    cudaStream_t stream) {
    if (scores.n == 0) return;
    const Tiling tiling(scores.V, scores.n, Pack<T>::size);
    launch(chunk_stats<T>, tiling.grid(), stream, scores, tiling.across, tiling.rows, tiling.chunks, partial);
    const dim3 grid(static_cast<unsigned>(ceil_div(scores.n, kThreads / kWarp)));
    launch(finish_logprob<T>, grid, stream, scores, tiling.chunks, partial, target, ignore_index, logp, lse);
}

template <typename T>
void score_gradient(
    Scores<T> scores, int64_t first, const int64_t* target, const Wide<T>* lse, const Wide<T>* coefficient,
    cudaStream_t stream) {
    if (scores.n == 0) return;
    const Tiling tiling(scores.V, scores.n, Pack<T>::size);
    launch(
        turn_scores<T>, tiling.grid(), stream, scores, tiling.across, tiling.rows, first, target, lse, coefficient);
}

template <typename W>
void pair_coefficients(
    const W* logp, const int64_t* start, int64_t pairs, const W* reference, const W* weight, double beta, double scale,
    LossOptions<W> options, W* sums, W* coefficient, cudaStream_t stream) {
    if (pairs == 0) return;
    launch(
        pair_rows<W>, dim3(static_cast<unsigned>(pairs)), stream, logp, start, reference, weight, static_cast<W>(beta),
        static_cast<W>(scale), options, sums, coefficient);
}

#define LDALIGN_INSTANTIATE(T)                                                                                      \
    template void logprob<T>(                                                                                       \
        Scores<T>, const int64_t*, int64_t, Stats<Wide<T>>*, Wide<T>*, Wide<T>*, cudaStream_t);                     \
    template void score_gradient<T>(                                                                                \
        Scores<T>, int64_t, const int64_t*, const Wide<T>*, const Wide<T>*, cudaStream_t);
LDALIGN_INSTANTIATE(float)
LDALIGN_INSTANTIATE(double)
LDALIGN_INSTANTIATE(__nv_bfloat16)
LDALIGN_INSTANTIATE(__half)
#undef LDALIGN_INSTANTIATE

template void pair_coefficients<float>(
    const float*, const int64_t*, int64_t, const float*, const float*, double, double, LossOptions<float>,
    float*, float*, cudaStream_t);
template void pair_coefficients<double>(
    const double*, const int64_t*, int64_t, const double*, const double*, double, double, LossOptions<double>,
    double*, double*, cudaStream_t);

}  // namespace ldalign_cuda
