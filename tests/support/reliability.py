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
    "C3": {
        "test_strangers.py::test_a_damaged_file_is_named": (
            "A report of a stranger's run: a file that it reads is cut, changed, gone, a folder, a "
            "link out, not UTF-8, huge, of another kind, or a bomb of YAML's anchors.",
            "one line with the file's name, exit code 2; nothing outside is read or written",
        ),
        "test_strangers.py::test_what_no_report_reads_may_be_anything": (
            "A file of a run that no report reads holds anything at all.",
            "the report as before",
        ),
        "test_strangers.py::test_a_damaged_comparison_is_named": (
            "The numbers of a comparison are damaged.",
            "one line with the file's name, exit code 2",
        ),
        "test_names.py::test_a_name_is_plain_text_in_a_table": (
            "A name in a table holds markup, a formula or a border of the table.",
            "plain text",
        ),
        "test_names.py::test_a_name_is_plain_text_in_a_drawing": (
            "A name in a drawing holds markup or a formula.",
            "plain text",
        ),
    },
    "M10": {
        "test_tokenizer_growth.py::test_a_bomb_is_refused": (
            "A chain of steps in tokenizer.json makes a text longer until the process ends.",
            "one line with the file's name, before the library has it",
        ),
        "test_tokenizer_growth.py::test_ordinary_ones_pass": (
            "Tokenizers with the longest chains that are in use.",
            "taken",
        ),
    },
    "T4": {
        "test_exits.py::test_a_rank_ends_with_its_launcher": (
            "What launched a rank, torchrun or `--ranks`, is killed by SIGKILL, also while it "
            "starts.",
            "it stops as after SIGTERM; a rank that was started in another way goes on",
        ),
    },
    "T6": {
        "test_exits.py::test_what_the_machine_refuses_is_no_bug": (
            "A file system is stale, times out, fails or forbids; Python or torch gets no memory: "
            "wherever that shows.",
            "one line, exit code 3",
        ),
    },
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
    "T19": {
        "test_policy.py::test_step_0_is_judged_in_nats_whatever_beta_is": (
            "The first step's log-probs are off from the cached reference's by what bfloat16 "
            "rounds, and one or two of them by more, at beta 0.1 and 5.",
            "rounding passes; more is refused with row and nats, also where the mean loss hides it",
        ),
    },
    "T20": {
        "test_nodes.py::test_nodes_that_differ_are_refused": (
            "Two torchruns: the second has another learning rate, another policy at the same path, "
            "or an old copy of the run folder.",
            "one line on each that names rank, host and key; nothing is made",
        ),
        "test_nodes.py::test_a_stages_inputs_are_compared": (
            "A rank's files of a stage change while the run is under way.",
            "refused before the stage is made, with stage, rank, host and key",
        ),
        "test_nodes.py::test_a_given_guide_is_compared": (
            "A rank finds another guide in the folder that is given.",
            "refused before anything is made, with rank, host and folder",
        ),
    },
    "T21": {
        "test_distributed.py::test_a_stop_while_ranks_wait_for_others": (
            "SIGTERM, and Ctrl-C, to a rank that waits for another to join.",
            "exit 143 and 130 at once",
        ),
        "test_nodes.py::test_torchrun_restarts_ranks_that_die": (
            "`torchrun --max-restarts` on one host, and two of them: a rank dies in each of the "
            "first four starts.",
            "all ranks start again, and the fifth ends well",
        ),
        "test_ranks.py::test_no_start_meets_what_an_earlier_one_left": (
            "20 starts of three ranks on one store, of which some lack a rank.",
            "the ranks of each start meet, and see nothing of another",
        ),
    },
    "T22": {
        "test_durable.py::test_no_sync_can_be_left_out": (
            "The same with one sync left out: of a file, of a folder, of the folder of a new name.",
            "it is seen",
        ),
        "test_checkpoint.py::test_what_is_written_is_read_back": (
            "The disk keeps another value of a checkpoint than was written.",
            "exit 3; it gets no name, and the checkpoint before it stays",
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
            "only missing rows are made: with the C++ decoder to the bit, else the same tokens",
        ),
        "test_answers.py::test_other_ranks_may_go_on": (
            "Three ranks are killed, one rank goes on.",
            "only missing rows are made, the same answers",
        ),
        "test_partial_rows.py::test_a_part_cut_at_any_byte_holds_whole_rows": (
            "The file of rows that are done ends at any byte, or in zeros.",
            "whole lines count, nothing else",
        ),
        "test_partial_rows.py::test_a_flipped_bit_costs_its_row_alone": (
            "Any bit of a row that is done is another.",
            "that row is made again, which is said",
        ),
        "test_answers.py::test_rows_that_the_disk_has_lost_are_no_answers": (
            "Rows that were made cannot be read back at the end.",
            "exit 3, one line with both numbers; also without assertions (python -O)",
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
        "test_answers.py::test_a_rank_may_get_no_rows": (
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
    "X3": {
        "test_endpoint.py::test_what_is_no_answer_is_asked_again": (
            "A judge's endpoint sends what is no answer: no JSON, no text, no UTF-8, packed, over "
            "1 MiB, no HTTP.",
            "asked again, then one line with the URL; what was answered is kept",
        ),
        "test_endpoint.py::test_an_answer_without_end_is_not_read_to_its_end": (
            "Its answer has no end.",
            "no more than 1 MiB is read",
        ),
        "test_endpoint.py::test_an_answer_that_drips_is_not_waited_for": (
            "Its answer comes byte by byte, each in time.",
            "one line, when the time of the whole is over",
        ),
        "test_endpoint.py::test_a_redirect_is_not_followed": (
            "It sends us to another address.",
            "one line; neither key nor question goes there",
        ),
        "test_endpoint.py::test_usage_that_is_no_count_does_not_loosen_the_cap": (
            "It counts tokens as negative, NaN, text, or not at all.",
            "the cap ends the run as if it had counted 3 bytes for one",
        ),
        "test_endpoint.py::test_a_request_to_stop_waits_for_no_answer": (
            "SIGTERM, and Ctrl-C, while it answers nothing.",
            "exit 143 and 130 at once; what was answered is kept",
        ),
    },
}
HEAD = """# Reliability

Every row of the fault matrix as a test: what is done, what is expected, what was seen. Made by
`make reliability` from the tests themselves (`tests/faults/test_faults_*.py`, and the ordinary
tests that prove a row) and their last results. The tests at every write point are 16 parts of each
kind (hours in all): where fewer were seen, the others were not run.
What two nodes said to each fault of T20 and T21: [results/node-faults.md](results/node-faults.md).
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
    """{file.py::test: how often passed, failed, skipped} over all parameters; of what is in several
    files, as the last of them has it.
    """
    found: dict[tuple[str, str], str] = {}
    for path in paths:
        for case in ET.parse(path).iter("testcase"):
            module, name = case.get("classname", "").split(".")[-1], case.get("name", "")
            kinds = {child.tag for child in case}
            found[module, name] = (
                "failed"
                if kinds & {"failure", "error"}
                else "skipped"
                if "skipped" in kinds
                else "passed"
            )
    counts: dict[str, Counter[str]] = {}
    for (module, name), outcome in found.items():
        counts.setdefault(f"{module}.py::{name.split('[')[0]}", Counter())[outcome] += 1
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
