"""The real HybridModel of megatron-core 0.19 (MambaModel in 0.16) with layers of GPTModel's local spec.

Megatron-Core has a stack spec for Transformer Engine only. Here its layers are those of `get_gpt_layer_local_spec`,
each taken apart into one with the attention and one with the MLP, and the last norm is the local one, too.
"""

from __future__ import annotations

import copy
from typing import Any


def pattern(moe: list[bool], stages: int) -> str:
    """The pattern of a model, its layers spread evenly over stages."""
    layers = ["*E" if has else "*-" for has in moe]
    share = len(layers) // stages
    return "|".join("".join(layers[start : start + share]) for start in range(0, len(layers), share))


def build(config: Any, moe: bool, layers: str, vp_stage: int | None = None, **options: Any) -> Any:
    """A model chunk of this rank; `options` are those of both models' constructors."""
    try:
        from megatron.core.models.hybrid import hybrid_block as block
        from megatron.core.models.hybrid.hybrid_model import HybridModel
    except ImportError:
        from megatron.core.models.mamba import MambaModel
        from megatron.core.ssm import mamba_block as block

        assert vp_stage is None
        spec = _stack_spec(block, block.MambaStack, block.MambaStackSubmodules, config, moe)
        return MambaModel(config, spec, hybrid_override_pattern=layers.replace("|", ""), **options)
    spec = _stack_spec(block, block.HybridStack, block.HybridStackSubmodules, config, moe)
    return HybridModel(config, spec, hybrid_layer_pattern=layers, vp_stage=vp_stage, **options)


def build_latent(config: Any, layers: str, **options: Any) -> Any:
    """A model of 0.19 with latent attention, and with dense layers as well as such with experts."""
    from megatron.core.models.hybrid import hybrid_block as block
    from megatron.core.models.hybrid.hybrid_model import HybridModel
    from megatron.core.transformer.identity_op import IdentityOp
    from megatron.core.transformer.spec_utils import ModuleSpec
    from megatron.core.transformer.torch_norm import WrappedTorchNorm

    block.TENorm = WrappedTorchNorm
    attention, dense = _halves(config, False, latent=True)
    attention.submodules.self_attention.submodules.core_attention = IdentityOp
    _, experts = _halves(config, True, latent=True)
    parts = block.HybridStackSubmodules(mla_layer=attention, mlp_layer=dense, moe_layer=experts)
    spec = ModuleSpec(module=block.HybridStack, submodules=parts)
    return HybridModel(config, spec, hybrid_layer_pattern=layers, **options)


def _stack_spec(block: Any, stack: Any, submodules: Any, config: Any, moe: bool) -> Any:
    from megatron.core.transformer.spec_utils import ModuleSpec
    from megatron.core.transformer.torch_norm import WrappedTorchNorm

    block.TENorm = WrappedTorchNorm
    attention, mlp = _halves(config, moe)
    kind = {"moe_layer" if moe else "mlp_layer": mlp}
    return ModuleSpec(module=stack, submodules=submodules(attention_layer=attention, **kind))


def _halves(config: Any, moe: bool, *, latent: bool = False) -> tuple[Any, Any]:
    """The attention and the MLP of a layer of GPTModel, each as a layer."""
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.ssm.mlp_layer import MLPLayer
    from megatron.core.transformer.identity_op import IdentityFuncOp, IdentityOp

    layer = get_gpt_layer_local_spec(
        num_experts=config.num_moe_experts if moe else None,
        moe_grouped_gemm=False,
        qk_layernorm=config.qk_layernorm,
        normalization="RMSNorm",
        multi_latent_attention=latent,
    )
    attention, mlp = copy.deepcopy(layer), copy.deepcopy(layer)
    attention.submodules.pre_mlp_layernorm = attention.submodules.mlp = IdentityOp
    attention.submodules.mlp_bda = IdentityFuncOp
    mlp.submodules.input_layernorm = mlp.submodules.self_attention = IdentityOp
    mlp.submodules.self_attn_bda = IdentityFuncOp
    if not moe:
        mlp.module = MLPLayer
    return attention, mlp
