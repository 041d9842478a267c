"""The method on one pair, with its numbers: `ldalign tour [seed=0] [policy=NAME]`.

One prompt and its two responses are followed from the file to the update of the policy: token ids,
sampling, guide, latents, distance, weight, packed batch, log-probs, loss, gradient, optimizer step.
Every step is one function below and calls the functions that a run calls; the lines after its title
say which, and where they are. docs/tour.md tells the same walk in words. Nothing is kept: no run
folder is made, and the policy's folder stays as it is.

A run (arXiv 2404.06390) has thousands of rows; here there are 32, so that two cores need about a
minute. The pair that is followed is the first of the file. All is computed in float32 on the CPU:
on one machine, the same seed prints the same numbers.
"""

import json
import math
import tempfile
import textwrap
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldalign import ops
from ldalign.data import embedded
from ldalign.data.encoding import Fitting, encode_rows
from ldalign.data.pairs import Pair, Pairs, with_losers
from ldalign.data.reading import read_rows
from ldalign.data.rows import Row
from ldalign.data.tokenizer import Tokenizer, load_tokenizer
from ldalign.evaluation.guide import heldout_figures, tells_apart
from ldalign.generation.generate import generate_ids
from ldalign.generation.sampling import Sampling
from ldalign.models.guide import NO_LATENT, Guide, GuideConfig, Reading
from ldalign.models.guide_folder import pretrained_guide
from ldalign.models.mistral import Mistral
from ldalign.models.weights import load_model
from ldalign.objective import (
    contrast_loss,
    distance_weights,
    dpo_coefficient,
    dpo_loss,
    latent_distance,
    margin,
)
from ldalign.run.context import open_policy
from ldalign.run.settings import RunConfig
from ldalign.system import distributed, exits
from ldalign.system.config import describe, load_config, non_negative, setting, split_argv
from ldalign.system.errors import InputError
from ldalign.system.files import write_jsonl
from ldalign.system.metrics import say
from ldalign.training.batches import Batch
from ldalign.training.guide import GuideTrainSettings, split, train_guide
from ldalign.training.latent_map import fit
from ldalign.training.optim import Optimizer, make_optimizer
from ldalign.training.scoring import response_logps

ROWS = 32  # the iteration: what the guide learns from, and what the mean distance is taken over
BATCH = 8  # pairs of the one optimizer step; the pair that is followed is the first
MAX_NEW_TOKENS, MAX_LENGTH = 48, 256
LATENT_WIDTH = 16  # of the guide: few enough to print
BETA, LEARNING_RATE, MAX_GRAD_NORM = 0.1, 8e-6, 1.0  # those of configs/smollm2-135m.yaml
MICRO_TOKENS = 4096  # of one forward: all that is here fits
CPU = torch.device("cpu")


@dataclass(frozen=True)
class TourKeys:
    """What may be chosen."""

    seed: int = setting(0, "of rows, samples and guide", check=non_negative)
    policy: str = setting(
        "smollm2-135m-instruct",
        "model folder, Hugging Face name (org/name), the embedded default, or toy (tiny, random)",
    )
    cache: str | None = setting(None, "where fetched models are kept; null: ~/.cache/ldalign")


def main(argv: list[str]) -> None:
    """Reads the settings and takes the steps."""
    path, overrides, flags = split_argv(argv, ("--help",))
    if "--help" in flags:
        print((__doc__ or "").strip(), "Keys, with their defaults:", describe(TourKeys), sep="\n\n")
        return
    keys = load_config(TourKeys, path, overrides)
    began = time.perf_counter()
    distributed.start("cpu")
    folder = open_policy(RunConfig(policy=keys.policy, cache=keys.cache))
    tokenizer, policy = load_tokenizer(folder), load_model(folder, torch.float32)
    assert isinstance(policy, Mistral)  # open_policy refuses others
    print(f"policy={keys.policy} seed={keys.seed}, float32 on the CPU")

    rows = read_file(keys.seed)
    pairs = make_ids(rows, tokenizer)
    pairs = sample_losers(pairs, policy, tokenizer, keys.seed)
    guide = make_guide(pairs, folder, keys.seed)
    read_again(pairs, guide)
    batch = pack(weigh(pairs, guide), tokenizer)
    batch = score_reference(batch, policy)
    loss, gradients = loss_of_the_equations(batch, policy)
    fused_loss(batch, policy, loss, gradients)
    update(policy, pull(batch, policy))
    look_again(batch, policy)
    spin(batch)
    say(f"tour: {time.perf_counter() - began:.0f} s on {torch.get_num_threads()} threads")
    distributed.stop()


