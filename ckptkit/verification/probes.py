"""Hidden states at the same places of both libraries' models."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from ckptkit.checkpoint import EMBEDDING, HEAD

KEPT = 64
"""Positions, counted from the end, whose hidden states are kept."""


def places(num_layers: int) -> list[str]:
    """Names of all probes in the order of the computation; the head follows the last one."""
    parts = ("self_attention", "mlp", "output")
    return ["embedding", *(f"layers.{i}.{part}" for i in range(num_layers) for part in parts), "final_norm"]


@dataclass(frozen=True)
class Site:
    """A place in a model.

    Attributes:
        module: The module whose output is kept.
        take: Hidden state [batch, sequence, hidden] from that output.
        feeds: Names of the tensors between the previous probe and this one.
    """

    module: torch.nn.Module
    take: Callable[[Any], torch.Tensor]
    feeds: list[str]


class Recorder:
    """Keeps the hidden states that pass some sites.

    Args:
        sites: Place -> site.

    Attributes:
        sites: As given.
        states: Place -> fp32 [positions of all sequences, hidden] in host memory, sequence after sequence; of each
            sequence its last `KEPT` positions.
    """

    def __init__(self, sites: dict[str, Site]) -> None:
        self.sites = sites
        self.states: dict[str, torch.Tensor] = {}

    @contextmanager
    def over(self, length: int) -> Iterator[None]:
        """Keep what passes inside, of sequences of `length` tokens; what follows them is padding."""
        handles = [site.module.register_forward_hook(self._hook(place, length)) for place, site in self.sites.items()]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _hook(self, place: str, length: int) -> Callable[..., None]:
        def keep(module: torch.nn.Module, inputs: Any, output: Any) -> None:
            # A copy: megatron-core adds the residual into the output of attention and MLP in place.
            state = self.sites[place].take(output).detach()[:, :length][:, -KEPT:].flatten(0, 1).float().cpu().clone()
            self.states[place] = torch.cat((self.states[place], state)) if place in self.states else state

        return keep


def megatron_sites(chunks: list[Any]) -> dict[str, Site]:
    """Sites of a rank's model chunks; layers by their global number."""
    from ckptkit.megatron.model import layer_numbers

    sites: dict[str, Site] = {}
    for chunk in chunks:
        take = _sequence_first(chunk.config.sequence_parallel)
        if chunk.pre_process:
            sites["embedding"] = Site(chunk.embedding, take, _names(chunk.embedding, "embedding."))
        for number, layer in zip(layer_numbers(chunk), chunk.decoder.layers, strict=True):
            prefix = f"decoder.layers.{number}."
            sites.update(_layer_sites(f"layers.{number}", layer, prefix, take, layer.self_attention))
        if chunk.post_process:
            norm = chunk.decoder.final_layernorm
            sites["final_norm"] = Site(norm, take, _names(norm, "decoder.final_layernorm."))
    return sites


def megatron_head(chunks: list[Any]) -> list[str]:
    """Names of the tensors of the head, on the ranks that hold it."""
    if not chunks[-1].post_process:
        return []
    shared = chunks[-1].share_embeddings_and_output_weights and chunks[-1].pre_process
    return [EMBEDDING if shared else HEAD]


def hf_head(model: Any) -> list[str]:
    """Names of the tensors of the head."""
    head = model.get_output_embeddings()
    return [name for name, parameter in model.named_parameters() if parameter is head.weight]


def hf_sites(model: Any) -> dict[str, Site]:
    """Sites of a transformers model."""
    decoder = model.get_decoder()
    prefixes = {module: name for name, module in model.named_modules()}
    embedding = model.get_input_embeddings()
    sites = {"embedding": Site(embedding, _first, _names(embedding, f"{prefixes[embedding]}."))}
    for number, layer in enumerate(decoder.layers):
        sites.update(_layer_sites(f"layers.{number}", layer, f"{prefixes[layer]}.", _first, layer.self_attn))
    sites["final_norm"] = Site(decoder.norm, _first, _names(decoder.norm, f"{prefixes[decoder.norm]}."))
    return sites


def _layer_sites(
    name: str, layer: Any, prefix: str, take: Callable[[Any], torch.Tensor], attention: torch.nn.Module
) -> dict[str, Site]:
    """Attention, MLP and whole of one decoder layer, its tensors shared out among them in running order.

    Norms after attention and MLP belong to those: in Megatron they are part of the last linear.
    """
    feeds: dict[str, list[str]] = {"self_attention": [], "mlp": [], "output": []}
    modules = {"self_attention": attention, "mlp": layer.mlp, "output": layer}
    if hasattr(layer, "post_feedforward_layernorm"):
        modules |= {"self_attention": layer.post_attention_layernorm, "mlp": layer.post_feedforward_layernorm}
    post_norms = {module: part for part, module in modules.items()}
    for child, module in layer.named_children():
        feeds[post_norms.get(module) or _part(child)] += _names(module, f"{prefix}{child}.")
    feeds["output"] += [prefix + parameter for parameter, _ in layer.named_parameters(recurse=False)]
    return {f"{name}.{part}": Site(modules[part], take, feeds[part]) for part in feeds}


def _part(child: str) -> str:
    """Which probe of a layer sees the tensors of one of its children first."""
    if child in ("input_layernorm", "attention_layernorm", "self_attention", "self_attn"):
        return "self_attention"
    if child in ("pre_mlp_layernorm", "pre_feedforward_layernorm", "feedforward_layernorm", "mlp"):
        return "mlp"
    # Llama's post_attention_layernorm precedes the MLP.
    return "mlp" if child == "post_attention_layernorm" else "output"


def _names(module: torch.nn.Module, prefix: str) -> list[str]:
    return [prefix + name for name, _ in module.named_parameters()]


def _first(output: Any) -> torch.Tensor:
    """The hidden state of a transformers module, whose further outputs are attention weights and caches."""
    state: torch.Tensor = output[0] if isinstance(output, tuple) else output
    return state


def _sequence_first(sequence_parallel: bool) -> Callable[[Any], torch.Tensor]:
    """Reads a Megatron module's output: [sequence, batch, hidden], or that with a bias still to be added."""

    def take(output: torch.Tensor | tuple[torch.Tensor, torch.Tensor | None]) -> torch.Tensor:
        from ckptkit.megatron.parallel import gather_over_tensor_ranks

        state, bias = output if isinstance(output, tuple) else (output, None)
        state = state if bias is None else state + bias
        if sequence_parallel:
            state = gather_over_tensor_ranks(state, dim=0)
        return state.transpose(0, 1)

    return take
