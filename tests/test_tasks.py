"""The embedded data set: the same rows everywhere, splits that share nothing, a checker that is not talked round."""

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

from ldalign import tasks
from ldalign.errors import EnvironmentProblem, InputError
from ldalign.tasks import KINDS, check, make_rows

TRAIN, HELDOUT = make_rows(0, "train", 4000), make_rows(0, "heldout", 600)
DRAWN = [*tasks.tasks(0, "train", 2600), *tasks.tasks(0, "heldout", 520)]


def of_kind(kind):
    return [task for task in DRAWN if task.kind == kind]


# --- the rows ---


@pytest.mark.parametrize(
    ("split", "digest"),
    [
        ("train", "80632629a29ce524af3231727dfdabfc8f61868135be820592f10249d7b6e134"),
        ("heldout", "f84f626d5db31c62dea38ab4428a7c15e202fc242b78e4159ae7b065f33f8739"),
    ],
)
def test_rows_are_pinned(split, digest):
    """A change here changes every result measured on this data: make it on purpose, and say so in the records."""
    text = json.dumps(make_rows(0, split, 260), sort_keys=True)
    assert hashlib.sha256(text.encode()).hexdigest() == digest


def test_a_row_keeps_its_id_whatever_the_count():
    by_id = {row["id"]: row for row in TRAIN}
    assert all(by_id[row["id"]] == row for row in make_rows(0, "train", 300))
    assert set(by_id) == {f"train-{i:06}" for i in range(4000)}


def test_seed_and_split_change_the_rows():
    prompts = [tuple(row["messages"][0]["content"] for row in make_rows(seed, "train", 50)) for seed in (0, 1)]
    assert prompts[0] != prompts[1]


@pytest.mark.parametrize("rows", [TRAIN, HELDOUT], ids=["train", "heldout"])
def test_row_shape_balance_and_distinct_prompts(rows):
    assert len(KINDS) >= 10
    for row in rows:
        assert list(row) == ["id", "messages", "kind", "answer"] and isinstance(row["answer"], str)
        assert [m["role"] for m in row["messages"]] == ["user", "assistant"]
        assert all(m["content"] == m["content"].strip() and "{" not in m["content"][1:] for m in row["messages"])
    assert len({row["messages"][0]["content"] for row in rows}) == len(rows)
    sizes = Counter(row["kind"] for row in rows)
    assert set(sizes) == set(KINDS) and max(sizes.values()) - min(sizes.values()) <= 1
    assert [row["kind"] for row in rows[:26]] != list(KINDS) * 2  # shuffled


def test_heldout_shares_no_prompt_task_wording_or_person_with_train():
    for seed in (0, 1):  # whatever the seeds
        train, heldout = list(tasks.tasks(0, "train", 4000)), list(tasks.tasks(seed, "heldout", 600))
        assert not {t.prompt for t in train} & {t.prompt for t in heldout}
        assert not {(t.kind, t.params) for t in train} & {(t.kind, t.params) for t in heldout}
    for kind in KINDS:
        assert len(set(tasks.WORDINGS[kind, "train"])) == 5 and len(set(tasks.WORDINGS[kind, "heldout"])) == 3
        assert not set(tasks.WORDINGS[kind, "train"]) & set(tasks.WORDINGS[kind, "heldout"])
    assert not set(tasks.PEOPLE["train"]) & set(tasks.PEOPLE["heldout"])


@pytest.mark.parametrize("kind", KINDS)
def test_every_wording_is_used(kind):
    for split in tasks.CAPACITY:
        for wording in tasks.WORDINGS[kind, split]:
            pattern = re.compile(".+".join(map(re.escape, re.split(r"{\w+}", wording))))
            assert any(pattern.fullmatch(task.prompt) for task in of_kind(kind)), wording


@pytest.mark.parametrize("kind", KINDS)
def test_lengths(kind):
    prompts = [len(task.prompt.split()) for task in of_kind(kind)]
    responses = [len(task.response.split()) for task in of_kind(kind)]
    assert 18 <= min(prompts) and max(prompts) <= 45 and 20 <= sum(prompts) / len(prompts) <= 30
    assert 5 <= min(responses) and max(responses) <= 30


@pytest.mark.parametrize("seed", [0, 7])
@pytest.mark.parametrize("split", ["train", "heldout"])
def test_capacity_is_real(split, seed):
    assert tasks.CAPACITY["train"] >= 4000 and tasks.CAPACITY["heldout"] >= 600
    prompts = {task.prompt for task in tasks.tasks(seed, split, tasks.CAPACITY[split])}
    assert len(prompts) == tasks.CAPACITY[split]


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
    return next(day for day in (datetime.date(2024, 1, d) for d in range(1, 8)) if f"{day:%A}" == name)


