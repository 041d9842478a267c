"""Ranks: starting them, FSDP2 wrapping, sums over all of them.

One code path: a run without torchrun is a world of one rank. Where weights are kept in another
dtype than they compute in, FSDP2's mixed precision casts them as it gathers them.
"""

import contextlib
import functools
import itertools
import os
import secrets
import socket
import stat
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Literal, TypeGuard, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

import ldalign
from ldalign.system import exits, interrupt
from ldalign.system.errors import EnvironmentProblem, InputError, LdalignError, NumericsError
from ldalign.system.memory import OutOfMemory, keep_freed_memory

# Imported where something is sharded: they take half as long again as torch itself.
if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.tensor import DTensor

T = TypeVar("T")

LONGEST_WORK = timedelta(hours=24)  # of one rank while the others wait at a barrier
# With these TCP finds out in 2 minutes that the host of a connection is gone without a word.
KEEPALIVE = {
    "SO_KEEPALIVE": 1,
    "TCP_KEEPIDLE": 60,
    "TCP_KEEPINTVL": 10,
    "TCP_KEEPCNT": 6,
    "TCP_USER_TIMEOUT": 120_000,
}
# Errors that reach every rank as what they are: `on_rank0`.
_SHARED_ERRORS: dict[str, type[LdalignError]] = {
    cls.__name__: cls for cls in (InputError, EnvironmentProblem, OutOfMemory, NumericsError)
}


# --------------------------------------------------------------------------------- start, meet, end


