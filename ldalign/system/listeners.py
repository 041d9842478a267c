"""Who is told what a run does while it does it, beside the files it leaves: sinks, the live page.

A listener can never stop a run: what it raises is said once, in one line, and it is told nothing
more.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

from ldalign.system import logs


class Listener(Protocol):
    """What is told, on rank 0 alone."""

    name: str  # in the line that says what went wrong

    def begins(self, stage: str) -> None:
        """A stage is being made now."""

    def record(self, stage: str, record: Mapping[str, Any], line: str) -> None:
        """A line of a stage's metrics.jsonl, and the line that a person reads of it."""

    def ends(self, stage: str, summary: Mapping[str, float], made: bool) -> None:
        """A stage is there: made now, or before (made: False). summary: its summary.json."""


_listening: list[Listener] = []


@contextlib.contextmanager
def listening(listeners: Sequence[Listener]) -> Iterator[None]:
    """Tells these listeners everything until the block ends."""
    before = list(_listening)
    _listening.extend(listeners)
    try:
        yield
    finally:
        _listening[:] = before


def tell(event: Callable[[Listener], None]) -> None:
    """Hands an event, such as `lambda listener: listener.begins(stage)`, to every listener."""
    for listener in list(_listening):
        try:
            event(listener)
        except Exception as error:  # whatever it is, the run goes on
            _listening.remove(listener)
            switched_off(listener.name, error)


def switched_off(name: str, error: BaseException) -> None:
    """Says, in one line, that a listener failed and is told nothing more."""
    reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
    logs.line(f"WARNING: {name}: {reason}; it is switched off, and nothing else changes")
