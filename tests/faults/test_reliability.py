"""The page of the fault matrix: each test it names is there, each named by an id says why."""

from pathlib import Path

import pytest
import reliability

RESULTS = """<testsuites><testsuite>
<testcase classname="tests.data.test_pairs" name="test_equal_distances_weigh_one"/>
<testcase classname="tests.test_faults_kill" name="test_T2_sigkill_at_every_write_point[kill]"/>
<testcase classname="tests.test_faults_kill" name="test_T2_sigkill_at_every_write_point[torn]">
<failure/></testcase>
</testsuite></testsuites>"""


def test_named_tests_exist() -> None:
    for proofs in reliability.ELSEWHERE.values():
        for name in proofs:
            file, test = name.split("::")
            (path,) = reliability.ROOT.glob(f"tests/*/{file}")
            assert f"def {test}(" in path.read_text(encoding="utf-8"), name


@pytest.mark.parametrize(
    "path",
    sorted(reliability.ROOT.glob("tests/faults/test_faults_*.py")),
    ids=lambda path: path.name,
)
def test_every_row_says_what_is_done_and_expected(path: Path) -> None:
    rows = reliability.described(path)
    assert rows and all(done and expected for _, done, expected in rows.values())


def test_every_row_of_the_matrix_has_a_proof() -> None:
    """D1 to D12, M1 to M11, C1 to C3, T1 to T22, G1 to G6, X1 to X3."""
    counts = {"D": 12, "M": 11, "C": 3, "T": 22, "G": 6, "X": 3}
    proved = set(reliability.ELSEWHERE)
    for path in reliability.ROOT.glob("tests/faults/test_faults_*.py"):
        proved |= {id_ for id_, _, _ in reliability.described(path).values()}
    assert proved == {f"{kind}{n}" for kind, count in counts.items() for n in range(1, count + 1)}


def test_table(tmp_path: Path) -> None:
    (tmp_path / "results.xml").write_text(RESULTS)
    text = reliability.table([str(tmp_path / "results.xml")])
    assert "| T13 | All distances are equal. | weights 1 | 1 passed |" in text
    (line,) = [line for line in text.splitlines() if "test_T2_sigkill_at_every_write_point" in line]
    assert "| 1 failed, 1 passed |" in line and line.startswith("| T2 | SIGKILL right before, or")
