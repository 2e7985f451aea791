"""megatron-core's own model of GLM-4.5 or DeepSeek-V3, on one rank, loads a checkpoint.

It is a GPTModel with multi-token prediction, or, with `hybrid` at the end, a HybridModel without.

A program of its own: `python -m tests.formats.prediction_model KIND FORMAT FOLDER [hybrid]`. It prints the keys of a
distributed checkpoint that differ, and ends with an error where tensors do not fit the model. With `live` as the format
it loads `FOLDER/hf` into the running model, and saves it as `FOLDER/back`.
"""

from __future__ import annotations

import os
import sys
import warnings
from pathlib import Path
from typing import Any

from tests.formats.hybrid_model import build_latent
from tests.models import raw_config


def build(kind: str, hybrid: bool = False) -> Any:
    """The model, from megatron-core's local spec and its config, whatever ckptkit makes of config.json."""
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec, get_gpt_mtp_block_spec
    from megatron.core.transformer.identity_op import IdentityOp
    from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig

    raw = raw_config(kind)
    dense = raw["first_k_dense_replace"]
    shared = {
        "num_layers": raw["num_hidden_layers"] * (2 if hybrid else 1),
        "hidden_size": raw["hidden_size"],
        "ffn_hidden_size": raw["intermediate_size"],
        "num_attention_heads": raw["num_attention_heads"],
        "num_query_groups": raw["num_key_value_heads"],
        "num_moe_experts": raw["n_routed_experts"],
        "moe_ffn_hidden_size": raw["moe_intermediate_size"],
        "moe_shared_expert_intermediate_size": raw["moe_intermediate_size"] * raw["n_shared_experts"],
        "moe_layer_freq": 1 if hybrid else [int(layer >= dense) for layer in range(raw["num_hidden_layers"])],
        "moe_router_score_function": "sigmoid",
        "moe_router_enable_expert_bias": True,
        "moe_router_topk": raw["num_experts_per_tok"],
        "mtp_num_layers": None if hybrid else 1,
        "normalization": "RMSNorm",
        "gated_linear_unit": True,
        "add_bias_linear": False,
        "qk_layernorm": True,
        "use_cpu_initialization": True,
    }
    if "kv_lora_rank" in raw:
        config = MLATransformerConfig(
            **shared,
            q_lora_rank=raw["q_lora_rank"],
            kv_lora_rank=raw["kv_lora_rank"],
            qk_head_dim=raw["qk_nope_head_dim"],
            qk_pos_emb_head_dim=raw["qk_rope_head_dim"],
            v_head_dim=raw["v_head_dim"],
            rope_type="rope",
        )
    else:
        config = TransformerConfig(**shared, kv_channels=raw["head_dim"], add_qkv_bias=True)
    if hybrid:
        pattern = "".join("+E" if layer >= dense else "+-" for layer in range(raw["num_hidden_layers"]))
        sizes = {"vocab_size": 256, "max_sequence_length": 512, "share_embeddings_and_output_weights": False}
        return build_latent(config, pattern, **sizes)
    spec = get_gpt_decoder_block_spec(config, use_transformer_engine=False)
    if "kv_lora_rank" in raw:
        for layer in spec.layer_specs:
            layer.submodules.self_attention.submodules.core_attention = IdentityOp  # 0.16.1 has none without GPU
    return GPTModel(
        config,
        spec,
        vocab_size=256,
        max_sequence_length=512,
        share_embeddings_and_output_weights=False,
        position_embedding_type="rope",
        mtp_block_spec=get_gpt_mtp_block_spec(config, spec, use_transformer_engine=False),
    )


def load(kind: str, format: str, folder: Path, hybrid: bool = False) -> list[str]:
    """Loads a checkpoint strictly, and returns the keys that the model or the checkpoint lacks."""
    import torch
    from megatron.core import dist_checkpointing, parallel_state
    from megatron.core.dist_checkpointing.validation import StrictHandling
    from megatron.core.transformer import multi_latent_attention

    torch.distributed.init_process_group("gloo", rank=0, world_size=1, store=torch.distributed.HashStore())
    parallel_state.initialize_model_parallel()
    torch.cuda.current_device = lambda: torch.device("cpu")
    multi_latent_attention.HAVE_TE = False
    model = build(kind, hybrid)
    if format == "live":
        return both_ways(model, folder)
    if format == "torch":
        content = torch.load(folder / "mp_rank_00" / "model_optim_rng.pt", weights_only=False)
        lacking, further = model.load_state_dict(content["model"], strict=False)
        lacking = [key for key in lacking if "_extra_state" not in key]
        return [*(f"missing {key}" for key in lacking), *(f"further {key}" for key in further)]
    wanted = model.sharded_state_dict(metadata={"non_homogeneous_layers": True})
    _, lacking, further = dist_checkpointing.load(wanted, str(folder), strict=StrictHandling.RETURN_ALL)
    return [*(f"missing {key}" for key in sorted(lacking)), *(f"further {key}" for key in sorted(further))]


def both_ways(model: Any, folder: Path) -> list[str]:
    """Loads the Hugging Face directory `hf` into the running model, and saves that beside it."""
    import torch

    from ckptkit import load_hf, save_hf

    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(7)
    load_hf(model, folder / "hf")
    left = [name for name, parameter in model.named_parameters() if (parameter == 7).all()]
    save_hf(model, folder / "back", hf_reference=folder / "hf")
    return [f"missing {name}" for name in left]


if __name__ == "__main__":
    os.environ.setdefault("MASTER_ADDR", "localhost")
    warnings.simplefilter("ignore")
    print("\n".join(load(sys.argv[1], sys.argv[2], Path(sys.argv[3]), "hybrid" in sys.argv[4:])))
