"""Values of earlier layers that later layers need beside the hidden state, and their way there.

Gemma 4 has two such things: inputs that every layer gets of its own, made from the token ids where the embedding is,
and keys and values that several layers attend to. Within a stage they travel as Megatron's `context`, which goes from
layer to layer and through activation recomputation. From stage to stage they are columns to the right of the hidden
state, so that whatever sends hidden states sends them too, and gradients come back the same way.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from megatron.core.transformer.transformer_config import TransformerConfig

from ckptkit.tables.model_config import ModelConfig

Column = tuple[str, int]
"""(`input`, the layer that it is for) or (`kv`, the layer that it is from)."""


@dataclass(frozen=True)
class Carried:
    """The columns that travel beside the hidden state [sequence, batch, hidden].

    Keys and values of a rank's heads are those of the whole sequence, also where the hidden state is split over it.
    They are reshaped to its part of the sequence, element by element, and back where they are used.

    Attributes:
        config: The model.
        tp: Tensor parallel size.
        parts: Over how many ranks the sequence is split.
    """

    config: ModelConfig
    tp: int
    parts: int

    @classmethod
    def under(cls, config: TransformerConfig, model: ModelConfig) -> Carried:
        """The columns of a model under Megatron's config."""
        tp = config.tensor_model_parallel_size
        return cls(model, tp, tp if config.sequence_parallel else 1)

    def donors(self, before: int, after: int) -> list[int]:
        """Layers below `before` whose keys and values layers from `after` on attend to."""
        found = {layer.kv_donor for layer in self.config.layers[after:] if layer.kv_donor is not None}
        return sorted(donor for donor in found if donor < before)

    def entering(self, layer: int) -> list[Column]:
        """The values that enter a layer from the previous stage, or the first layer from the embedding."""
        inputs = range(layer, self.config.num_layers) if self.config.per_layer_input_size else ()
        return [*(("input", at) for at in inputs), *(("kv", at) for at in self.donors(layer, layer))]

    def before(self, layer: int, first: int) -> list[Column]:
        """The values available before a layer of a stage that begins with `first`: those that entered or were added."""
        added = [donor for donor in self.donors(layer, first) if donor >= first]
        return [*self.entering(first), *(("kv", donor) for donor in added)]

    def width(self, columns: Iterable[Column]) -> int:
        """Number of columns."""
        return sum(self._width(column) for column in columns)

    def split(self, wide: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The hidden state, and what came beside it or None, of what a stage receives."""
        hidden = self.config.hidden_size
        if wide.size(-1) == hidden:
            return wide, None
        return wide[..., :hidden].contiguous(), wide[..., hidden:].contiguous()

    def take(self, context: torch.Tensor | None, columns: list[Column], wanted: Column) -> torch.Tensor:
        """One entry of a context that holds `columns`."""
        assert context is not None
        start = self.width(columns[: columns.index(wanted)])
        return context[..., start : start + self._width(wanted)]

    def join(self, hidden: torch.Tensor, context: torch.Tensor | None, columns: list[Column], end: int) -> torch.Tensor:
        """The values that a stage sends if its last layer is before `end`: the hidden state, and those for `end`."""
        if context is None:
            return hidden
        return torch.cat((hidden, *(self.take(context, columns, column) for column in self.entering(end))), dim=-1)

    def _width(self, column: Column) -> int:
        kind, number = column
        if kind == "input":
            return self.config.per_layer_input_size
        layer = self.config.layers[number]
        return self.parts * max(1, layer.num_kv_heads // self.tp) * 2 * layer.head_dim
