"""The console command: `ldalign COMMAND [options] [key=value ...]`.

A command is the `main(argv)` of a module, most often of one of train/*.py, which is imported when
it is asked for: help, version and presets load no torch.
"""

import importlib
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NoReturn

import ldalign
from ldalign.system import exits
from ldalign.system.errors import InputError, nearest

RANKS = "--ranks"


@dataclass(frozen=True)
class Command:
    """A command: the module whose `main(argv)` it is, and what it does, in a few words."""

    module: str
    does: str
    given: tuple[str, ...] = ()  # arguments that the command stands for
    ranks: bool = False  # whether several processes may share its work


COMMANDS = {
    "align": Command("ldalign.train.align", "the whole method, or another one", ranks=True),
    "sft": Command("ldalign.train.sft", "supervised fine-tuning alone", ranks=True),
    "guide": Command("ldalign.train.guide", "train the guide alone", ranks=True),
    "generate": Command("ldalign.train.generate", "answer a file of prompts", ranks=True),
    "chat": Command("ldalign.train.generate", "talk to a policy in the terminal", ("--chat",)),
    "evaluate": Command(
        "ldalign.train.evaluate", "measure a policy on held-out rows and benchmarks", ranks=True
    ),
    "judge": Command("ldalign.train.judge", "hold a guide's distances against a judge", ranks=True),
    "compare": Command("ldalign.train.compare", "several methods from one start", ranks=True),
    "report": Command("ldalign.train.report", "write a run's report again"),
    "inspect": Command("ldalign.train.inspect_data", "show rows as the tokens trained on"),
    "export": Command("ldalign.train.export", "write a policy as a GGUF file"),
    "push": Command("ldalign.train.push", "send a policy's folder to the hub"),
    "presets": Command("ldalign.train.presets", "list the presets, or copy one"),
    "tour": Command("ldalign.train.tour", "one pair through the whole method, in numbers"),
    "env": Command("ldalign.run.environment", "what this machine has, and what is used of it"),
}


def main() -> NoReturn:
    """Runs the command that the arguments name, and exits as it does."""
    exits.run(run)


def run(argv: list[str]) -> None:
    """Runs `argv`: a command's name, then its arguments. Raises InputError, which says what is
    wrong with them.
    """
    name, arguments = (argv[0], argv[1:]) if argv else ("", [])
    if name in ("-h", "--help"):
        print(usage())
        return
    if name == "--version":
        print(f"ldalign {ldalign.__version__}")
        return
    if not name:
        print(usage(), file=sys.stderr)
        raise InputError("no command is given")
    command = COMMANDS.get(name)
    if command is None:
        if name in ("-v", "-V"):
            raise InputError(f"{name}: unknown option; write ldalign --version")
        if name.startswith("-") or "=" in name:
            raise InputError(f"{name}: a command comes first: ldalign align {name}")
        if name in ("help", "version"):
            raise InputError(f"{name}: unknown command; write ldalign --{name}")
        hint = nearest(name, COMMANDS) or "; `ldalign --help` lists them"
        raise InputError(f"{name}: unknown command{hint}")
    given, ranks = _split_ranks(name, command, arguments)
    asks = {"-h", "--help"} & set(given)
    if ranks is None and not asks:
        import torch

        ranks = torch.cuda.device_count()
    if ranks and ranks > 1 and not asks:
        if "RANK" in os.environ:
            raise InputError(f"{RANKS}: torchrun started this process already; leave it out")
        from ldalign.system.launch import launch

        launch(command.module, [*command.given, *given], ranks)
    importlib.import_module(command.module).main([*command.given, *given])


def usage() -> str:
    """What `ldalign --help` prints: the commands, a line each."""
    width = max(map(len, COMMANDS))
    return "\n".join(
        [
            "ldalign: align a language model with latent distances (arXiv 2404.06390)",
            "",
            "    ldalign COMMAND [--config FILE.yaml or preset] [key=value ...]",
            "",
            *(f"  {name:{width}}  {command.does}" for name, command in COMMANDS.items()),
            "",
            "ldalign COMMAND --help: its options and keys. --ranks N (or auto, one a GPU): in N",
            "processes on this machine. --debug: the traceback with an error. --version.",
        ]
    )


def _split_ranks(
    name: str, command: Command, arguments: Sequence[str]
) -> tuple[list[str], int | None]:
    """The arguments without `--ranks`, and how many are asked for; None: as many as GPUs."""
    rest: list[str] = []
    ranks: int | None = 1
    left = iter(arguments)
    for argument in left:
        option, equals, value = argument.partition("=")
        if option != RANKS:
            rest.append(argument)
            continue
        value = value if equals else next(left, "")
        if not command.ranks:
            raise InputError(f"{RANKS}: {name} is the work of one process; leave it out")
        if value != "auto" and not (value.isascii() and value.isdigit() and int(value) > 0):
            raise InputError(f"{RANKS}: needs a number of processes, or auto; write {RANKS} 2")
        ranks = None if value == "auto" else int(value)
    return rest, ranks
