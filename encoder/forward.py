"""The forward of a tower: one function for eager calls, capture and replay alike.

Everything that depends on the batch is read on the device, from the grid table, so the same calls
can be recorded once and replayed for every batch that fits. Nothing here synchronises or moves
data to or from the host. Rows past the live ones are finite in the residual stream and in every
intermediate: norms write zeros there, and what attention, gating and large matrix products leave
alone starts zero.
"""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch

from ..capture import RungLimits
from ..kernels.activation import activation_
from ..kernels.attention import varlen_attention
from ..kernels.gated_linear import choose_gated_backend, gated_linear
from ..kernels.layout import Layout, layout
from ..kernels.linear import choose_backend, linear
from ..kernels.norm import norm
from ..kernels.patch_embed import patch_embed
from ..kernels.residual import residual
from ..kernels.rope import rope_
from ..kernels.swiglu import swiglu
from ..kernels.window_attention import window_attention
from .branch import Branch
from .fp8 import Fp8Block, Stream, linear_of_rows
from .spec import EncoderSpec
from .weights import BlockWeights, MergerWeights, TowerWeights


@dataclass(frozen=True)
class Batch:
    """One packed batch on the device, and the host's bounds for it.

    Attributes:
        pixel_values: [T, P] in the tower's dtype; rows past the live ones may hold anything.
        grid: [items, 3] int32, zero past the live items.
        limits: Capacities; T = limits.max_patches.
        max_seqlen: Upper bound in patches of a frame.
    """

    pixel_values: torch.Tensor
    grid: torch.Tensor
    limits: RungLimits
    max_seqlen: int


class _Workspace:
    """Intermediates of one forward, shared by all blocks.

    Padding rows that their writers leave alone start as zeros, since readers multiply them:
    attention reads qkv up to a tile past its last segment, a GEMM all rows or up to a tile past
    the live ones.
    """

    def __init__(self, weights: TowerWeights, x: torch.Tensor):
        spec, T = weights.spec, x.shape[0]
        block = weights.blocks[0]
        is_gated = spec.mlp == "gated"
        self.normed = torch.empty_like(x)
        self.qkv = _output(x, block.qkv_weight, None).view(T, 3, spec.num_heads, spec.head_dim)
        self.attended = x.new_zeros(T, spec.num_heads, spec.head_dim)
        if is_gated:
            N, K = block.up_weight.shape
            backend, _ = choose_gated_backend(T, N, K, x.dtype, x.device)
            # not needed by one kernel; two of them read and write live rows only
            is_needed = backend == "library" or weights.fp8.plan is not None
            self.up = x.new_empty(T if is_needed else 0, N)
            self.gated = x.new_zeros(T, block.down_weight.shape[1])
        else:
            self.up = self.gated = _output(x, block.up_weight, spec.activation)


def _output(x: torch.Tensor, weight: torch.Tensor, activation: str | None) -> torch.Tensor:
    """Buffer for `linear(x, weight)`, zero if that leaves padding rows alone."""
    (T, K), N = x.shape, weight.shape[0]
    backend, _ = choose_backend(T, N, K, x.dtype, x.device, activation, has_residual=False)
    return x.new_empty(T, N) if backend == "library" else x.new_zeros(T, N)


def tower_forward(
    weights: TowerWeights,
    batch: Batch,
    outputs: Mapping[str, torch.Tensor],
    *,
    attention: str,
    states: Mapping[int, torch.Tensor] | None = None,
) -> None:
    """Run the tower on `batch` and write `outputs`.

    Args:
        weights: Prepared weights.
        batch: What to encode.
        outputs: "last_hidden_state" [T, D], "pooler_output" [T/4, out] and, for each deepstack
            merger, "deepstack_0".. [T/4, out]; live rows first. Padding rows are finite, or as
            they were where a large matrix product leaves them alone.
        attention: Backend of the blocks that attend over whole frames.
        states: Block index to [T, D] tensors that take the stream after those blocks.
    """
    device = batch.pixel_values.device
    # Triton launches on the current device, and autocast would change dtypes between kernels
    on_device = torch.cuda.device(device) if device.type == "cuda" else nullcontext()
    with on_device, torch.autocast(device.type, enabled=False):
        _forward(weights, batch, outputs, attention, states or {})


