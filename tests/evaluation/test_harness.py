"""The lm-eval adapter against lm-eval's own Hugging Face backend, on one tiny model."""

import json
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import runs
import torch
from benchmark_data import CONTEXTS, LONG, REQUESTS, file_of, instances, make_row

pytest.importorskip("lm_eval", reason="the extra eval is not installed")
transformers = pytest.importorskip("transformers")

from lm_eval.api.model import CacheHook  # noqa: E402
from lm_eval.models.huggingface import HFLM  # noqa: E402

from ldalign.data.tokenizer import load_tokenizer  # noqa: E402
from ldalign.evaluation.benchmarks import harness  # noqa: E402
from ldalign.evaluation.benchmarks.definitions import Benchmark  # noqa: E402
from ldalign.evaluation.benchmarks.harness import HarnessModel, sampling_of  # noqa: E402
from ldalign.evaluation.benchmarks.packing import Scored, plan_trees  # noqa: E402
from ldalign.evaluation.benchmarks.runner import run_benchmark  # noqa: E402
from ldalign.generation.generate import generate_ids  # noqa: E402
from ldalign.generation.sampling import Sampling  # noqa: E402
from ldalign.models.mistral import Mistral  # noqa: E402
from ldalign.models.toy import write_toy_model  # noqa: E402
from ldalign.models.weights import load_model  # noqa: E402
from ldalign.system.distributed import auto_dtype  # noqa: E402
from ldalign.system.errors import InputError, NumericsError  # noqa: E402


def scaled(model: torch.nn.Module) -> torch.nn.Module:
    """Weights so large that predictions differ from token to token."""
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim > 1:
                p.mul_(6.0)
    return model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_toy_model(tmp_path_factory.mktemp("harness") / "toy")


@pytest.fixture(scope="module")
def ours(folder: Path) -> HarnessModel:
    model = scaled(load_model(folder, torch.float32, "cpu"))
    assert isinstance(model, Mistral)
    return HarnessModel(model=model, tokenizer=load_tokenizer(folder), micro_tokens=1024)


@pytest.fixture(scope="module")
def theirs(folder: Path) -> Any:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    return HFLM(pretrained=scaled(model), tokenizer=tokenizer, batch_size=4)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_loglikelihoods(ours: HarnessModel, theirs: Any, capfd: pytest.CaptureFixture[str]) -> None:
    """Shared, empty and cut contexts, continuations of one token and of many,
    some of them greedy.
    """
    requests = instances("loglikelihood", REQUESTS)
    got, expected = ours.loglikelihood(requests), theirs.loglikelihood(requests, disable_tqdm=True)
    assert [flag for _, flag in got] == [flag for _, flag in expected]
    for (mine, _), (other, _) in zip(got, expected, strict=True):
        assert mine == pytest.approx(other, abs=1e-3)
    assert "contexts beyond 512 tokens lose their beginning" in capfd.readouterr().err


def test_greedy_continuations_are_told(ours: HarnessModel, theirs: Any) -> None:
    """In token ids: what the model would say, the same with its last or its first id
    changed, and one id of it.
    """
    prompts = [ours.tok_encode(text) for text in ("The quick", "Say two", "fox")]
    made = generate_ids(ours.model, prompts, ["a", "b", "c"], [], Sampling(5, temperature=0.0), 0)
    requests = []
    for prompt, ids in zip(prompts, (response.ids for response in made), strict=True):
        for changed in (ids, [*ids[:-1], ids[-1] ^ 1], [ids[0] ^ 1, *ids[1:]], ids[:1]):
            requests.append((("", str(changed)), prompt, changed))
    got = ours._loglikelihood_tokens(requests)
    assert [flag for _, flag in got] == [True, False, False, True] * 3
    expected = theirs._loglikelihood_tokens(requests, disable_tqdm=True)
    assert [flag for _, flag in got] == [flag for _, flag in expected]
    assert [value for value, _ in got] == pytest.approx([value for value, _ in expected], abs=1e-3)


def test_bfloat16_is_scored_too(folder: Path) -> None:
    model = load_model(folder, torch.bfloat16, "cpu")
    assert isinstance(model, Mistral)
    lm = HarnessModel(model=model, tokenizer=load_tokenizer(folder))
    values = [value for value, _ in lm.loglikelihood(instances("loglikelihood", REQUESTS[:5]))]
    assert values[3] < 0 and values[2] < values[0] < 0


