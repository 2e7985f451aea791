"""Hidden states at the same places of both libraries' models."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch

from ckptkit.checkpoints.checkpoint import EMBEDDING, HEAD
from ckptkit.verification.routing import decoder_layers, is_router

KINDS = ("layers", "prediction")
"""Layers of the model, and of multi-token prediction."""
KEPT = 64
"""Positions of a row, counted from the end, whose hidden states are kept."""
KEPT_IN_ALL = 512
"""Positions of all rows whose hidden states are kept."""
WITHIN = (".self_attention", ".mlp")
PARTS = ("self_attention", "router", "mlp", "output")
ALL_PARTS = ("adapter", *PARTS)
"""With what one layer of a model may have before it."""
_BEFORE = ("embedding_norm", "hidden_norm", "projection")
"""Parts of a layer of multi-token prediction before its decoder layer; `final_norm` is behind that."""


def places(num_layers: int, parts: Sequence[str] = PARTS, predicted: int = 0) -> list[str]:
    """Names of all probes in the order of the computation; the head follows the last one.

    Args:
        num_layers: Layers of the model.
        parts: Parts of a layer.
        predicted: Layers of multi-token prediction.
    """
    inner = [*(_BEFORE if len(parts) > 1 else ()), *parts, "final_norm"]
    return [
        "embedding",
        *(f"layers.{number}.{part}" for number in range(num_layers) for part in parts),
        "final_norm",
        *(f"prediction.{number}.{part}" for number in range(predicted) for part in inner),
    ]


def places_in(found: Collection[str], parts: Sequence[str] = PARTS) -> list[str]:
    """The probes among these names, in the order of the computation.

    Args:
        found: The names; every layer has its output among them.
        parts: Parts of a layer that count.
    """
    layers, predicted = (
        sum(name.startswith(f"{kind}.") and name.endswith(".output") for name in found) for kind in KINDS
    )
    return [place for place in places(layers, parts, predicted) if place in found]


@dataclass(frozen=True)
class Site:
    """A place in a model.

    Attributes:
        module: The module whose output is kept.
        take: Hidden state [batch, sequence, hidden] from that output; None where something else is kept.
        feeds: Names of the tensors between the previous probe and this one.
    """

    module: torch.nn.Module
    take: Callable[[Any], torch.Tensor] | None
    feeds: list[str]


class Recorder:
    """Keeps the hidden states that pass some sites.

    Args:
        sites: Place -> site.
        whole_layers: Keep no states within layers.

    Attributes:
        sites: As given.
        states: Place -> fp32 [positions of all sequences, hidden] in host memory, sequence after sequence; of each
            sequence its last `KEPT` positions, and no more than `KEPT_IN_ALL` of all of them.
    """

    def __init__(self, sites: dict[str, Site], whole_layers: bool = False) -> None:
        self.sites = sites
        self._takes = {
            place: site.take
            for place, site in sites.items()
            if site.take is not None and not (whole_layers and place.endswith(WITHIN))
        }
        self.states: dict[str, torch.Tensor] = {}

    @contextmanager
    def over(self, length: int) -> Iterator[None]:
        """Keep what passes inside, of sequences of `length` tokens; what follows them is padding."""
        handles = [
            self.sites[place].module.register_forward_hook(self._hook(take, place, length))
            for place, take in self._takes.items()
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _hook(self, take: Callable[[Any], torch.Tensor], place: str, length: int) -> Callable[..., None]:
        def keep(module: torch.nn.Module, inputs: Any, output: Any) -> None:
            known = self.states.get(place)
            room = KEPT_IN_ALL - (0 if known is None else len(known))
            # A copy: megatron-core adds the residual into the output of attention and MLP in place.
            whole = take(output).detach()  # a collective where the sequence is split: no rank may leave it out
            state = whole[:, :length][:, -KEPT:].flatten(0, 1)[:room].float().cpu().clone()
            self.states[place] = state if known is None else torch.cat((known, state))

        return keep


def megatron_sites(chunks: list[Any]) -> dict[str, Site]:
    """Sites of a rank's model chunks; layers by their global number."""
    from ckptkit.megatron.decoder import inner_layer
    from ckptkit.megatron.model import layer_numbers

    sites: dict[str, Site] = {}
    for chunk in chunks:
        take = _sequence_first(chunk.config.sequence_parallel)
        if chunk.pre_process:
            sites["embedding"] = Site(chunk.embedding, take, _names(chunk.embedding, "embedding."))
        for number, layer in zip(layer_numbers(chunk), chunk.decoder.layers, strict=True):
            prefix = f"decoder.layers.{number}."
            sites.update(_layer_sites(f"layers.{number}", layer, prefix, take, layer.self_attention))
            sites[f"layers.{number}.output"] = replace(sites[f"layers.{number}.output"], take=_whole_layer(chunk, take))
        if (adapter := getattr(chunk.decoder, "adapter", None)) is not None:
            sites[f"layers.{adapter.after}.adapter"] = Site(adapter, take, _names(adapter, "decoder.adapter."))
        _add_inputs(sites, chunk, "")
        if chunk.post_process:
            norm = chunk.decoder.final_layernorm
            sites["final_norm"] = Site(norm, take, _names(norm, "decoder.final_layernorm."))
        if hasattr(chunk, "mtp"):
            for number, layer in enumerate(chunk.mtp.layers):
                inner = inner_layer(layer)
                within = _layer_sites(
                    f"prediction.{number}", inner, MTP_INNER.format(number), take, inner.self_attention
                )
                output = within[f"prediction.{number}.output"]
                within[f"prediction.{number}.output"] = replace(output, take=_whole_layer(chunk, take))
                around = (layer.enorm, layer.hnorm, inner.input_layernorm, layer.final_layernorm)
                names = [f"mtp.layers.{number}.{name}" for name in _AROUND_IN_MEGATRON]
                sites.update(_prediction_sites(number, around, names, within, take))
    return sites


