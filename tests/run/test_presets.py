"""Every preset in configs/: it is read, passes --dry-run, and says of each line whose it is."""

import json
import shutil
import struct
from pathlib import Path

import pytest
import torch
from made_bert import write_bert
from runs import ROOT

from ldalign.models.mistral import Mistral, MistralConfig
from ldalign.run.compare_settings import CompareConfig
from ldalign.run.settings import RunConfig
from ldalign.system import distributed
from ldalign.system.config import load_config
from ldalign.train import align, compare
from ldalign.train.command import read_config

CONFIGS = sorted(path.stem for path in (ROOT / "configs").glob("*.yaml"))
SMALL = [name for name in CONFIGS if name.startswith(("smollm2", "own-data"))]
LARGE = [name for name in CONFIGS if name.startswith("zephyr")]
MISTRAL_7B = {
    "model_type": "mistral",
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "sliding_window": 4096,
    "max_position_embeddings": 32768,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}


@pytest.fixture(scope="module")
def seven_billion(tmp_path_factory: pytest.TempPathFactory, zephyr_folder: Path) -> Path:
    """A model folder in Mistral-7B's shapes whose 14 GB take no room: the file is
    a hole behind its header.
    """
    folder = Path(shutil.copytree(zephyr_folder, tmp_path_factory.mktemp("large") / "zephyr"))
    (folder / "config.json").write_text(json.dumps(MISTRAL_7B))
    with torch.device("meta"):
        model = Mistral(MistralConfig.from_json(MISTRAL_7B, "config.json"))
    header, end = {}, 0
    for name, p in model.named_parameters():
        for part, rows in (model.stored_parts(name) or {name: len(p)}).items():
            shape = [rows, *p.shape[1:]]
            size = 2 * torch.Size(shape).numel()
            header[part] = {"dtype": "BF16", "shape": shape, "data_offsets": [end, end + size]}
            end += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with (folder / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)
    return folder


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    """A file that serves as every data set: preference rows of conversations with two turns."""
    path = tmp_path / "rows.jsonl"
    with path.open("w") as file:
        for i in range(1000):
            ask = [{"role": "user", "content": f"Count to {i}."}]
            file.write(
                json.dumps(
                    {
                        "prompt": f"Count to {i}.",
                        "chosen": [*ask, {"role": "assistant", "content": f"1, 2, ..., {i}"}],
                        "rejected": [*ask, {"role": "assistant", "content": "No."}],
                    }
                )
                + "\n"
            )
    return path


@pytest.mark.parametrize("name", LARGE)
def test_dry_run_of_a_7b_preset(
    name: str,
    seven_billion: Path,
    rows: Path,
    tmp_path: Path,
    in_process: None,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """All but the paths as in the file; a tiny random guide, as no GPT-2 is at hand, and small
    timing probes.
    """
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage._replace(free=10**12))
    align.main(
        [
            "--config",
            str(ROOT / f"configs/{name}.yaml"),
            f"policy={seven_billion}",
            f"data={rows}",
            *(["guide.folder=null"] if name.startswith("zephyr-7b-ld-align") else []),
            "training.micro_tokens=64",
            "sampling.batch_rows=8",
            *(["training.shard_ranks=1"] if name.endswith("-nodes") else []),  # of one process
            f"run={tmp_path / 'run'}",
            "--dry-run",
        ]
    )
    said = capfd.readouterr().err
    assert (
        "7241.7 million weights, all names and shapes right"
    ) in said and "dry run: nothing was made" in said
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", SMALL)
def test_dry_run_of_a_small_preset(
    name: str,
    smollm2_folder: Path,
    rows: Path,
    tmp_path: Path,
    in_process: None,
    capfd: pytest.CaptureFixture[str],
) -> None:
    own = [f"data={rows}"] if name.startswith("own-data") else []
    align.main(
        [
            "--config",
            str(ROOT / f"configs/{name}.yaml"),
            *own,
            f"run={tmp_path / 'run'}",
            "--dry-run",
            f"cache={smollm2_folder.parent}",
        ]
    )
    said = capfd.readouterr().err
    assert "134.5 million weights" in said and "dry run: nothing was made" in said


