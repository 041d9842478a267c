"""The stages of a run, each a folder with a manifest: data, policy (SFT or alignment), responses, guide, distances,
reference, evaluation.

A stage reads the folders of the stages before it and writes its own; `pipeline.run_stage` skips what is done and
refuses what was made from something else. A stage's parents are what its output depends on: contents (hashes of rows,
model folders, files of earlier stages) and config keys by their own names, so that a refusal names the key. Not among
them is what only moves work about and changes the last bits at most: micro_tokens, batch_rows, checkpointing,
shard_ranks, whole, checkpoint.*, the number of ranks. Every function here is called by all ranks.
"""

import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, cast

import torch
from safetensors.torch import load_file

from ldalign import distributed
from ldalign.answers import make_answers
from ldalign.batches import Pair
from ldalign.checkpoint import Plan
from ldalign.context import Context, prompt_text
from ldalign.data import Row, data_hash
from ldalign.decoders import Decoder, new_decoder
from ldalign.engine import Engine, Request
from ldalign.errors import InputError
from ldalign.evaluate import EvaluationSettings, evaluate
from ldalign.files import save_tensors
from ldalign.generate import text_of
from ldalign.gpt2 import GPT2Config
from ldalign.guide import GuideConfig, is_trained_guide, load_guide, new_guide
from ldalign.guide_training import GuideTrainSettings, train_guide
from ldalign.losers import read_losers
from ldalign.methods import distance_weights, effective_size, usable, with_losers
from ldalign.metrics import Bar, say
from ldalign.mistral import Mistral
from ldalign.pipeline import (
    CHECKPOINTS,
    Parents,
    hash_file,
    hash_model_folder,
    hash_settings,
    read_jsonl,
    write_json,
    write_jsonl,
    write_rows,
)
from ldalign.sampling import Response, Sampling
from ldalign.scoring import response_logps
from ldalign.settings import RunConfig, Sft
from ldalign.summaries import Metrics, stage
from ldalign.tokenizer import Tokenizer
from ldalign.training import TrainSettings, train
from ldalign.weights import load_model, save_model

log = logging.getLogger(__name__)

SCHEDULE_KEYS = (
    "training.schedule", "training.warmup_ratio", "training.weight_decay", "training.max_grad_norm",
    "training.master_dtype", "training.state_dtype",
)  # fmt: skip
SAMPLING_KEYS = tuple(
    f"sampling.{key}" for key in ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "stop")
)


def data_stage(ctx: Context) -> None:
    """The rows as they are used, after reading, splitting and dropping: data/train.jsonl and data/heldout.jsonl.

    The ids of dropped rows are in data/dropped.jsonl.
    """

    def make(folder: Path) -> Metrics:
        if distributed.rank() == 0:
            for name, prepared in (("train", ctx.train), ("heldout", ctx.heldout)):
                write_jsonl(folder / f"{name}.jsonl", map(_record, prepared.rows))
            dropped = [
                {"split": name, "id": id_, "reason": f"the prompt alone fills max_length={ctx.config.max_length}"}
                for name, prepared in (("train", ctx.train), ("heldout", ctx.heldout)) for id_ in prepared.dropped
            ]  # fmt: skip
            write_jsonl(folder / "dropped.jsonl", dropped)
        return {
            "rows/train": len(ctx.train.rows), "rows/heldout": len(ctx.heldout.rows),
            "rows/dropped": len(ctx.train.dropped), "rows/cut": ctx.train.cut,
        }  # fmt: skip

    parents: Parents = {
        "data (training rows)": data_hash(ctx.train.rows), "number of training rows": len(ctx.train.rows),
        "data (held-out rows)": ctx.heldout_hash, "number of held-out rows": len(ctx.heldout.rows),
    }  # fmt: skip
    stage(ctx, "data", {**parents, **ctx.keys("turns", "max_length")}, make)


def _record(row: Row) -> dict[str, Any]:
    messages = [*row.history, {"role": "assistant", "content": row.response}]
    record: dict[str, Any] = {"id": row.id, "messages": messages}
    if row.rejected is not None:
        record = {
            "id": row.id,
            "chosen": messages,
            "rejected": [*row.history, {"role": "assistant", "content": row.rejected}],
        }
    return record | ({"kind": row.kind, "answer": row.answer} if row.kind is not None else {})


# --------------------------------------------------------------------------------------------------------------- SFT


