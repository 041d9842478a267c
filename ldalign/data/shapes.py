"""A record as a conversation: every shape in which people keep their rows.

`read_record` takes one JSON object and gives its turns and its answers, or the BadRow that says why
it cannot. No key is passed over: `ldalign.data.columns` says what becomes of each, and one that is
read, but not in the record's shape, is refused.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from ldalign.data.columns import (
    ANSWERS,
    CONVERSATION_IDS,
    PAIR_KEYS,
    TALKS,
    Columns,
    KeyCounts,
    holds_text,
    is_id,
    mapping_hint,
    plan_of,
    refusal,
    says_something,
    shown,
    use_of,
)
from ldalign.data.records import BadRow
from ldalign.data.rows import Message
from ldalign.data.turns import ROLES, check_turns, read_name, read_turns, type_name
from ldalign.data.written_out import (
    MARKED,
    TRANSCRIPT,
    checked_text,
    read_transcript,
    refuse_rendered,
    refuse_written_out,
)

SHAPES = (
    "messages | conversations | prompt + response | prompt + completion | instruction (+ input) + "
    "output | real + generated | chosen + rejected (+ prompt)"
)
BESIDE = ("id", "kind", "answer", "system", *CONVERSATION_IDS)  # read beside every shape

# What is said at the end of how many rows were so.
NUMBERS = "rows have a whole number as an answer, which is read as its digits"
OPEN_ENDS = "conversations end with a user turn, which is left out"


@dataclass(frozen=True)
class Talk:
    """One record, read.

    messages: all turns of its conversation, those behind the last answer too. ends: where the
    answers stand in it that a row may train on, by index. rejected: the text of the other answer to
    what goes before the last of `ends`, of preference rows. is_conversation: whether it may have
    more than one answer to train on.
    """

    messages: list[Message]
    ends: list[int]
    rejected: str | None = None
    is_conversation: bool = False


def read_record(
    record: Any, columns: Columns, counts: KeyCounts, unread: Sequence[str] = ()
) -> Talk:
    """Returns the conversation of one record, and counts the keys that it leaves out.

    unread: names of columns of its file that were not even read. Raises BadRow.
    """
    named = _checked(record, columns, counts, unread)
    reader = _Reader(named, columns, counts, [*record, *unread])
    try:
        talk = reader.read()
        reader.refuse_what_is_left()
        talk = _with_system(named, talk)
    except BadRow as error:
        raise _by_its_name(error, record, columns) from None
    counts.notes.update(reader.notes)
    return talk


def read_prompt(record: Any, columns: Columns, counts: KeyCounts) -> list[Message]:
    """Returns the conversation of a record that is to be answered; it ends with a user turn.

    Answers that stand beside it are no part of it. Raises BadRow.
    """
    named = _checked(record, columns, counts, ())
    reader = _Reader(named, columns, counts, list(record))
    try:
        messages = _open_talk(reader, record)
        asked = (*ANSWERS, *(key for keys in PAIR_KEYS for key in keys))
        reader.refuse_what_is_left(harmless=asked)
        return _with_system(named, Talk(messages, [])).messages
    except BadRow as error:
        raise _by_its_name(error, record, columns) from None


def _open_talk(reader: "_Reader", record: dict[str, Any]) -> list[Message]:
    """The conversation of a record that is to be answered."""
    messages, named = reader.prompt(), reader.record
    check_turns(messages or [], "prompt")
    key = next((key for key in TALKS if says_something(named.get(key))), None)
    if messages is not None and key is not None:
        reader.read_same_prompt(reader.turns(reader.take(key), key), key)
    elif messages is None:
        if key is None:
            raise BadRow(
                'expected {"prompt": text} or {"messages": [...]} that ends with a user turn; '
                f"found {_found(record)}{mapping_hint(list(record))}"
            )
        messages = reader.turns(reader.take(key), key)
        check_turns(messages, key)
        if messages[-1]["role"] != "user":
            raise BadRow(
                f"{key}: ends with a turn of the {messages[-1]['role']}; expected a conversation "
                "that ends with a user turn"
            )
    return messages


def given_id(record: dict[str, Any], columns: Columns) -> str | None:
    """Returns the id that a record gives itself, as text; None for none. Raises BadRow."""
    key, value = columns.given(record, "id")
    return read_name(value, key)


# ------------------------------------------------------------------------------- the keys of a row


def _checked(
    record: Any, columns: Columns, counts: KeyCounts, unread: Sequence[str]
) -> dict[str, Any]:
    """The record under the names that are read, its other keys counted."""
    if not isinstance(record, dict):
        raise BadRow(f"the row is {type_name(record)}; expected an object with {SHAPES}")
    try:
        named = columns.rename(record)
    except ValueError as error:
        raise BadRow(str(error)) from None
    plan = plan_of(tuple(named))
    if plan.metadata:
        counts.metadata.update(plan.metadata)
    for key in plan.unknown:
        counts.unknown[shown(key)] += says_something(named[key])
    if columns.ignored:
        counts.ignored.update(columns.ignored.intersection(record))
    for key in unread:
        if key in columns.ignored:
            counts.ignored[key] += 1
        else:
            metadata = use_of(key) == "metadata"
            (counts.metadata if metadata else counts.unknown)[key if metadata else shown(key)] += 1
    return named


def _by_its_name(error: BadRow, record: dict[str, Any], columns: Columns) -> BadRow:
    """The error about a key that is read under the user's name for it, with that name."""
    key, separator, rest = str(error).partition(": ")
    source = columns.named.get(key)
    if separator and source is not None and says_something(record.get(source)):
        return BadRow(f"{shown(source)} (columns.{key}): {rest}")
    return error


