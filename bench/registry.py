"""Every kernel benchmark, once: inputs, definition, least cost and contenders.

Shapes are those of published towers at some workload of `workloads.py`; labels name both.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from ..kernels import activation, attention, gated_linear, linear, norm, patch_embed, rope, swiglu
from ..kernels import rotary_linear as rotary
from ..kernels import window_attention as windows
from ..kernels.roofline import Cost

Dims = dict[str, Any]
EPS = 1e-6


@dataclass(frozen=True)
class Case:
    """One operator.

    Attributes:
        name: What `python -m vitgraph.bench kernels NAME` selects.
        shapes: Label to dimensions.
        make: (dims, draw) -> arguments; `draw` gives random tensors of the benchmark's dtype.
        reference: The definition: in the dtype of its arguments, so that fp64 gives the oracle.
        cost: (dims, dtype) -> least work and traffic.
        providers: Name to implementation, same arguments and result as `reference`; the first is
            the baseline. They may write to their arguments.
    """

    name: str
    shapes: Mapping[str, Dims]
    make: Callable[[Dims, "Draw"], tuple[Any, ...]]
    reference: Callable[..., torch.Tensor]
    cost: Callable[[Dims, torch.dtype], Cost]
    providers: Mapping[str, Callable[..., torch.Tensor]]


@dataclass(frozen=True)
class Draw:
    """Random tensors on one device; same seed, same values."""

    device: torch.device
    dtype: torch.dtype
    generator: torch.Generator

    def __call__(self, *shape: int, mean: float = 0.0, scale: float = 1.0) -> torch.Tensor:
        """Normal values of the benchmark's dtype."""
        x = torch.randn(*shape, device=self.device, generator=self.generator)
        return (x * scale + mean).to(self.dtype)

    def angles(self, rows: int, half: int) -> tuple[torch.Tensor, torch.Tensor]:
        """fp32 cos and sin [rows, half] of random angles."""
        angle = torch.rand(rows, half, device=self.device, generator=self.generator) * 6.283
        return angle.cos(), angle.sin()

    def offsets(self, lengths: tuple[int, ...]) -> torch.Tensor:
        """int32 [S + 1] ends of segments, from 0."""
        return torch.tensor([0, *lengths], device=self.device).cumsum(0, dtype=torch.int32)


_STREAMS = {
    "qwen3-vl-8b img448": {"T": 784, "D": 1152},
    "qwen3-vl-8b img1024": {"T": 4096, "D": 1152},
    "qwen3-vl-8b 16mixed": {"T": 17900, "D": 1152},
    "qwen2.5-vl-7b img1024": {"T": 4096, "D": 1280},
}


def _norm_inputs(dims: Dims, draw: Draw) -> tuple[Any, ...]:
    # rows with a mean: cancellation shows
    D = dims["D"]
    return draw(dims["T"], D, mean=1.0), draw(D, mean=1.0, scale=0.1), draw(D, scale=0.1)


def _layer_norm_ref(x, weight, bias):
    return norm.norm_ref(x, weight, bias, EPS, kind="layer")


def _rms_norm_ref(x, weight, bias):
    return norm.norm_ref(x, weight, None, EPS, kind="rms")


def _stream_cost(dims: Dims, dtype: torch.dtype) -> Cost:
    return norm.cost(dims["T"], dims["D"], dtype)


