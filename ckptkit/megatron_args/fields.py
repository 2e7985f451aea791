"""Megatron's fields of a model, one row each: our name, and the name in each of Megatron's three places.

The places are Megatron-LM's `args`, megatron-core's `TransformerConfig`, and Megatron-Bridge's model providers, which
are classes derived from `TransformerConfig`. A row is written to each place in which it has a name. `of_model` and
`of_layer` rows are also read back, so a field that has one meaning everywhere costs one line. Differences between the
places are code: `writing.py`, `reading.py`, `bridge_provider.py` and `ckptkit/megatron/config.py`.

The rows stand in the order in which `args` are written.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from dataclasses import fields as dataclass_fields
from typing import Any, Literal

from ckptkit.megatron_args.kinds import (
    COUNT,
    COUNT_OR_NONE,
    COUNT_OR_ZERO,
    EXPERTS,
    FACTOR,
    FLAG,
    FREQUENCY,
    GROUPS,
    LAYERS,
    LAYOUT,
    LEARNABLE,
    NAME,
    NUMBER,
    POSITIVE,
    POSITIVE_OR_NONE,
    SCORE,
    SOFTMAX_TYPE,
    WINDOW,
    Kind,
)
from ckptkit.sharding.grid import Parallelism
from ckptkit.tables.model_config import QUICK_GELU, SOFTMAX, DeltaNet, LayerConfig, ModelConfig, Rope, is_layout

Place = Literal["args", "core", "provider"]
Value = Callable[[ModelConfig, LayerConfig], Any]

Name = str | None
_SAME = ""
"""Default of a name: that of the place before it, in the order ours, args, core, provider."""


@dataclass(frozen=True)
class Field:
    """One fact that Megatron records about a model.

    Attributes:
        args: Name among Megatron-LM's arguments, or None.
        core: Name in `TransformerConfig`, or None.
        provider: Name in Megatron-Bridge's providers, or None.
        kind: Type of the argument; None for a constant, whose type is not checked.
        value: (model, the layer that stands for all layers) -> the value to write.
        ours: Field of `ModelConfig` or `LayerConfig` that it is read into, or None.
        of: The class of `ours`.
        opposite: Whether it is true where `ours` is false.
        layout: Whether it is a layout fact: stored bytes are cut by it, or mean something else by it.
    """

    args: Name
    core: Name
    provider: Name
    kind: Kind | None
    value: Value
    ours: str | None = None
    of: type[ModelConfig] | type[LayerConfig] | None = None
    opposite: bool = False
    layout: bool = False

    def read(self, value: Any) -> Any:
        """An argument's value -> that of our field."""
        assert self.kind is not None
        read = self.kind.read(value)
        return not read if self.opposite else read


def of_model(kind: Kind, ours: str, args: Name = _SAME, core: Name = _SAME, provider: Name = _SAME) -> Field:
    """A field of `ModelConfig`. By default a place has the name of the place before it; None: it has no name there."""
    names = _names(ours, args, core, provider)
    return Field(
        *names,
        kind,
        lambda config, layer: getattr(config, ours),
        ours,
        ModelConfig,
        layout=is_layout(ModelConfig, ours),
    )


def of_layer(kind: Kind, ours: str, args: Name = _SAME, core: Name = _SAME, provider: Name = _SAME) -> Field:
    """A field of `LayerConfig`; names as in `of_model`."""
    names = _names(ours, args, core, provider)
    return Field(
        *names, kind, lambda config, layer: getattr(layer, ours), ours, LayerConfig, layout=is_layout(LayerConfig, ours)
    )


def opposite(ours: str, args: str, core: Name = _SAME, provider: Name = _SAME) -> Field:
    """A flag that is set where a flag of `ModelConfig` is not; names as in `of_model`."""
    names = _names(ours, args, core, provider)
    return Field(*names, FLAG, lambda config, layer: not getattr(config, ours), ours, ModelConfig, opposite=True)


