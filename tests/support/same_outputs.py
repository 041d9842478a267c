"""Whether another checkout makes the same runs, byte for byte: same_outputs.py OLD [NEW].

Runs `configs/toy.yaml` by each of the six methods in both checkouts (folders with a `.venv`, as
`make setup` leaves it; NEW is this one where it is not given) and compares every file of the run
folders: policies, guides, responses, distances, reference log-probs, answers, metrics, manifests,
tables. What a clock or the machine's memory says is taken out first: seconds, rates, peaks;
environment.json, the page and its figures are left out whole. Prints a line a method, and every
file that differs; exits with 1 if there is one. Some two minutes on two cores. It is how a change
of structure is shown to change nothing else:

    git worktree add ../before main~1 && make -C ../before setup
    .venv/bin/python tests/support/same_outputs.py ../before
"""

import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

METHODS = {
    "ld_align": [],
    "spin": ["mix_previous=true"],
    "dpo": ["iterations=1"],
    "sft": ["iterations=1"],
    "self_reward": [],
    "rlaif": ["judge=toy"],
}
# Keys of records that a clock or the machine's memory fills in.
MEASURED = re.compile(r".*seconds|.*tokens_per_second|.*time/.*|.*memory/.*")
# Files that say where and when a run was made, or repeat with times what other files say.
LEFT_OUT = {"environment.json", "started.json", "lock", "report.html", "report.json", "README.md"}
# Files whose text holds times: a manifest's hash of them says nothing.
TIMED = ("summary.json", "metrics.jsonl", "table.json", "table.md")


def run(checkout: Path, folder: Path, method: str) -> str:
    """Makes the run `folder`/METHOD by the code of `checkout`; returns the last line it says."""
    command = [
        str(checkout / ".venv/bin/python"),
        str(checkout / "train/align.py"),
        "--config",
        str(checkout / "configs/toy.yaml"),
        f"method={method}",
        f"run={method}",
        *METHODS[method],
    ]
    environment = os.environ | {"HOME": str(folder)}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    lines = (done.stdout + done.stderr).strip().splitlines()
    if done.returncode:
        sys.exit(f"{checkout}: {method} ended with {done.returncode}: {lines[-1] if lines else ''}")
    return lines[-1]


def without_measured(value: Any) -> Any:
    """A JSON value without what a clock or the machine's memory filled in."""
    if isinstance(value, dict):
        return {k: without_measured(v) for k, v in value.items() if not MEASURED.fullmatch(k)}
    return [without_measured(v) for v in value] if isinstance(value, list) else value


def content(path: Path) -> str:
    """Returns what is compared of a file: a hash of its bytes, or of its values without times."""
    if path.name == "table.md":
        text = without_times(path.read_text())
    elif path.name == "manifest.json":
        manifest = json.loads(path.read_text())
        manifest["files"] = {k: v for k, v in manifest["files"].items() if not k.endswith(TIMED)}
        text = json.dumps(manifest)
    elif path.suffix in (".json", ".jsonl"):
        lines = [path.read_text()] if path.suffix == ".json" else path.read_text().splitlines()
        text = "\n".join(json.dumps(without_measured(json.loads(line))) for line in lines)
    else:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    return hashlib.sha256(text.encode()).hexdigest()


def without_times(page: str) -> str:
    """Takes the wall times out of table.md: the rows of their table, and its sums."""
    rows = re.compile(r"^(\| wall time, s .*\n\|---.*\n)(?:\|.*\n)*", re.MULTILINE)
    return re.sub(r"^Once a run:.*$", "", rows.sub(r"\1", page), flags=re.MULTILINE)


def contents(run: Path) -> dict[str, str]:
    """{path in the run folder: what is compared of it} of every file, figures left out."""
    files = (path for path in sorted(run.rglob("*")) if path.is_file())
    kept = (path for path in files if path.name not in LEFT_OUT and path.parent.name != "figures")
    return {str(path.relative_to(run)): content(path) for path in kept}


def main(old: Path, new: Path) -> int:
    """Compares all methods; the number of files that differ."""
    differing = 0
    with tempfile.TemporaryDirectory() as folder:
        sides = [Path(folder) / name for name in ("old", "new")]
        for method in METHODS:
            found = []
            for checkout, side in zip((old, new), sides, strict=True):
                side.mkdir(exist_ok=True)
                run(checkout, side, method)
                found.append(contents(side / method))
            names = sorted(found[0].keys() | found[1].keys())
            odd = [name for name in names if found[0].get(name) != found[1].get(name)]
            weights = sum(name.endswith(".safetensors") for name in names)
            print(
                f"{method}: {len(names)} files, {weights} of them weights: {len(odd)} differ",
                flush=True,
            )
            print(*(f"    {name}" for name in odd), sep="\n", end="\n" if odd else "")
            differing += len(odd)
    return differing


if __name__ == "__main__":
    if len(sys.argv) not in (2, 3):
        sys.exit((__doc__ or "").strip())
    HERE = Path(__file__).resolve().parents[2]
    sys.exit(
        bool(
            main(
                Path(sys.argv[1]).resolve(),
                Path(sys.argv[2]).resolve() if len(sys.argv) == 3 else HERE,
            )
        )
    )
