"""The keys loss.*: what contradicts itself, and a run with each, to its end."""

import math
import shutil
from pathlib import Path
from typing import get_args, get_type_hints

import pytest
from runs import ROOT
from safetensors.torch import load_file

from ldalign.kernels.loss_options import DPO
from ldalign.run.settings import RunConfig, reader, unread
from ldalign.system.config import load_config
from ldalign.system.errors import InputError
from ldalign.system.files import read_jsonl
from ldalign.train.align import main

POLICY = "iteration_0/policy"
KEYS = ["loss.nll=0.5", "loss.label_smoothing=0.1", "loss.length_normalised=true"]


def align(run: Path, cache: Path, *arguments: str) -> None:
    given = ["--config", str(ROOT / "configs/toy.yaml"), f"run={run}", f"cache={cache}"]
    main([*given, "report=table", "iterations=1", "continual_sft.epochs=0", *arguments])


def test_off_by_default() -> None:
    assert RunConfig().loss.options == DPO


@pytest.mark.parametrize("method", get_args(get_type_hints(RunConfig)["method"]))
def test_every_method_with_pairs_reads_them(method: str) -> None:
    names = [key.partition("=")[0] for key in KEYS]
    assert unread(method, names) == (names if method == "sft" else [])
    if method == "sft":
        assert unread(reader(method, "pairs"), names) == names  # it has prompts of pairs, no losers
    more = {"dpo": ["iterations=1"], "sft": ["iterations=1"]}.get(method, [])
    options = load_config(RunConfig, None, [f"method={method}", *more, *KEYS]).loss.options
    assert options == ("sigmoid", 0.5, 0.1, True)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (
            ["loss.kind=ipo", "loss.label_smoothing=0.1"],
            "loss.label_smoothing=0.1: loss.kind=ipo has none; leave one of them out",
        ),
        (["loss.label_smoothing=0.5"], "loss.label_smoothing: 0.5 must be 0 or greater, below 0.5"),
        (["loss.label_smoothing=-1"], "loss.label_smoothing: -1.0 must be 0 or greater, below 0.5"),
        (["loss.nll=-1"], "loss.nll: -1.0 must be 0 or greater"),
        (["loss.kind=hinge"], "loss.kind: 'hinge' is not one of sigmoid, ipo"),
    ],
)
def test_what_is_no_loss_is_refused(keys: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message) as raised:
        load_config(RunConfig, None, keys)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("keys", "start"),
    [
        (["loss.kind=ipo"], 25.0),  # 1/(4 beta^2), beta 0.1
        (["loss.nll=1"], math.log(2)),
        (["loss.label_smoothing=0.1"], math.log(2)),
        (["loss.length_normalised=true", "beta=2"], math.log(2)),
        (["loss.kind=ipo", "loss.nll=0.5", "loss.length_normalised=true", "beta=0.5"], 1.0),
    ],
    ids=str,
)
def test_a_run_with_it(
    keys: list[str], start: float, tmp_path: Path, toy_run: Path, toy_cache: Path, in_process: None
) -> None:
    """LD-Align on the toy run's own pairs: it starts where it must and ends as another policy,
    which is not taken for one of another loss.
    """
    run = Path(shutil.copytree(toy_run, tmp_path / "run"))
    plain = load_file(run / POLICY / "model.safetensors")
    for name in ("iteration_0/policy", "iteration_0/evaluation", "iteration_1", "continual_sft"):
        shutil.rmtree(run / name)
    align(run, toy_cache, *keys)
    written = read_jsonl(run / POLICY / "metrics.jsonl")
    first, *_, last = (r for r in written if "loss/unweighted" in r)  # others are of validation
    assert first["loss/unweighted"] == pytest.approx(start, rel=1e-4)
    nll = dict(key.split("=") for key in keys).get("loss.nll", "0")
    added = float(nll) * first.get("nll/chosen", 0.0)
    assert first["loss"] == pytest.approx(first["weight/mean"] * start + added, rel=1e-3)
    assert (
        abs(first["rewards/margins"]) < 1e-2 and last["rewards/margins"] > first["rewards/margins"]
    )
    made = load_file(run / POLICY / "model.safetensors")
    assert any((made[name] != plain[name]).any() for name in plain)
    align(run, toy_cache, *keys)  # already done
    others = [key for key in keys if not key.startswith("loss.")]
    with pytest.raises(InputError, match=rf"{POLICY}.*loss\.\w+ was .*, now 'absent'"):
        align(run, toy_cache, *others)
