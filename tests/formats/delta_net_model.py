"""megatron-core's own GPTModel with gated DeltaNets: on a few ranks it loads a distributed checkpoint and saves it.

The program of a rank: `python -m tests.formats.delta_net_model KIND FOLDER RANK TP PP EP`. It loads `FOLDER/ours`,
prints the keys that differ, and saves the model as `FOLDER/theirs`. A single rank also writes its logits.

Where there is no GPU, three things are ours: the norm, since megatron-core has zero-centred ones of Transformer Engine
alone; the linear layers are those of the local spec; and `l2norm`, of `flash-linear-attention`, is four lines of torch.
The DeltaNet itself runs in megatron-core's deterministic path.
"""

from __future__ import annotations

import sys
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

from tests.formats.megatron_ranks import cuda_is_cpu
from tests.models import raw_config

LENGTH = 70
"""Tokens of the input: more than one chunk of the gated delta rule."""


def l2norm(x: Any) -> Any:
    """Rows of length 1, as the kernels of `flash-linear-attention` and transformers have them."""
    import torch

    return x * torch.rsqrt((x * x).sum(dim=-1, keepdim=True) + 1e-6)


def zero_centered_norm() -> type:
    """An RMSNorm that multiplies by one more than its weight."""
    import torch

    class Norm(torch.nn.Module):
        def __init__(self, config: Any, hidden_size: int, eps: float = 1e-6, **unused: Any) -> None:
            super().__init__()
            self.eps, self.weight = eps, torch.nn.Parameter(torch.zeros(hidden_size))

        def forward(self, x: Any) -> Any:
            return torch.nn.functional.rms_norm(x, x.shape[-1:], eps=self.eps) * (1 + self.weight)

    return Norm


def config_of(raw: dict[str, Any], tp: int, pp: int, ep: int) -> Any:
    """megatron-core's config, whatever ckptkit makes of config.json."""
    import torch
    from megatron.core.transformer.transformer_config import TransformerConfig

    types = raw["layer_types"]
    dense = raw.get("mlp_only_layers") or []
    experts: dict[str, Any] = {}
    if "num_experts" in raw:
        experts = {
            "num_moe_experts": raw["num_experts"],
            "moe_ffn_hidden_size": raw["moe_intermediate_size"],
            "moe_shared_expert_intermediate_size": raw["shared_expert_intermediate_size"],
            "moe_shared_expert_gate": True,
            "moe_layer_freq": [int(layer not in dense) for layer in range(len(types))],
            "moe_router_topk": raw["num_experts_per_tok"],
            "moe_router_pre_softmax": not raw.get("norm_topk_prob", True),
            "moe_token_dispatcher_type": "allgather",
        }
    return TransformerConfig(
        num_layers=raw["num_hidden_layers"],
        hidden_size=raw["hidden_size"],
        ffn_hidden_size=raw.get("intermediate_size") or raw["moe_intermediate_size"],
        num_attention_heads=raw["num_attention_heads"],
        num_query_groups=raw["num_key_value_heads"],
        kv_channels=raw["head_dim"],
        attention_output_gate=True,
        experimental_attention_variant="gated_delta_net",
        linear_attention_freq=[int(kind == "linear_attention") for kind in types],
        linear_conv_kernel_dim=raw["linear_conv_kernel_dim"],
        linear_key_head_dim=raw["linear_key_head_dim"],
        linear_value_head_dim=raw["linear_value_head_dim"],
        linear_num_key_heads=raw["linear_num_key_heads"],
        linear_num_value_heads=raw["linear_num_value_heads"],
        normalization="RMSNorm",
        layernorm_epsilon=raw["rms_norm_eps"],
        qk_layernorm=True,
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        add_bias_linear=False,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        gradient_accumulation_fusion=False,
        deterministic_mode=True,
        use_cpu_initialization=True,
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp,
        expert_model_parallel_size=ep,
        pipeline_dtype=torch.float32,
        **experts,
    )


