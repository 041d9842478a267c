"""What all training scripts do alike: read the settings, open the run folder and the
data, then do their stages.
"""

import contextlib
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields, replace
from pathlib import Path

from ldalign.report.live import watched
from ldalign.report.page import try_page
from ldalign.report.table import say_table, write_report
from ldalign.run.context import Context, agree_on_settings, open_context
from ldalign.run.disk import check_disk
from ldalign.run.dry_run import Gpus, dry_run
from ldalign.run.folder import RunFolder
from ldalign.run.keys import ValidationKeys
from ldalign.run.measures import check_measurements
from ldalign.run.plan import stage_of
from ldalign.run.prepared import check_data
from ldalign.run.settings import RunConfig, reader, unread
from ldalign.run.stages.benchmarks import BENCHMARKS_STAGE, check_benchmarks
from ldalign.run.stages.guide import agree_on_guide, check_guide, say_guide
from ldalign.run.stranger import refuse_outside
from ldalign.system import distributed
from ldalign.system.config import describe, given_keys, load_config, split_argv, to_yaml
from ldalign.system.errors import InputError
from ldalign.system.files import writing
from ldalign.system.metrics import say
from ldalign.system.sinks import check_sinks
from ldalign.train.push import check_run_pushes, push

FLAGS = ("--help", "--dry-run")
USAGE = """
Options: --config FILE.yaml, or the name of a preset (`ldalign presets`); --help; --dry-run (check
everything and estimate memory, disk and time, make nothing; beside it gpus=8x80: the memory of 8
GPUs of 80 GiB, computed here); --debug (the traceback with an error).
"""
# Of a run's keys, those that people set first: at the top of --help.
SET_FIRST = (
    "policy",
    "data",
    "run",
    "method",
    "iterations",
    "beta",
    "learning_rate",
    "max_length",
    "max_new_tokens",
    "global_batch",
    "max_rows",
    "sft.epochs",
)


def run_script(
    argv: Sequence[str],
    doc: str,
    work: Callable[[Context], str],
    planned: Callable[[RunConfig], list[str]],
    check: Callable[[RunConfig], None] = lambda config: None,
    by_method: bool = False,
    trains: bool = True,
    kept: Callable[[Context], Path] | None = None,
) -> None:
    """Runs a script: `work(ctx)` makes its stages and returns a closing line, `planned` names them.

    doc: the script's docstring. check: raises InputError for settings with which the script has
    nothing to do. by_method: the key `method` says what the script reads, so keys that it does not
    read are refused. trains: no policy is trained where it is False, and no held-out row is set
    aside for validation. kept: the folder of the policy that the script's work ends with, which
    hub.push pushes; None: it has none, and pushes nothing.
    """
    argv, gpus = take_gpus(argv)
    config = read_config(argv, doc)
    if config is None:
        return
    if not trains:
        config = replace(config, validation=ValidationKeys(rows=0), select=None)
    check(config)
    if by_method:
        check_method_reads(argv, config)
    if any(stage_of(name) is BENCHMARKS_STAGE for name in planned(config)):
        check_benchmarks(config)
    distributed.start(config.device, config.timeout_minutes)
    agree_on_settings(config)
    check_data(config)
    check_measurements(config, planned(config))
    if kept is not None:
        check_run_pushes(config, planned(config), make="--dry-run" not in argv)
    if "--dry-run" in argv:
        refuse_outside(Path(config.run))
        folder = RunFolder(Path(config.run), to_yaml(config))
        ctx = open_context(folder, config, planned(config), write=False)
        say(dry_run(ctx, planned(config), gpus))
    else:
        with open_run(config, planned(config)) as ctx:
            closing = work(ctx)
            ctx.run.record()  # the report shows it
            if distributed.rank() == 0:
                with writing(ctx.run.path):
                    say(f"\n{write_report(ctx.run.path)}")
                say_table(ctx.run.path)
                if config.report == "page":
                    say(try_page(ctx.run.path))
            say(closing)
            if kept is not None and config.hub.push is not None:
                push(kept(ctx), config.hub.push, config.hub.private)
    distributed.stop()


@contextlib.contextmanager
def open_run(config: RunConfig, planned: Sequence[str]) -> Iterator[Context]:
    """Opens and locks the run folder and prepares its rows; yields the context that the planned
    stages work in.
    """
    with RunFolder(Path(config.run), to_yaml(config)) as run:
        check_guide(config, planned)
        agree_on_guide(config, planned)
        ctx = open_context(run, config, planned)
        check_disk(ctx, planned, run.path)
        say_guide(ctx, planned)
        with watched(ctx, planned):
            yield ctx


def read_config(
    argv: Sequence[str], doc: str, cls: type[RunConfig] = RunConfig
) -> RunConfig | None:
    """The settings that the command line asks for; None where it asks for help, printed here.

    Raises InputError, after the usage, where it says nothing: no command starts a run that nobody
    asked for; EnvironmentProblem for a sink of the key `log` whose library is not installed.
    """
    path, overrides, flags = split_argv(argv, FLAGS, cls)
    if "--help" in flags:
        inherited = {one.name for one in fields(RunConfig)}
        own = [one.name for one in fields(cls) if one.name not in inherited]
        keys = describe(cls, (*own, *SET_FIRST))
        print(doc.strip(), f"{USAGE}\nKeys, with their defaults.\n", keys, sep="\n")
        return None
    if path is None and not overrides:
        if os.environ.get("RANK", "0") == "0":
            print(doc.strip(), USAGE, sep="\n", file=sys.stderr)
        raise InputError(
            "nothing is asked for: give --config FILE.yaml or key=value, or --help for all keys"
        )
    config = load_config(cls, path, overrides)
    check_sinks(config.log)
    return config


def take_gpus(argv: Sequence[str]) -> tuple[list[str], Gpus | None]:
    """Takes `gpus=COUNTxGIB` out of a dry run's arguments; elsewhere it is an unknown key. Raises
    InputError for another form.
    """
    if "--dry-run" not in argv:
        return list(argv), None
    found = [argument for argument in argv if argument.startswith("gpus=")]
    rest = [argument for argument in argv if argument not in found]
    return rest, Gpus.of(found[-1].removeprefix("gpus=")) if found else None


def check_method_reads(argv: Sequence[str], config: RunConfig) -> None:
    """Raises InputError for keys of the command line that the method does not read; names those of
    the config file.

    A file may serve several methods (`method=spin` over it, or as the `base:` of others), so it is
    not refused; what a base gives is not even named.
    """
    path, overrides, _ = split_argv(argv, FLAGS)
    method, name = config.method, reader(config.method, config.sft_prompts)
    in_file, on_line = (unread(name, keys) for keys in given_keys(RunConfig, path, overrides))
    if on_line:
        raise InputError(
            f"{', '.join(on_line)}: method={method} does not read "
            f"{'this key' if len(on_line) == 1 else 'these keys'}; leave out, or give another "
            "method (docs/methods.md)"
        )
    if in_file:
        groups = dict.fromkeys(
            f"{key.partition('.')[0]}.*" if "." in key else key for key in in_file
        )
        say(f"{path}: method={method} does not read {', '.join(groups)}; they change nothing here")


def need(condition: bool, message: str) -> None:
    """Raises InputError with `message` unless `condition` holds."""
    if not condition:
        raise InputError(message)
