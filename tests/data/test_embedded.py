"""The embedded data: the same rows everywhere, splits apart, a checker that is not talked round."""

import datetime
import hashlib
import itertools
import json
import random
import re
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ldalign.data import embedded, problems
from ldalign.data.embedded import check, make_rows
from ldalign.data.problems import PROBLEMS as KINDS
from ldalign.system.errors import EnvironmentProblem, InputError

TRAIN, HELDOUT = make_rows(0, "train", 4000), make_rows(0, "heldout", 600)
DRAWN = [*embedded.tasks(0, "train", 2600), *embedded.tasks(0, "heldout", 520)]


def of_kind(kind):
    return [task for task in DRAWN if task.kind == kind]


# --- the rows ---


@pytest.mark.parametrize(
    ("split", "digest"),
    [
        ("train", "ddc6976375d781d0047e3146625e785fa77dd7147ed9fcfd8ff59514352ea15f"),
        ("heldout", "783c64cd4368d450da6e19bb4449e712c50ecca9a764cb823bf36fb95f113cca"),
    ],
)
def test_rows_are_pinned(split, digest):
    """A change here changes every result measured on this data: make it on purpose,
    and say so in the records.
    """
    text = json.dumps(make_rows(0, split, 260), sort_keys=True)
    assert hashlib.sha256(text.encode()).hexdigest() == digest


def test_a_row_keeps_its_id_whatever_the_count():
    by_id = {row["id"]: row for row in TRAIN}
    assert all(by_id[row["id"]] == row for row in make_rows(0, "train", 300))
    assert set(by_id) == {f"train-{i:06}" for i in range(4000)}


def test_seed_and_split_change_the_rows():
    prompts = [
        tuple(row["messages"][0]["content"] for row in make_rows(seed, "train", 50))
        for seed in (0, 1)
    ]
    assert prompts[0] != prompts[1]


@pytest.mark.parametrize("rows", [TRAIN, HELDOUT], ids=["train", "heldout"])
def test_row_shape_balance_and_distinct_prompts(rows):
    assert len(KINDS) >= 8
    for row in rows:
        assert list(row) == ["id", "messages", "kind", "answer"] and isinstance(row["answer"], str)
        assert [m["role"] for m in row["messages"]] == ["user", "assistant"]
        assert all(
            m["content"] == m["content"].strip() and "{" not in m["content"][1:]
            for m in row["messages"]
        )
    assert len({row["messages"][0]["content"] for row in rows}) == len(rows)
    sizes = Counter(row["kind"] for row in rows)
    assert set(sizes) == set(KINDS) and max(sizes.values()) - min(sizes.values()) <= 1
    assert [row["kind"] for row in rows[:18]] != list(KINDS) * 2  # shuffled


def test_heldout_shares_no_prompt_task_wording_or_person_with_train():
    for seed in (0, 1):  # whatever the seeds
        train, heldout = (
            list(embedded.tasks(0, "train", 4000)),
            list(embedded.tasks(seed, "heldout", 600)),
        )
        assert not {t.prompt for t in train} & {t.prompt for t in heldout}
        assert not {(t.kind, t.params) for t in train} & {(t.kind, t.params) for t in heldout}
    for kind in KINDS:
        assert (
            len(set(problems.WORDINGS[kind, "train"])) == 8
            and len(set(problems.WORDINGS[kind, "heldout"])) == 4
        )
        assert not set(problems.WORDINGS[kind, "train"]) & set(problems.WORDINGS[kind, "heldout"])
    assert not set(problems.PEOPLE["train"]) & set(problems.PEOPLE["heldout"])


@pytest.mark.parametrize("kind", KINDS)
def test_every_wording_is_used(kind):
    for split in embedded.CAPACITY:
        for wording in problems.WORDINGS[kind, split]:
            pattern = re.compile(".+".join(map(re.escape, re.split(r"{\w+}", wording))))
            assert any(pattern.fullmatch(task.prompt) for task in of_kind(kind)), wording


@pytest.mark.parametrize("kind", KINDS)
def test_lengths(kind):
    prompts = [len(task.prompt.split()) for task in of_kind(kind)]
    responses = [len(task.response.split()) for task in of_kind(kind)]
    assert 8 <= min(prompts) and max(prompts) <= 24 and 13 <= sum(prompts) / len(prompts) <= 20
    assert 5 <= min(responses) and max(responses) <= 20


@pytest.mark.parametrize("seed", [0, 7])
@pytest.mark.parametrize("split", ["train", "heldout"])
def test_capacity_is_real(split, seed):
    assert embedded.CAPACITY["train"] >= 4000 and embedded.CAPACITY["heldout"] >= 600
    prompts = {task.prompt for task in embedded.tasks(seed, split, embedded.CAPACITY[split])}
    assert len(prompts) == embedded.CAPACITY[split]


