"""`--dry-run`: everything that can be checked before work begins, and rough figures of what the work will take.

Checked: settings, data, template and ids of every row (`open_context`); names and shapes of the policy's and the
guide's tensors, from their files' headers; the run folder; room on the disk. Estimated: tokens, optimizer steps,
memory, disk, time. Nothing is written into the run folder.
"""

import os
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from ldalign import distributed, ops
from ldalign.batches import count_steps
from ldalign.errors import EnvironmentProblem, InputError
from ldalign.guide import is_trained_guide
from ldalign.mistral import Mistral, MistralConfig
from ldalign.settings import Guide
from ldalign.stages import Context
from ldalign.weights import check_model, count_parameters

RECORD_BYTES = 40  # a sampled token in its file: text and id
PROBE_SECONDS = 0.1  # a matrix product is timed for this long
OVERHEAD_GIB = 0.4  # interpreter, torch and its libraries
LOGIT_COPIES = 4  # of the head's piece of logits: in the compute dtype and in float32, with their gradients


@dataclass(frozen=True)
class Work:
    """What one stage does, in tokens read or made."""

    name: str
    trained: int = 0
    scored: int = 0
    generated: int = 0
    steps: int = 0  # of the optimizer


def dry_run(ctx: Context, planned: Sequence[str]) -> str:
    """Checks what `open_context` has not checked; returns the page to print.

    Raises InputError for a model, guide or run folder that cannot be used, EnvironmentProblem where the disk has no
    room.
    """
    model = check_model(ctx.start)
    assert isinstance(model, Mistral)  # `open_policy` refuses anything else
    if "guide" in planned:
        _check_guide(ctx.config.guide)
    work = [_work(ctx, name) for name in planned]
    parameters = count_parameters(model)
    lines = [
        f"policy: {ctx.start}: {parameters / 1e6:.1f} million weights, all names and shapes right",
        *_data_lines(ctx),
        *(f"{w.name}: {w.steps} optimizer steps, {w.trained} tokens to train on" for w in work if w.steps),
        _memory_line(ctx, model, parameters),
        _disk_line(ctx, planned, parameters),
        _time_line(ctx, model.config, work, parameters),
        "dry run: nothing was made",
    ]
    return "\n".join(lines)


# ------------------------------------------------------------------------------------------------------------ checks


def _check_guide(guide: Guide) -> None:
    if guide.folder is None:
        return
    folder = Path(guide.folder).expanduser()
    if not folder.is_dir():
        raise InputError(f"guide={guide.folder}: no such folder; give a GPT-2 folder or one that train/guide.py wrote")
    parts = [folder / "encoder", folder / "decoder"] if is_trained_guide(folder) else [folder]
    for part in parts:
        if isinstance(check_model(part), Mistral):
            raise InputError(f"{part}: is no gpt2; give a GPT-2 folder or one that train/guide.py wrote (guide=FOLDER)")
    if not (folder / "tokenizer.json").is_file():
        raise InputError(f"{folder}: has no tokenizer.json; the guide reads text through a tokenizer of its own")


def _existing(run: Path) -> Path:
    """The run folder, or the nearest folder above it that is there. Raises where a run could not be made."""
    if run.exists() and not run.is_dir():
        raise InputError(f"{run}: is a file; give a folder (run=NAME)")
    if run.is_dir() and any(run.iterdir()) and not (run / "lock").exists():
        raise InputError(f"{run}: holds something that is no run; give a new or empty folder (run=NAME)")
    folder = run.absolute()
    while not folder.exists():
        folder = folder.parent
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise EnvironmentProblem(f"{folder}: cannot be written to; give another folder (run=NAME)")
    return folder


# --------------------------------------------------------------------------------------------------------- estimates


def _data_lines(ctx: Context) -> list[str]:
    lines = []
    for name, prepared in (("training", ctx.train), ("held-out", ctx.heldout)):
        if prepared.rows:
            parts = [
                f"{what} {np.mean(sizes):.0f} tokens (95 %: {np.percentile(sizes, 95):.0f}, most {max(sizes)})"
                for what, sizes in (("prompt", [len(p.prompt) for p in prepared.pairs]),
                                    ("response", [len(p.real) for p in prepared.pairs]))
            ]  # fmt: skip
            lost = f"{len(prepared.dropped)} dropped, {prepared.cut} responses cut"
            lines.append(f"{name} rows: {len(prepared.rows)} ({lost}); {', '.join(parts)}")
    return lines


def _work(ctx: Context, name: str) -> Work:
    """The tokens of one planned stage. Sampled responses are taken to be as long as the real ones."""
    config, pairs = ctx.config, ctx.used[1]
    real = sum(len(p.real) for p in pairs)
    both = sum(len(p.prompt) + 2 * len(p.real) for p in pairs)
    top, _, step = name.rpartition("/")
    if step == "policy" and top in ("sft", "continual_sft"):
        sft = config.sft if top == "sft" else config.continual_sft
        own = ctx.train.pairs[: sft.rows]
        tokens = sft.epochs * sum(p.tokens for p in own)
        return Work(name, trained=tokens, steps=count_steps(len(own), sft.global_batch, sft.epochs))
    if step == "policy":
        epochs = config.training.epochs
        return Work(name, trained=epochs * both, steps=count_steps(len(pairs), config.global_batch, epochs))
    if step == "responses":
        return Work(name, scored=sum(len(p.prompt) for p in pairs), generated=real)
    if step == "reference":
        return Work(name, scored=both)
    if step == "evaluation":
        answers = 1 + config.evaluation.samples
        held = list(zip(ctx.heldout.rows, ctx.heldout.pairs, strict=True))
        checked = [p for row, p in held if row.kind is not None]
        return Work(
            name,
            scored=sum(p.tokens for _, p in held) + answers * sum(len(p.prompt) for p in checked),
            generated=answers * sum(len(p.real) for p in checked),
        )
    return Work(name)  # the guide is small beside the policy, and its stages are left out


