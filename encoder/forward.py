"""The forward of a tower: one function for eager calls, capture and replay alike.

Everything that depends on the batch is read on the device, from the grid table, so the same calls
can be recorded once and replayed for every batch that fits. Nothing here synchronises or moves
data to or from the host. Rows past the live ones are finite in the residual stream and in every
intermediate: norms write zeros there, and where attention, gating and large matrix products leave
them alone, they are zeroed first.
"""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch

from ..capture import RungLimits
from ..kernels import background
from ..kernels.attention import FP8_BACKENDS, varlen_attention
from ..kernels.deferred_norm import ScaledRows, choose_deferred, linear_of_scaled
from ..kernels.frame_positions import add_frame_positions_
from ..kernels.gated_linear import choose_gated_backend, gated_linear
from ..kernels.gemm import gemm
from ..kernels.layout import Layout, layout
from ..kernels.linear import empty_output, linear
from ..kernels.norm import norm
from ..kernels.patch_embed import patch_embed
from ..kernels.pdl import kernel_chain
from ..kernels.positions import add_positions_
from ..kernels.rope import rope_
from ..kernels.rotary_linear import Rotation, rotary_linear, rotating_tile
from ..kernels.swiglu import swiglu
from ..kernels.temporal_mean import temporal_mean
from ..kernels.window_attention import window_attention
from ..kernels.zero_padding import ZeroedPadding
from .attended import Attended
from .branch import Branch
from .fp8 import Fp8Block, mlp_of_rows
from .glm_merger import glm_merge
from .spec import EncoderSpec
from .stream import Stream
from .weights import BlockWeights, MergerWeights, TowerWeights, up_epilogue


@dataclass(frozen=True)
class Batch:
    """One packed batch on the device, and the host's bounds for it.

    Attributes:
        pixel_values: [T, P] in the tower's dtype; rows past the live ones may hold anything.
        grid: [items, 3] int32, zero past the live items.
        limits: Capacities; T = limits.max_patches.
        max_seqlen: Upper bound in patches of a frame, or of an item whose frames attend together.
    """

    pixel_values: torch.Tensor
    grid: torch.Tensor
    limits: RungLimits
    max_seqlen: int


