"""The sampler: C++ and eager against the reference in float64; the reference against others; what
may be asked of it.
"""

from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from ldalign.generation.sampling import Sampling, blank_unsound, sample
from ldalign.kernels import cpp, eager, reference

NONE = torch.empty(0, 0, dtype=torch.int64)
ISAS = cpp.build_info()["isas"] if cpp.available() else []
# temperature, top_k, top_p, min_p, penalty
SETTINGS = [
    (0.0, 0, 1.0, 0.0, 1.0),
    (1.0, 0, 1.0, 0.0, 1.0),
    (0.6, 0, 1.0, 0.0, 1.0),
    (1.7, 20, 1.0, 0.0, 1.0),
    (1.0, 1, 1.0, 0.0, 1.0),
    (1.0, 0, 0.3, 0.0, 1.0),
    (1.4, 0, 0.97, 0.0, 1.0),
    (0.8, 40, 0.9, 0.0, 1.0),
    (1.0, 0, 1.0, 0.05, 1.0),
    (1.0, 0, 1.0, 0.0, 1.3),
    (1.2, 50, 0.95, 0.02, 0.8),
    (0.0, 0, 1.0, 0.0, 1.5),
]


@pytest.fixture(params=["eager", *ISAS])
def backend(request: pytest.FixtureRequest) -> Iterator[ModuleType]:
    if request.param == "eager":
        yield eager
        return
    before = cpp.build_info()["isa"]
    cpp.set_isa(request.param)
    yield cpp
    cpp.set_isa(before)


