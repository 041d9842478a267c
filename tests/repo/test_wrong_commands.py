"""What a newcomer types wrong, and the one line that it is answered with.

In this process, by the way that every command ends (`exits.run`): what is printed is what a
terminal shows.
"""

import shlex
import sys
from pathlib import Path
from typing import NoReturn

import pytest

from ldalign import cli
from ldalign.system import exits, interrupt, logs

# A command as it is typed in a folder of FILES; what its line has to say.
TOY = "align --config toy cache={cache}"
WRONG = [
    # ------------------------------------------------------------------------- the command's name
    ("aling", "did you mean align?"),
    ("help", "write ldalign --help"),
    ("-v", "write ldalign --version"),
    ("--config toy", "a command comes first: ldalign align --config"),
    ("presets toy", "write `ldalign presets copy toy my.yaml`"),
    ("presets copy own_data my.yaml", "did you mean own-data?"),
    ("align --ranks 99x", "write --ranks 2"),
    # ---------------------------------------------------------------------------------- the config
    ("align my.yaml", "a config is given as --config my.yaml"),
    ("align toy", "a config is given as --config toy"),
    ("align --config", "write --config FILE.yaml"),
    ("align --config nofile.yaml", "`ldalign presets` lists those that come with it"),
    ("align --config smollm", "did you mean --config smollm2-135m?"),
    ("align --config my_rows.jsonl", "if these are rows: data=my_rows.jsonl"),
    ("align --config my.yaml", "my.yaml:1: lerning_rate: unknown key; did you mean learning_r"),
    # ------------------------------------------------------------------------------------ the keys
    ("align --learning_rate 1e-5", "a key is given without dashes: learning_rate=1e-5"),
    (f"{TOY} learning_rate=abc", "learning_rate: 'abc' is not a number"),
    (f"{TOY} beta=-1", "beta: -1.0 must be greater than 0"),
    (f"{TOY} beta 0.2", "beta 0.2: has a blank in it; write beta=0.2"),
    (f"{TOY} beta = 0.2", "write beta=0.2"),
    (f"{TOY} sft.epochs= 2", "write sft.epochs=2"),
    (f"{TOY} data =my_rows.jsonl", "write data=my_rows.jsonl"),
    (f"{TOY} output_dir=x", "unknown key; write run=x"),
    (f"{TOY} per_device_train_batch_size=4", "write training.micro_tokens=TOKENS"),
    (f"{TOY} device=gpu", "give device=cuda"),
    (f"{TOY} log=null", "write []"),
    (f"{TOY} method=ppo", "is not one of ld_align, spin, dpo, sft, self_reward, rlaif"),
    # ------------------------------------------------------------------------------ rows and models
    ("align my_rows.jsonl", "is it data=my_rows.jsonl?"),
    (f"{TOY} data=missing.jsonl", "no such file or folder; give a file or folder of rows"),
    (f"{TOY} data=my_row.jsonl", "did you mean data=my_rows.jsonl?"),
    (f"{TOY} data=rows.csv", 'c.read_csv("rows.csv", '),
    (f"{TOY} data=notes.txt", "notes.txt:1:1: broken JSON: Expecting value; expected one JSON"),
    (f"{TOY} policy=/no/such", "expected a model folder, 'smollm2-135m-instruct' or a Hugging"),
    (f"{TOY} policy=SmolLM2", "did you mean smollm2-135m-instruct?"),
    (f"{TOY} policy=gptj", "model_type 'gptj' cannot be a policy; give a mistral or llama"),
    ("align --config own-data policy=toy cache={cache}", "did you mean data=my_rows.jsonl?"),
    # --------------------------------------------------------------------------- the other commands
    ("report", "run: must be given (run folder)"),
    ("report runs/none", "is it run=runs/none?"),
    ("report run=runs/none", "is no run folder, as it has no config.yaml; give one (run=RUN)"),
    ("export gguf", "give FOLDER [OUT.gguf]"),
    ("export gguf nothing", "'nothing': no such folder; expected a model folder"),
    ("chat policy=runs/none", "has no config.json; expected a model folder"),
    ("chat policy=runs/begun", "is a run that has no policy yet; the command that began it"),
    ("chat runs/begun", "is it policy=runs/begun or run=runs/begun?"),
    ("generate --prompt Hello policy=toy", "write prompts=FILE"),
    ("generate prompt=Hello policy=toy", "ldalign chat reads the terminal"),
    ("inspect data=missing.jsonl policy=toy cache={cache}", "give a file or folder of rows"),
    ("inspect my_rows.jsonl", "is it data=my_rows.jsonl?"),
    ("push", "give FOLDER OWNER/NAME"),
]  # fmt: skip
# These print their usage before.
TOLD_NOTHING = [
    ("", "no command is given"),
    ("align", "give --config FILE.yaml or key=value, or --help for all keys"),
    ("chat", "give --config FILE.yaml or key=value, or --help for all keys"),
]
FILES = {
    "my_rows.jsonl": '{"prompt": "What is 6 x 7?"}\n',
    "rows.csv": "prompt,response\nhi,hello\n",
    "notes.txt": "What is 6 x 7?\n",
    "my.yaml": "lerning_rate: 1\n",
    "gptj/config.json": '{"model_type": "gptj"}',
    "runs/none/notes.txt": "",
    "runs/begun/config.yaml": "run: runs/begun\n",
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, in_process: None) -> Path:
    for name, text in FILES.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def ends(line: str, monkeypatch: pytest.MonkeyPatch) -> int:
    """The exit code of `ldalign` with the arguments of a line that is typed."""

    def leave(code: int) -> NoReturn:
        raise SystemExit(code)

    monkeypatch.setattr(sys, "argv", ["ldalign", *shlex.split(line)])
    monkeypatch.setattr(exits, "leave", leave)  # it ends the process at once
    monkeypatch.setattr(interrupt, "listen", lambda: None)  # the tests' own signals stay
    monkeypatch.setattr(logs, "configure", lambda: None)
    with pytest.raises(SystemExit) as ended:
        exits.run(cli.run)
    return int(str(ended.value.code))