# ---------------------------------------------------------------------------------------- the steps


def read_file(seed: int) -> list[Row]:
    """The rows of a data file: the first ROWS of the embedded data set, written and read again."""
    step(1, "The row in the file", embedded.make_rows, read_rows)
    records = embedded.make_rows(seed, "train", ROWS)
    for record in records:
        # SmolLM2's template else puts a longer system turn of its own in front of every prompt.
        record["messages"].insert(0, {"role": "system", "content": "Be brief."})
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "train.jsonl"
        write_jsonl(path, records)
        rows = read_rows(str(path))
    show("line 1 of the file", json.dumps(records[0]))
    show("rows", f"{len(rows)}; the first is followed")
    show("x, the prompt", quoted(rows[0].history[-1]["content"]))
    show("y, the winner", quoted(rows[0].response))
    return rows


def make_ids(rows: Sequence[Row], tokenizer: Tokenizer) -> Pairs:
    """Token ids of prompt and winner."""
    step(2, "Chat text and token ids", Tokenizer.render, Tokenizer.pair_ids, encode_rows)
    show("chat text of x", quoted(tokenizer.render(rows[0].history, add_generation_prompt=True)))
    pairs = encode_rows(rows, tokenizer, Fitting(MAX_LENGTH)).pairs
    show(f"ids of x ({len(pairs[0].prompt)})", pairs[0].prompt)
    show(f"ids of y ({len(pairs[0].real)})", pairs[0].real)
    show("tokens of y", pieces(pairs[0].real, tokenizer))
    show("end tokens", ", ".join(f"{i} {pieces([i], tokenizer)}" for i in tokenizer.end_ids))
    show("trained on", f"the {len(pairs[0].real)} tokens of y; those of x are only read")
    return pairs


def sample_losers(pairs: Sequence[Pair], policy: Mistral, tokenizer: Tokenizer, seed: int) -> Pairs:
    """The pairs with the policy's own response to every prompt, one sample at temperature 1."""
    step(3, "The loser: what the policy answers itself", generate_ids, with_losers)
    responses = generate_ids(
        policy,
        [pair.prompt for pair in pairs],
        [f"iteration/0/{pair.id}" for pair in pairs],  # a random stream for every row
        tokenizer.end_ids,
        Sampling(MAX_NEW_TOKENS, temperature=1.0),
        seed,
    )
    with_own = with_losers(pairs, [response.ids for response in responses], MAX_LENGTH)
    first = responses[0]
    show("y', the loser", quoted(tokenizer.decode(first.ids)))
    show(f"ids of y' ({len(first.ids)})", first.ids)
    show("finish reason", f"{first.finish_reason} (stop: an end token; length: cut)")
    show("log-prob", f"{first.logp:.4f} nats, summed over its tokens")
    stopped = sum(response.finish_reason == "stop" for response in responses)
    show("all rows", f"{stopped} of {len(responses)} ended by themselves")
    if not with_own[0].usable:
        raise InputError(f"seed={seed}: y' is y, so this pair teaches nothing; give another seed")
    show("usable", f"{sum(with_own.usable)} of {len(pairs)}: y' is not y")
    return with_own


