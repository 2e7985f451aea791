"""Megatron-Bridge's model provider in `run_config.yaml`: written for it, and read where it wrote one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from ckptkit.checkpoints.checkpoint import Checkpoint
from ckptkit.errors import CkptkitError
from ckptkit.families import family_of
from ckptkit.formats.run_config import is_reference, lay_out_run_config, read_run_config, reference
from ckptkit.io.plan import OutputFile
from ckptkit.megatron_args.bridge_provider import (
    Provider,
    args_of_provider,
    layout_args_of_provider,
    provider_of,
)
from ckptkit.sharding.grid import Parallelism
from ckptkit.tables.bridge import Named
from ckptkit.tables.spelling import GROUPED, Spelling


def run_config(
    source: Checkpoint,
    grid: Parallelism,
    divisible_by: int,
    spelling: Spelling,
    folder: str,
    *,
    text: bool,
    peft: dict[str, Any] | None = None,
) -> OutputFile:
    """The file that lets Megatron-Bridge build the model of a distributed checkpoint.

    Args:
        source: The model.
        grid: The grid that is written.
        divisible_by: `make_vocab_size_divisible_by`.
        spelling: How names and experts are written.
        folder: The folder of `.metadata`, below the checkpoint's root.
        peft: The `peft` section of an adapter, or None.
        text: Whether only the text part of a multimodal model is written as a model.

    Raises:
        UnsupportedError: Megatron-Bridge has no provider that builds it.
    """
    family = source.family
    if text and family.text_only is not None:
        family = family_of(family.text_only(source.sidecar.config), source.path)
    dtype = source.main_dtype if source.lora is None else source.config.dtype or source.main_dtype
    config = replace(source.config, architecture=family.architectures[0], dtype=dtype)
    local = spelling.name == "local" or source.family.quirks.local_only(source.config)
    provider = provider_of(family, config, grid, divisible_by, local=local, grouped=spelling.experts == GROUPED)
    values = {
        key: reference(value.name, value.bound) if isinstance(value, Named) else value
        for key, value in provider.values.items()
    }
    return lay_out_run_config({"_target_": provider.target, **values}, folder, peft)


def args_of_run_config(folder: Path, *, layout_alone: bool = False) -> dict[str, Any]:
    """The model in the file in a folder, as Megatron-LM's `args`; empty if there is no such file.

    Args:
        folder: The folder of `.metadata`.
        layout_alone: Give only the arguments by which stored bytes are cut, which exist for every model.

    Raises:
        InputError: It is damaged, or makes no sense.
        UnsupportedError: `args` cannot express it.
    """
    model = read_run_config(folder)
    if not model:
        return {}
    values = {key: Named(value["_target_"]) if is_reference(value) else value for key, value in model.items()}
    to_args = layout_args_of_provider if layout_alone else args_of_provider
    try:
        return to_args(Provider(str(model.get("_target_")), values))
    except CkptkitError as error:
        raise type(error)(error.what, where=folder, hint=error.hint) from None
