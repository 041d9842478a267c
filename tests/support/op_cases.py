"""The block's and the head's ops as test cases: a backend's raw functions, the reference.

float64 judges: on the same rounded inputs the error is at most twice that of eager PyTorch running
the reference in that dtype, three times for gradients; float64 itself must agree to rounding.
"""

from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ldalign.kernels import reference
from ldalign.kernels.loss_options import DPO, Kind, LossOptions

# Other losses of a pair: each option alone, and as many at once as go together.
OPTIONS = {
    "ipo": LossOptions("ipo"),
    "nll": LossOptions(nll=0.8),
    "smoothed": LossOptions(label_smoothing=0.2),
    "per token": LossOptions(length_normalised=True),
    "ipo, nll, per token": LossOptions("ipo", nll=0.3, length_normalised=True),
    "smoothed, nll, per token": LossOptions("sigmoid", 0.3, 0.1, True),
}


@dataclass
class Case:
    """An op: float64 inputs, how many results are values (gradients follow), the plain weight."""

    ours: Callable[..., Any]
    eager: Callable[..., Any]
    inputs: list[Tensor]
    values: int
    weight: int | None = None
    wide: tuple[int, ...] = ()  # inputs that stay float32, or float64 with the others

    def rounded(self, dtype: torch.dtype) -> list[Tensor]:
        wide = reference.accumulate_dtype(dtype)
        return [x.to(wide if i in self.wide else dtype) for i, x in enumerate(self.inputs)]

    def run(self, inputs: list[Tensor]) -> list[Tensor]:
        return list(self.ours(*inputs))


