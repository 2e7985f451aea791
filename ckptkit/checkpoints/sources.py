"""Opens a source: a path, a hub reference, or a folder in a store."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from ckptkit.checkpoints.checkpoint import Checkpoint
from ckptkit.checkpoints.opening import open_checkpoint
from ckptkit.checkpoints.source_options import SourceOptions, options_called
from ckptkit.formats.hub import Located, locate
from ckptkit.io.stores.mirror import mirror_around, shown


def open_source(
    stack: ExitStack, src: str | Path, hf_reference: str | Path | None, *, headers_only: bool, **options: Any
) -> Checkpoint:
    """Opens a checkpoint wherever it is, and notes in its sidecar where on the hub it came from.

    Args:
        stack: Keeps fetched files until it closes.
        src: A directory, `org/model@revision` on the hub, or a folder in a store.
        hf_reference: The same, for what supplies config.json, tokenizer and shard map.
        headers_only: Fetch no more than a plan needs.
        options: Further options of `open_checkpoint`.
    """
    located = stack.enter_context(locate(src, headers_only=headers_only))
    return open_located(stack, located, hf_reference, headers_only=headers_only, **options)


def open_located(
    stack: ExitStack, located: Located, hf_reference: str | Path | None, *, headers_only: bool, **options: Any
) -> Checkpoint:
    """Opens a checkpoint that was located; arguments as for `open_source`."""
    reference = None
    if hf_reference is not None:
        reference = stack.enter_context(locate(hf_reference, headers_only=headers_only)).path
    source = open_checkpoint(located.path, hf_reference=reference, **options)
    return replace(source, sidecar=replace(source.sidecar, origin=located.origin)) if located.origin else source


def open_side(
    stack: ExitStack,
    path: str | Path,
    source: SourceOptions,
    prefix: str,
    hf_reference: str | Path | None,
    *,
    headers_only: bool,
) -> Checkpoint:
    """Opens one of two checkpoints. Hugging Face directories and models on the hub describe themselves.

    Args:
        stack: Keeps fetched files until it closes.
        path: A directory, `org/model@revision` on the hub, or a folder in a store.
        source: Facts about this side that it does not record itself.
        prefix: What the options of this side begin with, for messages.
        hf_reference: Hugging Face directory that describes a side in another format.
        headers_only: Fetch no more than a plan needs.
    """
    located = stack.enter_context(locate(path, headers_only=headers_only))
    options = source.keywords()
    reference = options.pop("hf_reference", None if describes_itself(located) else hf_reference)
    with options_called(prefix):
        return open_located(stack, located, reference, headers_only=headers_only, **options)


def describes_itself(located: Located) -> bool:
    """Whether a checkpoint needs no Hugging Face directory beside it."""
    return bool(located.origin) or (located.path / "config.json").is_file()


def facts_of(source: Checkpoint) -> dict[str, Any]:
    """Where a checkpoint is and which model it holds, for the result of a command."""
    quantised = source.sidecar.quantised if source.format == "hf" else None
    return {
        "path": shown(str(source.path)),
        "format": source.format,
        "family": source.family.name,
        "architecture": source.config.architecture,
        "grid": str(source.grid),
        **({} if quantised is None else {"quantised": quantised.facts()}),
    }


def fetched_for(*sources: Checkpoint) -> dict[str, int]:
    """What checkpoints in stores cost this process so far, in `requests` for bytes and `bytes`; empty for others."""
    mirrors = {mirror.root: mirror for source in sources if (mirror := mirror_around(source.path)) is not None}.values()
    if not mirrors:
        return {}
    return {"requests": sum(mirror.requests for mirror in mirrors), "bytes": sum(mirror.nbytes for mirror in mirrors)}