def start(device: str = "auto", timeout_minutes: float = 30) -> torch.device:
    """Joins the process group (torchrun's, or a group of one) and returns this rank's device.

    device: auto (CUDA where there is one), cpu or cuda. Raises EnvironmentProblem for a
    device that is not there.

    timeout_minutes: how long a rank waits for another inside a step, where all are about as fast.
    Where one may work alone for hours (`barrier`, `on_rank0`, `on_all`) they meet in a gloo group
    of their own, with a limit of its own. A rank whose process ends is noticed at once in either,
    as its connections close; except by NCCL, which waits for the timeout, where no torchrun ends
    the run before. A request to stop is heard while this rank waits for others to join.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    keep_float32()
    if device == "cpu":
        keep_freed_memory()
        use_onednn_for_float32()
    else:
        local = int(os.environ.get("LOCAL_RANK", 0))
        if local >= torch.cuda.device_count():
            raise EnvironmentProblem(
                f"device=cuda: rank {local} of this machine has no GPU "
                f"({torch.cuda.device_count()} found); use device=cpu or fewer processes"
            )
        torch.cuda.set_device(local)
    if not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo"
        timeout = timedelta(minutes=timeout_minutes)
        if "RANK" in os.environ:
            on = torch.cuda.current_device() if device == "cuda" else None
            interrupt.aside(lambda: _join(backend, timeout, on))
        else:
            dist.init_process_group(
                backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout
            )
    if device == "cuda":
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def auto_dtype(device: torch.device) -> torch.dtype:
    """The compute dtype of dtype=auto: bfloat16 where the device has instructions for it."""
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        native = torch.cpu._is_avx512_bf16_supported()
    return torch.bfloat16 if native else torch.float32


def _join(backend: str, timeout: timedelta, gpu: int | None) -> None:
    """Waits for all ranks and makes their groups. gpu: this rank's, which is set for each thread.

    Raises EnvironmentProblem where one does not come in time, and as `_meeting`.
    """
    if gpu is not None:
        torch.cuda.set_device(gpu)
    try:
        store, number, count = next(dist.rendezvous("env://", timeout=timeout))
        store.set_timeout(timeout)
        store = _unused(store, number, count, timeout)
    except dist.DistStoreError as error:
        minutes, ranks = timeout.total_seconds() / 60, os.environ["WORLD_SIZE"]
        reason = str(error).strip().splitlines()[0]
        raise EnvironmentProblem(
            f"the {ranks} ranks did not all join within {minutes:g} minutes (timeout_minutes): "
            f"{reason}; start those of every host together"
        ) from None
    dist.init_process_group(backend, store=store, rank=number, world_size=count, timeout=timeout)
    if count > 1:
        _meeting()


def _unused(store: dist.Store, number: int, count: int, timeout: timedelta) -> dist.Store:
    """A part of the store, the same for all ranks, that no earlier start has written into.

    torchrun's store outlives a restart of the ranks (--max-restarts), so that it has the addresses
    of those that are gone; and torchrun tells no rank which start this is: its agents count their
    own restarts. So rank 0 gives each of its starts a name, and waits until every rank has answered
    to it with one of its own; these it repeats, from which a rank knows that it was meant.

    number, count: of this rank, and of all. Raises DistStoreError where a rank does not answer in
    time.
    """
    mine, deadline = secrets.token_hex(8), time.monotonic() + timeout.total_seconds()
    if number == 0:
        store.set("start", mine)
        answers = [store.get(f"{mine}/{other}").decode() for other in range(1, count)]
        store.set(f"{mine}/all", " ".join(answers))
        return dist.PrefixStore(mine, store)
    for pause in itertools.chain((0.02, 0.05, 0.1, 0.2, 0.5), itertools.repeat(1.0)):
        start = store.get("start").decode()
        store.set(f"{start}/{number}", mine)
        if store.check([f"{start}/all"]) and mine in store.get(f"{start}/all").decode():
            return dist.PrefixStore(start, store)
        if time.monotonic() > deadline:
            break
        time.sleep(pause)
    raise dist.DistStoreError("rank 0 does not answer")


@functools.cache
def _meeting() -> dist.ProcessGroup:
    """Makes the group of all ranks in which they may wait long for each other.

    Raises EnvironmentProblem where they run other versions.
    """
    group: dist.ProcessGroup = dist.new_group(backend="gloo", timeout=LONGEST_WORK)
    _keep_alive()
    versions = {"ldalign": ldalign.__version__, "torch": str(torch.__version__)}
    peers: list[Any] = [None] * world_size()
    dist.all_gather_object(peers, (socket.gethostname(), os.getpid(), versions), group=group)
    exits.PEERS[:] = [(host, process) for host, process, _ in peers]
    found = [(host, versions) for host, _, versions in peers]
    _compare(found, "install the same versions on every host")
    return group


def _keep_alive() -> None:
    """Has TCP itself ask after the other side of every connection of this process."""
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):  # closed meanwhile
            if not stat.S_ISSOCK(os.fstat(int(name)).st_mode):
                continue
            with socket.socket(fileno=os.dup(int(name))) as connection:
                over_ip = connection.family in (socket.AF_INET, socket.AF_INET6)
                if not over_ip or connection.type != socket.SOCK_STREAM:
                    continue
                for option, value in KEEPALIVE.items():
                    level = socket.SOL_SOCKET if option.startswith("SO") else socket.IPPROTO_TCP
                    connection.setsockopt(level, getattr(socket, option), value)


def keep_float32() -> None:
    """Has products of float32 computed in float32, and sums of half-precision ones in float32.

    Every setting of this process is made, whatever the environment or an earlier caller chose. The
    first is the newer interface and reaches what the others do not name; they agree with it, as
    torch refuses to tell a precision on which its two interfaces differ.
    """
    torch.backends.fp32_precision = "ieee"  # type: ignore[attr-defined]
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    products = torch.backends.cuda.matmul
    products.allow_bf16_reduced_precision_reduction = False
    products.allow_fp16_reduced_precision_reduction = False
    products.allow_fp16_accumulation = False
    torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(False)


def use_onednn_for_float32() -> bool:
    """Gives float32 products to oneDNN where they stay float32 there; returns whether it did.

    MKL, the default, is often slower. torch offers oneDNN only by asking for "medium" precision,
    which a CPU without bfloat16 matrix units answers in full float32 and another in bfloat16: a
    product is made to see which.
    """
    a = torch.linspace(-1, 1, 256 * 256).view(256, 256)
    b = torch.linspace(1, 3, 256 * 256).view(256, 256)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    exact = a.double() @ b.double()
    full = bool(((a @ b).double() - exact).norm() <= 1e-5 * exact.norm())  # bfloat16: 2e-3
    if not full:
        torch.set_float32_matmul_precision(before)
    return full


def stop() -> None:
    """Leaves the process group."""
    _mesh.cache_clear()
    _meeting.cache_clear()
    if dist.is_initialized():
        dist.destroy_process_group()


def rank() -> int:
    """Returns this process's number, 0 to world_size() - 1."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Returns how many processes work on this run."""
    return dist.get_world_size() if dist.is_initialized() else 1


def barrier() -> None:
    """Waits for all ranks, for hours if need be."""
    if world_size() > 1:
        dist.barrier(group=_meeting())