def normal(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    return (
        torch.randn(
            shape, generator=torch.Generator().manual_seed(seed + sum(shape)), dtype=torch.float64
        )
        * scale
    )


def uneven(*shape: int, seed: int = 0) -> Tensor:
    """Upstream gradients: random, and of sizes 0.1 to 2."""
    sizes = torch.linspace(0.1, 2, max(1, torch.Size(shape).numel()), dtype=torch.float64)
    return normal(*shape, seed=seed) * sizes[: torch.Size(shape).numel()].view(shape)


def targets(N: int, V: int) -> Tensor:
    return torch.randint(V, (N,), generator=torch.Generator().manual_seed(N + V))


def leaf(*tensors: Tensor) -> list[Tensor]:
    return [x.detach().clone().requires_grad_() for x in tensors]


def gradients(value: Tensor, upstream: Tensor, *leaves: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(value, leaves, upstream.to(value.dtype)))


def head_inputs(N: int, D: int, V: int) -> list[Tensor]:
    return [normal(N, D, scale=2), normal(V, D, seed=1, scale=D**-0.5)]


@dataclass
class Cases:
    """The cases of one backend, the module `raw`."""

    raw: ModuleType

    def forward(self, N: int, D: int, V: int) -> Case:
        target = targets(N, V)

        def eager(h: Tensor, w: Tensor) -> list[Tensor]:
            logits = (h @ w.T).to(reference.accumulate_dtype(h.dtype))
            return [reference.linear_logprob(h, w, target.to(h.device)), logits.logsumexp(1)]

        return Case(
            lambda h, w: self.raw.linear_logprob(h, w, target.to(h.device)),
            eager,
            head_inputs(N, D, V),
            2,
        )

    def backward(self, N: int, D: int, V: int) -> Case:
        target = targets(N, V)

        def ours(h: Tensor, w: Tensor, grad: Tensor) -> Any:
            return self.raw.linear_logprob_backward(
                grad,
                h,
                w,
                target.to(h.device),
                self.raw.linear_logprob(h, w, target.to(h.device))[1],
                True,
                True,
            )

        def eager(h: Tensor, w: Tensor, grad: Tensor) -> list[Tensor]:
            h, w = leaf(h, w)
            return gradients(reference.linear_logprob(h, w, target.to(h.device)), grad, h, w)

        return Case(ours, eager, [*head_inputs(N, D, V), uneven(N, seed=3)], 0, weight=2, wide=(2,))

    def sft(self, N: int, D: int, V: int) -> Case:
        target, scale = targets(N, V), 0.7

        def eager(h: Tensor, w: Tensor) -> list[Tensor]:
            h, w = leaf(h, w)
            logp = reference.linear_logprob(h, w, target.to(h.device))
            return [logp.detach(), *gradients(-scale * logp.sum(), torch.ones(()), h, w)]

        return Case(
            lambda h, w: self.raw.sft_loss(h, w, target.to(h.device), scale, True, True),
            eager,
            head_inputs(N, D, V),
            1,
        )

    def pair(self, lengths: list[int], D: int, V: int, options: LossOptions = DPO) -> Case:
        N, S = sum(lengths), len(lengths)
        target, beta, scale, tokens = targets(N, V), 0.3, 0.7, torch.tensor(lengths)

        def eager(h: Tensor, w: Tensor, ref: Tensor, weight: Tensor) -> list[Tensor]:
            h, w = leaf(h, w)
            logp = reference.linear_logprob(h, w, target.to(h.device))
            sums = torch.stack([run.sum() for run in logp.split(lengths)])
            loss, _ = reference.pair_loss(sums, ref, tokens.to(h.device), weight, beta, options)
            return [sums.detach(), *gradients(scale * loss, torch.ones(()), h, w)]

        def ours(h: Tensor, w: Tensor, ref: Tensor, weight: Tensor) -> Any:
            return self.raw.pair_loss(
                h, w, target.to(h.device), lengths, ref, weight, beta, scale, True, True, options
            )

        # near the policy's own sums, else every coefficient is 0 or 1
        at = head_inputs(N, D, V)
        sums = torch.stack(
            [run.sum() for run in reference.linear_logprob(*at, target).split(lengths)]
        )
        weight = normal(S // 2, seed=7).abs() + 0.2
        return Case(ours, eager, [*at, sums + normal(S, scale=2), weight], 1, weight=3, wide=(2, 3))

    def dpo(self, P: int, kind: Kind = "sigmoid", label_smoothing: float = 0.0) -> Case:
        def eager(*x: Tensor) -> list[Tensor]:
            real = x[0].detach().clone().requires_grad_()
            loss, metrics = reference.weighted_dpo_loss(real, *x[1:], 0.3, kind, label_smoothing)
            per_pair = [metrics[name] for name in ("loss", "rewards/chosen", "rewards/rejected")]
            return [loss.detach(), *per_pair, *gradients(loss, torch.ones(()), real)]

        inputs = [*(normal(P, seed=i, scale=20) for i in range(4)), normal(P, seed=5).abs() + 0.2]
        return Case(
            lambda *x: self.raw.weighted_dpo(*x, 0.3, kind, label_smoothing),
            eager,
            inputs,
            4,
            weight=4,
            wide=(0, 1, 2, 3, 4),
        )

    def norm(self, N: int, D: int) -> Case:
        def ours(x: Tensor, w: Tensor, dy: Tensor) -> list[Tensor]:
            y, rstd = self.raw.rms_norm(x, w, 1e-3)
            return [y, rstd, *self.raw.rms_norm_backward(dy, x, w, rstd)]

        def eager(x: Tensor, w: Tensor, dy: Tensor) -> list[Tensor]:
            x, w = leaf(x, w)
            y = reference.rms_norm(x, w, 1e-3)
            rstd = (
                x.detach().to(reference.accumulate_dtype(x.dtype)).pow(2).mean(-1) + 1e-3
            ).rsqrt()
            return [y.detach(), rstd, *gradients(y, dy, x, w)]

        return Case(
            ours, eager, [normal(N, D), normal(D, seed=1), uneven(N, D, seed=2)], 2, weight=1
        )

    def add_norm(self, N: int, D: int) -> Case:
        def ours(
            x: Tensor, residual: Tensor, w: Tensor, dy: Tensor, dtotal: Tensor
        ) -> list[Tensor]:
            y, total, rstd = self.raw.add_rms_norm(x, residual, w, 1e-3)
            return [y, total, *self.raw.add_rms_norm_backward(dy, dtotal, total, w, rstd)]

        def eager(
            x: Tensor, residual: Tensor, w: Tensor, dy: Tensor, dtotal: Tensor
        ) -> list[Tensor]:
            x, w = leaf(x, w)
            total = x + residual
            y = reference.rms_norm(total, w, 1e-3)
            return [
                y.detach(),
                total.detach(),
                *torch.autograd.grad([y, total], [x, w], [dy, dtotal]),
            ]

        rows = [
            normal(N, D),
            normal(N, D, seed=1),
            normal(D, seed=5),
            uneven(N, D, seed=2),
            uneven(N, D, seed=3),
        ]
        return Case(ours, eager, rows, 2, weight=2)

    def rope(self, N: int, H: int, E: int, turned: int | None = None) -> Case:
        angles = normal(N, E // 2, seed=1, scale=5)

        def ours(x: Tensor, dy: Tensor, cos: Tensor, sin: Tensor) -> list[Tensor]:
            return [turn(x, cos, sin, False), turn(dy, cos, sin, True)]

        def turn(x: Tensor, cos: Tensor, sin: Tensor, inverse: bool) -> Tensor:
            """In place, in the middle of wider rows."""
            room = x.new_ones(len(x), H + 2, E)
            room[:, 1:-1] = x
            self.raw.rope_(room[:, 1:-1], cos, sin, inverse, turned or H)
            assert (room[:, [0, -1]] == 1).all(), "beyond the heads"
            return room[:, 1:-1]

        def eager(x: Tensor, dy: Tensor, cos: Tensor, sin: Tensor) -> list[Tensor]:
            (x,) = leaf(x)
            y = torch.cat((reference.rope(x[:, : turned or H], cos, sin), x[:, turned or H :]), 1)
            return [y.detach(), *gradients(y, dy, x)]

        inputs = [normal(N, H, E), uneven(N, H, E, seed=2), angles.cos(), angles.sin()]
        return Case(ours, eager, inputs, 1, weight=2, wide=(2, 3))

    def swiglu(self, N: int, D: int) -> Case:
        def ours(gate: Tensor, up: Tensor, dy: Tensor) -> list[Tensor]:
            gate_up = torch.cat((gate, up), 1)
            return [self.raw.swiglu(gate_up), *self.raw.swiglu_backward(dy, gate_up).chunk(2, 1)]

        def eager(gate: Tensor, up: Tensor, dy: Tensor) -> list[Tensor]:
            gate, up = leaf(gate, up)
            y = reference.swiglu(gate, up)
            return [y.detach(), *gradients(y, dy, gate, up)]

        return Case(
            ours,
            eager,
            [normal(N, D, scale=2), normal(N, D, seed=1), uneven(N, D, seed=2)],
            1,
            weight=1,
        )


def check(case: Case, ours: list[Tensor], inputs: list[Tensor]) -> None:
    """The rule above, for every result."""
    exact, eager = case.eager(*(x.double() for x in inputs)), case.eager(*inputs)
    assert len(ours) == len(exact)
    for i, (a, b, e) in enumerate(zip(ours, eager, exact, strict=True)):
        what = f"result {i} of {len(ours)}"
        assert a.shape == e.shape and a.dtype == b.dtype, f"{what}: {a.shape} {a.dtype}"
        error, allowed = (a.double() - e).norm(), (b.double() - e).norm()
        if a.dtype == torch.float64:
            assert error <= 1e-12 * (1 + e.norm()), f"{what}: {error:.1e}"
        else:
            # Eager may happen to be exact; a value of several float32 operations cannot promise
            # that.
            floor = (4 if a.dtype == torch.float32 else 1) * torch.finfo(a.dtype).eps * e.norm()
            assert error <= max((2 if i < case.values else 3) * allowed, floor), (
                f"{what}: {error:.1e}, {allowed:.1e}"
            )
