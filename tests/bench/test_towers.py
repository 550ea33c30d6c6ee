import json
import math
from dataclasses import replace

import pytest
import torch
from vitgraph.bench import contest, towers
from vitgraph.bench.__main__ import main
from vitgraph.bench.arguments import parser
from vitgraph.bench.oracle import Reference
from vitgraph.bench.ours_providers import OursTower, encoder_of, plain_backend
from vitgraph.bench.provenance import source_digest
from vitgraph.bench.provider import UnavailableError
from vitgraph.bench.timing import Effort, TimeBudget
from vitgraph.bench.towers_config import TOWERS, TowerConfig, build_tower, tower_config
from vitgraph.bench.vllm_providers import VllmTower
from vitgraph.encoder.families import FAMILIES
from vitgraph.encoder.kimi_vl import vision_config
from vitgraph.kernels import attention

TINY = ("tiny-qwen3-vl", "tiny-qwen2.5-vl", "tiny-qwen2-vl", "tiny-paddleocr")
WORKLOADS = {"one": ((1, 8, 12),), "mixed": ((1, 4, 6), (2, 10, 18), (1, 2, 2))}
FAST = Effort(warmup_s=0.0, rounds=2, min_rounds=2)
KEYS = {
    "tower", "workload", "provider", "ms", "ms_p20", "ms_p80", "samples", "floor_ms",
    "floor_parts", "patches", "padded_patches", "attention", "replays", "max_err_ratio",
}  # fmt: skip


def quiet(line):
    pass


def run(**kwargs):
    return towers.run(workloads=WORKLOADS, device="cpu", effort=FAST, log=quiet, **kwargs)


@pytest.fixture(scope="module")
def rows():
    return run(towers=TINY, providers=contest.PROVIDERS)


def test_a_row_for_each_tower_workload_and_provider(rows):
    assert [(r["tower"], r["workload"], r["provider"]) for r in rows] == [
        (t, w, p) for t in TINY for w in WORKLOADS for p in contest.PROVIDERS
    ]
    for row in rows:
        assert row.keys() - {"reason"} == KEYS
        assert row["patches"] == {"one": 96, "mixed": 388}[row["workload"]]
        assert row["floor_ms"] is None
        assert (row["ms"] is None) == ("reason" in row)
    text = contest.summary(rows)
    assert "tiny-qwen3-vl mixed" in text
    assert "ours: a CUDA graph needs a CUDA device" in text


def test_what_runs_without_a_gpu(rows):
    timed = {r["provider"] for r in rows if r["ms"] is not None}
    assert timed == {"hf-eager-sdpa", "ours-eager"}
    for row in rows:
        if row["provider"] == "hf-eager-sdpa":
            assert row["max_err_ratio"] < 1.01
            assert 0 < row["ms_p20"] <= row["ms"] <= row["ms_p80"]
            assert row["samples"] == FAST.rounds
            assert row["padded_patches"] == row["patches"]
        elif row["provider"] != "ours-eager":
            assert "CUDA device" in row["reason"]


def test_a_wrong_contender_gets_no_time(monkeypatch):
    from vitgraph.encoder.vision_encoder import VisionEncoder

    right = VisionEncoder.eager_forward

    def one_small_image_is_wrong(self, pixel_values, grid_thw):
        out = right(self, pixel_values, grid_thw)
        out["pooler_output"][-1] *= 1.5  # the last of 97 tokens, an image of its own
        return out

    monkeypatch.setattr(VisionEncoder, "eager_forward", one_small_image_is_wrong)
    *_, row = run(towers=["tiny-qwen2-vl"], providers=["ours-eager"])
    assert row["ms"] is None
    assert row["max_err_ratio"] > contest.MAX_ERR_RATIO
    assert row["reason"].startswith("error is")

    monkeypatch.setattr(
        VisionEncoder,
        "eager_forward",
        lambda self, x, g: {k: v * math.nan for k, v in right(self, x, g).items()},
    )
    row, *_ = run(towers=["tiny-qwen2-vl"], providers=["ours-eager"])
    assert row["ms"] is None
    assert "nan" in row["reason"]


def test_a_contender_that_fails_does_not_stop_the_others(monkeypatch):
    from vitgraph.encoder.vision_encoder import VisionEncoder

    def broken(self, pixel_values, grid_thw):
        raise RuntimeError("no luck\nmore")

    monkeypatch.setattr(VisionEncoder, "eager_forward", broken)
    rows = run(towers=["tiny-qwen2-vl"], providers=["ours-eager", "hf-eager-sdpa"])
    assert [r.get("reason") for r in rows[:2]] == ["RuntimeError: no luck", None]


