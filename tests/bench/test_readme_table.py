import json
from pathlib import Path

import pytest
from vitgraph.bench.__main__ import main
from vitgraph.bench.provenance import commit_digest
from vitgraph.bench.readme_table import readme_table, readme_tables

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "bench" / "results" / "h200"
COMMITTED = RESULTS / "towers.json"
FAMILIES, IMAGES = RESULTS / "families.json", RESULTS / "images.json"
FP8 = RESULTS / "towers-fp8.json"


def test_the_readme_holds_the_committed_results():
    readme = (ROOT / "README.md").read_text()
    assert readme_table(COMMITTED) in readme
    assert readme_table(FAMILIES) in readme
    assert readme_table(IMAGES) in readme
    assert readme_table(FP8) in readme


@pytest.mark.parametrize("path", sorted(RESULTS.glob("*.json")), ids=lambda path: path.stem)
def test_committed_results_are_of_the_commit_that_they_name(path):
    content = json.loads(path.read_text())
    meta = content.get("meta", content)
    assert not meta["dirty"]
    digest = commit_digest(meta["commit"])
    if digest is None:
        pytest.skip(f"the history here does not hold commit {meta['commit']}")
    assert meta["source_digest"] == digest


# the README says so: the floor has no products but the library's, and a kernel for each norm
BELOW_FLOOR = {
    ("qwen3-vl-8b", "img224"),
    ("qwen3-vl-8b", "16mixed"),
    ("qwen2.5-vl-7b", "img224"),
    ("qwen2.5-vl-7b", "img2048"),
    ("qwen2.5-vl-7b", "16mixed"),
    ("qwen2-vl-7b", "img224"),
    ("qwen2-vl-7b", "16mixed"),
}


def test_committed_results_are_complete():
    result = json.loads(COMMITTED.read_text())
    rows = {(r["tower"], r["workload"], r["provider"]): r for r in result["rows"]}
    for tower in ("qwen3-vl-8b", "qwen2.5-vl-7b", "qwen2-vl-7b"):
        for workload in ("img224", "img448", "img1024", "img2048", "8ximg448", "16mixed"):
            ours = rows[tower, workload, "ours"]
            assert ours["max_err_ratio"] <= 1.3
            is_below = ours["ms"] <= ours["floor_ms"]
            assert is_below == ((tower, workload) in BELOW_FLOOR)
            assert ours["attention"] == "hopper"  # README: the table of a plain install as well


META = {
    "gpu": "G", "torch": "2", "triton": "3", "transformers": "5", "dtype": "bfloat16",
    "commit": "abc", "dirty": False, "date": "2026-01-02T03", "command": "vitgraph bench towers",
}  # fmt: skip


def result(tmp_path, name, times, *, attention="fa4", **meta):
    """A result of one tower; `times` maps a workload to the ms of its providers."""
    rows = [
        {
            "tower": "t", "workload": workload, "provider": provider, "ms": ms, "floor_ms": 0.5,
            "patches": 1234, "max_err_ratio": None if ms is None else 0.9,
            "attention": attention if provider == "ours" and ms else None,
        }
        for workload, by_name in times.items()
        for provider, ms in by_name.items()
    ]  # fmt: skip
    path = tmp_path / name
    path.write_text(json.dumps({"meta": {**META, **meta}, "rows": rows}))
    return path


def cells(text, workload):
    (line,) = [line for line in text.splitlines() if line.startswith(f"| t | {workload} ")]
    return line.strip("| ").split(" | ")[2:]


def test_ours_is_held_against_the_fastest_correct_peer(tmp_path):
    sdpa, fa2, exact = "hf-eager-sdpa", "hf-eager-fa2", "hf-exact-graph"
    path = result(
        tmp_path,
        "r.json",
        {
            "ahead": {sdpa: 6.0, fa2: 5.0, exact: 3.0, "vllm-graph": None, "ours": 2.0},
            "behind": {sdpa: 6.0, fa2: None, exact: 3.0, "vllm-graph": 1.5, "ours": 2.0},
            "tied": {sdpa: 2.0, exact: None, "vllm-eager": 3.0, "ours": 2.0, "ours-graph": 1.0},
            "failed": {sdpa: 6.0, "ours": None},
            "alone": {sdpa: None, "ours": 2.0},
        },
    )
    text = readme_table(path)
    head, rule, *_ = text.splitlines()
    assert head == (
        "| tower | workload | patches | HF eager | HF graph | vLLM | ours | speed-up | floor | "
        "error |"
    )
    assert rule.count("---") == 10
    assert cells(text, "ahead") == ["1,234", "5", "3", "-", "2", "1.50", "0.5", "0.90"]
    assert cells(text, "behind") == [
        "1,234", "6", "3", "1.5", "2", "0.75, behind vllm-graph", "0.5", "0.90",
    ]  # fmt: skip
    assert cells(text, "tied")[5] == "1.00, behind hf-eager-sdpa"
    assert cells(text, "failed") == ["1,234", "6", "-", "-", "-", "no time", "0.5", "-"]
    assert cells(text, "alone")[5] == "-"


