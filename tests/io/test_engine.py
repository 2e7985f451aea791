"""The engine writes what the algebra says, whatever the buffers, the threads and the faults."""

from __future__ import annotations

import hashlib
import os
import stat
import threading
import zlib
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ckptkit.dtypes import DTYPES
from ckptkit.errors import InputError, StorageError, UnsupportedError
from ckptkit.io import engine, faults
from ckptkit.io.engine import MEMORY_LIMIT, compare, hash_tensor, read_tensor, run
from ckptkit.io.plan import Comparison, OutputFile, Plan, literal
from ckptkit.io.schedule import Limits, Schedule, tensor_units
from ckptkit.io.segments import Checksum, Segment
from ckptkit.tensors import Tensor, hstack, vstack
from tests.test_tensors import FILE, Pair, pairs

U8, F16, F32, BF16 = (DTYPES[name] for name in ("U8", "F16", "F32", "BF16"))
TINY = [
    Limits(staging=8, scratch=8, direct=16, extent=8),
    Limits(staging=24, scratch=64, direct=1 << 30),
    Limits(staging=64, scratch=16, direct=8, extent=16),
    Limits(),
]
limits = st.sampled_from(TINY)
SLOW = Limits(staging=4096, scratch=4096)


@pytest.fixture(scope="module", autouse=True)
def source(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The file that the random tensors read, in the current directory."""
    directory = tmp_path_factory.mktemp("source")
    before = Path.cwd()
    os.chdir(directory)
    (directory / "file").write_bytes(FILE.tobytes())
    yield directory
    os.chdir(before)


def written(plan: Plan, directory: Path, **options: object) -> dict[str, bytes]:
    run(plan, directory, **options)  # type: ignore[arg-type]
    return {file.path: (directory / file.path).read_bytes() for file in plan.files}


def as_float32(array: np.ndarray) -> bytes:
    with np.errstate(all="ignore"):
        single = array.view(np.float16).astype(np.float32)
    bits = single.view(np.uint32).copy()
    bits[np.isnan(single)] |= np.uint32(0x400000)
    return bits.tobytes()


@settings(max_examples=200)
@given(pairs(), limits, st.booleans())
def test_read_tensor(pair: Pair, limits: Limits, cast: bool) -> None:
    tensor, array = pair
    expected = as_float32(array) if cast else array.tobytes()
    data = read_tensor(tensor.astype(F32) if cast else tensor, limits=limits)
    assert data.flags.writeable
    assert (data.dtype, data.shape) == (np.uint8, (len(expected),))
    assert data.tobytes() == expected


@settings(max_examples=150)
@given(st.data(), limits, st.integers(1, 3))
def test_run(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject, limits: Limits, threads: int) -> None:
    files: list[OutputFile] = []
    expected: dict[str, bytes] = {}
    for index in range(data.draw(st.integers(1, 3))):
        segments, content = [], bytearray()
        for tensor, array in data.draw(st.lists(pairs(), max_size=4)):
            content += bytes(data.draw(st.integers(0, 9)))
            cast = data.draw(st.booleans())
            segments.append(Segment(len(content), tensor.astype(F32) if cast else tensor))
            content += as_float32(array) if cast else array.tobytes()
        content += bytes(data.draw(st.integers(0, 9)))
        files.append(OutputFile(f"{index}/f", len(content), tuple(segments)))
        expected[f"{index}/f"] = bytes(content)
    seen: list[int] = []
    plan = Plan(tuple(files))
    directory = tmp_path_factory.mktemp("out")
    assert written(plan, directory, threads=threads, limits=limits, progress=seen.append) == expected
    assert sum(seen) == plan.nbytes


@settings(max_examples=100)
@given(st.data(), limits, st.integers(1, 3))
def test_column_shards(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject, limits: Limits, threads: int
) -> None:
    """Outputs that take columns of the same rows are written by shared units."""
    rows, width = data.draw(st.integers(2, 12)), data.draw(st.integers(2, 12))
    cuts = sorted({0, width, *data.draw(st.lists(st.integers(0, width), max_size=4))})
    dropped = data.draw(st.integers(0, len(cuts)))  # a shard that nobody takes leaves a hole in the rows
    cast = data.draw(st.booleans())
    array = FILE[7 : 7 + rows * width].reshape(rows, width)
    tensor = Tensor.from_file("file", 14, F16, (rows, width))
    files, expected = [], {}
    for index, (left, right) in enumerate(pairwise(cuts)):
        if index == dropped:
            continue
        shard = tensor.cols(left, right)
        columns = np.ascontiguousarray(array[:, left:right])
        content = as_float32(columns) if cast else columns.tobytes()
        segment = Segment(3, shard.astype(F32) if cast else shard)
        files.append(OutputFile(f"{index}", 3 + len(content), (segment,)))
        expected[f"{index}"] = bytes(3) + content
    directory = tmp_path_factory.mktemp("out")
    assert written(Plan(tuple(files)), directory, threads=threads, limits=limits) == expected


def test_column_shards_read_the_source_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensor = Tensor.from_file("file", 0, F16, (64, 32))
    shards = [tensor.cols(4 * rank, 4 * rank + 4) for rank in range(8)]
    plan = Plan(tuple(OutputFile(f"{rank}", 512, (Segment(0, shard),)) for rank, shard in enumerate(shards)))
    read: list[int] = []

    def preadv(fd: int, buffers: list[memoryview], offset: int) -> int:
        read.append(os.preadv(fd, buffers, offset))
        return read[-1]

    monkeypatch.setattr(faults, "reader", lambda: preadv)
    run(plan, tmp_path)
    assert sum(read) == tensor.nbytes


@settings(max_examples=60)
@given(st.data(), limits, st.integers(1, 3))
def test_checksums(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject, limits: Limits, threads: int) -> None:
    content, segments, sums = bytearray(), [], []
    for tensor, array in data.draw(st.lists(pairs(), min_size=1, max_size=4)):
        start = len(content) + 8
        segments.append(Segment(start, tensor))
        content += bytes(8) + array.tobytes()
        sums.append((start, len(content)))
    checksums = tuple(Checksum(start, stop, (start - 8, start - 4)) for start, stop in sums)
    for start, stop in sums:
        content[start - 8 : start] = zlib.crc32(content[start:stop]).to_bytes(4, "little") * 2
    plan = Plan((OutputFile("f", len(content), tuple(segments), checksums),))
    assert written(plan, tmp_path_factory.mktemp("out"), threads=threads, limits=limits)["f"] == content
    hashes = run(plan, tmp_path_factory.mktemp("out"), threads=threads, limits=limits, hash=True).hashes
    assert hashes == {"f": hashlib.sha256(content).hexdigest()}


@pytest.mark.parametrize("threads", [1, 2, 4])
def test_large_runs(tmp_path: Path, threads: int) -> None:
    """Real buffer sizes: kernel copies, columns, side by side, and checksums over several units."""
    random = np.random.default_rng(1)
    array = random.integers(0, 256, (2500, 4000), np.uint8)
    (tmp_path / "big").write_bytes(array.tobytes())
    whole = Tensor.from_file(str(tmp_path / "big"), 0, U8, array.shape)
    swapped = hstack([whole.cols(3000, 4000), whole.cols(0, 3000)])
    halves = [whole.cols(0, 2000), whole.cols(2000, 4000)]
    checked = OutputFile("checked", 4 + array.size, (Segment(4, swapped),), (Checksum(4, 4 + array.size, (0,)),))
    plan = Plan(
        (
            OutputFile("copy", array.size, (Segment(0, whole),)),
            checked,
            *(OutputFile(f"half{i}", array.size // 2, (Segment(0, half),)) for i, half in enumerate(halves)),
        )
    )
    result = written(plan, tmp_path / "out", threads=threads)
    assert result["copy"] == array.tobytes()
    turned = np.hstack([array[:, 3000:], array[:, :3000]]).tobytes()
    assert result["checked"] == zlib.crc32(turned).to_bytes(4, "little") + turned
    assert result["half0"] == array[:, :2000].tobytes()
    assert result["half1"] == array[:, 2000:].tobytes()


def test_wide_sparse_rows_are_read_one_by_one(tmp_path: Path) -> None:
    array = np.random.default_rng(2).integers(0, 256, (20, 100_000), np.uint8)
    (tmp_path / "wide").write_bytes(array.tobytes())
    column = Tensor.from_file(str(tmp_path / "wide"), 0, U8, array.shape).cols(500, 700)
    assert read_tensor(column).tobytes() == array[:, 500:700].tobytes()


def test_kernel_copy_falls_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: int) -> int:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(faults, "writer", lambda: (os.pwrite, refuse))
    plan = Plan((OutputFile.copy("f", "file", 8192),))
    assert written(plan, tmp_path, limits=Limits(staging=64, direct=64))["f"] == FILE.tobytes()


def test_small_files_modes_and_hashes(tmp_path: Path) -> None:
    plan = Plan((OutputFile.small("a/b/c", b"text"), OutputFile.small("empty", b""), OutputFile("zeros", 10, ())))
    mask = os.umask(0o027)
    try:
        result = run(plan, tmp_path, hash=True)
    finally:
        os.umask(mask)
    assert stat.S_IMODE((tmp_path / "a/b/c").stat().st_mode) == 0o640
    contents = {"a/b/c": b"text", "empty": b"", "zeros": bytes(10)}
    assert result.hashes == {path: hashlib.sha256(data).hexdigest() for path, data in contents.items()}
    assert (result.written, result.kept) == (14, 0)


def test_hash_tensor() -> None:
    tensor = Tensor.from_file("file", 0, F16, (64, 32)).cols(3, 9)
    assert hash_tensor(tensor) == hashlib.sha256(FILE[:2048].reshape(64, 32)[:, 3:9].tobytes()).hexdigest()


class TestUnits:
    def test_bounded_and_lazy(self) -> None:
        """A plan for 100 TB makes its first units at once, and none is larger than a buffer."""
        huge = Tensor.from_file("f", 0, BF16, (1 << 20, 50_000_000))
        units = tensor_units(huge.cols(0, 1 << 18), Limits())
        assert all(next(units).size <= Limits().staging for _ in range(100))

    def test_neighbours_in_the_source_are_one_copy(self) -> None:
        first, second = Tensor.from_file("f", 8, U8, (3 << 20,)), Tensor.from_file("f", 8 + (3 << 20), U8, (2 << 20,))
        file = OutputFile("o", 5 << 20, (Segment(0, first), Segment(3 << 20, second)))
        schedule = Schedule([file], [0], Limits())
        units = list(iter(lambda: schedule.next(0), None))
        assert [(unit.direct, unit.size) for unit in units] == [(True, 5 << 20)]

    def test_many_small_tensors_are_one_write(self) -> None:
        tensors = [Tensor.from_file("f", 1000 * i, U8, (10,)) for i in range(500)]
        file = OutputFile("o", 5000, tuple(Segment(10 * i, tensor) for i, tensor in enumerate(tensors)))
        schedule = Schedule([file], [0], Limits())
        assert [unit.size for unit in iter(lambda: schedule.next(0), None)] == [5000]

    def test_a_file_has_few_workers(self) -> None:
        """Writers to one file wait for each other, so workers go to other files, and what is too much gets nothing."""
        files = [OutputFile(name, 40 << 20, (Segment(0, Tensor.full(U8, (40, 1 << 20))),)) for name in "ab"]
        schedule = Schedule(files, [0, 1], Limits())
        units = [schedule.next(worker) for worker in range(8)]
        assert [unit and unit.writes[0].file for unit in units] == [0, 1, 0, 1, 0, 1, None, None]
        rest = [list(iter(lambda: schedule.next(worker), None)) for worker in range(8)]  # noqa: B023
        assert sum(unit.size for units in (units, *rest) for unit in units if unit) == 80 << 20
        assert schedule.next(7) is None


class TestComparisons:
    tensor = Tensor.from_file("file", 0, F16, (40, 16))

    @pytest.mark.parametrize("limits", TINY)
    def test_equal(self, tmp_path: Path, limits: Limits) -> None:
        (tmp_path / "copy").write_bytes(FILE[:640].tobytes())
        copy = Tensor.from_file(str(tmp_path / "copy"), 0, F16, (40, 16))
        compare(Comparison(self.tensor, copy, "both"), limits=limits)
        compare(Comparison(self.tensor.cols(0, 3), copy.cols(0, 3), "columns"), limits=limits)
        compare(Comparison(self.tensor, hstack([copy.cols(0, 3), copy.cols(3, 16)]), "bands"), limits=limits)

    @pytest.mark.parametrize("limits", TINY)
    @pytest.mark.parametrize("element", [0, 1, 77, 639])
    def test_first_difference_is_named(self, tmp_path: Path, limits: Limits, element: int) -> None:
        other = FILE[:640].copy()
        other[element:] ^= 1 << 8
        (tmp_path / "copy").write_bytes(other.tobytes())
        copy = Tensor.from_file(str(tmp_path / "copy"), 0, F16, (40, 16))
        for right in (copy, hstack([copy.cols(0, 5), copy.cols(5, 16)])):
            with pytest.raises(InputError, match=f"the norms: .*differ first at element {element} of 640"):
                compare(Comparison(self.tensor, right, "the norms"), limits=limits)

    def test_other_shape(self) -> None:
        with pytest.raises(InputError, match=r"F16\[40, 16\] and F16\[16, 40\]"):
            compare(Comparison(self.tensor, self.tensor.reshape((16, 40)), "x"))

    def test_failing_comparison_stops_the_run(self, tmp_path: Path) -> None:
        comparison = Comparison(self.tensor.rows(0, 1), self.tensor.rows(1, 2), "rows")
        plan = Plan((OutputFile.small("f", b"x"),), (comparison,))
        with pytest.raises(InputError, match="rows: "):
            run(plan, tmp_path)

    def test_counted(self, tmp_path: Path) -> None:
        half = self.tensor.rows(0, 20)
        assert run(Plan((), (Comparison(half, half, "same"),)), tmp_path).compared == half.nbytes


class TestPlanChecks:
    @pytest.mark.parametrize("path", ["../x", "/x", "a/../../x", "", ".", "a//b", "a/", "./a", "a\0b"])
    def test_paths_that_leave_the_directory(self, tmp_path: Path, path: str) -> None:
        with pytest.raises(InputError, match="cannot have this name"):
            run(Plan((OutputFile.small(path, b"x"),)), tmp_path / "out")
        assert not list(tmp_path.iterdir())

    def test_two_files_of_one_name(self, tmp_path: Path) -> None:
        with pytest.raises(InputError, match="cannot have this name"):
            run(Plan((OutputFile.small("a", b"x"), OutputFile.small("a", b"y"))), tmp_path)

    def test_casts(self, tmp_path: Path) -> None:
        tensor = Tensor.full(DTYPES["F8_E4M3"], (4,)).astype(BF16)
        with pytest.raises(UnsupportedError, match="F8_E4M3"):
            run(Plan((OutputFile("f", 8, (Segment(0, tensor),)),)), tmp_path)

    @pytest.mark.parametrize(
        "file",
        [
            OutputFile("f", 10, (Segment(0, literal(b"12345")), Segment(4, literal(b"123")))),
            OutputFile("f", 4, (Segment(0, literal(b"12345")),)),
            OutputFile("f", 10, (), (Checksum(0, 6, (4,)),)),
            OutputFile("f", 10, (), (Checksum(0, 4, (7,)),)),
            OutputFile("f", 10, (), (Checksum(0, 11, (4,)),)),
            OutputFile("f", 30, (), (Checksum(0, 11, (20,)), Checksum(10, 12, (24,)))),
        ],
    )
    def test_mistakes_of_a_planner(self, file: OutputFile) -> None:
        with pytest.raises(ValueError, match="f: "):
            Plan((file,)).check()


class TestSources:
    def test_missing(self, tmp_path: Path) -> None:
        with pytest.raises(InputError, match="the source file is gone"):
            run(Plan((OutputFile.copy("f", str(tmp_path / "none"), 10),)), tmp_path / "out")

    @pytest.mark.parametrize("columns", [False, True])
    def test_shorter_than_planned(self, tmp_path: Path, columns: bool) -> None:
        (tmp_path / "short").write_bytes(bytes(3 << 20))
        tensor = Tensor.from_file(str(tmp_path / "short"), 0, U8, (4, 1 << 20))
        tensor = tensor.cols(0, 100) if columns else tensor
        with pytest.raises(InputError, match="the file ends before byte"):
            run(Plan((OutputFile("f", tensor.nbytes, (Segment(0, tensor),)),)), tmp_path / "out")

    def test_truncated_while_reading(self, tmp_path: Path) -> None:
        size = 8 << 20
        (tmp_path / "big").write_bytes(bytes(size))
        column = Tensor.from_file(str(tmp_path / "big"), 0, U8, (size >> 10, 1 << 10)).cols(0, 1000)
        plan = Plan((OutputFile("f", column.nbytes, (Segment(0, column),)),))
        with pytest.raises(InputError, match="truncated"):
            cut = lambda _: os.truncate(tmp_path / "big", size // 2)  # noqa: E731
            run(plan, tmp_path / "out", threads=1, progress=cut, limits=SLOW)


class TestFaults:
    column = Tensor.from_file("file", 0, F16, (64, 64)).cols(0, 32)
    plan = Plan((OutputFile.copy("a", "file", 8192), OutputFile("b", 4096, (Segment(0, column),))))
    expected: ClassVar = {"a": FILE.tobytes(), "b": FILE.reshape(64, 64)[:, :32].tobytes()}

    @pytest.mark.parametrize("at", [0, 1, 100, 4096, 8000, 12287])
    @pytest.mark.parametrize("limits", [TINY[1], TINY[2]])
    @pytest.mark.parametrize(
        ("kind", "error", "message"),
        [
            ("enospc", StorageError, "no space left on the device"),
            ("eio", StorageError, "input/output error"),
            ("read-eio", StorageError, "input/output error"),
            ("read-end", InputError, "the file ends before byte"),
        ],
    )
    def test_errors(
        self, tmp_path: Path, kind: str, error: type[Exception], message: str, at: int, limits: Limits
    ) -> None:
        if kind.startswith("read") and limits.direct < 8192:
            at //= 4  # what the kernel copies is not read by us
        before = threading.active_count()
        with faults.inject(f"{kind}:{at}"), pytest.raises(error, match=message):
            run(self.plan, tmp_path, limits=limits)
        assert threading.active_count() == before

    @pytest.mark.parametrize("at", [1, 7, 64, 5000])
    @pytest.mark.parametrize("limits", TINY)
    def test_short_writes_are_completed(self, tmp_path: Path, at: int, limits: Limits) -> None:
        with faults.inject(f"short:{at}"):
            assert written(self.plan, tmp_path, limits=limits) == self.expected

    def test_none_without_being_asked(self, tmp_path: Path) -> None:
        assert faults.reader() is os.preadv
        assert faults.writer()[0] is os.pwrite
        assert written(self.plan, tmp_path) == self.expected

    def test_by_environment(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv(faults.VARIABLE, "enospc:100")
        with pytest.raises(StorageError, match="no space"):
            run(self.plan, tmp_path)

    @pytest.mark.parametrize("spec", ["", "enospc", "enospc:", "enospc:rename", "flood:7", "read-eio:rename"])
    def test_unknown(self, spec: str) -> None:
        with pytest.raises(Exception, match="unknown fault"), faults.inject(spec):
            pass

    def test_interrupt_stops_the_threads(self, tmp_path: Path) -> None:
        def interrupt(_: int) -> None:
            raise KeyboardInterrupt

        before = threading.active_count()
        with pytest.raises(KeyboardInterrupt):
            run(self.plan, tmp_path, progress=interrupt, limits=TINY[0])
        assert threading.active_count() == before


@pytest.mark.parametrize("threads", [4, 40])
def test_memory_does_not_grow(tmp_path: Path, threads: int) -> None:
    """Peak of anonymous memory while 192 MiB pass, most of it rearranged and cast."""
    size = 64 << 20
    with open(tmp_path / "big", "wb") as file:
        file.truncate(size)
    whole = Tensor.from_file(str(tmp_path / "big"), 0, BF16, (4096, size >> 13))
    parts = [vstack([whole.rows(64, 4096), whole.rows(0, 64)]), whole.cols(0, 4096), whole.cols(4096, 8192).astype(F32)]
    plan = Plan(tuple(OutputFile(f"{i}", part.nbytes, (Segment(0, part),)) for i, part in enumerate(parts)))
    before, peak = anonymous(), 0

    def sample(_: int) -> None:
        nonlocal peak
        peak = max(peak, anonymous())

    engine.run(plan, tmp_path / "out", threads=threads, progress=sample, hash=True)
    assert peak - before < MEMORY_LIMIT


def anonymous() -> int:
    """Anonymous memory of this process in bytes."""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) << 10 for line in status if line.startswith("RssAnon"))
