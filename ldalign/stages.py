"""The stages of a run, each a folder with a manifest: data, policy (SFT or alignment), responses, guide, distances,
reference, evaluation.

A stage reads the folders of the stages before it and writes its own; `pipeline.run_stage` skips what is done and
refuses what was made from something else. A stage's parents are what its output depends on: contents (hashes of rows,
model folders, files of earlier stages) and config keys by their own names, so that a refusal names the key. Not among
them is what only moves work about and changes the last bits at most: micro_tokens, batch_rows, checkpointing,
shard_ranks, whole, the number of ranks. Every function here is called by all ranks.
"""

import json
import logging
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, cast

import torch
from safetensors.torch import load_file, save_file
from tqdm import tqdm

from ldalign import distributed, tasks
from ldalign.answers import make_answers
from ldalign.batches import Pair
from ldalign.config import to_dict
from ldalign.data import Row, data_hash, read_rows
from ldalign.decoders import Decoder, new_decoder
from ldalign.engine import Engine, Request
from ldalign.errors import InputError
from ldalign.evaluate import EvaluationSettings, evaluate
from ldalign.generate import text_of
from ldalign.gpt2 import GPT2Config
from ldalign.guide import GuideConfig, is_trained_guide, load_guide, new_guide
from ldalign.guide_training import GuideTrainSettings, train_guide
from ldalign.losers import read_losers
from ldalign.methods import Prepared, distance_weights, effective_size, prepare, usable, with_losers
from ldalign.metrics import say
from ldalign.mistral import Mistral
from ldalign.pipeline import Parents, RunFolder, hash_file, hash_model_folder, hash_settings, on_rank0, write_text
from ldalign.pretrained import resolve_model
from ldalign.sampling import Response, Sampling
from ldalign.scoring import response_logps
from ldalign.seeds import permutation
from ldalign.settings import RunConfig, Sft
from ldalign.tokenizer import Tokenizer, load_tokenizer
from ldalign.training import TrainSettings, train
from ldalign.weights import load_model, read_config, save_model

log = logging.getLogger(__name__)

EMBEDDED = "embedded"
EMBEDDED_ROWS = {"train": 4000, "heldout": 600}
SUMMARY = "summary.json"  # in every stage folder: what a report shows of it, and its wall time
SCHEDULE_KEYS = (
    "training.schedule", "training.warmup_ratio", "training.weight_decay", "training.max_grad_norm",
    "training.master_dtype", "training.state_dtype",
)  # fmt: skip
SAMPLING_KEYS = tuple(
    f"sampling.{key}" for key in ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "stop")
)

Metrics = dict[str, float]


@dataclass(frozen=True)
class Context:
    """What every stage needs: the run's folder and settings, the given policy, its tokenizer, and the rows in ids."""

    run: RunFolder
    config: RunConfig
    device: torch.device
    dtype: torch.dtype
    start: Path  # model folder the run starts from, before any SFT
    tokenizer: Tokenizer
    train: Prepared
    heldout: Prepared

    @cached_property
    def used(self) -> tuple[list[Row], list[Pair]]:
        """The rows an iteration works on, and their pairs without losers."""
        most = self.config.max_rows
        return self.train.rows[:most], self.train.pairs[:most]

    @cached_property
    def used_hash(self) -> str:
        """Of the rows in `used`."""
        return data_hash(self.used[0])

    @cached_property
    def heldout_hash(self) -> str:
        """Of the held-out rows."""
        return data_hash(self.heldout.rows)

    def keys(self, *names: str) -> Parents:
        """The values of config keys, for a manifest; a group's name stands for all its keys."""
        return named_keys(self.config, *names)


def named_keys(config: RunConfig, *names: str) -> Parents:
    """{dotted key: plain value} of the named keys and groups of keys."""
    out: dict[str, str | int | float] = {}

    def spread(name: str, value: Any) -> None:
        if isinstance(value, dict):
            for key, inner in value.items():
                spread(f"{name}.{key}", inner)
        else:
            out[name] = value if isinstance(value, (str, int, float)) else json.dumps(value)

    for name in names:
        value: Any = to_dict(config)
        for part in name.split("."):
            value = value[part]
        spread(name, value)
    return out


# ------------------------------------------------------------------------------------------------------- data, policy


def choose_dtype(config: RunConfig, device: torch.device) -> torch.dtype:
    """The compute dtype: as given, or bfloat16 where the device has instructions for it."""
    if config.dtype != "auto":
        return torch.bfloat16 if config.dtype == "bfloat16" else torch.float32
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    return torch.bfloat16 if torch.cpu._is_avx512_bf16_supported() else torch.float32


def open_policy(config: RunConfig) -> Path:
    """The given policy's model folder, fetched by rank 0 where it is not there yet. InputError for a GPT-2."""
    cache = Path(config.cache).expanduser() if config.cache else Path.home() / ".cache" / "ldalign"
    folder = Path(on_rank0(lambda: str(resolve_model(config.policy, cache))))
    kind = read_config(folder).get("model_type")
    if kind not in ("mistral", "llama"):
        raise InputError(
            f"{folder}: model_type {kind!r} cannot be a policy; give a mistral or llama folder (policy=PATH)"
        )
    return folder


