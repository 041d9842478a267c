"""What the benchmark scripts share: options, measured processes, result files."""

import argparse
import contextlib
import datetime
import json
import os
import resource
import statistics
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from environments import PeerMissing, peer_python
from work import Config, Shape

from ldalign.models.fetch import DEFAULT_MODEL, resolve_model
from ldalign.models.toy import CONFIG as TOY_CONFIG
from ldalign.run.context import choose_dtype
from ldalign.run.environment import describe_machine
from ldalign.run.settings import RunConfig
from ldalign.system.distributed import use_onednn_for_float32
from ldalign.system.errors import EnvironmentProblem

HERE = Path(__file__).resolve().parent
sys.path.append(str(HERE / "peers"))  # worker.py, for scripts that import ours.py
# how long a measurement of the machine's rates lasts, and what it copies
RATE_SECONDS, COPY_BYTES = 1.5, 2**28
# glibc gives large blocks back to the system and faults them in again, up to 40 % of a peer's time.
# ldalign tells it not to (ldalign/system/memory.py); a peer's user would have to know these
# variables, which say the same.
KEEP_MEMORY = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(2**31 - 1),
    "MALLOC_TOP_PAD_": str(64 * 2**20),
}
QUIET = {
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "TQDM_DISABLE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "TORCH_CPP_LOG_LEVEL": "ERROR",
    "ACCELERATE_LOG_LEVEL": "error",
}


class Failed(Exception):
    """A measured process ended without a result; the text is its last line."""


def options(name: str, doc: str | None) -> argparse.ArgumentParser:
    """Makes a parser with the options that every benchmark has."""
    parser = argparse.ArgumentParser(
        prog=f"bench/{name}.py", description=(doc or "").partition("\n")[0]
    )
    parser.add_argument("--policy", default=DEFAULT_MODEL, help="model folder or name")
    parser.add_argument(
        "--cache", type=Path, default=Path.home() / ".cache" / "ldalign", help="of fetched models"
    )
    parser.add_argument(
        "--repeat", type=int, default=None, help="measured repetitions, after one to warm up"
    )
    parser.add_argument(
        "--small", action="store_true", help="a toy model and a fraction of the work: does it run?"
    )
    parser.add_argument("--no-peers", action="store_true", help="ldalign's side alone")
    parser.add_argument(
        "--results", type=Path, default=HERE / "results", help="folder of the result files"
    )
    return parser


def device_and_dtype() -> tuple[torch.device, str]:
    """Returns the device that runs go to here, and the dtype they compute in."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return device, str(choose_dtype(RunConfig(), device)).removeprefix("torch.")


def model_of(args: argparse.Namespace) -> tuple[Path | None, Config]:
    """Returns the policy's folder and its config.json.

    With --small it is the toy's config and no folder: random weights.
    """
    if args.small:
        return None, dict(TOY_CONFIG)
    folder = resolve_model(args.policy, args.cache)
    return folder, json.loads((folder / "config.json").read_text(encoding="utf-8"))


# ------------------------------------------------------------------------------- measured processes


def measure(
    script: str,
    job: Mapping[str, Any],
    peer: str | None = None,
    environment: Mapping[str, str] | None = None,
    checkout: Path | None = None,
) -> dict[str, Any]:
    """The result of one job, done by bench/SCRIPT in a process of its own.

    peer: whose environment it runs in; None: ldalign's. checkout: of ldalign, whose scripts and
    .venv are used in place of these. Raises PeerMissing and Failed.
    """
    python = Path(sys.executable) if peer is None else peer_python(peer)
    folder = HERE
    if checkout is not None:
        python, folder = checkout.resolve() / ".venv/bin/python", checkout.resolve() / "bench"
    busy = Busy()
    done = subprocess.run(
        [str(python), str(folder / script)],
        input=json.dumps(job),
        capture_output=True,
        text=True,
        env={**os.environ, **QUIET, "PYTHONPATH": str(folder / "peers"), **(environment or {})},
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith('{"')]
    if done.returncode or not lines:
        last = (done.stderr.strip().splitlines() or ["no output"])[-1]
        killed = done.returncode == -9
        raise Failed(
            "killed, probably for memory"
            if killed
            else f"exit code {done.returncode}: {last[:300]}"
        )
    return json.loads(lines[-1]) | {"others": busy.others()}  # type: ignore[no-any-return]


class Busy:
    """Counts from now on what share of the machine's cores other processes use, a spinning one and
    the host's other guests among them.
    """

    def __init__(self) -> None:
        self.began = self._now()

    @staticmethod
    def _now() -> tuple[float, float, float]:
        """(seconds of all cores, of them in use, of them by processes of ours that have ended)."""
        try:
            words = Path("/proc/stat").read_text(encoding="utf-8").split("\n", 1)[0].split()[1:9]
        except OSError:
            return 0.0, 0.0, 0.0
        times = [int(word) / os.sysconf("SC_CLK_TCK") for word in words]
        own = resource.getrusage(resource.RUSAGE_CHILDREN)
        return sum(times), sum(times) - times[3] - times[4], own.ru_utime + own.ru_stime

    def others(self) -> float:
        whole, used, own = (b - a for a, b in zip(self.began, self._now(), strict=True))
        return max(0.0, used - own) / whole if whole else 0.0


@contextlib.contextmanager
def spinning(processes: int) -> Iterator[None]:
    """Keeps as many cores busy as there are processes, as a neighbour would."""
    started = [
        subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(processes)
    ]
    try:
        yield
    finally:
        for process in started:
            process.kill()
            process.wait()


def measure_or_say(*args: Any, **kwargs: Any) -> dict[str, Any]:
    """As `measure`, but a peer that cannot be measured gives {"skipped": why}: its row says so."""
    try:
        return measure(*args, **kwargs)
    except (PeerMissing, Failed) as why:
        return {"skipped": str(why)}


def measure_ours(task: str, job: Mapping[str, Any]) -> dict[str, Any]:
    """ldalign's side of a benchmark, which has to run."""
    try:
        return measure("ours.py", {**job, "task": task})
    except Failed as why:
        raise EnvironmentProblem(f"bench: {task}: ldalign failed: {why}") from None