def _rope_inputs(dims: Dims, draw: Draw) -> tuple[Any, ...]:
    T, H, D = dims["T"], dims["H"], dims["D"]
    return draw(T, 3, H, D), *draw.angles(T, D // 2)


def _rope_ref(qkv, cos, sin):
    return rope.rope_ref(qkv[:, :2].flatten(1, 2), cos, sin)


def _rope(qkv, cos, sin):
    return rope.rope_(qkv, cos, sin)[:, :2].flatten(1, 2)


def _rotary_inputs(dims: Dims, draw: Draw) -> tuple[Any, ...]:
    T, H, D = dims["T"], dims["H"], dims["D"]
    K, N = H * D, 3 * H * D
    index = torch.arange(T, device=draw.device)
    position = torch.stack([index // 64, index % 64, 0 * index, 0 * index], 1).int()
    inv_freq = 1e4 ** -(torch.arange(D // 4, device=draw.device) / (D // 4))
    angle = (position[:, :2, None] * inv_freq).flatten(1)
    places = position, rotary.turns_of(inv_freq, H), angle.cos(), angle.sin()
    return draw(T, K), draw(N, K, scale=K**-0.5), draw(N, scale=0.1), *places


def _rotary_ref(x, weight, bias, position, turns, cos, sin):
    return rotary.rotary_linear_ref(x, weight, bias, cos, sin)


def _rotary(x, weight, bias, position, turns, cos, sin, backend):
    out = x.new_empty(len(x), 3, len(weight) // (6 * cos.shape[1]), 2 * cos.shape[1])
    rotation = rotary.Rotation(position, turns, cos, sin)
    return rotary.rotary_linear(x, weight, bias, rotation, out=out, backend=backend)


def _linear_inputs(dims: Dims, draw: Draw) -> tuple[Any, ...]:
    T, N, K = dims["T"], dims["N"], dims["K"]
    return draw(T, K), draw(N, K, scale=K**-0.5), draw(N, scale=0.1), dims.get("activation")


def _residual_inputs(dims: Dims, draw: Draw) -> tuple[Any, ...]:
    T, N, K = dims["T"], dims["N"], dims["K"]
    return draw(T, N), draw(T, K), draw(N, K, scale=K**-0.5)


def _gated_inputs(dims: Dims, draw: Draw) -> tuple[Any, ...]:
    T, rows, K = dims["T"], 2 * dims["F"], dims["K"]
    return draw(T, K), draw(rows, K, scale=K**-0.5), draw(rows, scale=0.1)


def _linear_ref(x, weight, bias, kind):
    return linear.linear_ref(x, weight, bias, activation=kind)


def _linear_torch(x, weight, bias, kind):
    y = F.linear(x, weight, bias)
    return y if kind is None else activation.activation_ref(y, kind)


def _linear(x, weight, bias, kind, backend):
    return linear.linear(x, weight, bias, activation=kind, backend=backend)


def _add_linear_ref(stream, x, weight):
    return linear.linear_ref(x, weight, residual=stream)


def _add_linear(stream, x, weight, backend):
    return linear.linear(x, weight, residual=stream, backend=backend)


def _linear_cost(dims: Dims, dtype: torch.dtype, has_residual: bool = False) -> Cost:
    T, N, K = dims["T"], dims["N"], dims["K"]
    return linear.cost(T, N, K, dtype, has_residual=has_residual)


def _attention_inputs(dims: Dims, draw: Draw) -> tuple[Any, ...]:
    lengths = dims["lengths"]
    qkv = draw(sum(lengths), 3, dims["H"], dims["D"])
    return qkv, draw.offsets(lengths), max(lengths)


def _attention_ref(qkv, ends, longest):
    # a head at a time: in fp64 the scores of 16 heads and 16,384 rows would take 34 GB
    heads = []
    for h in range(qkv.shape[2]):
        q, k, v = qkv[:, :, h : h + 1].unbind(1)
        heads.append(attention.attention_ref(q, k, v, ends, scale=qkv.shape[-1] ** -0.5))
    return torch.cat(heads, 1)


def _attention(qkv, ends, longest, backend):
    q, k, v = qkv.unbind(1)
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    scale = q.shape[-1] ** -0.5
    tickets = torch.zeros(2, dtype=torch.int32, device=q.device)
    attention.varlen_attention(
        q, k, v, ends, max_seqlen=longest, scale=scale, out=out, backend=backend, tickets=tickets
    )
    return out


def _attention_cost(dims: Dims, dtype: torch.dtype) -> Cost:
    return attention.cost(dims["lengths"], dims["H"], dims["D"], dtype)


def _window_inputs(dims: Dims, draw: Draw) -> tuple[Any, ...]:
    lengths = dims["lengths"]
    qkv = draw(sum(lengths), 3, dims["H"], dims["D"])
    return qkv, *draw.angles(sum(lengths), dims["D"] // 2), draw.offsets(lengths)


def _window_ref(qkv, cos, sin, ends):
    q, k, v = qkv.unbind(1)
    return windows.window_attention_ref(q, k, v, cos, sin, ends, scale=q.shape[-1] ** -0.5)


def _window_parts(qkv, cos, sin, ends, backend):
    return _attention(rope.rope_(qkv, cos, sin), ends, 64, backend)


def _window(qkv, cos, sin, ends):
    q, k, v = qkv.unbind(1)
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    windows.window_attention(q, k, v, cos, sin, ends, scale=q.shape[-1] ** -0.5, out=out)
    return out


def _window_cost(dims: Dims, dtype: torch.dtype) -> Cost:
    return windows.cost(dims["lengths"], dims["H"], dims["D"], dtype)


def _patch_inputs(dims: Dims, draw: Draw) -> tuple[Any, ...]:
    h, w, P, D, G = (dims[k] for k in ("h", "w", "P", "D", "G"))
    row, column = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
    size = torch.ones_like(row)
    position = torch.stack([row, column, size * h, size * w], -1).view(-1, 4)
    table = draw(G * G, D, scale=0.3)
    pixels, weight = draw(h * w, P), draw(D, P, scale=P**-0.5)
    return pixels, weight, draw(D), table, position.to(draw.device, torch.int32)


def _patch_ref(pixels, weight, bias, table, position):
    return patch_embed.patch_embed_ref(pixels, weight, bias, table=table, position=position)


def _patch(pixels, weight, bias, table, position):
    return patch_embed.patch_embed(pixels, weight, bias, table=table, position=position)


def _patch_cost(dims: Dims, dtype: torch.dtype) -> Cost:
    T = dims["h"] * dims["w"]
    return patch_embed.cost(T, dims["P"], dims["D"], dtype, table_rows=dims["G"] ** 2)


_HEADS = {"H": 16, "D": 72}
_LINEAR_BACKENDS = ("library", "triton", "hopper", "auto")
_ROWS = (("img448", 784), ("img1024", 4096))
# 28 x 28 patches in windows of 8 x 8, the last row and column cut to 4
_CUT_WINDOWS = ((64,) * 3 + (32,)) * 3 + (32,) * 3 + (16,)
_MIXED = (196, 784, 920, 4096, 1972, 256, 1200, 484, 784, 3072, 280, 864, 988, 576, 900, 528)

_CASES = [
    Case(
        "layer_norm", _STREAMS, _norm_inputs, _layer_norm_ref, _stream_cost,
        {
            "torch": lambda x, w, b: F.layer_norm(x, x.shape[-1:], w, b, EPS),
            "vitgraph": lambda x, w, b: norm.norm(x, w, b, EPS, kind="layer"),
        },
    ),
    Case(
        "rms_norm", _STREAMS, _norm_inputs, _rms_norm_ref, _stream_cost,
        {
            "eager": _rms_norm_ref,
            "torch": lambda x, w, b: F.rms_norm(x, x.shape[-1:], w, EPS),
            "vitgraph": lambda x, w, b: norm.norm(x, w, None, EPS, kind="rms"),
        },
    ),
    Case(
        "rope",
        {
            "qwen3-vl-8b img448": {"T": 784, **_HEADS},
            "qwen3-vl-8b img1024": {"T": 4096, **_HEADS},
            "qwen2-vl-7b img1024": {"T": 4096, "H": 16, "D": 80},
        },
        _rope_inputs, _rope_ref,
        lambda d, dtype: rope.cost(d["T"], d["H"], d["D"], dtype),
        {"eager": _rope_ref, "vitgraph": _rope},
    ),
    Case(
        "rotary_linear",
        {
            f"{tower} T={T}": {"T": T, "H": 16, "D": D}
            for T in (208, 784, 4096, 16384)
            for tower, D in (("qwen3-vl-8b", 72), ("qwen2-vl-7b", 80))
        },
        _rotary_inputs, _rotary_ref,
        lambda d, dtype: rotary.cost(d["T"], d["H"], d["D"], d["H"] * d["D"], dtype),
        {
            "eager": _rotary_ref,
            **{
                name: partial(_rotary, backend=name)
                for name in ("library", "hopper", "few_rows", "auto")
            },
        },
    ),
    Case(
        "swiglu",
        {f"qwen2.5-vl-7b {label}": {"T": T, "F": 3456} for label, T in _ROWS},
        lambda d, draw: (draw(d["T"], 2 * d["F"]),),
        swiglu.swiglu_ref,
        lambda d, dtype: swiglu.cost(d["T"], d["F"], dtype),
        {"eager": swiglu.swiglu_ref, "vitgraph": swiglu.swiglu},
    ),
    Case(
        "quick_gelu",
        {f"qwen2-vl-7b {label}": {"T": T, "F": 5120} for label, T in _ROWS},
        lambda d, draw: (draw(d["T"], d["F"]),),
        lambda x: activation.activation_ref(x, "quick_gelu"),
        lambda d, dtype: activation.cost(d["T"], d["F"], dtype),
        {
            "eager": lambda x: activation.activation_ref(x, "quick_gelu"),
            "vitgraph": lambda x: activation.activation_(x, "quick_gelu"),
        },
    ),
    Case(
        "linear",
        {
            f"{name} T={T}": {"T": T, "N": N, "K": K, "activation": kind}
            for T in (208, 784, 4096)
            for name, N, K, kind in (
                ("qwen3-vl-8b qkv", 3456, 1152, None),
                ("qwen3-vl-8b fc1", 4304, 1152, "gelu_tanh"),
                ("qwen2.5-vl-7b gate_up", 6912, 1280, None),
                ("qwen2-vl-7b fc1", 5120, 1280, "quick_gelu"),
            )
        },
        _linear_inputs, _linear_ref, _linear_cost,
        {
            "torch": _linear_torch,
            **{name: partial(_linear, backend=name) for name in (*_LINEAR_BACKENDS, "few_rows")},
        },
    ),
    Case(
        "linear_residual",
        {
            f"{name} T={T}": {"T": T, "N": N, "K": K}
            for T in (208, 784, 4096)
            for name, N, K in (
                ("qwen3-vl-8b proj", 1152, 1152),
                ("qwen3-vl-8b fc2", 1152, 4304),
                ("qwen2.5-vl-7b down", 1280, 3456),
            )
        },
        _residual_inputs, _add_linear_ref, partial(_linear_cost, has_residual=True),
        {
            "torch": lambda stream, x, w: stream + F.linear(x, w),
            **{name: partial(_add_linear, backend=name) for name in _LINEAR_BACKENDS},
        },
    ),
    Case(
        "gated_linear",
        {
            f"qwen2.5-vl-7b T={T}": {"T": T, "F": 3456, "K": 1280} for T in (208, 784, 4096, 16384)
        },
        _gated_inputs, gated_linear.gated_linear_ref,
        lambda dims, dtype: gated_linear.cost(dims["T"], dims["F"], dims["K"], dtype),
        {
            "eager": gated_linear.gated_linear_ref,
            **{
                name: partial(gated_linear.gated_linear, backend=name)
                for name in ("library", "hopper", "few_rows", "auto")
            },
        },
    ),
    Case(
        "attention",
        {
            f"{tower} {name}": {"lengths": lengths, "H": 16, "D": D}
            for tower, D in (("qwen3-vl-2b", 64), ("qwen3-vl-8b", 72), ("qwen2-vl-7b", 80))
            for name, lengths in (
                ("img224", (196,)), ("img448", (784,)), ("img1024", (4096,)),
                ("img2048", (16384,)), ("8ximg448", (784,) * 8), ("16mixed", _MIXED),
            )
        },
        _attention_inputs, _attention_ref, _attention_cost,
        {
            name: partial(_attention, backend=name)
            for name in ("torch", "fa2", "fa3", "fa4", "triton", "hopper")
        },
    ),
    Case(
        "window_attention",
        {
            "qwen2.5-vl-7b img448": {"lengths": _CUT_WINDOWS, "H": 16, "D": 80},
            "qwen2.5-vl-7b img1024": {"lengths": (64,) * 64, "H": 16, "D": 80},
            "qwen2.5-vl-7b img2048": {"lengths": (64,) * 256, "H": 16, "D": 80},
        },
        _window_inputs, _window_ref, _window_cost,
        {
            "rope+torch": partial(_window_parts, backend="torch"),
            "rope+fa4": partial(_window_parts, backend="fa4"),
            "vitgraph": _window,
        },
    ),
    Case(
        "patch_embed",
        {
            f"qwen3-vl-8b {name}": {"h": side, "w": side, "P": 1536, "D": 1152, "G": 48}
            for name, side in (("img448", 28), ("img1024", 64))
        },
        _patch_inputs, _patch_ref, _patch_cost,
        {"eager": _patch_ref, "vitgraph": _patch},
    ),
]  # fmt: skip
REGISTRY: dict[str, Case] = {case.name: case for case in _CASES}
