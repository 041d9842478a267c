"""A GPU that is not there: tensors of the CPU stand for its own, and what the host waits for it.

`FakeGPU` is entered around code that is given the device "cuda". Memory knows where it lies: what
is made of device tensors is on the device, and Python is told so (`x.device`, `x.is_cuda`). Each
place where a real GPU would make the host wait is recorded with its line. An operation on tensors
of both sides is an error, as on a GPU, and so is a look at a copy to the host that has not been
waited for. Triton's kernels are not launched: what they would fill in stays zeros, so it is the
host that is tested here and no number.

Not seen: a wait inside torch's C++ that does not show in the operators it calls, CUDA graphs, and
FSDP. Its mesh is of a device that is really there, the CPU here: it copies the weights back to it,
and gathers them into buffers of it, through which no operator that is seen here follows them.
"""

import contextlib
import linecache
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ldalign import ops
from ldalign.kernels import triton_common

ROOT = Path(__file__).resolve().parents[2]
GPU = torch.device("cuda", 0)

# Operators whose result has a size that only the device knows, and those that return a number.
WAITING = {
    "_local_scalar_dense": "read",
    "equal": "read",
    "nonzero": "size",
    "masked_select": "size",
    "_unique2": "size",
    "unique_dim": "size",
    "unique_consecutive": "size",
}
# These take indices from the host too, which a GPU then copies, and waits for.
INDEXED = {"index", "index_put", "index_put_", "_index_put_impl_"}


def waits_for(name: str, args: Any, kwargs: Any) -> str | None:
    """What the host waits for in an operator of tensors on the device: numbers or a size, or None.

    name, args, kwargs: the operator's own name and what it was given.
    """
    if name in WAITING:
        return WAITING[name]
    if name == "repeat_interleave" and kwargs.get("output_size") is None and len(args) == 1:
        return "size"
    indices = [x for x in args[1] if x is not None] if name in INDEXED else []
    return "size" if any(x.dtype in (torch.bool, torch.uint8) for x in indices) else None


class Wait(NamedTuple):
    """One wait of the host: its kind, and the innermost line of the product that asked for it."""

    kind: str
    place: str  # file:function
    line: str


class _Storages:
    """A set of tensors' memory."""

    def __init__(self) -> None:
        self.known: dict[int, StorageWeakRef] = {}  # the reference keeps the number from reuse

    def __contains__(self, x: Tensor) -> bool:
        with torch._C.DisableTorchFunction():
            return x.untyped_storage()._cdata in self.known

    def add(self, x: Tensor) -> None:
        with torch._C.DisableTorchFunction():
            reference = StorageWeakRef(x.untyped_storage())
        if len(self.known) > 20_000:
            self.known = {k: ref for k, ref in self.known.items() if not ref.expired()}
        self.known[reference.cdata] = reference

    def remove(self, x: Tensor) -> None:
        with torch._C.DisableTorchFunction():
            self.known.pop(x.untyped_storage()._cdata, None)


class FakeGPU:
    """See the module. waits: what was recorded, in order. copies: how many there were to the
    device, waited for or not.
    """

    def __init__(self) -> None:
        self.waits: list[Wait] = []
        self.copies = 0
        self.device, self.pinned, self.unread = _Storages(), _Storages(), _Storages()
        self.python, self.operators = _Python(self), _Operators(self)

    def __enter__(self) -> "FakeGPU":
        self.left = contextlib.ExitStack()
        patch = self.left.enter_context(pytest.MonkeyPatch.context())
        sizes = SimpleNamespace(multi_processor_count=132)
        patch.setattr(torch.cuda, "get_device_properties", lambda _: sizes)
        patch.setattr(torch.cuda, "Event", lambda: _Event(self))
        patch.setattr(torch.cuda, "current_stream", lambda device=None: None)
        self.left.enter_context(triton_common.recording((9, 0), lambda *_: None))
        self.left.enter_context(self.operators)
        self.left.enter_context(self.python)
        return self

    def __exit__(self, *error: Any) -> None:
        self.left.__exit__(*error)

    def move(self, model: nn.Module) -> None:
        """Has the model's parameters and buffers lie on the device."""
        for x in (*model.parameters(), *model.buffers()):
            self.device.add(x)

    def counts(self) -> Counter[tuple[str, str]]:
        """How often the host waited, by kind and place."""
        return Counter((wait.kind, wait.place) for wait in self.waits)

    def wait(self, kind: str) -> None:
        frame: Any = sys._getframe(1)
        while frame is not None:
            path = Path(frame.f_code.co_filename)
            inside = path.is_relative_to(ROOT / "ldalign") or path.is_relative_to(ROOT / "kernels")
            if inside:
                name, number = path.relative_to(ROOT), frame.f_lineno
                line = f"{name}:{number}: {linecache.getline(str(path), number).strip()}"
                place = f"{name}:{frame.f_code.co_qualname.replace('.<locals>', '')}"
                self.waits.append(Wait(kind, place, line))
                return
            frame = frame.f_back
        self.waits.append(Wait(kind, "outside", ""))

    def copied(self, source: Tensor, target: Tensor, non_blocking: bool) -> None:
        """Records what a copy between the sides costs the host."""
        up = target in self.device
        self.copies += up
        host = source if up else target
        if not non_blocking or (up and source not in self.pinned):
            self.wait("copy to the device" if up else "copy to the host")
        elif not up:
            self.unread.add(host)

    def read(self, x: Tensor) -> None:
        """The host looks at numbers."""
        if x in self.device:
            self.wait("read")
        assert x not in self.unread, "the host reads a copy that may not have arrived"