def _found(record: dict[str, Any]) -> str:
    """The keys of a record, for messages; those that say nothing are marked."""
    named = [
        repr(key) if says_something(value) else f"{key!r} ({'null' if value is None else 'empty'})"
        for key, value in record.items()
    ]
    shown = ", ".join(named[:20]) or "no keys"
    return shown + (f" and {len(named) - 20} more" if len(named) > 20 else "")


def _with_system(record: dict[str, Any], talk: Talk) -> Talk:
    """The talk with the column `system` as its system turn; one that says nothing makes none."""
    system = record.get("system")
    if not says_something(system):
        return talk
    if not isinstance(system, str):
        raise BadRow(f"system: is {type_name(system)}; expected text")
    turn = {"role": "system", "content": checked_text(system, "system")}
    refuse_rendered(system, "system")
    if talk.messages[0]["role"] != "system":
        return replace(talk, messages=[turn, *talk.messages], ends=[end + 1 for end in talk.ends])
    if talk.messages[0] != turn:
        raise BadRow(
            "system: differs from the system turn that the conversation has; leave it out with "
            "ignore_columns: [system]"
        )
    return talk


# ------------------------------------------------------------------------------------------ shapes


class _Reader:
    """Reads one record, and knows which of its keys were used."""

    def __init__(
        self, record: dict[str, Any], columns: Columns, counts: KeyCounts, keys: list[str]
    ) -> None:
        self.record = record
        self.columns = columns
        self.counts = counts
        self.keys = keys  # of the file, for messages
        self.used = set(BESIDE)
        self.notes: list[str] = []  # what is counted where the row turns out to be good
        self.is_transcript = False  # the prompt was one, so its answers are the rest of it
        self.there = {key for key, value in record.items() if says_something(value)}

    def has(self, *keys: str) -> bool:
        return self.there.issuperset(keys)

    def take(self, key: str) -> Any:
        self.used.add(key)
        return self.record[key]

    def take_answer(self, key: str) -> Any:
        """The value of an answer; a whole number is its digits. Of a fraction it is not known how
        the file spells it.
        """
        value = self.take(key)
        if isinstance(value, bool) or not isinstance(value, int | float):
            return value
        if isinstance(value, float):
            raise BadRow(f"{key}: is the number {value!r}; expected text")
        self.notes.append(NUMBERS)
        return str(value)

    def read(self) -> Talk:
        """Reads the record by the keys that say something; an empty one is as absent as null."""
        talk = self._by_shape()
        if talk is None:  # what is empty may be what is wrong
            self.there = {key for key, value in self.record.items() if value is not None}
            talk = self._by_shape()
        if talk is None:
            raise BadRow(self._no_shape())
        return talk

    def _by_shape(self) -> Talk | None:
        for winner, loser in PAIR_KEYS:
            if self.has(winner, loser):
                return self._pair(winner, loser)
        for key in TALKS:
            if self.has(key):
                return self._conversation(key)
        for key in ANSWERS:
            if self.has(key) and (self.has("prompt") or self.has("instruction")):
                return self._answered(key)
        return None

    def _no_shape(self) -> str:
        """What to say of a record of no shape."""
        found = _found(self.record)
        asked = [key for key in ("prompt", "instruction") if says_something(self.record.get(key))]
        sides = [key for keys in PAIR_KEYS for key in keys if self.has(key)]
        if asked and not sides:
            return (
                f"{asked[0]}: has no answer beside it; expected {' | '.join(ANSWERS)} | chosen + "
                f"rejected; found {found}{mapping_hint(self.keys)}"
            )
        beside = [key for key in self.keys if key not in self.record]
        found += f"; not read: {', '.join(map(repr, beside[:20]))}" if beside else ""
        for target, source in self.columns.named.items():
            if source not in self.keys:
                found += f"; columns.{target}={shown(source)}: the row has no such key"
        for key, value in self.record.items():
            first = value[0] if isinstance(value, list) and value else None
            if isinstance(first, dict) and not {"role", "from", "content"} & first.keys():
                found += f"; where {key!r} is the list of rows, write the list itself as the file"
        return f"no known shape: expected {SHAPES}; found {found}{mapping_hint(self.keys)}"

    def refuse_what_is_left(self, harmless: Sequence[str] = ()) -> None:
        """Raises BadRow for a key that says something, is no metadata, and was not used, unless it
        is among those that do no harm here.
        """
        for key in plan_of(tuple(self.record)).meaning:
            if says_something(self.record[key]):
                raise BadRow(refusal(key))
        for key, value in self.record.items():
            if key in self.used or key in harmless:
                continue
            if use_of(key) == "read" and says_something(value):
                shape = " + ".join(sorted(self.used - set(BESIDE)))
                raise BadRow(
                    f"{key}: is not read beside {shape}; leave it out with ignore_columns: [{key}]"
                )

    def prompt(self) -> list[Message] | None:
        """What `prompt`, or Alpaca's `instruction` and `input`, ask; None without them."""
        if self.has("prompt"):
            return self._prompt(self.take("prompt"))
        if not self.has("instruction"):
            return None
        parts = [self._plain("instruction"), self._plain("input") if self.has("input") else ""]
        return [{"role": "user", "content": "\n\n".join(part for part in parts if part.strip())}]

    def turns(self, value: Any, key: str) -> list[Message]:
        return read_turns(value, key, self.columns, self.counts)

    def _conversation(self, key: str) -> Talk:
        messages = self.turns(self.take(key), key)
        check_turns(messages, key)
        ends = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        if not ends:
            raise BadRow(f"{key}: no assistant turn")
        if ends[-1] < len(messages) - 1:
            self.notes.append(OPEN_ENDS)
        self.read_same_prompt(messages, key)
        return Talk(messages, ends, is_conversation=True)

    def _answered(self, key: str) -> Talk:
        prompt = self.prompt() or []
        value = self.take_answer(key)
        history, answer = self._side(value, key, prompt)
        return Talk([*history, {"role": "assistant", "content": answer}], [len(history)])

    def _pair(self, winner: str, loser: str) -> Talk:
        """A preference record: the prompt is given, or both conversations (or texts) begin with
        it.
        """
        first, second = self.take_answer(winner), self.take_answer(loser)
        whole = not isinstance(first, str) or not isinstance(second, str)
        prompt = self.prompt()
        if prompt is None:
            prompt = self._open_conversation()
        if prompt is None and not whole:
            first, second = self._shared(first, second, winner, loser)
        history, response = self._side(first, winner, prompt)
        other_history, rejected = self._side(second, loser, prompt)
        if history != other_history:
            raise BadRow(
                f"{winner} and {loser} differ before their last turn; expected one prompt and two "
                "answers"
            )
        messages = [*history, {"role": "assistant", "content": response}]
        self._take_same_conversation(messages, winner)
        return Talk(messages, [len(history)], rejected)

    def _side(
        self, value: Any, key: str, prompt: list[Message] | None
    ) -> tuple[list[Message], str]:
        """(history, answer) of a response: a text, an assistant turn alone, or a conversation."""
        if isinstance(value, str):
            answer: list[Message] = [{"role": "assistant", "content": self._answer(value, key)}]
        elif isinstance(value, dict | list):
            answer = self.turns([value] if isinstance(value, dict) else value, key)
        else:
            raise BadRow(f"{key}: is {type_name(value)}; expected text")
        alone = answer[0]["role"] == "assistant"
        if alone and prompt is None:
            raise BadRow(
                f"{key}: an answer without a prompt; expected the key prompt or a whole "
                "conversation"
            )
        messages = [*(prompt or []), *answer] if alone else answer
        check_turns(messages, key)
        if messages[-1]["role"] != "assistant":
            raise BadRow(
                f"{key}: ends with a turn of the {messages[-1]['role']}; expected the assistant"
            )
        if not alone:
            self.read_same_prompt(messages, key)
        return messages[:-1], messages[-1]["content"]

    def _answer(self, text: str, key: str) -> str:
        """The text of an answer; behind a transcript, without the blank of the form."""
        if self.is_transcript:
            if "\n\nHuman:" in text:
                raise BadRow(f"{key}: goes on with a turn of the Human; give the row as messages")
            text = text.removeprefix(" ")
        return checked_text(text, key)

    def _shared(self, first: str, second: str, winner: str, loser: str) -> tuple[Any, Any]:
        """Two texts without a prompt, as whole conversations.

        They are transcripts; or the prompt is what both begin with, up to the last white space
        (TRL's implicit prompt), where no other column may hold it.
        """
        if TRANSCRIPT.match(first) and TRANSCRIPT.match(second):
            return read_transcript(first, winner), read_transcript(second, loser)
        for text, key in ((first, winner), (second, loser)):
            refuse_rendered(text, key)
            if MARKED.match(text):
                raise BadRow(f"{key}: is a whole conversation in one text; give it as messages")
        others = [key for key in self.record if key not in (winner, loser)]
        if texts := [key for key in others if self._may_be_prompt(key)]:
            named = ", ".join(map(shown, texts))
            raise BadRow(
                f"{winner} and {loser} have no prompt, and the row has {named}; read one as the "
                f"prompt (columns: {{prompt: {shown(texts[0])}}}), or leave all out with "
                "ignore_columns"
            )
        shared = 0
        while shared < min(len(first), len(second)) and first[shared] == second[shared]:
            shared += 1
        while shared > 0 and not first[shared - 1].isspace():
            shared -= 1
        prompt = first[:shared].rstrip()
        if not prompt:
            raise BadRow(f"{winner} and {loser} share no prompt; expected the key prompt")
        ask = {"role": "user", "content": prompt}
        return tuple(  # type: ignore[return-value]
            [ask, {"role": "assistant", "content": text[shared:]}] for text in (first, second)
        )

    def _may_be_prompt(self, key: str) -> bool:
        """Whether a key that is not read may hold the prompt of a pair that names none."""
        return holds_text(self.record[key]) and not is_id(key)

    def _prompt(self, value: Any) -> list[Message]:
        """The key `prompt`: a text (one user turn) or a conversation that ends with a user turn."""
        if isinstance(value, str):
            text = checked_text(value, "prompt")
            refuse_rendered(text, "prompt")
            if not TRANSCRIPT.match(text):
                refuse_written_out(text, "prompt")
                return [{"role": "user", "content": text}]
            self.is_transcript = True
            value = read_transcript(text, "prompt")
            if not value[-1]["content"].strip():  # "Assistant:", where the answer is to come
                del value[-1]
        if not isinstance(value, list):
            raise BadRow(f"prompt: is {type_name(value)}; expected text or a list of turns")
        messages = self.turns(value, "prompt")
        if messages[-1]["role"] != "user":
            raise BadRow(
                f"prompt: ends with a turn of the {messages[-1]['role']}; expected the user"
            )
        return messages

    def _open_conversation(self) -> list[Message] | None:
        """`messages` or `conversations` that ends with a user turn: a pair's prompt."""
        for key in TALKS:
            value = self.record.get(key)
            if isinstance(value, list) and value and isinstance(value[-1], dict):
                role = value[-1].get("role") or value[-1].get("from")
                if isinstance(role, str) and ROLES.get(role) == "user":
                    return self.turns(self.take(key), key)
        return None

    def read_same_prompt(self, messages: Sequence[Message], key: str) -> None:
        """Raises BadRow where the prompt beside a whole conversation is no part of it."""
        if not self.has("prompt"):
            return
        prompt = self.take("prompt")
        said = {message["content"].strip() for message in messages}
        asked = (
            [prompt] if isinstance(prompt, str) else [m["content"] for m in self._prompt(prompt)]
        )
        for text in asked:
            if text.strip() not in said:
                raise BadRow(
                    f"prompt: is no turn of {key}; leave one of them out with ignore_columns: "
                    "[prompt]"
                )

    def _take_same_conversation(self, messages: list[Message], winner: str) -> None:
        """Takes `messages` beside a pair where it is the winner's conversation, as in
        UltraFeedback; else it is left, to be refused.
        """
        for key in TALKS:
            if self.has(key) and key not in self.used:
                if self.turns(self.record[key], key) == messages:
                    self.used.add(key)

    def _plain(self, key: str) -> str:
        value = self.take(key)
        if not isinstance(value, str):
            raise BadRow(f"{key}: is {type_name(value)}; expected text")
        refuse_rendered(value, key)
        return checked_text(value, key)
