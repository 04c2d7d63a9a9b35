"""Compiles every form in which a Triton kernel is launched for sm_80, sm_90 and sm_100, and reads what became of it.

Run by test_compile_gate.py in a process of its own, or by hand: `python -m tests.kernels.compile_gate`. No GPU is
needed: a driver that launches nothing notes how each launch specialises its kernel, types, alignments and constants,
first of the ops at a real vocabulary, then (`--all`) of the whole fuzzing suite. Prints what was found for the former,
with a time estimated for an H200, and exits with 1 where any form spills registers or has a stack, needs more shared
memory than the chip has, or, at a real vocabulary, reads logits in less than 16 bytes; or where a kernel was never
launched.
"""

from __future__ import annotations

import contextlib
import io
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules
from typing import Any

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime import driver
from triton.runtime.jit import JITFunction

import rethinker_kernels as ops
from rethinker_kernels import linear, merge_attention, triton_kernels
from rethinker_kernels.triton_kernels import exponentials, log_softmax

SHARED_MEMORY = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
"""Bytes a program may use, by architecture."""

PROCESSORS = 132
"""Of the GPU whose launches are noted: they decide which rows are few."""

VOCABULARY, ROWS = 151_936, 8 * PROCESSORS

ROWS_OF_A_STEP = 16_384
"""For which times are estimated."""

MODULES = [import_module(found.name) for found in iter_modules(triton_kernels.__path__, f"{triton_kernels.__name__}.")]


@dataclass(eq=False)
class Form:
    """One specialisation of a kernel."""

    kernel: JITFunction
    signature: dict[str, str]
    constants: dict[tuple[int, ...], Any]
    attributes: dict[tuple[int, ...], list]
    warps: int
    registers: int | None  # at most
    name: str  # of the op at a real vocabulary that launched it first; empty for the fuzzing suite's own

    @property
    def capabilities(self) -> list[int]:
        """Where it may run."""
        return [90] if self.kernel.module == exponentials.__name__ else list(SHARED_MEMORY)

    @property
    def reads_rows(self) -> bool:
        """Whether it goes over rows of logits."""
        return "logits" in self.signature

    @property
    def copies_heads(self) -> bool:
        """Whether it reads and writes whole heads of a usual width, in 16 bits."""
        return self.name.startswith("merge attention, bf16") and not self.name.endswith("80")

    @property
    def element_size(self) -> int:
        """Bytes of a logit."""
        return 4 if self.signature["logits"] == "*fp32" else 2

    def __str__(self) -> str:
        types = [kind for kind in self.signature.values() if kind != "constexpr"]
        return f"{self.kernel.__name__}({', '.join(types)}; {list(self.constants.values())}; {self.warps} warps)"


class Nothing:
    """A compiled kernel that can be launched and keeps nothing of what it is given."""

    def __getattr__(self, name: str) -> Nothing:
        return self

    def __call__(self, *args, **kwargs) -> Nothing:
        return self


class Driver(Nothing):
    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0


