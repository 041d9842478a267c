"""train/inspect_data.py: what it prints, with and without colour, and how it refuses."""

import json
import os
import pty
import re
import subprocess
from collections import Counter
from pathlib import Path

import pytest
from runs import ROOT, one_thread, script_command

from ldalign.data.inspection import FileFigures
from ldalign.system.config import load_config
from ldalign.system.errors import InputError
from ldalign.train import inspect_data

SCRIPT = ROOT / "train/inspect_data.py"
STYLE = re.compile(r"\x1b\[[0-9;]*m")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Four rows: plain, a hostile id, one that is cut, one whose prompt fills max_length."""
    rows = [
        {"id": "plain", "prompt": "Hi", "response": "Yes é"},
        {"id": "\x1b[31mred", "prompt": "Hi", "response": "No"},
        {"id": "long", "prompt": "Hi", "response": "word " * 50 + "end"},
        {"id": "full", "prompt": "word " * 60, "response": "Yes"},
    ]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def options(data: Path, cache: Path, *more: str) -> list[str]:
    keys = ("policy=toy", "max_length=40", "max_new_tokens=3", "evaluation.rows=0", "shuffle=false")
    return [f"data={data}", f"cache={cache}", f"run={cache / 'no-run'}", *keys, *more]


def printed(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    inspect_data.main(list(arguments))
    return capsys.readouterr().out


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    text = printed(capsys, "--help")
    assert "python train/inspect_data.py" in text and "rows=3" in text and "template=null" in text


def test_rows_and_figures(
    data: Path, toy_cache: Path, in_process: None, capsys: pytest.CaptureFixture[str]
) -> None:
    text = printed(capsys, *options(data, toy_cache, "rows=4"))
    assert not STYLE.search(text)  # no terminal
    first, second, third, fourth, figures, _ = text.split("\n\n")
    assert first.startswith(f"{data}:1, id plain, training: ")
    assert "  prompt, read: " in first and "'<|im_start|>':1 " in first and "'H':" in first
    assert "  response, trained on: " in first and "'é':" in first and "+" in first
    assert first.endswith("  end, trained on: 1 token\n    '<|im_end|>':2")
    assert r"id '\x1b[31mred'" in second
    assert "  cut by max_length=40, left out: " in third and "end, trained on" not in third
    assert ": 40 tokens, " in third
    assert "  dropped: the prompt alone fills max_length=40" in fourth
    assert "  prompt, left out: " in fourth and "trained on: " not in fourth.partition("\n")[2]
    assert figures.startswith(f"{data}: 4 rows = 3 training + 1 left out\n")
    assert f"  1 left out: the prompt alone fills max_length=40 (the first: {data}:4)" in figures
    assert "  1 have a response that is cut at max_length=40" in figures
    assert re.search(r"\n  tokens +least +25 % +median +75 % +95 % +99 % +most\n", figures)
    assert not (toy_cache / "no-run").exists()


def test_one_row_by_each_of_its_names(
    data: Path, toy_cache: Path, in_process: None, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = {
        printed(capsys, *options(data, toy_cache, f"rows={name}"))
        for name in ("long", "rows.jsonl:3", "[3]", "[long]")
    }
    assert len(texts) == 1 and "id long" in texts.pop()
    with pytest.raises(InputError, match="rows: 'nobody': no such row"):
        inspect_data.main(options(data, toy_cache, "rows=nobody"))
    with pytest.raises(InputError, match="rows=-1: give 0 or more"):
        inspect_data.main(options(data, toy_cache, "rows=-1"))
    with pytest.raises(InputError, match="--dry-run: nothing is made here"):
        inspect_data.main(options(data, toy_cache, "--dry-run"))
    assert "id " not in printed(capsys, *options(data, toy_cache, "rows=0"))


def test_what_is_trained_on_follows_the_method(
    tmp_path: Path, toy_cache: Path, in_process: None, capsys: pytest.CaptureFixture[str]
) -> None:
    """dpo trains on the rejected response too; self_reward on none of the data's but in SFT; a row
    that is held out is measured.
    """
    file = tmp_path / "pairs.jsonl"
    file.write_text(
        "".join(
            json.dumps({"id": f"r{i}", "prompt": f"Say {i}", "chosen": "Yes", "rejected": "No"})
            + "\n"
            for i in range(10)
        )
    )
    for more, response, rejected in (
        ((), "trained on", "not trained on"),
        (("method=dpo", "iterations=1"), "trained on", "trained on"),
        (("method=self_reward",), "not trained on", "not trained on"),
        (("method=self_reward", "sft.epochs=1"), "trained on", "not trained on"),
    ):
        text = printed(capsys, *options(file, toy_cache, "rows=1", *more))
        assert f"  response, {response}: " in text and f"  rejected, {rejected}: " in text, more
    keys = options(file, toy_cache, "rows=10")
    keys[keys.index("evaluation.rows=0")] = "evaluation.rows=2"
    text = printed(capsys, *keys)
    held = next(part for part in text.split("\n\n") if ", held out: " in part)
    assert "  response, measured: " in held and "trained on" not in held
    assert "10 rows = 9 training + 1 held out\n" in text


def test_bad_rows_and_templates_are_named(
    data: Path, tmp_path: Path, toy_cache: Path, in_process: None, capfd: pytest.CaptureFixture[str]
) -> None:
    """A row that the template refuses is shown as that, and counted; rows too long for the policy
    are said to be.
    """
    template = tmp_path / "refuses.jinja"
    template.write_text(
        "{% if messages[0]['content'] | length > 99 %}{{ raise_exception('too long') }}{% endif %}"
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' }}"
        "{{ m['content'] + '<|im_end|>' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    )
    inspect_data.main(options(data, toy_cache, "rows=full", f"template={template}"))
    text = capfd.readouterr().out
    assert "id full, training: bad, which ends a run\n" in text and "too long" in text
    assert f"{data}: 4 rows = 3 training + 1 bad, which ends a run\n" in text
    assert f"  1 bad, which ends a run (the first: {data}:4: template={template}: too long)" in text
    inspect_data.main(
        options(data, toy_cache, "rows=full", f"template={template}", "bad_rows=skip")
    )
    said = capfd.readouterr()
    assert "id full, training: skipped (bad_rows=skip)\n" in said.out
    assert f"{data}: 4 rows = 3 training + 1 skipped (bad_rows=skip)\n" in said.out
    assert "1 of 4 rows are bad, more than the 1% that bad_rows=skip may leave out" in said.err
    inspect_data.main(options(data, toy_cache, "rows=0", "max_length=2000"))
    assert "rows are longer" not in capfd.readouterr().err
    long = data.with_name("long.jsonl")
    long.write_text(json.dumps({"prompt": "Hi", "response": "word " * 700}) + "\n")
    inspect_data.main(options(long, toy_cache, "rows=0", "max_length=2000"))
    said = capfd.readouterr().err
    assert "1 rows are longer than the 512 tokens that the policy reads (max_position_emb" in said


def test_long_prompts_are_shown_as_a_run_takes_them(
    data: Path, toy_cache: Path, in_process: None, capsys: pytest.CaptureFixture[str]
) -> None:
    """truncate: the row that is trained on, as that; error: that a run ends."""
    text = printed(capsys, *options(data, toy_cache, "rows=full", "long_prompts=truncate"))
    row, figures, _ = text.split("\n\n")
    assert re.match(rf"{data}:4, id full, training: \d+ tokens, [1-9]\d* trained on\n", row)
    lost = r"\n  truncated: without the question's beginning; the prompt had (\d+) tokens\n"
    found = re.search(lost, row)
    assert found and int(found[1]) > 40 and "  response, trained on: " in row
    assert figures.startswith(f"{data}: 4 rows = 4 training\n")
    assert "\n  1 are truncated to leave room for the response\n" in figures
    text = printed(capsys, *options(data, toy_cache, "rows=full", "long_prompts=error"))
    row, figures, _ = text.split("\n\n")
    assert row.startswith(f"{data}:4, id full, training: bad, which ends a run\n")
    assert "the prompt alone has " in row and "max_length=40; raise max_length" in row
    assert figures.startswith(f"{data}: 4 rows = 3 training + 1 bad, which ends a run\n")


def test_turns_that_are_taken_away_are_counted(
    tmp_path: Path, toy_cache: Path, in_process: None, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whole turns, and both; a system turn that leaves no room is the reason why a row is not
    there.
    """
    turns = [("user", "word " * 30), ("assistant", "ok"), ("user", "Hi"), ("assistant", "Yes")]
    long = [*turns[:2], ("user", "word " * 30), ("assistant", "Yes")]
    system = [("system", "word " * 30), ("user", "Is it?"), ("assistant", "Yes")]
    file = tmp_path / "turns.jsonl"
    file.write_text(
        "".join(
            json.dumps({"messages": [{"role": r, "content": c} for r, c in row]}) + "\n"
            for row in (turns, long, system)
        )
    )
    text = printed(capsys, *options(file, toy_cache, "rows=3", "long_prompts=truncate"))
    whole, both, without, figures, _ = text.split("\n\n")
    assert "  truncated: without the first 2 turns; the prompt had " in whole
    assert "without the first 2 turns and the question's beginning; the prompt had " in both
    reason = "the system turn fills too much of max_length=40 to leave room for the question"
    assert f": 0 tokens, 0 trained on\n  dropped: {reason}\n" in without
    assert figures.startswith(f"{file}: 3 rows = 2 training + 1 left out\n  1 left out: {reason}")


