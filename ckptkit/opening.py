"""Opening a checkpoint of any format: recognise it, describe its model, and bring its tensors under canonical names."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from ckptkit.checkpoint import Checkpoint, most_common_dtype
from ckptkit.errors import CkptkitError, InputError, UnsupportedError, UsageError
from ckptkit.families import family_of, recognise, refuse_foreign
from ckptkit.families.args import contradictions, from_args, grid_of, model_from_args
from ckptkit.families.config import ModelConfig
from ckptkit.families.known_args import GRID_ARGS, read_args
from ckptkit.families.table import Family
from ckptkit.formats.dcp import is_dcp
from ckptkit.formats.dcp_state import open_dcp_state
from ckptkit.formats.fsdp import is_fsdp, open_fsdp
from ckptkit.formats.grouped_experts import ungrouped_experts
from ckptkit.formats.hf import HfFiles, open_hf, open_reference, read_json, read_shards
from ckptkit.formats.module_state import ModuleState
from ckptkit.formats.packed import PackedFiles, is_packed, open_packed
from ckptkit.formats.sidecar import Sidecar, read_sidecar
from ckptkit.formats.torch_dist import TorchDistFiles, is_torch_dist, open_torch_dist, ungrouped, without_group
from ckptkit.formats.torch_legacy import (
    OptimizerState,
    RankFile,
    RankKey,
    TorchFiles,
    is_torch_legacy,
    open_torch_legacy,
    rank_folder,
)
from ckptkit.hybrid import as_gpt, holds_hybrid
from ckptkit.io.plan import Comparison
from ckptkit.io.source import Seen
from ckptkit.joining import Problems, join_shards
from ckptkit.locating import Place, find_place, is_hf_like
from ckptkit.run_config import args_of_run_config
from ckptkit.sharding.grid import Parallelism, StatedGrid
from ckptkit.tensors import DTYPES
from ckptkit.vocabulary import Vocabulary, stored_vocabulary


def open_checkpoint(
    path: str | Path,
    *,
    hf_reference: str | Path | None = None,
    iteration: int | None = None,
    stored_grid: StatedGrid | None = None,
    vocab_size: int | None = None,
) -> Checkpoint:
    """Opens a checkpoint of any format; only headers are read.

    Args:
        path: A Hugging Face directory, a packed directory, a Megatron checkpoint (its root or one iteration), verl's
            `actor` folder, or a directory of torch.distributed.checkpoint with a Hugging Face model.
        hf_reference: A Hugging Face directory that supplies config.json, tokenizer and shard map; it outranks the
            sidecar. It need not hold weights.
        iteration: Number of the iteration, if `path` is the root of several.
        stored_grid: The grid of `mp_rank_*` files whose `args` do not say it.
        vocab_size: The true size of the vocabulary, where nothing else tells it from its padding.

    Raises:
        InputError: It is damaged, incomplete, or holds tensors that the family does not have.
        UnsupportedError: No family or format of ours.
        UsageError: What is said of it contradicts what it says itself, or has no meaning for it.
    """
    place = find_place(Path(path), iteration)
    reference = place.reference if hf_reference is None else Path(hf_reference)
    around = [place.root / "ckptkit", *([] if reference is None else [reference])]
    seen = Seen.of(place.folder, *(folder for folder in around if folder.is_dir()))
    files = None if reference is None else _complete(open_reference(reference))[0]
    given = _Given(files, stored_grid or StatedGrid(), vocab_size)
    checkpoint = _open(place, given)
    if files is not None:
        _take_extras(checkpoint, files)
    checkpoint.seen = seen
    if hf_reference is None and place.reference is not None:
        there = place.reference.relative_to(place.root).name or "the folder itself"
        checkpoint.notes.append(f"config and tokenizer are those of {there}")
    if checkpoint.format != "torch" and given.grid.sizes():
        raise UsageError(f"the --src sizes are about mp_rank files, and this is {checkpoint.format}", where=path)
    if vocab_size not in (None, checkpoint.config.vocab_size):
        told = f"--vocab-size {vocab_size}, but the checkpoint says {checkpoint.config.vocab_size}"
        raise UsageError(told, where=path, hint="drop --vocab-size")
    return checkpoint


def _take_extras(checkpoint: Checkpoint, reference: HfFiles) -> None:
    """Adds the reference's tensors that have no place in Megatron, unless the checkpoint has them itself."""
    held, family = checkpoint.sidecar.extras, checkpoint.family
    taken = {
        name: tensor
        for name, tensor in sorted(reference.tensors.items())
        if name not in held and family.is_extra(name, checkpoint.config)
    }
    if taken:
        checkpoint.sidecar = replace(checkpoint.sidecar, extras={**held, **taken})
        checkpoint.coverage["of the reference"] = len(taken)
        some = ", ".join(list(taken)[:3])
        checkpoint.notes.append(f"{len(taken)} of the tensors come from the reference, not the checkpoint: {some}")


