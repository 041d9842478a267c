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
SHOPS = "Oak Market,Hill Store,Lake Corner,Star Shop,Mill House,Green Cart,Red Barn,City Stall".split(",")
DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
UNITS = (  # (what is measured, large unit, small unit, small units in a large one, largest large count)
    ("the bus ride", "hours", "minutes", 60, 9), ("the film", "hours", "minutes", 60, 9),
    ("the song list", "minutes", "seconds", 60, 9), ("the summer course", "weeks", "days", 7, 12),
    ("the boat trip", "days", "hours", 24, 9), ("the rope", "metres", "centimetres", 100, 40),
    ("the hiking path", "kilometres", "metres", 1000, 30), ("the parcel", "kilograms", "grams", 1000, 30),
    ("the soup", "litres", "millilitres", 1000, 20), ("the shelf", "feet", "inches", 12, 12),
    ("the fence", "yards", "feet", 3, 40), ("the egg order", "dozens", "single eggs", 12, 12),
)  # fmt: skip
SCALES = (  # (more, less, most, least)
    ("taller", "shorter", "tallest", "shortest"), ("older", "younger", "oldest", "youngest"),
    ("faster", "slower", "fastest", "slowest"), ("stronger", "weaker", "strongest", "weakest"),
)  # fmt: skip