def _forward(
    weights: TowerWeights,
    batch: Batch,
    outputs: Mapping[str, torch.Tensor],
    attention: str,
    states: Mapping[int, torch.Tensor],
) -> None:
    spec = weights.spec
    plan = layout(
        batch.grid,
        weights.inv_freq,
        num_rows=batch.pixel_values.shape[0],
        num_frames=batch.limits.max_frames,
        num_windows=batch.limits.max_windows,
        merge=spec.merge_size,
        window=spec.window_size,
    )
    reordered = plan.source if spec.window_size else None
    x = patch_embed(
        batch.pixel_values,
        weights.tensors["patch.weight"],
        weights.tensors.get("patch.bias"),
        source=reordered,
        table=weights.tensors.get("position.table"),
        position=plan.position,
        live_rows=plan.live_rows,
    )
    work = _Workspace(weights, x)
    stream, fp8 = Stream(x, plan.live_rows), weights.fp8
    branch = Branch(x.device, len(x))
    for i, block in enumerate(weights.blocks):
        in_windows = spec.attends_in_windows(i)
        _attend(
            spec, block, fp8.blocks[i], stream, plan, work, batch.max_seqlen, attention, in_windows
        )
        _mlp(spec, block, fp8.blocks[i], stream, plan, work)
        if i in spec.deepstack_layers:
            j, x = spec.deepstack_layers.index(i), stream.settled()
            joined = x.view(-1, spec.hidden_size * spec.patches_per_token)
            out = outputs[f"deepstack_{j}"]
            _merge(spec, weights.deepstack[j], fp8.deepstack[j], joined, plan, None, out, branch)
        if i in states:
            x = stream.settled()
            residual(x, weights.offsets[i + 1], live_rows=plan.live_rows, out=states[i])
    x = stream.settled()
    residual(x, weights.offsets[-1], live_rows=plan.live_rows, out=outputs["last_hidden_state"])
    out = outputs["pooler_output"]
    _merge(spec, weights.merger, fp8.merger, x, plan, reordered, out, None)
    branch.join()


def _attend(
    spec: EncoderSpec,
    block: BlockWeights,
    in_fp8: Fp8Block,
    stream: Stream,
    plan: Layout,
    work: _Workspace,
    max_seqlen: int,
    attention: str,
    in_windows: bool,
) -> None:
    live = plan.live_rows
    if in_fp8.qkv is not None:
        weights = block.norm1_weight, block.norm1_bias, block.norm1_offset
        stream.norm_linear(weights, in_fp8.qkv, block.qkv_bias, spec, work.qkv.flatten(1))
    else:
        norm(
            stream.settled(), block.norm1_weight, block.norm1_bias, spec.eps,
            kind=spec.norm, offset=block.norm1_offset, live_rows=live, out=work.normed,
        )  # fmt: skip
        linear(
            work.normed, block.qkv_weight, block.qkv_bias,
            out=work.qkv.flatten(1), live_rows=live,
        )  # fmt: skip
    scale = spec.head_dim**-0.5
    q, k, v = work.qkv.unbind(1)
    if in_windows:
        window_attention(
            q, k, v, plan.cos, plan.sin, plan.cu_window_seqlens,
            scale=scale, max_window=spec.window_size**2, out=work.attended,
        )  # fmt: skip
    else:
        rope_(work.qkv, plan.cos, plan.sin, live)
        varlen_attention(
            q, k, v, plan.cu_seqlens,
            max_seqlen=max_seqlen, scale=scale, out=work.attended, backend=attention,
        )  # fmt: skip
    attended = work.attended.flatten(1)
    if in_fp8.proj is not None:
        stream.add_linear(attended, in_fp8.proj)
    else:
        linear(attended, block.proj_weight, residual=stream.x, live_rows=live)


