"""The commands that the pages print: found, sorted, and checked without running them."""

import re
import shlex
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from runs import ROOT

from ldalign.cli import COMMANDS
from ldalign.run.compare_settings import CompareConfig
from ldalign.run.settings import RunConfig
from ldalign.system.config import load_config
from ldalign.system.errors import InputError
from ldalign.train import command
from ldalign.train.generate import GenerateConfig
from ldalign.train.inspect_data import InspectConfig
from ldalign.train.report import ReportConfig
from ldalign.train.tour import TourKeys

# What nobody can check here, by its beginning: other people's programs and addresses.
UNCHECKED = (
    "git clone URL",
    "git worktree add",
    "cd ldalign",
    "hf download",
    "pip download",
    "pip install pre-commit",
    "pre-commit install",
    "unzip ",
    "llama-",
)
PROGRAMS = "make|python3?|torchrun|ldalign|pip|git|hf|unzip|cd|pre-commit"
START = re.compile(rf"(?:[A-Z_]+=\S+ )*(?:\.venv/bin/)?(?:{PROGRAMS})(?: |$)")
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
INDENTED = re.compile(r"(?:^ {4}.*\n)+", re.MULTILINE)
PLAIN = ("", "bash", "sh", "console")  # languages of a block that may hold commands

# Scripts and their config classes; `ldalign COMMAND` is one of them, or a module.
SCRIPTS: dict[str, Any] = {
    "align": RunConfig,
    "sft": RunConfig,
    "guide": RunConfig,
    "evaluate": RunConfig,
    "judge": RunConfig,
    "generate": GenerateConfig,
    "inspect_data": InspectConfig,
    "compare": CompareConfig,
    "report": ReportConfig,
    "tour": TourKeys,
}
FLAGS = {*command.FLAGS, "--help", "--debug", "--chat"}
CONSOLE = {"chat": "generate", "inspect": "inspect_data"}  # `ldalign NAME` of another name
WITHOUT_KEYS = ("env", "presets", "export", "push")  # console commands that take no keys of a run
# A reader's own config file, which is not here: checked with this one in its place.
OWN_CONFIG = {CompareConfig: "configs/compare-own-data.yaml"}


class Command(NamedTuple):
    """A command of a page, without its comment, its continued lines joined."""

    page: str
    line: int
    text: str


def commands(page: Path) -> list[Command]:
    """Returns the commands in the page's blocks of code, fenced or indented."""
    text = page.read_text(encoding="utf-8")
    name = str(page.relative_to(ROOT)) if page.is_relative_to(ROOT) else page.name
    found = []
    for fence in FENCE.finditer(text):
        if fence[1] in PLAIN:
            found += _of_block(name, text[: fence.start(2)].count("\n") + 1, fence[2])
    blank = FENCE.sub(lambda fence: "\n" * fence[0].count("\n"), text)
    for block in INDENTED.finditer(blank):
        found += _of_block(name, blank[: block.start()].count("\n") + 1, block[0])
    return sorted(found, key=lambda one: one.line)


def _of_block(page: str, line: int, block: str) -> Iterator[Command]:
    """The commands of a block: all its lines, where its first one is a command."""
    lines = block.splitlines()
    if not START.match(lines[0].strip()):
        return
    whole, begin = "", line
    for number, one in enumerate(lines, line):
        whole, begin = (whole, begin) if whole else ("", number)
        whole += one.strip().removesuffix("\\")
        if not one.rstrip().endswith("\\"):
            if whole and not whole.startswith("#"):
                yield from (Command(page, begin, part) for part in _parts(whole))
            whole = ""


def _parts(text: str) -> Iterator[str]:
    lexer = shlex.shlex(text, posix=False, punctuation_chars="&")
    lexer.whitespace_split, lexer.commenters = True, "#"
    part: list[str] = []
    for word in [*lexer, "&&"]:
        if word == "&&":
            yield " ".join(part)
            part = []
        else:
            part.append(word)


def wrong(text: str) -> str | None:
    """What is wrong with a command; None: nothing, or it is one that nobody can check."""
    if text.startswith(UNCHECKED):
        return None
    program, arguments = _program(text)
    check = _CHECKS.get(program.removesuffix("3"))
    if check is None:
        return f"{program}: a program that tests/support/doc_commands.py does not know"
    try:
        return check(arguments)
    except InputError as error:
        return str(error)


def _program(text: str) -> tuple[str, list[str]]:
    """A command's program and its arguments, without what is set before it and where its output
    goes.
    """
    words = shlex.split(re.sub(r"\s(\||\d?>).*", "", text))
    while words and re.match(r"[A-Z_]+=", words[0]):
        words.pop(0)
    return Path(words[0]).name, words[1:]


def _make_script(target: str, given: Mapping[str, str]) -> list[str] | None:
    """The arguments of the script that a target stands for; None: it stands for none."""
    more = shlex.split(given.get("ARGS", ""))
    if target in ("align", "compare"):
        name = "CONFIG" if target == "align" else "COMPARE"
        makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
        usual = re.search(rf"^{name} \?= (.*)$", makefile, re.MULTILINE)
        return ["--config", given.get(name) or usual[1], *more]  # type: ignore[index]
    if target == "report":
        return [f"run={given.get('RUN', '')}", *more]
    return more if target in ("evaluate", "tour") else None


def _without_ranks(arguments: Sequence[str]) -> list[str]:
    rest = list(arguments)
    if "--ranks" in rest:
        at = rest.index("--ranks")
        del rest[at : at + 2]
    return rest


