// The ops ldalign_cuda::*: argument checks, products (cuBLAS through at::mm), workspaces, and the order of it all.
//
// The scores Z = hidden weight^T of N tokens over a vocabulary of V are never in memory whole unless they fit the
// workspace. They lie transposed, Z^T = weight hidden^T of (V, n): kernels.h says why, and see Borrowed below.
// No function here waits for the GPU.

#include <ATen/ATen.h>
#include <c10/core/DeviceGuard.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <algorithm>
#include <functional>
#include <tuple>
#include <vector>

#include "kernels.h"

namespace ldalign_cuda {
namespace {

using at::Tensor;

constexpr int64_t kSlab = 1024;  // words of the vocabulary a slab takes: enough for a product to fill a GPU

at::ScalarType wide(at::ScalarType dtype) { return dtype == at::kDouble ? at::kDouble : at::kFloat; }
int64_t pack_of(const Tensor& x) { return 16 / x.element_size(); }
int64_t round_down(int64_t value, int64_t step) { return value / step * step; }
int64_t round_up(int64_t value, int64_t step) { return round_down(value + step - 1, step); }

// torch's dtypes, and CUDA's for the same bits
template <typename Function>
void dispatch(at::ScalarType dtype, Function&& function) {
    switch (dtype) {
        case at::kFloat: return function(float{});
        case at::kDouble: return function(double{});
        case at::kBFloat16: return function(__nv_bfloat16{});
        case at::kHalf: return function(__half{});
        default: TORCH_CHECK(false, "no kernel for dtype ", dtype);
    }
}

template <typename T>
T* pointer(const Tensor& x) {
    return static_cast<T*>(x.data_ptr());
}

template <typename T>
Scores<T> scores_of(const Tensor& z) {  // (V, n), the columns side by side
    return {pointer<T>(z), z.size(0), z.size(1), z.stride(0)};
}

// Launches go to x's device; and the ops know no autograd, which would refuse products into given memory.
struct Guards {
    c10::DeviceGuard device;
    at::NoGradGuard no_grad;
    explicit Guards(const Tensor& x) : device(x.device()) {}
};

cudaStream_t stream() { return c10::cuda::getCurrentCUDAStream().stream(); }

// ---- the head's arguments, and one step of work for each kernel ------------------------------------------------------

struct Head {
    Tensor hidden;  // (N, D)
    Tensor weight;  // (V, D)
    Tensor target;  // (N,) int64
    int64_t N, D, V;

    Head(const Tensor& hidden_, const Tensor& weight_, const Tensor& target_) {
        const auto dtype = hidden_.scalar_type();
        TORCH_CHECK(
            dtype == at::kFloat || dtype == at::kDouble || dtype == at::kBFloat16 || dtype == at::kHalf,
            "hidden: dtype must be float32, float64, bfloat16 or float16, not ", dtype);
        TORCH_CHECK(hidden_.dim() == 2, "hidden: must be (N, D), not of shape ", hidden_.sizes());
        TORCH_CHECK(
            weight_.dim() == 2 && weight_.size(1) == hidden_.size(1), "weight: must be (V, D) with D = ",
            hidden_.size(1), " as hidden has, not of shape ", weight_.sizes());
        TORCH_CHECK(
            target_.dim() == 1 && target_.size(0) == hidden_.size(0), "target: must be (N,) with N = ", hidden_.size(0),
            " as hidden has, not of shape ", target_.sizes());
        TORCH_CHECK(
            weight_.scalar_type() == dtype, "weight: must have hidden's dtype, ", dtype, ", not ", weight_.scalar_type());
        TORCH_CHECK(target_.scalar_type() == at::kLong, "target: must be int64, not ", target_.scalar_type());
        TORCH_CHECK(weight_.device() == hidden_.device(), "weight: must be on hidden's device, ", hidden_.device());
        TORCH_CHECK(target_.device() == hidden_.device(), "target: must be on hidden's device, ", hidden_.device());
        TORCH_CHECK(
            weight_.size(0) > 0 && weight_.size(0) < (int64_t(1) << 31),
            "weight: V must be at least 1 and below 2^31, not ", weight_.size(0));
        hidden = hidden_.contiguous();
        weight = weight_.contiguous();
        target = target_.contiguous();
        N = hidden.size(0);
        D = hidden.size(1);
        V = weight.size(0);
    }

