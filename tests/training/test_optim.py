"""Schedules and parameter groups."""

from types import ModuleType

import pytest
import torch
from torch import Tensor

from ldalign import ops
from ldalign.kernels import cpp, eager
from ldalign.training.optim import learning_rate_factor, make_optimizer


def factors(steps: int, ratio: float, schedule: str) -> list[float]:
    return [learning_rate_factor(step, steps, ratio, schedule) for step in range(steps)]  # type: ignore[arg-type]


def test_warm_up_then_decay_by_hand() -> None:
    assert factors(6, 0.34, "constant") == pytest.approx([1 / 3, 2 / 3, 1, 1, 1, 1])
    assert factors(6, 0.3, "linear") == pytest.approx([1 / 2, 1, 1, 3 / 4, 2 / 4, 1 / 4])
    assert factors(4, 0.0, "linear") == pytest.approx([1, 3 / 4, 1 / 2, 1 / 4])
    assert factors(5, 0.2, "cosine") == pytest.approx(
        [1, 1, (1 + 0.5**0.5) / 2, 0.5, (1 - 0.5**0.5) / 2]
    )


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
@pytest.mark.parametrize("steps", [1, 2, 7])
@pytest.mark.parametrize("ratio", [0.0, 0.1, 1.0])
def test_never_zero_never_above_one(schedule: str, steps: int, ratio: float) -> None:
    got = factors(steps, ratio, schedule)
    assert all(0 < f <= 1 for f in got) and max(got) == 1


def test_only_matrices_are_decayed() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.LayerNorm(3))
    model[0].bias.requires_grad_(False)
    decayed, kept = make_optimizer(model, "adamw", 0.1, weight_decay=0.5).param_groups
    assert [p.ndim for p in decayed["params"]] == [2] and decayed["weight_decay"] == 0.5
    assert [p.ndim for p in kept["params"]] == [1, 1] and kept["weight_decay"] == 0.0


def test_the_optimizers_are_the_named_ones() -> None:
    """One step from a gradient of 4, by the papers' formulas: AdamW moves by lr, RMSprop by lr /
    sqrt(1 - alpha).
    """
    for name, expected in (("adamw", 0.1), ("rmsprop", 0.1 / 0.01**0.5)):
        model = torch.nn.Linear(1, 1, bias=False)
        before = model.weight.item()
        optimizer = make_optimizer(model, name, 0.1)  # type: ignore[arg-type]
        model.weight.grad = torch.tensor([[4.0]])
        optimizer.step()
        assert before - model.weight.item() == pytest.approx(expected, rel=1e-4)


def test_rmsprop_keeps_one_average() -> None:
    """A mean that nothing reads would be as much memory again as the weights."""
    for name, kept in (("adamw", {"mean", "square"}), ("rmsprop", {"square"})):
        model = torch.nn.Linear(2, 2)
        optimizer = make_optimizer(model, name, 0.1)  # type: ignore[arg-type]
        model.weight.grad = torch.ones(2, 2)
        optimizer.step()
        assert optimizer.state[model.weight].keys() == kept
        assert optimizer.seed == 0


