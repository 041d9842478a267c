"""The benchmarks: definitions against lm-eval's, perfect and random models, files, stages."""

import importlib.metadata
import json
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from benchmark_data import RIGHT, TASKS, file_of, make_row
from runs import ROOT

pytest.importorskip("lm_eval", reason="the extra eval is not installed")

import lm_eval.tasks
from lm_eval.api.model import LM
from lm_eval.api.task import ConfigurableTask
from lm_eval.tasks._yaml_loader import load_yaml

from ldalign.evaluation.benchmarks import runner
from ldalign.evaluation.benchmarks.definitions import Benchmark, LocalRow, Rows, names
from ldalign.evaluation.benchmarks.rows import recall_of_four
from ldalign.evaluation.benchmarks.runner import run_benchmark
from ldalign.run.settings import RunConfig
from ldalign.run.stages import benchmarks as benchmarks_stage
from ldalign.system.config import load_config
from ldalign.system.errors import EnvironmentProblem, InputError
from ldalign.system.files import read_jsonl
from ldalign.train import align, evaluate

THEIRS = {
    "arc_challenge": "arc",
    "arc_easy": "arc",
    "truthfulqa_mc1": "truthfulqa",
    "truthfulqa_mc2": "truthfulqa",
}


def write_data(folder: Path, count: int) -> Path:
    for task in TASKS:
        draw = random.Random(task)
        rows = [make_row(task, 100 + i, draw) for i in range(count)]
        (folder / file_of(task)).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("data"), 6)


class Answers(LM):
    """A model that is a function of text."""

    def __init__(self, score: Callable[[str, str], float], answer: Callable[[str], str]) -> None:
        super().__init__()
        self.score, self.answer = score, answer

    def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
        return [(self.score(*request.args), False) for request in requests]

    def loglikelihood_rolling(self, requests: list[Any]) -> list[float]:
        raise NotImplementedError

    def generate_until(self, requests: list[Any]) -> list[str]:
        return [self.answer(request.args[0]) for request in requests]


# ------------------------------------------------------------------------------------------- scores


def test_names() -> None:
    assert tuple(names()) == TASKS


@pytest.mark.parametrize("task", TASKS)
def test_a_model_that_knows_gets_everything_right(task: str, data: Path) -> None:
    """The greedy flag is False for every choice: lm-eval's own MuTual scores
    would be 0.25 or so here.
    """
    perfect = Answers(
        lambda _, text: -0.01 * len(text) if RIGHT in text else -9.0 * len(text),
        lambda context: (
            " so it is " + "\n#### ".join(re.findall(r"Number (\d+)", context)[-1:] * 2)
        ),
    )
    metrics, samples = run_benchmark(perfect, Benchmark(task, data, 0))
    scores = {key: value for key, value in metrics.items() if f"{key}_se" in metrics}
    assert scores and all(value == pytest.approx(1.0) for value in scores.values())
    assert metrics["rows"] == 6 and metrics["shots"] == 0 and metrics["chat_template"] == 0
    assert len(samples) == 6 and all(sample["prompt"] for sample in samples)


CHANCE = {
    "acc": 0.25,
    "acc_norm": 0.25,
    "r@1": 0.25,
    "r@2": 0.5,
    "mrr": 25 / 48,
    "exact_match/strict": 0.0,
    "exact_match/flexible": 0.0,
}


@pytest.mark.parametrize("task", TASKS)
def test_a_model_that_guesses_is_at_chance(task: str, tmp_path: Path) -> None:
    count = 200
    draw = random.Random(1)
    lines = [json.dumps(make_row(task, 100 + i, draw)) for i in range(count)]
    (tmp_path / file_of(task)).write_text("\n".join(lines))
    guess = Answers(
        lambda context, text: draw.gauss(-30, 3) if task != "piqa" else draw.gauss(0, 1),
        lambda _: "7",
    )
    metrics, _ = run_benchmark(guess, Benchmark(task, tmp_path, 0))
    expected = {
        **CHANCE,
        **({"acc": 0.5, "acc_norm": 0.5} if task in ("piqa", "truthfulqa_mc2") else {}),
    }
    # acc_norm favours long texts where log-probs do not grow with them
    known = [key for key in metrics if key in expected and key != "acc_norm"]
    assert known
    for key in known:
        assert metrics[key] == pytest.approx(expected[key], abs=0.11), key
        assert metrics[f"{key}_se"] < 0.04


