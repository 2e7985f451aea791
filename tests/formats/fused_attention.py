"""megatron-core's `FusedMLASelfAttention` on two ranks takes the layer that `--spec te_fused` writes for each.

A program of its own: `python -m tests.formats.fused_attention FOLDER`, with files of ranks on TP2 in `FOLDER/release`,
and the two weights that the layer is made of in `FOLDER/whole.safetensors`. It needs megatron-core 0.19.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

ATTENTION = "decoder.layers.0.self_attention."
SIZES = {
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "qk_head_dim": 16,
    "qk_pos_emb_head_dim": 8,
    "v_head_dim": 18,
    "hidden_size": 96,
}


def build() -> Any:
    """The attention, with megatron-core's own linear layers in place of Transformer Engine's."""
    from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
    from megatron.core.transformer.enums import AttnMaskType
    from megatron.core.transformer.identity_op import IdentityOp
    from megatron.core.transformer.multi_latent_attention import FusedMLASelfAttention, MLASelfAttentionSubmodules
    from megatron.core.transformer.torch_norm import WrappedTorchNorm
    from megatron.core.transformer.transformer_config import MLATransformerConfig

    config = MLATransformerConfig(
        num_layers=1,
        num_attention_heads=8,
        tensor_model_parallel_size=2,
        normalization="RMSNorm",
        add_bias_linear=False,
        qk_layernorm=True,
        use_cpu_initialization=True,
        rope_type="rope",
        mla_down_proj_fusion=True,
        **SIZES,
    )
    parts = MLASelfAttentionSubmodules(
        linear_qkv_down_proj=ColumnParallelLinear,
        linear_q_up_proj=ColumnParallelLinear,
        linear_kv_up_proj=ColumnParallelLinear,
        core_attention=IdentityOp,
        linear_proj=RowParallelLinear,
        q_layernorm=WrappedTorchNorm,
        kv_layernorm=WrappedTorchNorm,
    )
    return FusedMLASelfAttention(config, parts, layer_number=1, attn_mask_type=AttnMaskType.causal)


def run(rank: int, folder: str, meeting: str) -> None:
    """Loads one rank's layer, and compares both latent vectors, and the keys of a distributed checkpoint."""
    import torch
    import torch.distributed as dist
    from megatron.core import parallel_state
    from safetensors.torch import load_file

    dist.init_process_group("gloo", rank=rank, world_size=2, store=dist.FileStore(meeting, 2))
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=2)
    torch.cuda.current_device = lambda: torch.device("cpu")  # type: ignore[assignment, return-value]
    attention, name = build(), "linear_qkv_down_proj.weight"
    file = Path(folder, "release", f"mp_rank_0{rank}", "model_optim_rng.pt")
    stored = torch.load(file, weights_only=False)["model"][ATTENTION + name]
    attention.load_state_dict({**attention.state_dict(), name: stored})
    states = torch.randn(5, 2, SIZES["hidden_size"], generator=torch.Generator().manual_seed(0))
    queries, own = attention._qkv_down_projection(states)
    parts = [torch.empty_like(own) for _ in range(2)]
    dist.all_gather(parts, own.contiguous())
    whole = load_file(str(Path(folder, "whole.safetensors")))
    for found, weight in ((queries, whole["queries"]), (torch.cat(parts, -1), whole["keys and values"])):
        torch.testing.assert_close(found, states @ weight.T, rtol=1e-5, atol=1e-5)
    keys = {key for key in attention.sharded_state_dict(prefix=ATTENTION) if "down_proj.weight" in key}
    assert keys == {f"{ATTENTION}linear_{part}_down_proj.weight" for part in ("q", "kv")}, keys


if __name__ == "__main__":
    import torch.multiprocessing

    with tempfile.TemporaryDirectory() as place:
        torch.multiprocessing.spawn(run, (sys.argv[1], f"{place}/store"), 2)
    print("equal")