def start_stage(ctx: Context) -> Path:
    """The policy that self-play starts from: the given one, after SFT where the config asks for it."""
    return sft_stage(ctx, "sft", ctx.start) if ctx.config.sft.epochs else ctx.start


def start_name(config: RunConfig) -> str:
    """What the start policy is called in the run folder and the table."""
    return "sft" if config.sft.epochs else "start"


def sft_stage(ctx: Context, group: Literal["sft", "continual_sft"], start: Path) -> Path:
    """Supervised fine-tuning of `start` on real responses by one group of config keys; returns the policy's folder."""
    sft: Sft = getattr(ctx.config, group)
    rows, pairs = ctx.train.rows[: sft.rows], ctx.train.pairs[: sft.rows]
    settings = replace(
        _train_settings(ctx), epochs=sft.epochs, learning_rate=sft.learning_rate, global_batch=sft.global_batch,
        optimizer="adamw",
    )  # fmt: skip
    keys = ctx.keys(f"{group}.epochs", f"{group}.learning_rate", f"{group}.global_batch", "max_length")
    return _train_stage(ctx, f"{group}/policy", start, pairs, settings, {"data": data_hash(rows), **keys})


def _train_settings(ctx: Context) -> TrainSettings:
    c, t = ctx.config, ctx.config.training
    return TrainSettings(
        epochs=t.epochs, global_batch=c.global_batch, micro_tokens=t.micro_tokens, learning_rate=c.learning_rate,
        optimizer=t.optimizer, schedule=t.schedule, warmup_ratio=t.warmup_ratio, weight_decay=t.weight_decay,
        max_grad_norm=t.max_grad_norm, beta=c.beta, checkpointing=t.checkpointing,
        state_dtype=getattr(torch, t.state_dtype), sharding=distributed.Sharding(t.shard_ranks, t.whole),
    )  # fmt: skip


def _train_stage(
    ctx: Context, name: str, start: Path, pairs: Sequence[Pair], settings: TrainSettings, parents: Parents,
    *, step0_is_reference: bool = True, extra: Metrics | None = None,
) -> Path:  # fmt: skip
    """Trains `start` on pairs; the stage folder is a model folder that also holds metrics.jsonl and summary.json."""

    def make(folder: Path) -> Metrics:
        model = load_model(
            start, getattr(torch, ctx.config.training.master_dtype), ctx.device,
            lambda m: distributed.shard(m, m.blocks, ctx.dtype, ctx.device, settings.sharding),
        )  # fmt: skip
        summary = train(
            model, pairs, settings, compute_dtype=ctx.dtype, device=ctx.device, seed=ctx.config.seed, stage=name,
            metrics_path=folder / "metrics.jsonl", step0_is_reference=step0_is_reference,
            checkpoints=_plan(ctx, folder),
        )  # fmt: skip
        dtype = torch.bfloat16 if ctx.config.policy_dtype == "bfloat16" else torch.float32
        state = distributed.full_state(model, dtype)
        if distributed.rank() == 0:
            save_model(model, folder, start, dtype, state)
        return summary | (extra or {})

    parents = {
        **parents, "policy": hash_model_folder(start), "template": ctx.tokenizer.template_hash,
        **ctx.keys("seed", "policy_dtype", *SCHEDULE_KEYS), "dtype": str(ctx.dtype),
    }  # fmt: skip
    stage(ctx, name, parents, make, resume=True)
    return ctx.run.path / name


def _plan(ctx: Context, folder: Path) -> Plan:
    """The checkpoints of a stage that is made in `folder`."""
    c = ctx.config.checkpoint
    return Plan(folder / CHECKPOINTS, c.minutes, c.steps, c.keep)


# --------------------------------------------------------------------------------------------------------- iteration


