"""The console command `ldalign`: its commands, the presets, several ranks, and how it ends."""

import ast
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from runs import ROOT, one_thread

import ldalign
from ldalign import cli
from ldalign.run.compare_settings import CompareConfig
from ldalign.run.settings import RunConfig
from ldalign.system import exits, interrupt
from ldalign.system.config import load_config, split_argv, to_dict
from ldalign.system.errors import InputError, how_to_install
from ldalign.system.presets import presets, summary
from ldalign.train import (
    align,
    compare,
    evaluate,
    generate,
    guide,
    inspect_data,
    judge,
    sft,
)
from ldalign.train.command import SET_FIRST

SCRIPTS = (align, sft, guide, generate, evaluate, judge, compare, inspect_data)
PRESETS = sorted(path.stem for path in (ROOT / "configs").glob("*.yaml"))


def refused(*argv: str) -> str:
    """The one line with which `ldalign argv` refuses."""
    with pytest.raises(InputError) as error:
        cli.run(list(argv))
    return str(error.value)


# -------------------------------------------------------------------------------------- the command


@pytest.mark.parametrize("option", ["-h", "--help"])
def test_help_lists_every_command(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    cli.run([option])
    text = capsys.readouterr().out
    listed = dict(re.findall(r"^  (\w+) +(.+)$", text, re.MULTILINE))
    assert listed == {name: command.does for name, command in cli.COMMANDS.items()}
    assert max(map(len, text.splitlines())) <= 100


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_command_is_the_main_of_a_module(name: str) -> None:
    parts = cli.COMMANDS[name].module.split(".")[1:]
    path = (ROOT if parts[0] == "train" else ROOT / "ldalign").joinpath(*parts)
    tree = ast.parse(path.with_suffix(".py").read_text(encoding="utf-8"))
    mains = [node for node in tree.body if isinstance(node, ast.FunctionDef)]
    assert [node.args.args[0].arg for node in mains if node.name == "main"] == ["argv"]


def test_without_a_command_it_prints_its_usage(capsys: pytest.CaptureFixture[str]) -> None:
    assert refused() == "no command is given"
    assert capsys.readouterr().err.strip() == cli.usage()


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["alin"], "alin: unknown command; did you mean align?"),
        (["zzz"], "zzz: unknown command; `ldalign --help` lists them"),
        (["--config", "x"], "--config: a command comes first: ldalign align --config"),
        (["seed=1"], "seed=1: a command comes first: ldalign align seed=1"),
        (["report", "--ranks", "2"], "--ranks: report is the work of one process; leave it out"),
        (["align", "--ranks"], "--ranks: needs a number of processes, or auto; write --ranks 2"),
        (["align", "--ranks=0"], "--ranks: needs a number of processes, or auto; write --ranks 2"),
        (["presets", "kopy"], "presets kopy: unknown; write `ldalign presets copy NAME my.yaml`"),
    ],
)
def test_what_is_mistyped_is_one_line(argv: list[str], message: str) -> None:
    assert refused(*argv) == message


def test_help_version_and_presets_load_no_torch(tmp_path: Path) -> None:
    code = (
        "import sys; from ldalign import cli\n"
        "for line in ('--help', '--version', 'presets', 'presets --help', 'presets copy toy a'):\n"
        "    cli.run(line.split())\n"
        "print('loaded', sorted({'torch', 'numpy', 'yaml'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path
    )
    assert done.stdout.splitlines()[-1] == "loaded []"
    assert f"\nldalign {ldalign.__version__}\n" in done.stdout


