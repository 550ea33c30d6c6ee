"""The launch table in force on a GPU: shipped, or measured there and kept in the user's cache."""

import json
import threading
from dataclasses import asdict, replace
from types import SimpleNamespace

import pytest
import torch
from vitgraph.kernels import cublaslt, few_rows_tuning, library_tuning, tables, tuning_cache
from vitgraph.kernels import gated_linear as gated_module
from vitgraph.kernels import gemm as gemm_module
from vitgraph.kernels import gemm_few_rows as few_rows_module
from vitgraph.kernels import linear as linear_module
from vitgraph.kernels.cublaslt import Algorithm
from vitgraph.kernels.few_rows_tuning import FewRowsConfig, few_rows_from_json, few_rows_tile
from vitgraph.kernels.gated_linear import choose_gated_backend
from vitgraph.kernels.gemm_few_rows import choose_partials
from vitgraph.kernels.gemm_tuning import (
    GATED,
    RESIDUAL,
    SHIPPED,
    SQUARE,
    TABLE,
    WIDE,
    table_from_json,
    table_to_json,
)
from vitgraph.kernels.linear import choose_backend
from vitgraph.kernels.tables import tuning, tuning_report
from vitgraph.kernels.tuning_cache import cache_folder, read_tuning, tuning_path, write_tuning

GPU, OTHER = "NVIDIA Imaginary 80GB", "NVIDIA Other"
DEVICE = torch.device("cuda", 0)
QKV = (3456, 1152, "")
MEASURED = {QKV: ((1000, WIDE),), (1536, 5120, RESIDUAL): (), (64, 64, "gelu_erf"): ((1, SQUARE),)}


@pytest.fixture(autouse=True)
def gpus(tmp_path, monkeypatch):
    """Two Hopper GPUs of one name and one of another, and an empty cache of the user."""
    monkeypatch.setenv("VITGRAPH_CACHE", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    names = [GPU, GPU, OTHER]
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: names[device.index])
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(linear_module, "num_sms", lambda device: 132)
    monkeypatch.setattr(gemm_module, "_gluon_reason", lambda: None)
    forget()
    yield
    forget()


def forget():
    """What a new process starts with."""
    tables._tuning_of_device.cache_clear()
    tables._tuning_of_gpu.cache_clear()


def keep(table, gpu=GPU, few_rows=None, library=None):
    tables = {"gemm": table, "few_rows": few_rows or {}, "library": library or {}}
    return write_tuning(gpu, {name: table_to_json(table) for name, table in tables.items()})


def chosen(M=16384, N=3456, K=1152, device=DEVICE):
    return choose_backend(M, N, K, torch.bfloat16, device, None, False)


def test_without_a_file_the_shipped_table_stands():
    assert tuning(DEVICE).table is TABLE
    assert tuning(DEVICE).path is None
    assert tuning_report(DEVICE) == "shipped"
    assert chosen() == ("hopper", SQUARE)
    assert chosen(M=1000) == ("library", None)


def test_info_tells_of_another_release_of_the_library(monkeypatch):
    for version in (library_tuning.VERSION, None):
        monkeypatch.setattr(cublaslt, "version", lambda version=version: version)
        assert tuning_report(DEVICE) == "shipped"
    monkeypatch.setattr(cublaslt, "version", lambda: "13.9.0")
    assert "here it is 13.9.0" in tuning_report(DEVICE)
    keep(MEASURED)
    forget()
    report = tuning_report(DEVICE)
    assert report.startswith("measured on this GPU")
    assert "here it is 13.9.0" in report
    monkeypatch.setattr(tables, "hopper_reason", lambda device, dtype: "of another kind")
    assert ";" not in tuning_report(DEVICE)  # nothing of it is used there


@pytest.mark.parametrize(
    ("version", "shipped"), [("13.9.9", library_tuning.TABLE), ("14.0.0", {}), ("12.9.1", {})]
)
def test_algorithms_are_of_one_major_release(version, shipped, monkeypatch):
    monkeypatch.setattr(cublaslt, "version", lambda: version)
    assert tuning(DEVICE).library == shipped
    assert tuning(DEVICE).table is TABLE
    forget()
    mine = {(8, 8, ""): ((64, Algorithm(1, 2, 3)),)}
    keep({}, library=mine)
    assert tuning(DEVICE).library == {**shipped, **mine}