def layer_specs(config: Any) -> list[Any]:
    """A spec for each layer of the model: the local one, with a DeltaNet where the config says so."""
    from megatron.core.models.backends import LocalSpecProvider
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.ssm.gated_delta_net import GatedDeltaNet, GatedDeltaNetSubmodules
    from megatron.core.transformer.spec_utils import ModuleSpec

    norm, backend = zero_centered_norm(), LocalSpecProvider()
    delta = ModuleSpec(
        module=GatedDeltaNet,
        submodules=GatedDeltaNetSubmodules(backend.column_parallel_linear(), norm, backend.row_parallel_linear()),
    )
    moe = config.moe_layer_freq if config.num_moe_experts else [0] * config.num_layers
    specs = []
    for has_experts, linear in zip(moe, config.linear_attention_freq, strict=True):
        spec = get_gpt_layer_local_spec(config.num_moe_experts if has_experts else None, qk_layernorm=True)
        inside = spec.submodules
        fused = "self_attention.in_proj.layer_norm_" if linear else "self_attention.linear_qkv.layer_norm_"
        keys = {"input_layernorm.": fused}
        if not has_experts:
            keys["pre_mlp_layernorm."] = "mlp.linear_fc1.layer_norm_"
        inside = replace(inside, input_layernorm=norm, pre_mlp_layernorm=norm, sharded_state_dict_keys_map=keys)
        if linear:
            inside = replace(inside, self_attention=delta)
        else:
            own = replace(inside.self_attention.submodules, q_layernorm=norm, k_layernorm=norm)
            inside = replace(inside, self_attention=replace(inside.self_attention, submodules=own))
        specs.append(replace(spec, submodules=inside))
    return specs


def build(kind: str, tp: int, pp: int, ep: int) -> Any:
    """The part of the model that this rank has."""
    from megatron.core import parallel_state
    from megatron.core.models.gpt import GPTModel
    from megatron.core.ssm import gated_delta_net
    from megatron.core.transformer.moe import moe_utils
    from megatron.core.transformer.transformer_block import TransformerBlockSubmodules

    moe_utils.te_general_gemm = None  # 0.16.1 forgets that there may be none
    gated_delta_net.HAVE_FLA, gated_delta_net.l2norm = True, l2norm
    raw = raw_config(kind)
    config, here = config_of(raw, tp, pp, ep), parallel_state.get_pipeline_model_parallel_rank()
    each = config.num_layers // pp
    rope = raw["rope_parameters"]
    return GPTModel(
        config,
        TransformerBlockSubmodules(layer_specs(config)[here * each : (here + 1) * each], zero_centered_norm()),
        vocab_size=256,
        max_sequence_length=512,
        pre_process=here == 0,
        post_process=here == pp - 1,
        share_embeddings_and_output_weights=raw["tie_word_embeddings"],
        position_embedding_type="rope",
        rotary_base=rope["rope_theta"],
        rotary_percent=rope["partial_rotary_factor"],
    ).float()


def main(kind: str, folder: Path, rank: int, tp: int, pp: int, ep: int) -> None:
    """One rank's part."""
    import torch
    from megatron.core import dist_checkpointing, parallel_state, tensor_parallel
    from megatron.core.dist_checkpointing.validation import StrictHandling

    cuda_is_cpu(setattr)
    size = tp * pp * ep
    store = torch.distributed.FileStore(str(folder / "store"), size)
    torch.distributed.init_process_group("gloo", rank=rank, world_size=size, store=store)
    parallel_state.initialize_model_parallel(tp, pp, expert_model_parallel_size=ep)
    tensor_parallel.random.initialize_rng_tracker(inference_rng_tracker=True)
    model = build(kind, tp, pp, ep)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(float("nan"))
    metadata = {"non_homogeneous_layers": True, "singleton_local_shards": False}
    wanted = model.sharded_state_dict(metadata=metadata)
    found, lacking, further = dist_checkpointing.load(
        wanted, str(folder / "ours" / "release"), strict=StrictHandling.RETURN_ALL
    )
    model.load_state_dict(found, strict=False)
    unset = [name for name, parameter in model.named_parameters() if parameter.isnan().any()]
    if rank == 0:
        problems = [("missing", lacking), ("further", further), ("unset", unset)]
        print("\n".join(f"{what} {key}" for what, keys in problems for key in sorted(keys)))
        (folder / "theirs").mkdir()
    torch.distributed.barrier()
    dist_checkpointing.save(model.sharded_state_dict(metadata=metadata), str(folder / "theirs"))
    if size == 1 and (folder / "tokens.pt").exists():
        tokens = torch.load(folder / "tokens.pt")
        places = torch.arange(tokens.shape[1]).expand_as(tokens)
        mask = torch.ones(tokens.shape[1], tokens.shape[1]).triu(1).bool()[None, None]
        with torch.no_grad():
            torch.save(model.eval()(tokens, places, mask), folder / "logits.pt")
    torch.distributed.barrier()


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main(sys.argv[1], Path(sys.argv[2]), *map(int, sys.argv[3:]))
