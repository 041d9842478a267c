"""Weights in 8 bits: the C++ products against plain PyTorch, to the bit, and what they draw."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import torch.nn.functional as F
from op_cases import normal
from torch import Tensor, nn

from ldalign.data.embedded import make_rows
from ldalign.data.tokenizer import load_tokenizer
from ldalign.generation.decoders import (
    PANEL,
    PackedDecoder,
    check_weights,
    new_decoder,
    pack_int8,
    pack_weight,
)
from ldalign.generation.engine import Engine, Request
from ldalign.generation.sampling import Response, Sampling
from ldalign.kernels import cpp, reference
from ldalign.kernels.reference import GROUP
from ldalign.models.mistral import Mistral
from ldalign.models.toy import random_mistral
from ldalign.models.weights import load_model
from ldalign.system.errors import InputError, NumericsError

pytestmark = pytest.mark.skipif(not cpp.available(), reason="no C++ backend")
FLOATS = [torch.float32, torch.bfloat16]


def hadamard() -> Tensor:
    """(64, 64) by Sylvester's doubling, float64."""
    matrix = torch.ones(1, 1, dtype=torch.float64)
    for _ in range(6):
        matrix = torch.cat((torch.cat((matrix, matrix), 1), torch.cat((matrix, -matrix), 1)))
    return matrix


def restored(q: Tensor, scales: Tensor, K: int) -> Tensor:
    """What 8 bits stand for: (N, K) float64."""
    groups = q.double().unflatten(1, (-1, GROUP)) * scales.double()[..., None]
    return (groups @ hadamard() / 8).flatten(1)[:, :K]


# --------------------------------------------------------------------------------- the reference


def test_a_turn_is_a_hadamard_matrix() -> None:
    matrix = hadamard()
    assert torch.equal(matrix @ matrix, 64 * torch.eye(64, dtype=torch.float64))
    assert torch.equal(reference.turned(torch.eye(64)).double(), matrix)
    x = normal(5, 64)
    assert torch.allclose(reference.turned(x), x @ matrix, atol=1e-12)