def test_measured_entries_stand_before_shipped_ones():
    path = keep(MEASURED)
    assert tuning(DEVICE).table == {**TABLE, **MEASURED}
    assert tuning_report(DEVICE) == f"measured on this GPU: {path}"
    assert chosen(M=1000) == chosen() == ("hopper", WIDE)
    assert chosen(M=999) == ("library", None)
    assert chosen(N=3840, K=1280) == ("hopper", SQUARE)  # shipped
    # an empty entry is the library, also where the rule between measurements would have a tile
    library = choose_backend(65536, 1536, 5120, torch.bfloat16, DEVICE, None, True)
    assert library == ("library", None)
    assert choose_backend(65536, 1536, 5120, torch.bfloat16, DEVICE, None, False)[0] == "hopper"


NARROW = FewRowsConfig(64, 64, num_stages=6)
PROJ = (1152, 1152, RESIDUAL)
GATE = (6912, 1280, GATED)


def test_what_the_user_measured_stands_before_shipped_tiles_of_few_rows():
    assert chosen(M=256) == ("few_rows", few_rows_tile(256, *QKV))
    forget()
    # faster without them at 128 rows, with another one at 256, and no longer at 257
    keep({QKV: ((1, WIDE),)}, few_rows={QKV: ((128, None), (256, NARROW))})
    assert chosen(M=128) == ("hopper", WIDE)
    assert chosen(M=129) == chosen(M=256) == ("few_rows", NARROW)
    assert chosen(M=257) == ("hopper", WIDE)
    shipped = few_rows_tile(256, 3840, 1280, "")
    assert shipped is not None
    assert chosen(M=256, N=3840, K=1280) == ("few_rows", shipped)  # not measured by the user


def test_measured_algorithms_stand_before_shipped_ones():
    mine = {(*QKV[:2], ""): ((64, Algorithm(1, 2, 3)),)}
    keep({}, library=mine)
    assert tuning(DEVICE).library == {**library_tuning.TABLE, **mine}
    before = tuning(DEVICE).fingerprint()
    forget()
    keep({}, library={key: ((65, Algorithm(1, 2, 3)),) for key in mine})
    assert tuning(DEVICE).fingerprint() != before


def test_a_measured_shape_without_tiles_of_few_rows_has_none():
    keep({QKV: ((200, WIDE),)})
    assert chosen(M=199) == ("library", None)
    assert chosen(M=200) == ("hopper", WIDE)


def test_parts_and_gates_go_by_the_users_tiles(monkeypatch):
    weight = SimpleNamespace(
        shape=PROJ[:2], dtype=torch.bfloat16, device=DEVICE, is_cuda=True, itemsize=2,
        data_ptr=lambda: 0, stride=lambda axis: (1152, 1)[axis],
    )  # fmt: skip
    monkeypatch.setattr(gated_module, "num_sms", lambda device: 132)
    wide = FewRowsConfig(64, 128, num_stages=9)

    def gate(M):
        return choose_gated_backend(M, *GATE[:2], torch.bfloat16, DEVICE)

    assert choose_partials(128, weight) == few_rows_tile(128, *PROJ) != NARROW
    assert gate(256) == ("few_rows", few_rows_tile(256, *GATE)) != ("few_rows", wide)
    forget()
    keep({PROJ: (), GATE: ((1, SQUARE),)}, few_rows={PROJ: ((128, NARROW),), GATE: ((256, wide),)})
    assert choose_partials(128, weight) == NARROW
    assert choose_partials(129, weight) is None
    assert gate(256) == ("few_rows", wide)
    assert gate(257) == ("hopper", SQUARE)


def test_the_named_backend_of_few_rows_goes_by_the_users_tiles(monkeypatch):
    taken = []
    monkeypatch.setattr(linear_module, "hopper_reason", lambda device, dtype: None)
    monkeypatch.setattr(linear_module, "tuning", lambda device: tuning(DEVICE))
    monkeypatch.setattr(gated_module, "tuning", lambda device: tuning(DEVICE))
    monkeypatch.setattr(few_rows_module, "launch", lambda *a, config, **k: taken.append(config))
    deep, wide = FewRowsConfig(64, 128, num_stages=9), FewRowsConfig(64, 192, num_stages=6)
    keep({}, few_rows={(64, 64, ""): ((16, wide),), (128, 64, GATED): ((16, deep),)})
    for rows in (16, 17):
        x = torch.zeros(rows, 64, dtype=torch.bfloat16)
        linear_module.linear(x, torch.zeros(64, 64, dtype=x.dtype), backend="few_rows")
    assert taken == [wide, NARROW]
    tiles = [gated_module._tuned_tile("few_rows", M, 128, 64, DEVICE) for M in (16, 17)]
    assert tiles == [deep, FewRowsConfig(64, 128, num_stages=4)]


