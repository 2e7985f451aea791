"""`ModelConfig`: the one description of a model that tables, plans and the runtime read.

A family translates its raw config.json to a `ModelConfig`, and `megatron_args/` does so with Megatron's `args`.
Everything that may differ between layers is in `LayerConfig`. A uniform model has equal layers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from typing import Any

_LAYOUT = {"layout": True}
"""Marks a layout fact: by this field stored bytes are cut into tensors, so that another value yields other weights."""


def is_layout(of: type[Any], name: str) -> bool:
    """Whether a field of one of these classes is a layout fact."""
    return any(one.name == name and one.metadata.get("layout", False) for one in fields(of))


SOFTMAX, SIGMOID = "softmax", "sigmoid"
"""Functions that make scores of a router's logits."""
QUICK_GELU = "quick_gelu"
"""The activation `x * sigmoid(QUICK_GELU_ALPHA * x)`."""
QUICK_GELU_ALPHA = 1.702
"""Source: `quick_gelu` of Megatron-Core, which has this number in its code."""


@dataclass(frozen=True)
class Rope:
    """Rotary position embedding of a layer, rotated in halves (`rotate_half`).

    Attributes:
        theta: Base of the frequencies.
        kind: `default`, `linear`, `llama3`, `yarn`, or a name that only some runtimes know.
        factor: Scaling factor of all kinds but `default`.
        low_freq_factor: llama3: wavelengths above `original_max_position / low_freq_factor` are divided by `factor`.
        high_freq_factor: llama3: wavelengths below `original_max_position / high_freq_factor` are kept.
        original_max_position: llama3 and yarn: context length before scaling, in tokens.
        beta_fast: yarn: pairs that rotate more often than this within the original context are kept.
        beta_slow: yarn: pairs that rotate less often than this are divided by `factor`.
        attention_factor: yarn: multiplies cosines and sines; None derives it from the factor and the two mscales.
        mscale: yarn: weight of the logarithm of `factor` in `attention_factor`, or None.
        mscale_all_dim: yarn: the same in its denominator, or None.
        truncate: yarn: whether the bounds of the blend are rounded to whole pairs.
        partial: Share of the head that rotates, its first channels; the exponents of the frequencies count over these.
            proportional: share of the pairs that rotate, the first ones; the others have frequency 0, and the exponents
            count over the whole head.
    """

    theta: float
    kind: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position: int = 8192
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True
    partial: float = 1.0


@dataclass(frozen=True)
class LatentAttention:
    """Multi-head latent attention: queries, and keys with values, are made of a narrow latent vector each.

    Attributes:
        query_rank: Width of the queries' latent vector, or None where they are projected from the residual stream.
        key_value_rank: Width of the latent vector of keys and values.
        plain_dim: Channels of a head's query and key that do not rotate.
        rotary_dim: Channels that do, after the plain ones; neighbours on disk form a pair. Those of the keys are
            shared by all heads.
        value_dim: Width of a head's value.
        norm_eps: Epsilon of the norms of latent vectors.
    """

    query_rank: int | None
    key_value_rank: int
    plain_dim: int
    rotary_dim: int
    value_dim: int
    norm_eps: float = 1e-6


@dataclass(frozen=True)
class DeltaNet:
    """Linear attention by the gated delta rule, behind a short causal convolution of queries, keys and values.

    Attributes:
        key_heads: Heads of queries and of keys.
        value_heads: Heads of values, a multiple of those of keys; each also has a gate, a beta and a decay.
        key_dim: Width of a query or key.
        value_dim: Width of a value, and of its gate.
        kernel: Tokens that the convolution sees, the current one included.
    """

    key_heads: int
    value_heads: int
    key_dim: int
    value_dim: int
    kernel: int


