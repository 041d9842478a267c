"""The embedded data with several right wordings of every answer."""

import hashlib
import json
import math
import random
import string
from collections import Counter

import pytest
from any_wording_cases import STATE

from ldalign.data import embedded
from ldalign.data.embedded import ANY, KINDS, check, make_rows, respond
from ldalign.data.problems import PEOPLE, PROBLEMS, RESPONSES, WORDINGS, draw
from ldalign.system.errors import InputError

TRAIN, HELDOUT = make_rows(0, "train", 4000, True), make_rows(0, "heldout", 600, True)


@pytest.mark.parametrize(
    ("split", "digest"),
    [
        ("train", "b59302dfac97a5bd028ec7544da32e57409ad20ec5c78ff28f5d5f4ca0631ad7"),
        ("heldout", "44de93f365b43c3ffb64df97ac12197deb1a4457bba7da5d011c0d2acdc47c0e"),
    ],
)
def test_rows_are_pinned(split, digest):
    """A change here changes every result measured on this data: make it on purpose."""
    text = json.dumps(make_rows(0, split, 260, True), sort_keys=True)
    assert hashlib.sha256(text.encode()).hexdigest() == digest


def test_a_row_keeps_its_id_whatever_the_count():
    by_id = {row["id"]: row for row in TRAIN}
    assert all(by_id[row["id"]] == row for row in make_rows(0, "train", 300, True))
    assert make_rows(1, "train", 50, True) != make_rows(0, "train", 50, True)


@pytest.mark.parametrize(("rows", "count"), [(TRAIN, 4000), (HELDOUT, 600)])
def test_counts_shape_and_every_answer_right(rows, count):
    assert len(rows) == count == len({row["messages"][0]["content"] for row in rows})
    sizes = Counter(row["kind"] for row in rows)
    assert set(sizes) == {kind + ANY for kind in PROBLEMS}
    assert max(sizes.values()) - min(sizes.values()) <= 1
    for row in rows:
        assert list(row) == ["id", "messages", "kind", "answer"]
        assert set(row["answer"]) == {"final", "known"}
        response = row["messages"][1]["content"]
        assert response == response.strip() and "{answer}" not in response
        assert check(row["kind"], row["answer"], response), row


def test_splits_share_no_prompt_parameters_or_people():
    sets = {}
    for split, count in (("train", 4000), ("heldout", 600)):
        for any_wording in (False, True):
            sets[split, any_wording] = list(embedded.tasks(0, split, count, any_wording))
    # Of the other set too: a policy that learned the one can be measured on the other.
    for one in (sets["train", False], sets["train", True]):
        for other in (sets["heldout", False], sets["heldout", True]):
            assert not {t.prompt for t in one} & {t.prompt for t in other}
            params = [{(t.kind.removesuffix(ANY), t.params) for t in s} for s in (one, other)]
            assert not params[0] & params[1]
    assert not set(PEOPLE["train"]) & set(PEOPLE["heldout"])
    for kind in PROBLEMS:
        assert not set(WORDINGS[kind, "train"]) & set(WORDINGS[kind, "heldout"])


@pytest.mark.parametrize("split", ["train", "heldout"])
def test_capacity_is_real(split):
    prompts = {task.prompt for task in embedded.tasks(3, split, embedded.CAPACITY[split], True)}
    assert len(prompts) == embedded.CAPACITY[split]


@pytest.mark.parametrize("kind", PROBLEMS)
def test_every_problem_has_six_right_wordings_of_other_form_and_length(kind):
    assert set(RESPONSES) == set(PROBLEMS) and len(RESPONSES[kind]) >= 8
    for i in range(50):
        problem = draw(random.Random(f"{kind}/{i}"), kind, "train", clear=True)
        responses = [respond(wording, problem) for wording in RESPONSES[kind]]
        assert len(set(responses)) == len(responses)
        bare = {" ".join(r.casefold().split()) for r in responses}  # spaces and capitals aside
        assert len(bare) >= 6
        sizes = sorted(len(r.split()) for r in responses)
        assert sizes[-1] >= 2 * sizes[0] and len(set(sizes)) >= 4, sizes
    assert all(fields_in(wording) & set(STATE) for wording in RESPONSES[kind])


def fields_in(wording):
    return {name for _, name, _, _ in string.Formatter().parse(wording) if name}


def test_the_wordings_are_drawn_evenly(monkeypatch):
    """Each stands in its share of the rows, within five standard errors."""
    monkeypatch.setattr(embedded, "respond", lambda wording, problem: wording)
    drawn = [
        (task.kind.removesuffix(ANY), task.response)
        for task in embedded.tasks(0, "train", 4000, True)
    ]
    counts, kinds = Counter(drawn), [kind for kind, _ in drawn]
    for kind in PROBLEMS:
        n, share = kinds.count(kind), 1 / len(RESPONSES[kind])
        error = math.sqrt(n * share * (1 - share))
        assert all(abs(counts[kind, w] - n * share) < 5 * error for w in RESPONSES[kind])


def test_no_answer_is_given_by_the_prompt():
    """Or who only repeats it could be right."""
    for row in (*TRAIN, *HELDOUT):
        final, known = row["answer"]["final"], row["answer"]["known"]
        assert final not in known and final.split(" ")[0] not in known
        assert not check(row["kind"], row["answer"], row["messages"][0]["content"]) or (
            "Its order number is" in row["messages"][0]["content"]
        )


def test_both_sets_ask_the_same():
    """Most prompts of the two sets are the same ones; the others had an answer of their own."""
    plain = {row["id"]: row["messages"][0]["content"] for row in make_rows(0, "train", 4000)}
    same = sum(plain[row["id"]] == row["messages"][0]["content"] for row in TRAIN)
    assert 0.9 < same / len(TRAIN) < 1


def test_the_two_conventions_are_not_mixed_up():
    assert KINDS == (*PROBLEMS, *(kind + ANY for kind in PROBLEMS))
    with pytest.raises(InputError, match="kind arithmetic-any: answer: is '47 pens'"):
        check("arithmetic-any", "47 pens", "47 pens")
    assert not check("arithmetic", {"final": "47 pens", "known": []}, "Answer: 47 pens")
    with pytest.raises(InputError, match="unknown task kind 'riddles-any'"):
        check("riddles-any", {"final": "1", "known": []}, "1")


def test_command_writes_both_files(tmp_path):
    embedded.main([str(tmp_path), "--wordings", "--train", "30", "--heldout", "20", "--seed", "3"])
    for split, count in (("train", 30), ("heldout", 20)):
        lines = (tmp_path / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()
        assert [json.loads(line) for line in lines] == make_rows(3, split, count, True)
