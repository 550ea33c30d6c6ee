"""vLLM's own vision tower as contenders: eager, and under its encoder CUDA graphs.

Only where vLLM is importable; its internals move between releases (written against 0.26). Weights
are those of the Hugging Face tower, so its output is held against the same oracle. No replay comes
before the one that is checked: a graph whose first replay is wrong gets no time.
"""

import importlib
import importlib.util
import socket
import types
from collections.abc import Callable
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

from .provider import Builders, Job, Provider, UnavailableError, require_cuda

_CLASSES = {  # family: module, tower, model that owns the tower
    "qwen3_vl": ("qwen3_vl", "Qwen3_VisionTransformer", "Qwen3VLForConditionalGeneration"),
    "qwen2_5_vl": ("qwen2_5_vl", "Qwen2_5_VisionTransformer", "Qwen2_5_VLForConditionalGeneration"),
}
_MAX_TOKENS = 16384  # its default budgets then are 64, 128, ... 16384
_MAX_ITEMS = 16  # enough for these workloads in one batch; 64 by default
_MAX_FRAMES = 8  # of one video


class VllmTower:
    """vLLM's tower with the weights of a Hugging Face one, made when it is first needed."""

    def __init__(self, family: str, tower: Any):
        self._family = family
        self._hf = tower
        self._vision: Any = None
        self._model: Any = None
        self._context = ExitStack()
        self._managers: dict[bool, Any] = {}

    def builders(self) -> Builders:
        """Builders of the two contenders."""
        return {"vllm-eager": self._eager, "vllm-graph": self._graph}

    def release(self) -> None:
        """Free the tower and its graphs, and leave vLLM's configuration."""
        for manager in self._managers.values():
            manager.clear()
        self._vision = self._model = None
        self._managers = {}
        self._context.close()

    def _prepare(self) -> Any:
        parameter = next(self._hf.parameters())
        require_cuda(parameter.device, "vLLM")
        if self._family not in _CLASSES:
            raise UnavailableError(f"no vLLM tower with CUDA graphs for {self._family}")
        if importlib.util.find_spec("vllm") is None:
            raise UnavailableError("vllm is not installed")
        if self._vision is None:
            self._build(parameter)
        return self._vision

    def _build(self, parameter: torch.Tensor) -> None:
        module_name, tower_name, model_name = _CLASSES[self._family]
        with ExitStack() as context, _cudnn_sdpa_as_it_is():
            vllm_config = importlib.import_module("vllm.config")
            module = importlib.import_module(f"vllm.model_executor.models.{module_name}")
            # its layers look the configuration up when built and, some of them, when called
            context.enter_context(vllm_config.set_current_vllm_config(vllm_config.VllmConfig()))
            _join_group_of_one(parameter.device.index or 0)
            with _default_dtype(parameter.dtype), torch.device(parameter.device):
                vision = getattr(module, tower_name)(self._hf.config, norm_eps=1e-6)
            _load(vision, self._hf)
            # what the capture machinery asks of a whole model, around this tower alone
            model = object.__new__(getattr(module, model_name))
            torch.nn.Module.__init__(model)
            model.visual = vision.eval().requires_grad_(False)
            model.is_multimodal_pruning_enabled = False
            model.get_max_frames_per_video = lambda: _MAX_FRAMES
            self._vision, self._model = vision, model
            self._context = context.pop_all()

    def _manager(self, is_video: bool) -> Any:
        if is_video in self._managers:
            return self._managers[is_video]
        worker = importlib.import_module("vllm.v1.worker.encoder_cudagraph")
        # image-only graphs unless a video is asked for: with frame slots beyond the items, release
        # 0.26 fills the tail of cu_seqlens with zeros and images come out wrong
        limits = types.SimpleNamespace(
            get_limit_per_prompt=lambda kind: int(is_video or kind != "video"),
            mm_encoder_tp_mode="weights",
        )
        model_config = types.SimpleNamespace(max_model_len=_MAX_TOKENS, multimodal_config=limits)
        self._model.model_config = model_config
        self._model.multimodal_config = limits
        settings = types.SimpleNamespace(
            compilation_config=types.SimpleNamespace(
                encoder_cudagraph_token_budgets=[],
                encoder_cudagraph_max_vision_items_per_batch=_MAX_ITEMS,
                encoder_cudagraph_max_frames_per_batch=None,
            ),
            model_config=model_config,
            scheduler_config=types.SimpleNamespace(max_num_batched_tokens=_MAX_TOKENS),
            parallel_config=types.SimpleNamespace(tensor_parallel_size=1),
        )
        parameter = next(self._hf.parameters())
        manager = worker.EncoderCudaGraphManager(
            settings, parameter.device, parameter.dtype, self._model
        )
        with torch.inference_mode():
            manager.capture(torch.cuda.graph_pool_handle())
        self._managers[is_video] = manager
        return manager

    def _eager(self, job: Job) -> Provider:
        vision = self._prepare()
        grids = [list(grid) for grid in job.grids]
        return self._provider(job, lambda: vision(job.pixel_values, grids), len(job.pixel_values))

    def _graph(self, job: Job) -> Provider:
        self._prepare()
        is_video = any(t > 1 for t, _, _ in job.grids)
        manager = self._manager(is_video)
        pixels, grid = (
            ("pixel_values_videos", "video_grid_thw")
            if is_video
            else ("pixel_values", "image_grid_thw")
        )
        batch = {pixels: job.pixel_values, grid: [list(g) for g in job.grids]}
        padded = _padded_patches(manager, batch, pixels)
        return self._provider(job, lambda: manager.execute(dict(batch)), padded)

    def _provider(self, job: Job, forward: Callable[[], Any], padded_patches: int) -> Provider:
        deepstack = getattr(self._hf.config, "deepstack_visual_indexes", ())

        @torch.inference_mode()
        def call() -> Any:
            return forward()

        def features() -> list[torch.Tensor]:
            out = call()
            joined = out if isinstance(out, torch.Tensor) else torch.cat(list(out))
            # vLLM lays the deepstack features beside the tokens
            return list(joined.chunk(1 + len(deepstack), dim=1))

        return Provider(call, features, padded_patches)