def derived(
    kind: Kind, args: str, value: Value, core: Name = _SAME, provider: Name = _SAME, *, layout: bool = False
) -> Field:
    """A field that follows from several of ours: a rule writes it, and code reads it. Names as in `of_model`."""
    return Field(*_names(args, args, core, provider), kind, value, layout=layout)


def of_groups(ours: str, args: str) -> Field:
    """A number of groups of experts; without groups it has no value."""
    names = _names(ours, args, _SAME, _SAME)

    def value(config: ModelConfig, layer: LayerConfig) -> Any:
        return getattr(config, ours) if max(config.router_groups, config.router_groups_chosen) > 1 else None

    return Field(*names, GROUPS, value, ours, ModelConfig)


def constant(value: Any, args: str, core: Name = _SAME, provider: Name = _SAME, *, layout: bool = False) -> Field:
    """A field with the same value for every model that is converted. Names as in `of_model`."""
    return Field(*_names(args, args, core, provider), None, lambda config, layer: value, layout=layout)


def _names(ours: str, args: Name, core: Name, provider: Name) -> tuple[Name, Name, Name]:
    args = ours if args == _SAME else args
    core = args if core == _SAME else core
    return args, core, core if provider == _SAME else provider


def main_rope(config: ModelConfig) -> Rope:
    """The one rotary embedding that `args` describe: that of the layers without a window, if there are any."""
    return next((layer.rope for layer in config.layers if layer.window is None), config.layers[0].rope)


def _rotary_base(config: ModelConfig, layer: LayerConfig) -> float | int:
    """Whole numbers are integers, as Megatron-LM's parser stores them."""
    theta = main_rope(config).theta
    return int(theta) if float(theta).is_integer() else theta


def _rotary_percent(config: ModelConfig, layer: LayerConfig) -> float:
    """Share of a head that rotates; Megatron-LM has no argument for a rope that only slows the rest down to nothing."""
    rope = main_rope(config)
    return 1.0 if rope.kind == "proportional" else rope.partial


def _interpolation(config: ModelConfig, layer: LayerConfig) -> float | None:
    rope = main_rope(config)
    return rope.factor if rope.kind == "linear" else None


def _llama3_scaling(config: ModelConfig, layer: LayerConfig) -> bool:
    return main_rope(config).kind == "llama3"


def _llama3_factor(config: ModelConfig, layer: LayerConfig) -> float:
    rope = main_rope(config)
    return rope.factor if rope.kind == "llama3" else 8.0


def _has_all_biases(config: ModelConfig, layer: LayerConfig) -> bool:
    return config.qkv_bias and config.out_bias and config.mlp_bias


def _window_size(config: ModelConfig, layer: LayerConfig) -> tuple[int, int] | None:
    """Megatron counts the tokens to the left of the current one, a `LayerConfig` counts that one, too."""
    window = next((layer.window for layer in config.layers if layer.window is not None), None)
    return None if window is None else (window - 1, 0)


def _layers_with_window(config: ModelConfig, layer: LayerConfig) -> list[int] | None:
    """1 for each layer with a window, 0 for the others; None where all layers are alike."""
    windows = [layer.window for layer in config.layers]
    return None if len(set(windows)) == 1 else [int(window is not None) for window in windows]


def _layers_with_experts(config: ModelConfig, layer: LayerConfig) -> int | list[int]:
    """1 for each layer with experts, 0 for the others; 1 where all layers have them."""
    moe = [int(layer.moe) for layer in config.layers]
    return 1 if all(moe) else moe