def test_mutual_ranks() -> None:
    values = [(-3.0, True), (-1.0, False), (-2.0, False), (-9.0, True)]
    for answers, r1, r2, mrr in (
        ("A", 0, 0, 1 / 3),
        ("B", 1, 1, 1),
        ("C", 0, 1, 1 / 2),
        ("D", 0, 0, 1 / 4),
    ):
        assert recall_of_four({"answers": answers}, values) == {"r@1": r1, "r@2": r2, "mrr": mrr}
    assert recall_of_four({"answers": "A"}, [(-1.0, False)] * 4) == {
        "r@1": 0,
        "r@2": 0,
        "mrr": 1 / 4,
    }


# --------------------------------------------------------------------------------- as lm-eval's own


def their_task(task: str, rows: Rows, shots: int) -> ConfigurableTask:
    """lm-eval's own definition over these rows."""
    path = Path(lm_eval.tasks.__file__).parent / THEIRS.get(task, task) / f"{task}.yaml"
    config = load_yaml(path, resolve_func=task in ("hellaswag", "mutual"))
    if task.startswith("truthfulqa"):  # its functions import packages for other tasks
        config.pop("process_results", None)
    config |= {
        "custom_dataset": lambda **_: {"rows": rows, "examples": rows[:shots]},
        "training_split": None,
        "validation_split": None,
        "test_split": "rows",
        "fewshot_split": "examples" if shots else None,
        "fewshot_config": {"sampler": "first_n"},
        "num_fewshot": shots,
    }
    made = ConfigurableTask(config=config)
    made.set_fewshot_seed(1234)
    return made


def requests_of(task: ConfigurableTask) -> list[Any]:
    task.build_all_requests()
    return [instance.args for instance in task.instances]


HUB_HELLASWAG = {
    "activity_label": "Baking",
    "ctx_a": "[header] How to bake [title] Mix",
    "ctx_b": "then the  dough",
    "label": "1",
    "endings": [" [step] Rest.", "is baked [substeps] now  or later.", "waits.", "goes."],
}


@pytest.mark.parametrize("task", TASKS)
def test_prompts_and_verdicts_are_lm_evals(task: str, data: Path, tmp_path: Path) -> None:
    """For the same rows, with two examples in front where the task takes any."""
    lines = (data / file_of(task)).read_text().splitlines()
    if task == "hellaswag":
        lines = [json.dumps({**HUB_HELLASWAG, "label": str(i % 4)}) for i in range(6)]
    if task == "mutual":
        lines[3] = lines[3].replace("is it", "`` she did n't '' ;  is it \\n n't")
    (tmp_path / file_of(task)).write_text("\n".join(lines))
    shots = 0 if task.startswith("truthfulqa") else 2
    ours = Benchmark(task, tmp_path, shots).task()
    rows = Rows(LocalRow(json.loads(line)) for line in lines)
    theirs = their_task(task, rows, shots)
    mine, other = requests_of(ours), requests_of(theirs)[-len(requests_of(ours)) :]
    assert mine == other and mine
    if task in ("mutual", "truthfulqa_mc2"):  # ours by design; a function that is tested by itself
        return
    result = (
        [" so 4.\n#### 103", "103"]
        if task == "gsm8k"
        else [(-1.0 * n, False) for n in (3, 1, 2, 4)]
    )
    for doc, same in zip(
        ours.test_docs(), theirs.test_docs()[shots:] if task != "hellaswag" else [], strict=False
    ):
        size = 1 if task == "gsm8k" else len(ours.doc_to_choice(doc))
        assert ours.process_results(doc, result[:size]) == theirs.process_results(
            same, result[:size]
        )


def test_default_shots_and_versions() -> None:
    shots = {task: Benchmark(task).used_shots for task in TASKS}
    assert shots == {**dict.fromkeys(TASKS, 0), "arc_challenge": 25, "hellaswag": 10, "gsm8k": 5}
    for task in TASKS:
        path = Path(lm_eval.tasks.__file__).parent / THEIRS.get(task, task) / f"{task}.yaml"
        theirs, ours = load_yaml(path, resolve_func=False), Benchmark(task).definition
        assert ours["metadata"]["version"] == theirs["metadata"]["version"]
        for key in (
            "dataset_path",
            "dataset_name",
            "training_split",
            "validation_split",
            "test_split",
        ):
            assert ours.get(key) == theirs.get(key), key
        assert ours.get("generation_kwargs") == theirs.get("generation_kwargs")
        assert ours.get("filter_list") == theirs.get("filter_list")


