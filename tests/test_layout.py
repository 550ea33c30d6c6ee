import subprocess
import sys
import tomllib
from pathlib import Path

import torch
from vitgraph.kernels import dispatch

ROOT = Path(__file__).parents[1]


def test_kernels_folder_is_not_a_top_level_package():
    init = ROOT / "kernels" / "__init__.py"
    assert not init.exists(), (
        "with the repository root on sys.path, kernels/__init__.py would make `import kernels` "
        "find this folder before Hugging Face's `kernels`, which transformers imports"
    )


def test_transformers_imports_from_the_repository_root():
    code = "import transformers; from transformers import Qwen2VLForConditionalGeneration"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_every_folder_with_code_is_packaged():
    setuptools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    folders = {
        path.parent.relative_to(ROOT).parts
        for path in ROOT.rglob("*.py")
        if path.relative_to(ROOT).parts[0] not in ("tests", "docs", "build")
        and not path.relative_to(ROOT).parts[0].startswith(".")
    }
    assert {"vitgraph." + ".".join(parts) for parts in folders} == set(setuptools["packages"])
    assert set(setuptools["package-dir"]) == set(setuptools["packages"])


def test_cpu_tensors_outside_kernel_tests_run_references():
    assert dispatch.use_reference(torch.zeros(1))