CORE_FIELDS = (
    derived(LAYERS, "num_layers", lambda config, layer: config.num_layers, layout=True),
    of_model(COUNT, "hidden_size"),
    of_layer(COUNT, "ffn_hidden_size"),
    derived(
        COUNT, "seq_length", lambda config, layer: config.max_position_embeddings, core=None, provider="seq_length"
    ),
    of_model(COUNT, "max_position_embeddings", core=None),
    of_layer(COUNT, "num_heads", "num_attention_heads"),
    derived(
        FLAG,
        "group_query_attention",
        lambda config, layer: layer.num_kv_heads != layer.num_heads,
        core=None,
        layout=True,
    ),
    of_layer(COUNT, "num_kv_heads", "num_query_groups"),
    of_layer(COUNT, "head_dim", "kv_channels"),
    constant("rope", "position_embedding_type", core=None, provider="position_embedding_type"),
    constant(True, "add_position_embedding", core=None),
    constant(True, "use_rotary_position_embeddings", core=None),
    derived(POSITIVE, "rotary_base", _rotary_base, core=None),
    derived(POSITIVE, "rotary_percent", _rotary_percent, core=None, provider="rotary_percent"),
    constant(False, "rotary_interleaved", core=None, layout=True),
    derived(NUMBER, "rotary_seq_len_interpolation_factor", _interpolation, core=None),
    derived(FLAG, "use_rope_scaling", _llama3_scaling, core=None),
    derived(POSITIVE, "rope_scaling_factor", _llama3_factor, core=None),
    derived(FLAG, "add_bias_linear", _has_all_biases, core=None, provider="add_bias_linear"),
    of_model(FLAG, "qkv_bias", "add_qkv_bias"),
    derived(FLAG, "swiglu", lambda config, layer: config.gated and config.activation == "silu", core=None),
    of_model(FLAG, "gated", args=None, core="gated_linear_unit"),
    constant(False, "squared_relu", core=None),
    constant("RMSNorm", "normalization"),
    of_model(NUMBER, "norm_eps", "norm_epsilon", "layernorm_epsilon"),
    of_model(FLAG, "zero_centered_norms", "apply_layernorm_1p", "layernorm_zero_centered_gamma"),
    of_model(FLAG, "qk_norm", "qk_layernorm"),
    opposite("tied", "untie_embeddings_and_output_weights", core=None),
    of_model(FLAG, "tied", args=None, core=None, provider="share_embeddings_and_output_weights"),
    constant(False, "apply_query_key_layer_scaling", core=None),
    constant(0.0, "attention_dropout"),
    constant(0.0, "hidden_dropout"),
    of_model(NUMBER, "init_std", "init_method_std"),
    derived(POSITIVE, "softmax_scale", lambda config, layer: config.softmax_scale, provider=None),
    derived(WINDOW, "window_size", _window_size, core=None),
    derived(FREQUENCY, "window_attn_skip_freq", _layers_with_window, core=None),
    derived(EXPERTS, "num_experts", lambda config, layer: config.num_experts or None, "num_moe_experts", layout=True),
)
"""Fields of every model."""

BEYOND_PLAIN_FIELDS = (
    Field(
        *("softmax_type",) * 3,
        SOFTMAX_TYPE,
        lambda config, layer: LEARNABLE if config.sinks else "vanilla",
        "sinks",
        ModelConfig,
    ),
    derived(FLAG, "quick_geglu", lambda config, layer: config.gated and config.activation == QUICK_GELU, core=None),
    of_model(POSITIVE_OR_NONE, "activation_clamp", "activation_func_clamp_value"),
    of_model(NUMBER, "up_offset", "glu_linear_offset"),
)
"""Further fields of a model with sinks, or with an MLP that is gated by more than a function."""

EXPERT_FIELDS = (
    derived(FREQUENCY, "moe_layer_freq", _layers_with_experts, core=None, layout=True),
    of_model(COUNT_OR_ZERO, "moe_ffn_hidden_size"),
    of_model(COUNT, "experts_per_token", "moe_router_topk"),
    constant(SOFTMAX, "moe_router_score_function", provider=None),
    opposite("norm_topk_prob", "moe_router_pre_softmax"),
)
"""Further fields of a model with experts.

A softmax over the chosen experts equals a softmax over all experts that is renormalised over the chosen ones. So
`norm_topk_prob` is Megatron's order unless `moe_router_pre_softmax` is set.
"""

SCORE_FIELDS = (
    of_model(SCORE, "router_score", "moe_router_score_function"),
    of_model(FLAG, "expert_bias", "moe_router_enable_expert_bias"),
    of_model(FACTOR, "routed_scaling", "moe_router_topk_scaling_factor"),
    of_groups("router_groups", "moe_router_num_groups"),
    of_groups("router_groups_chosen", "moe_router_group_topk"),
)
"""Further fields of a model whose router is none of a plain softmax."""

