"""The embedded default data set: seeded natural-language tasks whose answers a program can check.

Every row is `{"id", "messages": [user, assistant], "kind", "answer"}`, all values strings but `messages`. The response
is a short worked step, then a last line `Answer: X`; kind `formatting` answers with the JSON object alone. `check`
wants that convention, which the prompts do not spell out: a model learns it from the training rows.

The two splits share nothing but the kinds of task. Wordings and people come from separate lists, and a hash of each
parameter tuple says which split may use it, whatever the seed. All randomness is `random.Random(str)`, drawn with
integer methods only, so rows are the same on every machine and Python version.

    python -m ldalign.tasks FOLDER [--seed 0] [--train 4000] [--heldout 600]
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

from ldalign.errors import EnvironmentProblem, InputError, run

# Most rows a split is made with, all prompts distinct for any seed; the tests fill both.
CAPACITY = {"train": 20_000, "heldout": 2_000}

PEOPLE = {
    "train": (
        "Mia Omar Lena Tom Priya Sam Anna Hugo Kofi Rosa Ivan Nina Paul Zoe Amir Clara Ben Yuki Noah Ella Felix Maya "
        "Jonas Sara Luis Emma Tariq Grace Oscar Leila Max Julia Dev Helen Marco Ruth Simon Ada Victor Wendy"
    ).split(),
    "heldout": "Bruno Carla Diego Elsa Farid Greta Henry Ines Jamal Kira Liam Mona Nils Olga Pedro Quinn".split(),
}
GOODS = "apples pears pens books eggs cards stamps beads shells candles mugs plates roses buttons coins tickets".split()
THINGS = "lamp chair kettle jacket clock camera radio mirror basket blanket guitar bicycle".split()
EVENTS = "a dentist visit,a piano lesson,a job interview,a chess match,a book fair,a school trip,an eye test".split(",")
WORDS = (
    "apple bread chair dance eagle forest garden house island jacket kitten lemon market night orange pencil queen "
    "river silver table uncle valley window yellow zebra bridge candle doctor engine flower green hammer insect "
    "jungle ladder mountain needle ocean paper rabbit spoon tiger train violin water cat dog sun moon star tree "
    "fish milk rain snow"
).split()
CITIES = "Oslo,Paris,Lima,Cairo,Delhi,Rome,Tokyo,Madrid,Dublin,Vienna,Quito,Athens,Boston,Lagos,Prague".split(",")
JOBS = "nurse baker pilot teacher farmer painter lawyer driver singer doctor plumber writer".split()
DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
UNITS = (  # (what is measured, large unit, small unit, small units in a large one, largest large count)
    ("the bus ride", "hours", "minutes", 60, 9), ("the film", "hours", "minutes", 60, 9),
    ("the song list", "minutes", "seconds", 60, 9), ("the summer course", "weeks", "days", 7, 12),
    ("the boat trip", "days", "hours", 24, 9), ("the rope", "metres", "centimetres", 100, 40),
    ("the hiking path", "kilometres", "metres", 1000, 30), ("the parcel", "kilograms", "grams", 1000, 30),
    ("the soup", "litres", "millilitres", 1000, 20), ("the shelf", "feet", "inches", 12, 12),
    ("the fence", "yards", "feet", 3, 40), ("the egg order", "dozens", "single eggs", 12, 12),
)  # fmt: skip
SCALES = (  # (the relation, most, least)
    ("taller", "tallest", "shortest"), ("older", "oldest", "youngest"), ("faster", "fastest", "slowest"),
    ("stronger", "strongest", "weakest"), ("richer", "richest", "poorest"), ("heavier", "heaviest", "lightest"),
)  # fmt: skip

# What a user says, one wording a line. The braces name fields of the problem; {name} is a person of the split.
_WORDINGS = """
# arithmetic train
{name} has {a} {goods}, buys {b} more and then gives {c} away. How many {goods} does {name} have now?
There were {a} {goods} on the table. {name} added {b} and later took {c}. How many are on the table?
{name} collected {a} {goods} and found {b} more. Then {c} were lost. How many {goods} are left?
A shop had {a} {goods}. It got {b} new ones and sold {c} to {name}. How many does it have?
{name} starts with {a} {goods}, wins {b} and loses {c}. How many {goods} is that in the end?
In the box were {a} {goods}. {name} put in {b} and took out {c}. How many are in the box now?
On Monday {name} had {a} {goods}. On Tuesday {b} came in and {c} went out. How many {goods} remain?
{name} packed {a} {goods}, then {b} others, and removed {c} again. How many {goods} are packed?
# arithmetic heldout
{name} owned {a} {goods}, received {b} as a gift and used {c}. How many {goods} does {name} still own?
A drawer held {a} {goods}. {name} laid in {b} and pulled out {c}. How many does it hold now?
After buying {a} {goods}, {name} bought {b} others and returned {c}. How many {goods} did {name} keep?
The class had {a} {goods}. {name} brought {b}, but {c} broke. How many {goods} does the class have?
# units train
How many {small} are {a} {big} and {b} {small}? {name} asks because of {thing}.
{name} says that {thing} is {a} {big} and {b} {small}. What is that in {small}?
Convert {a} {big} and {b} {small} to {small}. {name} needs it for {thing}.
The note on {thing} says {a} {big} and {b} {small}. Tell {name} how many {small} that is.
For {thing}, {name} counted {a} {big} and {b} {small}. Give the total in {small}.
{name} wants {thing} in {small} only. It is {a} {big} and {b} {small}.
{a} {big} and {b} {small}: that is what {name} wrote for {thing}. How many {small} is it?
Change {a} {big} and {b} {small} into {small}, please. It is for {thing} of {name}.
# units heldout
{name} measured {thing}: {a} {big} and {b} {small}. How much is this in {small}?
If {thing} is {a} {big} and {b} {small}, how many {small} should {name} write?
Express {a} {big} and {b} {small} in {small}. {name} has to know for {thing}.
{name} asks about {thing}. How many {small} do {a} {big} and {b} {small} make?
# dates train
Today is {day}. {name} has {event} in {n} days. What day of the week is that?
It is {day}. In {n} days {name} has {event}. Which day will it be?
{name} has {event} {n} days after {day}. What day is it on?
What day is {n} days after {day}? {name} has {event} then.
If today is {day}, which day comes {n} days later? {name} has {event} on it.
{name} says: today is {day} and {event} is {n} days away. Which day is it?
On {day}, {name} hears that {event} is in {n} days. Name that day.
Now it is {day}. {name} has {event} {n} days from now. What day is it on?
# dates heldout
This is {day}. {name} waits {n} days for {event}. On which day of the week is it?
{name} booked {event} on {day}, for {n} days later. Which day of the week is that?
Count {n} days from {day}. On that day {name} has {event}. Which day is it?
{n} days from today {name} has {event}. Today is {day}. What weekday will it be?
# clock train
{name} leaves at {start} and travels for {length}. When does {name} arrive?
A film starts at {start} and runs for {length}. When can {name} go home?
{name} begins to work at {start} and works for {length}. What time is it then?
The meeting with {name} opens at {start} and takes {length}. When is it over?
What time is {length} after {start}? {name} wants to know.
{name} puts a cake in the oven at {start} for {length}. When is it done?
It is {start}. {name} will call in {length}. What time will that be?
The train of {name} goes at {start} and needs {length}. At what time does it arrive?
# clock heldout
{name} went for a walk at {start} and came back {length} later. When was that?
A game starts at {start} and lasts {length}. At what time can {name} leave?
{name} goes to sleep at {start} and sleeps for {length}. When does {name} wake up?
The ferry leaves at {start} with {name} and sails for {length}. When does it land?
# sorting train
Sort these {what} {order} for {name}: {items}.
{name} wrote down the {what} {items}. Put them {order}.
Please put the {what} {items} {order}. {name} needs the list.
Here are the {what} of {name}: {items}. Write them {order}.
Arrange {items} {order}. These are the {what} that {name} drew.
{name} has the {what} {items}. List them {order}.
The {what} {items} must be {order}. Help {name} with it.
Write the {what} {items} again, {order}, as {name} asked.
# sorting heldout
{name} wants these {what} {order}: {items}.
Can you order the {what} {items} for {name}? They should be {order}.
{items} are the {what} on the cards of {name}. Give them {order}.
Take the {what} {items} and show {name} the list {order}.
# counting train
How many {what} are on this list of {name}? {items}
{name} wrote these {what}: {items}. How many are they?
Count the {what} for {name}: {items}.
Here are the {what} that {name} likes: {items}. How many is that?
{name} read out {items}. How many {what} did {name} read?
The list of {name} has the {what} {items}. How many does it have?
Tell {name} how many {what} these are: {items}.
{items}: how many {what} did {name} write?
# counting heldout
{name} put the {what} {items} on the board. How many are there?
{name} made a row: {items}. What is the number of {what} in it?
{name} chose {items}. Count these {what}.
On the page of {name} stand the {what} {items}. How many {what} stand there?
# extraction train
Message from {name}: the {thing} costs ${price}, the order number is {code}, it comes on {day}. What is the {wanted}?
{name} ordered a {thing}, order number {code}. It comes on {day} and costs ${price}. What is the {wanted}?
Deliver one {thing} to {name} on {day}, order number {code}, price ${price}. Give me the {wanted}.
Order {code} is a {thing} for {name}. It costs ${price} and comes on {day}. Find the {wanted}.
Dear {name}, your {thing} for ${price} comes on {day}. Its order number is {code}. What is the {wanted}?
A {thing} for {name}: ${price}, number {code}, due on {day}. Which {wanted} is given?
{name} pays ${price} for the {thing} with the number {code}. It arrives on {day}. What is the {wanted}?
On {day} {name} gets a {thing} for ${price}. The order has the number {code}. Tell me the {wanted}.
# extraction heldout
{name} bought a {thing} for ${price}. It has the order number {code} and comes on {day}. Name the {wanted}.
Note: {day}, one {thing}, ${price}, order {code}, for {name}. What is the {wanted} here?
The {thing} of {name} will come on {day}. The number is {code}, the price ${price}. State the {wanted}.
Order {code} from {name}: a {thing}, ${price}, for {day}. I need the {wanted}.
# formatting train
Write as JSON with the keys name, age and city: {name} is {age} and lives in {city}.
{name} is a {age} year old from {city}. Give name, age and city as JSON.
Make a JSON object with name, age and city for {name}, who is {age} and lives in {city}.
{name} comes from {city} and is {age} years old. Write name, age and city as JSON.
Convert to JSON with name, age and city: a person called {name} in {city}, aged {age}.
JSON with name, age and city, please. {name}, {age} years old, has a flat in {city}.
{name} from {city} is {age}. Turn this into JSON with the keys name, age and city.
In {city} lives {name}, aged {age}. Put name, age and city in JSON.
# formatting heldout
Our guest {name} is {age} years old and comes from {city}. Store name, age and city as JSON.
Show name, age and city as a JSON object: {name} of {city} is {age}.
{name} moved to {city} and is {age} years old. I need name, age and city in JSON.
Age {age}, home {city}, name {name}. Write JSON with name, age and city.
# logic train
{x1} is {rel} than {y1}. {x2} is {rel} than {y2}. Who is the {which}?
We know: {x1} is {rel} than {y1}, and {x2} is {rel} than {y2}. Name the {which} of them.
If {x1} is {rel} than {y1} and {x2} is {rel} than {y2}, who is the {which}?
{x1} is {rel} than {y1} and {x2} is {rel} than {y2}. Which of the three is the {which}?
A riddle: {x1} is {rel} than {y1}. {x2} is {rel} than {y2}. Who of them is the {which}?
Who is the {which}? {x1} is {rel} than {y1}, {x2} is {rel} than {y2}.
Three friends met. {x1} is {rel} than {y1}. {x2} is {rel} than {y2}. Find the {which} one.
It is true that {x1} is {rel} than {y1} and {x2} is {rel} than {y2}. Say who is the {which}.
# logic heldout
{x1} is {rel} than {y1}, while {x2} is {rel} than {y2}. Who is the {which} person?
In a team, {x1} is {rel} than {y1}. Also, {x2} is {rel} than {y2}. Who is the {which} there?
Given that {x1} is {rel} than {y1} and {x2} is {rel} than {y2}, tell me the {which} of the three.
Someone says {x1} is {rel} than {y1} and {x2} is {rel} than {y2}. Then who is the {which}?
"""


class Problem(NamedTuple):
    """One drawn task. `params` settles the work to be done, without the people; the hash of it picks the split."""

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


def _read_wordings(text: str) -> dict[tuple[str, str], tuple[str, ...]]:
    """(kind, split) -> its wordings, out of the block above."""
    parts = (part.strip().splitlines() for part in text.split("# ")[1:])
    return {(head.split()[0], head.split()[1]): tuple(lines) for head, *lines in parts}


WORDINGS = _read_wordings(_WORDINGS)


# --- one function per kind: draws the numbers and words of one problem; `people` are the split's names ---


def _arithmetic(rng: random.Random, people: Sequence[str]) -> Problem:
    a, b, c = rng.randint(11, 79), rng.randint(2, 15), rng.randint(2, 9)
    goods = rng.choice(GOODS)
    working = f"{a} + {b} = {a + b}, and {a + b} - {c} = {a + b - c}."
    return Problem((a, b, c), {"a": a, "b": b, "c": c, "goods": goods}, working, f"{a + b - c} {goods}")


def _units(rng: random.Random, people: Sequence[str]) -> Problem:
    thing, big, small, factor, most = rng.choice(UNITS)
    a, step = rng.randint(2, most), 50 if factor == 1000 else 5 if factor in (60, 100) else 1
    b = step * rng.randint(1 if step > 1 else 2, (factor - 1) // step)
    whole = a * factor
    working = f"{a} x {factor} = {whole}, and {whole} + {b} = {whole + b}."
    fields = {"thing": thing, "big": big, "small": small, "a": a, "b": b}
    return Problem((big, small, a, b), fields, working, f"{whole + b} {small}")


def _dates(rng: random.Random, people: Sequence[str]) -> Problem:
    start, n = rng.randrange(7), rng.randint(2, 6)
    passed = [f"{i} {DAYS[(start + i) % 7]}" for i in range(1, n + 1)]
    fields = {"day": DAYS[start], "n": n, "event": rng.choice(EVENTS)}
    return Problem((start, n), fields, f"{DAYS[start]}, then {_joined(passed)}.", DAYS[(start + n) % 7])


def _clock(rng: random.Random, people: Sequence[str]) -> Problem:
    start, minutes = 5 * rng.randint(72, 215), rng.choice((60, 120, 180, 240, 10, 15, 20, 30, 40, 45))
    hours, rest = divmod(minutes, 60)
    length = f"{rest} minutes" if rest else f"{hours} hour{'s' * (hours > 1)}"
    first, end = (f"{t // 60:02}:{t % 60:02}" for t in (start, start + minutes))
    return Problem((start, minutes), {"start": first, "length": length}, f"{first} plus {length} is {end}.", end)


def _sorting(rng: random.Random, people: Sequence[str]) -> Problem:
    items: list[Any] = rng.sample(WORDS, 3) if rng.randrange(2) else rng.sample(range(10, 100), 3)
    words, backwards = isinstance(items[0], str), bool(rng.randrange(3) == 0)
    order = ("in alphabetical order", "in reverse alphabetical order") if words else (
        "from smallest to largest", "from largest to smallest")  # fmt: skip
    done = sorted(items, reverse=backwards)
    fields = {"what": "words" if words else "numbers", "items": _joined(items), "order": order[backwards]}
    return Problem((*done,), fields, f"The first is {done[0]}, the last is {done[-1]}.", _joined(done))


def _counting(rng: random.Random, people: Sequence[str]) -> Problem:
    what, source = rng.choice((("words", WORDS), ("cities", CITIES), ("jobs", JOBS), ("things", THINGS)))
    items = rng.sample(source, rng.randint(3, 8))
    working = _joined(f"{i} {item}" for i, item in enumerate(items, 1)) + "."
    return Problem((*items,), {"items": _joined(items), "what": what}, working, str(len(items)))


def _extraction(rng: random.Random, people: Sequence[str]) -> Problem:
    price, day, thing = rng.randint(12, 240), rng.choice(DAYS), rng.choice(THINGS)
    code = "".join(rng.choice("ABCDEFHKLMNPRSTWXYZ") for _ in range(2)) + str(rng.randint(100, 999))
    wanted, answer = rng.choice([("price", f"${price}"), ("order number", code), ("day of delivery", day)])
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
    fields = {"x1": x1, "y1": y1, "x2": x2, "y2": y2, "rel": relation, "which": most if place == 0 else least}
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


def _number(text: str) -> tuple[Decimal, str] | None:
    """ "1,200 grams" -> (1200, "gram"); "8" -> (8, ""); None for anything else."""
    match = re.fullmatch(r"(-?(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)(?:\.[0-9]+)?) ?([a-z ]*)", _tidy(text))
    return None if match is None else (Decimal(match[1].replace(",", "")), match[2].removesuffix("s"))


def _same_time(expected: str, given: str) -> bool:
    return _tidy(expected).removeprefix("0") == _tidy(given).removeprefix("0")


def _same_list(expected: str, given: str) -> bool:
    want, got = ([_tidy(item) for item in re.split(r",(?: and\b)?|;|\band\b", _tidy(t))] for t in (expected, given))
    return want == got


def _same_record(expected: str, given: str) -> bool:
    """One JSON object with the same keys, each once, and the same values; 34 and "34" are the same value."""

    def pairs(text: str) -> list[tuple[str, str]]:
        record = json.loads(text.casefold(), object_pairs_hook=tuple)  # a tuple tells an object from an array
        if not isinstance(record, tuple):
            raise TypeError("not an object")
        return sorted((key, str(value)) for key, value in record)

    fenced = re.fullmatch(r"```(?:json)?\s*(.*?)\s*```", given.strip(), re.DOTALL)
    try:
        return pairs(expected) == pairs(fenced[1] if fenced else given.strip().rstrip(".;! "))
    except (ValueError, TypeError, RecursionError):
        return False  # not JSON, or not an object


def _tidy(text: str) -> str:
    """Lower case, single spaces, no markdown stars, no closing punctuation. A leading "." stays: .5 is not 5."""
    return " ".join(text.casefold().replace("*", "").split()).lstrip("\"'([`").rstrip(" .,;:!?\"')]`")


class Kind(NamedTuple):
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
_MARKER = re.compile(r"(?:\b(?:so|the|my|final|correct)\s+)*\banswer\W{0,3}?\s*(?::|=|\bis\b:?)", re.IGNORECASE)


def check(kind: str, answer: Any, response: str) -> bool:
    """Does the response end in the right final answer?

    All that follows "Answer:" must be the answer, so text after it fails; every answer named this way must be right,
    so a response with two different ones fails. The working before it is not read. Kind `formatting`: the whole
    response must be the JSON object. Raises InputError for an unknown kind.
    """
    if kind not in REGISTRY:
        raise InputError(f"unknown task kind {kind!r}; the kinds are {', '.join(KINDS)}")
    same = REGISTRY[kind].same
    given = [response] if kind == "formatting" else _MARKER.split(response)[1:]
    return bool(given) and all(same(str(answer), text) for text in given)


def tasks(seed: int, split: str, count: int) -> Iterator[Task]:
    """`count` tasks with distinct prompts, the kinds in turn; task i is the same whatever `count` is."""
    if split not in CAPACITY:
        raise InputError(f"unknown split {split!r} of the embedded data set; use {' or '.join(CAPACITY)}")
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
    """One parameter tuple in five is kept for the held-out split. Python's hash() differs from run to run; this not."""
    digest = hashlib.sha256(f"{kind}/{params!r}".encode()).digest()
    return "heldout" if digest[0] % 5 == 0 else "train"


