"""Responses made elsewhere (vLLM, an API), as losers of the first iteration: read and checked.

A JSON Lines file, one line a training row: `id` (as in RUN/data/train.jsonl) and `response`;
optional `finish_reason` ("stop", the default, or "length": cut, so without an end token),
`token_ids` (of the response; without them the text is tokenized) and `prompt_token_ids`, which must
be the prompt's as ldalign renders it; the BOS alone may be missing. The names are vLLM's.
"""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ldalign.data.pairs import Pair
from ldalign.data.records import json_lines
from ldalign.data.rows import Row
from ldalign.data.tokenizer import Tokenizer
from ldalign.generation.sampling import Response
from ldalign.system.errors import InputError

log = logging.getLogger(__name__)


def read_losers(
    path: Path,
    rows: Sequence[Row],
    pairs: Sequence[Pair],
    known: Sequence[Row],
    tokenizer: Tokenizer,
    prompts: Path,
) -> list[Response]:
    """Returns a response for each of `rows`, whose prompts in token ids are in `pairs`.

    known: all rows of the data, of which `rows` are those used.
    prompts: the file in which the prompts can be read, for messages.

    Raises InputError naming file, line and what differs.
    """
    if not path.exists():
        raise InputError(
            f"responses={path}: not there yet; answer the prompts in {prompts}, one line "
            '{"id": ..., "response": ...} for each, and run this again'
        )
    ids = {row.id for row in known}
    given: dict[str, tuple[str, dict[str, Any]]] = {}
    for where, value in json_lines(path):
        record = _record(value, where, tokenizer.vocab_size)
        if record["id"] not in ids:
            raise InputError(
                f"{where}: id {record['id']!r} is not in the data; the ids are those in {prompts}"
            )
        if record["id"] in given:
            raise InputError(
                f"{where}: id {record['id']!r} was answered before ({given[record['id']][0]})"
            )
        given[record["id"]] = where, record
    absent = [row.id for row in rows if row.id not in given]
    if absent:
        raise InputError(
            f"{path}: {len(absent)} of {len(rows)} rows have no response, the first: "
            f"{absent[0]!r}; the prompts are in {prompts}"
        )
    if not any("prompt_token_ids" in record for _, record in given.values()):
        log.warning(
            "%s: no prompt_token_ids, so it cannot be checked that the prompts were rendered alike",
            path,
        )
    bare = sum(
        _lacks_bos(given[row.id][1].get("prompt_token_ids"), pair, tokenizer)
        for row, pair in zip(rows, pairs, strict=True)
    )
    if bare:
        log.warning(
            "%s: %d of %d prompts lack the BOS (id %s) that training puts in front, and are "
            "otherwise as they should be; sample with the template of an exported policy, which "
            "writes it",
            path,
            bare,
            len(rows),
            tokenizer.bos_id,
        )
    return [
        _response(*given[row.id], row, pair, tokenizer)
        for row, pair in zip(rows, pairs, strict=True)
    ]


def _lacks_bos(theirs: list[int] | None, pair: Pair, tokenizer: Tokenizer) -> bool:
    """Says whether a prompt's ids are the pair's but for the BOS in front."""
    bos = tokenizer.bos_id
    return bos is not None and theirs is not None and [bos, *theirs] == pair.prompt


def _record(value: Any, where: str, vocabulary: int) -> dict[str, Any]:
    """The record of one line, its types and ids checked, its id a text."""
    record: dict[str, Any] = value if isinstance(value, dict) else {}
    keys = ("token_ids", "prompt_token_ids")
    ids = {key: record[key] for key in keys if record.get(key) is not None}
    sound = (
        isinstance(record.get("response"), str)
        and isinstance(record.get("id"), str | int)
        and record.get("finish_reason", "stop") in ("stop", "length")
        and all(isinstance(tokens, list) for tokens in ids.values())
        and all(type(token) is int for tokens in ids.values() for token in tokens)
    )
    if not sound:
        raise InputError(
            f'{where}: expected {{"id": ..., "response": text}}, and maybe "finish_reason" (stop '
            'or length), "token_ids" and "prompt_token_ids" (lists of ids)'
        )
    for key, tokens in ids.items():
        odd = next((token for token in tokens if not 0 <= token < vocabulary), None)
        if odd is not None:
            raise InputError(
                f"{where}: {key} has {odd}, but the vocabulary has {vocabulary} entries"
            )
    return {**record, "id": str(record["id"])}


def _response(
    where: str, record: dict[str, Any], row: Row, pair: Pair, tokenizer: Tokenizer
) -> Response:
    """The response of a record, in ids that end as the pair's own."""
    theirs = record.get("prompt_token_ids")
    same = theirs is None or theirs == pair.prompt or _lacks_bos(theirs, pair, tokenizer)
    if theirs is not None and not same:
        both = zip(theirs, pair.prompt, strict=False)
        place = next((i for i, (a, b) in enumerate(both) if a != b), None)
        # Where one is the other's beginning, they differ at its end.
        place = min(len(theirs), len(pair.prompt)) if place is None else place
        raise InputError(
            f"{where}: prompt_token_ids differ from ldalign's from token {place} on: theirs "
            f"{tokenizer.decode(theirs[place : place + 8], skip_special_tokens=False)!r}, ours "
            f"{tokenizer.decode(pair.prompt[place : place + 8], skip_special_tokens=False)!r}; "
            "generate with the chat template of the policy's folder"
        )
    reason = record.get("finish_reason", "stop")
    ids = record.get("token_ids")
    if ids is None:
        answered = Row(row.id, row.history, record["response"], where=where)
        whole = list(tokenizer.pair_ids(answered).response)
        # A cut response has no end token: its ids are those of its text alone.
        ids = whole if reason == "stop" else tokenizer.encode(record["response"])
    if reason == "stop" and (not ids or ids[-1] not in tokenizer.end_ids):
        # Engines differ in whether token_ids hold the end token.
        end = pair.real[-1] if pair.real[-1] in tokenizer.end_ids else tokenizer.end_ids[0]
        ids = [*ids, end]
    return Response(list(ids), reason, None)
