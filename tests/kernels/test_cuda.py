"""The CUDA C++ backend: it compiles with no spills; its ops on the CPU and on a GPU.

On the CPU the same kernels and the same host code run under tests/support/cuda_on_cpu, which has
the few parts of CUDA they use as plain C++: every index, sum and product is checked without a GPU;
speed, memory and the compiler's output are not. The error rule is that of test_ops.py.
"""

import ast
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from op_cases import OPTIONS
from torch import Tensor
from torch.utils.cpp_extension import COMMON_NVCC_FLAGS

from ldalign.kernels import cuda, reference
from ldalign.kernels.loss_options import DPO

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ROOT / "csrc" / "cuda"
ON_CPU = ROOT / "tests/support/cuda_on_cpu"
TORCH = Path(torch.__file__).parent
TORCH_HEADERS = [
    "-isystem",
    f"{TORCH}/include",
    "-isystem",
    f"{TORCH}/include/torch/csrc/api/include",
]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
IGNORED = cuda.IGNORE_INDEX
Results = list[Tensor]

needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")


def shell(*command: str | Path) -> str:
    """What the command prints; the test fails with it if the command does."""
    done = subprocess.run(
        list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


# ---------------------------------------------------------------------------------------- compiling


# The most shared memory in KiB: of one block that asks for no more than it declares, and of all
# blocks on a multiprocessor, each with one KiB of the system's.
STATIC_SHARED = 48
SHARED = {"8.0": 164, "9.0": 228, "10.0": 228, "12.0": 100}
KERNELS = {"linear_logprob": 14, "weighted_dpo": 2}


def test_every_kernel_and_architecture_is_checked() -> None:
    assert {path.stem for path in SOURCES.glob("*.cu")} == set(KERNELS)
    built_for = re.search(
        r"^ARCHITECTURES = (.*?\))", (ROOT / "setup.py").read_text(), re.MULTILINE
    )
    assert built_for and ast.literal_eval(built_for[1]) == tuple(SHARED)
    shared = "\n".join(path.read_text() for path in SOURCES.iterdir())
    assert "extern __shared__" not in shared and "kernel<<<grid, kThreads, 0, stream>>>" in shared


@needs_nvcc
@pytest.mark.gpu_check
@pytest.mark.slow
@pytest.mark.parametrize("name", KERNELS)
def test_kernels_compile_without_spills(name: str, tmp_path: Path) -> None:
    """With the flags that torch's builder adds, which take CUDA's conversions of half precision
    away. No torch on the include path: the kernels need none.
    """
    known = shell("nvcc", "--list-gpu-arch").split()
    limits = {f"{float(c) * 10:.0f}": limit for c, limit in SHARED.items()}
    limits = {arch: limit for arch, limit in limits.items() if f"compute_{arch}" in known}
    assert {"80", "90"} <= limits.keys()
    flags = [*COMMON_NVCC_FLAGS, "-std=c++20", "-O3", "-Xptxas", "-v", "-Werror", "all-warnings"]
    flags += [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in limits]
    said = shell("nvcc", *flags, "-c", SOURCES / f"{name}.cu", "-o", tmp_path / "kernels.o")
    kernels = re.findall(
        r"entry function '(\w+)' for 'sm_(\d+)'.*?(\d+) bytes stack frame, (\d+) bytes spill "
        r"stores, (\d+) bytes spill loads.*?Used (\d+) registers([^\n]*)",
        said,
        re.DOTALL,
    )
    assert Counter(kernel[1] for kernel in kernels) == dict.fromkeys(limits, KERNELS[name]), said
    for kernel, arch, stack, stores, loads, registers, rest in kernels:
        found = re.search(r"(\d+) bytes smem", rest)
        shared = int(found[1]) / 1024 if found else 0
        what = f"sm_{arch} {kernel}: {registers} registers, {shared} KiB shared"
        print(what)
        assert (int(stores), int(loads), int(stack)) == (0, 0, 0), what
        # Three blocks of 256 threads to a multiprocessor.
        assert int(registers) <= 80, what
        assert shared <= STATIC_SHARED and 3 * (shared + 1) <= limits[arch], what


@needs_nvcc
@pytest.mark.gpu_check
@pytest.mark.slow
def test_host_code_compiles(tmp_path: Path) -> None:
    """Against CUDA's own headers and torch's, a CPU torch's too: that lacks one file, which its
    CUDA build makes.
    """
    made = tmp_path / "c10" / "cuda" / "impl" / "cuda_cmake_macros.h"
    made.parent.mkdir(parents=True)
    made.write_text("#define C10_CUDA_BUILD_SHARED_LIBS\n")
    out = tmp_path / "bindings.o"
    shell(
        "nvcc",
        "-std=c++20",
        *TORCH_HEADERS,
        "-isystem",
        tmp_path,
        "-c",
        SOURCES / "bindings.cpp",
        "-o",
        out,
    )
    assert out.exists()


# -------------------------------------------------------------------------------- where the ops run


@pytest.fixture(scope="session")
def ops_on_cpu(tmp_path_factory: pytest.TempPathFactory) -> None:
    if hasattr(torch.ops.ldalign_cuda, "pair_loss"):
        pytest.skip("the real ldalign_cuda ops are loaded, which this library would define again")
    if shutil.which("g++") is None:
        pytest.skip("needs g++")
    library = tmp_path_factory.mktemp("cuda_on_cpu") / "ops.so"
    shell(
        "g++",
        "-std=c++20",
        "-O1",
        "-fPIC",
        "-shared",
        f"-I{ON_CPU}",
        *TORCH_HEADERS,
        ON_CPU / "ops.cpp",
        f"-L{TORCH}/lib",
        "-ltorch_cpu",
        "-lc10",
        f"-Wl,-rpath,{TORCH}/lib",
        "-o",
        library,
    )
    torch.ops.load_library(str(library))


@pytest.fixture(
    params=[
        pytest.param("cpu", marks=pytest.mark.slow),
        pytest.param("cuda", marks=pytest.mark.gpu),
    ]
)
def device(request: pytest.FixtureRequest) -> Iterator[str]:
    """Where the test runs: the kernels as C++ on the CPU, where memory that nothing was written to
    is NaN; or the real ones on a GPU.
    """
    if request.param == "cpu":
        request.getfixturevalue("ops_on_cpu")
        torch.use_deterministic_algorithms(True)  # which fills what at::empty gives
    elif not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    elif not cuda.available():
        pytest.fail(f"a CUDA device, and yet: {cuda.why_not()}")
    yield str(request.param)
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def full_precision() -> Iterator[None]:
    """Keeps float32 products in float32: the error rule is no rule for TF32, a run's choice."""
    kept = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(kept)


def normal(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    return (
        torch.randn(
            shape, generator=torch.Generator().manual_seed(seed + sum(shape)), dtype=torch.float64
        )
        * scale
    )


class Case:
    """One head and one batch, in one dtype on one device; beside it float64 and eager PyTorch."""

    beta, scale = 0.3, 0.7
    options = DPO

    def __init__(
        self, N: int, D: int, V: int, dtype: torch.dtype, device: str, ignored: float = 0.0
    ) -> None:
        wide = reference.accumulate_dtype(dtype)
        random = torch.Generator().manual_seed(N + V)
        self.hidden = normal(N, D, scale=2).to(device, dtype)
        self.weight = normal(V, D, seed=1, scale=D**-0.5).to(device, dtype)
        self.target = torch.randint(V, (N,), generator=random).to(device)
        self.kept = (torch.rand(N, generator=random) >= ignored).to(device)
        self.target[~self.kept] = IGNORED
        self.grad = (normal(N, seed=9) * torch.linspace(0.1, 2, N, dtype=torch.float64)).to(
            device, wide
        )
        # Five pairs of uneven lengths, an empty response among them
        cuts = torch.sort(torch.randint(N + 1, (9,), generator=random)).values.tolist()
        self.lengths = [b - a for a, b in zip([0, *cuts], [*cuts, N], strict=True)]
        exact = self.sums(self.logp(self.hidden.double(), self.weight.double()))
        # so that Delta is about 1
        self.reference = (exact + normal(10, seed=3).to(device)).to(wide)
        self.pair_weight = normal(5, seed=5).abs().to(device, wide)

    def pair_arguments(
        self,
    ) -> tuple[Tensor, Tensor, Tensor, list[int], Tensor, Tensor, float, float]:
        lengths, reference_, weight = self.lengths, self.reference, self.pair_weight
        return (
            self.hidden,
            self.weight,
            self.target,
            lengths,
            reference_,
            weight,
            self.beta,
            self.scale,
        )

    def logp(self, hidden: Tensor, weight: Tensor) -> Tensor:
        return reference.linear_logprob(hidden, weight, self.target.clamp(min=0)) * self.kept

    def sums(self, logp: Tensor) -> Tensor:
        return torch.stack([run.sum() for run in logp.split(self.lengths)])

    def pair(self, logp: Tensor) -> Tensor:
        s, r = self.sums(logp), self.reference.to(logp.dtype)
        weight = self.pair_weight.to(logp.dtype)
        tokens = torch.tensor(self.lengths, device=s.device)
        given = s, r, tokens, weight, self.beta, self.options
        return self.scale * reference.pair_loss(*given)[0]

    def eager(
        self,
        value: Callable[[Tensor], Tensor],
        loss: Callable[[Tensor], Tensor],
        dtype: torch.dtype | None = None,
    ) -> Results:
        """value(logp), and the gradients of loss(logp), by autograd."""
        leaves = [
            x.detach().to(dtype or x.dtype).requires_grad_() for x in (self.hidden, self.weight)
        ]
        logp = self.logp(*leaves)
        return [value(logp).detach(), *torch.autograd.grad(loss(logp), leaves)]


def run_head(case: Case) -> Results:
    logp, lse = cuda.linear_logprob(case.hidden, case.weight, case.target)
    dh, dw = cuda.linear_logprob_backward(
        case.grad, case.hidden, case.weight, case.target, lse, True, True
    )
    assert dh is not None and dw is not None
    return [logp, dh, dw]


def run_pair(case: Case) -> Results:
    sums, dh, dw = cuda.pair_loss(*case.pair_arguments(), True, True, case.options)
    assert dh is not None and dw is not None
    return [sums, dh, dw]


def run_sft(case: Case) -> Results:
    logp, dh, dw = cuda.sft_loss(case.hidden, case.weight, case.target, case.scale, True, True)
    assert dh is not None and dw is not None
    return [logp, dh, dw]


OPS: dict[str, tuple[Callable[[Case], Results], Callable[..., Results]]] = {
    "head": (
        run_head,
        lambda c, dtype=None: c.eager(lambda p: p, lambda p: (p * c.grad.to(p.dtype)).sum(), dtype),
    ),
    "pair": (run_pair, lambda c, dtype=None: c.eager(c.sums, c.pair, dtype)),
    "sft": (
        run_sft,
        lambda c, dtype=None: c.eager(lambda p: p, lambda p: -c.scale * p.sum(), dtype),
    ),
}


def check(name: str, case: Case, ours: Results | None = None) -> None:
    run, eager = OPS[name]
    exact, theirs = eager(case, torch.float64), eager(case)
    for i, (a, b, e) in enumerate(zip(ours or run(case), theirs, exact, strict=True)):
        what = f"{name}, {('value', 'dh', 'dw')[i]}"
        assert a.shape == e.shape and a.dtype == b.dtype, what
        error, allowed = (a.double() - e).norm(), (b.double() - e).norm()
        if a.dtype == torch.float64:
            assert error <= 1e-12 * (1 + e.norm()), f"{what}: {error:.1e}"
        else:
            floor = (
                (4 if case.hidden.dtype == torch.float32 else 1)
                * torch.finfo(a.dtype).eps
                * e.norm()
            )
            assert error <= max((3 if i else 2) * allowed, floor), (
                f"{what}: {error:.1e} against {allowed:.1e}"
            )


# ---------------------------------------------------------------------------- against the reference

SHAPES = {
    "aligned": (64, 32, 128),
    "ragged": (37, 13, 101),
    "one row": (1, 8, 33),
    "vocabulary": (11, 8, 50_257),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", OPS)
def test_against_reference(name: str, shape: str, dtype: torch.dtype, device: str) -> None:
    check(name, Case(*SHAPES[shape], dtype, device))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", ["aligned", "ragged", "vocabulary"])
@pytest.mark.parametrize("name", OPS)
def test_in_pieces(
    name: str, shape: str, dtype: torch.dtype, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """8 tokens at a time in bfloat16, 2 in float64: groups of pairs, pairs visited
    twice, sums of products.
    """
    monkeypatch.setattr(cuda, "WORKSPACE_BYTES", 16 * SHAPES[shape][2])
    check(name, Case(*SHAPES[shape], dtype, device))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("N", [41, 48, 64, 72])
@pytest.mark.parametrize("name", ["pair", "sft"])
def test_scores_in_the_memory_of_dw(
    name: str, N: int, dtype: torch.dtype, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More tokens than the workspace holds, not more than it and dw hold; over two
    slabs of the vocabulary.
    """
    V, D = 1_500, 64
    size = torch.finfo(dtype).bits // 8
    monkeypatch.setattr(cuda, "WORKSPACE_BYTES", 40 * V * size)
    check(name, Case(N, D, V, dtype, device))


@pytest.mark.parametrize("ignored", [0.5, 1.0])
@pytest.mark.parametrize("name", ["head", "sft"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_ignored_rows_add_nothing(
    name: str, ignored: float, dtype: torch.dtype, device: str
) -> None:
    case = Case(*SHAPES["ragged"], dtype, device, ignored)
    results = OPS[name][0](case)
    check(name, case, results)
    logp, dh, dw = results
    assert not logp[~case.kept].any() and not dh[~case.kept].any()
    if ignored == 1:
        assert not dw.any()
    # Whatever a caller says the log-sum-exp of an ignored row is
    lse = torch.zeros_like(logp)
    dh = cuda.linear_logprob_backward(
        case.grad, case.hidden * 1e4, case.weight, case.target, lse, True, False
    )[0]
    assert dh is not None and not dh[~case.kept].any()


@pytest.mark.parametrize("ignore_index", [-1, 7])
def test_any_ignore_index(ignore_index: int, device: str) -> None:
    case = Case(*SHAPES["ragged"], torch.float32, device)
    expected = cuda.linear_logprob(case.hidden, case.weight, case.target)[0]
    case.target[::3] = ignore_index
    logp = cuda.linear_logprob(case.hidden, case.weight, case.target, ignore_index)[0]
    counted = case.target != ignore_index
    assert torch.equal(logp[counted], expected[counted]) and not logp[~counted].any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", OPTIONS)
def test_other_losses(name: str, dtype: torch.dtype, device: str) -> None:
    case = Case(*SHAPES["ragged"], dtype, device)
    assert 0 in case.lengths, "an empty response is among them"
    case.options = OPTIONS[name]
    check("pair", case)


@pytest.mark.parametrize("options", [(), ("ipo",), ("sigmoid", 0.2)], ids=str)
@pytest.mark.parametrize("P", [0, 1, 5, 1_000])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_weighted_dpo(P: int, dtype: torch.dtype, options: tuple[Any, ...], device: str) -> None:
    inputs = [normal(P, seed=i, scale=40).to(device, dtype) for i in range(4)]
    weight = normal(P, seed=5).abs().to(device, dtype)
    leaves = [inputs[0].double().requires_grad_(), *(x.double() for x in inputs[1:])]
    loss, metrics = reference.weighted_dpo_loss(*leaves, weight.double(), 0.2, *options)
    expected = [loss, metrics["loss"], metrics["rewards/chosen"], metrics["rewards/rejected"]]
    expected.append(torch.autograd.grad(loss, leaves[0])[0])
    for ours, e in zip(cuda.weighted_dpo(*inputs, weight, 0.2, *options), expected, strict=True):
        assert ours.shape == e.shape and ours.dtype == dtype
        assert (ours - e).norm() <= 32 * torch.finfo(dtype).eps * e.norm()


def test_weighted_dpo_far_out(device: str) -> None:
    """Delta of +-1e4, 0 and NaN: by hand."""
    real = torch.tensor([1e4, -1e4, 0.0, float("nan")], device=device)
    zero, weight = torch.zeros_like(real), torch.tensor([1.0, 2.0, 3.0, 1.0], device=device)
    loss, each, _, _, coefficient = cuda.weighted_dpo(real, zero, zero, zero, weight, 1.0)
    nan = float("nan")
    torch.testing.assert_close(each.cpu(), torch.tensor([0.0, 1e4, 0.6931472, nan]), equal_nan=True)
    torch.testing.assert_close(
        coefficient.cpu(), torch.tensor([0.0, -2.0, -1.5, nan]), equal_nan=True
    )
    assert loss.isnan()


# --------------------------------------------------------------------------------------- properties


@pytest.mark.parametrize("workspace", [cuda.WORKSPACE_BYTES, 1])
@pytest.mark.parametrize("name", OPS)
def test_repeats_strides_and_inputs(
    name: str, workspace: int, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same bits each time and for any strides, an expanded gradient, and
    nothing written to an input.
    """
    monkeypatch.setattr(cuda, "WORKSPACE_BYTES", workspace)
    case = Case(*SHAPES["ragged"], torch.bfloat16, device)
    case.grad = torch.tensor(0.7, device=device).expand(len(case.grad))
    tensors = ["hidden", "weight", "target", "grad", "reference", "pair_weight"]
    kept = {x: getattr(case, x).clone() for x in tensors}
    first, second = OPS[name][0](case), OPS[name][0](case)
    assert all(torch.equal(getattr(case, x), kept[x]) for x in tensors)
    for x in tensors:
        spread = torch.stack([kept[x], kept[x] + 1], -1)[..., 0]
        assert not spread.is_contiguous()
        setattr(case, x, spread)
    for a, b, c in zip(first, second, OPS[name][0](case), strict=True):
        assert torch.equal(a, b) and torch.equal(a, c)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("workspace", [cuda.WORKSPACE_BYTES, 1])
@pytest.mark.parametrize("name", OPS)
def test_only_what_is_needed(
    name: str, workspace: int, dtype: torch.dtype, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One gradient alone, or none: None for the other, and the same value,
    whichever way the work is cut.
    """
    monkeypatch.setattr(cuda, "WORKSPACE_BYTES", workspace)
    case = Case(*SHAPES["ragged"], dtype, device)
    both = OPS[name][0](case)
    lse = cuda.linear_logprob(case.hidden, case.weight, case.target)[1]
    for need in ((True, False), (False, True), (False, False)):
        if name == "head":
            arguments = (case.grad, case.hidden, case.weight, case.target, lse)
            results = [both[0], *cuda.linear_logprob_backward(*arguments, *need)]
        elif name == "pair":
            results = [*cuda.pair_loss(*case.pair_arguments(), *need)]
        else:
            results = [*cuda.sft_loss(case.hidden, case.weight, case.target, case.scale, *need)]
        assert [x is not None for x in results] == [True, *need]
        filled = [x if x is not None else full for x, full in zip(results, both, strict=True)]
        check(name, case, filled)


@pytest.mark.parametrize("name", OPS)
def test_no_rows(name: str, device: str) -> None:
    value, dh, dw = OPS[name][0](Case(0, 8, 33, torch.float32, device))
    assert len(value) == (10 if name == "pair" else 0) and not value.any()
    assert dh.shape == (0, 8) and dw.shape == (33, 8) and not dw.any()


def test_no_pairs(device: str) -> None:
    nothing = torch.zeros(0, device=device)
    weight = normal(33, 8).to(device, torch.float32)
    sums, dh, dw = cuda.pair_loss(
        weight[:0], weight, nothing.long(), [], nothing, nothing, 0.1, 1.0, True, True
    )
    assert (
        sums.shape == (0,)
        and dh is not None
        and dh.shape == (0, 8)
        and dw is not None
        and not dw.any()
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_huge_scores(dtype: torch.dtype, device: str) -> None:
    """Scores of +-1e4: exact values, finite gradients, and a target with no chance is -2e4
    (rounded), not -inf.
    """
    hidden = torch.tensor([[1e4], [-1e4]] * 6, device=device, dtype=dtype)
    weight = torch.tensor([[1.0], [-1.0], *[[0.5]] * 99], device=device, dtype=dtype)
    target = torch.zeros(12, dtype=torch.int64, device=device)
    logp, dh, dw = cuda.sft_loss(hidden, weight, target, -1.0, True, True)
    assert logp.tolist() == [0.0, 2 * hidden[1].item()] * 6
    assert dh is not None and dh.flatten().tolist() == [0.0, 2.0] * 6
    assert dw is not None and dw.isfinite().all()


@pytest.mark.parametrize("name", OPS)
def test_nan_comes_out_as_nan(name: str, device: str) -> None:
    """In the row it is in (of a response, all rows of the pair), and not in others."""
    case = Case(*SHAPES["aligned"], torch.bfloat16, device)
    case.lengths = [8, 8] * 4
    case.reference, case.pair_weight = torch.zeros(8, device=device), torch.ones(4, device=device)
    case.hidden[20, 3] = float("nan")
    value, dh, dw = OPS[name][0](case)
    bad = {"pair": slice(2, 3)}.get(name, slice(20, 21))
    rows = {"pair": slice(16, 32)}.get(name, slice(20, 21))
    assert value[bad].isnan().all() and value.isnan().sum() == 1
    assert dh[rows].isnan().all() and dh.isnan().any(1).sum() == len(dh[rows])
    assert dw.isnan().any()


@pytest.mark.parametrize("name", OPS)
def test_the_check_can_fail(name: str, device: str) -> None:
    """Zeros, two rows swapped, a pair's weight dropped: each must be seen, in the
    value and in both gradients.
    """
    case = Case(*SHAPES["ragged"], torch.bfloat16, device)
    good = OPS[name][0](case)
    check(name, case, good)
    for i in range(3):
        rows = good[i].double().flatten(1).norm(dim=1) if i else good[i].double().abs()
        a, b = rows.argmax(), rows.argmin()
        swapped = good[i].clone()
        swapped[a], swapped[b] = good[i][b], good[i][a]
        for bad in (torch.zeros_like(good[i]), swapped):
            with pytest.raises(AssertionError):
                check(name, case, [bad if j == i else x for j, x in enumerate(good)])
    if name == "pair":
        case.pair_weight, weight = torch.ones_like(case.pair_weight), case.pair_weight
        unweighted = run_pair(case)
        case.pair_weight = weight
        with pytest.raises(AssertionError):
            check(name, case, unweighted)


def test_arguments_are_named(device: str) -> None:
    case = Case(4, 8, 33, torch.float32, device)
    h, w, t = case.hidden, case.weight, case.target
    one = torch.ones(1, device=device)
    for message, call in {
        r"hidden: must be \(N, D\)": lambda: cuda.linear_logprob(h[0], w, t),
        r"weight: must be \(V, D\) with D = 8": lambda: cuda.linear_logprob(h, w[:, :7], t),
        "weight: must have hidden's dtype": lambda: cuda.linear_logprob(h, w.double(), t),
        "weight: V must be at least 1": lambda: cuda.linear_logprob(h, w[:0], t),
        r"target: must be \(N,\) with N = 4": lambda: cuda.linear_logprob(h, w, t[:3]),
        "target: must be int64": lambda: cuda.linear_logprob(h, w, t.int()),
        "lengths: must be of an even": lambda: cuda.pair_loss(
            h, w, t, [4], one, one, 0.1, 1.0, True, True
        ),
        "lengths: must add up to hidden's N = 4": lambda: cuda.pair_loss(
            h, w, t, [1, 2], one.expand(2), one, 0.1, 1.0, True, True
        ),
        "lengths: must not be negative": lambda: cuda.pair_loss(
            h, w, t, [5, -1], one.expand(2), one, 0.1, 1.0, True, True
        ),
        r"reference: must be of shape \(2,\)": lambda: cuda.pair_loss(
            h, w, t, [2, 2], one, one, 0.1, 1.0, True, True
        ),
        "ref_real: must be": lambda: cuda.weighted_dpo(one, one, one.double(), one, one, 0.1),
        "hidden: dtype must be": lambda: cuda.linear_logprob(h.long(), w.long(), t),
    }.items():
        with pytest.raises(RuntimeError, match=message):
            call()


# ---------------------------------------------------------------------------------- a real GPU only


@pytest.mark.gpu
@pytest.mark.parametrize("device", ["cuda"], indirect=True)
@pytest.mark.parametrize("V", [32_000, 49_152, 50_257, 128_256])
@pytest.mark.parametrize("name", OPS)
def test_real_vocabularies(name: str, V: int, device: str) -> None:
    check(name, Case(24, 512, V, torch.bfloat16, device))


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.parametrize("device", ["cuda"], indirect=True)
@pytest.mark.parametrize("V", [32_000, 128_256])
def test_memory_beyond_the_gradients(V: int, device: str) -> None:
    """At most 1 GiB at 8,192 tokens and D = 4,096; and nothing waits for the GPU."""
    hidden = torch.randn(8_192, 4_096, device=device, dtype=torch.bfloat16)
    weight = torch.randn(V, 4_096, device=device, dtype=torch.bfloat16) / 64
    target = torch.randint(V, (8_192,), device=device)
    reference_, pair_weight = torch.zeros(16, device=device), torch.ones(8, device=device)

    def call() -> tuple[Tensor | None, ...]:
        return cuda.pair_loss(
            hidden, weight, target, [512] * 16, reference_, pair_weight, 0.1, 0.125, True, True
        )

    call()  # cuBLAS takes its own workspace once
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    torch.cuda.set_sync_debug_mode("error")
    try:
        results = call()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    made = sum(x.numel() * x.element_size() for x in results if x is not None)
    extra = torch.cuda.max_memory_allocated() - before - made
    print(f"V = {V}: {extra / 2**20:.0f} MiB beyond the results")
    assert extra <= 2**30


@pytest.mark.gpu
@pytest.mark.parametrize("device", ["cuda"], indirect=True)
@pytest.mark.parametrize("word", [33, -1, 2**40])
def test_target_out_of_range_stops_the_kernel(word: int, device: str) -> None:
    """In a process of its own: the CUDA context does not survive."""
    program = (
        "import torch; from ldalign.kernels import cuda; assert cuda.available()\n"
        "x = torch.ones(4, 8, device='cuda'); w = torch.ones(33, 8, device='cuda')\n"
        f"cuda.linear_logprob(x, w, torch.tensor([0, 1, 2, {word}], device='cuda')); "
        "torch.cuda.synchronize()"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode != 0
    assert (
        "target out of range" in done.stdout + done.stderr and "device-side assert" in done.stderr
    )
