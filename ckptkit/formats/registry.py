"""The formats that can be read, and which of them a folder holds."""

from __future__ import annotations

from pathlib import Path

from ckptkit.formats.format import Format
from ckptkit.formats.hf import HF
from ckptkit.formats.peft import PEFT
from ckptkit.formats.torch_dist import TORCH_DIST
from ckptkit.formats.torch_legacy import TORCH, has_iterations
from ckptkit.formats.trainer_states.dcp import DCP
from ckptkit.formats.trainer_states.fsdp import FSDP

FORMATS = (HF, PEFT, TORCH, TORCH_DIST, DCP, FSDP)
"""In the order in which they are asked: the first that recognises a folder has it."""


def format_of(folder: Path) -> Format | None:
    """The format of what a folder holds, or None.

    A folder with a config.json and no weights counts as a Hugging Face directory: its reader reports what is missing.
    Beside a Megatron checkpoint a config.json decides nothing.

    Raises:
        InputError: A file that the format is recognised by is damaged.
    """
    found = next((format for format in FORMATS if format.recognise(folder)), None)
    if found is None and (folder / "config.json").is_file() and not has_iterations(folder):
        return HF
    return found


def formats_of(folder: Path) -> list[Format]:
    """All formats of which a folder holds files; the container of a distributed checkpoint is not one by itself."""
    found = [format for format in FORMATS if format.recognise(folder)]
    return [format for format in found if format is not DCP or TORCH_DIST not in found]


def is_huggingface(folder: Path) -> bool:
    """Whether a folder is a Hugging Face directory; without shards only a folder with a config.json can be one."""
    return HF.recognise(folder) or ((folder / "config.json").is_file() and format_of(folder) is HF)
