"""Multi-token prediction in transformers: the reference for the logits of these layers.

transformers runs them while it generates. Its own loader looks for the numbers that released models give these layers,
so a model with other numbers would get none: here they are loaded by the number of layers before them. Where archives
have them apart (Qwen3-Next and its successors), transformers has no loader: its layers are loaded by their numbers.
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
_APART = "mtp."
"""Beginning of the names of layers that are not numbered behind the others."""
_OUTSIDE = {
    "fc.weight": "eh_proj.weight",
    "pre_fc_norm_embedding.weight": "enorm.weight",
    "pre_fc_norm_hidden.weight": "hnorm.weight",
    "norm.weight": "shared_head.norm.weight",
}
"""Names there -> names inside of a layer that is numbered."""
_PARTS = ("gate", "up", "down")
_EXPERT = re.compile(rf"(?P<experts>.+\.experts\.)(?P<number>[0-9]{{1,6}})\.(?P<part>{'|'.join(_PARTS)})_proj\.weight")
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
        first: The number that the directory gives the first of them, or None where it has them apart.

    Raises:
        InputError: The directory has not all of their weights.
        UnsupportedError: This transformers cannot run them.
    """

    def __init__(self, model: Any, path: str | Path, count: int, rounded: Mapping[str, str]) -> None:
        import torch

        layers = int(model.config.get_text_config().num_hidden_layers)
        stored = {name: value for name, value in read_shards(Path(path)).tensors.items() if count_in_hf([name], layers)}
        state = {name: load(value) for name, value in stored.items() if not name.endswith(COPIES)}
        for name, value in state.items():
            dtype = rounded.get(name, rounded.get(EVERY))
            if dtype is not None and value.is_floating_point():
                state[name] = value.to(getattr(torch, dtype)).to(value.dtype)
        apart = any(name.startswith(_APART) for name in state)
        self.first = None if apart else layers
        self._owner = model
        if apart:
            state = _stacked({_numbered(name, layers): value for name, value in state.items()})
        self.model = _loaded(model, count, state, path, _attention_alone(model, count, path) if apart else {})

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
                inner = match[2].replace(_POST_NORM, _POST_NORM_ON_HUB).removeprefix(_BLOCK)
                number = int(match[1])
                found[_apart(inner) if self.first is None else f"model.layers.{self.first + number}.{inner}"] = value
        return found

    def use_attention(self, name: str) -> None:
        """Switches to another implementation of attention."""
        self.model.set_attn_implementation(name)


def _numbered(name: str, layers: int) -> str:
    """The name of a tensor of the one layer that is apart, as if it were numbered behind the model's own."""
    inside = name.removeprefix(_APART).removeprefix("layers.0.")
    return f"model.layers.{layers}.{_OUTSIDE.get(inside, inside)}"


def _apart(inside: str) -> str:
    """The name of a tensor of the one layer that is apart, from that inside of a layer that is numbered."""
    outside = {ours: theirs for theirs, ours in _OUTSIDE.items()}
    return _APART + outside.get(inside, f"layers.0.{inside}")


def _stacked(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same with all experts of a layer in one tensor, as transformers has them in memory."""
    import torch

    experts: dict[str, dict[int, dict[str, torch.Tensor]]] = {}
    for name, value in state.items():
        if match := _EXPERT.fullmatch(name):
            experts.setdefault(match["experts"], {}).setdefault(int(match["number"]), {})[match["part"]] = value
    found = dict(state)
    for prefix, parts in experts.items():
        if sorted(parts) != list(range(len(parts))) or any(len(one) < len(_PARTS) for one in parts.values()):
            continue  # whoever loads them names what is missing
        gate, up, down = ([parts[number][part] for number in sorted(parts)] for part in _PARTS)
        found[f"{prefix}gate_up_proj"] = torch.stack([torch.cat(pair) for pair in zip(gate, up, strict=True)])
        found[f"{prefix}down_proj"] = torch.stack(down)
        for name in [name for name in found if _EXPERT.fullmatch(name) and name.startswith(prefix)]:
            del found[name]
    return found


def _attention_alone(model: Any, count: int, path: object) -> dict[str, Any]:
    """What config.json does not say of layers that have attention whatever the model's own have.

    Raises:
        UnsupportedError: transformers would take another norm for them.
    """
    last = model.get_decoder().layers[-1]
    if hasattr(last, "linear_attn"):
        raise UnsupportedError(
            "transformers makes multi-token prediction like the model's last layer, which has no attention", where=path
        )
    without_experts = list(range(count)) if not hasattr(last.mlp, "experts") else []
    return {"mtp_layer_types": ["full_attention"] * count, "mlp_only_layers": without_experts, "decoder_sparse_step": 1}


def _loaded(model: Any, count: int, state: dict[str, torch.Tensor], path: object, given: Mapping[str, Any]) -> Any:
    """A `MtpModel` of transformers with these weights, in the type of the model.

    Args:
        model: The model.
        count: How many layers it has.
        state: Their weights, by the names of layers that are numbered.
        path: Where they come from.
        given: Fields of its config that are others for these layers.
    """
    import transformers
    from transformers import modeling_layers

    if not hasattr(getattr(modeling_layers, "MtpModel", None), "get_weight_conversions"):
        raise UnsupportedError(f"transformers {transformers.__version__} runs no multi-token prediction", where=path)
    from transformers.core_model_loading import convert_and_load_state_dict_in_model
    from transformers.modeling_utils import LoadStateDictConfig

    config = model.config.get_text_config(decoder=True)
    before = {name: getattr(config, name, None) for name in ("num_mtp_layers", "mtp_mlp_layer_types", *given)}
    config.num_mtp_layers = count
    for name, value in given.items():
        setattr(config, name, value)
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
    names = (name for name, _ in found.named_parameters(remove_duplicate=False))  # tied ones, too
    shared = tuple(name for name in names if name.startswith(("embed_tokens.", "shared_head.")))
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