RANKS_SCRIPT = """
import json, sys
from pathlib import Path
from ldalign.system import distributed, exits
from test_harness import CONTEXTS, REQUESTS, instances
from ldalign.evaluation.benchmarks.harness import HarnessModel

def main(argv):
    lm = HarnessModel(policy=argv[0], dtype="float32", device="cpu", micro_tokens=1024)
    kwargs = {"max_gen_toks": 6, "until": []}
    result = [lm.loglikelihood(instances("loglikelihood", REQUESTS)),
              lm.generate_until(instances("generate_until", [(text, kwargs) for text in CONTEXTS]))]
    Path(argv[1] + str(distributed.rank())).write_text(json.dumps(result))
    distributed.stop()

exits.run(main)
"""


@pytest.mark.slow
def test_two_ranks_have_what_one_has(folder: Path, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    here = f"import sys\nsys.path.insert(0, {str(Path(__file__).parent)!r})\n"
    script.write_text(here + RANKS_SCRIPT)
    done = runs.run_script(script, folder, tmp_path / "result", ranks=2)
    assert done.returncode == 0, done.stderr
    first, second = (json.loads((tmp_path / f"result{rank}").read_text()) for rank in (0, 1))
    assert first == second
    lm = HarnessModel(policy=str(folder), dtype="float32", device="cpu")
    kwargs = {"max_gen_toks": 6, "until": []}
    assert first[1] == lm.generate_until(
        instances("generate_until", [(text, kwargs) for text in CONTEXTS])
    )
    for (value, flag), (mine, my_flag) in zip(
        first[0], lm.loglikelihood(instances("loglikelihood", REQUESTS)), strict=True
    ):
        assert flag == my_flag and value == pytest.approx(mine, abs=1e-3)


def test_rolling(ours: HarnessModel, theirs: Any) -> None:
    requests = instances("loglikelihood_rolling", [("a short text",), (LONG,)])
    assert ours.loglikelihood_rolling(requests) == pytest.approx(
        theirs.loglikelihood_rolling(requests, disable_tqdm=True), rel=1e-5
    )


def test_generation(ours: HarnessModel, theirs: Any) -> None:
    """Equal texts, also where a stop string spans tokens: it is cut out of what
    is generated without one.
    """
    free = ours.generate_until(
        instances("generate_until", [(c, {"max_gen_toks": 16}) for c in CONTEXTS])
    )
    assert all(free)
    stops = [text[3:6] for text in free]
    for until in ([], *([stop] for stop in stops), stops):
        kwargs = {"until": until, "max_gen_toks": 16, "do_sample": False, "temperature": 0.0}
        got = ours.generate_until(
            instances("generate_until", [(c, dict(kwargs)) for c in CONTEXTS])
        )
        requests = instances(
            "generate_until", [(c, {**kwargs, "until": list(until)}) for c in CONTEXTS]
        )  # it adds one
        assert got == theirs.generate_until(requests, disable_tqdm=True)
        assert all(stop not in text for stop in until for text in got)
    assert any(len(ours.ids_of.encode(stop)) > 1 for stop in stops)


def test_texts_become_ids_as_theirs(ours: HarnessModel, theirs: Any) -> None:
    texts = ["plain", " space", "<|im_start|>user\nHi<|im_end|>\n", "Über\n\nnaïve"]
    for text in texts:
        assert ours.tok_encode(text) == theirs.tok_encode(text)
    assert (
        ours.prefix_token_id == theirs.prefix_token_id and ours.eot_token_id == theirs.eot_token_id
    )
    history = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes"}]
    for prompt in (True, False):
        messages = history[:1] if prompt else history
        rendered = ours.apply_chat_template(messages, add_generation_prompt=prompt)
        assert rendered == theirs.apply_chat_template(messages, add_generation_prompt=prompt)
    assert (
        ours.chat_template(True) == theirs.tokenizer.chat_template
        and ours.chat_template(False) is None
    )


def test_one_bos(zephyr_folder: Path) -> None:
    tokenizer = load_tokenizer(zephyr_folder)
    bos = tokenizer.bos_id
    ids = tokenizer.encode_rendered("Hi there")
    assert ids[0] == bos and ids.count(bos) == 1
    assert tokenizer.encode_rendered("<s>Hi there").count(bos) == 1
    assert tokenizer.encode_rendered("Hi there", add_bos=False) == ids[1:]


def test_contexts_are_computed_once() -> None:
    """Four choices of one context, and a long beginning that many contexts share;
    what is alone stays alone.
    """
    context = tuple(range(50))
    (tree,) = plan_trees([Scored(context, (n, 1)) for n in range(4)], 1000)
    assert tree.tokens == 50 + 4
    few = [Scored((*context, 90 + row, 7), (n, 1)) for row in range(5) for n in range(4)]
    (tree,) = plan_trees(few, 1000)
    assert tree.prefix == context and tree.tokens == 50 + 20 * 3
    assert sorted(tree.members) == list(range(20))
    assert all(tree.tokens <= 100 for tree in plan_trees(few, 100))
    apart = plan_trees([Scored((row,) * 30, (n, 1)) for row in range(3) for n in range(2)], 1000)
    assert [tree.tokens for tree in apart] == [32] * 3


def test_finished_requests_go_to_the_cache(ours: HarnessModel) -> None:
    seen = []

    class Hook(CacheHook):
        def add_partial(self, attr: str, req: Any, res: Any) -> None:
            seen.append((attr, req, res))

    ours.set_cache_hook(Hook(None))
    results = ours.loglikelihood(instances("loglikelihood", REQUESTS[:3]))
    ours.set_cache_hook(CacheHook(None))
    assert sorted((req, res) for _, req, res in seen) == sorted(
        zip(REQUESTS[:3], results, strict=True)
    )


def test_generation_settings() -> None:
    assert sampling_of({"until": "x", "temperature": 0.7, "do_sample": False}).temperature == 0
    made = sampling_of(
        {
            "until": ["", "x"],
            "temperature": 0.7,
            "do_sample": True,
            "top_p": 0.9,
            "max_new_tokens": 9,
        }
    )
    assert (made.temperature, made.top_p, made.max_new_tokens, made.stop) == (0.7, 0.9, 9, ("x",))
    assert sampling_of({}).max_new_tokens == 256
    with pytest.raises(InputError, match="num_beams: not offered"):
        sampling_of({"num_beams": 4})


def test_bad_arguments(ours: HarnessModel) -> None:
    with pytest.raises(InputError, match="pretrained: unknown"):
        HarnessModel(pretrained="x")
    with pytest.raises(InputError, match="policy=FOLDER is missing"):
        HarnessModel()
    with pytest.raises(InputError, match="continuation has no tokens"):
        ours.loglikelihood(instances("loglikelihood", [("context", "")]))


def test_dtype_auto(folder: Path) -> None:
    lm = HarnessModel(policy=str(folder), dtype="auto", device="cpu")
    assert lm.model.output_weight.dtype == auto_dtype(torch.device("cpu"))
    with pytest.raises(InputError, match="dtype=int8: expected auto, bfloat16 or float32"):
        HarnessModel(policy=str(folder), dtype="int8", device="cpu")


def test_without_a_gpu_it_goes_on_on_the_cpu(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """The harness's command asks for cuda:0 whatever the machine."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    lm = HarnessModel(policy=str(folder), dtype="float32", device="cuda:0")
    assert lm.device == torch.device("cpu")
    assert "device=cuda:0: there is no GPU here; going on on the CPU" in capfd.readouterr().err
    HarnessModel(policy=str(folder), dtype="float32", device="cpu")
    assert "WARNING" not in capfd.readouterr().err
    for other in ("cuda:7", "mps"):
        with pytest.raises(InputError, match=f"device={other}: expected auto, cpu or cuda"):
            HarnessModel(policy=str(folder), device=other)


COLLAPSES = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{{ m['content'] | replace('  ', ' ') | upper }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def test_a_template_that_rewrites_the_turn_to_go_on_from(folder: Path) -> None:
    """Spaces collapsed, letters raised: where the turn ends cannot be told."""
    lm = HarnessModel(
        model=load_model(folder, torch.float32, "cpu"),  # type: ignore[arg-type]
        tokenizer=load_tokenizer(folder, template=COLLAPSES),
    )
    history = [
        {"role": "user", "content": "Two  and two?"},
        {"role": "assistant", "content": "It  is"},
    ]
    assert lm.apply_chat_template(history[:1]).endswith(
        "TWO AND TWO?<|im_end|>\n<|im_start|>assistant\n"
    )
    with pytest.raises(
        InputError,
        match="chat template: rewrites the turn 'It  is' that the answer goes on from",
    ):
        lm.apply_chat_template(history, add_generation_prompt=False)
    last = [history[0], {"role": "assistant", "content": "41"}]
    assert lm.apply_chat_template(last, add_generation_prompt=False).endswith("\n41")


def test_a_model_that_overflows_names_the_row(folder: Path) -> None:
    """Log-probs, whole texts, answers: exit code 4, and nothing of it in the harness's cache."""
    model = load_model(folder, torch.float32, "cpu")
    assert isinstance(model, Mistral)
    with torch.no_grad():
        model.model.norm.weight.fill_(3e38)
    lm = HarnessModel(model=model, tokenizer=load_tokenizer(folder))
    seen: list[Any] = []

    class Hook(CacheHook):
        def add_partial(self, attr: str, req: Any, res: Any) -> None:
            seen.append(res)

    lm.set_cache_hook(Hook(None))
    named = "'some task, row 1'"
    for kind, arguments in (
        ("loglikelihood", ("a", " b")),
        ("loglikelihood_rolling", ("a b",)),
        ("generate_until", ("a", {"max_gen_toks": 3, "until": []})),
    ):
        (request,) = instances(kind, [arguments])
        request.task_name, request.doc_id = "some task", 1
        with pytest.raises(NumericsError, match=named):
            getattr(lm, kind)([request])
    assert not seen


@pytest.mark.slow
def test_the_command_ends_in_one_line(folder: Path, tmp_path: Path) -> None:
    """lm-eval's own command with our model: on the CPU by itself, its table; else one last line."""
    (tmp_path / "rows.jsonl").write_text('{"q": "Q?", "a": "yes", "b": "no"}\n')
    (tmp_path / "mine.yaml").write_text(
        "task: mine\ndataset_path: json\ntest_split: test\noutput_type: multiple_choice\n"
        f"dataset_kwargs: {{data_files: {{test: {tmp_path}/rows.jsonl}}}}\n"
        "doc_to_text: '{{q}}'\ndoc_to_target: 0\ndoc_to_choice: ['{{a}}', '{{b}}']\n"
    )
    module = "ldalign.evaluation.benchmarks.harness"
    env = runs.one_thread() | {"HF_HOME": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"}
    start = [sys.executable, "-m", module, "--model", "ldalign", "--include_path", str(tmp_path)]

    def run(model: str, task: str) -> subprocess.CompletedProcess[str]:
        more = ["--model_args", model, "--tasks", task]
        return subprocess.run([*start, *more], capture_output=True, text=True, env=env)

    good = run(f"policy={folder},dtype=auto", "mine")
    assert good.returncode == 0 and "mine" in good.stdout, good.stderr
    bad = run(f"policy={folder}", "nonesuch")
    assert bad.returncode == 2 and "Traceback" not in bad.stderr
    last = bad.stderr.splitlines()[-1]
    assert last.startswith("ldalign: error: lm-eval: Tasks not found: nonesuch")


def test_unknown_model_args_are_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["harness"])
    argv = ["--model", "ldalign", "--model_args", f"policy={folder},size=3", "--tasks", "piqa"]
    with pytest.raises(InputError, match="model_args: size: unknown"):
        harness.main(argv)


def test_registered(folder: Path) -> None:
    from lm_eval.api.registry import get_model

    lm = get_model("ldalign").create_from_arg_string(
        f"policy={folder},dtype=float32", {"device": "cpu"}
    )
    assert lm.loglikelihood(instances("loglikelihood", [("a", " b")]))[0][0] < 0


@pytest.mark.parametrize("task", ["hellaswag", "truthfulqa_mc2", "mutual", "gsm8k"])
def test_scores_of_tasks_are_those_of_the_other_backend(
    task: str, ours: HarnessModel, theirs: Any, tmp_path: Path
) -> None:
    """One task of each kind: log-probs and generated texts, verdicts and metrics of a few rows."""
    rows = [make_row(task, 100 + i, random.Random(i)) for i in range(4)]
    (tmp_path / file_of(task)).write_text("\n".join(map(json.dumps, rows)))
    benchmark = Benchmark(task, tmp_path, 0 if task.startswith("truthfulqa") else 1)
    (mine, my_rows), (other, other_rows) = (run_benchmark(lm, benchmark) for lm in (ours, theirs))
    assert mine == pytest.approx(other, abs=1e-4)
    for row, same in zip(my_rows, other_rows, strict=True):
        assert row.pop("logprobs", []) == pytest.approx(same.pop("logprobs", []), abs=1e-3)
        assert row["prompt"] == same["prompt"] and row.get("generated") == same.get("generated")
        assert row.get("greedy") == same.get("greedy")