def make_guide(pairs: Sequence[Pair], folder: Path, seed: int) -> Guide:
    """A guide whose one tower is the policy as it is, trained on both responses of most rows."""
    functions = (pretrained_guide, Guide.fit, split, fit, train_guide, heldout_figures, tells_apart)
    step(4, "The guide: the policy and a latent", *functions)
    config = GuideConfig(latent_width=LATENT_WIDTH, latent_norm="rms", max_tokens=MAX_LENGTH)
    guide = pretrained_guide(config, seed, folder, frozen=True, dtype=torch.float32)
    read = [guide.fit(pair) for pair in pairs]
    seen, unseen = split(read[1:], 0.25, seed)
    unseen = [read[0], *unseen]  # nothing that is said of the pair below was learnt from it
    own, _, sibling, *_ = readings(guide, read[0])
    tower, into = (
        sum(p.numel() for p in m.parameters()) for m in (guide.encoder, guide.latent.to_latent)
    )
    back = (guide.latent.to_output.weight, guide.latent.to_scale.weight, guide.latent.null)
    show("tower", f"the policy: {tower} weights, encoder and decoder at once, not trained")
    show("fitted", f"{into} weights: from its states to {LATENT_WIDTH} numbers")
    show("trained", f"{sum(p.numel() for p in back)} weights: from those numbers back")
    show("rows", f"{len(seen)} are trained on, {len(unseen)} held out, the followed one too")
    show("log D(y | x) before", f"{own:.4f} with its own latent, {sibling:.4f} with that of y'")
    settings = GuideTrainSettings(
        epochs=4,
        global_batch=4,
        learning_rate=2e-3,
        micro_tokens=MICRO_TOKENS,
        latent_map="fitted",
    )
    train_guide(guide, seen, settings, compute_dtype=torch.float32, device=CPU, seed=seed)
    f = heldout_figures(guide, unseen, MICRO_TOKENS)
    for name, key in (("sibling gain", "sibling"), ("gain over no latent", "none")):
        gain, error = f[f"{key}_gain"], f[f"{key}_gain_se"]
        show(name, f"{gain:+.4f} +- {error:.4f} nats a response, held out")
    show("own latent is better", f"in {f['own_better']:.0%} of the held-out responses")
    show("tells apart", "yes" if tells_apart(f) else "no: a run would stop here (guide.gate)")
    return guide


def read_again(pairs: Sequence[Pair], guide: Guide) -> None:
    """Latents of the pair that is followed, and its responses predicted with each of them."""
    step(5, "Latents and readings", Guide.encode, Reading, Guide.forward, contrast_loss)
    pair = guide.fit(pairs[0])
    with torch.no_grad():
        z = guide.encode([pair])  # (2, Z)
    show("E(x, y)", numbers(z[0]))
    show("E(x, y')", numbers(z[1]))
    y, other, y_sibling, other_sibling, y_none, other_none = readings(guide, pair)
    for name, whose, own, sibling, none in (
        ("y", "y'", y, y_sibling, y_none),
        ("y'", "y", other, other_sibling, other_none),
    ):
        show(
            f"log D({name} | x, .)",
            f"{own:.4f} with its own latent, {sibling:.4f} with that of {whose}, "
            f"{none:.4f} with none",
        )
    gains = torch.tensor([y - y_sibling, other - other_sibling])
    contrasts = contrast_loss(gains, torch.zeros(2))
    show("sibling gain G", f"{float(gains[0]):+.4f} of y, {float(gains[1]):+.4f} of y'")
    show("contrast", f"{float(contrasts[0]):.4f} of y, {float(contrasts[1]):.4f} of y'")


@torch.no_grad()
def readings(guide: Guide, pair: Pair) -> list[float]:
    """log D in nats of y and of y': with the own latent, with the other's, and with none."""
    latents = [(0, 0), (1, 1), (0, 1), (1, 0), (0, NO_LATENT), (1, NO_LATENT)]
    wanted = [Reading(response, latent) for response, latent in latents]
    logps, _ = guide([pair], wanted)
    lengths = [len(pair.responses[reading.response]) for reading in wanted]
    return [float(part.sum()) for part in logps.split(lengths)]


