"""The embedded data sets: seeded natural-language tasks whose answers a program can check.

Every row is `{"id", "messages": [user, assistant], "kind", "answer"}`. There are two sets of the
same problems:

- `embedded`: the response is a short worked step, then a last line `Answer: X`; kind `formatting`
  answers with the JSON object alone. `check` wants that convention, which the prompts do not spell
  out: a model learns it from the training rows.
- `embedded-wordings`: the response is one of nine wordings (eight of a record), drawn at random,
  and `check` takes any, also one that is in no row (`any_wording.py`). So another response is
  wrong, or right in other words. The kinds end in `-any`; `answer` is `{"final", "known"}` there.

The two splits share neither wordings of prompts nor people, which come from separate lists, nor
parameter tuples: a hash of each says which split may use it, whatever the seed and the set. Single
numbers, goods and words do stand in both. All randomness is `random.Random(str)`, drawn with
integer methods only, so rows are the same on every machine and Python version.

    python -m ldalign.data.embedded FOLDER [--wordings] [--seed 0] [--train 4000] [--heldout 600]
"""

import argparse
import json
import random
import re
from collections.abc import Callable, Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any, NamedTuple

from ldalign.data.any_wording import check_any
from ldalign.data.problems import PEOPLE, PROBLEMS, RESPONSES, WORDINGS, Problem, draw
from ldalign.system.errors import EnvironmentProblem, InputError
from ldalign.system.exits import run

# The most rows of a split, with all prompts distinct whatever the seed; the tests fill both.
CAPACITY = {"train": 20_000, "heldout": 2_000}
ANY = "-any"  # ends a kind whose answers may be worded in any way


class Task(NamedTuple):
    """A problem put into words, ready to become a row."""

    kind: str
    params: tuple[Any, ...]
    prompt: str
    response: str
    answer: str | dict[str, Any]


# --- comparing a given final answer with the expected one ---


def _same_text(expected: str, given: str) -> bool:
    def bare(text: str) -> str:
        return re.sub(r"^(the |\$)", "", _tidy(text))

    return bare(expected) == bare(given)


def _same_number(expected: str, given: str) -> bool:
    """Equal values; a unit may be left out but not changed."""
    want, got = _number(expected), _number(given)
    return want is not None and got is not None and want[0] == got[0] and got[1] in ("", want[1])


_NUMBER = re.compile(r"(-?(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)(?:\.[0-9]+)?) ?([a-z ]*)")


def _number(text: str) -> tuple[Decimal, str] | None:
    """1,200 grams -> (1200, "gram"); 8 -> (8, ""); None for anything else."""
    match = _NUMBER.fullmatch(_tidy(text))
    if match is None:
        return None
    return Decimal(match[1].replace(",", "")), match[2].removesuffix("s")


def _same_time(expected: str, given: str) -> bool:
    return _tidy(expected).removeprefix("0") == _tidy(given).removeprefix("0")


def _same_list(expected: str, given: str) -> bool:
    def items(text: str) -> list[str]:
        return [_tidy(item) for item in re.split(r",(?: and\b)?|;|\band\b", _tidy(text))]

    return items(expected) == items(given)


def _same_record(expected: str, given: str) -> bool:
    """One JSON object with the same keys, each once, and the same values.

    34 and "34" are the same value.
    """

    def pairs(text: str) -> list[tuple[str, str]]:
        # As a tuple of pairs, an object is not taken for an array, and a key given twice stays.
        record = json.loads(text.casefold(), object_pairs_hook=tuple)
        if not isinstance(record, tuple):
            raise TypeError("not an object")
        return sorted((key, str(value)) for key, value in record)

    given = given.strip()
    if len(given) >= 6 and given.startswith("```") and given.endswith("```"):
        given = given[3:-3].removeprefix("json").strip()
    else:
        given = given.rstrip(".;! ")
    try:
        return pairs(expected) == pairs(given)
    except (ValueError, TypeError, RecursionError):
        return False  # not JSON, or not an object


def _tidy(text: str) -> str:
    """Lower case, single spaces, no markdown stars, no closing punctuation.

    A leading "." stays: .5 is not 5.
    """
    words = " ".join(text.casefold().replace("*", "").split())
    return words.lstrip("\"'([`").rstrip(" .,;:!?\"')]`")


# When the answer of a problem is the right one: (expected, given).
_SAME: dict[str, Callable[[str, str], bool]] = {
    "arithmetic": _same_number,
    "units": _same_number,
    "dates": _same_text,
    "clock": _same_time,
    "sorting": _same_list,
    "counting": _same_number,
    "extraction": _same_text,
    "formatting": _same_record,
    "logic": _same_text,
}
# The kinds that `check` knows, of both sets.
KINDS: tuple[str, ...] = (*PROBLEMS, *(problem + ANY for problem in PROBLEMS))

# "Answer: 42", "The answer is 42", "**Final answer:** 42"
_MARKER = re.compile(r"\banswer\W{0,3}?\s*(?::|=|\bis\b:?)", re.IGNORECASE)
# What leads up to it, as "so the final ", in a text that is turned round: a search for it from the
# front would begin anew at every one of its words, which takes hours in a text of nothing else.
_BEFORE = re.compile(r"(?:\s+(?:os|eht|ym|lanif|tcerroc)\b)*", re.IGNORECASE)


def _given(response: str) -> list[str]:
    """What follows each "answer:", until what leads up to the next."""
    *parts, last = _MARKER.split(response)
    return [*(_BEFORE.sub("", part[::-1], count=1)[::-1] for part in parts), last][1:]