@dataclass(frozen=True)
class _Given:
    """What the user says of a Megatron checkpoint."""

    reference: HfFiles | None
    grid: StatedGrid
    vocab_size: int | None


def _open(place: Place, given: _Given) -> Checkpoint:
    folder = place.folder
    if is_hf_like(folder):
        shards = read_shards(folder)
        if is_packed(shards.tensors):
            return _open_packed(open_packed(folder, shards), given)
        if given.reference is not None:
            raise UsageError("a Hugging Face directory takes no reference", where=folder, hint="drop --hf-reference")
        return open_hf_files(open_hf(folder, shards))
    if is_torch_legacy(folder):
        return _open_torch(open_torch_legacy(folder, place.root, pp=given.grid.pp, ep=given.grid.ep), given)
    if is_torch_dist(folder):
        return _open_torch_dist(open_torch_dist(folder, place.root), given)
    if is_dcp(folder):
        return _open_state(open_dcp_state(folder), given)
    if is_fsdp(folder):
        return _open_state(open_fsdp(folder), given)
    raise InputError(
        "not a checkpoint that ckptkit knows",
        where=folder,
        hint="expected config.json and safetensors, a packed directory, mp_rank_* folders, a torch_dist folder, or"
        " shards of FSDP",
    )


def _complete(files: HfFiles) -> tuple[HfFiles, list[str]]:
    """A directory whose config.json describes the model by itself, and notes; older layouts leave some of it to others.

    Raises:
        InputError: Something about the model cannot be known.
    """
    family = family_of(files.config, files.path / "config.json")
    if family.complete is None:
        return files, []

    def read(path: str) -> dict[str, Any] | None:
        places = (files.path / path / "config.json", Path(path) / "config.json")
        return next((read_json(place) for place in places if place.is_file()), None)

    shapes = {name: tensor.shape for name, tensor in files.tensors.items()}
    with _located(files.path):
        config, notes = family.complete(files.config, shapes, read)
    return replace(files, config=config), notes


