import json
import sys
from xml.etree import ElementTree

import matplotlib
import pytest
from vitgraph.bench import contest, plots
from vitgraph.bench.__main__ import main
from vitgraph.bench.plots import write_plots

META = {"gpu": "G", "dtype": "bfloat16", "commit": "abcdef0123", "dirty": False}


def point(axis, at, provider, ms, *, floor=1.0, replays=None, tower="t"):
    rung = 1000 if axis == "occupancy" else None
    return {
        "tower": tower, "axis": axis, "workload": f"{axis}-{at}", "provider": provider, "ms": ms,
        "ms_p20": ms and 0.9 * ms, "ms_p80": ms and 1.2 * ms, "floor_ms": floor,
        "tokens": at, "images": at, "rung_tokens": rung, "live_share": rung and at / rung,
        "replays": replays,
    }  # fmt: skip


ROWS = [
    point("tokens", 256, "ours", 4.0, floor=2.0, replays=0),  # out of order
    point("tokens", 64, "ours", 2.0, replays=1),
    point("tokens", 64, "hf-eager-sdpa", 3.0),
    point("tokens", 256, "hf-eager-sdpa", None, floor=2.0),
    point("images", 1, "ours", 2.0, replays=1),
    point("occupancy", 300, "ours-graph", 5.0, replays=1),
    point("occupancy", 1000, "ours-graph", 9.0, floor=8.0, replays=1),
    point("images", 1, "vllm-graph", 7.0, tower="u"),
]
CEILINGS = {"copy_gbps": 4000.0, "gemm_tflops": 800.0}


def kernel(case, provider, tflops, gbps):
    us = None if tflops is None else 1.0
    return {"case": case, "provider": provider, "us": us, "tflops": tflops, "gbps": gbps}


KERNELS = [
    kernel("norm", "torch", 1.0, 2000.0),
    kernel("norm", "vitgraph", 1.5, 3000.0),
    kernel("linear", "triton", 600.0, 1500.0),
    kernel("linear", "hopper", None, None),
]


@pytest.fixture
def write(tmp_path):
    def to_file(name, rows, **meta):
        path = tmp_path / name
        path.write_text(json.dumps({"meta": {**META, **meta}, "rows": rows}))
        return path

    return to_file


def drawn(path):
    return {name: figure.axes[0] for name, figure in plots._figures(path)}


def lines(axes):
    return {
        line.get_label(): list(map(tuple, line.get_xydata()))
        for line in axes.lines
        if not line.get_label().startswith("_")
    }


def test_latency_against_tokens_with_the_floor(write):
    axes = drawn(write("r.json", ROWS))["r-tokens-t.svg"]
    assert lines(axes) == {
        "ours": [(64, 2.0), (256, 4.0)],
        "hf-eager-sdpa": [(64, 3.0)],
        "floor": [(64, 1.0), (256, 2.0)],
    }
    assert axes.get_xscale() == axes.get_yscale() == "log"
    assert axes.get_title() == "t, bfloat16, G, commit abcdef0"
    assert [text.get_text() for text in axes.texts] == ["no time: hf-eager-sdpa at 1 of 2"]
    bands, dots = axes.collections[::2], axes.collections[1::2]
    vertices = bands[0].get_paths()[0].vertices
    assert vertices[:, 1].min() == pytest.approx(1.8)
    assert vertices[:, 1].max() == pytest.approx(4.8)
    filled, hollow = dots[0].get_facecolors()
    assert tuple(hollow[:3]) == (1, 1, 1)
    assert tuple(filled[:3]) != (1, 1, 1)


def test_occupancy_is_in_per_cent_and_from_zero(write):
    axes = drawn(write("r.json", ROWS))["r-occupancy-t.svg"]
    assert lines(axes)["ours-graph"] == [(30, 5.0), (100, 9.0)]
    assert lines(axes)["floor"] == [(30, 1.0), (100, 8.0)]
    assert axes.get_ylim()[0] == 0
    assert axes.get_title() == "t, rung of 1,000 tokens, bfloat16, G, commit abcdef0"
    assert len(axes.texts) == 0


