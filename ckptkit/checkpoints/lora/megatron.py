"""The adapter in a Megatron checkpoint, with or without the model's weights beside it."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ckptkit.checkpoints.checkpoint import Checkpoint, is_on
from ckptkit.checkpoints.config_fields import differing_fields, in_words
from ckptkit.checkpoints.description import Given, located
from ckptkit.checkpoints.joining import Shards, join_shards
from ckptkit.checkpoints.locating import Place
from ckptkit.checkpoints.lora.dora import lengths_in, unlike_peft
from ckptkit.checkpoints.lora.layouts import Canonical, Found, Record, canonical
from ckptkit.checkpoints.lora.places import names_in_memory
from ckptkit.checkpoints.lora.record import Lora
from ckptkit.checkpoints.lora.sources import Alpha, find_alpha, has_record, read_record
from ckptkit.errors import InputError, UnsupportedError, UsageError
from ckptkit.families import family_of
from ckptkit.formats.json_files import read_json
from ckptkit.formats.peft import CONFIG
from ckptkit.formats.peft_config import AdapterConfig, alpha_for, raw_config
from ckptkit.formats.sidecar import OF_ADAPTER, Sidecar, read_sidecar
from ckptkit.formats.torch_dist import ungrouped
from ckptkit.formats.torch_legacy import RankFile, RankKey
from ckptkit.io.plan import Comparison
from ckptkit.megatron_args.reading import from_args
from ckptkit.sharding.grid import Parallelism
from ckptkit.sharding.rules import COLUMN, GATED_COLUMN, expert_home
from ckptkit.sharding.stages import split_layers, stage_of_layer
from ckptkit.tables.bounds import check_adapted
from ckptkit.tables.family import Family
from ckptkit.tables.items import Item
from ckptkit.tables.lora import A, B, fused, is_linear, magnitudes, part_of, single, stored_layouts
from ckptkit.tables.model_config import ModelConfig
from ckptkit.tables.spelling import Spelling
from ckptkit.tensors import Tensor, stack, vstack

ADAPTER, MODEL = "adapter", "model"
"""The parts of a checkpoint that holds both."""

_NAME = re.compile(
    r"(?P<module>.+)\.(?P<middle>adapter\.(?:adapter_\w+\.)?linear_(?:in|out)|lora_[AB]\.(?P<name>\w+))\.weight(?P<expert>\d*)"
)
_BASE_LAYER = re.compile(r"\.(?:base_layer|to_wrap)\.(?=(?:weight|bias|layer_norm_weight)\d*$)")
_MAGNITUDE = ".adapter.weight_magnitude"
"""End of the name that `DoRA` of Megatron-Bridge has for the lengths of rows."""
_EXPERTS = re.compile(r".+\.experts\.linear_fc[12]")
_HALVED = (".adapter.adapter_gate.linear_out.weight", ".adapter.adapter_up.linear_out.weight")
_RANK_BY_RANK = (_MAGNITUDE, ".lora_B.default.weight")
"""Ends of names in distributed checkpoints, see `stored_form`; experts have another end."""

HOW_TO_TAKE = (
    "`ckptkit adapter merge` puts them into the weights, `ckptkit adapter export` takes them out, and `ckptkit convert"
    " --part model` takes the weights"
)
"""What to do with an adapter beside the weights."""

Ranks = Mapping[RankKey, RankFile]


def is_adapter_name(name: str) -> bool:
    """Whether a Megatron name is that of a tensor of an adapter."""
    return _NAME.fullmatch(name) is not None or name.endswith(_MAGNITUDE)


def only_part(ranks: Ranks, part: str) -> dict[RankKey, RankFile]:
    """The adapter of a checkpoint alone, or its model alone under the names that it has without an adapter."""
    wanted = part == ADAPTER
    return {
        rank: {
            chunk: {
                _BASE_LAYER.sub(".", name): tensor
                for name, tensor in tensors.items()
                if is_adapter_name(name) is wanted
            }
            for chunk, tensors in chunks.items()
        }
        for rank, chunks in ranks.items()
    }


def choose_part(ranks: Ranks, given: Given, where: Path) -> tuple[Ranks, bool]:
    """The tensors that are wanted, and whether they are an adapter.

    Raises:
        InputError: The checkpoint does not hold what is wanted.
        UnsupportedError: It holds a model and an adapter, and nothing says which is wanted.
    """
    names = _names_in(ranks)
    factors = {name for name in names if is_adapter_name(name)}
    if given.part == ADAPTER and not factors:
        raise InputError("no adapter in it", where=where, hint="expected names such as linear_qkv.adapter.linear_in")
    if not factors:
        return ranks, False
    if given.part is not None:
        return only_part(ranks, given.part), given.part == ADAPTER
    if len(factors) < len(names):
        raise UnsupportedError(
            f"adapters of Megatron beside the weights ({min(factors)})",
            where=where,
            hint=HOW_TO_TAKE,
        )
    return ranks, True


def read_megatron(
    place: Place,
    format: str,
    ranks: Ranks,
    grid: Parallelism,
    args: Mapping[str, Any],
    given: Given,
    *,
    stacked: bool = False,
    stored: Parallelism | None = None,
) -> Checkpoint:
    """The adapter in the shards of a Megatron checkpoint.

    Args:
        place: Where it is.
        format: `torch` or `torch_dist`.
        ranks: The factors of each rank.
        grid: The grid that the ranks make up.
        args: Megatron's arguments.
        given: What the user states.
        stacked: Whether the layers of a distributed checkpoint were stacked.
        stored: The grid that wrote a distributed checkpoint, whose tensors are whole.

    Raises:
        InputError: Factors are missing or unknown, or nothing says alpha.
        UsageError: Nothing says which model it is for.
    """
    path, about = place.folder, _describe(place, args, given)
    # An alpha of the user means that the sidecar's record does not count.
    record = read_record(place.root) if given.lora_alpha is None else None
    alpha, notes = find_alpha(place, record, given.lora_alpha)
    unknown = stored is not None and not args
    joined = _join(path, about, ranks, grid, stacked=stacked, stored=stored, unknown=unknown)
    if record is not None:
        _check_record(record, joined.found, place.root)
    view = canonical(joined.found, alpha.scale, record)
    lengths = lengths_in(joined.found, view, place, about.original)
    if lengths and not has_record(place.root):  # ckptkit did not write it
        unlike = unlike_peft([one.item for one in joined.found], about.config, None if unknown else (stored or grid).tp)
        if unlike:
            raise UnsupportedError(f"not the DoRA of peft: {unlike[0]}", where=path, hint="leave these layers out")
    own = about.original if record is not None else None
    config = own or _config(view, alpha, about, dora=bool(lengths))
    names = {} if record is None else _original_names(about.sidecar, record)
    return Checkpoint(
        path=path,
        format=format,
        family=about.family,
        config=about.config,
        sidecar=replace(about.sidecar, extras={**about.sidecar.extras, **lengths}),
        items=view.items,
        tensors=view.tensors,
        spelling=about.family.spellings[0],
        grid=stored or grid,
        padding={key: tensor for key, tensor in joined.padding.items() if key in view.items},
        args=dict(args),
        comparisons=joined.comparisons,
        coverage=joined.coverage,
        notes=(*notes, *_trained(view.trained)),
        disagreements=about.disagreements,
        lora=Lora(config, view.linears, view.scales, names, joined.found[0].layout),
    )


@dataclass(frozen=True)
class _About:
    """The model that an adapter is for, and PEFT's config of the original where the sidecar has it."""

    family: Family
    config: ModelConfig
    sidecar: Sidecar
    original: AdapterConfig | None
    disagreements: tuple[str, ...]


