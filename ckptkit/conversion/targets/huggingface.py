"""Writes a Hugging Face directory."""

from __future__ import annotations

from ckptkit.conversion.options import DEFAULT_SHARD_SIZE
from ckptkit.conversion.target import Target, WritableFormat
from ckptkit.formats.hf import BIN_INDEX, INDEX, index_of, lay_out_like, lay_out_shards
from ckptkit.io.plan import OutputFile


def _lay_out(target: Target) -> list[OutputFile]:
    """Unpacks every Megatron tensor. Files and header bytes are those of the original where the tensors still fit."""
    source, shard_size = target.source, target.options.shard_size
    stale = {INDEX, BIN_INDEX}
    if target.quantised is not None:
        files = target.quantised.lay_out(shard_size, DEFAULT_SHARD_SIZE)
    else:
        tensors = source.hf_tensors(source.stored_names)
        headers = source.sidecar.headers if shard_size is None else {}
        kept = lay_out_like(tensors, headers)
        files = kept if kept is not None else lay_out_shards(tensors, shard_size or DEFAULT_SHARD_SIZE)
        if kept is not None:
            stale = set()
            if len(headers) > 1 and INDEX not in source.sidecar.small:  # of weights that were quantised
                files.append(OutputFile.small(INDEX, index_of(headers)))
    taken = {file.path for file in files} | stale
    code = {path.name: path for path in source.family.directory.code if "auto_map" in source.sidecar.config}
    small = [file for file in source.sidecar.small_outputs(code) if file.path not in taken]
    return [*files, *small, target.config_json]


FORMAT = WritableFormat("hf", _lay_out, takes=frozenset({"shard_size", "quantise"}))