    Tensor wide_vector() const { return at::empty({N}, hidden.options().dtype(wide(hidden.scalar_type()))); }
    Tensor rows(int64_t first, int64_t n) const { return hidden.narrow(0, first, n); }
};

// Argument `name` of a row or a pair each: wide, of the expected length, on hidden's device.
Tensor wide_argument(const char* name, const Tensor& x, int64_t length, const Tensor& hidden) {
    TORCH_CHECK(
        x.dim() == 1 && x.size(0) == length, name, ": must be of shape (", length, ",), not ", x.sizes());
    TORCH_CHECK(
        x.scalar_type() == wide(hidden.scalar_type()), name, ": must be ", wide(hidden.scalar_type()), ", not ",
        x.scalar_type());
    TORCH_CHECK(x.device() == hidden.device(), name, ": must be on ", hidden.device(), ", not on ", x.device());
    return x.contiguous();
}

// Tokens [first, first + n) and where their scores go: z (V, n).
struct Piece {
    int64_t first, n;
    Tensor z;
};

void make_scores(const Head& head, Piece& piece) {
    at::mm_out(piece.z, head.weight, head.rows(piece.first, piece.n).t());
}

void take_logprob(const Head& head, const Piece& piece, int64_t ignore_index, Tensor& logp, Tensor& lse) {
    const int64_t chunks = stats_chunks(head.V, piece.n, head.hidden.element_size());
    const Tensor partial = at::empty({piece.n, chunks, 2}, logp.options());
    dispatch(head.hidden.scalar_type(), [&](auto zero) {
        using T = decltype(zero);
        using W = Wide<T>;
        logprob<T>(
            scores_of<T>(piece.z), pointer<int64_t>(head.target) + piece.first, ignore_index,
            pointer<Stats<W>>(partial), pointer<W>(logp) + piece.first, pointer<W>(lse) + piece.first, stream());
    });
    C10_CUDA_KERNEL_LAUNCH_CHECK();
}

// first_word: where z begins in the vocabulary
void take_gradient(
    const Head& head, Piece& piece, int64_t first_word, const Tensor& lse, const Tensor& coefficient) {
    dispatch(head.hidden.scalar_type(), [&](auto zero) {
        using T = decltype(zero);
        using W = Wide<T>;
        score_gradient<T>(
            scores_of<T>(piece.z), first_word, pointer<int64_t>(head.target) + piece.first,
            pointer<W>(lse) + piece.first, pointer<W>(coefficient) + piece.first, stream());
    });
    C10_CUDA_KERNEL_LAUNCH_CHECK();
}

// A gradient that is the sum of several products: added up in float32, rounded once, at the end. One product alone
// needs no float32 copy, and neither does a model in float32 or float64.
class SumOfProducts {
  public:
    SumOfProducts(Tensor out, bool several) : out_(std::move(out)) {
        const auto dtype = wide(out_.scalar_type());
        apart_ = several && out_.scalar_type() != dtype;
        sum_ = apart_ ? at::empty(out_.sizes(), out_.options().dtype(dtype)) : out_;
        if (apart_) product_ = at::empty({std::min(kSlab, out_.size(0)), out_.size(1)}, sum_.options());
    }

    void add(const Tensor& a, const Tensor& b) {
        if (!apart_) {
            if (empty_) at::mm_out(sum_, a, b);
            else sum_.addmm_(a, b);
        } else {
            // A slab at a time: torch has no product of half precision that adds to a float32 matrix (its addmm with
            // an out_dtype came to take one only lately), but it has one that makes a float32 matrix.
            for (int64_t v = 0; v < out_.size(0); v += kSlab) {
                const int64_t n = std::min(kSlab, out_.size(0) - v);
                Tensor to = sum_.narrow(0, v, n);
                Tensor product = empty_ ? to : product_.narrow(0, 0, n);
                at::mm_out(product, a.narrow(0, v, n), b, product.scalar_type());
                if (!empty_) to.add_(product);
            }
        }
        empty_ = false;
    }

    void finish() {
        if (empty_) out_.zero_();
        else if (apart_) out_.copy_(sum_);
    }

