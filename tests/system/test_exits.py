"""How commands end: exit codes, one line, one rank."""

import contextlib
import errno
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from ldalign.system import exits, interrupt
from ldalign.system.errors import EnvironmentProblem, InputError, cannot_be_read, is_failure

SCRIPT = """
import builtins
from ldalign.system import errors, exits

def main(argv):
    if argv[0] == "fine":
        print(argv)
        return
    kind = getattr(errors, argv[0], None) or getattr(builtins, argv[0])
    raise kind("data.jsonl:7: bad row;\\nmend it")

exits.run(main)
"""


def command(*argv: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {
        k: v
        for k, v in os.environ.items()
        if k not in ("RANK", "WORLD_SIZE", "TORCHELASTIC_ERROR_FILE")
    }
    return subprocess.run(
        [sys.executable, "-c", SCRIPT, *argv],
        capture_output=True,
        text=True,
        env={**environment, **variables},
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
            "ldalign: error: unexpected KeyError: 'data.jsonl:7: bad row;\\nmend it' (run again "
            "with --debug for the traceback)\n",
        ),
    ],
)
def test_one_line_and_the_code(kind: str, code: int, line: str) -> None:
    result = command(kind)
    assert (result.returncode, result.stdout, result.stderr) == (code, "", line)


FAILS = """
import errno, os
from ldalign.system import errors, exits

def main(argv):
    {what}

exits.run(main)
"""
AGAIN = "mend that and run the same command again: what is finished is kept"


@pytest.mark.parametrize(
    ("what", "code", "line"),
    [
        *(
            (
                f"raise OSError(errno.{name}, os.strerror(errno.{name}), b'/net/caf\\xe9'.decode("
                "'utf-8', 'surrogateescape'))",
                3,
                rf"/net/caf\\udce9: {said}; {AGAIN}",
            )
            for name, said in (
                ("ESTALE", "Stale file handle"),
                ("ETIMEDOUT", "Connection timed out"),
                ("EACCES", "Permission denied"),
                ("EIO", "Input/output error"),
            )
        ),
        ("raise MemoryError", 3, r"out of memory: .* \(MemoryError: \)"),
        ("bytearray(2 ** 62)", 3, r"out of memory: .*"),
        ("import torch; torch.empty(2 ** 58)", 3, r"out of memory: .*DefaultCPUAllocator.*"),
        ("raise RuntimeError('a bug')", 1, "unexpected RuntimeError: a bug .*"),
        ("open('/nowhere')", 1, "unexpected FileNotFoundError: .*"),
    ],
)
def test_what_the_machine_refuses_is_no_bug(what: str, code: int, line: str) -> None:
    """Wherever it comes from: a file system that is gone, a library that gets no memory."""
    done = subprocess.run(
        [sys.executable, "-c", FAILS.format(what=what)], capture_output=True, text=True
    )
    assert done.returncode == code and done.stdout == ""
    assert re.fullmatch(rf"ldalign: error: {line}\n", done.stderr), done.stderr


def test_a_file_system_that_fails_is_not_the_files_fault(tmp_path: Path) -> None:
    stale, absent = OSError(errno.ESTALE, "Stale file handle"), OSError(errno.EISDIR, "Is a folder")
    assert type(cannot_be_read(tmp_path, stale)) is EnvironmentProblem
    assert type(cannot_be_read(tmp_path, absent)) is InputError


def test_a_strangers_name_does_not_act_on_the_terminal() -> None:
    """A key or a file's name in a message, also in the traceback."""
    what = "raise errors.InputError('a\\x1b[2J\\x00\\x9b\\u202eb\\u200d c')"
    code = [sys.executable, "-c", FAILS.format(what=what), "--debug"]
    done = subprocess.run(code, capture_output=True, text=True, encoding="utf-8")
    trace, _, line = done.stderr.strip().rpartition("\n")
    assert line == "ldalign: error: a\\x1b[2J\\x00\\x9b\\u202eb\u200d c" and done.returncode == 2
    assert trace.startswith("Traceback") and not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f]", trace)


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
    assert (
        subprocess.run([sys.executable, str(script), kind], capture_output=True).returncode == code
    )


