"""What Triton makes of a kernel for a GPU that need not be present: registers, spills, SASS.

    info = inspect(
        _gemm_kernel,
        {"x": "tensordesc<bf16[128,64]>", ..., "bias_ptr": "*bf16", "M": "i32"},
        {"BLOCK_M": 128, ...},
        num_warps=8,
    )
    assert info.spill_bytes == 0 and info.count("HGMMA") > 0

Compilation uses the ptxas in Triton's wheel. A kernel that was decorated for the interpreter is
compiled in one helper process, where Triton is imported without it: Triton's own functions
(`tl.sum`, `tl.sigmoid`) are decorated too.
"""

import functools
import importlib
import multiprocessing
import os
import re
import subprocess
import tempfile
from collections.abc import Collection, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class CompiledInfo:
    """One compiled kernel.

    `registers` and `spill_bytes` (local memory: spills and stack) are per thread, `shared_bytes`
    is per program. `sass` and `ptx` are the listings.
    """

    registers: int
    spill_bytes: int
    shared_bytes: int
    sass: str
    ptx: str

    def count(self, opcode: str) -> int:
        """Instructions in the SASS whose name starts with `opcode`, such as "HGMMA.64x128"."""
        return len(re.findall(rf"\b{re.escape(opcode)}", self.sass))


def _leave_interpreter() -> None:
    os.environ["TRITON_INTERPRET"] = "0"


@functools.cache
def _helper() -> ProcessPoolExecutor:
    return ProcessPoolExecutor(
        max_workers=1,
        mp_context=multiprocessing.get_context("spawn"),
        initializer=_leave_interpreter,
    )


def _compile(module: str, name: str, request: dict[str, Any]) -> CompiledInfo:
    kernel = getattr(importlib.import_module(module), name)
    return _compile_here(kernel, **request)


def _compile_here(
    kernel: Any,
    signature: dict[str, str],
    constexprs: dict[str, Any],
    divisible: list[str],
    options: dict[str, Any],
    capability: int,
) -> CompiledInfo:
    import triton
    from triton import knobs
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = kernel.arg_names
    unknown = (signature.keys() | constexprs.keys()) - set(names)
    missing = set(names) - signature.keys() - constexprs.keys()
    if unknown or missing:
        raise ValueError(
            f"inspect: {kernel.__name__} takes {names}; without a type or value: "
            f"{sorted(missing)}; not an argument: {sorted(unknown)}"
        )
    source_type = ASTSource
    if kernel.is_gluon():
        from triton.experimental.gluon import _runtime

        source_type = _runtime.GluonASTSource
    source = source_type(
        kernel,
        signature={n: "constexpr" if n in constexprs else signature[n] for n in names},
        constexprs={(names.index(n),): v for n, v in constexprs.items()},
        attrs={(names.index(n),): [["tt.divisibility", 16]] for n in divisible},
    )
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    cuobjdump = knobs.nvidia.cuobjdump.path
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        usage, sass = (
            subprocess.run(
                [cuobjdump, flag, cubin.name], check=True, capture_output=True, text=True
            ).stdout
            for flag in ("-res-usage", "-sass")
        )
    used = {key: int(value) for key, value in re.findall(r"\b([A-Z]+):(\d+)", usage)}
    return CompiledInfo(
        registers=used["REG"],
        spill_bytes=used["STACK"] + used["LOCAL"],
        shared_bytes=compiled.metadata.shared,
        sass=sass,
        ptx=compiled.asm["ptx"],
    )


def inspect(
    kernel: Any,
    signature: Mapping[str, str],
    constexprs: Mapping[str, Any],
    *,
    divisible: Collection[str] = (),
    capability: int = 90,
    **options: Any,
) -> CompiledInfo:
    """Compile `kernel` for compute capability `capability` and report on the machine code.

    Args:
        kernel: A `@triton.jit` or `@gluon.jit` function at the top level of an importable module.
        signature: Type of every argument that is not a constexpr: "*bf16", "i32", "fp32",
            "tensordesc<bf16[128,64]>"; for Gluon with the `repr` of a layout after the shape.
        constexprs: Value of every constexpr; `None` for a pointer that is not passed.
        divisible: Integer arguments that are multiples of 16. Pointers always count as aligned
            to 16 bytes; without this, loads compile narrow.
        options: Launch options: `num_warps`, `num_stages`, `launch_pdl`.

    Raises:
        ValueError: an argument of the kernel is missing, or one is unknown.
    """
    pointers = [n for n, t in signature.items() if t.startswith("*") and n not in constexprs]
    request = {
        "signature": dict(signature),
        "constexprs": dict(constexprs),
        "divisible": [*pointers, *divisible],
        "options": options,
        "capability": capability,
    }
    from triton import knobs
    from triton.runtime.jit import JITFunction

    # a Gluon kernel is never decorated for the interpreter, but what it calls is
    if isinstance(kernel, JITFunction) and not knobs.runtime.interpret:
        return _compile_here(kernel, **request)
    return _helper().submit(_compile, kernel.fn.__module__, kernel.__name__, request).result()
