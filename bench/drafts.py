"""What drafts save of sampling: the data's responses, tried on the policy's.

    python bench/drafts.py [--rows 32] [--batches 1,32] [--epochs 0,1,4,16] [--draft-tokens 2,4,8]

Part of `make bench`; the key is `sampling.draft_tokens`. How much is saved depends on how well the
policy fits its data. So rows of the embedded data set are answered by the model as it is, and by it
after epochs of SFT on those very rows: as in a run, which samples on what it is trained on. Each
policy answers them at temperature 1, so many rows at a time, without drafts and with drafts of
several lengths, in turns. The responses must be the same, token for token.
"""

import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import common
import torch

from ldalign.data.embedded import make_rows
from ldalign.data.rows import Row
from ldalign.data.tokenizer import load_tokenizer
from ldalign.generation.decoders import Decoder, new_decoder
from ldalign.generation.engine import Engine, Request
from ldalign.generation.sampling import Response, Sampling
from ldalign.models.fetch import resolve_model
from ldalign.models.mistral import Mistral
from ldalign.models.weights import load_model
from ldalign.system.errors import EnvironmentProblem
from ldalign.system.exits import run

NEW_TOKENS = 128  # of a response, at most
SEED = 0


def main(argv: list[str]) -> None:
    parser = common.options("drafts", __doc__)
    parser.add_argument("--rows", type=int, default=32, help="that are answered, and trained on")
    parser.add_argument("--batches", default="1,32", help="rows at a time")
    parser.add_argument("--epochs", default="0,1,4,16", help="of SFT before: one policy each")
    parser.add_argument("--draft-tokens", default="2,4,8", help="that a step tries, at most")
    args = parser.parse_args(argv)
    count = 2 if args.small else args.rows
    start = resolve_model("toy" if args.small else args.policy, args.cache)
    epochs, batches, drafts = (
        [int(x) for x in given.split(",")][: 2 if args.small else None]
        for given in (args.epochs, args.batches, args.draft_tokens)
    )
    entries = []
    with tempfile.TemporaryDirectory() as scratch:
        records = make_rows(SEED, "train", count)
        for n in epochs:
            common.say(f"drafts: {n} epochs of SFT ...")
            policy = start if n == 0 else fine_tuned(start, records, n, Path(scratch), args.cache)
            repeat = 1 if args.small else args.repeat or 3
            measured = measure(policy, records, batches, drafts, repeat, args.small)
            entries += [{"epochs": n, **entry} for entry in measured]
    result = common.result("drafts", args, rows=count, new_tokens=NEW_TOKENS, entries=entries)
    common.save(result, render(result), args.results, "drafts-cpu")


class Counted:
    """A decoder that counts its steps."""

    def __init__(self, decoder: Decoder) -> None:
        self.decoder, self.steps = decoder, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.decoder, name)

    def step(self, *given: torch.Tensor) -> torch.Tensor:
        self.steps += 1
        return self.decoder.step(*given)


def fine_tuned(
    start: Path, records: Sequence[dict[str, Any]], epochs: int, scratch: Path, cache: Path
) -> Path:
    """Trains on the records with train/sft.py, as a user would; returns the policy's folder."""
    folder, data = scratch / f"sft-{epochs}", scratch / "rows.jsonl"
    data.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    settings = [
        f"policy={start}",
        f"data={data}",
        f"run={folder}",
        f"cache={cache}",
        f"sft.epochs={epochs}",
        "sft.learning_rate=2e-5",
        f"sft.global_batch={min(8, len(records))}",
        "evaluation.rows=0",
        "report=table",
    ]
    script = Path(__file__).resolve().parent.parent / "train/sft.py"
    done = subprocess.run(
        [sys.executable, str(script), *settings], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise EnvironmentProblem(f"bench: drafts: SFT failed: {done.stderr.strip()[-300:]}")
    return folder / "sft/policy"


def measure(
    policy: Path,
    records: Sequence[dict[str, Any]],
    batches: Sequence[int],
    drafts: Sequence[int],
    repeat: int,
    small: bool,
) -> list[dict[str, Any]]:
    """Times this policy's responses, an entry for each batch and length of the drafts (0: none)."""
    tokenizer = load_tokenizer(policy)
    pairs = [
        tokenizer.pair_ids(
            Row(
                record["id"],
                tuple(record["messages"][:-1]),
                record["messages"][-1]["content"],
            )
        )
        for record in records
    ]
    model = cast(Mistral, load_model(policy, torch.bfloat16, torch.device("cpu"))).eval()
    counted = Counted(new_decoder(model, release=True))
    decoder = cast(Decoder, counted)
    sampling = Sampling(8 if small else NEW_TOKENS)
    longest = max(len(pair.prompt) for pair in pairs) + sampling.max_new_tokens
    entries = []
    for rows in batches:
        times: dict[int, list[float]] = {most: [] for most in (0, *drafts)}
        steps: dict[int, int] = {}
        plain: dict[int, Response] = {}
        for turn in range(repeat + 1):  # the first to warm up
            for most, seconds in times.items():
                requests = [
                    Request(f"{turn}/{i}", pair.prompt, i, draft=pair.response)
                    for i, pair in enumerate(pairs)
                ]
                engine = Engine(
                    decoder,
                    sampling,
                    tokenizer.end_ids,
                    SEED,
                    longest=longest,
                    rows=rows,
                    draft_tokens=most,
                )
                before, began = counted.steps, time.perf_counter()
                made = {request.index: response for request, response in engine.run(requests)}
                seconds.append(time.perf_counter() - began)
                if most == 0:
                    plain = made
                elif made != plain:
                    raise EnvironmentProblem("bench: drafts: another response with a draft")
                steps[most] = counted.steps - before
        tokens = sum(len(response.ids) for response in plain.values())
        for most, seconds in times.items():
            entries.append(
                {
                    "rows": rows,
                    "draft_tokens": most,
                    "tokens": tokens,
                    "seconds": seconds[1:],
                    "steps": steps[most],
                    "speed": statistics.median(
                        a / b for a, b in zip(times[0][1:], seconds[1:], strict=True)
                    ),
                }
            )
    return entries


def render(result: dict[str, Any]) -> list[str]:
    """The Markdown page."""
    lines = [
        "## drafts, cpu",
        "",
        f"{result['policy']} in bfloat16 after epochs of SFT on {result['rows']} rows of the "
        "embedded data set, answering those rows at temperature 1 with at most "
        f"{result['new_tokens']} tokens; medians, in turns, after one to warm up. 0 draft tokens: "
        "without. Steps of the last turn, prompts' steps among them. The responses were the same "
        "with every draft.",
        "",
        *common.table(
            "epochs of SFT", "rows at a time", "draft tokens", "steps", "tokens a second", "speed"
        ),
    ]
    for entry in result["entries"]:
        speed = entry["tokens"] / statistics.median(entry["seconds"])
        lines.append(
            common.row(
                entry["epochs"],
                entry["rows"],
                entry["draft_tokens"],
                entry["steps"],
                f"{speed:.0f}",
                f"{entry['speed']:.2f}",
            )
        )
    return lines


if __name__ == "__main__":
    run(main)
