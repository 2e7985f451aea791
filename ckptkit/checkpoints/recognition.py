"""Which family a Megatron checkpoint belongs to, by its tensor names and `args`."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from ckptkit.errors import UnsupportedError
from ckptkit.families import families
from ckptkit.megatron_args.reading import model_from_args
from ckptkit.tables.family import Family, FusedRow


def recognise(names: Iterable[str], args: Mapping[str, Any] | None = None) -> Family:
    """The family of a Megatron checkpoint that nothing describes but tensor names, and perhaps `args`.

    Args:
        names: Its Megatron names.
        args: Its `args`. They decide between families with the same tensors: the first whose config.json can say what
            they say (a window makes a Llama a Mistral).

    Raises:
        UnsupportedError: No family's table fits the names.
    """
    names = set(names)
    fitting = sorted((family for family in families() if family.fits(names)), key=lambda family: -len(family.marks))
    if not fitting:
        raise UnsupportedError(
            "no family fits the tensor names", hint="pass --hf-reference with the model's config.json"
        )
    alike = [family for family in fitting if family.marks == fitting[0].marks]
    return next((family for family in alike if args and _can_say(family, args)), alike[0])


def _can_say(family: Family, args: Mapping[str, Any]) -> bool:
    """Whether config.json of the family holds everything that `args` say."""
    try:
        config = model_from_args(family, args, args.get("vocab_size") or 1)
    except UnsupportedError:
        return False
    return family.parse(family.unparse(config, {})) == replace(config, mtp_layers=0)  # which the tensors say


_PARTS = re.compile(
    r"(?P<lora>(?:^|\.)lora_|\.base_layer\.)"
    r"|(?P<adapter>\.adapter\.linear_(?:in|out)\.|\.to_wrap\.)"
    r"|(?P<value>^(?:\w+\.)*v_head\.)"
    r"|(?P<old>^(?:\w+\.)*language_model\.(?:encoder|transformer)\.)"
    r"|(?P<quantizer>_quantizer\.)"
)
_OF_TRAINERS = {
    "lora": (
        "LoRA adapters beside the weights",
        "merge them into the weights with peft (merge_and_unload) before they are saved",
    ),
    "adapter": (
        "adapters of Megatron beside the weights",
        "`ckptkit adapter merge` puts an adapter into the weights",
    ),
    "value": (
        "the value head of TRL, which no class of transformers has",
        "save the model inside it (pretrained_model.save_pretrained), and convert that",
    ),
    "old": (
        "the layout that Megatron-LM had before Megatron-Core",
        "convert it with Megatron-LM's tools/checkpoint/convert.py (--loader legacy --saver core)",
    ),
    "quantizer": ("quantisers of ModelOpt beside the weights", "convert from the unquantised model"),
}
"""Parts of names that trainers leave -> what they are, and what to do."""


def refuse_trainers_parts(names: Iterable[str], where: object) -> None:
    """Names what trainers put beside the weights of a model, in whatever format: adapters, other heads, quantisers.

    Raises:
        UnsupportedError: There is any.
    """
    found = {match.lastgroup: name for name in sorted(names, reverse=True) if (match := _PARTS.search(name))}
    for kind, (what, hint) in _OF_TRAINERS.items():
        if kind in found:
            raise UnsupportedError(f"{what} ({found[kind]})", where=where, hint=hint)


def refuse_foreign(names: Iterable[str], where: object) -> None:
    """Names the layout of a Megatron checkpoint that is known, but that no table reads.

    Raises:
        UnsupportedError: It has such a layout.
    """
    refuse_trainers_parts(names, where)
    marks = {piece: layout for family in families() for piece, layout in family.quirks.foreign.items()}
    for name in sorted(names):
        for piece, layout in marks.items():
            if piece in name:
                raise UnsupportedError(
                    f"{layout} (it holds {name})",
                    where=where,
                    hint="export it to Hugging Face with the tool that wrote it, and convert that",
                )


def fused_in(names: Iterable[str]) -> FusedRow | None:
    """The row in place of several others that the ranks with these names have, or None."""
    known = {id(row): row for family in families() if (row := family.quirks.fused) is not None}
    written = set(names)
    return next((row for row in known.values() if row.is_in(written)), None)
