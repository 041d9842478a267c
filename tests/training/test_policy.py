"""The training step against a plain eager loop, its splits, its refusals and its metrics."""

import functools
import json
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor

from ldalign.data.pairs import Pair
from ldalign.kernels.loss_options import DPO, LossOptions
from ldalign.objective import optional_loss
from ldalign.system import distributed
from ldalign.system.errors import NumericsError
from ldalign.system.metrics import Mean
from ldalign.training import policy
from ldalign.training.batches import global_batches
from ldalign.training.policy import TrainSettings, accumulate_gradients, global_batch, train
from ldalign.training.scoring import response_logps

CPU = torch.device("cpu")
SETTINGS = TrainSettings(
    epochs=1, global_batch=8, micro_tokens=60, learning_rate=1e-3, optimizer="adamw"
)
# Their sum is not their number: else a mean by weight and one by count are the same.
WEIGHTS = [0.3, 1.7, 0.0, 3.1, 0.8, 1.0, 0.5, 1.5]


@pytest.fixture(autouse=True)
def one_rank(in_process: None) -> Iterator[None]:
    distributed.start("cpu")
    yield


def with_reference(pairs: Sequence[Pair], model: torch.nn.Module | None = None) -> list[Pair]:
    """The pairs with the log-probs that `model` (tiny.mistral()) gives them as their reference."""
    table = response_logps(model or tiny.mistral(), pairs, 10_000, CPU).tolist()  # type: ignore[arg-type]
    return [
        replace(p, ref_real=real, ref_generated=gen)
        for p, (real, gen) in zip(pairs, table, strict=True)
    ]


def as_sft(pairs: Sequence[Pair]) -> list[Pair]:
    return [replace(pair, generated=None) for pair in pairs]


def gradient(
    pairs: Sequence[Pair], settings: TrainSettings = SETTINGS, checkpointing: str = "none"
) -> tuple[float, dict[str, Tensor], dict[str, float]]:
    """Loss, gradients and metrics of one global batch, through the product's own path."""
    model, mean = tiny.mistral(), Mean()
    for block in model.blocks:
        block.checkpointing = checkpointing
    distributed.shard(model, model.blocks, torch.float32, CPU)
    batch = global_batch(model, pairs, settings, CPU)
    after: list[None] = []
    loss = float(
        accumulate_gradients(
            model, batch, settings, mean, CPU, after_micro=lambda: after.append(None)
        )
    )
    assert len(after) == batch.micros
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return loss, grads, mean.means(mean.totals(CPU).tolist())


