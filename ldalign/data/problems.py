"""Problems of nine kinds with one right answer each, and the wordings in which users ask for it.

Every kind has a function that draws the numbers and words of one problem; the answer, a short
working, and what a wording may name come with it. `wordings.txt` holds what a user says,
`responses.txt` what a right response may say. All randomness is drawn with integer methods only,
so problems are the same on every machine and Python version.
"""

import hashlib
import json
import random
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

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
COUNTS = dict(enumerate("three four five six seven eight".split(), 3))  # of a list, in words


class Problem(NamedTuple):
    """One drawn task.

    params: settles the work to be done, without the people; the hash of it picks the split.
    fields: what the braces of a wording take, `name` and `answer` aside.
    working: the steps to the answer; empty: there are none.
    answer: the right one.
    known: the values of the prompt and of a right working that are of the answer's type.
    """

    params: tuple[Any, ...]
    fields: dict[str, Any]
    working: str
    answer: str
    known: tuple[str, ...] = ()


def _read_wordings(name: str) -> dict[tuple[str, ...], tuple[str, ...]]:
    """Reads a file of wordings: {the words of a headline: the lines below it}."""
    text = Path(__file__).with_name(name).read_text(encoding="utf-8")
    parts = (part.strip().splitlines() for part in text.split("# ")[1:])
    return {tuple(head.split()): tuple(lines) for head, *lines in parts}


# What a user says, by (kind, split).
WORDINGS = _read_wordings("wordings.txt")
# What a right response says, by kind; with line breaks.
RESPONSES = {
    kind: tuple(line.replace("|", "\n") for line in lines)
    for (kind,), lines in _read_wordings("responses.txt").items()
}


# -------------------------------------------------------------------------------------------- kinds
#
# One function a kind: draws the numbers and words of one problem; `people` are the split's names.


def _arithmetic(rng: random.Random, people: Sequence[str]) -> Problem:
    a, b, c = rng.randint(11, 79), rng.randint(2, 15), rng.randint(2, 9)
    goods = rng.choice(GOODS)
    whole, value = a + b, a + b - c
    working = f"{a} + {b} = {whole}, and {whole} - {c} = {value}."
    fields = {"a": a, "b": b, "c": c, "goods": goods, "whole": whole, "value": value}
    known = _texts(a, b, c, whole, a - c, abs(b - c))
    return Problem((a, b, c), fields, working, f"{value} {goods}", known)