ROUTER_DTYPE = (derived(NAME, "moe_router_dtype", lambda config, layer: "fp32"),)
"""Of a model whose router computes in fp32. Elsewhere a trainer may choose so: it is the precision of a step."""

SHARED_EXPERT_FIELDS = (of_model(COUNT_OR_ZERO, "shared_expert_size", "moe_shared_expert_intermediate_size"),)
"""Further fields of a model with shared experts."""

SHARED_GATE_FIELDS = (of_model(FLAG, "shared_expert_gate", "moe_shared_expert_gate"),)
"""Further fields of a model whose shared experts have a gate."""

DENSE_BESIDE_EXPERTS = (
    derived(
        COUNT_OR_ZERO,
        "moe_shared_expert_intermediate_size",
        lambda config, layer: layer.ffn_hidden_size,
        provider=None,
        layout=True,
    ),
)
"""Further fields of a model with a dense MLP beside its experts."""


def _of_latent(name: str) -> Value:
    return lambda config, layer: getattr(config.latent, name)


def _yarn(config: ModelConfig, plain: float, value: Callable[[Rope], float | None]) -> float | None:
    """A value of a yarn rope, or one that leaves others as they are."""
    rope = main_rope(config)
    return value(rope) if rope.kind == "yarn" else plain


def mscales(rope: Rope) -> tuple[float, float]:
    """`mscale` and `mscale_all_dim` of Megatron-Core with the effect of a yarn rope of transformers.

    Source: `_compute_yarn_parameters` and `yarn_apply_mscale` of transformers, `_yarn_get_concentration_factor` of
    Megatron-Core.
    """
    return (rope.mscale, rope.mscale_all_dim) if rope.mscale and rope.mscale_all_dim else (1.0, 0.0)


LATENT_FIELDS = (
    constant(True, "multi_latent_attention", layout=True),
    derived(COUNT, "q_lora_rank", _of_latent("query_rank"), layout=True),
    derived(COUNT, "kv_lora_rank", _of_latent("key_value_rank"), layout=True),
    derived(COUNT, "qk_head_dim", _of_latent("plain_dim"), layout=True),
    derived(COUNT, "qk_pos_emb_head_dim", _of_latent("rotary_dim"), layout=True),
    derived(COUNT, "v_head_dim", _of_latent("value_dim"), layout=True),
    derived(NAME, "rope_type", lambda config, layer: "yarn" if main_rope(config).kind == "yarn" else "rope"),
    derived(POSITIVE, "rotary_scaling_factor", lambda config, layer: _yarn(config, 1.0, lambda rope: rope.factor)),
    derived(NUMBER, "mscale", lambda config, layer: _yarn(config, 1.0, lambda rope: mscales(rope)[0])),
    derived(NUMBER, "mscale_all_dim", lambda config, layer: _yarn(config, 0.0, lambda rope: mscales(rope)[1])),
)
"""Further fields of a model with latent attention. Megatron-LM has no argument for the other numbers of its yarn."""

LATENT_ARGS = {
    "query_rank": "q_lora_rank",
    "key_value_rank": "kv_lora_rank",
    "plain_dim": "qk_head_dim",
    "rotary_dim": "qk_pos_emb_head_dim",
    "value_dim": "v_head_dim",
}
"""Field of `LatentAttention` -> argument."""


def _of_delta(name: str) -> Value:
    return lambda config, layer: getattr(delta_of(config), name)


def delta_of(config: ModelConfig) -> DeltaNet | None:
    """The sizes of the layers with a DeltaNet, or None if no layer has one."""
    return next((layer.delta for layer in config.layers if layer.delta is not None), None)