def _describe(place: Place, args: Mapping[str, Any], given: Given) -> _About:
    sidecar = read_sidecar(place.root, OF_ADAPTER) or read_sidecar(place.root)
    if given.reference is not None:
        base = {name: file for name, file in given.reference.small.items() if name == "config.json"}
        own = sidecar or Sidecar(given.reference.config, {})
        sidecar = replace(own, config=given.reference.config, small={**own.small, **base})
    if sidecar is None:
        raise UsageError(
            "an adapter does not hold the config of the model that it is for",
            where=place.folder,
            hint="give --hf-reference with that model",
        )
    family = family_of(sidecar.config, place.root)
    config = family.parse(sidecar.config)
    file = sidecar.small.get(CONFIG)
    original = None if file is None else AdapterConfig.parse(read_json(file), file)
    with located(place.root):
        stated = from_args(family, args, config) if args else config
    others = differing_fields(stated, config, ignored=("dtype", "init_std", "max_position_embeddings"))
    wrong = tuple(f"args say {one.name} {in_words(one.left)}, config.json says {in_words(one.right)}" for one in others)
    if wrong and given.reference is not None:
        raise InputError(
            f"the reference is another model than the adapter is for: {'; '.join(wrong[:3])}",
            where=place.folder,
            hint="give the model that it was trained on",
        )
    return _About(family, config, sidecar, original, wrong)