def _units(rng: random.Random, people: Sequence[str]) -> Problem:
    thing, big, small, factor, most = rng.choice(UNITS)
    a = rng.randint(2, most)
    step = 50 if factor == 1000 else 5 if factor in (60, 100) else 1  # round numbers of small units
    b = step * rng.randint(1 if step > 1 else 2, (factor - 1) // step)
    whole = a * factor
    value = whole + b
    working = f"{a} x {factor} = {whole}, and {whole} + {b} = {value}."
    fields = {"thing": thing, "big": big, "small": small, "a": a, "b": b}
    fields |= {"factor": factor, "whole": whole, "value": value}
    known = _texts(a, b, 1, factor, whole)
    return Problem((big, small, a, b), fields, working, f"{value} {small}", known)


def _dates(rng: random.Random, people: Sequence[str]) -> Problem:
    start, n = rng.randrange(7), rng.randint(2, 6)
    days = [DAYS[(start + i) % 7] for i in range(n + 1)]
    passed = [f"{i} {day}" for i, day in enumerate(days)][1:]
    fields = {"day": days[0], "n": n, "event": rng.choice(EVENTS), "passed": _joined(days[1:])}
    fields["steps"] = "\n".join(f"+{i}: {day}" for i, day in enumerate(days[1:], 1))
    working = f"{days[0]}, then {_joined(passed)}."
    return Problem((start, n), fields, working, days[-1], tuple(days[:-1]))


def _clock(rng: random.Random, people: Sequence[str]) -> Problem:
    start = 5 * rng.randint(72, 215)  # minutes after midnight: 6:00 to 17:55
    minutes = rng.choice((60, 120, 180, 240, 10, 15, 20, 30, 40, 45))
    hours, rest = divmod(minutes, 60)
    length = f"{rest} minutes" if rest else f"{hours} hour{'s' * (hours > 1)}"
    first, end = (f"{t // 60:02}:{t % 60:02}" for t in (start, start + minutes))
    fields = {"start": first, "length": length}
    working = f"{first} plus {length} is {end}."
    return Problem((start, minutes), fields, working, end, (first,))


def _sorting(rng: random.Random, people: Sequence[str]) -> Problem:
    items: list[Any] = rng.sample(WORDS, 3) if rng.randrange(2) else rng.sample(range(10, 100), 3)
    words, backwards = isinstance(items[0], str), bool(rng.randrange(3) == 0)
    order = ("from smallest to largest", "from largest to smallest")
    if words:
        order = ("in alphabetical order", "in reverse alphabetical order")
    done = sorted(items, reverse=backwards)
    what = "words" if words else "numbers"
    fields = {"what": what, "items": _joined(items), "order": order[backwards]}
    fields |= dict(zip(("first", "second", "third"), done, strict=True))
    working = f"The first is {done[0]}, the last is {done[-1]}."
    return Problem((*done,), fields, working, _joined(done), (_joined(items),))


def _counting(rng: random.Random, people: Sequence[str]) -> Problem:
    sources = (("words", WORDS), ("cities", CITIES), ("jobs", JOBS), ("things", THINGS))
    what, source = rng.choice(sources)
    items = rng.sample(source, rng.randint(3, 8))
    numbered = [f"{i} {item}" for i, item in enumerate(items, 1)]
    fields = {"items": _joined(items), "what": what, "last": items[-1]}
    fields["steps"] = "\n".join(f"{i}. {item}" for i, item in enumerate(items, 1))
    fields["word"] = COUNTS[len(items)]
    return Problem((*items,), fields, _joined(numbered) + ".", str(len(items)))


def _extraction(rng: random.Random, people: Sequence[str]) -> Problem:
    price, day, thing = rng.randint(12, 240), rng.choice(DAYS), rng.choice(THINGS)
    code = "".join(rng.choice("ABCDEFHKLMNPRSTWXYZ") for _ in range(2)) + str(rng.randint(100, 999))
    wanted, answer = rng.choice(
        [("price", f"${price}"), ("order number", code), ("day of delivery", day)]
    )
    fields = {"price": price, "day": day, "thing": thing, "code": code, "wanted": wanted}
    known = tuple(value for value in (f"${price}", code, day) if value != answer)
    params = (price, day, thing, code)
    return Problem(params, fields, f"The {wanted} is {answer}.", answer, known)


def _formatting(rng: random.Random, people: Sequence[str]) -> Problem:
    age, city = rng.randint(18, 79), rng.choice(CITIES)
    record = {"name": rng.choice(people), "age": age, "city": city}
    backwards = json.dumps(dict(reversed(record.items())))
    layouts = {
        "backwards": backwards,
        "indented": json.dumps(record, indent=2),
        "dense": json.dumps(record, separators=(",", ":")),
    }
    return Problem((age, city), record | layouts, "", json.dumps(record))


def _logic(rng: random.Random, people: Sequence[str]) -> Problem:
    relation, most, least = rng.choice(SCALES)
    ranked = rng.sample(people, 3)  # from most to least
    clues = list(pairwise(ranked))
    rng.shuffle(clues)
    (x1, y1), (x2, y2) = clues
    place = rng.choice((0, 2))
    fields = {"x1": x1, "y1": y1, "x2": x2, "y2": y2}
    fields |= {"rel": relation, "which": most if place == 0 else least}
    fields |= {"most": most, "least": least, "ranked": _joined(ranked)}
    working = f"From {most} to {least}: {_joined(ranked)}."
    known = tuple(person for person in ranked if person != ranked[place])
    return Problem((relation, *clues, place), fields, working, ranked[place], known)


def _joined(items: Any) -> str:
    return ", ".join(map(str, items))


def _texts(*values: int) -> tuple[str, ...]:
    return tuple(dict.fromkeys(map(str, values)))  # each once


_DRAW: dict[str, Callable[[random.Random, Sequence[str]], Problem]] = {
    "arithmetic": _arithmetic,
    "units": _units,
    "dates": _dates,
    "clock": _clock,
    "sorting": _sorting,
    "counting": _counting,
    "extraction": _extraction,
    "formatting": _formatting,
    "logic": _logic,
}
PROBLEMS: tuple[str, ...] = tuple(_DRAW)


def draw(rng: random.Random, kind: str, split: str, clear: bool) -> Problem:
    """Draws a problem of a kind that the split may use.

    clear: none whose answer is also among its known values, so that who only repeats the prompt
    cannot be right.
    """
    while True:
        problem = _DRAW[kind](rng, PEOPLE[split])
        if _split_of(kind, problem.params) == split and not (clear and _answers_itself(problem)):
            return problem


def _answers_itself(problem: Problem) -> bool:
    return bool({problem.answer, str(problem.fields.get("value"))} & {*problem.known})


def _split_of(kind: str, params: tuple[Any, ...]) -> str:
    """The split that may use a parameter tuple: one in five is kept for the held-out one.

    By sha256: Python's hash() differs from run to run.
    """
    digest = hashlib.sha256(f"{kind}/{params!r}".encode()).digest()
    return "heldout" if digest[0] % 5 == 0 else "train"