def test_commands_load_no_more_than_they_need() -> None:
    """What takes long to import and few runs use is imported by those."""
    code = (
        "import importlib, sys\n"
        "from ldalign.cli import COMMANDS\n"
        "for command in COMMANDS.values(): importlib.import_module(command.module)\n"
        "late = {'torch.distributed.tensor', 'torch.distributed.fsdp', 'sympy', 'triton'}\n"
        "late |= {'matplotlib', 'pyarrow', 'transformers', 'lm_eval', 'huggingface_hub'}\n"
        "print('torch' in sys.modules, sorted(late & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "True []\n"


def test_chat_is_generate_and_inspect_its_script(monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[tuple[str, list[str]]] = []
    for module in (generate, inspect_data):
        name = module.__name__.rpartition(".")[2]
        monkeypatch.setattr(module, "main", lambda argv, name=name: called.append((name, argv)))
    cli.run(["chat", "policy=toy"])
    cli.run(["generate", "--ranks", "1", "a=1", "--dry-run"])
    cli.run(["inspect", "--help"])
    assert called == [
        ("generate", ["--chat", "policy=toy"]),
        ("generate", ["a=1", "--dry-run"]),
        ("inspect_data", ["--help"]),
    ]


# ------------------------------------------------------------------------ told nothing, told little


@pytest.mark.parametrize("argv", [[], ["--dry-run"]], ids=["nothing", "a flag"])
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.__name__.rpartition(".")[2])
def test_a_script_that_is_told_nothing_prints_its_usage(
    script: Any,
    argv: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="^nothing is asked for: give --config FILE.yaml or key="):
        script.main(argv)
    said = capsys.readouterr()
    assert "    ldalign " in said.err and "Options: --config" in said.err and not said.out
    assert not list(tmp_path.iterdir())


def test_help_begins_with_the_keys_that_are_set_first(capsys: pytest.CaptureFixture[str]) -> None:
    align.main(["--help"])
    text = capsys.readouterr().out
    at_top, _, others = text.partition("\nThe other keys:\n")
    named = re.findall(r"^([a-z_.]+)=", at_top.partition("\nSet first:\n")[2], re.MULTILINE)
    assert named == list(SET_FIRST) and len(named) == 12
    for name, value in to_dict(RunConfig()).items():
        if name not in SET_FIRST:
            assert re.search(rf"^{name}(=|:  )", others, re.MULTILINE), name
        if isinstance(value, dict):  # a paragraph, with all its keys
            paragraph = next(p for p in others.split("\n\n") if p.startswith(f"{name}:  "))
            assert all(f"\n{name}.{key}=" in paragraph for key in value)


def test_help_of_a_script_begins_with_its_own_keys(capsys: pytest.CaptureFixture[str]) -> None:
    generate.main(["-h"])
    text = capsys.readouterr().out.partition("\nSet first:\n")[2]
    assert text.index("\nprompts=") < text.index("\nsamples=") < text.index("\npolicy=")
    compare.main(["--help"])
    text = capsys.readouterr().out
    assert (
        text.index("\ncompare.methods=") < text.index("\npolicy=") < text.index("\nThe other keys:")
    )


# ------------------------------------------------------------------------------------------ presets


def test_presets_are_listed_with_a_line_each(capsys: pytest.CaptureFixture[str]) -> None:
    cli.run(["presets"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == PRESETS == list(presets())
    for name, line in zip(PRESETS, lines, strict=True):
        said = summary(ROOT / f"configs/{name}.yaml")
        assert line.endswith(f"  {said}") and 20 < len(said) <= 98


@pytest.mark.parametrize("name", [name for name in PRESETS if not name.startswith("own-data")])
def test_the_first_line_of_a_preset_is_a_sentence(name: str) -> None:
    said = summary(ROOT / f"configs/{name}.yaml")
    assert said[0].isupper() and said[-1] in ".?" and len(said) <= 95


@pytest.mark.parametrize("name", PRESETS)
def test_a_copy_means_the_same_wherever_it_is(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = tmp_path / "my.yaml"
    cli.run(["presets", "copy", name, str(copy)])
    original = ROOT / f"configs/{name}.yaml"
    assert copy.read_bytes() == original.read_bytes()
    comparison = name.startswith("compare-")
    command = "compare" if comparison else "align"
    assert f"ldalign {command} --config {copy} --dry-run" in capsys.readouterr().out
    kind: type = CompareConfig if comparison else RunConfig
    assert load_config(kind, copy) == load_config(kind, original)
    assert refused("presets", "copy", name, str(copy)).endswith(
        "my.yaml: is there already; give another name"
    )


def test_a_base_beside_the_copy_comes_before_the_preset(tmp_path: Path) -> None:
    (tmp_path / "my.yaml").write_text("base: toy.yaml\nseed: 3\n")
    assert load_config(RunConfig, tmp_path / "my.yaml").max_rows == 48
    (tmp_path / "toy.yaml").write_text("max_rows: 7\n")
    assert load_config(RunConfig, tmp_path / "my.yaml").max_rows == 7
    (tmp_path / "my.yaml").write_text("base: other/toy.yaml\n")
    with pytest.raises(InputError, match="other/toy.yaml: no such file"):
        load_config(RunConfig, tmp_path / "my.yaml")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["smollm2", "x"], "smollm2: no such preset; did you mean smollm2-135m?"),
        (["zzz", "x"], "zzz: no such preset; `ldalign presets` lists them"),
        (["toy"], "needs a preset and a new file's name: copy toy my.yaml"),
    ],
)
def test_a_wrong_copy_is_one_line(argv: list[str], message: str) -> None:
    assert refused("presets", "copy", *argv) == f"presets copy: {message}"


def test_config_takes_a_preset_where_no_file_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("toy", "toy.yaml"):
        assert split_argv(["--config", name])[0] == ROOT / "configs/toy.yaml"
    (tmp_path / "toy").write_text("max_rows: 7\n")
    assert split_argv(["--config", "toy"])[0] == Path("toy")
    assert split_argv(["--config", "absent/toy.yaml"])[0] == Path("absent/toy.yaml")


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("tooy", "; did you mean --config toy?"),
        ("configs/toy.yaml", "; did you mean --config toy?"),
        ("zzz", "; `ldalign presets` lists those that come with it"),
    ],
)
def test_a_config_that_is_not_there(
    name: str, hint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError) as error:
        align.main(["--config", name])
    assert str(error.value) == f"{name}: No such file or directory{hint}"


