"""Compiles every Triton kernel for sm_80, sm_90 and sm_100 without a GPU and reads what became of it.

Run by test_compile_gate.py in a process of its own, or by hand: `python -m tests.kernels.compile_gate`.
Prints registers, shared memory, stack, spills and the widest load of every kernel, and exits with 1 where one has
spills or a stack, needs more shared memory than the chip has, or reads rows of logits in less than 16 bytes.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from rethinker_kernels.triton_kernels import group_advantages, grpo_loss, linear, log_softmax
from rethinker_kernels.triton_kernels.tiles import BY_ARCHITECTURE, MAX_SPLITS, Tiles

SHARED_MEMORY = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
"""Bytes a program may use."""

POINTERS = {
    **dict.fromkeys(["index"], "*i64"),
    **dict.fromkeys(["offsets"], "*i32"),
    **dict.fromkeys(["mask"], "*u8"),
    **dict.fromkeys(["degenerate"], "*i8"),
    **dict.fromkeys(["stats"], "*fp64"),
}
INTEGERS = {"rows", "inner", "vocabulary", "splits", "span", "count", "sequences", "programs"}
STRIDES = {"outer_stride", "inner_stride", "out_stride", "stride"}
NUMBERS = {"temperature", "normalizer", "lower", "upper", "dual", "kl_coef", "eps"}


@dataclass
class Case:
    """A kernel, the constants it is compiled with, and the type of its logits (None: it has none)."""

    name: str
    kernel: Any
    warps: int
    constants: dict[str, Any]
    logits: str | None = None
    absent: set[str] = field(default_factory=set)  # pointers that are None

    def source(self) -> ASTSource:
        """As the launchers call it for a real model: addresses, strides and sizes divisible by 16."""
        unaligned = set(self.kernel.params[i].name for i in range(len(self.kernel.params))
                        if self.kernel.params[i].do_not_specialize)  # fmt: skip
        signature, constants, attributes = {}, {}, {}
        for position, name in enumerate(self.kernel.arg_names):
            if name in self.constants or name in self.absent:
                signature[name] = "constexpr"
                constants[name] = self.constants.get(name)
            elif name in NUMBERS:
                signature[name] = "fp32"
            elif name in INTEGERS | STRIDES:
                signature[name] = "i32" if name in INTEGERS else "i64"
            else:
                is_logits = name in ("logits", "out") and self.logits is not None
                signature[name] = f"*{self.logits}" if is_logits else POINTERS.get(name, "*fp32")
            if name not in NUMBERS | unaligned and signature[name] != "constexpr":
                attributes[(position,)] = [["tt.divisibility", 16]]
        return ASTSource(fn=self.kernel, signature=signature, constexprs=constants, attrs=attributes)


def cases(tile: Tiles) -> list[Case]:
    """Every kernel, in the forms that use the most registers and in those that training uses."""
    row = {"DEPTH": tile.depth, "LANES": tile.lanes}
    scalar, vector = {"PER_ROW": False}, {"PER_ROW": True}
    found = []
    for logits in ("bf16", "fp32"):
        for entropy in (True, False):
            name = f"{logits}{'+entropy' if entropy else ''}"
            constants = {**scalar, "ENTROPY": entropy, "SPLIT": False, **row}
            found.append(
                Case(f"forward {name}", log_softmax.forward_kernel, tile.row_warps, constants, logits, {"temperatures"})
            )
            constants = {**scalar, "LOGPS": True, "ENTROPY": entropy, "TILE": tile.gradient}
            found.append(
                Case(
                    f"backward {name}", log_softmax.backward_kernel, tile.row_warps, constants, logits, {"temperatures"}
                )
            )
        for estimator in (0, 3):
            constants = {**vector, "ESTIMATOR": estimator, "SUPERVISED": estimator > 0, **row, "TILE": tile.gradient}
            found.append(
                Case(f"linear grpo {logits} kl{estimator}", linear.grpo_rows_kernel, tile.row_warps, constants, logits)
            )
    split = {**vector, "ENTROPY": True, "SPLIT": True, **row}
    found.append(Case("forward split", log_softmax.forward_kernel, tile.row_warps, split, "bf16"))
    combine = {**vector, "ENTROPY": True, "SPLITS": MAX_SPLITS}
    found.append(Case("combine", log_softmax.combine_kernel, 1, combine, "bf16"))
    for sequences, ratio in ((False, False), (True, False), (True, True)):
        kind = "sequences" if sequences else "rows"
        constants = {
            "SEQUENCES": sequences, "ADVANTAGES": kind, "WEIGHTS": kind, "MASK": True, "ESTIMATOR": 3,
            "SHARED_RATIO": ratio, "MEAN": sequences, "NORMALIZERS": True, "BLOCK": tile.tokens,
        }  # fmt: skip
        name = f"grpo {kind}{' one ratio' if ratio else ''}"
        found.append(Case(name, grpo_loss.loss_kernel, tile.token_warps, constants))
    found.append(Case("grpo total", grpo_loss.total_kernel, 4, {"STATS": 8, "BLOCK": 64}))
    for std, batch in ((True, False), (False, True)):
        constants = {"STD": std, "BATCH": batch, "BLOCK": tile.group}
        found.append(Case(f"group advantages {'std' if std else 'batch'}", group_advantages.group_kernel, 1, constants))
    return found


def tool(name: str) -> str:
    """A program of the CUDA toolkit that the triton wheel carries."""
    return str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name)


def measure(case: Case, capability: int) -> dict[str, Any]:
    """Compile, and read resources and loads from the binary."""
    compiled = triton.compile(
        case.source(), target=GPUTarget("cuda", capability, 32), options={"num_warps": case.warps}
    )
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        usage = _output(tool("cuobjdump"), "--dump-resource-usage", cubin.name)
        sass = _output(tool("cuobjdump"), "--dump-sass", cubin.name)
    found = {key: int(value) for key, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", usage)}
    widths = [int(w) for w in re.findall(r"\bLDG\.E(?:\.[A-Z]\w*)*?\.(64|128)\b", sass)] or [32]
    return {
        "registers": found["REG"],
        "stack": found["STACK"],
        "local": found["LOCAL"],
        "spills": len(re.findall(r"\b(?:STL|LDL)\b", sass)),
        "shared": compiled.metadata.shared,
        "widest": max(widths) // 8,
    }


def _output(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout


def faults(case: Case, capability: int, found: dict[str, Any]) -> list[str]:
    """What is wrong with a compiled kernel, in words."""
    wrong = [f"{name} {found[name]}" for name in ("stack", "local", "spills") if found[name]]
    if found["shared"] > SHARED_MEMORY[capability]:
        wrong.append(f"shared memory {found['shared']} of {SHARED_MEMORY[capability]}")
    if case.logits is not None and case.kernel is not log_softmax.combine_kernel and found["widest"] < 16:
        wrong.append(f"loads of {found['widest']} bytes")
    return wrong


def main() -> int:
    wrong = 0
    print(f"{'kernel':32} {'arch':>6} {'warps':>5} {'regs':>5} {'shared':>7} {'stack':>5} {'spills':>6} {'load':>5}")
    for capability, tile in BY_ARCHITECTURE.items():
        for case in cases(tile):
            found = measure(case, capability)
            problems = faults(case, capability, found)
            wrong += bool(problems)
            print(
                f"{case.name:32} sm_{capability:<3} {case.warps:5} {found['registers']:5} {found['shared']:7} "
                f"{found['stack']:5} {found['spills']:6} {found['widest']:4}B  {', '.join(problems)}",
                flush=True,
            )
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
