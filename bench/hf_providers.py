"""Hugging Face's own towers as contenders, from plain eager calls to compiled exact graphs.

- `hf-eager-sdpa`: the tower as it comes.
- `hf-eager-fa2`: the same with the FlashAttention-2 that is built into torch.
- `hf-exact-graph`: all metadata precomputed for exactly this layout, FlashAttention-2, one CUDA
  graph; only the replay is timed. No server could use it (a graph per layout), so it is what a
  perfect budget graph of these kernels would reach.
- `hf-compile-graph`: the same with every block compiled for exactly these shapes.
"""

import copy
import sys
from collections.abc import Callable
from typing import Any

import torch
from transformers import AttentionInterface, vision_utils
from transformers.vision_utils import (
    get_vision_cu_seqlens,
    get_vision_position_ids,
    get_vision_window_index,
)

from .provider import Builders, Job, Provider, UnavailableError, features_of, require_cuda
from .timing import record
from .towers_config import hf_blocks, hf_grid, hf_pixels

# towers hand over the packed sequence only where the name of the attention contains "flash"
FLASH = "vitgraph_torch_flash"


def torch_flash_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float,
    cu_seq_lens_q: torch.Tensor,
    cu_seq_lens_k: torch.Tensor,
    max_length_q: int,
    max_length_k: int,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Hugging Face's attention function on torch's FlashAttention-2; q, k, v are [1, H, T, D]."""
    from torch.nn.attention.varlen import varlen_attn

    q, k, v = (x.squeeze(0).transpose(0, 1) for x in (query, key, value))
    out = varlen_attn(
        q, k, v, cu_seq_lens_q, cu_seq_lens_k, max_length_q, max_length_k, scale=scaling
    )
    assert isinstance(out, torch.Tensor)  # a pair only when asked for the log-sum-exp
    return out.unsqueeze(0), None


def register_flash() -> None:
    """Make `FLASH` known to transformers; harmless when repeated."""
    AttentionInterface.register(FLASH, torch_flash_attention)


def precomputed_kwargs(tower: Any, grid_thw: torch.Tensor) -> dict[str, Any]:
    """Everything that Hugging Face's forward derives from `grid_thw`, as its keyword arguments.

    Tensors are on the device of `grid_thw`. With them (and attention that takes the packed
    sequence) the forward neither reads the device nor has a shape that depends on data.
    """
    config = tower.config
    is_kimi = config.model_type == "kimi_k25_vision"
    is_raster = is_kimi or config.model_type == "paddleocr_vl_vision"
    merge = 1 if is_raster else config.spatial_merge_size
    cu_seqlens = get_vision_cu_seqlens(grid_thw)
    kwargs: dict[str, Any] = {
        "cu_seqlens": cu_seqlens,
        "max_seqlen": _longest(cu_seqlens),
        "position_ids": get_vision_position_ids(grid_thw, merge),
    }
    if hasattr(config, "fullatt_block_indexes"):
        index, cu_windows = get_vision_window_index(
            grid_thw, merge, config.window_size, config.patch_size
        )
        kwargs["window_index"] = index.to(grid_thw.device)
        kwargs["cu_window_seqlens"] = cu_windows
        kwargs["max_window_seqlen"] = _longest(cu_windows)
    if is_raster or hasattr(config, "num_position_embeddings"):
        if not hasattr(vision_utils, "get_vision_interpolation_indices_and_weights"):
            raise UnavailableError("precomputed positions need a newer transformers, such as 5.17")
        table = tower
        if is_raster:
            table = tower.patch_embed.pos_emb if is_kimi else tower.vision_model.embeddings
        indices, weights = vision_utils.get_vision_interpolation_indices_and_weights(
            grid_thw,
            num_grid_per_side=table.num_grid_per_side,
            mode=table.interpolation_mode,
            align_corners=table.interpolation_align_corners,
            spatial_merge_size=merge,
        )
        kwargs["interp_indices"] = indices
        kwargs["interp_weights"] = weights
    if is_kimi:  # of images alone, whose segments are frames as well
        home = sys.modules[type(tower).__module__]
        kwargs["frame_index"] = home.get_vision_frame_index(grid_thw)
        kwargs["temporal_merge_index"] = home.get_vision_temporal_merge_index(
            grid_thw, *config.merge_kernel_size
        )
    return kwargs


def _longest(cu_seqlens: torch.Tensor) -> int:
    return int(cu_seqlens.diff().max())


def hf_builders(tower: Any) -> Builders:
    """Builders of the four contenders around one live tower.

    `hf-eager-*` and `hf-exact-graph` share the tower: each switches its attention before it runs.
    """
    register_flash()
    device = next(tower.parameters()).device

    def eager(implementation: str) -> Callable[[Job], Provider]:
        def build(job: Job) -> Provider:
            if implementation == FLASH:
                require_cuda(device, "torch's FlashAttention-2")

            grid_thw = hf_grid(tower, job.grid_thw)
            pixels = hf_pixels(tower, job.pixel_values)

            @torch.inference_mode()
            def call() -> Any:
                tower.config._attn_implementation = implementation
                return tower(pixels, grid_thw=grid_thw)

            return Provider(call, lambda: features_of(call()), len(job.pixel_values))

        return build

    def exact_graph(job: Job) -> Provider:
        require_cuda(device, "a CUDA graph")
        return _exact_graph(tower, job)

    def compile_graph(job: Job) -> Provider:
        require_cuda(device, "a CUDA graph")
        # its own copy: compile() changes the modules, which the eager contenders share
        torch.compiler.reset()
        compiled = copy.deepcopy(tower)
        for block in hf_blocks(compiled):
            block.compile(dynamic=False)
        return _exact_graph(compiled, job)

    return {
        "hf-eager-sdpa": eager("sdpa"),
        "hf-eager-fa2": eager(FLASH),
        "hf-exact-graph": exact_graph,
        "hf-compile-graph": compile_graph,
    }


def _exact_graph(tower: Any, job: Job) -> Provider:
    grid_thw, pixels = hf_grid(tower, job.grid_thw), hf_pixels(tower, job.pixel_values)
    kwargs = precomputed_kwargs(tower, grid_thw)
    tower.config._attn_implementation = FLASH

    @torch.inference_mode()
    def forward() -> Any:
        return tower(pixels, grid_thw=grid_thw, **kwargs)

    try:
        graph, output = record(forward)
    except torch.cuda.OutOfMemoryError as error:
        raise UnavailableError(f"out of GPU memory while capturing: {error}") from error

    def features() -> list[torch.Tensor]:
        graph.replay()
        return features_of(output)

    return Provider(graph.replay, features, len(job.pixel_values), holds=(tower, kwargs))
