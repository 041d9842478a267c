"""Compiles every Triton kernel as production would launch it, for GPUs this machine need not have.

The ops run on tensors of device "meta" at production shapes; each launch is recorded and compiled
for sm_80, sm_90, sm_100 and sm_120, and the machine code is asked what it takes: registers, spilled
bytes, shared memory, instructions. `problems` says what of it is not as it should be. A new kernel
needs a call in `run_production`, nothing else.

    python -m ldalign.kernels.compile_check          the table; exit code 1 where there are problems
    python -m ldalign.kernels.compile_check --short  one shape, the worst, on sm_90
    python -m ldalign.kernels.compile_check --json   the same, one JSON list

The installed Triton compiles, or one in a folder of its own that PYTHONPATH names
(`pip install --no-deps --target FOLDER triton==3.6.0`).
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

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
    triton_optim,
)
from ldalign.kernels.loss_options import DPO, LossOptions
from ldalign.kernels.triton_common import INTERPRETED, recording

# KiB of shared memory that one program may have (CUDA C++ Programming Guide, compute capabilities)
SHARED_KIB = {80: 163, 90: 227, 100: 227, 120: 99}
# Which tensor-core instructions an architecture's large products are made of.
PRODUCTS = {80: "mma", 90: "wgmma", 100: "tcgen05", 120: "mma"}
# Of a thread, stored before a loop and loaded after it, once a program. The compiler does so with a
# value or two where registers are left, in one version here and in another there.
SPILLED_BYTES = 64
FEW_ROWS = 64  # a decoded token's query heads are fewer: wgmma and tcgen05 leave those to mma
# Instructions that are counted, as the machine spells them.
INSTRUCTIONS = {
    "mma": r"\bHMMA\b",
    "wgmma": r"\bHGMMA\b",
    "tcgen05": r"\bUTC\w*MMA\b",
    "load128": r"\bLDG\.E\S*\.128\b",
    "store128": r"\bSTG\.E\S*\.128\b",
    "async128": r"\bLDGSTS\S*\.128\b",  # from global to shared memory while the program goes on
}
# What reads numbers one at a time, or whose results are few a program: all else loads and stores
# 16 bytes at once, which takes aligned pointers, strides and sizes.
NARROW_LOADS = {"pair_coefficient", "weighted_dpo"}
NARROW_STORES = {
    *NARROW_LOADS,
    "merge_splits",
    "row_statistics",
    "sample",
    "sum_rows",
}
TOKENS = 8192
# Rows, and new tokens of each: many that decode, few that decode, prompts.
DECODING = ((64, 1), (4, 1), (16, 512))
PAGES = 64  # of a row: 1024 tokens
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


class Shapes(NamedTuple):
    """The shapes of one run through all ops, on one architecture in one dtype."""

    arch: int
    dtype: torch.dtype
    models: Sequence[tuple[int, int, int, int]]  # width, the feed-forward's, heads, head width
    attention: Sequence[tuple[int, int, int, int | None]]  # heads, key heads, head width, window
    heads: Sequence[tuple[int, int]]  # width, vocabulary


SMOLLM2, MISTRAL = (9, 3, 64, None), (32, 8, 128, 4096)
# Query heads of a key head, head width, window: what the compiler sees of a shape.
GROUPS = [(8 * G, 8, E, w) for G, E, w in product((1, 4, 7, 8), (64, 128), (None, 4096))]
ATTENTION = {
    torch.bfloat16: [SMOLLM2, *GROUPS],
    # Guides and small models: the tiles depend on the head width alone.
    torch.float32: [SMOLLM2, MISTRAL, (56, 8, 128, None)],
}
MODELS = [(576, 1536, 9, 64), (4096, 14_336, 32, 128)]
HEADS = [(576, 49_152), (4096, 32_000), (4096, 151_936)]
FULL = [
    Shapes(arch, dtype, MODELS, attention, HEADS)
    for arch, (dtype, attention) in product(SHARED_KIB, ATTENTION.items())
]
# A group that is no power of two, the wide head and a window: the most registers.
SHORT = [Shapes(90, torch.bfloat16, MODELS[1:], [(56, 8, 128, 4096)], HEADS[1:2])]


@dataclass(frozen=True)
class Compiled:
    """One kernel for one GPU.

    shared_bytes and registers as launched; a spill is a register kept in memory. looped_spills: how
    many instructions in loops store or load one. instructions: how many of each of INSTRUCTIONS.
    widths: the bits of each load from and store to global memory.
    """

    kernel: str
    triton: str
    arch: int
    dtype: str
    warps: int
    stages: int
    registers: int
    spilled_bytes: int
    looped_spills: int
    shared_bytes: int
    instructions: dict[str, int]
    multiplies: bool
    widths: list[int]
    constants: dict[str, Any]

    def __str__(self) -> str:
        constants = " ".join(f"{name}={value}" for name, value in self.constants.items())
        return f"{self.kernel} {self.dtype} sm_{self.arch} Triton {self.triton} {constants}"


def run_production(shapes: Shapes) -> None:
    """Runs every op at every one of the shapes, on tensors without memory."""
    dtype = shapes.dtype

    def empty(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    def wide(*shape: int) -> Tensor:
        return empty(*shape, dtype=torch.float32)

    N = TOKENS
    for D, F, H, E in shapes.models:
        x, weight, rstd = empty(N, D), empty(D), wide(N)
        triton_norm.rms_norm(x, weight, 1e-5)
        triton_norm.add_rms_norm(x, x, weight, 1e-5)
        triton_norm.rms_norm_backward(x, x, weight, rstd)
        triton_norm.add_rms_norm_backward(x, x, x, weight, rstd)
        q, angle = empty(N, H, E), wide(N, E // 2)
        triton_elementwise.rope_(q, angle, angle, False, H)
        triton_elementwise.rope_(q, angle, angle, True, H)
        gate_up = empty(N, 2 * F)
        triton_elementwise.swiglu(gate_up)
        triton_elementwise.swiglu_backward(empty(N, F), gate_up)
    segments = torch.tensor([(0, 2048, 0, 0), (2048, 5120, 0, 2048), (5120, TOKENS, 0, 2048)])
    for H, K, E, window in shapes.attention:
        qkv, out, lse = empty(N, H + 2 * K, E), empty(N, H, E), wide(N, H)
        triton_attention.pair_attention(qkv, H, segments, window)
        triton_attention.pair_attention_backward(out, qkv, out, lse, H, segments, window)
        cache, slots = empty(64 * PAGES, 16, K, E), empty(N, dtype=torch.int64)
        angle = wide(N, E // 2)
        triton_decode.rope_to_pages(qkv, angle, angle, H, cache, cache, slots)
        for R, most in DECODING:
            rows, pages = empty(R, 2, dtype=torch.int64), empty(R, PAGES, dtype=torch.int32)
            triton_decode.paged_attention(
                empty(R * most, H, E), cache, cache, rows, pages, most, window
            )
    weight, factor = empty(4096, 576), empty(dtype=torch.float32)
    for kind in ATTENTION:
        average = empty(4096, 576, dtype=kind)
        triton_optim.adamw_(
            weight, weight, average, average, factor, 1e-3, 0.1, 0.9, 0.999, 1e-8, 1, 0
        )
        triton_optim.rmsprop_(weight, weight, average, factor, 1e-3, 0.1, 0.99, 1e-8, 0)
    for D, V in shapes.heads:
        hidden, weight, target = empty(N, D), empty(V, D), empty(N, dtype=torch.int64)
        triton_head.linear_logprob(hidden, weight, target)
        triton_head.linear_logprob_backward(wide(N), hidden, weight, target, wide(N), True, True)
        triton_head.sft_loss(hidden, weight, target, 1.0, True, True)
        pairs = hidden, weight, target, [256] * 32, wide(32), wide(16), 0.1, 1.0, True, True
        for options in (DPO, LossOptions("ipo", length_normalised=True)):
            triton_head.pair_loss(*pairs, options)
        sums = wide(16)
        triton_elementwise.weighted_dpo(sums, sums, sums, sums, sums, 0.1)
        triton_elementwise.weighted_dpo(sums, sums, sums, sums, sums, 0.1, "ipo")
        logits, uniform, seen = (
            wide(64, V),
            empty(64, dtype=torch.float64),
            empty(64, 0, dtype=torch.int64),
        )
        triton_decode.sample(logits, uniform, 0.0, 0, 1.0, 0.0, 1.0, seen)
        for top_k, top_p in product((0, 50), (1.0, 0.9)):
            triton_decode.sample(logits, uniform, 1.0, top_k, top_p, 0.0, 1.0, seen)
    # So many pieces that dW is no longer added up as it is; the last shape's D and V.
    N = 8 * TOKENS
    hidden, target = empty(N, D), empty(N, dtype=torch.int64)
    triton_head.linear_logprob_backward(wide(N), hidden, weight, target, wide(N), True, True)


def compiled(selection: Sequence[Shapes] = FULL) -> list[Compiled]:
    """Compiles each distinct kernel of `run_production` for each of the selection.

    Raises RuntimeError in Triton's interpreter, and where Triton cannot compile a kernel.
    """
    if INTERPRETED:
        raise RuntimeError(
            "compile_check: TRITON_INTERPRET is set, so there is nothing to compile; unset it"
        )
    done: dict[str, Compiled] = {}
    for shapes in selection:
        arch, kind = shapes.arch, TYPES[shapes.dtype]

        def record(kernel: Any, args: tuple[Any, ...], options: dict[str, Any]) -> None:
            launch = _Launch(kernel, args, options)
            key = f"{arch} {launch.key}"  # noqa: B023  called only inside this iteration
            if key not in done:
                done[key] = launch.compile(arch, kind)  # noqa: B023

        with recording(divmod(arch, 10), record):
            run_production(shapes)
    return list(done.values())


def problems(rows: Sequence[Compiled]) -> list[str]:
    """Returns what is not as it should be, a line each.

    No register is spilled in a loop, and few before or after one; shared memory fits; bfloat16 is
    multiplied by the architecture's tensor cores with operands fetched ahead, float32 by none (they
    would round it to ten bits); what memory limits is read and written 16 bytes at a time.
    """
    found = []
    for row in rows:
        has = row.instructions
        wrong = {
            f"spills in a loop, {row.looped_spills} instructions": row.looped_spills > 0,
            f"spills {row.spilled_bytes} bytes": row.spilled_bytes > SPILLED_BYTES,
            f"takes {row.shared_bytes} bytes of shared memory": row.shared_bytes
            > SHARED_KIB[row.arch] * 1024,
            "loads no 16 bytes at once": row.kernel not in NARROW_LOADS
            and not has["load128"] + has["async128"],
            "stores no 16 bytes at once": row.kernel not in NARROW_STORES and not has["store128"],
        }
        if row.kernel in ("adamw", "rmsprop"):  # all but the factor, which is one number
            wrong["moves less than 16 bytes at once"] = sorted(set(row.widths)) != [32, 128] or (
                row.widths.count(32) > 1
            )
        if row.multiplies and row.dtype == "fp32":
            wrong["multiplies float32 on tensor cores"] = any(has[x] for x in PRODUCTS.values())
        elif row.multiplies:
            few = row.kernel == "paged_attention" and row.constants["ROWS"] < FEW_ROWS
            needed = "mma" if few else PRODUCTS[row.arch]
            wrong[f"has no {needed}"] = not has[needed]
            wrong["fetches no operand ahead"] = not has["async128"]
        found += [f"{row}: {what}" for what, is_so in wrong.items() if is_so]
    return found


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
        name = self.kernel.__name__.strip("_").removesuffix("_kernel")
        try:
            binary = triton.compile(
                source, target=GPUTarget("cuda", arch, 32), options=self.options
            )
        except Exception as error:
            raise RuntimeError(
                f"compile_check: Triton {triton.__version__} cannot compile {name} for sm_{arch}: "
                f"{error}"
            ) from error
        used, code = _machine_code(binary.asm["cubin"])
        return Compiled(
            kernel=name,
            triton=triton.__version__,
            arch=arch,
            dtype=dtype,
            warps=binary.metadata.num_warps,
            stages=binary.metadata.num_stages,
            registers=used["REG"],
            # A spilled register lies in the stack frame, which the machine calls local memory.
            spilled_bytes=max(used["STACK"], used["LOCAL"]),
            looped_spills=looped_spills(code),
            shared_bytes=binary.metadata.shared,
            instructions={
                name: len(re.findall(pattern, code)) for name, pattern in INSTRUCTIONS.items()
            },
            multiplies="tt.dot" in binary.asm["ttir"],
            widths=[_bits(access) for access in re.findall(r"\b(?:LDG|STG)\.(\S+)", code)],
            constants=self.constants,
        )


def _type(value: Any) -> str:
    if isinstance(value, Tensor):
        return "*" + TYPES[value.dtype]
    if isinstance(value, float):
        return "fp32"
    return "i32" if -(2**31) <= value < 2**31 else "i64"


def _bits(access: str) -> int:
    """Of a load or store named like E.128.CONSTANT; without a number it is of 32 bits."""
    found = re.search(r"\b[US]?(8|16|64|128)\b", access)
    return int(found[1]) if found else 32


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
        text = subprocess.run(
            [tool, "-res-usage", "-sass", file.name], capture_output=True, text=True, check=True
        ).stdout
    used = re.findall(r"\b(REG|STACK|LOCAL):(\d+)", text)
    return {name: int(number) for name, number in used}, text


def looped_spills(code: str) -> int:
    """Returns how many instructions of a disassembly store or load a spilled register (STL, LDL)
    and lie in a loop: can be reached from themselves.
    """
    found = re.findall(r"/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+)?\s*([A-Z]\S*)([^;]*);", code)
    number = {int(at, 16): i for i, (at, *_) in enumerate(found)}
    following: list[list[int]] = []  # of each instruction, those that may come next
    for i, (_, predicate, operation, operands) in enumerate(found):
        kind, targets = operation.split(".")[0], re.findall(r"\b0x([0-9a-f]+)\b", operands)
        jumps = kind in ("BRA", "JMP", "CALL") and bool(targets)
        # A branch may have its condition among its operands, or in its name.
        always = predicate in ("", "@PT") and "," not in operands and ".DIV" not in operation
        ends = kind in ("EXIT", "RET") or (jumps and kind != "CALL")
        following.append([i + 1] if i + 1 < len(found) and not (always and ends) else [])
        if jumps and int(targets[-1], 16) in number:
            following[i].append(number[int(targets[-1], 16)])

    def returns(begin: int) -> bool:
        seen: set[int] = set()
        waiting = list(following[begin])
        while waiting:
            i = waiting.pop()
            if i not in seen:
                seen.add(i)
                waiting.extend(following[i])
        return begin in seen

    spills = [i for i, x in enumerate(found) if x[2].split(".")[0] in ("STL", "LDL")]
    return sum(map(returns, spills))


def compiled_apart(folder: Path | None = None, *options: str) -> list[Compiled]:
    """Returns what this module finds in a process of its own: this one may interpret its Triton.

    folder: of another Triton than the installed one. options: as on the command line. Raises
    RuntimeError with the process's last lines.
    """
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    if folder is not None:
        environment["PYTHONPATH"] = str(folder)
    done = subprocess.run(
        [sys.executable, "-P", "-m", "ldalign.kernels.compile_check", "--json", *options],
        capture_output=True,
        text=True,
        env=environment,
    )
    if done.returncode:
        raise RuntimeError(done.stderr[-4000:])
    return [Compiled(**row) for row in json.loads(done.stdout)]


def table(rows: Sequence[Compiled]) -> str:
    """Returns the rows as aligned text."""
    head = [
        "kernel",
        "dtype",
        "GPU",
        "warps",
        "stages",
        "registers",
        "spilled B",
        "in loops",
        "shared KiB",
    ]
    cells = [[*head, *INSTRUCTIONS, "constants"]] + [
        [
            row.kernel,
            row.dtype,
            f"sm_{row.arch}",
            str(row.warps),
            str(row.stages),
            str(row.registers),
            str(row.spilled_bytes),
            str(row.looped_spills),
            f"{row.shared_bytes / 1024:.1f}",
            *(str(row.instructions[name]) for name in INSTRUCTIONS),
            " ".join(f"{name}={value}" for name, value in row.constants.items()),
        ]
        for row in rows
    ]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join(
        "  ".join(x.ljust(w) for x, w in zip(line, widths, strict=True)).rstrip() for line in cells
    )


def main() -> int:
    """Prints the table and the problems, or JSON."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    part = parser.add_mutually_exclusive_group()
    part.add_argument("--short", action="store_true", help="one shape, the worst, on sm_90")
    part.add_argument(
        "--arch", type=int, choices=list(SHARED_KIB), help="only for this GPU, 90 for sm_90"
    )
    parser.add_argument(
        "--json", action="store_true", help="print a JSON list instead of the table"
    )
    args = parser.parse_args()
    selection = SHORT if args.short else FULL
    rows = compiled([shapes for shapes in selection if args.arch in (None, shapes.arch)])
    if args.json:
        print(json.dumps([asdict(row) for row in rows]))
        return 0
    print(table(rows))
    found = problems(rows)
    print(*found, sep="\n", end="\n" if found else "")
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main())
