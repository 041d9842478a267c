"""The embedded default data set: seeded natural-language tasks whose answers a program can check.

Every row is `{"id", "messages": [user, assistant], "kind", "answer"}`, all values strings but
`messages`. The response is a short worked step, then a last line `Answer: X`; kind `formatting`
answers with the JSON object alone. `check` wants that convention, which the prompts do not spell
out: a model learns it from the training rows.

The two splits share neither wordings nor people, which come from separate lists, nor parameter
tuples: a hash of each says which split may use it, whatever the seed. Single numbers, goods and
words do stand in both. All randomness is `random.Random(str)`, drawn with integer methods only, so
rows are the same on every machine and Python version.

    python -m ldalign.data.embedded FOLDER [--seed 0] [--train 4000] [--heldout 600]
"""

import argparse
import hashlib
import json
import random
import re
from collections.abc import Callable, Iterator, Sequence
from decimal import Decimal
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from ldalign.system.errors import EnvironmentProblem, InputError
from ldalign.system.exits import run

# The most rows of a split, with all prompts distinct whatever the seed; the tests fill both.
CAPACITY = {"train": 20_000, "heldout": 2_000}

PEOPLE = {
    "train": (
        "Mia Omar Lena Tom Priya Sam Anna Hugo Kofi Rosa Ivan Nina Paul Zoe Amir Clara Ben Yuki "
        "Noah Ella Felix Maya Jonas Sara Luis Emma Tariq Grace Oscar Leila Max Julia Dev Helen "
        "Marco Ruth Simon Ada Victor Wendy"
    ).split(),
    "heldout": (
        "Bruno Carla Diego Elsa Farid Greta Henry Ines Jamal Kira Liam Mona Nils Olga Pedro Quinn"
    ).split(),
}
GOODS = (
    "apples pears pens books eggs cards stamps beads shells candles mugs plates roses buttons "
    "coins tickets"
).split()
THINGS = "lamp chair kettle jacket clock camera radio mirror basket blanket guitar bicycle".split()
EVENTS = (
    "a dentist visit,a piano lesson,a job interview,a chess match,"
    "a book fair,a school trip,an eye test"
).split(",")
WORDS = (
    "apple bread chair dance eagle forest garden house island jacket kitten lemon market night "
    "orange pencil queen river silver table uncle valley window yellow zebra bridge candle doctor "
    "engine flower green hammer insect jungle ladder mountain needle ocean paper rabbit spoon "
    "tiger train violin water cat dog sun moon star tree fish milk rain snow"
).split()
CITIES = (
    "Oslo Paris Lima Cairo Delhi Rome Tokyo Madrid Dublin Vienna Quito Athens Boston Lagos Prague"
).split()
JOBS = "nurse baker pilot teacher farmer painter lawyer driver singer doctor plumber writer".split()
DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
# (what is measured, large unit, small unit, small units in a large one, largest large count)
UNITS = (
    ("the bus ride", "hours", "minutes", 60, 9),
    ("the film", "hours", "minutes", 60, 9),
    ("the song list", "minutes", "seconds", 60, 9),
    ("the summer course", "weeks", "days", 7, 12),
    ("the boat trip", "days", "hours", 24, 9),
    ("the rope", "metres", "centimetres", 100, 40),
    ("the hiking path", "kilometres", "metres", 1000, 30),
    ("the parcel", "kilograms", "grams", 1000, 30),
    ("the soup", "litres", "millilitres", 1000, 20),
    ("the shelf", "feet", "inches", 12, 12),
    ("the fence", "yards", "feet", 3, 40),
    ("the egg order", "dozens", "single eggs", 12, 12),
)
SCALES = (  # (the relation, most, least)
    ("taller", "tallest", "shortest"),
    ("older", "oldest", "youngest"),
    ("faster", "fastest", "slowest"),
    ("stronger", "strongest", "weakest"),
    ("richer", "richest", "poorest"),
    ("heavier", "heaviest", "lightest"),
)


class Problem(NamedTuple):
    """One drawn task.

    `params` settles the work to be done, without the people; the hash of it picks the split.
    """

    params: tuple[Any, ...]
    fields: dict[str, Any]  # what the wording's braces take, `name` aside
    working: str  # empty: the response is the answer alone
    answer: str


class Task(NamedTuple):
    """A problem put into words, ready to become a row."""

    kind: str
    params: tuple[Any, ...]
    prompt: str
    response: str
    answer: str


def _read_wordings() -> dict[tuple[str, str], tuple[str, ...]]:
    """What a user says: {(kind, split): its wordings}, out of wordings.txt."""
    text = Path(__file__).with_name("wordings.txt").read_text(encoding="utf-8")
    parts = (part.strip().splitlines() for part in text.split("# ")[1:])
    return {(head.split()[0], head.split()[1]): tuple(lines) for head, *lines in parts}


WORDINGS = _read_wordings()


# -------------------------------------------------------------------------------------------- kinds
#
# One function a kind: draws the numbers and words of one problem; `people` are the split's names.