_AROUND_IN_MEGATRON = ("enorm.weight", "hnorm.weight", "eh_proj.weight", "final_layernorm.weight")
_AROUND_IN_HF = ("enorm.weight", "hnorm.weight", "eh_proj.weight", "shared_head.norm.weight")
MTP_INNER = "mtp.layers.{}.transformer_layer."


def _prediction_sites(
    number: int,
    modules: Sequence[torch.nn.Module],
    names: Sequence[str],
    within: dict[str, Site],
    take: Callable[[Any], torch.Tensor],
) -> dict[str, Site]:
    """Sites of a layer of multi-token prediction.

    Args:
        number: Its number, from 0.
        modules: The two norms, the norm behind the projection, whose output shows the projection, and the last norm.
        names: Names of the tensors of the two norms, the projection and the last norm.
        within: Sites of the decoder layer inside.
        take: Reads the hidden state.
    """
    place = f"prediction.{number}"
    of_norm = [name for name in within[f"{place}.self_attention"].feeds if ".input_layernorm." in name]
    within[f"{place}.self_attention"].feeds[:] = [
        name for name in within[f"{place}.self_attention"].feeds if name not in of_norm
    ]
    found = {
        f"{place}.{part}": Site(module, take, [name])
        for part, module, name in zip((*_BEFORE, "final_norm"), modules, names, strict=True)
    }
    found[f"{place}.projection"].feeds.extend(of_norm)
    return found | within


def hf_prediction_sites(prediction: Any, first: int) -> dict[str, Site]:
    """Sites of layers of multi-token prediction in transformers.

    Args:
        prediction: Its `MtpModel`.
        first: Number that files give the first of these layers.
    """
    sites: dict[str, Site] = {}
    for number, layer in enumerate(prediction.layers):
        prefix = f"model.layers.{first + number}."
        within = _layer_sites(f"prediction.{number}", layer.mtp_block, prefix, _first, layer.mtp_block.self_attn)
        around = (layer.enorm, layer.hnorm, layer.mtp_block.input_layernorm, layer.post_norm)
        sites.update(_prediction_sites(number, around, [prefix + name for name in _AROUND_IN_HF], within, _first))
    return sites


def megatron_head(chunks: list[Any]) -> list[str]:
    """Names of the tensors of the head, on the ranks that hold it."""
    if not chunks[-1].post_process:
        return []
    shared = chunks[-1].share_embeddings_and_output_weights and chunks[-1].pre_process
    return [EMBEDDING if shared else HEAD]


def hf_head(model: Any) -> list[str]:
    """Names of the tensors of the head."""
    if hasattr(model, "score"):
        return _names(model.score, "score.")
    head = model.get_output_embeddings()
    return [name for name, parameter in model.named_parameters() if parameter is head.weight]


def hf_sites(model: Any) -> dict[str, Site]:
    """Sites of a transformers model."""
    decoder = model.get_decoder()
    prefixes = {module: name for name, module in model.named_modules()}
    embedding = model.get_input_embeddings()
    sites = {"embedding": Site(embedding, _first, _names(embedding, f"{prefixes[embedding]}."))}
    for number, layer in enumerate(decoder_layers(model)):
        sites.update(_layer_sites(f"layers.{number}", layer, f"{prefixes[layer]}.", _first, _attention(layer)))
    _add_adapter(sites, decoder, f"{prefixes[decoder]}.")
    _add_inputs(sites, decoder, f"{prefixes[decoder]}.")
    sites["final_norm"] = Site(decoder.norm, _first, _names(decoder.norm, f"{prefixes[decoder.norm]}."))
    return sites