# -------------------------------------------------------------------------------------- local files


def test_examples_are_never_scored(data: Path, tmp_path: Path) -> None:
    """Without a file of examples the first rows are; with one, it is drawn from
    and every row is scored.
    """
    task = Benchmark("arc_easy", data, 2).task()
    prompts = [context for context, _ in requests_of(task)][::4]
    expected = [["100", "101", str(i)] for i in range(102, 106)]
    assert [re.findall(r"What is (\d+)", prompt) for prompt in prompts] == expected
    draw = random.Random(0)
    (tmp_path / "arc_easy.jsonl").write_text(json.dumps(make_row("arc_easy", 500, draw)))
    examples = [json.dumps(make_row("arc_easy", i, draw)) for i in range(9)]
    (tmp_path / "arc_easy_train.jsonl").write_text("\n".join(examples))
    (prompt, *_), *_ = requests_of(Benchmark("arc_easy", tmp_path, 2).task())
    assert (
        re.findall(r"What is (\d+)", prompt)[2:] == ["500"]
        and len(re.findall("Question", prompt)) == 3
    )
    assert Benchmark("arc_easy", tmp_path, 2).source != Benchmark("arc_easy", tmp_path, 0).source


@pytest.mark.parametrize(
    ("task", "line", "message"),
    [
        (
            "piqa",
            '{"goal": "x", "sol1": "a", "label": 0}',
            "piqa.jsonl:2: not a row of piqa: column 'sol2' is missing",
        ),
        (
            "openbookqa",
            '{"question": "x"}',
            "openbookqa.jsonl:2: .* column 'question_stem' is missing",
        ),
        (
            "piqa",
            '{"goal": "x", "sol1": "a", "sol2": "", "label": 0}',
            "piqa.jsonl:2: .*choices are no list of texts",
        ),
        (
            "piqa",
            '{"goal": "x", "sol1": "a", "sol2": "b", "label": 2}',
            "piqa.jsonl:2: .*the answer 2 is none of 2",
        ),
        ("piqa", "{", "piqa.jsonl:2: not JSON"),
        ("piqa", "[1]", "piqa.jsonl:2: list instead of an object"),
        ("hellaswag", '{"ctx_a": "x"}', "hellaswag.jsonl:2: column 'ctx_b' is missing"),
        (
            "mutual",
            '{"article": "x", "options": ["a"], "answers": "E"}',
            "mutual.jsonl:2: not a row of mutual",
        ),
        (
            "arc_easy",
            '{"question": "x", "choices": {"text": ["a"], "label": ["A"]}, "answerKey": "B"}',
            ":2: not",
        ),
        (
            "truthfulqa_mc1",
            '{"question": "x", "mc1_targets": {"choices": ["a", "b"], "labels": [0, 1]}}',
            ":2: the",
        ),
        (
            "gsm8k",
            '{"question": "x"}',
            "gsm8k.jsonl:2: not a row of gsm8k: column 'answer' is missing",
        ),
    ],
)
def test_bad_rows_are_named(task: str, line: str, message: str, tmp_path: Path) -> None:
    good = json.dumps(make_row(task, 1, random.Random(0)))
    (tmp_path / file_of(task)).write_text(f"{good}\n{line}\n")
    with pytest.raises(InputError, match=message):
        Benchmark(task, tmp_path, 0).task()


