"""Symbolic sizes: the tables write shapes with them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ckptkit.tables.model_config import DeltaNet, LatentAttention, LayerConfig, ModelConfig


@dataclass(frozen=True, eq=False)
class Dim:
    """A size that depends on the config.

    Attributes:
        name: For messages.
        of: (Model, layer) -> the size.
        by_layer: Whether it is a block for each layer of the model, in their order.
    """

    name: str
    of: Callable[[ModelConfig, LayerConfig], int]
    by_layer: bool = False

    def __mul__(self, factor: int) -> Dim:
        return Dim(f"{factor}*{self.name}", lambda config, layer: factor * self.of(config, layer))

    __rmul__ = __mul__


Shape = tuple[Dim, ...]


def _latent(config: ModelConfig) -> LatentAttention:
    assert config.latent is not None
    return config.latent


def _delta(layer: LayerConfig) -> DeltaNet:
    assert layer.delta is not None
    return layer.delta


V = Dim("vocab_size", lambda config, layer: config.vocab_size)
D = Dim("hidden_size", lambda config, layer: layer.hidden_size or config.hidden_size)
HEADS = Dim("attention heads", lambda config, layer: layer.num_heads)
GROUPS = Dim("key/value heads", lambda config, layer: layer.num_kv_heads)
HD = Dim("head_dim", lambda config, layer: layer.head_dim)
Q = Dim("num_attention_heads*head_dim", lambda config, layer: layer.num_heads * layer.head_dim)
KV = Dim("num_key_value_heads*head_dim", lambda config, layer: layer.num_kv_heads * layer.head_dim)
F = Dim("intermediate_size", lambda config, layer: layer.ffn_hidden_size)
E = Dim("num_experts", lambda config, layer: config.num_experts)
I = Dim("moe_intermediate_size", lambda config, layer: config.moe_ffn_hidden_size)  # noqa: E741  the field's letter
S = Dim("n_shared_experts*moe_intermediate_size", lambda config, layer: config.shared_expert_size)
ONE = Dim("1", lambda config, layer: 1)
QR = Dim("q_lora_rank", lambda config, layer: _latent(config).query_rank or 0)
KVR = Dim("kv_lora_rank", lambda config, layer: _latent(config).key_value_rank)
KVA = Dim("kv_lora_rank+qk_rope_head_dim", lambda config, layer: KVR.of(config, layer) + _latent(config).rotary_dim)
QB = Dim(
    "num_attention_heads*(qk_nope_head_dim+qk_rope_head_dim)",
    lambda config, layer: layer.num_heads * (_latent(config).plain_dim + _latent(config).rotary_dim),
)
KVB = Dim(
    "num_attention_heads*(qk_nope_head_dim+v_head_dim)",
    lambda config, layer: layer.num_heads * (_latent(config).plain_dim + _latent(config).value_dim),
)
KEY_HEADS = Dim("key heads", lambda config, layer: _delta(layer).key_heads)
VALUE_HEADS = Dim("value heads", lambda config, layer: _delta(layer).value_heads)
VALUE_DIM = Dim("linear_value_head_dim", lambda config, layer: _delta(layer).value_dim)
KERNEL = Dim("linear_conv_kernel_dim", lambda config, layer: _delta(layer).kernel)
KEYS = Dim(
    "linear_num_key_heads*linear_key_head_dim", lambda config, layer: _delta(layer).key_heads * _delta(layer).key_dim
)
VALUES = Dim(
    "linear_num_value_heads*linear_value_head_dim",
    lambda config, layer: _delta(layer).value_heads * _delta(layer).value_dim,
)
QKVZ = Dim(
    f"2*{KEYS.name}+2*{VALUES.name}", lambda config, layer: 2 * KEYS.of(config, layer) + 2 * VALUES.of(config, layer)
)
QKV = Dim(f"2*{KEYS.name}+{VALUES.name}", lambda config, layer: 2 * KEYS.of(config, layer) + VALUES.of(config, layer))
P = Dim("hidden_size_per_layer_input", lambda config, layer: config.per_layer_input_size)
LP = Dim("num_hidden_layers*" + P.name, lambda config, layer: config.num_layers * config.per_layer_input_size, True)
VP = Dim("vocab_size_per_layer_input", lambda config, layer: config.per_layer_vocab_size)
