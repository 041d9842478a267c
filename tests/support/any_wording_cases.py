"""Responses written by hand: right ones in wordings that no row has, and wrong ones; and wrong
answers to any problem, to be put into the wordings that rows do have.
"""

import itertools
import json
import string
from collections.abc import Iterator
from typing import Any

from ldalign.data.problems import COUNTS, DAYS, PEOPLE, Problem
from ldalign.data.problems import WORDS as WORDS_OF_THE_DATA

ARITHMETIC = {"final": "47 pens", "known": ["41", "9", "3", "50", "38", "6"]}
BIG = {"final": "1205 grams", "known": ["1", "205", "1000"]}
MINUTES = {"final": "205 minutes", "known": ["3", "25", "1", "60", "180"]}
THURSDAY = {"final": "Thursday", "known": ["Monday", "Tuesday", "Wednesday"]}
EVENING = {"final": "17:35", "known": ["16:50"]}
MORNING = {"final": "09:05", "known": ["08:45"]}
WORDS = {"final": "apple, cat, zebra", "known": ["cat, zebra, apple"]}
NUMBERS = {"final": "77, 45, 12", "known": ["45, 77, 12"]}
FIVE = {"final": "5", "known": []}
PRICE = {"final": "$45", "known": ["AB123", "Friday"]}
CODE = {"final": "AB123", "known": ["$45", "Friday"]}
DAY = {"final": "Friday", "known": ["$45", "AB123"]}
RECORD = {"final": '{"name": "Mia", "age": 34, "city": "Oslo"}', "known": []}
TALLEST = {"final": "Mia is the tallest", "known": ["Omar", "Lena"]}
SHORTEST = {"final": "Lena is the shortest", "known": ["Mia", "Omar"]}

