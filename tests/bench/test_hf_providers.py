import pytest
import torch
from vitgraph.bench.hf_providers import FLASH, hf_builders, precomputed_kwargs
from vitgraph.bench.provider import UnavailableError, features_of, make_job
from vitgraph.bench.towers_config import (
    TOWERS,
    TowerConfig,
    build_tower,
    hf_blocks,
    hf_grid,
    hf_pixels,
    patch_values,
)

TINY = [name for name in TOWERS if name.startswith("tiny")]
GRIDS = ((1, 8, 12), (1, 4, 6), (3, 10, 18))


def job_for(tower, dtype=torch.float32):
    width = patch_values(tower.config)
    return make_job(GRIDS, width, device=torch.device("cpu"), dtype=dtype, seed=0)


@pytest.mark.parametrize("name", TINY)
def test_precomputed_metadata_changes_no_bit(name):
    tower = build_tower(name, device="cpu", dtype=torch.float32)
    job = job_for(tower)
    grid = hf_grid(tower, job.grid_thw)
    kwargs = precomputed_kwargs(tower, grid)
    # with every key there the grid is not looked at (but for the positions of GLM-4V): a wrong one
    # shows a key that was ignored
    nonsense = grid if name == "tiny-glm-4v" else torch.tensor([[1, 2, 2]])
    pixels = hf_pixels(tower, job.pixel_values)
    with torch.inference_mode():
        own = features_of(tower(pixels, grid_thw=grid))
        given = features_of(tower(pixels, grid_thw=nonsense, **kwargs))
    assert len(own) == 1 + len(getattr(tower.config, "deepstack_visual_indexes", ()))
    for a, b in zip(own, given, strict=True):
        assert torch.equal(a, b)
    assert kwargs["max_seqlen"] == 180


def test_precomputed_metadata_of_kimi_changes_no_bit(monkeypatch):
    """Of images alone; there is no tiny one in the table."""
    tiny = {
        "hidden_size": 64, "num_attention_heads": 2, "num_hidden_layers": 3,
        "intermediate_size": 96, "pos_emb_height": 8, "pos_emb_width": 8,
    }  # fmt: skip
    monkeypatch.setitem(TOWERS, "tiny-kimi", TowerConfig("kimi_k25", tiny))
    tower = build_tower("tiny-kimi", device="cpu", dtype=torch.float32)
    width = patch_values(tower.config)
    job = make_job(GRIDS[:2], width, device=torch.device("cpu"), dtype=torch.float32, seed=0)
    kwargs = precomputed_kwargs(tower, job.grid_thw)
    pixels = hf_pixels(tower, job.pixel_values)
    with torch.inference_mode():
        own = features_of(tower(pixels, grid_thw=job.grid_thw))
        given = features_of(tower(pixels, grid_thw=torch.tensor([[1, 2, 2]]), **kwargs))
    assert torch.equal(own[0], given[0])
    assert len(hf_blocks(tower)) == 3


def test_window_metadata():
    tower = build_tower("tiny-qwen2.5-vl", device="cpu", dtype=torch.float32)
    kwargs = precomputed_kwargs(tower, torch.tensor([[1, 10, 18]]))
    assert kwargs["cu_window_seqlens"].tolist() == [0, 64, 128, 144, 160, 176, 180]
    assert kwargs["max_window_seqlen"] == 64


@pytest.mark.parametrize("name", TINY)
def test_packed_attention_by_name_agrees_with_sdpa(name, monkeypatch):
    """The packed branch, with the flash kernel replaced by a CPU stand-in of the same arguments."""
    from torch.nn.attention import varlen
    from vitgraph.kernels.attention import attention_ref

    def stand_in(q, k, v, cu_q, cu_k, max_q, max_k, *, scale):
        assert torch.equal(cu_q, cu_k)
        assert max_q == max_k == int(cu_q.diff().max())
        return attention_ref(q, k, v, cu_q, scale=scale)

    monkeypatch.setattr(varlen, "varlen_attn", stand_in)
    tower = build_tower(name, device="cpu", dtype=torch.float32)
    job = job_for(tower)
    own = hf_builders(tower)["hf-eager-sdpa"](job).features()
    tower.config._attn_implementation = FLASH
    with torch.inference_mode():
        grid = hf_grid(tower, job.grid_thw)
        kwargs = precomputed_kwargs(tower, grid)
        pixels = hf_pixels(tower, job.pixel_values)
        packed = features_of(tower(pixels, grid_thw=grid, **kwargs))
    for a, b in zip(own, packed, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", TINY)
def test_blocks(name):
    tower = build_tower(name, device="cpu", dtype=torch.float32)
    assert 3 <= len(hf_blocks(tower)) <= 4


@pytest.mark.parametrize("provider", ["hf-eager-fa2", "hf-exact-graph", "hf-compile-graph"])
def test_reason_without_a_gpu(provider):
    tower = build_tower("tiny-qwen2-vl", device="cpu", dtype=torch.float32)
    with pytest.raises(UnavailableError, match="needs a CUDA device"):
        hf_builders(tower)[provider](job_for(tower))


@pytest.mark.gpu
@pytest.mark.parametrize(
    "name", ["tiny-qwen3-vl", "tiny-qwen2.5-vl", "tiny-glm-4v", "tiny-paddleocr"]
)
@pytest.mark.parametrize("provider", ["hf-eager-fa2", "hf-exact-graph"])
def test_gpu_contenders_agree_with_sdpa(name, provider):
    tower = build_tower(name, device="cuda", dtype=torch.bfloat16)
    width = patch_values(tower.config)
    job = make_job(GRIDS, width, device=torch.device("cuda"), dtype=torch.bfloat16, seed=0)
    builders = hf_builders(tower)
    own = builders["hf-eager-sdpa"](job).features()
    for a, b in zip(own, builders[provider](job).features(), strict=True):
        assert (a.float() - b.float()).norm() / a.float().norm() < 0.1
