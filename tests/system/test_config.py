"""The configuration machinery, on a toy config of its own."""

import re
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, get_type_hints

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ldalign.run.foreign_names import FOREIGN
from ldalign.run.settings import RunConfig
from ldalign.system import config as c
from ldalign.system.errors import InputError


@dataclass(frozen=True)
class Guide:
    SHORTHAND: ClassVar[str] = "folder"
    folder: str | None = c.setting(None, "A finished guide.")
    epochs: int = c.setting(3, "Passes over the data.", check=c.positive)


@dataclass(frozen=True)
class Bare:
    size: int = c.setting(2, "A size.")


@dataclass(frozen=True)
class Toy:
    run: str = c.setting("runs/toy", "Run folder.")
    learning_rate: float = c.setting(5e-7, "Peak learning rate.", check=c.positive)
    top_p: float = c.setting(1.0, "Nucleus.", check=c.above_up_to(0, 1))
    seed: int = c.setting(0, "Seed.", check=c.non_negative)
    greedy: bool = c.setting(False, "Take the likeliest token.")
    method: Literal["ld_align", "spin", "sft"] = c.setting("ld_align", "Pair source.")
    max_rows: int | None = c.setting(None, "Rows used; null for all.", check=c.positive)
    note: str | None = c.setting(None, "Anything.")
    data: str | list[str] = c.setting("default", "Where the rows are.")
    betas: tuple[float, ...] = c.setting((0.9, 0.95), "Adam's.")
    cache: Path = c.setting(Path("cache"), "Where models are kept.")
    guide: Guide = c.group(Guide, "The guiding model.")
    bare: Bare = c.group(Bare)

    def problems(self) -> list[str]:
        return (
            ["greedy: contradicts top_p below 1; drop one"]
            if self.greedy and self.top_p < 1
            else []
        )


def load(tmp_path: Path, text: str, *overrides: str) -> Toy:
    path = tmp_path / "toy.yaml"
    path.write_text(text)
    return c.load_config(Toy, path, overrides)


def refusal(*overrides: str) -> str:
    with pytest.raises(InputError) as caught:
        c.load_config(Toy, None, overrides)
    return str(caught.value)


def test_defaults_and_an_empty_file(tmp_path: Path) -> None:
    assert c.load_config(Toy) == Toy()
    assert load(tmp_path, "# nothing\n") == Toy()


def test_file_then_overrides(tmp_path: Path) -> None:
    text = (
        "learning_rate: 1e-4\nseed: 7\nguide:\n  epochs: 5\n  folder: a\nbetas: [0.8, 1]\ncache: "
        "/x\ngreedy: yes\n"
    )
    config = load(tmp_path, text, "seed=8", "guide.epochs=6", "seed=9", "max_rows=10")
    assert config == Toy(
        learning_rate=1e-4,
        seed=9,
        guide=Guide(folder="a", epochs=6),
        betas=(0.8, 1.0),
        cache=Path("/x"),
        greedy=True,
        max_rows=10,
    )
    assert isinstance(config.learning_rate, float) and isinstance(config.betas[1], float)


def test_text_is_taken_as_it_stands() -> None:
    config = c.load_config(Toy, None, ["run=2024-01-01", "data=*.jsonl", "note=a=b: c"])
    assert (config.run, config.data, config.note) == ("2024-01-01", "*.jsonl", "a=b: c")
    assert c.load_config(Toy, None, ["run=007"]).run == "007"


@pytest.mark.parametrize("value", ["null", "None", "~", ""])
def test_null(value: str) -> None:
    assert c.load_config(Toy, None, ["note=x", f"note={value}"]).note is None


def test_quoted_null_is_text() -> None:
    assert c.load_config(Toy, None, ["note='None'"]).note == "None"


def test_shorthand_of_a_group(tmp_path: Path) -> None:
    assert c.load_config(Toy, None, ["guide=some/where"]).guide == Guide(folder="some/where")
    assert load(tmp_path, "guide: here\n", "guide.epochs=1").guide == Guide(folder="here", epochs=1)
    assert c.load_config(Toy, None, ["guide={folder: x, epochs: 2}"]).guide == Guide("x", 2)
    assert "bare is a group of keys (size)" in refusal("bare=3")


