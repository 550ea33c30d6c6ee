import json
from pathlib import Path

import pytest
from vitgraph.bench.__main__ import main
from vitgraph.bench.readme_table import readme_table

ROOT = Path(__file__).parents[2]
COMMITTED = ROOT / "bench" / "results" / "h200" / "towers.json"


def test_the_readme_holds_the_committed_results():
    assert readme_table(COMMITTED) in (ROOT / "README.md").read_text()


def test_committed_results_are_complete():
    result = json.loads(COMMITTED.read_text())
    assert result["meta"]["dirty"] is False
    rows = {(r["tower"], r["workload"], r["provider"]): r for r in result["rows"]}
    for tower in ("qwen3-vl-8b", "qwen2.5-vl-7b", "qwen2-vl-7b"):
        for workload in ("img224", "img448", "img1024", "img2048", "8ximg448", "16mixed"):
            ours = rows[tower, workload, "ours"]
            assert ours["max_err_ratio"] <= 1.3
            assert ours["floor_ms"] < ours["ms"]


@pytest.mark.parametrize("text", ["{", "{}", '{"meta": {}, "rows": [{}]}'])
def test_other_files_are_refused(text, tmp_path, capsys):
    file = tmp_path / "x.json"
    file.write_text(text)
    with pytest.raises(ValueError, match=r"x.json is no result of `bench towers`"):
        readme_table(file)
    assert main(["readme", str(file)]) == 2
    assert "is no result" in capsys.readouterr().err
