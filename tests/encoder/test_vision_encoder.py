import numpy as np
import pytest
import torch
import vitgraph.bench.towers_config as towers
from vitgraph.capture import EncoderCudaGraphConfig, EncoderCudaGraphManager
from vitgraph.capture.staging import allocate
from vitgraph.encoder import VisionEncoder, vision_encoder
from vitgraph.kernels.launch import is_compiling

GRIDS = [(1, 4, 6), (2, 2, 4)]
PATCHES = 40


@pytest.fixture(scope="module")
def encoder():
    hf = towers.empty_tower(towers.tower_config("tiny-qwen3-vl"), device="cpu", dtype=torch.float32)
    return VisionEncoder.from_hf(towers.boost_(hf, seed=0))


@pytest.fixture
def pixels():
    return torch.randn(PATCHES, 1536, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    "grids", [GRIDS, torch.tensor(GRIDS), np.array(GRIDS), [torch.tensor(g) for g in GRIDS]]
)
def test_grids_in_any_integer_form(encoder, pixels, grids):
    want = encoder(pixels, GRIDS)
    got = encoder(pixels, grids)
    assert torch.equal(got.pooler_output, want.pooler_output)
    assert got.pooler_output.shape == (10, 64)
    assert got.last_hidden_state.shape == (40, 64)


def test_nothing_in_nothing_out(encoder):
    out = encoder(torch.zeros(0, 1536), torch.zeros(0, 3, dtype=torch.long))
    assert out.pooler_output.shape == (0, 64)
    assert out.deepstack_features is not None
    assert [f.shape for f in out.deepstack_features] == [(0, 64), (0, 64)]


def test_layers(encoder, pixels):
    out = encoder(pixels, GRIDS, layers=[0, -1])
    assert list(out.hidden_states) == [0, encoder.spec.depth - 1]
    assert torch.equal(out.hidden_states[encoder.spec.depth - 1], out.last_hidden_state)
    with pytest.raises(ValueError, match=r"layers = \[4\]: \[4\] outside this tower's blocks 0..3"):
        encoder(pixels, GRIDS, layers=[4])


def test_items_do_not_see_each_other(encoder, pixels):
    both = encoder(pixels, GRIDS).pooler_output
    first = encoder(pixels[:24], GRIDS[:1]).pooler_output
    second = encoder(pixels[24:], GRIDS[1:]).pooler_output
    torch.testing.assert_close(both, torch.cat([first, second]), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("grids", "error", "message"),
    [
        ([(1, 4, 5)], ValueError, r"\(1, 4, 5\).*multiples of the merge size 2.*32 pixels"),
        ([(0, 4, 6)], ValueError, r"grid_thw\[0\] = \(0, 4, 6\): every side must be at least 1"),
        ([(1, -4, 6)], ValueError, "at least 1"),
        ([(1, 4)], ValueError, "three integers"),
        ([(1, 4.5, 6)], TypeError, "three integers"),
        ([7], TypeError, "three integers"),
        (torch.tensor([[1.0, 4, 6]]), TypeError, "integer type"),
        (torch.tensor([1, 4, 6]), ValueError, r"\[3\] must be \[items, 3\]"),
        ([(1, 4, 4)], ValueError, "40 rows, but grid_thw describes 16 patches in 1 items"),
    ],
)
def test_bad_grids(encoder, pixels, grids, error, message):
    with pytest.raises(error, match=message):
        encoder(pixels, grids)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda p: p.to(torch.uint8), TypeError, "torch.uint8 must be a floating-point"),
        (lambda p: p.numpy(), TypeError, "ndarray"),
        (lambda p: p[:, :1176], ValueError, r"\[40, 1176\] must be \[patches, 1536\]"),
        (lambda p: p.flatten(), ValueError, "must be"),
        (lambda p: p.index_fill(0, torch.tensor([30]), float("nan")), ValueError,
         r"NaN or infinity in row 30 \(item 1, grid \(2, 2, 4\)\)"),
        (lambda p: p.index_fill(0, torch.tensor([0]), float("inf")), ValueError, "item 0"),
    ],
)  # fmt: skip
def test_bad_pixels(encoder, pixels, change, error, message):
    with pytest.raises(error, match=message):
        encoder(change(pixels), GRIDS)


