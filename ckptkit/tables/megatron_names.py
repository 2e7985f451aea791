"""The extra states of Megatron's modules, and the names of the norm before experts in each layer spec.

A module may have an `_extra_state`: an object beside its tensors. It is empty unless the module computes in FP8, but
strict loading asks for it. In per-rank files only modules of Transformer Engine have one. In a distributed checkpoint
every parallel linear layer has one, whatever its layer spec; so has the last norm, which Megatron-Core takes from
Transformer Engine in every spec, wherever that is installed (but for one way of building models with experts from the
local spec, where the key is one too many). Attention has one in a distributed checkpoint only with a learnable softmax,
and there only Transformer Engine's.

Source: `get_extra_state` of Transformer Engine's modules, `DotProductAttention` of it (`softmax_offset` is a parameter
of [heads / tensor parallel size] beside that state), and `sharded_state_dict` of Megatron-Core's
`ColumnParallelLinear`, `RowParallelLinear`, `TEDotProductAttention` and `TransformerLayer`, 0.16.1 and 0.19.2.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from ckptkit.tables.family import MegatronQuirks

_STATE = "_extra_state"
WRAPPED = "base_layer"
"""Where the modules of PEFT keep the layer that they adapt. Source: `LoraLayer` of peft, `LoraParallelLinear` of
mcore-bridge."""
_PREDICTION = "eh_proj"
_WEIGHT = re.compile(r"(.+)\.weight(\d*)")
_LATENT = (
    ".linear_q_proj",
    ".linear_qkv_down_proj",
    *(f".linear_{part}_{way}_proj" for part in ("q", "kv") for way in ("down", "up")),
)
_DELTA = tuple(f".self_attention.{linear}" for linear in ("in_proj", "out_proj"))
_TE_LINEAR = (".linear_qkv", ".linear_proj", ".linear_fc1", ".linear_fc2", ".eh_proj", *_LATENT, *_DELTA)
_LINEAR, _NORMS = "linear_", ("_layernorm", "final_norm", ".enorm", ".hnorm", ".self_attention.out_norm")
_QKV, _KV, _CORE = "linear_qkv", "linear_kv_up_proj", "core_attention"
_SINKS = f".{_CORE}.softmax_offset"
_LAST_NORM, _HYBRID_NORM, _HEAD = "decoder.final_layernorm", "decoder.final_norm", "output_layer"
_NORM_BEFORE_EXPERTS, _FUSED_NORM = "pre_mlp_layernorm.weight", "mlp.linear_fc1.layer_norm_weight"
_EXPERTS = re.compile(r"(.+\.mlp)\.experts\..+")


def rank_states(name: str, quirks: MegatronQuirks) -> list[str]:
    """Names of the extra states beside a tensor in a per-rank file, for a model of Transformer Engine's modules.

    Args:
        name: The tensor, as the file names it.
        quirks: The quirks of its family.
    """
    module = name.rpartition(".")[0]
    bare = module.removesuffix(f".{WRAPPED}")
    modules = [module] if bare.endswith((*_TE_LINEAR, *_NORMS)) and not bare.endswith(quirks.plain) else []
    for linear in (_QKV, _KV):
        if bare.endswith(f".self_attention.{linear}"):
            modules.append(bare.removesuffix(linear) + _CORE)
    return [f"{module}.{_STATE}" for module in modules]


def distributed_states(name: str, spec: str, quirks: MegatronQuirks) -> list[str]:
    """Names of the extra states beside a tensor of a distributed checkpoint, with its layer and expert numbers.

    Args:
        name: Canonical name of the tensor, or its name in HybridModel.
        spec: `te`, or another layer spec. Only in `te` other norms than the last have a state.
        quirks: The quirks of its family.
    """
    if name.endswith(_SINKS):
        return [f"{name.rpartition('.')[0]}.{_STATE}"] if spec == "te" else []
    match = _WEIGHT.fullmatch(name)
    if match is None:
        return []
    module, expert = match.groups()
    bare = module.removesuffix(f".{WRAPPED}")
    if bare.endswith(quirks.plain):
        return []
    last = bare.rpartition(".")[2]
    is_linear = last.startswith(_LINEAR) or last in (_PREDICTION, *quirks.parallel) or bare.endswith(_DELTA)
    modules = [module] if is_linear else []
    if module.endswith(_HYBRID_NORM):  # GPTModel leaves out the state of its head, HybridModel does not
        modules.append(module.removesuffix(_HYBRID_NORM) + _HEAD)
    if module.endswith(_NORMS if spec == "te" else (_LAST_NORM, _HYBRID_NORM)):
        modules.append(module)
    return [f"{module}.{_STATE}{expert}" for module in modules]


def norms_of_local_spec(names: Iterable[str]) -> dict[str, str]:
    """Canonical names of the norms before experts -> their names in a distributed checkpoint of the local layer spec.

    In a layer with experts, the `te` spec names this norm `pre_mlp_layernorm.weight`. The local spec gives it the name
    of a norm that is fused into a dense MLP.
    """
    names = set(names)
    blocks = {match[1].removesuffix("mlp") for name in names if (match := _EXPERTS.fullmatch(name))}
    return {
        block + _NORM_BEFORE_EXPERTS: block + _FUSED_NORM for block in blocks if block + _NORM_BEFORE_EXPERTS in names
    }


def norms_from_local_spec(names: Iterable[str]) -> dict[str, str]:
    """The inverse of `norms_of_local_spec`, for names of any layer spec: stored name -> canonical name."""
    names = set(names)
    return {
        fused: fused.removesuffix(_FUSED_NORM) + _NORM_BEFORE_EXPERTS
        for fused in names
        if fused.endswith(f".{_FUSED_NORM}")
        and fused.replace("layer_norm_weight", "weight") not in names
        and fused.removesuffix(_FUSED_NORM) + "mlp.router.weight" in names
    }