RIGHT = [
    ("arithmetic", ARITHMETIC, "47"),
    ("arithmetic", ARITHMETIC, "**47 pens**"),
    ("arithmetic", ARITHMETIC, "FORTY-SEVEN PENS."),
    ("arithmetic", ARITHMETIC, "THE ANSWER IS 47 PENS!"),
    ("arithmetic", ARITHMETIC, "Mia has 47 pens now."),
    (
        "arithmetic",
        ARITHMETIC,
        "There were 41 pens, 9 were added and 3 taken, so there are 47 pens.",
    ),
    (
        "arithmetic",
        ARITHMETIC,
        "She started with 41 and bought 9, making 50. After 3 are gone she has 47.",
    ),
    ("arithmetic", ARITHMETIC, "Mia has 47 pens left after buying 9 and giving away 3."),
    ("arithmetic", ARITHMETIC, "Let's see: 41+9=50, 50-3=47. Final answer: **47**"),
    ("arithmetic", ARITHMETIC, "41 + 9 = 50 - 3 = 47"),
    ("arithmetic", ARITHMETIC, "47 = 41 + 9 - 3"),
    ("arithmetic", ARITHMETIC, "41 plus 9 is 50. 50 minus 3 is 47."),
    ("arithmetic", ARITHMETIC, "The result is 47 pens. Let me know if you need anything else!"),
    ("arithmetic", ARITHMETIC, "$41 + 9 - 3 = 47$. The answer is $\\boxed{47}$."),
    ("arithmetic", ARITHMETIC, "### Answer\n\n47 pens"),
    ("arithmetic", ARITHMETIC, "Here is the answer:\n\n- 47 pens"),
    ("arithmetic", ARITHMETIC, "Not 46 but 47 pens."),
    ("arithmetic", ARITHMETIC, "It is 47 pens rather than 46."),
    ("arithmetic", ARITHMETIC, "47.0 pens"),
    ("arithmetic", ARITHMETIC, "47 pens. Check: 47 + 3 = 50."),
    ("arithmetic", ARITHMETIC, "41 + 9 = 50, and 50 - 3 = 47. Check: 47 + 3 = 50."),
    (
        "arithmetic",
        ARITHMETIC,
        "1. Start with 41 pens.\n2. Add 9: 41 + 9 = 50.\n3. Take 3: 50 - 3 = 47.\n\nTotal: 47",
    ),
    ("arithmetic", ARITHMETIC, "The total is 47 of them, I think."),
    ("units", BIG, "1,205 grams"),
    ("units", BIG, "It weighs 1205 g."),
    ("units", BIG, "1 kilogram is 1000 grams, so 1 kilogram and 205 grams are 1,205 grams."),
    ("units", MINUTES, "3 hours and 25 minutes is equal to 205 minutes."),
    ("units", MINUTES, "3 * 60 = 180\n180 + 25 = 205\n\n**205 minutes**"),
    ("units", MINUTES, "3 hours = 180 minutes, plus 25 minutes = 205 minutes"),
    ("units", MINUTES, "That would be 205 min in total."),
    ("units", MINUTES, "205, because an hour has 60 minutes."),
    ("units", MINUTES, "Two hundred and five, that is 205 minutes."),
    ("dates", THURSDAY, "thursday"),
    ("dates", THURSDAY, "It falls on a Thursday."),
    ("dates", THURSDAY, "Three days after Monday is Thursday."),
    ("dates", THURSDAY, "Monday -> Tuesday -> Wednesday -> Thursday, so Thursday"),
    ("dates", THURSDAY, "If today is Monday, the match will be on Thursday. Good luck!"),
    (
        "dates",
        THURSDAY,
        "Tuesday is 1 day away, Wednesday is 2 days away, and Thursday is 3 days away.",
    ),
    ("dates", THURSDAY, "**Thursday** (Monday + 3 days)"),
    ("dates", THURSDAY, "Thursday. Have fun at the match!"),
    ("clock", EVENING, "5:35 PM"),
    ("clock", EVENING, "Mia arrives at 17:35."),
    ("clock", EVENING, "16:50 + 10 minutes = 17:00, 17:00 + 35 minutes = 17:35"),
    ("clock", EVENING, "From 16:50, 45 minutes later it is 5:35 p.m."),
    ("clock", MORNING, "9:05"),
    ("clock", MORNING, "At 9:05 am, since 8:45 plus 20 minutes is 9:05."),
    ("clock", MORNING, "The film ends at 09:05:00."),
    ("sorting", WORDS, "Apple, Cat, Zebra"),
    ("sorting", WORDS, "apple cat zebra"),
    ("sorting", WORDS, "- apple\n- cat\n- zebra"),
    ("sorting", WORDS, "apple, cat, zebra\n\napple, cat, zebra"),
    ("sorting", WORDS, "The sorted list is [apple, cat, zebra]."),
    ("sorting", WORDS, "cat, zebra, apple -> apple, cat, zebra"),
    ("sorting", WORDS, "You gave me cat, zebra, apple. In order: 1) apple 2) cat 3) zebra"),
    ("sorting", WORDS, '"apple", "cat", and "zebra"'),
    ("sorting", WORDS, "The first is apple. The second is cat. The third is zebra."),
    ("sorting", NUMBERS, "77 > 45 > 12"),
    ("sorting", NUMBERS, "(1) 77, (2) 45, (3) 12"),
    ("sorting", NUMBERS, "The 3 numbers, sorted: 77, 45, 12."),
    ("sorting", NUMBERS, "From largest to smallest they are 77, 45 and 12."),
    ("counting", FIVE, "five"),
    ("counting", FIVE, "There are FIVE words on the list."),
    ("counting", FIVE, "1 cat, 2 dog, 3 sun, 4 moon, 5 star. So there are 5."),
    ("counting", FIVE, "cat (1), dog (2), sun (3), moon (4), star (5): 5 words"),
    ("counting", FIVE, "1, 2, 3, 4, 5. The answer is 5."),
    ("counting", FIVE, "Mia read 5 words."),
    ("extraction", PRICE, "45 dollars"),
    ("extraction", PRICE, "The price is $45.00."),
    ("extraction", PRICE, "You will pay $45 for it."),
    ("extraction", CODE, "The order number is ab123"),
    ("extraction", CODE, "`AB123`"),
    ("extraction", DAY, "The lamp will be delivered on Friday."),
    ("extraction", DAY, "It costs $45 and has the number AB123. The day of delivery is Friday."),
    (
        "formatting",
        RECORD,
        'Here you go:\n\n```json\n{"city": "Oslo", "name": "Mia", "age": "34"}\n```',
    ),
    ("formatting", RECORD, '{"Name":"Mia","Age":34,"City":"Oslo"} This describes Mia from Oslo.'),
    ("formatting", RECORD, 'The JSON is {"name": "Mia", "age": 34, "city": "Oslo"}.'),
    ("logic", TALLEST, "Mia"),
    ("logic", TALLEST, "The tallest person is Mia."),
    ("logic", TALLEST, "It isn't Omar. The tallest is Mia."),
    (
        "logic",
        TALLEST,
        "Mia is taller than Omar, who is taller than Lena. Therefore, Mia is the tallest of all.",
    ),
    ("logic", TALLEST, "Mia > Omar > Lena, so it is Mia."),
    ("logic", TALLEST, "MIA IS TALLER THAN BOTH."),
    ("logic", TALLEST, "Lena is the shortest, and **Mia** is the tallest."),
    ("logic", TALLEST, "Answer: Mia. Omar is in the middle."),
    (
        "logic",
        TALLEST,
        "Since Omar is taller than Lena and Mia is taller than Omar, the tallest is Mia.",
    ),
    ("logic", SHORTEST, "Mia is the tallest and Lena is the shortest."),
    ("logic", SHORTEST, "It must be Lena, because everyone else is taller."),
]

