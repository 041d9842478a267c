"""Sentence embeddings: a tiny random BERT against plain arithmetic, and the judge of closeness."""

import json
import os
import re
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from made_bert import LONGEST, WORDS, write_bert
from runs import ROOT
from safetensors.torch import load_file, save_file
from stage_kills import check_resume
from transformers import AutoTokenizer, BertConfig, BertModel

from ldalign.data.ragged import TokenLists
from ldalign.data.rows import Row
from ldalign.evaluation.embedding import EmbeddingModel, check_embedding_model
from ldalign.evaluation.judges import EmbeddingJudge
from ldalign.models.toy import write_toy_model
from ldalign.run.context import open_context
from ldalign.run.folder import RunFolder
from ldalign.run.manifest import hash_model_folder
from ldalign.run.measures import check_measurements
from ldalign.run.settings import RunConfig
from ldalign.run.stages.judged import judged_stage
from ldalign.run.stages.responses import RESPONSES, Responses
from ldalign.system import distributed
from ldalign.system.config import load_config
from ldalign.system.errors import EnvironmentProblem, InputError, NumericsError
from ldalign.system.files import read_jsonl, write_jsonl
from ldalign.system.memory import OutOfMemory
from ldalign.train import align, judge

CPU = torch.device("cpu")
pytestmark = pytest.mark.usefixtures("in_process")  # one thread: the model is tiny


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_bert(tmp_path_factory.mktemp("embedding") / "bert")


@pytest.fixture
def copied(bert: Path, tmp_path: Path) -> Path:
    return shutil.copytree(bert, tmp_path / "bert")


def texts(count: int, seed: int) -> list[str]:
    draw = np.random.default_rng(seed)
    return [" ".join(draw.choice(WORDS, draw.integers(1, 40))) for _ in range(count)]


def plainly(folder: Path, given: list[str], longest: int = LONGEST) -> torch.Tensor:
    """The vectors (N, D) float64, a text at a time: mean of the last layer, by its length."""
    model = BertModel.from_pretrained(folder, dtype=torch.float64, add_pooling_layer=False).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    vectors = []
    for text in given:
        words = tokenizer(text, add_special_tokens=False, truncation=False)["input_ids"]
        ids = [1, *words[: longest - 2], 2]
        with torch.no_grad():
            states = model(input_ids=torch.tensor([ids])).last_hidden_state[0]
        total = sum((states[i] for i in range(len(ids))), torch.zeros(16, dtype=torch.float64))
        mean = total / len(ids)
        vectors.append(mean / mean.square().sum().sqrt())
    return torch.stack(vectors)


def test_embeddings_equal_plain_arithmetic(bert: Path) -> None:
    """In batches of any size; of longer texts the end is cut, and counted."""
    given = [*texts(31, 0), "", "  what is  ", "what is"]
    expected = plainly(bert, given)
    spread = (expected @ expected.T).fill_diagonal_(0).abs().min()
    assert spread < 0.9, "a model that embeds all alike tests nothing"
    for batch_tokens in (1, 100, 8192):
        model = EmbeddingModel(bert, CPU, batch_tokens)
        got = model.embed(given)
        assert got.dtype == torch.float32 and got.shape == (34, 16) and model.width == 16
        torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-5)
        assert torch.equal(got[-2], got[-1])
        assert model.cut == sum(len(text.split()) > LONGEST - 2 for text in given) > 5
    assert not torch.allclose(got.double(), plainly(bert, given, 12), atol=1e-2)
    assert model.embed(["what"]).shape == (1, 16) and model.cut == 0
    assert model.embed([]).shape == (0, 16)