def test_a_peer_that_is_not_hugging_faces_is_marked(tmp_path):
    eager, exact = "plain-eager-sdpa", "plain-exact-graph"
    both = {"hf-eager-sdpa": 6.0, "hf-exact-graph": 5.0, "ours": 4.0}
    path = result(tmp_path, "r.json", {"w": both, "x": {eager: 3.0, exact: 1.0, "ours": 2.0}})
    text = readme_table(path)
    assert cells(text, "w") == ["1,234", "6", "5", "4", "1.25", "0.5", "0.90"]
    line = "| t (plain) | x | 1,234 | 3 | 1 | 2 | 0.50, behind plain-exact-graph | 0.5 | 0.90 |"
    lines = text.splitlines()
    assert line in lines
    note = lines[lines.index(line) + 2]
    assert note.startswith("(plain): transformers does not have this tower. The columns of HF hold")
    without = readme_table(result(tmp_path, "s.json", {"w": both}))
    assert "plain" not in without


def test_fp8_is_held_against_ours_without(tmp_path):
    times = {
        "both": {"ours": 3.0, "ours-graph": 2.9, "ours-fp8": 2.0},
        "wrong": {"ours": 3.0, "ours-fp8": None},
        "alone": {"ours-fp8": 2.0},
    }
    text = readme_table(result(tmp_path, "r.json", times, not_run=["t x"]))
    assert text.startswith("| tower | workload | patches | ours | ours with fp8 | times faster |")
    assert cells(text, "both") == ["1,234", "3", "2", "1.50"]
    assert cells(text, "wrong") == ["1,234", "3", "-", "-"]
    assert cells(text, "alone") == ["1,234", "-", "2", "-"]
    assert "commit abc, 2026-01-02: `vitgraph bench towers`." in text
    assert text.endswith("Not run, time was over: t x.")


def test_what_was_not_run_and_changes_are_named(tmp_path):
    times = {"w": {"hf-eager-sdpa": 3.0, "ours": 2.0}}
    text = readme_table(result(tmp_path, "r.json", times, dirty=True, not_run=["t a", "t b"]))
    assert "commit abc with changes, 2026-01-02" in text
    assert text.endswith("Not run, time was over: t a, t b.")
    assert "vLLM" not in text


def test_a_floor_that_nobody_computed_has_no_column(tmp_path):
    path = result(tmp_path, "r.json", {"w": {"hf-eager-sdpa": 3.0, "ours": 2.0}})
    content = json.loads(path.read_text())
    for row in content["rows"]:
        row["floor_ms"] = None
    path.write_text(json.dumps(content))
    text = readme_table(path)
    assert text.startswith("| tower | workload | patches | HF eager | HF graph | ours | speed-up |")
    assert "floor" not in text
    assert cells(text, "w") == ["1,234", "3", "-", "2", "1.50", "0.90"]


def test_both_tables(tmp_path, capsys):
    times = {"w": {"hf-eager-sdpa": 3.0, "ours": 2.0}}
    with_fa4 = result(tmp_path, "a.json", times)
    plain = result(tmp_path, "b.json", times, attention="triton", plain=True)
    text = readme_tables(with_fa4, plain)
    first, second = text.split("Plain install, without any package of FlashAttention:\n\n")
    assert first == f"With FlashAttention-4:\n\n{readme_table(with_fa4)}\n\n"
    assert second == readme_table(plain)
    own = result(tmp_path, "d.json", times, attention="hopper")
    assert readme_tables(own, plain).startswith(f"With our `hopper`:\n\n{readme_table(own)}")
    assert main(["readme", str(with_fa4), "--plain-file", str(plain)]) == 0
    assert capsys.readouterr().out == text + "\n"

    with pytest.raises(ValueError, match=r"a.json is not from `bench towers --plain`"):
        readme_tables(with_fa4, with_fa4)
    with pytest.raises(ValueError, match="pass it as --plain-file"):
        readme_tables(plain, plain)
    with pytest.raises(ValueError, match="names no attention backend of `ours`"):
        readme_tables(result(tmp_path, "c.json", times, attention=None), plain)


@pytest.mark.parametrize("text", ["{", "{}", '{"meta": {}, "rows": [{}]}'])
def test_other_files_are_refused(text, tmp_path, capsys):
    file = tmp_path / "x.json"
    file.write_text(text)
    with pytest.raises(ValueError, match=r"x.json is no result of `bench towers`"):
        readme_table(file)
    assert main(["readme", str(file)]) == 2
    assert "is no result" in capsys.readouterr().err
