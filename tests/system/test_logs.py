"""How lines go out: levels, one line each, and a reader who has gone."""

import fcntl
import io
import logging
import os
import pty
import struct
import subprocess
import sys
import termios
import warnings
from collections.abc import Iterator

import pytest

from ldalign.system import logs

COMMAND = """
import logging, sys, warnings
from ldalign.system import exits
def main(argv):
    logging.getLogger("ldalign.models.fetch").info("downloading %s", "it")
    logging.getLogger("ldalign.ops").info("a kernel")
    logging.getLogger("httpx").info("a request")
    logging.getLogger("urllib3.connectionpool").warning("a retry\\nof two lines")
    warnings.warn("deprecated")
    logging.getLogger("ldalign.data").warning("%d rows", "no number")
exits.run(main)
"""


@pytest.fixture
def configured() -> Iterator[None]:
    """Logging as a command has it; afterwards as it was."""
    root, ours = logging.getLogger(), logging.getLogger("ldalign")
    before = root.handlers[:], root.level, ours.level
    logs.configure()
    yield
    root.handlers[:], root.level, ours.level = before
    logging.captureWarnings(False)


def test_a_command_says_its_own_lines_and_others_warnings() -> None:
    done = subprocess.run(
        [sys.executable, "-c", COMMAND], capture_output=True, text=True, check=True
    )
    first, second, third, fourth = done.stderr.splitlines()
    assert first == "downloading it"
    assert second == "WARNING: urllib3.connectionpool: a retry of two lines"
    assert third.startswith("WARNING: py.warnings: ") and "deprecated" in third
    assert fourth == "WARNING: %d rows"  # a message that cannot be made is said as it is


def test_what_acts_and_is_not_seen_is_printed_with_its_number(
    capsys: pytest.CaptureFixture[str],
) -> None:
    acting = "\x00\x08\x0b\x1b\x7f\x85\x9f\u061c\u200e\u200f\u202a\u202e\u2066\u2069\ud800\uffff\r"
    for character in acting:
        logs.line(f"a{character}b")
        shown = f"{ord(character):02x}" if ord(character) < 256 else f"{ord(character):04x}"
        assert capsys.readouterr().err in (f"a\\x{shown}b\n", f"a\\u{shown}b\n")
    # Arabic, Hebrew, joiners of a word and of an emoji, tabs, lines of either kind
    legible = "\u0633 \u05e9\t\u0645\u200c\u06cc\n\r\n\U0001f468\u200d\U0001f469\xa0\xad\u2060"
    logs.line(legible)
    assert capsys.readouterr().err == f"{legible}\n"


def test_it_is_configured_once(configured: None, capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure()
    logging.getLogger("ldalign.run.manifest").info("once")
    assert capsys.readouterr().err == "once\n"


def test_other_ranks_warn_only(
    configured: None, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "1")
    logging.getLogger("ldalign.data").info("not said")
    logging.getLogger("ldalign.data").warning("odd")
    assert capsys.readouterr().err == "rank 1: WARNING: odd\n"


class Gone(io.StringIO):
    """A pipe whose reader has gone; a terminal, if need be."""

    def __init__(self, terminal: bool) -> None:
        super().__init__()
        self.terminal = terminal

    def isatty(self) -> bool:
        return self.terminal

    def write(self, text: str) -> int:
        raise BrokenPipeError("nobody reads")


@pytest.mark.parametrize("terminal", [False, True])
def test_a_line_that_cannot_be_printed_is_lost(
    monkeypatch: pytest.MonkeyPatch, terminal: bool
) -> None:
    monkeypatch.setattr(sys, "stderr", Gone(terminal))
    logs.line("lost")
    closed = io.StringIO()
    closed.close()
    for stream in (closed, None):
        monkeypatch.setattr(sys, "stderr", stream)
        assert not logs.shows_bars()
        with warnings.catch_warnings():
            logs.line("lost")


@pytest.mark.parametrize(("columns", "bars"), [(0, False), (100, True)])
def test_a_terminal_without_a_width_gets_plain_lines(
    columns: int, bars: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a container or a recorder calls a terminal may have no width: bars would be empty."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    with open(theirs, "w", encoding="utf-8") as terminal:
        monkeypatch.setattr(sys, "stderr", terminal)
        assert logs.shows_bars() is bars
        monkeypatch.undo()
    os.close(ours)
