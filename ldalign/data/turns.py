"""The turns of a conversation: lists of messages, transcripts, and what a text may hold."""

import re
from collections.abc import Sequence
from typing import Any

from ldalign.data.columns import Columns, KeyCounts, plan_of, refusal, says_something
from ldalign.data.records import BadRow
from ldalign.data.rows import Message

ROLES = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
}

# A whole conversation in one text, as in HH-RLHF: "\n\nHuman: ...\n\nAssistant: ...".
TRANSCRIPT = re.compile(r"\s*Human:.*\n\nAssistant:", re.DOTALL)
SPEAKER = re.compile(r"(?:\A\s*|\n\n)(Human|Assistant): ?")
# A conversation that some chat template has written already: a template would wrap it once more.
RENDERED = re.compile(
    r"\s*(?:<s>\s*)?(?:\[INST\]|<\|(?:im_start|user|system|start_header_id|begin_of_text)\|>|"
    r"<start_of_turn>)"
)
# The same by hand, where no key says what is the prompt.
MARKED = re.compile(r"\s*(?:#+ ?(?:Human|User|Instruction|System)\b|(?:Human|USER|User|System):)")

# What a list of content parts may say beside the type and the text of each.
PART_METADATA = ("cache_control", "id", "index", "annotations")


def read_turns(value: Any, key: str, columns: Columns, counts: KeyCounts) -> list[Message]:
    """Returns the turns of a list of {role, content}, or of ShareGPT's {from, value}.

    key: what the list is called. counts gets the keys that are left out. Raises BadRow.
    """
    if not isinstance(value, list):
        raise BadRow(f"{key}: is {type_name(value)}; expected a list of {{role, content}}")
    if not value:
        raise BadRow(f"{key}: is empty")
    return [
        _turn(turn, f"{key}: turn {number}", columns, counts)
        for number, turn in enumerate(value, start=1)
    ]


def _turn(turn: Any, where: str, columns: Columns, counts: KeyCounts) -> Message:
    if not isinstance(turn, dict):
        raise BadRow(f"{where} is {type_name(turn)}; expected {{role, content}}")
    plan = plan_of(tuple(turn), True)
    for name in plan.meaning:
        if says_something(turn[name]) and name not in columns.ignored:
            raise BadRow(refusal(name, f"{where}: ", turn=True))
    for name in plan.unknown:
        if says_something(turn[name]) and name not in columns.ignored:
            counts.unknown[f"{name} (of a turn)"] += 1
    if columns.ignored:
        counts.ignored.update(columns.ignored.intersection(turn))
    role, content = turn.get("role"), turn.get("content")
    if role is None:
        role = turn.get("from")
    if content is None:
        content = turn.get("value")
    elif says_something(turn.get("value")):
        raise BadRow(f"{where} has both content and value; expected one of them")
    known = ROLES.get(role) if isinstance(role, str) else None
    if known is None:
        raise BadRow(f"{where} has role {role!r}; expected system, user or assistant")
    return {"role": known, "content": _content(content, where)}


def _content(value: Any, where: str) -> str:
    """The text of a turn: a text, or a list of parts that are all text."""
    if isinstance(value, list):
        value = "".join(_part(part, f"{where}, part {n}") for n, part in enumerate(value, start=1))
    if not isinstance(value, str):
        raise BadRow(f"{where} has content of type {type_name(value)}; expected text")
    return checked_text(value, where)


def _part(part: Any, where: str) -> str:
    if not isinstance(part, dict) or not isinstance(part.get("type"), str):
        raise BadRow(f'{where}: is no {{"type": "text", "text": ...}}')
    if part["type"] != "text":
        raise BadRow(f"{where}: is of type {part['type']!r}, which is not read; expected text")
    if not isinstance(part.get("text"), str):
        raise BadRow(f"{where}: has a text of type {type_name(part.get('text'))}; expected text")
    for key, value in part.items():
        if key not in ("type", "text", *PART_METADATA) and says_something(value):
            raise BadRow(f"{where}: has {key}, which is not read; expected type and text")
    return str(part["text"])


def read_transcript(text: str, key: str) -> list[Message]:
    """The turns of a transcript; the blank behind each speaker's colon is the form's."""
    checked_text(text, key)
    _, *parts = SPEAKER.split(text)
    turns = []
    for speaker, said in zip(parts[::2], parts[1::2], strict=True):
        role = "user" if speaker == "Human" else "assistant"
        turns.append({"role": role, "content": said})
    return turns


def refuse_rendered(text: str, key: str) -> None:
    """Raises BadRow for a text that a chat template has written."""
    found = RENDERED.match(text)
    if found:
        raise BadRow(
            f"{key}: begins with {found[0].strip()!r}: a chat template has written it already; "
            "give the conversation as messages"
        )


def check_turns(messages: Sequence[Message], key: str) -> None:
    """Raises BadRow unless an optional system turn, then user and assistant take turns.

    Every turn of user and assistant must say something.
    """
    expected = "user"
    for number, message in enumerate(messages, start=1):
        role = message["role"]
        if number == 1 and role == "system":
            continue
        if role != expected:
            raise BadRow(
                f"{key}: turn {number} is {role}; expected {expected} (user and assistant "
                "alternate)"
            )
        if not message["content"].strip():
            raise BadRow(f"{key}: turn {number} ({role}) is empty")
        expected = "assistant" if role == "user" else "user"


def checked_text(value: str, key: str) -> str:
    """Returns `value`, unless it holds what no UTF-8 file can or no tokenizer should see.

    Raises BadRow.
    """
    if "\0" in value:
        raise BadRow(f"{key}: holds a NUL character")
    if not value.isascii():
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as error:
            raise BadRow(
                f"{key}: holds half of a surrogate pair at character {error.start + 1}"
            ) from error
    return value


def type_name(value: Any) -> str:
    """Returns a value's type as JSON calls it, for messages."""
    names: dict[type, str] = {dict: "an object", list: "a list", str: "text"}
    names |= {bool: "a boolean", int: "a number", float: "a number"}
    return "null" if value is None else names.get(type(value), type(value).__name__)
