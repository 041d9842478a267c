"""What every stage of a run starts from: the device, the given policy, its tokenizer,
and the rows in token ids.
"""

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Protocol

import torch

from ldalign import ops
from ldalign.data.pairs import Pairs
from ldalign.data.preparation import TOO_MANY
from ldalign.data.rows import Row
from ldalign.data.store import NO_ROWS, Split, data_hash, tokens_hash
from ldalign.data.tokenizer import Tokenizer, load_tokenizer
from ldalign.generation.decoders import check_weights
from ldalign.kernels import flash
from ldalign.models.fetch import resolve_model
from ldalign.models.guide_folder import is_trained_guide
from ldalign.models.stored_tensors import read_config
from ldalign.models.weights import check_model, count_parameters
from ldalign.run.keys import GuideKeys
from ldalign.run.lengths import asked_of, given
from ldalign.run.manifest import (
    CHECKPOINTS,
    SAME_FILES,
    SAME_SETTINGS,
    Parents,
    hash_model_folder,
)
from ldalign.run.positions import check_rows, for_longer_rows, warn_of_answers
from ldalign.run.prepared import open_data, say_files
from ldalign.run.settings import RunConfig
from ldalign.system import distributed
from ldalign.system.config import to_dict
from ldalign.system.distributed import on_rank0
from ldalign.system.errors import InputError
from ldalign.system.files import hash_file
from ldalign.system.metrics import Metrics, say
from ldalign.system.untrusted import read_text
from ldalign.training.checkpoint import CheckpointPlan

SELECTED = "selected.json"  # in the run folder: which policy is its result
SAMPLED = ("responses", "agreement_samples")  # stages whose answers have max_new_tokens


class Run(Protocol):
    """What a stage asks of the run's folder. `ldalign.run.folder.RunFolder` is it: it knows the
    order of all stages, so it stands above them.
    """

    path: Path

    @property
    def began(self) -> date:
        """The day this run was begun."""

    def stage(
        self, name: str, parents: Parents, make: Callable[[Path], Metrics], resume: bool = False
    ) -> Metrics:
        """Makes the folder `name` of this run with `make`, unless it is there;
        returns its summary.
        """

    def settle(self, config_yaml: str) -> None:
        """Takes the settings as the data have completed them, to be written down."""

    def record(self) -> None:
        """Writes settings, machine and date down, once."""


@dataclass(frozen=True)
class Context:
    """What every stage needs: the run's folder and settings, the given policy, its tokenizer, and
    the rows in ids.
    """

    run: Run
    config: RunConfig
    device: torch.device
    dtype: torch.dtype
    start: Path  # model folder the run starts from, before any SFT
    tokenizer: Tokenizer
    train: Split
    heldout: Split  # whose figures are reported
    validation: Split = NO_ROWS  # what policies are measured on while they are trained
    counts: Mapping[str, float] = field(default_factory=dict)  # of rows, the data stage's summary
    from_data: Sequence[str] = ()  # which of the two lengths were taken from the data

    @cached_property
    def used(self) -> tuple[Sequence[Row], Pairs]:
        """The rows an iteration works on, and their pairs without losers."""
        most = self.config.max_rows
        return self.train.rows[:most], self.train.pairs[:most]

    @cached_property
    def used_tokens(self) -> int:
        """The tokens of the rows in `used`, with losers as long as their winners."""
        _, pairs = self.used
        return int(pairs.prompts.lengths.sum() + 2 * pairs.real.lengths.sum())

    @cached_property
    def used_hash(self) -> str:
        """sha256 of the rows in `used`."""
        return data_hash(self.used[0])

    @cached_property
    def heldout_hash(self) -> str:
        """sha256 of the held-out rows."""
        return data_hash(self.heldout.rows)

    @property
    def select(self) -> Literal["last", "best"]:
        """Which weights of a stage, and which iteration's policy, are its result."""
        return self.config.select or ("best" if self.validation.rows else "last")

    @property
    def template(self) -> str | None:
        """The text of the chat template that the config gives; None: the policy's own."""
        return None if self.config.template is None else self.tokenizer.template

    @cached_property
    def parameters(self) -> int:
        """The number of the policy's weights, from the headers of its files."""
        return count_parameters(check_model(self.start))

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