@pytest.mark.parametrize(
    ("epilogue", "tile", "message"),
    [
        ("", FewRowsConfig(64, 64, 6, splits=3), "tile .* is none that 'bias' runs with"),
        (GATED, NARROW, "tile .* is none that 'swiglu' runs with"),
        ("", FewRowsConfig(64, 64, 14), "tile .* is none that 'bias' runs with"),
        (
            RESIDUAL,
            FewRowsConfig(64, 64, 6, splits=3),
            "tile .* is none that 'residual' runs with",
        ),  # K = 64
    ],
)
def test_a_damaged_entry_of_few_rows_is_refused(epilogue, tile, message):
    keep({}, few_rows={(64, 64, epilogue): ((16, tile),)})
    with pytest.raises(ValueError, match=rf"cannot be used \(entry 0: {message}"):
        chosen()
    write_tuning(GPU, {"gemm": []})
    with pytest.raises(ValueError, match="entries are a NoneType"):
        chosen()


def test_every_shipped_tile_of_few_rows_can_be_stored():
    table = few_rows_tuning.TABLE
    assert few_rows_from_json(json.loads(json.dumps(table_to_json(table)))) == table
    with pytest.raises(ValueError, match="last M 8 does not ascend from 8"):
        few_rows_from_json([entry(tiles=[[8, None], [8, None]])])


def test_the_named_backend_goes_by_the_same_table(monkeypatch):
    keep({(64, 64, ""): ((1, WIDE),)})
    taken = []
    monkeypatch.setattr(linear_module, "hopper_reason", lambda device, dtype: None)
    monkeypatch.setattr(linear_module, "tuning", lambda device: tuning(DEVICE))
    monkeypatch.setattr(linear_module, "gemm", lambda *a, config, **k: taken.append(config))
    x = torch.zeros(16, 64)
    linear_module.linear(x, torch.zeros(64, 64), backend="hopper")
    linear_module.linear(x, torch.zeros(128, 64), backend="hopper")
    assert taken == [WIDE, SQUARE]


def test_each_gpu_has_its_own_table():
    keep(MEASURED)
    assert tuning(torch.device("cuda", 2)).table is TABLE
    assert tuning(torch.device("cpu")).table is TABLE
    assert tuning(torch.device("cuda")) is tuning(torch.device("cuda", 1))
    assert tuning(torch.device("cuda", 1)) is tuning(DEVICE)


def test_the_file_is_read_once_in_a_process(monkeypatch):
    path = keep(MEASURED)
    reads = []
    read = tables.read_tuning
    monkeypatch.setattr(tables, "read_tuning", lambda gpu: (reads.append(gpu), read(gpu))[1])
    first = chosen(M=1000)
    path.unlink()
    assert chosen(M=1000) == first == ("hopper", WIDE)
    # the second GPU of that name was not asked for before the file went
    assert chosen(M=1000, device=torch.device("cuda", 1)) == first
    assert reads == [GPU]
    keep({QKV: ()})
    assert chosen(M=1000) == first
    forget()
    assert chosen() == ("library", None)


def test_a_file_that_comes_later_changes_nothing():
    before = chosen(M=1000)
    keep(MEASURED)
    assert chosen(M=1000) == before == ("library", None)
    assert tuning_report(DEVICE) == "shipped"


def test_threads_that_ask_at_once_get_one_table(monkeypatch):
    keep(MEASURED)
    reads, entered, leave = [], threading.Event(), threading.Event()
    read = tables.read_tuning

    def slow(gpu):
        reads.append(gpu)
        entered.set()
        assert leave.wait(30)
        return read(gpu)

    monkeypatch.setattr(tables, "read_tuning", slow)
    found = []
    ask = lambda index: found.append(tuning(torch.device("cuda", index)))  # noqa: E731
    threads = [threading.Thread(target=ask, args=(index,)) for index in (0, 1)]
    threads[0].start()
    assert entered.wait(30)
    threads[1].start()
    threads[1].join(0.2)  # it waits for the first
    leave.set()
    for thread in threads:
        thread.join(30)
    assert reads == [GPU]
    assert found[0] is found[1]


