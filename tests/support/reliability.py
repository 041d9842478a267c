"""Makes docs/reliability.md from the tests' results.

    python tests/support/reliability.py RESULTS.xml [...]

The files are of pytest --junitxml.

--files prints the test files that it is made of instead.

A row of the fault matrix is a test called test_ID_what; its docstring says what is done and, after
"Expected:", what must come of it. Rows that an ordinary test proves are named in ELSEWHERE. What
was seen is read from the results.
"""

import ast
import re
import sys
import xml.etree.ElementTree as ET
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
OUTPUT = ROOT / "docs/reliability.md"
NAMED = re.compile(r"test_([DMCTGX]\d+)_")
ELSEWHERE: dict[str, dict[str, tuple[str, str]]] = {
    "T11": {
        "test_partial_rows.py::test_a_killed_stage_is_gone_on_with": (
            "Reference, distances, judged, evaluation and agreement killed after their first, a "
            "middle and their last write but one; the last line torn; the writing rank gone.",
            "only missing rows are computed; files bit-identical",
        ),
        "test_reward.py::test_a_killed_stage_is_gone_on_with": (
            "The same for rewards.",
            "only missing rows are computed; files bit-identical",
        ),
    },
    "T13": {
        "test_pairs.py::test_zero_distances_weigh_one_with_a_warning": (
            "All distances are 0.",
            "weights 1, a warning",
        ),
        "test_pairs.py::test_equal_distances_weigh_one": (
            "All distances are equal.",
            "weights 1",
        ),
        "test_pairs.py::test_a_clip_lowers_the_largest_and_leaves_the_rest": (
            "A distance far above the others, with weight_clip.",
            "the weight is lowered, and counted",
        ),
        "test_guide.py::test_a_distance_that_is_not_finite_names_its_row": (
            "A distance is NaN.",
            "exit 4, the row named",
        ),
    },
    "T14": {
        "test_policy.py::test_all_weights_one_is_spin_bit_for_bit": (
            "All weights are 1.",
            "SPIN's policy, to the bit",
        ),
    },
    "T17": {
        "test_policy.py::test_trajectory_does_not_depend_on_micro_batches": (
            "50 steps in micro-batches of one pair and of all.",
            "losses within 1e-4, mean drift 1e-5",
        ),
        "test_policy.py::test_checkpointing_changes_nothing": (
            "Blocks recomputed in the backward.",
            "the same loss, gradients within 1e-6",
        ),
        "test_distributed.py::test_same_trajectory_as_one_rank": (
            "2 and 4 ranks, sharded and in copies.",
            "losses within 1e-4, mean drift 1e-5",
        ),
    },
    "G1": {
        "test_toy_run.py::test_records": (
            "Responses that reach the token limit.",
            "`finish_reason: length`, and no end token at their end",
        ),
    },
    "G2": {
        "test_pairs.py::test_with_losers_and_usable": (
            "An empty loser, and one equal to the winner.",
            "dropped",
        ),
    },
    "G3": {
        "test_generate.py::test_same_tokens_whatever_batch_and_order": (
            "Other batch sizes and orders, greedy and sampled.",
            "the same tokens",
        ),
        "test_engine.py::test_bits_do_not_depend_on_company": (
            "A row alone and in company.",
            "the same bits",
        ),
        "test_toy_run.py::test_two_ranks_are_one_rank": ("Two ranks.", "the same responses"),
    },
    "G4": {
        "test_answers.py::test_a_killed_run_is_gone_on_with": (
            "Killed after 0 to 22 of 23 rows; the last line torn.",
            "only missing rows are made, to the bit",
        ),
    },
    "G5": {
        "test_toy_run.py::test_a_changed_setting_is_refused_by_name": (
            "Another policy, seed, data or sampling.",
            "exit 2, the key with its old and new value",
        ),
        "test_answers.py::test_bad_losers": (
            "Losers whose prompt was rendered by another template.",
            "exit 2, file, line and first differing token",
        ),
    },
    "G6": {
        "test_engine.py::test_memory_stays_in_its_budget": (
            "A cache too small for all rows.",
            "fewer rows at a time, the same answers",
        ),
        "test_engine.py::test_a_prompt_that_fills_the_context": (
            "A prompt that fills the context.",
            "an answer of 0 or 1",
        ),
        "test_answers.py::test_ranks_take_chunks_and_take_over": (
            "A rank that gets no rows.",
            "nobody waits for it",
        ),
    },
    "X2": {
        "test_benchmarks.py::test_what_is_missing_is_named": (
            "A benchmark's file or the hub is not there, or its name is unknown.",
            "one line that names the task",
        ),
        "test_benchmarks.py::test_finished_tasks_are_kept_when_a_later_one_fails": (
            "The second of two tasks fails.",
            "the first is kept, and not run again",
        ),
    },
    "X1": {
        "test_export.py::test_tiny_mistral_export_runs_in_transformers": (
            "Export, reload in transformers.",
            "equal tensors, ids and greedy text",
        ),
        "test_export.py::test_both_stop_at_every_declared_end": (
            "Several end tokens.",
            "both stop at each",
        ),
    },
}
HEAD = """# Reliability

Every row of the fault matrix as a test: what is done, what is expected, what was seen. Made by
`make reliability` from the tests themselves (`tests/faults/test_faults_*.py`, and the ordinary
tests that prove a row) and their last results. The tests at every write point are 16 parts of each
kind (hours in all): where fewer were seen, the others were not run.
Not tried: an export in vLLM (a part of X1), ranks on several hosts, NCCL.
"""