def read_data(config: RunConfig) -> tuple[list[Row], list[Row]]:
    """(training rows, held-out rows) as the config asks; the training rows are the most that any stage uses."""
    if config.data == EMBEDDED:
        train_rows, heldout = (_embedded_rows(config.seed, split, count) for split, count in EMBEDDED_ROWS.items())
    else:
        train_rows, heldout = read_rows(config.data, turns=config.turns), []
    if config.heldout is not None:
        heldout = read_rows(config.heldout, turns=config.turns)
    elif config.data != EMBEDDED and config.evaluation.rows:
        order = permutation(config.seed, "heldout", len(train_rows))
        chosen = {int(i) for i in order[: round(len(train_rows) * config.heldout_fraction)]}
        heldout = [row for i, row in enumerate(train_rows) if i in chosen]
        train_rows = [row for i, row in enumerate(train_rows) if i not in chosen]
    # A kind of the user's own has no checker here: such rows are read for their likelihood alone.
    heldout = [r if r.kind in tasks.KINDS else replace(r, kind=None, answer=None) for r in heldout]
    asked = [config.max_rows, *(sft.rows for sft in (config.sft, config.continual_sft) if sft.epochs)]
    most = None if None in asked else max(n for n in asked if n is not None)
    return train_rows[:most], heldout[: config.evaluation.rows]


def _embedded_rows(seed: int, split: str, count: int) -> list[Row]:
    # A system turn of our own, because SmolLM2's template else puts a longer one in front of every prompt.
    system = {"role": "system", "content": "Be brief."}
    return [
        Row(r["id"], (system, r["messages"][0]), r["messages"][1]["content"], kind=r["kind"], answer=r["answer"],
            where=f"embedded:{r['id']}")
        for r in tasks.make_rows(seed, split, count)
    ]  # fmt: skip


def open_context(run: RunFolder, config: RunConfig) -> Context:
    """Reads and checks the data and the tokenizer; no weights are read and nothing is written.

    Raises InputError for bad rows, rows that do not fit, or fewer of them than one global batch.
    """
    device = distributed.start(config.device)
    train_rows, heldout_rows = read_data(config)
    start = open_policy(config)
    tokenizer = load_tokenizer(start)
    ctx = Context(
        run, config, device, choose_dtype(config, device), start, tokenizer,
        prepare(train_rows, tokenizer, config.max_length), prepare(heldout_rows, tokenizer, config.max_length),
    )  # fmt: skip
    _check_enough(ctx)
    distributed.copies(config.training.shard_ranks)
    say(
        f"data: {len(ctx.train.rows)} training rows ({ctx.train.cut} responses cut, {len(ctx.train.dropped)} rows "
        f"dropped), {len(ctx.heldout.rows)} held out; {device.type}, {str(ctx.dtype).removeprefix('torch.')}, "
        f"{distributed.world_size()} rank(s)"
    )
    unchecked = sum(row.kind is None for row in ctx.heldout.rows)
    if unchecked:
        say(
            f"data: WARNING: {unchecked} of {len(ctx.heldout.rows)} held-out rows name no checker (kind and answer): "
            "accuracy cannot be measured on them, only the likelihood of their responses"
        )
    return ctx


def _check_enough(ctx: Context) -> None:
    config, rows = ctx.config, len(ctx.train.rows)
    needs = [("global_batch", config.global_batch, len(ctx.used[0]))] if config.iterations else []
    needs += [
        (f"{name}.global_batch", sft.global_batch, min(rows, sft.rows or rows))
        for name, sft in (("sft", config.sft), ("continual_sft", config.continual_sft))
        if sft.epochs
    ]
    for key, batch, count in needs:
        if count < batch:
            raise InputError(
                f"data: {count} usable rows are fewer than one batch of {key}={batch}; add rows or lower {key}"
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
    stage(ctx, name, parents, make)
    return ctx.run.path / name


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
                             metrics_path=folder / "metrics.jsonl")  # fmt: skip
        state = distributed.full_state(guide, torch.float32)
        if distributed.rank() == 0:
            guide.save(folder, state)
        return losses

    stage(ctx, "guide", _guide_parents(ctx, given, generated), make)
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
            save_file({"logps": logps}, folder / "reference.safetensors")
            _write_json(folder / "rows.json", [pair.id for pair in kept])
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


# ------------------------------------------------------------------------------------------------------------- files