class OneAllowed(TimeBudget):
    """Time is over after the first."""

    def allows(self, label):
        if self.seconds is None:
            self.seconds = 10.0
            return True
        self.skipped.append(label)
        return False


def test_when_time_is_over_no_workload_and_no_tower_starts(monkeypatch):
    built = []
    real = towers.Contest
    monkeypatch.setattr(towers, "Contest", lambda n, *a, **k: built.append(n) or real(n, *a, **k))
    budget = OneAllowed()
    names = ["tiny-qwen2-vl", "tiny-qwen3-vl"]
    rows = run(towers=names, providers=["hf-eager-sdpa"], time_budget=budget)
    assert [(r["tower"], r["workload"]) for r in rows] == [("tiny-qwen2-vl", "one")]
    assert built == ["tiny-qwen2-vl"]
    assert budget.skipped == ["tiny-qwen2-vl mixed", "tiny-qwen3-vl one", "tiny-qwen3-vl mixed"]


@pytest.mark.parametrize("also_missing", [set(), {"hopper"}])
def test_plain_is_what_is_chosen_on_a_gpu_without_flash_attention(also_missing, monkeypatch):
    """Every backend of a package is missing; what torch brings is there."""
    missing = {"fa2", "fa3", "fa4", *also_missing}
    gpu = torch.device("cuda", 0)
    monkeypatch.setattr(attention, "_with_index", lambda device: gpu)
    monkeypatch.setattr(
        attention, "_reason", lambda name, *_: "not installed" if name in missing else None
    )
    chosen = attention.choose_backend(gpu, torch.bfloat16, 72)
    assert plain_backend(gpu, torch.bfloat16, 72) == chosen


def test_plain_with_a_head_dim_that_nothing_takes(monkeypatch):
    gpu = torch.device("cuda", 0)
    monkeypatch.setattr(attention, "_with_index", lambda device: gpu)
    monkeypatch.setattr(attention, "_reason", lambda name, *_: f"{name} does not take it")
    with pytest.raises(ValueError, match="triton does not take it"):
        plain_backend(gpu, torch.bfloat16, 72)


def test_plain_is_asked_for_with_the_head_dim_of_the_tower(monkeypatch):
    tower, asked = build_tower("tiny-qwen3-vl", device="cpu", dtype=torch.bfloat16), []
    monkeypatch.setattr(
        "vitgraph.bench.ours_providers.plain_backend",
        lambda *given: asked.append(given) or "reference",
    )
    assert OursTower(tower, (), attention="plain").encoder().attention == "reference"
    assert asked == [(torch.device("cpu"), torch.bfloat16, 32)]


def test_plain_excludes_another_attention():
    with pytest.raises(SystemExit):
        parser().parse_args(["towers", "--plain", "--attention", "fa4"])