class Launches:
    """Notes launches in place of a driver, with GPU tiles and Triton kernels for CPU tensors."""

    def __init__(self) -> None:
        self.forms: list[Form] = []
        self.name = ""

    def install(self) -> None:
        driver.set_active(Driver())
        launches, own_tiles = self, log_softmax.tiles

        def note(kernel, key, signature, device, constants, options, attributes, warmup):
            launches.forms.append(
                Form(kernel, signature, constants, attributes, options.num_warps, options.maxnreg, launches.name)
            )
            kernel.device_caches[device][0][key] = done = Nothing()
            return done

        JITFunction._do_compile = note
        for name, module in list(sys.modules.items()):
            if name.startswith("rethinker_kernels"):
                if hasattr(module, "takes_triton"):
                    module.takes_triton = lambda tensor: tensor.dtype != torch.float64
                if callable(getattr(module, "tiles", None)):
                    module.tiles = lambda _, rows: own_tiles(torch.device("cuda"), rows)
                if hasattr(module, "processors"):
                    module.processors = lambda device: PROCESSORS
        exponentials.INTERPRETED = exponentials.TILES
        plain = exponentials.Exponentials.__init__

        def on_gpu(made, *given):
            plain(made, *given)
            made.lanes = 1024

        exponentials.Exponentials.__init__ = on_gpu
        # What kernels leave unwritten makes assertions fail; only their launches count here.
        linear.product = lambda a, b, out, add=False: None

    def of_real_ops(self) -> None:
        """The ops as training calls them: 16-bit heads, fp32 ones, and few rows."""
        offsets = torch.tensor([0, 100, ROWS])
        index, values = torch.zeros(ROWS, dtype=torch.int64), torch.zeros(ROWS)
        surrogate = {"cu_seqlens": offsets, "normalizer": 1.0}
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            short = str(dtype).removeprefix("torch.").replace("float", "fp").replace("bfp", "bf")
            for rows, kind in ((ROWS, ""), (512, ", half filled")):
                for entropy, softcap in ((False, None), (True, None), (True, 30.0)):
                    logits = torch.empty(rows, VOCABULARY, dtype=dtype, requires_grad=True)
                    self.name = f"log-softmax{' + entropy' * entropy}{' + cap' * bool(softcap)}, {short}{kind}"
                    options = {"return_entropy": entropy, "softcap": softcap}
                    outputs = ops.selective_log_softmax(logits, index[:rows], **options)
                    (sum(o.sum() for o in outputs) if entropy else outputs.sum()).backward()
            hidden = torch.empty(ROWS, 16, dtype=dtype, requires_grad=True)
            weight = torch.empty(VOCABULARY, 16, dtype=dtype, requires_grad=True)
            for fused in (False, True)[: 1 + (dtype == torch.bfloat16)]:
                linear.takes_exponentials = lambda *_, fused=fused: fused
                kind = ", exponentials" * fused
                self.name = f"linear log-softmax, {short}{kind}"
                for entropy in (False, True):
                    out = ops.linear_selective_log_softmax(hidden, weight, index, return_entropy=entropy)
                    (out[0] if entropy else out).sum().backward()
                for kl_coef in (0.0, 0.1):
                    self.name = f"linear grpo{' + kl' * bool(kl_coef)}, {short}{kind}"
                    more = {"kl_coef": kl_coef, "ref_logps": values, "nll_weights": values}
                    ops.linear_grpo_loss(hidden, weight, index, values, values, **more, **surrogate)[0].backward()
                self.name = f"linear grpo + entropy, {short}{kind}"
                more = {"entropy_coef": 0.01, **surrogate}
                ops.linear_grpo_loss(hidden, weight, index, values, values, **more)[0].backward()
                if not fused:
                    self.name = f"linear grpo + entropy + cap, {short}"
                    ops.linear_grpo_loss(hidden, weight, index, values, values, softcap=30.0, **more)[0].backward()
            linear.takes_exponentials = lambda *_: False
            for width in (64, 80, 128):
                self.name = f"merge attention, {short}, heads of {width}"
                out, lse = torch.empty(ROWS, 4, width, dtype=dtype), torch.empty(4, ROWS)
                merge_attention.merge_attention(out, lse, out.clone(), lse.clone(), index)
        self.name = ""

    def of_the_fuzzing_suite(self) -> None:
        file = Path(__file__).with_name("fuzz_triton.py")
        with contextlib.redirect_stdout(io.StringIO()) as said:
            status = pytest.main(["-q", "-p", "no:cacheprovider", "-n", "0", str(file)], plugins=[self])
        if status != 0:
            raise RuntimeError(said.getvalue()[-6000:])

    @pytest.hookimpl(hookwrapper=True)
    def pytest_runtest_makereport(self, item, call):
        """A failed comparison is a pass here: nothing was computed."""
        report = (yield).get_result()
        failed = call.excinfo is not None and call.when == "call"
        if failed and (
            call.excinfo.errisinstance(AssertionError) or "opcheck" in str(call.excinfo.value)[:200].lower()
        ):
            report.outcome = "passed"


def tool(name: str) -> str:
    """A program of the CUDA toolkit that the triton wheel carries."""
    return str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name)