# -------------------------------------------------------------------------------------------- hints


def test_hints_name_the_packages_of_each_extra() -> None:
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    extras = tomllib.loads(text)["project"]["optional-dependencies"]
    assert len(extras) > 4
    for extra, wanted in extras.items():
        pip, install, *named = shlex.split(how_to_install(extra))
        assert (pip, install) == ("pip", "install")
        assert set(map(Requirement, named)) == set(map(Requirement, wanted))
    quoted = how_to_install("hub", "reward").removeprefix("pip install ")
    assert re.fullmatch(r"'[^']+' '[^']+'", quoted)  # zsh takes > and [ for its own else


def test_no_hint_needs_ldalign_on_an_index() -> None:
    folders = ("ldalign", "train", "kernels", "docs")
    files = [path for folder in folders for path in (ROOT / folder).rglob("*")]
    texts = {path: path.read_text("utf-8") for path in files if path.suffix in (".py", ".md")}
    found = [path.name for path, text in texts.items() if re.search(r"install '?ldalign\[", text)]
    assert len(texts) > 150 and not found


# -------------------------------------------------------------------------------- several processes


def test_ranks_are_started_with_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    class Started(Exception):
        pass

    def launch(*arguments: object) -> None:
        raise Started(*arguments)

    monkeypatch.setattr("ldalign.system.launch.launch", launch)
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    for ranks, count in (("--ranks=2", 2), ("--ranks=auto", 4)):
        with pytest.raises(Started) as started:
            cli.run(["sft", "a=1", ranks, "--dry-run"])
        assert started.value.args == ("ldalign.train.sft", ["a=1", "--dry-run"], count)
    monkeypatch.setenv("RANK", "0")
    assert refused("sft", "--ranks", "2").startswith("--ranks: torchrun started this process")


