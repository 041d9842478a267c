"""The stages of a run, each a folder with a manifest: data, policy (SFT or alignment), responses,
guide, distances, reference, evaluation.

A stage reads the folders of the stages before it and writes its own; `pipeline.run_stage` skips
what is done and refuses what was made from something else. A stage's parents are what its output
depends on: contents (hashes of rows, model folders, files of earlier stages) and config keys by
their own names, so that a refusal names the key. Not among them is what only moves work about and
changes the last bits at most: micro_tokens, batch_rows, checkpointing, shard_ranks, whole,
checkpoint.*, the number of ranks. Every function here is called by all ranks.
"""

import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, cast

import torch
from safetensors.torch import load_file

from ldalign.context import EMBEDDED, Context
from ldalign.data.pairs import Pair, usable
from ldalign.data.rows import Row, data_hash, files_of, prompt_text
from ldalign.data.tokenizer import Tokenizer
from ldalign.evaluation.held_out import EvaluationSettings, evaluate
from ldalign.generation.answers import make_answers
from ldalign.generation.decoders import Decoder, new_decoder
from ldalign.generation.engine import Engine, Request
from ldalign.generation.external import read_losers
from ldalign.generation.generate import text_of
from ldalign.generation.sampling import Response, Sampling
from ldalign.models.gpt2 import GPT2Config
from ldalign.models.guide import GuideConfig
from ldalign.models.guide_folder import (
    is_trained_guide,
    load_guide,
    new_guide,
    policy_guide,
    save_guide,
)
from ldalign.models.mistral import Mistral
from ldalign.models.weights import load_model, save_model
from ldalign.objective import effective_size, pair_weights
from ldalign.pipeline import CHECKPOINTS, MANIFEST, Parents, hash_model_folder, hash_settings
from ldalign.settings import SAMPLING_KEYS, RunConfig, Sft
from ldalign.summaries import stage
from ldalign.system import distributed
from ldalign.system.distributed import on_rank0
from ldalign.system.errors import InputError
from ldalign.system.files import hash_file, read_jsonl, save_tensors, write_json, write_jsonl
from ldalign.system.metrics import Bar, Metrics, say
from ldalign.system.partial_rows import FOLDER as PARTS
from ldalign.training.checkpoint import Plan
from ldalign.training.guide import GuideTrainSettings, train_guide
from ldalign.training.policy import TrainSettings, train
from ldalign.training.scoring import response_logps

log = logging.getLogger(__name__)

RESPONSES = "iteration_{}/responses/responses.jsonl"  # in the run folder

SOURCES = "sources.json"  # in the data stage: the files that were read, and their sha256
SCHEDULE_KEYS = (
    "training.schedule",
    "training.warmup_ratio",
    "training.weight_decay",
    "training.max_grad_norm",
    "training.master_dtype",
    "training.state_dtype",
)


def data_stage(ctx: Context) -> None:
    """The rows as they are used, after reading, splitting and dropping: data/train.jsonl and
    data/heldout.jsonl.

    The ids of dropped rows are in data/dropped.jsonl, the files that were read in
    data/sources.json.
    """

    def make(folder: Path) -> Metrics:
        if distributed.rank() == 0:
            for name, prepared in (("train", ctx.train), ("heldout", ctx.heldout)):
                write_jsonl(folder / f"{name}.jsonl", map(_record, prepared.rows))
            dropped = [
                {
                    "split": name,
                    "id": id_,
                    "reason": f"the prompt alone fills max_length={ctx.config.max_length}",
                }
                for name, prepared in (("train", ctx.train), ("heldout", ctx.heldout))
                for id_ in prepared.dropped
            ]
            write_jsonl(folder / "dropped.jsonl", dropped)
            write_json(folder / SOURCES, {str(path): hash_file(path) for path in _data_files(ctx)})
        return {
            "rows/train": len(ctx.train.rows),
            "rows/heldout": len(ctx.heldout.rows),
            "rows/dropped": len(ctx.train.dropped),
            "rows/cut": ctx.train.cut,
            **{f"rows/{name}": n for name, n in ctx.counts.items()},
        }

    parents = _data_parents(ctx)
    on_rank0(lambda: check_sources(ctx))
    stage(ctx, "data", {**parents, **ctx.keys("turns", "max_length")}, make)


def _data_parents(ctx: Context) -> Parents:
    return {
        "data (training rows)": data_hash(ctx.train.rows),
        "number of training rows": len(ctx.train.rows),
        "data (held-out rows)": ctx.heldout_hash,
        "number of held-out rows": len(ctx.heldout.rows),
    }


