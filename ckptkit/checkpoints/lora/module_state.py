"""The adapter in the state of a bare module that PEFT has wrapped: what verl and others leave of FSDP training.

Factors have their names in memory, which hold the name of the adapter (`q_proj.lora_A.default.weight`). The weights of
the layers that have factors are one module further inside (`q_proj.base_layer.weight`). There may be factors alone.

Source: `get_peft_model_state_dict` of peft 0.21, and `fsdp_checkpoint_manager.py` of verl (commit 1dda039).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from ckptkit.checkpoints.checkpoint import Checkpoint
from ckptkit.checkpoints.description import Given
from ckptkit.checkpoints.locating import Place
from ckptkit.checkpoints.lora.megatron import ADAPTER, HOW_TO_TAKE, MODEL, targets
from ckptkit.checkpoints.lora.peft_directory import open_peft_files
from ckptkit.checkpoints.lora.places import Names, Packed, assign, names_of, pairs
from ckptkit.checkpoints.lora.sources import Alpha, find_alpha
from ckptkit.errors import InputError, UnsupportedError
from ckptkit.families import family_of
from ckptkit.formats.hf import HfFiles
from ckptkit.formats.json_files import read_json
from ckptkit.formats.peft import CONFIG, PREFIX, PeftFiles, parse_name
from ckptkit.formats.peft_config import AdapterConfig, raw_config
from ckptkit.formats.trainer_states.module_state import ModuleState
from ckptkit.formats.wrapper_names import Wrapping, find_wrapping
from ckptkit.tables.bounds import check_adapted
from ckptkit.tensors import Tensor

_FACTOR = re.compile(r"(?P<module>.+)\.lora_(?P<side>[AB])\.(?P<name>[^.]+)\.weight")
_INSIDE = re.compile(r"\.base_layer(?=\.)")


def is_of_adapter(key: str) -> bool:
    """Whether a key is that of a tensor that PEFT has added."""
    return ".lora_" in key


def keys_of_part(part: str | None) -> Callable[[str], bool]:
    """The keys of a part of a state, or of all of it."""
    parts: dict[str, Callable[[str], bool]] = {ADAPTER: is_of_adapter, MODEL: lambda key: not is_of_adapter(key)}
    return parts.get(part or "", lambda key: True)


def choose_part_of_state(state: ModuleState, part: str | None) -> tuple[ModuleState, bool]:
    """The tensors that are wanted, and whether they are an adapter.

    Raises:
        InputError: The state does not hold what is wanted.
        UnsupportedError: It holds a model and an adapter, and nothing says which is wanted.
    """
    factors = [key for key in state.tensors if is_of_adapter(key)]
    if part == ADAPTER and not factors:
        raise InputError("no adapter in it", where=state.path, hint="expected names such as q_proj.lora_A.default")
    if factors and len(factors) < len(state.tensors):
        raise UnsupportedError(
            f"LoRA adapters beside the weights ({min(factors)})",
            where=state.path,
            hint=HOW_TO_TAKE,
        )
    if part == MODEL:
        tensors = {_INSIDE.sub("", key): tensor for key, tensor in state.tensors.items()}
        if len(tensors) < len(state.tensors):
            twice = next(key for key in state.tensors if _INSIDE.search(key) and _INSIDE.sub("", key) in state.tensors)
            raise InputError(f"{twice} and {_INSIDE.sub('', twice)} name one weight", where=state.path)
        return replace(state, tensors=tensors), False
    return state, bool(factors)


def read_state_of_adapter(
    state: ModuleState, place: Place, reference: HfFiles, given: Given
) -> tuple[Checkpoint, Wrapping]:
    """The adapter in a state of factors, and what stands before their names.

    Raises:
        InputError: Factors are missing or unknown, or nothing says alpha.
        UnsupportedError: A tensor is no factor of a linear layer.
    """
    family = family_of(reference.config, reference.path / "config.json")
    config = family.parse(reference.config)
    check_adapted(config, reference.path)
    known = {
        name
        for spelling in family.hf_spellings
        for names in (Names(family, config, spelling),)
        for name in (*names.linears, *names.packed)
    }
    wrapping = find_wrapping(state.tensors, lambda names: sum(_module(name) in known for name in names))
    tensors = _as_in_files(wrapping.removed(state.tensors, state.path), state.path)
    alpha, notes = find_alpha(place, None, given.lora_alpha)
    names = names_of(family, config, {parse_name(name, state.path).module for name in tensors}, None)
    stated = next((file for folder in (place.folder, place.root) if (file := folder / CONFIG).is_file()), None)
    if stated is not None and given.lora_alpha is None:
        described = AdapterConfig.parse(read_json(stated), stated)
    else:
        described = _described(tensors, names, alpha, state.path)
    files = PeftFiles(state.path, described, tensors, {}, {})
    return replace(open_peft_files(files, reference), format=state.format).noting(*notes), wrapping


def _module(name: str) -> str:
    match = _FACTOR.fullmatch(name)
    return "" if match is None else _INSIDE.sub("", match["module"] + ".").removesuffix(".")


def _as_in_files(tensors: Mapping[str, Tensor], path: Path) -> dict[str, Tensor]:
    """Factors under the names that PEFT gives them in files.

    Raises:
        InputError: There are several adapters.
        UnsupportedError: A tensor is something else.
    """
    found: dict[str, Tensor] = {}
    adapters: set[str] = set()
    for name, tensor in tensors.items():
        match = _FACTOR.fullmatch(name)
        if match is None:
            raise UnsupportedError(
                f"{name} is no factor of a linear layer, and nothing beside it describes it",
                where=path,
                hint="load the state into the PEFT model, and save that with save_pretrained",
            )
        adapters.add(match["name"])
        found[f"{PREFIX}{match['module']}.lora_{match['side']}.weight"] = tensor
    if len(adapters) > 1:
        raise InputError(f"several adapters: {', '.join(sorted(adapters)[:4])}", where=path, hint="keep one of them")
    return found


def _described(tensors: Mapping[str, Tensor], names: Names, alpha: Alpha, path: Path) -> AdapterConfig:
    """PEFT's config of factors that have no adapter_config.json: one alpha counts for all.

    Raises:
        InputError: Their ranks are not the one that is stated beside alpha.
    """
    found = pairs({name: parse_name(name, path) for name in tensors}, tensors.__getitem__, path)
    places, _ = assign(found, names, path)
    ranks: dict[str, int] = {}
    parameters: list[str] = []
    for (module, depth), place in places.items():
        stacked = found[module, depth][0].shape[0]
        if isinstance(place, Packed):
            ranks[place.name] = stacked // len(place.experts)
            parameters.append(place.name)
        else:
            ranks[module] = stacked
    for name, rank in ranks.items():
        if alpha.rank not in (None, rank):
            raise InputError(
                f"the factors of {name} have rank {rank}, and {alpha.where} says {alpha.rank}: its alpha may be that of"
                " others",
                where=path,
                hint=f"give --lora-alpha, or put the {CONFIG} of the adapter beside the weights",
            )
    raw = raw_config("", _most_common(list(ranks.values())), alpha.value, rslora=alpha.rslora)
    raw["target_modules"] = targets(ranks.keys() - set(parameters), names.linears)
    if parameters:
        raw["target_parameters"] = sorted(parameters)
    config = AdapterConfig.parse(raw, path)
    return config.stating({name: (rank, alpha.scale(rank)) for name, rank in ranks.items()})


def _most_common(ranks: Sequence[int]) -> int:
    return max(sorted(set(ranks), reverse=True), key=ranks.count, default=1)