@dataclass(frozen=True)
class _Factors:
    """The whole factors of a checkpoint, and the facts that joining its shards gave."""

    found: list[Found]
    comparisons: tuple[Comparison, ...]
    coverage: Mapping[str, int]
    padding: Mapping[str, Tensor]


def _join(
    path: Path,
    about: _About,
    ranks: Ranks,
    grid: Parallelism,
    *,
    stacked: bool,
    stored: Parallelism | None,
    unknown: bool,
) -> _Factors:
    family, config = about.family, about.config
    check_adapted(config, path)
    groups = family.attention_groups(config)
    ranks = {
        rank: {
            chunk: _by_expert(ungrouped(tensors, groups, stacked, path) if groups else tensors, config, grid, path)
            for chunk, tensors in chunks.items()
        }
        for rank, chunks in _renamed(ranks, path).items()
    }
    spelling = family.spelling_of(_base_names(_names_in(ranks)))
    wanted = list(_wanted(about, spelling, grid, ranks, path))
    if unknown:
        _refuse_unknown_order(wanted, path)
    items = {item.key: item for one in wanted for item in one.items}
    joined = join_shards(Shards(path, family, config, items, spelling, grid, ranks, None, 1 << 40))
    if not wanted:
        raise InputError("no factors that this model has a place for", where=path)
    found = [
        Found(
            one.item,
            one.index,
            one.layout,
            *(regular(item, joined.tensors[item.key], stored) for item in one.items),
        )
        for one in wanted
    ]
    return _Factors(found, joined.comparisons, joined.coverage, joined.padding)


@dataclass(frozen=True)
class _Wanted:
    """A pair of factors that a checkpoint holds.

    Attributes:
        item: The Megatron tensor that it is for.
        index: The part of it, or None for all.
        layout: The layout of its names.
        items: The rows of A and B, and of the lengths of the weight's rows, if it has them (DoRA).
    """

    item: Item
    index: int | None
    layout: str
    items: tuple[Item, ...]


def _wanted(about: _About, spelling: Spelling, grid: Parallelism, ranks: Ranks, path: Path) -> Iterator[_Wanted]:
    """The factors whose names are there, each on the stage that its linear layer is on.

    Raises:
        InputError: A layer has factors in two layouts.
    """
    stages = split_layers(about.config.num_layers, grid)
    homes = stage_of_layer(stages)
    chunks = {rank: list(found.values()) for rank, found in ranks.items()}
    for item in about.family.items(about.config):
        if not is_linear(item):
            continue
        stage, number = (
            homes[item.layer]
            if item.layer is not None
            else (next(stage for stage in stages if is_on(item, stage, grid)), None)
        )
        ep, expert = (0, None) if item.expert is None else expert_home(item.expert, about.config.num_experts, grid.ep)
        # Experts may live on some tensor parallel ranks only: the first one that has this expert parallel rank.
        first = min(tp for pp, tp, at in chunks if (pp, at) == (stage.pp_rank, ep))
        chunk = chunks[stage.pp_rank, first, ep][stage.vp_stage]
        taken: set[str] = set()
        for way in stored_layouts(item.kind):
            names = [spelling.written(name.format(i=number, e=expert)) for name in way.names]
            present = [name for name in names if name in chunk]
            if not present:
                continue
            rank = chunk[names[1]].shape[-1] if names[1] in chunk and chunk[names[1]].shape else 1
            if taken - {way.layout}:
                raise InputError(f"{item.key} has factors in two layouts ({present[0]})", where=path)
            taken.add(way.layout)
            rows = _rows(item, way.index, way.layout, rank)
            lengths = way.magnitudes and spelling.written(way.magnitudes.format(i=number, e=expert))
            if lengths in chunk:
                rows = (*rows, magnitudes(item))
            yield _Wanted(item, way.index, way.layout, rows)


def _rows(item: Item, index: int | None, layout: str, rank: int) -> tuple[Item, ...]:
    if index is None:
        return fused(item, A, rank, layout), fused(item, B, rank, layout)
    return single(part_of(item, index), A, rank), single(part_of(item, index), B, rank)


