"""Rows become token ids that fit: the response is cut, and a prompt that fills all is not used."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

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

    @property
    def room(self) -> int:
        """The least tokens that a truncated prompt leaves for the response."""
        return max(1, self.max_length // 4)


@dataclass(frozen=True)
class FittedRow:
    """A row that fits: its tokens, and the row itself, whose history may have lost its beginning.

    A response is as long as it may be; `cut` says whether it lost its end.
    """

    row: Row
    prompt: list[int]
    response: list[int]
    rejected: list[int] | None
    cut: bool


def fit_rows(
    rows: Sequence[Row], tokenizer: Tokenizer, fitting: Fitting
) -> list[FittedRow | BadRow | None]:
    """Encodes rows. In place of a row that cannot be encoded stands what is wrong with it; in place
    of one whose prompt alone fills max_length, and that may not be truncated, None.
    """
    # The losers as rows of their own, so that the template writes them as it writes the winners.
    preferences = [n for n, row in enumerate(rows) if row.rejected is not None]
    losers = [replace(rows[n], response=str(rows[n].rejected), rejected=None) for n in preferences]
    winners = tokenizer.pairs_ids(rows)
    rejected = dict(zip(preferences, tokenizer.pairs_ids(losers), strict=True))
    return [
        _fit(row, ids, rejected.get(n), tokenizer, fitting)
        for n, (row, ids) in enumerate(zip(rows, winners, strict=True))
    ]


def _fit(
    row: Row,
    ids: PairIds | BadRow,
    loser: PairIds | BadRow | None,
    tokenizer: Tokenizer,
    fitting: Fitting,
) -> FittedRow | BadRow | None:
    for found in (ids, loser):
        if isinstance(found, BadRow):
            return BadRow(f"{row.where or row.id}: {found}")
    assert not isinstance(ids, BadRow) and not isinstance(loser, BadRow)
    room = fitting.max_length - len(ids.prompt)
    if room >= 1:
        cut = len(ids.response) > room
        rejected = None if loser is None else loser.response[:room]
        return FittedRow(row, ids.prompt, ids.response[:room], rejected, cut)
    # A pair without a response teaches nothing.
    if fitting.long_prompts == "drop":
        return None
    if fitting.long_prompts == "truncate":
        shorter = truncated(row, tokenizer, fitting)
        if shorter != row:
            return fit_rows([shorter], tokenizer, replace(fitting, long_prompts="error"))[0]
    return BadRow(
        f"{row.where or row.id}: the prompt alone has {len(ids.prompt)} tokens and fills "
        f"max_length={fitting.max_length}; raise max_length, or give long_prompts=drop or truncate"
    )


def truncated(row: Row, tokenizer: Tokenizer, fitting: Fitting) -> Row:
    """Returns a row whose history has lost its beginning, so that the prompt leaves room for the
    response: first whole turns, a question with its answer, then the last question's first tokens.
    The system turn stays.
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
        kept = tokenizer.decode(text[over:]) if over < len(text) else ""
        # A character of several tokens may have lost its first.
        kept = kept.lstrip("\ufffd")
        turns = [*turns[:-1], {**question, "content": kept}]
    return replace(row, history=(*head, *turns))


def encode_rows(rows: Sequence[Row], tokenizer: Tokenizer, fitting: Fitting) -> Split:
    """Returns the rows that fit, in memory: for a few. Raises InputError for the first bad one."""
    fitted = []
    for one in fit_rows(rows, tokenizer, fitting):
        if isinstance(one, BadRow):
            raise InputError(str(one))
        if one is not None:
            fitted.append(one)
    pairs = [Pair(f.row.id, f.prompt, f.response) for f in fitted]
    return Split([f.row for f in fitted], Pairs.of(pairs))
