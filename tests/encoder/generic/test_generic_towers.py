"""Generic towers equal Hugging Face's own forward, exactly laid out and over static buffers."""

import threading

import pytest
import torch
import torch.nn.functional as F
import transformers
from transformers.utils import ModelOutput
from vitgraph.capture import EncoderCudaGraphManager, Pruning
from vitgraph.encoder import generic
from vitgraph.encoder.feed import feed_of
from vitgraph.encoder.generic import GenericEncoder
from vitgraph.encoder.generic_tower import NEVER
from vitgraph.encoder.hf_attention import (
    IMPLEMENTATION,
    AttentionSwitch,
    NotPackedError,
    packed_attention,
)
from vitgraph.encoder.hf_metadata import MetadataInput
from vitgraph.encoder.tower_contents import TowerContents
from vitgraph.kernels.testing import assert_as_accurate


def check(got, case, pixels, grids):
    """Within twice the error of Hugging Face's fp32 forward against its fp64 forward."""
    own, oracle = case.own(pixels, grids), case.own(pixels, grids, case.twin)
    assert got.keys() == own.keys()
    for name, value in own.items():
        assert_as_accurate(got[name], value, oracle[name], name=name)


def test_equals_own_forward(cases, model_type, layout, grids):
    case = cases(model_type)
    if not case.takes(layout):
        pytest.skip("its own forward refuses these items")
    pixels = case.pixels(grids)
    output = case.encoder(pixels, torch.tensor(grids))
    own = case.tower(
        pixels[None] if case.encoder.facts.batched else pixels, grid_thw=torch.tensor(grids)
    )
    assert type(output) is type(own)
    assert list(output) == list(own)
    assert [type(value) for value in output.values()] == [type(value) for value in own.values()]
    assert output.last_hidden_state.shape == own.last_hidden_state.shape
    check(case.encoder.eager_forward(pixels, grids), case, pixels, grids)


def test_static_buffers(cases, model_type, layout, grids):
    """Padding of every kind: spare tokens, segments, windows; poisoned pixels and tables."""
    case = cases(model_type)
    if not case.takes(layout):
        pytest.skip("its own forward refuses these items")
    items = case.encoder.item_specs(grids)
    if any(item.num_frames == NEVER for item in items):
        pytest.skip("these items fit no rung")
    tokens = sum(item.output_tokens for item in items)
    frames = sum(item.num_frames for item in items)
    limits = case.encoder.rung_limits(tokens + 63, len(items) + 3, frames + 3)
    pixels = case.pixels(grids)
    inputs, outputs = case.buffers(limits)
    case.stage(inputs, pixels, grids, limits)
    expected = case.own(pixels, grids)
    got = case.replayed(inputs, outputs, expected, limits)
    # some attention backends multiply rows past a segment by zero
    assert all(value.isfinite().all() for value in outputs.values())
    check(got, case, pixels, grids)
    inputs["pixel_values"][len(pixels) :] = 3.0
    again = case.replayed(inputs, outputs, expected, limits)
    assert all(torch.equal(got[name], again[name]) for name in got)  # padding cannot be seen


def test_exactly_full_rung(cases, model_type):
    case = cases(model_type)
    grids = [(1, 8, 12), (1, 4, 6)]
    tokens = sum(item.output_tokens for item in case.encoder.item_specs(grids))
    limits = case.encoder.rung_limits(tokens, 2, 2)
    inputs, outputs = case.buffers(limits)
    pixels = case.pixels(grids)
    case.stage(inputs, pixels, grids, limits)
    expected = case.own(pixels, grids)
    check(case.replayed(inputs, outputs, expected, limits), case, pixels, grids)


def test_buffers_serve_one_batch_after_another(cases, model_type):
    case = cases(model_type)
    large, small = [(1, 10, 18), (1, 8, 12)], [(1, 4, 6)]
    tokens = sum(item.output_tokens for item in case.encoder.item_specs(large))
    limits = case.encoder.rung_limits(tokens + 8, 4, 4)
    inputs, outputs = case.buffers(limits)
    results = []
    for grids in (large, small, large):
        pixels = case.pixels(grids)
        case.stage(inputs, pixels, grids, limits)
        got = case.replayed(inputs, outputs, case.own(pixels, grids), limits)
        check(got, case, pixels, grids)
        results.append(got)
    assert all(torch.equal(results[0][name], results[2][name]) for name in results[0])