def _data_files(ctx: Context) -> list[Path]:
    specs = [spec for spec in (ctx.config.data, ctx.config.heldout) if spec not in (None, EMBEDDED)]
    return [path for spec in specs for path in files_of(spec)]


def check_sources(ctx: Context) -> None:
    """Raises InputError where the run's rows are others than when it began, and a data file is why:
    it is named.

    A file that changed without changing the rows that are used is none of the run's business.
    """
    folder = ctx.run.path / "data"
    try:
        began = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["parents"]
        old = dict(json.loads((folder / SOURCES).read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return  # no such stage yet, or a damaged one, which says so itself
    if all(began.get(key) == value for key, value in _data_parents(ctx).items()):
        return
    new = {str(path): hash_file(path) for path in _data_files(ctx)}
    for path in [*old, *new]:
        if path in old and path in new and old[path] != new[path]:
            raise InputError(
                f"{path}: changed since this run began: sha256 was {old[path]}, now {new[path]}; "
                "put it back, or start another run (run=NAME)"
            )


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


# ---------------------------------------------------------------------------------------------- SFT


def start_stage(ctx: Context) -> Path:
    """The policy that self-play starts from: the given one, after SFT where the
    config asks for it.
    """
    return sft_stage(ctx, "sft", ctx.start) if ctx.config.sft.epochs else ctx.start


def start_name(config: RunConfig) -> str:
    """What the start policy is called in the run folder and the table."""
    return "sft" if config.sft.epochs else "start"


def sft_stage(ctx: Context, group: Literal["sft", "continual_sft"], start: Path) -> Path:
    """Supervised fine-tuning of `start` on real responses by one group of config keys; returns the
    policy's folder.
    """
    sft: Sft = getattr(ctx.config, group)
    rows, pairs = ctx.train.rows[: sft.rows], ctx.train.pairs[: sft.rows]
    settings = replace(
        _train_settings(ctx),
        epochs=sft.epochs,
        learning_rate=sft.learning_rate,
        global_batch=sft.global_batch,
        optimizer="adamw",
    )
    keys = ctx.keys(
        f"{group}.epochs", f"{group}.learning_rate", f"{group}.global_batch", "max_length"
    )
    return _train_stage(
        ctx, f"{group}/policy", start, pairs, settings, {"data": data_hash(rows), **keys}
    )


def _train_settings(ctx: Context) -> TrainSettings:
    c, t = ctx.config, ctx.config.training
    return TrainSettings(
        epochs=t.epochs,
        global_batch=c.global_batch,
        micro_tokens=t.micro_tokens,
        learning_rate=c.at("learning_rate", 0),
        optimizer=t.optimizer,
        schedule=t.schedule,
        warmup_ratio=t.warmup_ratio,
        weight_decay=t.weight_decay,
        max_grad_norm=t.max_grad_norm,
        checkpointing=t.checkpointing,
        state_dtype=getattr(torch, t.state_dtype),
        sharding=distributed.Sharding(t.shard_ranks, t.whole),
    )


def _train_stage(
    ctx: Context,
    name: str,
    start: Path,
    pairs: Sequence[Pair],
    settings: TrainSettings,
    parents: Parents,
    *,
    step0_is_reference: bool = True,
    extra: Metrics | None = None,
) -> Path:
    """Trains `start` on pairs; the stage folder is a model folder that also holds metrics.jsonl and
    summary.json.
    """

    def make(folder: Path) -> Metrics:
        model = load_model(
            start,
            getattr(torch, ctx.config.training.master_dtype),
            ctx.device,
            lambda m: distributed.shard(m, m.blocks, ctx.dtype, ctx.device, settings.sharding),
        )
        summary = train(
            model,
            pairs,
            settings,
            compute_dtype=ctx.dtype,
            device=ctx.device,
            seed=ctx.config.seed,
            stage=name,
            metrics_path=folder / "metrics.jsonl",
            step0_is_reference=step0_is_reference,
            checkpoints=_plan(ctx, folder),
        )
        dtype = torch.bfloat16 if ctx.config.policy_dtype == "bfloat16" else torch.float32
        state = distributed.full_state(model, dtype)
        if distributed.rank() == 0:
            save_model(model, folder, start, dtype, state)
        return summary | (extra or {})

    parents = {
        **parents,
        "policy": hash_model_folder(start),
        **ctx.tokenizer.template_parents,
        **ctx.keys("seed", "policy_dtype", *SCHEDULE_KEYS),
        "dtype": str(ctx.dtype),
    }
    stage(ctx, name, parents, make, resume=True)
    return ctx.run.path / name


def _plan(ctx: Context, folder: Path) -> Plan:
    """The checkpoints of a stage that is made in `folder`."""
    c = ctx.config.checkpoint
    return Plan(folder / CHECKPOINTS, c.minutes, c.steps, c.keep)


# ---------------------------------------------------------------------------------------- iteration


def responses_stage(ctx: Context, t: int, policy: Path, samples: int = 1) -> list[Response]:
    """Samples responses from `policy`, those of a row one after the other, or takes the first
    iteration's as given.

    The records carry what was sampled, token by token. A run that was cut short is gone on with.
    """
    name, config = f"iteration_{t}/responses", ctx.config
    rows, pairs = ctx.used
    given = Path(config.responses).expanduser() if config.responses and t == 0 else None
    sampling = sampling_of(config)
    keys = [
        f"iteration/{t}/{row.id}" + (f"/{n}" if samples > 1 else "")
        for row in rows
        for n in range(samples)
    ]
    requests = [Request(key, pairs[i // samples].prompt, i) for i, key in enumerate(keys)]

    def record(request: Request, r: Response) -> dict[str, Any]:
        text = text_of(ctx.tokenizer.decode(r.ids), sampling)
        return {
            "id": rows[request.index // samples].id,
            "response": text,
            "finish_reason": r.finish_reason,
            "n_tokens": len(r.ids),
            "token_ids": r.ids,
            "logp": r.logp,
        }

    def make(folder: Path) -> Metrics:
        path = folder / "responses.jsonl"
        if given is not None:
            prompts = ctx.run.path / "data/train.jsonl"
            losers = read_losers(given, rows, pairs, ctx.train.rows, ctx.tokenizer, prompts)
            records = [
                record(request, loser) for request, loser in zip(requests, losers, strict=True)
            ]
            if distributed.rank() == 0:
                write_jsonl(path, records)
        else:
            model = cast(Mistral, load_model(policy, ctx.dtype, ctx.device))
            engine = new_engine(config, requests, ctx.tokenizer)
            with Bar(name, -(-len(requests) // distributed.world_size()), "rows") as progress:
                records = make_answers(
                    path, requests, new_decoder(model, release=True), engine, record, progress
                )
        tokens = sum(r["n_tokens"] for r in records)
        cut = sum(r["finish_reason"] == "length" for r in records)
        return {
            "rows": len(requests),
            "tokens": tokens,
            "len/rejected": tokens / len(requests),
            "losers/given": float(given is not None),
            "losers/truncated_frac": cut / len(requests),
        }

    parents: dict[str, str | int | float] = {
        "data": ctx.used_hash,
        **ctx.tokenizer.template_parents,
    }
    if given is not None:
        parents["responses"] = hash_file(given) if given.is_file() else "absent"
    else:
        parents |= {
            "policy": hash_model_folder(policy),
            "iteration": t,
            "dtype": str(ctx.dtype),
            **({"samples": samples} if samples > 1 else {}),
            **ctx.keys("max_new_tokens", *SAMPLING_KEYS, "seed"),
        }
    # a given file is read at once, and may be mended
    stage(ctx, name, parents, make, resume=given is None)
    return read_responses(ctx, t)


def read_responses(ctx: Context, t: int) -> list[Response]:
    """What iteration t sampled, a row's responses one after the other."""
    records = read_jsonl(ctx.run.path / RESPONSES.format(t))
    return [Response(r["token_ids"], r["finish_reason"], r["logp"]) for r in records]


def response_texts(ctx: Context, responses: Sequence[Response]) -> list[str]:
    """Their texts, each up to its stop string, as in the records."""
    sampling = sampling_of(ctx.config)
    return [text_of(ctx.tokenizer.decode(r.ids), sampling) for r in responses]


def sampling_of(config: RunConfig) -> Sampling:
    """How training responses are sampled."""
    s = config.sampling
    return Sampling(
        config.max_new_tokens,
        s.temperature,
        s.top_k,
        s.top_p,
        s.min_p,
        s.repetition_penalty,
        tuple(s.stop),
    )


def new_engine(
    config: RunConfig, requests: Sequence[Request], tokenizer: Tokenizer
) -> Callable[[Decoder], Engine]:
    """Of a decoder: the engine that samples as the config says."""
    s = config.sampling
    longest = max((len(request.prompt) for request in requests), default=1) + config.max_new_tokens
    cache_bytes = None if s.cache_gib is None else int(s.cache_gib * 2**30)
    rows = min(s.batch_rows, max(1, len(requests)))
    return lambda decoder: Engine(
        decoder,
        sampling_of(config),
        tokenizer.end_ids,
        config.seed,
        longest=longest,
        rows=rows,
        cache_bytes=cache_bytes,
        decode=tokenizer.decode,
    )


def guide_stage(
    ctx: Context, t: int, start: Path | None = None, generated: Sequence[str] | None = None
) -> Path:
    """Trains the guide on real and generated responses, or takes the trained one that is given;
    returns its folder.

    It is in guide/ where t is 0, else in iteration_t/guide: a guide of that iteration's own,
    trained anew from what the first began with (seed, folder or start policy). start: the policy
    that self-play starts from; guide.backbone=policy needs it. generated: a text a row of
    `ctx.used`; None: the samples in iteration_t/responses.
    """
    g = ctx.config.guide
    given = Path(g.folder).expanduser() if g.folder else None
    if given is not None and is_trained_guide(given):
        return given
    rows, _ = ctx.used
    name = f"iteration_{t}/guide" if t else "guide"
    if generated is None:
        generated = [r["response"] for r in read_jsonl(ctx.run.path / RESPONSES.format(t))]

    def make(folder: Path) -> Metrics:
        texts = [
            (prompt_text(row), row.response, loser)
            for row, loser in zip(rows, generated, strict=True)
        ]
        config = GuideConfig(
            g.latent_tokens, g.latent_width, g.token_dropout, g.latent_dropout, g.max_tokens
        )
        if g.backbone == "policy":
            assert start is not None
            guide = policy_guide(config, ctx.config.seed, start)
        else:
            size = GPT2Config(
                g.vocabulary, max(1024, g.max_tokens + g.latent_tokens), g.width, g.layers, g.heads
            )
            guide = new_guide(
                config, ctx.config.seed, given, [t for row in texts for t in row], size
            )
        examples = [(guide.example(x, y), guide.example(x, z)) for x, y, z in texts]
        settings = GuideTrainSettings(
            g.epochs,
            g.global_batch,
            g.learning_rate,
            ctx.config.training.micro_tokens,
            g.heldout_fraction,
        )
        losses = train_guide(
            guide.to(ctx.device),
            examples,
            settings,
            device=ctx.device,
            seed=ctx.config.seed,
            metrics_path=folder / "metrics.jsonl",
            ids=[row.id for row in rows],
            checkpoints=_plan(ctx, folder),
        )
        state = distributed.full_state(guide, torch.float32)
        if distributed.rank() == 0:
            save_guide(guide, folder, state)
        return losses

    stage(ctx, name, _guide_parents(ctx, given, start, generated), make, resume=True)
    return ctx.run.path / name


def _guide_parents(
    ctx: Context, given: Path | None, start: Path | None, generated: Sequence[str]
) -> Parents:
    of_policy = ctx.config.guide.backbone == "policy"
    without = {"guide.folder", "guide.retrain"}
    if of_policy or given is not None:  # the towers' sizes are not ours to say
        without |= {f"guide.{name}" for name in ("layers", "width", "heads", "vocabulary")}
    keys = {name: value for name, value in ctx.keys("guide", "seed").items() if name not in without}
    if of_policy:
        assert start is not None
        begun: Parents = {"policy": hash_model_folder(start)}
    else:
        begun = {"pretrained": hash_model_folder(given) if given else "none"}
    return {**keys, "data": ctx.used_hash, "responses": hash_settings(list(generated)), **begun}


def distances_stage(
    ctx: Context, t: int, guide: Path, pairs: Sequence[Pair], responses: Sequence[Response]
) -> list[Pair]:
    """Latent distances of this iteration's pairs; returns the pairs with the
    weights made of them.
    """
    name, config = f"iteration_{t}/distances", ctx.config
    rows, _ = ctx.used
    kept = [usable(pair) for pair in pairs]

    def make(folder: Path) -> Metrics:
        distances = latent_distances(
            ctx, guide, rows, response_texts(ctx, responses), folder / PARTS / "distances"
        )
        weights, clipped = pair_weights(
            config.weights, distances, pairs, kept, config.seed + t, config.weight_clip
        )
        if clipped:
            log.warning(
                "%s: weight_clip=%g lowered %d of %d weights",
                name,
                config.weight_clip,
                clipped,
                sum(kept),
            )
        if distributed.rank() == 0:
            columns = zip(rows, distances.tolist(), weights.tolist(), strict=True)
            write_jsonl(
                folder / "distances.jsonl",
                ({"id": r.id, "distance": d, "weight": w} for r, d, w in columns),
            )
        return _distance_summary(distances, weights, kept) | {"weight/clipped": clipped}

    parents: dict[str, str | int | float] = {
        "guide": guide_hash(guide),
        "responses": file_hash(ctx, RESPONSES.format(t)),
        "data": ctx.used_hash,
        **ctx.keys("max_length", "distance", "weights", "weight_clip"),
    }
    if config.weights == "shuffled":
        parents |= ctx.keys("seed")
    stage(ctx, name, parents, make, resume=True)
    weights = [r["weight"] for r in read_jsonl(ctx.run.path / name / "distances.jsonl")]
    return [replace(pair, weight=weight) for pair, weight in zip(pairs, weights, strict=True)]


def latent_distances(
    ctx: Context, guide: Path, rows: Sequence[Row], texts: Sequence[str], path: Path
) -> torch.Tensor:
    """(N,) float64 of each text to its row's real response, by the key `distance`. path: as in
    `Guide.distance`.
    """
    return (
        load_guide(guide, ctx.device)
        .distance(
            [prompt_text(row) for row in rows],
            [row.response for row in rows],
            texts,
            ctx.config.training.micro_tokens,
            ctx.config.distance,
            [row.id for row in rows],
            path,
        )
        .double()
    )


def guide_hash(folder: Path) -> str:
    """Of a trained guide's folder."""
    # The folder itself counts as one: latent.safetensors and tokenizer.json lie in it.
    parts = [hash_model_folder(part) for part in (folder, folder / "encoder", folder / "decoder")]
    return hash_settings([*parts, hash_file(folder / "guide.json")])


def _distance_summary(
    distances: torch.Tensor, weights: torch.Tensor, kept: Sequence[bool]
) -> Metrics:
    """Of the pairs that count; {} if there are none."""
    chosen = torch.tensor(list(kept))
    d, w = distances[chosen], weights[chosen]
    if not len(d):
        return {}
    quantiles = {f"distance/p{q}": float(d.quantile(q / 100)) for q in (10, 50, 90)}
    return {
        "distance/mean": float(d.mean()),
        "distance/std": float(d.std(correction=0)),
        **quantiles,
        "weight/mean": float(w.mean()),
        "weight/min": float(w.min()),
        "weight/max": float(w.max()),
        "weight/std": float(w.std(correction=0)),
        "weight/ess": effective_size(w),
    }


def reference_stage(
    ctx: Context, t: int, policy: Path, pairs: Sequence[Pair], made_from: Parents, cut: int = 0
) -> list[Pair]:
    """Log-probs of both responses under the reference policy, cached by row id; returns the pairs
    that carry them.

    Pairs that will not be trained on are not scored, and carry zeros. made_from: what the pairs'
    tokens depend on, beside the data and max_length. cut: how many of the sampled responses
    max_length cut (they have no end token), for the summary.
    """
    name = f"iteration_{t}/reference"
    kept = [pair for pair in pairs if usable(pair)]

    def make(folder: Path) -> Metrics:
        model = load_model(policy, ctx.dtype, ctx.device).requires_grad_(False)
        with Bar(name, len(kept), "pairs") as progress:
            logps = response_logps(
                model,
                kept,
                ctx.config.training.micro_tokens,
                ctx.device,
                lambda n: progress(n, 0),
                folder / PARTS / "logps",
            )
        if distributed.rank() == 0:
            save_tensors({"logps": logps}, folder / "reference.safetensors")
            write_json(folder / "rows.json", [pair.id for pair in kept])
        if not kept:
            return {"losers/cut": cut}
        real, generated = logps.mean(0).tolist()
        return {"logps/ref_chosen": real, "logps/ref_rejected": generated, "losers/cut": cut}

    parents = {
        "policy": hash_model_folder(policy),
        "data": ctx.used_hash,
        **ctx.tokenizer.template_parents,
        "dtype": str(ctx.dtype),
        **made_from,
        **ctx.keys("max_length"),
    }
    stage(ctx, name, parents, make, resume=True)
    folder = ctx.run.path / name
    ids = json.loads((folder / "rows.json").read_text(encoding="utf-8"))
    logps = dict(
        zip(ids, load_file(folder / "reference.safetensors")["logps"].tolist(), strict=True)
    )
    return [
        replace(pair, ref_real=logps[pair.id][0], ref_generated=logps[pair.id][1])
        if usable(pair)
        else pair
        for pair in pairs
    ]


def policy_stage(
    ctx: Context, t: int, start: Path, pairs: Sequence[Pair], made_from: Parents
) -> Path:
    """Trains `start` on the iteration's pairs; returns the next policy's folder. made_from: as in
    `reference_stage`.
    """
    kept = [pair for pair in pairs if usable(pair)]
    if not kept:
        raise InputError(
            f"iteration {t}: there is no pair left to learn from: every loser equals its winner, "
            "or the judge saw none better; this is the end of what the method can do, or raise "
            "sampling.temperature"
        )
    skipped = len(pairs) - len(kept)
    parents: dict[str, str | int | float] = {
        "data": ctx.used_hash,
        **made_from,
        "weights": hash_settings([p.weight for p in kept]),
        "learning_rate": ctx.config.at("learning_rate", t),
        **ctx.keys(
            "method",
            "global_batch",
            "max_length",
            "training.epochs",
            "training.steps",
            "training.optimizer",
        ),
    }
    if kept[0].generated is not None:
        reference = file_hash(ctx, f"iteration_{t}/reference/reference.safetensors")
        parents |= {"beta": ctx.config.at("beta", t), "reference": reference}
    settings = replace(
        _train_settings(ctx),
        learning_rate=ctx.config.at("learning_rate", t),
        beta=ctx.config.at("beta", t),
        steps=ctx.config.training.steps,
    )
    return _train_stage(
        ctx,
        f"iteration_{t}/policy",
        start,
        kept,
        settings,
        parents,
        step0_is_reference=ctx.config.reference == "iteration" or t == 0,
        extra={
            "pairs": len(kept),
            "skipped_pairs": skipped,
            "losers/identical_frac": skipped / len(pairs),
        },
    )


def file_hash(ctx: Context, name: str) -> str:
    """sha256 of a file in the run folder."""
    return hash_file(ctx.run.path / name)


# --------------------------------------------------------------------------------------- evaluation


def evaluation_stage(ctx: Context, name: str, policy: Path) -> Metrics:
    """Held-out metrics of `policy` in NAME/evaluation, with every answer it gave; {} where no rows
    are held out.
    """
    e, config = ctx.config.evaluation, ctx.config
    name = f"{name}/evaluation"
    if not ctx.heldout.rows:
        return {}
    settings = EvaluationSettings(
        e.samples,
        Sampling(config.max_new_tokens, e.temperature),
        config.sampling.batch_rows,
        config.training.micro_tokens,
        config.seed,
        answer_all=config.reward.model is not None,
    )
    checkable = sum(row.kind is not None for row in ctx.heldout.rows)
    unchecked = len(ctx.heldout.rows) - checkable

    def make(folder: Path) -> Metrics:
        model = cast(Mistral, load_model(policy, ctx.dtype, ctx.device))
        answers = checkable * (1 + e.samples) + unchecked * settings.answer_all
        with Bar(name, answers // distributed.world_size(), "rows") as progress:
            metrics, records = evaluate(
                model,
                ctx.tokenizer,
                ctx.heldout.rows,
                ctx.heldout.pairs,
                settings,
                ctx.device,
                folder / PARTS,
                progress,
                release=True,
            )
        if distributed.rank() == 0:
            write_jsonl(folder / "answers.jsonl", records)
        return metrics

    parents: dict[str, str | int | float] = {
        "policy": hash_model_folder(policy),
        "data (held-out rows)": ctx.heldout_hash,
        "dtype": str(ctx.dtype),
        **ctx.tokenizer.template_parents,
        **ctx.keys(
            "max_length", "max_new_tokens", "evaluation.samples", "evaluation.temperature", "seed"
        ),
    }
    if settings.answer_all and unchecked:
        parents["answers"] = "to every row, for reward.model"
    metrics = stage(ctx, name, parents, make, resume=True)
    if "accuracy/greedy" in metrics:
        say(
            f"{name}: greedy {metrics['accuracy/greedy']:.1%}, sampled "
            f"{metrics.get('accuracy/sampled', 0):.1%} right, nll {metrics['nll/real']:.4f}"
        )
    else:
        say(f"{name}: nll of real responses {metrics['nll/real']:.4f}")
    return metrics