def measure(form: Form, capability: int) -> dict[str, Any]:
    """Compile, and read resources from the binary, and of an op at a real vocabulary on sm_90 the instructions too."""
    source = ASTSource(form.kernel, form.signature, form.constants, form.attributes)
    options = {"num_warps": form.warps, "maxnreg": form.registers}
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        usage = _output(tool("cuobjdump"), "--dump-resource-usage", cubin.name)
        estimated = capability == 90 and form.name and form.reads_rows
        sass = _output(tool("cuobjdump"), "--dump-sass", cubin.name) if estimated else ""
    found = {key: int(value) for key, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", usage)}
    loads, stores = (
        re.findall(rf"{kind}\.global\S*?(?:\.v(\d))?\.b(\d+)", compiled.asm["ptx"]) for kind in ("ld", "st")
    )
    return {
        "registers": found["REG"],
        "stack": found["STACK"],  # spilled registers lie there, too
        "local": found["LOCAL"],
        "shared": compiled.metadata.shared,
        "widest": max((int(count or 1) * int(bits) // 8 for count, bits in loads), default=0),
        "stored": max((int(count or 1) * int(bits) // 8 for count, bits in stores), default=0),
        "work": work_per_logit(sass, form.element_size) if estimated else None,
    }


def _output(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout


def work_per_logit(sass: str, element_size: int) -> tuple[float, float]:
    """(instructions, special-function instructions) per logit, over all loops that take exponentials."""
    lines = re.findall(r"/\*([0-9a-f]{4,5})\*/ +(.*?) *;", sass)
    place = {int(address, 16): position for position, (address, _) in enumerate(lines)}
    loops = []
    for position, (address, text) in enumerate(lines):
        jump = re.search(r"\bBRA\S* (?:\S+, )?`?\(?0x([0-9a-f]+)", text)
        if jump and int(jump[1], 16) < int(address, 16) and int(jump[1], 16) in place:
            loops.append((place[int(jump[1], 16)], position + 1))
    instructions = special = 0.0
    for start, end in loops:
        body = [text for _, text in lines[start:end]]
        exponentials = sum("MUFU" in text for text in body)
        widths = [re.search(r"\bLDG\.E(?:\.[A-Z]\w*)*?(?:\.(64|128|256))?(?:\.CONSTANT)? ", text) for text in body]
        logits = sum(int(width[1] or 32) // 8 for width in widths if width) / element_size
        inner = any(start <= s and e <= end and (s, e) != (start, end) for s, e in loops)
        if exponentials and logits and not inner:
            instructions += len(body) / logits
            special += exponentials / logits
    return instructions, special


def estimate(form: Form, work: tuple[float, float]) -> tuple[float, float]:
    """(milliseconds for ROWS_OF_A_STEP rows on an H200, the floor): what takes longest of memory, issue slots and the
    special-function units, were each busy alone; the floor is what the op must read and write."""
    logits = ROWS_OF_A_STEP * VOCABULARY
    size, out = form.element_size, 2 if form.signature.get("out") in ("*bf16", "*fp16") else 4
    reads = {"forward_kernel": size, "backward_kernel": size + out, "grpo_rows_kernel": 2 * size + out}
    must = {"forward_kernel": size, "backward_kernel": size + out, "grpo_rows_kernel": size + out}
    memory, floor = (logits * table[form.kernel.__name__] / 4.25e9 for table in (reads, must))
    instructions, special = work
    clock = 1.7e6 * PROCESSORS  # cycles of all processors per millisecond
    return max(memory, logits * instructions / (4 * 32 * clock), logits * special / (16 * clock)), floor


def faults(form: Form, capability: int, found: dict[str, Any]) -> list[str]:
    """What is wrong with a compiled kernel, in words."""
    wrong = [f"{name} {found[name]}" for name in ("stack", "local") if found[name]]
    if found["shared"] > SHARED_MEMORY[capability]:
        wrong.append(f"shared memory {found['shared']} of {SHARED_MEMORY[capability]}")
    if form.name and form.reads_rows and found["widest"] < 16:
        wrong.append(f"loads of {found['widest']} bytes")
    if form.copies_heads and min(found["widest"], found["stored"]) < 16:
        wrong.append(f"loads of {found['widest']} and stores of {found['stored']} bytes")
    return wrong


FORMS: list[Form] = []
"""All forms, for the processes that compile them: they are forked, as forms cannot be sent."""


def _measured(task: tuple[int, int]) -> dict[str, int]:
    position, capability = task
    return measure(FORMS[position], capability)


def main() -> int:
    launches = Launches()
    launches.install()
    launches.of_real_ops()
    if "--all" in sys.argv:
        launches.of_the_fuzzing_suite()
    FORMS.extend(launches.forms)
    tasks = [(place, capability) for place, form in enumerate(FORMS) for capability in form.capabilities]
    with multiprocessing.get_context("fork").Pool(os.cpu_count()) as pool:
        results = pool.map(_measured, tasks, chunksize=4)
    launched = {form.kernel for form in FORMS}
    kernels = [value for module in MODULES for name, value in vars(module).items() if name.endswith("_kernel")]
    wrong = [f"{kernel.__name__}: never launched" for kernel in kernels if kernel not in launched]
    print(
        f"{'op':46} {'kernel':10} {'arch':>6} {'warps':>5} {'regs':>5} {'shared':>6} {'load':>4} "
        f"{'ops/logit':>9} {'ms':>5} floor"
    )
    for (position, capability), found in zip(tasks, results, strict=True):
        form = FORMS[position]
        wrong += [f"sm_{capability} {form}: {fault}" for fault in faults(form, capability, found)]
        if form.name:
            name = form.kernel.__name__.removesuffix("_kernel")
            line = (
                f"{form.name:46} {name:10} sm_{capability:<3} {form.warps:5} {found['registers']:5} {found['shared']:6}"
            )
            line += f" {found['widest']:3}B"
            if found["work"]:
                milliseconds, floor = estimate(form, found["work"])
                line += f" {found['work'][0]:9.1f} {milliseconds:5.2f} {floor:5.2f}"
            print(line)
    print(f"triton {triton.__version__}: {len(FORMS)} forms of {len(kernels)} kernels, {len(wrong)} faults")
    print(*wrong, sep="\n")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
