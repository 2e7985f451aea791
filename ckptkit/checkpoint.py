"""An opened checkpoint: whatever its format, the same canonical view, and any rank's shard of it.

Opening reads headers only. The view is one `Tensor` recipe for each item of the family's table, under Megatron's
canonical name with the global layer number and without vocabulary padding. Hugging Face tensors are packed into it,
shards are joined into it; both are slicing, so nothing is loaded.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ckptkit.errors import InputError, UnsupportedError, UsageError
from ckptkit.families import family_of, recognise
from ckptkit.families.args import from_args, grid_of, model_from_args
from ckptkit.families.config import ModelConfig
from ckptkit.families.spelling import Spelling
from ckptkit.families.table import Family, Item
from ckptkit.formats.hf import HfFiles, has_shards, open_hf, read_shards
from ckptkit.formats.packed import is_packed, open_packed
from ckptkit.formats.sidecar import Sidecar, read_sidecar
from ckptkit.formats.torch_legacy import RankFile, TorchFiles, is_torch_legacy, iteration_folder, open_torch_legacy
from ckptkit.io.plan import Comparison
from ckptkit.sharding.grid import Parallelism
from ckptkit.sharding.rules import pad_rows, padded_vocab_size
from ckptkit.sharding.stages import Stage, split_layers, stage_of_layer
from ckptkit.tensors import Tensor, vstack

if TYPE_CHECKING:
    import torch

EMBEDDING, HEAD = "embedding.word_embeddings.weight", "output_layer.weight"
DEFAULT_DIVISIBLE_BY = 128


@dataclass
class Checkpoint:
    """A checkpoint of any format, opened.

    Attributes:
        path: Where it is.
        format: `hf`, `packed` or `torch`.
        family: The family whose table it follows.
        config: What it describes; for Megatron formats stored `args` override the sidecar's config.json.
        sidecar: The Hugging Face side: config.json and small files, headers, tensors without a Megatron slot.
        items: Canonical name -> table item, in table order.
        tensors: Canonical name -> tensor without vocabulary padding.
        grid: The stored grid; 1 x 1 where nothing is sharded.
        spec: How Megatron names are spelled (`te` or `local`); `te` for Hugging Face.
        padded_vocab_size: Rows of the stored embedding.
        args: Megatron's `args`, empty for Hugging Face.
        comparisons: What must be equal for the view to be the whole truth (replicated shards, tied copies).
        coverage: How many stored tensors were used, are replicas, travel in the sidecar, ...
        notes: What a user should know.
        disagreements: Fields in which `args` contradict config.json, as sentences.
    """

    path: Path
    format: str
    family: Family
    config: ModelConfig
    sidecar: Sidecar
    items: dict[str, Item]
    tensors: dict[str, Tensor]
    grid: Parallelism = field(default_factory=Parallelism)
    spec: str = "te"
    padded_vocab_size: int = 0
    args: dict[str, Any] = field(default_factory=dict)
    comparisons: list[Comparison] = field(default_factory=list)
    coverage: dict[str, int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    disagreements: list[str] = field(default_factory=list)

    @property
    def parameters(self) -> int:
        """Number of parameters, each counted once."""
        return sum(tensor.numel for tensor in self.tensors.values())

    def chunk(self, stage: Stage, tp_rank: int, grid: Parallelism, spec: str, divisible_by: int) -> dict[str, Tensor]:
        """The tensors of one model chunk of one rank, under the stage's own layer numbers.

        Args:
            stage: The chunk's stage.
            tp_rank: Tensor parallel rank.
            grid: The grid that the rank belongs to.
            spec: Spelling of the names, `te` or `local`.
            divisible_by: The vocabulary is padded to a multiple of this times the tensor parallel size.

        Raises:
            UsageError: A tensor does not divide over the tensor parallel ranks.
        """
        spelling = self.family.spelling(spec)
        local = {layer: number for number, layer in enumerate(stage.layers)}
        chunk = {}
        for key, item in self.items.items():
            if not _is_on(item, stage):
                continue
            number = None if item.layer is None else local[item.layer]
            name = spelling.written(item.row.megatron.format(i=number))
            chunk[name] = self._cut(key, tp_rank, grid.tp, divisible_by)
        if self.config.tied and stage.last and not stage.first:
            chunk[HEAD] = self._cut(EMBEDDING, tp_rank, grid.tp, divisible_by)
        return chunk

    def _cut(self, key: str, tp_rank: int, tp: int, divisible_by: int) -> Tensor:
        tensor, split = self.tensors[key], self.items[key].row.split
        if split.padded:
            tensor = pad_rows(tensor, padded_vocab_size(tensor.shape[0], divisible_by, tp))
        try:
            return split.cut(tensor, tp_rank, tp)
        except UsageError as error:
            raise UsageError(error.what, where=key, hint=error.hint) from None

    def shard(
        self,
        tp_rank: int = 0,
        tp: int = 1,
        pp_rank: int = 0,
        pp: int = 1,
        vp_stage: int = 0,
        vpp: int = 1,
        *,
        grid: Parallelism | None = None,
        spec: str = "te",
        make_vocab_size_divisible_by: int = DEFAULT_DIVISIBLE_BY,
        padded_vocab_size: int | None = None,
    ) -> dict[str, torch.Tensor]:
        """One rank's tensors, loaded, from any format and for any grid.

        Args:
            tp_rank: Tensor parallel rank, of `tp`.
            tp: Tensor parallel size.
            pp_rank: Pipeline rank, of `pp`.
            pp: Pipeline parallel size.
            vp_stage: Virtual stage (model chunk), of `vpp`.
            vpp: Virtual pipeline size.
            grid: The whole grid instead of `tp`, `pp` and `vpp`, for uneven pipelines.
            spec: `te` or `local` names.
            make_vocab_size_divisible_by: As Megatron-LM's option of that name.
            padded_vocab_size: Rows of the whole embedding, where they are known already; outranks the option above.

        Returns:
            Megatron names with stage-local layer numbers -> CPU tensors in the stored dtype.

        Raises:
            UsageError: The grid cannot hold the model, or the rank is not in it.
        """
        from ckptkit.megatron.loading import load

        grid = grid or Parallelism(tp, pp, vpp)
        check_grid(self.config, grid)
        if not (0 <= tp_rank < grid.tp and 0 <= pp_rank < grid.pp and 0 <= vp_stage < grid.vpp):
            raise UsageError(f"no rank tp {tp_rank}, pp {pp_rank}, virtual stage {vp_stage} in {grid}")
        divisible_by = make_vocab_size_divisible_by
        if padded_vocab_size is not None:
            divisible_by = padded_vocab_size // grid.tp
        stages = {(s.pp_rank, s.vp_stage): s for s in split_layers(self.config.num_layers, grid)}
        chunk = self.chunk(stages[pp_rank, vp_stage], tp_rank, grid, spec, divisible_by)
        return {name: load(tensor) for name, tensor in chunk.items()}


def check_grid(config: ModelConfig, grid: Parallelism) -> None:
    """Whether Megatron-Core can run the model on a grid.

    Raises:
        UsageError: Heads or layers do not divide over it.
    """
    for layer in set(config.layers):
        heads, groups = layer.num_heads, layer.num_kv_heads
        if heads % grid.tp:
            sizes = [size for size in range(1, heads + 1) if heads % size == 0]
            raise UsageError(
                f"{heads} attention heads do not divide over --tp {grid.tp}",
                hint=f"--tp {', '.join(map(str, sizes[:6]))} would",
            )
        if groups % grid.tp and grid.tp % groups:
            raise UsageError(f"{groups} key/value heads and --tp {grid.tp}: one must be a multiple of the other")
    split_layers(config.num_layers, grid)


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
        if is_packed(read_shards(path)[0]):
            return _open_packed(path, reference)
        return _open_hf(open_hf(path))
    folder = iteration_folder(path)
    if is_torch_legacy(folder):
        return _open_torch(open_torch_legacy(folder, path if folder != path else _root(path)), reference)
    raise InputError(
        "not a checkpoint that ckptkit knows",
        where=path,
        hint="expected config.json and safetensors, a packed directory, or mp_rank_* folders",
    )


def _root(folder: Path) -> Path:
    """The checkpoint's root, for an iteration folder given directly."""
    return folder if (folder / "ckptkit").is_dir() else folder.parent


