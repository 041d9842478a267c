"""The optimizers' Triton kernels: against float64, bit for bit against the others, bytes moved."""

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import triton_backend
from bytes_moved import BytesMoved
from op_cases import Case, check
from runs import ROOT
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard, distribute_tensor, init_device_mesh
from triton_backend import NATIVE, gpu

from ldalign.kernels import cpp, eager, reference, triton_optim
from ldalign.system import distributed
from ldalign.training.optim import make_optimizer

device, interpret = triton_backend.device, triton_backend.interpret
pytestmark = [
    pytest.mark.gpu_check,
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # numpy's, on infinity and NaN
]

F, B = torch.float32, torch.bfloat16
# dtypes of weight, gradient and averages; AdamW's two may differ as well
MIXES = {
    "adamw": list(itertools.product((F, B), repeat=4)),
    "rmsprop": list(itertools.product((F, B), repeat=3)),
}
EACH = [(name, mix) for name, mixes in MIXES.items() for mix in mixes]
# of the weight, the gradient and all averages, as training has them, and bytes a weight that plain
# PyTorch moves
MOVED = {
    ("adamw", F, F): 396,
    ("adamw", F, B): 576,
    ("adamw", B, F): 488,
    ("adamw", B, B): 668,
    ("rmsprop", F, F): 348,
    ("rmsprop", F, B): 438,
    ("rmsprop", B, F): 446,
    ("rmsprop", B, B): 536,
}


def mixed(name: str, mix: tuple[torch.dtype, ...], shape: tuple[int, ...]) -> list[Tensor]:
    """A weight, its gradient and averages."""
    make = torch.Generator().manual_seed(sum(shape))
    tensors = [torch.randn(shape, generator=make) for _ in mix]
    tensors[-1] = tensors[-1].square() + 0.1
    return [x.to(dtype) for x, dtype in zip(tensors, mix, strict=True)]


def step(
    module: Any,
    name: str,
    tensors: list[Tensor],
    factor: Tensor | None,
    numbers: tuple[float, ...],
    number: int = 1,
    seed: int = 0xFEDCBA98,
) -> list[Tensor]:
    """The weight and averages after a step of `module`, from copies; the gradient in front goes.

    numbers: learning rate, decay, AdamW's first beta, the share of the old square, eps.
    """
    rate, decay, beta1, share, eps = numbers
    p, grad, *averages = (x.clone() for x in tensors)
    if name == "adamw":
        module.adamw_(p, grad, *averages, factor, rate, decay, beta1, share, eps, number, seed)
    else:
        module.rmsprop_(p, grad, *averages, factor, rate, decay, share, eps, seed)
    return [p, *averages]


def exact(name: str, tensors: list[Tensor], numbers: tuple[float, ...]) -> list[Tensor]:
    rate, decay, beta1, share, eps = numbers
    *tensors, factor = tensors
    if name == "adamw":
        return list(reference.adamw(*tensors, factor, rate, decay, beta1, share, eps, 3))
    return list(reference.rmsprop(*tensors, factor, rate, decay, share, eps))


@pytest.mark.parametrize(
    ("name", "mix", "shape"),
    [(name, mix, (37, 73)) for name, mix in EACH]
    + [(name, MIXES[name][-1], shape) for name in MIXES for shape in ((1,), (1024,), (0, 3))],
    ids=str,
)
def test_step_against_float64(
    name: str, mix: tuple[torch.dtype, ...], shape: tuple[int, ...], device: str
) -> None:
    """A large step, so that a weight that stays where it is would be seen in bfloat16 too."""
    numbers = (0.5, 0.1, 0.9, 0.99, 1e-3)
    inputs = [x.to(device) for x in (*mixed(name, mix, shape), torch.tensor(0.37))]

    def oracle(*x: Tensor) -> list[Tensor]:
        if x[0].dtype == torch.float64:
            return exact(name, list(x), numbers)
        return step(eager, name, list(x[:-1]), x[-1], numbers, 3)

    case = Case(step, oracle, [], values=len(mix) - 1)
    ours = step(gpu, name, inputs[:-1], inputs[-1], numbers, 3)
    check(case, ours, inputs)
    if len(shape) == 2 and shape[0]:
        before = [inputs[0], *inputs[2:-1]]
        for i, kept in enumerate(before):
            with pytest.raises(AssertionError, match=f"result {i}"):
                check(case, [*ours[:i], kept, *ours[i + 1 :]], inputs)
                pytest.fail(f"a result {i} that stays as it was passes")