@pytest.mark.parametrize("K", [64, 576, 70, 2])
def test_quantising_loses_half_a_step(K: int) -> None:
    """The error is that of rounding to scale, in the turned group; a large value is its own
    group's business.
    """
    x = normal(7, K).float()
    before = reference.quantise(x)[1]
    x[:, K // 2] = 100
    q, scales = reference.quantise(x)
    assert torch.equal((scales != before).nonzero()[:, 1], torch.full((7,), K // 2 // 64))
    assert q.shape == (7, -(-K // 64) * 64) and scales.shape == (7, -(-K // 64))
    assert q.abs().unflatten(1, (-1, 64)).amax(2).eq(127).all()
    error = F.pad(restored(q, scales, K) - x, (0, -K % 64)).unflatten(1, (-1, 64)) @ hadamard() / 8
    if K % 64 == 0:  # else what lies beyond K has been cut off
        assert (error.abs() <= 0.5001 * scales[..., None]).all()
    assert error.norm() < 0.01 * x.double().norm()


def test_a_large_value_costs_the_others_little() -> None:
    """One of a hundred times the size: without the turn the error of the others is their own."""
    x = normal(9, 64).float()
    x[:, 3] = 100
    others = torch.arange(64) != 3
    turned = (restored(*reference.quantise(x), 64) - x)[:, others].norm()
    scale = x.abs().amax(1, keepdim=True) / 127
    plain = ((x / scale).round() * scale - x)[:, others].norm()
    assert turned < 0.3 * plain


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_spoils_its_row(bad: float) -> None:
    x = normal(3, 130).float()
    x[1, 70] = bad
    q, scales = reference.quantise(x)
    assert scales.isnan().tolist() == [[False] * 3, [False, True, False], [False] * 3]
    assert not q[1, 64:128].any()


def test_zeros_and_what_has_no_reciprocal_are_zeros() -> None:
    x = torch.zeros(2, 64)
    x[1] = 1e-40
    q, scales = reference.quantise(x)
    assert not q.any() and not scales.any()


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("K", [2, 64, 66, 576])
def test_cpp_quantises_to_the_bit(isa: None, dtype: torch.dtype, K: int) -> None:
    """In every instruction set, also what is not finite, not contiguous, or near nothing."""
    x = normal(37, 2 * K).to(dtype)[:, ::2]
    x[0], x[1], x[2, 0] = 0, 1e-40, 1e4
    x[3, -1], x[4, 0], x[5, K // 2] = float("nan"), float("inf"), float("-inf")
    x[6, 0], x[7] = 3e38, 3e38  # 8 times the turn of the second overflows
    (q, scales), (wanted, of_wanted) = cpp.quantise(x), reference.quantise(x)
    assert torch.equal(q, wanted) and torch.equal(scales.isnan(), of_wanted.isnan())
    assert torch.equal(scales.nan_to_num(-1.0), of_wanted.nan_to_num(-1.0))
    assert scales.isnan().any(1).sum() >= 3 and (scales == 0).any(1).sum() >= 2
    assert [part.shape[0] for part in cpp.quantise(x[:0])] == [0, 0]


# ----------------------------------------------------------------------------------- the product


def products(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """The C++ product of x with the weight in 8 bits, and the reference's."""
    ours = cpp.packed_linear(x, *pack_int8(weight), len(weight), wide_out=True)
    return ours, reference.int8_linear(x, *reference.quantise(weight))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(
    ("rows", "K", "N"),
    [
        *((1, 64, 96), (5, 32, 61), (12, 34, 33), (13, 130, 200), (40, 6, 1), (3, 576, 1000)),
        *((2, 2, 32), (6, 64, 31), (7, 1536, 100), (33, 62, 70)),
    ],
)
def test_a_product_equals_the_reference(
    isa: None, dtype: torch.dtype, rows: int, K: int, N: int
) -> None:
    """To the bit in every instruction set, so also between them; a row alone has the same bits; and
    it is near the product of the weight itself.
    """
    x, weight = normal(rows, K).to(dtype), normal(N, K, seed=1).to(dtype)
    x[0] *= 1000
    x[-1, K // 2] = 300
    ours, wanted = products(x, weight)
    assert torch.equal(ours, wanted)
    packed = pack_int8(weight)
    narrow = cpp.packed_linear(x, *packed, N, wide_out=False)
    assert narrow.dtype == dtype and torch.equal(narrow, wanted.to(dtype))
    for i in range(rows):
        assert torch.equal(cpp.packed_linear(x[i : i + 1], *packed, N, wide_out=True)[0], ours[i])
    exact = x.double() @ weight.double().T
    assert (ours - exact).norm() < 0.02 * exact.norm()
    assert (products(x.roll(1, 1), weight)[0] - exact).norm() > 0.1 * exact.norm()


@pytest.mark.parametrize("values", [(127, 127), (-127, -128), (127, -128), (-127, 127)])
def test_the_largest_sums_are_exact(isa: None, values: tuple[int, int]) -> None:
    """All bytes of a row and of a weight at their ends: nothing saturates or overflows."""
    of_row, of_weight = values
    K, N = 1536, 40
    x = torch.zeros(3, K)
    x[:, ::GROUP] = of_row  # the first of a group, and nothing else: turned, all are alike
    assert (reference.quantise(x)[0] == of_row).all()
    weight = torch.full((N, K), of_weight, dtype=torch.int8)
    scales = torch.ones(N, K // GROUP)
    ours = cpp.packed_linear(x, pack_weight(weight), pack_weight(scales), N, wide_out=True)
    assert torch.equal(ours, reference.int8_linear(x, weight, scales))
    assert ours[0, 0] == pytest.approx(K * of_row * of_weight / 8)


def test_halves_are_rounded_alike(isa: None) -> None:
    """Values half way between two integers, in which a fused operation would differ."""
    draw = torch.Generator().manual_seed(0)
    halves = torch.randint(-127, 127, (400, 64), generator=draw) + 0.5
    halves[:, 0] = 127
    x = (reference.turned(halves) / 64 * torch.rand(400, 1, generator=draw)).float()
    ours, wanted = products(x, torch.eye(64))
    assert torch.equal(ours, wanted)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", FLOATS)
def test_a_row_that_is_not_finite_gives_nan(isa: None, dtype: torch.dtype, bad: float) -> None:
    """In all of its values, and in no other row's; so does such a weight's row in its column."""
    x, weight = normal(14, 100).to(dtype), normal(50, 100, seed=1).to(dtype)
    clean, _ = products(x, weight)
    x[5, 99] = bad
    ours, _ = products(x, weight)
    assert ours[5].isnan().all()
    others = torch.arange(14) != 5
    assert torch.equal(ours[others], clean[others])
    weight[7, 3] = bad
    column = products(x[others], weight)[0]
    assert column[:, 7].isnan().all() and column.isnan().sum() == 13


def test_rows_of_zeros_and_none(isa: None) -> None:
    weight = normal(33, 64)
    ours, _ = products(torch.zeros(2, 64), weight.float())
    assert torch.equal(ours, torch.zeros(2, 33))
    assert products(torch.zeros(0, 64), weight.float())[0].shape == (0, 33)


def test_threads_do_not_matter() -> None:
    x, weight = normal(9, 576).float(), normal(3000, 576, seed=1).float()
    before = torch.get_num_threads()
    try:
        found = []
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            found.append(products(x, weight)[0])
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(one, found[0]) for one in found)


def test_bad_weights_are_refused() -> None:
    x, packed = normal(2, 70).float(), pack_int8(normal(40, 70).float())
    assert packed.values.shape == (2, 128, PANEL) and packed.scales is not None
    assert packed.scales.shape == (2, 2, PANEL)
    for values, scales, N, message in (
        (packed.values, packed.scales, 70, "packed has shape"),
        (packed.values[:, :70], packed.scales, 40, "packed has shape"),
        (packed.values, packed.scales[:, :1], 40, "scales has shape"),
        (packed.values, packed.scales.double(), 40, "scales is Double"),
        (packed.values.float(), packed.scales, 40, "packed is Float"),
    ):
        with pytest.raises(ValueError, match=f"packed_linear: {message}"):
            cpp.packed_linear(x, values, scales, N, wide_out=True)


@pytest.mark.parametrize("pack", [pack_int8, pack_weight])
@pytest.mark.parametrize("rows", [0, 3, 32])
def test_a_weight_without_columns_is_refused(pack: Callable[[Tensor], Any], rows: int) -> None:
    """One without rows is none the less packed: into no panels."""
    with pytest.raises(
        ValueError, match=rf"^weight has shape \({rows}, 0\); it needs at least one"
    ):
        pack(torch.zeros(rows, 0))
    packed = pack(torch.zeros(0, 64))
    assert (packed.values if pack is pack_int8 else packed).shape == (0, 64, PANEL)


# ----------------------------------------------------------------------------------- the decoder


def model_of(dtype: torch.dtype = torch.float32, **changes: Any) -> Mistral:
    """tiny.mistral with other sizes."""
    model = random_mistral(replace(tiny.MISTRAL, **changes), 0).to(dtype)
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim > 1:
                p.mul_(5.0)
    return model


def in_8_bits(model: Mistral) -> Callable[[Tensor], Tensor]:
    """The model's own forward, (B, T) ids to (B, T, V) logits, with the reference's products."""

    def product_of(weight: Tensor) -> Callable[[Tensor], Tensor]:
        q, scales = reference.quantise(weight.detach())
        return lambda x: reference.int8_linear(x, q, scales).to(x.dtype)

    head = product_of(model.output_weight)
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.forward = product_of(module.weight)

    def forward(ids: Tensor) -> Tensor:
        with torch.no_grad():
            logits = model(ids, head=lambda hidden, weight: head(hidden))
        return logits.unflatten(0, ids.shape)

    return forward


def prompt_logits(decoder: PackedDecoder, ids: Tensor) -> Tensor:
    """The logits after every token of (T,) ids: (T, V)."""
    decoder.allocate(8, 100)
    pages = torch.arange(8, dtype=torch.int32)[None]
    return decoder.step(ids, torch.tensor([[len(ids), 0]]), pages, torch.arange(len(ids)))


def run(engine: Engine, requests: list[Request]) -> list[Response]:
    done = {request.index: response for request, response in engine.run(requests)}
    return [done[i] for i in range(len(requests))]


def requests_of(count: int) -> list[Request]:
    prompts = tiny.prompts(count, longest=40)
    return [Request(f"row{i}", prompt, i) for i, prompt in enumerate(prompts)]


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    "sizes",
    [{}, {"num_attention_heads": 6, "hidden_size": 90, "intermediate_size": 70}],
    ids=["whole groups", "parts of groups"],
)
def test_a_decoder_does_what_the_modules_do(isa: None, tied: bool, sizes: dict[str, Any]) -> None:
    """To rounding; and what it gives is not what the exact weights give."""
    changes = {"tie_word_embeddings": tied, **sizes}
    ids = torch.tensor(tiny.prompts(1, seed=3, longest=60)[0] * 60)[:60]
    exact = prompt_logits(PackedDecoder(model_of(**changes)), ids)
    found = prompt_logits(PackedDecoder(model_of(**changes), weights="int8"), ids)
    wanted = in_8_bits(model_of(**changes))(ids[None])[0]
    loss = (exact - wanted).norm()
    assert 0.002 * exact.norm() < loss < 0.1 * exact.norm()
    assert (found - wanted).norm() < 0.3 * loss


@pytest.mark.parametrize("dtype", FLOATS)
def test_bits_do_not_depend_on_company(isa: None, dtype: torch.dtype) -> None:
    decoder = PackedDecoder(model_of(dtype), weights="int8")
    requests = requests_of(9)
    results = [
        run(
            Engine(decoder, Sampling(20), [2, 5], 0, longest=60, rows=rows, step_tokens=step),
            requests,
        )
        for rows, step in ((9, 512), (1, 512), (4, 7), (9, 1))
    ]
    assert results[1:] == results[:-1]
    exact = Engine(PackedDecoder(model_of(dtype)), Sampling(20), [2, 5], 0, longest=60)
    assert run(exact, requests) != results[0]


@pytest.mark.parametrize("tied", [False, True])
def test_release_takes_the_weights(tied: bool) -> None:
    """All but the embedding, which is read as it is."""
    model = model_of(tie_word_embeddings=tied)
    kept = new_decoder(model, weights="int8")
    released = new_decoder(model, release=True, weights="int8")
    left = sum(p.numel() for p in model.parameters())
    assert left < 200 + model.embedding.weight.numel()
    found = [
        run(Engine(decoder, Sampling(9), [], 0, longest=60), requests_of(3))
        for decoder in (kept, released)
    ]
    assert found[0] == found[1]


@pytest.mark.parametrize("name", ["self_attn.o_proj", "mlp.down_proj"])
def test_bad_weights_end_a_generation(name: str) -> None:
    model = model_of()
    with torch.no_grad():
        model.blocks[1].get_submodule(name).weight[3, 5] = float("inf")
    engine = Engine(new_decoder(model, weights="int8"), Sampling(5), [], 0, longest=60)
    with pytest.raises(NumericsError, match="NaN or infinite"):
        run(engine, requests_of(2))


def test_where_it_cannot_be_it_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    for dtype in FLOATS:
        check_weights("int8", cpu, dtype)
    check_weights("exact", torch.device("cuda"), torch.float16)
    for device, dtype in ((torch.device("cuda"), torch.bfloat16), (cpu, torch.float16)):
        with pytest.raises(InputError, match=r"sampling\.weights=int8: is for policies of even"):
            check_weights("int8", device, dtype)
    odd = model_of(intermediate_size=47)
    with pytest.raises(InputError, match=r"sampling\.weights=int8: .*leave it out"):
        new_decoder(odd, weights="int8")
    monkeypatch.setenv("LDALIGN_BACKEND", "eager")
    with pytest.raises(InputError, match=r"sampling\.weights=int8: "):
        new_decoder(model_of(), weights="int8")
    assert new_decoder(model_of(), weights="exact").step_tokens == 512


@pytest.mark.slow
def test_smollm2_draws_from_nearly_the_same(smollm2_folder: Path) -> None:
    """Of real responses: nats a token from the float32 distribution, beside those of bfloat16."""
    tokenizer = load_tokenizer(smollm2_folder)
    texts = [
        tokenizer.encode_rendered(tokenizer.render(row["messages"]))
        for row in make_rows(0, "heldout", 3)
    ]

    def logps(dtype: torch.dtype, weights: Any) -> Tensor:
        model = load_model(smollm2_folder, dtype, torch.device("cpu"))
        assert isinstance(model, Mistral)
        decoder = PackedDecoder(model, weights=weights)
        found = [prompt_logits(decoder, torch.tensor(ids[:100])) for ids in texts]
        return torch.cat(found).log_softmax(1)

    exact = logps(torch.float32, "exact")

    def divergence(other: Tensor) -> float:
        return float((exact.exp() * (exact - other)).sum(1).mean())

    half = divergence(logps(torch.bfloat16, "exact"))
    for dtype in FLOATS:
        assert 0.0005 < divergence(logps(dtype, "int8")) < 0.01
    assert 0.0001 < half < 0.003
