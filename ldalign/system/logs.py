"""How lines reach who reads them: stderr, a line at a time, from one place.

`line` prints; everything that is said goes through it: `metrics.say`, the warnings of our modules
and of the libraries. `configure`, called once a command (`exits.run`), sets the levels: our own
lines from INFO on, other libraries' warnings alone.
"""

import contextlib
import logging
import os
import sys

from tqdm import tqdm

from ldalign.system.visible import visible

# Libraries that say much at INFO; what they warn of is said, in one line.
LIBRARIES = (
    "datasets",
    "huggingface_hub",
    "lm_eval",
    "torch",
    "transformers",
    "trackio",
    "urllib3",
    "wandb",
)
# Which kernel each operation takes: `make check-env` says it, in one table.
QUIET = ("ldalign.ops",)
NO_BARS = ("HF_HUB_DISABLE_PROGRESS_BARS", "HF_DATASETS_DISABLE_PROGRESS_BARS")


def line(text: str) -> None:
    """Prints a line on stderr, above a bar where one is shown there. Control characters, which a
    name or text from elsewhere may hold, are printed with their number.

    A run outlives who reads it, a terminal or a pipe: a line that cannot be printed is lost.
    """
    text = visible(text)
    with contextlib.suppress(OSError, ValueError):  # ValueError: stderr is closed
        if shows_bars():
            tqdm.write(text, file=sys.stderr)
            sys.stderr.flush()
        else:
            print(text, file=sys.stderr, flush=True)


def shows_bars() -> bool:
    """Whether stderr is a terminal, where a bar can be drawn; a file or a pipe gets plain lines,
    and so does a terminal without a width (a container's, say), where tqdm draws nothing.
    """
    try:
        if not sys.stderr.isatty():
            return False
        with contextlib.suppress(OSError, AttributeError):  # it does not say its width
            return os.get_terminal_size(sys.stderr.fileno()).columns > 0
        return True
    except (AttributeError, ValueError):  # there is none, or it is closed
        return False


def configure() -> None:
    """Sets how the whole program logs. To call it again changes nothing."""
    root = logging.getLogger()
    root.handlers[:] = [h for h in root.handlers if not isinstance(h, _Lines)] + [_Lines()]
    root.setLevel(logging.WARNING)
    logging.getLogger("ldalign").setLevel(logging.INFO)
    for name in (*LIBRARIES, *QUIET):
        logging.getLogger(name).setLevel(logging.WARNING)
    logging.captureWarnings(True)
    if not shows_bars():
        for name in NO_BARS:  # read when these libraries are imported
            os.environ.setdefault(name, "1")


class _Lines(logging.Handler):
    """Prints every record as one line: what happened on rank 0, and warnings of the others."""

    def emit(self, record: logging.LogRecord) -> None:
        rank = os.environ.get("RANK", "0")
        if rank != "0" and record.levelno < logging.WARNING:
            return
        try:
            text = " ".join(record.getMessage().split())
        except Exception:  # a library's mistake in its own message
            text = str(record.msg)
        begin = "" if record.name.startswith("ldalign") else f"{record.name}: "
        if record.levelno >= logging.WARNING:
            begin = f"WARNING: {begin}"
        line(f"{begin}{text}" if rank == "0" else f"rank {rank}: {begin}{text}")