@pytest.mark.parametrize("launcher", ["torchrun", "another"])
def test_of_several_ranks_one_speaks(launcher: str, tmp_path: Path) -> None:
    """Whichever it is, with its number; another error is another line; the same in the next run of
    the same parent.
    """

    def of_rank(rank: int, kind: str) -> str:
        variables = {
            "RANK": str(rank),
            "WORLD_SIZE": "2",
            "TMPDIR": str(tmp_path),
            "MASTER_PORT": "29500",
        }
        if launcher == "torchrun":
            (tmp_path / str(rank)).mkdir(exist_ok=True)
            variables["TORCHELASTIC_ERROR_FILE"] = str(tmp_path / str(rank) / "error.json")
        return command(kind, **variables).stderr

    assert of_rank(1, "InputError") == "ldalign: error: rank 1: data.jsonl:7: bad row; mend it\n"
    assert of_rank(0, "InputError") == ""
    assert of_rank(0, "KeyboardInterrupt") == ""
    assert of_rank(0, "KeyError").startswith("ldalign: error: rank 0: unexpected KeyError")
    assert of_rank(1, "InputError").startswith("ldalign: error: rank 1: data.jsonl")


def test_a_rank_ends_for_another_is_said_where_nobody_spoke(tmp_path: Path) -> None:
    variables = {"WORLD_SIZE": "2", "TMPDIR": str(tmp_path)}
    assert command("KeyboardInterrupt", RANK="1", **variables).stderr == (
        "ldalign: error: rank 1: interrupted\n"
    )
    assert command("KeyboardInterrupt", RANK="0", **variables).stderr == ""


def test_what_another_user_left_silences_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)
    assert [exits._may_speak("x", aftermath) for aftermath in (False, False, True)] == [
        True,
        False,
        False,
    ]
    user = os.getuid()
    (left,) = tmp_path.iterdir()
    monkeypatch.setattr(os, "getuid", lambda: user + 1)
    left.rename(tmp_path / left.name.replace(f"said_{user}_", f"said_{user + 1}_"))
    assert exits._may_speak("x", False) and exits._may_speak("x", True)


def test_torchrun_prints_it_once(tmp_path: Path) -> None:
    script = tmp_path / "fails.py"
    script.write_text(SCRIPT)
    launcher = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
    ]
    result = subprocess.run([*launcher, str(script), "InputError"], capture_output=True, text=True)
    assert result.returncode != 0
    assert result.stderr.count("data.jsonl:7: bad row; mend it") == 1
    assert re.search("^ldalign: error: rank [01]: data", result.stderr, flags=re.MULTILINE)


def test_a_request_to_stop_is_no_failure_of_a_library() -> None:
    panic = type("PanicException", (BaseException,), {})
    assert is_failure(ValueError()) and is_failure(panic())
    others = (interrupt.Stopped(15), KeyboardInterrupt(), SystemExit(), MemoryError())
    assert not any(map(is_failure, others))


PRINTS = """
from ldalign.system import exits

def main(argv):
    for _ in range(10_000):
        print("a line that fills the buffer more than once")

exits.run(main)
"""


def test_who_stops_reading_gets_no_error() -> None:
    """As `| head` does; a pipe of another kind that breaks is an error still."""
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        [sys.executable, "-c", PRINTS], stdout=write, stderr=subprocess.PIPE, text=True
    )
    os.close(write)
    assert (done.returncode, done.stderr) == (0, "")
    result = command("BrokenPipeError")
    assert result.returncode == 1 and "unexpected BrokenPipeError" in result.stderr


@pytest.mark.parametrize("lines", [1, 10_000])  # one waits in the buffer until the end
def test_a_full_disk_behind_stdout_is_said(lines: int) -> None:
    script = PRINTS.replace("10_000", str(lines))
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-c", script], stdout=full, stderr=subprocess.PIPE, text=True
        )
    assert done.returncode == 3
    assert "what is printed cannot be written: No space left on device" in done.stderr


HANGS_UP = """
import os, signal
from ldalign.system import exits

def main(argv):
    os.kill(os.getpid(), signal.SIGHUP)
    print("goes on")

exits.run(main)
"""


