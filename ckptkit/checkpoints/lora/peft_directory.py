"""A PEFT directory as a checkpoint, and back: the names and the files of an adapter."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from ckptkit.checkpoints.checkpoint import Checkpoint
from ckptkit.checkpoints.description import Given
from ckptkit.checkpoints.locating import Place
from ckptkit.checkpoints.lora.places import Names, Packed, assign, names_in_memory, names_of, pairs
from ckptkit.checkpoints.lora.record import Lora
from ckptkit.checkpoints.lora.values import ValueReader
from ckptkit.checkpoints.problems import Problems
from ckptkit.errors import InputError, UnsupportedError, UsageError
from ckptkit.families import family_of
from ckptkit.formats.hf import HfFiles
from ckptkit.formats.peft import (
    MAGNITUDE,
    PeftFiles,
    Stored,
    factor_name,
    magnitude_name,
    open_peft,
    parse_name,
)
from ckptkit.formats.peft_config import AdapterConfig
from ckptkit.formats.sidecar import Sidecar
from ckptkit.tables.bounds import check_adapted
from ckptkit.tables.family import Family
from ckptkit.tables.lora import SIDES, A, B, Linear, is_embedding, is_linear, single
from ckptkit.tables.model_config import ModelConfig
from ckptkit.tensors import Tensor

_WEIGHT = ".weight"


def read_peft(place: Place, given: Given) -> Checkpoint:
    """Opens a PEFT directory. The base's config.json says which model it is for.

    Raises:
        InputError: It is damaged, or has factors that the model has no place for.
        UnsupportedError: It is no LoRA.
        UsageError: Nothing says which model it is for.
    """
    files = open_peft(place.folder)
    if given.reference is None:
        base = f" ({files.config.base[:80]}, it says)" if files.config.base else ""
        raise UsageError(
            "an adapter does not hold the config of the model that it is for",
            where=place.folder,
            hint=f"give --hf-reference with that model{base}",
        )
    if given.lora_alpha is not None:
        raise UsageError("adapter_config.json has the alpha", where=place.folder, hint="drop --lora-alpha")
    return open_peft_files(files, given.reference)


def open_peft_files(files: PeftFiles, reference: HfFiles) -> Checkpoint:
    """An adapter under PEFT's names, for the model that a reference describes.

    Raises:
        InputError: It is damaged, or has factors that the model has no place for.
        UnsupportedError: It is no LoRA.
    """
    family = family_of(reference.config, reference.path / "config.json")
    config = family.parse(reference.config)
    check_adapted(config, reference.path)
    stored = {name: parse_name(name, files.path) for name in files.tensors}
    names = names_of(family, config, {about.module for about in stored.values()}, files.config.is_old)
    found = pairs(stored, files.tensors.__getitem__, files.path)
    places, unknown = assign(found, names, files.path)
    _refuse_parameters([parse_name(name, files.path).module for name in unknown], names, family, config, files.path)
    problems = Problems(files.path)
    problems.unknown(unknown)
    tensors: dict[str, Tensor] = {}
    modules: dict[str, Linear] = {}
    scales: dict[str, float] = {}
    for key, where in places.items():
        a, b = found[key]
        linears, stated = _take(where, key[0], a, b, tensors, problems, files)
        scale = _scale(files.config, stated, a.shape[0] // (len(where.experts) if isinstance(where, Packed) else 1))
        _check_target(files.config, where, key[0])
        for linear in linears:
            modules[linear.module], scales[linear.module] = linear, scale
    extras = _extras(files, stored, names)
    problems.check()
    _check_magnitudes(files, modules, extras)
    lora = Lora(files.config, modules, scales, {name: tensor.shape for name, tensor in files.tensors.items()})
    order = {module: number for number, module in enumerate(modules)}
    items = {
        linear.key(side): single(linear, side, tensors[linear.key(A)].shape[0])
        for linear in sorted(modules.values(), key=lambda linear: order[linear.module])
        for side in SIDES
    }
    return Checkpoint(
        path=files.path,
        format="peft",
        family=family,
        config=config,
        sidecar=Sidecar(dict(reference.config), _small(files, reference), files.headers, extras),
        items=items,
        tensors={key: tensors[key] for key in items},
        spelling=family.spellings[0],
        coverage={"used": len(files.tensors) - len(extras), **({"kept whole": len(extras)} if extras else {})},
        lora=lora,
    )


def _refuse_parameters(modules: Iterable[str], names: Names, family: Family, config: ModelConfig, where: Path) -> None:
    """Refuses factors of what is a linear layer in Hugging Face, and in Megatron a parameter outside of any.

    Args:
        modules: Modules for which no linear layer was found.
        names: How the adapter calls them.
        family: The family of the model.
        config: The model.
        where: The adapter.

    Raises:
        UnsupportedError: One is such a module.
    """
    canonical = {names.canonical(module + _WEIGHT): module for module in modules}
    for item in family.items(config) if canonical else ():
        if is_linear(item) or is_embedding(item):
            continue
        if module := next((canonical[name] for name in item.hf if name in canonical), None):
            raise UnsupportedError(
                f"{module} has factors, and Megatron has no linear layer there: {item.key} is a bare parameter",
                where=where,
                hint="train without it (exclude_modules of peft), or merge the adapter with peft",
            )


def _small(files: PeftFiles, reference: HfFiles) -> dict[str, Path]:
    """The adapter's small files, and the base's config.json."""
    own = {name: path for name, path in files.small.items() if name != "config.json"}
    return {**own, "config.json": reference.small.get("config.json", reference.path / "config.json")}


def _take(
    where: Linear | Packed,
    module: str,
    a: Tensor,
    b: Tensor,
    tensors: dict[str, Tensor],
    problems: Problems,
    files: PeftFiles,
) -> tuple[list[Linear], str]:
    """Puts a pair of factors where it belongs. Returns its layers, and the name by which PEFT's config knows it."""
    if isinstance(where, Packed):
        tensors.update(where.apart(a, b, files.path))
        return [linear for parts in where.experts for linear in parts], where.name
    rows, columns = where.shape
    if (a.shape[1], b.shape[0]) != (columns, rows):
        problems.wrong.append(
            f"{module}: lora_A is {list(a.shape)} and lora_B {list(b.shape)}, the weight is [{rows}, {columns}]"
        )
    tensors[where.key(A)], tensors[where.key(B)] = a, b
    return [where], files.config.called(module)


