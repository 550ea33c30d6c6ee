from types import SimpleNamespace

import pytest
import torch
import vitgraph.bench.towers_config as towers
from vitgraph.encoder import VisionEncoder, branch, forward
from vitgraph.encoder.branch import MOST_ROWS, Branch
from vitgraph.encoder.stream import Stream
from vitgraph.kernels import background, pdl
from vitgraph.kernels.testing import rel_rms


def test_in_line_on_a_cpu():
    x = torch.zeros(3)
    branch = Branch(torch.device("cpu"), rows=1)
    with branch.after_main(x):
        x += 1
    branch.join()
    assert (x == 1).all()


class OnGpu(list):
    """Rows that claim to be on a GPU."""

    is_cuda, device = True, torch.device("cuda")


def test_no_kernel_of_a_branch_starts_early(monkeypatch):
    """In line neither: what a warm-up compiles is what a capture launches."""
    monkeypatch.setattr(pdl, "_has_pdl", lambda device: True)
    rows = OnGpu([0])
    with pdl.kernel_chain():
        with Branch(torch.device("cpu"), rows=1).after_main():
            assert not pdl.starts_early(rows)
        assert pdl.starts_early(rows)


class FakeStream:
    """One of the few streams that are handed out in turn."""

    pool = (11, 12, 13)
    handed_out = 0

    def __init__(self, device):
        self.device = device
        self.cuda_stream = self.pool[FakeStream.handed_out % len(self.pool)]
        FakeStream.handed_out += 1


@pytest.mark.parametrize("main_is", FakeStream.pool)
def test_the_branch_is_never_the_main_line_itself(main_is, monkeypatch):
    """A graph may be recorded on the very stream that would be handed out next."""
    monkeypatch.setattr(torch.cuda, "Stream", FakeStream)
    monkeypatch.setattr(FakeStream, "handed_out", 0)
    main = SimpleNamespace(device=torch.device("cuda", 1), cuda_stream=main_is)
    find = branch._side_stream.__wrapped__
    side = find(main)
    assert side.cuda_stream != main_is
    assert side.device == main.device
    monkeypatch.setattr(FakeStream, "handed_out", FakeStream.pool.index(main_is))
    assert find(main).cuda_stream != main_is


@pytest.fixture
def products(monkeypatch):
    """Most programs of the products that may run beside others."""
    calls = []
    product = forward.gemm

    def gemm(x, weight, bias, **options):
        calls.append(options["programs"])
        return product(x, weight, bias, **options)

    monkeypatch.setattr(forward, "gemm", gemm)
    return calls


def test_the_last_merger_takes_the_whole_gpu(products, monkeypatch):
    monkeypatch.setattr(background, "suits_background", lambda *_: True)
    hf = towers.build_tower("tiny-qwen3-vl", device="cpu", dtype=torch.float64)
    encoder = VisionEncoder.from_hf(hf)
    g = torch.Generator().manual_seed(0)
    pixels = torch.randn(40, encoder.spec.patch_values, generator=g, dtype=torch.float64)
    got = encoder.eager_forward(pixels, [(1, 4, 6), (1, 4, 4)])
    assert products == [None, None] * len(encoder.spec.deepstack_layers), "in line"
    monkeypatch.setattr(background, "suits_background", lambda *_: False)
    want = encoder.eager_forward(pixels, [(1, 4, 6), (1, 4, 4)])
    for key, value in want.items():
        assert rel_rms(got[key], value) <= 1e-12


@pytest.mark.parametrize("most_rows", [40, 39])
def test_mergers_read_what_the_next_norm_leaves(most_rows, monkeypatch):
    """Or norms of their own, with more rows than a branch takes; the results are the same."""
    monkeypatch.setattr(branch, "MOST_ROWS", most_rows)
    hf = towers.build_tower("tiny-qwen3-vl", device="cpu", dtype=torch.float64)
    encoder = VisionEncoder.from_hf(hf)
    spec, joined = encoder.spec, []
    norm_of_stream = Stream.norm

    def norm(stream, *args, **options):
        joined.append(options.get("joined", 1) > 1)
        return norm_of_stream(stream, *args, **options)

    monkeypatch.setattr(Stream, "norm", norm)
    g = torch.Generator().manual_seed(0)
    pixels = torch.randn(40, spec.patch_values, generator=g, dtype=torch.float64)
    got = encoder.eager_forward(pixels, [(1, 4, 6), (1, 4, 4)])
    # behind the last block there is no norm that could leave them
    by_others = sum(i + 1 < spec.depth for i in spec.deepstack_layers) if most_rows == 40 else 0
    assert by_others > 0 or most_rows < 40
    assert sum(joined) == len(spec.deepstack_layers) - by_others
    with torch.no_grad():
        grid = torch.tensor([(1, 4, 6), (1, 4, 4)])
        features = hf(pixels, grid_thw=grid).deepstack_features
    for j, want in enumerate(features):
        assert rel_rms(got[f"deepstack_{j}"], want) <= 1e-6  # angles are fp32


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [background.MOST_ROWS, background.MOST_ROWS + 4])
def test_mergers_beside_the_blocks_get_few_programs(tokens, products):
    hf = towers.build_tower("tiny-qwen3-vl", device="cuda", dtype=torch.bfloat16)
    encoder = VisionEncoder.from_hf(hf)
    products_of_all = 2 * len(encoder.spec.deepstack_layers)
    expected = [background.PROGRAMS] * (products_of_all if tokens <= background.MOST_ROWS else 0)
    encoder.capture({"token_budgets": (tokens,)})
    split = len(products) - len(expected)
    assert products[split:] == expected
    assert set(products[:split]) <= {None}, "warm-ups are in line"


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("rows", "is_beside"), [(MOST_ROWS, True), (MOST_ROWS + 1, False)], ids=["few", "many"]
)
def test_beside_the_main_line_of_a_graph(rows, is_beside):
    device = torch.device("cuda", torch.cuda.current_device())
    x = torch.arange(4.0, device=device)
    squares, sums = torch.zeros_like(x), torch.zeros_like(x)
    streams = []

    def work():
        branch = Branch(device, rows)
        copied = x + 0
        with branch.after_main(copied):
            assert branch.is_beside == (torch.cuda.current_stream() != main)
            assert not pdl.starts_early(x)
            streams.append(torch.cuda.current_stream())
            squares.copy_(copied * copied)
        sums.copy_(copied + x)
        branch.join()
        sums.add_(squares)

    main = torch.cuda.current_stream()
    with pdl.kernel_chain():
        work()  # eager calls are in line
        assert streams.pop() == main
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            main = torch.cuda.current_stream()
            work()
    assert (streams.pop() != main) == is_beside
    for start in (0.0, 5.0):
        x.copy_(torch.arange(4.0) + start)
        graph.replay()
        assert torch.equal(sums, x * x + 2 * x)