@pytest.mark.parametrize("name", ["adamw", "rmsprop"])
def test_every_parameter_and_step_rounds_by_a_seed_of_its_own(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Golden: a run that goes on rounds as one that was never stopped, in every version. Parameters
    are counted whether they have a gradient or not, and by default nothing is decayed.
    """
    given: list[int] = []
    monkeypatch.setattr(ops, f"{name}_", lambda *arguments: given.append(arguments[-1]))
    model = torch.nn.ModuleList(torch.nn.Linear(2, 2, bias=False) for _ in range(3))
    optimizer = make_optimizer(model, name, 0.1, seed=3)  # type: ignore[arg-type]
    for i in (0, 2):
        model[i].weight.grad = torch.ones(2, 2)
    optimizer.step()
    optimizer.step()
    assert given == [591717831, 2829730369, 2838540350, 781585592]
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.0]


def both_steps(
    dtype: torch.dtype, state: torch.dtype, name: str, steps: int = 3
) -> tuple[list[Tensor], list[Tensor]]:
    """Weights and averages after some steps: of the C++ kernel, and of plain PyTorch."""
    results = []
    for module in (cpp, eager):
        make = torch.Generator().manual_seed(0)
        p = torch.randn(70, 33, generator=make).to(dtype)
        averages = [torch.zeros(p.shape, dtype=state) for _ in range(2 if name == "adamw" else 1)]
        for step in range(1, steps + 1):
            grad = torch.randn(p.shape, generator=make).to(dtype)
            if name == "adamw":
                module.adamw_(p, grad, *averages, None, 1e-2, 0.1, 0.9, 0.999, 1e-8, step, 7 * step)
            else:
                module.rmsprop_(p, grad, *averages, None, 1e-2, 0.1, 0.99, 1e-8, 7 * step)
        results.append([p, *averages])
    return results[0], results[1]


needs_cpp = pytest.mark.skipif(not cpp.available(), reason=f"no C++ backend: {cpp.why_not()}")


@needs_cpp
@pytest.mark.parametrize("name", ["adamw", "rmsprop"])
@pytest.mark.parametrize("state", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_kernel_is_the_formula(dtype: torch.dtype, state: torch.dtype, name: str) -> None:
    """The same random bits: a bfloat16 value may differ only where float32
    rounding tips the balance.
    """
    for ours, theirs in zip(*both_steps(dtype, state, name), strict=True):
        if ours.dtype == dtype == state == torch.float32:
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
        else:
            assert ours.dtype == torch.float32 or (ours == theirs).float().mean() > 0.95
            torch.testing.assert_close(ours.float(), theirs.float(), rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("name", ["adamw", "rmsprop"])
def test_float32_steps_are_torchs(name: str) -> None:
    """Five steps with decay against torch.optim."""
    models = [torch.nn.Linear(9, 7, bias=False) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    ours = make_optimizer(models[0], name, 1e-2, weight_decay=0.1)  # type: ignore[arg-type]
    peer = {"adamw": torch.optim.AdamW, "rmsprop": torch.optim.RMSprop}[name]
    theirs = peer(models[1].parameters(), lr=1e-2, weight_decay=0.1)
    for step in range(5):
        grad = torch.randn(7, 9, generator=torch.Generator().manual_seed(step))
        for model, optimizer in zip(models, (ours, theirs), strict=True):
            model.weight.grad = grad.clone()
            optimizer.step()
    torch.testing.assert_close(models[0].weight, models[1].weight, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", [pytest.param("cpp", marks=needs_cpp), "eager"])
@pytest.mark.parametrize("name", ["adamw", "rmsprop"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_factor_is_a_scaled_gradient(
    dtype: torch.dtype, name: str, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same bits as of gradients that were multiplied before, each rounded to its dtype. A
    factor of 1 writes to no gradient.
    """
    monkeypatch.setenv("LDALIGN_BACKEND", backend)

    def trained(factor: Tensor, before: bool) -> list[Tensor]:
        torch.manual_seed(0)
        model = torch.nn.Linear(33, 70).to(dtype)
        optimizer = make_optimizer(model, name, 1e-2, 0.1, state_dtype=dtype)  # type: ignore[arg-type]
        for _ in range(2):
            for p in model.parameters():
                p.grad = torch.randn(p.shape).to(dtype)
            grads = [p.grad for p in model.parameters() if p.grad is not None]
            if before:
                torch._foreach_mul_(grads, factor)
            versions = [g._version for g in grads]
            optimizer.step(None if before else factor)
            if before or factor == 1:
                assert versions == [g._version for g in grads]
        return list(model.parameters())

    half, one = torch.tensor(0.37), torch.ones(())
    for factor in (half, one):
        assert all(map(torch.equal, trained(factor, True), trained(factor, False)))
    assert not any(map(torch.equal, trained(half, False), trained(one, False)))


@pytest.mark.parametrize(
    "module", [pytest.param(cpp, marks=needs_cpp), eager], ids=["cpp", "eager"]
)
def test_small_steps_add_up_in_bfloat16(module: ModuleType) -> None:
    """2,000 steps of 1/2000: rounded to nearest none of them would move a weight of 1 at all."""
    p = torch.ones(4000, dtype=torch.bfloat16)
    square = torch.ones(4000, dtype=torch.bfloat16)
    for step in range(2000):
        module.rmsprop_(p, torch.ones_like(p), square, None, 5e-4, 0.0, 0.99, 0.0, step)
    assert p.float().mean().item() == pytest.approx(0.0, abs=0.01)
    assert square.float().mean().item() == pytest.approx(1.0, abs=0.01)


@pytest.mark.parametrize(
    "module", [pytest.param(cpp, marks=needs_cpp), eager], ids=["cpp", "eager"]
)
def test_infinite_and_nan_stay(module: ModuleType) -> None:
    p = torch.tensor([torch.inf, -torch.inf, torch.nan, 1.0], dtype=torch.bfloat16)
    module.adamw_(
        p, torch.ones_like(p), torch.zeros(4), torch.zeros(4), None, 0.1, 0, 0.9, 0.999, 1e-8, 1, 5
    )
    assert p[:2].isinf().all() and p[2].isnan() and p[3] < 1
