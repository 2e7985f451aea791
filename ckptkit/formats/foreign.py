"""Formats of other tools that are not read: known by the names of their files, and what to do with them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from ckptkit.errors import UnsupportedError

_MOST = 10_000


class Foreign(NamedTuple):
    """A format that is not read.

    Attributes:
        names: What the names of its files look like; with a slash inside of a folder.
        what: Its name.
        hint: How its weights become readable.
    """

    names: re.Pattern[str]
    what: str
    hint: str


def _foreign(names: str, what: str, hint: str) -> Foreign:
    return Foreign(re.compile(names), what, hint)


_EXPORT = "save it as safetensors with the tool that wrote it, and convert that"

FOREIGN = (
    _foreign(
        r"(.*/)?layer_\d+-model_\d+-model_states\.pt",
        "a checkpoint of Megatron-DeepSpeed",
        "export it with Megatron-DeepSpeed's tools/convert_checkpoint/deepspeed_to_transformers.py, and convert that",
    ),
    _foreign(
        r"(.*/)?((bf16_|fp16_)?zero_pp_rank_\d+_mp_rank_\d+_\w+\.pt|mp_rank_\d+_model_states\.pt|zero_to_fp32\.py)",
        "a checkpoint of DeepSpeed (ZeRO)",
        "run `python zero_to_fp32.py . OUT --safe_serialization` in its folder, put config.json and the tokenizer into"
        " OUT, and convert OUT",
    ),
    _foreign(
        r"adapter_config\.json|adapter_model\.(safetensors|bin)",
        "a part of an adapter of PEFT",
        "adapter_config.json and adapter_model.safetensors belong into one folder: give that",
    ),
    _foreign(
        r"delta\.json",
        "a delta between two checkpoints",
        "`ckptkit delta apply` makes the second of the first, `ckptkit inspect` says what is in it",
    ),
    _foreign(
        r"(.*/)?consolidated\.\d+\.pth",
        "the original files of a Llama",
        "convert them with transformers' convert_llama_weights_to_hf.py, or fetch the model in transformers' format",
    ),
    _foreign(
        r"consolidated(-\d+-of-\d+)?\.safetensors(\.index\.json)?",
        "the original files of a Mistral",
        "convert them with transformers' convert_mistral_weights_to_hf.py, or fetch the model in transformers' format",
    ),
    _foreign(
        r".*\.nemo|model_config\.yaml|model_weights\.ckpt",
        "a model of NeMo 1",
        "export it to Hugging Face with NeMo's scripts/checkpoint_converters, and convert that",
    ),
    _foreign(r".*\.gguf", "GGUF", "convert from the model that it was made of"),
    _foreign(r"rank\d+\.safetensors|.*\.(engine|plan)", "TensorRT", "convert from the model that it was made of"),
    _foreign(r"(.*/)?[^/]*\.onnx", "ONNX", "convert from the model that it was made of"),
    _foreign(
        r"(.*/)?(_CHECKPOINT_METADATA|manifest\.ocdbt)|.*\.msgpack(\.index\.json)?",
        "a checkpoint of JAX (Orbax or Flax)",
        _EXPORT,
    ),
    _foreign(r"tf_model.*\.h5|.*\.h5|saved_model\.pb|.*\.ckpt(-\d+)?\.index", "a model of TensorFlow", _EXPORT),
    _foreign(r"model-rank-\d+-part-\d+\.safetensors", "the sharded state of vLLM", _EXPORT),
    _foreign(r".*\.npz", "a model of MLX", _EXPORT),
    _foreign(r".*\.pdparams", "a model of Paddle", _EXPORT),
    _foreign(r".*\.ckpt", "a checkpoint of Lightning", _EXPORT),
)
"""In the order in which they are asked."""


def refuse_foreign_files(folder: Path) -> None:
    """Names the format of a folder that no reader recognises, if it is known.

    Raises:
        UnsupportedError: It is.
    """
    refuse_foreign_names(_names(folder), folder)


def refuse_foreign_names(names: Iterable[str], where: Path) -> None:
    """Names the format that files with these names have, if it is known.

    Raises:
        UnsupportedError: It is.
    """
    found = sorted(names)
    for foreign in FOREIGN:
        if name := next((name for name in found if foreign.names.fullmatch(name)), None):
            raise UnsupportedError(f"{foreign.what} ({name}), which is not read", where=where, hint=foreign.hint)


def _names(folder: Path) -> Iterator[str]:
    """The names of the files in a folder and in the folders in it."""
    if not folder.is_dir():
        return
    for item in islice(folder.iterdir(), _MOST):
        yield item.name
        if item.is_dir() and not item.is_symlink():
            yield from (f"{item.name}/{inner.name}" for inner in islice(item.iterdir(), _MOST))
