"""Every Triton kernel compiles for GPUs that are not here, and its machine code is sound.

`make test` compiles the worst shape with the installed Triton, `make gpu-check` every case with
each Triton that requirements/ names. `python -m ldalign.kernels.compile_check` prints the table.
"""

import os
import re
import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest
from runs import ROOT

pytest.importorskip("triton", reason="the package triton is not installed")

from ldalign.kernels import compile_check
from ldalign.kernels.compile_check import Compiled, compiled_apart, looped_spills, problems

pytestmark = pytest.mark.gpu_check
# requirements/triton-3.6.txt is installed into .venv-triton-3.6
OTHERS = [path.stem for path in sorted((ROOT / "requirements").glob("triton-*.txt"))]


def written() -> set[str]:
    """The kernels in kernels/triton_*.py."""
    sources = [path.read_text(encoding="utf-8") for path in (ROOT / "kernels").glob("triton_*.py")]
    return set(re.findall(r"^def _(\w+)_kernel\(", "\n".join(sources), re.MULTILINE))


@pytest.mark.slow
def test_the_worst_shape() -> None:
    rows = compiled_apart(None, "--short")
    assert {(row.arch, row.dtype) for row in rows} == {(90, "bf16")}
    assert {"attention_dkv", "paged_attention", "sample"} <= {row.kernel for row in rows}
    assert not problems(rows)


# A test for each GPU, so that several processes share them.
@pytest.mark.long
@pytest.mark.parametrize("arch", compile_check.SHARED_KIB)
@pytest.mark.parametrize("folder", [None, *OTHERS])
def test_every_case(folder: str | None, arch: int) -> None:
    place = None
    if folder is not None:
        place = ROOT / f".venv-{folder}"
        if not (place / "triton").is_dir():
            pytest.skip(f"{place.name} is not there: make gpu-check makes it")
    rows = compiled_apart(place, f"--arch={arch}")
    if folder is not None:
        assert {row.triton.rpartition(".")[0] for row in rows} == {folder.removeprefix("triton-")}
    assert {row.arch for row in rows} == {arch}
    assert {row.kernel for row in rows} == written()
    assert {row.dtype for row in rows if row.multiplies} == {"bf16", "fp32"}
    assert not problems(rows)


INSTRUCTIONS = dict.fromkeys(compile_check.INSTRUCTIONS, 0)
SOUND = Compiled(
    kernel="attention",
    triton="3.9.0",
    arch=90,
    dtype="bf16",
    warps=8,
    stages=2,
    registers=255,
    spilled_bytes=0,
    looped_spills=0,
    shared_bytes=227 * 1024,
    instructions=INSTRUCTIONS | {"wgmma": 1, "store128": 1, "async128": 1},
    multiplies=True,
    widths=[128, 128],
    constants={"ROWS": 128},
)


def test_what_is_sound_has_no_problems() -> None:
    decoding = INSTRUCTIONS | {"mma": 1, "store128": 1, "async128": 1}
    few = replace(SOUND, kernel="paged_attention", constants={"ROWS": 16}, instructions=decoding)
    wide = replace(SOUND, dtype="fp32", instructions=INSTRUCTIONS | {"load128": 1, "store128": 1})
    assert not problems([SOUND, few, wide, replace(SOUND, arch=120, **on("mma"), shared_bytes=0)])


def on(product: str) -> dict[str, Any]:
    return {"instructions": INSTRUCTIONS | {product: 1, "store128": 1, "async128": 1}}


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"spilled_bytes": 72}, "spills 72 bytes"),
        ({"spilled_bytes": 8, "looped_spills": 2}, "spills in a loop, 2 instructions"),
        ({"shared_bytes": 227 * 1024 + 1}, "of shared memory"),
        ({"arch": 120, "shared_bytes": 99 * 1024 + 1, **on("mma")}, "of shared memory"),
        (on("mma"), "has no wgmma"),
        ({"arch": 100, **on("wgmma")}, "has no tcgen05"),
        ({"dtype": "fp32"}, "float32 on tensor cores"),
        ({"instructions": SOUND.instructions | {"async128": 0, "load128": 1}}, "fetches no"),
        ({"multiplies": False, "instructions": INSTRUCTIONS | {"store128": 1}}, "loads no 16"),
        ({"multiplies": False, "instructions": INSTRUCTIONS | {"load128": 1}}, "stores no 16"),
    ],
)
def test_each_problem_is_named(changes: dict[str, Any], what: str) -> None:
    (found,) = problems([replace(SOUND, **changes)])
    assert found.startswith("attention ") and what in found


