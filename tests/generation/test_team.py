"""The threads of a decoding step: by themselves under a sanitizer, and with a model's layers."""

import os
import shutil
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import tiny
import torch

from ldalign.generation.decoders import PackedDecoder
from ldalign.generation.engine import Engine, Request
from ldalign.generation.sampling import Sampling
from ldalign.kernels import cpp
from ldalign.models.toy import random_mistral

ROOT = Path(__file__).resolve().parents[2]
CASES = ("chain", "sleeps", "late", "errors", "callers", "forks", "widths")

needs_cpp = pytest.mark.skipif(not cpp.available(), reason="no C++ backend")


@pytest.fixture(scope="module", params=["plain", "thread"])
def program(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """tests/support/team/cases.cpp, as it is and under ThreadSanitizer."""
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("needs a C++ compiler")
    out = tmp_path_factory.mktemp("team") / request.param
    flags = ["-fsanitize=thread"] if request.param == "thread" else []
    support = ROOT / "tests/support/team"
    sources = [support / "cases.cpp", ROOT / "csrc/team.cpp"]
    command = [compiler, "-std=c++17", "-O1", "-g", *flags, f"-I{support}", f"-I{ROOT / 'csrc'}"]
    done = subprocess.run(
        [*command, *map(str, sources), "-o", str(out), "-pthread"], capture_output=True, text=True
    )
    if flags and done.returncode and "tsan" in done.stderr:
        pytest.skip("the compiler has no ThreadSanitizer")
    assert done.returncode == 0, done.stderr
    return out


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("case", CASES)
def test_every_piece_once_and_in_order(program: Path, case: str, threads: int) -> None:
    if program.name == "thread" and case == "forks":
        pytest.skip("ThreadSanitizer follows no fork of several threads")
    # Some kernels lay out memory in a way that ThreadSanitizer refuses.
    same_layout = ["setarch", os.uname().machine, "-R"] if shutil.which("setarch") else []
    done = subprocess.run(
        [*same_layout, str(program), case, str(threads)],
        capture_output=True,
        text=True,
        timeout=300,
    )
    if "personality" in done.stderr or "unexpected memory mapping" in done.stderr:
        pytest.skip("this kernel does not let ThreadSanitizer run")
    assert done.returncode == 0, done.stderr
    assert done.stdout == "held\n" and not done.stderr


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def engine(rows: int = 5, new: int = 12) -> Engine:
    decoder = PackedDecoder(random_mistral(tiny.MISTRAL, 0))
    return Engine(decoder, Sampling(new), [], 0, longest=60, rows=rows)


def sampled(engine: Engine) -> list[tuple[list[int], float | None]]:
    """Rows of unlike lengths, one of them long enough for several runs of queries."""
    prompts = tiny.prompts(7, longest=45)
    requests = [Request(f"row{i}", prompt, i) for i, prompt in enumerate(prompts)]
    done = {request.index: response for request, response in engine.run(requests)}
    return [(list(map(int, done[i].ids)), done[i].logp) for i in range(len(requests))]


@needs_cpp
def test_bits_do_not_depend_on_the_threads(threads: None) -> None:
    results = []
    for count in (1, 2, 3, 7):
        torch.set_num_threads(count)
        results.append(sampled(engine()))
    assert results[1:] == results[:-1] and len({logp for _, logp in results[0]}) == 7


@needs_cpp
def test_two_engines_at_once(threads: None) -> None:
    """One has the team, the other works alone: both say what they say by themselves."""
    torch.set_num_threads(3)
    expected = sampled(engine())
    results: list[list[list[tuple[list[int], float | None]]]] = [[], []]

    def work(which: int) -> None:
        own = engine()
        for _ in range(5):
            results[which].append(sampled(own))

    both = [threading.Thread(target=work, args=(which,)) for which in range(2)]
    for thread in both:
        thread.start()
    for thread in both:
        thread.join()
    assert results == [[expected] * 5] * 2


@needs_cpp
def test_a_fork_has_threads_of_its_own(threads: None) -> None:
    torch.set_num_threads(3)
    own = engine()  # made before the fork: OpenMP, which packs the weights, does not outlive one
    expected = sampled(own)
    child = os.fork()
    if child == 0:
        os._exit(0 if sampled(own) == expected else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert sampled(own) == expected


@needs_cpp
def test_the_profiler_counts_a_part_once(threads: None) -> None:
    """Only the caller's time is counted, however many threads go through a part."""
    torch.set_num_threads(2)
    own = engine(rows=7, new=4)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        sampled(own)
    counts = {event.key: event.count for event in profile.key_averages()}
    steps = counts["ldalign_cpp::decode_layers"]
    layers = tiny.MISTRAL.num_hidden_layers
    assert counts["ldalign_cpp::decode_attention"] == counts["ldalign_cpp::decode_mlp"]
    assert (
        counts["ldalign_cpp::decode_mlp"] == counts["ldalign_cpp::decode_swiglu"] == steps * layers
    )
    assert counts["ldalign_cpp::decode_rms_norm"] == steps * (2 * layers + 1)