def _memory_line(ctx: Context, model: Mistral, parameters: int) -> str:
    """Peak of one rank while it trains."""
    t, width = ctx.config.training, ctx.dtype.itemsize
    adamw = t.optimizer == "adamw" or ctx.config.sft.epochs or ctx.config.continual_sft.epochs
    states = 8 if adamw else 4
    sharded = parameters * (4 + 4 + states) / distributed.world_size()
    # FSDP gathers one group at a time, the next one ahead: two blocks, and embedding and head, with their gradients.
    block = count_parameters(model.blocks[0])
    gathered = 2 * width * (2 * block + parameters - block * len(model.blocks))
    activations = t.micro_tokens * sum(activation_bytes(model.config, width, t.checkpointing))
    logits = min(ops.workspace_bytes(ctx.device.type), 4 * model.config.vocab_size * t.micro_tokens)
    parts = {
        "float32 weights, gradients and optimizer": sharded, "compute copies": gathered,
        f"activations of {t.micro_tokens} tokens": activations, "logits": LOGIT_COPIES * logits,
        "program": OVERHEAD_GIB * 2**30,
    }  # fmt: skip
    shown = ", ".join(f"{name} {size / 2**30:.1f}" for name, size in parts.items())
    return f"memory, rough: {sum(parts.values()) / 2**30:.1f} GiB a rank ({shown})"


def activation_bytes(config: MistralConfig, itemsize: int, checkpointing: str) -> tuple[int, int]:
    """Bytes per token of a micro-batch: those kept for the backward; those made again there, a block at a time.

    Counted over the tensors that the blocks save.
    """
    width, inner = config.hidden_size, config.intermediate_size
    heads = config.num_attention_heads * config.head_dim
    kv = config.num_key_value_heads * config.head_dim
    # Each norm's input and result, the turned q, k, v, attention's result, gate and up, their product; all in the
    # compute dtype. In float32: a scale for each norm and a log-sum-exp for each head.
    block = itemsize * (4 * width + 2 * heads + 2 * kv + 3 * inner) + 4 * (2 + config.num_attention_heads)
    stream = itemsize * width
    outside = stream + 4 * config.head_dim + 12  # the last norm's input and scale, the rotary tables, the ids
    if checkpointing == "full":
        return config.num_hidden_layers * stream + outside, block
    again = 3 * itemsize * inner if checkpointing == "selective" else 0  # inside the feed-forward
    return config.num_hidden_layers * (block - again) + outside, again


def _disk_line(ctx: Context, planned: Sequence[str], parameters: int) -> str:
    folder = _existing(Path(ctx.config.run))
    policies = sum(name.endswith("/policy") for name in planned)
    needed = policies * parameters * (2 if ctx.config.policy_dtype == "bfloat16" else 4)
    needed += RECORD_BYTES * sum(_work(ctx, name).generated for name in planned)
    if "guide" in planned:
        g = ctx.config.guide
        needed += 2 * 4 * (12 * g.layers * g.width**2 + (g.vocabulary + 1024) * g.width)
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise EnvironmentProblem(
            f"{folder}: the run needs about {needed / 2**30:.1f} GiB of disk, {free / 2**30:.1f} are free; "
            "make room or give another folder (run=NAME)"
        )
    return (
        f"disk: {needed / 2**30:.2f} GiB for {policies} policies and their files; {free / 2**30:.1f} free in {folder}"
    )


def _time_line(ctx: Context, config: MistralConfig, work: Sequence[Work], parameters: int) -> str:
    """From the measured speed of two products: 6 operations a weight and token to train, 2 to score or generate."""
    wide = _flops(ctx, config, ctx.config.training.micro_tokens)
    narrow = _flops(ctx, config, min(ctx.config.sampling.batch_rows, len(ctx.used[1])))
    seconds = sum(
        parameters * ((6 * w.trained + 2 * w.scored) / wide + 2 * w.generated / narrow) for w in work
    ) / distributed.world_size()  # fmt: skip
    return (
        f"time, rough (a third to three times): {seconds / 60:.1f} min without the guide and loading, if a product of "
        f"{ctx.config.training.micro_tokens} rows runs at {wide / 1e9:.0f} GFLOP/s and one of a decoding step at "
        f"{narrow / 1e9:.0f}, as measured now, and sampled responses are as long as the real ones"
    )


def _flops(ctx: Context, config: MistralConfig, rows: int) -> float:
    """Operations a second of (rows, D) @ (D, F) in the compute dtype."""
    a = torch.ones(rows, config.hidden_size, dtype=ctx.dtype, device=ctx.device)
    b = torch.ones(config.hidden_size, config.intermediate_size, dtype=ctx.dtype, device=ctx.device)
    a @ b  # the first call also sets things up
    done, began = 0, time.perf_counter()
    while time.perf_counter() - began < PROBE_SECONDS:
        a @ b
        done += 1
        if ctx.device.type == "cuda":
            torch.cuda.synchronize()
    return 2 * done * rows * b.numel() / (time.perf_counter() - began)
