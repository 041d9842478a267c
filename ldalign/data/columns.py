"""What becomes of every key of a data row, and of every key of a turn: the table.

A key is read; or it is known to be harmless (ids, scores, sources) and is left out; or it carries
meaning that is not read (tools, labels, reasoning), so that a row in which it says something is
refused by the key's name; or it is unknown, and is named. `docs/data.md` has the same table. A user
renames keys (`columns`) and leaves keys out (`ignore_columns`).
"""

import fnmatch
import functools
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

PAIR_KEYS = (("real", "generated"), ("chosen", "rejected"))  # (winner, loser)
ANSWERS = ("response", "completion", "output")  # of a row with a prompt and one answer
TALKS = ("messages", "conversations")  # whole conversations
# What names the conversation that a row is a turn of; the first of them that says something does.
CONVERSATION_IDS = (
    *("conversation_id", "conv_id", "conversation_hash", "dialogue_id", "dialog_id", "chat_id"),
    *("thread_id", "session_id", "message_tree_id"),
)

Use = Literal["read", "metadata", "meaning", "unknown"]

READ = (
    "id",
    *TALKS,
    "system",
    "prompt",
    "instruction",
    "input",
    *ANSWERS,
    *(key for keys in PAIR_KEYS for key in keys),
    "kind",
    "answer",
    *CONVERSATION_IDS,
)
TURN_READ = ("role", "content", "from", "value")

# Names, and patterns of names (*): what says where a row is from and how good it is.
METADATA = (
    *("*_id", "*_ids", "uuid", "hash", "index", "idx", "row", "__index_level_0__"),
    *("source", "*_source", "source_*", "dataset", "origin", "url", "license", "version", "split"),
    *("model", "*_model", "model_*", "generator", "author", "annotator", "annotator_*"),
    *("score", "scores", "score_*", "*_score", "*_scores", "rating", "ratings", "*_rating"),
    *("*_ratings", "rank", "quality", "difficulty", "toxic", "redacted", "openai_moderation"),
    *("language", "lang", "timestamp", "created", "created_*", "date", "time"),
    *("category", "subject", "topic", "domain", "tags", "type", "metadata", "meta"),
    *("num_*", "n_*", "length", "*_length", "tokens", "*_tokens", "token_count"),
)
# Of these and of the ids that are read, what is a name of a row and can be no text of it.
IDS = ("*id", "*_ids", "hash", "*_hash", "index", "idx", "row", "__index_level_0__")
# A name among a turn's is one of several speakers: the usual templates do not write it.
TURN_METADATA = (*METADATA, "name")

NUMBER = re.compile(r"\s*[-+]?[\d.,]+(?:[eE][-+]?\d+)?\s*%?\s*")

# What changes the task where it is dropped, and the key of `columns` that would read it.
MEANING: dict[str, str | None] = {
    **dict.fromkeys(("question", "query"), "prompt"),
    **dict.fromkeys(("system_prompt", "system_message"), "system"),
    **dict.fromkeys(("conversation", "dialogue", "dialog"), "messages"),
    **dict.fromkeys(("history", "context", "documents")),
    **dict.fromkeys(("tools", "functions", "available_tools", "tool_calls", "function_call")),
    **dict.fromkeys(("reasoning_content", "reasoning", "thinking", "thoughts")),
    **dict.fromkeys(("label", "labels", "preference", "winner", "choice", "margin")),
    **dict.fromkeys(("preference_label", "preferred", "is_preferred", "is_chosen", "desirable")),
    **dict.fromkeys(("kto_tag", "kto_label", "train", "train_on_inputs", "training_detail")),
    **dict.fromkeys(("better_response_id", "safer_response_id", "completions", "responses")),
    **dict.fromkeys(("response_a", "response_b", "response_0", "response_1", "response_2")),
    **dict.fromkeys(("weight", "weights", "sample_weight", "loss_weight", "loss_mask")),
    **dict.fromkeys(("completion_mask", "chat_template", "chat_template_kwargs")),
    **dict.fromkeys(("image", "images", "audio", "audios", "video", "videos")),
}
TURN_MEANING: dict[str, str | None] = {
    **dict.fromkeys(("tools", "functions", "tool_calls", "tool_call_id", "function_call")),
    **dict.fromkeys(("reasoning_content", "reasoning", "thinking", "thoughts")),
    **dict.fromkeys(("weight", "train", "trainable", "loss", "loss_mask", "mask", "label")),
    **dict.fromkeys(("training_detail", "train_on_turn", "kto_tag")),
    **dict.fromkeys(("refusal", "prefix", "documents", "citations")),
    **dict.fromkeys(("image", "images", "audio", "audios", "video", "videos")),
}


def use_of(key: str, turn: bool = False) -> Use:
    """Says what becomes of a key of a row, or of a turn, by the table."""
    read, meaning, metadata = (
        (TURN_READ, TURN_MEANING, TURN_METADATA) if turn else (READ, MEANING, METADATA)
    )
    if key in read:
        return "read"
    if key in meaning:
        return "meaning"
    if any(fnmatch.fnmatchcase(key, pattern) for pattern in metadata):
        return "metadata"
    return "unknown"


class Plan(NamedTuple):
    """The keys of one row or turn that are not simply read, by what becomes of them."""

    meaning: tuple[str, ...]
    metadata: tuple[str, ...]
    unknown: tuple[str, ...]


@functools.lru_cache(maxsize=1024)  # the rows of a file have few sets of keys
def plan_of(keys: tuple[str, ...], turn: bool = False) -> Plan:
    """Sorts the keys of a row, or of a turn, by the table."""
    uses = {key: use_of(key, turn) for key in keys}
    meaning, metadata, unknown = (
        tuple(key for key, use in uses.items() if use == wanted)
        for wanted in ("meaning", "metadata", "unknown")
    )
    return Plan(meaning, metadata, unknown)


