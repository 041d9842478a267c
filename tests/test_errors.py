"""How commands end: exit codes, one line, one rank."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from ldalign import interrupt
from ldalign.errors import is_failure

SCRIPT = """
import builtins
from ldalign import errors

def main(argv):
    if argv[0] == "fine":
        print(argv)
        return
    kind = getattr(errors, argv[0], None) or getattr(builtins, argv[0])
    raise kind("data.jsonl:7: bad row;\\nmend it")

errors.run(main)
"""


def command(*argv: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "TORCHELASTIC_ERROR_FILE")}
    return subprocess.run(
        [sys.executable, "-c", SCRIPT, *argv], capture_output=True, text=True, env={**environment, **variables}
    )


@pytest.mark.parametrize(
    ("kind", "code", "line"),
    [
        ("InputError", 2, "ldalign: error: data.jsonl:7: bad row; mend it\n"),
        ("EnvironmentProblem", 3, "ldalign: error: data.jsonl:7: bad row; mend it\n"),
        ("NumericsError", 4, "ldalign: error: data.jsonl:7: bad row; mend it\n"),
        ("KeyboardInterrupt", 130, "ldalign: error: interrupted\n"),
        (
            "KeyError",
            1,
            "ldalign: error: unexpected KeyError: 'data.jsonl:7: bad row;\\nmend it' "
            "(run again with --debug for the traceback)\n",
        ),
    ],
)
def test_one_line_and_the_code(kind: str, code: int, line: str) -> None:
    result = command(kind)
    assert (result.returncode, result.stdout, result.stderr) == (code, "", line)


def test_debug_adds_the_traceback_and_is_taken_out() -> None:
    result = command("--debug", "InputError")
    assert result.returncode == 2
    assert result.stderr.startswith("Traceback") and result.stderr.endswith("bad row; mend it\n")
    assert command("fine", "--debug", "x").stdout == "['fine', 'x']\n"


def test_success_exits_0() -> None:
    assert command("fine").returncode == 0


@pytest.mark.parametrize(("kind", "code"), [("fine", 0), ("InputError", 2)])
def test_no_shutdown_spoils_the_exit_code(kind: str, code: int, tmp_path: Path) -> None:
    """What a process group's thread may do while Python shuts down: abort the process."""
    script = tmp_path / "script.py"
    script.write_text(f"import atexit, os\natexit.register(os.abort)\n{SCRIPT}")
    assert subprocess.run([sys.executable, str(script), kind], capture_output=True).returncode == code


def test_first_rank_to_fail_speaks_under_torchrun(tmp_path: Path) -> None:
    ranks = {}
    for rank in ("1", "0"):
        (tmp_path / rank).mkdir()
        error_file = str(tmp_path / rank / "error.json")
        ranks[rank] = command("InputError", RANK=rank, WORLD_SIZE="2", TORCHELASTIC_ERROR_FILE=error_file)
    assert "bad row" in ranks["1"].stderr
    assert ranks["0"].stderr == "" and ranks["0"].returncode == 2


def test_rank_0_speaks_under_another_launcher() -> None:
    assert command("InputError", RANK="1", WORLD_SIZE="2").stderr == ""
    assert "bad row" in command("InputError", RANK="0", WORLD_SIZE="2").stderr
    assert "unexpected KeyError" in command("KeyError", RANK="1", WORLD_SIZE="2").stderr


def test_torchrun_prints_it_once(tmp_path: Path) -> None:
    script = tmp_path / "fails.py"
    script.write_text(SCRIPT)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    result = subprocess.run([*launcher, str(script), "InputError"], capture_output=True, text=True)
    assert result.returncode != 0
    assert result.stderr.count("ldalign: error: data.jsonl:7: bad row; mend it") == 1


def test_a_request_to_stop_is_no_failure_of_a_library() -> None:
    panic = type("PanicException", (BaseException,), {})
    assert is_failure(ValueError()) and is_failure(panic())
    assert not any(map(is_failure, (interrupt.Stopped(15), KeyboardInterrupt(), SystemExit())))