def on_rank0(work: Callable[[], T]) -> T:
    """Runs `work` on rank 0 alone and returns its result on every rank. All ranks must call it.

    If it raises, every rank raises: an ldalign error as the same class with the same text,
    any other as RuntimeError on the other ranks. So no rank is left waiting. The result
    travels by torch.distributed's object broadcast (between our own processes, never from a
    file) and should be small.
    """
    if world_size() == 1:
        return work()
    outcome, failure = _attempt(work) if rank() == 0 else (None, None)
    shared = [outcome]
    dist.broadcast_object_list(shared, src=0, group=_meeting())
    result: T = _results(shared, failure)[0]
    return result


def on_all(work: Callable[[], T]) -> list[T]:
    """Runs `work` on every rank and returns all results, by rank, on each. All ranks must call it.

    If it raises on one, every rank raises, as with `on_rank0`; so `work` itself may contain no
    collective operation.
    """
    if world_size() == 1:
        return [work()]
    outcome, failure = _attempt(work)
    shared: list[Any] = [None] * world_size()
    dist.all_gather_object(shared, outcome, group=_meeting())
    return _results(shared, failure)


def agree(
    find: Callable[[], Mapping[str, Any]],
    mend: str,
    error: type[EnvironmentProblem | InputError] = EnvironmentProblem,
) -> None:
    """Compares what `find` gives on each rank, by name, with what it gives on rank 0. All ranks
    must call it; a rank alone has nothing to compare, and does not call `find`.

    Where a value differs every rank raises the same `error`: rank, host, name, both values, and
    then `mend`. If `find` raises on one, every rank raises, as with `on_all`.
    """
    if world_size() > 1:
        _compare(on_all(lambda: (socket.gethostname(), dict(find()))), mend, error)


def _compare(
    found: Sequence[tuple[str, Mapping[str, Any]]],
    mend: str,
    error: type[EnvironmentProblem | InputError] = EnvironmentProblem,
) -> None:
    """Raises `error` for the first rank that has another value than rank 0. found: host and values
    of each.
    """
    first_host, expected = found[0]
    for number, (host, values) in enumerate(found):
        names = [
            name
            for name in {**expected, **values}
            if values.get(name, "none") != expected.get(name, "none")
        ]
        if names:
            name, *others = names
            value, first = values.get(name, "none"), expected.get(name, "none")
            more = f" (and another {', '.join(others)})" if others else ""
            text = (
                f"rank {number} on {host} has {name} {value}, rank 0 on {first_host} has "
                f"{first}{more}; {mend}"
            )
            raise EnvironmentProblem(text) if error is EnvironmentProblem else InputError(text)


def _attempt(work: Callable[[], T]) -> tuple[tuple[T | None, str, str], Exception | None]:
    """Runs `work`: (result, kind of error, its text), which can travel, and the error itself."""
    try:
        return (work(), "", ""), None
    except Exception as error:
        return (None, type(error).__name__, str(error)), error


def _results(outcomes: Sequence[Any], failure: Exception | None) -> list[Any]:
    if failure is not None:
        raise exits.of_rank(failure, rank())
    for number, (_, kind, text) in enumerate(outcomes):
        if kind in _SHARED_ERRORS:
            raise exits.of_rank(_SHARED_ERRORS[kind](text), number)
        if kind:
            raise exits.of_rank(RuntimeError(f"{kind}: {text}"), number)
    return [result for result, _, _ in outcomes]


# -------------------------------------------------------------------------------------------- FSDP2


@dataclass(frozen=True)
class Sharding:
    """How a model in training lies on the ranks: it changes memory and messages, not results."""

    ranks: int | None = None  # that share one copy of the model (the GPUs of a node); None: all
    # what a rank keeps whole until a step's last backward
    whole: Literal["nothing", "gradients", "all"] = "gradients"


