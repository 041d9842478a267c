"""Steps of decoding as CUDA graphs, without CUDA: captured under a watch, replayed on the CPU.

`fake_graphs.FakeGraphs` stands for the GPU, so that the engine runs in its GPU form. The oracle is
the engine in its other form over the same modules.
"""

import contextlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from fake_graphs import FakeGraphs, HostRead
from torch import Tensor

from ldalign.generation import graphs
from ldalign.generation.decoders import ModuleDecoder
from ldalign.generation.engine import Engine, Request
from ldalign.generation.graphs import CudaGraphs
from ldalign.generation.sampling import Response, Sampling
from ldalign.generation.standing import SIZES, StandingSteps
from ldalign.models.mistral import Mistral
from ldalign.system.memory import OutOfMemory, is_out_of_memory

pytestmark = pytest.mark.gpu_check

EAGER = pytest.mark.usefixtures("eager")


@pytest.fixture
def eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """A backend whose every operation the watch sees; C++ reads what it likes."""
    monkeypatch.setenv("LDALIGN_BACKEND", "eager")


def model() -> Mistral:
    model = tiny.mistral()
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim > 1:
                p.mul_(5.0)
    return model


def engine(
    fake: FakeGraphs | None,
    sampling: Sampling,
    rows: int = 4,
    ends: Sequence[int] = (),
    **more: Any,
) -> Engine:
    decoder = ModuleDecoder(model(), None if fake is None else lambda: fake)
    return Engine(decoder, sampling, ends, 0, longest=70, rows=rows, decode=text, **more)


def text(ids: list[int]) -> str:
    return "".join(chr(97 + i % 26) for i in ids)


def run(engine: Engine, requests: Sequence[Request]) -> list[Response]:
    done = {request.index: response for request, response in engine.run(requests)}
    return [done[i] for i in range(len(requests))]


def requests(rows: int, longest: int = 40) -> list[Request]:
    prompts = [[5], *tiny.prompts(rows - 1, longest=longest)]
    return [Request(f"row{i}", prompt, i) for i, prompt in enumerate(prompts)]


