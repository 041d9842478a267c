"""Compiles every Triton kernel as production would launch it, for GPUs this machine need not have.

The ops run on tensors of device "meta" at production shapes; each launch is recorded and compiled
for sm_80 and sm_90, and the machine code is asked what it takes: registers, spilled bytes, shared
memory, tensor-core instructions.

    python -m ldalign.kernels.compile_check         the table
    python -m ldalign.kernels.compile_check --json  the same, one JSON list
"""

import argparse
import json
import re
import subprocess
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from ldalign.kernels import (
    triton_attention,
    triton_decode,
    triton_elementwise,
    triton_head,
    triton_norm,
)
from ldalign.kernels.loss_options import DPO, LossOptions
from ldalign.kernels.triton_common import INTERPRETED, recording

CAPABILITIES = ((8, 0), (9, 0))
DTYPES = (torch.bfloat16, torch.float32)
TOKENS = 8192
# Width, the feed-forward's width, heads, head width.
MODELS = ((576, 1536, 9, 64), (4096, 14_336, 32, 128))
ATTENTION = ((9, 3, 64, None), (32, 8, 128, 4096))  # query heads, key heads, head width, window
# Rows, and new tokens of each: many that decode, few that decode, prompts.
DECODING = ((64, 1), (4, 1), (16, 512))
PAGES = 64  # of a row: 1024 tokens
HEADS = ((576, 49_152), (4096, 32_000), (4096, 128_256))  # width, vocabulary
# mma.sync and wgmma as the machine spells them; wgmma multiplies 64 rows at a time, so fewer rows
# are left to mma.sync
TENSOR_CORES = {80: r"\bHMMA\b", 90: r"\bHGMMA\b"}
WGMMA_ROWS = 64
TYPES = {
    torch.float64: "fp64",
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.int16: "i16",
    torch.uint8: "u8",
}


@dataclass(frozen=True)
class Compiled:
    """One kernel for one GPU.

    shared_bytes and registers as launched; a spill is a register kept in memory.
    """

    kernel: str
    arch: int
    dtype: str
    warps: int
    registers: int
    spilled_bytes: int
    shared_bytes: int
    tensor_core_instructions: int
    multiplies: bool
    constants: dict[str, Any]