def _make(arguments: Sequence[str]) -> str | None:
    words = [word for word in arguments if "=" not in word]
    given = dict(word.split("=", 1) for word in arguments if "=" in word)
    if words[:1] == ["-C"]:
        words = words[2:]
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.search(r"^\.PHONY: (.*)$", makefile, re.MULTILINE)[1].split())  # type: ignore[index]
    unknown = set(words) - targets
    if unknown:
        return f"make has no target {', '.join(sorted(unknown))}"
    more = shlex.split(given.get("ARGS", ""))
    for target in words:
        script = _make_script(target, given)
        if script is not None:
            return check_script(target, script)
        if target in ("test", "test-slow", "reliability"):
            return _paths(more)
        if target in ("bench", "profile", "gpu", "fuzz", "mutate", "test-options"):
            scripts = {"bench": "bench/run.py", "profile": "bench/profile_train.py"}
            scripts |= {"gpu": "bench/gpu.py", "fuzz": "tests/support/fuzz.py"}
            scripts |= {"mutate": "tests/support/mutate.py"}
            scripts |= {"test-options": "tests/support/option_matrix.py"}
            return _options(scripts[target], more)
    return None


def _python(arguments: Sequence[str]) -> str | None:
    if not arguments:
        return "python without a script"
    script, *rest = arguments
    if script == "-m":
        module, *rest = rest
        if module == "pytest":
            return _paths(rest)
        path = ROOT.joinpath(*module.split(".")).with_suffix(".py")
        return None if path.is_file() else f"no module {module}"
    if script == "-c":
        compile(rest[0], "-c", "exec")
        return None
    if not (ROOT / script).is_file():
        return f"no file {script}"
    if script.startswith("train/"):
        return check_script(Path(script).stem, rest)
    return _options(script, rest)


def _torchrun(arguments: Sequence[str]) -> str | None:
    at = next((i for i, word in enumerate(arguments) if word.endswith(".py")), None)
    return "torchrun without a script" if at is None else _python(arguments[at:])


def _console(arguments: Sequence[str]) -> str | None:
    if not arguments or arguments[0] in ("--help", "--version"):
        return None
    name, *rest = arguments
    if name in WITHOUT_KEYS:
        return None
    script = CONSOLE.get(name, name)
    if script not in SCRIPTS:
        return f"ldalign has no command {name}"
    return check_script(script, _without_ranks(rest))


def _pip(arguments: Sequence[str]) -> str | None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    for word in arguments[1:]:
        extras = re.fullmatch(r"(?:ldalign|\.)\[([\w,]+)\]", word)
        unknown = (
            set(extras[1].split(",")) - set(project["optional-dependencies"]) if extras else ()
        )
        if unknown:
            return f"{word}: no extra {', '.join(sorted(unknown))}"
        if word.startswith("requirements/") and not (ROOT / word).is_file():
            return f"no file {word}"
    return None


def check_script(name: str, arguments: Sequence[str]) -> str | None:
    """Resolves the settings of a script of train/; raises InputError where they are refused."""
    cls = SCRIPTS.get(name)
    if cls is None:  # one that takes no keys
        return None if (ROOT / f"train/{name}.py").is_file() else f"train/ has no script {name}.py"
    rest = [word for word in arguments if word not in FLAGS]
    config: str | None = None
    if "--config" in rest:
        at = rest.index("--config")
        config = rest[at + 1]
        del rest[at : at + 2]
    own = config is not None and "/" not in config and config.endswith(".yaml")
    if config is None or own:
        file = OWN_CONFIG.get(cls) if own else None
        path = ROOT / file if file else None
    else:
        path = ROOT / (config if "/" in config else f"configs/{config}.yaml")
        if not path.is_file():
            return f"no file {config}"
    loaded = load_config(cls, path, rest)
    if name == "align":
        where = ["--config", str(path)] if path else []
        command.check_method_reads([*where, *rest], loaded)
    return None


def script_call(text: str) -> tuple[str, list[str]] | None:
    """The module of train/ whose `main` a command calls, and its arguments; None: it calls none.

    `make` stands for what its target calls, torchrun and --ranks for one process.
    """
    program, arguments = _program(text)
    if program == "make":
        target, *rest = arguments
        script = _make_script(target, dict(word.split("=", 1) for word in rest if "=" in word))
        return None if script is None else (target, script)
    if program == "ldalign":
        command = COMMANDS.get(arguments[0]) if arguments else None
        if command is None:
            return None
        rest = [*command.given, *_without_ranks(arguments[1:])]
        return command.module.removeprefix("ldalign.train."), rest
    at = next((i for i, word in enumerate(arguments) if word.startswith("train/")), None)
    return None if at is None else (Path(arguments[at]).stem, arguments[at + 1 :])


def _options(script: str, arguments: Sequence[str]) -> str | None:
    files = [ROOT / script, ROOT / "bench/common.py"]  # which has those of all benchmarks
    source = "".join(path.read_text(encoding="utf-8") for path in files)
    unknown = [word for word in arguments if word.startswith("--") and f'"{word}"' not in source]
    return f"{script} has no option {', '.join(unknown)}" if unknown else None


def _paths(arguments: Sequence[str]) -> str | None:
    """The tests that a call of pytest names are there."""
    named = [path for word in arguments if word.startswith("tests/") for path in _braces(word)]
    missing = [path for path in named if not (ROOT / path.partition("::")[0]).exists()]
    return f"no file {', '.join(missing)}" if missing else None


def _braces(word: str) -> list[str]:
    found = re.search(r"\{([^}]*)\}", word)
    parts = found[1].split(",") if found else []
    return [word.replace(found[0], part) for part in parts] if found else [word]


_CHECKS: dict[str, Callable[[Sequence[str]], str | None]] = {
    "make": _make,
    "python": _python,
    "torchrun": _torchrun,
    "ldalign": _console,
    "pip": _pip,
}
