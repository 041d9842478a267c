"""What ranks do for each other, each thing by itself: two ranks of which a test is one, or one that
is told what the others are. Whole trainings on several ranks are in test_distributed.py.
"""

import random
import socket
import threading
import warnings
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import pytest
import tiny
import torch
import torch._dynamo  # which FSDP imports: once, and not in each fork
import torch.distributed as dist
from fake_gpu import FakeGPU
from ranks_here import on_ranks
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from ldalign.system import distributed, exits
from ldalign.system.distributed import Sharding
from ldalign.system.errors import EnvironmentProblem, InputError, NumericsError

CPU = torch.device("cpu")
HERE = pytest.mark.parametrize("here", [0, 1])


@pytest.fixture(autouse=True)
def no_group_yet(in_process: None) -> Iterator[None]:
    distributed.stop()
    yield


# ------------------------------------------------------------------------------------------ meeting


def test_no_start_meets_what_an_earlier_one_left() -> None:
    """One store for 20 starts of 3 ranks. Before some of them a rank never comes, and the others
    give up.
    """
    store, ranks, draw = dist.HashStore(), 3, random.Random(0)
    limit, used = timedelta(minutes=5), set()
    for attempt in range(20):
        dead = draw.choice([(), (1,), (2,), (0,)])
        if dead:  # of these ranks nobody joins, and the others give up
            for rank in {0, 1, 2} - {*dead}:
                give_up = timedelta(seconds=0.1)
                store.set_timeout(give_up)
                with pytest.raises(dist.DistStoreError):
                    distributed._unused(store, rank, ranks, give_up)
        store.set_timeout(limit)
        found: dict[int, Any] = {}

        def join(rank: int, found: dict[int, Any] = found) -> None:
            found[rank] = distributed._unused(store, rank, ranks, limit)

        order = draw.sample(range(ranks), ranks)
        threads = [threading.Thread(target=join, args=(rank,)) for rank in order]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not found[0].check(["key"])
        found[0].set("key", str(attempt))
        assert {found[rank].get("key") for rank in range(ranks)} == {str(attempt).encode()}
        used.add(found[0].get("key"))
    assert len(used) == 20


def test_a_rank_that_never_comes_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rank 0 alone of two: its store waits, then says so."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    variables = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost"}
    for name, value in {**variables, "MASTER_PORT": str(port)}.items():
        monkeypatch.setenv(name, value)
    expected = r"^the 2 ranks did not all join within 0\.02 minutes \(timeout_minutes\): .*; start"
    with pytest.raises(EnvironmentProblem, match=expected):
        distributed.start("cpu", 0.02)


def meets() -> dict[str, Any]:
    rank = distributed.rank()
    mine = [2, 0] if rank else [1]
    return {
        "rank": rank,
        "world": distributed.world_size(),
        "of rank 0": distributed.on_rank0(lambda: f"of {rank}"),
        "of all": distributed.on_all(lambda: 10 * rank),
        "total": distributed.total(torch.tensor([1.0, rank])).tolist(),
        "merged": distributed.merge_rows(3, mine, 2.0 * torch.tensor(mine)[:, None]).tolist(),
        "processes": [host for host, _ in exits.PEERS],
    }


@HERE
def test_two_ranks_meet(here: int) -> None:
    for rank, found in enumerate(on_ranks(meets, here=here)):
        assert found == {
            "rank": rank,
            "world": 2,
            "of rank 0": "of 0",
            "of all": [0, 10],
            "total": [2.0, 1.0],
            "merged": [[0.0], [2.0], [4.0]],
            "processes": [socket.gethostname()] * 2,
        }


def raised(work: Any) -> tuple[str, str, int | None]:
    """The class of the error that `work` raises, its text, and the rank in whose name it is."""
    with pytest.raises(Exception) as caught:
        work()
    return type(caught.value).__name__, str(caught.value), vars(caught.value).get("ldalign_rank")


def fails() -> list[tuple[str, str, int | None]]:
    rank = distributed.rank()

    def failing(which: int, error: Exception) -> None:
        if rank == which:
            raise error

    return [
        raised(lambda: distributed.on_rank0(lambda: failing(0, InputError("no such file")))),
        raised(lambda: distributed.on_all(lambda: failing(1, NumericsError("row 7: nan")))),
        raised(lambda: distributed.on_all(lambda: failing(1, KeyError("planted")))),
    ]


@HERE
def test_an_error_of_one_rank_is_all_ranks(here: int) -> None:
    """In the name of the one that made it, on which alone it is what it was if it is not ours."""
    first, second = on_ranks(fails, here=here)
    shared = [("InputError", "no such file", 0), ("NumericsError", "row 7: nan", 1)]
    assert first == [*shared, ("RuntimeError", "KeyError: 'planted'", 1)]
    assert second == [*shared, ("KeyError", "'planted'", 1)]


