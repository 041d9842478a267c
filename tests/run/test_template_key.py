"""`template=FILE`: a chat template in place of the policy's own, everywhere in a run."""

import hashlib
import json
from pathlib import Path

import pytest
from runs import ROOT
from toy_context import open_toy

from ldalign.data.tokenizer import load_tokenizer
from ldalign.models.toy import TEMPLATE
from ldalign.run.stages.judged import judge_parents, open_judge
from ldalign.system.errors import InputError
from ldalign.system.files import read_jsonl
from ldalign.train import align, generate

OTHER = "<|im_start|>system\nMARK<|im_end|>\n" + TEMPLATE
HELLO = [{"role": "user", "content": "Hello"}]


@pytest.fixture
def template(tmp_path: Path) -> Path:
    file = tmp_path / "other.jinja"
    file.write_text(OTHER)
    return file


def sha(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def parents(folder: Path) -> dict[str, object]:
    found: dict[str, object] = json.loads((folder / "manifest.json").read_text())["parents"]
    return found


@pytest.mark.slow
def test_a_run_with_another_template(
    tmp_path: Path, toy_cache: Path, template: Path, in_process: None
) -> None:
    """Prompts have its mark, every stage that reads one names it, every policy made carries it, and
    so does a guide that starts as the policy. A changed file is refused.
    """
    run = tmp_path / "run"
    options = [
        "--config",
        str(ROOT / "configs/toy.yaml"),
        f"run={run}",
        f"cache={toy_cache}",
        f"template={template}",
        "iterations=1",
        "max_rows=16",
        "sft.rows=16",
        "sft.epochs=1",
        "continual_sft.epochs=0",
        "max_new_tokens=6",
        "guide.backbone=policy",
        "report=table",
    ]
    align.main(options)
    for stage in ("sft/policy", "iteration_0/responses", "iteration_0/reference", "guide"):
        assert parents(run / stage)["template"] == sha(OTHER), stage
    for folder in ("sft/policy", "iteration_0/policy", "guide/encoder"):
        assert (run / folder / "chat_template.jinja").read_text() == OTHER
        settings = json.loads((run / folder / "tokenizer_config.json").read_text())
        assert settings["chat_template"] == OTHER
    exported = load_tokenizer(run / "iteration_0/policy")
    assert exported.render(HELLO).startswith("<|im_start|>system\nMARK<|im_end|>\n")
    # the policy itself keeps its own
    assert load_tokenizer(next(toy_cache.glob("toy-*"))).template == TEMPLATE
    template.write_text(OTHER.replace("MARK", "OTHER"))
    with pytest.raises(InputError, match="template was"):
        align.main(options)
    with pytest.raises(InputError, match="template was"):
        align.main([option for option in options if not option.startswith("template=")])


def test_prompts_are_rendered_by_it(toy_cache: Path, template: Path, in_process: None) -> None:
    ctx = open_toy(toy_cache, f"template={template}")
    assert ctx.template == OTHER and ctx.tokenizer.template_hash == sha(OTHER)
    assert "MARK" in ctx.tokenizer.decode(ctx.train.pairs[0].prompt)
    own = open_toy(toy_cache)
    assert own.template is None and "MARK" not in own.tokenizer.decode(own.train.pairs[0].prompt)


def test_the_policy_judges_by_it_and_others_by_their_own(
    tmp_path: Path, toy_cache: Path, template: Path, in_process: None
) -> None:
    ctx = open_toy(toy_cache, f"template={template}", "judge=policy")
    judge = open_judge(ctx, ctx.start)
    assert judge.tokenizer.template == OTHER  # type: ignore[attr-defined]
    assert judge_parents(ctx, ctx.start)["template"] == sha(OTHER)
    other = open_toy(toy_cache, f"template={template}", f"judge={ctx.start}")
    assert open_judge(other, ctx.start).tokenizer.template == TEMPLATE  # type: ignore[attr-defined]
    assert "template" not in judge_parents(other, ctx.start)


def test_prompts_of_a_file(
    tmp_path: Path, toy_cache: Path, template: Path, in_process: None
) -> None:
    """generate.py: the answers' manifest names it, and another is refused."""
    prompts, out = tmp_path / "prompts.jsonl", tmp_path / "out"
    prompts.write_text('{"prompt": "Hello"}\n')
    options = [
        "policy=toy",
        f"cache={toy_cache}",
        f"prompts={prompts}",
        f"output={out}",
        "max_new_tokens=3",
    ]
    generate.main([*options, f"template={template}"])
    assert parents(out)["template"] == sha(OTHER) and len(read_jsonl(out / "answers.jsonl")) == 1
    with pytest.raises(InputError, match="template was"):
        generate.main(options)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "template=.*: no such file"),
        (" \n", "template=.*: is empty"),
        ("{% for %}", r"template=.*chat.jinja: TemplateSyntaxError: .* \(line 1\)"),
        (b"\xff\xfe", "not UTF-8"),
    ],
)
def test_a_template_that_cannot_be_used(
    text: str | bytes | None, message: str, tmp_path: Path, toy_cache: Path, in_process: None
) -> None:
    file = tmp_path / "chat.jinja"
    if text is not None:
        file.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(InputError, match=message):
        open_toy(toy_cache, f"template={file}")


def test_a_link_to_a_template_is_as_good(
    tmp_path: Path, toy_cache: Path, template: Path, in_process: None
) -> None:
    (tmp_path / "links").mkdir()
    link = tmp_path / "links/chat.jinja"
    link.symlink_to(template)
    assert open_toy(toy_cache, f"template={link}").template == OTHER


def test_a_template_that_fails_is_named_by_its_file(toy_cache: Path, template: Path) -> None:
    """With its line, for every row, and where it leaves an answer out of one."""
    template.write_text(TEMPLATE + "\n{{ nothing.at_all }}")
    with pytest.raises(InputError, match=rf"template={template}: UndefinedError: .* \(line \d+\)"):
        open_toy(toy_cache, f"template={template}")
    template.write_text("a\n{% if %}")
    with pytest.raises(InputError, match=rf"^template={template}: TemplateSynt.* \(line 2\)$"):
        open_toy(toy_cache, f"template={template}")