def _open_hf(files: HfFiles) -> Checkpoint:
    family = family_of(files.config, files.path / "config.json")
    config = family.parse(files.config)
    items = {item.key: item for item in family.items(config)}
    left = dict(files.tensors)
    problems = _Problems(files.path)
    tensors = {}
    for key, item in items.items():
        parts = [problems.take(left, name, shape) for name, shape in item.parts.items()]
        if all(part is not None for part in parts):
            tensors[key] = item.pack([part for part in parts if part is not None])
    used = len(files.tensors) - len(left)
    comparisons = []
    for replica in family.replicas:
        if replica.hf in left and replica.when(config) and replica.of in files.tensors:
            what = f"{replica.hf} repeats {replica.of} (tie_word_embeddings is true)"
            comparisons.append(Comparison(left.pop(replica.hf), files.tensors[replica.of], what))
    allowed = {name.format(i=index) for name in family.extras for index in range(config.num_layers)}
    extras = {name: left.pop(name) for name in sorted(left.keys() & allowed)}
    _refuse_quantised(files.path, left)
    problems.unknown(left)
    problems.check()
    coverage = {"used": used, "replicas": len(comparisons), "in the sidecar": len(extras)}
    notes = [f"{name} is not part of the model and stays behind" for name in files.ignored]
    return Checkpoint(
        path=files.path,
        format="hf",
        family=family,
        config=config,
        sidecar=Sidecar.of_hf(files, extras),
        items=items,
        tensors=tensors,
        padded_vocab_size=config.vocab_size,
        comparisons=comparisons,
        coverage=coverage,
        notes=notes,
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
    root: Path, args: Mapping[str, Any], names: Iterable[str], reference: HfFiles | None, vocab_rows: int
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
    family = recognise(names)
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


def _open_packed(path: Path, reference: HfFiles | None) -> Checkpoint:
    """A packed model is a grid of one rank: its one stage numbers layers as the whole model does."""
    files = open_packed(path)
    return _join(path, path, "packed", {(0, 0): {"model": files.tensors}}, Parallelism(), files.args, reference)


def _open_torch(files: TorchFiles, reference: HfFiles | None) -> Checkpoint:
    tp, pp, vpp = files.grid_shape
    grid = replace(grid_of(files.args), tp=tp, pp=pp, vpp=vpp)
    return _join(files.path, files.root, "torch", files.ranks, grid, files.args, reference)


def _join(
    path: Path,
    root: Path,
    format: str,
    ranks: Mapping[tuple[int, int], RankFile],
    grid: Parallelism,
    args: dict[str, Any],
    reference: HfFiles | None,
) -> Checkpoint:
    """The canonical view of shards: each item's shards are found on their stage and joined by the item's rule."""
    names = {name for chunks in ranks.values() for chunk in chunks.values() for name in chunk}
    embeddings = [chunk[EMBEDDING] for chunks in ranks.values() for chunk in chunks.values() if EMBEDDING in chunk]
    about = _describe(root, args, names, reference, sum(shard.shape[0] for shard in embeddings))
    spec = _spec_of(names)
    spelling = about.family.spelling(spec)
    left = {
        (pp_rank, vp_stage, tp_rank): dict(chunk)
        for (pp_rank, tp_rank), chunks in ranks.items()
        for vp_stage, chunk in enumerate(chunks.values())
    }
    checkpoint = Checkpoint(
        path=path,
        format=format,
        family=about.family,
        config=about.config,
        sidecar=about.sidecar,
        items={item.key: item for item in about.family.items(about.config)},
        tensors={},
        grid=grid,
        spec=spec,
        args=args,
        notes=about.notes,
        disagreements=about.disagreements,
    )
    _Joiner(checkpoint, spelling, left).join()
    return checkpoint


class _Joiner:
    """Fills a checkpoint's canonical view from the shards in `left`, which it empties."""

    def __init__(
        self, checkpoint: Checkpoint, spelling: Spelling, left: dict[tuple[int, int, int], dict[str, Tensor]]
    ) -> None:
        self.checkpoint = checkpoint
        self.spelling = spelling
        self.left = left
        self.stored = sum(len(chunk) for chunk in left.values())
        self.problems = _Problems(checkpoint.path)
        self.stages = split_layers(checkpoint.config.num_layers, checkpoint.grid)
        self.home = stage_of_layer(self.stages)

    def join(self) -> None:
        """Joins every item.

        Raises:
            InputError: Shards are missing, unknown or mis-shaped.
        """
        used = 0
        for key, item in self.checkpoint.items.items():
            if (shards := self._shards(item)) is None:
                continue
            used += 1 if item.row.split.replicated else len(shards)
            self._add(key, item, shards)
        self._compare_tied_head()
        self.problems.unknown({name for chunk in self.left.values() for name in chunk})
        self.problems.check()
        self.checkpoint.coverage.update(used=used, replicas=self.stored - used)

    def _stage(self, item: Item) -> tuple[Stage, int | None]:
        if item.layer is not None:
            return self.home[item.layer]
        return next((stage, None) for stage in self.stages if _is_on(item, stage))

    def _shards(self, item: Item) -> list[Tensor] | None:
        stage, number = self._stage(item)
        name = self.spelling.written(item.row.megatron.format(i=number))
        where = f" (layer {item.layer})" if item.layer is not None else ""
        found = [
            self.problems.take(self.left[stage.pp_rank, stage.vp_stage, tp_rank], name, None, where)
            for tp_rank in range(self.checkpoint.grid.tp)
        ]
        shards = [shard for shard in found if shard is not None]
        return shards if len(shards) == len(found) else None

    def _add(self, key: str, item: Item, shards: list[Tensor]) -> None:
        split = item.row.split
        try:
            joined = split.join(shards)
        except (ValueError, UsageError) as error:
            self.problems.wrong.append(f"{key}: its shards do not fit together ({error})")
            return
        if split.padded:
            self.checkpoint.padded_vocab_size = joined.shape[0]
            joined = joined.rows(0, min(joined.shape[0], item.shape[0]))
        if joined.shape != item.shape:
            self.problems.wrong.append(f"{key} is {list(joined.shape)}, the config says {list(item.shape)}")
            return
        if split.replicated:
            for tp_rank, copy in enumerate(shards[1:], 1):
                what = f"{key} on tensor parallel ranks 0 and {tp_rank}"
                self.checkpoint.comparisons.append(Comparison(shards[0], copy, what))
        self.checkpoint.tensors[key] = joined

    def _compare_tied_head(self) -> None:
        """A tied model at PP > 1 stores the embedding again on the last stage; Megatron trains the two as one."""
        last = next(stage for stage in self.stages if stage.last)
        if not self.checkpoint.config.tied or EMBEDDING not in self.checkpoint.tensors:
            return
        copies = [
            self.left[last.pp_rank, last.vp_stage, tp_rank].pop(HEAD, None)
            for tp_rank in range(self.checkpoint.grid.tp)
        ]
        stored = [copy for copy in copies if copy is not None]
        if len(stored) == len(copies):
            head = vstack(stored)
            rows = min(head.shape[0], self.checkpoint.config.vocab_size)
            what = "output_layer.weight of the last stage and the tied embedding"
            embedding = self.checkpoint.tensors[EMBEDDING]
            self.checkpoint.comparisons.append(Comparison(head.rows(0, rows), embedding, what))
        elif stored or not last.first:
            self.problems.missing.append(f"{HEAD} (the tied copy on the last stage)")


class _Problems:
    """Everything wrong with the tensors of a checkpoint, said in one line."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.missing: list[str] = []
        self.wrong: list[str] = []
        self.extra: list[str] = []

    def take(
        self, tensors: dict[str, Tensor], name: str, shape: tuple[int, ...] | None, where: str = ""
    ) -> Tensor | None:
        """Removes and returns a tensor of `shape` (None: any), or notes what is wrong with it."""
        tensor = tensors.pop(name, None)
        if tensor is None:
            self.missing.append(name + where)
        elif shape is not None and tensor.shape != shape:
            self.wrong.append(f"{name} is {list(tensor.shape)}, the config says {list(shape)}")
        else:
            return tensor
        return None

    def unknown(self, names: Iterable[str]) -> None:
        """Notes tensors that nothing asked for."""
        self.extra.extend(sorted(names))

    def check(self) -> None:
        """Raises what was noted.

        Raises:
            InputError: Anything was.
        """
        parts = [
            f"{len(names)} {label}: {', '.join(names[:3])}{', ...' if len(names) > 3 else ''}"
            for names, label in (
                (self.missing, "missing"),
                (self.wrong, "of the wrong shape"),
                (self.extra, "unknown to this family"),
            )
            if names
        ]
        if parts:
            raise InputError(f"tensors and config disagree: {'; '.join(parts)}", where=self.path)


def _is_on(item: Item, stage: Stage) -> bool:
    """Whether a stage holds an item: layers by number, the embedding first, norm and head last."""
    if item.layer is not None:
        return item.layer in stage.layers
    return stage.first if item.key == EMBEDDING else stage.last


def _spec_of(names: Iterable[str]) -> str:
    """`local` if the norms before attention and MLP stand alone, as Megatron's local spec writes them."""
    return (
        "local"
        if any(name.endswith((".input_layernorm.weight", ".pre_mlp_layernorm.weight")) for name in names)
        else "te"
    )
