"""Value models of Gemma 4: the text model, and a head with one output per token.

transformers has such classes for other models of its kind, built of the same two parts.
"""

from transformers import Gemma4TextConfig
from transformers.modeling_layers import GenericForSequenceClassification, GenericForTokenClassification
from transformers.models.gemma4.modeling_gemma4 import Gemma4PreTrainedModel


class Gemma4TextForTokenClassification(GenericForTokenClassification, Gemma4PreTrainedModel):
    """A label for every token; with a single label, its value."""

    config_class = Gemma4TextConfig
    config: Gemma4TextConfig  # type: ignore[assignment]
    input_modalities = ("text",)  # type: ignore[assignment]


class Gemma4TextForSequenceClassification(GenericForSequenceClassification, Gemma4PreTrainedModel):
    """A label for every sequence, read at its last token."""

    config_class = Gemma4TextConfig
    config: Gemma4TextConfig  # type: ignore[assignment]
    input_modalities = ("text",)  # type: ignore[assignment]


__all__ = ["Gemma4TextForSequenceClassification", "Gemma4TextForTokenClassification"]
