"""HybridModel's schema: every layer of a GPT model is two, one of attention and one MLP, dense or of experts.

Megatron-Core deprecates GPTModel in favour of HybridModel since 0.19. The tensors are the same; layer `i` becomes the
layers `2i` (`*`) and `2i + 1` (`-` with a dense MLP, `E` with experts), and the last norm is `decoder.final_norm`. A
pattern of these symbols is the one argument that describes the layers; `|` parts pipeline stages, chunk by chunk.

Source: `HybridStack`, `HybridModel` and `select_pipeline_segment` of megatron-core 0.19.2; `MambaModel` of 0.16.1 has
the same names.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ckptkit.errors import InputError, UnsupportedError, UsageError

ATTENTION, MLP, MOE = "*", "-", "E"
GPT, HYBRID = "gpt", "hybrid"
MODELS = (GPT, HYBRID)
PATTERN, OLD_PATTERN = "hybrid_layer_pattern", "hybrid_override_pattern"

_GPT_NORM, _HYBRID_NORM = "decoder.final_layernorm.weight", "decoder.final_norm.weight"
_LAYER = re.compile(r"(.*\bdecoder\.layers\.)(\d+)\.(.+)")
_IN_ATTENTION = re.compile(r"(self_attention|input_layernorm)\.")
_IN_MLP = re.compile(r"(mlp|pre_mlp_layernorm)\.")


def hybrid_name(name: str) -> str:
    """The name in HybridModel of a tensor of GPTModel; layers may be counted within a stage or over all.

    Raises:
        UsageError: HybridModel has no place for it.
    """
    match = _LAYER.fullmatch(name)
    if match is None:
        return name.replace(_GPT_NORM, _HYBRID_NORM)
    block, number, rest = match[1], 2 * int(match[2]), match[3]
    if _IN_MLP.match(rest):
        number += 1
    elif not _IN_ATTENTION.match(rest):
        raise UsageError(f"--megatron-model hybrid: its layers have no {rest}", hint="use --megatron-model gpt")
    return f"{block}{number}.{rest}"


def is_hybrid(names: Iterable[str]) -> bool:
    """Whether names are those of a HybridModel."""
    return any(name.endswith(_HYBRID_NORM) for name in names)


def layer_count(names: Iterable[str]) -> int:
    """How many layers a chunk of a HybridModel has, by the highest number in its names."""
    return max((int(match[2]) + 1 for name in names if (match := _LAYER.fullmatch(name))), default=0)


def gpt_name(name: str, first: int = 0) -> str:
    """The name in GPTModel, with the layer counted over all stages, of a tensor of HybridModel.

    Args:
        name: The name, its layer counted from `first`.
        first: Layers of HybridModel on the stages before.

    Raises:
        UnsupportedError: The layer is neither attention nor an MLP, or not where GPTModel has it.
    """
    match = _LAYER.fullmatch(name)
    if match is None:
        return name.replace(_HYBRID_NORM, _GPT_NORM)
    block, number, rest = match[1], first + int(match[2]), match[3]
    if not (_IN_MLP if number % 2 else _IN_ATTENTION).match(rest):
        raise UnsupportedError(
            f"layer {number} of the hybrid model holds {rest}",
            hint="attention and MLP must take turns, as in a model that Hugging Face has",
        )
    return f"{block}{number // 2}.{rest}"


def pattern_of(names: Iterable[str]) -> str:
    """The pattern, without stages, of a model with these names of GPTModel."""
    moe: dict[int, bool] = {}
    for name in names:
        if match := _LAYER.fullmatch(name):
            layer = int(match[2])
            moe[layer] = moe.get(layer, False) or match[3].startswith("mlp.router.")
    return "".join(ATTENTION + (MOE if moe[layer] else MLP) for layer in sorted(moe))


def hybrid_args(args: Mapping[str, Any], moe: Sequence[bool], stages: Iterable[Sequence[int]]) -> dict[str, Any]:
    """The arguments of a HybridModel.

    Args:
        args: Those of the same model as a GPTModel.
        moe: For each layer of GPTModel, whether it has experts.
        stages: Its layers on each stage, in the order in which data passes them.
    """
    segments = ("".join(ATTENTION + (MOE if moe[layer] else MLP) for layer in stage) for stage in stages)
    skip = args.get("window_attn_skip_freq")
    return {
        **{name: value for name, value in args.items() if name != "pipeline_model_parallel_layout"},
        "num_layers": 2 * len(moe),
        PATTERN: "|".join(segments),
        "is_hybrid_model": True,
        "decoder_first_pipeline_num_layers": None,
        "decoder_last_pipeline_num_layers": None,
        "account_for_embedding_in_pipeline_split": False,
        "account_for_loss_in_pipeline_split": False,
        "window_attn_skip_freq": [slides for one in skip for slides in (one, 0)] if isinstance(skip, list) else skip,
        **({"moe_layer_freq": 1} if any(moe) else {}),
    }


def gpt_args(args: Mapping[str, Any], pattern: str) -> dict[str, Any]:
    """The arguments of a GPTModel.

    Args:
        args: Those of the same model as a HybridModel; none at all stay none.
        pattern: The pattern that its tensors make, without stages.

    Raises:
        InputError: The arguments give another pattern.
        UnsupportedError: Their pattern has multi-token prediction.
    """
    if not args:
        return {}
    told = args.get(PATTERN) or args.get(OLD_PATTERN)
    if isinstance(told, str):
        main, *prediction = told.split("/")
        if any(prediction):
            raise UnsupportedError(f"hybrid layer pattern {told[:60]!r} with multi-token prediction")
        if main.replace("|", "") != pattern:
            raise InputError(f"args give the layer pattern {told[:60]!r}, but the tensors form {pattern[:60]!r}")
    moe = [int(symbol == MOE) for symbol in pattern[1::2]]
    return {
        **args,
        "num_layers": len(moe),
        "moe_layer_freq": 1 if all(moe) else moe,
        "window_attn_skip_freq": _skip(args.get("window_attn_skip_freq"), len(moe)),
    }


def _skip(skip: Any, layers: int) -> Any:
    """Which layers of GPTModel have a window, from the same argument for the layers of HybridModel."""
    if isinstance(skip, int):
        return [int((2 * layer + 1) % skip != 0) for layer in range(layers)]
    return skip[::2] if isinstance(skip, list) else skip


def inexpressible_as_hybrid(rope_kinds: Iterable[str]) -> list[str]:
    """Settings that GPTModel has an argument for and HybridModel has none, as sentences."""
    if "llama3" in rope_kinds:
        return ["llama3 rope: HybridModel does not scale it (GPTModel does)"]
    return []