def described(path: Path) -> dict[str, tuple[str, str, str]]:
    """{test: (id, what is done, expected)} of a file's tests that are named by an id."""
    found = {}
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        match = NAMED.match(node.name) if isinstance(node, ast.FunctionDef) else None
        if match and isinstance(node, ast.FunctionDef):
            done, _, expected = " ".join((ast.get_docstring(node) or "").split()).partition(
                "Expected: "
            )
            found[f"{path.name}::{node.name}"] = (match[1], done.strip(), expected)
    return found


def results(paths: list[str]) -> dict[str, Counter[str]]:
    """{file.py::test: how often passed, failed, skipped} over all parameters."""
    counts: dict[str, Counter[str]] = {}
    for path in paths:
        for case in ET.parse(path).iter("testcase"):
            module = case.get("classname", "").split(".")[-1]
            name = f"{module}.py::{case.get('name', '').split('[')[0]}"
            kinds = {child.tag for child in case}
            outcome = (
                "failed"
                if kinds & {"failure", "error"}
                else "skipped"
                if "skipped" in kinds
                else "passed"
            )
            counts.setdefault(name, Counter())[outcome] += 1
    return counts


def table(paths: list[str]) -> str:
    """The page."""
    tests = {
        name: row
        for path in sorted(ROOT.glob("tests/faults/test_faults_*.py"))
        for name, row in described(path).items()
    }
    for id_, proofs in ELSEWHERE.items():
        tests |= {name: (id_, *texts) for name, texts in proofs.items()}
    seen = results(paths)
    rows = sorted(
        tests.items(), key=lambda row: ("DMCTGX".index(row[1][0][0]), int(row[1][0][1:]), row[0])
    )
    lines = ["| id | what is done | expected | seen | test |", "|---|---|---|---|---|"]
    for name, (id_, done, expected) in rows:
        counts = (
            ", ".join(f"{n} {kind}" for kind, n in sorted(seen.get(name, Counter()).items()))
            or "not run"
        )
        cells = [cell.replace("|", "\\|") for cell in (id_, done, expected, counts, f"`{name}`")]
        lines.append(f"| {' | '.join(cells)} |")
    return f"{HEAD}\n" + "\n".join(lines) + "\n"


if __name__ == "__main__":
    if sys.argv[1:] == ["--files"]:
        files = {name.split("::")[0] for proofs in ELSEWHERE.values() for name in proofs}
        paths = [next(ROOT.glob(f"tests/*/{name}")) for name in files]
        paths += ROOT.glob("tests/faults/test_faults_*.py")
        print(*sorted({str(path.relative_to(ROOT)) for path in paths}))
    else:
        OUTPUT.write_text(table(sys.argv[1:]), encoding="utf-8")
