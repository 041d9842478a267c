"""Made-up rows of every benchmark, in the format of local files."""

import random
from typing import Any

from lm_eval.api.instance import Instance

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


LONG = " ".join(f"word {i} of many," for i in range(150))  # more tokens than the model reads


SHARED = "Question: what is two and two?\nAnswer: four.\n\n" * 4


REQUESTS = [
    ("The quick brown fox", " jumps over"),
    ("The quick brown fox", " sleeps"),
    ("The quick brown fox", " jumps over the lazy dog and then it goes home again"),
    ("", "alone"),
    ("", "a longer text without anything before it"),
    ("trailing space ", "x"),
    ("Über naïve café", " 10 °C <|im_end|> and on"),
    (LONG, " the end"),
    (LONG, " another end that is longer than the first"),
    *(
        (f"{SHARED}Question: what is {i}?\nAnswer:", f" it is {j}")
        for i in range(6)
        for j in range(3)
    ),
    ("The quick brown fox", " sleeps"),  # once more
]


CONTEXTS = ["The quick brown fox", SHARED, "Say: ", LONG]


def instances(kind: str, arguments: list[Any]) -> list[Any]:
    return [
        Instance(request_type=kind, doc={}, arguments=a, idx=i) for i, a in enumerate(arguments)
    ]