@pytest.mark.parametrize(
    ("at_start", "code", "printed"), [(signal.SIG_DFL, 129, ""), (signal.SIG_IGN, 0, "goes on\n")]
)
def test_a_terminal_that_is_gone_ends_a_command_but_for_nohup(
    at_start: signal.Handlers, code: int, printed: str
) -> None:
    done = subprocess.run(
        [sys.executable, "-c", HANGS_UP],
        capture_output=True,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGHUP, at_start),  # as nohup does
    )
    assert (done.returncode, done.stdout) == (code, printed)
    assert done.stderr.startswith("ldalign: error: stopped by SIGHUP; " if code else "")
    assert bool(done.stderr) == bool(code)


A_RANK = """
import sys
from ldalign.system import exits

def main(argv):
    print("there", flush=True)
    sys.stdin.readline()
    print("goes on")

exits.run(main)
"""
LAUNCHES = """
import os, subprocess, sys

variables = dict(word.split("=") for word in sys.argv[2:])
variables = {name: value.replace("ME", str(os.getpid())) for name, value in variables.items()}
subprocess.run([sys.executable, "-c", sys.argv[1]], env={**os.environ, **variables})
"""


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux to say that the parent is gone")
@pytest.mark.parametrize(
    ("variable", "printed"),
    [
        ("TORCHELASTIC_RUN_ID=1", "there\n"),  # torchrun's
        (f"{interrupt.LAUNCHER}=ME", "there\n"),  # ours
        (f"{interrupt.LAUNCHER}=1", ""),  # which was gone before the rank had begun
        ("RANK=0", "there\ngoes on\n"),  # by hand
    ],
)
def test_a_rank_ends_with_its_launcher(variable: str, printed: str) -> None:
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("RANK", "TORCHEL"))}
    launcher = subprocess.Popen(
        [sys.executable, "-c", LAUNCHES, A_RANK, variable],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )
    assert launcher.stdin is not None and launcher.stdout is not None
    begun = launcher.stdout.readline()
    launcher.kill()
    launcher.wait()  # from here on the rank has the signal, before it can read a line
    with contextlib.suppress(BrokenPipeError):
        launcher.stdin.write("go on\n")
        launcher.stdin.close()
    assert begun + launcher.stdout.read() == printed
    stopped = "" if "goes on" in printed else "ldalign: error: stopped by SIGTERM; "
    assert launcher.stderr is not None and launcher.stderr.read().startswith(stopped)


def test_a_closed_stdout_changes_nothing() -> None:
    closed = ["sh", "-c", '"$0" "$@" >&-', sys.executable, "-c", SCRIPT]
    for kind, code in (("fine", 0), ("InputError", 2)):
        done = subprocess.run([*closed, kind], stderr=subprocess.PIPE, text=True)
        assert done.returncode == code and "Traceback" not in done.stderr


STREAMS = """
import os, sys
from ldalign.system import exits
from ldalign.system.logs import line

def main(argv):
    line("a line for stderr")
    print("also", file=sys.stderr)
    opened = os.open(os.devnull, os.O_RDONLY)
    print(opened > 2, [os.fstat(n).st_rdev for n in (0, 2)] == [os.stat(os.devnull).st_rdev] * 2)
    raise exits.LdalignError("it failed")

exits.run(main)
"""


def test_a_closed_stderr_is_not_stdout() -> None:
    """What is said for stderr is lost, and no file takes the number of a stream."""
    closed = ["sh", "-c", '"$0" "$@" <&- 2>&-', sys.executable, "-c", STREAMS]
    done = subprocess.run(closed, stdout=subprocess.PIPE, text=True)
    assert (done.stdout, done.returncode) == ("True True\n", 1)


def test_the_cause_is_written_for_the_launcher(tmp_path: Path) -> None:
    """By the rank that failed, once more without its text; not by one that ends for another."""
    file = tmp_path / "0" / "error.json"
    file.parent.mkdir()
    variables = {"RANK": "0", "WORLD_SIZE": "2", "TORCHELASTIC_ERROR_FILE": str(file)}
    command("KeyboardInterrupt", **variables)
    assert not file.exists()
    command("NumericsError", **variables)
    message = json.loads(file.read_text())["message"]
    assert "rank 0" in message["message"] and "exit code 4" in message["message"]
    assert "bad row" not in message["message"] and int(message["extraInfo"]["timestamp"]) > 0