def _layers_with_delta(config: ModelConfig, layer: LayerConfig) -> int | list[int]:
    """`n` where every `n`th layer alone has attention; else 1 for each layer with a DeltaNet, 0 for the others."""
    delta = [int(layer.delta is not None) for layer in config.layers]
    every = delta.index(0) + 1 if 0 in delta else 0
    regular = every > 1 and all(has == int((number + 1) % every != 0) for number, has in enumerate(delta))
    return every if regular else delta


GATED_DELTA_NET = "gated_delta_net"
DELTA_FIELDS = (
    constant(GATED_DELTA_NET, "experimental_attention_variant", layout=True),
    derived(FREQUENCY, "linear_attention_freq", _layers_with_delta, layout=True),
    derived(COUNT, "linear_conv_kernel_dim", _of_delta("kernel"), layout=True),
    derived(COUNT, "linear_key_head_dim", _of_delta("key_dim"), layout=True),
    derived(COUNT, "linear_value_head_dim", _of_delta("value_dim"), layout=True),
    derived(COUNT, "linear_num_key_heads", _of_delta("key_heads"), layout=True),
    derived(COUNT, "linear_num_value_heads", _of_delta("value_heads"), layout=True),
)
"""Further fields of a model with DeltaNets."""

DELTA_ARGS = {
    "key_heads": "linear_num_key_heads",
    "value_heads": "linear_num_value_heads",
    "key_dim": "linear_key_head_dim",
    "value_dim": "linear_value_head_dim",
    "kernel": "linear_conv_kernel_dim",
}
"""Field of `DeltaNet` -> argument."""

GATE_FIELDS = (of_model(FLAG, "output_gate", "attention_output_gate"),)
"""Further fields of a model whose attention has an output gate."""

PREDICTION_FIELDS = (of_model(COUNT_OR_NONE, "mtp_layers", "mtp_num_layers"),)
"""Further fields of a model with layers of multi-token prediction."""

PRECISION_FIELDS = (
    derived(FLAG, "bf16", lambda config, layer: config.dtype == "bfloat16", core=None, provider="bf16"),
    derived(FLAG, "fp16", lambda config, layer: config.dtype == "float16", core=None, provider="fp16"),
)
"""The element type that config.json states; a `TransformerConfig` takes that of the run."""

FIELDS = (
    *CORE_FIELDS,
    *BEYOND_PLAIN_FIELDS,
    *(field for field in EXPERT_FIELDS if field.ours or field.kind),
    *SCORE_FIELDS,
    *ROUTER_DTYPE,
    *SHARED_EXPERT_FIELDS,
    *SHARED_GATE_FIELDS,
    *LATENT_FIELDS,
    *DELTA_FIELDS,
    *GATE_FIELDS,
    *PREDICTION_FIELDS,
    *PRECISION_FIELDS,
)
"""All rows, but for those that give a name another meaning."""


_SCORE = "moe_router_score_function"


def _scores_otherwise(config: ModelConfig) -> bool:
    """Whether a router is another than most models have: a softmax, and nothing beside it."""
    plain = {field.name: field.default for field in dataclass_fields(ModelConfig)}
    return any(getattr(config, row.ours) != plain[row.ours] for row in SCORE_FIELDS if row.ours is not None)


def _is_beyond_plain(config: ModelConfig) -> bool:
    clamped = config.activation_clamp is not None or config.up_offset != 0.0
    return config.sinks or clamped or config.activation == QUICK_GELU


def fields_of(config: ModelConfig) -> Iterator[Field]:
    """The rows of a model, in the order in which they are written; those of its element type come last."""
    yield from CORE_FIELDS
    yield from BEYOND_PLAIN_FIELDS if _is_beyond_plain(config) else ()
    yield from LATENT_FIELDS if config.latent is not None else ()
    yield from GATE_FIELDS if config.output_gate else ()
    yield from DELTA_FIELDS if delta_of(config) is not None else ()
    yield from PREDICTION_FIELDS if config.mtp_layers else ()
    if config.num_experts:
        scores = _scores_otherwise(config)
        yield from (field for field in EXPERT_FIELDS if not scores or field.args != _SCORE)
        yield from SCORE_FIELDS if scores else ()
        yield from ROUTER_DTYPE if config.router_in_fp32 else ()
        if config.shared_expert_size:
            yield from SHARED_EXPERT_FIELDS
            yield from SHARED_GATE_FIELDS if config.shared_expert_gate else ()
        if config.parallel_dense:
            yield from DENSE_BESIDE_EXPERTS