def _by_rank(tensor: Tensor, tp: int) -> Tensor:
    """Gate and up as their rows are -> rank by rank, each rank's part of gate and then of up."""
    return COLUMN.join([GATED_COLUMN.cut(tensor, rank, tp) for rank in range(tp)])


def _by_half(tensor: Tensor, tp: int) -> Tensor:
    """Rank by rank -> first the first halves of all ranks' rows: the inverse of `_by_rank`."""
    return GATED_COLUMN.join([COLUMN.cut(tensor, rank, tp) for rank in range(tp)])


def stored_form(item: Item, tensor: Tensor, grid: Parallelism) -> tuple[Tensor, int]:
    """A tensor of an adapter as writers have it in torch_dist, and in how many blocks ranks divide it.

    Megatron-Core stores gate and up of a linear's weight one after the other. Of adapters not all follow:

    - `CanonicalLoRA` of Megatron-Bridge stores B of gate, and that of up, in two halves, as if each held gate and up;
    - its `DoRA` stores the lengths of rows rank by rank, each rank's gate before its up; so does mcore-bridge with B;
    - all of them store rank by rank what belongs to the projection of a DeltaNet, whose parts Megatron-Core takes apart
      for the weight alone.

    Source: `ParallelLinearAdapter.sharded_state_dict`, which tests `"linear_fc1" in base_linear_name` alone, and
    `ParallelLinearDoRAAdapter.sharded_state_dict` of Megatron-Bridge (commit 067f987);
    `LoraParallelLinear.sharded_state_dict` of mcore-bridge (commit f020e47), which halves the tensors of `base_layer`;
    `apply_swiglu_sharded_factory` of Megatron-Core.
    """
    if _is_halved(item):
        return _by_half(tensor, grid.tp), 2
    if _is_rank_by_rank(item):
        return _by_rank(tensor, grid.tp), 1
    if item.row.split.by_part:
        split = item.kind.layout.by_part(shared=False)
        return vstack([split.cut(tensor, rank, grid.tp) for rank in range(grid.tp)]), 1
    return tensor, item.row.split.blocks


def regular(item: Item, tensor: Tensor, grid: Parallelism | None) -> Tensor:
    """The inverse of `stored_form`, for the grid that wrote a distributed checkpoint; None for per-rank files."""
    if grid is not None and _is_halved(item):
        return _by_rank(tensor, grid.tp)
    if grid is not None and _is_rank_by_rank(item):
        return _by_half(tensor, grid.tp)
    if grid is not None and item.row.split.by_part:
        share = tensor.shape[0] // grid.tp
        shards = [tensor.rows(rank * share, (rank + 1) * share) for rank in range(grid.tp)]
        return item.kind.layout.by_part(shared=False).join(shards)
    return tensor


def _is_halved(item: Item) -> bool:
    return item.row.megatron.endswith(_HALVED)


def _is_rank_by_rank(item: Item) -> bool:
    return item.row.megatron.endswith(_RANK_BY_RANK) and item.row.split.blocks == 2


def _refuse_unknown_order(wanted: Iterable[_Wanted], path: Path) -> None:
    """Refuses tensors that `regular` moves, where nothing says how many ranks wrote the distributed checkpoint.

    Raises:
        UnsupportedError: There is one.
    """
    for one in wanted:
        for item in one.items:
            if _is_halved(item) or _is_rank_by_rank(item) or item.row.split.by_part:
                raise UnsupportedError(
                    f"{item.key} lies in the order of the tensor parallel ranks that wrote it, and nothing says how"
                    " many these were",
                    where=path,
                    hint="take the PEFT adapter that its trainer exports",
                )


def _names_in(ranks: Ranks) -> set[str]:
    return {name for chunks in ranks.values() for chunk in chunks.values() for name in chunk}


def _base_names(names: Iterable[str]) -> set[str]:
    """The names of the weights that factors are for."""
    matches = (_NAME.fullmatch(name) for name in names)
    return {f"{match['module']}.weight{match['expert']}" for match in matches if match}


def _renamed(ranks: Ranks, path: Path) -> Ranks:
    """Factors under the name `default` for an adapter of any name.

    Raises:
        InputError: There are adapters of several names.
    """
    found = {match["name"] for name in _names_in(ranks) if (match := _NAME.fullmatch(name)) and match["name"]}
    if len(found) > 1:
        raise InputError(f"several adapters: {', '.join(sorted(found)[:4])}", where=path, hint="keep one of them")
    if found <= {"default"}:
        return ranks
    (name,) = found
    old = re.compile(rf"\.(lora_[AB])\.{re.escape(name)}\.(?=weight\d*$)")
    return {
        rank: {
            chunk: {old.sub(r".\1.default.", key): tensor for key, tensor in tensors.items()}
            for chunk, tensors in chunks.items()
        }
        for rank, chunks in ranks.items()
    }


