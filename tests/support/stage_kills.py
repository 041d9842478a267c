"""A stage that is killed in the middle and made again, beside one that nobody disturbs."""

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest

from ldalign.system.partial_rows import Part

Make = Callable[[Path], Any]  # makes the stages in a run folder


class Killed(Exception):
    """What ends a stage here."""


class Appends:
    """Counts writes of rows to files of parts, and kills the writer after so many of them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.rows = self.writes = 0
        self.left: int | None = None
        plain = Part.append

        def append(part: Part, rows: Iterable[tuple[int, Any]]) -> None:
            rows = list(rows)
            if self.left == 0:
                part.file.write(json.dumps([rows[0][0], [0.0, 0.0]])[:-1])  # torn
                part.file.flush()
                raise Killed
            self.left = None if self.left is None else self.left - 1
            plain(part, rows)
            self.rows, self.writes = self.rows + len(rows), self.writes + 1

        monkeypatch.setattr(Part, "append", append)

    def during(self, make: Make, run: Path, left: int | None = None) -> tuple[int, int]:
        """Rows and writes of `make(run)`, which is killed after `left` writes."""
        self.rows, self.writes, self.left = 0, 0, left
        if left is None:
            make(run)
        else:
            with pytest.raises(Killed):
                make(run)
        return self.rows, self.writes


def contents(stage: Path) -> dict[str, Any]:
    """Every file of a stage, but for its wall time."""
    found: dict[str, Any] = {
        str(p.relative_to(stage)): p.read_bytes() for p in stage.rglob("*") if p.is_file()
    }
    summary = json.loads(found["summary.json"])
    del summary["seconds"]
    found["summary.json"] = summary
    found["manifest.json"] = json.loads(found["manifest.json"])["parents"]
    return found


def check_resume(
    make: Make, stage: str, run: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Checks a stage that is killed after its first, a middle and its last write but one.

    It is killed by a rank that is gone afterwards.

    run: a folder of this name with all that the stage reads. Nothing that was written is computed
    again, and the stage ends with the bytes of an undisturbed one.
    """
    appends = Appends(monkeypatch)
    rows, writes = appends.during(make, run("whole"))
    expected = contents(run("whole") / stage)
    assert writes >= 3, "a stage of one chunk tests nothing"
    for left in sorted({1, writes // 2, writes - 1}):
        folder = run(f"killed_{left}")
        done, _ = appends.during(make, folder, left)
        for part in list(folder.rglob("*.rank0")):
            part.rename(part.with_suffix(".rank3"))
        again, _ = appends.during(make, folder)
        assert again == rows - done < rows
        assert contents(folder / stage) == expected