def inputs(rows: int, vocabulary: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(rows, vocabulary, generator=draw)
    uniform = torch.rand(rows, generator=draw, dtype=torch.float64)
    seen = torch.randint(-1, vocabulary, (rows, 30), generator=draw)
    return logits, uniform, seen


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize(("rows", "vocabulary"), [(60, 50), (41, 1000), (1, 49_152), (7, 32_003)])
def test_like_the_reference(backend: ModuleType, settings: Any, rows: int, vocabulary: int) -> None:
    """The same token, but for a draw within rounding of a boundary; and its log-prob."""
    logits, uniform, seen = inputs(rows, vocabulary)
    wanted, logp = reference.sample(logits.double(), uniform, *settings, seen)
    ids, got = backend.sample(logits.clone(), uniform, *settings, seen)
    assert ids.dtype == torch.int64 and got.dtype == torch.float32
    near = [
        i for i in range(rows) if boundary(logits[i], settings, seen[i], float(uniform[i])) < 1e-6
    ]
    assert len(near) <= rows // 5
    for i in set(range(rows)) - set(near):
        assert ids[i] == wanted[i]
        assert got[i].item() == pytest.approx(logp[i].item(), abs=2e-5)


def boundary(logits: Tensor, settings: Any, seen: Tensor, uniform: float) -> float:
    """How far the draw is from where the next token begins."""
    temperature, top_k, top_p, min_p, penalty = settings
    if temperature == 0:
        return 1.0
    z = reference.penalised(logits.double()[None], penalty, seen[None]) / temperature
    return float((reference.kept(z, top_k, top_p, min_p)[0].cumsum(0) - uniform).abs().min())


def test_a_row_does_not_depend_on_its_company(backend: ModuleType) -> None:
    logits, uniform, seen = inputs(12, 700)
    for settings in SETTINGS:
        whole = backend.sample(logits.clone(), uniform, *settings, seen)
        for i in range(12):
            alone = backend.sample(
                logits[i : i + 1].clone(), uniform[i : i + 1], *settings, seen[i : i + 1]
            )
            assert alone[0] == whole[0][i] and alone[1] == whole[1][i]


def test_cuts_are_those_of_transformers() -> None:
    """Their processors, in the order in which `generate` applies them."""
    processors = pytest.importorskip("transformers.generation.logits_process")
    logits, _, seen = inputs(20, 400)
    seen = seen.clamp(0)
    theirs = logits.double()
    for step in (
        processors.RepetitionPenaltyLogitsProcessor(1.4),
        processors.TemperatureLogitsWarper(0.9),
        processors.TopKLogitsWarper(60),
        processors.TopPLogitsWarper(0.85),
        processors.MinPLogitsWarper(0.03),
    ):
        theirs = step(seen, theirs)
    ours = reference.kept(reference.penalised(logits.double(), 1.4, seen) / 0.9, 60, 0.85, 0.03)
    assert torch.allclose(ours, theirs.softmax(-1), atol=1e-9)
    assert 1 < int((ours > 0).sum(1).max()) < 60


def test_equal_logits(backend: ModuleType) -> None:
    """Ties: greedy takes the first; all that equal the k-th stay; of equals,
    top_p keeps the lower ids.
    """
    logits = torch.tensor([[1.0, 3.0, 3.0, 3.0, 0.0]])

    def drawn(*settings: float) -> set[int]:
        n = 300
        uniform = (torch.arange(n, dtype=torch.float64) + 0.5) / n
        return set(backend.sample(logits.repeat(n, 1), uniform, *settings, NONE)[0].tolist())

    assert drawn(0.0, 0, 1.0, 0.0, 1.0) == {1}
    assert drawn(1.0, 2, 1.0, 0.0, 1.0) == {1, 2, 3}
    assert drawn(1.0, 0, 0.5, 0.0, 1.0) == {1, 2}
    assert drawn(1.0, 0, 1.0, 1.0, 1.0) == {1, 2, 3}


@pytest.mark.skipif(not ISAS, reason="no C++ backend")
def test_bad_arguments_name_themselves() -> None:
    logits, uniform, seen = inputs(3, 10)
    with pytest.raises(ValueError, match="sample: logits is"):
        cpp.sample(logits.double(), uniform, 1.0, 0, 1.0, 0.0, 1.0, seen)
    with pytest.raises(ValueError, match=r"sample: uniform has shape \[2\], expected \(R,\)"):
        cpp.sample(logits, uniform[:2], 1.0, 0, 1.0, 0.0, 1.0, seen)
    with pytest.raises(ValueError, match="sample: seen has shape"):
        cpp.sample(logits, uniform, 1.0, 0, 1.0, 0.0, 2.0, seen[:1])


def no_check(logits: Tensor) -> Tensor:
    raise AssertionError("the C++ backend was asked")


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("built", [True, False])
def test_unsound_rows_are_blanked(built: bool, bad: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where finite numbers have an infinite sum, and without the C++ backend."""
    if not built:
        monkeypatch.setattr(cpp, "available", lambda: False)
        monkeypatch.setattr(cpp, "all_finite", no_check)
    logits = torch.full((3, 8), 3e38)
    logits[1, 2] = bad
    assert blank_unsound(logits).tolist() == [True, False, True]
    assert logits[1].tolist() == [0.0] * 8 and logits[0].tolist() == [torch.tensor(3e38).item()] * 8


def test_the_cpp_backend_is_not_asked_about_logits_elsewhere(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It reads a CPU's memory alone. A tensor without any stands for a GPU's."""
    monkeypatch.setattr(cpp, "available", lambda: True)
    monkeypatch.setattr(cpp, "all_finite", no_check)
    sound = blank_unsound(torch.zeros(3, 8, device="meta"))
    assert (sound.shape, sound.dtype, sound.device.type) == ((3,), torch.bool, "meta")


def test_rows_are_told_one_by_one() -> None:
    assert blank_unsound(torch.ones(2, 5)).tolist() == [True, True]


def test_the_sampling_that_is_not_asked_for() -> None:
    """From the model's own distribution, whatever the config of a model says."""
    assert Sampling() == Sampling(256, 1.0, 0, 1.0, 0.0, 1.0, ())


@pytest.mark.parametrize(
    ("name", "sound", "refused"),
    [
        ("max_new_tokens", [1], [0]),
        ("temperature", [0.0, 1e9], [-1e-9, float("inf"), float("nan")]),
        ("top_k", [0, 1], [-1]),
        ("top_p", [1e-9, 1.0], [0.0, 1.0000001]),
        ("min_p", [0.0, 1.0], [-1e-9, 1.0000001]),
        ("repetition_penalty", [1e-9, 1e9], [0.0, float("inf")]),
        ("stop", [("a", "b")], [("a", "")]),
    ],
)
def test_the_ends_of_what_may_be_asked(name: str, sound: list[Any], refused: list[Any]) -> None:
    for value in sound:
        Sampling(**{name: value})
    for value in refused:
        with pytest.raises(ValueError, match="bad sampling settings"):
            Sampling(**{name: value})


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_every_setting_reaches_the_sampler(settings: Any) -> None:
    logits, uniform, seen = inputs(7, 50)
    temperature, top_k, top_p, min_p, penalty = settings
    sampling = Sampling(9, temperature, top_k, top_p, min_p, penalty)
    found = sample(logits.clone(), uniform, sampling, seen)
    expected = eager.sample(logits.clone(), uniform, *settings, seen)
    assert torch.equal(found[0], expected[0])
    torch.testing.assert_close(found[1], expected[1], atol=1e-5, rtol=0)
