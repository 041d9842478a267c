"""Rows become token ids that fit: the response is cut, and a prompt that fills all is not used."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from ldalign.data.chat_text import TemplateRefusal
from ldalign.data.pairs import Pair, Pairs
from ldalign.data.records import BadRow
from ldalign.data.rows import Message, Row
from ldalign.data.store import Split
from ldalign.data.tokenizer import PairIds, Tokenizer
from ldalign.system.errors import InputError

LongPrompts = Literal["drop", "error", "truncate"]


@dataclass(frozen=True)
class Fitting:
    """How rows are made to fit."""

    max_length: int  # tokens of prompt and longer response together
    long_prompts: LongPrompts = "drop"  # what becomes of a row whose prompt alone fills max_length
    reads: int | None = None  # tokens that the policy reads; None: not known here

    @property
    def room(self) -> int:
        """The least tokens that a truncated prompt leaves for the response."""
        return max(1, self.max_length // 4)


@dataclass(frozen=True)
class FittedRow:
    """A row that fits: its tokens, and the row itself, whose history may have lost its beginning.

    A response is as long as it may be; what it lost of its end is in `lost`, or `rejected_lost`.
    """

    row: Row
    prompt: list[int]
    response: list[int]
    rejected: list[int] | None
    lost: list[int]
    rejected_lost: list[int]
    whole_prompt: int  # tokens of the prompt as the data have it

    @property
    def cut(self) -> bool:
        """Whether one of the responses lost its end."""
        return bool(self.lost or self.rejected_lost)

    @property
    def truncated(self) -> bool:
        """Whether the history lost its beginning."""
        return len(self.prompt) < self.whole_prompt


@dataclass(frozen=True)
class TooLong:
    """A row that is left out, because its prompt leaves no room for a response."""

    reason: str  # the same for every such row
    ids: PairIds  # uncut


def fit_rows(
    rows: Sequence[Row],
    tokenizer: Tokenizer,
    fitting: Fitting,
    preference: Collection[int] = (),
) -> list[FittedRow | TooLong | BadRow]:
    """Encodes rows. In place of a row that cannot be encoded stands what is wrong with it; in place
    of one whose prompt alone fills max_length, and that may not or cannot be truncated, a TooLong.

    preference: the numbers, in `rows`, of those that need a rejected response: without one they are
    bad.
    """
    # The losers as rows of their own, so that the template writes them as it writes the winners.
    pairs = [n for n, row in enumerate(rows) if row.rejected is not None]
    losers = [replace(rows[n], response=str(rows[n].rejected), rejected=None) for n in pairs]
    winners = tokenizer.pairs_ids(rows)
    needing = frozenset(preference)
    rejected = dict(zip(pairs, tokenizer.pairs_ids(losers), strict=True))
    return [
        _without_rejected(row)
        if n in needing and row.rejected is None
        else _fit(row, ids, rejected.get(n), tokenizer, fitting)
        for n, (row, ids) in enumerate(zip(rows, winners, strict=True))
    ]


def _without_rejected(row: Row) -> BadRow:
    return BadRow(
        f"{row.where or row.id}: has no rejected response, which method=dpo needs: rows are "
        "{prompt, chosen, rejected} (docs/data.md)"
    )


def _fit(
    row: Row,
    ids: PairIds | BadRow,
    loser: PairIds | BadRow | None,
    tokenizer: Tokenizer,
    fitting: Fitting,
) -> FittedRow | TooLong | BadRow:
    for found in (ids, loser):
        if isinstance(found, BadRow):
            return BadRow(f"{row.where or row.id}: {found}")
    assert not isinstance(ids, BadRow) and not isinstance(loser, BadRow)
    prompt, response = ids
    room = fitting.max_length - len(prompt)
    if room >= 1:
        rejected = None if loser is None else loser.response[:room]
        rejected_lost = [] if loser is None else loser.response[room:]
        return FittedRow(
            row, prompt, response[:room], rejected, response[room:], rejected_lost, len(prompt)
        )
    # A pair without a response teaches nothing.
    if fitting.long_prompts == "error":
        if fitting.reads is not None and len(prompt) >= fitting.reads:
            return BadRow(
                f"{row.where or row.id}: the prompt alone has {len(prompt)} tokens, and the policy "
                f"reads {fitting.reads}; shorten it, or give long_prompts=drop or truncate"
            )
        return BadRow(
            f"{row.where or row.id}: the prompt alone has {len(prompt)} tokens and fills "
            f"max_length={fitting.max_length}; raise max_length, or give long_prompts=drop or "
            "truncate"
        )
    if fitting.long_prompts == "truncate":
        return _truncated_and_fit(row, ids, tokenizer, fitting)
    return TooLong(f"the prompt alone fills max_length={fitting.max_length}", ids)


def _truncated_and_fit(
    row: Row, ids: PairIds, tokenizer: Tokenizer, fitting: Fitting
) -> FittedRow | TooLong | BadRow:
    """The row with a history that leaves room for the response, where there is one.

    ids: of the whole row.
    """
    without = " (without the turns that long_prompts=truncate takes away)"
    try:
        shorter = truncated(row, tokenizer, fitting)
    except TemplateRefusal as refusal:
        return BadRow(f"{row.where or row.id}: {refusal.reason}{without}")
    if shorter is not None:
        [fitted] = fit_rows([shorter], tokenizer, replace(fitting, long_prompts="drop"))
        if isinstance(fitted, FittedRow):
            return replace(fitted, whole_prompt=len(ids.prompt))
        if isinstance(fitted, BadRow):
            return BadRow(f"{fitted}{without}")
    what = "system turn" if row.history[0]["role"] == "system" else "chat template"
    return TooLong(
        f"the {what} fills too much of max_length={fitting.max_length} to leave room for the "
        "question",
        ids,
    )


def truncated(row: Row, tokenizer: Tokenizer, fitting: Fitting) -> Row | None:
    """Returns a row whose history has lost its beginning, so that the prompt leaves room for the
    response: first whole turns, a question with its answer, then the last question's first tokens.
    The system turn stays.

    Of a question that is cut, at least half of the prompt's tokens must be left: else a long system
    turn would leave a scrap of it. None where fewer are, or nothing but white space.

    Raises TemplateRefusal where the template takes the longer history, but not the shorter.
    """
    most = fitting.max_length - fitting.room
    turns = list(row.history)
    head: list[Message] = [turns.pop(0)] if turns[0]["role"] == "system" else []
    while len(turns) > 2 and len(tokenizer.prompt_ids([*head, *turns])) > most:
        turns = turns[2:]
    over = len(tokenizer.prompt_ids([*head, *turns])) - most
    if over > 0:
        question = turns[-1]
        text = tokenizer.encode(question["content"])
        if len(text) - over < most / 2:
            return None
        # A character of several tokens may have lost its first.
        kept = tokenizer.decode(text[over:]).lstrip("\ufffd")
        if not kept.strip():
            return None
        turns = [*turns[:-1], {**question, "content": kept}]
    return replace(row, history=(*head, *turns))


def encode_rows(rows: Sequence[Row], tokenizer: Tokenizer, fitting: Fitting) -> Split:
    """Returns the rows that fit, in memory: for a few. Raises InputError for the first bad one."""
    fitted = []
    for one in fit_rows(rows, tokenizer, fitting):
        if isinstance(one, BadRow):
            raise InputError(str(one))
        if isinstance(one, FittedRow):
            fitted.append(one)
    pairs = [Pair(f.row.id, f.prompt, f.response) for f in fitted]
    return Split([f.row for f in fitted], Pairs.of(pairs))
