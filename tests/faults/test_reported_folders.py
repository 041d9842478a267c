"""Inputs that fail, in the shape of public reports: model and tokenizer folders.

The folders lie beside the repository where they are at hand; what each is about is tested, with
inputs made on the spot, in tests/data (test_chat_answers, test_special_tokens, test_chat_templates,
test_tokenizer) and tests/models/test_model_folders.py.
"""

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from made_tokenizers import as_row, messages
from made_weights import refusal
from runs import ROOT

from ldalign.data.encoding import Fitting, encode_rows
from ldalign.data.reading import read_rows
from ldalign.data.records import BadRow
from ldalign.data.tokenizer import Tokenizer, load_tokenizer
from ldalign.data.tokenizer_export import save_tokenizer_files
from ldalign.generation.external import read_losers
from ldalign.models import toy
from ldalign.models.mistral import Mistral
from ldalign.models.weights import context_length, load_model
from ldalign.system.errors import InputError

FAULTS = ROOT.parent / "shared/data/faults"
needs_faults = pytest.mark.skipif(not FAULTS.is_dir(), reason=f"{FAULTS} is not there")


def shown(tokenizer: Tokenizer, ids: list[int]) -> str:
    return tokenizer.decode(ids, skip_special_tokens=False)


@needs_faults
@pytest.mark.parametrize("name", ["k01_additional_in_vocab", "k04_extra_list", "k05_extra_dict"])
def test_a_declared_token_is_one_id(name: str) -> None:
    """A token is declared in additional_special_tokens or extra_special_tokens alone.

    Expected: one id, which only the template writes.
    """
    tokenizer = load_tokenizer(FAULTS / "tokenizers" / name)
    ids = tokenizer.prompt_ids(messages([("user", "a <|tool|> b")]))
    assert ids[0] == 377 and ids.count(377) == 1
    assert shown(tokenizer, ids).startswith("<|tool|><|im_start|>user\na <|tool|> b")


@needs_faults
def test_only_a_sentencepiece_model() -> None:
    """A folder has tokenizer.model and no tokenizer.json.

    Expected: one line that says how to convert it.
    """
    with pytest.raises(InputError, match=r"tokenizer.model: is a tokenizer of an older kind"):
        load_tokenizer(FAULTS / "tokenizers/k13_spm_model_only")


@needs_faults
@pytest.mark.parametrize("name", ["k30_template_drops_reasoning", "k40_template_collapses_spaces"])
def test_an_answer_that_the_template_changes(name: str) -> None:
    """The template cuts the reasoning out of an answer, or rewrites it.

    Expected: the row is bad, and the message says which part.
    """
    tokenizer = load_tokenizer(FAULTS / "tokenizers" / name)
    row = as_row([("user", "q"), ("assistant", "<think>x</think>the  answer")])
    [bad] = tokenizer.pairs_ids([row])
    assert isinstance(bad, BadRow) and "leaves out or changes a part of the answer" in str(bad)


@needs_faults
@pytest.mark.parametrize("name", ["k31_namespace_in_loop", "k32_many_calls_in_loop"])
def test_calls_in_a_loop(name: str) -> None:
    """A template makes a namespace in a loop, or calls sixty times beside long texts.

    Expected: rendered as jinja2 does.
    """
    tokenizer = load_tokenizer(FAULTS / "tokenizers" / name)
    text = "word " * 5000 + "end"
    assert tokenizer.render(messages([("user", text)]), True) == (
        f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n"
    )


@needs_faults
def test_the_system_text_in_the_last_user_turn() -> None:
    """A template puts the system text into the last user turn.

    Expected: the prompt as for generation, the answer behind it.
    """
    tokenizer = load_tokenizer(FAULTS / "models/k50_system_in_last_user_turn")
    row = as_row([("system", "Be brief."), ("user", "2 + 2?"), ("assistant", "four")])
    pair = tokenizer.pair_ids(row)
    assert pair.prompt == tokenizer.prompt_ids(row.history)
    assert shown(tokenizer, pair.prompt).endswith("Be brief.\n\n2 + 2?[/INST]")
    assert shown(tokenizer, pair.response).strip() == "four</s>"


@needs_faults
def test_one_row_that_the_template_refuses() -> None:
    """One row of 200 has a system turn, which the template refuses.

    Expected: a bad row, with the file, the line and what the template says.
    """
    rows = read_rows(FAULTS / "data/g01_one_system_row.jsonl")
    tokenizer = load_tokenizer(FAULTS / "models/g01_refuses_system")
    bad = [i for i, pair in enumerate(tokenizer.pairs_ids(rows)) if isinstance(pair, BadRow)]
    assert bad == [57]
    where = r"g01_one_system_row.jsonl:58: chat template: System role not supported$"
    with pytest.raises(InputError, match=where):
        tokenizer.pair_ids(rows[57])


