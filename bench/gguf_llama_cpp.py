"""What llama.cpp makes of an exported policy: its tokens and log-probabilities beside ours.

    npm install --prefix FOLDER --ignore-scripts node-llama-cpp@3.22.1
    python bench/gguf_llama_cpp.py --node FOLDER [--policy FOLDER]

Exports the policy in each dtype, lets llama.cpp (node-llama-cpp's prebuilt library, on the CPU)
tokenize texts and say the probabilities of the next token at every position, and compares both with
ldalign's own tokenizer and float32 forward. Not part of `make bench`: it measures no speed.
"""

import json
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import common
import torch

from ldalign.data.tokenizer import load_tokenizer
from ldalign.models.fetch import resolve_model
from ldalign.models.gguf_export import GgufDtype, export_gguf
from ldalign.models.weights import load_model
from ldalign.system.errors import EnvironmentProblem
from ldalign.system.exits import run

SAID = (  # a chat, a chat with its answer, and what tokenizers differ in
    [{"role": "user", "content": "What is 6 x 7?"}],
    [
        {"role": "user", "content": "Store Elsa's age, 64, and her city, Vienna, as JSON."},
        {"role": "assistant", "content": '{"age": 64, "city": "Vienna"}'},
    ],
    [{"role": "user", "content": "naïve café — 日本語 🙂\n\n\n  def f(x):\n\treturn 12345 # it's"}],
)
LIKELY = 1e-3  # tokens of a smaller probability are not compared


def main(argv: list[str]) -> None:
    parser = common.options("gguf_llama_cpp", __doc__)
    parser.add_argument("--node", type=Path, required=True, help="where node-llama-cpp is")
    args = parser.parse_args(argv)
    package = args.node / "node_modules" / "node-llama-cpp"
    if not package.is_dir():
        raise EnvironmentProblem(
            f"{package}: not there; npm install --prefix {args.node} --ignore-scripts "
            "node-llama-cpp"
        )
    version = json.loads((package / "package.json").read_text(encoding="utf-8"))["version"]
    release = json.loads((package / "llama" / "binariesGithubRelease.json").read_text())["release"]
    policy = resolve_model(args.policy, args.cache)
    found = measure(policy, args.node)
    result = common.result(
        "gguf-llama-cpp", args, llama_cpp=release, node_llama_cpp=version, dtypes=found
    )
    common.save(result, render(result), args.results)


def measure(policy: Path, node: Path) -> dict[str, dict[str, Any]]:
    """By dtype of the file: what is the same, and the largest difference in log-probability."""
    tokenizer = load_tokenizer(policy)
    texts = [tokenizer.render(turns, turns[-1]["role"] == "user") for turns in SAID]
    ids = [tokenizer.encode_rendered(text) for text in texts]
    model = load_model(policy, torch.float32)
    with torch.no_grad():
        ours = [model(torch.tensor([one]))[0].log_softmax(-1) for one in ids]
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch).resolve()
        files = {dtype: folder / f"{dtype}.gguf" for dtype in get_args(GgufDtype)}
        for dtype, path in files.items():
            export_gguf(policy, path, dtype)
        (folder / "texts.json").write_text(json.dumps(texts), encoding="utf-8")
        script = Path(__file__).resolve().parent / "peers" / "llama_cpp.mjs"
        asked = [script, folder / "texts.json", folder / "out.json", *files.values()]
        common.say("gguf: llama.cpp reads the files ...")
        done = subprocess.run(["node", *map(str, asked)], cwd=node, capture_output=True, text=True)
        if done.returncode:
            raise EnvironmentProblem(f"node: {done.stderr.strip().splitlines()[-1:]}")
        theirs = json.loads((folder / "out.json").read_text(encoding="utf-8"))
        return {
            dtype: compare(ids, ours, theirs[str(path)]) | {"bytes": path.stat().st_size}
            for dtype, path in files.items()
        }


def compare(
    ids: Sequence[Sequence[int]], ours: Sequence[torch.Tensor], theirs: Sequence[dict[str, Any]]
) -> dict[str, Any]:
    """The figures of one file. ours: log-probabilities (T, V) a text."""
    same = [list(own) == found["tokens"] for own, found in zip(ids, theirs, strict=True)]
    gaps: list[float] = []
    likeliest = positions = 0
    for own, found, equal in zip(ours, theirs, same, strict=True):
        for row, top in zip(own, found["tops"] if equal else [], strict=equal):
            likely = [(token, p) for token, p in top if p > LIKELY]
            at = torch.tensor([token for token, _ in likely])
            logps = torch.tensor([p for _, p in likely], dtype=torch.float64).log()
            gaps += (row[at].double() - logps).abs().tolist()
            likeliest += int(row.argmax()) == top[0][0]
            positions += 1
    errors = torch.tensor(gaps, dtype=torch.float64)
    return {
        "texts": len(same),
        "texts_same_tokens": sum(same),
        "positions": positions,
        "same_likeliest": likeliest,
        "compared": len(gaps),
        "mean_gap": float(errors.mean()) if gaps else None,
        "largest_gap": float(errors.max()) if gaps else None,
    }


def render(result: dict[str, Any]) -> list[str]:
    """The page."""
    lines = [
        "# An exported policy in llama.cpp",
        "",
        f"{result['policy']}, exported by `ldalign export gguf` and read by llama.cpp "
        f"{result['llama_cpp']} (node-llama-cpp {result['node_llama_cpp']}, CPU), against "
        "ldalign's tokenizer and its float32 forward. The gap is of the log-probabilities, in "
        f"nats, over all next tokens that llama.cpp gives more than {LIKELY:g}. It keeps keys and "
        "values in float16, whatever the file.",
        "",
        *common.table(
            "file", "MB", "same tokens", "same likeliest token", "mean gap", "largest gap"
        ),
    ]
    for dtype, one in result["dtypes"].items():
        gaps = (f"{one[name]:.4f}" for name in ("mean_gap", "largest_gap"))
        tokens = f"{one['texts_same_tokens']} of {one['texts']} texts"
        likeliest = f"{one['same_likeliest']} of {one['positions']}"
        lines.append(common.row(dtype, f"{one['bytes'] / 1e6:.0f}", tokens, likeliest, *gaps))
    return lines


if __name__ == "__main__":
    run(main)