def test_bad_requests_are_refused():
    with pytest.raises(InputError, match=r"20001 rows.*0 to 20000"):
        make_rows(0, "train", 20_001)
    with pytest.raises(InputError, match="-1 rows"):
        make_rows(0, "train", -1)
    with pytest.raises(InputError, match="'test'"):
        make_rows(0, "test", 1)
    with pytest.raises(InputError, match="'riddles'"):
        check("riddles", "1", "Answer: 1")
    assert make_rows(0, "train", 0) == []


# --- the answers, by another route than the generator's ---


def numbers(text):
    return [int(n) for n in re.findall(r"\d+", text)]


def weekday(name):
    return next(
        day for day in (datetime.date(2024, 1, d) for d in range(1, 8)) if f"{day:%A}" == name
    )


def solve(task):
    """Works the answer out from the prompt's own text.

    Where wordings differ too much, it takes the parameters.
    """
    if task.kind == "arithmetic":
        a, b, c = numbers(task.prompt)
        return f"{a + b - c} {re.search('|'.join(problems.GOODS), task.prompt)[0]}"
    if task.kind == "units":
        big, small, a, b = task.params
        seconds = {"seconds": 1, "minutes": 60, "hours": 3600, "days": 86400, "weeks": 604800}
        mm = {
            "inches": 1,
            "feet": 12,
            "yards": 36,
            "centimetres": 1,
            "metres": 100,
            "kilometres": 100_000,
        }
        parts = {
            "grams": 1,
            "kilograms": 1000,
            "millilitres": 1,
            "litres": 1000,
            "single eggs": 1,
            "dozens": 12,
        }
        size = seconds | mm | parts
        return f"{a * size[big] // size[small] + b} {small}"
    if task.kind == "dates":
        (n,) = numbers(task.prompt)
        (start,) = re.findall("|".join(problems.DAYS), task.prompt)
        return f"{weekday(start) + datetime.timedelta(days=n):%A}"
    if task.kind == "clock":
        ((h, m),) = re.findall(r"(\d\d):(\d\d)", task.prompt)
        ((length, unit),) = re.findall(r"(\d+) (hour|minute)", task.prompt)
        h, m, passed = int(h), int(m), {f"{unit}s": int(length)}
        return f"{datetime.datetime(2024, 1, 1, h, m) + datetime.timedelta(**passed):%H:%M}"
    if task.kind == "sorting":
        items = re.findall(r"\d+", task.prompt) or re.search(r"\w+(, \w+){2}", task.prompt)[
            0
        ].split(", ")
        items.sort(key=lambda item: (len(item), item) if item.isdigit() else item)
        return ", ".join(
            items[::-1] if "reverse" in task.prompt or "largest to" in task.prompt else items
        )
    if task.kind == "counting":
        return len(re.search(r"\w+(, \w+){2,}", task.prompt)[0].split(", "))
    if task.kind == "extraction":
        patterns = {
            "price": r"\$\d+",
            "order number": r"\b[A-Z]{2}\d{3}\b",
            "day of delivery": "|".join(problems.DAYS),
        }
        wanted = max(patterns, key=task.prompt.rfind)  # the question comes last
        (found,) = re.findall(patterns[wanted], task.prompt)
        return found
    if task.kind == "logic":
        relation, *clues, _ = task.params
        (order,) = [
            o
            for o in itertools.permutations({p for clue in clues for p in clue})
            if all(o.index(x) < o.index(y) for x, y in clues)
        ]
        most = next(most for rel, most, _ in problems.SCALES if rel == relation)
        return order[0 if most in task.prompt else -1]
    record = dict(zip(("age", "city"), task.params, strict=True))
    (name,) = [
        p
        for split in problems.PEOPLE.values()
        for p in split
        if re.search(rf"\b{p}\b", task.prompt)
    ]
    assert all(str(value) in task.prompt for value in record.values())
    return json.dumps({"name": name} | record)


@pytest.mark.parametrize("kind", KINDS)
def test_answers_agree_with_a_second_solver(kind):
    for task in of_kind(kind):
        assert check(kind, solve(task), task.response), task


def test_every_equation_in_the_working_is_true():
    seen = 0
    signs = {"+": lambda a, b: a + b, "-": lambda a, b: a - b, "x": lambda a, b: a * b}
    for task in DRAWN:
        for a, sign, b, result in re.findall(r"(\d+) ([-+x]) (\d+) = (\d+)", task.response):
            assert signs[sign](int(a), int(b)) == int(result), task
            seen += 1
    assert seen > 1000


