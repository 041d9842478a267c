"""How much longer a tokenizer.json can make a text: a stranger's could end the process.

Each step of its normalizer, pre-tokenizer, post-processor and decoder makes a text at most so many
times as long, and in a chain they multiply. Forty that write "aa" for "a" ask for a terabyte, and
the library ends the process where it gets none; so they are counted before it has the file. What a
step is counted for is what it does to the text that grows most.
"""

import base64
import binascii
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ldalign.system.errors import InputError

MOST = 1000  # times as long, or characters and tokens longer
# The parts of a tokenizer that a text goes through, on the way in and on the way out.
WAYS = (("normalizer", "pre_tokenizer", "post_processor"), ("decoder",))
# What one character may become, by the kind of a step: in NFKC, U+FDFA has 18.
LONGEST = {
    "NFC": 3,
    "NFD": 4,
    "NFKC": 18,
    "NFKD": 18,
    "Lowercase": 3,
    "BertNormalizer": 9,
    "ByteLevel": 4,
    "Metaspace": 2,
}
CHAINS = ("normalizers", "pretokenizers", "processors", "decoders")  # the steps of a Sequence
# A regular expression that matches no empty text for sure: characters and plain classes of them,
# each once or more.
_SOLID = re.compile(
    r"(?:(?:[^\\\[\](){}.*+?|^$#&]|\\[snrt.*+?]|\\[pP]\{\w+\}|\[\^?(?:[^\\\[\]&]|\\[snrt])+\])"
    r"(?:\+|\{[1-9]\d*,?\})?)+"
)


def check_growth(description: Mapping[str, Any], path: Path) -> None:
    """Raises InputError where a tokenizer, the content of the tokenizer.json at `path`, may make a
    text more than MOST times as long, or longer by more than MOST.

    Of the steps that are ordinary at any length (Unicode's forms, say), the longest is free: no
    chain that is known comes near MOST.
    """
    model = description.get("model")
    affixes = ("continuing_subword_prefix", "end_of_word_suffix")
    of_word = sum(len(_text(model, key)) for key in affixes) if isinstance(model, Mapping) else 0
    for way in WAYS:
        times, added, ordinary = 1, of_word, 1
        for step in (step for part in way for step in _steps(description.get(part))):
            kind = step.get("type")
            longest = LONGEST.get(kind, 1) if isinstance(kind, str) else 1
            if kind == "Precompiled":
                longest = _longest_in(_text(step, "precompiled_charsmap"))
            elif kind == "Replace":
                times *= _by_replacing(step)
            elif kind == "Prepend":
                added += len(_text(step, "prepend"))
            elif kind == "TemplateProcessing":
                repeats, tokens = _by_template(step)
                times, added = times * repeats, added + tokens
            times, ordinary = times * longest, max(ordinary, longest)
        if times > MOST * ordinary or added > MOST:
            much = f"{added} characters or tokens longer"
            if times > MOST * ordinary:
                much = f"10^{math.log10(times):.0f} times as long"
            raise InputError(
                f"{path}: its {' and '.join(way)} may make a text {much} (at most {MOST} is "
                "taken); download it again, or take the steps out that make texts longer"
            )


def _steps(part: Any) -> Iterator[Mapping[str, Any]]:
    """The steps of a part, in any order, those of its sequences one by one."""
    waiting = [part]
    while waiting:
        step = waiting.pop()
        if isinstance(step, Mapping):
            yield step
            inner = (step.get(name) for name in CHAINS)
            waiting += [one for steps in inner if isinstance(steps, list) for one in steps]


def _text(step: Mapping[str, Any], key: str) -> str:
    value = step.get(key)
    return value if isinstance(value, str) else ""


def _by_replacing(step: Mapping[str, Any]) -> int:
    pattern, content = step.get("pattern"), len(_text(step, "content"))
    if isinstance(pattern, Mapping) and (found := _text(pattern, "String")):
        return max(1, -(-content // len(found)))
    solid = isinstance(pattern, Mapping) and _SOLID.fullmatch(_text(pattern, "Regex"))
    # of an empty match, it comes before and behind every character
    return max(1, content) if solid else 1 + 2 * content


def _longest_in(charsmap: str) -> int:
    """The longest text that a compiled map writes for a character or more: what lies between zeros
    behind its trie, whose size it begins with.
    """
    try:
        content = base64.b64decode(charsmap)
    except (binascii.Error, ValueError):
        return 1  # the library refuses it
    written = content[4 + int.from_bytes(content[:4], "little") :]
    return max(1, *(len(text.decode("utf-8", "replace")) for text in written.split(b"\0")))


def _by_template(step: Mapping[str, Any]) -> tuple[int, int]:
    """How many times a template repeats a text, and how many tokens it adds."""
    pieces, known = step.get("single"), step.get("special_tokens")
    repeats = added = 0
    for piece in pieces if isinstance(pieces, list) else []:
        if isinstance(piece, Mapping) and "Sequence" in piece:
            repeats += 1
        token = piece.get("SpecialToken") if isinstance(piece, Mapping) else None
        name = token.get("id") if isinstance(token, Mapping) else None
        own = known.get(name) if isinstance(known, Mapping) and isinstance(name, str) else None
        ids = own.get("ids") if isinstance(own, Mapping) else None
        added += len(ids) if isinstance(ids, list) else 1
    return max(1, repeats), added