def _by_expert(tensors: Mapping[str, Tensor], config: ModelConfig, grid: Parallelism, path: Path) -> dict[str, Tensor]:
    """Factors of grouped experts as those of single ones: one of `[experts, ...]`, or one that all experts share."""
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        match = _NAME.fullmatch(name)
        if match is None or match["expert"] or not _EXPERTS.fullmatch(match["module"]) or not config.num_experts:
            found[name] = tensor
            continue
        count = config.num_experts // grid.ep
        if len(tensor.shape) not in (2, 3) or (len(tensor.shape) == 3 and tensor.shape[0] != count):
            raise InputError(f"{name} is {list(tensor.shape)}, for {count} experts", where=path)
        for expert in range(count):
            one = tensor if len(tensor.shape) == 2 else tensor.rows(expert, expert + 1).reshape(tensor.shape[1:])
            found[f"{name}{expert}"] = one
    return found


def grouped_factors(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `_by_expert` for the names of Megatron-Bridge: the factors of a rank's experts in one tensor.

    Raises:
        InputError: The factors of experts differ in type.
    """
    found: dict[str, Tensor] = {}
    experts: dict[str, list[Tensor]] = {}
    for name, tensor in tensors.items():
        match = _NAME.fullmatch(name)
        if match is None or not match["expert"] or match["name"] or not _EXPERTS.fullmatch(match["module"]):
            found[name] = tensor
        else:
            experts.setdefault(name.removesuffix(match["expert"]), []).append(tensor)
    try:
        return found | {name: stack(factors) for name, factors in experts.items()}
    except ValueError as error:
        raise InputError(f"the factors of experts: {error}", hint="--dtype casts them to one type") from None


def _check_record(record: Record, found: list[Found], root: Path) -> None:
    """Whether a record is that of these factors.

    Raises:
        InputError: It has another rank, or names modules that have no factors.
    """
    hint = "pass --lora-alpha to go without the sidecar"
    ranks = {one.b.shape[1] for one in found}
    if ranks != {record.rank}:
        what = f"the sidecar describes factors of rank {record.rank}, the checkpoint has {sorted(ranks)}"
        raise InputError(what, where=root, hint=hint)
    there = {linear.module for one in found for linear, _ in one.linears}
    if missing := sorted(record.modules.keys() - there):
        raise InputError(f"the sidecar describes factors of {missing[0]}, which are not there", where=root, hint=hint)


def _original_names(sidecar: Sidecar, record: Record) -> dict[str, tuple[int, ...]]:
    """Names and shapes in the file of the original adapter."""
    named = {name: entry.shape for header in sidecar.headers.values() for name, entry in header.entries.items()}
    return named or dict(record.names)


def _config(view: Canonical, alpha: Alpha, about: _About, *, dora: bool) -> AdapterConfig:
    """PEFT's config of an adapter that Megatron made."""
    names = names_in_memory(about.family, about.config)
    ranks = [view.tensors[linear.key(A)].shape[0] for linear in view.linears.values()]
    modules = {names.written(module) for module in view.linears}
    rank = max(set(ranks), key=ranks.count)
    scales = list(view.scales.values())
    value = alpha.value if alpha.rslora else alpha_for(max(set(scales), key=scales.count), rank)
    raw = raw_config(about.sidecar.origin.get("repository", ""), rank, value, rslora=alpha.rslora)
    raw |= {"use_dora": dora, "target_modules": targets(modules, names.linears)}
    return AdapterConfig.parse(raw, about.config.architecture)


def targets(modules: Collection[str], known: Iterable[str]) -> list[str]:
    """The last words of the names of modules, if these include no other module; else their full names."""
    words = {module.rpartition(".")[2] for module in modules}
    all_of = {module for module in known if module.rpartition(".")[2] in words}
    return sorted(words if all_of == set(modules) else modules)


def _trained(modules: list[str]) -> list[str]:
    if not modules:
        return []
    what = "training has mixed the ranks of parts that were stacked"
    return [f"{what}: {len(modules)} modules get all ranks of their tensor ({modules[0]}, ...)"]
