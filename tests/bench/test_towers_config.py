import pytest
import torch
from vitgraph.bench.provider import features_of
from vitgraph.bench.towers_config import (
    TOWERS,
    TowerConfig,
    boost_,
    build_tower,
    empty_tower,
    fp32_copy,
    hf_grid,
    hf_pixels,
    patch_values,
    tower_config,
)

# millions of parameters of the published towers
PARAMETERS = {
    "qwen3-vl-2b": 407,
    "qwen3-vl-4b": 415,
    "qwen3-vl-8b": 576,
    "qwen3-vl-32b": 595,
    "qwen3-omni-30b": 539,
    "qwen3.5-0.8b": 101,
    "qwen3.5-9b": 456,
    "qwen3.5-27b": 461,
    "qwen3.5-35b": 447,
    "qwen2.5-vl-3b": 669,
    "qwen2.5-vl-7b": 677,
    "qwen2.5-vl-32b": 689,
    "qwen2.5-vl-72b": 705,
    "qwen2.5-omni-7b": 677,
    "mimo-vl-7b": 684,
    "qwen2-vl-2b": 665,
    "qwen2-vl-7b": 676,
    "qwen2-vl-72b": 699,
    "glm-4.1v-9b": 892,
    "glm-4.5v": 859,
    "glm-ocr": 434,
    "glm-5.3-flash": 564,
    "paddleocr-vl": 413,
    "kimi-k2.5": 417,
    "kimi-vl": 417,
}
TINY = [name for name in TOWERS if name.startswith("tiny")]
GRID = torch.tensor([[1, 8, 12], [1, 4, 6], [3, 10, 18]])


def pixels(tower):
    rows = int(GRID.prod(1).sum())
    generator = torch.Generator().manual_seed(1)
    return torch.randn(rows, patch_values(tower.config), generator=generator)


def rotary(tower):
    return next(m for n, m in tower.named_modules() if n.endswith("rotary_pos_emb"))


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameter_count(name):
    tower = empty_tower(tower_config(name), device="meta", dtype=torch.bfloat16)
    count = sum(p.numel() for p in tower.parameters())
    assert round(count / 1e6) == PARAMETERS[name]
    assert {p.dtype for p in tower.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("name", TINY)
def test_boosted_weights_are_seeded_and_frequencies_stay_fp32(name):
    a, b, c = (build_tower(name, device="cpu", dtype=torch.bfloat16, seed=s) for s in (0, 0, 1))
    for (key, x), y in zip(a.state_dict().items(), b.state_dict().values(), strict=True):
        assert torch.equal(x, y), key
        assert x.isfinite().all(), key
    assert not torch.equal(next(a.parameters()), next(c.parameters()))
    frequencies = rotary(a).inv_freq
    quarter = len(frequencies)
    exact = 10000.0 ** -(torch.arange(quarter, dtype=torch.float64) / quarter)
    assert frequencies.dtype == torch.float32
    torch.testing.assert_close(frequencies.double(), exact, rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", TINY)
def test_fp32_copy_has_the_same_values(name):
    tower = build_tower(name, device="cpu", dtype=torch.bfloat16)
    wide = fp32_copy(name, tower)
    for (key, x), y in zip(tower.state_dict().items(), wide.state_dict().values(), strict=True):
        assert torch.equal(x.float(), y), key


@pytest.mark.parametrize("name", TINY)
def test_output_notices_a_missing_rope_and_a_missing_boundary(name, monkeypatch):
    tower = build_tower(name, device="cpu", dtype=torch.float32)
    x = hf_pixels(tower, pixels(tower))
    rows = int(GRID.prod(1).sum())

    def pooled(**kwargs):
        with torch.inference_mode():
            return features_of(tower(x, grid_thw=hf_grid(tower, GRID), **kwargs))[0]

    full = pooled()
    one_segment = pooled(cu_seqlens=torch.tensor([0, rows], dtype=torch.int32))
    rotary(tower).inv_freq.zero_()
    no_rope = pooled()
    for changed in (one_segment, no_rope):
        assert (changed - full).norm() / full.norm() > 0.05


def test_kimi_notices_missing_positions_and_a_missing_rope(monkeypatch):
    """There is no tiny one in the table."""
    tiny = {
        "hidden_size": 64, "num_attention_heads": 2, "num_hidden_layers": 3,
        "intermediate_size": 96, "pos_emb_height": 8, "pos_emb_width": 8,
    }  # fmt: skip
    monkeypatch.setitem(TOWERS, "tiny-kimi", TowerConfig("kimi_k25", tiny))
    tower = build_tower("tiny-kimi", device="cpu", dtype=torch.float32)
    table = tower.patch_embed.pos_emb.position_embeddings
    assert 0.25 < table.std() < 0.35  # as other tables; by its fan-in a full one would hardly show
    grid = GRID[:2]
    rows = torch.randn(120, patch_values(tower.config), generator=torch.Generator().manual_seed(1))

    def pooled():
        with torch.inference_mode():
            return features_of(tower(hf_pixels(tower, rows), grid_thw=grid))[0]

    full = pooled()
    assert full.shape == (30, 256)
    with torch.no_grad():
        tower.rotary_emb.inv_freq.zero_()
        without_rope = pooled()
        tower.patch_embed.pos_emb.position_embeddings.zero_()
    assert (without_rope - full).norm() / full.norm() > 0.05
    assert (pooled() - without_rope).norm() / full.norm() > 0.05


def test_boost_gives_norms_a_scale_around_one():
    tower = empty_tower(tower_config("tiny-qwen2.5-vl"), device="cpu", dtype=torch.float32)
    weights = dict(boost_(tower, 0).named_parameters())
    assert abs(weights["merger.ln_q.weight"].mean() - 1) < 0.1
    assert abs(weights["blocks.0.attn.qkv.bias"].mean()) < 0.1
    assert 1.5 < weights["blocks.0.attn.qkv.weight"].std() * 8 < 2.5
    assert 0.8 < weights["blocks.0.attn.proj.weight"].std() * 8 < 1.2


def test_boost_gives_layer_scales_that_leave_blocks_a_part():
    layer = torch.nn.Module()
    for name in ("lambda_1", "lambda_2", "bias"):
        layer.register_parameter(name, torch.nn.Parameter(torch.empty(64, dtype=torch.bfloat16)))
    tower = torch.nn.Sequential(torch.nn.Sequential(layer))
    weights = dict(boost_(tower, 0).named_parameters())
    scales = torch.stack([weights["0.0.lambda_1"], weights["0.0.lambda_2"]]).float()
    assert 0.1 <= scales.min() < 0.12
    assert 0.28 < scales.max() <= 0.302  # rounded to bf16
    assert not torch.equal(*scales)
    assert weights["0.0.bias"].min() < 0


def test_unknown_tower():
    with pytest.raises(ValueError, match="'qwen9' is not known"):
        tower_config("qwen9")