# What a user says, one wording a line. The braces name fields of the problem; {name} is a person of the split.
_WORDINGS = """
# arithmetic train
{name} has {a} {goods} at home and buys {b} boxes with {c} {goods} in each. How many {goods} does {name} have in total?
There are {a} {goods} on the shelf. {name} brings {b} more bags of {c} {goods} each. How many {goods} are there now?
A club owns {a} {goods}. Today {name} gives it {b} packs of {c} {goods} each. How many {goods} does the club have now?
{name} counted {a} {goods} in the morning. Later {b} crates of {c} {goods} each came in. How many is that in all?
At the fair, {name} won {a} {goods}, and then {b} prizes of {c} {goods} each. What is the total number of {goods}?
# arithmetic heldout
A cupboard holds {a} {goods}. {name} adds {b} trays carrying {c} apiece. What number of {goods} does it hold afterwards?
Last year {name} collected {a} {goods}. Then {b} friends sent {c} {goods} each. How large is the collection today?
Work out how many {goods} {name} has if {a} lie on the table and {b} drawers contain {c} {goods} every one.
# money train
{name} buys {b} {goods} at the market for ${c} each and pays with ${a} in cash. How much change should {name} get back?
In a small shop one pack of {goods} costs ${c}. {name} takes {b} packs and hands over ${a}. Please work out the change.
{name} has ${a} to spend and orders {b} sets of {goods}. Each set costs ${c}. How many dollars does {name} have left?
{name} gets ${a} from a parent to buy {b} bags of {goods} at ${c} a bag. How much money should {name} bring home?
{name} pays ${a} at the till for {b} boxes of {goods}. The price of a box is ${c}. What change does the seller return?
# money heldout
With ${a} in the wallet, {name} pays for {b} jars of {goods} priced at ${c} per jar. What sum remains in the wallet?
The list says ${c} for one bundle of {goods}. {name} buys {b} bundles using ${a}. How many dollars come back to {name}?
Find what is left of ${a} once {name} has bought {b} trays of {goods} and spent ${c} on every tray.
# units train
{name} writes in a notebook that {thing} comes to {a} {big} and {b} {small}. How much is that in {small} altogether?
According to {name}, {thing} comes to {a} {big} plus {b} {small}. Please turn the amount into {small} for the form.
The total for {thing} is {a} {big} and {b} {small}. {name} needs it in {small} only. What should {name} write down?
Help {name} with a conversion. For {thing} the plan says {a} {big} and {b} {small}. How many {small} is that in all?
{name} checked {thing} and found {a} {big} and {b} {small}. Change this to {small}, with one number for all of it.
# units heldout
A label made by {name} gives {a} {big} and {b} {small} for {thing}. Express this using {small} and no other unit.
If {thing} amounts to {a} {big} together with {b} {small}, what figure in {small} alone should {name} enter?
{name} knows the size of {thing}, namely {a} {big} and {b} {small}, yet the table wants {small}. Give the figure.
# dates train
Today is {day}. {name} has {event} exactly {n} days from now. On which day of the week will that be?
{name} wrote on the calendar on a {day}: {event} in {n} days. Which day of the week does it fall on?
It is {day} today, and {name} is waiting for {event}, which is {n} days away. What day of the week is it then?
If today is {day}, what day of the week will it be after {n} days? {name} needs to know because of {event}.
{name} booked {event} on a {day}. The booking is for {n} days later. Tell {name} which day of the week that is.
# dates heldout
Starting from {day}, {name} counts {n} days forward to reach {event}. Name the weekday on which {name} arrives.
There are {n} days left until {event}, says {name}, and this is {day}. What weekday should go into the diary?
For {name}, {event} takes place {n} days after the coming {day}. Say on what weekday {name} has to be there.
# clock train
{name} takes a train that leaves at {start} and travels for {length}. At what time does {name} arrive?
A film begins at {start} and runs for {length} without a break. When can {name} leave the cinema after the end?
{name} starts to work in the garden at {start} and stops {length} later. What time is it when {name} stops?
The meeting with {name} opens at {start}. It is planned to last {length}. At what time will the meeting be over?
{name} puts a stew on the stove at {start}. It has to cook for {length}. What time will it be ready?
# clock heldout
It was {start} when {name} set out on a walk of {length}. What did the clock show when the walk came to its end?
A ferry with {name} on board sails at {start}, and the crossing needs {length}. Give the time at which it lands.
{name} parked at {start} and the ticket is valid for {length}. Until what time may the car of {name} stay?
# sorting train
{name} wrote these {what} on cards for a class game: {items}. Put them {order} and write them with commas in between.
Please sort the following {what} {order} for {name}, and give me the full sorted list: {items}.
Here is a list of {what} that {name} made this morning: {items}. Can you arrange the list {order}?
The {what} {items} are out of place in the file of {name}. Write all of them again, {order}.
{name} asks for some help with a list. The {what} are {items}. They should be listed {order}.
# sorting heldout
For a poster, {name} wants the {what} below to appear {order}. Rewrite the whole list that way. {items}
Take {items} and line these {what} up {order}, so that {name} can copy the result into a table.
{items}: how does this row of {what} read once {name} has rearranged it so that it runs {order}?
# counting train
{name} looked out of the window and wrote down: {items}. How many times did {name} write the word {target}?
Count how often the word {target} comes up in this list, which {name} typed in a hurry: {items}.
In a memory game {name} turned over these cards: {items}. How many of the cards showed the word {target}?
This is what {name} read aloud in class: {items}. Please tell me how many times {target} was read.
Look at the row of stickers that {name} has: {items}. How many stickers with the word {target} are there?
# counting heldout
{items}: those are the labels on the drawers of {name}. What number of drawers carry the label {target}?
Among the words {name} called out, namely {items}, say how frequently {target} was heard in all.
{name} got these tickets in a raffle: {items}. Give the number of tickets that say {target}.
# extraction train
Message from {name}: the {thing} costs ${price}, the order number is {code}, it arrives on {day}. What is the {wanted}?
{name} ordered a {thing} with order number {code}. It is due on {day} and the bill is ${price}. Pick out the {wanted}.
Deliver one {thing} to {name} on {day}, order number {code}, total price ${price}. Give me the {wanted} in this note.
Order {code} is a {thing} for {name}. It was sold for ${price} and will come on {day}. Find the {wanted} in this text.
Dear {name}, your {thing} for ${price} will come on {day} and has order number {code}. Which {wanted} is given here?
# extraction heldout
On {day} a courier brings {name} a new {thing}, paid with ${price}, filed under number {code}. State the {wanted}.
Receipt {code}: one {thing}, amount ${price}, customer {name}, to be handed over {day}. Read the {wanted} from this.
{name} will collect the {thing} this {day}; it is parcel {code} and ${price} is due. A clerk asks for the {wanted}.
# formatting train
Write as a JSON object with the keys name, age, city and job: {name} is {age}, lives in {city} and works as a {job}.
{name} is a {age} year old {job} from {city}. Turn the sentence into JSON using the keys name, age, city and job.
Make a JSON record with name, age, city and job for {name}, who is {age} years old, is a {job} and lives in {city}.
Our member {name} comes from {city}, is {age} years old and works as a {job}. Give name, age, city and job as JSON.
Convert to JSON with the keys name, age, city and job. The person is a {job} called {name} in {city}, aged {age}.
# formatting heldout
From {city} we welcome the {job} {name}, {age} years of age. Store name, age, city and job in one JSON object.
I need name, age, city and job in JSON form. The facts are: job {job}, first name {name}, home {city}, age {age}.
A {age} year old called {name} has moved to {city} to be a {job}. Show name, age, city and job of this person as JSON.
# logic train
{x1} is {rel1} than {y1}. {x2} is {rel2} than {y2}. All three are good friends. Who is the {which} of the three?
Here is a puzzle. {x1} is {rel1} than {y1}, and {x2} is {rel2} than {y2}. Which of them is the {which} one?
We know that {x1} is {rel1} than {y1}. We also know that {x2} is {rel2} than {y2}. Name the {which} person.
In one family, {x1} is {rel1} than {y1} and {x2} is {rel2} than {y2}. Who is the {which} among them?
A teacher writes that {x1} is {rel1} than {y1} and that {x2} is {rel2} than {y2}. Who is the {which}?
# logic heldout
Compared with {y1}, {x1} is {rel1}. Compared with {y2}, {x2} is {rel2}. Decide which person here is the {which}.
A coach notes that {x1} is {rel1} than {y1}, whereas {x2} is {rel2} than {y2}. Whom does the coach list as the {which}?
Since {x1} is known to be {rel1} than {y1}, while {x2} is {rel2} than {y2}, who must be the {which} here?
# comparison train
At {shop1}, {n1} {goods} cost ${p1}. At {shop2}, {n2} {goods} cost ${p2}. Which shop is cheaper, or is it the same?
{name} sees {n1} {goods} for ${p1} at {shop1} and {n2} for ${p2} at {shop2}. Where is one cheaper, or is it the same?
{shop1} sells {n1} {goods} for ${p1}, {shop2} sells {n2} for ${p2}. Which is cheaper per piece, or are both the same?
Which price for one is better: {n1} {goods} for ${p1} at {shop1}, {n2} for ${p2} at {shop2}, or is it the same?
{name} has offers, {n1} {goods} at {shop1} for ${p1}, {n2} at {shop2} for ${p2}. Who asks less for each, or the same?
# comparison heldout
For ${p1} {name} gets {n1} {goods} from {shop1}; for ${p2}, {n2} from {shop2}. Say who charges less apiece, or the same.
Two sellers of {goods}: {shop1} wants ${p1} for {n1}, {shop2} ${p2} for {n2}. Per item, whom to choose, or the same?
Does one of the {goods} cost less at {shop1}, {n1} for ${p1}, or at {shop2}, {n2} for ${p2}, or exactly the same?
# words train
{name} has this list of words: {items}. Your task is to write {task}. Put commas between your words or letters.
Take the words {items} from the notebook of {name} and write {task}, with commas in between.
Here are some words from {name}: {items}. Now write {task}. Use commas between the parts of your list.
For a word game, {name} picked {items}. Please write {task} for the next player, with commas.
The words on the board are {items}. {name} should write {task}, with commas in between. What is right?
# words heldout
Given the row {items}, a teacher tells {name} to write {task}. Show what belongs on the page, split by commas.
{name} reads out {items}. Someone else must now write {task}. Give that list, using a comma after each entry.
Out of {items}, as chosen by {name}, produce {task} and separate the entries of the result by commas.
# sequence train
{name} writes numbers that follow a rule: {items}. Which number comes next if {name} keeps to the same rule?
Every day {name} counts the {goods} on a stall: {items}. If the pattern goes on, what is the next number?
Look at this row of numbers from the school book of {name}: {items}. Find the rule and give the next number.
The number of {goods} in a game of {name} changes like this: {items}. What number should follow?
What is the next number in this pattern? {items}. {name} says that each step follows the same rule.
# sequence heldout
A machine built by {name} prints {items} and then stops. Predict the number it would have printed after those.
{items} is how a series begins on the worksheet that {name} got. Extend it by a single further number.
{name} saved {items} coins in these weeks and goes on in the same way. What will the coming week bring?
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
    a, b, c = rng.randint(11, 59), rng.randint(2, 4), rng.randint(2, 9)
    goods = rng.choice(GOODS)
    working = f"{b} x {c} = {b * c}, and {a} + {b * c} = {a + b * c}."
    return Problem((a, b, c), {"a": a, "b": b, "c": c, "goods": goods}, working, f"{a + b * c} {goods}")


def _money(rng: random.Random, people: Sequence[str]) -> Problem:
    b, c = rng.randint(2, 4), rng.randint(2, 12)
    cost = b * c
    paid = rng.choice([note for note in (20, 30, 40, 50, 60, 70, 80, 90, 100) if note > cost])
    working = f"{b} x {c} = {cost} dollars, and {paid} - {cost} = {paid - cost} dollars."
    return Problem((paid, b, c), {"a": paid, "b": b, "c": c, "goods": rng.choice(GOODS)}, working, f"${paid - cost}")


def _units(rng: random.Random, people: Sequence[str]) -> Problem:
    thing, big, small, factor, most = rng.choice(UNITS)
    a, step = rng.randint(2, most), 50 if factor == 1000 else 5 if factor in (60, 100) else 1
    b = step * rng.randint(1 if step > 1 else 2, (factor - 1) // step)
    whole = a * factor
    working = f"{a} x {factor} = {whole} {small}, and {whole} + {b} = {whole + b}."
    fields = {"thing": thing, "big": big, "small": small, "a": a, "b": b}
    return Problem((big, small, a, b), fields, working, f"{whole + b} {small}")


def _dates(rng: random.Random, people: Sequence[str]) -> Problem:
    start, n = rng.randrange(7), rng.randint(2, 9)
    passed = [DAYS[(start + i) % 7] for i in range(1, n % 7 + 1)]
    count = f"count on {len(passed)} from {DAYS[start]}: {_joined(passed)}." if passed else "it is the same day again."
    fields = {"day": DAYS[start], "n": n, "event": rng.choice(EVENTS)}
    return Problem((start, n), fields, f"{n} = {n // 7} x 7 + {n % 7}, so {count}", DAYS[(start + n) % 7])


def _clock(rng: random.Random, people: Sequence[str]) -> Problem:
    start, hours, minutes = 5 * rng.randint(72, 215), rng.randint(1, 3), 10 * rng.randint(1, 4)
    whole = f"{hours} hour{'s' * (hours > 1)}"
    times = (start, start + 60 * hours, start + 60 * hours + minutes)
    first, middle, end = (f"{t // 60:02}:{t % 60:02}" for t in times)
    working = f"{first} plus {whole} is {middle}, and {minutes} minutes more is {end}."
    return Problem((start, hours, minutes), {"start": first, "length": f"{whole} and {minutes} minutes"}, working, end)


def _sorting(rng: random.Random, people: Sequence[str]) -> Problem:
    items: list[Any] = rng.sample(WORDS, 3) if rng.randrange(2) else rng.sample(range(10, 100), 3)
    words, backwards = isinstance(items[0], str), bool(rng.randrange(3) == 0)
    order = ("in alphabetical order", "in reverse alphabetical order") if words else (
        "from smallest to largest", "from largest to smallest")  # fmt: skip
    done = sorted(items, reverse=backwards)
    fields = {"what": "words" if words else "numbers", "items": _joined(items), "order": order[backwards]}
    working = f"Sorted {order[backwards]}, the list starts with {done[0]} and ends with {done[-1]}."
    return Problem((*done,), fields, working, _joined(done))


def _counting(rng: random.Random, people: Sequence[str]) -> Problem:
    target, *others = rng.sample(WORDS, 3)
    count = rng.randint(1, 5)
    items = [target] * count + [rng.choice(others) for _ in range(rng.randint(6, 8) - count)]
    rng.shuffle(items)
    working = "Counting: " + _joined(f"{target} {i}" for i in range(1, count + 1)) + "."
    return Problem((target, *items), {"items": _joined(items), "target": target}, working, str(count))


def _extraction(rng: random.Random, people: Sequence[str]) -> Problem:
    price, day, thing = rng.randint(12, 240), rng.choice(DAYS), rng.choice(THINGS)
    code = "".join(rng.choice("ABCDEFHKLMNPRSTWXYZ") for _ in range(2)) + str(rng.randint(100, 999))
    wanted, answer = rng.choice([("price", f"${price}"), ("order number", code), ("day of delivery", day)])
    fields = {"price": price, "day": day, "thing": thing, "code": code, "wanted": wanted}
    return Problem((price, day, thing, code), fields, f"The {wanted} given in the text is {answer}.", answer)


def _formatting(rng: random.Random, people: Sequence[str]) -> Problem:
    age, city, job = rng.randint(18, 79), rng.choice(CITIES), rng.choice(JOBS)
    record = {"name": rng.choice(people), "age": age, "city": city, "job": job}
    return Problem((age, city, job), record, "", json.dumps(record))


def _logic(rng: random.Random, people: Sequence[str]) -> Problem:
    more, less, most, least = rng.choice(SCALES)
    ranked = rng.sample(people, 3)  # from most to least
    clues = [(hi, more, lo) if rng.randrange(2) else (lo, less, hi) for hi, lo in pairwise(ranked)]
    rng.shuffle(clues)
    (x1, rel1, y1), (x2, rel2, y2) = clues
    place = rng.randrange(3)
    fields = {"x1": x1, "rel1": rel1, "y1": y1, "x2": x2, "rel2": rel2, "y2": y2}
    fields["which"] = (most, f"second {most}", least)[place]
    working = f"From the {most} to the {least}, the order is {_joined(ranked)}."
    return Problem((*clues, place), fields, working, ranked[place])


def _comparison(rng: random.Random, people: Sequence[str]) -> Problem:
    (shop1, shop2), (n1, n2) = rng.sample(SHOPS, 2), rng.sample(range(2, 10), 2)
    each1 = rng.randint(2, 12)
    each2 = max(2, each1 + rng.randint(-2, 2))
    answer = "the same" if each1 == each2 else shop1 if each1 < each2 else shop2
    p1, p2 = n1 * each1, n2 * each2
    fields = {"shop1": shop1, "shop2": shop2, "n1": n1, "n2": n2, "p1": p1, "p2": p2, "goods": rng.choice(GOODS)}
    working = f"{shop1}: {p1} / {n1} = {each1} dollars each. {shop2}: {p2} / {n2} = {each2} dollars each."
    return Problem((n1, p1, n2, p2), fields, working, answer)


def _words(rng: random.Random, people: Sequence[str]) -> Problem:
    items = rng.sample(WORDS, 3)
    if not any(len(word) > 5 for word in items):
        items[rng.randrange(3)] = "mountain"
    task, done = rng.choice([
        ("the words in reverse order", items[::-1]),
        ("only the words with more than five letters", [word for word in items if len(word) > 5]),
        ("the first letter of each word", [word[0] for word in items]),
        ("the last letter of each word", [word[-1] for word in items]),
        ("the list with the first and the last word swapped", [items[-1], *items[1:-1], items[0]]),
    ])  # fmt: skip
    return Problem((task, *items), {"items": _joined(items), "task": task}, f"Here I write {task}.", _joined(done))


def _sequence(rng: random.Random, people: Sequence[str]) -> Problem:
    falls, start, step = bool(rng.randrange(2)), rng.randint(2, 40), rng.choice((2, 3, 4, 5, 10))
    row = [start + step * (5 - i if falls else i) for i in range(5)]
    *shown, last = row
    why = f"Each number is {step} {'less' if falls else 'more'} than the last"
    how = f"{'-' if falls else '+'} {step}"
    fields = {"items": _joined(shown), "goods": rng.choice(GOODS)}
    return Problem((*shown,), fields, f"{why}, and {shown[-1]} {how} = {last}.", str(last))


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
    """ "1,200 grams" -> (1200, "gram"); "$8" -> (8, "dollar"); None for anything else."""
    match = re.fullmatch(r"(\$?)(-?(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)(?:\.[0-9]+)?) ?([a-z ]*)", _tidy(text))
    if match is None:
        return None
    unit = match[3] or ("dollars" if match[1] else "")
    return Decimal(match[2].replace(",", "")), unit.removesuffix("s")


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
    "money": Kind(_money, _same_number),
    "units": Kind(_units, _same_number),
    "dates": Kind(_dates, _same_text),
    "clock": Kind(_clock, _same_time),
    "sorting": Kind(_sorting, _same_list),
    "counting": Kind(_counting, _same_number),
    "extraction": Kind(_extraction, _same_text),
    "formatting": Kind(_formatting, _same_record),
    "logic": Kind(_logic, _same_text),
    "comparison": Kind(_comparison, _same_text),
    "words": Kind(_words, _same_list),
    "sequence": Kind(_sequence, _same_number),
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