RANK = """
import os, pathlib, signal, sys, time
from ldalign.system import errors, exits

def main(argv):
    kind, folder = argv
    rank = int(os.environ["RANK"])
    if kind == "fine":
        return
    pathlib.Path(folder, f"{kind}{rank}").touch()
    if rank == 1 and kind == "killed":
        while not pathlib.Path(folder, "killed0").exists():  # a rank that still starts says nothing
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGKILL)
    elif kind == "nohup":
        while not pathlib.Path(folder, "hung up").exists():
            time.sleep(0.01)
        return
    elif rank == 1 and kind != "waits":
        raise getattr(errors, kind)("rows.jsonl:7: bad row")
    time.sleep(60)

exits.run(main)
"""
# One process that has torch, and from it one a case: `launch` does not return.
LAUNCHER = """
import os, pathlib, signal, sys, time
from ldalign.system import exits, launch

folder = sys.argv[1]
for kind in sys.argv[2:]:
    child = os.fork()
    if not child:
        sys.argv = [sys.argv[0]]
        signal.signal(signal.SIGHUP, signal.SIG_IGN if kind == "nohup" else signal.SIG_DFL)
        exits.run(lambda argv: launch.launch("a_rank", [kind, folder], 2))
    ends = {"waits": signal.SIGINT, "nohup": signal.SIGHUP}.get(kind)
    while ends and len(list(pathlib.Path(folder).glob(f"{kind}*"))) < 2:
        time.sleep(0.05)
    if ends:
        os.kill(child, ends)
        pathlib.Path(folder, "hung up").touch()
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    print(f"{kind}: {code}", file=sys.stderr)
"""


@pytest.mark.slow
def test_several_ranks_end_with_one_line_and_its_code(tmp_path: Path) -> None:
    """No word of torch's: a rank's own line, or ours for one that was killed; the code of the rank
    that failed, not of those that were stopped for it.
    """
    (tmp_path / "a_rank.py").write_text(RANK)
    kinds = ["fine", "nohup", "InputError", "NumericsError", "killed", "waits"]
    done = subprocess.run(
        [sys.executable, "-c", LAUNCHER, str(tmp_path), *kinds],
        capture_output=True,
        text=True,
        env={**one_thread(), "PYTHONPATH": str(tmp_path)},
    )
    bad = "ldalign: error: rank 1: rows.jsonl:7: bad row"
    expected = [
        "fine: 0",
        "nohup: 0",
        bad,
        "InputError: 2",
        bad,
        "NumericsError: 4",
        "ldalign: error: rank 0: stopped by SIGTERM; what is finished is kept; run the same "
        "command to go on",
        "ldalign: error: rank 1 was killed (SIGKILL), as the system does where memory runs out "
        "(see `dmesg`); run the same command again: what is finished is kept",
        "killed: 3",
    ]
    lines = done.stderr.splitlines()
    assert lines[:-2] == expected, done.stderr
    assert re.fullmatch(r"ldalign: error: rank [01]: stopped by SIGINT; .* to go on", lines[-2])
    assert lines[-1] == "waits: 130"


# -------------------------------------------------------------------------------------------- ends


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_leaves_a_chat(
    number: signal.Signals, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without a line of error; SIGTERM is said, as everywhere."""

    def interrupted(config: object) -> None:
        raise interrupt.Stopped(number)

    def leave(code: int) -> None:
        raise SystemExit(code)

    monkeypatch.setattr(generate, "chat", interrupted)
    monkeypatch.setattr(exits, "leave", leave)
    with pytest.raises(SystemExit if number == signal.SIGINT else interrupt.Stopped) as end:
        generate.main(["--chat", "policy=toy"])
    if number == signal.SIGINT:
        assert end.value.code == 130  # type: ignore[union-attr]
        assert capsys.readouterr().err == "\n"


def make(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs make with nothing to set up."""
    if shutil.which("make") is None:
        pytest.skip("needs make")
    old = [word for stamp in (".product", ".eval") for word in ("-o", f".venv/{stamp}")]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("MAKE")}
    return subprocess.run(
        ["make", *old, *arguments], cwd=ROOT, capture_output=True, text=True, env=environment
    )


def test_make_report_asks_for_a_run() -> None:
    done = make("report")
    assert done.returncode == 2
    first, *_ = done.stderr.splitlines()
    assert first == "make report: give the run folder: make report RUN=runs/smollm2-135m"


@pytest.mark.parametrize(
    ("arguments", "command"),
    [
        (["align"], ".venv/bin/ldalign align --ranks auto --config configs/smollm2-135m.yaml"),
        (
            ["align", "GPUS=2", "CONFIG=toy", "ARGS=seed=1"],
            ".venv/bin/ldalign align --ranks 2 --config toy seed=1",
        ),
        (["compare"], "train/compare.py --config configs/compare-wordings.yaml"),
    ],
    ids=["align", "align of two", "compare"],
)
def test_make_gives_a_config(arguments: list[str], command: str) -> None:
    assert command in make("-n", *arguments).stdout
