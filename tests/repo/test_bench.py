"""The benchmarks: every script runs, all sides do the same work, costs and parts are right."""

import importlib
import importlib.util
import json
import math
import os
import subprocess
import sys
import venv
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from runs import ROOT
from torch.profiler import ProfilerActivity, profile, record_function
from torch.utils.flop_counter import FlopCounterMode

from ldalign.models.mistral import MistralConfig
from ldalign.models.toy import CONFIG, random_mistral

BENCH = ROOT / "bench"


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Imports a module of bench/, and forgets all of them after the test: the names are common."""
    for folder in (BENCH / "peers", BENCH):
        monkeypatch.syspath_prepend(str(folder))
    before = set(sys.modules)
    yield importlib.import_module
    for name in set(sys.modules) - before:
        if Path(getattr(sys.modules[name], "__file__", None) or "/").is_relative_to(BENCH):
            del sys.modules[name]


def run_bench(
    script: str, *arguments: object, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Runs a benchmark as `make bench` does, its own folder on its import path, on one thread."""
    clean = {k: v for k, v in os.environ.items() if k not in ("PYTHONSAFEPATH", "PYTHONPATH")}
    command = [sys.executable, str(BENCH / script), *map(str, arguments)]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        env=clean | {"OMP_NUM_THREADS": "1"} | environment,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done


# ------------------------------------------------------------------------------------------ scripts


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "more", "name"),
    [
        ("step.py", ["--precisions", "bfloat16"], "step-cpu"),
        ("growth.py", [], "growth-cpu"),
        ("generate.py", [], "generate-cpu"),
        ("drafts.py", [], "drafts-cpu"),
        ("int8.py", [], "int8"),
        ("packed_file.py", [], "packed-file"),
        ("end_to_end.py", [], "end-to-end-cpu"),
        pytest.param("compile.py", [], "compile-cpu", marks=pytest.mark.long),
    ],
)
def test_our_side_of_every_benchmark_runs(
    tmp_path: Path, script: str, more: list[str], name: str
) -> None:
    run_bench(script, "--small", "--no-peers", "--results", tmp_path, *more)
    result = json.loads((tmp_path / f"{name}.json").read_text())
    page = (tmp_path / f"{name}.md").read_text()
    assert result["small"] and "Made with --small" in page and "not run: exit code" not in page
    assert {p.name for p in tmp_path.iterdir()} == {f"{name}.json", f"{name}.md"}


@pytest.mark.slow
def test_profile_accounts_for_all_the_time(tmp_path: Path) -> None:
    run_bench("profile_train.py", "--small", "--results", tmp_path)
    result = json.loads((tmp_path / "profile-cpu.json").read_text())
    training, reference, guide, generation = result["sections"]
    for section, busy in (
        (training, ("attention", "MLP", "head", "elementwise", "optimizer")),
        (reference, ("attention", "MLP", "head", "elementwise")),
        (guide, ("attention", "MLP", "optimizer")),
        (generation, ("attention", "MLP", "head", "elementwise", "sampler")),
    ):
        seconds = {part["part"]: part["seconds"] for part in section["parts"]}
        assert all(seconds[part] > 0 for part in busy), seconds
        # More than all the time is there where another process had the core within a part.
        assert 0.8 < sum(seconds.values()) / section["seconds"] < 10, section["name"]
    assert {p.name for p in tmp_path.glob("*.json.gz")} == {
        f"trace-{section['name']}-cpu.json.gz" for section in result["sections"]
    }


@pytest.mark.slow
def test_startup_measures_whole_commands(tmp_path: Path) -> None:
    """Help loads no torch, and a first token cannot come before torch does."""
    run_bench("startup.py", "--small", "--results", tmp_path)
    rows = json.loads((tmp_path / "startup-cpu.json").read_text())["rows"]
    by_name = {row["name"]: row for row in rows}
    assert by_name["python -c 'import torch'"]["time_ratio"] == 1.0
    assert all(row["median_seconds"] > 0 for row in rows) and len(rows) == 5


