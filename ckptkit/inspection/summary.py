"""`inspect`: the headers of a checkpoint, summed up by role."""

from __future__ import annotations

from collections import Counter
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ckptkit.checkpoints.checkpoint import Checkpoint
from ckptkit.checkpoints.sources import open_source
from ckptkit.megatron_args.flags import megatron_flags
from ckptkit.megatron_args.inexpressible import inexpressible
from ckptkit.sharding.grid import StatedGrid


@dataclass(frozen=True)
class Inspection:
    """A summary of the headers of a checkpoint. Sizes in bytes.

    `megatron_flags` holds the words after `pretrain_gpt.py` with which Megatron-LM builds the model, or None where no
    words do, for the reasons in `inexpressible`.
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

    def to_dict(self) -> dict[str, Any]:
        """The inspection as JSON values."""
        return asdict(self)


def inspect(
    path: str | Path,
    *,
    hf_reference: str | Path | None = None,
    iteration: int | None = None,
    stored_grid: StatedGrid | None = None,
    vocab_size: int | None = None,
) -> Inspection:
    """Reads the headers of a checkpoint and sums them up by role.

    Args:
        path: A checkpoint of any format, or `org/model@revision` on the hub.
        hf_reference: As for `convert`, and so are the others.
        iteration: Number of the iteration.
        stored_grid: The stored grid, where `args` do not say it.
        vocab_size: The true size of the vocabulary.

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
        )
    dtypes: Counter[str] = Counter()
    roles: dict[str, dict[str, Any]] = {}
    for key, tensor in source.tensors.items():
        name = source.items[key].row.megatron.replace("decoder.layers.{i}", "layers.*")
        role = roles.setdefault(name, {"role": name, "tensors": 0, "parameters": 0, "bytes": 0})
        role["tensors"] += 1
        role["parameters"] += source.items[key].parameters
        role["bytes"] += tensor.nbytes
        dtypes[tensor.dtype.name] += tensor.nbytes
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
        inexpressible=inexpressible(source.config),
        notes=[*source.notes, *source.disagreements],
    )


def _megatron_flags(source: Checkpoint) -> list[str] | None:
    """Megatron-LM's flags for a checkpoint; one that it cannot load by itself is described as a whole."""
    loadable = source.format in ("torch", "torch_dist")
    args = source.args if loadable and "num_layers" in source.args else {}
    if args and source.spelling.name == "local":
        args = {"transformer_impl": "local", **args}
    grid = source.grid if source.format == "torch" else None
    return megatron_flags(source.family, source.config, args, grid)
