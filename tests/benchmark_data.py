"""Made-up rows of every benchmark, in the format of local files."""

import random
from typing import Any

TASKS = (
    "arc_challenge",
    "arc_easy",
    "gsm8k",
    "hellaswag",
    "mutual",
    "openbookqa",
    "piqa",
    "truthfulqa_mc1",
    "truthfulqa_mc2",
)
RIGHT = "the right one"


def make_row(task: str, i: int, draw: random.Random) -> dict[str, Any]:
    """A row in the local format whose right answers say so."""

    def texts(count: int, right: int) -> list[str]:
        return [
            f"{RIGHT} of {i}" if n == right else f"wrong {n} of number {i} or so"[: 14 + n]
            for n in range(count)
        ]

    if task == "piqa":
        right = draw.randrange(2)
        return {
            "goal": f"Goal {i}?",
            **dict(zip(("sol1", "sol2"), texts(2, right), strict=True)),
            "label": right,
        }
    if task == "gsm8k":
        return {"question": f"Number {i}?", "answer": f"It is <<{i}={i}>>{i}.\n#### {i}"}
    if task.startswith("truthfulqa"):
        true = [f"{RIGHT} {n} of {i}" for n in range(2)]
        false = [f"a wrong answer {n} of {i}" for n in range(3)]
        return {
            "question": f"Is it {i}?",
            "mc1_targets": {"choices": [true[0], *false], "labels": [1, 0, 0, 0]},
            "mc2_targets": {"choices": [*true, *false[:2]], "labels": [1, 1, 0, 0]},
        }
    right = draw.randrange(4)
    choices = texts(4, right)
    if task == "hellaswag":
        return {"query": f"Event {i}: somebody", "choices": choices, "label": right}
    if task == "mutual":
        return {"article": f"m : is it {i} ?", "options": choices, "answers": "ABCD"[right]}
    question = "question_stem" if task == "openbookqa" else "question"
    return {
        question: f"What is {i}?",
        "choices": {"text": choices, "label": list("ABCD")},
        "answerKey": "ABCD"[right],
    }


def file_of(task: str) -> str:
    """The name of its local file."""
    return "truthfulqa_mc.jsonl" if task.startswith("truthfulqa") else f"{task}.jsonl"