@dataclass(frozen=True)
class LayerConfig:
    """One decoder layer. Sizes are global (before tensor parallelism), in elements.

    Fields marked as layout facts say how stored bytes are cut into tensors.

    Attributes:
        num_heads: Query heads.
        num_kv_heads: Key/value heads (query groups in Megatron's words).
        head_dim: Width of a head (`kv_channels`); with latent attention, of its value.
        ffn_hidden_size: Width of the dense MLP.
        rope: Rotary embedding.
        window: Visible tokens including the current one, or None for all of them.
        moe: Whether experts replace the dense MLP (or stand beside it, if the model has `parallel_dense`).
        k_eq_v: Whether values are the raw key projection, before its norm and rotation; there is no value projection.
        kv_donor: Number of the layer whose keys and values this one attends to, or None for its own.
        hidden_size: Width of the residual stream in this layer, or None for the model's.
        norm_eps: Epsilon of the norms of this layer, or None for the model's.
        delta: The sizes of a gated DeltaNet in place of attention, or None for attention.
    """

    num_heads: int = field(metadata=_LAYOUT)
    num_kv_heads: int = field(metadata=_LAYOUT)
    head_dim: int = field(metadata=_LAYOUT)
    ffn_hidden_size: int = field(metadata=_LAYOUT)
    rope: Rope
    window: int | None = None
    moe: bool = field(default=False, metadata=_LAYOUT)
    k_eq_v: bool = field(default=False, metadata=_LAYOUT)
    kv_donor: int | None = field(default=None, metadata=_LAYOUT)
    hidden_size: int | None = field(default=None, metadata=_LAYOUT)
    norm_eps: float | None = None
    delta: DeltaNet | None = field(default=None, metadata=_LAYOUT)


@dataclass(frozen=True)
class Adapter:
    """The linear map between the first layers of a narrow model and the last ones of a wide one, without biases.

    Attributes:
        kind: `linear` is one matrix [wide, narrow]; `two-linear` is two, [wide, narrow] and [wide, wide]; `mlp` is the
            same two with a ReLU between them.
        after: Number of layers before it, all of the narrow width.
        hidden_size: The narrow width; that of the model is the wide one.
    """

    kind: str
    after: int
    hidden_size: int