def test_distances_equal_plain_arithmetic(bert: Path) -> None:
    a, b, c = texts(23, 1), texts(23, 2), texts(23, 3)
    b[4] = a[4]
    vectors = [plainly(bert, given) for given in (a, b, c)]
    expected = [1 - (vectors[0] * other).sum(dim=1) for other in vectors[1:]]
    model = EmbeddingModel(bert, CPU, 100)
    got = model.distance(a, b)
    assert got.dtype == torch.float32 and got.shape == (23,)
    torch.testing.assert_close(got.double(), expected[0], rtol=1e-4, atol=1e-6)
    assert got[4] == 0 and got.std() > 0.01
    assert torch.equal(model.distance(b, a), got)
    both = model.distances(a, [b, c])
    torch.testing.assert_close(both.double(), torch.stack(expected, 1), rtol=1e-4, atol=1e-6)
    assert torch.equal(model.distances(a, [c, b]), both.flip(1))
    assert model.distance([], []).shape == (0,)


def test_rows_are_shared_among_ranks(bert: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two ranks, one after the other: each embeds its share, and together the same bits."""
    given, others = texts(23, 1), texts(23, 2)
    model = EmbeddingModel(bert, CPU, 100)
    alone = model.distance(given, others)
    merged = torch.zeros(23)
    for rank in range(2):

        def merge(count: int, mine: list[int], values: torch.Tensor) -> torch.Tensor:
            assert 0 < len(mine) < count
            merged[mine] += values[:, 0].float()
            return torch.zeros(count, 1)

        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        monkeypatch.setattr(distributed, "world_size", lambda: 2)
        monkeypatch.setattr(distributed, "on_rank0", lambda work: work())
        monkeypatch.setattr(distributed, "on_all", lambda work: [work()])
        monkeypatch.setattr(distributed, "merge_rows", merge)
        model.distance(given, others)
    assert torch.equal(merged, alone)


@pytest.mark.parametrize(
    ("file", "changes", "longest"),
    [
        ("sentence_bert_config.json", {"max_seq_length": 10}, 10),
        ("sentence_bert_config.json", {"max_seq_length": None}, 40),
        ("tokenizer_config.json", {"model_max_length": 12}, LONGEST),
    ],
)
def test_the_longest_text(copied: Path, file: str, changes: dict[str, Any], longest: int) -> None:
    """Of sentence_bert_config.json, else of the tokenizer, else of the model's positions."""
    rewrite(copied / file, **changes)
    assert EmbeddingModel(copied, CPU).longest == longest
    (copied / "sentence_bert_config.json").unlink()
    bound = 12 if file == "tokenizer_config.json" else 40
    model = EmbeddingModel(copied, CPU)
    assert model.longest == bound
    given = ["what " * n for n in (bound - 2, bound - 1)]
    torch.testing.assert_close(
        model.embed(given).double(), plainly(copied, given, bound), rtol=1e-5, atol=1e-5
    )
    assert model.cut == 1


def test_the_plain_layout_and_small_letters(copied: Path) -> None:
    """Without the files of sentence-transformers a folder is read alike; do_lower_case is heard."""
    given = texts(5, 4)
    expected = EmbeddingModel(copied, CPU).embed(given)
    rewrite(copied / "sentence_bert_config.json", do_lower_case=True)
    changed = hash_model_folder(copied)
    assert torch.equal(EmbeddingModel(copied, CPU).embed([t.upper() for t in given]), expected)
    (copied / "modules.json").unlink()
    shutil.rmtree(copied / "1_Pooling")
    rewrite(copied / "sentence_bert_config.json", do_lower_case=False)
    assert torch.equal(EmbeddingModel(copied, CPU).embed(given), expected)
    assert hash_model_folder(copied) != changed, "what changes a vector changes the hash"


def test_a_hubs_cache_is_followed(bert: Path, tmp_path: Path) -> None:
    """Its files are links to blobs of the same model, the pooling's too."""
    root = tmp_path / "models--org--name"
    folder = shutil.copytree(bert, root / "snapshots/0")
    (root / "blobs").mkdir()
    for number, path in enumerate(p for p in sorted(folder.rglob("*")) if p.is_file()):
        blob = path.rename(root / "blobs" / str(number))
        path.symlink_to(os.path.relpath(blob, path.parent))
    check_embedding_model(folder)
    elsewhere = shutil.move(folder / "1_Pooling", tmp_path / "elsewhere")
    (folder / "1_Pooling").symlink_to(elsewhere)
    with pytest.raises(InputError, match=r"1_Pooling/config.json: is a link out"):
        check_embedding_model(folder)


# ----------------------------------------------------------------------------------------- refusals


def rewrite(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def pooling(**changes: Any) -> Callable[[Path], None]:
    return lambda folder: rewrite(folder / "1_Pooling/config.json", **changes)


def step(**changes: Any) -> Callable[[Path], None]:
    """Adds a step to modules.json."""

    def spoil(folder: Path) -> None:
        steps = json.loads((folder / "modules.json").read_text())
        (folder / "modules.json").write_text(json.dumps([*steps, changes]))

    return spoil


REFUSED: dict[str, tuple[Callable[[Path], Any], str]] = {
    "nothing": (shutil.rmtree, "has no weights in safetensors (judge.folder); give a folder"),
    "pickle": (
        lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"),
        "has no weights in safetensors (judge.folder); give a folder with model.safetensors",
    ),
    "no tokenizer": (lambda f: (f / "tokenizer.json").unlink(), "has no tokenizer.json"),
    "code": (
        lambda f: rewrite(f / "config.json", auto_map={"AutoModel": "x.Evil"}),
        "config.json: auto_map asks to run code",
    ),
    "cut file": (
        lambda f: (f / "model.safetensors").write_bytes(b"not tensors"),
        "model.safetensors: not a whole safetensors file",
    ),
    "adapter": (lambda f: (f / "adapter_config.json").write_text("{}"), "an adapter"),
    "cls": (
        pooling(pooling_mode_cls_token=True),
        "1_Pooling/config.json: pooling_mode_cls_token is True; only the mean over the tokens",
    ),
    "no mean": (
        pooling(pooling_mode_mean_tokens=False),
        "1_Pooling/config.json: pooling_mode_mean_tokens is False",
    ),
    "named mode": (pooling(pooling_mode="max"), "1_Pooling/config.json: pooling_mode is 'max'"),
    "a further layer": (
        step(type="sentence_transformers.models.Dense", path="2_Dense"),
        "modules.json: type 'sentence_transformers.models.Dense' is not done here",
    ),
    "encoder elsewhere": (
        step(type="sentence_transformers.models.Transformer", path="0_BERT"),
        "modules.json: path '0_BERT' of the Transformer must be ''",
    ),
    "pooling elsewhere": (
        step(type="sentence_transformers.models.Pooling", path="../x"),
        "modules.json: path '../x' of the Pooling is no plain name",
    ),
    "no steps": (lambda f: (f / "modules.json").write_text("3"), "modules.json: expected a list"),
    "prompt": (
        lambda f: (f / "config_sentence_transformers.json").write_text(
            '{"default_prompt_name": "query"}'
        ),
        "config_sentence_transformers.json: default_prompt_name 'query' puts a prompt",
    ),
}
# What only loading shows.
REFUSED_LATER: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no bound": (
        lambda f: rewrite(f / "sentence_bert_config.json", max_seq_length=41),
        "sentence_bert_config.json: max_seq_length is 41; it must be an integer from 3 to 40",
    ),
    "no room": (
        lambda f: rewrite(f / "sentence_bert_config.json", max_seq_length=2),
        "max_seq_length is 2; it must be an integer from 3 to 40",
    ),
    "another network": (
        lambda f: rewrite(f / "config.json", model_type="nothing"),
        "not an embedding model that can be read",
    ),
    "no pad token": (
        lambda f: rewrite(f / "tokenizer_config.json", pad_token=None),
        "tokenizer_config.json: names no pad_token",
    ),
    "more layers": (
        lambda f: rewrite(f / "config.json", num_hidden_layers=3),
        "16 tensors are missing, the first: encoder.layer.2.attention.output.LayerNorm.bias; is "
        "it an embedding model?",
    ),
}


