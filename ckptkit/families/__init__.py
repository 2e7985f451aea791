"""Model families: one table each. `family_of` finds the one that a config.json belongs to."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from functools import cache
from importlib.metadata import EntryPoint, entry_points

from ckptkit.errors import InputError, UnsupportedError
from ckptkit.families.heads import name_of_value_family, value_families
from ckptkit.tables.family import Family
from ckptkit.tables.rows import Raw

REFUSED = {
    "DeepseekV2ForCausalLM": "it chooses groups of experts by the best of each, which Megatron-Core has no router for"
}
"""Architecture -> the reason why it is none of a family's, where one could expect it to be."""
ENTRY_POINTS = "ckptkit.families"
"""Group of the entry points by which other packages add families: each names a `Family`."""


@cache
def families() -> tuple[Family, ...]:
    """All families: our own, those of other installed packages, and the value models of both.

    Raises:
        UnsupportedError: An entry point does not lead to a `Family`, or to one that is there already.
    """
    from ckptkit.families.apertus import APERTUS
    from ckptkit.families.deepseek import DEEPSEEK_V3
    from ckptkit.families.gemma3 import GEMMA3, GEMMA3_TEXT
    from ckptkit.families.gemma4 import GEMMA4, GEMMA4_TEXT
    from ckptkit.families.glm import GLM4_MOE
    from ckptkit.families.glm_lite import GLM4_MOE_LITE
    from ckptkit.families.gpt_oss import GPT_OSS
    from ckptkit.families.llama import LLAMA
    from ckptkit.families.mistral import MINISTRAL, MISTRAL, MIXTRAL
    from ckptkit.families.qwen import QWEN2, QWEN3, QWEN3_MOE
    from ckptkit.families.qwen3_5 import QWEN3_5, QWEN3_5_MOE, QWEN3_5_MOE_TEXT, QWEN3_5_TEXT
    from ckptkit.families.qwen3_next import QWEN3_NEXT
    from ckptkit.families.split_llama import SPLIT_LLAMA

    found = [LLAMA, QWEN2, QWEN3, QWEN3_MOE, MISTRAL, MINISTRAL, MIXTRAL, APERTUS, GLM4_MOE, DEEPSEEK_V3, GLM4_MOE_LITE]
    found += [GPT_OSS, QWEN3_NEXT, QWEN3_5_TEXT, QWEN3_5, QWEN3_5_MOE_TEXT, QWEN3_5_MOE]
    found += [GEMMA3_TEXT, GEMMA3, GEMMA4_TEXT, GEMMA4]
    found.append(SPLIT_LLAMA)
    for point in sorted(entry_points(group=ENTRY_POINTS)):
        family = _load(point)
        if taken := set(_names([family])) & set(_names([*found, *value_families(found)])):
            raise UnsupportedError(
                f"the family of entry point {point.name} is there already: {', '.join(sorted(taken))}"
            )
        found.append(family)
    found += value_families(found)
    if twice := [name for name, count in Counter(_names(found)).items() if count > 1]:
        raise UnsupportedError(f"two families, or their value models, are called {', '.join(sorted(twice))}")
    return tuple(found)


def _names(families: Iterable[Family]) -> list[str]:
    """The names and architectures of families, which must differ."""
    return [name for family in families for name in (family.name, *family.architectures)]


def _load(point: EntryPoint) -> Family:
    try:
        family = point.load()
    except Exception as error:  # whatever another package raises while it is imported
        raise UnsupportedError(
            f"entry point {point.name} ({point.value}) does not load: {error}", hint="update or remove its package"
        ) from error
    if not isinstance(family, Family):
        raise UnsupportedError(f"entry point {point.name} ({point.value}) is no Family", hint="see CONTRIBUTING")
    return family


def family_of(raw: Raw, where: object) -> Family:
    """The family of a config.json.

    Raises:
        InputError: It names no architecture.
        UnsupportedError: No family converts this architecture, or the weights are quantised.
    """
    architectures = raw.get("architectures")
    if not isinstance(architectures, list) or not architectures:
        raise InputError("config.json names no architectures", where=where, hint='add e.g. ["LlamaForCausalLM"]')
    if raw.get("quantization_config"):
        stated = raw["quantization_config"]
        method = stated.get("quant_method", "of unknown kind") if isinstance(stated, dict) else stated
        raise UnsupportedError(
            f"quantised weights ({method})", where=where, hint="convert from the unquantised model of the same name"
        )
    for family in families():
        if architectures[0] in family.architectures:
            return family
    why = f": {REFUSED[architectures[0]]}" if architectures[0] in REFUSED else ""
    raise UnsupportedError(
        f"no family converts {architectures[0]}{why}", where=where, hint="`ckptkit families` lists what is supported"
    )


def family_called(name: str) -> Family:
    """The family with this short name.

    Raises:
        UnsupportedError: There is none.
    """
    for family in families():
        if family.name == name:
            return family
    raise UnsupportedError(f"no family is called {name}", hint="`ckptkit families` lists what is supported")


def value_family_of(family: Family) -> Family | None:
    """The family of a family's value models, or None where Hugging Face has no class for them."""
    name = name_of_value_family(family)
    same = (found for found in families() if found.name == name and found.architectures == family.value_architectures)
    return next(same, None)
