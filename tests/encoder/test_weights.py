from dataclasses import replace

import pytest
import torch
import vitgraph.bench.towers_config as towers
from safetensors.torch import load_file, save_file
from vitgraph.encoder.families import family_of_model, family_of_tower
from vitgraph.encoder.vision_encoder import VisionEncoder
from vitgraph.encoder.weight_map import Rule, neighbour_rule
from vitgraph.encoder.weights import TowerWeights
from vitgraph.kernels.aligned_rows import LINE

TINY = [name for name in towers.TOWERS if name.startswith("tiny")]


def tower(name, dtype=torch.float32):
    model = towers.empty_tower(towers.tower_config(name), device="cpu", dtype=dtype)
    return towers.boost_(model, seed=1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", TINY)
def test_state_dict_gives_hugging_face_back_bit_for_bit(name, dtype):
    hf = tower(name, dtype)
    weights = TowerWeights(
        family_of_tower(hf).spec(hf.config),
        family_of_tower(hf).weight_map(family_of_tower(hf).spec(hf.config)),
        hf.state_dict(), torch.device("cpu"), dtype,
    )  # fmt: skip
    state = weights.state_dict()
    assert state.keys() == hf.state_dict().keys()
    for key, value in hf.state_dict().items():
        assert torch.equal(state[key], value), key


@pytest.mark.parametrize("name", [n for n in towers.TOWERS if not n.startswith("tiny")])
def test_rules_cover_every_published_tower(name):
    hf = towers.empty_tower(towers.tower_config(name), device="meta", dtype=torch.bfloat16)
    family = family_of_tower(hf)
    spec = family.spec(hf.config)
    rules = family.weight_map(spec)
    theirs = {key: tuple(p.shape) for key, p in hf.named_parameters()}
    assert {s: r.shape for r in rules for s in r.sources} == theirs
    # rows of every matrix start on 16 bytes, which fast GEMMs need; the patch embedding is a kernel
    # of its own, for rows of any width (PaddleOCR-VL: 588 values)
    for rule in rules:
        packed = rule.pack(dict(hf.named_parameters()))
        if packed.ndim == 2 and rule.name != "patch.weight":
            assert packed.shape[1] % 8 == 0, rule.name


def test_odd_mlp_is_padded_with_zeros():
    hf = tower("tiny-qwen2.5-vl")
    family = family_of_tower(hf)
    config = hf.config
    config.intermediate_size = 90
    hf = type(hf)._from_config(config).eval().requires_grad_(False)
    towers.boost_(hf, seed=2)
    encoder = VisionEncoder.from_hf(hf)
    assert encoder.spec.padded_mlp_size == 128
    up = encoder.weights.tensors["blocks.0.up.weight"]
    assert up.shape == (256, 64)
    assert (up[90:128] == 0).all()
    assert torch.equal(up[128:218], hf.blocks[0].mlp.up_proj.weight)
    assert family.name == "qwen2_5_vl"
    grid = [(1, 8, 12), (1, 4, 6)]
    pixels = torch.randn(120, 1176, generator=torch.Generator().manual_seed(0))
    want = hf(pixels, grid_thw=torch.tensor(grid)).pooler_output
    torch.testing.assert_close(encoder(pixels, grid).pooler_output, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", TINY)
def test_a_state_can_be_saved_and_loaded(name, tmp_path):
    hf = tower(name)
    if name == "tiny-qwen2.5-vl":  # whose columns are padded
        hf.config.intermediate_size = 90
        hf = type(hf)._from_config(hf.config).eval().requires_grad_(False)
    encoder = VisionEncoder.from_hf(hf)
    file = tmp_path / "tower.safetensors"
    save_file(encoder.state_dict(), file)
    loaded, theirs = load_file(file), hf.state_dict()
    assert loaded.keys() == theirs.keys()
    for key, tensor in loaded.items():
        assert torch.equal(tensor, theirs[key]), key


def test_a_live_module_is_shared_and_reloads_in_place():
    hf = tower("tiny-qwen3-vl")
    encoder = VisionEncoder.from_hf(hf)
    proj = encoder.weights.tensors["blocks.0.proj.weight"]
    assert proj.data_ptr() == hf.blocks[0].attn.proj.weight.data_ptr()
    hf.blocks[0].attn.qkv.weight.mul_(1.1)  # its rows are reordered: a copy
    pixels, grid = torch.randn(24, 1536), [(1, 4, 6)]
    before = encoder(pixels, grid).pooler_output
    addresses = {k: v.data_ptr() for k, v in encoder.weights.tensors.items()}
    # no constant: LayerNorm would not see it
    hf.blocks[0].attn.proj.bias.add_(torch.randn(64))
    encoder.load_weights(hf)
    assert {k: v.data_ptr() for k, v in encoder.weights.tensors.items()} == addresses
    after = encoder(pixels, grid).pooler_output
    want = hf(pixels, grid_thw=torch.tensor(grid)).pooler_output
    assert not torch.allclose(after, before, atol=1e-2)
    torch.testing.assert_close(after, want, rtol=1e-4, atol=1e-4)


@pytest.mark.gpu
def test_rows_of_down_start_at_lines_of_the_cache_on_a_gpu():
    hf = tower("tiny-qwen3-vl", torch.bfloat16).cuda()  # whose MLP is 96 wide
    encoder = VisionEncoder.from_hf(hf)
    down = encoder.weights.blocks[0].down_weight
    assert down.shape == (64, 96)
    assert down.stride(0) * down.itemsize % LINE == 0
    theirs = hf.blocks[0].mlp.linear_fc2.weight
    theirs.mul_(2)
    address = down.data_ptr()
    encoder.load_weights(hf)
    assert encoder.weights.blocks[0].down_weight.data_ptr() == address
    assert torch.equal(down, theirs)
    state = encoder.state_dict()
    assert all(torch.equal(state[key], value) for key, value in hf.state_dict().items())


def test_missing_and_misshapen_tensors_are_named():
    hf = tower("tiny-qwen3-vl")
    family = family_of_tower(hf)
    spec = family.spec(hf.config)
    state = dict(hf.named_parameters())
    cpu = torch.device("cpu")
    missing = {k: v for k, v in state.items() if k != "blocks.2.mlp.linear_fc1.weight"}
    message = r"'blocks.2.mlp.linear_fc1.weight' is missing .*\[96, 64\]"
    with pytest.raises(ValueError, match=message):
        TowerWeights(spec, family.weight_map(spec), missing, cpu, torch.float32)
    state["merger.norm.weight"] = torch.ones(65)
    with pytest.raises(ValueError, match=r"'merger.norm.weight' has shape \[65\], expected \[64\]"):
        TowerWeights(spec, family.weight_map(spec), state, cpu, torch.float32)


def test_quantised_tensors_are_refused():
    hf = tower("tiny-qwen3-vl")
    family = family_of_tower(hf)
    spec = family.spec(hf.config)
    state = dict(hf.state_dict())
    state["blocks.0.attn.qkv.weight"] = state["blocks.0.attn.qkv.weight"].to(torch.int8)
    with pytest.raises(ValueError, match=r"'blocks.0.attn.qkv.weight' is torch.int8; quantised"):
        TowerWeights(spec, family.weight_map(spec), state, torch.device("cpu"), torch.float32)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_heads": 5}, "multiple of 8"),
        ({"num_heads": 16}, "multiple of 8"),
        ({"window_size": 18}, "over the limit of 16"),
        ({"window_size": 7}, "not a multiple of merge_size"),
        ({"deepstack_layers": (4,)}, r"deepstack_layers holds \[4\], outside the blocks 0..3"),
    ],
)
def test_specs_that_no_kernel_can_run(change, message):
    hf = tower("tiny-qwen3-vl")
    with pytest.raises(ValueError, match=message):
        replace(family_of_tower(hf).spec(hf.config), **change)