def agree_on_settings(config: RunConfig) -> None:
    """Raises InputError where a rank was given other settings than rank 0. All ranks."""
    keys = list(to_dict(config))
    distributed.agree(lambda: named_keys(config, *keys), SAME_SETTINGS, InputError)


# ------------------------------------------------------------------------------------- data, policy


def choose_dtype(config: RunConfig, device: torch.device) -> torch.dtype:
    """The compute dtype: as given, or bfloat16 where the device has instructions for it."""
    if config.dtype != "auto":
        return torch.bfloat16 if config.dtype == "bfloat16" else torch.float32
    return distributed.auto_dtype(device)


def _kernels(device: torch.device) -> str:
    """What this rank's operations run by: `cpp`, say. Ranks of which one lacks a compiler would
    compute with other roundings, which nothing shows.
    """
    on_flash = device.type == "cuda" and ops.flash_wanted()
    flashes = [f"FlashAttention-{n}" for n in flash.generations()] if on_flash else []
    return ", ".join([*flashes, *ops.backends(device.type)])


def find_model(config: RunConfig, name: str) -> Path:
    """The model folder that `name` stands for, fetched by rank 0 where it is not there yet; of a
    run folder, the policy that is the run's result.
    """

    def resolved() -> str:
        selected = _selected_in(name)
        if selected is None:
            _refuse_unfinished(Path(os.path.expanduser(name)))
        return str(resolve_model(selected or name, config.cache_folder))

    return Path(on_rank0(resolved))


def _refuse_unfinished(run: Path) -> None:
    """Raises InputError for a run folder that has no policy yet."""
    is_run = (run / "config.yaml").is_file() and not (run / "config.json").exists()
    if is_run and not list(run.glob("*/policy/config.json")):
        raise InputError(
            f"{run}: is a run that has no policy yet; the command that began it goes on with it"
        )


def _selected_in(name: str) -> str | None:
    """The folder that the run NAME says its result is in; None where `name` is no such run."""
    run = Path(name)
    path = run / SELECTED
    if not name or not path.is_file():
        return None
    try:
        folder = json.loads(read_text(path))["folder"]
        return str(run / folder)
    except (ValueError, TypeError, KeyError, RecursionError):
        raise InputError(
            f"{path}: does not say which policy is the run's result; give its folder "
            "(policy=RUN/iteration_0/policy, say)"
        ) from None


def open_policy(config: RunConfig) -> Path:
    """The given policy's model folder, fetched by rank 0 where it is not there yet, all headers of
    its files checked.

    Raises InputError as `check_model` does, and for a GPT-2.
    """
    folder = find_model(config, config.policy)
    kind = read_config(folder).get("model_type")
    if kind not in ("mistral", "llama"):
        raise InputError(
            f"{folder}: model_type {kind!r} cannot be a policy; give a mistral or llama folder "
            "(policy=PATH)"
        )
    check_model(folder)
    return folder


def open_tokenizer(config: RunConfig, folder: Path, today: date | None = None) -> Tokenizer:
    """The tokenizer of the policy's model folder, with the chat template that the config gives.

    Raises InputError as `load_tokenizer` does, and for a template that cannot be read.
    """
    text = _read_template(config)
    called = None if text is None else f"template={config.template}"
    return load_tokenizer(folder, text, today, called)


def _read_template(config: RunConfig) -> str | None:
    if config.template is None:
        return None
    path = Path(config.template)
    try:
        # A link is as good: the file is the user's own.
        text = read_text(Path(os.path.realpath(path)))
    except FileNotFoundError:
        raise InputError(f"template={path}: no such file") from None
    if not text.strip():
        raise InputError(f"template={path}: is empty; leave the key out for the policy's own")
    return text