def _scale(config: AdapterConfig, module: str, rank: int) -> float:
    stated = config.rank_of(module)
    if stated is not None and stated != rank:
        raise InputError(f"{module} has rank {rank}, adapter_config.json says {stated}", where=config.where)
    return config.scale_of(module, rank)


def _check_target(config: AdapterConfig, where: Linear | Packed, module: str) -> None:
    """A factor that PEFT would not load must not count.

    Raises:
        InputError: `target_modules` and `target_parameters` do not include it.
    """
    name = where.name if isinstance(where, Packed) else f"{module}{_WEIGHT}"
    if not config.targets(module) and not config.targets_parameter(name):
        raise InputError(
            f"target_modules does not include {module}, which has factors: peft would not load them",
            where=config.where,
            hint="add it",
        )


def _extras(files: PeftFiles, stored: Mapping[str, Stored], names: Names) -> dict[str, Tensor]:
    """The tensors that are no factors of linear layers, under canonical names."""
    extras: dict[str, Tensor] = {}
    for name, about in stored.items():
        if about.kind == "factor":
            continue
        endings = {"embedding": f".lora_embedding_{about.side}", "magnitude": MAGNITUDE}
        ending = endings.get(about.kind, "")
        module = about.module if about.kind == "whole" else names.canonical(about.module + _WEIGHT)
        canonical = names.canonical(module) if about.kind == "whole" else module.removesuffix(_WEIGHT) + ending
        if canonical in extras:
            raise InputError(f"{name} is stored twice", where=files.path)
        extras[canonical] = files.tensors[name]
    return extras


def _check_magnitudes(files: PeftFiles, modules: Mapping[str, Linear], extras: Mapping[str, Tensor]) -> None:
    """In DoRA, every layer has magnitudes; otherwise none has.

    Raises:
        InputError: Some are missing or of another shape, or there are some without DoRA.
        UnsupportedError: Some are those of an embedding.
    """
    found = {name.removesuffix(MAGNITUDE) for name in extras if name.endswith(MAGNITUDE)}
    if found and not files.config.dora:
        what = f"{min(found)} has a lora_magnitude_vector, and adapter_config.json says nothing of use_dora"
        raise InputError(what, where=files.path, hint="is use_dora lost?")
    if not files.config.dora:
        return
    if missing := sorted(modules.keys() - found):
        what = f"{missing[0]} has no lora_magnitude_vector, without which DoRA is not defined"
        raise InputError(what, where=files.path, hint="save the adapter with peft")
    if others := sorted(found - modules.keys()):
        raise UnsupportedError(
            f"DoRA of {others[0]}, which is no linear layer", where=files.path, hint="merge the adapter with peft"
        )
    for module in sorted(found):
        shape, rows = extras[module + MAGNITUDE].shape, modules[module].shape[0]
        if shape != (rows,):
            raise InputError(f"{module}{MAGNITUDE} is {list(shape)}, the weight has {rows} rows", where=files.path)


