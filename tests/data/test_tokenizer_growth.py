"""How much a tokenizer.json may make of a text: chains that end the process are refused, ordinary
ones pass, and what is counted is never less than what the library makes.
"""

import base64
import json
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from made_tokenizers import byte_level_tokenizer, sentencepiece_tokenizer
from tokenizers import Regex
from tokenizers.normalizers import Normalizer, Replace, Sequence

from ldalign.data.tokenizer_growth import MOST, check_growth
from ldalign.system.errors import InputError

WHERE = Path("tokenizer.json")


def replace(pattern: dict[str, str], content: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": pattern, "content": content}


def chain(*steps: dict[str, Any]) -> dict[str, Any]:
    return {"type": "Sequence", "normalizers": list(steps)}


def charsmap(*written: str) -> str:
    texts = "\0".join(written).encode()
    return base64.b64encode((4).to_bytes(4, "little") + bytes(4) + texts).decode()


TEMPLATE = {
    "type": "TemplateProcessing",
    "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A"}}],
    "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
}
DOUBLED = replace({"String": "a"}, "aa")
BOMBS: dict[str, dict[str, Any]] = {
    "twice": {"normalizer": chain(*[DOUBLED] * 40)},
    "within": {"normalizer": chain(*[chain(DOUBLED, DOUBLED)] * 20)},
    "once": {"normalizer": replace({"String": "a"}, "a" * (MOST + 1))},
    "regex": {"normalizer": chain(*[replace({"Regex": "a"}, "aa")] * 40)},
    "empty": {"normalizer": chain(*[replace({"Regex": "x*"}, "a")] * 40)},
    "class": {"normalizer": chain(*[replace({"Regex": "[[:alpha:]]*"}, "a")] * 40)},
    "forms": {"normalizer": chain(*[{"type": "NFKD"}, replace({"String": "a"}, "\ufdfa")] * 9)},
    "case": {"normalizer": chain(*[{"type": "Lowercase"}, replace({"String": "i̇"}, "İİ")] * 40)},
    "bytes": {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [{"type": "ByteLevel"}] * 40}},
    "map": {
        "normalizer": chain(
            *[{"type": "Precompiled", "precompiled_charsmap": charsmap("b", "a" * 40)}] * 9
        )
    },
    "prepend": {"normalizer": {"type": "Prepend", "prepend": "a" * (MOST + 1)}},
    "template": {"post_processor": {**TEMPLATE, "single": [{"Sequence": {"id": "A"}}] * 1001}},
    "ids": {
        "post_processor": {
            **TEMPLATE,
            "special_tokens": {"<s>": {"id": "<s>", "ids": [1] * 1001, "tokens": ["a"] * 1001}},
        }
    },
    "parts": {
        "normalizer": chain(*[DOUBLED] * 6),
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [{"type": "ByteLevel"}] * 5},
    },
    "out": {"decoder": {"type": "Sequence", "decoders": [DOUBLED] * 40}},
    "prefix": {"model": {"type": "BPE", "continuing_subword_prefix": "#" * (MOST + 1)}},
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_bomb_is_refused(name: str) -> None:
    with pytest.raises(InputError, match=r"^tokenizer.json: its .* may make a text .* longer|as "):
        check_growth(BOMBS[name], WHERE)


def test_ordinary_ones_pass() -> None:
    """Those of the tests, and the longest chains of models that are widely used."""
    for made in (byte_level_tokenizer(), *map(sentencepiece_tokenizer, ("legacy", "always"))):
        check_growth(json.loads(made.to_str()), WHERE)
    albert = chain(
        replace({"String": "``"}, '"'),
        replace({"String": "''"}, '"'),
        {"type": "NFKD"},
        {"type": "StripAccents"},
        {"type": "Lowercase"},
        {"type": "Precompiled", "precompiled_charsmap": charsmap(" ", "صلى الله عليه وسلم")},
        replace({"Regex": " {2,}"}, " "),
    )
    metaspace = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always"}
    check_growth(
        {"normalizer": albert, "pre_tokenizer": metaspace, "post_processor": TEMPLATE}, WHERE
    )
    clip = chain({"type": "NFC"}, replace({"Regex": "\\s+"}, " "), {"type": "Lowercase"})
    byte_level = {"type": "Sequence", "pretokenizers": [{"type": "Split"}, {"type": "ByteLevel"}]}
    check_growth(
        {"normalizer": clip, "pre_tokenizer": byte_level, "decoder": {"type": "ByteLevel"}}, WHERE
    )
    spaces = ["\\p{Z}+", "[ \\t]+", " {2,}", "[0-9]+", "\\n{3}", "a"]
    check_growth({"normalizer": chain(*[replace({"Regex": r}, " ") for r in spaces * 9])}, WHERE)
    many = [replace({"String": chr(0x3400 + n)}, chr(0x4E00 + n)) for n in range(3000)]
    check_growth({"normalizer": chain(*many)}, WHERE)


@pytest.mark.parametrize(
    "part", [None, 3, [], {}, {"type": 4}, {"normalizers": 3}, {"type": "Precompiled"}, TEMPLATE]
)
def test_what_is_no_part_is_left_to_the_library(part: Any) -> None:
    check_growth({"normalizer": part, "post_processor": part, "decoder": part, "model": 3}, WHERE)


@pytest.mark.parametrize(
    ("text", "steps"),
    [
        ("a" * 50, [("a", "aa")] * 9),
        ("abc", [(Regex("x*"), "é")] * 8),
        ("ab ab", [(Regex("b+"), "ab")] * 9),
        ("aaaa", [("aa", "aaa")] * 8),
    ],
)
def test_what_is_counted_is_no_less_than_what_is_made(
    text: str, steps: list[tuple[Any, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The library's own growth is found with a bound right below it."""
    normalizer: Normalizer = Sequence([Replace(*step) for step in steps])
    grown = len(normalizer.normalize_str(text)) / len(text)
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.normalizer = normalizer
    assert grown > 2
    monkeypatch.setattr("ldalign.data.tokenizer_growth.MOST", grown * 0.99)
    with pytest.raises(InputError):
        check_growth(json.loads(made.to_str()), WHERE)