WRONG = [
    ("arithmetic", ARITHMETIC, ""),
    ("arithmetic", ARITHMETIC, "46 pens"),
    ("arithmetic", ARITHMETIC, "47 books"),
    ("arithmetic", ARITHMETIC, "$47"),
    ("arithmetic", ARITHMETIC, "-47"),
    ("arithmetic", ARITHMETIC, "47 %"),
    ("arithmetic", ARITHMETIC, "47 thousand pens"),
    ("arithmetic", ARITHMETIC, "47.5 pens"),
    ("arithmetic", ARITHMETIC, "4 7"),
    ("arithmetic", ARITHMETIC, "47 or 46 pens"),
    ("arithmetic", ARITHMETIC, "47 or 50 pens"),
    ("arithmetic", ARITHMETIC, "Either 50 or 47."),
    ("arithmetic", ARITHMETIC, "About 47 pens."),
    ("arithmetic", ARITHMETIC, "More than 47 pens."),
    ("arithmetic", ARITHMETIC, "Not 47 pens."),
    ("arithmetic", ARITHMETIC, "Answer: 47 pens and 50 pens"),
    ("arithmetic", ARITHMETIC, "41 + 9 = 50, and 50 - 3 = 47.\nAnswer: 47, 50"),
    ("clock", EVENING, "16:50 plus 45 minutes is 17:35.\nAnswer: 17:35, 16:50"),
    ("arithmetic", ARITHMETIC, "50 pens instead of 47 pens."),
    ("clock", EVENING, "16:50 instead of 17:35"),
    ("dates", THURSDAY, "It is on Wednesday rather than on Thursday."),
    ("logic", TALLEST, "Omar is taller than Lena, so Omar instead of Mia is the tallest."),
    ("arithmetic", ARITHMETIC, "The answer is not 47."),
    ("arithmetic", ARITHMETIC, "47 is wrong."),
    ("arithmetic", ARITHMETIC, "50 pens"),
    ("arithmetic", ARITHMETIC, "41 + 9 - 3 = 50"),
    ("arithmetic", ARITHMETIC, "41 + 9 = 50, and 50 - 3 ="),
    ("arithmetic", ARITHMETIC, "41 + 9 = 50, and 50 - 3 = 47. Answer: 50"),
    ("arithmetic", ARITHMETIC, "41 + 9 = 50, and 50 - 3 = 47, so Mia has 50 pens."),
    ("arithmetic", ARITHMETIC, "41 + 9 = 50, and 50 - 3 = 47. Mia keeps 50 pens."),
    ("arithmetic", ARITHMETIC, "47 pens, because 41 + 9 = 50 and 50 - 3 = 46."),
    ("arithmetic", ARITHMETIC, "Answer: 47 pens\nAnswer: 48 pens"),
    ("arithmetic", ARITHMETIC, "47 pens. No, 46 pens."),
    ("arithmetic", ARITHMETIC, "47 pens.\n50 pens."),
    ("arithmetic", ARITHMETIC, "Mia had 41 pens, bought 9 and lost 3."),
    ("arithmetic", ARITHMETIC, "47 + 3 = 50"),
    ("arithmetic", ARITHMETIC, "Answer: I do not know. 41 + 9 - 3"),
    ("arithmetic", ARITHMETIC, "Is it 47 pens?"),
    ("units", BIG, "1.205 grams"),
    ("units", BIG, "1205 kilograms"),
    ("units", BIG, "1 kilogram and 205 grams"),
    ("units", BIG, "12,05 grams"),
    ("units", MINUTES, "205 hours"),
    ("units", MINUTES, "180 minutes and 25 minutes"),
    ("units", MINUTES, "3 x 60 = 180, and 180 + 25 = 205. Answer: 180 minutes"),
    ("units", MINUTES, "3:25"),
    ("dates", THURSDAY, "Monday"),
    ("dates", THURSDAY, "Friday"),
    ("dates", THURSDAY, "Monday, then 1 Tuesday, 2 Wednesday, 3 Thursday.\nAnswer: Wednesday"),
    ("dates", THURSDAY, "Monday, Tuesday, Wednesday, Thursday: it is on Wednesday."),
    ("dates", THURSDAY, "Thursday or Friday"),
    ("dates", THURSDAY, "Thursday or Wednesday"),
    ("dates", THURSDAY, "Monday, Tuesday, Wednesday, Thursday, Friday"),
    ("dates", THURSDAY, "Three days after Thursday is Sunday."),
    ("dates", THURSDAY, "It is not on Thursday."),
    ("dates", THURSDAY, "Thursday, no, Wednesday"),
    ("dates", THURSDAY, "Today is Monday. The event is in 3 days."),
    ("clock", EVENING, "5:35"),
    ("clock", EVENING, "5:35 AM"),
    ("clock", EVENING, "17:36"),
    ("clock", EVENING, "16:95"),
    ("clock", EVENING, "17:35 am"),
    ("clock", MORNING, "At 08:65, because the start is at 08:45 and 20 minutes go by."),
    ("clock", EVENING, "16:50"),
    ("clock", EVENING, "16:50 plus 45 minutes is 17:35. Answer: 17:25"),
    ("clock", EVENING, "16:50 plus 45 minutes is 17:35. Answer: 16:50"),
    ("clock", EVENING, "between 17:35 and 18:00"),
    ("clock", EVENING, "17:35 or 17:45"),
    ("clock", MORNING, "9:5"),
    ("clock", MORNING, "21:05"),
    ("clock", MORNING, "9:05 pm"),
    ("clock", MORNING, "after 9:05"),
    ("sorting", WORDS, "apple, zebra, cat"),
    ("sorting", WORDS, "cat, zebra, apple"),
    ("sorting", WORDS, "apple, cat"),
    ("sorting", WORDS, "apple, cat, zebra, dog"),
    ("sorting", WORDS, "apple, cat, zebra, blurb"),
    ("sorting", WORDS, "The list is apple,cat,zebra,blurb."),
    ("sorting", WORDS, "dog, apple, cat, zebra"),
    ("sorting", WORDS, "apple, cat, zebra or cat, apple, zebra"),
    ("sorting", WORDS, "apple, cat, zebra\nAnswer: cat, zebra, apple"),
    ("sorting", WORDS, "apple, cat, zebra, zebra"),
    ("sorting", WORDS, "apple, cat, zebra. The list is cat, zebra, apple, cat, zebra."),
    ("sorting", WORDS, "The first is apple, the last is zebra."),
    ("sorting", NUMBERS, "12, 45, 77"),
    ("sorting", NUMBERS, "77, 45, 13"),
    ("sorting", NUMBERS, "77, 45, 12, 11"),
    ("sorting", NUMBERS, "77, 4, 12"),
    ("sorting", NUMBERS, "77, 45, 12, 3"),
    ("sorting", NUMBERS, "1. 1\n2. 77\n3. 45\n4. 12"),
    ("counting", FIVE, "4"),
    ("counting", FIVE, "1 cat, 2 dog, 3 sun, 4 moon, 5 star."),
    ("counting", FIVE, "1 cat, 2 dog, 3 sun, 4 moon, 5 star.\nAnswer: 4"),
    ("counting", FIVE, "5 or 6"),
    ("counting", FIVE, "five, no, six"),
    ("counting", FIVE, ".5"),
    ("counting", FIVE, "\u0665\u0666"),
    ("counting", FIVE, "fifty-five"),
    ("counting", FIVE, "at least 5"),
    ("extraction", PRICE, "$54"),
    ("extraction", PRICE, "45 euros"),
    ("extraction", PRICE, "The price is Friday."),
    ("extraction", PRICE, "A lamp for $45, order number AB123, comes on Friday."),
    ("extraction", PRICE, "Answer: AB123"),
    ("extraction", PRICE, "$45 or $54"),
    ("extraction", CODE, "AB124"),
    ("extraction", CODE, "AB12"),
    ("extraction", CODE, "123"),
    ("extraction", CODE, "The lamp with the order number AB123 costs $45 and comes on Friday."),
    ("extraction", DAY, "Monday"),
    ("extraction", DAY, "Friday, or Saturday"),
    ("extraction", DAY, "It comes on Friday, has the number AB123, and costs $45."),
    ("formatting", RECORD, '{"name": "Mia", "age": 35, "city": "Oslo"}'),
    ("formatting", RECORD, '{"name": "Mia", "age": 34}'),
    ("formatting", RECORD, '{"name": "Mia", "age": 34, "city": "Oslo"'),
    ("formatting", RECORD, '{"name": "Mia", "age": 34, "age": 34, "city": "Oslo"}'),
    ("formatting", RECORD, '{"name": "Mia", "age": 34, "city": "Oslo", "job": "baker"}'),
    ("formatting", RECORD, '{"name": "Mia", "age": 34, "city": "Oslo"} {"name": "Omar"}'),
    ("formatting", RECORD, '{"name": "Mia", "age": 34, "city": "Oslo"} Omar is 34.'),
    ("formatting", RECORD, '{"name": "Mia", "age": 34, "city": "Oslo"} But she is 43.'),
    ("formatting", RECORD, '{"person": {"name": "Mia", "age": 34, "city": "Oslo"}}'),
    ("formatting", RECORD, "name: Mia, age: 34, city: Oslo"),
    ("formatting", RECORD, "{'name': 'Mia', 'age': 34, 'city': 'Oslo'}"),
    ("logic", TALLEST, "Omar"),
    ("logic", TALLEST, "Mia is taller than Omar. Omar is taller than Lena."),
    ("logic", TALLEST, "From tallest to shortest: Mia, Omar, Lena.\nAnswer: Omar"),
    ("logic", TALLEST, "Mia is the shortest."),
    ("logic", TALLEST, "Mia or Omar"),
    ("logic", TALLEST, "Omar or Mia"),
    ("logic", TALLEST, "Answer: Mia/Omar"),
    ("logic", TALLEST, "Omar / Mia is the tallest."),
    ("logic", TALLEST, "Answer: not Mia"),
    ("logic", TALLEST, "It isn't Mia, it is Mia."),
    ("logic", TALLEST, "Mia is the tallest. Omar is the tallest."),
    ("logic", TALLEST, "Mia is not the tallest."),
    ("logic", TALLEST, "The tallest is Mia. So the answer is Lena."),
    ("logic", TALLEST, "Mia and Omar are the tallest."),
    ("logic", TALLEST, "Who is the tallest? Mia is taller than Omar."),
    ("logic", TALLEST, "Mia is taller than Omar, so Omar is the tallest."),
    ("logic", TALLEST, "The tallest is Nora."),
    ("logic", TALLEST, "Mia, Omar, Lena"),
    ("logic", SHORTEST, "From tallest to shortest: Mia, Omar, Lena."),
    ("logic", SHORTEST, "Lena is the tallest and Mia is the shortest."),
    ("logic", SHORTEST, "Mia is the tallest."),
]