# the digest, which fingerprints of calibrations hold


def test_the_digest_changes_with_the_table():
    shipped = tuning(DEVICE).digest
    assert tuning(torch.device("cuda", 2)).digest == shipped
    digests = {shipped}
    for table in (MEASURED, {QKV: ((101, WIDE),)}, {QKV: ((100, SQUARE),)}, {QKV: ()}):
        forget()
        keep(table)
        digests.add(tuning(DEVICE).digest)
        # entries in another order are the same table
        forget()
        keep(dict(reversed(table.items())))
        assert tuning(DEVICE).digest in digests
    assert len(digests) == 5
    forget()
    keep({QKV: TABLE[QKV]})
    assert tuning(DEVICE).digest == shipped


def test_the_fingerprint_of_an_encoder_changes_with_the_table(monkeypatch):
    from vitgraph.encoder import recordable
    from vitgraph.encoder.demo import demo_encoder

    encoder = demo_encoder("cpu")
    monkeypatch.setattr(recordable, "tuning", lambda device: tuning(DEVICE))
    shipped = encoder.fingerprint()
    assert encoder.fingerprint() == shipped
    keep(MEASURED)
    assert encoder.fingerprint() == shipped
    forget()
    assert encoder.fingerprint() != shipped


def test_the_fingerprint_of_an_encoder_changes_with_the_table_of_few_rows(monkeypatch):
    from vitgraph.encoder.demo import demo_encoder

    encoder = demo_encoder("cpu")
    shipped = encoder.fingerprint()
    (last, tile), *later = few_rows_tuning.TABLE[QKV]
    for entry in (
        ((last + 1, tile), *later),
        ((last, replace(tile, num_stages=tile.num_stages - 1)), *later),
        (),
    ):
        monkeypatch.setitem(few_rows_tuning.TABLE, QKV, entry)
        assert encoder.fingerprint() != shipped
    monkeypatch.undo()
    assert encoder.fingerprint() == shipped


# the file


def test_a_table_survives_the_file():
    for table in (TABLE, MEASURED, {}):
        assert table_from_json(json.loads(json.dumps(table_to_json(table)))) == table


def test_one_file_for_each_gpu_and_versions(tmp_path, monkeypatch):
    assert cache_folder() == tmp_path
    paths = {tuning_path(GPU), tuning_path(OTHER)}
    assert {path.parent for path in paths} == {tmp_path / "tuning"}
    assert tuning_path(GPU).name.startswith("NVIDIA-Imaginary-80GB-")
    for owner, name, value in (
        (torch, "__version__", "9.9"),
        (tuning_cache.triton, "__version__", "9.9"),
        (torch.version, "cuda", "99.9"),
        (tuning_cache, "FORMAT", 99),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, value)
            paths.add(tuning_path(GPU))
            assert tuning_cache.made_on(GPU) != {}
    assert len(paths) == 6
    monkeypatch.delenv("VITGRAPH_CACHE")
    monkeypatch.setattr(tuning_cache.Path, "home", lambda: tmp_path / "home")
    assert cache_folder() == tmp_path / "home" / ".cache" / "vitgraph"


def test_a_file_is_replaced_whole_or_not_at_all(monkeypatch):
    path = keep(MEASURED)
    written = path.read_text()
    with pytest.raises(ValueError, match="Out of range float"):
        write_tuning(GPU, {"gemm": float("nan")})
    assert path.read_text() == written

    def full(self, text, **options):
        open(self, "w").close()
        raise OSError("no space left")

    with monkeypatch.context() as patch:
        patch.setattr(tuning_cache.Path, "write_text", full)
        with pytest.raises(OSError, match="no space"):
            keep({})
    assert path.read_text() == written
    keep({})
    content = read_tuning(GPU)
    assert content is not None
    assert content["gemm"] == []
    assert content["made_on"]["gpu"] == GPU


