"""Rows that are done are kept: every stage that computes row by row is killed and gone on with."""

import json
import math
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_gpu import FakeGPU
from runs import ROOT
from stage_kills import check_resume

from ldalign import ops
from ldalign.data.pairs import Pairs, with_losers
from ldalign.data.ragged import TokenLists
from ldalign.evaluation.judges import POLICY
from ldalign.generation.sampling import Response
from ldalign.models.gpt2 import GPT2Config
from ldalign.models.guide import Guide, GuideConfig, States
from ldalign.models.guide_folder import new_guide, save_guide
from ldalign.models.toy import write_toy_model
from ldalign.run import context
from ldalign.run.folder import RunFolder
from ldalign.run.settings import RunConfig
from ldalign.run.stages import distances as distances_module
from ldalign.run.stages.agreement import agreement_stage
from ldalign.run.stages.distances import distances_stage
from ldalign.run.stages.evaluation import evaluation_stage
from ldalign.run.stages.judged import judged_stage
from ldalign.run.stages.reference import reference_stage
from ldalign.run.stages.responses import RESPONSES, Responses
from ldalign.system import distributed
from ldalign.system.config import load_config, to_yaml
from ldalign.system.errors import InputError, NumericsError
from ldalign.system.files import write_jsonl
from ldalign.system.partial_rows import Part, Parts, table

CHUNKS = [[4, 0], [1], [3, 2]]


def thirds(chunk: Sequence[int]) -> torch.Tensor:
    return torch.tensor([[i / 3, -(10.0 ** (i - 300))] for i in chunk], dtype=torch.float64)


def refusal(i: int, value: float) -> str:
    return f"row {i}: {value}"


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_gpu_gets_a_chunk_before_the_one_before_is_read(device: str) -> None:
    said: list[str] = []

    def work(chunk: Sequence[int]) -> torch.Tensor:
        said.append(f"make {chunk[0]}")
        return thirds(chunk).pin_memory().to(device, non_blocking=True)

    with FakeGPU():
        found = table(CHUNKS, work, 2, refusal, progress=lambda rows: said.append(f"read {rows}"))
    assert torch.equal(found, thirds(range(5)))
    orders = {
        "cpu": ["read 0", "make 4", "read 2", "make 1", "read 1", "make 3", "read 2"],
        "cuda": ["read 0", "make 4", "make 1", "read 2", "make 3", "read 1", "read 2"],
    }
    assert said == orders[device]


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_chunks_before_one_that_fails_are_kept(device: str, tmp_path: Path) -> None:
    path = tmp_path / "parts/x"

    def work(chunk: Sequence[int]) -> torch.Tensor:
        if chunk == CHUNKS[2]:
            raise KeyError("planted")
        return thirds(chunk).pin_memory().to(device, non_blocking=True)

    with FakeGPU(), pytest.raises(KeyError):
        table(CHUNKS, work, 2, refusal, path)
    assert Parts(path).read().keys() == {4, 0, 1}


def test_floats_come_back_as_they_were(tmp_path: Path) -> None:
    """Through the file, for rows of an earlier start; float32 values too."""
    path = tmp_path / "parts/x"
    first = table(CHUNKS, thirds, 2, refusal, path)
    assert torch.equal(first, thirds(range(5)))
    assert torch.equal(
        table(CHUNKS, lambda chunk: pytest.fail("done before"), 2, refusal, path), first
    )
    narrow = torch.rand(64, 1, generator=torch.Generator().manual_seed(0))
    for _ in range(2):
        assert torch.equal(
            table([range(64)], lambda chunk: narrow, 1, refusal, path.with_name("y")).float(),
            narrow,
        )
    assert table([], thirds, 2, refusal).shape == (0, 2)


def test_a_chunk_counts_whole_or_not_at_all(tmp_path: Path) -> None:
    """Files of two ranks, one of which ends in half a chunk and a torn line.

    Other chunks than before ask for other rows.
    """
    path = tmp_path / "parts/x"
    path.parent.mkdir()
    for rank, rows in enumerate([[(4, [1.0]), (0, [2.0]), (3, [5.0]), (2, [6.5])], [(1, [3.0])]]):
        with path.with_name(f"x.rank{rank}").open("a", encoding="utf-8") as file:
            Part(file).append(rows)
    os.truncate(path.with_name("x.rank0"), path.with_name("x.rank0").stat().st_size - 4)
    asked = []

    def work(chunk: Sequence[int]) -> torch.Tensor:
        asked.append(list(chunk))
        return torch.zeros(len(chunk), 1)

    assert table(CHUNKS, work, 1, refusal, path)[:, 0].tolist() == [2.0, 3.0, 0.0, 0.0, 1.0]
    assert asked == [[3, 2]]
    assert Parts(path).gather().keys() == set(range(5)) and Parts(path).gather(
        [[0], [7, 1]]
    ).keys() == {0}