@dataclass(frozen=True)
class ModelConfig:
    """A decoder-only language model.

    Fields marked as layout facts say how stored bytes are cut into tensors, or what they mean; nothing outranks what a
    checkpoint says of them. The number of `layers` is one.

    Attributes:
        family: Name of the family that owns the table, e.g. `llama`.
        architecture: Hugging Face class name, e.g. `LlamaForCausalLM`.
        hidden_size: Width of the residual stream.
        vocab_size: Rows of the embedding, without Megatron's padding.
        layers: The decoder layers, first to last.
        tied: Whether the head is the embedding.
        norm_eps: Epsilon of every RMSNorm, but for layers that have their own.
        max_position_embeddings: Context length in tokens.
        qkv_bias: Whether q, k and v have biases.
        out_bias: Whether the attention output projection has one.
        mlp_bias: Whether the MLP linears have them, those of experts included.
        router_bias: Whether the router's linear has one.
        sinks: Whether every head has a learned score of its own beside those of the keys, for which there is no value
            (Megatron's learnable softmax).
        qk_norm: Whether q and k are normalised per head; with latent attention, the latent vectors.
        output_gate: Whether the output of attention is multiplied by the sigmoid of a gate before its projection. Gates
            are projected beside the queries.
        latent: The sizes of latent attention, or None for plain attention.
        activation: Hugging Face's name of the MLP's activation (`silu`, `gelu_pytorch_tanh`, `xielu`, ...).
        gated: Whether the MLP is gated (`act(gate) * up`).
        activation_clamp: Largest gate, and largest absolute value of the up projection, before either is used; or None.
        up_offset: Added to the up projection after that.
        init_std: Standard deviation of the initialisation, for training.
        dtype: Element type that config.json states, as torch names it, or None.
        num_experts: Experts of each layer that has them; 0 in a dense model.
        experts_per_token: Experts that a token is routed to.
        moe_ffn_hidden_size: Width of one expert.
        norm_topk_prob: Whether the weights of the chosen experts are scaled to a sum of 1. The result equals a softmax
            over the chosen experts alone, which is Megatron-Core's order unless `moe_router_pre_softmax` is set.
        router_score: Function that makes scores of the router's logits: `softmax`, or `sigmoid` of each logit. Weights
            of a sigmoid are scaled to a sum of 1 by dividing them.
        router_in_fp32: Whether the router's logits are computed in fp32, whatever the dtype of the model is.
        expert_bias: Whether a bias of each expert is added to its score for the choice of experts, and for that alone.
        routed_scaling: Factor on the weights of the chosen experts.
        router_groups: Groups of experts, of which the router chooses some first; 1: it chooses among all experts.
        router_groups_chosen: Groups that it chooses, by the sum of the two best scores in each.
        shared_expert_size: Width of the expert that every token goes through beside the chosen ones; 0 without it.
        shared_expert_gate: Whether its output is multiplied by the sigmoid of one number, a projection of its input.
        mtp_layers: Layers of multi-token prediction after the last one, each with experts if that one has them. Files
            may lack those that config.json counts: a model has as many as there are tensors for.
        zero_centered_norms: Whether every RMSNorm, those of q and k too, multiplies by `1 + weight`; that of the
            outputs of a DeltaNet in Megatron-Core alone.
        post_norms: Whether the outputs of attention and MLP are normalised before they join the residual stream.
        scaled_embedding: Whether embeddings are multiplied by `embedding_scale`.
        softmax_scale: Factor on the attention scores; None is `head_dim ** -0.5`.
        attention_softcap: Attention scores become `cap * tanh(score / cap)`, or None.
        logit_softcap: The same for the logits.
        value_norm: Whether values are normalised per head, without a weight.
        parallel_dense: Whether layers with experts keep a dense MLP beside them, each with norms of its own.
        router_scales: Whether the router normalises its input without a weight, multiplies it by a learned scale and
            by `hidden_size ** -0.5`, and the weights of the chosen experts, renormalised, by a learned scale each.
        layer_scalars: Whether every layer multiplies its whole output by a learned number.
        per_layer_input_size: Width of the per-layer embeddings; 0 without them.
        per_layer_vocab_size: Rows of the per-layer embedding.
        adapter: The adapter of a split Llama, between its narrow and its wide layers, or None.
        value_head: Whether the head gives one value per token instead of logits.
        value_bias: Whether that head has a bias.
    """

    family: str
    architecture: str
    hidden_size: int = field(metadata=_LAYOUT)
    vocab_size: int
    layers: tuple[LayerConfig, ...] = field(metadata=_LAYOUT)
    tied: bool
    norm_eps: float
    max_position_embeddings: int
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    router_bias: bool = False
    sinks: bool = False
    qk_norm: bool = False
    output_gate: bool = field(default=False, metadata=_LAYOUT)
    latent: LatentAttention | None = field(default=None, metadata=_LAYOUT)
    activation: str = "silu"
    gated: bool = field(default=True, metadata=_LAYOUT)
    activation_clamp: float | None = None
    up_offset: float = 0.0
    init_std: float = 0.02
    dtype: str | None = None
    num_experts: int = field(default=0, metadata=_LAYOUT)
    experts_per_token: int = 0
    moe_ffn_hidden_size: int = field(default=0, metadata=_LAYOUT)
    norm_topk_prob: bool = True
    router_score: str = SOFTMAX
    router_in_fp32: bool = False
    expert_bias: bool = False
    routed_scaling: float = 1.0
    router_groups: int = 1
    router_groups_chosen: int = 1
    shared_expert_size: int = field(default=0, metadata=_LAYOUT)
    shared_expert_gate: bool = False
    mtp_layers: int = field(default=0, metadata=_LAYOUT)
    zero_centered_norms: bool = field(default=False, metadata=_LAYOUT)
    post_norms: bool = False
    scaled_embedding: bool = False
    softmax_scale: float | None = None
    attention_softcap: float | None = None
    logit_softcap: float | None = None
    value_norm: bool = False
    parallel_dense: bool = field(default=False, metadata=_LAYOUT)
    router_scales: bool = False
    layer_scalars: bool = False
    per_layer_input_size: int = field(default=0, metadata=_LAYOUT)
    per_layer_vocab_size: int = 0
    adapter: Adapter | None = field(default=None, metadata=_LAYOUT)
    value_head: bool = False
    value_bias: bool = False

    @property
    def num_layers(self) -> int:
        """Number of decoder layers."""
        return len(self.layers)

    def number_in_group(self, layer: int) -> int:
        """A layer's number among those on its side of the adapter; without one, its number."""
        return layer - self.adapter.after if self.adapter is not None and layer >= self.adapter.after else layer

    @property
    def embedding_scale(self) -> float:
        """Factor on the embeddings, `sqrt(hidden_size)` or 1.

        transformers rounds it to the dtype of the weights before it multiplies (`Gemma3TextScaledWordEmbedding`).
        """
        return math.sqrt(self.hidden_size) if self.scaled_embedding else 1.0