def differ() -> list[tuple[str, str, int | None]]:
    rank = distributed.rank()
    distributed.agree(lambda: {"dtype": "float32"}, "never said")
    return [
        raised(lambda: distributed.agree(lambda: {"dtype": "float32", "clock": rank}, "set it")),
        raised(lambda: distributed.agree(lambda: dict.fromkeys("ab" * rank, 1), "x", InputError)),
    ]


def test_ranks_that_differ_are_told_apart() -> None:
    host = socket.gethostname()
    for found in on_ranks(differ):
        assert [one[:2] for one in found] == [
            (
                "EnvironmentProblem",
                f"rank 1 on {host} has clock 1, rank 0 on {host} has 0; set it",
            ),
            (
                "InputError",
                f"rank 1 on {host} has a 1, rank 0 on {host} has none (and another b); x",
            ),
        ]


def test_what_only_rank_0_has_is_a_difference_too() -> None:
    with pytest.raises(
        EnvironmentProblem, match="^rank 1 on b has a none, rank 0 on a has 1; mend"
    ):
        distributed._compare([("a", {"a": 1}), ("b", {})], "mend")
    distributed._compare([("a", {"a": 1}), ("b", {"a": 1})], "mend")


def test_ranks_wait_long_for_each_other_by_gloo(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the backend of the steps is: NCCL has a rank's GPU wait, and for its own timeout."""
    made: list[dict[str, Any]] = []
    monkeypatch.setattr(dist, "new_group", lambda **options: made.append(options))
    monkeypatch.setattr(
        dist, "all_gather_object", lambda peers, mine, group: peers.__setitem__(0, mine)
    )
    distributed._meeting()
    assert made == [{"backend": "gloo", "timeout": distributed.LONGEST_WORK}]


@pytest.mark.parametrize(
    ("work", "name"),
    [
        (lambda: distributed.on_all(lambda: 1), "all_gather_object"),
        (lambda: distributed.on_rank0(lambda: 1), "broadcast_object_list"),
        (distributed.barrier, "barrier"),
    ],
    ids=["on_all", "on_rank0", "barrier"],
)
def test_where_one_may_work_for_hours_all_meet(
    work: Any, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not in the group of the steps, whose patience is short."""
    meeting, met = object(), []

    def meets(*given: Any, group: Any, **more: Any) -> None:
        met.append(group)
        if name == "all_gather_object":
            given[0][:] = [given[1]] * 2

    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    monkeypatch.setattr(distributed, "_meeting", lambda: meeting)
    monkeypatch.setattr(dist, name, meets)
    work()
    assert met == [meeting]


def test_of_a_store_that_does_not_answer_the_first_line_is_said(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def silent(*given: Any, **more: Any) -> None:
        raise dist.DistStoreError("timed out after 180000ms\n  at TCPStore.cpp:1\n")

    monkeypatch.setattr(dist, "rendezvous", silent)
    monkeypatch.setenv("WORLD_SIZE", "4")
    expected = (
        r"^the 4 ranks did not all join within 3 minutes \(timeout_minutes\): timed out after "
        "180000ms; start those of every host together$"
    )
    with pytest.raises(EnvironmentProblem, match=expected):
        distributed._join("gloo", timedelta(minutes=3), None)


def test_a_gpus_ranks_add_up_on_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """NCCL knows no other memory; the result is the host's."""
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_backend", lambda: "cpu:gloo,cuda:nccl")
    monkeypatch.setattr(distributed, "world_size", lambda: 1)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    with FakeGPU():
        found = distributed.merge_rows(3, [2, 0], torch.tensor([[5.0], [6.0]]))
    assert found.tolist() == [[6.0], [0.0], [5.0]] and found.device == CPU


@pytest.mark.parametrize(("local", "device"), [(None, 0), ("1", 1), ("2", None)])
def test_a_rank_takes_the_gpu_of_its_number(
    local: str | None, device: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: list[int] = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: taken[-1])
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    if local is not None:
        monkeypatch.setenv("LOCAL_RANK", local)
    if device is None:
        expected = r"^device=cuda: rank 2 of this machine has no GPU \(2 found\); use device=cpu"
        with pytest.raises(EnvironmentProblem, match=expected):
            distributed.start("cuda")
    else:
        assert distributed.start("cuda") == torch.device("cuda", device) and taken == [device]


# ---------------------------------------------------------------------------------- cut into shards


class Small(nn.Module):
    """Weights of 5, 2 and 1 rows, of which the last rank of two holds 2, 1 and none."""

    def __init__(self) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(0)
        self.blocks = nn.ModuleList([nn.Linear(3, 5, bias=False), nn.Linear(5, 2, bias=False)])
        self.scale = nn.Parameter(torch.ones(1, 4))
        for p in self.parameters():
            p.data = torch.randn(p.shape, generator=draw)


def sharded(sharding: Sharding) -> dict[str, Any]:
    model = Small()
    distributed.shard(model, [*model.blocks], torch.float32, CPU, sharding)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    norm, factor = distributed.clip_grad_norm(model, 1.0)
    half = distributed.full_state(model, torch.bfloat16)
    return {
        "rows": [distributed.local_rows(p) for p in model.parameters()],
        "held": [tuple(distributed.local(p).shape) for p in model.parameters()],
        "norm": float(norm),
        "clipped": float(norm * factor),
        "state": distributed.full_state(model, torch.float32),
        "half": {name: p.dtype for name, p in half.items()},
        "each": {n: p.clone() for n, p in distributed.whole_state(model, torch.float64).items()},
    }


def in_both_ways() -> dict[str, dict[str, Any]]:
    return {"cut": sharded(Sharding()), "copies": sharded(Sharding(ranks=1))}


# Of each rank, in the order of `parameters`.
ROWS = {
    "cut": [[(0, 1), (0, 3), (0, 1)], [(1, 1), (3, 5), (1, 2)]],
    "copies": [[(0, 1), (0, 5), (0, 2)]] * 2,
}


def test_a_model_on_two_ranks() -> None:
    """Each row is on one rank of a copy, and rank 0 is given all; the norm counts each row once.

    In one group: what torch keeps of a mesh, for its next call, names the groups of the first.
    """
    plain = Small().state_dict()
    for rank, ways in enumerate(on_ranks(in_both_ways)):
        for way, found in ways.items():
            rows = ROWS[way][rank]
            assert found["rows"] == rows
            assert [shape[0] for shape in found["held"]] == [stop - start for start, stop in rows]
            assert found["norm"] == pytest.approx((15 + 10 + 4) ** 0.5, rel=1e-6)
            assert found["clipped"] == pytest.approx(1.0, rel=1e-4)
            expected = plain if rank == 0 else {}
            assert found["state"].keys() == expected.keys() == found["half"].keys()
            assert all(torch.equal(p, found["state"][name]) for name, p in expected.items())
            assert set(found["half"].values()) <= {torch.bfloat16}
            assert all(torch.equal(p.double(), found["each"][name]) for name, p in plain.items())


@pytest.mark.parametrize(
    ("world", "ranks", "copies"), [(8, None, 1), (8, 8, 1), (8, 2, 4), (6, 3, 2), (1, None, 1)]
)
def test_copies(
    world: int, ranks: int | None, copies: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(distributed, "world_size", lambda: world)
    assert distributed.copies(ranks) == copies
    with pytest.raises(
        InputError, match=f"training.shard_ranks=5: {world} ranks cannot be split so"
    ):
        distributed.copies(5)


class Told:
    """A wrapped model that keeps what it was last told, by the method's name."""

    def __init__(self) -> None:
        self.said: dict[str, bool] = {}

    def __getattr__(self, name: str) -> Any:
        return lambda value: self.said.__setitem__(name.removeprefix("set_"), value)


@pytest.mark.parametrize(
    ("world", "whole", "last", "expected"),
    [
        # what a step's last micro-batch does: everything
        *((world, whole, True, (True, True, True))
          for world in (1, 2, 8) for whole in ("nothing", "gradients", "all")),
        (2, "nothing", False, (True, False, True)),
        (2, "gradients", False, (False, False, True)),
        (2, "all", False, (False, False, False)),
        *((1, whole, False, (False, False, False)) for whole in ("nothing", "gradients", "all")),
    ],
)  # fmt: skip
def test_what_a_micro_batch_leaves_out(
    world: int, whole: Any, last: bool, expected: tuple[bool, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sums over the ranks of a copy, sums over the copies, and letting go of gathered weights."""
    monkeypatch.setattr(distributed, "world_size", lambda: world)
    monkeypatch.setattr(distributed, "_is_wrapped", lambda model: True)
    model: Any = Told()
    distributed.last_micro(model, last, Sharding(whole=whole))
    names = ("requires_gradient_sync", "requires_all_reduce", "reshard_after_backward")
    assert tuple(model.said[name] for name in names) == expected


# -------------------------------------------------------------------------- of one rank, that casts


def test_a_rank_alone_pays_nothing(in_process: None) -> None:
    """Only for weights to be cast: those are gathered, in the compute dtype, by FSDP."""
    distributed.start("cpu")
    for dtype, wrapped in ((torch.float32, False), (torch.bfloat16, True)):
        model = tiny.mistral()
        distributed.shard(model, model.blocks, dtype, CPU)
        assert isinstance(model, FSDPModule) == wrapped


def test_tables_stay_float32_where_weights_are_cast() -> None:
    """The rotary tables enter a block as they are; FSDP's warning about views is not said."""
    distributed.start("cpu")
    model, seen = tiny.mistral(), list[torch.dtype]()
    model.blocks[1].self_attn.register_forward_pre_hook(
        lambda module, given: seen.extend(tensor.dtype for tensor in given[1:3])
    )
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        distributed.shard(model, model.blocks, torch.bfloat16, CPU)
        hidden = model(torch.tensor([[3, 4, 5, 6]]))
    assert seen == [torch.float32] * 2 and hidden.dtype == torch.bfloat16
    assert not [one for one in said if "view tensor" in str(one.message)]


def test_whole_weights_are_the_models_own_after_a_forward() -> None:
    """A forward without backward leaves weights gathered, in the dtype of the computation."""
    distributed.start("cpu")
    plain = tiny.mistral().state_dict()
    for state_of in (distributed.full_state, distributed.whole_state):
        model = tiny.mistral()
        distributed.shard(model, model.blocks, torch.bfloat16, CPU)
        with torch.no_grad():
            model(torch.tensor([[3, 4, 5, 6]]))
        state: dict[str, Tensor] = state_of(model, torch.float32)
        assert state.keys() == plain.keys()
        assert all(torch.equal(p, plain[name]) for name, p in state.items())


def test_the_norm_of_bfloat16_gradients_is_taken_in_float32() -> None:
    model = nn.Linear(301, 7, bias=False, dtype=torch.bfloat16)
    model.weight.grad = torch.full((7, 301), 1.0078125, dtype=torch.bfloat16)
    norm, _ = distributed.clip_grad_norm(model, 0.0)
    assert norm.dtype == torch.float32
    assert float(norm) == pytest.approx(1.0078125 * (7 * 301) ** 0.5, rel=1e-6)


# ------------------------------------------------------------------------------------------ float32


def precisions() -> dict[str, object]:
    """Every setting that lets a product of float32 be less, or a sum of half precision."""
    products, backends = torch.backends.cuda.matmul, torch.backends
    return {
        "all": backends.fp32_precision,
        "cuBLAS": products.fp32_precision,
        "cuBLAS TF32": products.allow_tf32,
        "cuDNN": (backends.cudnn.conv.fp32_precision, backends.cudnn.rnn.fp32_precision),
        "cuDNN TF32": backends.cudnn.allow_tf32,
        "oneDNN": (backends.mkldnn.conv.fp32_precision, backends.mkldnn.rnn.fp32_precision),
        "bfloat16 sums": products.allow_bf16_reduced_precision_reduction,
        "float16 sums": products.allow_fp16_reduced_precision_reduction,
        "float16 accumulation": products.allow_fp16_accumulation,
        "attention's sums": backends.cuda.fp16_bf16_reduction_math_sdp_allowed(),
    }


@pytest.fixture
def torch_with_a_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """torch says that it has a GPU, and a process group; its precisions are the loosest."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    torch.backends.fp32_precision = "tf32"
    torch.set_float32_matmul_precision("medium")
    torch.backends.cudnn.allow_tf32 = True
    products = torch.backends.cuda.matmul
    products.allow_bf16_reduced_precision_reduction = True
    products.allow_fp16_reduced_precision_reduction = True
    products.allow_fp16_accumulation = True
    torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(True)
    yield
    distributed.keep_float32()
    distributed.use_onednn_for_float32()


@pytest.mark.parametrize("asked", ["auto", "cuda"])
def test_float32_is_float32_on_a_gpu(asked: str, torch_with_a_gpu: None) -> None:
    loose = precisions()
    assert distributed.start(asked) == torch.device("cuda", 0)
    assert torch.get_float32_matmul_precision() == "highest"
    assert precisions() == {
        "all": "ieee",
        "cuBLAS": "ieee",
        "cuBLAS TF32": False,
        "cuDNN": ("ieee", "ieee"),
        "cuDNN TF32": False,
        "oneDNN": ("ieee", "ieee"),
        "bfloat16 sums": False,
        "float16 sums": False,
        "float16 accumulation": False,
        "attention's sums": False,
    }
    assert all(loose[name] != kept for name, kept in precisions().items()), "all were loose before"


@pytest.mark.parametrize("asked", ["auto", "cpu"])
def test_float32_is_float32_on_a_cpu(
    asked: str, torch_with_a_gpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Products are oneDNN's, which is asked for as "medium", only where it keeps them float32."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert distributed.start(asked) == CPU
    exact = distributed.use_onednn_for_float32()
    assert torch.get_float32_matmul_precision() == ("medium" if exact else "highest")
    mine = precisions()
    assert mine["oneDNN"] == ("ieee", "ieee") and mine["bfloat16 sums"] is False
    a = torch.randn(300, 300, generator=torch.Generator().manual_seed(0))
    product = a.double() @ a.double()
    assert ((a @ a).double() - product).norm() < 1e-5 * product.norm()