# What a person would take for right, and the checker does not see: it is wrong in doubt.
MISSED = [
    (
        "arithmetic",
        ARITHMETIC,
        "After giving 3 away it is 38 at first. With 9 more it is 47, up from 41.",
    ),
    ("units", MINUTES, "two hundred and five"),
    ("dates", THURSDAY, "Thu."),
    ("clock", EVENING, "Twenty-five to six in the evening."),
    ("sorting", WORDS, "The first is apple, the last is zebra, and cat is in between."),
    ("counting", FIVE, "There are 5 words, and 3 of them are animals."),
    ("extraction", CODE, "AB 123"),
    ("formatting", RECORD, "{'name': 'Mia', 'age': 34, 'city': 'Oslo'}"),
    ("logic", TALLEST, "Nobody is taller than Mia."),
]

# The fields of a wording that state the answer, of those that a kind has.
STATE = "answer value word first second third backwards indented dense".split()


def fields_of(problem: Problem) -> dict[str, Any]:
    """What the wordings of right responses take."""
    return {"answer": problem.answer} | problem.fields


def pieces(wording: str, fields: dict[str, Any]) -> list[tuple[str, str]]:
    """A response in parts: (text, the field it is from, "" for the wording's own)."""
    parts = []
    for text, name, _, _ in string.Formatter().parse(wording):
        parts += [(text, "")] + ([(str(fields[name]), name)] if name is not None else [])
    return parts


