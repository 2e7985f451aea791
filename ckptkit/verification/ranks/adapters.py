"""The adapter of a job: its shards for the ranks of megatron-core, or its modules of peft in transformers."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from math import lcm
from typing import TYPE_CHECKING, Any

from ckptkit.checkpoints.checkpoint import Checkpoint
from ckptkit.checkpoints.lora.layouts import Record, laid_out
from ckptkit.checkpoints.lora.megatron import ADAPTER
from ckptkit.conversion.adapters import check_heads
from ckptkit.errors import InputError, UnsupportedError, VerificationError
from ckptkit.io.stores.mirror import fetch_folder
from ckptkit.tables.lora import FUSED, PEFT
from ckptkit.verification.ranks.jobs import AdapterJob

if TYPE_CHECKING:
    import torch

    from ckptkit.sharding.grid import Parallelism


@dataclass(frozen=True)
class LaidOut:
    """An adapter in a layout of Megatron.

    Attributes:
        checkpoint: Its factors, whose `shard` is a rank's part.
        record: How they were laid out.
    """

    checkpoint: Checkpoint
    record: Record

    @property
    def scale(self) -> float:
        """The factor of B A."""
        return self.record.scale


def open_adapter(job: AdapterJob, base: Checkpoint, opener: Callable[..., Checkpoint]) -> Checkpoint:
    """The adapter of a job, in its canonical view.

    Args:
        job: The adapter.
        base: The model that it is for.
        opener: Opens a checkpoint.

    Raises:
        CkptkitError: It cannot be opened.
    """
    return opener(job.path, base=base, part=ADAPTER, **job.opening.keywords())


def open_laid_out(job: AdapterJob, base: Checkpoint, grid: Parallelism, opener: Callable[..., Checkpoint]) -> LaidOut:
    """Opens an adapter in its own Megatron layout, that of a PEFT directory in `fused`.

    Args:
        job: The adapter.
        base: The model that it is for.
        grid: The grid that it runs on.
        opener: Opens a checkpoint.

    Raises:
        InputError: It is damaged, or for another model.
        UnsupportedError: Megatron cannot express it.
        UsageError: It does not divide over the grid.
    """
    adapter = open_adapter(job, base, opener)
    assert adapter.lora is not None
    layout = adapter.lora.layout or FUSED
    check_heads(base.config, layout, grid.tp)
    multiple = 1 if layout == PEFT else lcm(grid.tp, grid.expert_tp)
    checkpoint, record, _ = laid_out(adapter, layout, multiple, sequential=True, lossy=False)
    return LaidOut(checkpoint, record)


def with_peft(model: Any, job: AdapterJob, dtype: torch.dtype) -> Any:
    """A model of transformers with modules of peft in it, or with their products in its weights.

    peft fills factors that are missing with random values, and only warns. Here that is an error.

    Args:
        model: The model.
        job: The adapter, a PEFT directory.
        dtype: Type that the factors compute in.

    Returns:
        The same model.

    Raises:
        InputError: peft cannot load the adapter, or not all of it.
        UnsupportedError: peft is not installed.
    """
    try:
        from peft import PeftModel
    except ImportError:
        raise UnsupportedError(
            "--adapter runs the reference in peft, which is not installed", hint="install peft"
        ) from None
    of_model = {id(parameter) for parameter in model.parameters()}
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        fetch_folder(job.path)
        try:
            found = PeftModel.from_pretrained(model, job.path, autocast_adapter_dtype=False)
        except Exception as error:  # what adapter_config.json may hold makes peft raise anything
            kind = VerificationError if isinstance(error, MemoryError) else InputError
            raise kind(f"peft cannot load it ({' '.join(str(error).split())[:300]})", where=job.path) from error
    missing = [str(one.message) for one in told if "missing adapter keys" in str(one.message)]
    if missing:
        raise InputError(f"peft does not find all of it: {' '.join(missing[0].split())[:300]}", where=job.path)
    for parameter in found.parameters():
        if id(parameter) not in of_model:  # a model's own types stay, those of its buffers too
            parameter.data = parameter.data.to(dtype)
    plain: Any = found.merge_and_unload() if job.merged else found.base_model.model
    return plain.eval()