def test_values_are_looked_at_only_where_asked(encoder, pixels):
    pixels[30] = float("nan")
    assert encoder(pixels, GRIDS, check_finite=False).pooler_output.isnan().any()
    with pytest.raises(ValueError, match="NaN or infinity in row 30"):
        encoder(pixels, GRIDS, check_finite=True)


@pytest.mark.gpu
def test_pixels_on_a_gpu_are_checked_on_request(pixels):
    config = towers.tower_config("tiny-qwen3-vl")
    hf = towers.empty_tower(config, device="cuda", dtype=torch.bfloat16)
    encoder = VisionEncoder.from_hf(towers.boost_(hf, seed=0))
    on_gpu = pixels.cuda()
    on_gpu[30] = float("nan")
    with pytest.raises(ValueError, match=r"row 30 \(item 1, grid \(2, 2, 4\)\)"):
        encoder(on_gpu, GRIDS, check_finite=True)
    assert encoder(on_gpu, GRIDS).pooler_output.shape == (10, 64)


def test_capture_needs_a_gpu(encoder):
    with pytest.raises(RuntimeError, match="need a CUDA device, this tower is on cpu"):
        encoder.capture()


def test_a_call_between_finds_no_graphs_or_whole_ones(encoder, pixels, monkeypatch):
    want = encoder(pixels, GRIDS).pooler_output

    class Graphs:
        def clear(self):
            # a call of another thread
            assert torch.equal(encoder(pixels, GRIDS).pooler_output, want)

        def execute(self, *args, **kwargs):
            raise RuntimeError("cleared")

    monkeypatch.setattr(encoder, "graphs", Graphs())
    encoder.release_graphs()
    assert encoder.graphs is None


def test_autocast_changes_nothing(encoder, pixels):
    want = encoder(pixels, GRIDS).pooler_output
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(encoder(pixels, GRIDS).pooler_output, want)


def test_results_are_the_callers(encoder, pixels):
    first = encoder(pixels, GRIDS).pooler_output
    kept = first.clone()
    encoder(pixels * 2, GRIDS)
    assert torch.equal(first, kept)
    assert not first.is_inference()


def test_stats_are_of_graphs(encoder, pixels, rerun_recorder, monkeypatch):
    with pytest.raises(RuntimeError, match=r"stats: nothing is captured; call capture\(\) first"):
        encoder.stats()
    manager = EncoderCudaGraphManager(encoder, {"token_budgets": [64]}, recorder=rerun_recorder)
    manager.capture()
    monkeypatch.setattr(encoder, "graphs", manager)
    encoder(pixels, GRIDS)
    assert encoder.stats()["items"] == len(GRIDS)


def test_kernels_are_compiled_for_rungs_by_halves(encoder, monkeypatch):
    rungs = EncoderCudaGraphConfig(token_budgets=(8, 9, 15, 16, 31, 32, 40)).resolve(encoder)
    inputs = allocate(encoder.input_specs(rungs[-1]), encoder.device)
    outputs = allocate(encoder.output_specs(rungs[-1]), encoder.device)
    taken = []

    def graph_forward(given, written, limits):
        assert is_compiling()
        assert len(given["pixel_values"]) == limits.max_patches
        assert len(written["pooler_output"]) == limits.token_budget
        taken.append(limits.token_budget)

    monkeypatch.setattr(encoder, "graph_forward", graph_forward)
    encoder.compile_kernels(inputs, outputs, rungs)
    assert taken == [40, 16, 8]
    assert not is_compiling()


@pytest.mark.parametrize("pruning", [False, True])
def test_a_refused_configuration_leaves_the_graphs(encoder, rerun_recorder, monkeypatch, pruning):
    kept = EncoderCudaGraphManager(encoder, {"token_budgets": [64]}, recorder=rerun_recorder)
    kept.capture()
    monkeypatch.setattr(encoder, "graphs", kept)
    monkeypatch.setattr(vision_encoder, "check_capturable", lambda *_: None)
    for config in ({"token_budgets": []}, {"max_vision_items_per_batch": 10**9}):
        with pytest.raises(ValueError, match=next(iter(config))):
            encoder.capture(config, pruning=pruning)
        assert encoder.graphs is kept
        assert kept.ladder is not None
        assert not encoder._records_pruning
    with pytest.raises(RuntimeError, match="CUDA"):  # as far as a CPU goes
        encoder.capture({"token_budgets": [64]})
    assert (encoder.graphs, kept.ladder) == (None, None)