def shard(
    model: nn.Module,
    blocks: Sequence[nn.Module],
    compute_dtype: torch.dtype,
    device: torch.device,
    sharding: Sharding = Sharding(),
    methods: Sequence[str] = (),
    exact: Mapping[nn.Module, Sequence[str]] = {},
) -> nn.Module:
    """Wraps a model for FSDP2: each block is a group; embedding, norm and head are one more.

    A second call does nothing. Weights are gathered in `compute_dtype`; the model keeps its own
    dtype, sharded by rows, and so do its gradients. They are *summed* over ranks, and over
    micro-batches, in float32: the loss is already divided by the global count, so any split gives
    the same gradient. A meta-device model is only cut: `weights.load_model` then reads the pieces.
    A rank alone whose weights have the compute dtype already has nothing to gather, cast or reduce:
    its model is left as it is. methods: of the model, for which weights are gathered as for
    `forward`. exact: small modules of it that are gathered in float32, which they have, each with
    the methods that need their weights. Raises InputError where `sharding.ranks` does not divide
    the number of ranks.
    """
    # The first block returns its input, which FSDP hands to it as a view. Nothing is computed in
    # place on what a block returns, of which torch warns.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")
    several = world_size() > 1
    apart = {p for module in exact for p in module.parameters()}
    cast = any(p.dtype != compute_dtype for p in model.parameters() if p not in apart)
    if _is_wrapped(model) or not (several or cast):
        return model
    from torch.distributed.fsdp import (
        MixedPrecisionPolicy,
        fully_shard,
        register_fsdp_forward_method,
    )

    mesh = _mesh(device.type, copies(sharding.ranks))
    # The rotary tables enter the blocks in float32 and must stay so: inputs are not cast.
    policy = MixedPrecisionPolicy(
        param_dtype=compute_dtype, reduce_dtype=torch.float32, cast_forward_inputs=False
    )
    plain = MixedPrecisionPolicy(reduce_dtype=torch.float32, cast_forward_inputs=False)
    for module in (*exact, *blocks, model):
        # The backward begins with the head and the last block: these are not let go of.
        needed_first = module is model or module is blocks[-1] or module in exact
        reshard = several and sharding.whole != "all" and not needed_first
        wrapped = fully_shard(
            module,
            mesh=mesh,
            mp_policy=plain if module in exact else policy,
            reshard_after_forward=reshard,
        )
        wrapped.set_force_sum_reduction_for_comms(True)
        if several:  # alone, a factor would cost one more copy of the gradients
            wrapped.set_gradient_divide_factor(1.0)
    for module, names in {model: methods, **exact}.items():
        for name in names:
            register_fsdp_forward_method(module, name)
    return model


def copies(shard_ranks: int | None) -> int:
    """Returns how many copies of the model all ranks hold together, each on `shard_ranks` of them.

    Raises InputError where these do not divide the number of ranks.
    """
    found, rest = divmod(world_size(), shard_ranks or world_size())
    if rest:
        divisors = [n for n in range(1, world_size() + 1) if world_size() % n == 0]
        nearest = max(n for n in divisors if n <= (shard_ranks or n))
        raise InputError(
            f"training.shard_ranks={shard_ranks}: {world_size()} ranks cannot be split so; the "
            f"nearest that can: training.shard_ranks={nearest}"
        )
    return found


def _is_wrapped(module: nn.Module) -> "TypeGuard[FSDPModule]":
    fsdp = sys.modules.get("torch.distributed.fsdp")
    return fsdp is not None and isinstance(module, fsdp.FSDPModule)


def is_sharded(p: Tensor) -> "TypeGuard[DTensor]":
    """Says whether FSDP has cut a parameter, or its gradient, among the ranks."""
    tensor = sys.modules.get("torch.distributed.tensor")
    return tensor is not None and isinstance(p, tensor.DTensor)


def local(p: Tensor) -> Tensor:
    """Returns the rows of a parameter or a gradient that this rank holds, which may be all."""
    return p.to_local() if is_sharded(p) else p


def mesh_of(tensors: Iterable[Tensor]) -> "DeviceMesh | None":
    """Returns the ranks that the first sharded tensor is cut among; None where none is."""
    return next((p.device_mesh for p in tensors if is_sharded(p)), None)