def test_empty_tables_are_harmless(cases, model_type):
    """Graphs are warmed up and first launched with zeros in every table."""
    case = cases(model_type)
    limits = case.encoder.rung_limits(16, 2, 2)
    inputs, outputs = case.buffers(limits)
    for value in inputs.values():
        value.zero_()
    case.replayed(inputs, outputs, {}, limits)
    assert all(value.isfinite().all() for value in outputs.values())


def test_manager_replays_and_splits(cases, model_type, recorder):
    case = cases(model_type)
    manager = EncoderCudaGraphManager(case.encoder, {"token_budgets": [16, 64]}, recorder=recorder)
    manager.capture()
    grids = [(1, 8, 12), (1, 4, 6), (1, 10, 18), (1, 6, 4)]  # more than the largest rung
    if case.encoder.facts.merge == 1:
        grids = [(1, 4, 6), (1, 2, 3), (1, 5, 9), (1, 3, 2)]
    pixels = case.pixels(grids)
    got = manager.execute(pixels, grids)
    check(got, case, pixels, grids)
    stats = manager.stats()
    assert (stats["hits"], stats["misses"]) == (4, 0)
    assert stats["replays"] >= 2
    static = manager.ladder.ring.slots[0].outputs.values()
    addresses = {value.untyped_storage().data_ptr() for value in static}
    assert not addresses & {value.untyped_storage().data_ptr() for value in got.values()}


