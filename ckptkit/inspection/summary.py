"""`inspect`: the headers of a checkpoint, summed up by role."""

from __future__ import annotations

from collections import Counter
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path
from typing import Any

from ckptkit.checkpoints.checkpoint import Checkpoint
from ckptkit.checkpoints.lora.record import Lora
from ckptkit.checkpoints.sidecar_contents import notes_of_scales
from ckptkit.checkpoints.sources import facts_of, open_source
from ckptkit.formats.garbage import collection_paused
from ckptkit.io.stores.mirror import shown
from ckptkit.megatron_args.flags import megatron_flags
from ckptkit.megatron_args.inexpressible import inexpressible
from ckptkit.sharding.grid import StatedGrid
from ckptkit.tables.lora import A

SCHEMA = 1
"""Version of the JSON; it rises when a field goes away or changes its meaning."""


@dataclass(frozen=True)
class Inspection:
    """A summary of the headers of a checkpoint. Sizes in bytes.

    `megatron_flags` holds the words after `pretrain_gpt.py` with which Megatron-LM builds the model, or None where no
    words do, for the reasons in `inexpressible`. `quantised` says what of a quantised checkpoint is, how, and the bytes
    that reading it as numbers adds; `bytes`, `dtypes` and `roles` are then about these numbers.
    """

    path: str
    format: str
    family: str
    architecture: str
    grid: str
    parameters: int
    bytes: int
    dtypes: dict[str, int]
    roles: list[dict[str, Any]]
    optimizer: dict[str, int]
    megatron_flags: list[str] | None
    inexpressible: list[str]
    notes: list[str]
    adapter: dict[str, Any] | None = None
    quantised: dict[str, Any] | None = None

    def to_dict(self) -> dict[str, Any]:
        """The inspection as JSON values."""
        return {"schema": SCHEMA, **asdict(self)}


@collection_paused()
def inspect(
    path: str | Path,
    *,
    hf_reference: str | Path | None = None,
    iteration: int | None = None,
    stored_grid: StatedGrid | None = None,
    vocab_size: int | None = None,
    lora_alpha: float | None = None,
) -> Inspection:
    """Reads the headers of a checkpoint and sums them up by role.

    Args:
        path: A checkpoint of any format, or `org/model@revision` on the hub.
        hf_reference: As for `convert`, and so are the others.
        iteration: Number of the iteration.
        stored_grid: The stored grid, where `args` do not say it.
        vocab_size: The true size of the vocabulary.
        lora_alpha: Alpha of a Megatron adapter that does not record it.

    Raises:
        InputError: It is damaged or incomplete.
        UnsupportedError: No family or format of ours.
    """
    with ExitStack() as stack:
        source = open_source(
            stack,
            path,
            hf_reference,
            headers_only=True,
            iteration=iteration,
            stored_grid=stored_grid,
            vocab_size=vocab_size,
            lora_alpha=lora_alpha,
        )
    alike = Counter((source.items[key].kind, tensor.out_dtype, tensor.shape) for key, tensor in source.tensors.items())
    dtypes: Counter[str] = Counter()
    roles: dict[str, dict[str, Any]] = {}
    for (kind, dtype, shape), count in alike.items():
        nbytes = prod(shape) * dtype.itemsize
        name = kind.row.megatron.replace("decoder.layers.{i}", "layers.*")
        role = roles.setdefault(name, {"role": name, "tensors": 0, "parameters": 0, "bytes": 0})
        role["tensors"] += count
        role["parameters"] += count * kind.parameters
        role["bytes"] += count * nbytes
        dtypes[dtype.name] += count * nbytes
    return Inspection(
        path=str(path),
        format=source.format,
        family=source.family.name,
        architecture=source.config.architecture,
        grid=str(source.grid),
        parameters=source.parameters,
        bytes=sum(dtypes.values()),
        dtypes=dict(dtypes),
        roles=list(roles.values()),
        optimizer=asdict(source.optimizer),
        megatron_flags=_megatron_flags(source),
        inexpressible=inexpressible(source.config, local=_stored_args(source).get("transformer_impl") == "local"),
        notes=[shown(note) for note in (*source.notes, *notes_of_scales(source.sidecar), *source.disagreements)],
        adapter=None if source.lora is None else _of_adapter(source.lora, source),
        quantised=facts_of(source).get("quantised"),
    )


def _of_adapter(lora: Lora, source: Checkpoint) -> dict[str, Any]:
    """Ranks and scales of an adapter, each with the number of linear layers that have it."""
    ranks = Counter(source.tensors[linear.key(A)].shape[0] for linear in lora.linears.values())
    scales = Counter(lora.scales.values())
    return {
        "layout": lora.layout or "peft",
        "modules": len(lora.linears),
        "ranks": {str(rank): count for rank, count in sorted(ranks.items())},
        "scales": {f"{scale:.6g}": count for scale, count in sorted(scales.items())},
        "kept whole": sorted(source.sidecar.extras),
    }


def _megatron_flags(source: Checkpoint) -> list[str] | None:
    """Megatron-LM's flags for a checkpoint; one that it cannot load by itself is described as a whole."""
    grid = source.grid if source.format == "torch" else None
    return megatron_flags(source.family, source.config, _stored_args(source), grid)


def _stored_args(source: Checkpoint) -> dict[str, Any]:
    """The arguments of a checkpoint that Megatron-LM can load by itself; empty for others."""
    loadable = source.format in ("torch", "torch_dist")
    args = source.args if loadable and "num_layers" in source.args else {}
    return {"transformer_impl": "local", **args} if args and source.spelling.name == "local" else args