@pytest.mark.parametrize("fault", REFUSED)
def test_what_is_refused_before_anything_is_computed(copied: Path, fault: str) -> None:
    config = load_config(
        RunConfig, overrides=["method=rlaif", "judge=embedding", f"judge.folder={copied}"]
    )
    check_measurements(config, ["iteration_0/judged"])
    spoil, message = REFUSED[fault]
    spoil(copied)
    for check in (check_embedding_model, lambda folder: EmbeddingModel(folder, CPU)):
        with pytest.raises(InputError, match=re.escape(message)) as caught:
            check(copied)
        text = str(caught.value)
        assert "judge.folder" in text and str(copied) in text and "\n" not in text
    with pytest.raises(InputError, match="judge.folder"):
        check_measurements(config, ["iteration_0/judged"])


@pytest.mark.parametrize("fault", REFUSED_LATER)
def test_what_is_refused_when_it_is_loaded(copied: Path, fault: str) -> None:
    spoil, message = REFUSED_LATER[fault]
    spoil(copied)
    with pytest.raises(InputError, match=re.escape(message)) as caught:
        EmbeddingModel(copied, CPU)
    text = str(caught.value)
    assert "judge.folder" in text and str(copied) in text and "\n" not in text


def test_weights_that_are_not_finite_or_too_few(copied: Path) -> None:
    whole = load_file(copied / "model.safetensors")
    name = "embeddings.LayerNorm.weight"
    damaged = whole | {name: whole[name] * float("inf")}
    save_file(damaged, copied / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match=rf"tensor {name} holds NaN or Inf.*\(judge.folder\)"):
        EmbeddingModel(copied, CPU)
    few = BertConfig(**json.loads((copied / "config.json").read_text()) | {"vocab_size": 12})
    BertModel(few, add_pooling_layer=False).save_pretrained(copied)
    with pytest.raises(InputError, match=r"has the token id 21, the model's embedding 12 rows"):
        EmbeddingModel(copied, CPU)