def test_a_part_cut_at_any_byte_holds_whole_rows(tmp_path: Path) -> None:
    """What ends inside a row, or goes on with zeros as after a crash, loses that row alone."""
    path, rows = tmp_path / "x", [(12, {"text": "\u2028ü"}), (3, [0.1]), (345, {"ids": [1, 23]})]
    with Parts(path).open() as part:
        for row in rows:
            part.append([row])
    own = tmp_path / "x.rank0"
    whole = own.read_bytes()
    ends = [i + 1 for i, byte in enumerate(whole) if byte == 10]
    for cut in range(len(whole) + 1):
        done = dict(rows[: sum(end <= cut for end in ends)])
        for rest in (b"", bytes(9), bytes(9) + b"\n"):
            own.write_bytes(whole[:cut] + rest)
            assert Parts(path).read() == done, (cut, rest)


def test_a_flipped_bit_costs_its_row_alone(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Every bit of a record in turn, its checksum, index, text and numbers: the row is made again,
    and no other.
    """
    path, rows = tmp_path / "x", [(2, [0.125, 7.0]), (0, {"text": "aé"}), (1, [1e-30])]
    with Parts(path).open() as part:
        part.append(rows)
    own = tmp_path / "x.rank0"
    whole = own.read_bytes()
    begin, end = (whole.index(b"\n") + 1, whole.index(b"\n", whole.index(b"\n") + 1))
    for bit in range(8 * begin, 8 * end):
        flipped = bytearray(whole)
        flipped[bit // 8] ^= 1 << bit % 8
        own.write_bytes(flipped)
        caplog.clear()
        assert Parts(path).read() == dict(rows[::2]), bit
        assert re.search(r"x\.rank0: [12] of [34] rows are damaged", caplog.text)
    own.write_bytes(whole)
    assert Parts(path).gather() == dict(rows)


def test_rows_are_written_at_once_and_synced_now_and_then(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """35 rows, one a second: each can be read at once, and three times the disk is waited for."""
    now, synced = 0.0, []
    monkeypatch.setattr(os, "fsync", lambda descriptor: synced.append(now))
    path = tmp_path / "x.rank0"
    with path.open("a", encoding="utf-8") as file:
        part = Part(file, lambda: now)
        for i in range(35):
            now = float(i)
            part.append([(i, None)])
            assert len(path.read_bytes().splitlines()) == i + 1
    assert synced == [10.0, 20.0, 30.0]


def test_values_that_are_not_finite_are_not_kept(tmp_path: Path) -> None:
    """The row is named; the chunks before are kept, and the next start asks for the others."""
    path = tmp_path / "parts/x"

    def spoilt(chunk: Sequence[int]) -> torch.Tensor:
        return torch.tensor([[math.nan if i == 1 else float(i)] for i in chunk])

    with pytest.raises(NumericsError, match=r"^row 1: nan$"):
        table(CHUNKS, spoilt, 1, refusal, path)
    assert Parts(path).read() == {4: [4.0], 0: [0.0]}


# --------------------------------------------------------------------------------------- the stages


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """policy/ and guide/, random."""
    folder = tmp_path_factory.mktemp("models")
    write_toy_model(folder / "policy")
    words = [f"It is {i}." for i in range(20)]
    config = GuideConfig(latent_tokens=2, latent_width=4, max_tokens=64)
    save_guide(new_guide(config, 0, words, GPT2Config(300, 96, 16, 1, 2)), folder / "guide")
    return folder


@pytest.fixture(scope="module")
def opened_once(models: Path) -> context.Context:
    config = load_config(
        RunConfig,
        ROOT / "configs/toy.yaml",
        [
            f"policy={models / 'policy'}",
            f"guide={models / 'guide'}",
            "max_rows=16",
            "sft.epochs=0",
            "dtype=float32",
            "continual_sft.epochs=0",
            "evaluation.rows=6",
            "evaluation.samples=2",
            "agreement.rows=6",
            "judge=policy",
            "max_new_tokens=6",
            "training.micro_tokens=300",
            "device=cpu",
        ],
    )
    ctx = context.open_context(RunFolder(models / "run", to_yaml(config)), config)
    distributed.stop()
    return ctx


@pytest.fixture
def opened(opened_once: context.Context, in_process: None) -> Callable[..., context.Context]:
    """The context of a run, and in its folder the responses' file."""

    def open_run(run: Path, **changes: Any) -> context.Context:
        if not (run / "iteration_0").exists():
            (run / "iteration_0/responses").mkdir(parents=True)
            write_jsonl(run / RESPONSES.format(0), [1])  # its hash alone is read
        return replace(
            opened_once, run=RunFolder(run, ""), config=replace(opened_once.config, **changes)
        )

    return open_run


def sampled(ctx: context.Context) -> list[Response]:
    """Two responses a row: those of the two rows after it."""
    real = [pair.real for pair in ctx.used[1]]
    return [
        Response(real[(i + n) % len(real)], "stop", 0.0) for i in range(len(real)) for n in (1, 2)
    ]


def reference(ctx: context.Context, models: Path) -> Any:
    pairs = with_losers(ctx.used[1], [r.ids for r in sampled(ctx)[::2]], ctx.config.max_length)
    return reference_stage(ctx, 0, models / "policy", pairs, {})


def distances(ctx: context.Context, models: Path) -> Any:
    pairs = with_losers(ctx.used[1], [r.ids for r in sampled(ctx)[::2]], ctx.config.max_length)
    return distances_stage(ctx, 0, models / "guide", models / "policy", pairs)


def judged(ctx: context.Context, models: Path) -> Any:
    samples = sampled(ctx)
    tokens = TokenLists.of(r.ids for r in samples)
    responses = Responses(tokens, [r.finish_reason for r in samples])
    return judged_stage(ctx, 0, models / "policy", responses, POLICY)


def evaluation(ctx: context.Context, models: Path) -> Any:
    return evaluation_stage(ctx, "start", models / "policy")


def agreed(ctx: context.Context, models: Path) -> Any:
    return agreement_stage(ctx, models / "policy", models / "guide", models / "policy")


STAGES = {
    "iteration_0/reference": reference,
    "iteration_0/distances": distances,
    "iteration_0/judged": judged,
    "start/evaluation": evaluation,
    "agreement": agreed,
}


@pytest.mark.parametrize("stage", STAGES)
def test_a_killed_stage_is_gone_on_with(
    stage: str,
    opened: Callable[..., context.Context],
    models: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def make(run: Path) -> None:
        STAGES[stage](opened(run), models)

    check_resume(make, stage, lambda name: tmp_path / name, monkeypatch)


def test_what_was_begun_from_other_settings_is_refused(
    opened: Callable[..., context.Context],
    models: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """By the key's name; what moves work about alone may change."""

    def fail(*rest: Any) -> None:
        raise KeyError

    with monkeypatch.context() as patch:
        patch.setattr(distances_module, "pair_weights", fail)
        with pytest.raises(KeyError):
            distances(opened(tmp_path / "run"), models)
    assert Parts(
        tmp_path / "run/iteration_0/distances.partial/parts/distances"
    ).read().keys() == set(range(16))
    with pytest.raises(
        InputError,
        match="parents.json: made from something else: distance was 'euclidean', now 'cos",
    ):
        distances(opened(tmp_path / "run", distance="cosine"), models)
    monkeypatch.setattr(Part, "append", fail)
    training = replace(opened(tmp_path / "run").config.training, micro_tokens=1000)
    distances(opened(tmp_path / "run", training=training), models)
    assert sorted(p.name for p in (tmp_path / "run/iteration_0/distances").iterdir()) == [
        "distances.jsonl",
        "manifest.json",
        "summary.json",
    ]


def test_a_distance_that_is_nan_names_the_rows_id(
    opened: Callable[..., context.Context],
    models: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ctx = opened(tmp_path / "run")
    plain, wanted = Guide.states, ctx.used[0][3]

    def spoil(guide: Guide, pairs: Any) -> States:
        states = plain(guide, pairs)
        for i, pair in enumerate(pairs):
            if pair.id == wanted.id:
                m = len(states.read) // len(pairs)
                states.read[i * m] = math.nan
        return states

    monkeypatch.setattr(Guide, "states", spoil)
    with pytest.raises(NumericsError, match=f"^row {wanted.id}: the latent distance is nan"):
        distances(ctx, models)


def test_a_log_prob_that_is_nan_names_the_rows_id(
    opened: Callable[..., context.Context],
    models: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ctx = opened(tmp_path / "run")
    plain = ops.segment_sum
    pairs = with_losers(ctx.used[1], [[9]] * 16, ctx.config.max_length)
    spoiled = [*pairs]
    spoiled[5] = replace(pairs[5], id="this one", real=[7] * 40)
    pairs = Pairs.of(spoiled)

    def spoil(values: torch.Tensor, lengths: list[int]) -> torch.Tensor:
        return plain(values, lengths) * torch.tensor(
            [math.inf if n == 40 else 1.0 for n in lengths]
        )

    monkeypatch.setattr(ops, "segment_sum", spoil)
    with pytest.raises(
        NumericsError, match="^row this one: the log-probability of a response is -inf"
    ):
        reference_stage(ctx, 0, models / "policy", pairs, {})
    assert json.loads((tmp_path / "run/iteration_0/reference.partial/parents.json").read_text())