def open_hf_files(files: HfFiles) -> Checkpoint:
    """Opens what a Hugging Face directory holds, or what would be in one.

    Raises:
        InputError: Tensors are missing, mis-shaped or unknown.
        UnsupportedError: No family for its architecture, or the weights are quantised.
    """
    files, notes = _complete(files)
    family = family_of(files.config, files.path / "config.json")
    config = family.parse(files.config)
    items = {item.key: item for item in family.items(config)}
    stored, _ = family.unfuse(files.tensors, config)
    left = dict(stored)
    dtype = most_common_dtype(stored.values()) if stored else DTYPES["F32"]
    problems = Problems(files.path)
    tensors = {}
    for key, item in items.items():
        parts = [problems.take(left, name, shape) for name, shape in item.parts.items()]
        held = {slot.hf: problems.take(left, slot.hf, slot.shape) for slot in item.slots if slot.hf in left}
        unused = {name: tensor for name, tensor in held.items() if name is not None and tensor is not None}
        if all(part is not None for part in parts):
            tensors[key] = item.pack([part for part in parts if part is not None], unused, dtype)
    used = len(files.tensors) - len(left)
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
        notes=[*notes, *(f"{name} is not part of the model and stays behind" for name in files.ignored)],
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
    root: Path, args: Mapping[str, Any], names: set[str], given: _Given, vocabulary: Vocabulary
) -> _Description:
    """The family, config and sidecar of a Megatron checkpoint: reference first, then sidecar, then `args` alone."""
    sidecar, reference = read_sidecar(root), given.reference
    if reference is not None:
        sidecar = Sidecar.of_hf(reference, sidecar.extras if sidecar else {})
    if sidecar is not None:
        family = family_of(sidecar.config, root)
        base = family.parse(sidecar.config)
        with _located(root):
            config = from_args(args, base)
        differences = [*_differences(config, base), *_contradictions(args, base)]
        cut, notes = _compare_vocabulary(base.vocab_size, given.vocab_size, vocabulary.told)
        if reference is None:
            return _Description(family, config, sidecar, notes, [*differences, *cut])
        if cut:  # a reference outranks words about the weights, not the weights
            hint = f"give one with the right vocab_size, or --vocab-size {base.vocab_size} if the others are no tokens"
            raise InputError(f"{cut[0]}: weights would be lost", where=root, hint=hint)
        notes += [f"the reference outranks the checkpoint's args: {text}" for text in differences]
        return _Description(family, base, sidecar, notes, [])
    with _located(root):
        return _describe_by_args(root, args, names, given, vocabulary)


def _compare_vocabulary(size: int, stated: int | None, told: int | None) -> tuple[list[str], list[str]]:
    """Contradictions between config.json and `args` about the number of tokens, and notes.

    Args:
        size: What config.json says.
        stated: What the user says, or None.
        told: What `args` say, or None.
    """
    if told in (None, size):
        return [], []
    text = f"args say vocab_size {told}, config.json says {size}"
    if told is not None and told > size:
        return ([text], []) if stated != size else ([], [f"{text}, which --vocab-size confirms"])
    return [], [f"{text}: all its rows are kept"]  # of many a released model, more than its tokenizer has tokens


def _describe_by_args(
    root: Path, args: Mapping[str, Any], names: set[str], given: _Given, vocabulary: Vocabulary
) -> _Description:
    """The description of a checkpoint that nobody else describes."""
    family, rows = recognise(names, args), vocabulary.rows
    if given.vocab_size is not None and not 0 < given.vocab_size <= rows:
        raise UsageError(f"--vocab-size {given.vocab_size}, but {rows} rows are stored", where=root)
    vocab_size = vocabulary.size(given.vocab_size, root)
    config = model_from_args(args, family.name, family.architectures[0], vocab_size)
    notes = [
        "config.json is built from the checkpoint's args; tokenizer, generation config and special token ids are"
        " unknown (--hf-reference supplies them)"
    ]
    if vocabulary.told is None and given.vocab_size is None:
        notes.append(f"the true vocabulary size is unknown: all {rows} stored rows are kept (--vocab-size supplies it)")
    if vocabulary.told not in (None, vocab_size):
        notes.append(f"--vocab-size {vocab_size} outranks the checkpoint's args, which say {vocabulary.told}")
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


def _contradictions(args: Mapping[str, Any], base: ModelConfig) -> list[str]:
    """Arguments with which Megatron-LM computes something else than the model of config.json."""
    return [
        f"args say {name} {stored!r}, config.json means {expected!r}"
        for name, stored, expected in contradictions(args, base)
    ]


@contextmanager
def _located(where: Path) -> Iterator[None]:
    """Names the place in errors that do not."""
    try:
        yield
    except CkptkitError as error:
        raise type(error)(error.what, where=error.where or where, hint=error.hint) from None


def _open_packed(files: PackedFiles, given: _Given) -> Checkpoint:
    """A packed model is a grid of one rank: its one stage numbers layers as the whole model does."""
    ranks = {(0, 0, 0): {"model": files.tensors}}
    return _join(files.path, files.path, "packed", ranks, Parallelism(), _args(files.args, files.path), given)