@pytest.mark.parametrize(("name", "mix"), EACH, ids=str)
def test_step_has_the_bits_of_the_others(
    name: str, mix: tuple[torch.dtype, ...], device: str
) -> None:
    """On numbers of few bits, whose products and sums are exact, in one rounding or two. What is
    left, square root, quotient, last sum, the factor's rounding and the random bits, is the same in
    plain PyTorch and C++.
    """
    make = torch.Generator().manual_seed(1)

    def grid(low: float, high: float, bits: int, dtype: torch.dtype) -> Tensor:
        x = torch.rand(41, 77, generator=make) * (high - low) + low
        return ((x * 2**bits).round() / 2**bits).to(dtype)

    weight, gradient, *averages = mix
    tensors = [
        grid(1, 2, 7, weight),
        grid(1, 2, 3 if gradient == F else 7, gradient),
        *(grid(1, 2, 7, dtype) for dtype in averages),
    ]
    numbers = (0.25, 0.5, 0.5, 0.75, 0.0)
    factor = torch.tensor(13 / 32)
    ours = step(gpu, name, [x.to(device) for x in tensors], factor.to(device), numbers)
    ours = [x.cpu() for x in ours]
    theirs = step(eager, name, tensors, factor, numbers)
    if weight == F:  # torch's square root on a CPU, MKL's, may be the neighbour of the right one
        torch.testing.assert_close(ours[0], theirs[0], rtol=0, atol=2**-22)
        theirs[0] = ours[0]
    assert all(map(torch.equal, ours, theirs))
    if cpp.available() and weight == gradient and len(set(averages)) == 1:
        assert all(map(torch.equal, ours, step(cpp, name, tensors, factor, numbers)))


