"""What a model is, independent of who wrote it down: the one description that tables, plans and the runtime read.

A family translates its raw config.json (and Megatron's `args`) to a `ModelConfig`. Everything that may differ
between layers is in `LayerConfig`, so a uniform model is simply one whose layers are all equal.
"""

from __future__ import annotations

import math
from dataclasses import dataclass


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


@dataclass(frozen=True)
class LayerConfig:
    """One decoder layer. Sizes are global (before tensor parallelism), in elements.

    Attributes:
        num_heads: Query heads.
        num_kv_heads: Key/value heads (query groups in Megatron's words).
        head_dim: Width of a head (`kv_channels`).
        ffn_hidden_size: Width of the dense MLP.
        rope: Rotary embedding.
        window: Visible tokens including the current one, or None for all of them.
        moe: Whether experts take the place of the dense MLP.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    ffn_hidden_size: int
    rope: Rope
    window: int | None = None
    moe: bool = False


@dataclass(frozen=True)
class ModelConfig:
    """A decoder-only language model.

    Attributes:
        family: Name of the family that owns the table, e.g. `llama`.
        architecture: Hugging Face class name, e.g. `LlamaForCausalLM`.
        hidden_size: Width of the residual stream.
        vocab_size: Rows of the embedding, without Megatron's padding.
        layers: The decoder layers, first to last.
        tied: Whether the head is the embedding.
        norm_eps: Epsilon of every RMSNorm.
        max_position_embeddings: Context length in tokens.
        qkv_bias: Whether q, k and v have biases.
        out_bias: Whether the attention output projection has one.
        mlp_bias: Whether the MLP linears have them.
        qk_norm: Whether q and k are normalised per head.
        activation: Hugging Face's name of the MLP's activation (`silu`, `gelu_pytorch_tanh`, `xielu`, ...).
        gated: Whether the MLP is gated (`act(gate) * up`).
        init_std: Standard deviation of the initialisation, for training.
        dtype: Element type that config.json states, as torch names it, or None.
        num_experts: Experts of each layer that has them; 0 in a dense model.
        experts_per_token: Experts that a token is routed to.
        moe_ffn_hidden_size: Width of one expert.
        norm_topk_prob: Whether the weights of the chosen experts are scaled to sum up to 1. Then a softmax over all
            experts before the choice equals one over the chosen after it, which is what Megatron-Core does unless
            `moe_router_pre_softmax` is set.
        zero_centered_norms: Whether every RMSNorm, those of q and k too, multiplies by `1 + weight`.
        post_norms: Whether the outputs of attention and MLP are normalised before they join the residual stream.
        scaled_embedding: Whether embeddings are multiplied by `embedding_scale`.
        softmax_scale: Factor on the attention scores; None is `head_dim ** -0.5`.
        attention_softcap: Attention scores become `cap * tanh(score / cap)`, or None.
        logit_softcap: The same for the logits.
    """

    family: str
    architecture: str
    hidden_size: int
    vocab_size: int
    layers: tuple[LayerConfig, ...]
    tied: bool
    norm_eps: float
    max_position_embeddings: int
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    activation: str = "silu"
    gated: bool = True
    init_std: float = 0.02
    dtype: str | None = None
    num_experts: int = 0
    experts_per_token: int = 0
    moe_ffn_hidden_size: int = 0
    norm_topk_prob: bool = True
    zero_centered_norms: bool = False
    post_norms: bool = False
    scaled_embedding: bool = False
    softmax_scale: float | None = None
    attention_softcap: float | None = None
    logit_softcap: float | None = None

    @property
    def num_layers(self) -> int:
        """Number of decoder layers."""
        return len(self.layers)

    @property
    def embedding_scale(self) -> float:
        """Factor on the embeddings, `sqrt(hidden_size)` or 1.

        transformers rounds it to the dtype of the weights before it multiplies (`Gemma3TextScaledWordEmbedding`).
        """
        return math.sqrt(self.hidden_size) if self.scaled_embedding else 1.0