def test_union_of_text_and_list() -> None:
    assert c.load_config(Toy, None, ["data=[a, b]"]).data == ["a", "b"]
    assert c.load_config(Toy, None, ["data=a"]).data == "a"
    assert "a list is not text or a list, each text" in refusal("data=[{path: a, weight: 2}]")


def test_unknown_keys_name_the_nearest() -> None:
    assert ("learning_rte=1: learning_rte: unknown key; did you mean learning_rate?") in refusal(
        "learning_rte=1"
    )
    assert "guide.epoch: unknown key; did you mean guide.epochs?" in refusal("guide.epoch=1")
    assert "giude: unknown key; did you mean guide?" in refusal("giude.epochs=1")
    assert "seed is a key, not a group of keys" in refusal("seed.x=1")
    assert "xyzzy: unknown key" in refusal("xyzzy=1") and "did you mean" not in refusal("xyzzy=1")


def refusal_of_a_run(*overrides: str) -> str:
    with pytest.raises(InputError) as caught:
        c.load_config(RunConfig, None, overrides)
    return str(caught.value)


@pytest.mark.parametrize(
    ("override", "meant"),
    [
        ("optimizer=adamw", "training.optimizer"),
        ("optimiser=adamw", "training.optimizer"),
        ("sft.optimizer=adamw", "training.optimizer"),
        ("trainer.optimizer=adamw", "training"),
        ("xyz.top_k=5", "sampling.top_k"),
        ("training.beta_=1", "beta"),
        ("epochs=3", "training.epochs, guide.epochs, sft.epochs or continual_sft.epochs"),
        ("learning_rat=1", "learning_rate"),
        ("guide.epoch=1", "guide.epochs"),
    ],
)
def test_a_key_is_found_in_whichever_group_it_is(override: str, meant: str) -> None:
    """By the last part of its name, those of the main training first; then by nearness."""
    assert refusal_of_a_run(override).endswith(f"unknown key; did you mean {meant}?")


def test_a_key_in_the_wrong_group_of_a_file(tmp_path: Path) -> None:
    path = write(tmp_path / "x.yaml", "sft:\n  optimizer: adamw\ntraining: {num_epochs: 2}\n")
    with pytest.raises(InputError) as caught:
        c.load_config(RunConfig, path)
    assert str(caught.value) == (
        f"2 problems: {path}:2: sft.optimizer: unknown key; did you mean training.optimizer? | "
        f"{path}:3: training.num_epochs: unknown key; write training.epochs=2; of each iteration"
    )


@pytest.mark.parametrize(
    ("override", "answer"),
    [
        ("num_train_epochs=3", "write training.epochs=3; of each iteration"),
        ("base_model=org/name", "write policy=org/name"),
        ("trainer.max_steps=5", "write training.steps=5; of each iteration"),
        ("lora_r=8", "there is none here: LoRA and other adapters are not part of ldalign; all"),
    ],
)
def test_a_name_from_elsewhere_is_answered(override: str, answer: str) -> None:
    assert f"unknown key; {answer}" in refusal_of_a_run(override)


def dotted_keys(cls: type = RunConfig) -> set[str]:
    """With the groups themselves."""
    found = set()
    for declared in fields(cls):
        inner = get_type_hints(cls)[declared.name]
        found.add(declared.name)
        if is_dataclass(inner):
            found |= {f"{declared.name}.{key}" for key in dotted_keys(inner)}  # type: ignore[arg-type]
    return found


def test_every_name_from_elsewhere_has_an_answer_in_one_line_that_is_true() -> None:
    """It begins with a key that there is, or with "none: "; every KEY= in it is a key. A name that
    is a key's last part says that key.
    """
    keys = dotted_keys()
    last_parts = {key.rpartition(".")[2] for key in keys}
    assert len(FOREIGN) > 120 and {"learning_rate", "training.epochs", "guide"} <= keys
    for name, text in FOREIGN.items():
        assert len(text) < 200 and text.isprintable() and text == text.strip(), name
        named = re.findall(r"([\w.]+)=", text)
        assert named or text.startswith("none: "), name
        assert set(named) - {"gpus"} <= keys, name
        first = named[0] if named else ""
        assert text.startswith(("none: ", f"{first}=")), name
        if name in last_parts - {"model", "chat_template"}:  # a judge's, the benchmarks'
            assert first.rpartition(".")[2] == name, name