def _load(vision: torch.nn.Module, tower: torch.nn.Module) -> None:
    """Give `vision` the weights of a Hugging Face `tower`.

    Raises:
        RuntimeError: a parameter of `vision` got none; it would hold whatever was in memory.
    """
    load_weights: Any = vision.load_weights
    loaded = load_weights(tower.state_dict().items())
    missing = sorted(dict(vision.named_parameters()).keys() - loaded)
    if missing:
        raise RuntimeError(f"vLLM's tower got no weights for {', '.join(missing)}")


@torch.inference_mode()
def _padded_patches(manager: Any, batch: dict[str, Any], pixels: str) -> int:
    """Rows that `manager` computes on for `batch`: all buffers of the graphs that it would replay.

    Replays none of them; items beyond the largest budget run eagerly here, as they do later.
    """
    rows = len(batch[pixels])

    def count(part: dict[str, Any], budget: int, path: str = "default") -> torch.Tensor:
        nonlocal rows
        graph = manager.budget_graphs[path][budget]
        rows += len(graph.input_buffers["pixel_values"]) - len(part[pixels])
        return graph.output_buffer

    manager._run_budget_graph = count
    try:
        manager.execute(dict(batch))
    finally:
        del manager._run_budget_graph  # the method of its class again
    return rows


@contextmanager
def _cudnn_sdpa_as_it_is():
    """vLLM switches cuDNN's attention off in the whole process, that of other contenders too."""
    before = torch.backends.cuda.cudnn_sdp_enabled()
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)


@contextmanager
def _default_dtype(dtype: torch.dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _join_group_of_one(device_index: int) -> None:
    """vLLM's layers ask for tensor-parallel groups even when they are alone."""
    distributed = importlib.import_module("vllm.distributed")
    if distributed.parallel_state.model_parallel_is_initialized():
        return
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"tcp://127.0.0.1:{probe.getsockname()[1]}"
    distributed.init_distributed_environment(1, 0, address, device_index, "nccl")
    distributed.initialize_model_parallel(1)
