"""Policies pushed to the hub: what is sent, what is refused first, what a failure says."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from fake_hub import FakeHub, Refusal, hub_on_this_machine
from runs import ROOT, one_thread

from ldalign.models.toy import write_toy_model
from ldalign.run.compare_settings import CompareConfig
from ldalign.run.settings import RunConfig
from ldalign.system import hub
from ldalign.system.config import load_config
from ldalign.system.errors import EnvironmentProblem, InputError, LdalignError
from ldalign.train import align, command, push, sft


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeHub:
    return FakeHub(monkeypatch, {})


@pytest.fixture
def policy(tmp_path: Path) -> Path:
    """A policy's folder, with the files of its stage and a card."""
    folder = write_toy_model(tmp_path / "it's/policy")
    for name in ("manifest.json", "summary.json", "metrics.jsonl", "README.md", "optimizer.pt"):
        (folder / name).write_text(name)
    (folder / "checkpoint-5").mkdir()
    (folder / "checkpoint-5/model.safetensors").write_text("")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates/tools.jinja").write_text("t")
    return folder


PUSHED = {
    "README.md",
    "additional_chat_templates/tools.jinja",
    "chat_template.jinja",
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
}


def test_what_is_pushed(fake: FakeHub, policy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Weights, tokenizer, card: nothing else of the folder; weights of an earlier push go."""
    fake.pushed = {"model-00001-of-00002.safetensors": b"", "notes.md": b"mine"}
    push.main([str(policy), "me/policy"])
    assert fake.repositories == {"me/policy": True}, "private"
    assert set(fake.pushed) == PUSHED | {"notes.md"}
    assert fake.pushed["model.safetensors"] == (policy / "model.safetensors").read_bytes()
    assert "pushed 8 files: https://hub/me/policy/commit/c0ffee" in capsys.readouterr().err
    (policy / "README.md").write_text("more is known")
    push.main([str(policy), "me/policy"])
    assert fake.calls[-1] == ["README.md"], "the rest is there"
    push.main([str(policy), "Our-Lab/policy", "private=false"])
    assert fake.repositories["Our-Lab/policy"] is False


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "push: give FOLDER OWNER/NAME"),
        (["FOLDER"], r"give FOLDER OWNER/NAME \[private=false\]"),
        (["FOLDER", "me/policy", "private=no"], "give FOLDER OWNER/NAME"),
        (["FOLDER", "policy"], "^policy: no repository of the hub is called that"),
        (["nowhere", "me/policy"], "model 'nowhere': no such folder"),
    ],
)
def test_the_script_refuses(
    arguments: list[str], message: str, fake: FakeHub, policy: Path
) -> None:
    with pytest.raises(InputError, match=message):
        push.main([str(policy) if one == "FOLDER" else one for one in arguments])
    assert not fake.repositories


@pytest.mark.parametrize(
    ("name", "good"),
    [
        ("me/policy", True),
        ("Our-Lab/smollm2_v1.0", True),
        ("policy", False),
        ("me/a/b", False),
        ("me/a--b", False),
        ("me/a..b", False),
        ("me/a.git", False),
        ("me/policy-", False),
        ("me/pol icy", False),
        ("-me/policy", False),
        ("me/" + "a" * 97, False),
        ("", False),
    ],
)
def test_names(name: str, good: bool) -> None:
    assert hub.is_repository(name) == good


def broken(name: str, error: Any) -> Any:
    def arrange(fake: FakeHub) -> None:
        fake.fails[name] = fake.errors[error]("said\n so") if isinstance(error, str) else error

    return arrange


def set_to(**values: Any) -> Any:
    return lambda fake: vars(fake).update(values)


READER = {"name": "me", "auth": {"accessToken": {"role": "read"}}}
CHECKS = {
    "no token": (broken("whoami", "LocalTokenNotFoundError"), InputError, "there is no token; set"),
    "bad token": (broken("whoami", Refusal(401)), InputError, "does not accept the token"),
    "token that reads": (set_to(who=READER), InputError, "the token only reads"),
    "another's": (set_to(who={"name": "you"}), InputError, "owner is you, not me"),
    "forbidden": (broken("create_repo", Refusal(403)), InputError, r"may not write there.*no way"),
    "name": (
        broken("create_repo", "HFValidationError"),
        InputError,
        "the name is refused: said so",
    ),
    "refused": (broken("create_repo", Refusal(400)), InputError, "is refused: no way"),
    "public": (set_to(repositories={"me/policy": False}), InputError, "there already and public"),
    "no network": (
        broken("whoami", ConnectionError("no\nroute")),
        EnvironmentProblem,
        r"the hub cannot be reached \(ConnectionError: no route\)",
    ),
    "hub is down": (broken("create_repo", Refusal(503)), EnvironmentProblem, "cannot be reached"),
}


@pytest.mark.parametrize("case", CHECKS)
def test_a_run_is_refused_before_it_begins(
    case: str,
    fake: FakeHub,
    tmp_path: Path,
    in_process: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(command, "open_run", lambda *_: pytest.fail("it began"))
    arrange, kind, message = CHECKS[case]
    arrange(fake)
    run = ["policy=toy", f"cache={tmp_path}", f"run={tmp_path / 'run'}", "hub.push=me/policy"]
    with pytest.raises(LdalignError, match=f"^push to me/policy: .*{message}") as caught:
        align.main(run)
    assert type(caught.value) is kind and "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists() and not fake.pushed


def test_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(EnvironmentProblem, match=r"pip install 'huggingface_hub>=0.24'"):
        hub.check_push("me/policy", True, make=True)


def test_settings(fake: FakeHub, tmp_path: Path, in_process: None) -> None:
    with pytest.raises(InputError, match=r"hub.push=policy: .*must be OWNER/NAME, as the hub"):
        load_config(RunConfig, None, ["hub.push=policy"])
    with pytest.raises(InputError, match=r"hub.push: a comparison pushes none"):
        load_config(CompareConfig, None, ["hub.push=me/policy", "training.steps=3"])
    with pytest.raises(InputError, match=r"hub.push=me/policy: no policy is trained"):
        align.main([f"run={tmp_path}/run", "policy=toy", "hub.push=me/policy", "iterations=0"])
    assert not fake.repositories


def test_a_run_pushes_what_it_ends_with(
    fake: FakeHub,
    tmp_path: Path,
    toy_cache: Path,
    in_process: None,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """The network goes at the end: one line, and everything is kept; the same command sends it."""
    run = ["--config", str(ROOT / "configs/toy.yaml"), f"cache={toy_cache}"]
    run += [f"run={tmp_path / 'run'}", "hub.push=me/policy", "evaluation.samples=0"]
    sft.main([*run, "--dry-run"])
    assert not fake.repositories, "a dry run makes nothing"
    fake.fails["upload_folder"] = ConnectionError("no\nroute")
    with pytest.raises(EnvironmentProblem) as caught:
        sft.main(run)
    folder = tmp_path / "run/sft/policy"
    assert str(caught.value) == (
        "push to me/policy: the hub cannot be reached (ConnectionError: no route); nothing is "
        f"lost, the policy is in {folder}: run the same command again, or ldalign push {folder} "
        "me/policy"
    )
    assert (tmp_path / "run/report/table.md").is_file() and not fake.pushed
    fake.fails.clear()
    capfd.readouterr()
    sft.main(run)
    assert "sft/policy: already done" in capfd.readouterr().err
    assert fake.pushed["model.safetensors"] == (folder / "model.safetensors").read_bytes()
    assert b"NLL of the data's responses" in fake.pushed["README.md"], "the card with its table"


# ---------------------------------------------------------------------------------- the real client


def push_for_real(address: str, token: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING"))}
    environment |= one_thread() | {
        "HF_ENDPOINT": address,
        "HF_TOKEN": token,
        "HF_HUB_DISABLE_XET": "1",
    }
    environment |= {"HOME": str(ROOT / "none"), "NO_PROXY": "*", "no_proxy": "*"}
    command = [sys.executable, ROOT / "train/push.py", *arguments]
    return subprocess.run(
        [str(one) for one in command], capture_output=True, text=True, env=environment
    )


def test_with_the_real_client(policy: Path) -> None:
    """huggingface_hub itself, and a hub on this machine: pushed, refused, and out of reach."""
    with hub_on_this_machine("right") as (address, there):
        there["me/policy/model-00001-of-00002.safetensors"] = b"old"
        done = push_for_real(address, "right", policy, "me/policy")
        assert done.returncode == 0, done.stderr
        names = {name.removeprefix("me/policy/") for name in there}
        assert names == PUSHED
        weights = (policy / "model.safetensors").read_bytes()
        assert there["me/policy/model.safetensors"] == weights
        wrong = push_for_real(address, "wrong", policy, "me/policy")
    assert wrong.returncode == 2
    assert "ldalign: error: push to me/policy: the hub does not accept the token" in wrong.stderr
    gone = push_for_real(address, "right", policy, "me/policy")
    assert gone.returncode == 3
    assert "ldalign: error: push to me/policy: the hub cannot be reached" in gone.stderr
    assert json.loads((policy / "config.json").read_text())
