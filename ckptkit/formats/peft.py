"""A directory of a PEFT adapter: `adapter_config.json` beside `adapter_model.safetensors` (or `.bin`).

Names begin with `base_model.model.`, then comes the name of a module of the model that was adapted.

Source: `get_peft_model_state_dict` and `PeftModel.save_pretrained` of peft 0.21.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from ckptkit.errors import InputError, UnsupportedError
from ckptkit.formats import safetensors
from ckptkit.formats.format import Archive, Format
from ckptkit.formats.hf import read_shard, small_files
from ckptkit.formats.json_files import read_json
from ckptkit.formats.links import check_link
from ckptkit.formats.peft_config import AdapterConfig
from ckptkit.formats.safetensors import Header
from ckptkit.io.plan import OutputFile
from ckptkit.tensors import Tensor

CONFIG, SAFETENSORS, BIN = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
PREFIX = "base_model.model."
_FACTOR = re.compile(r"(?P<module>.+?)(?P<wrapped>(?:\.base_layer)*)\.lora_(?P<side>[AB])\.weight")
_EMBEDDING = re.compile(r"(?P<module>.+?)\.lora_embedding_(?P<side>[AB])")
MAGNITUDE = ".lora_magnitude_vector"
_OTHERS = {"lora_B.bias": "biases of lora_B"}


@dataclass(frozen=True)
class Stored:
    """What a name in the file of an adapter says.

    Attributes:
        kind: `factor` (of a linear layer), `embedding` (a factor of an embedding), `magnitude` (lengths of a weight's
            rows, in DoRA), or `whole` (a tensor of the model).
        module: Name of the module inside the model, without `.base_layer`; for `whole` the name of the tensor.
        side: `A` or `B` of a factor, else empty.
        depth: How many wrappers of other parameters are around a factor's own (`target_parameters`).
    """

    kind: str
    module: str
    side: str = ""
    depth: int = 0


def parse_name(name: str, where: object) -> Stored:
    """What a stored name says.

    Raises:
        InputError: It does not begin as all names of an adapter do.
        UnsupportedError: It belongs to another method than LoRA.
    """
    if not name.startswith(PREFIX):
        raise InputError(f"{name} does not begin with {PREFIX}", where=where, hint="save the adapter with peft")
    inner = name.removeprefix(PREFIX)
    for piece, what in _OTHERS.items():
        if piece in inner:
            raise UnsupportedError(f"{name} holds {what}", where=where, hint="merge the adapter with peft")
    if match := _FACTOR.fullmatch(inner):
        return Stored("factor", match["module"], match["side"], match["wrapped"].count(".base_layer"))
    if match := _EMBEDDING.fullmatch(inner):
        return Stored("embedding", match["module"], match["side"])
    if inner.endswith(MAGNITUDE):
        return Stored("magnitude", inner.removesuffix(MAGNITUDE))
    if "lora_" in inner:
        raise InputError(f"{name} is no name that peft gives", where=where, hint="save the adapter with peft")
    return Stored("whole", inner.replace(".base_layer.", "."))


def magnitude_name(module: str) -> str:
    """The stored name of the lengths of a weight's rows (DoRA)."""
    return f"{PREFIX}{module}{MAGNITUDE}"


def factor_name(module: str, side: str, depth: int = 0) -> str:
    """The stored name of a factor."""
    return f"{PREFIX}{module}{'.base_layer' * depth}.lora_{side}.weight"


@dataclass(frozen=True)
class PeftFiles:
    """An opened directory.

    Attributes:
        path: The directory.
        config: adapter_config.json.
        tensors: Stored name -> tensor.
        headers: The file of the weights -> its header, if it is safetensors.
        small: Relative path -> absolute path of all other files, adapter_config.json included.
    """

    path: Path
    config: AdapterConfig
    tensors: dict[str, Tensor]
    headers: dict[str, Header]
    small: dict[str, Path]


def is_peft(folder: Path) -> bool:
    """Whether a folder holds an adapter of PEFT."""
    return (folder / CONFIG).is_file() and any((folder / name).is_file() for name in (SAFETENSORS, BIN))


def open_peft(path: Path) -> PeftFiles:
    """Opens a directory; only headers are read.

    Raises:
        InputError: A file is missing or damaged, or there are two files of weights.
        UnsupportedError: It is no LoRA, or a method that computes something else.
    """
    check_link(path / CONFIG, path)
    weights = _weights(path)
    config = AdapterConfig.parse(read_json(path / CONFIG), path / CONFIG)
    tensors, header = read_shard(path / weights)
    if not tensors:
        raise InputError("no tensors in it", where=path / weights)
    return PeftFiles(path, config, tensors, {} if header is None else {weights: header}, small_files(path)[0])


def lay_out_peft(
    tensors: Mapping[str, Tensor], headers: Mapping[str, Header], config: AdapterConfig, small: Mapping[str, Path]
) -> list[OutputFile]:
    """The files of an adapter: those that `headers` and `small` describe, where the tensors and the config are theirs.

    Args:
        tensors: Stored name -> tensor.
        headers: The original file of the weights -> its header.
        config: The config that belongs to the tensors.
        small: Relative path -> absolute path of the original small files.
    """
    header = headers.get(SAFETENSORS)
    fits = header is not None and header.entries.keys() == tensors.keys() and header.matches(tensors)
    files = [safetensors.lay_out(SAFETENSORS, dict(tensors), header if fits else None)]
    original = small.get(CONFIG)
    if original is not None and read_json(original) == config.raw:
        files.append(OutputFile.copy(CONFIG, str(original), original.stat().st_size))
    else:
        text = json.dumps(config.raw, indent=2, sort_keys=True)
        files.append(OutputFile.small(CONFIG, text.encode()))
    others = {name: path for name, path in sorted(small.items()) if name not in (CONFIG, SAFETENSORS, BIN)}
    return [*files, *(OutputFile.copy(name, str(path), path.stat().st_size) for name, path in others.items())]


def _weights(path: Path) -> str:
    found = [name for name in (SAFETENSORS, BIN) if (path / name).is_file()]
    if len(found) != 1:
        what = f"no {SAFETENSORS}" if not found else f"two sets of weights, {' and '.join(found)}"
        raise InputError(what, where=path, hint="is the download complete?" if not found else "keep one of them")
    check_link(path / found[0], path)
    return found[0]


def _checks(folder: Path) -> Iterator[Callable[[], object]]:
    names: list[str] = []
    yield lambda: names.append(_weights(folder))
    for name in names:
        yield partial(read_shard, folder / name)
    yield lambda: AdapterConfig.parse(read_json(folder / CONFIG), folder / CONFIG)


def _archives(folder: Path) -> Iterator[Archive]:
    return (Archive(folder / name) for name in (BIN,) if (folder / name).is_file())


PEFT = Format("peft", is_peft, _checks, _archives)
