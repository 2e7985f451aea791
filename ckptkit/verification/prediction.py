"""Multi-token prediction in transformers: the reference for the logits of these layers.

transformers runs them while it generates. Its own loader looks for the numbers that released models give these layers,
so a model with other numbers would get none: here they are loaded by the number of layers before them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ckptkit.errors import InputError, UnsupportedError
from ckptkit.formats.hf import read_shards
from ckptkit.io.as_torch import load
from ckptkit.tables.prediction import count_in_hf
from ckptkit.verification.rounding import EVERY

if TYPE_CHECKING:
    import torch

COPIES = (".embed_tokens.weight", ".shared_head.head.weight")
"""Endings of the copies of the embedding and of the head, for which transformers takes the model's own."""
_BIAS = "e_score_correction_bias"
"""What transformers keeps in float32."""
_OF_LAYER = re.compile(r"layers\.([0-9]+)\.(.+)")
_BLOCK, _POST_NORM, _POST_NORM_ON_HUB = "mtp_block.", "post_norm.", "shared_head.norm."
"""Names in transformers' `MtpLayer`, and that of its last norm in released files."""


class Prediction:
    """The layers of multi-token prediction of a loaded model.

    Args:
        model: The model, which shares its embedding and its head with them.
        path: Its directory.
        count: How many of them it has.
        rounded: As `Rounding.dtypes`.

    Attributes:
        model: transformers' `MtpModel`.
        first: The number that the directory gives the first of them.

    Raises:
        InputError: The directory has not all of their weights.
        UnsupportedError: This transformers cannot run them.
    """

    def __init__(self, model: Any, path: str | Path, count: int, rounded: Mapping[str, str]) -> None:
        import torch

        self.first = int(model.config.num_hidden_layers)
        stored = {
            name: value for name, value in read_shards(Path(path)).tensors.items() if count_in_hf([name], self.first)
        }
        state = {name: load(value) for name, value in stored.items() if not name.endswith(COPIES)}
        for name, value in state.items():
            dtype = rounded.get(name, rounded.get(EVERY))
            if dtype is not None and value.is_floating_point():
                state[name] = value.to(getattr(torch, dtype)).to(value.dtype)
        self._owner = model
        self.model = _loaded(model, count, state, path)

    def logits(self, batch: torch.Tensor) -> torch.Tensor:
        """Logits of the last of the layers, [batch, sequence, vocabulary].

        Args:
            batch: Token ids, int64 [batch, sequence].
        """
        states = self._owner.get_decoder()(input_ids=batch, use_cache=False).last_hidden_state
        *_, last = self.states(batch, states)
        logits: torch.Tensor = self._owner.get_output_embeddings()(last)
        return logits

    def every_logits(self, batch: torch.Tensor) -> list[torch.Tensor]:
        """Logits of the model, and of each of the layers, from one pass; as `logits`."""
        states = self._owner.get_decoder()(input_ids=batch, use_cache=False).last_hidden_state
        head = self._owner.get_output_embeddings()
        return [head(found) for found in (states, *self.states(batch, states))]

    def states(self, batch: torch.Tensor, states: torch.Tensor) -> Iterator[torch.Tensor]:
        """Hidden states behind each of the layers, [batch, sequence, hidden].

        The layer with number k sees, at each position, the k-th token after it, and behind the end of a row token 0.

        Args:
            batch: Token ids, int64 [batch, sequence].
            states: Hidden states behind the model's final norm, [batch, sequence, hidden].
        """
        import torch
        import torch.nn.functional as F

        positions = torch.arange(batch.size(1), device=batch.device)[None]
        tokens = batch
        for number in range(len(self.model.layers)):
            tokens = F.pad(tokens[:, 1:], (0, 1))
            # Not through the module: what is recorded of it is the model's own pass.
            embedded = F.embedding(tokens, self._owner.get_input_embeddings().weight)
            states = self.model.forward_layer(number, states, positions, None, inputs_embeds=embedded)
            yield states

    def tensors(self) -> dict[str, torch.Tensor]:
        """Parameters and persistent buffers of the layers, under the names that their like have in the model."""
        found = {}
        for name, value in self.model.state_dict(keep_vars=True).items():
            if match := _OF_LAYER.fullmatch(name):
                inner = match[2].replace(_POST_NORM, _POST_NORM_ON_HUB)
                found[f"model.layers.{self.first + int(match[1])}.{inner.removeprefix(_BLOCK)}"] = value
        return found

    def use_attention(self, name: str) -> None:
        """Switches to another implementation of attention."""
        self.model.set_attn_implementation(name)


def _loaded(model: Any, count: int, state: dict[str, torch.Tensor], path: object) -> Any:
    """A `MtpModel` of transformers with these weights, in the type of the model."""
    import transformers
    from transformers import modeling_layers

    if not hasattr(getattr(modeling_layers, "MtpModel", None), "get_weight_conversions"):
        raise UnsupportedError(f"transformers {transformers.__version__} runs no multi-token prediction", where=path)
    from transformers.core_model_loading import convert_and_load_state_dict_in_model
    from transformers.modeling_utils import LoadStateDictConfig

    config = model.config
    before = {name: getattr(config, name, None) for name in ("num_mtp_layers", "mtp_mlp_layer_types")}
    config.num_mtp_layers = count
    if getattr(config, "mlp_layer_types", None) is not None:
        config.mtp_mlp_layer_types = (
            config.mlp_layer_types[-1:] * count
        )  # a config without them: they are like the last
    try:
        found = modeling_layers.MtpModel(model, count)
        conversions: Any = found.get_weight_conversions(model)
    finally:
        for name, value in before.items():
            setattr(config, name, value)
    info, _ = convert_and_load_state_dict_in_model(
        model=found, state_dict=state, load_config=LoadStateDictConfig(weight_mapping=conversions)
    )
    shared = tuple(name for name, _ in found.named_parameters() if name.startswith(("embed_tokens.", "shared_head.")))
    kinds = {
        "missing": sorted(set(info.missing_keys) - set(shared)),
        "unexpected": sorted(info.unexpected_keys),
        "of another shape": sorted(map(str, info.mismatched_keys)),
    }
    texts = [f"{kind}: {', '.join(names[:4])}" for kind, names in kinds.items() if names]
    if texts:
        raise InputError(f"weights of multi-token prediction do not fit: {'; '.join(texts)}", where=path)
    biases = {name: value.detach().clone() for name, value in found.named_buffers() if name.endswith(_BIAS)}
    found.layers.to(device=model.device, dtype=model.dtype)
    for name, value in biases.items():
        module, _, attribute = name.rpartition(".")
        setattr(found.get_submodule(module), attribute, value.float().to(model.device))
    return found.eval()
