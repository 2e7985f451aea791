"""The names of Megatron-Core's HybridModel, in which attention and MLP are layers of their own.

Since 0.19, Megatron-Core deprecates GPTModel in favour of HybridModel. The tensors are the same. Layer `i` of GPTModel
becomes layer `2i` (symbol `*` for attention, `+` for latent attention) and layer `2i + 1` (`-` for a dense MLP, `E`
for experts). The last norm is `decoder.final_norm`. One argument describes all layers: a pattern of these symbols, with
`|` between model chunks.

Source: `HybridStack`, `HybridModel` and `select_pipeline_segment` of megatron-core 0.19.2; `MambaModel` of 0.16.1 has
the same names, and no latent attention.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ckptkit.errors import InputError, UnsupportedError, UsageError

ATTENTION, LATENT, MLP, MOE = "*", "+", "-", "E"
GPT, HYBRID = "gpt", "hybrid"
MODELS = (GPT, HYBRID)
PATTERN, OLD_PATTERN = "hybrid_layer_pattern", "hybrid_override_pattern"

_GPT_NORM, _HYBRID_NORM = "decoder.final_layernorm.weight", "decoder.final_norm.weight"
_LAYER = re.compile(r"(.*\bdecoder\.layers\.)(\d+)\.(.+)")
_IN_ATTENTION = re.compile(r"(self_attention|input_layernorm)\.")
_IN_LATENT = re.compile(r"self_attention\.linear_(kv|qkv)_down_proj\.")
_IN_MLP = re.compile(r"(mlp|pre_mlp_layernorm)\.")


def hybrid_name(name: str) -> str:
    """A name of GPTModel -> the name in HybridModel. Layer numbers may be local to a stage or global.

    Raises:
        UsageError: HybridModel has no such tensor.
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
    """The number of layers of a model chunk of HybridModel: its highest layer number plus 1."""
    return max((int(match[2]) + 1 for name in names if (match := _LAYER.fullmatch(name))), default=0)


def gpt_name(name: str, first: int = 0) -> str:
    """A name of HybridModel -> the name in GPTModel, with the global layer number.

    Args:
        name: The name, its layer counted from `first`.
        first: Layers of HybridModel on the stages before.

    Raises:
        UnsupportedError: Attention and MLP do not take turns, or a layer is neither.
    """
    match = _LAYER.fullmatch(name)
    if match is None:
        return name.replace(_HYBRID_NORM, _GPT_NORM)
    block, number, rest = match[1], first + int(match[2]), match[3]
    if not (_IN_MLP if number % 2 else _IN_ATTENTION).match(rest):
        raise UnsupportedError(
            f"layer {number} of the HybridModel holds {rest}",
            hint="attention and MLP must take turns: Hugging Face has no other models of this kind",
        )
    return f"{block}{number // 2}.{rest}"


def pattern_of(names: Iterable[str]) -> str:
    """The pattern, without `|`, of a model with these names of GPTModel."""
    latent: dict[int, bool] = {}
    moe: dict[int, bool] = {}
    for name in names:
        if match := _LAYER.fullmatch(name):
            layer = int(match[2])
            latent[layer] = latent.get(layer, False) or _IN_LATENT.match(match[3]) is not None
            moe[layer] = moe.get(layer, False) or match[3].startswith("mlp.router.")
    return "".join(_symbols(latent[layer], moe[layer]) for layer in sorted(moe))


def _symbols(latent: bool, moe: bool) -> str:
    """The two layers of HybridModel for one of GPTModel."""
    return (LATENT if latent else ATTENTION) + (MOE if moe else MLP)


def hybrid_args(args: Mapping[str, Any], moe: Sequence[bool], stages: Iterable[Sequence[int]]) -> dict[str, Any]:
    """The arguments of GPTModel -> those of the same model as a HybridModel.

    Args:
        args: The arguments of GPTModel.
        moe: For each layer of GPTModel, whether it has experts.
        stages: Its layers on each stage, in the order in which data passes through the stages.
    """
    latent = bool(args.get("multi_latent_attention"))
    segments = ("".join(_symbols(latent, moe[layer]) for layer in stage) for stage in stages)
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
    """The arguments of HybridModel -> those of the same model as a GPTModel.

    Args:
        args: The arguments of HybridModel; empty if the checkpoint has none, and then the result is empty, too.
        pattern: The pattern of its tensors, without `|`.

    Raises:
        InputError: The arguments give another pattern.
        UnsupportedError: Their pattern has multi-token prediction.
    """
    if not args:
        return {}
    stated = args.get(PATTERN) or args.get(OLD_PATTERN)
    if isinstance(stated, str):
        main, *prediction = stated.split("/")
        if any(prediction):
            raise UnsupportedError(f"hybrid layer pattern {stated[:60]!r} with multi-token prediction")
        if main.replace("|", "") != pattern:
            raise InputError(f"args give the layer pattern {stated[:60]!r}, but the tensors form {pattern[:60]!r}")
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
    """Sentences about settings that the arguments of GPTModel can express and those of HybridModel cannot."""
    if "llama3" in rope_kinds:
        return ["llama3 rope: HybridModel does not scale it (GPTModel does)"]
    return []