def test_plain_on_the_command_line(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(
        "vitgraph.bench.ours_providers.plain_backend",
        lambda *given: asked.append(given) or plain_backend(*given),
    )
    path = tmp_path / "plain.json"
    options = ["--towers", "tiny-qwen2-vl", "--workloads", "mix1", "--providers", "ours-eager"]
    code = main(["towers", *options, "--plain", "--device", "cpu", "--quick", "--json", str(path)])
    assert code == 0
    written = json.loads(path.read_text())
    assert written["meta"]["plain"] is True
    assert written["rows"][0]["attention"] == "reference"
    assert len(asked) == 1


def test_videos_for_a_tower_that_is_measured_on_images():
    with pytest.raises(ValueError, match=r"kimi-k2\.5 is measured on images, .* --workloads one"):
        run(towers=["kimi-k2.5"])
    towers.check_workloads(["kimi-k2.5"], {"one": WORKLOADS["one"]})
    towers.check_workloads(["tiny-qwen2-vl"], WORKLOADS)


def test_reference_needs_matching_features():
    x = torch.ones(4, 3)
    reference = Reference([x], [x], [1, 3])
    with pytest.raises(ValueError, match="shapes"):
        reference.worst_ratio([x, x])


def test_budgets_of_ours():
    tower = build_tower("tiny-qwen2-vl", device="cpu", dtype=torch.float32)
    grids = list(WORKLOADS.values())  # 24 and 97 tokens
    configs = {b: OursTower(tower, grids, b).config() for b in ("auto", "ladder", "tight")}
    assert configs["tight"].token_budgets == (24, 97)
    assert configs["ladder"].token_budgets is None
    ladder = [r.token_budget for r in configs["ladder"].resolve(OursTower(tower, grids).encoder())]
    fitting = tuple(min(b for b in ladder if b >= tokens) for tokens in (24, 97))
    assert configs["auto"].token_budgets == fitting


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen3_vl"])
def test_vllm_says_why_it_is_missing(family, monkeypatch):
    monkeypatch.setattr("vitgraph.bench.vllm_providers.require_cuda", lambda device, name: None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    tower = build_tower("tiny-qwen2-vl", device="cpu", dtype=torch.float32)
    builders = VllmTower(family, tower).builders()
    reason = "vllm is not installed" if family == "qwen3_vl" else "no vLLM tower"
    for name in ("vllm-eager", "vllm-graph"):
        with pytest.raises(UnavailableError, match=reason):
            builders[name](None)


def test_command_line_writes_json(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("VITGRAPH_COMMIT", "0abc123")
    path = tmp_path / "new" / "rows.json"
    code = main([
        "towers", "--towers", "tiny-qwen2-vl", "--workloads", "mix2", "--providers",
        "hf-eager-sdpa", "ours", "--device", "cpu", "--quick", "--json", str(path),
    ])  # fmt: skip
    assert code == 0
    written = json.loads(path.read_text())
    meta = written["meta"]
    for key in ("gpu", "driver", "clocks", "torch", "triton", "transformers", "date"):
        assert key in meta
    assert (meta["commit"], meta["dirty"]) == ("0abc123", None)
    assert meta["source_digest"] == source_digest()
    assert (meta["plain"], meta["budget_s"], meta["not_run"]) == (False, None, [])
    assert meta["command"].startswith("vitgraph bench towers --towers tiny-qwen2-vl")
    assert [r["provider"] for r in written["rows"]] == ["hf-eager-sdpa", "ours"]
    assert list(tmp_path.glob("new/.*")) == []
    assert "mix2" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments",
    [
        ["--towers", "qwen9"],
        ["--workloads", "huge"],
        ["--providers", "theirs"],
        ["--dtype", "float32"],
    ],
)
def test_command_line_refuses(arguments, capsys):
    assert main(["towers", "--device", "cpu", *arguments]) == 2
    assert "vitgraph bench: " in capsys.readouterr().err


@pytest.mark.gpu
@pytest.mark.parametrize("tower", TINY)
def test_on_a_gpu_ours_is_timed_and_has_a_floor(tower):
    rows = towers.run([tower], WORKLOADS, towers.DEFAULT_PROVIDERS, effort=FAST, log=quiet)
    by_name = {r["provider"]: r for r in rows if r["workload"] == "mixed"}
    for name in ("hf-exact-graph", "ours-eager", "ours-graph", "ours"):
        assert by_name[name]["ms"] is not None, by_name[name].get("reason")
        assert by_name[name]["floor_ms"] > 0
    assert by_name["ours"]["padded_patches"] >= by_name["ours"]["patches"]


def test_a_model_that_transformers_has_no_class_for(monkeypatch):
    """Ours is of that model, beside another one's tower that computes the same."""
    published = {
        "hidden_size": 64, "num_attention_heads": 2, "num_hidden_layers": 3,
        "intermediate_size": 96, "init_pos_emb_height": 8, "init_pos_emb_width": 8,
    }  # fmt: skip
    arguments = {name.removeprefix("init_"): size for name, size in published.items()}
    spec = FAMILIES["kimi_vl"].spec(vision_config({"vision_config": published}))
    config = TowerConfig("kimi_k25", arguments, images_only=True, spec=spec)
    monkeypatch.setitem(TOWERS, "tiny-kimi-vl", config)
    asked = []
    monkeypatch.setattr(
        "vitgraph.bench.ours_providers.encoder_of",
        lambda *given, **options: asked.append(encoder_of(*given, **options)) or asked[-1],
    )
    grids = {"three": ((1, 8, 12), (1, 4, 6), (1, 2, 2))}
    names = ("hf-eager-sdpa", "ours-eager")
    rows = towers.run(["tiny-kimi-vl"], grids, names, device="cpu", effort=FAST, log=quiet)
    assert [encoder.spec for encoder in asked] == [spec]
    assert all(row["ms"] is not None for row in rows), rows
    assert 0 < rows[1]["max_err_ratio"] <= 1.3


def test_kimi_vl_is_as_large_as_published():
    config = tower_config("kimi-vl")
    assert config.spec == FAMILIES["kimi_vl"].spec(vision_config({}))
    peer = FAMILIES["kimi_k25"].spec(config.vision_config())
    same = {"family": "kimi_vl", "images_only": True, "segments": "frames", "frame_positions": 0}
    assert config.spec == replace(peer, **same)
