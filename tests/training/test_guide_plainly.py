"""The guide's training against another of its kind: a decoder and a loop in plain float64, a
response at a time, which share no line with the product's beside the random streams.
"""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tiny_guides import CPU, SIZE, pairs, settings_of, stir, text_guide
from torch import Tensor

from ldalign.data.pairs import Pair
from ldalign.models.guide import Guide
from ldalign.system import distributed
from ldalign.system.files import read_jsonl
from ldalign.system.seeds import normals, permutation, uniforms
from ldalign.training.guide import train_guide
from ldalign.training.latent_map import standardise

STAGE, SEED = "iteration_2/guide", 7
Weights = dict[str, Tensor]


def states(w: Weights, tower: str, x: Tensor) -> Tensor:
    """GPT-2's states (T, D) of embeddings (T, D) of one sequence."""
    t, d = x.shape
    heads, e = SIZE.n_head, d // SIZE.n_head
    future = torch.ones(t, t, dtype=torch.bool).triu(1)

    def norm(x: Tensor, name: str) -> Tensor:
        x = (x - x.mean(1, keepdim=True)) / (x.var(1, correction=0, keepdim=True) + 1e-5).sqrt()
        return x * w[f"{tower}.transformer.{name}.weight"] + w[f"{tower}.transformer.{name}.bias"]

    def linear(x: Tensor, name: str) -> Tensor:
        name = f"{tower}.transformer.{name}"
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    x = x + w[f"{tower}.transformer.wpe.weight"][:t]
    for i in range(SIZE.n_layer):
        q, k, v = linear(norm(x, f"h.{i}.ln_1"), f"h.{i}.attn.c_attn").split(d, 1)
        out = []
        for h in range(heads):
            part = slice(h * e, (h + 1) * e)
            scores = (q[:, part] @ k[:, part].T / e**0.5).masked_fill(future, -torch.inf)
            out.append(scores.softmax(1) @ v[:, part])
        x = x + linear(torch.cat(out, 1), f"h.{i}.attn.c_proj")
        inner = linear(norm(x, f"h.{i}.ln_2"), f"h.{i}.mlp.c_fc")
        inner = 0.5 * inner * (1 + torch.tanh((2 / math.pi) ** 0.5 * (inner + 0.044715 * inner**3)))
        x = x + linear(inner, f"h.{i}.mlp.c_proj")
    return norm(x, "ln_f")


def latent(w: Weights, pair: Pair, side: int) -> Tensor:
    """The latent (Z,) of a response: the mean of its tokens' states, mapped, of size 1."""
    ids = [*pair.prompt, *pair.responses[side]]
    read = states(w, "encoder", w["encoder.transformer.wte.weight"][ids])[len(pair.prompt) :]
    z = read.mean(0) @ w["latent.to_latent.weight"].T + w["latent.to_latent.bias"]
    return z / (z.square().mean() + 1e-6).sqrt()


def logps(w: Weights, pair: Pair, side: int, z: Tensor, hidden: Tensor) -> Tensor:
    """The log-probs of a response's tokens, read with the latent z; those hidden are masked."""
    table, response = w["decoder.transformer.wte.weight"], list(pair.responses[side])
    x = table[[*pair.prompt, *response]]
    mask = torch.cat([torch.zeros(len(pair.prompt), dtype=torch.bool), hidden])
    x = torch.where(mask[:, None], w["latent.mask"], x)
    before = states(w, "decoder", x)[len(pair.prompt) - 1 : -1]
    scale, shift = (0.2 * z @ w[f"latent.to_{name}.weight"].T for name in ("scale", "output"))
    logits = (before * (1 + scale) + shift) @ table.T
    return logits.log_softmax(1)[range(len(response)), response]


def loss(w: Weights, batch: list[Pair], epoch: int, **what: Any) -> Tensor:
    """The loss () of a global batch, with the draws of its keys."""
    sides: list[list[Tensor]] = [[], []]  # summed log-probs with the own latent or none
    bags: list[list[Tensor]] = [[], []]
    counted, gaps, told = [0, 0], [], 0
    for pair in batch:
        z = [latent(w, pair, side) for side in (0, 1)]
        drawn = []
        for side, y in enumerate(pair.responses):
            key = f"{STAGE}/{epoch}/{pair.id}/{side}"
            u = uniforms(SEED, key, 2 + len(y))
            places = list(range(len(y)))
            if what["tokens"] < len(y):
                places = permutation(SEED, f"{key}/tokens", len(y))[: what["tokens"]].tolist()
            kept = u[0] >= what["latent_dropout"]
            hidden = torch.from_numpy(u[2:] < what["token_dropout"] * u[1])
            drawn.append((kept, hidden, places))
            noise = what["latent_noise"] * normals(SEED, f"{key}/noise", len(z[side])).double()
            z[side] = z[side] + noise * z[side].detach().square().mean().sqrt()
        for side, (kept, hidden, places) in enumerate(drawn):
            own = z[side] if kept else w["latent.null"]
            said = logps(w, pair, side, own, hidden)[places].sum()
            sides[side].append(said)
            counted[side] += len(places)
            alone = (0.2 * z[side] @ w["latent.to_output.weight"].T) @ w[
                "decoder.transformer.wte.weight"
            ].T
            tokens = [pair.responses[side][place] for place in places]
            bags[side].append(alone.log_softmax(0)[tokens].sum())
            if kept and pair.real != pair.generated:
                other = logps(w, pair, side, z[1 - side], hidden)[places].sum()
                gaps.append(F.softplus(other - said))
                told += len(places)
    total = -sum(torch.stack(sides[side]).sum() / counted[side] for side in (0, 1))
    total = total + what["contrast"] * torch.stack(gaps).sum() / told
    alone = -sum(torch.stack(bags[side]).sum() / counted[side] for side in (0, 1))
    return total + what["bag_of_words"] * alone