@pytest.mark.parametrize(("line", "says"), WRONG, ids=[line for line, _ in WRONG])
def test_a_wrong_command_is_answered_in_one_line(
    line: str,
    says: str,
    folder: Path,
    toy_cache: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    assert ends(line.format(cache=toy_cache), monkeypatch) == 2
    out, err = capfd.readouterr()
    said = [one for one in err.splitlines() if not one.startswith("data: 1 file: ")]
    assert len(said) == 1 and not out, err
    assert said[0].startswith("ldalign: error: ") and says in said[0]
    assert "unexpected" not in said[0] and "Traceback" not in err


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("align data=missing.jsonl", "data=missing.jsonl: no such file"),
        ("inspect data=missing.jsonl", "data=missing.jsonl: no such file"),
        ("compare --config compare-own-data data=missing.jsonl", "data=missing.jsonl: no such"),
        ("align heldout=missing.jsonl", "heldout=missing.jsonl: no such file"),
        ("align template=missing.jinja", "template=missing.jinja: no such file"),
    ],
)
def test_a_file_that_is_missing_waits_for_no_download(
    line: str,
    says: str,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    def fetched(name: str, cache: Path) -> Path:
        raise AssertionError(f"{name} is fetched")

    monkeypatch.setattr("ldalign.run.context.resolve_model", fetched)
    assert ends(f"{line} policy=org/model run=runs/new", monkeypatch) == 2
    assert says in capfd.readouterr().err


@pytest.mark.parametrize(("line", "says"), TOLD_NOTHING, ids=["ldalign", "align", "chat"])
def test_a_command_that_is_told_nothing_ends_in_one_line(
    line: str,
    says: str,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    assert ends(line, monkeypatch) == 2
    *usage, last = capfd.readouterr().err.splitlines()
    assert last.startswith("ldalign: error: ") and last.endswith(says)
    assert any(f"ldalign {line or 'COMMAND'}" in one for one in usage)
    assert not [one for one in usage if "error" in one.lower() and "--debug" not in one]
