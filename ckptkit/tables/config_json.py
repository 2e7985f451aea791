"""The translation of config.json, as far as most families share it.

A family lists its class defaults. A key that they lack does not exist in the class: it is neither read nor written. The
family replaces its own fields in the `ModelConfig` that `decoder` returns.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any

from ckptkit.errors import InputError
from ckptkit.tables.config_fields import FULL, SLIDING, Fields, set_dtype, set_rope
from ckptkit.tables.model_config import LayerConfig, ModelConfig, Rope
from ckptkit.tables.rows import Raw


@dataclass(frozen=True, eq=False)
class ConfigJson:
    """How a family writes its config.json.

    Attributes:
        family: Name of the family.
        architecture: Hugging Face class name.
        model_type: Hugging Face's name of the config class.
        defaults: Class default of every key that may be absent. `head_dim` None is `hidden_size / heads`.
        rope: Class default of the rotary embedding.
        aliases: Other names of keys.
    """

    family: str
    architecture: str
    model_type: str
    defaults: Mapping[str, Any]
    rope: Rope
    aliases: tuple[tuple[str, str], ...] = ()

    def fields(self, raw: Raw) -> Fields:
        """`raw` with the class defaults behind it."""
        return Fields(raw, self.defaults, dict(self.aliases))

    def decoder(self, raw: Raw) -> ModelConfig:
        """Translates the keys that all families share: sizes, biases, one rotary embedding; no windows, no experts.

        Raises:
            InputError: A field is missing, of the wrong type, or contradicts another.
        """
        fields = self.fields(raw)
        attention_bias = "attention_bias" in self.defaults and fields.flag("attention_bias")
        return ModelConfig(
            family=self.family,
            architecture=self.architecture,
            hidden_size=fields.integer("hidden_size"),
            vocab_size=fields.integer("vocab_size"),
            layers=(self._layer(fields),) * fields.integer("num_hidden_layers"),
            tied=fields.flag("tie_word_embeddings"),
            norm_eps=fields.number("rms_norm_eps"),
            max_position_embeddings=fields.integer("max_position_embeddings"),
            qkv_bias=attention_bias,
            out_bias=attention_bias,
            mlp_bias="mlp_bias" in self.defaults and fields.flag("mlp_bias"),
            activation=str(fields.get(self._activation)),
            init_std=fields.number("initializer_range"),
            dtype=fields.dtype(),
        )

    def _layer(self, fields: Fields) -> LayerConfig:
        hidden, heads = fields.integer("hidden_size"), fields.integer("num_attention_heads")
        kv_heads = fields.integer_or_none("num_key_value_heads") or heads
        if heads % kv_heads:
            raise InputError(f"config.json: {heads} attention heads are not a multiple of {kv_heads} key/value heads")
        head_dim = fields.integer_or_none("head_dim")
        if head_dim is None and hidden % heads:
            raise InputError(
                f"config.json: hidden_size {hidden} does not divide over {heads} heads, and head_dim is absent"
            )
        return LayerConfig(
            num_heads=heads,
            num_kv_heads=kv_heads,
            head_dim=head_dim or hidden // heads,
            ffn_hidden_size=fields.integer("intermediate_size"),
            rope=fields.rope(self.rope),
        )

    @property
    def _activation(self) -> str:
        return "hidden_activation" if "hidden_activation" in self.defaults else "hidden_act"

    def values(self, config: ModelConfig) -> dict[str, Any]:
        """The values of `config` for the keys that `decoder` reads, defaults included."""
        layer = config.layers[0]
        values = {
            "vocab_size": config.vocab_size,
            "hidden_size": config.hidden_size,
            "intermediate_size": layer.ffn_hidden_size,
            "num_hidden_layers": config.num_layers,
            "num_attention_heads": layer.num_heads,
            "num_key_value_heads": layer.num_kv_heads,
            "head_dim": layer.head_dim,
            self._activation: config.activation,
            "max_position_embeddings": config.max_position_embeddings,
            "initializer_range": config.init_std,
            "rms_norm_eps": config.norm_eps,
            "tie_word_embeddings": config.tied,
            "attention_bias": config.qkv_bias,
            "mlp_bias": config.mlp_bias,
        }
        return {key: value for key, value in values.items() if key in self.defaults}

    def unparse(
        self,
        config: ModelConfig,
        base: Raw,
        parse: Callable[[Raw], ModelConfig],
        values: Callable[[ModelConfig], Mapping[str, Any]],
    ) -> dict[str, Any]:
        """The raw config.json of `config`: `base` with the fields that differ, or all fields where there is no base.

        The rotary embedding is left to `with_rope`, for families with more than one.

        Args:
            config: The model to describe.
            base: The config.json to change, or an empty one.
            parse: The family's translation from config.json.
            values: The family's translation of a model to keys of config.json, defaults included.
        """
        raw = deepcopy(dict(base)) or {"architectures": [self.architecture], "model_type": self.model_type}
        old, new = values(parse(base)) if base else {}, values(config)
        changed = {key for key, value in new.items() if key not in old or old[key] != value}
        if changed & {"hidden_size", "num_attention_heads"}:  # absent, these two follow from those
            changed |= {key for key in ("head_dim", "num_key_value_heads") if key in new and raw.get(key) is None}
        for key in (key for key in new if key in changed):
            alias = dict(self.aliases).get(key, key)
            raw[alias if alias in raw else key] = new[key]
        set_dtype(raw, config.dtype)
        return raw

    def with_rope(self, raw: dict[str, Any], config: ModelConfig) -> dict[str, Any]:
        """`raw` with the one rotary embedding of `config`."""
        set_rope(raw, config.layers[0].rope, self.rope, self.defaults)
        return raw


def translation(
    config_json: ConfigJson,
    parse: Callable[[Raw], ModelConfig],
    values: Callable[[ModelConfig], Mapping[str, Any]],
) -> Callable[[ModelConfig, Raw], dict[str, Any]]:
    """The `unparse` of a family with one rotary embedding."""

    def unparse(config: ModelConfig, base: Raw) -> dict[str, Any]:
        return config_json.with_rope(config_json.unparse(config, base, parse, values), config)

    return unparse


def windowed(config: ModelConfig, windows: Iterable[int | None]) -> ModelConfig:
    """`config` with a window for each layer."""
    pairs = zip(config.layers, windows, strict=True)
    return replace(config, layers=tuple(replace(layer, window=window) for layer, window in pairs))


def windows_by_type(types: Sequence[str], window: int | None) -> list[int | None]:
    """`window` for sliding layers, None for the others.

    Raises:
        InputError: There are sliding layers, but no window.
    """
    if window is None and SLIDING in types:
        raise InputError(f"config.json: layer {types.index(SLIDING)} is {SLIDING}, but there is no sliding_window")
    return [window if kind == SLIDING else None for kind in types]


def window_of(config: ModelConfig) -> int | None:
    """The window of the layers that have one."""
    return next((layer.window for layer in config.layers if layer.window is not None), None)


def layer_types_of(config: ModelConfig) -> list[str]:
    """Hugging Face's `layer_types`."""
    return [FULL if layer.window is None else SLIDING for layer in config.layers]
