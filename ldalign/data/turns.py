"""The turns of a conversation: lists of messages, and what a text may hold."""

from collections.abc import Sequence
from typing import Any

from ldalign.data.columns import Columns, KeyCounts, plan_of, refusal, says_something, shown
from ldalign.data.records import BadRow
from ldalign.data.rows import Message
from ldalign.data.written_out import checked_text, refuse_rendered

ROLES = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
}
LARGEST_ID = 2**53  # up to which a floating-point number is one integer
TOOL_ROLES = ("tool", "function", "function_call", "observation", "tool_call", "tool_response")

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
    if columns.ignored:
        counts.ignored.update(columns.ignored.intersection(turn))
        turn = {key: value for key, value in turn.items() if key not in columns.ignored}
    plan = plan_of(tuple(turn), True)
    for name in plan.meaning:
        if says_something(turn[name]):
            raise BadRow(refusal(name, f"{where}: ", turn=True))
    for name in plan.metadata:
        counts.turns[name] += says_something(turn[name])
    for name in plan.unknown:
        if says_something(turn[name]):
            counts.unknown[f"{shown(name)} (of a turn)"] += 1
    content, value = turn.get("content"), turn.get("value")
    if value is not None:
        if not says_something(content):
            content = value
        elif says_something(value):
            raise BadRow(f"{where} has both content and value; expected one of them")
    role = ROLES.get(turn["role"]) if isinstance(turn.get("role"), str) else None
    if role is None or "from" in turn:
        role = _role(turn, where)
    text = _content(content, where)
    if role != "assistant":
        refuse_rendered(text, where)
    return {"role": role, "content": text}


def _role(turn: dict[str, Any], where: str) -> str:
    """Whose turn it is, by `role` or by ShareGPT's `from`."""
    role, other = turn.get("role"), turn.get("from")
    if not says_something(role):
        role, other = (role if other is None else other), None
    known = ROLES.get(role) if isinstance(role, str) else None
    if known is None:
        tools = "; leave such rows out, tools are not trained on" if role in TOOL_ROLES else ""
        raise BadRow(f"{where} has role {role!r}; expected system, user or assistant{tools}")
    if says_something(other) and (not isinstance(other, str) or ROLES.get(other) != known):
        raise BadRow(
            f"{where} has role {role!r} and from {other!r}; leave one of them out with "
            "ignore_columns: [from]"
        )
    return known


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
            raise BadRow(f"{where}: has {shown(key)}, which is not read; expected type and text")
    return str(part["text"])


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
                f"alternate){_remedy(number, role, expected)}"
            )
        if not message["content"].strip():
            raise BadRow(f"{key}: turn {number} ({role}) is empty")
        expected = "assistant" if role == "user" else "user"


def _remedy(number: int, role: str, expected: str) -> str:
    """What to do about a turn out of turn."""
    if role == "system":
        return "; a system turn is the first, and the only one"
    if number == 1 or (number == 2 and expected == "user"):
        return "; leave that turn out, or put the question before it that it answers"
    return f"; join the two turns of the {role} into one, or leave one of them out"


def read_name(value: Any, key: str) -> str | None:
    """Returns an id as text; None for one that says nothing.

    A whole 7.0 is 7, as tables with missing ids write it. Raises BadRow.
    """
    if isinstance(value, float) and value.is_integer() and abs(value) < LARGEST_ID:
        value = int(value)
    if isinstance(value, int | str) and not isinstance(value, bool) and value != "":
        return checked_text(str(value), key)
    if not says_something(value):
        return None
    found = repr(value)
    found = found if len(found) < 60 else type_name(value)
    raise BadRow(
        f"{key}: is {found}; expected a text or an integer; leave it out with "
        f"ignore_columns: [{key}]"
    )


def type_name(value: Any) -> str:
    """Returns a value's type as JSON calls it, for messages."""
    names: dict[type, str] = {dict: "an object", list: "a list", str: "text"}
    names |= {bool: "a boolean", int: "a number", float: "a number"}
    return "null" if value is None else names.get(type(value), type(value).__name__)