def test_answers_are_spread():
    """No kind can be passed by always giving its commonest answer."""
    for kind in KINDS:
        answers = Counter(task.answer for task in of_kind(kind))
        assert max(answers.values()) <= 0.35 * len(of_kind(kind)), (kind, answers.most_common(2))


# --- the checker ---


@pytest.mark.parametrize("row_set", [TRAIN, HELDOUT], ids=["train", "heldout"])
def test_every_response_passes_its_own_check(row_set):
    for row in row_set:
        assert check(row["kind"], row["answer"], row["messages"][1]["content"]), row


@pytest.mark.parametrize("kind", KINDS)
def test_wrong_answers_fail(kind):
    """Another row's answer under this row's right working, and this answer
    with one character changed.
    """
    rows = of_kind(kind)
    rng = random.Random(kind)
    for task, other in itertools.pairwise(rows):
        if other.answer != task.answer:
            assert not check(
                kind, task.answer, task.response.removesuffix(task.answer) + other.answer
            )
        at = rng.choice([i for i, letter in enumerate(task.answer) if letter.isalnum()])
        old = task.answer[at]
        new = rng.choice(
            [
                letter
                for letter in ("123456789" if old.isdigit() else "bcdfgkmz")
                if letter != old.lower()
            ]
        )
        changed = (
            task.response.removesuffix(task.answer) + task.answer[:at] + new + task.answer[at + 1 :]
        )
        assert not check(kind, task.answer, changed), changed


@pytest.mark.parametrize("kind", KINDS)
def test_no_answer_two_answers_and_babble_fail(kind):
    for task, other in itertools.pairwise(of_kind(kind)[:60]):
        right = task.response
        assert not check(kind, task.answer, "")
        assert not check(kind, task.answer, " \n")
        assert not check(kind, task.answer, right[: -len(task.answer)])
        assert not check(kind, task.answer, right + " or not")
        assert not check(kind, task.answer, right + f"\nNo, that is wrong: {other.answer}")
        if other.answer != task.answer:
            assert not check(kind, task.answer, f"Answer: {other.answer}\n{right}")
            assert not check(kind, task.answer, f"{right}\nAnswer: {other.answer}")
            assert not check(kind, task.answer, f"{right} or {other.answer}")
            assert not check(kind, task.answer, f"The answer is {other.answer}. {right}")


@pytest.mark.parametrize("kind", KINDS)
def test_case_space_and_closing_punctuation_do_not_matter(kind):
    for task in of_kind(kind)[:60]:
        for same in (
            task.response.upper(),
            task.response + ".",
            f"  {task.response} \n",
            task.response.lower() + "!",
        ):
            assert check(kind, task.answer, same), same


@pytest.mark.parametrize(
    ("kind", "answer", "response", "right"),
    [
        ("arithmetic", "76 pens", "Answer: 76", True),
        # only the final answer counts
        ("arithmetic", "76 pens", "6 x 7 = 41, nonsense. Answer: 76 pens", True),
        ("arithmetic", "76 pens", "**Final answer:** **76 pens**", True),
        ("arithmetic", "76 pens", "Answer: 76. So the answer is 76 pens.", True),
        ("arithmetic", "76 pens", "76 pens", False),  # no answer named
        ("arithmetic", "76 pens", "Answer: 76 books", False),
        ("arithmetic", "76 pens", "Answer: 76 or 77", False),
        ("arithmetic", "76 pens", "Answer: $76", False),
        ("arithmetic", "76 pens", "Answer: 7 6", False),
        ("arithmetic", "76 pens", "Answer: -76", False),
        ("arithmetic", "76 pens", "Answer: 76 thousand pens", False),
        ("arithmetic", "76 pens", "Answer: 76\nUser: and now?", False),
        ("arithmetic", "76 pens", "The answer is not 76", False),
        ("units", "1200 grams", "Answer: 1,200 grams", True),
        ("units", "1200 grams", "Answer: 1200.0 g", False),
        ("units", "1200 grams", "Answer: 1,2,00", False),
        ("units", "1200 grams", "Answer: 1200 kilograms", False),
        ("counting", 5, "Answer: 5", True),
        ("counting", 5, "Answer: .5", False),
        ("counting", 5, "Answer: \u0665", False),  # an Arabic five
        ("clock", "09:05", "Answer: 9:05.", True),
        ("clock", "09:05", "Answer: 19:05", False),
        ("clock", "09:05", "Answer: 9:5", False),
        ("dates", "Friday", "Answer: *friday*!", True),
        ("dates", "Friday", "Answer: Friday or Monday", False),
        ("sorting", "a, b, c", "Answer: a,b , and c.", True),
        ("sorting", "a, b, c", "Answer: [a, b, c]", True),
        ("sorting", "a, b, c", "Answer: a, c, b", False),
        ("sorting", "a, b, c", "Answer: a, b", False),
        ("sorting", "a, b, c", "Answer: a, b, c, c", False),
        ("sorting", "a, b, c", "Answer: a b c", False),
        ("extraction", "$45", "Answer: 45", True),
        ("extraction", "AB123", "Answer: AB 123", False),
        ("formatting", '{"a": "X", "b": 3}', '```json\n{"b": "3", "a": "x"}\n```', True),
        ("formatting", '{"a": "X", "b": 3}', '{"a": "X", "b": 4}', False),
        ("formatting", '{"a": "X", "b": 3}', '{"a": "X", "a": "X", "b": 3}', False),
        ("formatting", '{"a": "X", "b": 3}', '{"a": "X"}', False),
        ("formatting", '{"a": "X", "b": 3}', '[["a", "X"], ["b", 3]]', False),
        ("formatting", '{"a": "X", "b": 3}', '{"a": "X", "b": 3} {"a": "X", "b": 4}', False),
        ("formatting", '{"a": "X", "b": 3}', "[" * 100_000, False),
    ],
)
def test_checker_cases(kind, answer, response, right):
    assert check(kind, answer, response) is right