def written(fields: Iterable[Field], place: Place, config: ModelConfig, layer: LayerConfig) -> dict[str, Any]:
    """The names and values that a place records about a model.

    Args:
        fields: The rows.
        place: The place; rows without a name there are skipped.
        config: The model.
        layer: The layer whose sizes stand for those of all layers.
    """
    return {name: field.value(config, layer) for field in fields if (name := getattr(field, place)) is not None}


def core_sizes(layer: LayerConfig) -> dict[str, Any]:
    """The sizes of one layer, under the names of `TransformerConfig`."""
    return {
        field.core: getattr(layer, field.ours)
        for field in CORE_FIELDS
        if field.of is LayerConfig and field.core is not None and field.ours is not None
    }


def read(fields: Iterable[Field], args: Mapping[str, Any], of: type) -> dict[str, Any]:
    """Our fields as `args` give them; those that `args` lack are left out.

    Args:
        fields: The rows.
        args: Arguments.
        of: Which class's fields to read, `ModelConfig` or `LayerConfig`.

    Raises:
        TypeError: A number is None.
    """
    return {
        field.ours: field.read(args[field.args])
        for field in fields
        if field.of is of and field.ours is not None and field.args is not None and field.args in args
    }


@dataclass(frozen=True)
class GridField:
    """A size of a parallel grid.

    Attributes:
        ours: Field of `Parallelism`.
        kind: Type of the argument.
        args: Name among Megatron-LM's arguments.
        core: Name in `TransformerConfig` and in Megatron-Bridge's providers.
        since: Release of Megatron-Core that brought it, and before which it must not be written unless it is set; None
            for the others.
    """

    ours: str
    kind: Kind
    args: str
    core: str
    since: str | None = None

    def is_written(self, grid: Parallelism) -> bool:
        """Whether a grid needs it."""
        return self.since is None or self.value(grid) is not None

    def value(self, grid: Parallelism) -> Any:
        """The value to write."""
        if self.ours == "vpp":
            return grid.vpp if grid.vpp > 1 else None
        return grid.expert_tp if self.ours == "etp" else getattr(grid, self.ours)


def of_grid(kind: Kind, ours: str, args: str, core: str = _SAME, since: str | None = None) -> GridField:
    """A field of `Parallelism`; `core` is `args` unless it is given."""
    return GridField(ours, kind, args, core or args, since)


GRID_FIELDS = (
    of_grid(COUNT, "tp", "tensor_model_parallel_size"),
    of_grid(COUNT, "pp", "pipeline_model_parallel_size"),
    of_grid(COUNT, "vpp", "virtual_pipeline_model_parallel_size"),
    of_grid(COUNT, "first_stage_layers", "decoder_first_pipeline_num_layers", "num_layers_in_first_pipeline_stage"),
    of_grid(COUNT, "last_stage_layers", "decoder_last_pipeline_num_layers", "num_layers_in_last_pipeline_stage"),
    of_grid(FLAG, "embedding_in_split", "account_for_embedding_in_pipeline_split"),
    of_grid(FLAG, "loss_in_split", "account_for_loss_in_pipeline_split"),
    of_grid(COUNT, "ep", "expert_model_parallel_size"),
    of_grid(COUNT, "etp", "expert_tensor_parallel_size"),
    of_grid(LAYOUT, "pipeline_layout", "pipeline_model_parallel_layout", since="0.13"),
)
"""The grid."""

GRID_ARGS = {field.ours: field.args for field in GRID_FIELDS if field.kind is not FLAG}
"""Size or layout of a grid -> the argument that records it."""


def core_grid(grid: Parallelism) -> dict[str, Any]:
    """A grid under the names of `TransformerConfig`."""
    return {field.core: field.value(grid) for field in GRID_FIELDS if field.is_written(grid)}