@EAGER
@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(15),
        Sampling(15, temperature=0.0),
        Sampling(15, temperature=0.8, top_k=20, top_p=0.9, min_p=0.01),
        Sampling(15, repetition_penalty=1.3),
        Sampling(15, stop=("ab", "q", "never said")),
        Sampling(1),
    ],
    ids=["sampled", "greedy", "cuts", "penalty", "stop strings", "one token"],
)
@pytest.mark.parametrize("rows", [3, 20])
def test_graphs_give_the_tokens_of_the_plain_path(rows: int, sampling: Sampling) -> None:
    """Ragged prompts, rows that enter and leave, ends by id, by string and by length."""
    fake, asked = FakeGraphs(), requests(14 + rows // 2)
    ends = [] if sampling.stop else list(range(3, 9))
    plain = run(engine(None, sampling, rows, ends), asked)
    ours = run(engine(fake, sampling, rows, ends), asked)
    assert [(r.ids, r.finish_reason) for r in ours] == [(r.ids, r.finish_reason) for r in plain]
    assert [r.logp for r in ours] == pytest.approx([r.logp for r in plain], abs=1e-4)
    if sampling.max_new_tokens > 1:
        assert len({len(r.ids) for r in ours}) > 3 and fake.replays > 12
        assert {r.finish_reason for r in ours} == {"stop", "length"}


@EAGER
def test_prompts_computed_in_pieces_among_rows_under_way() -> None:
    asked = requests(9)
    plain = run(engine(None, Sampling(20), 5, [3, 4]), asked)
    for tokens in (7, 30):
        ours = run(engine(FakeGraphs(), Sampling(20), 5, [3, 4], step_tokens=tokens), asked)
        assert [r.ids for r in ours] == [r.ids for r in plain]


def test_an_engine_runs_again_after_it_was_left_with_a_step_on_its_way() -> None:
    """The last row of a run ends by an id, and a step with it has begun."""
    fake, asked = FakeGraphs(), requests(6)
    twice = engine(fake, Sampling(25), 6, list(range(3, 30)))
    first = run(twice, asked)
    assert any(r.finish_reason == "stop" for r in first)
    assert run(twice, asked) == first


@pytest.mark.parametrize(
    "read",
    [
        lambda x: x.sum().item(),
        lambda x: x.tolist(),
        lambda x: x.cpu(),
        lambda x: bool((x > 0).all()),
        lambda x: int(x[0]),
        lambda x: float(x[0]),
        lambda x: x.numpy(),
        lambda x: x[x > 0],
        lambda x: x.nonzero(),
        lambda x: x.unique(),
        lambda x: torch.tensor([1.0]) + x,
        lambda x: x.repeat_interleave(torch.ones(len(x), dtype=torch.int64)),
        lambda x: x.unique_consecutive(),
    ],
)
def test_the_watch_sees_host_reads(read: Callable[[Tensor], object]) -> None:
    fake, x = FakeGraphs(), torch.ones(3)
    with pytest.raises(HostRead):
        fake.capture(lambda: (read(x), None)[1])
    fake.capture(lambda: x.add_(1)[0].mul_(2))  # type: ignore[arg-type, return-value]


@EAGER
def test_a_host_read_in_a_step_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The watch is on where the engine captures."""
    decode = ModuleDecoder.decode

    def reading(self: ModuleDecoder, ids: Tensor, held: Tensor, pages: Tensor) -> Tensor:
        assert held.max() >= 0
        return decode(self, ids, held, pages)

    monkeypatch.setattr(ModuleDecoder, "decode", reading)
    with pytest.raises(HostRead):
        run(engine(FakeGraphs(), Sampling(9)), requests(2))


@pytest.mark.parametrize("rows", [1, 5, 64, 100, 256, 300])
def test_numbers_of_rows_that_have_a_graph(rows: int) -> None:
    """Twelve at most; captured once, the largest first, whatever is asked for."""
    captured: list[int] = []

    class Noting(FakeGraphs):
        def capture(self, work: Any) -> Callable[[], None]:
            captured.append(work.args[0])
            return lambda: None

    decoder = ModuleDecoder(model(), Noting)
    decoder.allocate(3, 40)
    steps = StandingSteps(decoder, Sampling(9), rows, 40, 3)
    for n in (min(3, rows), rows, 1, *range(1, rows + 1)):
        assert steps.ready(n)
        assert captured == sorted(captured, reverse=True) and captured[0] == rows
    assert captured == [rows, *(s for s in reversed(SIZES) if s < rows)] and len(captured) <= 12
    assert not steps.ready(rows + 1)


class Watched(FakeGraphs):
    """Notes what happens in which order."""

    def __init__(self) -> None:
        super().__init__()
        self.events: list[str] = []

    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        replay = super().capture(work)
        return lambda: (self.events.append("begin"), replay())[1]

    def upload(self, x: np.ndarray) -> Tensor:
        self.events.append("upload")
        return super().upload(x)

    def download(self, x: Tensor) -> Callable[[], np.ndarray]:
        wait = super().download(x)
        return lambda: (self.events.append("read"), wait())[1]


def test_one_copy_a_step_and_one_step_ahead() -> None:
    """Four rows of 20 tokens: the first is the prompts', then 19 steps, each begun before the one
    before it is read; the host sends something once.
    """
    watched = Watched()
    run(engine(watched, Sampling(20)), requests(4))
    assert watched.events == ["upload", "begin", *["begin", "read"] * 18, "read"]
    assert watched.captures == 1 and watched.downloads == 19


def test_a_row_that_leaves_is_one_small_copy() -> None:
    """Its place is left out: the places are sent, and no line of another row."""
    sizes = []

    class Measured(FakeGraphs):
        def upload(self, x: np.ndarray) -> Tensor:
            sizes.append(len(x))
            return super().upload(x)

    fake = Measured()
    made = engine(fake, Sampling(25), 4, [4, 5, 6, 7, 8, 9])
    done = run(made, requests(4))
    assert len({len(r.ids) for r in done}) == 4
    # The place of rows that are not there stays at its first token.
    assert made.standing is not None and made.standing.held[made.standing.spare] == 0
    line = 2 + 70 + 25 + 5
    assert sizes[0] == 4 + 4 + 4 * line and sizes[1:] and all(size <= 4 for size in sizes[1:])


def test_rows_enter_together() -> None:
    """Of 18 places two are empty before others enter; without graphs one."""
    asked = requests(50, longest=10)
    for fake, least in ((FakeGraphs(), 2), (None, 1)):
        made = engine(fake, Sampling(25), 18, [4, 5, 6], step_tokens=1000)
        entered = [0]  # rows, before each step
        for _ in made.run(asked, lambda *_: entered.append(made._clock)):  # noqa: B023
            pass
        entries = np.diff(entered)
        groups = [n for n in entries[1:] if n]
        assert sum(entries) == 50 and entries[0] == 18
        assert min(groups[:-1]) == least and len(groups) > 5


def test_few_pages_do_not_keep_rows_out() -> None:
    """Room for three rows in sixteen places: the next enters as one leaves."""
    asked = requests(12)
    decoder = ModuleDecoder(model(), FakeGraphs)
    tight = Engine(
        decoder, Sampling(9), [], 0, longest=70, rows=16, cache_bytes=15 * decoder.page_bytes()
    )
    plain = run(engine(None, Sampling(9), 16), asked)
    assert [r.ids for r in run(tight, asked)] == [r.ids for r in plain]


@EAGER
@pytest.mark.parametrize(
    "failing", [{1}, {2, 3}, set(range(1, 99))], ids=["largest", "some", "all"]
)
def test_no_memory_for_a_graph(failing: set[int], caplog: pytest.LogCaptureFixture) -> None:
    """Steps of as many rows are done without; said once for each, and the tokens are the same."""
    fake, asked = FakeGraphs(lambda captures: captures in failing), requests(20)
    plain = run(engine(None, Sampling(25), 9, [3, 4, 5]), asked)
    ours = run(engine(fake, Sampling(25), 9, [3, 4, 5]), asked)
    assert [r.ids for r in ours] == [r.ids for r in plain]
    told = [r.message for r in caplog.records if "no memory for a CUDA graph" in r.message]
    assert len(told) == min(len(failing), fake.captures) and fake.captures <= 5
    assert (fake.replays > 0) == (len(failing) < 5)


def test_other_errors_in_a_capture_are_not_held_back() -> None:
    class Broken(FakeGraphs):
        def capture(self, work: Callable[[], None]) -> Callable[[], None]:
            raise RuntimeError("a bug")

    with pytest.raises(RuntimeError, match="a bug"):
        run(engine(Broken(), Sampling(9)), requests(2))


def test_what_is_out_of_memory() -> None:
    def after(first: Exception, then: Exception) -> Exception:
        try:
            try:
                raise first
            finally:
                raise then
        except Exception as error:
            return error

    memory, bug = torch.OutOfMemoryError("CUDA out of memory"), ValueError("a bug")
    broken = "CUDA error: operation failed due to a previous error during capture"
    assert is_out_of_memory(memory) and is_out_of_memory(MemoryError())
    assert is_out_of_memory(RuntimeError("CUDA error: out of memory\nCUDA kernel errors might ..."))
    assert is_out_of_memory(after(memory, RuntimeError(broken)))
    assert not is_out_of_memory(after(bug, RuntimeError(broken)))
    assert not is_out_of_memory(RuntimeError(broken))
    assert not is_out_of_memory(after(memory, RuntimeError("another bug")))
    assert not is_out_of_memory(after(memory, OutOfMemory("named; captured")))


def test_cuda_graphs_share_pool_and_stream_on_their_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """The calls that are made of torch.cuda; what they do only a GPU can show."""
    calls: list[str] = []
    number = itertools.count()

    @contextlib.contextmanager
    def on(device: torch.device) -> Iterator[None]:
        calls.append(f"on {device}")
        yield
        calls.append("off")

    @contextlib.contextmanager
    def using(stream: "Stream") -> Iterator[None]:
        calls.append(f"use {stream.name}")
        yield

    @contextlib.contextmanager
    def capturing(
        graph: "Graph", pool: object, stream: "Stream", capture_error_mode: str
    ) -> Iterator[None]:
        assert capture_error_mode == "thread_local"  # other threads may ask the device meanwhile
        calls.append(f"capture {graph.name} in {pool} on {stream.name}")
        yield

    class Stream:
        def __init__(self, name: str | None = None) -> None:
            self.name = name or f"stream {next(number)}"

        def wait_stream(self, other: "Stream") -> None:
            calls.append(f"{self.name} waits for {other.name}")

    class Graph:
        def __init__(self) -> None:
            self.name = f"graph {next(number)}"

        def replay(self) -> None:
            calls.append(f"replay {self.name}")

    current = Stream("current")
    for name, value in {
        "device": on,
        "stream": using,
        "graph": capturing,
        "Stream": Stream,
        "CUDAGraph": Graph,
        "graph_pool_handle": lambda: f"pool {next(number)}",
        "current_stream": lambda: current,
        "set_stream": lambda stream: calls.append(f"back to {stream.name}"),
    }.items():
        monkeypatch.setattr(graphs.torch.cuda, name, value)
    ours = CudaGraphs(torch.device("cuda:1"))
    replays = [ours.capture(lambda: calls.append("work")) for _ in range(2)]
    replays[0]()
    assert calls == [
        *("on cuda:1", "off"),
        *(
            call
            for n in (2, 3)
            for call in (
                "on cuda:1",
                "stream 0 waits for current",
                "use stream 0",
                "work",
                f"capture graph {n} in pool 1 on stream 0",
                "work",
                "back to current",
                "current waits for stream 0",
                "off",
            )
        ),
        *("on cuda:1", "replay graph 2", "off"),
    ]


@pytest.mark.gpu
@pytest.mark.parametrize("sampling", [Sampling(9), Sampling(9, 0.8, 0, 0.9, 0.0, 1.2)])
def test_graphs_on_a_gpu_give_what_plain_steps_give(sampling: Sampling) -> None:
    """Ids but for a draw within rounding, which these do not meet; float32, rows of uneven lengths
    that enter and leave.
    """
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    device = torch.device("cuda")
    found = []
    for captured in (True, False):
        decoder = ModuleDecoder(model().to(device))
        assert decoder.graphed is decoder
        decoder.captured = captured
        engine = Engine(decoder, sampling, [2], 0, longest=40, rows=4, cache_bytes=2**24)
        rows = [Request(str(i), list(range(3, 5 + 3 * i)), i) for i in range(9)]
        found.append({r.index: response.ids for r, response in engine.run(rows)})
    assert found[0] == found[1] and len(found[0]) == 9