@pytest.mark.parametrize(
    ("name", "steps"),
    [("compare-own-data", 114), ("compare-wordings", 668)],
)
def test_dry_run_of_a_comparison(
    name: str,
    steps: int,
    smollm2_folder: Path,
    rows: Path,
    tmp_path: Path,
    in_process: None,
    capfd: pytest.CaptureFixture[str],
) -> None:
    own = [f"data={rows}"] if name == "compare-own-data" else []
    own.append(f"judge.folder={write_bert(tmp_path / 'bert')}")
    compare.main(
        [
            "--config",
            str(ROOT / f"configs/{name}.yaml"),
            *own,
            f"run={tmp_path / 'run'}",
            "--dry-run",
            f"cache={smollm2_folder.parent}",
        ]
    )
    assert f"sft/policy: {steps} optimizer steps" in capfd.readouterr().err


def test_every_config_is_tried() -> None:
    # toy.yaml is run by tests/run/test_toy_run.py
    assert set(CONFIGS) == {*SMALL, *LARGE, "toy"} | {
        f"compare-{name}" for name in ("own-data", "wordings")
    }
    assert len(LARGE) == 5 and len(SMALL) == 8


def test_the_papers_numbers_stand_in_the_presets() -> None:
    """The paper: 50,000 prompts, 3 iterations; DPO 2e-7, SFT 1e-5, 2 epochs; SPIN's scripts."""

    def read(name: str) -> RunConfig:
        return load_config(RunConfig, ROOT / f"configs/zephyr-7b-{name}.yaml")

    ours, spin, dpo, sft = map(read, ("ld-align", "spin", "dpo", "sft"))
    assert (ours.method, ours.iterations, ours.max_rows, ours.reference) == (
        "ld_align",
        3,
        50_000,
        "iteration",
    )
    assert (spin.method, spin.iterations, spin.training.epochs, spin.mix_previous) == (
        "spin",
        4,
        6,
        True,
    )
    assert spin.learning_rate == [5e-7, 5e-7, 1e-7, 1e-7] and spin.beta == [0.1, 0.1, 0.1, 5.0]
    assert (spin.training.optimizer, spin.training.schedule, spin.seed, spin.max_length) == (
        "rmsprop",
        "linear",
        42,
        1024,
    )
    assert (dpo.method, dpo.learning_rate, dpo.beta, dpo.training.epochs) == ("dpo", 2e-7, 0.1, 2)
    assert (sft.method, sft.learning_rate, sft.training.epochs) == ("sft", 1e-5, 2)
    assert {c.global_batch for c in (ours, spin, dpo, sft)} == {64}


# What a preset may mark as the paper's (arXiv 2404.06390): key -> value, by the method's name in
# the file's.
PAPER = {
    "ld-align": {
        "policy": "alignment-handbook/zephyr-7b-sft-full",
        "data": "data/ultrachat_200k/data/train_sft-*.parquet",
        "max_rows": "50000",
        "iterations": "3",
        "method": "ld_align",
        "reference": "iteration",
        "guide.folder": "models/gpt2",
        "guide.towers": "trained",
    },
    "spin": {"method": "spin"},
    "dpo": {
        "method": "dpo",
        "data": "data/ultrafeedback/data/train_prefs-*.parquet",
        "global_batch": "64",
        "learning_rate": "2.0e-7",
        "beta": "0.1",
        "training.epochs": "2",
    },
    "sft": {
        "method": "sft",
        "global_batch": "64",
        "learning_rate": "1.0e-5",
        "training.epochs": "2",
    },
}
MARKED = [name for name in CONFIGS if name.startswith(("zephyr-7b", "smollm2-135m"))]


@pytest.mark.parametrize("name", MARKED)
def test_every_line_says_whose_it_is(name: str) -> None:
    """Each line with a value ends in `# paper` (and is in PAPER) or in `# not the paper's: WHY`."""
    of_paper, group = {}, ""
    for line in (ROOT / f"configs/{name}.yaml").read_text().splitlines():
        if not line or line.startswith(("#", "base:", "run:")):
            continue
        group = group if line.startswith(" ") else ""
        key, _, rest = line.strip().partition(":")
        value, _, mark = (part.strip() for part in rest.partition("#"))
        if not value:
            group = f"{key}."
            assert not mark, f"{line}: the lines of a group are marked one by one"
        elif mark.startswith("paper"):
            of_paper[group + key] = value
        else:
            assert mark.startswith("not the paper's: "), line
    paper = PAPER.get(name.removeprefix("zephyr-7b-").removeprefix("smollm2-135m-"), {})
    if name.startswith("zephyr"):
        assert of_paper == paper
    assert of_paper.items() <= paper.items()


def test_a_comparison_is_read() -> None:
    assert isinstance(
        read_config(["--config", str(ROOT / "configs/compare-wordings.yaml")], "", CompareConfig),
        CompareConfig,
    )
    distributed.stop()