  private:
    Tensor out_, sum_, product_;
    bool apart_ = false, empty_ = true;
};

// ---- one pass: log-probs, coefficients, gradients --------------------------------------------------------------------

// Tokens whose coefficients are known together: as many whole pairs as the workspace holds.
struct Group {
    int64_t first, n;            // tokens
    int64_t first_pair = 0, pairs = 0;
};

int64_t workspace_tokens(const Head& head, int64_t bytes) {
    const int64_t fit = bytes / (head.V * static_cast<int64_t>(head.hidden.element_size()));
    const int64_t pack = pack_of(head.hidden);
    return std::min(std::max(round_down(fit, pack), pack), round_up(std::max<int64_t>(head.N, 1), pack));
}

// (words, columns) for scores, each row aligned: `columns` is a multiple of a pack. The last pack starts as zeros, for
// what stands behind an odd number of tokens: some products (oneDNN's in bfloat16 with AMX) read two at a time and
// multiply the second by 0, which memory as it was found turns into NaN.
Tensor scores_memory(const Tensor& like, int64_t words, int64_t columns) {
    Tensor memory = at::empty({words, columns}, like.options());
    memory.narrow(1, columns - pack_of(like), pack_of(like)).zero_();
    return memory;
}

// When dw is wanted and the scores do not fit the workspace, dw's own memory, not yet written, holds those of up to D
// tokens more: the first n columns of dw (V, D) are the transposed scores of n tokens. At 8,192 tokens, D = 4,096 and
// V = 128,256 in bfloat16 that leaves 1,002 MiB for the workspace, where a float32 sum over pieces would take 2,004.
// When both parts are gradients, dw[v] depends on row v of each and on no other: slab by slab the two are copied next
// to each other and multiplied in one go, and the product takes their place. One sum over all tokens, rounded once.
struct Borrowed {
    int64_t tokens = 0;  // 0: nothing borrowed
    int64_t own = 0;     // tokens in the workspace