class _Workspace:
    """Intermediates of one forward, shared by all blocks.

    Padding rows that their writers leave alone are zeroed once, since readers multiply them:
    attention reads qkv up to a tile past its last segment, a GEMM all rows or up to a tile past
    the live ones. Live rows are uninitialised: every block writes them before it reads them.
    """

    def __init__(self, weights: TowerWeights, x: torch.Tensor, padding: ZeroedPadding):
        spec, T = weights.spec, x.shape[0]
        block = weights.blocks[0]
        is_gated = spec.mlp == "gated"
        self.normed = torch.empty_like(x)
        in_fp8 = weights.fp8.plan is not None
        N, K = block.qkv_weight.shape
        rotates = weights.turns is not None and rotating_tile(T, N, K, x.dtype, x.device)
        qkv = empty_output(
            x, block.qkv_weight, padding=padding, leaves_padding=in_fp8 or bool(rotates)
        )
        self.qkv = qkv.view(T, 3, spec.num_heads, spec.head_dim)
        shape = T, spec.num_heads, spec.head_dim
        self.attended = Attended(x, shape, weights.fp8.blocks, padding)
        self.deferred = None  # tiles of the products around the second norm of a block
        if block.deferred is not None and not in_fp8:
            epilogue = up_epilogue(spec)
            self.deferred = choose_deferred(T, block.proj_weight, block.up_weight, epilogue)
        if self.deferred is not None:
            # where norm1 has written zeros to padding: the second product may multiply rows, by a
            # larger tile, that the first leaves alone
            self.scaled = ScaledRows.over(self.normed)
        if is_gated:
            N, K = block.up_weight.shape
            backend, _ = choose_gated_backend(T, N, K, x.dtype, x.device)
            # not needed by one kernel; two of them read and write live rows only
            is_needed = backend == "library" or spec.gate_limit is not None
            self.up = x.new_empty(T if is_needed else 0, N)
            self.gated = padding.of(x.new_empty(T, block.down_weight.shape[1]))
        else:
            self.up = self.gated = empty_output(
                x, block.up_weight, spec.activation,
                padding=padding, leaves_padding=in_fp8 or self.deferred is not None,
                at_lines=not in_fp8,
            )  # fmt: skip


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
        outputs: "last_hidden_state" [T, D] (with a "glm" merger [T/4, out]), "pooler_output"
            [T/4, out] and, for each deepstack merger, "deepstack_0".. [T/4, out]; live rows first.
            With merger "mean" items of several frames have fewer tokens.
            Without a merger, "last_hidden_state" alone.
            Padding rows are finite, or as they were where a matrix product leaves them alone.
        attention: Backend of the blocks that attend over whole frames or items.
        states: Block index to [T, D] tensors that take the stream after those blocks.
    """
    device = batch.pixel_values.device
    # Triton launches on the current device, and autocast would change dtypes between kernels
    on_device = torch.cuda.device(device) if device.type == "cuda" else nullcontext()
    with on_device, torch.autocast(device.type, enabled=False), kernel_chain():
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
        merge=spec.pixel_block,
        window=spec.window_size,
        clips=spec.segments == "clips",
    )
    reordered = plan.source if spec.window_size else None
    rotation = None
    if weights.turns is not None:
        rotation = Rotation(plan.position, weights.turns, plan.cos, plan.sin)
    x = _embed(weights, batch.pixel_values, plan, reordered)
    if weights.frame_table is not None:
        add_frame_positions_(x, weights.frame_table, batch.grid)
    with ZeroedPadding(plan.live_rows) as padding:
        work = _Workspace(weights, x, padding)
    fp8 = weights.fp8
    stream = Stream(x, plan.live_rows, in_fp8=fp8.plan is not None)
    branch = Branch(x.device, len(x))
    state = None  # behind the block before, if the norm of this one leaves it to a merger
    for i, block in enumerate(weights.blocks):
        in_windows = spec.attends_in_windows(i)
        _qkv(spec, block, fp8.blocks[i], stream, plan, work, rotation, in_windows, state)
        if state is not None:
            _merge_state(weights, i - 1, state, plan, outputs, branch)
            state = None
        _attend(
            spec, block, fp8.blocks[i], stream, plan, work, batch.max_seqlen, attention, in_windows
        )
        _mlp(spec, block, fp8.blocks[i], stream, plan, work)
        if i in spec.deepstack_layers:
            if branch.has_room and i + 1 < spec.depth and fp8.blocks[i + 1].qkv is None:
                state = torch.empty_like(x)
            else:
                j = spec.deepstack_layers.index(i)
                merger, out = weights.deepstack[j], outputs[f"deepstack_{j}"]
                normed = stream.norm(merger.norm, spec, joined=spec.patches_per_token)
                # what reads the stream stays on the main line
                with branch.after_main(normed):
                    _merge(merger, fp8.deepstack[j], normed, plan.live_tokens, out, branch)
        if i in states:
            stream.state(weights.offset_after(i), states[i])
    last = outputs["last_hidden_state"]
    if weights.final_norm is not None:
        stream.norm(weights.final_norm, spec, out=last)
        if spec.merger == "mean":
            rows = outputs["pooler_output"].view(-1, spec.hidden_size)
            temporal_mean(last, batch.grid, merge=spec.merge_size, out=rows)
    elif weights.glm_merger is not None:
        glm_merge(spec, weights.glm_merger, stream, plan, last, outputs["pooler_output"])
    elif weights.merger is not None:
        # back to the order of the pixels in a tower with one of its own
        normed = stream.norm(weights.merger.norm, spec, destination=reordered, state=last)
        joined = normed.view(-1, spec.hidden_size * spec.patches_per_token)
        _merge(weights.merger, fp8.merger, joined, plan.live_tokens, outputs["pooler_output"])
    branch.join()


def _embed(
    weights: TowerWeights, pixels: torch.Tensor, plan: Layout, source: torch.Tensor | None
) -> torch.Tensor:
    """The residual stream in front of the blocks."""
    spec, tensors, live = weights.spec, weights.tensors, plan.live_rows
    table = tensors.get("position.table")
    has_norm = spec.embed_norm != "none"
    x = patch_embed(
        pixels, tensors["patch.weight"], tensors.get("patch.bias"),
        source=source, table=None if has_norm else table, position=plan.position,
        sampling=spec.position_sampling, live_rows=live,
    )  # fmt: skip
    if has_norm:
        norm(
            x, tensors["embed_norm.weight"], tensors.get("embed_norm.bias"), spec.eps,
            kind=spec.embed_norm, live_rows=live, out=x,
        )  # fmt: skip
        # what comes between them keeps positions out of the epilogue of the product
        if table is not None:
            add_positions_(x, table, plan.position, spec.position_sampling, live)
    return x


def _qkv(
    spec: EncoderSpec,
    block: BlockWeights,
    in_fp8: Fp8Block,
    stream: Stream,
    plan: Layout,
    work: _Workspace,
    rotation: Rotation | None,
    in_windows: bool,
    state: torch.Tensor | None,
) -> None:
    """q, k and v of the normalised stream, rotated unless windows do it.

    `state` gets the stream itself; None where the norm is one into fp8.
    """
    live, flat = plan.live_rows, work.qkv.flatten(1)
    if in_fp8.qkv is not None:
        bias = in_fp8.qkv_bias if in_fp8.fits else block.qkv_bias
        stream.norm_linear_fp8(block.norm1, in_fp8.qkv, bias, spec, flat, rotation=rotation)
    else:
        stream.norm(block.norm1, spec, state=state, out=work.normed)
        if rotation is None:
            linear(work.normed, block.qkv_weight, block.qkv_bias, out=flat, live_rows=live)
        else:
            rotary_linear(
                work.normed, block.qkv_weight, block.qkv_bias, rotation,
                out=work.qkv, live_rows=live,
            )  # fmt: skip
    if spec.rope_theta and rotation is None and not in_windows:
        rope_(work.qkv, plan.cos, plan.sin, live, block.qk_norm_weight, spec.eps)


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
    scale = spec.head_dim**-0.5
    q, k, v = work.qkv.unbind(1)
    casts = in_windows or attention in FP8_BACKENDS
    out = work.attended.target(in_fp8, casts=casts)
    if in_windows:
        window_attention(
            q, k, v, plan.cos, plan.sin, plan.cu_window_seqlens,
            scale=scale, max_window=spec.window_size**2, out=out,
        )  # fmt: skip
    else:
        varlen_attention(
            q, k, v, plan.cu_seqlens,
            max_seqlen=max_seqlen, scale=scale, out=out, backend=attention, tickets=plan.tickets,
        )  # fmt: skip
    attended = work.attended.rows(in_fp8, casts=casts)
    if work.deferred is not None and block.deferred is not None:
        _, _, offset = block.norm2
        stream.add_linear_scaled(
            attended, block.proj_weight, block.deferred, offset, work.deferred[0], work.scaled
        )
    elif in_fp8.proj is not None:
        stream.add_linear_fp8(attended, in_fp8.proj)
    else:
        stream.add_linear(attended, block.proj_weight)


def _mlp(
    spec: EncoderSpec,
    block: BlockWeights,
    in_fp8: Fp8Block,
    stream: Stream,
    plan: Layout,
    work: _Workspace,
) -> None:
    live, is_gated = plan.live_rows, spec.mlp == "gated"
    if in_fp8.up is not None and in_fp8.down is not None and not is_gated:
        stream.norm_mlp_fp8(
            block.norm2, in_fp8.up, block.up_bias, in_fp8.down, spec, spec.activation
        )
        return
    # a gate with a limit is a pass of its own
    is_fused = not is_gated or spec.gate_limit is None
    transform = "swiglu" if is_gated else spec.activation
    if in_fp8.up is not None:
        stream.norm_linear_fp8(
            block.norm2, in_fp8.up, block.up_bias, spec,
            work.gated if is_fused else work.up, transform if is_fused else None,
        )  # fmt: skip
    elif work.deferred is not None and block.deferred is not None:
        linear_of_scaled(
            work.scaled, block.up_weight, block.deferred,
            activation=None if is_gated else spec.activation, is_gated=is_gated,
            out=work.gated, live_rows=live, config=work.deferred[1],
        )  # fmt: skip
    else:
        stream.norm(block.norm2, spec, out=work.normed)
        if is_gated and is_fused:
            gated_linear(
                work.normed, block.up_weight, block.up_bias,
                out=work.gated, scratch=work.up if len(work.up) else None, live_rows=live,
            )  # fmt: skip
        else:
            linear(
                work.normed, block.up_weight, block.up_bias,
                activation=None if is_gated else spec.activation, out=work.up, live_rows=live,
            )  # fmt: skip
    if not is_fused:
        swiglu(work.up, out=work.gated, live_rows=live, limit=spec.gate_limit)
    if in_fp8.down is not None:
        stream.add_linear_fp8(work.gated, in_fp8.down)
    else:
        stream.add_linear(work.gated, block.down_weight)


def _merge_state(
    weights: TowerWeights,
    layer: int,
    state: torch.Tensor,
    plan: Layout,
    outputs: Mapping[str, torch.Tensor],
    branch: Branch,
) -> None:
    """The deepstack merger behind `layer`, all of it beside the blocks.

    Its norm reads `state` [T, D], which nobody overwrites, and not the stream.
    """
    spec, j = weights.spec, weights.spec.deepstack_layers.index(layer)
    merger = weights.deepstack[j]
    weight, bias, _ = merger.norm  # the state lacks nothing
    rows = state.view(-1, spec.hidden_size * spec.patches_per_token)
    with branch.after_main(state):
        norm(
            rows, weight, bias, spec.eps, kind=spec.norm,
            live_rows=plan.live_rows, live_group=spec.patches_per_token, out=rows,
        )  # fmt: skip
        in_fp8 = weights.fp8.deepstack[j]
        _merge(merger, in_fp8, rows, plan.live_tokens, outputs[f"deepstack_{j}"], branch)


def _merge(
    merger: MergerWeights,
    in_fp8: Fp8Block,
    joined: torch.Tensor,
    live: torch.Tensor,
    out: torch.Tensor,
    branch: Branch | None = None,
) -> None:
    """The two layers of a merger, on normalised rows of 2 x 2 patches side by side.

    `branch` is what it is launched on, None for the main line.
    """
    if in_fp8.fc1 is not None and in_fp8.fc2 is not None:
        mlp_of_rows(
            joined, in_fp8.fc1, merger.fc1_bias, in_fp8.fc2, merger.fc2_bias, "gelu_erf", live, out
        )
        return
    weights = merger.fc1_weight, merger.fc2_weight
    if branch is not None and background.suits_background(joined, *weights):
        # in eager calls nothing runs beside it, and the same kernel takes the whole GPU
        programs = background.PROGRAMS if branch.is_beside else None
        place = {"live_rows": live, "config": background.TILE, "programs": programs}
        # both leave the same rows alone
        hidden = gemm(joined, merger.fc1_weight, merger.fc1_bias, activation="gelu_erf", **place)
        gemm(hidden, merger.fc2_weight, merger.fc2_bias, out=out, **place)
        return
    with ZeroedPadding(live) as padding:
        hidden = empty_output(
            joined, merger.fc1_weight, "gelu_erf", padding=padding, reader=merger.fc2_weight
        )
    linear(
        joined, merger.fc1_weight, merger.fc1_bias,
        activation="gelu_erf", live_rows=live, out=hidden,
    )  # fmt: skip
    linear(hidden, merger.fc2_weight, merger.fc2_bias, out=out, live_rows=live)


def output_shapes(
    spec: EncoderSpec, num_patches: int, num_tokens: int | None = None
) -> dict[str, tuple[int, int]]:
    """Names and shapes of the outputs for `num_patches` rows, by default those of images."""
    if spec.merger == "none":
        return {"last_hidden_state": (num_patches, spec.state_size)}
    tokens = num_patches // spec.patches_per_token if num_tokens is None else num_tokens
    shapes = {
        "last_hidden_state": (
            tokens if spec.merger == "glm" else num_patches,
            spec.state_size,
        ),
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
