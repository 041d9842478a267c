"""The report alone: `ldalign report run=RUN` (or `python train/report.py run=RUN`) writes
RUN/report/ again, from whatever stages are finished.

table.md and table.json, and with matplotlib (`pip install matplotlib`) report.html
and its figures. No model is loaded and nothing but RUN/report/ is written, so it may be
called while the run goes on. Of a comparison's folder (train/compare.py), comparison.md and its
figure, from the numbers in comparison.json.
"""

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ldalign.report.comparison_page import write_comparison
from ldalign.report.page import check_run, write_page
from ldalign.report.table import write_report
from ldalign.run.stranger import read_object
from ldalign.system import exits
from ldalign.system.config import REQUIRED, describe, load_config, setting, split_argv
from ldalign.system.errors import InputError
from ldalign.system.files import is_misread
from ldalign.system.metrics import say


@dataclass(frozen=True, kw_only=True)
class ReportConfig:
    """What the report is made of."""

    run: str = setting(REQUIRED, "run folder", path=True)


def main(argv: list[str]) -> None:
    """Reads the run folder's name, writes the report."""
    path, overrides, flags = split_argv(argv, ("--help",))
    if "--help" in flags:
        print((__doc__ or "").strip(), describe(ReportConfig), sep="\n\n")
        return
    run = Path(load_config(ReportConfig, path, overrides).run)
    with _made_of(run):
        check_run(run)
    comparison = run / "report/comparison.json"
    if os.path.lexists(comparison):
        summary = read_object(comparison, "run ldalign compare again, which writes it")
        with _made_of(comparison):
            text = write_comparison(run, summary)
        say(f"{text}\nThe report: {comparison.with_suffix('.md')}")
        return
    with _made_of(run):
        say(f"{write_report(run)}\nThe report: {write_page(run)}")


@contextlib.contextmanager
def _made_of(path: Path) -> Iterator[None]:
    """Turns what reading a stranger's numbers and rows ends with into an InputError that names
    `path`: the hashes of a stage say that it is as it was made, not that ldalign made it.
    """
    try:
        yield
    except Exception as e:
        if not is_misread(e):
            raise
        raise InputError(
            f"{path}: holds what no report can be made of ({type(e).__name__}: {e!s:.300}); with "
            "--debug, the traceback says what is read: delete that stage, or report it if ldalign "
            "made it"
        ) from e


if __name__ == "__main__":
    exits.run(main)
