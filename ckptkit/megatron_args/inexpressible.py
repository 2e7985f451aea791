"""Features of a model that stock Megatron has no argument for."""

from __future__ import annotations

from ckptkit.megatron_args.fields import delta_of, mscales
from ckptkit.tables.model_config import QUICK_GELU, SIGMOID, ModelConfig, Rope


def inexpressible(config: ModelConfig, *, local: bool = False) -> list[str]:
    """Sentences about features of a model that Megatron-LM's arguments cannot express.

    Args:
        config: The model.
        local: Whether its layers are to be those of the local spec.
    """
    note_of = _rope_note if config.latent is None else _latent_rope_note
    notes = [note for rope in dict.fromkeys(layer.rope for layer in config.layers) if (note := note_of(rope))]
    if config.latent is not None and config.latent.norm_eps != config.norm_eps:
        notes.append(
            f"norms of latent vectors with an epsilon of {config.latent.norm_eps:g}: Megatron-LM has one for all norms,"
            f" {config.norm_eps:g}"
        )
    if (config.qkv_bias, config.out_bias, config.mlp_bias) not in EXPRESSIBLE_BIASES:
        notes.append("biases on some linear layers only: Megatron-LM has --add-qkv-bias or all of them")
    if config.activation not in ("silu", QUICK_GELU) or not config.gated:
        kind = "a gated MLP" if config.gated else "an MLP"
        notes.append(f"{kind} with {config.activation} has no single argument in Megatron-LM")
    if config.router_groups > 1 and config.experts_per_token // config.router_groups_chosen != BEST_OF_GROUP:
        best = config.experts_per_token // config.router_groups_chosen
        notes.append(f"groups of experts chosen by the two best scores of each: Megatron-Core takes the best {best}")
    if local and delta_of(config) is not None:
        notes.append("a DeltaNet without Transformer Engine (--transformer-impl local): Megatron-Core builds none")
    return [*notes, *(f"{feature}: {reason}" for feature, reason in beyond_gpt(config).items())]


BEST_OF_GROUP = 2
"""Scores of a group whose sum decides whether it is chosen; Megatron-Core takes as many as a token has experts there.

Source: `Glm4MoeTopkRouter` and `DeepseekV3TopkRouter` of transformers, `group_limited_topk` of Megatron-Core."""

EXPRESSIBLE_BIASES = ((False, False, False), (True, False, False), (True, True, True))
"""Which of q, k and v, the attention output, and the MLP may have biases: none, the first, or all of them."""


def beyond_gpt(config: ModelConfig) -> dict[str, str]:
    """Features that no argument gives to Megatron's GPTModel: feature -> the form that Megatron has instead."""
    found = {}
    if len({layer.rope for layer in config.layers}) > 1:
        found["layers with different rotary embeddings"] = "Megatron-LM has one for all"
    if len({layer.window for layer in config.layers} - {None}) > 1:
        found["windows of different sizes"] = "Megatron-LM has one size, on some layers or on all"
    if config.adapter is not None:
        widths = f"{config.adapter.hidden_size} and {config.hidden_size}"
        found[f"layers of the widths {widths} with an adapter between them"] = "Megatron-LM has one width"
    features = {
        "norms after attention and MLP": config.post_norms,
        f"embeddings multiplied by {config.embedding_scale:g}": config.scaled_embedding,
        f"attention scores multiplied by {config.softmax_scale}": config.softmax_scale is not None,
        f"attention scores capped at {config.attention_softcap}": config.attention_softcap is not None,
        f"logits capped at {config.logit_softcap}": config.logit_softcap is not None,
        **_features_of_layers(config),
        "weights of chosen experts that are not scaled to a sum of 1, from a router with sigmoids": (
            config.router_score == SIGMOID and not config.norm_topk_prob
        ),
        "a router with a bias, or without, where experts are without, or with": (
            config.router_bias != (config.mlp_bias and config.num_experts > 0)
        ),
        "one value per token in place of logits": config.value_head,
    }
    return {**found, **{text: "no argument in Megatron-LM" for text, present in features.items() if present}}


def _features_of_layers(config: ModelConfig) -> dict[str, bool]:
    """Feature -> whether some layers have it; Megatron-LM builds all layers alike."""
    heads = {(layer.num_heads, layer.head_dim, layer.num_kv_heads) for layer in config.layers}
    widths = {layer.ffn_hidden_size for layer in config.layers}
    streams = {layer.hidden_size or config.hidden_size for layer in config.layers} | {config.hidden_size}
    epsilons = {layer.norm_eps or config.norm_eps for layer in config.layers} | {config.norm_eps}
    return {
        "layers of another width than the model's": config.adapter is None and len(streams) > 1,
        "norms with different epsilons": len(epsilons) > 1,
        "attention heads that differ between layers": config.adapter is None and len(heads) > 1,
        "MLPs whose width differs between layers": config.adapter is None and len(widths) > 1,
        "DeltaNets that differ between layers": len({layer.delta for layer in config.layers} - {None}) > 1,
        "values without a projection of their own": any(layer.k_eq_v for layer in config.layers),
        "layers that use the keys and values of another": any(layer.kv_donor is not None for layer in config.layers),
        "normalised values": config.value_norm,
        "experts beside a dense MLP with norms of its own": config.parallel_dense,
        "learned scales in the router": config.router_scales,
        "layers multiplied by a learned number": config.layer_scalars,
        "embeddings for each layer": config.per_layer_input_size > 0,
    }


def _latent_rope_note(rope: Rope) -> str | None:
    """Of the numbers of a yarn rope, Megatron-LM's arguments for latent attention have three."""
    if rope.kind == "default":
        return None
    if rope.kind != "yarn":
        return f"{rope.kind} rope with latent attention: Megatron-Core has yarn alone"
    mscale, of_all = mscales(rope)
    told = Rope(rope.theta, "yarn", rope.factor, original_max_position=4096, mscale=mscale, mscale_all_dim=of_all)
    if rope == told:
        return None
    return (
        "yarn rope with original/fast/slow/mscale/mscale_all_dim"
        f" {rope.original_max_position}/{rope.beta_fast:g}/{rope.beta_slow:g}/{rope.mscale}/{rope.mscale_all_dim}:"
        " Megatron-LM's arguments for latent attention have its factor and both mscales, and 4096/32/1"
    )


def _rope_note(rope: Rope) -> str | None:
    if rope.kind == "llama3" and Rope(rope.theta, "llama3", rope.factor) != rope:
        return (
            f"llama3 rope with low/high/original {rope.low_freq_factor}/{rope.high_freq_factor}/"
            f"{rope.original_max_position}: Megatron-Core always takes 1/4/8192"
        )
    if rope.kind not in ("default", "linear", "llama3"):
        since = (
            " that --use-checkpoint-args restores (0.19 has some on its command line)" if rope.kind == "yarn" else ""
        )
        return f"{rope.kind} rope has no argument in Megatron-LM{since}"
    return None