def weigh(pairs: Sequence[Pair], guide: Guide) -> list[Pair]:
    """The pairs with their weights; of the usable ones, the first BATCH."""
    step(6, "Distance and weight", latent_distance, Guide.pair_distances, distance_weights)
    read = [guide.fit(pair) for pair in pairs]
    with torch.no_grad():
        z = guide.encode(read[:1])
    show("difference", numbers(z[0] - z[1]))
    show("d = its length", f"{float(latent_distance(z[:1], z[1:])):.4f}")
    distances = guide.pair_distances(read, MICRO_TOKENS)
    show("the same in a run", f"{float(distances[0]):.4f}")
    low, mean, high = (float(x) for x in (distances.min(), distances.mean(), distances.max()))
    show("all rows", f"least {low:.4f}, mean {mean:.4f}, most {high:.4f}")
    kept = [pair.usable for pair in pairs]
    weights = distance_weights(distances, kept)
    mean = float(distances[torch.tensor(kept)].mean())
    show("s = d / mean d", f"{float(distances[0]):.6f} / {mean:.6f} = {float(weights[0]):.6f}")
    show("mean of all s", f"{float(weights[torch.tensor(kept)].mean()):.4f}")
    weighed = [replace(pair, weight=float(s)) for pair, s in zip(pairs, weights, strict=True)]
    batch = [pair for pair in weighed if pair.usable][:BATCH]
    show(f"s of the first {len(batch)}", numbers(torch.tensor([pair.weight for pair in batch])))
    return batch


def pack(pairs: Sequence[Pair], tokenizer: Tokenizer) -> Batch:
    """The pairs of one optimizer step, end to end in one sequence of tokens."""
    step(7, "The packed batch", Batch.pack)
    batch = Batch.pack(pairs)
    show("tokens", f"{len(batch.ids)} of {len(pairs)} pairs, no padding; each prompt stands once")
    for name, part in zip(("x", "y", "y'"), batch.layout.segments[:3].tolist(), strict=True):
        begin, end, prefix_begin, prefix_end = part
        places = batch.layout.positions[begin:end]
        before = (
            f"tokens {prefix_begin}..{prefix_end - 1} and " if prefix_end > prefix_begin else ""
        )
        at = f"tokens {begin}..{end - 1} at positions {places[0]}..{places[-1]}"
        show(f"{name} of the pair", f"{at}, sees {before}its own past")
    show("predicted", f"{len(batch.targets)} response tokens, each from the token before it")
    real, generated = batch.lengths[:2]
    for name, i in (("y", 0), ("y'", real)):
        target = pieces([int(batch.targets[i])], tokenizer)
        show(f"first token of {name}", f"{target}, from token {int(batch.rows[i])}, the last of x")
    show("tokens a response", f"{real}, {generated}, ...: winner, loser, winner, ...")
    return batch


def score_reference(batch: Batch, policy: Mistral) -> Batch:
    """The batch with the log-probs of its responses under the policy before training."""
    step(8, "Log-probs of the reference", response_logps)
    logps = response_logps(policy, batch.pairs, MICRO_TOKENS, CPU)  # (P, 2)
    pairs = [
        replace(pair, ref_real=real, ref_generated=generated)
        for pair, (real, generated) in zip(batch.pairs, logps.tolist(), strict=True)
    ]
    first = pairs[0]
    alone = [plain_logp(policy, first.prompt, response) for response in first.responses]
    show("log pi_ref(y | x)", f"{first.ref_real:.4f} nats; not packed {alone[0]:.4f}")
    show("log pi_ref(y' | x)", f"{first.ref_generated:.4f} nats; not packed {alone[1]:.4f}")
    return replace(batch, pairs=pairs)


def loss_of_the_equations(batch: Batch, policy: Mistral) -> tuple[Tensor, list[Tensor]]:
    """The loss of the batch, written as the paper has it, and its gradients, one a parameter.

    All logits are made, which training never does: (M, V), and as much again for their gradient.
    """
    step(9, "Margin and loss, by the equations", margin, dpo_loss)
    logits = policy(batch.ids, batch.layout, lambda hidden, weight: hidden[batch.rows] @ weight.T)
    logp = logits.log_softmax(-1).gather(1, batch.targets[:, None])[:, 0]  # (M,)
    sums = torch.stack([part.sum() for part in logp.split(batch.lengths)])  # (2P,)
    real, generated = batch.split(sums)
    ref_real, ref_generated, weights = columns(batch)
    delta = margin(real, generated, ref_real, ref_generated)
    losses = dpo_loss(delta, weights, BETA)
    loss = losses.mean()  # over the pairs of the global batch
    loss.backward()
    real, generated, delta = real.detach(), generated.detach(), delta.detach()
    losses, loss = losses.detach(), loss.detach()
    show("log pi(y | x)", f"{float(real[0]):.4f} nats: pi is pi_ref still")
    show("log pi(y' | x)", f"{float(generated[0]):.4f} nats")
    show("margin Delta", f"{float(delta[0]):.4f} nats: 0 up to rounding")
    unweighted = dpo_loss(delta, torch.ones_like(weights), BETA)
    show("loss without s", f"{float(unweighted[0]):.6f}; ln 2 = {math.log(2):.6f}")
    show("loss of the pair", f"{float(losses[0]):.6f} = s ln 2")
    show("loss of the batch", f"{float(loss):.6f}, the mean of its {len(losses)} pairs")
    return loss, take_gradients(policy)