def says_something(value: Any) -> bool:
    """Says whether a value is there: null, "", [], {} and NaN are how files write that it is not.

    NaN is how pandas writes a missing value, of a text too.
    """
    return value is not None and value != "" and value != [] and value != {} and value == value


def holds_text(value: Any) -> bool:
    """Says whether a value is a text that is no number, or has one in it."""
    if isinstance(value, dict):
        return any(map(holds_text, value.values()))
    if isinstance(value, list | tuple):
        return any(map(holds_text, value))
    if isinstance(value, str):
        return bool(value.strip()) and not NUMBER.fullmatch(value)
    return isinstance(value, bytes) and bool(value)


def is_id(key: str) -> bool:
    """Says whether a key of a row names it, by the table."""
    known = use_of(key) in ("read", "metadata")
    return known and any(fnmatch.fnmatchcase(key, pattern) for pattern in IDS)


def shown(key: str) -> str:
    """Returns a key's name as messages print it: escaped where a terminal could not show it."""
    return key if key.isprintable() else repr(key)[1:-1]


@dataclass
class KeyCounts:
    """In how many rows stand the keys that are left out, by name; the unknown as `shown`.

    turns: metadata of turns, in how many turns. notes: what else is said at the end, with how many
    times it was so.
    """

    metadata: Counter[str] = field(default_factory=Counter)
    turns: Counter[str] = field(default_factory=Counter)
    unknown: Counter[str] = field(default_factory=Counter)
    ignored: Counter[str] = field(default_factory=Counter)
    notes: Counter[str] = field(default_factory=Counter)

    def add(self, other: "KeyCounts") -> None:
        """Adds the counts of other rows."""
        self.metadata += other.metadata
        self.turns += other.turns
        self.notes += other.notes
        self.unknown += other.unknown
        self.ignored += other.ignored


@dataclass(frozen=True)
class Columns:
    """What a user says about the keys of rows.

    named: the file's name of a key that is read (`columns: {prompt: question}`). A row without it
    is read by the key's own name, as files of one run may differ.
    ignored: keys of rows and of turns that are left out, whatever they say.
    """

    named: Mapping[str, str] = field(default_factory=dict)
    ignored: frozenset[str] = frozenset()

    def problems(self) -> list[str]:
        """The contradictions in them, a sentence each."""
        found = []
        sources = list(self.named.values())
        for target, source in self.named.items():
            if sources.count(source) > 1:
                found.append(f"columns.{target}={source}: is read as another key too; keep one")
            if source in self.ignored:
                found.append(
                    f"columns.{target}={source}: is left out by ignore_columns; keep one of the two"
                )
        return found

    def is_needed(self, key: str) -> bool:
        """Whether the values of a column of the file must be read."""
        if key in self.named.values():
            return True
        return key not in self.ignored and use_of(key) != "metadata"

    def value(self, record: Mapping[str, Any], key: str) -> Any:
        """Returns the value of a key that is read under its own name alone; None where the user
        leaves it out, or reads it as another.
        """
        if key in self.ignored or key in self.named.values():
            return None
        return record.get(key)

    def unless_ignored(self, record: Mapping[str, Any], key: str) -> Any:
        """Returns the value that the file has under a name; None where the user leaves it out."""
        return None if key in self.ignored else record.get(key)

    def given(self, record: Mapping[str, Any], key: str) -> tuple[str, Any]:
        """Returns the value of a key that a row may have under the user's name for it, else under
        its own, and the name that it has there.
        """
        source = self.named.get(key)
        if source is not None and says_something(record.get(source)):
            return source, record[source]
        return key, self.value(record, key)

    def rename(self, record: dict[str, Any]) -> dict[str, Any]:
        """Returns a row's record with the keys that are read under their own names, without the
        ignored ones.

        Raises ValueError where both the user's name for a key and its own say something.
        """
        if not self.named and not self.ignored:
            return record
        sources = {source: target for target, source in self.named.items()}
        renamed = {}
        for key, value in record.items():
            if key in sources:
                if says_something(value) or sources[key] not in renamed:
                    renamed[sources[key]] = value
            elif key in self.ignored:
                continue
            elif key not in self.named or not says_something(record.get(self.named[key])):
                renamed[key] = value
            elif says_something(value):
                raise ValueError(
                    f"{key}: is there, and columns.{key}={self.named[key]} puts another column in "
                    f"its place; leave it out with ignore_columns: [{key}]"
                )
        return renamed


def refusal(key: str, where: str = "", turn: bool = False) -> str:
    """Returns what to say of a key that carries meaning and is not read.

    where: what stands before the key's name, such as "messages: turn 2: ".
    """
    target = None if turn else MEANING[key]
    mapped = f"read it with columns: {{{target}: {key}}}, or " if target else ""
    return (
        f"{where}{key}: carries meaning and is not read; {mapped}leave it out with "
        f"ignore_columns: [{key}]"
    )


def mapping_hint(keys: Sequence[str]) -> str:
    """Returns the `columns` that would make a row of these keys readable; "" for none."""
    targets: dict[str, str] = {}
    for key in keys:
        target = MEANING.get(key) or {"answer": "response", "input": "prompt"}.get(key)
        if target and target not in keys:
            targets.setdefault(target, key)
    mapping = ", ".join(f"{target}: {key}" for target, key in targets.items())
    return f"; name the keys: columns: {{{mapping}}}" if mapping else ""
