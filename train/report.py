"""The report alone: `ldalign report run=RUN` (or `python train/report.py run=RUN`) writes
RUN/report/ again, from whatever stages are finished.

table.md and table.json, and with matplotlib (`pip install matplotlib`) report.html
and its figures. No model is loaded and nothing but RUN/report/ is written, so it may be
called while the run goes on. Of a comparison's folder (train/compare.py), comparison.md and its
figure, from the numbers in comparison.json.
"""

import json
from dataclasses import dataclass
from pathlib import Path

from ldalign.report.comparison_page import write_comparison
from ldalign.report.page import check_run, write_page
from ldalign.report.table import write_report
from ldalign.system import exits
from ldalign.system.config import REQUIRED, describe, load_config, setting, split_argv
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
    check_run(run)
    comparison = run / "report/comparison.json"
    if comparison.is_file():
        summary = json.loads(comparison.read_text(encoding="utf-8"))
        say(f"{write_comparison(run, summary)}\nThe report: {comparison.with_suffix('.md')}")
        return
    say(f"{write_report(run)}\nThe report: {write_page(run)}")


if __name__ == "__main__":
    exits.run(main)