def test_every_contender_has_a_colour():
    assert set(plots._COLORS) >= {*contest.PROVIDERS}
    assert len(set(plots._COLORS.values())) == len(plots._COLORS)


def test_without_a_floor_none_is_drawn(write):
    rows = [point("tokens", 64, "ours-eager", 2.0, floor=None)]
    assert set(lines(drawn(write("r.json", rows))["r-tokens-t.svg"])) == {"ours-eager"}


def test_roofline_has_rates_over_intensity_under_the_ceilings(write):
    axes = drawn(write("k.json", KERNELS, ceilings=CEILINGS))["k-roofline.svg"]
    dots = {tuple(xy) for dots in axes.collections for xy in dots.get_offsets().tolist()}
    assert dots == {(0.5, 1.0), (0.5, 1.5), (400.0, 600.0)}
    assert lines(axes) == {"4000 GB/s, 800 TFLOP/s": [(0.5, 2.0), (200.0, 800.0), (400.0, 800.0)]}
    legend = [text.get_text() for text in axes.get_legend().get_texts()]
    assert legend == ["norm", "linear", "4000 GB/s, 800 TFLOP/s"]
    assert axes.get_title() == "ours blue, others grey, G, commit abcdef0"
    bare = drawn(write("k.json", KERNELS, ceilings=None))["k-roofline.svg"]
    assert lines(bare) == {}
    assert "ceilings not measured" in bare.get_title()


def test_files_are_valid_and_the_same_every_time(write, tmp_path):
    files = [write("r.json", ROWS), write("k.json", KERNELS, ceilings=CEILINGS)]
    first = write_plots(files, tmp_path / "new" / "a")
    assert [path.name for path in first] == [
        "r-tokens-t.svg", "r-images-t.svg", "r-occupancy-t.svg", "r-images-u.svg",
        "k-roofline.svg",
    ]  # fmt: skip
    style = {"axes.linewidth": 9.0, "font.size": 20.0, "svg.hashsalt": None, "axes.grid": True}
    with matplotlib.rc_context(style):
        second = write_plots(files, tmp_path / "b")
        assert matplotlib.rcParams["font.size"] == 20.0
    for one, other in zip(first, second, strict=True):
        text = one.read_text()
        assert text == other.read_text()
        assert "dc:date" not in text
        ElementTree.fromstring(text)
    assert list(first[0].parent.glob(".*")) == []
    assert "floor" in first[0].read_text()


def test_command_line(write, tmp_path, capsys):
    file = write("r.json", ROWS)
    assert main(["plot", str(file), "-o", str(tmp_path / "out")]) == 0
    assert capsys.readouterr().out.splitlines()[0] == str(tmp_path / "out" / "r-tokens-t.svg")
    assert len(list((tmp_path / "out").iterdir())) == 4


@pytest.mark.parametrize("rows", [[], [{"tower": "t", "workload": "w", "ms": 1.0}]])
def test_results_without_a_plot_are_refused(rows, write, tmp_path, capsys):
    assert main(["plot", str(write("x.json", rows)), "-o", str(tmp_path)]) == 2
    assert "x.json is no result of `scaling` or `kernels`" in capsys.readouterr().err


def test_other_files_are_refused(tmp_path):
    file = tmp_path / "x.json"
    for text in ("{", "[]", '{"rows": []}'):
        file.write_text(text)
        with pytest.raises(ValueError, match=r"x.json is no result of `vitgraph bench`"):
            write_plots([file], tmp_path)


def test_two_results_of_one_name_are_refused(write, tmp_path):
    file = write("r.json", ROWS)
    with pytest.raises(ValueError, match=r"two results would be r-tokens-t.svg"):
        write_plots([file, file], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_missing_matplotlib_is_named(write, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ValueError, match=r"pip install 'vitgraph\[bench\]'"):
        write_plots([write("r.json", ROWS)], tmp_path)
