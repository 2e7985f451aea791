"""The container against torch.distributed.checkpoint itself, and damaged or hostile ones."""

from __future__ import annotations

import io
import os
import pickle
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ckptkit.dtypes import DTYPES
from ckptkit.errors import CkptkitError, InputError, UnsupportedError
from ckptkit.formats.dcp.chunks import ChunkError
from ckptkit.formats.dcp.reading import METADATA, DcpFiles, open_dcp
from ckptkit.formats.dcp.writing import NewChunk, NewObject, lay_out_dcp
from ckptkit.tensors import Const, Tensor
from tests.formats.torch_file.torch_files import as_torch, contents, torch_bytes, write_out

torch = pytest.importorskip("torch")
dcp = pytest.importorskip("torch.distributed.checkpoint")

F32, BF16 = DTYPES["F32"], DTYPES["BF16"]
WEIGHT = torch.arange(48, dtype=torch.float32).reshape(6, 8)
BIAS = torch.arange(5, dtype=torch.bfloat16)


def from_torch(tensor: Any) -> Tensor:
    dtype = {torch.float32: F32, torch.bfloat16: BF16, torch.int64: DTYPES["I64"]}[tensor.dtype]
    return Tensor.from_bytes(torch_bytes(tensor), dtype, tuple(tensor.shape))


def write(folder: Path) -> Path:
    """A checkpoint with a tensor of four chunks in two files, one of a single chunk, and an object."""
    chunks = [
        NewChunk(
            "weight",
            (row, column),
            from_torch(WEIGHT[row : row + 3, column : column + 4]),
            (f"__{row // 3}_0.distcp",),
        )
        for row in (0, 3)
        for column in (0, 4)
    ]
    chunks.append(NewChunk("bias", (0,), from_torch(BIAS), ("__0_0.distcp",)))
    objects = [NewObject("object", b"anything at all", "__1_0.distcp")]
    for file in lay_out_dcp("", {"weight": (6, 8), "bias": (5,)}, chunks, objects):
        write_out(file, folder)
    return folder


def change(folder: Path, edit: Callable[[Any], None]) -> DcpFiles:
    """Lets torch's own classes change `.metadata`, and opens the folder again."""
    metadata = pickle.loads((folder / METADATA).read_bytes())
    edit(metadata)
    (folder / METADATA).write_bytes(pickle.dumps(metadata))
    return open_dcp(folder)


def move(metadata: Any, fqn: str, **changes: Any) -> None:
    """Changes where the first chunk of a tensor (or an object) is stored."""
    index = next(index for index in metadata.storage_data if index.fqn == fqn)
    metadata.storage_data[index] = replace(metadata.storage_data[index], **changes)


def refuses(action: Callable[[], object], match: str, kind: type[CkptkitError] = InputError) -> None:
    with pytest.raises(kind, match=match) as raised:
        action()
    assert "\n" not in str(raised.value)


def test_what_we_write_comes_back(tmp_path: Path) -> None:
    files = open_dcp(write(tmp_path))
    assert torch.equal(as_torch(files.tensor("weight")), WEIGHT)
    assert torch.equal(as_torch(files.tensor("bias")), BIAS)
    assert files.object_bytes("object") == b"anything at all"
    assert [index for index, _ in files.parts("weight", 1)] == [(row,) for row in range(6)]
    assert all(contents(part) == torch_bytes(WEIGHT[row]) for (row,), part in files.parts("weight", 1))
    refuses(lambda: list(files.parts("bias", 2)), r"bias is \[5\], not a stack")


def test_torch_loads_what_we_write(tmp_path: Path) -> None:
    write(tmp_path)
    state = {"weight": torch.zeros(6, 8), "bias": torch.zeros(5, dtype=torch.bfloat16)}
    dcp.load(state, checkpoint_id=tmp_path, no_dist=True)
    assert torch.equal(state["weight"], WEIGHT)
    assert torch.equal(state["bias"], BIAS)


def test_every_archive_is_sound(tmp_path: Path) -> None:
    files = open_dcp(write(tmp_path))
    for stored in files.tensors.values():
        for chunk in stored.chunks:
            span = chunk.span
            data = (tmp_path / span.file).read_bytes()[span.offset : span.offset + span.length]
            assert zipfile.ZipFile(io.BytesIO(data)).testzip() is None
            assert tuple(torch.load(io.BytesIO(data), weights_only=True).shape) == chunk.sizes


