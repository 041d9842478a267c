"""What becomes of every key of a data row, and of every key of a turn: the table.

A key is read; or it is known to be harmless (ids, scores, sources) and is left out; or it carries
meaning that is not read (tools, labels, reasoning), so that a row in which it says something is
refused by the key's name; or it is unknown, and is named. `docs/data.md` has the same table. A user
renames keys (`columns`) and leaves keys out (`ignore_columns`).
"""

import fnmatch
import functools
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

PAIR_KEYS = (("real", "generated"), ("chosen", "rejected"))  # (winner, loser)
ANSWERS = ("response", "completion", "output")  # of a row with a prompt and one answer
TALKS = ("messages", "conversations")  # whole conversations

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
# A name among a turn's is one of several speakers: the usual templates do not write it.
TURN_METADATA = (*METADATA, "name")

# What changes the task where it is dropped, and the key of `columns` that would read it.
MEANING: dict[str, str | None] = {
    **dict.fromkeys(("question", "query"), "prompt"),
    **dict.fromkeys(("system_prompt", "system_message"), "system"),
    **dict.fromkeys(("conversation", "dialogue", "dialog"), "messages"),
    **dict.fromkeys(("history", "context", "documents")),
    **dict.fromkeys(("tools", "functions", "available_tools", "tool_calls", "function_call")),
    **dict.fromkeys(("reasoning_content", "reasoning", "thinking", "thoughts")),
    **dict.fromkeys(("label", "labels", "preference", "winner", "choice", "margin")),
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
    """Says whether a value is there: null, "", [] and {} are how files write that it is not."""
    return value is not None and value != "" and value != [] and value != {}


@dataclass
class KeyCounts:
    """In how many rows stand the keys that are left out, by name."""

    metadata: Counter[str] = field(default_factory=Counter)
    unknown: Counter[str] = field(default_factory=Counter)
    ignored: Counter[str] = field(default_factory=Counter)

    def add(self, other: "KeyCounts") -> None:
        """Adds the counts of other rows."""
        self.metadata += other.metadata
        self.unknown += other.unknown
        self.ignored += other.ignored


@dataclass(frozen=True)
class Columns:
    """What a user says about the keys of rows.

    named: the file's name of a key that is read (`columns: {prompt: question}`).
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

    def rename(self, record: dict[str, Any]) -> dict[str, Any]:
        """Returns a row's record with the keys that are read under their own names, without the
        ignored ones.

        Raises ValueError where one takes the place of another that says something.
        """
        if not self.named and not self.ignored:
            return record
        sources = {source: target for target, source in self.named.items()}
        renamed = {}
        for key, value in record.items():
            if key in sources:
                renamed[sources[key]] = value
            elif key in self.ignored:
                continue
            elif key not in self.named:
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
