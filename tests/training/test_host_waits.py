"""What the host waits for on a GPU, by a GPU that is not there (support/fake_gpu.py).

Each list names every place where the host may wait, how often, and why. A new wait fails here with
its line, and one that is gone has to leave its list.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import tiny
import tiny_guides
import torch
from fake_gpu import GPU, FakeGPU

from ldalign.generation.decoders import ModuleDecoder
from ldalign.generation.engine import Engine, Request
from ldalign.generation.graphs import CudaGraphs
from ldalign.generation.sampling import Sampling
from ldalign.kernels import triton_head
from ldalign.system import distributed
from ldalign.training import guide as guide_training
from ldalign.training.batches import Batch
from ldalign.training.guide import train_guide
from ldalign.training.policy import TrainSettings, train
from ldalign.training.scoring import response_logps
from ldalign.training.validation import ValidationPlan, Validator

pytestmark = pytest.mark.gpu_check

Allowed = dict[tuple[str, str], int]  # (kind, place) -> how often
LOOP = "ldalign/training/loop.py:optimize"


@pytest.fixture(autouse=True)
def asked(in_process: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[torch.device]]:
    """One rank; what is asked of the driver about free memory."""
    found: list[torch.device] = []

    def free(device: torch.device) -> tuple[int, int]:
        found.append(device)
        return 2**36, 2**37

    # What a CPU has not: the driver's answer, for which no device is waited, and this product.
    monkeypatch.setattr(torch.cuda, "mem_get_info", free)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 0)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 0)
    monkeypatch.setattr(
        triton_head, "_wide_product", lambda a, b, out: torch.mm(a.float(), b.float(), out=out)
    )
    distributed.start("cpu")
    yield found


def check(gpu: FakeGPU, allowed: Allowed) -> None:
    new = {wait.line for wait in gpu.waits if (wait.kind, wait.place) not in allowed}
    assert not new, "the host waits:\n" + "\n".join(sorted(new))
    assert dict(gpu.counts()) == allowed


@pytest.mark.parametrize("kind", ["dpo", "sft"])
def test_a_training_step(
    kind: str, asked: list[torch.device], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two steps of 3 micro-batches each."""
    steps, micros = 2, 3
    pairs = tiny.pairs(16)
    if kind == "sft":
        pairs = [replace(pair, generated=None) for pair in pairs]
    settings = TrainSettings(
        epochs=1, global_batch=8, micro_tokens=48 if kind == "dpo" else 28, learning_rate=1e-3
    )
    model, gpu = tiny.mistral(), FakeGPU()
    gpu.move(model)
    pack, reads = Batch.pack, []

    def packed(*given: Any) -> Batch:
        reads.append(gpu.counts()["read", LOOP])
        return pack(*given)

    monkeypatch.setattr(Batch, "pack", packed)
    with gpu:
        train(
            model,
            pairs,
            settings,
            compute_dtype=torch.float32,
            device=GPU,
            seed=0,
            stage="stage",
            step0_is_reference=False,
        )
    check(
        gpu,
        {
            # loss, norm and metrics, before the weights are touched
            ("read", LOOP): steps,
        },
    )
    # The batch, attention's two work lists, and of pairs the head's offsets; the metrics' counts.
    assert gpu.copies == steps * (micros * (4 if kind == "dpo" else 3) + 1)
    assert asked == steps * [GPU]  # once a step, by the head
    # The first micro-batch of a step is packed before the host waits for the step before.
    assert reads == [0] * (micros + 1) + [1] * (micros - 1)


def test_a_scoring_pass() -> None:
    """Three micro-batches."""
    model, gpu = tiny.mistral(), FakeGPU()
    gpu.move(model)
    with gpu:
        response_logps(model, tiny.pairs(8), 48, GPU)
    # The log-probs of one micro-batch, when the device has got the next.
    check(gpu, {("event", "ldalign/system/transfer.py:Arriving.arrived"): 3})


def test_a_validation() -> None:
    model, gpu = tiny.mistral(), FakeGPU()
    gpu.move(model)
    with gpu:
        Validator(ValidationPlan(tiny.pairs(8)), model, 1, 48, GPU, "stage").after_step(1, True, {})
    check(gpu, {("read", "ldalign/training/validation.py:Validator._nll"): 1})


@pytest.mark.parametrize("readout", ["mean", "queries"])
def test_a_guides_training_step(readout: str) -> None:
    """One step of several micro-batches, with everything that a loss can have."""
    guide, gpu = tiny_guides.text_guide(readout=readout, injection="both"), FakeGPU()
    pairs = tiny_guides.pairs(guide, 4)
    settings = tiny_guides.settings_of(
        micro_tokens=60, token_dropout=0.1, latent_noise=0.1, bag_of_words=0.1, tokens=5
    )
    gpu.move(guide)
    with gpu:
        train_guide(guide, pairs, settings, compute_dtype=torch.float32, device=GPU, seed=0)
    check(
        gpu,
        {
            # once, before the first step: rank 0's map to the latent goes to all
            ("copy to the host", "ldalign/training/guide.py:_begin_map.begin.<listcomp>"): 2,
            ("copy to the device", "ldalign/training/guide.py:_begin_map"): 2,
            ("read", LOOP): 1,
        },
    )