def test_we_read_what_torch_writes(tmp_path: Path) -> None:
    state = {
        "model": {"weight": WEIGHT, "bias": BIAS, "step": torch.tensor(7), "empty": torch.zeros(0, 3)},
        "list": ["a", 1],
        "view": WEIGHT.t(),
    }
    dcp.save(state, checkpoint_id=tmp_path, no_dist=True)
    files = open_dcp(tmp_path)
    for key, tensor in state["model"].items():
        assert torch.equal(as_torch(files.tensor(f"model.{key}")), tensor)
    assert files.object("list") == ["a", 1]
    refuses(lambda: files.tensor("view"), r"tensor view does not lie row by row")


def test_casts_are_written(tmp_path: Path) -> None:
    chunk = NewChunk("weight", (0, 0), from_torch(WEIGHT).astype(BF16), ("__0_0.distcp",))
    for file in lay_out_dcp("", {"weight": (6, 8)}, [chunk]):
        write_out(file, tmp_path)
    assert torch.equal(as_torch(open_dcp(tmp_path).tensor("weight")), WEIGHT.to(torch.bfloat16))


def test_equal_input_gives_equal_bytes(tmp_path: Path) -> None:
    write(tmp_path / "a")
    write(tmp_path / "b")
    names = sorted(item.name for item in (tmp_path / "a").iterdir())
    assert names == [METADATA, "__0_0.distcp", "__1_0.distcp"]
    assert all((tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes() for name in names)


def test_chunks_that_do_not_fit_are_not_written() -> None:
    part = from_torch(WEIGHT[:3])
    for chunks, match in (
        ([NewChunk("weight", (0, 0), part, ("f",))], "leave holes"),
        ([NewChunk("weight", (0, 0), part, ("f",)), NewChunk("weight", (0, 0), part, ("f",))], "overlap|holes"),
        ([], "no chunks"),
    ):
        with pytest.raises(ChunkError, match=match):
            lay_out_dcp("", {"weight": (6, 8)}, chunks)
    mixed = [NewChunk("weight", (0, 0), part, ("f",)), NewChunk("weight", (3, 0), part.astype(BF16), ("f",))]
    with pytest.raises(InputError, match="weight would be of several types: BF16, F32"):
        lay_out_dcp("", {"weight": (6, 8)}, mixed)


def test_data_starts_aligned() -> None:
    chunks = [NewChunk("weight", (row, 0), Tensor.full(F32, (1, 3)), ("f",)) for row in range(5)]
    file, _ = lay_out_dcp("", {"weight": (5, 3)}, chunks, [NewObject("object", b"x", "f")])
    starts = [s.offset for s in file.segments if isinstance(s.tensor.bands[0].pieces[0], Const)]
    assert len(starts) == 5
    assert all(start % 64 == 0 for start in starts)


class Evil:
    """Creates a file when it is unpickled by something that runs code."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


def test_a_pickle_that_would_run_code_does_not(tmp_path: Path) -> None:
    write(tmp_path)
    (tmp_path / METADATA).write_bytes(pickle.dumps({"state_dict_metadata": Evil(tmp_path / "ran")}))
    refuses(lambda: open_dcp(tmp_path), r"names \w+\.mkdir.*nothing was run")
    assert not (tmp_path / "ran").exists()


def test_an_object_that_would_run_code_does_not(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    torch.save([Evil(tmp_path / "ran")], buffer)
    write(tmp_path)
    with (tmp_path / "__1_0.distcp").open("ab") as file:
        offset = file.tell()
        file.write(buffer.getvalue())
    files = change(tmp_path, lambda m: move(m, "object", offset=offset, length=len(buffer.getvalue())))
    refuses(lambda: files.object("object"), "nothing was run")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("path", ["../outside.distcp", "sub/../../outside.distcp", "", "__0_0.distcp\0"])
def test_paths_outside_the_folder(tmp_path: Path, path: str) -> None:
    folder = write(tmp_path / "checkpoint")
    (tmp_path / "outside.distcp").write_bytes((folder / "__0_0.distcp").read_bytes())
    files = change(folder, lambda m: move(m, "weight", relative_path=path))
    refuses(lambda: files.tensor("weight"), "outside the folder")
    assert torch.equal(as_torch(files.tensor("bias")), BIAS)


def test_absolute_paths_and_links_outside_the_folder(tmp_path: Path) -> None:
    folder = write(tmp_path / "checkpoint")
    files = change(folder, lambda m: move(m, "weight", relative_path=str(folder / "__0_0.distcp")))
    refuses(lambda: files.tensor("weight"), "outside the folder")
    (folder / "__1_0.distcp").rename(tmp_path / "elsewhere")
    (folder / "__1_0.distcp").symlink_to(tmp_path / "elsewhere")
    files = change(folder, lambda m: move(m, "weight", relative_path="__0_0.distcp"))
    refuses(lambda: files.tensor("weight"), "a symbolic link out of the folder")
    refuses(lambda: files.object_bytes("object"), "a symbolic link out of the folder")


def test_a_folder_that_is_a_link_itself_is_fine(tmp_path: Path) -> None:
    write(tmp_path / "checkpoint")
    (tmp_path / "link").symlink_to(tmp_path / "checkpoint")
    assert torch.equal(as_torch(open_dcp(tmp_path / "link").tensor("weight")), WEIGHT)


def chunks_of(metadata: Any) -> Any:
    return metadata.state_dict_metadata["weight"].chunks


def overlap(metadata: Any) -> None:
    """The last chunk lies over the one before it, and is stored for that place."""
    chunks_of(metadata)[-1] = replace(chunks_of(metadata)[-2])


def hole(metadata: Any) -> None:
    del chunks_of(metadata)[0]


def outside(metadata: Any) -> None:
    metadata.state_dict_metadata["weight"].size = torch.Size([5, 8])


def larger(metadata: Any) -> None:
    metadata.state_dict_metadata["weight"].size = torch.Size([6, 1 << 50])


def lost(metadata: Any) -> None:
    metadata.storage_data = {index: info for index, info in metadata.storage_data.items() if index.fqn != "weight"}


@pytest.mark.parametrize(
    ("edit", "match"),
    [
        (overlap, "tensor weight: its chunks overlap|tensor weight: its chunks leave holes"),
        (hole, "tensor weight: its chunks leave holes: they hold 36 elements, the tensor has 48"),
        (outside, r"tensor weight: a chunk at \[3, 0\] of size \[3, 4\] does not lie inside \[5, 8\]"),
        (larger, "tensor weight: its chunks leave holes"),
    ],
)
def test_chunks_that_do_not_make_up_the_tensor(tmp_path: Path, edit: Callable[[Any], None], match: str) -> None:
    files = change(write(tmp_path), edit)
    refuses(lambda: files.tensor("weight"), match)
    assert torch.equal(as_torch(files.tensor("bias")), BIAS)


def test_a_file_cut_short_or_missing(tmp_path: Path) -> None:
    files = open_dcp(write(tmp_path))
    file = tmp_path / "__0_0.distcp"
    whole = file.read_bytes()
    file.write_bytes(whole[:-1])
    refuses(lambda: files.tensor("bias"), r"__0_0\.distcp: bytes [\d,]+ to [\d,]+ are wanted, the file has")
    file.write_bytes(whole[:500])
    refuses(lambda: open_dcp(tmp_path).tensor("weight"), "are wanted, the file has 500")
    file.unlink()
    refuses(lambda: open_dcp(tmp_path).tensor("weight"), r"is in __0_0\.distcp, which is missing")


def test_damage_in_any_chunk_is_found_though_chunks_of_a_kind_are_read_quickly(tmp_path: Path) -> None:
    files = open_dcp(write(tmp_path))
    second = files.tensors["weight"].chunks[1].span
    whole = (tmp_path / second.file).read_bytes()

    def tampered(at: int) -> DcpFiles:
        data = bytearray(whole)
        data[at] ^= 0xFF
        (tmp_path / second.file).write_bytes(data)
        return open_dcp(tmp_path)

    pickle_at = whole.index(b"_rebuild_tensor", second.offset)
    end = second.offset + second.length
    for at in (second.offset, pickle_at, end - 22, end - 12, end - 98):
        refuses(lambda at=at: tampered(at).tensor("weight"), "damaged|not a file|truncated")
    data_at = whole.index(torch_bytes(WEIGHT[:3, 4:]), second.offset)
    assert contents(tampered(data_at).tensor("weight")) != torch_bytes(WEIGHT)


def test_a_chunk_of_another_dtype_or_shape_or_kind(tmp_path: Path) -> None:
    files = open_dcp(write(tmp_path))
    bias, weight = files.tensors["bias"].chunks[0].span, files.tensors["weight"].chunks[0].span
    files = change(tmp_path, lambda m: move(m, "bias", offset=weight.offset, length=weight.length))
    refuses(lambda: files.tensor("bias"), r"holds F32\[3, 4\] where \.metadata says bias has BF16\[5\]")
    files = change(tmp_path, lambda m: move(m, "weight", offset=bias.offset, length=bias.length))
    refuses(lambda: files.tensor("weight"), r"holds BF16\[5\] where")
    buffer = io.BytesIO()
    torch.save(["no tensor"], buffer)
    with (tmp_path / "__0_0.distcp").open("ab") as file:
        offset = file.tell()
        file.write(buffer.getvalue())
    files = change(tmp_path, lambda m: move(m, "weight", offset=offset, length=len(buffer.getvalue())))
    refuses(lambda: files.tensor("weight"), r"holds no tensor where \.metadata says weight is")


def test_what_is_stored_through_an_extension_is_unsupported(tmp_path: Path) -> None:
    files = change(write(tmp_path), lambda m: move(m, "weight", transform_descriptors=["stream.zstd"]))
    refuses(lambda: files.tensor("weight"), r"weight is stored through stream\.zstd", UnsupportedError)


def test_foreign_dtypes_are_unsupported_only_where_they_are_needed(tmp_path: Path) -> None:
    def foreign(metadata: Any) -> None:
        metadata.state_dict_metadata["bias"].properties.dtype = torch.complex128

    files = change(write(tmp_path), foreign)
    refuses(lambda: files.tensor("bias"), "tensor bias has elements of type torch.complex128", UnsupportedError)
    assert torch.equal(as_torch(files.tensor("weight")), WEIGHT)


def test_metadata_that_contradicts_itself(tmp_path: Path) -> None:
    write(tmp_path)
    good = (tmp_path / METADATA).read_bytes()
    refuses(lambda: change(tmp_path, lost), r"does not say where weight \(the chunk at \[0, 0\]\) is stored")
    for data, match in (
        (b"", "the file is empty"),
        (good[:-40], "pickle is damaged"),
        (b"not a pickle", "not a pickle"),
        (pickle.dumps({}, 2), "in place of an object"),
        (good.replace(b"state_dict_metadata", b"state_dict_metadatA"), "no metadata"),
        (good.replace(b"BytesStorageMetadata", b"ChunkStorageMetadata"), "describes object as a ChunkStorageMetadata"),
        (good.replace(b"relative_path", b"relative_pith"), "at no place of a file"),
        (good.replace(b"sizes", b"sizez"), r"describes sizes that are none \(a NoneType\)"),
    ):
        (tmp_path / METADATA).write_bytes(data)
        refuses(lambda: open_dcp(tmp_path), match)
    (tmp_path / METADATA).unlink()
    refuses(lambda: open_dcp(tmp_path), "no such file")


def test_sizes_that_are_no_sizes(tmp_path: Path) -> None:
    def negative(metadata: Any) -> None:
        move(metadata, "weight", offset=-5)

    write(tmp_path)
    refuses(lambda: change(tmp_path, negative), "weight at no place of a file")


def test_the_old_spelling_of_properties_is_read(tmp_path: Path) -> None:
    from torch.distributed._shard.sharded_tensor.metadata import TensorProperties

    def old(metadata: Any) -> None:
        metadata.state_dict_metadata["weight"].properties = TensorProperties(dtype=torch.float32)

    assert torch.equal(as_torch(change(write(tmp_path), old).tensor("weight")), WEIGHT)
