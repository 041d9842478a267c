"""Every Triton kernel compiles for sm_80 and sm_90 at production shapes, and its code is sound.

No GPU is needed.

`python -m ldalign.kernels.compile_check` prints the same facts as a table.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest

pytest.importorskip("triton", reason="the package triton is not installed")
pytestmark = pytest.mark.slow

SHARED_KIB = {80: 163, 90: 227}  # what one program may have
KERNELS = {
    "accumulate",
    "attention",
    "attention_dkv",
    "attention_dq",
    "logit_gradient",
    "logprob_slab",
    "merge_slabs",
    "merge_splits",
    "paged_attention",
    "pair_coefficient",
    "rms_norm",
    "rms_norm_backward",
    "rope",
    "row_statistics",
    "sample",
    "sum_rows",
    "swiglu",
    "swiglu_backward",
    "weighted_dpo",
}


@pytest.fixture(scope="module")
def rows() -> list[dict[str, Any]]:
    """In a process of its own: this one may have Triton in its interpreter."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-P", "-m", "ldalign.kernels.compile_check", "--json"],
        capture_output=True,
        text=True,
        env=environment,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    found: list[dict[str, Any]] = json.loads(done.stdout)
    return found


def failing(
    rows: list[dict[str, Any]], sound: Callable[[dict[str, Any]], bool]
) -> list[dict[str, Any]]:
    return [row for row in rows if not sound(row)]


def test_every_kernel_is_compiled_for_both(rows: list[dict[str, Any]]) -> None:
    for arch in SHARED_KIB:
        assert {row["kernel"] for row in rows if row["arch"] == arch} == KERNELS


def test_no_register_is_spilled(rows: list[dict[str, Any]]) -> None:
    assert not failing(rows, lambda row: row["spilled_bytes"] == 0)


def test_shared_memory_fits(rows: list[dict[str, Any]]) -> None:
    assert not failing(rows, lambda row: row["shared_bytes"] <= SHARED_KIB[row["arch"]] * 1024)


def test_products_run_on_tensor_cores(rows: list[dict[str, Any]]) -> None:
    """In bfloat16. float32 must not: tensor cores would round it to ten bits."""
    products = [row for row in rows if row["multiplies"]]
    assert {(row["arch"], row["dtype"]) for row in products} == {
        (a, d) for a in SHARED_KIB for d in ("bf16", "fp32")
    }
    assert not failing(
        products, lambda row: (row["tensor_core_instructions"] > 0) == (row["dtype"] == "bf16")
    )
