"""Whether a response gives the right answer, in whatever words.

The answer of such a row is `{"final": TEXT, "known": [TEXT, ...]}`: the right one, and the values
of the prompt and of a right working that are of its type. A response is right if it states the
final answer and nothing else as the answer. In doubt it is not:

- A value that is neither the answer nor known is an answer given, and a wrong one. Only inside an
  equation it is working, unless it is the result of the last one.
- What follows "answer:" or "the answer is", and what stands alone in a sentence or line, is an
  answer, known or not. Where two are joined by "or", both are; there, by "and" or a comma too.
- After the last "so", "total" and the like, the answer has to come again, if any value does.
- Where none of these is there, the answer must be the first value that the response names, or the
  last, and the response no longer than 60 words.

So a known value beside the right answer does no harm, and one in its place is wrong.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

from ldalign.data.mentions import (
    Finder,
    Mention,
    find_codes,
    find_days,
    find_lists,
    find_numbers,
    find_prices,
    find_times,
    plain,
)
from ldalign.data.problems import CITIES, DAYS, PEOPLE, SCALES
from ldalign.system.errors import InputError

MOST_WORDS = 60  # of a response that names a value, and does not say that it is the answer
MOST_CHARACTERS = 10_000  # of a response that is read; a longer one is not right

# "Answer: 42", "The answer is 42", "Result = 42"
_MARKER = re.compile(r"\b(?:answer|result|solution)\b\W{0,3}?\s*(?::|=|\b(?:is|would be)\b:?)")
# The answer follows these ...
_CUE = re.compile(
    r"\b(?:so(?! (?:far|that|many|much)\b)|therefore|thus|hence|total|final|in all|altogether|"
    r"in the end|actually|sorry|wait|rather(?! than)|correction|i mean|no(?=[,:]))\b"
)
# ... and stands before these: "47 pens are left", "it is 47, because".
_LEFT = re.compile(r"\b(?:left|remains?)\b")
_REASON = re.compile(r",? \(?(?:because|since|due to)\b|, (?:as|for|which (?:is|are|was))\b")
_IT_IS = re.compile(
    r"(?:so |yes,? |sure,? )?(?:it|that|this)(?:'s|'ll be| is| was| falls|"
    r" (?:will|would|must|has to|is going to) be)(?: (?:on|at|a|an|the))* ?"
)
_STOP = re.compile(r"[.!?;]+(?=\s|$)|\n+")
_NOT = re.compile(
    r"(?:\bnot|n't|\bnever|\binstead of|\brather than)"
    r"(?: (?:be|on|at|a|an|the|have|has|get|simply|exactly))* ?$"
)
_NOT_AFTER = re.compile(
    r" ?(?:is|are|was|would be)?(?: not|n't)\b| ?(?:is|are|would be) (?:wrong|incorrect|false)\b"
)
_ROUGHLY = re.compile(
    r"\b(?:about|around|roughly|almost|nearly|over|under|than|least|most|up to|approximately|"
    r"before|after|until|between) ?$"
)
_OR = re.compile(r"(?:\bor\b|/)(?: (?:maybe|perhaps|even|it is|on|at|the|a|an))* ?$")
_AND = re.compile(r",? and |, ?| & ?")
_FILLER = re.compile(
    r"\b(?:so|it|is|it's|its|that|that's|this|there|are|the|a|an|on|at|by|and|then|just|only|yes|"
    r"ok|okay|sure|here|will|be|must|would|has|to|i|get|think)\b|\W"
)
_JOINT = re.compile(r"\band\b|[^\w>]")
_AFTER = re.compile(r"\b(?:then|now|only|too|please)\b|[^\w>]")
# The number that a text ends in, in the text turned round; all that is no word is behind it.
_ENDS_IN = re.compile(r"\W*+[\d:.,]*\d")


class Sentence(NamedTuple):
    """text[start:end], and the values that it names."""

    start: int
    end: int
    mentions: list[Mention]
    asks: bool  # ends with a question mark


def states(text: str, mentions: Sequence[Mention]) -> bool:
    """Says whether a response states the right answer and no other, as the module's text says.

    text: as `plain` leaves it; mentions: of it, in their order.
    """
    mentions = list(_weighed(text, mentions))
    if any(not m.right and not m.known for m in mentions):
        return False
    sentences = list(_sentences(text, mentions))
    named = [*_marked(text, sentences), *_alone(text, sentences)]
    named += [*_alternatives(text, mentions), *_reasoned(text, sentences)]
    if not all(m is not None and m.right for m in named) or _contradicts(text, sentences):
        return False
    last = max((m.end for m in named if m is not None), default=0)
    concluded = _concluded(text, sentences, mentions, last)
    if concluded is not None:
        return concluded
    said = [m for sentence in sentences if not sentence.asks for m in sentence.mentions]
    if named or not said or len(text.split()) > MOST_WORDS:
        return bool(named)
    # A right sum is the answer if nothing comes after it.
    return said[-1].right or (said[0].right and not said[0].worked)


def _weighed(text: str, mentions: Sequence[Mention]) -> Iterator[Mention]:
    """The mentions; "not 47" and "about 47" are wrong where 47 is right, "not 46" says nothing."""
    for m in mentions:
        before = text[max(0, m.start - 40) : m.start].rpartition("\n")[2]
        denied = bool(_NOT.search(before) or _NOT_AFTER.match(text, m.end))
        if m.right and (denied or _ROUGHLY.search(before)):
            yield m._replace(right=False, known=False)
        elif not denied:
            yield m


def _sentences(text: str, mentions: Sequence[Mention]) -> Iterator[Sentence]:
    start = 0
    for stop in [*_STOP.finditer(text), None]:
        end = len(text) if stop is None else stop.start()
        # A list may go over several lines.
        inside = [m for m in mentions if start <= m.start < end]
        if inside and stop is not None and inside[-1].end > stop.end():
            continue
        if text[start:end].strip():
            yield Sentence(start, end, inside, stop is not None and "?" in stop[0])
        start = end if stop is None else stop.end()


def _marked(text: str, sentences: Sequence[Sentence]) -> Iterator[Mention | None]:
    """The first value after every "answer:", with those that "and" or a comma joins to it; None
    where there is none.
    """
    for i, sentence in enumerate(sentences):
        for marker in _MARKER.finditer(text, sentence.start, sentence.end):
            rest = [m for m in sentence.mentions if m.start >= marker.end()]
            if not text[marker.end() : sentence.end].strip(" :") and i + 1 < len(sentences):
                rest = sentences[i + 1].mentions
            if sentence.asks:
                continue
            yield rest[0] if rest else None
            for before, one in pairwise(rest):
                if not _AND.fullmatch(text, before.end, one.start):
                    break
                yield one


def _alone(text: str, sentences: Sequence[Sentence]) -> Iterator[Mention]:
    """The values of sentences and lines that have nothing else."""
    for start, end, mentions, asks in sentences:
        before, at = "", start
        for m in mentions:
            before, at = f"{before} {text[at : m.start]}", m.end
        filler = _FILLER if len(mentions) == 1 else _JOINT
        if not asks and not filler.sub("", before) and not _AFTER.sub("", text[at:end]):
            yield from mentions


def _alternatives(text: str, mentions: Sequence[Mention]) -> Iterator[Mention]:
    """The values behind an "or", and the one before each."""
    for before, one in pairwise([None, *mentions]):
        if one is not None and _OR.search(text[max(0, one.start - 40) : one.start]):
            yield from (m for m in (before, one) if m is not None)


def _contradicts(text: str, sentences: Sequence[Sentence]) -> bool:
    """Whether two sentences say the same of two values."""
    told: dict[str, str] = {}
    for start, end, mentions, _ in sentences:
        at = mentions[-1].start if mentions else _last_figure(text, start, end)
        upto = mentions[-1].end if mentions else end
        frame = " ".join(f"{text[start:at]} # {text[upto:end]}".split())
        value = text[at:upto].strip(" .")
        worded = at < end and re.search(r"[a-z]|=", frame)
        if worded and told.setdefault(frame, value) != value:
            return True
    return False


def _last_figure(text: str, start: int, end: int) -> int:
    """Where the number begins that text[start:end] ends in, but for marks; its end, if in none.

    Looked for from the end, as from the front every figure of a long text would be tried.
    """
    figure = _ENDS_IN.match(text[start:end][::-1])
    return end - figure.end() if figure else end


def _reasoned(text: str, sentences: Sequence[Sentence]) -> Iterator[Mention]:
    """The values for which a reason follows, and the first of all after "it is"."""
    first = True
    for sentence in sentences:
        for m in sentence.mentions:
            begins = first and _IT_IS.fullmatch(text[sentence.start : m.start].lstrip())
            if not sentence.asks and (begins or _REASON.match(text, m.end)):
                yield m
            first = False


def _concluded(
    text: str, sentences: Sequence[Sentence], mentions: Sequence[Mention], after: int
) -> bool | None:
    """Whether the value at the last "so" or "left" behind `after` is the answer; None: no such.

    Or else the very last value, where the steps go on after it.
    """
    for sentence in reversed(sentences):
        if sentence.end <= after or not sentence.mentions or sentence.asks:
            continue
        first = _at_cue(text, sentence, max(after, sentence.start))
        if first is not None:
            return first.right or mentions[-1].right
    return None


def _at_cue(text: str, sentence: Sentence, start: int) -> Mention | None:
    """The value that the last cue of a sentence is about; None where there is no cue."""
    cues = [(cue.end(), True) for cue in _CUE.finditer(text, start, sentence.end)]
    cues += [(cue.start(), False) for cue in _LEFT.finditer(text, start, sentence.end)]
    if not cues:
        return None
    at, follows = max(cues)
    behind = [m for m in sentence.mentions if m.start >= at]
    ahead = [m for m in sentence.mentions if m.start < at]
    if follows:
        return behind[0] if behind else ahead[-1]
    return ahead[-1] if ahead else behind[0]


# -------------------------------------------------------------------------------------------- kinds


def _stated(find: Finder) -> Callable[[str, str, Sequence[str]], bool]:
    """The rule of `states` for the values that `find` finds."""

    def right(response: str, final: str, known: Sequence[str]) -> bool:
        text = plain(response)
        return states(text, find(text, final, known))

    return right


def _extraction(response: str, final: str, known: Sequence[str]) -> bool:
    """Where other facts of the prompt are named too, a sentence has to say which one is asked for.

    Otherwise who repeats the prompt would be right.
    """
    text = plain(response)
    facts = [m for fact in known for m in _finder(fact)(text, fact, ()) if m.right]
    facts = [m._replace(right=False, known=True) for m in facts]
    found = sorted([*_finder(final)(text, final, ()), *facts])
    said = list(_labelled(text, final, found))
    if not states(text, found) or not all(m.right for m in said):
        return False
    sentences = list(_sentences(text, found))
    clear = [m for s in sentences for m in said if m in s.mentions and len(s.mentions) == 1]
    cued = _concluded(text, sentences, found, 0)
    return bool(not facts or clear or cued or [*_marked(text, sentences), *_alone(text, sentences)])


def _labelled(text: str, final: str, found: Sequence[Mention]) -> Iterator[Mention]:
    """The values that are said to be what is asked for: `the price is`, `is the price`."""
    what = r"price|cost" if final[0] == "$" else r"day(?: of delivery)?|delivery(?: day)?"
    label = f"(?:{what if final[0] == '$' or final in DAYS else 'number|code'})"
    before = re.compile(rf"\b{label}(?: of the \w+)? ?(?:is|:|=|was)(?: on)? ?$")
    after = re.compile(rf" (?:is|was) the (?:order )?{label}\b")
    for m in found:
        if before.search(text[max(0, m.start - 60) : m.start]) or after.match(text, m.end):
            yield m


def _finder(value: str) -> Finder:
    if value.startswith("$"):
        return find_prices
    return find_days if value in DAYS else find_codes


def _record(response: str, final: str, known: Sequence[str]) -> bool:
    """One JSON object, and no other name, age or city around it."""
    try:
        wanted = _DECODER.decode(final.casefold())
    except ValueError as error:
        raise InputError(
            f"kind formatting-any: answer: final: is no JSON object: {error}"
        ) from error
    text = response.casefold()
    at = text.find("{")
    if at < 0:
        return False
    try:
        given, end = _DECODER.raw_decode(text, at)
    except (ValueError, RecursionError):
        return False
    rest = text[:at] + " " + text[end:]
    if not isinstance(given, tuple) or not _same_pairs(given, wanted) or set(rest) & set("{}"):
        return False
    values = {str(value) for _, value in wanted}
    named = set(re.findall(r"\d\d+|[^\W\d]+", rest))
    told = {word for word in named if word.isdigit()} | named & _NAMES
    return told | (named & {city.casefold() for city in CITIES}) <= values


def _same_pairs(given: tuple[Any, ...], wanted: tuple[Any, ...]) -> bool:
    """Whether two objects have the same keys, each once, and the same values; 34 is "34"."""
    return sorted((k, str(v)) for k, v in given) == sorted((k, str(v)) for k, v in wanted)


# As a tuple of pairs an object is not taken for an array, and a key given twice stays.
_DECODER = json.JSONDecoder(object_pairs_hook=tuple)

_NAMES = {name.casefold() for names in PEOPLE.values() for name in names}
_BE = r"(?:is|was|must be|has to be|would be|should be)"


def _logic(response: str, final: str, known: Sequence[str]) -> bool:
    """final: "Mia is the tallest". Who is said to be so, or named as the answer, must be Mia alone.

    What is said of the other end, and of two people's relation, is working.
    """
    person, asked = final.casefold().split(" is the ")
    name = "|".join(sorted(_NAMES | {person, *map(str.casefold, known)}))
    text = _without_ranking(plain(response), name)
    claims = [m[1] for pattern in _claims(asked, name, person) for m in re.finditer(pattern, text)]
    mentions = [
        Mention(m.start(), m.end(), m[0] == person, True)
        for m in re.finditer(rf"\b(?:{name})\b(?!'s)", text)
    ]
    sentences = list(_sentences(text, mentions))
    marked = list(_marked(text, sentences))
    if None in marked:
        return False
    claims += [text[m.start : m.end] for m in (*marked, *_alone(text, sentences)) if m is not None]
    claims += _named_by_cue(text, sentences)
    return bool(claims) and set(claims) == {person}


def _claims(asked: str, name: str, person: str) -> Iterator[str]:
    """The patterns that say of group 1 that it is the one asked for; person: who is."""
    one, is_so = rf"\b({name})\b", rf"(?:{_BE}|[:=(-])(?: \w+ly| also| thus| indeed)?"
    between = r"(?: (?!to\b|is\b)\w+){0,5} ?"
    yield rf"{one} {is_so} ?(?:the )?(?:\w+ )?{asked}\b"
    yield rf"(?<!to )(?<!to the )\b{asked}{between}(?:{_BE}|:|=|->)(?: \w+ly| called)* {one}"
    yield rf"(?:^|[.!?\n] ?){one} ?(?:[,:;(-]|(?:because|since|as)\b)"
    yield rf"\b(?:it|that|this|he|she)(?:'s| {_BE})(?: \w+ly)? {one}"
    yield rf"\b(?:{name}),? or(?: maybe| perhaps)? (\w+)"
    yield rf"\bor(?: maybe| perhaps)? {one}"
    yield rf"{one}(?:,? or\b| ?/)"
    yield rf"/ ?{one}"
    two = rf"(?:{name}),? and (?:{name})\b(?! is\b)"
    everyone = r"(?:both|all|every|any|everyone|everybody|anyone|anybody|the others?|the rest)\b"
    for relation, most, _ in SCALES:
        if most == asked:
            yield rf"{one} {_BE} {relation} than (?:{everyone}|{two})"
    # "Mia is not the tallest" must not be said of the right one; no such claim is ever right.
    yield rf"\b(?:{name})( (?:is not|isn't)) (?:the )?{asked}\b"
    yield rf"((?:\bnot|n't|\bnever|\binstead of|\brather than) {person})\b"


def _without_ranking(text: str, name: str) -> str:
    """Takes out what ranks people: "from tallest to shortest: A, B, C", "A > B > C", "A and B"."""
    many = rf"\b(?:{name})(?:(?:[ ,<>]|->|and |then )+(?:{name})\b)+(?! is\b)"
    text = re.sub(rf"\bfrom (?:the )?\w+ to (?:the )?\w+(?: \w+)? ?[:,]? ?{many}", "these", text)
    return re.sub(many, "these", text)


def _named_by_cue(text: str, sentences: Sequence[Sentence]) -> Iterator[str]:
    """Whom "so" or "therefore" is followed by, without a word on what the person is."""
    for sentence in sentences:
        for cue in _CUE.finditer(text, sentence.start, sentence.end):
            rest = [m for m in sentence.mentions if m.start >= cue.end()]
            if rest and not sentence.asks and not re.match(r" ?(?:is|was)\b", text[rest[0].end :]):
                if not re.search(r"\b\w+est\b", text[cue.end() : sentence.end]):
                    yield text[rest[0].start : rest[0].end]


class Kind(NamedTuple):
    """When a response is right: (response, final, known); and what a final answer looks like."""

    right: Callable[[str, str, Sequence[str]], bool]
    form: str  # a regular expression
    such_as: str


_DAYS = "|".join(DAYS)
_KINDS = {
    "arithmetic": Kind(_stated(find_numbers), r"\d+( .+)?", "47 pens"),
    "units": Kind(_stated(find_numbers), r"\d+( .+)?", "205 minutes"),
    "dates": Kind(_stated(find_days), _DAYS, "Friday"),
    "clock": Kind(_stated(find_times), r"\d\d?:\d\d", "17:30"),
    "sorting": Kind(_stated(find_lists), r"\w+(, \w+)+", "apple, cat, zebra"),
    "counting": Kind(_stated(find_numbers), r"\d+", "5"),
    "extraction": Kind(_extraction, rf"\$\d+|[A-Za-z]+\d+|{_DAYS}", "$45, AB123 or Friday"),
    "formatting": Kind(_record, r"\{.*\}", '{"name": "Mia"}'),
    "logic": Kind(_logic, r"\w+ is the \w+", "Mia is the tallest"),
}


def check_any(kind: str, answer: Any, response: str) -> bool:
    """Says whether a response to a problem of a kind states the right answer, in any words.

    answer: `{"final": ..., "known": [...]}`, as `embedded.make_rows` writes it. Raises InputError
    for another form: with a bare text every value of the prompt would be a wrong answer.
    """
    form = isinstance(answer, dict) and set(answer) == {"final", "known"}
    form = form and isinstance(answer["known"], list)
    if not form or not all(isinstance(text, str) for text in (answer["final"], *answer["known"])):
        raise InputError(
            f'kind {kind}-any: answer: is {answer!r}; expected {{"final": TEXT, "known": [TEXT, '
            f"...]}} (or kind {kind}, which takes a text)"
        )
    final, known = answer["final"], answer["known"]
    if not re.fullmatch(_KINDS[kind].form, final):
        raise InputError(
            f"kind {kind}-any: answer: final: is {final!r}; expected one like "
            f"{_KINDS[kind].such_as!r}"
        )
    return len(response) <= MOST_CHARACTERS and _KINDS[kind].right(response, final, known)