def test_what_goes_wrong_with_a_text(bert: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Vectors that are not finite name their row; no memory, no transformers."""
    model = EmbeddingModel(bert, CPU)
    with torch.no_grad():
        model.model.embeddings.word_embeddings.weight[4].fill_(float("nan"))  # of "what"
    with pytest.raises(NumericsError, match=r"^row b: the embedding of a text gives nan; look at"):
        model.embed(["is", "what"], ["a", "b"])
    with pytest.raises(NumericsError, match="^row c: "):
        model.distance(["is", "is"], ["it", "what"], ["a", "c"])

    def fail(*arguments: Any, **keywords: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(model.model, "forward", fail)
    with pytest.raises(OutOfMemory, match=r"embeddings of 2 texts of at most 4 tokens: out of mem"):
        model.embed(["is it", "a"])
    monkeypatch.setitem(sys.modules, "transformers", None)
    message = "^judge.folder: transformers is missing; pip install 'transformers"
    with pytest.raises(EnvironmentProblem, match=message):
        EmbeddingModel(bert, CPU)
    config = load_config(RunConfig, overrides=["judge=embedding", f"judge.folder={bert}"])
    with pytest.raises(EnvironmentProblem, match=message):
        check_measurements(config, ["agreement"])


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (["judge=embedding"], "judge=embedding: needs the folder .* give judge.folder"),
        (["judge.folder=x"], "x: is read by judge=embedding and weights=semantic alone; leave it"),
        (["judge=policy", "judge.folder=x"], "judge.folder=x: is read by judge=embedding and"),
        (
            ["judge=embedding", "judge.folder=x", "judge.endpoint=http://localhost/v1"],
            "judge.model=embedding must be the endpoint's name",
        ),
        (["method=self_reward", "judge=embedding", "judge.folder=x"], "judges by itself"),
    ],
)
def test_contradictions(keys: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        load_config(RunConfig, overrides=keys)


# -------------------------------------------------------------------------------------------- judge


def rows_of(responses: list[str]) -> list[Row]:
    question = {"role": "user", "content": "what"}
    return [Row(str(n), (question,), text) for n, text in enumerate(responses)]


def test_the_closer_one_is_preferred(bert: Path, capfd: pytest.CaptureFixture[str]) -> None:
    real, first, second = texts(23, 5), texts(23, 6), texts(23, 7)
    first[3], second[3] = second[3], real[3]
    first[4] = second[4]
    vectors = [plainly(bert, given) for given in (real, first, second)]
    gains = (vectors[0] * (vectors[1] - vectors[2])).sum(dim=1)
    judge = EmbeddingJudge(EmbeddingModel(bert, CPU, 100))
    there = judge.prefer(rows_of(real), first, second)
    assert there == pytest.approx((0.5 + gains / 4).tolist(), abs=1e-6)
    assert there[3] < 0.5 and there[4] == 0.5 and 0 <= min(there) < 0.45 < 0.55 < max(there) <= 1
    assert "compared by their beginning: " in capfd.readouterr().err
    # To the bit, though all rows change places, or every second one.
    assert judge.prefer(rows_of(real), second, first) == [1 - p for p in there]
    mixed = [
        (b, a) if n % 2 else (a, b) for n, (a, b) in enumerate(zip(first, second, strict=True))
    ]
    swapped = judge.prefer(rows_of(real), [a for a, _ in mixed], [b for _, b in mixed])
    assert swapped == [1 - p if n % 2 else p for n, p in enumerate(there)]
    assert [1 - p for p in swapped] == [p if n % 2 else 1 - p for n, p in enumerate(there)]
    assert judge.prefer([], [], []) == []


class Measured:
    """An embedding model whose distances are given."""

    cut = 0

    def __init__(self, distances: list[list[float]]) -> None:
        self.given = torch.tensor(distances)

    def distances(self, real: list[str], others: list[list[str]], *rest: Any) -> torch.Tensor:
        return self.given


def test_preferences_at_the_edges() -> None:
    """All in [0, 1], and opposite to the bit where the closer one is closer by next to nothing."""
    given = [[0.0, 2.0], [2.0, 0.0], [0.3, 0.3], [1e-17, 1e-9], [3e-17, 1e-20], [0.1, 0.7]]
    rows, none = rows_of([""] * 6), [""] * 6
    there, back = (
        EmbeddingJudge(cast(Any, Measured(given))).prefer(rows, none, none)
        for given in (given, [pair[::-1] for pair in given])
    )
    assert there[:3] == [1.0, 0.0, 0.5] and there[3] > 0.5 and there[4] <= 0.5
    assert there[5] == pytest.approx(0.65)
    assert back == [1 - p for p in there] and there == [1 - p for p in back]


def settings(folder: Path, *more: str) -> list[str]:
    return [
        "sft.epochs=0",
        "continual_sft.epochs=0",
        "max_rows=16",
        "max_new_tokens=8",
        "judge=embedding",
        f"judge.folder={folder}",
        *more,
    ]


def test_a_killed_stage_is_gone_on_with(
    bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only what is missing is embedded; the folder's hash is among what the stage is made from."""
    policy = write_toy_model(tmp_path / "model")
    config = load_config(
        RunConfig,
        ROOT / "configs/toy.yaml",
        [*settings(bert), f"policy={policy}", "method=rlaif", "device=cpu"],
    )
    ctx = open_context(RunFolder(tmp_path / "run", ""), config)
    real = [pair.real for pair in ctx.used[1]]
    tokens = TokenLists.of(real[(i + n) % 16] for i in range(16) for n in (1, 2))
    samples = Responses(tokens, ["stop"] * 32)
    plain = EmbeddingModel.__init__
    monkeypatch.setattr(  # in several batches
        EmbeddingModel, "__init__", lambda self, *given: plain(self, *given, batch_tokens=40)
    )

    def make(run: Path) -> None:
        path = run / RESPONSES.format(0)
        if not path.exists():
            path.parent.mkdir(parents=True)
            write_jsonl(path, [1])  # its hash alone is read
        judged_stage(replace(ctx, run=RunFolder(run, "")), 0, policy, samples, None)

    check_resume(make, "iteration_0/judged", lambda name: tmp_path / name, monkeypatch)
    manifests = list(tmp_path.glob("*/iteration_0/judged/manifest.json"))
    parents = json.loads(manifests[0].read_text())["parents"]
    assert parents["judge.model"] == "embedding"
    assert parents["judge.folder"] == hash_model_folder(bert)


def test_the_script_and_a_run_of_rlaif(
    bert: Path, toy_run: Path, toy_cache: Path, tmp_path: Path
) -> None:
    """train/judge.py and train/align.py: every preference is that of the model alone."""
    toy = ["--config", str(ROOT / "configs/toy.yaml"), f"cache={toy_cache}", *settings(bert)]
    run = tmp_path / "agreement"
    policy = f"policy={toy_run / 'iteration_0/policy'}"
    asked = ["evaluation.rows=12", "agreement.rows=10", f"guide={toy_run / 'guide'}"]
    judge.main([*toy, f"run={run}", policy, *asked])
    records = read_jsonl(run / "agreement/agreement.jsonl")
    real = {r["id"]: r["messages"][-1]["content"] for r in read_jsonl(run / "data/heldout.jsonl")}
    check([r for r in records if r["verdict"] != "identical"], real, bert)
    figures = json.loads((run / "agreement/summary.json").read_text())
    assert figures["agreement/rows"] > 0 == figures["agreement/no_verdict"]

    run = tmp_path / "rlaif"
    align.main([*toy, f"run={run}", "method=rlaif", "iterations=1", "evaluation.rows=0"])
    samples = read_jsonl(run / "iteration_0/responses/responses.jsonl")
    real = {r["id"]: r["messages"][-1]["content"] for r in read_jsonl(run / "data/train.jsonl")}
    judged = read_jsonl(run / "iteration_0/judged/judged.jsonl")
    pairs = zip(judged, samples[0::2], samples[1::2], strict=True)
    check([r | {"first": a["response"], "second": b["response"]} for r, a, b in pairs], real, bert)
    assert (run / "iteration_0/policy/model.safetensors").is_file()


def check(records: list[dict[str, Any]], real: dict[str, str], folder: Path) -> None:
    model = EmbeddingModel(folder, CPU)
    columns = [[real[r["id"]] for r in records]]
    columns += [[r[side] for r in records] for side in ("first", "second")]
    vectors = [model.embed(column).double() for column in columns]
    gains = (vectors[0] * (vectors[1] - vectors[2])).sum(dim=1)
    preferences = [r["preference"] for r in records]
    assert preferences == pytest.approx((0.5 + gains / 4).tolist(), abs=1e-6)
    assert len(set(preferences)) > len(preferences) / 2, "texts that are all unknown test nothing"


# --------------------------------------------------------------------------------------- real model


@pytest.fixture(scope="module")
def minilm() -> EmbeddingModel:
    """all-MiniLM-L6-v2, from the folder that $LDALIGN_MINILM names."""
    if not (folder := os.environ.get("LDALIGN_MINILM")):
        pytest.skip("LDALIGN_MINILM names no folder of all-MiniLM-L6-v2 (docs/judges.md)")
    return EmbeddingModel(Path(folder), CPU)


def test_the_real_model(minilm: EmbeddingModel) -> None:
    """The cosines that sentence-transformers' quickstart prints for these three sentences."""
    assert (minilm.longest, minilm.width) == (256, 384)
    weather, sunny = "The weather is lovely today.", "It's so sunny outside!"
    stadium = "He drove to the stadium."
    cosines = 1 - minilm.distance([weather, weather, sunny], [sunny, stadium, stadium])
    assert cosines.tolist() == pytest.approx([0.6660, 0.1046, 0.1411], abs=1e-4)
    rows = rows_of(["The answer is 12: 7 + 5."] * 2)
    wrong, right = "I cannot say.", "7 plus 5 makes 12."
    first, second = EmbeddingJudge(minilm).prefer(rows, [right, wrong], [wrong, right])
    assert first > 0.6 and second == 1 - first
    assert minilm.embed(["word " * 400]).shape == (1, 384) and minilm.cut == 1