def test_an_optimizer_moves_16_bytes_at_once() -> None:
    """All but the factor, one number."""
    plain = INSTRUCTIONS | {"load128": 1, "store128": 1}
    step = replace(SOUND, kernel="adamw", multiplies=False, instructions=plain)
    assert not problems([replace(step, widths=[128, 32, 128])])
    for widths in ([128, 64, 32], [128, 32, 32], [32], [128, 128]):
        (found,) = problems([replace(step, widths=widths)])
        assert found.endswith("moves less than 16 bytes at once")


def test_a_process_that_fails_says_why() -> None:
    with pytest.raises(RuntimeError, match="--nothing"):
        compiled_apart(None, "--nothing")


CODE = """
        /*0000*/                   STL [R1], R6 ;                 /* 0x0000040601007387 */
        /*0010*/              @!P4 BRA 0x0080 ;                   /* 0x0000000400e0c947 */
        /*0020*/                   LDL R4, [R1+0x4] ;             /* 0x0000040601007387 */
        /*0030*/               @P1 BRA P2, 0x0050 ;               /* 0x0000000400e0c947 */
        /*0040*/              @!P5 BRA 0x0020 ?trans1;            /* 0xfffffff80094d947 */
        /*0050*/                   LDL.LU R6, [R1] ;              /* 0x0000040601007387 */
        /*0060*/                   BRA.DIV UR4, 0x00a0 ;          /* 0x0000001e048c7947 */
        /*0070*/                   CALL.REL.NOINC 0x00d0 ;        /* 0x0000003c00847944 */
        /*0080*/               @P0 EXIT ;                         /* 0x000000000000094d */
        /*0090*/                   EXIT ;                         /* 0x000000000000794d */
        /*00a0*/                   STL [R1], R6 ;                 /* 0x0000040601007387 */
        /*00b0*/                   BRA 0x0070 ;                   /* 0xfffffff80094d947 */
        /*00c0*/                   LDL R4, [R1+0x4] ;             /* 0x0000040601007387 */
        /*00d0*/                   RET.REL.NODEC R2 0x0000 ;      /* 0x0000040601007387 */
"""


@pytest.mark.parametrize(
    ("was", "now", "loops"),
    [
        ("", "", 1),  # from 20 to 40; what lies behind the end and goes back is none
        ("@P1 BRA P2, 0x0050", "    BRA     0x0050", 0),  # nothing comes back from 40
        ("@P1 BRA P2, 0x0050", "@PT BRA     0x0050", 0),
        ("@!P5 BRA 0x0020 ?trans1", "@!P5 BRA 0x0000", 2),
        ("BRA 0x0070", "BRA 0x0050", 3),  # two more, from 50 to b0
        ("    EXIT", "@P1 EXIT", 2),  # on to a0, and back to 70
        ("    CALL.REL.NOINC 0x00d0", "@P6 BRA 0x00a0", 2),  # from 70 to b0
        ("RET.REL.NODEC R2 0x0000", "BRA 0x00c0", 2),
    ],
)
def test_spills_in_loops(was: str, now: str, loops: int) -> None:
    assert was in CODE and looped_spills(CODE.replace(was, now)) == loops


STEPS = """
import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from ldalign.kernels import triton_optim
from ldalign.kernels.triton_common import recording

class Driver:  # of a GPU that is not there
    get_current_device = get_current_stream = staticmethod(lambda *_: 0)
    get_current_target = staticmethod(lambda: GPUTarget("cuda", 90, 32))

driver.set_active(Driver())
used = []

def launch(kernel, arguments, options):
    kernel.device_caches[0]  # makes the attribute `compile`
    kernel.compile = lambda *_, **__: object()
    kernel.warmup(*arguments, grid=(1,), **options)
    used.append(kernel)

x, factor = torch.empty(64, 64, device="meta"), torch.empty((), device="meta")
with recording((9, 0), launch):
    for step, seed in ((1, 1), (2, 16), (3, 2**32 - 1)):
        rate = 1e-3 / step if step < 3 else 1.0
        triton_optim.adamw_(x, x, x, x, factor, rate, 0.1, 0.9, 0.999, 1e-8, step, seed)
        triton_optim.rmsprop_(x, x, x, factor, rate, 0.1, 0.99, 1e-8, seed)
print(len(used), *(len(kernel.device_caches[0][0]) for kernel in used[:2]))
"""


def test_optimizers_are_compiled_once_for_all_steps() -> None:
    """By Triton's own cache: another learning rate, step or seed is no other kernel."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-P", "-c", STEPS], capture_output=True, text=True, env=environment
    )
    assert done.stdout.split() == ["6", "1", "1"], done.stderr[-4000:]