def _mlp(
    spec: EncoderSpec,
    block: BlockWeights,
    in_fp8: Fp8Block,
    stream: Stream,
    plan: Layout,
    work: _Workspace,
) -> None:
    live = plan.live_rows
    is_gated = spec.mlp == "gated"
    # the kernel that quantises rows for `down` also activates or gates them
    activation = None if is_gated or in_fp8.down is not None else spec.activation
    if in_fp8.up is not None:
        weights = block.norm2_weight, block.norm2_bias, block.norm2_offset
        stream.norm_linear(weights, in_fp8.up, block.up_bias, spec, work.up)
        if activation is not None:
            activation_(work.up, activation, live)
    else:
        norm(
            stream.settled(), block.norm2_weight, block.norm2_bias, spec.eps,
            kind=spec.norm, offset=block.norm2_offset, live_rows=live, out=work.normed,
        )  # fmt: skip
        if is_gated and in_fp8.down is None:
            gated_linear(
                work.normed, block.up_weight, block.up_bias,
                out=work.gated, scratch=work.up if len(work.up) else None, live_rows=live,
            )  # fmt: skip
        else:
            linear(
                work.normed, block.up_weight, block.up_bias,
                activation=activation, out=work.up, live_rows=live,
            )  # fmt: skip
    if in_fp8.down is not None:
        stream.add_linear(work.up, in_fp8.down, "swiglu" if is_gated else spec.activation)
        return
    if is_gated and in_fp8.up is not None:
        swiglu(work.up, out=work.gated, live_rows=live)
    linear(work.gated, block.down_weight, residual=stream.x, live_rows=live)


def _merge(
    spec: EncoderSpec,
    merger: MergerWeights,
    in_fp8: Fp8Block,
    rows: torch.Tensor,
    plan: Layout,
    destination: torch.Tensor | None,
    out: torch.Tensor,
    branch: Branch | None,
) -> None:
    """Norm, join 2 x 2 patches to a row, and a two-layer MLP.

    `rows` are patches if the norm comes before the joining, joined rows if after. `destination`
    brings a tower's own row order back to that of the pixels. The norm, which reads the stream,
    stays on the main line; the MLP may run on a `branch`.
    """
    joined_before = rows.shape[1] != spec.hidden_size
    normed = norm(
        rows, merger.norm_weight, merger.norm_bias, spec.eps,
        kind=spec.norm, offset=merger.offset, destination=destination, live_rows=plan.live_rows,
        live_group=spec.patches_per_token if joined_before else 1,
    )  # fmt: skip
    joined = normed.view(-1, spec.hidden_size * spec.patches_per_token)
    with nullcontext() if branch is None else branch.after_main(joined):
        _merger_mlp(merger, in_fp8, joined, plan.live_tokens, out)


def _merger_mlp(
    merger: MergerWeights,
    in_fp8: Fp8Block,
    joined: torch.Tensor,
    live: torch.Tensor,
    out: torch.Tensor,
) -> None:
    if in_fp8.fc1 is not None and in_fp8.fc2 is not None:
        hidden = torch.empty_like(joined)
        linear_of_rows(joined, in_fp8.fc1, merger.fc1_bias, live, hidden)
        linear_of_rows(hidden, in_fp8.fc2, merger.fc2_bias, live, out, "gelu_erf")
        return
    hidden = linear(
        joined, merger.fc1_weight, merger.fc1_bias,
        activation="gelu_erf", out=_output(joined, merger.fc1_weight, "gelu_erf"), live_rows=live,
    )  # fmt: skip
    linear(hidden, merger.fc2_weight, merger.fc2_bias, out=out, live_rows=live)


def output_shapes(spec: EncoderSpec, num_patches: int) -> dict[str, tuple[int, int]]:
    """Names and shapes of the outputs for `num_patches` rows."""
    tokens = num_patches // spec.patches_per_token
    shapes = {
        "last_hidden_state": (num_patches, spec.hidden_size),
        "pooler_output": (tokens, spec.out_size),
    }
    for j in range(len(spec.deepstack_layers)):
        shapes[f"deepstack_{j}"] = (tokens, spec.out_size)
    return shapes


def check_layers(spec: EncoderSpec, layers: Sequence[int]) -> list[int]:
    """Block indices with negative ones counted from the end.

    Raises:
        ValueError: an index is outside the tower.
    """
    bad = [i for i in layers if not -spec.depth <= i < spec.depth]
    if bad:
        raise ValueError(
            f"layers = {list(layers)}: {bad} outside this tower's blocks 0..{spec.depth - 1} "
            "(negative indices count from the end)"
        )
    return [i % spec.depth for i in layers]