    Borrowed(const Head& head, bool need_weight, int64_t bytes) {
        const int64_t slab = std::min(kSlab, head.V) * round_up(head.N, pack_of(head.hidden));
        own = workspace_tokens(head, bytes);
        if (!need_weight || head.N <= own || head.D % pack_of(head.hidden) != 0) return;
        const int64_t left = workspace_tokens(
            head, bytes - slab * static_cast<int64_t>(head.hidden.element_size()));
        if (head.N - left > head.D) return;
        own = left;
        tokens = head.N - left;
    }
};

void product_of_both(const Head& head, const Piece& in_dw, const Piece& in_workspace, Tensor& dw) {
    Tensor slab = scores_memory(dw, std::min(kSlab, head.V), round_up(head.N, pack_of(dw)));
    for (int64_t v = 0; v < head.V; v += kSlab) {
        const int64_t n = std::min(kSlab, head.V - v);
        Tensor both = slab.narrow(0, 0, n).narrow(1, 0, head.N);
        for (const Piece* piece : {&in_dw, &in_workspace})
            both.narrow(1, piece->first, piece->n).copy_(piece->z.narrow(0, v, n));
        Tensor out = dw.narrow(0, v, n);
        at::mm_out(out, both, head.hidden);
    }
}

// For each group: scores (product 1), log-probs, the coefficients `of` them, scores into gradients, dh and dw
// (products 2 and 3). A group that outgrows the workspace, one long pair, has its scores made twice.
void one_pass(
    const Head& head, const std::vector<Group>& groups, const Borrowed& borrowed, int64_t ignore_index, Tensor& logp,
    Tensor& lse, const Tensor& coefficient, const std::function<void(const Group&)>& of, Tensor& dh, Tensor& dw) {
    const bool need_hidden = dh.defined(), need_weight = dw.defined();
    const Tensor workspace = scores_memory(head.hidden, head.V, borrowed.own);
    bool several = groups.size() > 1;
    for (const Group& group : groups) several = several || group.n > borrowed.own;
    SumOfProducts dw_sum(need_weight ? dw : Tensor(head.weight), need_weight && several && borrowed.tokens == 0);

    for (const Group& group : groups) {
        std::vector<Piece> pieces;
        if (borrowed.tokens > 0) pieces.push_back({0, borrowed.tokens, dw.narrow(1, 0, borrowed.tokens)});
        for (int64_t i = borrowed.tokens; i < group.n; i += borrowed.own) {
            const int64_t n = std::min(borrowed.own, group.n - i);
            pieces.push_back({group.first + i, n, workspace.narrow(1, 0, n)});
        }
        const bool twice = borrowed.tokens == 0 && pieces.size() > 1;
        for (Piece& piece : pieces) {
            make_scores(head, piece);
            take_logprob(head, piece, ignore_index, logp, lse);
        }
        of(group);
        if (!need_hidden && !need_weight) continue;
        for (Piece& piece : pieces) {
            if (twice) make_scores(head, piece);
            take_gradient(head, piece, 0, lse, coefficient);
            if (need_hidden) {
                Tensor rows = dh.narrow(0, piece.first, piece.n);
                at::mm_out(rows, piece.z.t(), head.weight);
            }
            if (need_weight && borrowed.tokens == 0) dw_sum.add(piece.z, head.rows(piece.first, piece.n));
        }
        if (need_weight && borrowed.tokens > 0) product_of_both(head, pieces[0], pieces[1], dw);
    }
    if (need_weight && borrowed.tokens == 0) dw_sum.finish();
}

// What is not wanted comes back as an empty tensor: a schema has no good way to say "or none".
Tensor gradient_like(const Tensor& x, bool wanted) { return wanted ? at::empty_like(x) : Tensor(); }
Tensor or_empty(const Tensor& x, const Tensor& like) { return x.defined() ? x : at::empty({0}, like.options()); }

// ---- the ops ---------------------------------------------------------------------------------------------------------

std::tuple<Tensor, Tensor> linear_logprob(
    const Tensor& hidden,  // (N, D)
    const Tensor& weight,  // (V, D)
    const Tensor& target,  // (N,) int64
    int64_t ignore_index, int64_t workspace_bytes) {
    const Head head(hidden, weight, target);
    const Guards guards(hidden);
    Tensor logp = head.wide_vector(), lse = head.wide_vector();
    const int64_t tokens = workspace_tokens(head, workspace_bytes);
    const Tensor workspace = scores_memory(head.hidden, head.V, tokens);
    for (int64_t first = 0; first < head.N; first += tokens) {
        const int64_t n = std::min(tokens, head.N - first);
        Piece piece{first, n, workspace.narrow(1, 0, n)};
        make_scores(head, piece);
        take_logprob(head, piece, ignore_index, logp, lse);
    }
    return {logp, lse};
}

std::tuple<Tensor, Tensor> linear_logprob_backward(
    const Tensor& grad,    // (N,) wide
    const Tensor& hidden,  // (N, D)
    const Tensor& weight,  // (V, D)
    const Tensor& target,  // (N,) int64; a negative one adds nothing
    const Tensor& lse,     // (N,) wide
    bool need_hidden, bool need_weight, int64_t workspace_bytes) {
    const Head head(hidden, weight, target);
    const Tensor coefficient = wide_argument("grad", grad, head.N, hidden);
    const Tensor lse_ = wide_argument("lse", lse, head.N, hidden);
    const Guards guards(hidden);
    Tensor dh = gradient_like(head.hidden, need_hidden), dw = gradient_like(head.weight, need_weight);
    const int64_t pack = pack_of(hidden), size = hidden.element_size();
    if (head.N == 0) {
        if (need_weight) dw.zero_();
    } else if (need_weight) {
        // All tokens and a slab of the vocabulary at a time: each row of dw is then one sum over all tokens. With the
        // coefficients known, nothing asks for a token's whole vocabulary at once. dh is the sum of the slabs'.
        const int64_t width = round_up(head.N, pack);
        const int64_t fit = workspace_bytes / (width * size);
        int64_t words = std::min(head.V, std::max<int64_t>(fit, 1));
        if (need_hidden && words < head.V && size < 4) {  // make room for dh's float32 sum, up to half the workspace
            const int64_t sum = std::min(head.N * head.D * 4, workspace_bytes / 2);
            words = std::max<int64_t>((workspace_bytes - sum) / (width * size), 1);
        }
        const Tensor workspace = scores_memory(head.hidden, words, width);
        SumOfProducts dh_sum(need_hidden ? dh : Tensor(head.hidden), need_hidden && words < head.V);
        for (int64_t v = 0; v < head.V; v += words) {
            const int64_t n = std::min(words, head.V - v);
            Piece piece{0, head.N, workspace.narrow(0, 0, n).narrow(1, 0, head.N)};
            const Tensor slab = head.weight.narrow(0, v, n);
            at::mm_out(piece.z, slab, head.hidden.t());
            take_gradient(head, piece, v, lse_, coefficient);
            Tensor out = dw.narrow(0, v, n);
            at::mm_out(out, piece.z, head.hidden);
            if (need_hidden) dh_sum.add(piece.z.t(), slab);
        }
        if (need_hidden) dh_sum.finish();
    } else if (need_hidden) {
        const int64_t tokens = workspace_tokens(head, workspace_bytes);
        const Tensor workspace = scores_memory(head.hidden, head.V, tokens);
        for (int64_t first = 0; first < head.N; first += tokens) {
            const int64_t n = std::min(tokens, head.N - first);
            Piece piece{first, n, workspace.narrow(1, 0, n)};
            make_scores(head, piece);
            take_gradient(head, piece, 0, lse_, coefficient);
            Tensor rows = dh.narrow(0, first, n);
            at::mm_out(rows, piece.z.t(), head.weight);
        }
    }
    return {or_empty(dh, hidden), or_empty(dw, hidden)};
}

std::tuple<Tensor, Tensor, Tensor> pair_loss(
    const Tensor& hidden,  // (N, D)
    const Tensor& weight,  // (V, D)
    const Tensor& target,  // (N,) int64
    at::IntArrayRef lengths,    // S = 2 P: tokens of each response, real and generated in turn
    const Tensor& reference,    // (S,) wide
    const Tensor& pair_weight,  // (P,) wide
    double beta, double scale, bool need_hidden, bool need_weight, int64_t workspace_bytes, bool ipo, double nll,
    double label_smoothing, bool length_normalised) {
    const Head head(hidden, weight, target);
    const int64_t S = static_cast<int64_t>(lengths.size()), P = S / 2;
    TORCH_CHECK(S % 2 == 0, "lengths: must be of an even number of responses (real, generated, ...), not ", S);
    const Tensor reference_ = wide_argument("reference", reference, S, hidden);
    const Tensor weight_ = wide_argument("pair_weight", pair_weight, P, hidden);
    const Guards guards(hidden);

    // Pinned, so that the copy does not wait; the caching host allocator keeps it until the copy is done.
    const bool pin = hidden.is_cuda();
    const Tensor start_host = at::empty({S + 1}, at::TensorOptions().dtype(at::kLong).pinned_memory(pin));
    int64_t* start = start_host.data_ptr<int64_t>();
    start[0] = 0;
    for (int64_t s = 0; s < S; ++s) {
        TORCH_CHECK(lengths[s] >= 0, "lengths: must not be negative, and lengths[", s, "] is ", lengths[s]);
        start[s + 1] = start[s] + lengths[s];
    }
    TORCH_CHECK(
        start[S] == head.N, "lengths: must add up to hidden's N = ", head.N, ", and add up to ", start[S]);
    const Tensor start_device = start_host.to(hidden.device(), /*non_blocking=*/true);

    const Borrowed borrowed(head, need_weight, workspace_bytes);
    std::vector<Group> groups;
    for (int64_t p = 0; p < P; ++p) {
        const int64_t n = start[2 * p + 2] - start[2 * p];
        const bool joins = !groups.empty() && groups.back().n + n <= borrowed.own + borrowed.tokens;
        if (!joins) groups.push_back({start[2 * p], 0, p, 0});
        groups.back().n += n;
        groups.back().pairs += 1;
    }

    Tensor logp = head.wide_vector(), lse = head.wide_vector(), coefficient = head.wide_vector();
    Tensor sums = at::empty({S}, logp.options());
    Tensor dh = gradient_like(head.hidden, need_hidden), dw = gradient_like(head.weight, need_weight);
    const auto of = [&](const Group& group) {
        dispatch(logp.scalar_type(), [&](auto zero) {
            using W = Wide<decltype(zero)>;
            const LossOptions<W> options{
                ipo, static_cast<W>(nll), static_cast<W>(label_smoothing), length_normalised};
            pair_coefficients<W>(
                pointer<W>(logp), pointer<int64_t>(start_device) + 2 * group.first_pair, group.pairs,
                pointer<W>(reference_) + 2 * group.first_pair, pointer<W>(weight_) + group.first_pair, beta, scale,
                options, pointer<W>(sums) + 2 * group.first_pair, pointer<W>(coefficient), stream());
        });
        C10_CUDA_KERNEL_LAUNCH_CHECK();
    };
    one_pass(head, groups, borrowed, /*ignore_index=*/-100, logp, lse, coefficient, of, dh, dw);
    return {sums, or_empty(dh, hidden), or_empty(dw, hidden)};
}

std::tuple<Tensor, Tensor, Tensor> sft_loss(
    const Tensor& hidden,  // (N, D)
    const Tensor& weight,  // (V, D)
    const Tensor& target,  // (N,) int64
    double scale, bool need_hidden, bool need_weight, int64_t workspace_bytes) {
    const Head head(hidden, weight, target);
    const Guards guards(hidden);
    const Borrowed borrowed(head, need_weight, workspace_bytes);
    std::vector<Group> groups;
    const int64_t most = borrowed.own + borrowed.tokens;
    for (int64_t i = 0; i < head.N; i += most) groups.push_back({i, std::min(most, head.N - i)});

    Tensor logp = head.wide_vector(), lse = head.wide_vector();
    const Tensor coefficient = at::full({head.N}, -scale, logp.options());
    Tensor dh = gradient_like(head.hidden, need_hidden), dw = gradient_like(head.weight, need_weight);
    const auto of = [](const Group&) {};
    one_pass(head, groups, borrowed, /*ignore_index=*/-100, logp, lse, coefficient, of, dh, dw);
    return {logp, or_empty(dh, hidden), or_empty(dw, hidden)};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> weighted_dpo(
    const Tensor& sums_real, const Tensor& sums_generated, const Tensor& ref_real, const Tensor& ref_generated,
    const Tensor& weight, double beta, bool ipo, double label_smoothing) {  // all (P,) wide
    const auto dtype = sums_real.scalar_type();
    TORCH_CHECK(
        dtype == at::kFloat || dtype == at::kDouble, "sums_real: must be float32 or float64, not ", dtype);
    const int64_t P = sums_real.numel();
    const Tensor real = wide_argument("sums_real", sums_real, P, sums_real);
    const Tensor generated = wide_argument("sums_generated", sums_generated, P, sums_real);
    const Tensor ref_a = wide_argument("ref_real", ref_real, P, sums_real);
    const Tensor ref_b = wide_argument("ref_generated", ref_generated, P, sums_real);
    const Tensor weight_ = wide_argument("weight", weight, P, sums_real);
    const Guards guards(sums_real);
    Tensor loss = at::empty({}, real.options());
    Tensor each = at::empty_like(real), chosen = at::empty_like(real), rejected = at::empty_like(real);
    Tensor coefficient = at::empty_like(real);
    dispatch(dtype, [&](auto zero) {
        using W = Wide<decltype(zero)>;
        ldalign_cuda::weighted_dpo<W>(
            pointer<W>(real), pointer<W>(generated), pointer<W>(ref_a), pointer<W>(ref_b), pointer<W>(weight_), P, beta,
            ipo, label_smoothing, pointer<W>(loss), pointer<W>(each), pointer<W>(chosen), pointer<W>(rejected),
            pointer<W>(coefficient), stream());
    });
    C10_CUDA_KERNEL_LAUNCH_CHECK();
    return {loss, each, chosen, rejected, coefficient};
}

// The implementations for one dispatch key.
void implement(torch::Library& m) {
    m.impl("linear_logprob", &linear_logprob);
    m.impl("linear_logprob_backward", &linear_logprob_backward);
    m.impl("pair_loss", &pair_loss);
    m.impl("sft_loss", &sft_loss);
    m.impl("weighted_dpo", &weighted_dpo);
}

}  // namespace
}  // namespace ldalign_cuda

TORCH_LIBRARY_FRAGMENT(ldalign_cuda, m) {
    m.def(
        "linear_logprob(Tensor hidden, Tensor weight, Tensor target, int ignore_index, int workspace_bytes)"
        " -> (Tensor, Tensor)");
    m.def(
        "linear_logprob_backward(Tensor grad, Tensor hidden, Tensor weight, Tensor target, Tensor lse,"
        " bool need_hidden, bool need_weight, int workspace_bytes) -> (Tensor, Tensor)");
    m.def(
        "pair_loss(Tensor hidden, Tensor weight, Tensor target, int[] lengths, Tensor reference, Tensor pair_weight,"
        " float beta, float scale, bool need_hidden, bool need_weight, int workspace_bytes, bool ipo, float nll,"
        " float label_smoothing, bool length_normalised) -> (Tensor, Tensor, Tensor)");
    m.def(
        "sft_loss(Tensor hidden, Tensor weight, Tensor target, float scale, bool need_hidden, bool need_weight,"
        " int workspace_bytes) -> (Tensor, Tensor, Tensor)");
    m.def(
        "weighted_dpo(Tensor sums_real, Tensor sums_generated, Tensor ref_real, Tensor ref_generated, Tensor weight,"
        " float beta, bool ipo, float label_smoothing) -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(ldalign_cuda, CUDA, m) { ldalign_cuda::implement(m); }
