"""Writes a directory of a PEFT adapter."""

from __future__ import annotations

from ckptkit.checkpoints.lora.peft_directory import peft_tensors
from ckptkit.conversion.target import Target, WritableFormat
from ckptkit.formats.peft import lay_out_peft
from ckptkit.io.plan import OutputFile


def _lay_out(target: Target) -> list[OutputFile]:
    """The names and the files of the original, as far as they are known and still fit."""
    sidecar = target.source.sidecar
    tensors, config = peft_tensors(target.source)
    small = {name: path for name, path in sidecar.small.items() if name != "config.json"}
    return lay_out_peft(tensors, sidecar.headers, config, small)


FORMAT = WritableFormat("peft", _lay_out)