def check(kind: str, answer: Any, response: str) -> bool:
    """Says whether the response ends in the right final answer.

    All that follows "Answer:" must be the answer, so text after it fails; every answer named
    this way must be right, so a response with two different ones fails. The working before it
    is not read. Kind `formatting`: the whole response must be the JSON object. Of a kind that
    ends in `-any` the answer may be stated in any words (`any_wording.check_any`). Raises
    InputError for an unknown kind, and for an answer that is not of the kind's form.
    """
    if kind not in KINDS:
        raise InputError(f"unknown task kind {kind!r}; the kinds are {', '.join(KINDS)}")
    problem = kind.removesuffix(ANY)
    if problem != kind:
        return check_any(problem, answer, response)
    given = [response] if kind == "formatting" else _given(response)
    return bool(given) and all(_SAME[kind](str(answer), text) for text in given)


def tasks(seed: int, split: str, count: int, any_wording: bool = False) -> Iterator[Task]:
    """Yields `count` tasks with distinct prompts, the kinds in turn.

    any_wording: those of `embedded-wordings`. Task i is the same whatever `count` is. Raises
    InputError as `make_rows`.
    """
    if split not in CAPACITY:
        raise InputError(
            f"unknown split {split!r} of the embedded data set; use {' or '.join(CAPACITY)}"
        )
    if not 0 <= count <= CAPACITY[split]:
        raise InputError(f"{count} rows asked of split {split!r}; it makes 0 to {CAPACITY[split]}")
    seen: set[str] = set()
    for i in range(count):
        kind = PROBLEMS[i % len(PROBLEMS)]
        rng = random.Random(f"{seed}/{split}/{kind}/{i // len(PROBLEMS)}")
        task = _draw_task(rng, split, kind, any_wording)
        while task.prompt in seen:  # rare: CAPACITY stays far below the number of distinct prompts
            task = _draw_task(rng, split, kind, any_wording)
        seen.add(task.prompt)
        yield task


def _draw_task(rng: random.Random, split: str, kind: str, any_wording: bool) -> Task:
    problem = draw(rng, kind, split, clear=any_wording)
    wording = rng.choice(WORDINGS[kind, split])
    prompt = wording.format(**{"name": rng.choice(PEOPLE[split])} | problem.fields)
    if any_wording:
        response = respond(rng.choice(RESPONSES[kind]), problem)
        return Task(kind + ANY, problem.params, prompt, response, any_answer(kind, problem))
    response = f"{problem.working}\nAnswer: {problem.answer}" if problem.working else problem.answer
    return Task(kind, problem.params, prompt, response, problem.answer)


def respond(wording: str, problem: Problem) -> str:
    """Puts the answer to a problem into one of the wordings of its kind."""
    return wording.format(**{"answer": problem.answer} | problem.fields)


def any_answer(kind: str, problem: Problem) -> dict[str, Any]:
    """Returns what `check` needs to know the answer in any words."""
    which = f" is the {problem.fields['which']}" if kind == "logic" else ""
    return {"final": problem.answer + which, "known": list(problem.known)}


def make_rows(seed: int, split: str, count: int, any_wording: bool = False) -> list[dict[str, Any]]:
    """Returns `count` rows of split "train" or "heldout", shuffled.

    any_wording: those of `embedded-wordings`. The id numbers a row before the shuffle. The same
    seed gives the same row for the same id, whatever `count`. Raises InputError for an unknown
    split or a count above CAPACITY.
    """
    rows: list[dict[str, Any]] = []
    for i, task in enumerate(tasks(seed, split, count, any_wording)):
        user = {"role": "user", "content": task.prompt}
        assistant = {"role": "assistant", "content": task.response}
        row = {"id": f"{split}-{i:06}", "messages": [user, assistant]}
        rows.append(row | {"kind": task.kind, "answer": task.answer})
    random.Random(f"{seed}/{split}/order").shuffle(rows)
    return rows


def main(argv: list[str]) -> None:
    """Writes both splits as JSON Lines, as the command line says."""
    parser = argparse.ArgumentParser(
        prog="python -m ldalign.data.embedded", description="Write the embedded data set."
    )
    where = "where train.jsonl and heldout.jsonl go; made if missing"
    parser.add_argument("folder", type=Path, help=where)
    wordings = "the set embedded-wordings: every answer has several right wordings"
    parser.add_argument("--wordings", action="store_true", help=wordings)
    parser.add_argument("--seed", type=int, default=0, help="seed of both splits (default 0)")
    parser.add_argument("--train", type=int, default=4000, help="training rows (default 4000)")
    parser.add_argument("--heldout", type=int, default=600, help="held-out rows (default 600)")
    args = parser.parse_args(argv)
    rows = {
        split: make_rows(args.seed, split, getattr(args, split), args.wordings)
        for split in CAPACITY
    }
    for split, made in rows.items():
        path = args.folder / f"{split}.jsonl"
        try:
            args.folder.mkdir(parents=True, exist_ok=True)
            lines = "".join(json.dumps(row) + "\n" for row in made)
            path.write_text(lines, encoding="utf-8", newline="\n")
        except OSError as error:
            raise EnvironmentProblem(
                f"{path}: cannot be written ({error.strerror}); give another folder"
            ) from error
        print(f"{path}: {len(made)} rows, {len(PROBLEMS)} kinds, seed {args.seed}")


if __name__ == "__main__":
    run(main)
