"""Repairs of Triton's interpreter (`TRITON_INTERPRET=1`) that kernels in bf16 depend on.

Triton 3.6 keeps a bf16 tile as its bit pattern in a uint16 array. Its casts drop the low half of
an fp32 instead of rounding, its arithmetic and `tl.dot` work on the bit patterns as integers, and
with numpy 2.4 a loop bounded by a value loaded on the device raises. After `install()`

- casts to bf16 round to nearest, ties to even, as the hardware does;
- so do casts to fp8 (e4m3), which saturate at 448; without, a carry out of the mantissa is lost;
- bf16 arithmetic and comparisons are done in fp32 and rounded once, `tl.dot` takes exact operands;
- reductions, scans and atomics in bf16, whose order of rounding the interpreter cannot know,
  raise: cast to fp32 first;
- a loop bound may be a loaded value;
- numpy does not warn about overflow and NaN, which a GPU does not do either.

Call it once, before the first launch; the test suite does. To debug a kernel by hand:

    TRITON_INTERPRET=1 python -c "from vitgraph.kernels import interpreter; interpreter.install()"
"""

from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter as triton_interpreter

_Builder: Any = triton_interpreter.InterpreterBuilder
_Handle: Any = triton_interpreter.TensorHandle

_state = {"installed": False}


def to_bf16_bits(values: np.ndarray) -> np.ndarray:
    """Bit patterns (uint16) of `values` rounded to the nearest bf16, ties to even; NaN is kept."""
    values = np.ascontiguousarray(values, dtype=np.float32)
    bits = values.view(np.uint32)
    rounded = (bits + (np.uint32(0x7FFF) + ((bits >> 16) & np.uint32(1)))) >> 16
    # adding to a NaN's mantissa could carry into the sign; set its quiet bit instead
    quiet = (bits >> 16) | np.uint32(0x40)
    return np.where(np.isnan(values), quiet, rounded).astype(np.uint16)


def from_bf16_bits(bits: np.ndarray) -> np.ndarray:
    """The fp32 values of bf16 bit patterns (uint16); exact."""
    return (np.ascontiguousarray(bits).astype(np.uint32) << 16).view(np.float32)


def to_e4m3_bits(values: np.ndarray) -> np.ndarray:
    """Bit patterns (uint8) of `values` in e4m3: nearest, ties to even, saturated; NaN is kept."""
    # whether PyTorch's own cast saturates is left to its releases; clamp keeps NaN
    wide = torch.from_numpy(np.ascontiguousarray(values, dtype=np.float32)).clamp(-448, 448)
    return wide.to(torch.float8_e4m3fn).view(torch.uint8).numpy()


def _is_bf16(handle) -> bool:
    return handle.dtype.scalar == tl.bfloat16


def _widen(handle):
    return _Handle(from_bf16_bits(handle.data), tl.float32) if _is_bf16(handle) else handle


def _narrow(handle):
    return _Handle(to_bf16_bits(handle.data), tl.bfloat16)


def _in_fp32(operation):
    """`operation(self, *handles, ...)` with bf16 handles as fp32, and a float result rounded."""

    def repaired(self, *args):
        handles = [a for a in args if isinstance(a, _Handle)]
        if not any(map(_is_bf16, handles)):
            return operation(self, *args)
        out = operation(self, *(_widen(a) if isinstance(a, _Handle) else a for a in args))
        return _narrow(out) if out.data.dtype.kind == "f" else out

    return repaired


def _repair_casts() -> None:
    cast_impl, create_fp_to_fp = _Builder.cast_impl, _Builder.create_fp_to_fp

    def cast(self, src, dst_type):
        if dst_type.scalar == tl.bfloat16:
            return src if _is_bf16(src) else _narrow(src)
        return cast_impl(self, _widen(src), dst_type)

    def fp_to_fp(self, src, dst_type, rounding_mode):
        truncates = rounding_mode is not None and "RTZ" in str(rounding_mode)
        if dst_type.scalar == tl.float8e4nv and not truncates:
            return _Handle(to_e4m3_bits(_widen(src).data), tl.float8e4nv)
        is_fp8 = 8 in (src.dtype.scalar.primitive_bitwidth, dst_type.scalar.primitive_bitwidth)
        if is_fp8 or truncates:
            return create_fp_to_fp(self, src, dst_type, rounding_mode)
        return cast(self, src, dst_type)

    _Builder.cast_impl, _Builder.create_fp_to_fp = cast, fp_to_fp
    _Builder.get_bf16 = lambda self, value: _narrow(
        _Handle(np.array([value], dtype=np.float32), tl.float32)
    )


def _repair_arithmetic() -> None:
    for name in ("binary_op", "unary_op", "create_fma", "create_clampf"):
        setattr(_Builder, name, _in_fp32(getattr(_Builder, name)))
    dot = _Builder.create_dot

    def create_dot(self, a, b, acc, input_precision, max_num_imprecise_acc):
        return dot(self, _widen(a), _widen(b), acc, input_precision, max_num_imprecise_acc)

    _Builder.create_dot = create_dot


def _refuse_bf16_reductions() -> None:
    interface: Any = triton_interpreter.ReduceScanOpInterface
    check_tensor, atomic_rmw = interface.check_tensor, _Builder.create_atomic_rmw

    def check(self, inputs):
        if any(_is_bf16(t.handle) for t in inputs):
            raise TypeError("interpreter: a reduction or scan over bf16; cast to tl.float32 first")
        return check_tensor(self, inputs)

    def atomic(self, op, ptr, value, *args):
        if _is_bf16(value):
            raise TypeError("interpreter: an atomic on bf16; cast to tl.float32 first")
        return atomic_rmw(self, op, ptr, value, *args)

    interface.check_tensor, _Builder.create_atomic_rmw = check, atomic


def _repair_loop_bounds() -> None:
    patch_lang_tensor = triton_interpreter._patch_lang_tensor

    def patch(tensor, scope):
        patch_lang_tensor(tensor, scope)
        # int() of a one-element array of rank 1 raises since numpy 2.4
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    triton_interpreter._patch_lang_tensor = patch


def _silence_float_warnings() -> None:
    run_grid = triton_interpreter.GridExecutor.__call__

    def run(self, *args, **kwargs):
        with np.errstate(all="ignore"):
            return run_grid(self, *args, **kwargs)

    setattr(triton_interpreter.GridExecutor, "__call__", run)  # noqa: B010 (a method of a class)


def install() -> None:
    """Apply the repairs to this process's Triton; a second call does nothing."""
    if _state["installed"]:
        return
    _state["installed"] = True
    _repair_casts()
    _repair_arithmetic()
    _refuse_bf16_reductions()
    _repair_loop_bounds()
    _silence_float_warnings()