def test_logits_in_bfloat16_cost_what_float32_ones_do_not(tmp_path: Path) -> None:
    run_bench("logit_rounding.py", "--small", "--results", tmp_path)
    rows = json.loads((tmp_path / "logit-rounding.json").read_text())["rows"]
    assert len(rows) == 2 and all(row["float32"]["deviation"] < 1e-3 for row in rows)
    assert all(row[part]["deviation"] > 0.01 for row in rows for part in ("bfloat16", "hidden"))


def test_company_changes_what_bfloat16_rounds(tmp_path: Path) -> None:
    """Beside float32 a log-prob is off, and by less than the check of step 0 refuses."""
    run_bench("company.py", "--small", "--results", tmp_path)
    found = json.loads((tmp_path / "company.json").read_text())["found"]
    assert [entry["dtype"] for entry in found] == ["float32", "bfloat16", "bfloat16"]
    assert found[2]["other"] == "float32" and 0 < found[2]["typical"] <= found[2]["most"] < 1


def test_benchmarks_are_chosen_by_name() -> None:
    done = subprocess.run(
        [sys.executable, str(BENCH / "run.py"), "--only", "stepp"], capture_output=True, text=True
    )
    assert done.returncode == 2 and "--only stepp: choose from kernels, step" in done.stderr


def test_the_compile_matrix_shows_the_worst_shape(bench: Any) -> None:
    made = importlib.import_module("ldalign.kernels.compile_check").Compiled
    few, many = (
        made(
            "rope",
            version,
            90,
            "bf16",
            4,
            3,
            registers,
            spilled,
            0,
            1024,
            {"mma": mma},
            False,
            [],
            {},
        )
        for version, registers, spilled, mma in (("3.6.0", 48, 0, 12), ("3.6.0", 40, 8, 0))
    )
    other = made("rope", "3.9.0", 90, "bf16", 4, 3, 47, 0, 0, 0, {"mma": 7}, False, [], {})
    matrix = bench("compile_matrix")
    rows = matrix.summary([few, many, other])
    line = matrix.render({"rows": rows, "problems": []})[-3]
    assert line == "| rope | bf16 | sm_90 | 48 / 8 / 1.0 | 47 / 0 / 0.0 | mma 7 |"
    assert rows[0]["shapes"] == 2 and rows[0]["instructions"] == {"mma": 12}


# ----------------------------------------------------------------------------- all do the same work


@pytest.mark.slow
def test_the_padded_loop_trains_on_the_same_loss(tmp_path: Path, toy_cache: Path) -> None:
    """Float32, one model folder, the same pairs in the same order: the losses of the
    first step are one number.
    """
    pytest.importorskip("transformers")
    run_bench(
        "step.py",
        "--policy",
        "toy",
        "--cache",
        toy_cache,
        "--lengths",
        "short",
        "--repeat",
        1,
        "--batch",
        2,
        "--precisions",
        "float32",
        "--results",
        tmp_path,
        LDALIGN_PEER_TRANSFORMERS=sys.executable,
    )
    ours, padded = json.loads((tmp_path / "step-cpu.json").read_text())["tables"][0]["rows"]
    assert padded["first_loss"] == pytest.approx(ours["first_loss"], rel=1e-4)
    assert padded["time_ratio"] > 0 and ours["time_ratio"] == 1.0


@pytest.mark.slow
def test_the_padded_guide_does_the_same_work(tmp_path: Path) -> None:
    """Float32, one guide folder, the same pairs, nothing drawn by chance: both measure the same
    distances, of a policy's tower and of a GPT-2's, and start at the same loss.
    """
    run_bench(
        "guide.py", "--small", "--results", tmp_path, LDALIGN_PEER_TRANSFORMERS=sys.executable
    )
    result = json.loads((tmp_path / "guide-cpu.json").read_text())
    policy, *guides = result["steps"]["rows"]
    assert policy["time_ratio"] == 1.0 and len(guides) == 2
    for guide in guides:  # the toy knows nothing, and no latent says anything yet
        # ln 2 a response for the contrast, ten times, over some 30 tokens each
        assert 0.1 < guide["first_loss"] - 2 * math.log(512) < 0.4
        assert guide["time_ratio"] > 0 < guide["seconds_per_token"]
    (training,), distances = result["training"], result["distances"]
    assert [entry["guide"] for entry in distances] == ["policy", "toy"]
    assert all(entry["ldalign"]["median_seconds"] > 0 for entry in (training, *distances))
    pytest.importorskip("transformers")
    assert all(entry["largest_relative_difference"] < 1e-4 for entry in distances)
    ours, theirs = training["ldalign"]["first_loss"], training["peer"]["first_loss"]
    assert theirs == pytest.approx(ours, rel=1e-5)
    assert all(entry["time_ratio"] > 0 for entry in (training, *distances))