def test_a_guides_draws_are_made_while_the_device_works(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of a step before the host waits for the step before it; the same as on a CPU."""
    guide = tiny_guides.text_guide()
    pairs = tiny_guides.pairs(guide, 8)
    settings = replace(tiny_guides.settings_of(micro_tokens=60), epochs=2, global_batch=4)
    gpu, reads, keys = FakeGPU(), [], []
    draw = guide_training._draw

    def noted(guide: Any, pair: Any, key: str, *rest: Any) -> Any:
        reads.append(gpu.counts()["read", LOOP])
        keys.append(key)
        return draw(guide, pair, key, *rest)

    monkeypatch.setattr(guide_training, "_draw", noted)
    gpu.move(guide)
    with gpu:
        train_guide(guide, pairs, settings, compute_dtype=torch.float32, device=GPU, seed=0)
    assert reads == [0] * 8 + [1] * 4 + [2] * 4
    assert {key.rsplit("/", 1)[0] for key in keys[:8]} == {"guide/0"} and len(set(keys)) == 16
    assert {key.rsplit("/", 1)[0] for key in keys[8:]} == {"guide/1"}


def test_distances() -> None:
    """One batch of pairs, one of which is no distance from itself."""
    guide, gpu = tiny_guides.text_guide(), FakeGPU()
    pairs = tiny_guides.pairs(guide, 3)
    pairs.append(replace(pairs[0], generated=pairs[0].real))
    gpu.move(guide)
    with gpu:
        guide.pair_distances(pairs)
    check(gpu, {("event", "ldalign/system/transfer.py:Arriving.arrived"): 1})


class Graphs(CudaGraphs):
    """Its copies; what is captured is done each time, and watched."""

    def __init__(self) -> None:
        self.device = GPU

    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        work()
        return work


def test_decoding() -> None:
    """Two rows: their prompts by the host's numbers, then three tokens more of each by graphs."""
    model, gpu = tiny.mistral(), FakeGPU()
    gpu.move(model)
    sampling = Sampling(max_new_tokens=4)
    with gpu:
        decoder = ModuleDecoder(model, Graphs)
        engine = Engine(decoder, sampling, [2], 0, longest=20, rows=4, cache_bytes=2**22)
        list(engine.run([Request(str(i), [5, 6, 7], i) for i in range(2)]))
    check(
        gpu,
        {
            # of the step with prompts, tokens, log-probs and soundness in copies of their own
            ("copy to the host", "ldalign/generation/engine.py:Engine._step"): 3,
            # tokens, log-probs and soundness of a step, when the device has got the next
            ("event", "ldalign/system/transfer.py:Arriving.arrived"): 3,
        },
    )


# ----------------------------------------------------------------------------------- the GPU itself


def zeros() -> torch.Tensor:
    return torch.zeros(3, device=GPU)


WAITING: dict[str, tuple[str, Callable[[], Any]]] = {
    "item": ("read", lambda: zeros()[0].item()),
    "float": ("read", lambda: float(zeros().sum())),
    "if": ("read", lambda: bool(zeros()[0] > 0)),
    "tolist": ("read", lambda: zeros().tolist()),
    "tensor": ("copy to the device", lambda: torch.tensor([1, 2], device=GPU)),
    "to": ("copy to the device", lambda: torch.zeros(2).to(GPU)),
    "to, not pinned": ("copy to the device", lambda: torch.zeros(2).to(GPU, non_blocking=True)),
    "to, pinned": ("copy to the device", lambda: torch.zeros(2).pin_memory().to(GPU)),
    "copy_": ("copy to the device", lambda: zeros().copy_(torch.zeros(3))),
    "cpu": ("copy to the host", lambda: zeros().cpu()),
    "to cpu": ("copy to the host", lambda: zeros().to("cpu", torch.float64)),
    "list as an index": ("copy to the device", lambda: zeros()[[0, 2]]),
    "mask": ("size", lambda: zeros()[zeros() > 0]),
    "nonzero": ("size", lambda: zeros().nonzero()),
    "repeat_interleave": ("size", lambda: zeros().repeat_interleave(zeros().long(), dim=0)),
    "unique": ("size", lambda: zeros().unique()),
}


@pytest.mark.parametrize("case", WAITING)
def test_the_gpu_sees_a_wait(case: str) -> None:
    kind, act = WAITING[case]
    gpu = FakeGPU()
    with gpu:
        act()
    assert [wait.kind for wait in gpu.waits] == [kind]


def test_the_gpu_sees_no_wait_where_there_is_none() -> None:
    gpu = FakeGPU()
    with gpu:
        there = torch.zeros(2).pin_memory().to(GPU, non_blocking=True)
        assert there.is_cuda and (there.new_zeros(3) + 1).device == GPU
        repeats = torch.tensor([1, 2], pin_memory=True).to(GPU, non_blocking=True)
        there.repeat_interleave(repeats, dim=0, output_size=3)
        here = there.to("cpu", non_blocking=True)
        assert not gpu.waits and not here.is_cuda
        with pytest.raises(AssertionError, match="may not have arrived"):
            here.tolist()
        with pytest.raises(AssertionError, match=r"takes one of \(2,\) on the CPU"):
            there + torch.zeros(2)