def _args(stored: Mapping[str, Any], where: Path) -> dict[str, Any]:
    with _located(where):
        return read_args(stored)


def _open_torch(files: TorchFiles, given: _Given) -> Checkpoint:
    files = replace(files, args=_args(files.args, files.path))
    told = _stated(files, given.grid)
    pp, tp, ep = (1 + max(numbers) for numbers in zip(*files.ranks, strict=True))
    grid = replace(told, tp=max(tp, told.tp), pp=max(pp, told.pp), ep=max(ep, told.ep), vpp=files.chunks)
    for names, who in (
        ({name for name in ("tp", "pp", "ep") if GRID_ARGS[name] in files.args}, "args"),
        (given.grid.sizes(), "--src"),
    ):
        if any(getattr(grid, name) != getattr(told, name) for name in names):
            kind = InputError if who == "args" else UsageError
            raise kind(f"{who} say {told}, the folders make {grid}", where=files.path)
    for rank in grid.ranks():
        if (rank.pp, rank.tp, rank.ep) not in files.ranks:
            name = rank_folder((rank.pp, rank.tp, rank.ep), grid.pp, grid.ep)
            raise InputError(f"{name} is missing (the others make {grid})", where=files.path)
    with _located(files.path):
        ranks = ungrouped_experts(files.ranks)
    checkpoint = _join(files.path, files.root, "torch", ranks, grid, files.args, given)
    if not files.args:
        checkpoint.notes.append(f"there are no args: that the grid is {grid} is read off the folders and --src sizes")
    _leave_out(checkpoint, files.optimizer)
    return checkpoint


def _stated(files: TorchFiles, given: StatedGrid) -> Parallelism:
    """The grid that `args` tell, with what somebody says where they are silent.

    Raises:
        UsageError: Both speak, and differ.
    """
    with _located(files.path):
        told = grid_of(files.args)
    for name, size in given.sizes().items():
        said = told.expert_tp if name == "etp" else getattr(told, name)
        if files.args.get(GRID_ARGS[name]) is not None and said != size:
            option = f"--src-{name.replace('_', '-')}"
            raise UsageError(f"{option} {size}, but args say {said}", where=files.path, hint=f"drop {option}")
    sizes: dict[str, Any] = {**given.sizes()}
    return replace(told, **sizes)


def _open_torch_dist(files: TorchDistFiles, given: _Given) -> Checkpoint:
    """Distributed checkpoints hold whole tensors: they are joined as one rank's, and the grid is what `args` say."""
    ranks = {(0, 0, 0): {"model": files.tensors}}
    stored, notes = _dist_args(files, given)
    args = _args(stored, files.path)
    checkpoint = _join(files.path, files.root, "torch_dist", ranks, Parallelism(), args, given, stacked=files.stacked)
    checkpoint.notes += notes
    try:
        checkpoint.grid = grid_of(args)
    except UnsupportedError as error:
        checkpoint.notes.append(f"{error.what}; the tensors are whole all the same")
    _leave_out(checkpoint, files.optimizer)
    return checkpoint


def _dist_args(files: TorchDistFiles, given: _Given) -> tuple[dict[str, Any], list[str]]:
    """`args`, or what run_config.yaml says in their place, and notes; a reference outranks what is not supported."""
    if files.args:
        return files.args, []
    try:
        return args_of_run_config(files.path), []
    except UnsupportedError as error:
        if given.reference is None:
            raise
        return {}, [f"the reference outranks run_config.yaml: {error.what}"]