@pytest.mark.parametrize(
    ("argv", "answer"),
    [
        (["--learning_rate", "1e-5"], "--learning_rate: unknown option; a key is given without "
         "dashes: learning_rate=1e-5"),
        (["--learning_rate=1e-5", "seed=1"], "--learning_rate=1e-5: unknown option; a key is given "
         "without dashes: learning_rate=1e-5"),
        (["--sft.epochs", "2"], "--sft.epochs: unknown option; a key is given without dashes: "
         "sft.epochs=2"),
        (["--weight-decay", "0"], "--weight-decay: unknown option; write training.weight_decay=0"),
        (["--top_k", "5"], "--top_k: unknown option; a key is given without dashes: "
         "sampling.top_k=5"),
        (["--optimiser", "a"], "--optimiser: unknown option; did you mean training.optimizer?"),
        (["--dry-rum"], "--dry-rum: unknown option; did you mean --dry-run?"),
        (["--xyzzy", "3"], "--xyzzy: unknown option; --help has all keys"),
        (["--num_train_epochs", "3", "--disable_tqdm", "--lr=1"],
         "3 problems: --num_train_epochs: unknown option; write training.epochs=3; of each "
         "iteration | --disable_tqdm: unknown option; there is none here: bars are drawn in a "
         "terminal alone | --lr=1: unknown option; write learning_rate=1"),
        (["--hub_model_id=a/b", "--num_processes", "8", "--resume"],
         "3 problems: --hub_model_id=a/b: unknown option; write hub.push=a/b; the run's result "
         "goes there at its end | --num_processes: unknown option; there is none here: --ranks N "
         "starts N processes on this machine, torchrun those of several | --resume: unknown "
         "option; there is none here: the same command again goes on where the run stopped"),
    ],
)  # fmt: skip
def test_keys_with_dashes_are_answered_with_the_right_form(argv: list[str], answer: str) -> None:
    with pytest.raises(InputError) as caught:
        c.split_argv(argv, ["--dry-run"], RunConfig)
    assert str(caught.value) == answer


def test_a_name_from_elsewhere_in_a_group_is_the_groups_own_key(tmp_path: Path) -> None:
    """Where the group has none of that last part, it is the one that is meant elsewhere."""
    file = tmp_path / "run.yaml"
    file.write_text("sft: {lr: 1.0e-4, num_train_epochs: 3, weight_decay: 0.5}\n")
    with pytest.raises(InputError) as caught:
        c.load_config(RunConfig, file, ["guide.lr=1", "training.lr=2"])
    for said in (
        "sft.lr: unknown key; write sft.learning_rate=1.0e-4 |",
        "sft.num_train_epochs: unknown key; write sft.epochs=3; of each iteration |",
        "sft.weight_decay: unknown key; write training.weight_decay=0.5 |",
        "guide.lr: unknown key; write guide.learning_rate=1 |",
        "training.lr: unknown key; write learning_rate=2",
    ):
        assert said in str(caught.value)


def test_what_other_trainers_log_and_push_has_its_keys() -> None:
    """A name is not denied where there is a key for it."""
    for name, key in {
        "report_to": "log=", "logging_dir": "log=", "wandb_project": "log=",
        "push_to_hub": "hub.push=", "hub_model_id": "hub.push=",
    }.items():  # fmt: skip
        assert FOREIGN[name].startswith(key), name


def test_no_sink_is_named_twice() -> None:
    with pytest.raises(InputError, match="log: .* must be a list that names none twice"):
        c.load_config(RunConfig, None, ["log=[wandb, trackio, wandb]"])