def open_context(
    run: Run, config: RunConfig, planned: Sequence[str] | None = None, write: bool = True
) -> Context:
    """Reads and checks data, tokenizer and template, and the headers of the policy's
    files; the rows are prepared into RUN/data where they are not there yet. The context's settings
    have the lengths that come from the data.

    planned: the stages to come; None: all. write: False: nothing is written into the run folder.
    Raises InputError for bad rows, rows that do not fit or are longer than the policy reads, fewer
    of them than one global batch, rows without the checker that weights=oracle asks, a guide that
    is asked for in two ways, or sampling.weights that no decoder here has; EnvironmentProblem where
    a host has another policy, template or rows, or computes otherwise.
    """
    _check_guide(config.guide)
    device = distributed.start(config.device, config.timeout_minutes)
    on_rank0(lambda: say_files(config))  # before a policy is fetched, which may take long
    _read_template(config)
    start = open_policy(config)
    tokenizer = open_tokenizer(config, start, run.began)
    dtype = choose_dtype(config, device)
    check_weights(config.sampling.weights, device, dtype)
    distributed.agree(
        lambda: {
            "device": device.type,
            "dtype": str(dtype),
            "kernels": _kernels(device),
            # other roundings, again
            "threads": torch.get_num_threads() if device.type == "cpu" else "any",
            f"the policy {start}": hash_model_folder(start),
            **tokenizer.template_parents,
        },
        SAME_FILES,
    )
    data = open_data(run, config, tokenizer, write)
    from_data = asked_of(given(config))
    config, splits = data.config, (data.train, data.heldout, data.validation)
    ctx = Context(run, config, device, dtype, start, tokenizer, *splits, data.counts, from_data)
    distributed.agree(lambda: _rows_read(ctx), SAME_FILES)
    _check_positions(ctx, planned)
    _check_enough(ctx, planned)
    _check_validation(ctx)
    if config.method == "ld_align" and config.weights == "oracle" and config.iterations:
        check_verdicts(ctx.used[0])
    distributed.copies(config.training.shard_ranks)
    _say_policy(config.policy, start)
    ranks = distributed.world_size()
    n = {name.removeprefix("rows/"): f"{count:.0f}" for name, count in data.counts.items()}
    say(
        f"data: {n['train']} training rows ({n['cut']} responses cut), {n['heldout']} held out"
        f"{', ' + n['validation'] + ' more for validation' if ctx.validation.rows else ''}; of "
        f"{n['read']} rows that were read {n['dropped']} have too long a prompt, {n['skipped']} "
        f"are bad, {n['unused']} not used, {n['repeated']} repeat others; {device.type}, "
        f"{str(ctx.dtype).removeprefix('torch.')}, {ranks} rank{'s' * (ranks > 1)}"
    )
    cut = int(data.counts["rows/cut"])
    if write and cut > TOO_MANY * len(ctx.train.rows):  # a dry run's page has it
        say(
            f"data: WARNING: {cut} of {n['train']} training responses are longer than max_length="
            f"{config.max_length} leaves room for: they lose their end, and are trained on without "
            f"an end token; {for_longer_rows(start, config.max_length)}"
        )
    unchecked = sum(row.kind is None for row in ctx.heldout.rows)
    if unchecked:
        some = unchecked < len(ctx.heldout.rows)
        say(
            f"data: {'WARNING: ' if some else ''}{unchecked} of {len(ctx.heldout.rows)} held-out "
            "rows name no checker (kind and answer, docs/data.md): accuracy cannot be measured on "
            "them, only the likelihood of their responses"
        )
    return ctx


def _rows_read(ctx: Context) -> dict[str, str]:
    """The hashes of the rows as this rank reads them. Their tokens lie in files of their own, and
    of no stage but the guide's are they what it says that it is made from.
    """
    splits = {"training": ctx.train, "held-out": ctx.heldout, "validation": ctx.validation}
    return {
        "training rows": ctx.used_hash,
        "held-out rows": ctx.heldout_hash,
        **{f"{name} tokens": tokens_hash(split) for name, split in splits.items()},
    }


def _say_policy(name: str, folder: Path) -> None:
    """Says which files the policy is."""
    files = sorted(folder.glob("*.safetensors"))
    size = sum(path.stat().st_size for path in files) / 2**20
    where = f"{name}: {folder}" if name != str(folder) else name
    say(f"policy: {where}: {len(files)} file{'s' * (len(files) > 1)} of weights, {size:.1f} MiB")