def entry(**changes):
    return {"N": 64, "K": 64, "epilogue": "", "tiles": [[1, asdict(SQUARE)]], **changes}


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        (None, "entries are a NoneType instead of a list"),
        ({}, "entries are a dict"),
        ([entry(), 7], "entry 1 does not have N, K, epilogue and tiles"),
        ([{"N": 64, "K": 64}], "entry 0 does not have"),
        ([entry(M=1)], "entry 0 does not have"),
        ([entry(N=63)], "N = 63 and K = 64 must be multiples of 8"),
        ([entry(K=-8)], "multiples of 8"),
        ([entry(K=64.0)], "multiples of 8"),
        ([entry(N=True)], "multiples of 8"),
        ([entry(epilogue="relu")], "epilogue 'relu' is not one of"),
        ([entry(epilogue=["silu"])], r"epilogue \['silu'\] is not one of"),
        ([entry(), entry(tiles=[])], r"entry 1 repeats \(64, 64, ''\)"),
        ([entry(tiles={})], "tiles is a dict instead of a list"),
        ([entry(tiles=[[1]])], r"\[1\] is not \[first M, tile\]"),
        ([entry(tiles=[1])], r"1 is not \[first M, tile\]"),
        ([entry(tiles=[[0, None]])], "is not .first M, tile"),
        ([entry(tiles=[["1", None]])], "is not .first M, tile"),
        ([entry(tiles=[[True, None]])], "is not .first M, tile"),
        ([entry(tiles=[[8, None], [8, asdict(WIDE)]])], "first M 8 does not ascend from 8"),
        ([entry(tiles=[[1, {"block_m": 128}]])], "tile .* is none that 'bias' runs with"),
        ([entry(tiles=[[1, {**asdict(SQUARE), "block_n": 512}]])], "none that 'bias' runs with"),
        ([entry(tiles=[[1, {**asdict(SQUARE), "num_stages": 50}]])], "none that 'bias' runs"),
        ([entry(tiles=[[1, {**asdict(SQUARE), "block_m": 128.0}]])], "none that 'bias' runs"),
        ([entry(tiles=[[1, False]])], "tile false is none"),
        # it has no two equal halves
        ([entry(epilogue=GATED, tiles=[[1, asdict(WIDE)]])], "none that 'swiglu' runs with"),
    ],
)
def test_a_damaged_entry_is_refused_with_the_file_and_the_way_out(entries, message):
    with pytest.raises(ValueError, match=message):
        table_from_json(entries)
    path = write_tuning(GPU, {"gemm": entries, "few_rows": [], "library": []})
    for use in (chosen, lambda: tuning(DEVICE).digest, chosen):  # each time, not only the first
        with pytest.raises(ValueError, match="vitgraph tune") as caught:
            use()
        assert str(path) in str(caught.value)
        assert "delete it" in str(caught.value)
    assert str(path) in tuning_report(DEVICE)
    # the way out, within the same process: nothing has been computed by another table
    path.unlink()
    assert chosen() == ("hopper", SQUARE)


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"\xff\xfe", b'{"gemm": []}', b"[" * 100_000]
)
def test_a_damaged_file_is_refused(content):
    path = keep(MEASURED)
    path.write_bytes(content)
    with pytest.raises(ValueError, match="cannot be used") as caught:
        chosen()
    assert str(path) in str(caught.value)


def test_a_file_of_another_gpu_is_refused():
    copied = keep(MEASURED, OTHER)
    copied.rename(tuning_path(GPU))
    with pytest.raises(ValueError, match=f"'gpu': '{OTHER}'"):
        chosen()


def test_a_folder_in_its_place_is_refused():
    tuning_path(GPU).mkdir(parents=True)
    with pytest.raises(ValueError, match=r"cannot be used .*vitgraph tune"):
        chosen()


def test_a_damaged_file_does_not_keep_info_from_telling(monkeypatch):
    from typer.testing import CliRunner
    from vitgraph.encoder import cli

    monkeypatch.setattr(cli, "_attention_backends", dict)
    monkeypatch.setattr(cli, "_device_name", lambda: GPU)
    result = CliRunner().invoke(cli.app, ["info"])
    assert "launch table of matrix products  shipped\n" in result.stdout
    path = keep(MEASURED)
    forget()
    result = CliRunner().invoke(cli.app, ["info", "--json"])
    assert json.loads(result.stdout)["matrix_products"] == f"measured on this GPU: {path}"
    path.write_text("{")
    forget()
    result = CliRunner().invoke(cli.app, ["info"])
    assert result.exit_code == 0, result.output
    assert f"{path}, the launch table measured on this GPU, cannot be used" in result.stdout


def test_every_shipped_tile_can_be_stored():
    table = {(64, 64, ""): tuple((i + 1, tile) for i, tile in enumerate(SHIPPED))}
    assert table_from_json(table_to_json(table)) == table