def float32_products(device: str | torch.device, dtype: str) -> dict[str, str]:
    """What both sides' jobs say of float32 products on a CPU: the faster of torch's two libraries,
    which is asked for as "medium" precision, where its products stay float32 (not with AMX).
    """
    on_cpu = dtype == "float32" and torch.device(device).type == "cpu"
    return {"float32_products": "medium"} if on_cpu and use_onednn_for_float32() else {}


def measure_machine(
    shape: Shape, tokens: int, dtype: str, device: torch.device, small: bool = False
) -> dict[str, Any]:
    """Rates of the machine now: see machine.py. The products are those of one block."""
    job = {
        "task": "rates",
        "products": shape.attention_products + shape.mlp_products,
        "tokens": tokens,
        "dtype": dtype,
        "device": str(device),
        "seconds": 0.01 if small else RATE_SECONDS,
        "copy_bytes": 2**20 if small else COPY_BYTES,
        "libraries": ["highest", *float32_products(device, dtype).values()],
    }
    return measure("machine.py", job)


def say(text: str) -> None:
    """Says on stderr how far a benchmark has come."""
    print(f"bench: {text}", file=sys.stderr, flush=True)


def median_ratio(theirs: list[float], ours: list[float]) -> float:
    """Returns the median of theirs / ours, over times of the same pieces of work."""
    return statistics.median(a / b for a, b in zip(theirs, ours, strict=True))


# ------------------------------------------------------------------------------------- result files


def result(name: str, args: argparse.Namespace, **fields: Any) -> dict[str, Any]:
    """Makes a benchmark's record. A model folder is named without its place on this machine."""
    policy = "toy" if args.small else Path(args.policy).name
    return {"benchmark": name, "policy": policy, "small": args.small, **fields, **stamp()}


def stamp() -> dict[str, Any]:
    """Where and when a record was made."""
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    return {"machine": describe_machine(), "date": now}


def save(result: dict[str, Any], lines: list[str], folder: Path, name: str | None = None) -> None:
    """Writes NAME.json and NAME.md and prints the page."""
    machine = result["machine"]
    cpu = f"{machine['cpu']}, {machine['cores']} cores, {machine['torch_threads']} threads"
    where = ", ".join(machine["gpus"]) or cpu
    torch_version = machine["packages"]["torch"]
    foot = [
        "",
        f"{result['date']}, commit {machine['git_commit']}, {where}, torch {torch_version}.",
    ]
    if result["small"]:
        foot += ["", "Made with --small: shows that it runs, measures nothing."]
    page = "\n".join([*lines, *foot]) + "\n"
    folder.mkdir(parents=True, exist_ok=True)
    name = name or result["benchmark"]
    (folder / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    (folder / f"{name}.md").write_text(page, encoding="utf-8")
    print(page)


def table(*columns: str) -> list[str]:
    """Makes the head of a Markdown table."""
    return [f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]


def row(*cells: object) -> str:
    """Makes a line of a Markdown table."""
    return f"| {' | '.join(map(str, cells))} |"