def solve(task):
    """The answer worked out from the prompt's own text (from the parameters where wordings differ too much)."""
    if task.kind == "arithmetic":
        a, b, c = numbers(task.prompt)
        return f"{a + b * c} {re.search('|'.join(tasks.GOODS), task.prompt)[0]}"
    if task.kind == "money":
        return f"${task.params[0] - task.params[1] * task.params[2]}"
    if task.kind == "units":
        big, small, a, b = task.params
        seconds = {"seconds": 1, "minutes": 60, "hours": 3600, "days": 86400, "weeks": 604800}
        mm = {"inches": 1, "feet": 12, "yards": 36, "centimetres": 1, "metres": 100, "kilometres": 100_000}
        parts = {"grams": 1, "kilograms": 1000, "millilitres": 1, "litres": 1000, "single eggs": 1, "dozens": 12}
        size = seconds | mm | parts
        return f"{a * size[big] // size[small] + b} {small}"
    if task.kind == "dates":
        (n,) = numbers(task.prompt)
        (start,) = re.findall("|".join(tasks.DAYS), task.prompt)
        return f"{weekday(start) + datetime.timedelta(days=n):%A}"
    if task.kind == "clock":
        h, m, hours, minutes = numbers(task.prompt)
        return f"{datetime.datetime(2024, 1, 1, h, m) + datetime.timedelta(hours=hours, minutes=minutes):%H:%M}"
    if task.kind == "sorting":
        items = re.findall(r"\d+", task.prompt) or re.search(r"\w+(, \w+){2,3}", task.prompt)[0].split(", ")
        items.sort(key=lambda item: (len(item), item) if item.isdigit() else item)
        return ", ".join(items[::-1] if "reverse" in task.prompt or "largest to" in task.prompt else items)
    if task.kind == "counting":
        items = re.search(r"\w+(, \w+){5,}", task.prompt)[0].split(", ")
        return items.count(task.params[0])
    if task.kind == "extraction":
        patterns = {"price": r"\$\d+", "order number": r"\b[A-Z]{2}\d{3}\b", "day of delivery": "|".join(tasks.DAYS)}
        wanted = max(patterns, key=task.prompt.rfind)  # the question comes last
        (found,) = re.findall(patterns[wanted], task.prompt)
        return found
    if task.kind == "logic":
        *clues, place = task.params
        rank = dict(itertools.chain(*[[(more, 1), (less, -1)] for more, less, _, _ in tasks.SCALES]))
        people = {p for x, _, y in clues for p in (x, y)}
        (order,) = [o for o in itertools.permutations(people)
                    if all((o.index(y) - o.index(x)) * rank[rel] > 0 for x, rel, y in clues)]  # fmt: skip
        return order[place]
    if task.kind == "comparison":
        n1, p1, n2, p2 = task.params
        shops = [s for _, s in sorted((task.prompt.index(s), s) for s in tasks.SHOPS if s in task.prompt)]
        return "the same" if p1 * n2 == p2 * n1 else shops[p1 * n2 > p2 * n1]
    if task.kind == "words":
        job, *items = task.params
        assert ", ".join(items) in task.prompt and job in task.prompt
        a, *middle, z = items
        done = {"reverse": reversed(items), "more than five": (w for w in items if len(w) >= 6),
                "first letter": (w[:1] for w in items), "last letter": (w[-1:] for w in items),
                "swapped": (z, *middle, a)}  # fmt: skip
        return ", ".join(next(value for key, value in done.items() if key in job))
    if task.kind == "sequence":
        a, b, c, d = map(int, re.search(r"\d+(, \d+){3}", task.prompt)[0].split(", "))
        if b * b == a * c and c * c == b * d:
            return d * b // a
        return d + (d - c) + (d - c) - (c - b)
    record = dict(zip(("age", "city", "job"), task.params, strict=True))
    (name,) = [p for split in tasks.PEOPLE.values() for p in split if re.search(rf"\b{p}\b", task.prompt)]
    assert all(str(value) in task.prompt for value in record.values())
    return json.dumps({"name": name} | record)


@pytest.mark.parametrize("kind", KINDS)
def test_answers_agree_with_a_second_solver(kind):
    for task in of_kind(kind):
        assert check(kind, solve(task), task.response), task


