"""Rewards: a tiny random DeBERTa against transformers row by row, and the stages of rewards."""

import json
import re
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from made_bert import WORDS, save_tokenizer, word_tokenizer
from runs import ROOT
from safetensors.torch import load_file, save_file
from stage_kills import check_resume
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DebertaV2Config,
    DebertaV2ForSequenceClassification,
)

from ldalign.evaluation.reward import RewardModel, check_reward_model, summary
from ldalign.models.toy import write_toy_model
from ldalign.run.context import open_context
from ldalign.run.folder import RunFolder, stage_names
from ldalign.run.measures import measure, measurements
from ldalign.run.settings import RunConfig
from ldalign.run.stages import pair_rewards
from ldalign.system.config import load_config, to_yaml
from ldalign.system.errors import EnvironmentProblem, InputError, NumericsError
from ldalign.system.files import read_jsonl, write_jsonl
from ldalign.system.memory import OutOfMemory


@pytest.fixture(scope="module")
def deberta(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Makes a folder laid out like OpenAssistant's: DebertaV2, one logit, [CLS] q [SEP] a [SEP]."""
    folder = tmp_path_factory.mktemp("reward") / "deberta"
    save_tokenizer(word_tokenizer(pair="[CLS] $A [SEP] $B:1 [SEP]:1"), folder)
    torch.manual_seed(0)
    config = DebertaV2Config(
        vocab_size=32,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        num_labels=1,
        initializer_range=0.5,
        relative_attention=True,
        position_buckets=8,
        pos_att_type=["p2c", "c2p"],
        max_position_embeddings=64,
        type_vocab_size=0,
        pooler_hidden_size=16,
    )
    DebertaV2ForSequenceClassification(config).save_pretrained(folder)
    return folder


def texts(count: int, seed: int) -> list[str]:
    draw = np.random.default_rng(seed)
    return [" ".join(draw.choice(WORDS, draw.integers(1, 30))) for _ in range(count)]


def test_scores_equal_one_row_at_a_time(deberta: Path) -> None:
    questions, answers = texts(23, 0), texts(23, 1)
    model = AutoModelForSequenceClassification.from_pretrained(deberta, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(deberta)
    alone = []
    for q, a in zip(questions, answers, strict=True):
        with torch.no_grad():
            alone.append(
                model(
                    **tokenizer(q, a, return_tensors="pt", truncation=True, max_length=40)
                ).logits[0, 0]
            )
    expected = torch.stack(alone)
    assert expected.std() > 0.05, "a model that scores all alike tests nothing"
    for batch_tokens in (1, 100, 8192):
        got = RewardModel(
            deberta, torch.device("cpu"), max_tokens=40, batch_tokens=batch_tokens
        ).score(questions, answers)
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(
        RewardModel(deberta, torch.device("cpu")).score(answers, questions), expected, atol=1e-2
    )
    assert RewardModel(deberta, torch.device("cpu")).score([], []).shape == (0,)


def test_what_is_no_reward_model(
    deberta: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((deberta / name).read_bytes())
    torch.save({}, tmp_path / "pytorch_model.bin")  # a pickle is not read
    with pytest.raises(InputError, match=r"has no weights in safetensors .* docs/judges.md"):
        RewardModel(tmp_path, torch.device("cpu"))
    (tmp_path / "model.safetensors").write_bytes(b"not tensors")
    with pytest.raises(InputError, match="model.safetensors"):
        RewardModel(tmp_path, torch.device("cpu"))
    raw = json.loads((deberta / "config.json").read_text())
    two = DebertaV2ForSequenceClassification(DebertaV2Config(**(raw | {"num_labels": 2})))
    two.save_pretrained(tmp_path)
    with pytest.raises(InputError, match="has 2 labels"):
        RewardModel(tmp_path, torch.device("cpu"))
    (tmp_path / "config.json").write_text('{"model_type": "nothing"}')
    with pytest.raises(InputError, match="not a reward model that can be read"):
        RewardModel(tmp_path, torch.device("cpu"))
    model = RewardModel(deberta, torch.device("cpu"))
    with torch.no_grad():
        model.model.classifier.bias.fill_(float("nan"))
    with pytest.raises(NumericsError, match="^row a: the reward is nan"):
        model.score(["what"], ["it"], ["a"])
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(EnvironmentProblem, match=r"pip install 'transformers"):
        RewardModel(deberta, torch.device("cpu"))


def test_the_conversion_in_the_docs(deberta: Path, tmp_path: Path) -> None:
    """A folder with a pickle of weights, converted, gives the same scores.

    Without tokenizer.json the folder is refused.
    """
    old, new = tmp_path / "old", tmp_path / "new"
    old.mkdir()
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (old / name).write_bytes((deberta / name).read_bytes())
    torch.save(
        DebertaV2ForSequenceClassification.from_pretrained(deberta).state_dict(),
        old / "pytorch_model.bin",
    )
    (code,) = re.findall(
        r"```python\n(.*?)```", (ROOT / "docs/judges.md").read_text(), flags=re.DOTALL
    )
    for name, folder in (
        ("OpenAssistant/reward-model-deberta-v3-large-v2", old),
        ("models/reward-deberta", new),
    ):
        assert code.count(f'"{name}"') == 1
        code = code.replace(name, str(folder))
    exec(code, {})
    given = texts(3, 5), texts(3, 6)
    scores = [RewardModel(folder, torch.device("cpu")).score(*given) for folder in (deberta, new)]
    assert torch.equal(*scores)
    (new / "tokenizer.json").unlink()
    with pytest.raises(InputError, match=r"has no tokenizer.json .* docs/judges.md"):
        check_reward_model(new)


def test_weights_that_are_missing_or_not_finite(deberta: Path, tmp_path: Path) -> None:
    """transformers would draw what is missing at random."""
    folder = shutil.copytree(deberta, tmp_path / "model")
    whole = load_file(folder / "model.safetensors")
    save_file(
        {n: t for n, t in whole.items() if n != "classifier.weight"},
        folder / "model.safetensors",
        {"format": "pt"},
    )
    with pytest.raises(InputError, match=r"1 tensors are missing, the first: classifier.weight"):
        RewardModel(folder, torch.device("cpu"))
    whole["pooler.dense.bias"][3] = float("nan")
    save_file(whole, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match=r"model: tensor pooler.dense.bias holds NaN or Inf"):
        RewardModel(folder, torch.device("cpu"))


def test_no_memory(deberta: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For a batch, and for the weights."""

    def fail(*arguments: Any, **keywords: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    model = RewardModel(deberta, torch.device("cpu"))
    monkeypatch.setattr(model.model, "forward", fail)
    message = (
        r"rewards of 2 answers of at most \d+ tokens: out of memory; lower "
        r"reward.batch_tokens"
    )
    with pytest.raises(OutOfMemory, match=message):
        model.score(["what", "is"], ["it", "a"])
    monkeypatch.setattr(DebertaV2ForSequenceClassification, "to", fail)
    with pytest.raises(OutOfMemory, match="float32 weights on cpu: out of memory"):
        RewardModel(deberta, torch.device("cpu"))


def test_a_killed_stage_is_gone_on_with(
    deberta: Path, tmp_path: Path, in_process: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rewards of both sides of an iteration's pairs."""
    config = load_config(
        RunConfig,
        ROOT / "configs/toy.yaml",
        [
            f"policy={write_toy_model(tmp_path / 'model')}",
            "max_rows=16",
            "shuffle=false",
            "sft.epochs=0",
            "continual_sft.epochs=0",
            f"reward={deberta}",
            "reward.batch_tokens=100",
            "device=cpu",
        ],
    )
    ctx = open_context(RunFolder(tmp_path / "run", ""), config)
    responses = [{"response": text} for text in texts(16, 4)]

    def make(run: Path) -> None:
        path = run / "iteration_0/responses/responses.jsonl"
        if not path.exists():
            path.parent.mkdir(parents=True)
            write_jsonl(path, responses)
        pair_rewards.pair_rewards_stage(replace(ctx, run=RunFolder(run, "")), 0)

    check_resume(make, "iteration_0/pair_rewards", lambda name: tmp_path / name, monkeypatch)


def test_summary() -> None:
    """By hand: one win, one tie, two losses."""
    s = summary(np.array([1.0, 2.0, 0.0, 0.0]), np.array([0.0, 2.0, 1.0, 3.0]), np.zeros(4))
    assert s["reward/mean"] == 0.75 and s["reward/real"] == 1.5 and s["reward/win_rate"] == 1.5 / 4
    assert s["reward/win_rate_se"] == pytest.approx(np.std([1, 0.5, 0, 0], ddof=1) / 2)
    assert s["reward/win_rate_first"] == 0.75 and "reward/win_rate_first" not in summary(
        np.zeros(2), np.ones(2)
    )


def test_stages(
    deberta: Path, tmp_path: Path, in_process: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows without a checker are answered too; real responses are scored once; a second policy
    meets the first.
    """
    rows = [
        {"id": str(n), "prompt": q, "response": a}
        for n, (q, a) in enumerate(zip(texts(5, 2), texts(5, 3), strict=True))
    ]
    rows[0] |= {"kind": "counting", "answer": "3"}
    (tmp_path / "heldout.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    policies = [write_toy_model(tmp_path / name) for name in ("one", "two")]
    config = load_config(
        RunConfig,
        ROOT / "configs/toy.yaml",
        [
            f"policy={policies[0]}",
            f"run={tmp_path / 'run'}",
            f"heldout={tmp_path / 'heldout.jsonl'}",
            "max_rows=16",
            "sft.epochs=0",
            "continual_sft.epochs=0",
            "max_new_tokens=4",
            f"reward={deberta}",
            "device=cpu",
        ],
    )
    assert measurements(config, "sft") == ["sft/evaluation", "sft/reward"]
    scored: list[int] = []
    score = RewardModel.score

    def counted(
        self: RewardModel, questions: list[str], answers: list[str], *rest: Any
    ) -> torch.Tensor:
        scored.append(len(answers))
        return score(self, questions, answers, *rest)

    monkeypatch.setattr(RewardModel, "score", counted)
    with RunFolder(tmp_path / "run", to_yaml(config)) as run:
        ctx = open_context(run, config)
        for name, policy in (("start", policies[0]), ("iteration_0", policies[1])):
            measure(ctx, name, policy, "start")
        measure(ctx, "start", policies[0], "start")  # nothing to do
    assert scored == [5, 5, 5]
    answers = read_jsonl(tmp_path / "run/start/evaluation/answers.jsonl")
    assert [(len(a["sampled"]), len(a["correct"])) for a in answers] == [(2, 3)] + [(0, 0)] * 4
    model = RewardModel(deberta, torch.device("cpu"))
    expected = model.score([row["prompt"] for row in rows], [a["greedy"] for a in answers])
    first, second = (
        read_jsonl(tmp_path / f"run/{name}/reward/rewards.jsonl")
        for name in ("start", "iteration_0")
    )
    assert [r["generated"] for r in first] == pytest.approx(expected.tolist(), abs=1e-5)
    assert [r["real"] for r in first] == [r["real"] for r in second]
    figures = json.loads((tmp_path / "run/iteration_0/reward/summary.json").read_text())
    assert figures["reward/win_rate_first"] == 0.5, "the same weights: all ties"
    assert stage_names(tmp_path / "run") == ["data"] + [
        f"{name}/{step}" for name in ("start", "iteration_0") for step in ("evaluation", "reward")
    ]