def _layer_sites(
    name: str, layer: Any, prefix: str, take: Callable[[Any], torch.Tensor], attention: torch.nn.Module
) -> dict[str, Site]:
    """Attention, MLP and whole of one decoder layer, its tensors shared out among them in running order.

    Norms after attention and MLP belong to those: in Megatron they are part of the last linear.
    """
    feeds: dict[str, list[str]] = {part: [] for part in PARTS}
    modules = {"self_attention": attention, "mlp": layer.mlp, "output": layer}
    modules |= {part: getattr(layer, norm) for norm, part in _norms_after(layer).items()}
    post_norms = {module: part for part, module in modules.items()}
    for child, module in layer.named_children():
        feeds[post_norms.get(module) or _part(child)] += _names(module, f"{prefix}{child}.")
    for tensors in (layer.named_parameters(recurse=False), layer.named_buffers(recurse=False)):
        feeds["output"] += [prefix + tensor for tensor, _ in tensors]
    sites = {part: Site(modules[part], take, feeds[part]) for part in modules}
    for child, module in layer.named_modules(prefix=prefix.rstrip(".")):
        if is_router(module):
            # Scales of what experts give come after the router's logits, and do not show in them.
            own = [tensor for tensor in _names(module, f"{child}.") if not tensor.endswith(".per_expert_scale")]
            for part in modules:
                feeds[part][:] = [tensor for tensor in feeds[part] if tensor not in own]
            sites["router"] = Site(module, None, own)  # what it says is in the record of the routing
    return {f"{name}.{part}": site for part, site in sites.items()}


def _attention(layer: Any) -> torch.nn.Module:
    """The attention of a decoder layer of transformers, or what stands in its place."""
    found: torch.nn.Module = layer.linear_attn if hasattr(layer, "linear_attn") else layer.self_attn
    return found


def _part(child: str) -> str:
    """Which probe of a layer sees the tensors of one of its children first."""
    if child in ("input_layernorm", "attention_layernorm", "self_attention", "self_attn", "linear_attn"):
        return "self_attention"
    # Llama's post_attention_layernorm precedes the MLP.
    before = ("pre_mlp_", "pre_shared_expert_", "pre_feedforward_", "feedforward_", "post_attention_")
    within = ("mlp", "experts", "post_feedforward_layernorm_1", "post_feedforward_layernorm_2")
    return "mlp" if child in within or child.startswith(before) else "output"


def _norms_after(layer: Any) -> dict[str, str]:
    """Names of the norms after attention and MLP that a layer has by itself -> the part whose output they are."""
    if hasattr(layer, "post_feedforward_layernorm"):
        return {"post_attention_layernorm": "self_attention", "post_feedforward_layernorm": "mlp"}
    megatron = {"post_self_attn_layernorm": "self_attention", "post_mlp_layernorm": "mlp", "post_ffn_layernorm": "mlp"}
    return {norm: part for norm, part in megatron.items() if hasattr(layer, norm)}


def _add_inputs(sites: dict[str, Site], model: Any, prefix: str) -> None:
    """Count the tensors of per-layer inputs to the first layer's output, where they show first."""
    for child, module in model.named_children():
        if child.startswith(("per_layer_", "embed_tokens_per_layer")):
            sites["layers.0.output"].feeds.extend(_names(module, f"{prefix}{child}."))


def _add_adapter(sites: dict[str, Site], decoder: Any, prefix: str) -> None:
    """Reads the output of a split Llama's adapter, which is one module or two."""
    stems = [stem for stem in ("adapter", "adapter_linear_1", "adapter_linear_2") if hasattr(decoder, stem)]
    if stems:
        feeds = [f"{prefix}{stem}.weight" for stem in stems]
        place = f"layers.{len(decoder.layers_first)}.adapter"
        sites[place] = Site(getattr(decoder, stems[-1]), _first, feeds)


def _whole_layer(chunk: Any, take: Callable[[Any], torch.Tensor]) -> Callable[[Any], torch.Tensor]:
    """Reads the output of a Megatron layer: the hidden state without what is carried beside it to later layers."""
    return lambda output: take(output[0][..., : chunk.config.hidden_size])


def _names(module: torch.nn.Module, prefix: str) -> list[str]:
    return [prefix + name for name, _ in module.named_parameters()]


def _first(output: Any) -> torch.Tensor:
    """The hidden state of a transformers module, whose further outputs are attention weights and caches."""
    state: torch.Tensor = output[0] if isinstance(output, tuple) else output
    return state


def _sequence_first(sequence_parallel: bool) -> Callable[[Any], torch.Tensor]:
    """Reads a Megatron module's output: [sequence, batch, hidden], or that with a bias still to be added."""

    def take(output: torch.Tensor | tuple[torch.Tensor, torch.Tensor | None]) -> torch.Tensor:
        from ckptkit.megatron.context_parallel.share import whole_sequence

        state, bias = output if isinstance(output, tuple) else (output, None)
        state = state if bias is None else state + bias
        return whole_sequence(state, sequence_parallel).transpose(0, 1)

    return take