def test_pooled_videos_run_eagerly_by_length(cases, recorder):
    """A tower that averages frames has another index for each length; its own forward takes one."""
    case = cases("kimi_k25")
    manager = EncoderCudaGraphManager(case.encoder, {"token_budgets": [128]}, recorder=recorder)
    manager.capture()
    grids = [(2, 4, 6), (1, 8, 4), (3, 4, 4), (2, 4, 4)]
    pixels = case.pixels(grids)
    got = manager.execute(pixels, grids)
    assert manager.stats()["hits"] == 1
    assert manager.stats()["misses"] == 3
    assert got["pooler_output"].shape[0] == 6 + 8 + 4 + 4
    patch = token = 0
    for t, h, w in grids:
        alone = case.own(pixels[patch : patch + t * h * w], [(t, h, w)])
        oracle = case.own(pixels[patch : patch + t * h * w], [(t, h, w)], case.twin)
        rows = {
            "last_hidden_state": got["last_hidden_state"][patch : patch + t * h * w],
            "pooler_output": got["pooler_output"][token : token + h * w // 4],
        }
        for name, value in rows.items():
            assert_as_accurate(value, alone[name], oracle[name], name=name)
        patch, token = patch + t * h * w, token + h * w // 4


def test_no_items(cases, model_type):
    case = cases(model_type)
    output = case.encoder(case.pixels([]), [])
    assert isinstance(output, ModelOutput)
    assert output.last_hidden_state.numel() == 0


def test_tables_of_a_layout_are_made_once(cases):
    encoder = cases("qwen3_vl").encoder
    limits = encoder.rung_limits(64, 4, 4)
    first = encoder.stage([(1, 8, 12)], limits)
    assert encoder.stage([(1, 8, 12)], limits) is first
    larger = encoder.stage([(1, 8, 12)], encoder.rung_limits(128, 4, 4))
    assert len(larger["position_ids"]) == 2 * len(first["position_ids"])
    for width in range(2, 80, 2):
        encoder.stage([(1, 2, width)], limits)
    assert encoder.stage([(1, 8, 12)], limits) is not first  # few are kept
    assert len(encoder._staged) == 16


def test_padding_of_tables():
    offsets = MetadataInput("frames", (), torch.int32, "last")
    assert offsets.padded(torch.tensor([0, 4, 9]), 5, False).tolist() == [0, 4, 9, 9, 9]
    order = MetadataInput("tokens", (), torch.int64, "own")
    assert order.padded(torch.tensor([2, 0, 1]), 5, False).tolist() == [2, 0, 1, 3, 4]
    weights = MetadataInput("patches", (2,), torch.float32, "zero")
    assert weights.padded(torch.ones(1, 2), 2, False).tolist() == [[1, 1], [0, 0]]


def test_tower_is_left_as_it_was(build):
    tower = build("qwen2_5_vl")
    tower.config._attn_implementation = "eager"
    tower.train()
    tower.blocks[1].eval()
    training = [module.training for module in tower.modules()]
    home = __import__(type(tower).__module__, fromlist=["x"])
    functions = dict(vars(home))
    torch.manual_seed(3)
    state = torch.random.get_rng_state()
    encoder = GenericEncoder(tower)
    encoder(torch.randn(24, 1176, generator=torch.Generator().manual_seed(1)), [(1, 4, 6)])
    with pytest.raises(TypeError):  # in the middle of the forward
        encoder._run(torch.zeros(24, 5), torch.ones(1, 3), {}, "reference")
    assert tower.config._attn_implementation == "eager"
    assert [module.training for module in tower.modules()] == training
    assert all(vars(home)[name] is value for name, value in functions.items())
    assert torch.equal(torch.random.get_rng_state(), state)


def test_dropout_is_off_in_training_mode(build):
    tower = build("qwen3_5")
    encoder = GenericEncoder(tower)
    pixels = torch.randn(24, 1536, generator=torch.Generator().manual_seed(1))
    expected = encoder(pixels, [(1, 4, 6)]).pooler_output
    for module in tower.modules():
        if isinstance(module, torch.nn.LayerNorm):
            module.register_forward_hook(
                lambda m, _, out: torch.nn.functional.dropout(out, 0.5, m.training)
            )
    tower.train()
    assert torch.equal(encoder(pixels, [(1, 4, 6)]).pooler_output, expected)


def test_weights_are_shared(build):
    tower = build("glm_ocr")
    encoder = GenericEncoder(tower)
    pixels = torch.randn(24, 1176, generator=torch.Generator().manual_seed(1))
    before = encoder(pixels, [(1, 4, 6)]).pooler_output
    with torch.no_grad():
        tower.blocks[0].attn.qkv.weight.mul_(1.1)
        expected = tower(pixels, grid_thw=torch.tensor([(1, 4, 6)])).pooler_output
    after = encoder(pixels, [(1, 4, 6)]).pooler_output
    assert not torch.equal(after, before)
    assert torch.allclose(after, expected, rtol=1e-5, atol=1e-5)
    encoder.load_weights(tower)
    with pytest.raises(ValueError, match="of its own tower"):
        encoder.load_weights(build("glm_ocr"))


def test_attention_serves_only_our_calls(build):
    tower = build("qwen3_5")
    tower.config._attn_implementation = IMPLEMENTATION
    with pytest.raises(RuntimeError, match="serves vitgraph's generic towers only"):
        tower(torch.randn(24, 1536), grid_thw=torch.tensor([(1, 4, 6)]))
    q = torch.randn(1, 2, 8, 16)
    with pytest.raises(RuntimeError, match="set another one"):
        packed_attention(tower, q, q, q)


def test_attention_of_one_module(build):
    """Shared keys, a scale of the module's own, and rows of no segment."""
    switch = AttentionSwitch(build("qwen3_5"))
    generator = torch.Generator().manual_seed(5)
    q = torch.randn(1, 4, 9, 16, generator=generator)
    k, v = torch.randn(2, 1, 2, 9, 16, generator=generator)
    offsets = torch.tensor([0, 3, 7, 7], dtype=torch.int32)
    with switch.using("reference"):
        out, weights = packed_attention(
            torch.nn.Identity(), q, k, v, scaling=0.7, cu_seq_lens_q=offsets
        )
    assert weights is None
    assert out.shape == (1, 9, 4, 16)
    for begin, end in ((0, 3), (3, 7)):
        rows = slice(begin, end)
        expected = F.scaled_dot_product_attention(
            q[:, :, rows], k[:, :, rows], v[:, :, rows], scale=0.7, enable_gqa=True
        )
        assert torch.allclose(out[:, rows], expected.transpose(1, 2), atol=1e-6)
    assert not out[:, 7:].any()
    with (
        switch.using("reference"),
        pytest.raises(NotPackedError, match="Identity attends to all rows"),
    ):
        packed_attention(torch.nn.Identity(), q, k, v)


def test_calls_of_two_threads(cases):
    """The name of the attention is set and restored by turns."""
    case = cases("qwen3_vl")
    grids = [(1, 8, 12)]
    pixels = case.pixels(grids)
    expected = case.encoder(pixels, grids).pooler_output
    results = []

    def work():
        results.extend(case.encoder(pixels, grids).pooler_output for _ in range(5))

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 15
    assert all(torch.equal(result, expected) for result in results)
    assert case.tower.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("shared", ["tower", "config"])
def test_the_lock_is_that_of_the_config(build, shared):
    """Two encoders that switch one config would each restore what the other has set."""
    tower = build("qwen3_vl")
    other = tower if shared == "tower" else type(tower)._from_config(tower.config)
    assert other.config is tower.config
    first, second = AttentionSwitch(tower), AttentionSwitch(other)
    entered, leave = threading.Event(), threading.Event()

    def work():
        with second.using("reference"):
            entered.set()
            leave.wait(10)

    thread = threading.Thread(target=work)
    with first.using("reference"):
        thread.start()
        assert not entered.wait(0.2)
    assert entered.wait(10)
    leave.set()
    thread.join()
    assert tower.config._attn_implementation == "sdpa"
    assert AttentionSwitch(build("qwen3_vl")).locks != first.locks


def test_configs_inside_a_config_are_restored(build):
    """Setting the name of a config sets those inside it as well."""
    tower = build("qwen3_vl")
    full = transformers.Qwen3VLConfig(vision_config=tower.config)
    full.vision_config._attn_implementation = "sdpa"  # that of the whole is None
    full.text_config._attn_implementation = "eager"
    outer = torch.nn.Identity()
    outer.config = full
    holder = torch.nn.ModuleList([tower, outer])
    inside = (full.vision_config, full.text_config)
    with AttentionSwitch(holder).using("reference"):
        assert {config._attn_implementation for config in inside} == {IMPLEMENTATION}
    assert full._attn_implementation is None
    assert [config._attn_implementation for config in inside] == ["sdpa", "eager"]


def test_bad_calls(cases):
    case = cases("glm4v")
    encoder = case.encoder
    pixels = case.pixels([(1, 4, 6)])
    with pytest.raises(TypeError, match="uint8"):
        encoder(pixels.to(torch.uint8), [(1, 4, 6)])
    with pytest.raises(ValueError, match=r"must hold 32 patches.*1176 values"):
        encoder(pixels, [(1, 4, 8)])
    with pytest.raises(ValueError, match="multiples of the merge size 2"):
        encoder(case.pixels([(1, 3, 8)]), [(1, 3, 8)])
    with pytest.raises(ValueError, match=r"has 2 frames.*\(1, 4, 6\)"):
        encoder(case.pixels([(2, 4, 6)]), [(2, 4, 6)])
    with pytest.raises(TypeError, match="whole numbers"):
        encoder(pixels, [(1, 4, 6.0)])
    spoiled = pixels.clone()
    spoiled[3, 7] = torch.inf
    with pytest.raises(ValueError, match="NaN or infinity in patch 3"):
        encoder(spoiled, [(1, 4, 6)])
    assert not encoder(spoiled, [(1, 4, 6)], check_finite=False).pooler_output.isfinite().all()
    with pytest.raises(ValueError, match="only fused towers prune"):
        encoder.eager_forward(pixels, [(1, 4, 6)], Pruning((3,), (False,)))
    with pytest.raises(RuntimeError, match="need a CUDA device"):
        encoder.capture()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(build, dtype):
    """Probing and proving hold for towers whose roundings are a thousand times larger."""
    for model_type in ("qwen2_5_vl", "kimi_k25", "glm4v", "paddleocr_vl"):
        encoder = GenericEncoder(build(model_type, dtype))
        assert encoder.dtype == dtype


def test_a_tower_that_moved_is_not_replayed(build, recorder):
    """Graphs hold addresses; a replay would read what the parameters have left."""
    encoder = GenericEncoder(build("glm_ocr"))
    manager = EncoderCudaGraphManager(encoder, {"token_budgets": [64]}, recorder=recorder)
    manager.capture()
    encoder.graphs, encoder._captured = manager, TowerContents(encoder.tower)
    grids = [(1, 4, 6)]
    pixels = torch.randn(24, *encoder.facts.pixel_shape)
    encoder(pixels, grids)
    with torch.no_grad():
        next(encoder.tower.parameters()).mul_(1.0)  # values may change
    encoder(pixels, grids)
    first = next(encoder.tower.parameters())
    first.data = first.data.clone()
    with pytest.raises(RuntimeError, match=r"its storage changed after capture"):
        encoder(pixels, grids)
    encoder.release_graphs()
    encoder(pixels, grids)


def test_a_refused_configuration_leaves_the_graphs(build, recorder, monkeypatch):
    encoder = GenericEncoder(build("glm_ocr"))
    kept = EncoderCudaGraphManager(encoder, {"token_budgets": [64]}, recorder=recorder)
    kept.capture()
    encoder.graphs, encoder._captured = kept, TowerContents(encoder.tower)
    monkeypatch.setattr(generic, "check_capturable", lambda *_: None)
    with pytest.raises(ValueError, match="token_budgets"):
        encoder.capture({"token_budgets": []})
    assert encoder.graphs is kept
    assert kept.ladder is not None
    with pytest.raises(ValueError, match="a GenericEncoder cannot be fed with images"):
        feed_of(encoder)
