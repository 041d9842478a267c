"""Ranks: starting them, FSDP2 wrapping, sums over all of them.

One code path: a run without torchrun is a world of one rank, wrapped the same way. Compute dtype and master dtype come
from FSDP2's mixed precision: parameters and their gradients are kept in float32, gathered in the compute dtype.
"""

import datetime
import os
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from ldalign.errors import EnvironmentProblem
from ldalign.memory import keep_freed_memory


def start(device: str = "auto") -> torch.device:
    """Joins the process group (torchrun's, or a group of one) and returns this rank's device.

    device: auto (CUDA where there is one), cpu or cuda. Raises EnvironmentProblem for a device that is not there.
    """
    if device != "cuda":
        keep_freed_memory()
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        local = int(os.environ.get("LOCAL_RANK", 0))
        if local >= torch.cuda.device_count():
            raise EnvironmentProblem(
                f"device=cuda: rank {local} of this machine has no GPU ({torch.cuda.device_count()} found); "
                "use device=cpu or fewer processes"
            )
        torch.cuda.set_device(local)
    if not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo"
        # Stages without collectives (generation) may take hours on one rank while another waits at their end.
        timeout = datetime.timedelta(hours=24)
        if "RANK" in os.environ:
            dist.init_process_group(backend, timeout=timeout)
        else:
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
    return torch.device(device, torch.cuda.current_device()) if device == "cuda" else torch.device("cpu")


def stop() -> None:
    """Leaves the process group."""
    if dist.is_initialized():
        dist.destroy_process_group()


def rank() -> int:
    """This process's number, 0 to world_size() - 1."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """How many processes work on this run."""
    return dist.get_world_size() if dist.is_initialized() else 1


def barrier() -> None:
    """Waits for all ranks."""
    if world_size() > 1:
        dist.barrier()


def shard(model: nn.Module, blocks: Sequence[nn.Module], compute_dtype: torch.dtype, device: torch.device) -> nn.Module:
    """FSDP2 over all ranks: each block a group of its own, the rest (embedding, final norm, head) one more.

    The model must hold float32 weights. Gradients are *summed* over ranks in float32: the loss is already divided by
    the global count, so any split over ranks and micro-batches gives the same gradient.
    """
    mesh: DeviceMesh = init_device_mesh(device.type, (world_size(),))
    # The rotary tables enter the blocks in float32 and must stay so: inputs are not cast.
    policy = MixedPrecisionPolicy(param_dtype=compute_dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for module in (*blocks, model):
        # Alone, a rank has nothing to gather: the cast weights of the forward are kept for the backward.
        wrapped = fully_shard(module, mesh=mesh, mp_policy=policy, reshard_after_forward=world_size() > 1)
        wrapped.set_gradient_divide_factor(1.0)
        wrapped.set_force_sum_reduction_for_comms(True)
    return model


def last_micro(model: nn.Module, last: bool) -> None:
    """Before each micro-batch: gradients are reduced over ranks only after the last one of a global batch.

    A rank alone reduces every time, which only moves them into the float32 master gradients, but keeps its cast
    weights until the last.
    """
    assert isinstance(model, FSDPModule)
    if world_size() > 1:
        model.set_requires_gradient_sync(last)
    else:
        model.set_reshard_after_backward(last)


def full_state(model: nn.Module, dtype: torch.dtype) -> dict[str, Tensor]:
    """All parameters by name, whole, on the CPU in `dtype`; empty but on rank 0. Every rank must call it."""
    state = {}
    for name, p in model.named_parameters():
        whole = (p.full_tensor() if isinstance(p, DTensor) else p).detach()
        if rank() == 0:
            state[name] = whole.to("cpu", dtype)
    return state


def total(values: Tensor) -> Tensor:
    """The elementwise sum over all ranks, the same on each."""
    if world_size() > 1:
        values = values.clone()
        dist.all_reduce(values)
    return values


def merge_rows(count: int, mine: Sequence[int], values: Tensor) -> Tensor:
    """Per-row results of all ranks in one (count,) float64 CPU tensor; each rank gives the rows `mine` it worked on."""
    on_gpu = dist.is_initialized() and dist.get_backend() != "gloo"
    device = torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")
    out = torch.zeros(count, dtype=torch.float64, device=device)
    out[torch.tensor(list(mine), dtype=torch.int64, device=device)] = values.to(device, torch.float64)
    return total(out).cpu()


def clip_grad_norm(model: nn.Module, most: float) -> Tensor:
    """Scales all gradients so that their global L2 norm is at most `most` (0: no clipping); returns the norm before."""
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    norm: Any = torch.nn.utils.get_total_norm(grads, error_if_nonfinite=False, foreach=True)
    norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
    if most > 0 and torch.isfinite(norm):
        torch.nn.utils.clip_grads_with_norm_(model.parameters(), most, norm, foreach=True)
    return norm