def test_a_row_without_a_loser_is_bad_as_in_a_run(
    data: Path, toy_cache: Path, in_process: None, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of those that are trained on; where the method needs one."""
    with data.open("a") as file:
        file.write(json.dumps({"prompt": "Hey", "chosen": "Yes", "rejected": "No"}) + "\n")
    keys = options(data, toy_cache, "rows=plain")
    dpo = [*keys, "method=dpo", "iterations=1"]
    text = printed(capsys, *dpo)
    assert "id plain, training: bad, which ends a run\n" in text
    assert f"{data}:1: has no rejected response, which method=dpo needs" in text
    assert f"{data}: 5 rows = 1 training + 4 bad, which ends a run\n" in text
    assert "bad" not in printed(capsys, *keys)
    held = data.with_name("held.jsonl")
    held.write_text(json.dumps({"prompt": "Ho", "response": "Yes"}) + "\n")
    dpo[dpo.index("evaluation.rows=0")] = "evaluation.rows=9"
    text = printed(capsys, *dpo, f"heldout={held}")
    assert "1 held out" in text and "id plain, training: bad" in text


def test_rows_that_were_not_chosen_are_counted_by_reason(toy_cache: Path) -> None:
    """All rows of a file add up, also of one none of whose rows are used."""
    config = load_config(inspect_data.InspectConfig, None, ["policy=toy", "max_length=400"])
    figures = FileFigures(splits=Counter({"training": 80, "held out": 10}), cut=3)
    figures.dropped = {"too long": ["a.jsonl:7", "a.jsonl:9"]}
    figures.bad = ["a.jsonl:3: no shape"]
    reasons = {"beyond max_rows": 5, "beyond evaluation.rows": 2}
    paint = inspect_data.Paint(colour=False)
    lines = inspect_data.figures_lines("a.jsonl", figures, reasons, config, paint)
    assert lines == [
        "a.jsonl: 100 rows = 80 training + 10 held out + 9 left out + 1 bad, which ends a run",
        "  5 left out: beyond max_rows",
        "  2 left out: beyond evaluation.rows",
        "  2 left out: too long (the first: a.jsonl:7)",
        "  1 bad, which ends a run (the first: a.jsonl:3: no shape)",
        "  3 have a response that is cut at max_length=400",
    ]
    lines = inspect_data.figures_lines("b.jsonl", FileFigures(), reasons, config, paint)
    assert lines[0] == "b.jsonl: 7 rows = 7 left out"


@pytest.mark.parametrize("no_colour", [False, True])
def test_colour_in_a_terminal(no_colour: bool, data: Path, toy_cache: Path) -> None:
    """By part, in a terminal alone, and not where NO_COLOR asks for none; the text is the same."""
    keys = options(data, toy_cache, "rows=3")
    env = one_thread() | {"COLUMNS": "80", "TERM": "xterm"}
    env.pop("NO_COLOR", None)
    plain = subprocess.run(script_command(SCRIPT, *keys), capture_output=True, text=True, env=env)
    assert plain.returncode == 0, plain.stderr
    ours, theirs = pty.openpty()
    shown = subprocess.Popen(
        script_command(SCRIPT, *keys),
        stdout=theirs,
        stderr=subprocess.PIPE,
        env=env | ({"NO_COLOR": "1"} if no_colour else {}),
    )
    os.close(theirs)
    out = b""
    while True:
        try:
            piece = os.read(ours, 10_000)
        except OSError:  # the other side is closed
            break
        if not piece:
            break
        out += piece
    os.close(ours)
    assert shown.wait() == 0
    text = out.decode().replace("\r\n", "\n")
    assert STYLE.sub("", text) == plain.stdout
    if no_colour:
        assert text == plain.stdout
        return
    end = re.escape(f"\x1b[{inspect_data.STYLES['end']}m'<|im_end|>'\x1b[0m:")
    assert len(re.findall(end, text)) == 2  # the third row's is cut
    for part in ("prompt", "response", "cut"):
        assert f"\x1b[{inspect_data.STYLES[part]}m'" in text


def test_a_reader_that_has_seen_enough(data: Path, toy_cache: Path) -> None:
    keys = options(data, toy_cache, "rows=4")
    command = " ".join(f"'{part}'" for part in script_command(SCRIPT, *keys))
    script = f"set -o pipefail; {command} | true"
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, env=one_thread())
    assert done.returncode == 0 and "error" not in done.stderr, done.stderr