def _open_state(state: ModuleState, given: _Given) -> Checkpoint:
    """The state of a bare module: whole tensors under Hugging Face's names, or those of a packed model."""
    reference = given.reference
    if reference is None:
        raise UsageError(
            "the state of a bare module does not say which model it is",
            where=state.path,
            hint="give --hf-reference with the model's config.json",
        )
    if adapters := sorted(key for key in state.tensors if ".lora_" in key):
        hint = "merge them into the weights with peft (merge_and_unload) before they are saved"
        raise UnsupportedError(f"LoRA adapters beside the weights ({adapters[0]})", where=state.path, hint=hint)
    tensors = state.named(lambda names: max(_known(names, reference), sum(is_packed((name,)) for name in names)))
    if is_packed(tensors):
        ranks = {(0, 0, 0): {"model": tensors}}
        checkpoint = _join(state.path, state.path, state.format, ranks, Parallelism(), {}, given)
    else:
        checkpoint = open_hf_files(replace(reference, path=state.path, tensors=tensors, ignored=[]))
        checkpoint.format = state.format
    checkpoint.comparisons += state.comparisons
    checkpoint.coverage["replicas"] = checkpoint.coverage.get("replicas", 0) + len(state.comparisons)
    checkpoint.notes += [*state.notes, *_state_notes(checkpoint)]
    _leave_out(checkpoint, state.optimizer)
    return checkpoint


def _known(names: set[str], reference: HfFiles) -> int:
    """How many of these names a model has, however its experts are stored."""
    family = family_of(reference.config, reference.path / "config.json")
    config = family.parse(reference.config)
    canonical = [name for item in family.items(config) for name in item.parts]
    return max(len(names & spelling.names(canonical, config)) for spelling in family.hf_spellings)


def _state_notes(checkpoint: Checkpoint) -> list[str]:
    """Where a module's state is not all that its reference says of the model."""
    notes = []
    if checkpoint.config.dtype not in (None, dtype := checkpoint.main_dtype):
        told = checkpoint.config.dtype
        notes.append(f"the weights are {dtype}, config.json says {told} (--dtype {told} converts them)")
    return notes


def _leave_out(checkpoint: Checkpoint, optimizer: OptimizerState) -> None:
    checkpoint.optimizer = optimizer
    if optimizer:
        count = f"{optimizer.tensors:,} tensor{'s' * (optimizer.tensors != 1)}, " if optimizer.tensors else ""
        size = f"{count}{optimizer.nbytes:,} bytes"
        checkpoint.notes.append(f"the optimizer's state ({size}) is left out")


def _join(
    path: Path,
    root: Path,
    format: str,
    ranks: Mapping[RankKey, RankFile],
    grid: Parallelism,
    args: dict[str, Any],
    given: _Given,
    *,
    stacked: bool = False,
) -> Checkpoint:
    """A Megatron checkpoint from the files of its ranks; `stacked` says whether its layers were."""
    stored_grid, hybrid = grid, holds_hybrid(ranks)
    if hybrid:
        ranks, args = as_gpt(ranks, args, path)
        grid = Parallelism(tp=grid.tp, ep=grid.ep, etp=grid.etp)
    names = {without_group(name) for chunks in ranks.values() for chunk in chunks.values() for name in chunk}
    refuse_foreign(names, path)
    vocabulary = stored_vocabulary(ranks, args)
    about = _describe(root, args, names, given, vocabulary)
    if about.family.attention_of is not None:
        groups = [about.family.attention_of(layer) for layer in about.config.layers]
        ranks = {
            rank: {chunk: ungrouped(tensors, groups, stacked, path) for chunk, tensors in chunks.items()}
            for rank, chunks in ranks.items()
        }
    checkpoint = Checkpoint(
        path=path,
        format=format,
        family=about.family,
        config=about.config,
        sidecar=about.sidecar,
        items={item.key: item for item in about.family.items(about.config)},
        tensors={},
        spelling=about.family.spelling_of(names, about.config),
        grid=grid,
        args=args,
        notes=about.notes,
        disagreements=about.disagreements,
    )
    size, most = about.config.vocab_size, vocabulary.padded(about.config.vocab_size)
    join_shards(checkpoint, ranks, None if given.vocab_size == size else most)
    if vocabulary.rows > most:
        checkpoint.notes.append(f"{vocabulary.rows - size} rows beyond --vocab-size {size} are left out")
    checkpoint.grid = stored_grid
    if hybrid:
        checkpoint.notes.append("its tensors are those of Megatron-Core's HybridModel")
    return checkpoint
