"""Schedules and parameter groups."""

import pytest
import torch

from ldalign.optim import learning_rate_factor, make_optimizer


def factors(steps: int, ratio: float, schedule: str) -> list[float]:
    return [learning_rate_factor(step, steps, ratio, schedule) for step in range(steps)]  # type: ignore[arg-type]


def test_warm_up_then_decay_by_hand() -> None:
    assert factors(6, 0.34, "constant") == pytest.approx([1 / 3, 2 / 3, 1, 1, 1, 1])
    assert factors(6, 0.3, "linear") == pytest.approx([1 / 2, 1, 1, 3 / 4, 2 / 4, 1 / 4])
    assert factors(4, 0.0, "linear") == pytest.approx([1, 3 / 4, 1 / 2, 1 / 4])
    assert factors(5, 0.2, "cosine") == pytest.approx([1, 1, (1 + 0.5**0.5) / 2, 0.5, (1 - 0.5**0.5) / 2])


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
    """One step from a gradient of 4, by the papers' formulas: AdamW moves by lr, RMSprop by lr / sqrt(1 - alpha)."""
    for name, expected in (("adamw", 0.1), ("rmsprop", 0.1 / 0.01**0.5)):
        model = torch.nn.Linear(1, 1, bias=False)
        before = model.weight.item()
        optimizer = make_optimizer(model, name, 0.1)  # type: ignore[arg-type]
        model.weight.grad = torch.tensor([[4.0]])
        optimizer.step()
        assert before - model.weight.item() == pytest.approx(expected, rel=1e-4)