@pytest.mark.long
def test_a_checkout_is_measured_against_itself(tmp_path: Path) -> None:
    run_bench("before.py", ROOT, "--small", "--rounds", 1, "--only", "guide", "--results", tmp_path)
    ratios = json.loads((tmp_path / "before-cpu.json").read_text())["ratios"]
    assert set(ratios) == {"guide training", "guide distance", "new guide's training"}
    assert all(ratio > 0 for (ratio,) in ratios.values())


def test_ours_trains_in_the_order_given(bench: Any) -> None:
    pairs = bench("work").make_pairs(bench("work").LENGTHS["short"], 7, 100)
    ours = bench("ours")
    laid = ours.in_train_order(pairs)
    batches = importlib.import_module("ldalign.training.batches")
    taken = [
        laid[i].prompt
        for _, batch in batches.global_batches(7, 3, 1, ours.SEED, ours.STAGE)
        for i in batch
    ]
    assert taken == [pair["prompt"] for pair in pairs]


def test_peers_are_chosen_by_environment() -> None:
    command = [sys.executable, str(BENCH / "generate.py"), "--peers", "vllm,lama"]
    clean = {k: v for k, v in os.environ.items() if k not in ("PYTHONSAFEPATH", "PYTHONPATH")}
    done = subprocess.run(command, capture_output=True, text=True, env=clean)
    assert done.returncode == 2
    assert "--peers lama: choose from ctranslate2, llamacpp, openvino, tr" in done.stderr


def test_an_engine_has_all_that_it_reads(bench: Any) -> None:
    """Every peer has its script and pins, one that reads GGUF files a file for each of its tables;
    and one that reads files has none of random weights.
    """
    generate, environments = bench("generate"), bench("environments")
    for peer in generate.PEERS.values():
        assert (BENCH / "peers" / peer.script).is_file()
        assert environments.requirements(peer.environment).is_file()
        assert not peer.ggufs or [dtype for dtype, _ in peer.ggufs] == list(peer.dtypes)
        if peer.cpu:
            said = generate.measure_peer({"folder": None, "dtype": "bfloat16"}, peer)
            assert said == {"skipped": "it reads a model's files, and these weights are random"}


def test_an_engine_reads_the_file_of_the_table(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    generate = bench("generate")
    asked = []
    monkeypatch.setattr(
        generate.common, "measure_or_say", lambda script, job, *_: asked.append((script, job))
    )
    job = {"folder": "policy", "ggufs": {kind: f"{kind}.gguf" for kind in ("f32", "bf16", "q8_0")}}
    for name, dtype in (
        ("llama.cpp", "float32"),
        ("llama.cpp", "bfloat16"),
        ("llama.cpp, 8 bits", "bfloat16"),
        ("CTranslate2, 8 bits", "bfloat16"),
    ):
        generate.measure_peer({**job, "dtype": dtype}, generate.PEERS[name])
    assert [(script, job.get("gguf"), job["task"]) for script, job in asked] == [
        ("peers/llama_cpp_engine.py", "f32.gguf", "generation"),
        ("peers/llama_cpp_engine.py", "bf16.gguf", "generation"),
        ("peers/llama_cpp_engine.py", "q8_0.gguf", "generation"),
        ("peers/ctranslate2_engine.py", None, "eight_bits"),
    ]


def test_the_page_names_the_engines_settings_once(bench: Any) -> None:
    generate = bench("generate")
    side = {"tokens_per_second": 9.0, "time_ratio": 2.0, "first": None, "peak_gib": 1.0}
    side |= {"others": 0.0}
    sides = {
        "ldalign": side,
        "engine": {**side, "settings": "1.0; one batch"},
        "engine" + generate.BESIDE: {**side, "settings": "1.0; one batch"},
        "missing": {"skipped": "no network"},
    }
    table = {"rows": 1, "dtype": "float32", "sides": sides, "limits": {"reading": 100.0}}
    said = {"device": "cpu", "shape": None, "policy": "toy", "new_tokens": 8}
    lines = generate.render({**said, "tables": [table, {**table, "rows": 8}]})
    assert [line for line in lines if "one batch" in line and line.startswith("- ")] == [
        "- engine: 1.0; one batch"
    ]


def test_a_worker_holds_no_torch_that_its_engine_does_not_use() -> None:
    code = "import sys, worker; print('torch' in sys.modules, worker.peak_gib('cpu') < 0.1)"
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(BENCH / "peers")},
    )
    assert done.stdout.split() == ["False", "True"], done.stderr