def _check_guide(guide: GuideKeys) -> None:
    """Raises InputError for a guide that is asked for in two ways, by what lies in
    `guide.folder`.
    """
    if guide.folder is None:
        return
    trained = is_trained_guide(Path(guide.folder))
    if trained and guide.retrain:
        raise InputError(
            f"guide={guide.folder}: is a trained guide, used as it is; guide.retrain=true would "
            "train others: give one of the two"
        )
    if not trained and guide.backbone == "policy":
        raise InputError(
            f"guide={guide.folder}: is no trained guide, and guide.backbone=policy starts from the "
            "policy: give one of the two"
        )


def _check_positions(ctx: Context, planned: Sequence[str] | None) -> None:
    """Raises InputError for a row longer than the policy reads; warns where an answer may be."""
    splits = (ctx.train.pairs, ctx.heldout.pairs, ctx.validation.pairs)
    longest = max(int(pairs.tokens.max(initial=0)) for pairs in splits)
    check_rows(ctx.start, ctx.config.max_length, longest)
    if planned is None or any(name.rpartition("/")[2] in SAMPLED for name in planned):
        longest = max(int(pairs.prompts.lengths.max(initial=0)) for pairs in splits)
        warn_of_answers(ctx.start, longest, ctx.config.max_new_tokens)


def _check_enough(ctx: Context, planned: Sequence[str] | None) -> None:
    """Raises InputError where a policy that is trained has fewer rows than one global batch: any
    that the config asks for, or that is among the `planned` stages.
    """
    config, rows = ctx.config, len(ctx.train.rows)
    needs = (
        {"iteration_0": ("global_batch", config.global_batch, len(ctx.used[0]))}
        if config.iterations
        else {}
    )
    for name, sft in (("sft", config.sft), ("continual_sft", config.continual_sft)):
        if sft.epochs:
            needs[name] = f"{name}.global_batch", sft.global_batch, min(rows, sft.rows or rows)
    for name, (key, batch, count) in needs.items():
        if count < batch and (planned is None or f"{name}/policy" in planned):
            raise InputError(
                f"data: {count} usable rows are fewer than one batch of {key}={batch}; add rows or "
                f"lower {key}"
            )


def _check_validation(ctx: Context) -> None:
    """Raises InputError where the rows that are set aside cannot say what is asked of them."""
    v, rows = ctx.config.validation, ctx.validation.rows
    if rows:
        if v.metric == "accuracy" and all(row.kind is None for row in rows):
            raise InputError(
                f"validation.metric=accuracy: a program can check none of the {len(rows)} rows "
                "set aside for validation (kind and answer, docs/data.md); leave it out"
            )
        return
    wanted = {"select=best": ctx.config.select == "best"}
    wanted |= {f"validation.early_stop={v.early_stop}": v.early_stop is not None}
    wanted |= {f"validation.every={v.every}": v.every is not None}
    wanted |= {"validation.metric=accuracy": v.metric == "accuracy"}
    if any(wanted.values()):
        raise InputError(
            f"{', '.join(key for key, given in wanted.items() if given)}: no rows are set aside "
            f"for validation, as only {len(ctx.heldout.rows)} are held out; hold out more "
            "(heldout_fraction, heldout), give validation.rows, or leave out"
        )


def check_verdicts(rows: Sequence[Row]) -> None:
    """Raises InputError where weights=oracle finds rows that no program can check."""
    unchecked = [row.id for row in rows if row.kind is None]
    if unchecked:
        raise InputError(
            f"weights=oracle: {len(unchecked)} of {len(rows)} rows name no checker (kind and "
            f"answer), the first: {unchecked[0]}; give rows that do (data=embedded), or other "
            "weights"
        )


def checkpoint_plan(ctx: Context, folder: Path) -> CheckpointPlan:
    """The checkpoints of a stage that is made in `folder`."""
    c = ctx.config.checkpoint
    return CheckpointPlan(folder / CHECKPOINTS, c.minutes, c.steps, c.keep)


def file_hash(ctx: Context, name: str) -> str:
    """sha256 of a file in the run folder."""
    return hash_file(ctx.run.path / name)