def make_rows(seed: int, split: str, count: int) -> list[dict[str, Any]]:
    """`count` rows of split "train" or "heldout", shuffled; the id numbers a row before the shuffle.

    The same seed gives the same row for the same id, whatever `count`. Raises InputError for an unknown split or a
    count above CAPACITY.
    """
    rows = [
        {
            "id": f"{split}-{i:06}",
            "messages": [{"role": "user", "content": t.prompt}, {"role": "assistant", "content": t.response}],
            "kind": t.kind,
            "answer": t.answer,
        }
        for i, t in enumerate(tasks(seed, split, count))
    ]
    random.Random(f"{seed}/{split}/order").shuffle(rows)
    return rows


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m ldalign.tasks", description="Write the embedded data set.")
    parser.add_argument("folder", type=Path, help="where train.jsonl and heldout.jsonl go; made if missing")
    parser.add_argument("--seed", type=int, default=0, help="seed of both splits (default 0)")
    parser.add_argument("--train", type=int, default=4000, help="training rows (default 4000)")
    parser.add_argument("--heldout", type=int, default=600, help="held-out rows (default 600)")
    args = parser.parse_args(argv)
    rows = {split: make_rows(args.seed, split, getattr(args, split)) for split in CAPACITY}
    for split, made in rows.items():
        path = args.folder / f"{split}.jsonl"
        try:
            args.folder.mkdir(parents=True, exist_ok=True)
            path.write_text("".join(json.dumps(row) + "\n" for row in made), encoding="utf-8", newline="\n")
        except OSError as error:
            raise EnvironmentProblem(f"{path}: cannot be written ({error.strerror}); give another folder") from error
        print(f"{path}: {len(made)} rows, {len(KINDS)} kinds, seed {args.seed}")


if __name__ == "__main__":
    run(main)