def wrong_answers(kind: str, problem: Problem) -> Iterator[dict[str, Any]]:
    """The fields of a problem with another answer of its type in place of the right one."""
    right, known, fields = problem.answer, problem.known, problem.fields
    if kind in ("arithmetic", "units"):
        value, unit = fields["value"], right.split(" ", 1)[1]
        near = {value - 1, value + 1, value + 10, abs(value - 10), 10 * value, value // 10}
        for wrong in sorted((near | set(map(int, known))) - {value}):
            yield {"answer": f"{wrong} {unit}", "value": wrong}
    elif kind == "dates":
        yield from ({"answer": day} for day in DAYS if day != right)
    elif kind == "clock":
        hour, minute = map(int, right.split(":"))
        for moved in (-60, 60, -10, 10, -5, 5, 720):
            time = (60 * hour + minute + moved) % 1440
            yield {"answer": f"{time // 60:02}:{time % 60:02}"}
        yield {"answer": known[0]}
    elif kind == "sorting":
        items = right.split(", ")
        source = list(map(str, range(10, 100))) if items[0].isdigit() else WORDS_OF_THE_DATA
        other = next(item for item in source if item not in items)
        orders = [list(order) for order in itertools.permutations(items)][1:]
        for wrong in [*orders, *([*items[:i], other, *items[i + 1 :]] for i in range(3))]:
            places = zip(("first", "second", "third"), wrong, strict=True)
            yield {"answer": ", ".join(wrong)} | dict(places)
    elif kind == "counting":
        for wrong in {int(right) - 1, int(right) + 1, int(right) + 2} & set(COUNTS):
            yield {"answer": str(wrong), "word": COUNTS[wrong]}
    elif kind == "extraction":
        other_values = [right[:-1], right + "1", right[0] + right[:0:-1]]
        days = [day for day in DAYS if day not in (right, *known)]
        for wrong in {*known, *(days if right in DAYS else other_values)} - {right}:
            yield {"answer": wrong}
    elif kind == "formatting":
        record = json.loads(right)
        for change in ({"age": record["age"] + 1}, {"name": "Zed"}, {"city": "Berlin"}):
            wrong = record | change
            yield {
                "answer": json.dumps(wrong),
                "backwards": json.dumps(dict(reversed(wrong.items()))),
                "indented": json.dumps(wrong, indent=2),
                "dense": json.dumps(wrong, separators=(",", ":")),
            }
    else:
        other = next(person for person in PEOPLE["train"] if person not in (right, *known))
        yield from ({"answer": person} for person in (*known, other))