def fused_loss(batch: Batch, policy: Mistral, loss: Tensor, gradients: Sequence[Tensor]) -> None:
    """The same loss as training computes it; its gradients stay on the policy."""
    step(10, "The same loss, fused", ops.pair_loss)
    ref_real, ref_generated, weights = columns(batch)
    reference = torch.stack((ref_real, ref_generated), dim=1).flatten()  # (2P,)

    def head(hidden: Tensor, weight: Tensor) -> Tensor:
        # The last hidden states and the output matrix in, the loss out: no logits are kept.
        fused, _, metrics = ops.pair_loss(
            hidden[batch.rows],
            weight,
            batch.targets,
            batch.lengths,
            reference,
            weights,
            BETA,
            1.0 / len(batch.pairs),
        )
        show("loss without s", f"{float(metrics['loss'][0]):.6f}")
        return fused

    fused = policy(batch.ids, batch.layout, head)
    fused.backward()
    fused = fused.detach()
    show("loss of the batch", f"{float(fused):.6f}")
    show("fused - equations", f"{abs(float(fused - loss)):.1e}")
    own = [p.grad for p in policy.parameters() if p.grad is not None]
    apart = norm([a - b for a, b in zip(own, gradients, strict=True)])
    show("gradients apart", f"{apart / norm(gradients):.1e} of their length")


def pull(batch: Batch, policy: Mistral) -> Tensor:
    """What each pair pulls with, the length of the gradient that comes of it; the clip factor."""
    step(11, "Coefficient and gradient", dpo_coefficient, distributed.clip_grad_norm)
    ref_real, ref_generated, weights = columns(batch)
    real, generated = ref_real.clone().requires_grad_(), ref_generated.clone().requires_grad_()
    delta = margin(real, generated, ref_real, ref_generated)
    dpo_loss(delta, weights, BETA).sum().backward()
    by_hand = dpo_coefficient(delta.detach(), weights, BETA)
    assert real.grad is not None and generated.grad is not None
    show("d loss / d log pi(y)", f"{float(by_hand[0]):.6f} = -beta s sigmoid(-beta Delta)")
    show("by autograd", f"{float(real.grad[0]):.6f}, of y' {float(generated.grad[0]):+.6f}")
    show("of the whole batch", numbers(by_hand))
    before, factor = distributed.clip_grad_norm(policy, MAX_GRAD_NORM)
    show("gradient's norm", f"{float(before):.4f}, clipped to {float(before * factor):.3f}")
    return factor


def update(policy: Mistral, factor: Tensor) -> None:
    """One step of AdamW."""
    step(12, "The update", make_optimizer, Optimizer.step)
    optimizer = make_optimizer(policy, "adamw", LEARNING_RATE)
    gradient = policy.blocks[0].self_attn.qkv_proj.weight.grad
    weight = policy.blocks[0].self_attn.qkv_proj.weight.detach()
    assert gradient is not None
    before, slope = float(weight[0, 0]), float(gradient[0, 0] * factor)
    optimizer.step(factor)
    show("learning rate", f"{LEARNING_RATE:g}")
    show("one weight", f"{before:.8f} -> {float(weight[0, 0]):.8f}; its gradient was {slope:.1e}")
    optimizer.zero_grad()