class _Event:
    """torch.cuda.Event."""

    def __init__(self, gpu: FakeGPU) -> None:
        self.gpu = gpu

    def record(self, stream: None = None) -> None:
        self.before, self.gpu.unread = self.gpu.unread, _Storages()

    def synchronize(self) -> None:
        self.gpu.wait("event")
        self.before = _Storages()


class _Python(TorchFunctionMode):
    """What Python asks of tensors: where they lie, copies between the sides, numbers."""

    def __init__(self, gpu: FakeGPU) -> None:
        super().__init__()
        self.gpu = gpu

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        gpu, kwargs = self.gpu, kwargs or {}
        if func == Tensor.device.__get__:
            return GPU if args[0] in gpu.device else func(*args)
        if func == Tensor.is_cuda.__get__:
            return args[0] in gpu.device
        if func == Tensor.is_cpu.__get__:
            return args[0] not in gpu.device
        if func is Tensor.is_pinned:
            return args[0] in gpu.pinned
        if func is Tensor.pin_memory:
            return self._pinned(args[0].clone())
        if func in (Tensor.to, Tensor.cpu, Tensor.cuda):
            return self._to(func, *args, **kwargs)
        if func in (Tensor.tolist, Tensor.numpy, Tensor.__array__):
            gpu.read(args[0])
            return func(*args, **kwargs)
        if func is Tensor.backward:
            ones = torch.ones_like(args[0])
            with self:  # the Python of an operator's backward is looked at too
                return torch.autograd.graph._engine_run_backward(
                    (args[0],),
                    (ones,),
                    False,
                    False,
                    (),
                    allow_unreachable=True,
                    accumulate_grad=True,
                )
        return self._made(func, args, kwargs)

    def _made(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """Calls what may be a factory: one that is told a device, or to pin."""
        wanted, pin = kwargs.get("device"), kwargs.get("pin_memory", False)
        on_gpu = wanted is not None and torch.device(wanted).type == "cuda"
        if pin or on_gpu:
            kwargs = {**kwargs, "pin_memory": False}
        if wanted is not None:
            kwargs["device"] = "cpu"
        if not (pin or on_gpu):
            return func(*args, **kwargs)
        if func not in (torch.tensor, torch.empty, torch.zeros, torch.full, torch.arange):
            kwargs.pop("pin_memory")
        out = func(*args, **kwargs)
        if on_gpu:
            self.gpu.device.add(out)
            if func in (torch.tensor, torch.as_tensor):
                self.gpu.wait("copy to the device")
        return self._pinned(out) if pin else out

    def _pinned(self, x: Tensor) -> Tensor:
        self.gpu.pinned.add(x)
        return x

    def _to(self, func: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        gpu = self.gpu
        copy = kwargs.pop("copy", False)
        if func is not Tensor.to:
            device, dtype, non_blocking = "cpu" if func is Tensor.cpu else GPU, None, False
        elif args and isinstance(args[0], Tensor):
            device, dtype = "cuda" if args[0] in gpu.device else "cpu", args[0].dtype
            non_blocking = kwargs.get("non_blocking", False)
        else:
            device, dtype, non_blocking, _ = torch._C._nn._parse_to(*args, **kwargs)
        here = x in gpu.device
        there = here if device is None else torch.device(device).type == "cuda"
        if dtype is not None and dtype != x.dtype:
            pinned, x, copy = x in gpu.pinned, x.to(dtype), False
            if pinned:  # torch copies first and converts on the device
                gpu.pinned.add(x)
        if here == there:
            return x.clone() if copy else x
        out = x.clone()
        (gpu.device.add if there else gpu.device.remove)(out)
        gpu.copied(x, out, non_blocking)
        return out


class _Operators(TorchDispatchMode):
    """What operators do: where their results lie, and which of them make the host wait."""

    def __init__(self, gpu: FakeGPU) -> None:
        super().__init__()
        self.gpu = gpu

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        gpu, kwargs = self.gpu, kwargs or {}
        name = func._schema.name.partition("::")[2]
        if func.namespace == "ldalign":
            return self._ours(name, args)
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        on = [x for x in tensors if x in gpu.device]
        if name == "copy_":
            if (args[0] in gpu.device) != (args[1] in gpu.device):
                gpu.copied(args[1], args[0], args[2] if len(args) > 2 else False)
            return func(*args, **kwargs)
        if name == "_local_scalar_dense":
            gpu.read(args[0])
            return func(*args, **kwargs)
        if "empty" in name:  # for what a kernel would fill in
            out = func(*args, **kwargs).zero_()
            if on:
                gpu.device.add(out)
            return out
        if not on:
            return func(*args, **kwargs)
        self._look(name, args, kwargs, tensors)
        out = func(*args, **kwargs)
        for x in tree_leaves(out):
            if isinstance(x, Tensor):
                gpu.device.add(x)
        return out

    def _look(self, name: str, args: Any, kwargs: Any, tensors: list[Tensor]) -> None:
        gpu = self.gpu
        if (kind := waits_for(name, args, kwargs)) is not None:
            gpu.wait(kind)
        indices = [x for x in args[1] if x is not None] if name in INDEXED else []
        if any(x not in gpu.device for x in indices):
            gpu.wait("copy to the device")
        seen = {id(x) for x in indices}
        for x in tensors:
            other = id(x) not in seen and x not in gpu.device and x.ndim > 0
            assert not other, (
                f"{name} of tensors on the GPU takes one of {tuple(x.shape)} on the CPU"
            )

    def _ours(self, name: str, args: Any) -> Any:
        """Runs one of ldalign's operators as `ops` does, and looks inside."""
        run = getattr(ops, f"_run_{name}", None) or (lambda *a: ops._raw(name, a[0])(*a))
        inside = self.gpu.python not in _get_current_function_mode_stack()
        with self.gpu.python if inside else contextlib.nullcontext(), self:
            return run(*args)