@pytest.mark.parametrize(("name", "mix"), EACH, ids=str)
def test_random_bits_only_for_bfloat16(
    name: str, mix: tuple[torch.dtype, ...], device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """None are made for a step that stores float32 alone, whatever its gradient is."""
    if NATIVE:
        pytest.skip("a compiled kernel cannot be watched")
    made = []
    kernel = triton_optim._random_bits

    def watched(*arguments: Any) -> Any:
        made.append(arguments)
        return kernel(*arguments)

    monkeypatch.setattr(triton_optim, "_random_bits", watched)
    tensors = mixed(name, mix, (5,))
    step(triton_optim, name, tensors, None, (0.1, 0.1, 0.9, 0.99, 1e-8))
    stored = (mix[0], *mix[2:])
    assert len(made) == stored.count(B)


def test_infinite_and_nan_stay(device: str) -> None:
    p = torch.tensor([torch.inf, -torch.inf, torch.nan, 1.0], dtype=B, device=device)
    tensors = [p, torch.ones_like(p), torch.zeros_like(p), torch.zeros_like(p)]
    p, *_ = step(gpu, "adamw", tensors, None, (0.1, 0.0, 0.9, 0.99, 1e-8))
    assert p[:2].tolist() == [torch.inf, -torch.inf] and p[2].isnan() and p[3] < 1


def test_other_shapes_and_strides_are_refused(device: str) -> None:
    p, numbers = torch.ones(4, 6, device=device), (0.1, 0.0, 0.9, 0.99, 1e-8)
    for wrong in (torch.ones(6, 4, device=device).T, torch.ones(4, 5, device=device)):
        with pytest.raises(ValueError, match="expected dense ones of shape"):
            gpu.rmsprop_(p, wrong, torch.zeros_like(p), None, *numbers[:2], *numbers[3:], 0)


# -------------------------------------------------------------------------- through the Optimizer


@pytest.fixture
def triton(device: str, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("LDALIGN_BACKEND", "triton")
    return device


def layer(device: str, dtype: torch.dtype) -> nn.Linear:
    torch.manual_seed(3)
    return nn.Linear(64, 48).to(device, dtype)


def with_gradient(model: nn.Module, seed: int) -> None:
    make = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        whole = torch.randn(p.shape, generator=make).to(p.device, p.dtype)
        p.grad = (
            distribute_tensor(whole, p.device_mesh, [Shard(0)]) if isinstance(p, DTensor) else whole
        )


@pytest.fixture
def one_rank(in_process: None) -> Iterator[None]:
    distributed.start("cuda" if NATIVE else "cpu")
    yield


@pytest.mark.parametrize("name", MIXES)
def test_a_sharded_parameter_is_updated_where_it_lies(
    name: str, triton: str, one_rank: None
) -> None:
    mesh = init_device_mesh(triton, (1,))
    plain, cut = layer(triton, B), layer(triton, B)
    for key, p in list(cut.named_parameters()):
        setattr(cut, key, nn.Parameter(distribute_tensor(p.detach(), mesh, [Shard(0)])))
    for model in (plain, cut):
        optimizer = make_optimizer(model, name, 1e-2, 0.1, state_dtype=B, seed=5)  # type: ignore[arg-type]
        for number in range(2):
            with_gradient(model, number)
            optimizer.step(distributed.clip_grad_norm(model, 0.5)[1])
    for a, b in zip(plain.parameters(), cut.parameters(), strict=True):
        assert isinstance(b, DTensor) and torch.equal(a, b.to_local())


@pytest.mark.skipif(NATIVE, reason="only the interpreter counts loads and stores")
@pytest.mark.parametrize("key", MOVED, ids=str)
def test_bytes_moved_a_weight(
    key: tuple[str, torch.dtype, torch.dtype], triton: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A clipped step moves what it must, each number once in, once out (docs/kernels.md)."""
    name, dtype, state = key
    size, averages = dtype.itemsize, len(MIXES[name][0]) - 2
    least = 3 * size + 2 * averages * state.itemsize
    for backend, expected in (("eager", MOVED[key]), ("triton", least)):
        monkeypatch.setenv("LDALIGN_BACKEND", backend)
        model = layer("cpu", dtype)
        weights = sum(p.numel() for p in model.parameters())
        optimizer = make_optimizer(model, name, 1e-2, 0.1, state_dtype=state)  # type: ignore[arg-type]
        with_gradient(model, 0)
        optimizer.step()  # makes the averages
        with BytesMoved() as norm:
            factor = distributed.clip_grad_norm(model, 0.5)[1]
        assert norm.total / weights == pytest.approx(size, abs=0.1)
        with BytesMoved() as moved:
            optimizer.step(factor)
        assert moved.total / weights == pytest.approx(expected, rel=0.01), backend
    assert moved.total <= 1.2 * least * weights
    title, kinds = {"adamw": "AdamW", "rmsprop": "RMSprop"}[name], f"{dtype} | {state}"
    row = f"| {title} | {kinds.replace('torch.', '')} | {MOVED[key]} | {least} |"
    assert row in (ROOT / "docs/kernels.md").read_text()


@pytest.mark.parametrize("name", MIXES)
def test_no_host_waits_for_a_clipped_step(name: str) -> None:
    """A tensor on device meta cannot be looked at: doing so raises."""
    model = nn.Linear(8, 8, device="meta")
    for p in model.parameters():
        p.grad = torch.empty_like(p)
    norm, factor = distributed.clip_grad_norm(model, 1.0)
    assert norm.is_meta and factor.is_meta
    with pytest.raises(RuntimeError):
        float(norm)
    make_optimizer(model, name, 0.1).step(factor)  # type: ignore[arg-type]