def run_production(dtype: torch.dtype) -> None:
    """Runs every op at every production shape, on tensors without memory."""

    def empty(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    def wide(*shape: int) -> Tensor:
        return empty(*shape, dtype=torch.float32)

    N = TOKENS
    for D, F, H, E in MODELS:
        x, weight, rstd = empty(N, D), empty(D), wide(N)
        triton_norm.rms_norm(x, weight, 1e-5)
        triton_norm.add_rms_norm(x, x, weight, 1e-5)
        triton_norm.rms_norm_backward(x, x, weight, rstd)
        triton_norm.add_rms_norm_backward(x, x, x, weight, rstd)
        q, angle = empty(N, H, E), wide(N, E // 2)
        triton_elementwise.rope(q, angle, angle, False, H)
        triton_elementwise.rope(q, angle, angle, True, H)
        gate_up = empty(N, 2 * F)
        triton_elementwise.swiglu(gate_up)
        triton_elementwise.swiglu_backward(empty(N, F), gate_up)
    segments = torch.tensor([(0, 2048, 0, 0), (2048, 5120, 0, 2048), (5120, TOKENS, 0, 2048)])
    for H, K, E, window in ATTENTION:
        qkv, out, lse = empty(N, H + 2 * K, E), empty(N, H, E), wide(N, H)
        triton_attention.pair_attention(qkv, H, segments, window)
        triton_attention.pair_attention_backward(out, qkv, out, lse, H, segments, window)
        cache = empty(64 * PAGES, 16, K, E)
        for R, most in DECODING:
            rows, pages = empty(R, 2, dtype=torch.int64), empty(R, PAGES, dtype=torch.int32)
            triton_decode.paged_attention(
                empty(R * most, H, E), cache, cache, rows, pages, most, window
            )
    sums = wide(16)
    triton_elementwise.weighted_dpo(sums, sums, sums, sums, sums, 0.1)
    triton_elementwise.weighted_dpo(sums, sums, sums, sums, sums, 0.1, "ipo")
    for D, V in HEADS:
        hidden, weight, target = empty(N, D), empty(V, D), empty(N, dtype=torch.int64)
        triton_head.linear_logprob(hidden, weight, target)
        triton_head.linear_logprob_backward(wide(N), hidden, weight, target, wide(N), True, True)
        triton_head.sft_loss(hidden, weight, target, 1.0, True, True)
        # 32 responses of 256 tokens: several pieces at the largest vocabulary
        pairs = hidden, weight, target, [256] * 32, wide(32), wide(16), 0.1, 1.0, True, True
        for options in (DPO, LossOptions("ipo", length_normalised=True)):
            triton_head.pair_loss(*pairs, options)
        logits, uniform, seen = (
            wide(64, V),
            empty(64, dtype=torch.float64),
            empty(64, 0, dtype=torch.int64),
        )
        for temperature in (0.0, 1.0):
            triton_decode.sample(logits, uniform, temperature, 0, 1.0, 0.0, 1.0, seen)


def compiled() -> list[Compiled]:
    """Compiles each distinct kernel of `run_production` for each GPU of CAPABILITIES.

    Raises RuntimeError in Triton's interpreter.
    """
    if INTERPRETED:
        raise RuntimeError(
            "compile_check: TRITON_INTERPRET is set, so there is nothing to compile; unset it"
        )
    done: dict[str, Compiled] = {}
    for capability in CAPABILITIES:
        for dtype in DTYPES:
            arch, kind = capability[0] * 10 + capability[1], TYPES[dtype]

            def record(kernel: Any, args: tuple[Any, ...], options: dict[str, Any]) -> None:
                launch = _Launch(kernel, args, options)
                key = f"{capability} {launch.key}"  # noqa: B023  called only inside this iteration
                if key not in done:
                    done[key] = launch.compile(arch, kind)  # noqa: B023

            with recording(capability, record):
                run_production(dtype)
    return list(done.values())


class _Launch:
    """A recorded launch as the compiler sees it, as Triton's own JIT tells.

    That is types, and what is known of the values.
    """

    def __init__(self, kernel: Any, args: tuple[Any, ...], options: dict[str, Any]) -> None:
        self.kernel = kernel
        # What is not an argument of the kernel is an option of the compiler.
        self.options = {
            name: value for name, value in options.items() if name not in kernel.arg_names
        }
        self.constants = {
            name: value for name, value in options.items() if name not in self.options
        }
        self.signature: dict[str, str] = {}
        self.known: dict[tuple[int, ...], list[list[Any]]] = {}
        fixed: dict[str, Any] = dict(self.constants)
        names = kernel.arg_names
        for i, (parameter, value) in enumerate(zip(kernel.params, args, strict=False)):
            name = parameter.name
            self.signature[name] = _type(value)
            if parameter.do_not_specialize:
                continue
            if _multiple_of_16(value) and not parameter.do_not_specialize_on_alignment:
                self.known[(i,)] = [["tt.divisibility", 16]]
            if type(value) is int and value == 1:
                self.signature[name], fixed[name] = "constexpr", 1
        for name in self.constants:
            self.signature[name] = "constexpr"
        assert set(self.signature) == set(names), (
            f"{kernel.__name__}: {set(names) ^ set(self.signature)}"
        )
        self.fixed = fixed
        self.key = f"{kernel.__name__} {self.signature} {sorted(self.known)} {fixed} {self.options}"

    def compile(self, arch: int, dtype: str) -> Compiled:
        source = ASTSource(
            fn=self.kernel, signature=self.signature, constexprs=self.fixed, attrs=self.known
        )
        binary = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=self.options)
        used, code = _machine_code(binary.asm["cubin"])
        narrow = self.constants.get("ROWS", WGMMA_ROWS) < WGMMA_ROWS
        return Compiled(
            kernel=self.kernel.__name__.strip("_").removesuffix("_kernel"),
            arch=arch,
            dtype=dtype,
            warps=self.options["num_warps"],
            registers=used["REG"],
            # A spilled register lies in the stack frame, which the machine calls local memory.
            spilled_bytes=max(used["STACK"], used["LOCAL"]),
            shared_bytes=binary.metadata.shared,
            tensor_core_instructions=len(re.findall(TENSOR_CORES[80 if narrow else arch], code)),
            multiplies="tt.dot" in binary.asm["ttir"],
            constants=self.constants,
        )


def _type(value: Any) -> str:
    if isinstance(value, Tensor):
        return "*" + TYPES[value.dtype]
    if isinstance(value, float):
        return "fp32"
    return "i32" if -(2**31) <= value < 2**31 else "i64"


def _multiple_of_16(value: Any) -> bool:
    """A pointer's address in bytes (a fresh allocation's is), or an integer itself."""
    if isinstance(value, Tensor):
        return value.storage_offset() * value.element_size() % 16 == 0
    return isinstance(value, int) and value % 16 == 0


def _machine_code(cubin: bytes) -> tuple[dict[str, int], str]:
    """What the one kernel in a binary uses, and its instructions.

    It uses registers, and bytes of stack and local memory.
    """
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = {
            flag: subprocess.run(
                [tool, flag, file.name], capture_output=True, text=True, check=True
            ).stdout
            for flag in ("-res-usage", "-sass")
        }
    used = {
        name: int(number) for name, number in re.findall(r"\b([A-Z]+):(\d+)", text["-res-usage"])
    }
    return used, text["-sass"]


def table(rows: list[Compiled] | None = None) -> str:
    """Returns the rows, by default those of `compiled()`, as aligned text."""
    rows = compiled() if rows is None else rows
    head = [
        "kernel",
        "dtype",
        "GPU",
        "warps",
        "registers",
        "spilled B",
        "shared KiB",
        "tensor-core instr.",
        "constants",
    ]
    cells = [head] + [
        [
            row.kernel,
            row.dtype,
            f"sm_{row.arch}",
            str(row.warps),
            str(row.registers),
            str(row.spilled_bytes),
            f"{row.shared_bytes / 1024:.1f}",
            str(row.tensor_core_instructions) if row.multiplies else "-",
            " ".join(f"{name}={value}" for name, value in row.constants.items()),
        ]
        for row in rows
    ]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join(
        "  ".join(x.ljust(w) for x, w in zip(line, widths, strict=True)).rstrip() for line in cells
    )


def main() -> None:
    """Prints the table, or JSON."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--json", action="store_true", help="print a JSON list instead of the table"
    )
    as_json = parser.parse_args().json
    rows = compiled()
    print(json.dumps([asdict(row) for row in rows]) if as_json else table(rows))


if __name__ == "__main__":
    main()