def test_one_base_alone(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("base: toy\nseed: 3\nbase: own-data\n")
    with pytest.raises(InputError, match=r"run.yaml:3: base: given twice \(first in line 1\)"):
        c.load_config(RunConfig, file)


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("seed=1.5", "'1.5' is not an integer"),
        ("seed=1e3", "'1e3' is not an integer"),
        ("seed=1:30", "is not an integer"),  # YAML 1.1 would make it 90
        ("seed=010", "is not an integer"),  # and this 8
        ("seed=true", "'true' is not an integer"),
        ("seed=", "is not an integer"),
        ("seed=[1]", "a list is not an integer"),
        ("greedy=1", "'1' is not true or false"),
        ("learning_rate=fast", "'fast' is not a number"),
        ("learning_rate=nan", "nan is not a finite number"),
        ("learning_rate=.nan", ".nan is not a finite number"),
        ("learning_rate=inf", "inf is not a finite number"),
        ("learning_rate=-.inf", "not a"),
        ("learning_rate=1e999", "1e999 is not a finite number"),
        ("learning_rate=-1", "-1.0 must be greater than 0"),
        ("learning_rate=0", "0.0 must be greater than 0"),
        ("top_p=1.5", "1.5 must be greater than 0, at most 1"),
        ("seed=-1", "-1 must be 0 or greater"),
        ("max_rows=0", "0 must be greater than 0"),
        ("max_rows=some", "'some' is not an integer"),
        ("run=null", "'null' is not text"),
        ("method=spinn", "'spinn' is not one of ld_align, spin, sft; did you mean spin?"),
        ("betas=[0.9, x]", "'x' is not a number"),
        ("betas=0.9", "'0.9' is not a list, each a number; write [0.9]"),
        ("run=", "an empty value is not text"),
        ("my/rows.jsonl", "not of the form key=value; is it data=my/rows.jsonl?"),
        ("betas=[0.9", "not valid YAML"),
        ("just_text", "not of the form key=value"),
    ],
)
def test_wrong_values(override: str, expected: str) -> None:
    message = refusal(override)
    assert expected in message
    assert override in message  # says where
    assert override.split("=")[0] in message


def test_all_problems_at_once_with_file_and_line(tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        load(tmp_path, "seed: x\n\nguide:\n  epochs: 0\nlerning_rate: 1\nseed: 2\n", "top_p=2")
    message = str(caught.value)
    file = tmp_path / "toy.yaml"
    assert message.startswith("5 problems: ")
    assert f"{file}:1: seed: 'x' is not an integer" in message
    assert f"{file}:4: guide.epochs: 0 must be greater than 0" in message
    assert f"{file}:5: lerning_rate: unknown key; did you mean learning_rate?" in message
    assert f"{file}:6: seed: given twice (first in line 1)" in message
    assert "top_p=2: top_p: 2.0 must be" in message


def test_contradictions_are_checked_on_the_whole() -> None:
    assert refusal("greedy=true", "top_p=0.5") == "greedy: contradicts top_p below 1; drop one"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a: [\n", ":2: not valid YAML"),
        ("- a\n", ":1: a config must be"),
        ("? [a]\n: b\n", ":1: a key must be plain"),
    ],
)
def test_files_that_are_no_config(tmp_path: Path, text: str, expected: str) -> None:
    with pytest.raises(InputError, match="toy.yaml" + expected):
        load(tmp_path, text)


def test_unreadable_files(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="absent.yaml: No such file"):
        c.load_config(Toy, tmp_path / "absent.yaml")
    (tmp_path / "latin").write_bytes(b"run: \xe9")
    with pytest.raises(InputError, match="latin: not UTF-8 text"):
        c.load_config(Toy, tmp_path / "latin")


def test_yaml_cannot_build_objects(tmp_path: Path) -> None:
    with pytest.raises(InputError):
        load(tmp_path, "run: !!python/object/apply:os.getcwd []\n")


def test_required_keys() -> None:
    @dataclass(frozen=True, kw_only=True)
    class Strict:
        size: int = c.setting(1, "Size.")
        policy: str = c.setting(c.REQUIRED, "model folder")

    with pytest.raises(InputError, match=r"policy: must be given \(model folder\)"):
        c.load_config(Strict)
    assert c.load_config(Strict, None, ["policy=x"]) == Strict(policy="x")
    assert "policy=REQUIRED" in c.describe(Strict)


TEXT = st.sampled_from(
    ["None", "null", "~", "yes", "1e-4", "[", "a: b", "\x85", "\u2028x", " x\n\t"]
) | st.text(
    st.characters(codec="utf-8", exclude_characters="\x00", exclude_categories=("Cs",)), max_size=20
)


@settings(derandomize=True, deadline=None, max_examples=200)
@given(
    run=TEXT,
    learning_rate=st.floats(min_value=1e-300, max_value=1e300),
    seed=st.integers(0, 2**63),
    note=st.none() | TEXT,
    data=TEXT | st.lists(TEXT),
    folder=st.none() | TEXT,
)
def test_yaml_round_trip(
    tmp_path_factory: pytest.TempPathFactory, folder: str | None, **keys: Any
) -> None:
    config = Toy(**keys, guide=Guide(folder=folder))
    path = tmp_path_factory.mktemp("config") / "config.yaml"
    path.write_bytes(c.to_yaml(config).encode())
    assert c.load_config(Toy, path) == config
    path.write_bytes(c.to_yaml(config, changed=True).encode())
    assert c.load_config(Toy, path) == config


