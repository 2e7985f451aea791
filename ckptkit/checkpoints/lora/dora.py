"""DoRA in Megatron checkpoints: lengths of rows beside the factors, and what Megatron-Bridge computes in its name.

The judge of what DoRA computes is peft: the rows of `W + scale * B A` get the stored lengths. A row counts whole,
whatever ranks hold of it, and a bias is not scaled.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from ckptkit.checkpoints.locating import Place
from ckptkit.checkpoints.lora.layouts import Canonical, Found
from ckptkit.checkpoints.lora.sources import has_record, states_dora
from ckptkit.errors import InputError
from ckptkit.formats.peft import MAGNITUDE
from ckptkit.formats.peft_config import AdapterConfig
from ckptkit.tables.items import Item
from ckptkit.tables.model_config import ModelConfig
from ckptkit.tensors import Tensor

_UNDEFINED = "without which DoRA is not defined"


def lengths_in(
    found: Sequence[Found], view: Canonical, place: Place, original: AdapterConfig | None
) -> dict[str, Tensor]:
    """The lengths of rows, by the names that PEFT has for them. Either all layers have them, or none.

    Args:
        found: The factors of a checkpoint.
        view: The canonical view of them.
        place: Where the checkpoint is.
        original: PEFT's config of the adapter that it was made of, or None.

    Raises:
        InputError: Some layers have none, or what the checkpoint says of itself is something else.
    """
    lengths = {module: tensor for one in found for module, tensor in one.lengths.items() if module in view.linears}
    stated = states_dora(place)
    if original is not None and has_record(place.root):
        stated[str(original.where)] = original.dora
    for where, dora in stated.items():
        if dora and not lengths:
            what = f"{where} says DoRA, and there is no adapter.weight_magnitude, {_UNDEFINED}"
            raise InputError(what, where=place.folder, hint="save the adapter again")
        if lengths and not dora:
            what = f"there is an adapter.weight_magnitude, and {where} says nothing of DoRA"
            raise InputError(what, where=place.folder, hint="is it the description of another adapter?")
    if lengths and (missing := sorted(view.linears.keys() - lengths.keys())):
        key = view.linears[missing[0]].item.key
        what = f"{key} has no adapter.weight_magnitude, {_UNDEFINED}"
        raise InputError(what, where=place.folder, hint="is the adapter complete?")
    return {module + MAGNITUDE: tensor for module, tensor in lengths.items()}


def unlike_peft(items: Iterable[Item], config: ModelConfig, tp: int | None) -> list[str]:
    """A sentence for each way in which Megatron-Bridge computes another DoRA of these layers than peft.

    Source: `DoRALinear._get_weight_norm` and `forward` of Megatron-Bridge (commit 067f987); `SelfAttention` of
    Megatron-Core, which of all linears builds `linear_qkv` alone with `skip_bias_add=False`.

    Args:
        items: The Megatron tensors that have an adapter of DoRA.
        config: The model.
        tp: Tensor parallel size of the run, or None if nothing says it.
    """
    items = list(items)
    divided = [item.key for item in items if item.row.split.axis == -1]
    biased = [item.key for item in items if config.qkv_bias and item.key.endswith(".linear_qkv.weight")]
    found = []
    if divided and tp != 1:
        size = "TP above 1 (nothing says which this was)" if tp is None else f"TP {tp}"
        found.append(
            f"at {size} Megatron-Bridge takes the lengths of the rows of {divided[0]} from each rank's columns alone"
        )
    if biased:
        found.append(f"Megatron-Bridge scales the bias beside {biased[0]}, too")
    return found