def plain_training(
    w: Weights,
    rows: list[Pair],
    epochs: int,
    global_batch: int,
    rate: float,
    most: float,
    decay: float,
    **what: Any,
) -> list[dict[str, float]]:
    """Trains the weights in place; returns a record a step. Warm-up over 5 % of the steps, cosine
    to 0, clipping, AdamW (0.9, 0.98), with decay on matrices alone.
    """
    steps, records = epochs * -(-len(rows) // global_batch), []
    mean, square = ({name: torch.zeros_like(p) for name, p in w.items()} for _ in range(2))
    warm = math.ceil(0.05 * steps)
    for epoch in range(epochs):
        order = permutation(SEED, f"{STAGE}/epoch/{epoch}", len(rows)).tolist()
        for start in range(0, len(rows), global_batch):
            step = len(records) + 1
            for p in w.values():
                p.requires_grad_(True).grad = None
            value = loss(w, [rows[i] for i in order[start : start + global_batch]], epoch, **what)
            value.backward()
            grads = {name: p.grad for name, p in w.items() if p.grad is not None}
            norm = float(torch.stack([g.square().sum() for g in grads.values()]).sum().sqrt())
            clip = min(1.0, most / (norm + 1e-6)) if most else 1.0
            done = (step - 1 - warm) / (steps - warm)
            lr = rate * (step / warm if step <= warm else 0.5 * (1 + math.cos(math.pi * done)))
            with torch.no_grad():
                for name, g in grads.items():
                    p = w[name].requires_grad_(False)
                    mean[name].mul_(0.9).add_(clip * g, alpha=0.1)
                    square[name].mul_(0.98).add_((clip * g).square(), alpha=0.02)
                    p.mul_(1 - lr * (decay if p.ndim > 1 else 0.0))
                    size = (square[name] / (1 - 0.98**step)).sqrt() + 1e-8
                    p.sub_(lr * mean[name] / (1 - 0.9**step) / size)
            records.append({"loss": value.item(), "grad_norm": norm, "learning_rate": lr})
    return records


LOSS = {
    "contrast": 2.0,
    "bag_of_words": 0.5,
    "token_dropout": 0.8,
    "latent_dropout": 0.3,
    "latent_noise": 0.2,
    "tokens": 5,
}


def weights_of(guide: Guide) -> Weights:
    return {name: p.detach().double().clone() for name, p in guide.named_parameters()}


@pytest.mark.parametrize(("most", "close"), [(1.0, 1e-3), (1e-6, 2e-5)])
def test_the_same_steps(most: float, close: float, tmp_path: Path, in_process: None) -> None:
    """Two epochs of seven rows in batches of three: losses, norms, rates, and where the weights
    end. Clipped to 1e-6, steps are smaller by what AdamW's eps makes of such gradients, and
    rounding is not blown up: then the second average's 0.98 is seen too.
    """
    distributed.start("cpu")
    guide = stir(text_guide(latent_norm="rms"))
    rows = [*pairs(guide, 6), guide.pair("same", "again", "No idea", "No idea")]
    plan: dict[str, Any] = {"epochs": 2, "global_batch": 3, "learning_rate": 3e-3}
    begun = stir(text_guide(latent_norm="rms"))
    standardise(begun, rows)
    before, plain = weights_of(begun), weights_of(begun)
    clip: dict[str, Any] = {"max_grad_norm": most, "weight_decay": 2.0}
    settings = settings_of(**plan, **LOSS, **clip, micro_tokens=90, latent_map="drawn")
    usual = settings_of()
    assert (usual.max_grad_norm, usual.weight_decay, usual.warmup_ratio) == (1.0, 0.01, 0.05)
    where: dict[str, Any] = {"compute_dtype": torch.float32, "device": CPU, "stage": STAGE}
    train_guide(guide, rows, settings, seed=SEED, metrics_path=tmp_path / "m.jsonl", **where)
    expected = plain_training(plain, rows, 2, 3, plan["learning_rate"], most, 2.0, **LOSS)
    found = read_jsonl(tmp_path / "m.jsonl")
    assert [record["global_step"] for record in found] == [1, 2, 3, 4, 5, 6] and len(expected) == 6
    for ours, theirs in zip(found, expected, strict=True):
        assert {name: ours[name] for name in theirs} == pytest.approx(theirs, rel=close), ours
        assert ours["learning_rate"] == pytest.approx(theirs["learning_rate"], rel=1e-12)
    moved = gap = 0.0
    for name, p in guide.named_parameters():
        if name.endswith("c_attn.bias"):
            continue  # a key's has no gradient but rounding, which AdamW blows up
        moved += float((plain[name].detach() - before[name]).square().sum())
        gap += float((p.detach().double() - plain[name].detach()).square().sum())
    assert 0 < gap**0.5 < 0.02 * moved**0.5
    norms = [record["grad_norm"] for record in expected]
    assert min(norms) > 1.2 and max(norms) > 1.2 * min(norms), "else clipping is not seen"