def test_a_shallow_tower_may_keep_the_indices_of_a_deep_one():
    config = towers.tower_config("tiny-qwen2.5-vl").vision_config()
    config.fullatt_block_indexes = [1, 7, 15]
    hf = tower("tiny-qwen2.5-vl")
    assert family_of_tower(hf).spec(config).full_attention_layers == (1,)


def test_unknown_families_list_the_supported():
    with pytest.raises(ValueError, match=r"'llama'.*qwen2_vl, qwen2_5_vl, .*qwen3_vl_moe"):
        family_of_model({"model_type": "llama"})
    with pytest.raises(ValueError, match=r"'Linear' is not supported; .*Qwen3VLMoeVisionModel"):
        family_of_tower(torch.nn.Linear(1, 1))


def test_a_tower_without_data_is_refused():
    config = towers.tower_config("tiny-qwen3-vl")
    hf = towers.empty_tower(config, device="meta", dtype=torch.float32)
    with pytest.raises(ValueError, match="on \\['meta'\\]"):
        VisionEncoder.from_hf(hf)


@pytest.mark.parametrize("num_sources", [1, 3])
@pytest.mark.parametrize("has_orders", [False, True])
def test_pairs_of_q_and_k_become_neighbours(num_sources, has_orders):
    """Whatever order a family asks for, its element i and its element i + half lie side by side."""
    H, D, K = 2, 8, 5
    order = (1, 3, 0, 2, 5, 7, 4, 6) if has_orders else ()
    names = ("qkv",) if num_sources == 1 else ("q", "k", "v")
    rule = Rule("blocks.0.qkv.weight", names, (3 * H * D // num_sources, K))
    if has_orders:
        rule = replace(rule, row_orders=(order, order, ()) if num_sources == 3 else (order,))
    source = dict(zip(names, torch.randn(3 * H * D, K).chunk(num_sources), strict=True))
    new = neighbour_rule(rule, H)
    before, after = (r.pack(source).view(3, H, D, K) for r in (rule, new))
    for i in range(D // 2):
        assert torch.equal(after[:2, :, 2 * i], before[:2, :, i])
        assert torch.equal(after[:2, :, 2 * i + 1], before[:2, :, i + D // 2])
    assert torch.equal(after[2], before[2])
    for name, tensor in new.unpack(new.pack(source)).items():
        assert torch.equal(tensor, source[name])


def test_towers_whose_pairs_stay_halves():
    """Windows and norms of q and k rotate halves by themselves; the others rotate neighbours."""
    expected = {
        "tiny-qwen3-vl": True, "tiny-qwen2-vl": True, "tiny-paddleocr": True, "tiny-glm-4v": True,
        "tiny-qwen2.5-vl": False, "tiny-glm-ocr": False,
    }  # fmt: skip
    for name, rotates in expected.items():
        encoder = VisionEncoder.from_hf(tower(name))
        assert encoder.spec.rotates_neighbours == rotates, name
        assert (encoder.weights.turns is not None) == rotates
