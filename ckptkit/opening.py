"""Opening a checkpoint of any format: recognise it, describe its model, and bring its tensors under canonical names."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from ckptkit.checkpoint import EMBEDDING, Checkpoint
from ckptkit.errors import InputError, UnsupportedError
from ckptkit.families import family_of, recognise
from ckptkit.families.args import from_args, grid_of, model_from_args
from ckptkit.families.config import ModelConfig
from ckptkit.families.table import Family
from ckptkit.formats.hf import HfFiles, has_shards, open_hf, read_shards
from ckptkit.formats.packed import PackedFiles, is_packed, open_packed
from ckptkit.formats.sidecar import Sidecar, read_sidecar
from ckptkit.formats.torch_dist import TorchDistFiles, is_torch_dist, open_torch_dist
from ckptkit.formats.torch_legacy import (
    RankFile,
    RankKey,
    TorchFiles,
    is_torch_legacy,
    iteration_folder,
    open_torch_legacy,
    rank_folder,
)
from ckptkit.io.plan import Comparison
from ckptkit.joining import Problems, join_shards
from ckptkit.sharding.grid import Parallelism


def open_checkpoint(path: str | Path, *, hf_reference: str | Path | None = None) -> Checkpoint:
    """Opens a checkpoint of any format; only headers are read.

    Args:
        path: A Hugging Face directory, a packed directory, or a Megatron checkpoint (its root or one iteration).
        hf_reference: A Hugging Face directory that supplies config.json, tokenizer and shard map; it outranks the
            sidecar.

    Raises:
        InputError: It is damaged, incomplete, or holds tensors that the family does not have.
        UnsupportedError: No family or format of ours.
    """
    path = Path(path)
    if not path.is_dir():
        raise InputError("no such directory" if not path.exists() else "not a directory", where=path)
    reference = None if hf_reference is None else open_hf(Path(hf_reference))
    if has_shards(path) or (path / "config.json").is_file():
        shards = read_shards(path)
        if is_packed(shards.tensors):
            return _open_packed(open_packed(path, shards), reference)
        return _open_hf(open_hf(path, shards))
    folder = iteration_folder(path)
    if is_torch_legacy(folder):
        return _open_torch(open_torch_legacy(folder, path if folder != path else _root(path)), reference)
    if is_torch_dist(folder):
        return _open_torch_dist(open_torch_dist(folder, path if folder != path else _root(path)), reference)
    raise InputError(
        "not a checkpoint that ckptkit knows",
        where=path,
        hint="expected config.json and safetensors, a packed directory, mp_rank_* folders, or a torch_dist folder",
    )


def _root(folder: Path) -> Path:
    """The checkpoint's root, for an iteration folder given directly."""
    return folder if (folder / "ckptkit").is_dir() else folder.parent


def _open_hf(files: HfFiles) -> Checkpoint:
    family = family_of(files.config, files.path / "config.json")
    config = family.parse(files.config)
    items = {item.key: item for item in family.items(config)}
    stored, _ = family.unfuse(files.tensors, config)
    left = dict(stored)
    problems = Problems(files.path)
    tensors = {}
    for key, item in items.items():
        parts = [problems.take(left, name, shape) for name, shape in item.parts.items()]
        if all(part is not None for part in parts):
            tensors[key] = item.pack([part for part in parts if part is not None])
    used = len(stored) - len(left)
    comparisons = []
    for replica in family.replicas:
        if replica.hf in left and replica.when(config) and replica.of in stored:
            what = f"{replica.hf} repeats {replica.of} (tie_word_embeddings is true)"
            comparisons.append(Comparison(left.pop(replica.hf), stored[replica.of], what))
    extras = {name: left.pop(name) for name in sorted(left) if family.is_extra(name, config)}
    _refuse_quantised(files.path, left)
    problems.unknown(left)
    problems.check()
    return Checkpoint(
        path=files.path,
        format="hf",
        family=family,
        config=config,
        sidecar=Sidecar.of_hf(files, extras),
        items=items,
        tensors=tensors,
        spelling=family.spellings[0],
        padded_vocab_size=config.vocab_size,
        comparisons=comparisons,
        coverage={"used": used, "replicas": len(comparisons), "in the sidecar": len(extras)},
        notes=[f"{name} is not part of the model and stays behind" for name in files.ignored],
    )


_QUANTISED = {
    "_scale_inv": "FP8 with block scales",
    ".weight_scale": "FP8 with scales",
    ".qweight": "GPTQ or AWQ",
    ".SCB": "bitsandbytes 8 bit",
    ".absmax": "bitsandbytes 4 bit",
}


def _refuse_quantised(path: Path, names: Iterable[str]) -> None:
    """Names the method of weights that are quantised although config.json does not say so."""
    for name in sorted(names):
        for ending, method in _QUANTISED.items():
            if name.endswith(ending):
                raise UnsupportedError(
                    f"quantised weights ({method}: {name})", where=path, hint="convert from the unquantised model"
                )


@dataclass(frozen=True)
class _Description:
    """What a Megatron checkpoint says of its model, apart from the weights."""

    family: Family
    config: ModelConfig
    sidecar: Sidecar
    notes: list[str]
    disagreements: list[str]