def test_what_is_missing_is_named(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(
        InputError, match="benchmarks.tasks: pika: no such benchmark; did you mean piqa?"
    ):
        Benchmark("pika").task()
    with pytest.raises(
        InputError,
        match=r"piqa.jsonl: no such file, for benchmark piqa; "
        r".*benchmarks.data=null",
    ):
        Benchmark("piqa", tmp_path).task()
    with pytest.raises(InputError, match=r"piqa.jsonl: 6 rows are too few for 6 examples"):
        Benchmark("piqa", data, 6).task()

    def offline(*_: object, **__: object) -> None:
        raise ConnectionError("no route to the hub")

    monkeypatch.setattr("datasets.load_dataset", offline)
    with pytest.raises(
        EnvironmentProblem,
        match="benchmark piqa: .*baber/piqa.*no route to the hub.*benchmarks.data",
    ):
        Benchmark("piqa").task()


# ------------------------------------------------------------------------------------------- stages


def arguments(run: Path, cache: Path, data: Path, *more: str) -> list[str]:
    return [
        "--config",
        str(ROOT / "configs/toy.yaml"),
        f"run={run}",
        f"cache={cache}",
        "evaluation.rows=0",
        f"benchmarks.data={data}",
        "benchmarks.shots=1",
        *more,
    ]


def test_finished_tasks_are_kept_when_a_later_one_fails(
    tmp_path: Path,
    data: Path,
    toy_cache: Path,
    in_process: None,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    real, run = runner.run_benchmark, tmp_path / "run"
    tasks = "benchmarks.tasks=[piqa,gsm8k]"

    def fails(model: Any, benchmark: Benchmark, *rest: Any) -> Any:
        if benchmark.name == "gsm8k":
            raise EnvironmentProblem("benchmark gsm8k: gone")
        return real(model, benchmark, *rest)

    monkeypatch.setattr(benchmarks_stage, "run_benchmark", fails)
    with pytest.raises(EnvironmentProblem, match="gsm8k: gone"):
        evaluate.main(arguments(run, toy_cache, data, tasks))
    assert (run / "start/benchmarks/piqa/summary.json").is_file()
    monkeypatch.setattr(benchmarks_stage, "run_benchmark", real)
    evaluate.main(arguments(run, toy_cache, data, tasks))
    said = capfd.readouterr().err
    assert (
        "start/benchmarks/piqa: already done"
    ) in said and "| start | gsm8k | exact_match/strict 0.0" in said
    summary = json.loads((run / "start/benchmarks/piqa/summary.json").read_text())
    assert {
        "acc",
        "acc_se",
        "acc_norm",
        "acc_norm_se",
        "rows",
        "shots",
        "chat_template",
        "version",
    } < summary.keys()
    assert summary["rows"] == 5 and summary["shots"] == 1
    samples = read_jsonl(run / "start/benchmarks/piqa/samples.jsonl")
    assert len(samples) == 5 and len(samples[0]["logprobs"]) == len(samples[0]["choices"]) == 2
    assert all(
        "generated" in row for row in read_jsonl(run / "start/benchmarks/gsm8k/samples.jsonl")
    )
    assert not (run / "start/evaluation").exists()
    with pytest.raises(InputError, match="benchmarks.limit was 'all', now 2"):
        evaluate.main(arguments(run, toy_cache, data, tasks, "benchmarks.limit=2"))


def test_chat_template_and_dry_run(
    tmp_path: Path, data: Path, toy_cache: Path, in_process: None, capfd: pytest.CaptureFixture[str]
) -> None:
    options = ("benchmarks=[mutual]", "benchmarks.chat_template=true", "benchmarks.limit=2")
    evaluate.main(arguments(tmp_path / "run", toy_cache, data, *options, "--dry-run"))
    assert not (tmp_path / "run").exists()
    evaluate.main(arguments(tmp_path / "run", toy_cache, data, *options))
    first = read_jsonl(tmp_path / "run/start/benchmarks/mutual/samples.jsonl")[0]
    assert first["prompt"].startswith("<|im_start|>user\n") and first["prompt"].endswith(
        "<|im_start|>assistant\n"
    )
    assert (
        json.loads((tmp_path / "run/start/benchmarks/mutual/summary.json").read_text())[
            "chat_template"
        ]
        == 1
    )
    (data / "broken").mkdir(exist_ok=True)
    (data / "broken/piqa.jsonl").write_text("{}\n{}\n")
    for more, message in (
        ("benchmarks=[pika]", "did you mean piqa"),
        ("benchmarks=[piqa]", "piqa.jsonl:1: not a row"),
    ):
        with pytest.raises(InputError, match=message):
            evaluate.main(
                arguments(tmp_path / "other", toy_cache, data / "broken", more, "--dry-run")
            )


def test_without_lm_eval(
    tmp_path: Path, data: Path, toy_cache: Path, in_process: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def absent(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(runner.importlib.metadata, "version", absent)
    with pytest.raises(EnvironmentProblem, match=r"pip install 'lm_eval"):
        evaluate.main(arguments(tmp_path / "run", toy_cache, data, "benchmarks=[piqa]"))


def test_align_plans_them_after_every_evaluation() -> None:
    config = load_config(RunConfig, ROOT / "configs/toy.yaml", ["benchmarks=[piqa,mutual]"])
    planned = align.planned(config)
    for name in ("sft", "iteration_0", "iteration_1", "continual_sft"):
        assert {f"{name}/benchmarks/piqa", f"{name}/benchmarks/mutual"} <= set(planned)