def responses_stage(ctx: Context, t: int, policy: Path) -> list[Response]:
    """Samples one response a row from `policy`, or takes those that are given for the first iteration.

    The records carry what was sampled, token by token. A run that was cut short is gone on with.
    """
    name, config = f"iteration_{t}/responses", ctx.config
    rows, pairs = ctx.used
    given = Path(config.responses).expanduser() if config.responses and t == 0 else None
    sampling = sampling_of(config)
    requests = [
        Request(f"iteration/{t}/{row.id}", p.prompt, i) for i, (row, p) in enumerate(zip(rows, pairs, strict=True))
    ]

    def record(request: Request, r: Response) -> dict[str, Any]:
        text = text_of(ctx.tokenizer.decode(r.ids), sampling)
        return {"id": rows[request.index].id, "response": text, "finish_reason": r.finish_reason,
                "n_tokens": len(r.ids), "token_ids": r.ids, "logp": r.logp}  # fmt: skip

    def make(folder: Path) -> Metrics:
        path = folder / "responses.jsonl"
        if given is not None:
            prompts = ctx.run.path / "data/train.jsonl"
            losers = read_losers(given, rows, pairs, ctx.train.rows, ctx.tokenizer, prompts)
            records = [record(request, loser) for request, loser in zip(requests, losers, strict=True)]
            if distributed.rank() == 0:
                write_jsonl(path, records)
        else:
            model = cast(Mistral, load_model(policy, ctx.dtype, ctx.device))
            engine = new_engine(config, requests, ctx.tokenizer)
            with Bar(name, -(-len(rows) // distributed.world_size()), "rows") as progress:
                records = make_answers(path, requests, new_decoder(model, release=True), engine, record, progress)
        tokens = sum(r["n_tokens"] for r in records)
        cut = sum(r["finish_reason"] == "length" for r in records)
        return {
            "rows": len(rows), "tokens": tokens, "len/rejected": tokens / len(rows),
            "losers/given": float(given is not None), "losers/truncated_frac": cut / len(rows),
        }  # fmt: skip

    parents: dict[str, str | int | float] = {"data": ctx.used_hash, "template": ctx.tokenizer.template_hash}
    if given is not None:
        parents["responses"] = hash_file(given) if given.is_file() else "absent"
    else:
        parents |= {"policy": hash_model_folder(policy), "iteration": t, "dtype": str(ctx.dtype),
                    **ctx.keys("max_new_tokens", *SAMPLING_KEYS, "seed")}  # fmt: skip
    stage(ctx, name, parents, make, resume=True)
    records = read_jsonl(ctx.run.path / name / "responses.jsonl")
    return [Response(r["token_ids"], r["finish_reason"], r["logp"]) for r in records]


def sampling_of(config: RunConfig) -> Sampling:
    """How training responses are sampled."""
    s = config.sampling
    return Sampling(
        config.max_new_tokens, s.temperature, s.top_k, s.top_p, s.min_p, s.repetition_penalty, tuple(s.stop)
    )


def new_engine(config: RunConfig, requests: Sequence[Request], tokenizer: Tokenizer) -> Callable[[Decoder], Engine]:
    """Of a decoder: the engine that samples as the config says."""
    s = config.sampling
    longest = max((len(request.prompt) for request in requests), default=1) + config.max_new_tokens
    cache_bytes = None if s.cache_gib is None else int(s.cache_gib * 2**30)
    rows = min(s.batch_rows, max(1, len(requests)))
    return lambda decoder: Engine(
        decoder, sampling_of(config), tokenizer.end_ids, config.seed, longest=longest, rows=rows,
        cache_bytes=cache_bytes, decode=tokenizer.decode,
    )  # fmt: skip


def guide_stage(ctx: Context, generated: Sequence[str] | None = None) -> Path:
    """Trains the guide on real and generated responses, or takes the trained one that is given; returns its folder.

    generated: a text a row of `ctx.used`; None: the start policy's samples, in iteration_0/responses.
    """
    g = ctx.config.guide
    given = Path(g.folder).expanduser() if g.folder else None
    if given is not None and is_trained_guide(given):
        return given
    rows, _ = ctx.used
    if generated is None:
        generated = [r["response"] for r in read_jsonl(ctx.run.path / "iteration_0/responses/responses.jsonl")]

    def make(folder: Path) -> Metrics:
        texts = [(prompt_text(row), row.response, loser) for row, loser in zip(rows, generated, strict=True)]
        config = GuideConfig(g.latent_tokens, g.latent_width, g.token_dropout, g.latent_dropout, g.max_tokens)
        size = GPT2Config(g.vocabulary, max(1024, g.max_tokens + g.latent_tokens), g.width, g.layers, g.heads)
        guide = new_guide(config, ctx.config.seed, given, [t for row in texts for t in row], size)
        examples = [(guide.example(x, y), guide.example(x, z)) for x, y, z in texts]
        settings = GuideTrainSettings(g.epochs, g.global_batch, g.learning_rate, ctx.config.training.micro_tokens,
                                      g.heldout_fraction)  # fmt: skip
        losses = train_guide(guide.to(ctx.device), examples, settings, device=ctx.device, seed=ctx.config.seed,
                             metrics_path=folder / "metrics.jsonl", ids=[row.id for row in rows],
                             checkpoints=_plan(ctx, folder))  # fmt: skip
        state = distributed.full_state(guide, torch.float32)
        if distributed.rank() == 0:
            guide.save(folder, state)
        return losses

    stage(ctx, "guide", _guide_parents(ctx, given, generated), make, resume=True)
    return ctx.run.path / "guide"


def _guide_parents(ctx: Context, given: Path | None, generated: Sequence[str]) -> Parents:
    keys = {name: value for name, value in ctx.keys("guide", "seed").items() if name != "guide.folder"}
    if given is not None:
        for name in ("layers", "width", "heads", "vocabulary"):  # the given GPT-2 has its own
            keys.pop(f"guide.{name}")
    return {
        **keys, "data": ctx.used_hash, "responses": hash_settings(list(generated)),
        "pretrained": hash_model_folder(given) if given else "none",
    }  # fmt: skip


def distances_stage(ctx: Context, t: int, guide: Path, responses: Sequence[Response]) -> torch.Tensor:
    """Latent distances of this iteration's pairs, and the weights made of them; returns the weights (N,) float64."""
    name = f"iteration_{t}/distances"
    rows, pairs = ctx.used
    kept = [usable(pair) for pair in with_losers(pairs, [r.ids for r in responses], ctx.config.max_length)]

    def make(folder: Path) -> Metrics:
        mine = range(distributed.rank(), len(rows), distributed.world_size())
        model = load_guide(guide, ctx.device)
        values = model.distance([prompt_text(rows[i]) for i in mine], [rows[i].response for i in mine],
                                [ctx.tokenizer.decode(responses[i].ids) for i in mine])  # fmt: skip
        distances = distributed.merge_rows(len(rows), mine, values)
        weights = distance_weights(distances, kept)
        if distributed.rank() == 0:
            columns = zip(rows, distances.tolist(), weights.tolist(), strict=True)
            write_jsonl(folder / "distances.jsonl", ({"id": r.id, "distance": d, "weight": w} for r, d, w in columns))
        return _distance_summary(distances, weights, kept)

    parents = {
        "guide": _guide_hash(guide), "responses": _file_hash(ctx, f"iteration_{t}/responses/responses.jsonl"),
        "data": ctx.used_hash, **ctx.keys("max_length"),
    }  # fmt: skip
    stage(ctx, name, parents, make)
    return torch.tensor([r["weight"] for r in read_jsonl(ctx.run.path / name / "distances.jsonl")], dtype=torch.float64)


def _guide_hash(folder: Path) -> str:
    # The folder itself counts as one: latent.safetensors and tokenizer.json lie in it.
    parts = [hash_model_folder(part) for part in (folder, folder / "encoder", folder / "decoder")]
    return hash_settings([*parts, hash_file(folder / "guide.json")])


def _distance_summary(distances: torch.Tensor, weights: torch.Tensor, kept: Sequence[bool]) -> Metrics:
    """Of the pairs that count; {} if there are none."""
    chosen = torch.tensor(list(kept))
    d, w = distances[chosen], weights[chosen]
    if not len(d):
        return {}
    quantiles = {f"distance/p{q}": float(d.quantile(q / 100)) for q in (10, 50, 90)}
    return {
        "distance/mean": float(d.mean()), "distance/std": float(d.std(correction=0)), **quantiles,
        "weight/mean": float(w.mean()), "weight/min": float(w.min()), "weight/max": float(w.max()),
        "weight/std": float(w.std(correction=0)), "weight/ess": effective_size(w),
    }  # fmt: skip


def reference_stage(ctx: Context, t: int, policy: Path, responses: Sequence[Response]) -> list[Pair]:
    """Log-probs of both responses under the reference policy, cached by row id; returns the pairs that carry them.

    Pairs that will not be trained on are not scored, and carry zeros. losers/cut in the summary counts the sampled
    responses that max_length cut: they have no end token.
    """
    name = f"iteration_{t}/reference"
    pairs = with_losers(ctx.used[1], [r.ids for r in responses], ctx.config.max_length)
    kept = [pair for pair in pairs if usable(pair)]

    def make(folder: Path) -> Metrics:
        model = load_model(policy, ctx.dtype, ctx.device)
        with Bar(name, len(kept), "pairs") as progress:
            logps = response_logps(model, kept, ctx.config.training.micro_tokens, ctx.device, lambda n: progress(n, 0))
        if distributed.rank() == 0:
            save_tensors({"logps": logps}, folder / "reference.safetensors")
            write_json(folder / "rows.json", [pair.id for pair in kept])
        cut = sum(len(r.ids) > len(pair.generated or ()) for r, pair in zip(responses, pairs, strict=True))
        if not kept:
            return {"losers/cut": cut}
        real, generated = logps.mean(0).tolist()
        return {"logps/ref_chosen": real, "logps/ref_rejected": generated, "losers/cut": cut}

    parents = {
        "policy": hash_model_folder(policy), "data": ctx.used_hash, "template": ctx.tokenizer.template_hash,
        "responses": _file_hash(ctx, f"iteration_{t}/responses/responses.jsonl"), "dtype": str(ctx.dtype),
        **ctx.keys("max_length"),
    }  # fmt: skip
    stage(ctx, name, parents, make)
    folder = ctx.run.path / name
    ids = json.loads((folder / "rows.json").read_text(encoding="utf-8"))
    logps = dict(zip(ids, load_file(folder / "reference.safetensors")["logps"].tolist(), strict=True))
    return [
        replace(pair, ref_real=logps[pair.id][0], ref_generated=logps[pair.id][1]) if usable(pair) else pair
        for pair in pairs
    ]


def policy_stage(ctx: Context, t: int, start: Path, pairs: Sequence[Pair], weights: torch.Tensor) -> Path:
    """Aligns `start` on this iteration's pairs; returns the next policy's folder."""
    kept = [replace(p, weight=float(w)) for p, w in zip(pairs, weights, strict=True) if usable(p)]
    if not kept:
        raise InputError(f"iteration {t}: every sampled response equals the real one; there is nothing left to learn")
    skipped = len(pairs) - len(kept)
    parents = {
        "data": ctx.used_hash, "responses": _file_hash(ctx, f"iteration_{t}/responses/responses.jsonl"),
        "reference": _file_hash(ctx, f"iteration_{t}/reference/reference.safetensors"),
        "weights": hash_settings([p.weight for p in kept]),
        **ctx.keys("method", "global_batch", "learning_rate", "beta", "max_length"),
        **ctx.keys("training.epochs", "training.optimizer"),
    }  # fmt: skip
    return _train_stage(
        ctx, f"iteration_{t}/policy", start, kept, _train_settings(ctx), parents,
        step0_is_reference=ctx.config.reference == "iteration" or t == 0,
        extra={"pairs": len(kept), "skipped_pairs": skipped, "losers/identical_frac": skipped / len(pairs)},
    )  # fmt: skip


def _file_hash(ctx: Context, name: str) -> str:
    return hash_file(ctx.run.path / name)


# -------------------------------------------------------------------------------------------------------- evaluation


def evaluation_stage(ctx: Context, name: str, policy: Path) -> Metrics:
    """Held-out metrics of `policy` in NAME/evaluation, with every answer it gave; {} where no rows are held out."""
    e, config = ctx.config.evaluation, ctx.config
    name = f"{name}/evaluation"
    if not ctx.heldout.rows:
        return {}
    settings = EvaluationSettings(
        e.samples, Sampling(config.max_new_tokens, e.temperature), config.sampling.batch_rows,
        config.training.micro_tokens, config.seed,
    )  # fmt: skip

    def make(folder: Path) -> Metrics:
        model = cast(Mistral, load_model(policy, ctx.dtype, ctx.device))
        checkable = sum(row.kind is not None for row in ctx.heldout.rows)
        with Bar(name, checkable * (1 + e.samples) // distributed.world_size(), "rows") as progress:
            metrics, records = evaluate(model, ctx.tokenizer, ctx.heldout.rows, ctx.heldout.pairs, settings, ctx.device,
                                        progress, release=True)  # fmt: skip
        write_rows(folder / "answers.jsonl", records)
        return metrics

    parents = {
        "policy": hash_model_folder(policy), "data (held-out rows)": ctx.heldout_hash, "dtype": str(ctx.dtype),
        "template": ctx.tokenizer.template_hash,
        **ctx.keys("max_length", "max_new_tokens", "evaluation.samples", "evaluation.temperature", "seed"),
    }  # fmt: skip
    metrics = stage(ctx, name, parents, make)
    if "accuracy/greedy" in metrics:
        say(f"{name}: greedy {metrics['accuracy/greedy']:.1%}, sampled {metrics.get('accuracy/sampled', 0):.1%} right, "
            f"nll {metrics['nll/real']:.4f}")  # fmt: skip
    else:
        say(f"{name}: nll of real responses {metrics['nll/real']:.4f}")
    return metrics