def _describe(
    root: Path, args: Mapping[str, Any], names: set[str], reference: HfFiles | None, vocab_rows: int
) -> _Description:
    """The family, config and sidecar of a Megatron checkpoint: reference first, then sidecar, then `args` alone."""
    sidecar = read_sidecar(root)
    if reference is not None:
        sidecar = Sidecar.of_hf(reference, sidecar.extras if sidecar else {})
    if sidecar is not None:
        family = family_of(sidecar.config, root)
        base = family.parse(sidecar.config)
        config = from_args(args, base)
        differences = _differences(config, base)
        if reference is not None:
            notes = [f"the reference outranks the checkpoint's args: {text}" for text in differences]
            return _Description(family, base, sidecar, notes, [])
        return _Description(family, config, sidecar, [], differences)
    family = recognise(names, args)
    vocab_size = args.get("vocab_size") or vocab_rows
    config = model_from_args(args, family.name, family.architectures[0], vocab_size)
    notes = [
        "config.json is built from the checkpoint's args; tokenizer, generation config and special token ids are"
        " unknown (--hf-reference supplies them)"
    ]
    if not args.get("vocab_size"):
        notes.append(f"the true vocabulary size is unknown: all {vocab_rows} stored rows are kept")
    sidecar = Sidecar(family.unparse(config, {}), {})
    return _Description(family, config, sidecar, notes, [])


def _differences(config: ModelConfig, base: ModelConfig) -> list[str]:
    """Fields in which `args` contradict config.json."""
    texts = []
    for name in (f.name for f in fields(ModelConfig) if f.name not in ("layers", "dtype", "init_std")):
        if getattr(config, name) != getattr(base, name):
            texts.append(f"args say {name} {getattr(config, name)!r}, config.json says {getattr(base, name)!r}")
    if config.num_layers != base.num_layers:
        texts.append(f"args say {config.num_layers} layers, config.json says {base.num_layers}")
    elif config.layers != base.layers:
        new, old = next((a, b) for a, b in zip(config.layers, base.layers, strict=True) if a != b)
        for name in (f.name for f in fields(new) if getattr(new, f.name) != getattr(old, f.name)):
            texts.append(f"args say {name} {getattr(new, name)}, config.json says {getattr(old, name)}")
    return texts


def _open_packed(files: PackedFiles, reference: HfFiles | None) -> Checkpoint:
    """A packed model is a grid of one rank: its one stage numbers layers as the whole model does."""
    ranks = {(0, 0, 0): {"model": files.tensors}}
    return _join(files.path, files.path, "packed", ranks, Parallelism(), files.args, reference)


def _open_torch(files: TorchFiles, reference: HfFiles | None) -> Checkpoint:
    told = grid_of(files.args)
    pp, tp, ep = (1 + max(numbers) for numbers in zip(*files.ranks, strict=True))
    grid = replace(told, tp=max(tp, told.tp), pp=max(pp, told.pp), ep=max(ep, told.ep), vpp=files.chunks)
    stated = [size for size, key in _STATED if key in files.args]
    if any(getattr(grid, size) != getattr(told, size) for size in stated):
        raise InputError(f"args say {told}, the folders make {grid}", where=files.path)
    for rank in grid.ranks():
        if (rank.pp, rank.tp, rank.ep) not in files.ranks:
            name = rank_folder((rank.pp, rank.tp, rank.ep), grid.pp, grid.ep)
            raise InputError(f"{name} is missing (the others make {grid})", where=files.path)
    return _join(files.path, files.root, "torch", files.ranks, grid, files.args, reference)


def _open_torch_dist(files: TorchDistFiles, reference: HfFiles | None) -> Checkpoint:
    """Distributed checkpoints hold whole tensors: they are joined as one rank's, and the grid is what `args` say."""
    ranks = {(0, 0, 0): {"model": files.tensors}}
    checkpoint = _join(files.path, files.root, "torch_dist", ranks, Parallelism(), files.args, reference)
    checkpoint.grid = grid_of(files.args)
    if files.ignored:
        checkpoint.notes.append(f"{len(files.ignored)} tensors of the optimizer are left out")
    return checkpoint


_STATED = (
    ("tp", "tensor_model_parallel_size"),
    ("pp", "pipeline_model_parallel_size"),
    ("ep", "expert_model_parallel_size"),
)


def _join(
    path: Path,
    root: Path,
    format: str,
    ranks: Mapping[RankKey, RankFile],
    grid: Parallelism,
    args: dict[str, Any],
    reference: HfFiles | None,
) -> Checkpoint:
    """A Megatron checkpoint from the files of its ranks."""
    names = {name for chunks in ranks.values() for chunk in chunks.values() for name in chunk}
    about = _describe(root, args, names, reference, _vocab_rows(ranks))
    checkpoint = Checkpoint(
        path=path,
        format=format,
        family=about.family,
        config=about.config,
        sidecar=about.sidecar,
        items={item.key: item for item in about.family.items(about.config)},
        tensors={},
        spelling=about.family.spelling_of(names),
        grid=grid,
        args=args,
        notes=about.notes,
        disagreements=about.disagreements,
    )
    join_shards(checkpoint, ranks)
    return checkpoint


def _vocab_rows(ranks: Mapping[RankKey, RankFile]) -> int:
    """Rows of the stored embedding over all tensor parallel ranks, padding included."""
    rows = {}
    for (_, tp_rank, _), chunks in ranks.items():
        for chunk in chunks.values():
            for name, tensor in chunk.items():
                if name.endswith(EMBEDDING):
                    rows[tp_rank] = tensor.shape[0]
    return sum(rows.values())