def eager(
    pairs: Sequence[Pair], beta: float, options: LossOptions = DPO
) -> tuple[float, dict[str, Tensor]]:
    """The same by hand: float64, right-padded, whole logits, labels of -100."""
    model = tiny.mistral().double()
    sequences = [(p.prompt, response) for p in pairs for response in p.responses]
    longest = max(len(x) + len(y) for x, y in sequences)
    ids = torch.zeros(len(sequences), longest, dtype=torch.int64)
    labels = torch.full_like(ids, -100)
    for i, (x, y) in enumerate(sequences):
        ids[i, : len(x) + len(y)] = torch.tensor([*x, *y])
        labels[i, len(x) : len(x) + len(y)] = torch.tensor(y)
    logp = model(ids)[:, :-1].log_softmax(-1)
    labels = labels[:, 1:]
    seen = labels != -100
    sums = (logp.gather(2, labels.clamp(min=0)[..., None])[..., 0] * seen).sum(1)
    if pairs[0].generated is None:
        loss = -sums.sum() / seen.sum()
    else:
        column = functools.partial(torch.tensor, dtype=torch.float64)
        references = column([x for p in pairs for x in (p.ref_real, p.ref_generated)])
        sides = ((x[0::2], x[1::2]) for x in (sums, references, seen.sum(1)))
        weights = column([pair.weight for pair in pairs])
        loss = optional_loss(*sides, weights, beta, options).sum() / len(pairs)
    loss.backward()
    return loss.item(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def difference(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    """Largest relative norm of the difference over all parameters."""
    assert ours.keys() == theirs.keys()
    return max(
        float((ours[n].double() - theirs[n].double()).norm() / theirs[n].double().norm())
        for n in theirs
    )


@pytest.mark.parametrize("kind", ["sft", "dpo"])
def test_gradient_equals_a_plain_loop(kind: str) -> None:
    pairs = tiny.pairs(8, weights=WEIGHTS)
    pairs = as_sft(pairs) if kind == "sft" else pairs
    settings = replace(SETTINGS, beta=0.3)
    loss, grads, _ = gradient(pairs, settings)
    expected, eager_grads = eager(pairs, 0.3)
    assert loss == pytest.approx(expected, rel=1e-5)
    assert difference(grads, eager_grads) < 1e-4


OPTIONS = [
    LossOptions("ipo"),
    LossOptions(nll=0.7),
    LossOptions(label_smoothing=0.1),
    LossOptions(length_normalised=True),
    LossOptions("ipo", 0.7, 0.0, True),
    LossOptions("sigmoid", 0.7, 0.1, True),
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_other_losses_equal_a_plain_loop(options: LossOptions) -> None:
    """In micro-batches: the NLL, too, is divided by the pairs of the global batch."""
    pairs = tiny.pairs(8, weights=WEIGHTS)
    plain = gradient(pairs, replace(SETTINGS, beta=0.3))
    loss, grads, metrics = gradient(pairs, replace(SETTINGS, beta=0.3, loss=options))
    expected, eager_grads = eager(pairs, 0.3, options)
    assert loss == pytest.approx(expected, rel=1e-5)
    assert difference(grads, eager_grads) < 1e-4
    assert difference(grads, plain[1]) > 0.01
    known = plain[2].keys() - {"loss/unweighted"}
    assert metrics.keys() - plain[2].keys() == ({"nll/chosen"} if options.nll else set())
    for name in known:  # rewards are of whole responses
        assert metrics[name] == pytest.approx(plain[2][name], rel=1e-5), name


@pytest.mark.parametrize("kind", ["sft", "dpo"])
def test_micro_batches_do_not_change_the_gradient(kind: str) -> None:
    """8 x 1, about 4 x 2 and 1 x 8: every pair alone, some together, all together."""
    pairs = tiny.pairs(8, weights=WEIGHTS)
    pairs = as_sft(pairs) if kind == "sft" else pairs
    results = [gradient(pairs, replace(SETTINGS, micro_tokens=n)) for n in (1, 60, 10_000)]
    for loss, grads, metrics in results[1:]:
        assert loss == pytest.approx(results[0][0], rel=1e-6)
        assert difference(grads, results[0][1]) < 1e-5
        # on tokens spread over each micro-batch: another sample
        probed = {"entropy", "mean_token_accuracy"}
        for name in metrics.keys() - probed:
            assert metrics[name] == pytest.approx(results[0][2][name], rel=1e-4, abs=1e-6), name


@pytest.mark.parametrize("checkpointing", ["selective", "full"])
def test_checkpointing_changes_nothing(checkpointing: str) -> None:
    pairs = tiny.pairs(8, weights=WEIGHTS)
    loss, grads, _ = gradient(pairs)
    again, recomputed, _ = gradient(pairs, checkpointing=checkpointing)
    assert again == loss and difference(recomputed, grads) < 1e-6


def test_weights_scale_each_pairs_gradient() -> None:
    """The gradient of a weighted batch is the weighted sum of its pairs' own,
    over the number of pairs.
    """
    pairs = tiny.pairs(3, weights=[0.5, 0.0, 2.0])
    _, whole, _ = gradient(pairs)
    alone = [gradient([replace(pair, weight=1.0)])[1] for pair in pairs]
    for name, grad in whole.items():
        expected = sum(pair.weight * own[name] for pair, own in zip(pairs, alone, strict=True)) / 3
        assert (grad - expected).norm() < 1e-5 * grad.norm()


def test_log_probs_are_summed_not_averaged() -> None:
    """Twice the tokens, about twice the log-prob: DPO needs sums."""
    pair = tiny.pairs(1)[0]
    long = replace(pair, real=pair.real * 4, generated=list(pair.generated or ()))
    metrics = gradient([long])[2]
    expected = tiny.logps(tiny.mistral(), long.prompt, long.real).sum().item()
    assert metrics["logps/chosen"] == pytest.approx(expected, rel=1e-4)
    assert metrics["rewards/chosen"] == pytest.approx(
        SETTINGS.beta * (expected - long.ref_real), rel=1e-3
    )


def test_all_weights_one_is_spin_bit_for_bit() -> None:
    """SPIN's pairs carry no weight; LD-Align's with equal distances carry 1."""
    plain = with_reference(tiny.pairs(12))
    weighted = [replace(pair, weight=1.0) for pair in plain]
    ends = []
    for pairs in (plain, weighted):
        model = tiny.mistral()
        train(model, pairs, SETTINGS, compute_dtype=torch.float32, device=CPU, seed=0, stage="t")
        ends.append(distributed.full_state(model, torch.float32))
    assert all(torch.equal(ends[0][n], ends[1][n]) for n in ends[0])
    assert not torch.equal(
        ends[0]["model.norm.weight"], tiny.mistral().state_dict()["model.norm.weight"]
    )


def run(
    pairs: Sequence[Pair], path: Path | None = None, **settings: Any
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    model = tiny.mistral()
    chosen = replace(SETTINGS, **settings)
    out = train(
        model,
        pairs,
        chosen,
        compute_dtype=torch.float32,
        device=CPU,
        seed=0,
        stage="policy",
        metrics_path=path,
    )
    records = [json.loads(line) for line in path.read_text().splitlines()] if path else []
    return records, out


def test_step_0_must_start_at_the_reference() -> None:
    pairs = with_reference(tiny.pairs(8, weights=WEIGHTS))
    run(pairs)
    wrong = with_reference(pairs, tiny.mistral(seed=1))
    with pytest.raises(NumericsError, match=r"^policy: step 0: .* not those of the start policy"):
        run(wrong)
    model = tiny.mistral()
    train(
        model,
        wrong,
        SETTINGS,
        compute_dtype=torch.float32,
        device=CPU,
        seed=0,
        stage="t",
        step0_is_reference=False,
    )


BFLOAT16 = policy.STEP0_TOLERANCE[torch.bfloat16]  # put in the place of float32's


def moved(pairs: Sequence[Pair], *nats: float) -> list[Pair]:
    """The pairs with the first ones' winner further off the reference."""
    off = [replace(p, ref_real=p.ref_real + x) for p, x in zip(pairs, nats, strict=False)]
    return [*off, *pairs[len(off) :]]


@pytest.mark.parametrize("beta", [0.1, 5.0])
def test_step_0_is_judged_in_nats_whatever_beta_is(
    beta: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Log-probs that are off as bfloat16 rounds them, either way or all the same; and one by 4
    nats, which cancel in the mean loss, or which the other pairs outweigh there.
    """
    pairs = with_reference(tiny.pairs(8, weights=WEIGHTS))
    monkeypatch.setitem(policy.STEP0_TOLERANCE, torch.float32, BFLOAT16)
    assert all(1.9 < BFLOAT16 * (len(pair.real) + 15) ** 0.5 < 2.5 for pair in pairs)
    for sound in (moved(pairs, -0.5, 0.5), moved(pairs, 0.5, 0.5), moved(pairs, 1.9)):
        run(sound, beta=beta)
    for wrong in (moved(pairs, 0.0, 4.0), moved(pairs, -4.0, 4.0), moved(pairs, 0.0, 2.6)):
        with pytest.raises(NumericsError, match=r"row-[01]'s real response \(\d tokens\) is [-+]"):
            run(wrong, beta=beta)


def test_step_0_asks_more_of_many_responses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each may be off by what one of few tokens is; all of them at once are not.

    The allowed root mean square, from the text: 0.3 of one's, and the rest by the root of the
    number of responses.
    """
    pairs = with_reference(tiny.pairs(8, weights=WEIGHTS))
    monkeypatch.setitem(policy.STEP0_TOLERANCE, torch.float32, BFLOAT16)
    mean = sum(len(r) + 15 for pair in pairs for r in pair.responses) / 16
    allowed = BFLOAT16 * (0.3 + 0.7 / 16**0.5) * mean**0.5
    near = allowed * 2**0.5  # of the real ones alone: half of 16
    run(moved(pairs, *[0.98 * near] * 8))
    with pytest.raises(NumericsError) as refused:
        run(moved(pairs, *[1.02 * near] * 8))
    said = re.search(
        r"log-probs of 16 responses are ([\d.]+) nats .* explains ([\d.]+): ", str(refused.value)
    )
    assert said and float(said[1]) == pytest.approx(1.02 * allowed, rel=1e-3)
    assert float(said[2]) == pytest.approx(allowed, rel=1e-3)
    assert "most of all row row-" in str(refused.value)


def test_step_0_counts_the_responses_of_all_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A rank whose own are exact refuses for another's: the worst one's, or the sum's."""
    pairs = with_reference(tiny.pairs(8, weights=WEIGHTS))
    for worst, squares, wrong in (
        (0.9, 16 * 0.0004**2, False),
        (0.9, 16 * 0.0007**2, True),
        (1.1, 0.0, True),
    ):
        other = ((worst, 1e-3, 9e-4, "row x's real response (5 tokens)"), 16, squares, 16 * 20)
        monkeypatch.setattr(distributed, "on_all", lambda work, other=other: [work(), other])
        if wrong:
            with pytest.raises(NumericsError, match="row x's real response"):
                run(pairs)
        else:
            run(pairs)


def test_step_0_names_the_worst_response_and_its_nats() -> None:
    pairs = with_reference(tiny.pairs(8, weights=WEIGHTS))
    pairs[2] = replace(pairs[2], ref_real=pairs[2].ref_real - 0.01)
    pairs[5] = replace(pairs[5], ref_generated=pairs[5].ref_generated + 0.05)
    tokens = len(pairs[5].generated or ())
    expected = (
        rf"row-5's generated response \({tokens} tokens\) is -0\.0500 nats from the cached "
        rf"reference's, and rounding explains {2e-4 * (tokens + 15) ** 0.5:.4f}: "
    )
    with pytest.raises(NumericsError, match=expected):
        run(pairs)


@pytest.mark.parametrize("options", [DPO, *OPTIONS], ids=str)
def test_every_loss_has_its_own_start(options: LossOptions, tmp_path: Path) -> None:
    """ln 2 or 1/(4 beta^2) without weights and NLL; another model's reference is refused."""
    pairs = with_reference(tiny.pairs(8, weights=WEIGHTS))
    (first,), _ = run(pairs, tmp_path / "m.jsonl", loss=options, beta=0.2)
    ipo = options.kind == "ipo"
    start = 6.25 if ipo else math.log(2)
    assert first["loss/unweighted"] == pytest.approx(start, abs=1e-4)
    assert first["rewards/margins"] == pytest.approx(0, abs=1e-5)
    expected = first["weight/mean"] * start
    if options.nll:
        plain = [-pair.ref_real / len(pair.real) for pair in pairs]
        assert first["nll/chosen"] == pytest.approx(sum(plain) / len(plain), rel=1e-5)
        expected += options.nll * first["nll/chosen"]
    assert first["loss"] == pytest.approx(expected, rel=1e-5)
    wrong = with_reference(pairs, tiny.mistral(seed=1))
    with pytest.raises(NumericsError, match="not those of the start policy"):
        run(wrong, loss=options, beta=0.2)


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_a_non_finite_step_leaves_the_weights_alone(
    where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A NaN loss, and a finite loss whose gradient is infinite; the message
    names rows of the batch.
    """
    pairs = with_reference(tiny.pairs(8))
    if where == "loss":
        pairs[3] = replace(pairs[3], ref_real=math.nan)
    else:
        plain = policy._dpo

        def explode(hidden: Tensor, *rest: Any) -> Tensor:
            loss = plain(hidden, *rest)
            return loss + (hidden - hidden.detach()).abs().sum().sqrt()  # 0, with an infinite slope

        monkeypatch.setattr(policy, "_dpo", explode)
    model = tiny.mistral()
    with pytest.raises(NumericsError, match="row-"):
        train(model, pairs, SETTINGS, compute_dtype=torch.float32, device=CPU, seed=0, stage="t")
    state = distributed.full_state(model, torch.float32)
    assert all(torch.equal(state[name], p) for name, p in tiny.mistral().state_dict().items())


@pytest.mark.parametrize("optimizer", ["adamw", "rmsprop"])
@pytest.mark.parametrize("kind", ["sft", "dpo"])
def test_both_optimizers_lower_both_losses(optimizer: str, kind: str, tmp_path: Path) -> None:
    pairs = with_reference(tiny.pairs(16))
    pairs = as_sft(pairs) if kind == "sft" else pairs
    records, last = run(
        pairs, tmp_path / "m.jsonl", optimizer=optimizer, epochs=6, beta=0.3, warmup_ratio=0.0
    )
    losses = [r["loss"] for r in records]
    assert len(losses) == 12 and sum(losses[-2:]) < 0.93 * sum(losses[:2])
    assert last["steps"] == 12 and last["loss"] == pytest.approx(sum(losses[-2:]) / 2)
    if kind == "dpo":
        assert losses[0] == pytest.approx(math.log(2), abs=1e-5)
        assert last["rewards/accuracies"] > 0.9 and last["rewards/margins"] > 0.05


@pytest.mark.parametrize("kind", ["sft", "dpo"])
def test_a_line_has_what_a_person_watches(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pairs = with_reference(tiny.pairs(11, weights=[*WEIGHTS, 1.0, 2.0, 0.0]))
    records, _ = run(as_sft(pairs) if kind == "sft" else pairs, tmp_path / "m.jsonl")
    first, last = capsys.readouterr().err.splitlines()
    wanted = [f"step 1/2  loss {records[0]['loss']:.4f}"]
    wanted += ["lr ", " tokens/s", " GiB"]
    if kind == "dpo":
        wanted.append(f"  unweighted {records[0]['loss/unweighted']:.4f}  margin ")
    assert all(part in first for part in wanted) and first.endswith(" left")
    assert "step 2/2" in last and "left" not in last and len(first) <= 160


def test_metrics_have_trl_names_and_means_over_examples(tmp_path: Path) -> None:
    """11 pairs in steps of 8 and 3, micro-batches uneven: step 1's metrics are
    those of its own 8 pairs.
    """
    pairs = with_reference(tiny.pairs(11, weights=[*WEIGHTS, 1.0, 2.0, 0.0]))
    records, _ = run(pairs, tmp_path / "m.jsonl")
    assert [r["global_step"] for r in records] == [1, 2]
    assert [r["epoch"] for r in records] == [0.5, 1.0]
    trl = (
        "rewards/chosen rewards/rejected rewards/accuracies rewards/margins logps/chosen "
        "logps/rejected logits/chosen"
    )
    trl += (
        " logits/rejected loss grad_norm learning_rate epoch num_tokens entropy mean_token_accuracy"
    )
    assert set(trl.split()) <= records[0].keys()
    assert records[0]["loss/unweighted"] == pytest.approx(math.log(2), abs=1e-5)
    (_, first), (_, second) = global_batches(11, 8, 1, 0, "policy")
    for record, rows in ((records[0], first), (records[1], second)):
        chosen = [pairs[i] for i in rows]
        assert record["weight/mean"] == pytest.approx(sum(p.weight for p in chosen) / len(chosen))
        assert record["len/rejected"] == pytest.approx(
            sum(len(p.generated or ()) for p in chosen) / len(chosen)
        )
        assert record["logps/ref_chosen"] == pytest.approx(
            sum(p.ref_real for p in chosen) / len(chosen), rel=1e-5
        )
    assert records[0]["logps/chosen"] == pytest.approx(records[0]["logps/ref_chosen"], rel=1e-4)
    assert records[0]["loss"] == pytest.approx(math.log(2) * records[0]["weight/mean"], abs=1e-4)
    assert records[1]["num_tokens"] == sum(p.tokens for p in pairs)
    # one batch of logits, the plain way
    model = tiny.mistral()
    wanted = {"logits/chosen": [], "logits/rejected": []}  # type: ignore[var-annotated]
    for pair in (pairs[i] for i in first):
        for name, response in zip(wanted, pair.responses, strict=True):
            out = model(torch.tensor([[*pair.prompt, *response]]))
            wanted[name] += out[0, len(pair.prompt) - 1 : -1].mean(-1).tolist()
    for name, values in wanted.items():
        assert records[0][name] == pytest.approx(sum(values) / len(values), abs=1e-5)


def test_sft_metrics_and_divisor(tmp_path: Path) -> None:
    """SFT's loss is the mean over tokens of the global batch, so it equals the metric nll."""
    (record,), _ = run(as_sft(tiny.pairs(8)), tmp_path / "m.jsonl")
    assert record["loss"] == pytest.approx(record["nll"], rel=1e-6)
    assert "rewards/margins" not in record and 0 <= record["mean_token_accuracy"] <= 1
    assert record["entropy"] > 0


def test_steps_in_place_of_epochs(tmp_path: Path) -> None:
    """Nine steps of three pairs over five: they are passed over as often as that takes, and the
    schedule spans nine.
    """
    pairs = with_reference(tiny.pairs(5))
    records, last = run(
        pairs, tmp_path / "a.jsonl", epochs=1, steps=9, global_batch=3, schedule="linear"
    )
    assert [r["global_step"] for r in records] == list(range(1, 10)) and last["steps"] == 9
    assert [r["epoch"] for r in records] == [0.5 * n for n in range(1, 10)]
    assert records[-1]["learning_rate"] < records[1]["learning_rate"] / 6


def test_learning_rate_and_max_steps(tmp_path: Path) -> None:
    """The schedule spans all epochs even where max_steps ends the run early."""
    pairs = with_reference(tiny.pairs(16))
    whole, _ = run(pairs, tmp_path / "a.jsonl", epochs=5, warmup_ratio=0.2, schedule="linear")
    assert [r["learning_rate"] * 1e3 for r in whole] == pytest.approx(
        [0.5, 1, 1, *(n / 8 for n in range(7, 0, -1))]
    )
    some, last = run(
        pairs, tmp_path / "b.jsonl", epochs=5, warmup_ratio=0.2, schedule="linear", max_steps=4
    )
    assert [r["loss"] for r in some] == [r["loss"] for r in whole[:4]] and last["steps"] == 4


def test_clipping(tmp_path: Path) -> None:
    """The norm is that before clipping; the factor makes it `most`, and is 1 if it is infinite."""
    pairs = tiny.pairs(8)
    _, grads, _ = gradient(pairs)
    norm = math.sqrt(sum(float(g.double().square().sum()) for g in grads.values()))
    for most, expected in ((norm / 3, norm / 3), (0.0, norm), (norm * 2, norm)):
        model = tiny.mistral()
        distributed.shard(model, model.blocks, torch.float32, CPU)
        batch = global_batch(model, pairs, SETTINGS, CPU)
        accumulate_gradients(model, batch, SETTINGS, Mean(), CPU)
        before, factor = distributed.clip_grad_norm(model, most)
        assert float(before) == pytest.approx(norm, rel=1e-5)
        assert float(before * factor) == pytest.approx(expected, rel=1e-4)
        assert (factor == 1) == (expected == norm)
    next(model.parameters()).grad.view(-1)[0] = math.inf  # type: ignore[union-attr]
    assert [float(x) for x in distributed.clip_grad_norm(model, 1.0)] == [math.inf, 1.0]


def test_the_loop_clips() -> None:
    """A step of AdamW does not feel the gradient's size until that is far below eps."""
    pairs, plain = with_reference(tiny.pairs(8)), tiny.mistral()
    moved = []
    for most in (1.0, 1e-12):
        model = tiny.mistral()
        settings = replace(SETTINGS, max_grad_norm=most)
        train(
            model, pairs, settings, compute_dtype=torch.float32, device=CPU, seed=0, stage="policy"
        )
        differences = zip(model.parameters(), plain.parameters(), strict=True)
        moved.append(max(float((a - b).detach().abs().max()) for a, b in differences))
    assert moved[0] > 0.5 * SETTINGS.learning_rate and moved[1] < 1e-3 * SETTINGS.learning_rate


def test_trajectory_does_not_depend_on_micro_batches(tmp_path: Path) -> None:
    """50 steps: losses within 1e-4, mean drift within 1e-5."""
    pairs = with_reference(tiny.pairs(40, weights=[0.1 * (i % 20) for i in range(40)]))
    losses = []
    for n, micro_tokens in enumerate((1, 10_000)):
        records, _ = run(
            pairs, tmp_path / f"{n}.jsonl", epochs=10, micro_tokens=micro_tokens, learning_rate=1e-3
        )
        losses.append(torch.tensor([r["loss"] for r in records], dtype=torch.float64))
    gap = losses[0] - losses[1]
    assert len(gap) == 50 and gap.abs().max() < 1e-4 and gap.mean().abs() < 1e-5
    assert losses[0][-5:].mean() < 0.8 * losses[0][:5].mean()


def test_no_pairs_is_an_error() -> None:
    with pytest.raises(ValueError, match="no pairs"):
        run([])


@pytest.mark.parametrize("optimizer", ["adamw", "rmsprop"])
def test_pairs_of_weight_0_do_no_harm(optimizer: str) -> None:
    """Steps of such pairs alone leave every weight as it is; among others they add nothing to the
    gradient, and still count in the divisor, as the mean weight is over all pairs.
    """
    pairs = with_reference(tiny.pairs(4, weights=[0.0] * 4))
    model = tiny.mistral()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    settings = replace(SETTINGS, optimizer=optimizer, weight_decay=0.0, epochs=2, global_batch=2)
    found = train(
        model, pairs, settings, compute_dtype=torch.float32, device=CPU, seed=0, stage="x"
    )
    assert found["loss"] == 0.0 and found["loss/unweighted"] > 0
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())
    some = tiny.pairs(4, weights=[0.0, 2.0, 0.0, 1.5])
    alone = [replace(pair, weight=pair.weight / 2) for pair in some if pair.weight]
    assert difference(gradient(some)[1], gradient(alone)[1]) < 1e-4
