"""Faults on one of two nodes (tests/support/node_faults.py): five of them, and with --long all."""

import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import node_faults
import pytest
from node_faults import FAULTS, Proof, judged
from nodes import LATE, Ended, start_nodes

SHORT = (
    "another config file at the same path",
    "sees another token in the held-out rows",
    "plain PyTorch instead of the C++ kernels",
    "SIGKILL to its rank, in the alignment",
    "its disk is full in the middle",
)
BY_NAME = {fault.name: fault for fault in FAULTS}


@pytest.fixture(scope="module")
def proof(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Proof]:
    if shutil.which("cc") is None:
        pytest.skip("no C compiler for the failing file layer")
    folder = tmp_path_factory.mktemp("nodes")
    driver = start_nodes(folder)
    yield Proof(driver, folder)
    driver.close()


@pytest.mark.slow
@pytest.mark.parametrize("name", SHORT)
def test_T20_faults_on_one_of_two_nodes(name: str, proof: Proof) -> None:
    """Two torchruns: the second has another config file, sees another token than is there, has no
    C++ kernels, loses its rank, or has a full disk.

    Expected: an error on both that names what is wrong; started again without the fault, the
    undisturbed files to the bit.
    """
    seen = proof.try_out(BY_NAME[name])
    assert seen.good, seen
    assert seen.verdict == "refused" and 0 not in seen.codes


@pytest.mark.long
@pytest.mark.parametrize("name", sorted(BY_NAME.keys() - set(SHORT)))
def test_T20_every_fault_on_one_of_two_nodes(name: str, proof: Proof) -> None:
    """All other faults of docs/results/node-faults.md: settings, files, versions, views of the run
    folder, killed and stopped processes, cut connections, disks, ways to meet.

    Expected: the undisturbed files to the bit, or an error on both that names what is wrong.
    """
    seen = proof.try_out(BY_NAME[name])
    assert seen.good, seen


@pytest.mark.long
def test_T21_real_restarts(proof: Proof) -> None:
    """Three runs of two ranks by `torchrun --max-restarts`; a random rank is killed at a random
    moment of each.

    Expected: exit 0, the undisturbed files to the bit.
    """
    assert list(node_faults.restarts(proof, 3)) == ["equal"] * 3


def test_a_wrong_end_is_seen(tmp_path: Path) -> None:
    """What ended with 0 is compared, whoever else failed; what hangs or says nothing is no end."""
    (tmp_path / "model.safetensors").write_bytes(b"other")

    def expected(content: bytes = b"right") -> dict[str, bytes]:
        return {"model.safetensors": content}

    for codes in ([0, 0], [0, -9]):
        ended = Ended(codes, [[0], [0]], ["", ""])
        assert judged(ended, ["a line"], tmp_path, expected).startswith("WRONG: exit 0")
        assert judged(ended, [], tmp_path, partial(expected, b"other")) == "equal"
    assert judged(Ended([1, 1], [[2], [2]], []), ["a line"], tmp_path, expected) == "refused"
    assert judged(Ended([1, 1], [[2], [2]], []), [], tmp_path, expected) == "SAYS NOTHING"
    assert judged(Ended([1, LATE], [[2], []], []), ["a line"], tmp_path, expected) == "HANGS"


def test_the_page_has_every_fault() -> None:
    page = node_faults.PAGE.read_text(encoding="utf-8")
    rows = [line for line in page.splitlines() if line.startswith("| ")][1:]
    assert [row.split(" | ")[0].removeprefix("| ") for row in rows] == [f.name for f in FAULTS]
    assert len(FAULTS) >= 40 and len(BY_NAME) == len(FAULTS)
    assert "another result: **0**" in page