def look_again(batch: Batch, policy: Mistral) -> None:
    """The same responses under the policy after the step."""
    step(13, "After the step", response_logps, margin, dpo_loss)
    logps = response_logps(policy, batch.pairs, MICRO_TOKENS, CPU).float()
    ref_real, ref_generated, weights = columns(batch)
    delta = margin(logps[:, 0], logps[:, 1], ref_real, ref_generated)
    zero = torch.zeros_like(delta)
    before, after = dpo_loss(zero, weights, BETA), dpo_loss(delta, weights, BETA)
    show("log pi(y | x)", f"{float(ref_real[0]):.4f} -> {float(logps[0, 0]):.4f}")
    show("log pi(y' | x)", f"{float(ref_generated[0]):.4f} -> {float(logps[0, 1]):.4f}")
    show("margin Delta", f"0.0000 -> {float(delta[0]):.4f}")
    show("loss of the pair", f"{float(before[0]):.6f} -> {float(after[0]):.6f}")
    show("loss of the batch", f"{float(before.mean()):.6f} -> {float(after.mean()):.6f}")
    show("margins that rose", f"{int((delta > 0).sum())} of {len(delta)}")


def spin(batch: Batch) -> None:
    """What SPIN would have done with the same pairs."""
    step(14, "SPIN: the same with weight 1", dpo_coefficient)
    _, _, weights = columns(batch)
    zero, one = torch.zeros_like(weights), torch.ones_like(weights)
    show("weights", f"{numbers(weights)} (mean {float(weights.mean()):.4f})")
    show("LD-Align pulls with", numbers(dpo_coefficient(zero, weights, BETA)))
    show("SPIN pulls with", numbers(dpo_coefficient(zero, one, BETA)))
    show("SPIN's first loss", f"{float(dpo_loss(zero, one, BETA).mean()):.6f} = ln 2")


# ------------------------------------------------------------------------------------ small helpers


def columns(batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """Reference log-probs of winners and of losers, and weights, each (P,) float32."""
    table = [(pair.ref_real, pair.ref_generated, pair.weight) for pair in batch.pairs]
    real, generated, weights = torch.tensor(table, dtype=torch.float32).unbind(1)
    return real, generated, weights


@torch.no_grad()
def plain_logp(policy: Mistral, prompt: list[int], response: list[int]) -> float:
    """The log-prob of a response, in nats, as a textbook has it: one sequence, all its logits."""
    logits = policy(torch.tensor([prompt + response]))[0]  # (T, V)
    logp = logits.log_softmax(-1)[len(prompt) - 1 : -1]  # of the token after each
    return float(logp.gather(1, torch.tensor(response)[:, None]).sum())


def take_gradients(policy: Mistral) -> list[Tensor]:
    """The gradients of the policy, one a parameter, which has none afterwards."""
    gradients = [p.grad for p in policy.parameters() if p.grad is not None]
    policy.zero_grad(set_to_none=True)
    return gradients


def norm(tensors: Sequence[Tensor]) -> float:
    """The length of all of them together, as one vector."""
    return math.sqrt(sum(float(t.double().square().sum()) for t in tensors))


def step(number: int, title: str, *functions: Callable[..., Any]) -> None:
    """The title of a step, and where the functions are that it calls."""
    print(f"\n## {number}. {title}")
    for function in functions:
        print(f"{function.__module__.replace('.', '/')}.py: {function.__qualname__}")


def show(name: str, value: object) -> None:
    """A named value, in lines of at most 100 columns."""
    width = 24
    lines = textwrap.wrap(str(value), 100 - width, break_on_hyphens=False) or [""]
    for i, line in enumerate(lines):
        print(f"  {name if i == 0 else '':<{width - 2}}{line}")


def numbers(values: Tensor) -> str:
    """Numbers in a line."""
    return " ".join(f"{float(value):.4f}" for value in values)


def quoted(text: str) -> str:
    """A text on one line, in ASCII."""
    return json.dumps(text)


def pieces(ids: Sequence[int], tokenizer: Tokenizer) -> str:
    """The text of every token by itself."""
    return " ".join(quoted(tokenizer.decode([i], skip_special_tokens=False)) for i in ids)


if __name__ == "__main__":
    exits.run(main)
