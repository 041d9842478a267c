"""The values that a response names: numbers, days, times, codes, and lists of given items.

A value of the working (an operand, a step's result, a counted-off item) is left out: what is found
is what the response may be stating as its answer. `any_wording.py` decides on it.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from decimal import Decimal
from itertools import pairwise
from typing import NamedTuple

from ldalign.data.problems import DAYS, GOODS, UNITS, WORDS


class Mention(NamedTuple):
    """A value named in a response, at text[start:end].

    right: it is the right answer. known: it is none, but a value of the prompt or of a right
    working, which may stand beside the answer. worked: it is the result of an equation.
    """

    start: int
    end: int
    right: bool
    known: bool
    worked: bool = False


# (text, final answer, known values) -> the values that are not working, in their order
Finder = Callable[[str, str, Sequence[str]], list[Mention]]

_MARKS = str.maketrans(
    {"\u2019": "'", "\u2018": "'", "\u201c": '"', "\u201d": '"', "\u2212": "-", "\u2013": "-"}
    | {"\u2014": ";", "\u2192": "->", "\u21d2": "->", "\u00d7": "x", "\u00f7": "/"}
    | dict.fromkeys('_`#~"', "")
)


def plain(text: str) -> str:
    """Returns a response in lower case, without markdown, LaTeX and quotation marks.

    Line breaks stay, as they end a statement.
    """
    text = unicodedata.normalize("NFKC", text).translate(_MARKS).casefold()
    text = re.sub(r"\$([^$\n]{0,99}[=+\\][^$\n]{0,99}|\d+)\$", r" \1 ", text)  # $41 + 9 = 50$
    text = re.sub(r"\\(?:boxed|text|mathrm)\b|\\[()\[\],; ]", " ", text)
    text = text.replace("\\times", "x").replace("\\", " ")
    text = re.sub(r"(?<=\d)[^\S\n]?\*[^\S\n]?(?=\d)", " x ", text).replace("*", "")
    return re.sub(r"[^\S\n]+", " ", re.sub(r"[{}|]", " ", text))


# ------------------------------------------------------------------------------------------ numbers


_SCALES = ("%", "hundred", "thousand", "million")


def _spellings() -> dict[str, str]:
    """{a unit as it may be written: its name}."""
    spelled = {
        "hours": "hour hr hrs h",
        "minutes": "minute min mins",
        "seconds": "second sec secs s",
        "weeks": "week",
        "days": "day",
        "metres": "metre meters meter m",
        "centimetres": "centimetre centimeters centimeter cm",
        "kilometres": "kilometre kilometers kilometer km",
        "kilograms": "kilogram kilogrammes kilos kilo kg",
        "grams": "gram grammes g",
        "litres": "litre liters liter l",
        "millilitres": "millilitre milliliters milliliter ml",
        "feet": "foot ft",
        "inches": "inch",
        "yards": "yard yd yds",
        "dozens": "dozen",
        "single eggs": "eggs egg",
    }
    names = {small for _, _, small, *_ in UNITS} | {big for _, big, *_ in UNITS}
    assert names == set(spelled), "a unit without spellings"
    table = {word: name for name, words in spelled.items() for word in words.split()}
    table |= {name.removesuffix("s"): name for name in GOODS} | {name: name for name in GOODS}
    scales = {"percent": "%"} | {scale: scale for scale in _SCALES}
    money = {"$": "$", "dollars": "$", "dollar": "$", "usd": "$", "euros": "euros"}
    return table | {name: name for name in names} | scales | money


_UNIT_NAMES = _spellings()
_UNIT = "|".join(sorted(map(re.escape, _UNIT_NAMES), key=len, reverse=True))
_FIGURES = r"(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?"
_QUANTITY = rf"(?<![\w.,:/])(?:\$ ?)?{_FIGURES}(?: ?(?:{_UNIT})(?!\w))?(?![\w:]|,\d|\.\d)"
_NUMBER = re.compile(
    rf"(?<![\w.,:])(?P<sign>-)?(?P<money>\$ ?)?(?P<figures>{_FIGURES})"
    rf"(?:[ -]?(?P<unit>{_UNIT})(?!\w))?(?![\w:%]|,\d|\.\d)"
)
_ONES = "one two three four five six seven eight nine".split()
_TEENS = "ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen nineteen".split()
_TENS = "twenty thirty forty fifty sixty seventy eighty ninety".split()
_IN_WORDS = {word: i for i, word in enumerate((*_ONES, *_TEENS), 1) if word != "one"} | {
    tens + joint * bool(i) + one: 10 * n + i
    for n, tens in enumerate(_TENS, 2)
    for i, one in enumerate(("", *_ONES))
    for joint in "- "[: 2 if one else 1]
}
_WORD = re.compile(
    rf"(?<![\w-])(?P<word>{'|'.join(sorted(_IN_WORDS, key=len, reverse=True))})"
    rf"(?: (?P<unit>{_UNIT}))?(?![\w-])"
)
_NO_COUNT = r"(?:words?|cit|jobs?|things?|items?|names?|in\b|on\b|of\b|are\b|and\b|more\b|total)"


class _Quantity(NamedTuple):
    start: int
    end: int
    value: Decimal
    unit: str  # "": none is named


def _quantities(text: str, words: bool) -> list[_Quantity]:
    """The numbers in figures, with the units they have; also those in words, if asked for.

    A number in words that names no unit is left out where it is not asked for.
    """
    found = []
    for match in _NUMBER.finditer(text):
        value = Decimal(match["figures"].replace(",", ""))
        unit = "$" if match["money"] else _UNIT_NAMES.get(match["unit"] or "", "")
        found.append(
            _Quantity(match.start(), match.end(), -value if match["sign"] else value, unit)
        )
    for match in _WORD.finditer(text):
        unit = _UNIT_NAMES.get(match["unit"] or "", "")
        if (words or unit) and unit not in _SCALES:  # "two hundred and five" is not read
            value = Decimal(_IN_WORDS[match["word"]])
            found.append(_Quantity(match.start(), match.end(), value, unit))
    return sorted(found)


def find_numbers(text: str, final: str, known: Sequence[str]) -> list[Mention]:
    """Finds quantities; final: "47 pens" or "47". The wrong unit makes a number wrong."""
    wanted, _, unit = final.partition(" ")
    value, others = Decimal(wanted), {Decimal(number) for number in known if number.isdecimal()}
    if unit:
        found = _quantities(_without_labels(text), words=False)
    else:
        found = list(_not_counted_off(_quantities(text, words=True), text))
    mentions = []
    for one in found:
        right = one.value == value and one.unit in ("", unit)
        named = one.value in others and one.value != value and one.unit not in _SCALES
        mentions.append(Mention(one.start, one.end, right, named and not right))
    return _without_working(text, mentions, rf"(?:{_QUANTITY})")


def find_prices(text: str, final: str, known: Sequence[str]) -> list[Mention]:
    """Finds numbers of dollars, or of nothing; final: "$45"."""
    value = Decimal(final.removeprefix("$"))
    return [
        Mention(one.start, one.end, one.value == value and one.unit in ("", "$"), False)
        for one in _quantities(text, words=False)
    ]


def _without_labels(text: str) -> str:
    """Blanks out what only numbers the steps: `Step 2:` anywhere, `1.`, `2.`, ... before lines."""

    def blank(match: re.Match[str]) -> str:
        return " " * len(match[0])

    text = re.sub(r"\bstep \d+\b[.:)]?", blank, text)
    label = re.compile(r"^ ?\(?(\d{1,2})[.):](?= ?[^\W\d]| ?\d+ ?[-+x/a-z])", re.MULTILINE)
    numbers = [int(number) for number in label.findall(text)]
    if len(numbers) > 1 and numbers == list(range(1, len(numbers) + 1)):
        return label.sub(blank, text)
    return text


def _not_counted_off(found: Sequence[_Quantity], text: str) -> Iterator[_Quantity]:
    """Leaves out what counts items off: `1 cat, 2 dog, 3 sun`, `cat (1), dog (2)`, `1, 2, 3`."""
    step = re.compile(rf"(?:[.):]? ?(?!{_NO_COUNT})[^\W\d])|(?:\)? ?[,;>])|(?: ?\)(?!\w))")
    run: list[_Quantity] = []
    for one in found:
        counts = step.match(text, one.end) or (run and _ends(text, one))
        if one.value == len(run) + 1 and counts:
            run.append(one)
            continue
        yield from run if len(run) == 1 else ()
        run = []
        yield one
    yield from run if len(run) == 1 else ()


def _ends(text: str, one: _Quantity) -> bool:
    """Whether a counted-off number ends its list: `..., 2, 3` and no more in the sentence.

    Or the text, which was cut in the middle of a list.
    """
    more = re.match(r" ?\w", text[one.end :])
    listed = text[: one.start].rstrip(" ").endswith((",", "->", "and", "\n"))
    return listed and not more


# -------------------------------------------------------------------------------------- the working

_OPERATOR = (
    r" ?(?:[+x/]|-(?!>)|\b(?:plus|minus|times|multiplied by|divided by|less|and then)\b) ?\(?"
)
_GIVES = r" ?\)? ?(?:==?>?|->|\b(?:is|are|equals|equal to|makes?|gives?|leaves|comes to)\b) ?"


def _without_working(text: str, mentions: list[Mention], operand: str) -> list[Mention]:
    """Leaves out operands, and the results of all equations but the last.

    An equation that goes on from the right answer (47 + 3 = 50) is a check and counts for nothing.
    """
    sums = re.compile(
        rf"{operand}(?:{_OPERATOR}{operand})+ ?\)?|{operand}(?= ?= ?{operand}(?!{_OPERATOR}\d))"
    )
    spans = [match.span() for match in sums.finditer(text)]

    def inside(mention: Mention) -> bool:
        return any(start <= mention.start < end for start, end in spans)

    results, sums_done = [], 0
    for start, end in list(spans):
        operands = [m for m in mentions if start <= m.start < end]
        result = _result(text, mentions, start, end)
        if result is None or inside(result):
            continue
        if result.right or not any(m.right for m in operands):
            results.append(result)
            sums_done += len(operands) > 1
        else:
            spans.append((result.start, result.end))
    if not results:
        return [m for m in mentions if not inside(m)]
    last = max(results)
    # The first sum may be one on the way; a later one that ends the steps is the answer given, and
    # so is a time.
    known = last.known and sums_done == 1
    left = [m for m in mentions if not inside(m) and (m == last or m not in results)]
    return [m._replace(known=known, worked=True) if m == last else m for m in left]


def _result(text: str, mentions: Sequence[Mention], start: int, end: int) -> Mention | None:
    """The mention that an expression at text[start:end] is said to be equal to."""
    gives = re.compile(_GIVES).match(text, end)
    for mention in mentions:
        if gives and gives.end() <= mention.start <= gives.end() + 1:
            return mention
        if mention.end <= start and re.fullmatch(r" ?= ?\(?", text[mention.end : start]):
            return mention
    return None


# ---------------------------------------------------------------------------- days, times and codes

# In full: what "Wed" and "sun" may else be, a cut response shows.
_DAY = re.compile(rf"\b({'|'.join(DAYS).casefold()})s?\b")
_CHAIN = r"(?:[ ,;>-]|\(\d\)|\+?\b\d+[.:)]?|\b(?:then|and|next)\b|\n ?\+?\d+[.:)]? )*"


def find_days(text: str, final: str, known: Sequence[str]) -> list[Mention]:
    """Finds days of the week. Days that are counted off are working: `1 Tuesday, 2 Wednesday`."""
    wanted, others = final.casefold(), {day.casefold() for day in known}
    days = [
        Mention(m.start(), m.end(), m[1] == wanted, m[1] in others and m[1] != wanted)
        for m in _DAY.finditer(text)
    ]
    link = re.compile(_CHAIN)
    linked = [bool(link.fullmatch(text, a.end, b.start)) for a, b in pairwise(days)]
    linked = [False, *linked, False]
    days = [day for i, day in enumerate(days) if not any(linked[i : i + 2])]
    given = {m.start() for m in _all_steps(text, known)}
    return [d._replace(known=d.known and d.start not in given) for d in days]


def _all_steps(text: str, known: Sequence[str]) -> Iterator[re.Match[str]]:
    """The days that are said to be all the steps after the first: `3 days after Monday is ...`."""
    if known:
        first, steps = known[0].casefold(), rf"\b{len(known)}(?: days?)?"
        ways = rf"(?:{steps} (?:after|from) {first}|{first} ?(?:\+|plus) ?{steps})"
        for told in re.finditer(ways + r" ?(?:is|=|:|will be|->) ?", text):
            yield from (m for m in [_DAY.match(text, told.end())] if m)


_TIME = re.compile(
    r"(?<![\d:.,])(?P<hour>\d{1,2})(?:[:.h](?P<minute>\d\d)(?::00)?(?: hours)?"
    r"(?: ?(?P<half>[ap])\.?m\b\.?)?|(?: ?(?P<other>[ap])\.?m\b\.?| o'clock| ?h\b))(?![\d:])"
    r"|\b(?P<noon>noon)\b"
)
_SPAN = r"\d+ (?:hours?|minutes?|min|h)\b(?: and \d+ minutes?)?"
_MOMENT = "(?:" + re.sub(r"\?P<\w+>", "?:", _TIME.pattern) + f"|{_SPAN})"


def find_times(text: str, final: str, known: Sequence[str]) -> list[Mention]:
    """Finds times of the day; final: "17:30", which 5:30 pm is too, and 5:30 is not."""
    others = {_minutes(time) for time in known if re.fullmatch(r"\d\d?:\d\d", time)}
    mentions = []
    for match in _TIME.finditer(text):
        time, wanted = _time(match), _minutes(final)
        right = time == wanted
        mentions.append(Mention(match.start(), match.end(), right, time in others and not right))
    return _without_working(text, mentions, _MOMENT)


def _minutes(time: str) -> int:
    hour, minute = time.split(":")
    return 60 * int(hour) + int(minute)


def _time(match: re.Match[str]) -> int | None:
    """Minutes after midnight; None: no clock shows this, as 13:65 or 17:35 am."""
    if match["noon"]:
        return 12 * 60
    hour, minute = int(match["hour"]), int(match["minute"] or 0)
    half = match["half"] or match["other"]
    if hour > 23 or minute > 59 or (half == "a" and hour > 12):
        return None
    if half and 1 <= hour <= 12:
        hour = hour % 12 + 12 * (half == "p")
    return 60 * hour + minute


def find_codes(text: str, final: str, known: Sequence[str]) -> list[Mention]:
    """Finds words of letters and figures; final: "AB123"."""
    return [
        Mention(m.start(), m.end(), m[0] == final.casefold(), False)
        for m in re.finditer(r"\b(?:[a-z]+\d|\d+[a-z])\w*", text)
    ]


# -------------------------------------------------------------------------------------------- lists

_LINK = re.compile(
    r"(?:[\s,;:/<>()\[\]&-]|\b\d[.)]|"
    r"\b(?:and|then|next|first|second|third|last|lastly|finally|comes?|followed|by|goes|is|the|in|"
    r"middle|it|after|that|one|place|smallest|largest)\b|"
    r"\.(?=\s*(?:then|the|second|third|next|last|finally)\b))*"
)


_LABEL = re.compile(r" ?[.:)-] ?\S")  # behind the 1 of "1. 77", "(1) 77", "1: 77"


def find_lists(text: str, final: str, known: Sequence[str]) -> list[Mention]:
    """Finds lists of all the items or more; final: "cat, dog, sun"; known: the prompt's order.

    An item is any word of the data, and any number of two figures or more; of numbers also one of
    one figure that does not number what follows it.
    """
    items, others = _items(final), [_items(one) for one in known]
    numbers = items[0].isdigit()

    def is_item(m: re.Match[str]) -> bool:
        if not m[0].isdigit():
            return m[0] in items or m[0] in WORDS
        return len(m[0]) > 1 or (numbers and not _LABEL.match(text, m.end()))

    found = [m for m in re.finditer(r"(?<![\w.-])(?:\d+|[a-z]+)\b", text) if is_item(m)]
    runs: list[list[re.Match[str]]] = []
    for one in found:
        if runs and _LINK.fullmatch(text, runs[-1][-1].end(), one.start()):
            runs[-1].append(one)
        else:
            runs.append([one])
    lists = [part for run in runs for part in _parts(text, run, len(items), others)]
    return [_list_of(text, run, items, others) for run in lists if len(run) >= len(items)]


def _items(text: str) -> list[str]:
    return text.casefold().split(", ")


def _parts(
    text: str, run: list[re.Match[str]], size: int, others: Sequence[Sequence[str]]
) -> list[list[re.Match[str]]]:
    """The lists that a run of linked items has: one a line, or the prompt's order and another."""
    lines = [run[:1]]
    for before, one in pairwise(run):
        if "\n" in text[before.end() : one.start()]:
            lines.append([])
        lines[-1].append(one)
    if len(lines) > 1 and min(map(len, lines)) >= size:
        return lines
    if len(run) == 2 * size and [m[0] for m in run[:size]] in others:
        return [run[:size], run[size:]]
    return [run]


def _list_of(
    text: str, run: Sequence[re.Match[str]], items: Sequence[str], others: Sequence[Sequence[str]]
) -> Mention:
    named = [m[0] for m in run]
    more = re.match(r"(?:, ?and |, ?| and )([a-z]+)\s*(?:[.,;!]|$)", text[run[-1].end() :])
    longer = more is not None and more[1] not in ("please", "respectively", "sorted", "thanks")
    right = named == list(items) and not longer
    return Mention(run[0].start(), run[-1].end(), right, named in others and not right)
