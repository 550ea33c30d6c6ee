"""One rank of a process group, started as a script by test_data_parallel.py (no test itself).

    python data_parallel_ranks.py RANK WORLD DEVICE FOLDER

A line on stdin is a JSON list: the name of a scenario below and its arguments. What the scenario
returns, or the error it raises, is saved to FOLDER/<line>.<rank>.pt. The end of stdin ends it.
"""

import importlib.util
import json
import sys
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist
from vitgraph.capture import EncoderCudaGraphManager, Pruning
from vitgraph.capture.data_parallel import DataParallelEncoder, Shard
from vitgraph.capture.protocol import BufferSpec

TESTS = Path(__file__).parents[1]
# Ranks give up by themselves before the test does, with torch's account of the collective.
DEADLOCK_SECONDS = 20
CONFIG = {"token_budgets": [16, 64, 128], "max_vision_items_per_batch": 8}


def load(path):
    """A conftest as a module: pytest does not make it importable."""
    spec = importlib.util.spec_from_file_location("fakes", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


fakes = load(TESTS / "capture" / "conftest.py")


class SizedEncoder(fakes.FakeEncoder):
    """The fake encoder, which also says what attention costs."""

    def item_specs(self, grid_thw):
        specs = super().item_specs(grid_thw)
        pairs = [t * (h * w) ** 2 for t, h, w in grid_thw]
        return [
            type(spec)(spec.input_size, spec.output_tokens, spec.num_frames, 0, pair)
            for spec, pair in zip(specs, pairs, strict=True)
        ]


class HalfEncoder(SizedEncoder):
    """Pools in bf16, and has an output of one number a frame."""

    def output_specs(self, limits):
        specs = super().output_specs(limits)
        pooled = specs["pooler_output"]
        specs["pooler_output"] = BufferSpec(pooled.shape, torch.bfloat16, "tokens")
        specs["frame"] = BufferSpec((limits.max_frames,), torch.int32, "frames")
        return specs

    def eager_forward(self, pixel_values, grid_thw, pruning=None):
        outputs = super().eager_forward(pixel_values, grid_thw)
        frames = [h * w for t, h, w in grid_thw for _ in range(t)]
        return {
            "last_hidden_state": outputs["last_hidden_state"],
            "pooler_output": outputs["pooler_output"].bfloat16(),
            "frame": torch.tensor(frames, dtype=torch.int32, device=self.device),
        }


def pixels_of(grid, seed=0):
    generator = torch.Generator().manual_seed(seed)
    rows = sum(t * h * w for t, h, w in grid)
    return torch.randint(-8, 9, (rows, fakes.WIDTH), generator=generator).float()


def own_rows(pixels, grid, indices):
    pieces = pixels.split([t * h * w for t, h, w in grid])
    return torch.cat([pixels[:0], *(pieces[index] for index in indices)])


def rerun_recorder():
    """A replay runs the recorded work again, as with the fixture of this name."""
    return SimpleNamespace(
        new_pool=lambda: "pool",
        warm_up=lambda work: work(),
        record=lambda work, pool: SimpleNamespace(replay=work),
    )


def execute_of(encoder, rank, uneven):
    """Rank 0 replays, the others compute eagerly (`uneven`), or all replay."""
    if uneven and rank > 0:
        return encoder.eager_forward
    recorder = rerun_recorder() if encoder.device.type == "cpu" else None
    manager = EncoderCudaGraphManager(encoder, CONFIG, recorder=recorder)
    manager.capture()
    return manager.execute


def own_part(pruning, grid, indices):
    """What the items of `indices` keep."""
    if pruning is None:
        return None
    masks = None
    if pruning.mask is not None:
        pieces = pruning.mask.split([t * h * w // fakes.MERGE for t, h, w in grid])
        masks = torch.cat([pruning.mask[:0], *(pieces[index] for index in indices)])
    return Pruning(
        tuple(pruning.keep[index] for index in indices),
        tuple(pruning.masked[index] for index in indices),
        masks,
    )


def own_mask_alone(pruning, grid, indices):
    """The same, but for the mask of what other ranks compute."""
    if pruning.mask is None:
        return pruning
    mask, first = 1 - pruning.mask, 0
    for index, (t, h, w) in enumerate(grid):
        rows = slice(first, first + t * h * w // fakes.MERGE)
        first = rows.stop
        if index in indices:
            mask[rows] = pruning.mask[rows]
    return Pruning(pruning.keep, pruning.masked, mask)


def out_for(encoder, pixels, grid, indices, pruning, names):
    """Poisoned tensors for this rank's rows; without items those of no rows."""
    own = [grid[index] for index in indices] or [(1, 2, 2)]
    part = own_part(pruning, grid, indices) if indices else None
    expected = encoder.eager_forward(
        own_rows(pixels, grid, indices) if indices else torch.zeros(4, fakes.WIDTH), own, part
    )
    return {
        name: torch.full_like(tensor, 77)[: None if indices else 0]
        for name, tensor in expected.items()
        if name in names
    }


def mix(
    rank, device, grids, *, uneven=False, shard=False, half=False, pruned=None, out=None, **options
):
    """Several batches in turn, each call's results kept until the end.

    `pruned`: with pruning, and whether the encoder announces it. `out`: names to write in place.
    """
    encoder = (HalfEncoder if half else SizedEncoder)(device)
    if pruned is not None:
        encoder = fakes.PruningEncoder(device, announces=pruned)
    execute = encoder.eager_forward if half else execute_of(encoder, rank, uneven)
    parallel = DataParallelEncoder(execute, encoder)
    results = []
    for seed, grid in enumerate(grids):
        grid = [tuple(row) for row in grid]
        pixels, own = pixels_of(grid, seed), parallel.assignment(grid)[rank]
        if shard:
            pixels = own_rows(pixels, grid, own)
        if pruned is not None:
            pruning = fakes.pruning_of(grid, seed)
            options["pruning"] = own_mask_alone(pruning, grid, own)
        if out is not None:
            whole = pixels_of(grid, seed)
            options["out"] = out_for(encoder, whole, grid, own, options.get("pruning"), out)
        result = parallel.execute(pixels.to(device), grid, shard=shard, **options)
        if isinstance(result, Shard):
            assert result.indices == own
            result = result.outputs
        if out is not None:
            assert all(tensor is options["out"][name] for name, tensor in result.items())
        results.append((own, {name: tensor.cpu() for name, tensor in result.items()}))
    return results


def failing(rank, device, grid, *, bad, **options):
    """Ranks in `bad` raise in their encoder; a second batch shows that the group still works."""
    encoder = SizedEncoder(device)
    grid = [tuple(row) for row in grid]
    broken = [rank in bad]

    def execute(pixels, own):
        if broken[0]:
            raise FloatingPointError(f"kernel of {rank} went wrong " + "é" * 1000)
        return encoder.eager_forward(pixels, own)

    parallel = DataParallelEncoder(execute, encoder)
    pixels = pixels_of(grid).to(device)
    first = attempt(parallel, pixels, grid, **options)
    broken[0] = False
    return first, attempt(parallel, pixels, grid, **options)


def cheap_when_large(item):
    return 1000 - item.output_tokens


def one_row_each(pixels, grid):
    return {"last_hidden_state": pixels[:1], "pooler_output": pixels[:1]}


def differing(rank, device, what, **options):
    """The last rank is called differently from the others; then all are called alike."""
    encoder = SizedEncoder(device)
    if what.endswith(("prunes", "pruning")):
        encoder = fakes.PruningEncoder(device, announces=False)
    odd = rank == dist.get_world_size() - 1
    costs = None
    if odd and what == "costs":
        costs = cheap_when_large
    execute = encoder.eager_forward
    if odd and what == "outputs":
        execute = one_row_each
    parallel = DataParallelEncoder(execute, encoder, costs=costs)
    grid = [(1, 4, 4), (1, 2, 2), (2, 4, 8), (1, 8, 8)]
    pixels = pixels_of(grid).to(device)
    odd_grid = {
        "grid": [(1, 4, 4), (1, 2, 2), (1, 8, 8), (1, 8, 8)],
        "order": grid[::-1],
        "odd grid": [(1, 4, 4), (1, 2, 2), (2, 4, 8), (1, 7, 8)],
    }.get(what, grid)
    odd_pixels = pixels[1:] if what == "pixels" else pixels
    odd_options = {
        "gather": {"gather": ["pooler_output"]},
        "names": {"names": ["pooler_output"]},
        "one prunes": {"pruning": Pruning((4, 1, 16, 16), (False,) * 4)},
        "pruning": {"pruning": Pruning((4, 1, 7, 9), (False,) * 4)},
        "bad pruning": {"pruning": Pruning((5, 1, 7, 9), (False,) * 4)},
    }.get(what, {})
    if what in ("pruning", "bad pruning"):
        options["pruning"] = Pruning((4, 1, 9, 7), (False,) * 4)
    if odd:
        first = attempt(parallel, odd_pixels, odd_grid, **(options | odd_options))
    else:
        first = attempt(parallel, pixels, grid, **options)
    if what in ("costs", "outputs"):
        return first, None
    return first, attempt(parallel, pixels, grid)


def refused(rank, device, grid, pixels, keep=None, out=None, plain=False, **options):
    """Arguments that every rank refuses."""
    execute = one_row_each if plain else SizedEncoder(device).eager_forward
    parallel = DataParallelEncoder(execute, SizedEncoder(device))
    if keep is not None:
        options["pruning"] = Pruning(tuple(keep), (False,) * len(keep))
    if out is not None:
        options["out"] = {name: torch.empty(shape) for name, shape in out.items()}
    return attempt(parallel, torch.zeros(pixels), grid, **options)


def handed(rank, device, announces):
    """The options that the function is called with, for each call, and what comes back."""
    encoder = fakes.PruningEncoder(device, announces=announces)
    manager = EncoderCudaGraphManager(encoder, CONFIG, recorder=rerun_recorder())
    manager.capture()
    seen = []

    def execute(pixels, grid, *, pruning=None, out=None, names=None):
        options = {"pruning": pruning, "out": out, "names": names}
        given = {key: value for key, value in options.items() if value is not None}
        seen.append({key: None if key == "pruning" else list(given[key]) for key in given})
        return manager.execute(pixels, grid, **given)

    parallel = DataParallelEncoder(execute, encoder)
    grid = [(1, 4, 4)] * dist.get_world_size()
    pixels = pixels_of(grid)
    pruning = Pruning((3,) * len(grid), (False,) * len(grid))
    pooled = {"pooler_output": torch.empty(3, fakes.WIDTH)}
    for options in (
        {},
        {"names": ["pooler_output"]},
        {"gather": ["pooler_output"]},
        {"pruning": pruning},
        {"pruning": pruning, "names": ["pooler_output"]},
        {"pruning": pruning, "gather": False, "out": pooled},
        {"gather": False, "out": {"pooler_output": torch.empty(4, fakes.WIDTH)}},
    ):
        parallel.execute(pixels, grid, **options)
    return seen


def subgroup(rank, device, grid):
    """The last rank is in no group; the others share the batch out between them."""
    others = list(range(dist.get_world_size() - 1))
    group = dist.new_group(others)
    encoder = SizedEncoder(device)
    try:
        parallel = DataParallelEncoder(encoder.eager_forward, encoder, group=group)
    except ValueError as error:
        return str(error)
    grid = [tuple(row) for row in grid]
    return parallel.execute(pixels_of(grid).to(device), grid)


def real_tower(device, grid):
    """A tower, and pixels for `grid`: fp32 on the CPU, bf16 on a GPU."""
    towers = load(TESTS / "encoder" / "conftest.py")
    from vitgraph.encoder import VisionEncoder

    cls = towers.TOWERS["qwen3_vl"]
    torch.manual_seed(0)
    hf = cls._from_config(cls.config_class(**towers.VISION["qwen3_vl"]))
    towers.boost(hf)
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    encoder = VisionEncoder.from_hf(hf.to(device, dtype).eval())
    rows = sum(t * h * w for t, h, w in grid)
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randn(rows, encoder.spec.patch_values, generator=generator).to(device, dtype)
    return encoder, pixels


def tower(rank, device, grid):
    """A real tower: gathered rows against what one device computes for the same shards."""
    grid = [tuple(row) for row in grid]
    encoder, pixels = real_tower(device, grid)
    manager = EncoderCudaGraphManager(encoder, {"token_budgets": [64, 256]})
    manager.capture()
    parallel = DataParallelEncoder(manager.execute, encoder)
    gathered = parallel.execute(pixels, grid)
    shards = parallel.assignment(grid)
    tokens = [t * h * w // 4 for t, h, w in grid]
    pooled = gathered["pooler_output"].split(tokens)
    same = []
    for indices in shards:
        own = own_rows(pixels, grid, indices)
        alone = manager.execute(own, [grid[index] for index in indices])["pooler_output"]
        same.append(torch.equal(alone, torch.cat([pooled[index] for index in indices])))
    whole = manager.execute(pixels, grid)["pooler_output"].float()
    error = (gathered["pooler_output"].float() - whole).norm() / whole.norm()
    return same, float(error)


def pruned_tower(rank, device, grid):
    """A real tower: gathered rows of a pruned call against those of each shard alone."""
    from vitgraph.encoder.pruning import plan_pruning

    grid = [tuple(row) for row in grid]
    encoder, pixels = real_tower(device, grid)
    execute = encoder.eager_forward
    if device.type == "cuda":
        execute = encoder.capture({"token_budgets": [64, 256]}, pruning=True).execute
    parallel = DataParallelEncoder(execute, encoder)
    pruning = plan_pruning(encoder.spec, grid, 0.6, None)
    gathered = parallel.execute(pixels, grid, pruning=pruning)
    same = []
    for indices in parallel.assignment(grid):
        own = own_rows(pixels, grid, indices)
        part = own_part(pruning, grid, indices)
        alone = execute(own, [grid[index] for index in indices], pruning=part)
        for name in gathered.keys() - {"last_hidden_state"}:
            pieces = gathered[name].split(pruning.keep)
            same.append(torch.equal(alone[name], torch.cat([pieces[i] for i in indices])))
    return sorted(gathered), len(gathered["pooler_output"]), sum(pruning.keep), all(same)


def attempt(parallel, *args, **options):
    try:
        result = parallel.execute(*args, **options)
    except Exception as error:
        cause = error.__cause__
        return {
            "error": type(error).__name__,
            "text": str(error),
            "cause": None if cause is None else type(cause).__name__,
        }
    outputs = result.outputs if isinstance(result, Shard) else result
    return {name: tensor.cpu() for name, tensor in outputs.items()}


def main(rank, world, device, folder):
    torch.set_num_threads(1)
    backend = "gloo" if device == "cpu" else "nccl"
    place = torch.device(device)
    if device != "cpu":
        place = torch.device("cuda", rank)
        torch.cuda.set_device(place)
    dist.init_process_group(
        backend,
        init_method=(folder / "init").as_uri(),
        rank=rank,
        world_size=world,
        timeout=timedelta(seconds=DEADLOCK_SECONDS),
    )
    for number, line in enumerate(sys.stdin):
        name, arguments = json.loads(line)
        try:
            result = globals()[name](rank, place, **arguments)
        except Exception as error:
            result = f"{type(error).__name__}: {error}"
        saved = folder / f"{number}.{rank}.tmp"
        torch.save(result, saved)
        saved.rename(saved.with_suffix(".pt"))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], Path(sys.argv[4]))
