"""Megatron-LM's command line for a model: a flag for each argument that describes the model or its grid.

With `--use-checkpoint-args`, Megatron-LM takes most of a model from the checkpoint's `args`, but not all. Without a
word it leaves q/k norms, windows, epsilons and scaled ropes at the defaults of its parser, and computes another model.
The table says which arguments those are. It is tested against what Megatron-LM's parser takes, and against what
`load_args_from_checkpoint` restores, as `fixtures/megatron_lm.json` records them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ckptkit.megatron_args.fields import GRID_FIELDS
from ckptkit.megatron_args.inexpressible import inexpressible
from ckptkit.megatron_args.writing import model_args
from ckptkit.sharding.grid import Parallelism
from ckptkit.tables.family import Family
from ckptkit.tables.model_config import ModelConfig

USE_CHECKPOINT_ARGS = "--use-checkpoint-args"
_NULL_TOKENIZER, _OWN_TOKENIZER = "NullTokenizer", "--no-use-tokenizer-model-from-checkpoint-args"
_OF_OUTPUT = ("moe_grouped_gemm", "transformer_impl", "mla_down_proj_fusion")
"""Arguments that are an output's, and not its model's."""


@dataclass(frozen=True)
class Flag:
    """A flag of Megatron-LM's command line.

    Attributes:
        option: The flag.
        args: Name of the argument, as `args` are written.
        default: What the argument is without the flag.
        restored: Whether `--use-checkpoint-args` takes the argument from a checkpoint.
        switch: Whether no value follows.
        whole: Whether Megatron-LM takes whole numbers only.
        dest: Name that the parser gives to the argument, where it is not `args`.
    """

    option: str
    args: str
    default: Any = None
    restored: bool = False
    switch: bool = False
    whole: bool = False
    dest: str | None = None

    def words(self, value: Any) -> list[str]:
        """The flag on the command line for a value, or nothing where it needs none."""
        if value is None or value == self.default:
            return []
        return [self.option] if self.switch else [self.option, self._text(value)]

    def _text(self, value: Any) -> str:
        if isinstance(value, list):
            return f"[{','.join(map(str, value))}]"
        if isinstance(value, tuple):
            return ",".join(map(str, value))
        return str(int(value) if self.whole and float(value).is_integer() else value)


def _switch(option: str, args: str, restored: bool = False, default: bool = False, dest: str | None = None) -> Flag:
    return Flag(option, args, default, restored, switch=True, dest=dest)


FLAGS = (
    Flag("--num-layers", "num_layers", restored=True),
    Flag("--hidden-size", "hidden_size", restored=True),
    Flag("--ffn-hidden-size", "ffn_hidden_size", restored=True),
    Flag("--seq-length", "seq_length", restored=True),
    Flag("--max-position-embeddings", "max_position_embeddings", restored=True),
    Flag("--num-attention-heads", "num_attention_heads", restored=True),
    _switch("--group-query-attention", "group_query_attention", restored=True),
    Flag("--num-query-groups", "num_query_groups", default=1, restored=True),
    Flag("--kv-channels", "kv_channels", restored=True),
    Flag("--position-embedding-type", "position_embedding_type", default="learned_absolute", restored=True),
    Flag("--rotary-base", "rotary_base", default=10000, restored=True, whole=True),
    Flag("--rotary-percent", "rotary_percent", default=1.0, restored=True),
    Flag("--rotary-seq-len-interpolation-factor", "rotary_seq_len_interpolation_factor", whole=True),
    _switch("--use-rope-scaling", "use_rope_scaling"),
    Flag("--rope-scaling-factor", "rope_scaling_factor", default=8.0),
    _switch("--disable-bias-linear", "add_bias_linear", restored=True, default=True),
    _switch("--add-qkv-bias", "add_qkv_bias", restored=True),
    _switch("--swiglu", "swiglu", restored=True),
    _switch("--quick-geglu", "quick_geglu"),
    Flag("--activation-func-clamp-value", "activation_func_clamp_value"),
    Flag("--glu-linear-offset", "glu_linear_offset", default=0.0),
    Flag("--softmax-type", "softmax_type", default="vanilla"),
    Flag("--normalization", "normalization", default="LayerNorm", restored=True),
    Flag("--norm-epsilon", "norm_epsilon", default=1e-5, dest="layernorm_epsilon"),
    _switch("--apply-layernorm-1p", "apply_layernorm_1p", dest="layernorm_zero_centered_gamma"),
    _switch("--qk-layernorm", "qk_layernorm"),
    _switch("--untie-embeddings-and-output-weights", "untie_embeddings_and_output_weights", restored=True),
    Flag("--attention-dropout", "attention_dropout", default=0.1, restored=True),
    Flag("--hidden-dropout", "hidden_dropout", default=0.1, restored=True),
    Flag("--window-size", "window_size"),
    Flag("--window-attn-skip-freq", "window_attn_skip_freq"),
    Flag("--mtp-num-layers", "mtp_num_layers", restored=True),
    _switch("--multi-latent-attention", "multi_latent_attention"),
    Flag("--q-lora-rank", "q_lora_rank"),
    Flag("--kv-lora-rank", "kv_lora_rank", default=32),
    Flag("--qk-head-dim", "qk_head_dim", default=128),
    Flag("--qk-pos-emb-head-dim", "qk_pos_emb_head_dim", default=64),
    Flag("--v-head-dim", "v_head_dim", default=128),
    Flag("--rope-type", "rope_type"),
    Flag("--rotary-scaling-factor", "rotary_scaling_factor", default=1.0),
    Flag("--mscale", "mscale", default=1.0),
    Flag("--mscale-all-dim", "mscale_all_dim", default=0.0),
    Flag("--experimental-attention-variant", "experimental_attention_variant"),
    Flag("--linear-attention-freq", "linear_attention_freq"),
    Flag("--linear-conv-kernel-dim", "linear_conv_kernel_dim", default=4),
    Flag("--linear-key-head-dim", "linear_key_head_dim", default=128),
    Flag("--linear-value-head-dim", "linear_value_head_dim", default=128),
    Flag("--linear-num-key-heads", "linear_num_key_heads", default=16),
    Flag("--linear-num-value-heads", "linear_num_value_heads", default=32),
    _switch("--attention-output-gate", "attention_output_gate"),
    Flag("--num-experts", "num_experts", restored=True),
    Flag("--moe-layer-freq", "moe_layer_freq", default=1, restored=True),
    Flag("--moe-ffn-hidden-size", "moe_ffn_hidden_size", restored=True),
    Flag("--moe-router-topk", "moe_router_topk", default=2, restored=True),
    Flag("--moe-router-score-function", "moe_router_score_function", default="softmax", restored=True),
    _switch("--moe-router-pre-softmax", "moe_router_pre_softmax", restored=True),
    _switch("--moe-router-enable-expert-bias", "moe_router_enable_expert_bias", restored=True),
    Flag("--moe-router-dtype", "moe_router_dtype"),
    Flag("--moe-router-topk-scaling-factor", "moe_router_topk_scaling_factor", restored=True),
    Flag("--moe-router-num-groups", "moe_router_num_groups"),
    Flag("--moe-router-group-topk", "moe_router_group_topk"),
    Flag("--moe-shared-expert-intermediate-size", "moe_shared_expert_intermediate_size", restored=True),
    _switch("--moe-shared-expert-gate", "moe_shared_expert_gate"),
    _switch("--moe-grouped-gemm", "moe_grouped_gemm", restored=True),
    _switch("--mla-down-proj-fusion", "mla_down_proj_fusion"),
    Flag("--transformer-impl", "transformer_impl", default="transformer_engine"),
)
"""The flags that describe a model, in the order in which they are printed."""

GRID_FLAGS = (
    Flag("--tensor-model-parallel-size", "tensor_model_parallel_size", default=1),
    Flag("--pipeline-model-parallel-size", "pipeline_model_parallel_size", default=1),
    Flag("--num-virtual-stages-per-pipeline-rank", "virtual_pipeline_model_parallel_size"),
    Flag("--decoder-first-pipeline-num-layers", "decoder_first_pipeline_num_layers"),
    Flag("--decoder-last-pipeline-num-layers", "decoder_last_pipeline_num_layers"),
    _switch("--account-for-embedding-in-pipeline-split", "account_for_embedding_in_pipeline_split"),
    _switch("--account-for-loss-in-pipeline-split", "account_for_loss_in_pipeline_split"),
    Flag("--pipeline-model-parallel-layout", "pipeline_model_parallel_layout"),
    Flag("--expert-model-parallel-size", "expert_model_parallel_size", default=1),
    Flag("--expert-tensor-parallel-size", "expert_tensor_parallel_size"),
)
"""The flags of a grid, which files of ranks fit and a distributed checkpoint does not ask for."""


def megatron_flags(
    family: Family, config: ModelConfig, stored: Mapping[str, Any], grid: Parallelism | None = None
) -> list[str] | None:
    """The words after `pretrain_gpt.py` with which Megatron-LM 0.19 builds a model, or None where no words do.

    Args:
        family: The model's family.
        config: The model.
        stored: The checkpoint's `args`; empty where it has none, and then the words describe the whole model.
        grid: The one grid that the checkpoint's files are for; None where any grid loads them.
    """
    if inexpressible(config, local=stored.get("transformer_impl") == "local"):
        return None
    hybrid = "hybrid_layer_pattern" in stored
    kept = (*_OF_OUTPUT, *(("window_attn_skip_freq",) if hybrid else ()))
    model = {**model_args(family, config), **{name: stored[name] for name in kept if name in stored}}
    words = [USE_CHECKPOINT_ARGS] if stored else []
    words += [_OWN_TOKENIZER] if stored.get("tokenizer_type") == _NULL_TOKENIZER else []
    for flag in FLAGS:
        if not (flag.restored and stored.get(flag.args) is not None):
            words += flag.words(model.get(flag.args))
    return words if grid is None else words + _grid_words(grid, hybrid)


def _grid_words(grid: Parallelism, hybrid: bool) -> list[str]:
    """The flags of a grid, without those that others imply: a layout says how many virtual stages there are."""
    args = {field.args: field.value(grid) for field in GRID_FIELDS if field.is_written(grid)}
    implied = {"expert_tensor_parallel_size"} if grid.expert_tp == grid.tp else set()
    if grid.pipeline_layout is not None or hybrid:
        implied.add("virtual_pipeline_model_parallel_size")
    return [word for flag in GRID_FLAGS if flag.args not in implied for word in flag.words(args.get(flag.args))]