def test_yaml_of_what_is_changed() -> None:
    assert c.to_yaml(Toy(), changed=True) == "{}\n"
    config = Toy(max_rows=5, guide=Guide(epochs=4))
    assert c.to_yaml(config, changed=True) == "max_rows: 5\nguide:\n  epochs: 4\n"


def test_list_defaults_are_not_shared() -> None:
    @dataclass(frozen=True)
    class Lists:
        items: list[int] = c.setting([1], "Items.")
        plain: list[int] = field(default_factory=list)

    first, second = c.load_config(Lists), c.load_config(Lists)
    first.items.append(2)
    assert second.items == [1]


def test_describe_names_every_key() -> None:
    text = c.describe(Toy)
    assert "learning_rate=5e-07  (a number; greater than 0)\n    Peak learning rate." in text
    assert "guide:  The guiding model. guide=VALUE is short for guide.folder=VALUE" in text
    assert "guide.epochs=3  (an integer; greater than 0)" in text
    assert "max_rows=null  (an integer or null; greater than 0)" in text
    assert "greedy=false" in text and "method=ld_align  (one of ld_align, spin, sft)" in text


def test_split_argv() -> None:
    argv = ["--config", "a.yaml", "seed=1", "--dry-run", "x=--y"]
    assert c.split_argv(argv, ["--dry-run", "--help"]) == (
        Path("a.yaml"),
        ["seed=1", "x=--y"],
        {"--dry-run"},
    )
    assert c.split_argv(["--config=b.yaml"]) == (Path("b.yaml"), [], set())
    with pytest.raises(InputError, match="--dry-rum: unknown option; did you mean --dry-run"):
        c.split_argv(["--dry-rum"], ["--dry-run"])
    for argv in (["--data", "x.jsonl"], ["--data=x.jsonl"], ["seed=1", "--data", "x.jsonl"]):
        with pytest.raises(InputError, match="a key is given without dashes: data=x.jsonl$"):
            c.split_argv(argv, ["--dry-run"])
    for argv in (["--max-rows"], ["--max-rows", "seed=1"]):
        with pytest.raises(InputError, match="without dashes: max_rows=VALUE$"):
            c.split_argv(argv)
    assert c.split_argv(["-h"], ["--help"]) == (None, [], {"--help"})
    with pytest.raises(InputError, match="-h: unknown option$"):
        c.split_argv(["-h"])
    with pytest.raises(InputError, match="needs a file name"):
        c.split_argv(["--config"])


# --------------------------------------------------------------------------------------------- base


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def test_a_base_holds_where_the_file_says_nothing(tmp_path: Path) -> None:
    """Three files deep, groups key by key; the command line wins over all."""
    write(tmp_path / "a.yaml", "seed: 1\nbeta: 0.5\ntraining: {epochs: 7, optimizer: adamw}\n")
    (tmp_path / "deeper").mkdir()
    write(
        tmp_path / "deeper/b.yaml", "base: ../a.yaml\nseed: 2\nmax_rows: 9\ntraining: {epochs: 8}\n"
    )
    path = write(tmp_path / "c.yaml", "base: deeper/b.yaml\nmax_rows: null\n")
    config = c.load_config(RunConfig, path, ["beta=0.25"])
    assert (config.seed, config.beta, config.max_rows) == (2, 0.25, None)
    assert (config.training.epochs, config.training.optimizer) == (8, "adamw")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("base: none.yaml", "x.yaml:1: base: .*none.yaml: no such file; the name is relative"),
        ("seed: 1\nbase: x.yaml", "x.yaml:2: base: .* leads back to itself"),
        ("base: back.yaml", "back.yaml:1: base: .* leads back to itself"),
        ("base: [a.yaml]", "x.yaml:1: base must be the name of a config file, not a list"),
        ("base: wrong.yaml", "wrong.yaml:1: sede: unknown key"),
    ],
)
def test_a_base_that_is_none(tmp_path: Path, text: str, message: str) -> None:
    write(tmp_path / "back.yaml", "base: x.yaml")
    write(tmp_path / "wrong.yaml", "sede: 1")
    with pytest.raises(InputError, match=message):
        c.load_config(RunConfig, write(tmp_path / "x.yaml", text))