def peft_tensors(source: Checkpoint) -> tuple[dict[str, Tensor], AdapterConfig]:
    """The tensors of an adapter under PEFT's names, and the config that belongs to them.

    They have the form of the original file. Without one, each linear layer has a pair of factors under the name that
    transformers gives it.
    """
    assert source.lora is not None
    lora = source.lora
    stored = {name: parse_name(name, source.path) for name in lora.names}
    modules = {about.module for about in stored.values()}
    spelled = (
        names_of(source.family, source.config, modules, lora.config.is_old)
        if stored
        else names_in_memory(source.family, source.config)
    )
    tensors, packed = _like(source, stored, spelled)
    inside = {linear.module for one in packed for parts in one.experts for linear in parts}
    stating = {one.name: _rank_and_scale(source, one.experts[0][0]) for one in packed}
    targets: list[str] = []
    for module, linear in lora.linears.items():
        if module in inside:
            continue
        name = spelled.written(module)
        targets.append(name)
        stating[lora.config.called(name)] = _rank_and_scale(source, linear)
        for side in SIDES:
            tensors[factor_name(name, side)] = source.tensors[linear.key(side)]
        if (lengths := source.sidecar.extras.get(module + MAGNITUDE)) is not None:
            tensors[magnitude_name(name)] = lengths
    return tensors, lora.config.targeting(targets).stating(stating)


def _rank_and_scale(source: Checkpoint, linear: Linear) -> tuple[int, float]:
    assert source.lora is not None
    return source.tensors[linear.key(A)].shape[0], source.lora.scales[linear.module]


def _like(source: Checkpoint, stored: Mapping[str, Stored], spelled: Names) -> tuple[dict[str, Tensor], list[Packed]]:
    """Tensors under the names of an original file, as far as there are any; and the packed parameters among them."""
    assert source.lora is not None
    lora = source.lora
    dtype = next(iter(source.tensors.values())).dtype
    placeholders = {name: Tensor.full(dtype, shape) for name, shape in lora.names.items()}
    found = pairs(stored, placeholders.__getitem__, source.path)
    places, _ = assign(found, spelled, source.path)
    tensors: dict[str, Tensor] = {}
    packed: list[Packed] = []
    for (module, depth), where in places.items():
        if isinstance(where, Linear):
            if where.module not in lora.linears:
                continue
            factors = source.tensors[where.key(A)], source.tensors[where.key(B)]
        elif _can_pack(source, where):
            packed.append(where)
            swapped = where.is_swapped(*found[module, depth], source.path)
            factors = where.together(source.tensors, swapped=swapped)
        else:
            continue
        tensors.update({factor_name(module, side, depth): one for side, one in zip(SIDES, factors, strict=True)})
    for name, about in stored.items():
        if about.kind != "factor" and (extra := _extra(source, about, spelled)) is not None:
            tensors[name] = extra
    return {name: tensors[name] for name in lora.names if name in tensors}, packed


def _extra(source: Checkpoint, about: Stored, spelled: Names) -> Tensor | None:
    if about.kind == "whole":
        return source.sidecar.extras.get(spelled.canonical(about.module))
    module = spelled.canonical(about.module + _WEIGHT).removesuffix(_WEIGHT)
    ending = MAGNITUDE if about.kind == "magnitude" else f".lora_embedding_{about.side}"
    return source.sidecar.extras.get(f"{module}{ending}")


def _can_pack(source: Checkpoint, packed: Packed) -> bool:
    """Whether the layers of an expert share A, all ranks are equal, and so are all scales: then one pair can hold them.

    Raises:
        InputError: Some experts have factors, and others do not.
    """
    assert source.lora is not None
    linears = [linear for parts in packed.experts for linear in parts]
    there = [linear for linear in linears if linear.module in source.lora.linears]
    if not there:
        return False
    if len(there) < len(linears):
        raise InputError(f"{len(linears) - len(there)} layers of {packed.name} have no factors", where=source.path)
    ranks = {source.tensors[linear.key(A)].shape for linear in linears}
    if len(ranks) > 1 or len({source.lora.scales[linear.module] for linear in linears}) > 1:
        return False
    with ValueReader() as reader:
        return all(reader.all_same([source.tensors[one.key(A)] for one in parts]) for parts in packed.experts)
