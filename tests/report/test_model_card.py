"""Model cards: what they say, that no name breaks them, and that no finished stage changes."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard

from ldalign.report.model_card import CARD, MARK, Base, code, find_base, try_cards, write_cards
from ldalign.run.manifest import check_stage, run_stage
from ldalign.run.settings import RunConfig
from ldalign.system.config import to_dict

HOSTILE = "a\"b'c: [x](http://y) | <script> `tick` ``two`` # h\n---\nlicense: mit\n{% raw %} Ünï"


def stage(run: Path, name: str, files: dict[str, str], **summary: Any) -> None:
    def make(folder: Path) -> None:
        for file, text in files.items():
            (folder / file).write_text(text)
        (folder / "summary.json").write_text(json.dumps({"seconds": 1.0, **summary}))

    run_stage(run / name, {}, make)


def answers(correct: list[int], logp: float) -> str:
    rows = [
        {"id": str(i), "logp": logp * (i + 1), "n_tokens": 4, "correct": [bool(one), bool(one)]}
        for i, one in enumerate(correct)
    ]
    return "".join(json.dumps(row) + "\n" for row in rows)


def made_run(folder: Path, **config: Any) -> Path:
    """A run with SFT and one iteration, both measured, and what a card is made of."""
    folder.mkdir()
    (folder / "config.yaml").write_text(yaml.safe_dump(to_dict(RunConfig()) | config))
    (folder / "environment.json").write_text('{"ldalign": "0.1.0", "git_commit": "abc123"}')
    (folder / "started.json").write_text('{"date": "2026-11-20"}')
    sources = [
        {"key": "data", "path": "/home/me/rows.jsonl", "sha256": "f" * 64},
        {"key": "heldout", "path": "/home/me/held.jsonl", "sha256": "e" * 64},
    ]
    counts = {"rows/train": 48.0, "rows/heldout": 26.0, "rows/dropped": 3.0}
    stage(folder, "data", {"sources.json": json.dumps(sources)}, **counts)
    for name, right, logp in (("sft", [0, 0, 1, 0], -2.0), ("iteration_0", [1, 1, 1, 0], -1.0)):
        stage(folder, f"{name}/policy", {"model.safetensors": "", "config.json": "{}"})
        share = {"accuracy/greedy": sum(right) / 4, "accuracy/greedy_se": 0.1, "nll/real": -logp}
        stage(folder, f"{name}/evaluation", {"answers.jsonl": answers(right, logp)}, **share)
    chosen = {"policy": "iteration_0", "folder": "iteration_0/policy", "why": "the only iteration"}
    (folder / "selected.json").write_text(json.dumps(chosen))
    return folder


def card_of(run: Path, policy: str = "iteration_0") -> tuple[dict[str, Any], str]:
    text = (run / policy / "policy" / CARD).read_text()
    return yaml.safe_load(text.split("---\n")[1]), text


def test_what_a_card_says(tmp_path: Path) -> None:
    run = made_run(tmp_path / "run", data=["/home/me/rows.jsonl", "org/set:cfg:train"], seed=7)
    assert [path.parts[-3] for path in write_cards(run)] == ["sft", "iteration_0"]
    about, text = card_of(run)
    assert about == {
        "base_model": "HuggingFaceTB/SmolLM2-135M-Instruct",
        "base_model_relation": "finetune",
        "license": "apache-2.0",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["ldalign", "ld-align"],
        "datasets": ["org/set"],
    }
    for part in (
        "# `HuggingFaceTB/SmolLM2-135M-Instruct` after LD-Align, iteration 0\n",
        "Trained on `rows.jsonl`, `org/set:cfg:train`.",
        "| `rows.jsonl` | `ffffffffffffffff` |",
        "| `rows` | `48 training, 26 held out, 3 dropped as too long` |",
        "| `seed` | `7` |",
        "This is iteration 0, where 0 is the first.",
        "|  | start (after SFT) | this policy |",
        "| greedy accuracy, % | 25.0 +- 10.0 | 75.0 +- 10.0 |",
        "| NLL of the data's responses | 2.0000 | 1.0000 |",
        "- this policy less start (after SFT): greedy accuracy, points: +50.0 +- 28.9;",
        "The run's result is this policy: the only iteration.",
        "ldalign 0.1.0, commit `abc123`, in a run begun on 2026-11-20.",
        "AutoModelForCausalLM.from_pretrained(folder",
        "`ldalign chat policy=FOLDER`",
        "## Limits",
    ):
        assert part in text, part
    assert "/home/me" not in text and "held.jsonl" not in text, "a card may be published"
    data = ModelCard(text).data
    assert data.license == "apache-2.0" and data.base_model == about["base_model"]
    tuned = card_of(run, "sft")[1]
    assert "supervised fine-tuning\n" in tuned and "`sft.learning_rate`" in tuned
    assert "`beta`" in text and "`beta`" not in tuned, "which it does not read"
    assert card_of(run, "sft")[0]["tags"] == ["ldalign", "sft"]


def test_a_card_explains_accuracy_where_there_is_any(tmp_path: Path) -> None:
    run = made_run(tmp_path / "run")
    write_cards(run)
    assert "Accuracy is the share of answers" in card_of(run)[1]
    for path in run.glob("*/evaluation/summary.json"):
        found = json.loads(path.read_text())
        path.write_text(json.dumps({k: v for k, v in found.items() if "accuracy" not in k}))
    write_cards(run)
    text = card_of(run)[1]
    assert "NLL is of the data's own responses" in text and "Accuracy is" not in text


def test_a_finished_stage_stays_as_it_is(tmp_path: Path) -> None:
    """Cards are in no manifest: written, changed or deleted, the stage is whole, also anew."""
    run = made_run(tmp_path / "run")
    manifest = run / "iteration_0/policy/manifest.json"
    before = manifest.read_bytes()
    evaluation = (run / "iteration_0/evaluation").rename(tmp_path / "later")
    write_cards(run)
    assert "Not measured yet." in card_of(run)[1]
    evaluation.rename(run / "iteration_0/evaluation")
    (run / "environment.json").write_text('{"ldalign": "9", "git_commit": "def"}')
    assert write_cards(run) == [run / "iteration_0/policy" / CARD]
    text = card_of(run)[1]
    assert "75.0 +- 10.0" in text and write_cards(run) == []
    assert "ldalign 0.1.0, commit `abc123`" in text and "def" not in text.split("##")[-1]
    check_stage(run / "iteration_0/policy")
    assert not run_stage(run / "iteration_0/policy", {}, lambda folder: None)
    assert manifest.read_bytes() == before and CARD.encode() not in before


def test_a_card_that_a_person_changed_stays(tmp_path: Path) -> None:
    run = made_run(tmp_path / "run")
    write_cards(run)
    path = run / "iteration_0/policy" / CARD
    path.write_text(path.read_text().replace(MARK, "mine"))
    (run / "iteration_0/evaluation/summary.json").write_text("{}")
    assert write_cards(run) == [] and "mine" in path.read_text()


def test_policies_without_weights_get_none(tmp_path: Path) -> None:
    """As after compare.policies=remove."""
    run = made_run(tmp_path / "run")
    (run / "sft/policy/model.safetensors").unlink()
    assert write_cards(run) == [run / "iteration_0/policy" / CARD]


def test_no_name_breaks_a_card(tmp_path: Path) -> None:
    stop = {"stop": [HOSTILE]}
    run = made_run(tmp_path / "run", policy=HOSTILE, data=[HOSTILE, "x\n---\n"], sampling=stop)
    write_cards(run)
    about, text = card_of(run)
    assert about["license"] == "other" and "datasets" not in about and "base_model" not in about
    assert ModelCard(text).data.to_dict() == about
    body = text.split("---\n", 2)[2]
    assert not re.search("^(---|license:)", body, re.MULTILINE), "all in one line"
    plain = re.sub(r"(`+)(?!`).+?(?<!`)\1(?!`)", "", body.split("## How to load")[0])
    assert "<script>" in body and "<script>" not in plain, "in code alone"
    tables = [line for line in body.splitlines() if line.startswith("|")]
    assert all(len(re.findall(r"(?<!\\)\|", line)) in (3, 4) for line in tables)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a", "`a`"),
        ("a`b", "``a`b``"),
        ("``a", "``` ``a ```"),
        ("a|b", "`a|b`"),
        ("a\n\nb", "`a b`"),
        ("", "` `"),
    ],
)
def test_code(text: str, shown: str) -> None:
    assert code(text) == shown


def base_of(policy: Path | str, cache: Path) -> Base:
    return find_base({"policy": str(policy), "cache": str(cache)})


def test_the_base_and_its_licence(tmp_path: Path) -> None:
    smollm2 = Base(*["HuggingFaceTB/SmolLM2-135M-Instruct"] * 2, "apache-2.0")
    assert base_of("smollm2-135m-instruct", tmp_path) == smollm2
    assert base_of("toy", tmp_path) == Base("a tiny random model", None, None)
    assert base_of("org/name@v1", tmp_path) == Base("org/name@v1", "org/name", None)
    kept = tmp_path / "hub/org--name--v1"
    kept.mkdir(parents=True)
    (kept / "ldalign_source.json").write_text('{"name": "org/name@v1", "license": "mit"}')
    assert base_of("org/name@v1", tmp_path) == Base("org/name@v1", "org/name", "mit")
    assert base_of(kept, tmp_path) == Base("org--name--v1", "org/name", "mit")
    own = tmp_path / "own"
    own.mkdir()
    assert base_of(own, tmp_path) == Base("own", None, None)
    (own / "LICENSE").write_text("\n      Apache License\n   Version 2.0, January 2004\n")
    assert base_of(own, tmp_path) == Base("own", None, "apache-2.0")
    card = own / "README.md"
    card.write_text("---\nlicense: llama3\nbase_model: [org/other]\n---\ntext\n")
    assert base_of(own, tmp_path) == Base("own", "org/other", "llama3")
    for broken in ("---\nlicense: [\n---\n", "---\nlicense: {a: b}\nbase_model: 'x y'\n---\n", "x"):
        card.write_text(broken)
        assert base_of(own, tmp_path).hub is None, broken
    (own / "LICENSE").unlink()
    assert base_of(own, tmp_path) == Base("own", None, None)


def test_a_run_from_a_run(tmp_path: Path) -> None:
    """Base and licence go on through the cards."""
    run = made_run(tmp_path / "first")
    write_cards(run)
    found = Base("first", "HuggingFaceTB/SmolLM2-135M-Instruct", "apache-2.0")
    assert base_of(run, tmp_path) == found
    second = made_run(tmp_path / "second", policy=str(run / "sft/policy"))
    write_cards(second)
    about, text = card_of(second)
    assert about["base_model"] == found.hub and "which comes of" in text


def test_a_card_never_ends_a_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = made_run(tmp_path / "run")
    (run / "config.yaml").write_text("a: [")
    try_cards(run)
    assert "no model card" in caplog.text and not (run / "sft/policy" / CARD).exists()


@pytest.mark.slow
def test_every_policy_of_a_run_has_its_card(toy_run: Path) -> None:
    for name in ("sft", "iteration_0", "iteration_1", "continual_sft"):
        about, text = card_of(toy_run, name)
        assert about["license"] == "other" and "look it up" in text
        assert "NLL of the data's responses" in text and "None" not in text
        check_stage(toy_run / name / "policy")
    assert not list(toy_run.rglob("*.partial"))