@given(want=st.integers(0, 10**6), got=st.integers(-(10**6), 10**6))
def test_numbers_are_equal_only_when_equal(want, got):
    assert check("counting", str(want), f"Answer: {got}") == (want == got)
    assert check("counting", str(want), f"Answer: {want:,}.")


@given(items=st.lists(st.sampled_from(problems.WORDS), min_size=2, max_size=6), data=st.data())
def test_lists_are_equal_only_in_the_same_order(items, data):
    other = data.draw(st.permutations(items))
    assert check("sorting", ", ".join(items), "Answer: " + ", ".join(other)) == (items == other)


@given(
    words=st.lists(
        st.sampled_from(
            ["so", "The", "my", "FINAL", "correct", "\u017fo", "also", "answer", "Answer:"]
        )
        | st.sampled_from(["is", ":", "=", "5", "**", " ", "\n "])
    ),
    between=st.sampled_from(["", " "]),
)
def test_an_answer_ends_where_the_next_is_led_up_to(words, between):
    """As one regular expression says it, which takes too long for long texts."""
    leads = r"(?:\b(?:so|the|my|final|correct)\s+)*\banswer\W{0,3}?\s*(?::|=|\bis\b:?)"
    text = between.join(words)
    assert embedded._given(text) == re.split(leads, text, flags=re.IGNORECASE)[1:]


@pytest.mark.parametrize(
    ("kind", "answer", "response", "right"),
    [
        ("arithmetic", "5", "so " * 333_000 + "x", False),
        ("arithmetic", "5", "so " * 333_000 + "answer: 5", True),
        ("arithmetic", "5", "Answer: 5. " + "So the final " * 77_000 + "answer is 5", True),
        ("arithmetic", "5", "so " * 333_000 + "answer: 6", False),
        ("arithmetic", "5", "answer" + " " * 10**6 + "x", False),
        ("arithmetic", "5", "Answer: " + "1," * 500_000 + "x", False),
        ("sorting", "a, b", "Answer: " + "a, and " * 140_000, False),
        ("formatting", '{"a": 5}', "```" + " " * 10**6 + "x", False),
        ("formatting", '{"a": 5}', "```" + "x " * 10**6 + "```", False),
        ("formatting", '{"a": 5}', "```" + " \n" * 10**6 + '{"a": 5}' + " " * 10**6 + "```", True),
    ],
    ids=lambda value: value[:12] if isinstance(value, str) else None,
)
def test_a_long_text_gets_its_verdict(kind, answer, response, right):
    """Of a megabyte: read from every word anew, most of these would take hours."""
    assert check(kind, answer, response) is right


@given(kind=st.sampled_from(KINDS), response=st.text() | st.text().map("Answer: ".__add__))
def test_any_text_gets_a_verdict(kind, response):
    assert (
        check(kind, "no such answer 1", response) is False
        or "no such answer 1" in response.casefold()
    )


# --- the command ---


def test_command_writes_both_files(tmp_path, capsys):
    embedded.main(
        [str(tmp_path / "new" / "data"), "--train", "30", "--heldout", "20", "--seed", "3"]
    )
    for split, count in (("train", 30), ("heldout", 20)):
        lines = (tmp_path / "new" / "data" / f"{split}.jsonl").read_bytes().decode().split("\n")
        assert [json.loads(line) for line in lines[:-1]] == make_rows(3, split, count) and lines[
            -1
        ] == ""
    assert "30 rows" in capsys.readouterr().out


def test_command_says_when_it_cannot_write(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(EnvironmentProblem, match="cannot be written"):
        embedded.main([str(tmp_path / "file"), "--train", "1", "--heldout", "1"])
