"""Where tests run: on CUDA, or else kernels interpreted and everything else on references.

`@triton.jit` picks the interpreter when a kernel is defined, so the switch is thrown for the whole
session, before Triton is imported. Interpreted kernels are slow, therefore only tests under
tests/kernels launch them; elsewhere a CPU tensor goes the way it goes for a user, to `*_ref`.
"""

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

HAS_CUDA = torch.cuda.is_available()
if not HAS_CUDA:
    os.environ["TRITON_INTERPRET"] = "1"
INTERPRETS = os.environ.get("TRITON_INTERPRET") == "1"

try:
    import vitgraph.encoder  # noqa: F401
except ImportError as error:
    pytest.exit(f"not installed ({error}): run  pip install -e '.[test]'", returncode=2)

from triton import knobs  # noqa: E402
from vitgraph.kernels import dispatch, interpreter  # noqa: E402

if INTERPRETS:
    interpreter.install()

KERNEL_TESTS = Path(__file__).parent / "kernels"
REFERENCES = SimpleNamespace(runtime=SimpleNamespace(interpret=False))


def is_kernel_test(item: pytest.Item) -> bool:
    return item.path.is_relative_to(KERNEL_TESTS)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if HAS_CUDA:
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    # a hook and no fixture: it has to come before fixtures of module and session scope.
    # Only what dispatch reads is replaced: kernels first imported by a later test are still
    # decorated for the interpreter.
    dispatch.knobs = knobs if is_kernel_test(item) else REFERENCES


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """An empty cache: what a user has measured on this machine must not change what tests see."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VITGRAPH_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def device() -> str:
    """The device tests of both kinds run on: "cuda", or "cpu" (interpreter or references)."""
    return "cpu" if INTERPRETS else "cuda"


@pytest.fixture
def poison_empty(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """`poison_empty()`: fresh float buffers are NaN from then on, so that a hole in one shows."""

    def poisoned(allocate):
        def allocate_poisoned(*args, **kwargs):
            out = allocate(*args, **kwargs)
            return out.fill_(float("nan")) if out.is_floating_point() else out

        return allocate_poisoned

    def poison() -> None:
        for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
            monkeypatch.setattr(owner, name, poisoned(getattr(owner, name)))

    return poison


@pytest.fixture(autouse=True)
def kernels_are_poisoned(request: pytest.FixtureRequest, poison_empty: Callable[[], None]) -> None:
    if is_kernel_test(request.node):
        poison_empty()


class RerunRecorder:
    """Stands in for CUDA graphs on the CPU: a replay runs the recorded work again."""

    class Rerun:
        def __init__(self, work: Callable[[], None]):
            self.replay = work

    def new_pool(self) -> str:
        return "pool"

    def warm_up(self, work: Callable[[], None]) -> None:
        work()

    def record(self, work: Callable[[], None], pool: object) -> Rerun:
        return self.Rerun(work)


@pytest.fixture
def rerun_recorder() -> RerunRecorder:
    return RerunRecorder()
