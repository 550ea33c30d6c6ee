"""The vLLM contenders around stand-ins for the modules of vLLM that they reach for."""

import contextlib
import sys
import types
from typing import ClassVar

import pytest
import torch
from vitgraph.bench import vllm_providers
from vitgraph.bench.provider import make_job
from vitgraph.bench.towers_config import build_tower
from vitgraph.bench.vllm_providers import VllmTower

BUDGET_PATCHES = 128
CPU = torch.device("cpu")


class Vision(torch.nn.Module):
    """A tower of vLLM's calling convention that computes with Hugging Face's."""

    forgets: tuple[str, ...] = ()

    def __init__(self, config, norm_eps):
        super().__init__()
        self.tower = build_tower("tiny-qwen3-vl", device="cpu", dtype=torch.float32, seed=1)

    def load_weights(self, weights):
        self.tower.load_state_dict(dict(weights))
        return {name for name, _ in self.named_parameters()} - set(self.forgets)

    def forward(self, pixels, grids):
        assert torch.is_inference_mode_enabled()
        out = self.tower(pixels, grid_thw=torch.tensor(grids))
        return torch.cat([out.pooler_output, *out.deepstack_features], dim=1)


class Manager:
    """Replays the first item, in a buffer of `BUDGET_PATCHES`; the others run eagerly."""

    made: ClassVar[list["Manager"]] = []

    def __init__(self, settings, device, dtype, model):
        self.model = model
        self.limits = settings.model_config.multimodal_config
        self.replays = self.eager = 0
        self.is_cleared = False
        self.made.append(self)

    def capture(self, pool):
        assert torch.is_inference_mode_enabled()
        buffers = {"pixel_values": torch.zeros(BUDGET_PATCHES, 1)}
        graph = types.SimpleNamespace(input_buffers=buffers, output_buffer=torch.zeros(1, 1))
        self.budget_graphs = {"default": {32: graph}}

    def clear(self):
        self.is_cleared = True

    def _run_budget_graph(self, batch, budget, path="default"):
        self.replays += 1
        return self.model.visual(*batch.values())

    def execute(self, batch):
        (pixels, grid), (rows, grids) = batch.keys(), batch.values()
        first = grids[0][0] * grids[0][1] * grids[0][2]
        outputs = [self._run_budget_graph({pixels: rows[:first], grid: grids[:1]}, 32)]
        if grids[1:]:
            self.eager += 1
            outputs.append(self.model.visual(rows[first:], grids[1:]))
        return outputs


@pytest.fixture
def vllm(monkeypatch):
    """Stand-ins in place, as if vLLM 0.26 were installed and the CPU would do."""
    entered = []

    @contextlib.contextmanager
    def set_current_vllm_config(config):
        entered.append(config)
        try:
            yield
        finally:
            entered.remove(config)

    def model(*args):
        raise AssertionError("a model is never built, only its tower")

    modules = {
        "vllm": types.SimpleNamespace(),
        "vllm.config": types.SimpleNamespace(
            VllmConfig=object, set_current_vllm_config=set_current_vllm_config
        ),
        "vllm.distributed": types.SimpleNamespace(
            parallel_state=types.SimpleNamespace(model_parallel_is_initialized=lambda: True)
        ),
        "vllm.model_executor.models.qwen3_vl": types.SimpleNamespace(
            Qwen3_VisionTransformer=Vision,
            Qwen3VLForConditionalGeneration=type("Model", (torch.nn.Module,), {"__init__": model}),
        ),
        "vllm.v1.worker.encoder_cudagraph": types.SimpleNamespace(EncoderCudaGraphManager=Manager),
    }
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    monkeypatch.setattr(vllm_providers, "require_cuda", lambda device, name: None)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    monkeypatch.setattr(Manager, "made", [])
    return types.SimpleNamespace(entered=entered, managers=Manager.made)


@pytest.fixture
def tower():
    return build_tower("tiny-qwen3-vl", device="cpu", dtype=torch.float32)


def job_of(*grids):
    return make_job(grids, 3 * 2 * 16 * 16, device=CPU, dtype=torch.float32, seed=0)


def test_features_are_those_of_the_tower_whose_weights_it_has(vllm, tower):
    job = job_of((1, 4, 6), (1, 8, 8))
    with torch.inference_mode():
        out = tower(job.pixel_values, grid_thw=job.grid_thw)
    for build in VllmTower("qwen3_vl", tower).builders().values():
        features = build(job).features()
        torch.testing.assert_close(features, [out.pooler_output, *out.deepstack_features])


def test_padded_patches_are_buffers_of_graphs_and_live_rows_of_the_rest(vllm, tower):
    job = job_of((1, 4, 6), (1, 8, 8))
    builders = VllmTower("qwen3_vl", tower).builders()
    assert builders["vllm-eager"](job).padded_patches == 24 + 64
    assert builders["vllm-graph"](job).padded_patches == BUDGET_PATCHES + 64


def test_nothing_is_replayed_before_the_check(vllm, tower):
    provider = VllmTower("qwen3_vl", tower).builders()["vllm-graph"](job_of((1, 4, 6)))
    (manager,) = vllm.managers
    assert manager.replays == 0
    provider.features()
    assert manager.replays == 1


def test_images_have_graphs_without_room_for_videos(vllm, tower):
    build = VllmTower("qwen3_vl", tower).builders()["vllm-graph"]
    for grids in ((1, 4, 6),), ((2, 4, 6),), ((1, 8, 8),):
        build(job_of(*grids)).features()
    images, videos = vllm.managers
    assert [m.limits.get_limit_per_prompt("video") for m in (images, videos)] == [0, 1]
    assert [m.limits.get_limit_per_prompt("image") for m in (images, videos)] == [1, 1]
    assert (images.replays, videos.replays) == (2, 1)


def test_release_frees_graphs_and_leaves_the_configuration(vllm, tower):
    contender = VllmTower("qwen3_vl", tower)
    contender.builders()["vllm-graph"](job_of((1, 4, 6)))
    assert len(vllm.entered) == 1
    contender.release()
    assert vllm.entered == []
    assert vllm.managers[0].is_cleared


def test_a_tower_without_all_weights_is_refused(vllm, tower, monkeypatch):
    monkeypatch.setattr(Vision, "forgets", ("tower.pos_embed.weight",))
    contender = VllmTower("qwen3_vl", tower)
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"no weights for tower\.pos_embed\.weight"):
            contender.builders()["vllm-eager"](job_of((1, 4, 6)))
        assert vllm.entered == []  # what failed leaves no configuration behind


def test_the_attention_of_others_is_left_as_it_was(vllm, tower, monkeypatch):
    load = Vision.load_weights

    def switch_off(self, weights):
        torch.backends.cuda.enable_cudnn_sdp(False)
        return load(self, weights)

    monkeypatch.setattr(Vision, "load_weights", switch_off)
    before = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(True)
    try:
        VllmTower("qwen3_vl", tower).builders()["vllm-eager"](job_of((1, 4, 6)))
        assert torch.backends.cuda.cudnn_sdp_enabled()
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)
