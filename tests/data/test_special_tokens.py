"""Special tokens as transformers reads them, from every file that may declare them."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from made_tokenizers import CHATML_TEMPLATE, byte_level_tokenizer, messages, write_tokenizer_folder

from ldalign.data.tokenizer import load_tokenizer
from ldalign.system.errors import InputError

IN_VOCABULARY = "<|tool|>"  # a piece of the model's vocabulary that no file calls an added token
NEW = ("<|new|>", "<|call|>", "[THINK]")
TOKENS = (IN_VOCABULARY, *NEW)


def size_of(tokenizer_json: Path) -> int:
    raw = json.loads(tokenizer_json.read_text(encoding="utf-8"))
    return 1 + max([*raw["model"]["vocab"].values(), *(t["id"] for t in raw["added_tokens"])])


def write(folder: Path, rows: int | None = None, template: str = CHATML_TEMPLATE, **config: Any):
    """A ChatML folder with a piece IN_VOCABULARY; rows: of the embedding, beyond the vocabulary."""
    write_tokenizer_folder(folder, byte_level_tokenizer(), template)
    path = folder / "tokenizer.json"
    raw = json.loads(path.read_text(encoding="utf-8"))
    raw["model"]["vocab"][IN_VOCABULARY] = len(raw["model"]["vocab"])
    path.write_text(json.dumps(raw), encoding="utf-8")
    settings_ = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>", **config}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings_), encoding="utf-8")
    if rows is not None:
        sizes = {"vocab_size": size_of(path) + rows}
        (folder / "config.json").write_text(json.dumps(sizes), encoding="utf-8")
    return folder


def entry(token: str) -> dict[str, Any]:
    return {"__type": "AddedToken", "content": token, "lstrip": False, "rstrip": False,
            "normalized": False, "single_word": False}  # fmt: skip


token = st.sampled_from(TOKENS)
some = st.lists(token, unique=True, max_size=3)
DECLARATIONS = st.fixed_dictionaries(
    {},
    optional={
        "additional_special_tokens": some,
        "extra_special_tokens": some | st.dictionaries(st.sampled_from(("a_token", "b")), token),
        "pad_token": token | token.map(entry),
        "image_token": token,
        "mask_token": st.none() | token,
    },
)
MAPS = st.none() | st.fixed_dictionaries(
    {}, optional={"additional_special_tokens": some, "cls_token": token, "eos_token": token}
)


@settings(max_examples=80, deadline=None, suppress_health_check=list(HealthCheck))
@given(DECLARATIONS, MAPS, st.booleans())
def test_declared_tokens_have_the_ids_of_transformers(
    tmp_path_factory: pytest.TempPathFactory, config: Any, older: Any, decoder: bool
) -> None:
    """Any declaration, in any of the files: the same ids, and the same names in templates."""
    from transformers import AutoTokenizer

    names = ("pad_token", "image_token", "mask_token", "cls_token", "a_token", "b")
    template = "".join("{{ " + name + " }}|" for name in names)
    folder = write(tmp_path_factory.mktemp("declared"), 10, template, **config)
    if older is not None:
        (folder / "special_tokens_map.json").write_text(json.dumps(older), encoding="utf-8")
    if decoder:
        path = folder / "tokenizer_config.json"
        raw = json.loads(path.read_text(encoding="utf-8"))
        raw["added_tokens_decoder"] = {"2": {**entry("<|im_end|>"), "special": True}}
        path.write_text(json.dumps(raw), encoding="utf-8")
    theirs, ours = AutoTokenizer.from_pretrained(folder), load_tokenizer(folder)
    text = "x ".join(("", *TOKENS, "")) + "".join(TOKENS)
    assert ours.encode_rendered(text) == theirs(text, add_special_tokens=False)["input_ids"]
    chat = messages([("user", "x")])
    assert ours.render(chat) == theirs.apply_chat_template(chat, tokenize=False)
    # and a message that spells one is text
    assert not set(ours.encode(text)) & {i for i in theirs.all_special_ids if i is not None}


@pytest.mark.parametrize("place", ["additional_special_tokens", "extra_special_tokens"])
def test_a_piece_of_the_vocabulary_becomes_one_token(place: str, tmp_path: Path) -> None:
    folder = write(tmp_path, template="<|tool|>" + CHATML_TEMPLATE, **{place: [IN_VOCABULARY]})
    tokenizer = load_tokenizer(folder)
    ids = tokenizer.prompt_ids(messages([("user", "say <|tool|>")]))
    tool = size_of(folder / "tokenizer.json") - 1
    assert ids[0] == tool and ids.count(tool) == 1  # the message's is spelled in pieces
    assert "say <|tool|>" in tokenizer.decode(ids)


def test_a_named_extra_token_is_there_for_the_template(tmp_path: Path) -> None:
    extra = {"tool_token": IN_VOCABULARY}
    folder = write(tmp_path, template="{{ tool_token }}" + CHATML_TEMPLATE,
                   extra_special_tokens=extra)  # fmt: skip
    ids = load_tokenizer(folder).prompt_ids(messages([("user", "x")]))
    assert ids[0] == size_of(folder / "tokenizer.json") - 1


@pytest.mark.parametrize(
    "config",
    [
        {"extra_special_tokens": ["<|new|>"]},
        {"extra_special_tokens": {"new_token": "<|new|>"}},
        {"additional_special_tokens": ["<|new|>"]},
        {"pad_token": "<|new|>"},
        {"image_token": "<|new|>"},
        {"added_tokens_decoder": {"415": {**entry("<|new|>"), "special": True}}},
    ],
)
@pytest.mark.parametrize("rows", [None, 0])
def test_a_declared_token_without_a_row_is_refused(
    config: dict[str, Any], rows: int | None, tmp_path: Path
) -> None:
    folder = write(tmp_path, rows, **config)
    size = size_of(folder / "tokenizer.json")
    with pytest.raises(InputError) as caught:
        load_tokenizer(folder)
    assert (
        f"the declared token '<|new|>' has no row in the embedding: its id would be {size}, "
        in (str(caught.value))
    )
    assert f"vocab_size is {size}; remove it" in str(caught.value)


def test_added_tokens_json_is_read(tmp_path: Path) -> None:
    folder = write(tmp_path, 10)
    size = size_of(folder / "tokenizer.json")
    (folder / "added_tokens.json").write_text(json.dumps({"<|new|>": size}))
    assert load_tokenizer(folder).encode_rendered("<|new|>") == [size]


@pytest.mark.parametrize("extra", ["<|tool|>", [3], [None], {"a": 3}])
def test_malformed_extra_tokens_are_refused(extra: Any, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="extra_special_tokens is neither a list"):
        load_tokenizer(write(tmp_path, extra_special_tokens=extra))


def test_a_token_may_not_be_named_like_a_variable(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="names a token 'messages'"):
        load_tokenizer(write(tmp_path, extra_special_tokens={"messages": IN_VOCABULARY}))


def test_pieces_of_a_unigram_vocabulary_are_found(tmp_path: Path) -> None:
    import tokenizers

    pieces = [("<unk>", 0.0), ("<|tool|>", -1.0), *((c, -2.0) for c in "tol<|>ab")]
    backend = tokenizers.Tokenizer(tokenizers.models.Unigram(pieces, unk_id=0, byte_fallback=False))
    config = {"eos_token": "<unk>", "extra_special_tokens": ["<|tool|>"]}
    folder = write_tokenizer_folder(tmp_path, backend, CHATML_TEMPLATE, **config)
    assert load_tokenizer(folder).encode_rendered("a<|tool|>") == [8, 1]


@pytest.mark.parametrize("name", ["tokenizer.model", "vocab.json"])
def test_an_older_kind_of_tokenizer_is_to_be_converted(name: str, tmp_path: Path) -> None:
    folder = write(tmp_path)
    (folder / "tokenizer.json").rename(folder / name)
    with pytest.raises(InputError, match=rf"{name}: is a tokenizer of an older kind.* convert it"):
        load_tokenizer(folder)