def test_growth_leaves_out_what_would_not_fit(bench: Any) -> None:
    growth = bench("growth")
    said = growth.measure_side(growth.SIDES[0], {}, 32, {"ldalign": (16, 1e6)}, "cpu")
    assert said["skipped"].startswith("needs up to 2000000 GiB, ")


# ----------------------------------------------------------------------------------- whole commands


def test_a_side_is_watched_with_all_its_processes(bench: Any, tmp_path: Path) -> None:
    """Its time belongs to the stage that it said last, its memory is that of its children too."""
    script = bench("end_to_end")
    child = "import time; held = bytearray(200 * 2**20); time.sleep(0.6)"
    first = (
        "import subprocess, sys, time; time.sleep(0.3); print('stage: training', flush=True); "
        f"held = bytearray(150 * 2**20); subprocess.run([sys.executable, '-c', {child!r}]); "
        "print('stage: rest'); print('a word of its own')"
    )
    second = "import time; time.sleep(0.3)"
    found = script.watch(
        [
            script.Command([sys.executable, "-c", first]),
            script.Command([sys.executable, "-c", second], "hand-over"),
        ],
        tmp_path,
    )
    assert set(found["stages"]) == {"rest", "training", "hand-over"}
    assert found["stages"]["training"] > 0.6 and found["stages"]["rest"] > 0.3
    assert found["stages"]["hand-over"] > 0.3
    assert sum(found["stages"].values()) == pytest.approx(found["seconds"], abs=0.3)
    assert 350 < found["peak_gib"] * 1024 < 450


