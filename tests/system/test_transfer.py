"""Copies between host and GPU that nobody waits for, on a GPU that is not there."""

import torch
from fake_gpu import GPU, FakeGPU

from ldalign.system.transfer import Arriving, to_device

VALUES = [
    torch.tensor([5, -6, 7]),
    torch.tensor([[True, False, True]]),
    torch.tensor(0.25),
    torch.zeros(0, 4),
    torch.arange(6, dtype=torch.int32).view(2, 3).T,
    torch.tensor([1.5, -2.5], dtype=torch.bfloat16),
    torch.tensor([[1e-300]], dtype=torch.float64),
]


def test_to_device_is_one_copy_of_everything() -> None:
    gpu = FakeGPU()
    with gpu:
        there = to_device(GPU, *VALUES)
        assert all(x.is_cuda for x in there)
    assert not gpu.waits and len({x.untyped_storage().data_ptr() for x in there}) == 1
    for given, x in zip(VALUES, there, strict=True):
        assert x.dtype == given.dtype and torch.equal(x, given)
        assert x.storage_offset() * x.element_size() % 16 == 0  # a kernel's widest load
    assert to_device(GPU) == []


def test_on_the_cpu_nothing_is_copied() -> None:
    there = to_device(torch.device("cpu"), *VALUES)
    assert all(x is given for given, x in zip(VALUES, there, strict=True))
    assert Arriving(VALUES[0]).arrived() is VALUES[0]


def test_arriving_waits_for_its_own_copy_alone() -> None:
    gpu = FakeGPU()
    with gpu:
        (x,) = to_device(GPU, torch.tensor([3.0]))
        first, second = Arriving(x), Arriving(x + 1)
        assert not gpu.waits
        assert first.arrived().tolist() == [3.0] and second.arrived().tolist() == [4.0]
    assert [wait.kind for wait in gpu.waits] == ["event", "event"]