@pytest.mark.parametrize("name", ["tiny-qwen3-vl", "tiny-qwen2.5-vl"])
@pytest.mark.parametrize("precision", ["native", "fp8"])
def test_built_in_inference_mode_loaded_outside(name, precision, pixels):
    config = towers.tower_config(name)
    old, new = (
        towers.boost_(towers.empty_tower(config, device="cpu", dtype=torch.float32), seed=seed)
        for seed in (0, 1)
    )
    with torch.inference_mode():
        made = VisionEncoder.from_hf(old, precision=precision)
    made.load_weights(new)
    pixels = pixels[:, : made.spec.patch_values]
    want = VisionEncoder.from_hf(new, precision=precision)(pixels, GRIDS)
    assert torch.equal(made(pixels, GRIDS).pooler_output, want.pooler_output)


def test_loaded_in_inference_mode_and_again_outside(build_model, tmp_path):
    model, new = build_model("qwen3_vl"), build_model("qwen3_vl", seed=1).model.visual
    model.save_pretrained(tmp_path)
    with torch.inference_mode():
        made = VisionEncoder.from_pretrained(tmp_path, device="cpu")
    # inference tensors would be refused as parameters
    assert all(torch.nn.Parameter(value).requires_grad for value in made.state_dict().values())
    made.load_weights(new)
    for name, tensor in VisionEncoder.from_hf(new).weights.tensors.items():
        assert torch.equal(made.weights.tensors[name], tensor), name


@pytest.fixture
def replaying(encoder, rerun_recorder):
    """The encoder with graphs whose replays run the recorded work again."""
    manager = EncoderCudaGraphManager(encoder, {"token_budgets": [32]}, recorder=rerun_recorder)
    manager.capture()
    encoder.graphs = manager
    yield encoder
    encoder.release_graphs()


def test_a_layout_seen_before_is_replayed_at_once(replaying, pixels, monkeypatch):
    grids = torch.tensor(GRIDS)
    want = replaying(pixels, grids, check_finite=False)
    monkeypatch.setattr(vision_encoder, "check_pixels", lambda *_: pytest.fail("checked again"))
    got = replaying(pixels, grids.clone(), check_finite=False)
    assert torch.equal(got.pooler_output, want.pooler_output)
    assert torch.equal(got.last_hidden_state, want.last_hidden_state)
    assert all(map(torch.equal, got.deepstack_features, want.deepstack_features))
    assert got.tokens_per_item == want.tokens_per_item == (6, 4)
    assert got.hidden_states == {}
    assert got.kept_index is None
    assert replaying.stats()["replays"] == 2


@pytest.mark.parametrize(
    ("change", "options", "error", "message"),
    [
        (lambda p: p[1:], {}, ValueError, "39 rows, but grid_thw describes 40 patches"),
        (lambda p: p.to(torch.uint8), {}, TypeError, "must be a floating-point"),
        (lambda p: p.to(torch.float8_e4m3fn), {}, TypeError, "must be a floating-point"),
        (lambda p: p.numpy(), {}, TypeError, "must be a floating-point"),
        (lambda p: p.fill_(torch.nan), {"check_finite": True}, ValueError, "NaN or infinity"),
        (lambda p: p.fill_(torch.nan), {"check_finite": None}, ValueError, "NaN or infinity"),
        (lambda p: p, {"layers": [9]}, ValueError, "outside this tower's blocks"),
        (lambda p: p, {"pruning_rate": 2.0}, ValueError, "rate = 2.0 is the fraction"),
        (lambda p: p, {"keep_mask": []}, ValueError, "keep_mask: 0 entries"),
    ],
)
def test_what_a_layout_seen_before_does_not_excuse(
    replaying, pixels, change, options, error, message
):
    replaying(pixels, GRIDS, check_finite=False)
    with pytest.raises(error, match=message):
        replaying(change(pixels), GRIDS, **{"check_finite": False, **options})
    assert replaying.stats()["replays"] == 1


def test_graphs_released_while_pixels_are_checked(replaying, pixels, monkeypatch):
    """Which takes a while; the call runs eagerly then."""
    want = replaying(pixels, GRIDS)

    def check(*_):
        replaying.release_graphs()

    monkeypatch.setattr(vision_encoder, "check_pixels", check)
    got = replaying(pixels, GRIDS)
    # other shapes of products
    torch.testing.assert_close(got.pooler_output, want.pooler_output, rtol=1e-5, atol=1e-5)