def test_a_side_that_fails_says_why(
    bench: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = bench("end_to_end")
    bad = script.Command([sys.executable, "-c", "raise SystemExit('no such thing')"])
    side = script.Side("somebody", lambda work, out: [bad], ())
    monkeypatch.setitem(script.SIDES, "trl", side)
    found = {"ldalign": {"seconds": 2.0, "peak_gib": 1.0, "user_lines": 1}}
    found["trl"] = script.measure_side("trl", None, tmp_path / "trl")
    assert found["trl"]["skipped"].endswith("exit code 1: no such thing")
    script.compare(found)
    assert found["ldalign"]["time_ratio"] == 1.0 and set(found["trl"]) == {"skipped"}
    monkeypatch.setitem(script.SIDES, "ldalign", side)
    with pytest.raises(script.EnvironmentProblem, match="ldalign failed: .*no such thing"):
        script.measure_side("ldalign", None, tmp_path / "ldalign")


def test_lines_of_code_are_counted(bench: Any, tmp_path: Path) -> None:
    script = bench("end_to_end")
    (tmp_path / "some.py").write_text(
        '''"""What it does.

Not code.
"""

import sys  # one

# a comment


def name(
    one: int,
) -> str:
    """Not code."""
    text = """two
lines"""
    print("stage: training", flush=True)
    return text
'''
    )
    assert script.code_lines(tmp_path / "some.py") == 7
    assert script.leaves({"a": 1, "b": {"c": 2, "d": {"e": 3}}, "f": [4, 5]}) == 4


def test_rows_of_text_have_the_lengths_drawn(bench: Any, tmp_path: Path) -> None:
    """But for the few tokens that merge, or are spaces, where a text is cut."""
    script, lengths = bench("end_to_end"), bench("work").LENGTHS["gsm8k"]
    toy = importlib.import_module("ldalign.models.toy").write_toy_model(tmp_path / "toy")
    tokenizer = importlib.import_module("ldalign.data.tokenizer").load_tokenizer(toy)
    rows = {}
    for split in ("train", "heldout"):
        script.write_rows(tmp_path / split, tokenizer, "gsm8k", 40, split)
        rows[split] = list(map(json.loads, (tmp_path / split).read_text().splitlines()))
    prompts = [{row["prompt"] for row in rows[split]} for split in rows]
    assert len(prompts[0]) == len(prompts[1]) == 40 and not prompts[0] & prompts[1]
    dice = script.random.Random("0/gsm8k")
    for row in rows["train"]:
        prompt, response, _ = lengths.draw(dice)
        assert abs(len(tokenizer.encode(row["prompt"])) + lengths.template - prompt) <= 3
        assert abs(len(tokenizer.encode(row["response"])) - response) <= 3


# -------------------------------------------------------------------------------------------- pairs


def test_pairs_have_the_lengths_of_gsm8k(bench: Any) -> None:
    """Means, 95th percentiles and correlation of 2,500 rows of GSM8K, as measured
    (bench/work.py).
    """
    work = bench("work")
    pairs = work.make_pairs(work.LENGTHS["gsm8k"], 2500, 1000)
    prompt, real, generated = (
        np.array([len(p[name]) for p in pairs]) for name in ("prompt", "real", "generated")
    )
    assert prompt.mean() == pytest.approx(90, rel=0.03) and np.percentile(
        prompt, 95
    ) == pytest.approx(132, rel=0.05)
    for response in (real, generated):
        assert response.mean() == pytest.approx(124, rel=0.03)
        assert np.percentile(response, 95) == pytest.approx(228, rel=0.06)
        assert np.corrcoef(np.log(prompt), np.log(response))[0, 1] == pytest.approx(0.54, abs=0.06)
    assert pairs[:5] == work.make_pairs(work.LENGTHS["gsm8k"], 5, 1000)


def test_what_is_said_of_the_pairs(bench: Any) -> None:
    """Two pairs of (2, 3, 1) and (1, 1, 4) tokens: 12 in all, 3 of them
    prompt; padded, 4 rows of 5.
    """
    pair = {"prompt": [1] * 2, "real": [1] * 3, "generated": [1]}
    other = {"prompt": [1], "real": [1], "generated": [1] * 4}
    said = bench("work").describe([[pair, other]])
    assert said == {
        "pairs": 2,
        "tokens_per_pair": 6,
        "prompt_share": 0.25,
        "padded_over_packed": 20 / 12,
    }
    assert bench("work").tokens_of([bench("work").even_pair(128, 100)]) == 128


# -------------------------------------------------------------------------------------------- costs


def test_costs_count_the_products_that_a_step_multiplies(bench: Any) -> None:
    """Against torch's counter over a real forward and backward, and the mask counted one by one."""
    work = bench("work")
    pair = {"prompt": [3] * 5, "real": [4] * 4, "generated": [5] * 3}
    shape, N, M = work.Shape.of(CONFIG), 12, 7
    model = random_mistral(MistralConfig.from_json(CONFIG, "toy"), 0)
    assert shape.weights == sum(p.numel() for p in model.parameters())
    with FlopCounterMode(display=False) as counter:
        model(
            torch.zeros(1, N, dtype=torch.int64),
            None,
            lambda hidden, weight: (hidden[:M] @ weight.T).sum(),
        ).backward()
    products = counter.get_flop_counts()["Global"][torch.ops.aten.mm]
    seen = (
        sum(i + 1 for i in range(5))
        + sum(5 + i + 1 for i in range(4))
        + sum(5 + i + 1 for i in range(3))
    )
    scores = 3 * shape.layers * 4 * shape.H * shape.E * seen
    assert work.step_flops(shape, [pair]) == products + scores


def test_scoring_is_a_third_of_a_step(bench: Any) -> None:
    """Its products and scores; the elementwise work of one forward is less than half."""
    work = bench("work")
    shape = work.Shape.of(CONFIG)
    pairs = [{"prompt": [1] * 5, "real": [1] * 4, "generated": [1] * 3}]
    scored, step = work.scoring_costs(shape, pairs, 2), work.step_costs(shape, pairs, 2, 0)
    for part in ("attention", "MLP", "head"):
        assert 3 * scored[part].flops == pytest.approx(step[part].flops)
        assert 3 * scored[part].bytes == pytest.approx(step[part].bytes)
    assert scored["elementwise"].flops < step["elementwise"].flops / 2


def test_generation_reads_the_weights_once_a_token(bench: Any) -> None:
    work = bench("work")
    shape = work.Shape.of(CONFIG)
    few, more = (work.generation_costs(shape, [4, 4], tokens, 2)["MLP"] for tokens in (2, 3))
    weights = shape.layers * sum(i * o for i, o in shape.mlp_products)
    rows = shape.layers * 2 * sum(i + o for i, o in shape.mlp_products)
    assert more.bytes - few.bytes == 2 * (weights + rows)
    assert more.flops - few.flops == 2 * 2 * weights


# -------------------------------------------------------------------------------------- attribution


class MLP(torch.nn.Module):
    """Named as the part it is put into."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(64, 64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x @ self.weight).tanh()


def test_the_backward_belongs_to_its_forward(bench: Any) -> None:
    script: ModuleType = bench("profile_train")
    model = torch.nn.Sequential(MLP())
    script.put_ranges(model)
    x = torch.ones(8, 64, requires_grad=True)
    with profile(activities=[ProfilerActivity.CPU]) as profiler, record_function(script.WHOLE):
        model((x * 2.0).sigmoid()).sum().backward()
    events = profiler.events()
    forward = script.forward_parts(events)
    parts = {e.name: script.part_of(e, forward) for e in events}
    assert parts["aten::tanh"] == parts["TanhBackward0"] == parts["aten::tanh_backward"] == "MLP"
    assert (
        parts["aten::sigmoid"]
        == parts["SigmoidBackward0"]
        == parts["aten::sigmoid_backward"]
        == "other"
    )
    seconds = script.times_by_part(events, False)
    assert set(seconds) == {"MLP", "other", "idle"} and all(value > 0 for value in seconds.values())


# ------------------------------------------------------------------------------------- environments


def test_a_peer_whose_environment_cannot_be_made_is_a_row_that_says_so(
    bench: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    environments, common = bench("environments"), bench("common")
    (tmp_path / "requirements").mkdir()
    (tmp_path / "requirements/bench-nobody.txt").write_text("nobody==1.0\n")
    tried = []

    def fail(*_: object) -> None:
        tried.append(1)
        raise subprocess.CalledProcessError(
            1, "pip", stderr="ERROR: No matching distribution found for nobody==1.0\n"
        )

    monkeypatch.setattr(venv, "create", lambda folder, **_: folder.mkdir())
    monkeypatch.setattr(environments, "install", fail)
    for _ in range(2):  # the second time nothing is tried again
        with pytest.raises(
            environments.PeerMissing, match="could not be made: ERROR: No matching distribution"
        ):
            environments.peer_python("nobody", tmp_path)
    assert tried == [1] and not (tmp_path / ".venv-nobody").exists()
    monkeypatch.setenv("LDALIGN_PEER_NOBODY", "/no/such/python")
    said = common.measure_or_say("peers/padded.py", {}, "nobody")
    assert said == {"skipped": "LDALIGN_PEER_NOBODY=/no/such/python: no such file"}


def test_an_environment_is_made_again_when_its_pins_change(
    bench: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    environments = bench("environments")
    (tmp_path / "requirements").mkdir()
    pins = tmp_path / "requirements/bench-some.txt"
    made = []
    monkeypatch.setattr(venv, "create", lambda folder, **_: folder.mkdir())
    monkeypatch.setattr(environments, "install", lambda python, wanted: made.append(wanted))
    for text, times in (("some==1\n", 1), ("some==1\n", 1), ("some==2\n", 2)):
        pins.write_text(text)
        assert environments.peer_python("some", tmp_path) == tmp_path / ".venv-some/bin/python"
        assert made == [pins] * times


def test_pins_are_those_of_the_files_they_build_on_too(bench: Any, tmp_path: Path) -> None:
    (tmp_path / "requirements").mkdir()
    (tmp_path / "requirements/bench-some.txt").write_text("-r bench-other.txt\nsome==1\n")
    (tmp_path / "requirements/bench-other.txt").write_text("other==2\n")
    assert "other==2\n" in bench("environments").pins("some", tmp_path)


def test_a_failing_peer_leaves_its_last_line(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LDALIGN_PEER_TRL", sys.executable)
    said = bench("common").measure_or_say(
        "peers/padded.py", {"task": "none", "device": "cpu"}, "trl"
    )
    assert said["skipped"].startswith("exit code 1: ") and "Error" in said["skipped"]


# ---------------------------------------------------------------------- what a GPU would have to do


def test_a_step_is_computed_from_operations_and_bytes(bench: Any) -> None:
    """One layer, by hand: all parts bound by what they should be bound by."""
    work, roofline = bench("work"), bench("roofline")
    shape = work.Shape(D=1024, F=4096, H=8, K=8, E=128, V=1000, layers=1, tied=False)
    pairs = [{"prompt": [0] * 4000, "real": [0] * 2000, "generated": [0] * 2000}]
    card = roofline.Card(flops=1e12, bytes=1e10, link=1e9)
    all_of_it = roofline.Reached(1.0, 1.0, 1.0, 1.0, 1.0, 1.0)
    least = roofline.StepExtras(True, False, 0, False, 0, 0, 0.0)
    case = roofline.Case(1, weight=4, state=8, micro_tokens=10**6, eager_bytes=280)
    found = roofline.step_seconds(shape, pairs, card, case, least, all_of_it)
    assert found["MLP"] == pytest.approx(6 * 8000 * (1024 * 8192 + 4096 * 1024) / 1e12)
    assert found["optimizer"] == pytest.approx(28 * shape.weights / 1e10)  # AdamW in float32
    assert found["sending"] == found["host"] == found["again"] == found["checkpoints"] == 0
    more = roofline.StepExtras(False, True, 0, False, 1, 2, 0.5)
    worse = roofline.step_seconds(shape, pairs, card, case, more, all_of_it)
    assert worse["optimizer"] == pytest.approx(10 * found["optimizer"])
    assert worse["again"] == pytest.approx(2 * 8000 * 1024 * 8192 / 1e12)
    assert worse["host"] == 3.0 and worse["checkpoints"] > 0
    two = roofline.Case(ranks=2, weight=4, state=8, micro_tokens=10**6)
    shared = roofline.step_seconds(shape, pairs, card, two, least, all_of_it)
    sent = (4 + 4) * shape.weights / 2 / 1e9
    computing = sum(shared[part] for part in (*work.PRODUCTS, "elementwise"))
    assert shared["MLP"] == pytest.approx(found["MLP"] / 2)
    assert shared["sending"] == pytest.approx(max(0.0, sent - computing))


def test_decoding_is_computed_from_reading_the_weights(bench: Any) -> None:
    work, roofline = bench("work"), bench("roofline")
    shape = work.Shape.of(work.SHAPES["mistral-7b"])
    card, reached = roofline.CARDS["H100"], roofline.Reached()
    best = roofline.DecodeExtras(1.0, 0, 0, 0.0)
    one = roofline.decode_seconds(shape, [10], 1000, 1, card, best)
    reading = 2 * (shape.weights - shape.V * shape.D) / (card.bytes * reached.bytes)
    assert sum(one.values()) == pytest.approx(reading, rel=0.03)
    many = roofline.decode_seconds(shape, [10] * 64, 1000, 64, card, best)
    half = roofline.DecodeExtras(0.5, 0, 0, 0.0)
    emptier = roofline.decode_seconds(shape, [10] * 64, 1000, 64, card, half)
    assert emptier["MLP"] > 1.9 * many["MLP"]  # as many steps again, the weights read in each
    cache = 2 * 2 * shape.layers * shape.K * shape.E * sum(range(11, 1010)) / 1000
    read = cache / (card.bytes * reached.bytes)  # for each token, whoever else is there
    assert emptier["attention"] - read == pytest.approx(2 * (many["attention"] - read), rel=0.1)
    assert emptier["sampler"] == many["sampler"]


def test_the_roofline_page_needs_no_gpu(tmp_path: Path) -> None:
    run_bench("roofline.py", "--pairs", "2", "--results", tmp_path)
    page = (tmp_path / "roofline.md").read_text()
    assert "nothing here is measured" in page and page.count("**together**") == 2
    found = json.loads((tmp_path / "roofline.json").read_text())
    for table in (*found["step"].values(), *found["decode"].values()):
        before, now = (sum(table[when].values()) for when in ("before", "now"))
        assert 0 < now < before


def test_as_many_layers_as_a_card_holds(bench: Any) -> None:
    gpu, work = bench("gpu"), bench("work")
    shape = work.Shape.of(work.SHAPES["mistral-7b"])
    assert gpu.layers_that_fit(shape, 14, 139 * 2**30) == 32
    fewer = gpu.layers_that_fit(shape, 14, 80 * 10**9)
    block = (shape.weights - 2 * shape.V * shape.D - shape.D) / 32
    rest = shape.weights - 32 * block
    assert 14 * (rest + fewer * block) <= 60e9 < 14 * (rest + (fewer + 1) * block)


def test_a_gpu_run_leaves_what_it_found(
    bench: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Figures stand in the files after every part, also after one that fails or has no time."""
    gpu = bench("gpu")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100 80GB HBM3")
    pages: list[str] = []
    save = gpu.common.save
    monkeypatch.setattr(
        gpu.common,
        "save",
        lambda *args: (save(*args), pages.append((tmp_path / "gpu.md").read_text())),
    )
    made = f"import pathlib; pathlib.Path({str(tmp_path / 'one.json')!r}).write_text('[7]')"
    (tmp_path / "old.json").write_text("[8]")
    os.utime(tmp_path / "old.json", (1, 1))

    def figures(found: Any, card: Any) -> list[Any]:
        return [("a kernel", f"{found[0]} ms", f"{card.flops:.0e}")]

    parts = [
        gpu.Part("one", ["-c", made], 60, "one", figures),
        gpu.Part("two", ["-c", "raise SystemExit(5)"], 60),
        gpu.Part("three", ["-c", "import time; time.sleep(60)"], 0.2, "old", figures),
        gpu.Part("four", ["-c", f"{made}; raise SystemExit(5)"], 60, "one", figures),
    ]
    with pytest.raises(gpu.EnvironmentProblem, match="make gpu: two, three, four did not pass"):
        gpu.run_parts(parts, 1.0, tmp_path)
    assert [page.count("| **") for page in pages] == [1, 2, 3, 4]
    # A part's figures, also of one that failed; but none of an earlier run's.
    assert [page.count("| a kernel | 7 ms | 1e+15 |") for page in pages] == [1, 1, 1, 2]
    assert "8 ms" not in pages[-1]
    verdicts = [
        part["verdict"] for part in json.loads((tmp_path / "gpu.json").read_text())["parts"]
    ]
    assert verdicts == ["passed", "FAILED (5)", "STOPPED after 0 s", "FAILED (5)"]
    with pytest.raises(gpu.EnvironmentProblem):
        gpu.run_parts(parts[:1], 0.0, tmp_path)
    assert json.loads((tmp_path / "gpu.json").read_text())["parts"][0]["verdict"] == "no time left"


def test_gpu_figures_stand_beside_what_was_computed(bench: Any) -> None:
    gpu, card = bench("gpu"), bench("roofline").CARDS["H200"]
    ours = {"name": "ldalign", "precision": "mixed", "tokens_per_second": 9.0, "mfu": 0.5}
    ours |= {"peak_gib": 1.0}
    peer = {"name": "TRL", "precision": "mixed", "skipped": "no network"}
    step = {"shape": "smollm2-135m", "layers": 3, "batch": 2, "optimizer": "adamw"}
    step |= {"tables": [{"rows": [ours, peer]}]}
    (_, measured, computed), (_, why, nothing) = gpu.step_figures(step, card)
    assert measured == "9 tokens/s, MFU 50 %, 1.0 GiB" and computed.endswith(" tokens/s")
    assert (why, nothing) == ("not run: no network", "")
    assert gpu.step_figures(step, None)[0][2] == ""
    side = {"tokens_per_second": 50.0}
    table = {"rows": 4, "sides": {"ldalign": side}, "limits": {"reading": 100.0}}
    made = {"shape": "smollm2-135m", "new_tokens": 8, "tables": [table]}
    ((name, measured, computed),) = gpu.generate_figures(made, card)
    assert name == "decoding 4 rows: ldalign" and computed.endswith(" tokens/s")
    assert measured == "50 tokens/s, 50 % of reading once a token"
