"""The scripts of single stages: that they leave what align.py goes on from, and how they refuse."""

import importlib
import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import get_args, get_type_hints

import pytest
import torch
from runs import ROOT, one_thread, run_script, script_command

from ldalign.data.columns import Columns
from ldalign.models.toy import write_toy_model
from ldalign.models.weights import load_model, save_model
from ldalign.run.folder import stage_names
from ldalign.run.methods import STAGES
from ldalign.run.settings import UNREAD, RunConfig
from ldalign.system.errors import InputError
from ldalign.system.files import read_jsonl
from ldalign.train import align, evaluate, generate, guide, sft

NAMES = ("align", "sft", "guide", "generate", "evaluate")
CONFIG = str(ROOT / "configs/toy.yaml")


def arguments(run: Path, cache: Path, *more: str) -> list[str]:
    return ["--config", CONFIG, f"run={run}", f"cache={cache}", *more]


@pytest.mark.parametrize("name", NAMES)
def test_help(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    importlib.import_module(f"ldalign.train.{name}").main(["--help"])
    text = capsys.readouterr().out
    assert f"    torchrun train/{name}.py" in text  # how it is started
    assert "learning_rate=5e-07" in text and "--dry-run" in text
    assert ("prompts=null" in text) == (name == "generate")


@pytest.mark.parametrize("name", NAMES)
def test_dry_run_makes_nothing(
    name: str, tmp_path: Path, toy_cache: Path, in_process: None, capfd: pytest.CaptureFixture[str]
) -> None:
    importlib.import_module(f"ldalign.train.{name}").main(
        arguments(tmp_path / "run", toy_cache, "--dry-run")
    )
    assert "nothing was made" in capfd.readouterr().err
    assert not (tmp_path / "run").exists()


def test_launched_by_path_a_wrong_key_is_one_line_and_exit_code_2(tmp_path: Path) -> None:
    done = run_script(ROOT / "train/evaluate.py", "learning_rat=1", f"run={tmp_path / 'run'}")
    assert done.returncode == 2
    assert (
        done.stderr.strip() == "ldalign: error: learning_rat=1: learning_rat: unknown key; did you "
        "mean learning_rate?"
    )
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("main", "more", "message"),
    [
        (sft.main, "sft.epochs=0", "sft.epochs=0: nothing to train"),
        (guide.main, "method=spin", "has no guide"),
        (evaluate.main, "evaluation.rows=0", "nothing to evaluate on"),
        (generate.main, "output=x.jsonl", "needs prompts=FILE"),
        (generate.main, "prompts=x.jsonl", "needs output=FOLDER"),
        (generate.main, "samples=2", "needs prompts=FILE"),
    ],
)
def test_nothing_to_do_is_an_error(tmp_path: Path, main: object, more: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        main(arguments(tmp_path / "run", tmp_path, more))  # type: ignore[operator]


def test_keys_that_a_method_does_not_read(
    tmp_path: Path, toy_cache: Path, in_process: None, capfd: pytest.CaptureFixture[str]
) -> None:
    """Refused on the command line, named where the config file has them, in
    silence where its base does.
    """
    options = arguments(tmp_path / "run", toy_cache, "iterations=1", "--dry-run")
    for method, key in (
        ("spin", "guide.epochs=2"),
        ("dpo", "sampling.top_k=5"),
        ("sft", "beta=0.2"),
        ("sft", "loss.nll=1"),
        ("self_reward", "judge=policy"),
        ("ld_align", "agreement.rows=3"),
    ):
        name = "judge.model" if key == "judge=policy" else key.partition("=")[0]
        with pytest.raises(InputError, match=f"{name}: method={method} does not read this key"):
            align.main([*options, f"method={method}", key])
    capfd.readouterr()
    align.main([*options, "method=spin"])
    assert (
        "configs/toy.yaml: method=spin does not read guide.*; they change nothing here"
    ) in capfd.readouterr().err
    child = tmp_path / "spin.yaml"
    child.write_text(
        f"base: {os.path.relpath(ROOT / 'configs/toy.yaml', tmp_path)}\nmethod: spin\n"
    )
    at = options.index("--config")
    align.main([*options[:at], "--config", str(child), *options[at + 2 :]])
    assert "does not read" not in capfd.readouterr().err


def test_every_method_has_its_list_of_unread_keys() -> None:
    names = {key for keys in UNREAD.values() for key in keys}
    assert set(UNREAD) == {*get_args(get_type_hints(RunConfig)["method"]), "sft/pairs"}
    assert set(STAGES) == set(UNREAD)  # whose pairs are made by no other stages
    for name in names:
        value: object = RunConfig()
        for part in name.split("."):
            value = getattr(value, part)


def test_single_stages_are_those_of_align(
    tmp_path: Path, toy_cache: Path, in_process: None, capfd: pytest.CaptureFixture[str]
) -> None:
    run = arguments(tmp_path / "run", toy_cache, "iterations=1", "continual_sft.epochs=0")
    sft.main(run)
    generate.main(run)
    guide.main(run)
    assert stage_names(tmp_path / "run") == [
        "data",
        "sft/policy",
        "sft/evaluation",
        "iteration_0/responses",
        "guide",
    ]
    capfd.readouterr()
    align.main(run)
    said = capfd.readouterr().err
    for name in ("data", "sft/policy", "sft/evaluation", "iteration_0/responses", "guide"):
        assert f"{name}: already done" in said
    assert "iteration_0/policy: done" in said


def test_evaluate_measures_what_align_measured(
    tmp_path: Path, toy_run: Path, toy_cache: Path, in_process: None
) -> None:
    evaluate.main(
        arguments(tmp_path / "run", toy_cache, f"policy={toy_run / 'iteration_1/policy'}")
    )
    ours = json.loads((tmp_path / "run/start/evaluation/summary.json").read_text())
    theirs = json.loads((toy_run / "iteration_1/evaluation/summary.json").read_text())
    for summary in (ours, theirs):
        del summary["seconds"]
    assert ours == theirs
    assert "| start |" in (tmp_path / "run/report/table.md").read_text()


def test_guide_of_given_responses_needs_no_sampling(
    tmp_path: Path, toy_cache: Path, in_process: None
) -> None:
    lines = [
        {
            "real": [
                {"role": "user", "content": f"Say {i}."},
                {"role": "assistant", "content": f"It is {i}."},
            ],
            "generated": [
                {"role": "user", "content": f"Say {i}."},
                {"role": "assistant", "content": f"No, {i + 1}."},
            ],
        }
        for i in range(64)
    ]
    data = tmp_path / "pairs.jsonl"
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    guide.main(arguments(tmp_path / "run", toy_cache, f"data={data}", "global_batch=8"))
    assert stage_names(tmp_path / "run") == ["data", "guide"]
    assert "rejected" in read_jsonl(tmp_path / "run/data/train.jsonl")[0]
    # A guide that begins as the policy needs the one that self-play starts from.
    more = (f"data={data}", "global_batch=8", "guide.backbone=policy", "evaluation.rows=0")
    guide.main(arguments(tmp_path / "other", toy_cache, *more))
    assert stage_names(tmp_path / "other") == ["data", "sft/policy", "guide"]


# ----------------------------------------------------------------------------------------- generate


def test_generate_answers_a_file(tmp_path: Path, toy_cache: Path, in_process: None) -> None:
    """Twice each; asking again does nothing, other settings are refused by name, fewer samples are
    the same ones.
    """
    prompts, out = tmp_path / "prompts.jsonl", tmp_path / "out"
    prompts.write_text(
        '{"prompt": "What is 2 + 2?"}\n\n{"id": "x", "messages": [{"role": "user", "content": '
        '"What is 2 + 2?"}]}\n'
    )
    options = arguments(
        tmp_path / "run", toy_cache, f"prompts={prompts}", "samples=2", f"output={out}"
    )
    generate.main(options)
    first = read_jsonl(out / "answers.jsonl")
    assert [(r["id"], r["sample"]) for r in first] == [("1", 0), ("1", 1), ("x", 0), ("x", 1)]
    assert len({r["response"] for r in first}) == 4 and all(1 <= r["n_tokens"] <= 24 for r in first)
    manifest = json.loads((out / "manifest.json").read_text())
    assert (
        manifest["parents"]["sampling.temperature"] == 1.0 and manifest["parents"]["samples"] == 2
    )
    written = (out / "answers.jsonl").stat().st_mtime_ns
    generate.main(options)
    assert (out / "answers.jsonl").stat().st_mtime_ns == written
    with pytest.raises(
        InputError,
        match=r"made from something else: sampling.min_p was 0.0, now "
        r"0.1",
    ):
        generate.main([*options, "sampling.min_p=0.1"])
    generate.main([*options[:-2], f"output={tmp_path / 'one'}", "sampling.batch_rows=1"])
    assert read_jsonl(tmp_path / "one/answers.jsonl") == first[::2]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["one", "out", "prompts.jsonl"]
    with pytest.raises(InputError, match="is a file; give a folder"):
        generate.main([*options[:-1], f"output={prompts}"])


def test_chat_remembers_until_told_to_forget(tmp_path: Path, toy_cache: Path) -> None:
    """Typed lines in, one answer a line out, as it comes; the same words first
    get the same answer again.
    """
    keys = (
        "--chat",
        "max_new_tokens=9",
        "policy=toy",
        "sampling.temperature=0",
        "sampling.stop=[x]",
    )
    command = script_command(
        ROOT / "train/generate.py", *arguments(tmp_path / "run", toy_cache), *keys
    )
    done = subprocess.run(
        command,
        input="Hello\n\nHello\n/new\nHello\n",
        capture_output=True,
        text=True,
        env=one_thread(),
    )
    assert done.returncode == 0, done.stderr
    assert "/new begins again" in done.stderr and not (tmp_path / "run").exists()
    asked = subprocess.run(
        command, input="Hello\n", capture_output=True, text=True, env=one_thread()
    )
    assert (
        done.stdout.startswith(asked.stdout)
        and done.stdout.endswith(asked.stdout)
        and "x" not in done.stdout
    )
    assert len(done.stdout) > 2 * len(asked.stdout)


ASCII_ONLY = (
    {"LANG": "C", "PYTHONIOENCODING": "ascii"},
    {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"},
    {"PYTHONIOENCODING": "utf-8"},
)


@pytest.mark.parametrize("environment", ASCII_ONLY, ids=["asked for", "of the locale", "utf-8"])
def test_chat_takes_bytes_that_are_no_text(
    environment: dict[str, str], tmp_path: Path, toy_cache: Path
) -> None:
    """Latin-1, half a character, NUL, where the terminal knows ASCII alone: all are answered."""
    keys = ("--chat", "max_new_tokens=4", "policy=toy", "sampling.stop=[]")
    command = script_command(
        ROOT / "train/generate.py", *arguments(tmp_path / "run", toy_cache), *keys
    )
    lines = (b"caf\xe9", b"/new", b"\xff\xfe \x00", b"/new", "h\u00e9 \u2192".encode())
    asked = b"\n".join(lines) + b"\n"
    # The toy's random words may be any bytes too.
    done = subprocess.run(command, input=asked, capture_output=True, env=one_thread() | environment)
    said = done.stderr.decode()
    assert done.returncode == 0, said
    assert said.count("Some bytes of this line are no utf-8: each is read as U+FFFD") == 2
    assert len(done.stdout) > 3
    ascii_only = environment.get("PYTHONIOENCODING") != "utf-8"
    assert not ascii_only or done.stdout.isascii()


def test_chat_leaves_out_what_the_policy_cannot_read(tmp_path: Path, toy_cache: Path) -> None:
    folder = write_toy_model(tmp_path / "short", max_position_embeddings=64)
    command = script_command(
        ROOT / "train/generate.py",
        *arguments(tmp_path / "run", toy_cache, "--chat", "max_new_tokens=3", f"policy={folder}"),
    )
    asked = "word " * 60 + "\nHi\n"
    done = subprocess.run(command, input=asked, capture_output=True, text=True, env=one_thread())
    assert done.returncode == 0, done.stderr
    assert "tokens, and the policy reads 64 (max_position_embeddings in" in done.stderr
    assert len(done.stdout.splitlines()) >= 1 and "unexpected" not in done.stderr


def test_generate_holds_prompts_against_the_positions(
    tmp_path: Path, toy_cache: Path, in_process: None, capfd: pytest.CaptureFixture[str]
) -> None:
    """120 words where the policy reads 64 tokens: refused by id. A short prompt whose answer may
    run past them: warned of.
    """
    folder = write_toy_model(tmp_path / "short", max_position_embeddings=64)
    prompts = tmp_path / "prompts.jsonl"
    options = arguments(
        tmp_path / "run", toy_cache, f"policy={folder}", f"prompts={prompts}", "--dry-run"
    )
    prompts.write_text(json.dumps({"id": "long", "prompt": " ".join(["word"] * 120)}) + "\n")
    with pytest.raises(
        InputError, match=r"prompts: 'long' has \d+ tokens, and the policy reads 64 \(max_position"
    ):
        generate.main([*options, f"output={tmp_path / 'out'}"])
    assert not (tmp_path / "out").exists()
    prompts.write_text('{"prompt": "Hi"}\n')
    generate.main([*options, f"output={tmp_path / 'out'}", "max_new_tokens=40"])
    assert "WARNING" not in capfd.readouterr().err
    generate.main([*options, f"output={tmp_path / 'out'}", "max_new_tokens=60"])
    assert "with max_new_tokens=60 up to" in capfd.readouterr().err


def test_a_run_holds_its_rows_against_the_positions(
    tmp_path: Path, toy_cache: Path, in_process: None, capfd: pytest.CaptureFixture[str]
) -> None:
    """The dry run: rows longer than the policy reads are refused, with the max_length that fits;
    with it, sampled answers that may be longer are warned of, where any are sampled.
    """
    folder = write_toy_model(tmp_path / "short", max_position_embeddings=120)
    options = arguments(tmp_path / "run", toy_cache, f"policy={folder}", "--dry-run")
    with pytest.raises(
        InputError, match=r"max_length=160: the longest row has \d+ tokens, .*give max_length=120"
    ):
        align.main(options)
    fits = [*options, "max_length=120", "max_new_tokens=40"]
    align.main(fits)
    assert "policy: WARNING: the longest prompt has" in capfd.readouterr().err
    align.main([*fits, "method=sft", "iterations=1"])
    assert "policy: WARNING" not in capfd.readouterr().err


@pytest.mark.parametrize("more", [(), ("sampling.temperature=0",)], ids=["sampled", "greedy"])
def test_generate_stops_at_logits_that_are_not_finite(
    more: tuple[str, ...], tmp_path: Path, toy_cache: Path
) -> None:
    """A model that overflows: exit code 4 and the prompt's id, for a file and in a chat."""
    folder = write_toy_model(tmp_path / "overflowing")
    model = load_model(folder, torch.float32)
    with torch.no_grad():
        model.lm_head.weight.fill_(3e38)  # type: ignore[union-attr]
        model.model.norm.weight.fill_(3e38)  # type: ignore[union-attr]
    save_model(model, folder, folder)
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"id": "three", "prompt": "Count to three."}\n')
    options = arguments(tmp_path / "run", toy_cache, f"policy={folder}", *more)
    file = (f"prompts={prompts}", f"output={tmp_path / 'out'}")
    for talk, name in ((file, "'three'"), (("--chat",), "'chat/0'")):
        done = subprocess.run(
            script_command(ROOT / "train/generate.py", *options, *talk),
            input="Hello\n",
            capture_output=True,
            text=True,
            env=one_thread(),
        )
        assert done.returncode == 4, done.stderr
        assert f"ldalign: error: generation: {name}: the model's logits" in done.stderr
    assert not (tmp_path / "out").exists()


def test_losers_made_elsewhere(
    tmp_path: Path, toy_run: Path, toy_cache: Path, in_process: None
) -> None:
    """First the prompts, with a line that says what to do; then the stage, marked;
    other losers are refused.
    """
    file = tmp_path / "losers.jsonl"
    options = arguments(tmp_path / "run", toy_cache, f"responses={file}", "sft.epochs=0")
    with pytest.raises(
        InputError,
        match=r"losers.jsonl: not there yet; answer the prompts in "
        r".*data/train.jsonl",
    ):
        generate.main(options)
    rows = read_jsonl(tmp_path / "run/data/train.jsonl")
    file.write_text(
        "".join(json.dumps({"id": r["id"], "response": "No idea."}) + "\n" for r in rows)
    )
    generate.main(options)
    made = tmp_path / "run/iteration_0/responses"
    assert {r["response"] for r in read_jsonl(made / "responses.jsonl")} == {"No idea."}
    assert json.loads((made / "summary.json").read_text())["losers/given"] == 1.0
    assert "responses" in json.loads((made / "manifest.json").read_text())["parents"]
    file.write_text(file.read_text().replace("No idea", "No clue"))
    with pytest.raises(InputError, match="responses was"):
        generate.main(options)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "prompts.jsonl:1:2: broken JSON"),
        (
            '{"prompt": "a"}\n{"prompt": 1}',
            "prompts.jsonl:2: prompt: is a number; expected text or",
        ),
        ('{"prompt": "a"}\n[]', "prompts.jsonl:2: the row is a list; expected"),
        ('{"messages": [{"role": "assistant", "content": "a"}]}', "turn 1 is assistant; expected"),
        (
            '{"id": 1, "prompt": "a"}\n{"id": "1", "prompt": "b"}',
            "prompts.jsonl:2: id '1' is given twice",
        ),
        ('{"prompt": "a", "tools": [1]}', "prompts.jsonl:1: tools: carries meaning"),
        ("\n", "holds no prompts"),
        (None, "cannot be read"),
    ],
)
def test_bad_prompts(tmp_path: Path, text: str | None, message: str) -> None:
    path = tmp_path / "prompts.jsonl"
    if text is not None:
        path.write_text(text)
    with pytest.raises(InputError, match=message):
        generate.read_prompts(path)


def test_null_ids_and_prompts(tmp_path: Path) -> None:
    """As parquet writes what is not there: the ids are the lines', the messages are read."""
    asked = [{"role": "user", "content": "q"}]
    path = tmp_path / "prompts.jsonl"
    for record in ({"id": None, "prompt": "q"}, {"prompt": None, "messages": asked}):
        path.write_text(f"{json.dumps(record)}\n" * 4)
        assert generate.read_prompts(path) == dict.fromkeys("1234", asked)
    path.write_text('{"question": "q"}\n')
    columns = Columns({"prompt": "question"})
    assert generate.read_prompts(path, columns) == {"1": asked}


def test_scripts_do_not_touch_another_run(
    tmp_path: Path, toy_run: Path, toy_cache: Path, in_process: None
) -> None:
    """Evaluating another policy in a run folder that has evaluated one is refused, by name."""
    first = arguments(tmp_path / "run", toy_cache, "policy=toy", "evaluation.samples=0")
    evaluate.main(first)
    copy = shutil.copytree(toy_run / "sft/policy", tmp_path / "other")
    with pytest.raises(
        InputError, match="start/evaluation/manifest.json: made from something else: policy was"
    ):
        evaluate.main([*first, f"policy={copy}"])
