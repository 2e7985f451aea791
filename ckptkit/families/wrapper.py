"""Multimodal models around a text model: their config.json, and the config.json of the text model alone."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any

from ckptkit.tables.config_fields import Fields, object_in, set_dtype
from ckptkit.tables.config_json import ConfigJson
from ckptkit.tables.model_config import ModelConfig
from ckptkit.tables.rows import Raw

WRAPPER_DEFAULTS = {"tie_word_embeddings": True}
"""Class default of the one key that counts at the top level, of Gemma 3 and 4."""
_SHARED = ("dtype", "torch_dtype", "bos_token_id", "eos_token_id", "pad_token_id", "transformers_version")


@dataclass(frozen=True, eq=False)
class Wrapper:
    """How a multimodal family writes its config.json: that of the text model stands under `text_config`.

    Attributes:
        family: Name of the family, and Hugging Face's name of the config class.
        architecture: Hugging Face class name.
        text: The config.json of the text model's family.
        parse_text: The text family's translation from config.json.
        unparse_text: The text family's translation to config.json.
        tied: Class default of `tie_word_embeddings`, the one key that counts at the top level.
    """

    family: str
    architecture: str
    text: ConfigJson
    parse_text: Callable[[Raw], ModelConfig]
    unparse_text: Callable[[ModelConfig, Raw], dict[str, Any]]
    tied: bool = WRAPPER_DEFAULTS["tie_word_embeddings"]

    def _is_tied(self, raw: Raw) -> bool:
        return Fields(raw, {"tie_word_embeddings": self.tied}).flag("tie_word_embeddings")

    def parse(self, raw: Raw) -> ModelConfig:
        """Translates a config.json to the text model that it holds.

        Raises:
            InputError: A field is missing, of the wrong type, or contradicts another.
            UnsupportedError: No table converts such a text model.
        """
        text = object_in(raw, "text_config")
        return replace(
            self.parse_text(text),
            family=self.family,
            architecture=self.architecture,
            tied=self._is_tied(raw),
            dtype=Fields(raw, {}).dtype() or Fields(text, {}).dtype(),
        )

    def unparse(self, config: ModelConfig, base: Raw) -> dict[str, Any]:
        """The raw config.json: `base` with the fields that differ.

        Without a base the towers are unknown, and transformers builds those of its class defaults.
        """
        raw = deepcopy(dict(base)) or {"architectures": [config.architecture], "model_type": self.family}
        text = raw.get("text_config") or {}
        tied = self.text.fields(text).flag("tie_word_embeddings") if text else config.tied
        raw["text_config"] = self.unparse_text(replace(config, tied=tied, dtype=None), text)
        if not text:
            del raw["text_config"]["architectures"]  # only the whole model has one
        if self._is_tied(raw) != config.tied:
            raw["tie_word_embeddings"] = config.tied
        if not base or self.parse(base).dtype != config.dtype:
            set_dtype(raw, config.dtype)
        return raw

    def text_only(self, raw: Raw) -> dict[str, Any]:
        """The config.json of the text model alone, which the text family's class loads."""
        return {
            **{key: raw[key] for key in _SHARED if key in raw},
            **deepcopy(dict(raw.get("text_config") or {})),
            "architectures": [self.text.architecture],
            "model_type": self.text.model_type,
            "tie_word_embeddings": self.parse(raw).tied,
        }