def stage(ctx: Context, name: str, parents: Parents, make: Callable[[Path], Metrics], resume: bool = False) -> Metrics:
    """`RunFolder.stage`, with what `make` returns (on rank 0) and the wall time in summary.json; returns that summary.

    After a stage is made, the run's metrics.jsonl is put together again from all stages.
    """

    def timed(folder: Path) -> None:
        began = time.perf_counter()
        summary = make(folder)
        if distributed.rank() == 0:
            _write_json(folder / SUMMARY, {**summary, "seconds": round(time.perf_counter() - began, 2)})

    made = ctx.run.stage(name, parents, timed, resume)
    summary: Metrics = json.loads((ctx.run.path / name / SUMMARY).read_text(encoding="utf-8"))
    say(f"{name}: done ({summary['seconds']:.0f} s)" if made else f"{name}: already done")
    if made:
        on_rank0(lambda: _join_metrics(ctx.run.path))
    return summary


def stage_names(run: Path) -> list[str]:
    """The finished stages of a run folder, in the order of the method."""
    steps = ("responses", "distances", "reference", "policy", "evaluation")
    names = ["data", "start/evaluation", "sft/policy", "sft/evaluation"]
    names += [f"iteration_{t}/{step}" for t in sorted({0, *iterations(run)}) for step in steps]
    names.insert(names.index("iteration_0/distances"), "guide")  # trained on the first responses
    names += ["continual_sft/policy", "continual_sft/evaluation"]
    return [name for name in names if (run / name / SUMMARY).is_file()]


def iterations(run: Path) -> list[int]:
    """The numbers of the iterations in a run folder."""
    numbers = (path.name.removeprefix("iteration_") for path in run.glob("iteration_*"))
    return sorted(int(n) for n in numbers if n.isdecimal())


def _join_metrics(run: Path) -> None:
    """metrics.jsonl of the run: every stage's own lines, then its summary as one line (evaluation: prefix eval_)."""
    lines: list[str] = []
    for name in stage_names(run):
        path = run / name / "metrics.jsonl"
        lines += [path.read_text(encoding="utf-8")] if path.is_file() else []
        prefix = "eval_" if name.endswith("/evaluation") else ""
        summary = json.loads((run / name / SUMMARY).read_text(encoding="utf-8"))
        lines.append(json.dumps({"stage": name, **{f"{prefix}{key}": value for key, value in summary.items()}}) + "\n")
    write_text(run / "metrics.jsonl", "".join(lines))


def write_rows(path: Path, mine: Iterable[tuple[int, dict[str, Any]]]) -> list[dict[str, Any]]:
    """One JSON Lines file of all ranks' (row index, record), in row order; returns all records, on rank 0.

    Every rank calls it. The ranks' parts go through files beside it, as records may be large.
    """
    part = path.with_name(f"{path.name}.rank{distributed.rank()}")
    write_jsonl(part, mine)
    distributed.barrier()
    merged: list[dict[str, Any]] = []

    def merge() -> None:
        parts = [path.with_name(f"{path.name}.rank{n}") for n in range(distributed.world_size())]
        indexed = sorted((pair for p in parts for pair in read_jsonl(p)), key=lambda pair: pair[0])
        merged.extend(record for _, record in indexed)
        write_jsonl(path, merged)
        for p in parts:
            p.unlink()

    on_rank0(merge)
    return merged


def write_jsonl(path: Path, records: Iterable[Any]) -> None:
    """One JSON value a line."""
    path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records), encoding="utf-8")


def read_jsonl(path: Path) -> list[Any]:
    """The values of a JSON Lines file of ours."""
    # Not splitlines: a text may hold U+2028, which JSON leaves as it is.
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")


def prompt_text(row: Row) -> str:
    """What the guide reads as the prompt: the user's text, or for a longer history every turn with its role.

    The system turn is left out: it is the same for most rows of a data set.
    """
    turns = [m for m in row.history if m["role"] != "system"]
    if len(turns) == 1:
        return turns[0]["content"]
    return "\n\n".join(f"{m['role']}: {m['content']}" for m in turns)


class Bar:
    """A progress bar on rank 0, with new tokens per second where tokens are made: `with Bar(...) as progress`."""

    def __init__(self, name: str, total: int, unit: str) -> None:
        self.name, self.total, self.unit = name, total, unit

    def __enter__(self) -> Callable[[int, int], None]:
        self.tokens, self.began = 0, time.perf_counter()
        # disable=None: no bar where the output is a file
        self.tqdm = tqdm(
            total=self.total, desc=self.name, unit=self.unit, disable=None if distributed.rank() == 0 else True
        )
        return self.add

    def add(self, rows: int, tokens: int) -> None:
        self.tokens += tokens
        if self.tokens:
            self.tqdm.set_postfix_str(f"{self.tokens / (time.perf_counter() - self.began):.0f} tokens/s", refresh=False)
        self.tqdm.update(rows)

    def __exit__(self, *_: object) -> None:
        self.tqdm.close()
        if self.tokens:
            seconds = time.perf_counter() - self.began
            say(f"{self.name}: {self.tokens} tokens in {seconds:.0f} s, {self.tokens / seconds:.0f} tokens/s")