@needs_faults
@pytest.mark.parametrize("name", ["d12_answer_starts_newline", "d13_rejected_starts_newline"])
def test_an_answer_that_begins_with_line_ends(name: str, tmp_path: Path) -> None:
    """One answer of 200, or one rejected one, begins with two line ends.

    Expected: all 200 rows are trained on, the prompts as for generation.
    """
    rows = read_rows(FAULTS / f"data/{name}.jsonl")
    tokenizer = load_tokenizer(toy.write_toy_model(tmp_path / "toy"))
    prepared = encode_rows(rows, tokenizer, Fitting(500))
    assert len(prepared.pairs) == 200
    assert all(
        pair.prompt == tokenizer.prompt_ids(row.history)
        for row, pair in zip(rows, prepared.pairs, strict=True)
    )
    losers = [row.rejected or row.response for row in rows]
    row = as_row([("user", "q"), ("assistant", losers[57])])
    assert shown(tokenizer, tokenizer.pair_ids(row).response).startswith("\n\n")


@needs_faults
@pytest.mark.parametrize(
    ("name", "theta", "window", "context"),
    [
        ("m01_rope_scaling_default_theta", 500000.0, 48, 512),
        ("m11_index_names_absent_buffers", 10000.0, 48, 512),
        ("m23_short_context", 10000.0, 48, 64),
    ],
)
def test_folders_that_load(name: str, theta: float, window: int, context: int) -> None:
    """The rotary base stands in rope_scaling; the index names buffers; the context is short.

    Expected: read as transformers reads them.
    """
    folder = FAULTS / "models" / name
    model = load_model(folder, torch.float32)
    assert isinstance(model, Mistral)
    assert (model.config.rope_theta, model.config.sliding_window) == (theta, window)
    assert context_length(folder) == context


@needs_faults
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("m06b_layer_types", "layer_types asks for layers of several kinds"),
        ("m10_adapter_beside", "adapter_config.json: is an adapter"),
        ("m41_lfs_weights", "model.safetensors: is a Git LFS pointer"),
    ],
)
def test_folders_that_are_refused(name: str, message: str) -> None:
    """Layers of two kinds; an adapter beside the weights; weights that Git LFS has not fetched.

    Expected: one line.
    """
    refusal(FAULTS / "models" / name, message)


@needs_faults
def test_a_tokenizer_that_git_lfs_has_not_fetched() -> None:
    """tokenizer.json is a Git LFS pointer.

    Expected: one line.
    """
    with pytest.raises(InputError, match=r"tokenizer.json: is a Git LFS pointer"):
        load_tokenizer(FAULTS / "models/m42_lfs_tokenizer")


@needs_faults
def test_all_named_templates_are_exported(tmp_path: Path) -> None:
    """A folder has two templates in a list, and one in a folder.

    Expected: all of them in the export.
    """
    save_tokenizer_files(FAULTS / "models/x01_named_templates", tmp_path / "out")
    assert {path.name for path in (tmp_path / "out").rglob("*.jinja")} == {
        "chat_template.jinja",
        "tool_use.jinja",
    }


def test_losers_whose_prompts_lack_the_bos(
    zephyr_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Responses were sampled elsewhere with the folder's own template, which writes no BOS.

    Expected: taken, with a warning that names the BOS; another difference is an error.
    """
    tokenizer = load_tokenizer(zephyr_folder)
    rows = [as_row([("user", "Name a river"), ("assistant", "The Ob")])]
    pairs = encode_rows(rows, tokenizer, Fitting(500)).pairs
    path = tmp_path / "losers.jsonl"

    def read(ids: list[int]) -> Any:
        record = {"id": "r", "response": "No", "prompt_token_ids": ids}
        path.write_text(json.dumps(record))
        return read_losers(path, rows, pairs, rows, tokenizer, tmp_path / "train.jsonl")

    with caplog.at_level(logging.WARNING):
        [response] = read(pairs[0].prompt[1:])
    assert tokenizer.decode(response.ids) == "No"
    assert "1 of 1 prompts lack the BOS (id 1)" in caplog.text
    caplog.clear()
    read(pairs[0].prompt)
    assert "BOS" not in caplog.text
    with pytest.raises(InputError, match="prompt_token_ids differ"):
        read(pairs[0].prompt[2:])


@needs_faults
def test_losers_without_bos_as_reported(caplog: pytest.LogCaptureFixture) -> None:
    """The same, as it was reported.

    Expected: taken, with a warning.
    """
    rows = read_rows(FAULTS / "data/z01_rows.jsonl")
    tokenizer = load_tokenizer(FAULTS / "models/z01_zephyr_like")
    pairs = encode_rows(rows, tokenizer, Fitting(500)).pairs
    path = FAULTS / "data/z01_losers_no_bos.jsonl"
    with caplog.at_level(logging.WARNING):
        assert len(read_losers(path, rows, pairs, rows, tokenizer, path)) == len(rows)
    assert "prompts lack the BOS (id 1)" in caplog.text


@needs_faults
def test_the_exported_template_writes_the_bos(tmp_path: Path) -> None:
    """The same folder is exported.

    Expected: the template writes the BOS that training used.
    """
    folder = FAULTS / "models/z01_zephyr_like"
    save_tokenizer_files(folder, tmp_path / "out")
    chat = messages([("user", "x")])
    assert load_tokenizer(tmp_path / "out").render(chat) == "<s>" + load_tokenizer(folder).render(
        chat
    )
    shutil.rmtree(tmp_path / "out")