def _arithmetic(rng: random.Random, people: Sequence[str]) -> Problem:
    a, b, c = rng.randint(11, 79), rng.randint(2, 15), rng.randint(2, 9)
    goods = rng.choice(GOODS)
    working = f"{a} + {b} = {a + b}, and {a + b} - {c} = {a + b - c}."
    fields = {"a": a, "b": b, "c": c, "goods": goods}
    return Problem((a, b, c), fields, working, f"{a + b - c} {goods}")


def _units(rng: random.Random, people: Sequence[str]) -> Problem:
    thing, big, small, factor, most = rng.choice(UNITS)
    a = rng.randint(2, most)
    step = 50 if factor == 1000 else 5 if factor in (60, 100) else 1  # round numbers of small units
    b = step * rng.randint(1 if step > 1 else 2, (factor - 1) // step)
    whole = a * factor
    working = f"{a} x {factor} = {whole}, and {whole} + {b} = {whole + b}."
    fields = {"thing": thing, "big": big, "small": small, "a": a, "b": b}
    return Problem((big, small, a, b), fields, working, f"{whole + b} {small}")


def _dates(rng: random.Random, people: Sequence[str]) -> Problem:
    start, n = rng.randrange(7), rng.randint(2, 6)
    passed = [f"{i} {DAYS[(start + i) % 7]}" for i in range(1, n + 1)]
    fields = {"day": DAYS[start], "n": n, "event": rng.choice(EVENTS)}
    working = f"{DAYS[start]}, then {_joined(passed)}."
    return Problem((start, n), fields, working, DAYS[(start + n) % 7])


def _clock(rng: random.Random, people: Sequence[str]) -> Problem:
    start = 5 * rng.randint(72, 215)  # minutes after midnight: 6:00 to 17:55
    minutes = rng.choice((60, 120, 180, 240, 10, 15, 20, 30, 40, 45))
    hours, rest = divmod(minutes, 60)
    length = f"{rest} minutes" if rest else f"{hours} hour{'s' * (hours > 1)}"
    first, end = (f"{t // 60:02}:{t % 60:02}" for t in (start, start + minutes))
    fields = {"start": first, "length": length}
    return Problem((start, minutes), fields, f"{first} plus {length} is {end}.", end)


def _sorting(rng: random.Random, people: Sequence[str]) -> Problem:
    items: list[Any] = rng.sample(WORDS, 3) if rng.randrange(2) else rng.sample(range(10, 100), 3)
    words, backwards = isinstance(items[0], str), bool(rng.randrange(3) == 0)
    order = ("from smallest to largest", "from largest to smallest")
    if words:
        order = ("in alphabetical order", "in reverse alphabetical order")
    done = sorted(items, reverse=backwards)
    what = "words" if words else "numbers"
    fields = {"what": what, "items": _joined(items), "order": order[backwards]}
    working = f"The first is {done[0]}, the last is {done[-1]}."
    return Problem((*done,), fields, working, _joined(done))


def _counting(rng: random.Random, people: Sequence[str]) -> Problem:
    sources = (("words", WORDS), ("cities", CITIES), ("jobs", JOBS), ("things", THINGS))
    what, source = rng.choice(sources)
    items = rng.sample(source, rng.randint(3, 8))
    working = _joined(f"{i} {item}" for i, item in enumerate(items, 1)) + "."
    return Problem((*items,), {"items": _joined(items), "what": what}, working, str(len(items)))


def _extraction(rng: random.Random, people: Sequence[str]) -> Problem:
    price, day, thing = rng.randint(12, 240), rng.choice(DAYS), rng.choice(THINGS)
    code = "".join(rng.choice("ABCDEFHKLMNPRSTWXYZ") for _ in range(2)) + str(rng.randint(100, 999))
    wanted, answer = rng.choice(
        [("price", f"${price}"), ("order number", code), ("day of delivery", day)]
    )
    fields = {"price": price, "day": day, "thing": thing, "code": code, "wanted": wanted}
    return Problem((price, day, thing, code), fields, f"The {wanted} is {answer}.", answer)


def _formatting(rng: random.Random, people: Sequence[str]) -> Problem:
    age, city = rng.randint(18, 79), rng.choice(CITIES)
    record = {"name": rng.choice(people), "age": age, "city": city}
    return Problem((age, city), record, "", json.dumps(record))


def _logic(rng: random.Random, people: Sequence[str]) -> Problem:
    relation, most, least = rng.choice(SCALES)
    ranked = rng.sample(people, 3)  # from most to least
    clues = list(pairwise(ranked))
    rng.shuffle(clues)
    (x1, y1), (x2, y2) = clues
    place = rng.choice((0, 2))
    fields = {"x1": x1, "y1": y1, "x2": x2, "y2": y2}
    fields |= {"rel": relation, "which": most if place == 0 else least}
    working = f"From {most} to {least}: {_joined(ranked)}."
    return Problem((relation, *clues, place), fields, working, ranked[place])


def _joined(items: Any) -> str:
    return ", ".join(map(str, items))


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

    fenced = re.fullmatch(r"```(?:json)?\s*(.*?)\s*```", given.strip(), re.DOTALL)
    try:
        return pairs(expected) == pairs(fenced[1] if fenced else given.strip().rstrip(".;! "))
    except (ValueError, TypeError, RecursionError):
        return False  # not JSON, or not an object


def _tidy(text: str) -> str:
    """Lower case, single spaces, no markdown stars, no closing punctuation.

    A leading "." stays: .5 is not 5.
    """
    words = " ".join(text.casefold().replace("*", "").split())
    return words.lstrip("\"'([`").rstrip(" .,;:!?\"')]`")


class Kind(NamedTuple):
    """A kind of task: how a problem is drawn, and when an answer is the right one."""

    draw: Callable[[random.Random, Sequence[str]], Problem]
    same: Callable[[str, str], bool]  # (expected, given)


REGISTRY = {
    "arithmetic": Kind(_arithmetic, _same_number),
    "units": Kind(_units, _same_number),
    "dates": Kind(_dates, _same_text),
    "clock": Kind(_clock, _same_time),
    "sorting": Kind(_sorting, _same_list),
    "counting": Kind(_counting, _same_number),
    "extraction": Kind(_extraction, _same_text),
    "formatting": Kind(_formatting, _same_record),
    "logic": Kind(_logic, _same_text),
}
KINDS: tuple[str, ...] = tuple(REGISTRY)

# "Answer: 42", "The answer is 42", "**Final answer:** 42"
_MARKER = re.compile(
    r"(?:\b(?:so|the|my|final|correct)\s+)*\banswer\W{0,3}?\s*(?::|=|\bis\b:?)", re.IGNORECASE
)


def check(kind: str, answer: Any, response: str) -> bool:
    """Says whether the response ends in the right final answer.

    All that follows "Answer:" must be the answer, so text after it fails; every answer named
    this way must be right, so a response with two different ones fails. The working before it
    is not read. Kind `formatting`: the whole response must be the JSON object. Raises
    InputError for an unknown kind.
    """
    if kind not in REGISTRY:
        raise InputError(f"unknown task kind {kind!r}; the kinds are {', '.join(KINDS)}")
    same = REGISTRY[kind].same
    given = [response] if kind == "formatting" else _MARKER.split(response)[1:]
    return bool(given) and all(same(str(answer), text) for text in given)


def tasks(seed: int, split: str, count: int) -> Iterator[Task]:
    """Yields `count` tasks with distinct prompts, the kinds in turn.

    Task i is the same whatever `count` is. Raises InputError as `make_rows`.
    """
    if split not in CAPACITY:
        raise InputError(
            f"unknown split {split!r} of the embedded data set; use {' or '.join(CAPACITY)}"
        )
    if not 0 <= count <= CAPACITY[split]:
        raise InputError(f"{count} rows asked of split {split!r}; it makes 0 to {CAPACITY[split]}")
    seen: set[str] = set()
    for i in range(count):
        kind = KINDS[i % len(KINDS)]
        rng = random.Random(f"{seed}/{split}/{kind}/{i // len(KINDS)}")
        task = _draw_task(rng, split, kind)
        while task.prompt in seen:  # rare: CAPACITY stays far below the number of distinct prompts
            task = _draw_task(rng, split, kind)
        seen.add(task.prompt)
        yield task


def _draw_task(rng: random.Random, split: str, kind: str) -> Task:
    problem = REGISTRY[kind].draw(rng, PEOPLE[split])
    while _split_of(kind, problem.params) != split:
        problem = REGISTRY[kind].draw(rng, PEOPLE[split])
    wording = rng.choice(WORDINGS[kind, split])
    prompt = wording.format(**{"name": rng.choice(PEOPLE[split])} | problem.fields)
    response = f"{problem.working}\nAnswer: {problem.answer}" if problem.working else problem.answer
    return Task(kind, problem.params, prompt, response, problem.answer)


def _split_of(kind: str, params: tuple[Any, ...]) -> str:
    """The split that may use a parameter tuple: one in five is kept for the held-out one.

    By sha256: Python's hash() differs from run to run.
    """
    digest = hashlib.sha256(f"{kind}/{params!r}".encode()).digest()
    return "heldout" if digest[0] % 5 == 0 else "train"


def make_rows(seed: int, split: str, count: int) -> list[dict[str, Any]]:
    """Returns `count` rows of split "train" or "heldout", shuffled.

    The id numbers a row before the shuffle. The same seed gives the same row for the same id,
    whatever `count`. Raises InputError for an unknown split or a count above CAPACITY.
    """
    rows: list[dict[str, Any]] = []
    for i, task in enumerate(tasks(seed, split, count)):
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
    parser.add_argument("--seed", type=int, default=0, help="seed of both splits (default 0)")
    parser.add_argument("--train", type=int, default=4000, help="training rows (default 4000)")
    parser.add_argument("--heldout", type=int, default=600, help="held-out rows (default 600)")
    args = parser.parse_args(argv)
    rows = {split: make_rows(args.seed, split, getattr(args, split)) for split in CAPACITY}
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
        print(f"{path}: {len(made)} rows, {len(KINDS)} kinds, seed {args.seed}")


if __name__ == "__main__":
    run(main)