@functools.cache
def _mesh(device_type: str, copies: int) -> "DeviceMesh":
    """Arranges all ranks as (S,), or as (copies, S) for hybrid sharding.

    Cached, as a mesh of two dimensions makes process groups.
    """
    from torch.distributed.device_mesh import init_device_mesh

    if copies == 1:
        return init_device_mesh(device_type, (world_size(),))
    shape = (copies, world_size() // copies)
    return init_device_mesh(device_type, shape, mesh_dim_names=("copies", "shards"))


def last_micro(model: nn.Module, last: bool, sharding: Sharding = Sharding()) -> None:
    """Says, before each micro-batch of a global batch, what it may leave out as it is not the last.

    Gradients are reduced over ranks after the last one alone, where a rank has the memory to add
    them up whole until then (Sharding.whole "gradients", "all"); otherwise each adds to the shards,
    and the copies are summed at the last. Gathered weights are kept for the next micro-batch with
    "all", and on a rank alone.
    """
    if not _is_wrapped(model):
        return
    each = sharding.whole == "nothing" and world_size() > 1
    model.set_requires_gradient_sync(last or each)
    model.set_requires_all_reduce(last)
    model.set_reshard_after_backward(last or (sharding.whole != "all" and world_size() > 1))


def local_rows(p: Tensor) -> tuple[int, int]:
    """Returns the rows [start, stop) of a parameter that this rank holds.

    FSDP cuts the first axis, as `torch.chunk` does.
    """
    if not is_sharded(p):
        return 0, len(p)
    rows = -(-len(p) // p.device_mesh.size(-1))
    start = min(len(p), rows * p.device_mesh.get_local_rank(p.device_mesh.ndim - 1))
    return start, min(len(p), start + rows)


def reshard(model: nn.Module) -> None:
    """Lets go of gathered weights that a forward without backward may have left on a rank."""
    for module in model.modules():
        if _is_wrapped(module):
            module.reshard()


def full_state(model: nn.Module, dtype: torch.dtype | None) -> dict[str, Tensor]:
    """Returns all parameters by name, whole, on the CPU in `dtype` (None: each in its own); an
    empty dict but on rank 0.

    All ranks must call it. Parameters are gathered one at a time, in `dtype`, and by rank 0 alone.
    """
    reshard(model)
    state = {name: _whole(p, dtype or p.dtype) for name, p in model.named_parameters()}
    return {name: p for name, p in state.items() if p is not None}


def whole_state(model: nn.Module, dtype: torch.dtype) -> dict[str, Tensor]:
    """Returns all parameters by name, whole, in `dtype`, on every rank and its own device: copies,
    beside what the rank holds of the model. All ranks must call it.
    """
    reshard(model)
    state = {}
    for name, p in model.named_parameters():
        copy = p.detach().to(dtype, copy=True)
        state[name] = copy.full_tensor() if is_sharded(copy) else copy
    return state


def _whole(p: Tensor, dtype: torch.dtype) -> Tensor | None:
    if not is_sharded(p):
        return p.detach().to("cpu", dtype) if rank() == 0 else None
    mesh, group = p.device_mesh, p.device_mesh.get_group(p.device_mesh.ndim - 1)
    if mesh.ndim == 2 and mesh.get_local_rank(0) > 0:
        return None  # another copy's rank
    rows = -(-len(p) // mesh.size(-1))
    own = p.to_local().detach()
    part = torch.zeros(rows, *p.shape[1:], dtype=dtype, device=own.device)
    part[: len(own)] = own
    parts = [torch.empty_like(part) for _ in range(mesh.size(-1))] if rank() == 0 else None
    dist.gather(part, parts, dst=0, group=group)
    return None if parts is None else torch.cat([x.cpu() for x in parts])[: len(p)]


# ----------------------------------------------------------------------------------- over all ranks


def total(values: Tensor) -> Tensor:
    """Returns the elementwise sum over all ranks, the same on each."""
    if world_size() > 1:
        values = values.clone()
        dist.all_reduce(values)
    return values


def merge_rows(count: int, mine: Sequence[int], values: Tensor) -> Tensor:
    """Joins the rows of all ranks: (count, ...) float64 on the CPU, the same on each.

    mine: the rows that this rank worked on. values: their results, (len(mine), ...).
    """
    on_gpu = dist.is_initialized() and dist.get_backend() != "gloo"
    device = torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")
    out = torch.zeros(count, *values.shape[1:], dtype=torch.float64, device=device)
    places = torch.tensor(list(mine), dtype=torch.int64, device=device)
    out[places] = values.to(device, torch.float64)
    barrier()  # a rank may be slower by more than the timeout
    return total(out).cpu()


def clip_grad_norm(model: nn.Module, most: float) -> tuple[Tensor, Tensor]:
    """The global L2 norm of all gradients, and the factor that makes it at most `most`.

    most: 0 for no clipping. Each rank adds up the squares of its own shards; one number travels.
    Both are () float32 on the model's device, the same on all ranks; no host waits for them. The
    gradients stay as they are: `Optimizer.step` takes the factor, which is 1 where nothing is to be
    clipped or the norm is not finite.
    """
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    # In float32 for bfloat16 gradients too: a norm in their dtype would be off by up to 0.4 %.
    norms = torch._foreach_norm([local(g) for g in grads], 2.0, dtype=torch.float32)
    squares = torch.stack(norms).double().square().sum()
    mesh = mesh_of(grads)
    if mesh is not None and mesh.size(-1) > 1:
        # the last axis alone: the copies of hybrid sharding hold the same gradients
        dist.all_reduce(squares, group=mesh.get_group(mesh.ndim - 1))
    norm = squares.sqrt().float()
    if most == 0:
        return norm, torch.ones_like(norm)
    clipped = (norm > most) & norm.isfinite()
    return norm, torch.where(clipped, most / (norm + 1e-6), 1.0)