def test_every_equation_in_the_working_is_true():
    seen = 0
    signs = {"+": lambda a, b: a + b, "-": lambda a, b: a - b, "x": lambda a, b: a * b, "/": lambda a, b: a / b}
    for task in DRAWN:
        for a, sign, b, result in re.findall(r"(\d+) ([-+x/]) (\d+) = (\d+)", task.response):
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
    """Another row's answer under this row's right working, and this answer with one character changed."""
    rows = of_kind(kind)
    rng = random.Random(kind)
    for task, other in itertools.pairwise(rows):
        if other.answer != task.answer:
            assert not check(kind, task.answer, task.response.removesuffix(task.answer) + other.answer)
        at = rng.choice([i for i, letter in enumerate(task.answer) if letter.isalnum()])
        old = task.answer[at]
        new = rng.choice([letter for letter in ("123456789" if old.isdigit() else "bcdfgkmz") if letter != old.lower()])
        changed = task.response.removesuffix(task.answer) + task.answer[:at] + new + task.answer[at + 1 :]
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
        for same in (task.response.upper(), task.response + ".", f"  {task.response} \n", task.response.lower() + "!"):
            assert check(kind, task.answer, same), same


@pytest.mark.parametrize(
    ("kind", "answer", "response", "right"),
    [
        ("arithmetic", "76 pens", "Answer: 76", True),
        ("arithmetic", "76 pens", "6 x 7 = 41, nonsense. Answer: 76 pens", True),  # only the final answer counts
        ("arithmetic", "76 pens", "**Final answer:** **76 pens**", True),
        ("arithmetic", "76 pens", "Answer: 76. So the answer is 76 pens.", True),
        ("arithmetic", "76 pens", "76 pens", False),  # no answer named
        ("arithmetic", "76 pens", "Answer: 76 books", False),
        ("arithmetic", "76 pens", "Answer: 76 or 77", False),
        ("arithmetic", "76 pens", "Answer: 7 6", False),
        ("arithmetic", "76 pens", "Answer: -76", False),
        ("arithmetic", "76 pens", "Answer: 76 thousand pens", False),
        ("arithmetic", "76 pens", "Answer: 76\nUser: and now?", False),
        ("arithmetic", "76 pens", "The answer is not 76", False),
        ("units", "1200 grams", "Answer: 1,200 grams", True),
        ("units", "1200 grams", "Answer: 1200.0 g", False),
        ("units", "1200 grams", "Answer: 1,2,00", False),
        ("units", "1200 grams", "Answer: 1200 kilograms", False),
        ("money", "$8", "Answer: 8 dollars", True),
        ("money", "$8", "Answer: $8.00", True),
        ("money", "$8", "Answer: 8", True),
        ("money", "$8", "Answer: $80", False),
        ("money", "$8", "Answer: 8 pens", False),
        ("counting", 5, "Answer: 5", True),
        ("counting", 5, "Answer: .5", False),
        ("counting", 5, "Answer: \u0665", False),  # an Arabic five
        ("clock", "09:05", "Answer: 9:05.", True),
        ("clock", "09:05", "Answer: 19:05", False),
        ("clock", "09:05", "Answer: 9:5", False),
        ("dates", "Friday", "Answer: *friday*!", True),
        ("dates", "Friday", "Answer: Friday or Monday", False),
        ("comparison", "the same", "Answer: same", True),
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
    assert check("sequence", str(want), f"Answer: {got}") == (want == got)
    assert check("sequence", str(want), f"Answer: {want:,}.")


@given(items=st.lists(st.sampled_from(tasks.WORDS), min_size=2, max_size=6), data=st.data())
def test_lists_are_equal_only_in_the_same_order(items, data):
    other = data.draw(st.permutations(items))
    assert check("words", ", ".join(items), "Answer: " + ", ".join(other)) == (items == other)


@given(kind=st.sampled_from(KINDS), response=st.text() | st.text().map("Answer: ".__add__))
def test_any_text_gets_a_verdict(kind, response):
    assert check(kind, "no such answer 1", response) is False or "no such answer 1" in response.casefold()


# --- the command ---


def test_command_writes_both_files(tmp_path, capsys):
    tasks.main([str(tmp_path / "new" / "data"), "--train", "30", "--heldout", "20", "--seed", "3"])
    for split, count in (("train", 30), ("heldout", 20)):
        lines = (tmp_path / "new" / "data" / f"{split}.jsonl").read_bytes().decode().split("\n")
        assert [json.loads(line) for line in lines[:-1]] == make_rows(3, split, count) and lines[-1] == ""
    assert "30 rows" in capsys.readouterr().out


def test_command_says_when_it_cannot_write(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(EnvironmentProblem, match="cannot be written"):
        tasks.main([str(tmp_path / "file"), "--train", "1", "--heldout", "1"])
