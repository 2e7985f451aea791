"""`run_config.yaml`, by which Megatron-Bridge knows the model of a distributed checkpoint: it lies beside `.metadata`.

The `model` section names a class (`_target_`) and its arguments; a value that YAML has no form for is the name of a
Python object that is not called (`_call_: false`). Here it is read and written as plain data, so nothing in it runs.

Source: `load_model_config` and `read_run_config` of Megatron-Bridge 0.6.2, `instantiate_utils` and `yaml_utils` of
`megatron.training.config` 0.19.2.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ckptkit.errors import InputError
from ckptkit.formats.yaml_files import read_yaml
from ckptkit.io.plan import OutputFile

RUN_CONFIG = "run_config.yaml"
_LARGEST = 512 << 10

# For a run that continues from the checkpoint: there is no optimizer state, and no state of random numbers.
_CHECKPOINT = {
    "ckpt_format": "torch_dist",
    "fully_parallel_save": True,
    "save_optim": False,
    "save_rng": False,
}


def reference(name: str, bound: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """A Python object (`torch.bfloat16`, a function) as a value: its dotted name.

    Args:
        name: The name.
        bound: Arguments that are bound to the function, so that it is called with the others.
    """
    return {"_target_": name, "_partial_": True, **bound} if bound else {"_target_": name, "_call_": False}


def is_reference(value: Any) -> bool:
    """Whether a value is a Python object's dotted name."""
    return isinstance(value, Mapping) and isinstance(value.get("_target_"), str) and value.get("_call_") is False


def lay_out_run_config(model: Mapping[str, Any], folder: str, peft: Mapping[str, Any] | None = None) -> OutputFile:
    """The file that describes a model.

    Args:
        model: The `model` section: `_target_`, and values of plain types or made by `reference`.
        folder: The folder of `.metadata`, below the checkpoint's root.
        peft: The `peft` section of an adapter, or None.
    """
    import yaml

    sections = {"model": dict(model), "checkpoint": dict(_CHECKPOINT), **({} if peft is None else {"peft": dict(peft)})}
    text = yaml.safe_dump(sections, sort_keys=True)
    return OutputFile.small(f"{folder}/{RUN_CONFIG}", text.encode())


def read_run_config(folder: Path) -> dict[str, Any]:
    """The `model` section beside a checkpoint's `.metadata`; empty if there is no such file.

    Raises:
        InputError: It is damaged, or has no such section.
    """
    content = _read(folder)
    model = content.get("model")
    if content and not isinstance(model, dict):
        raise InputError("no section `model`", where=folder / RUN_CONFIG)
    return model if isinstance(model, dict) else {}


def read_section(folder: Path, name: str) -> dict[str, Any]:
    """Another section of the file; empty if there is no such file or section.

    Raises:
        InputError: It is damaged.
    """
    section = _read(folder).get(name)
    return section if isinstance(section, dict) else {}


def _read(folder: Path) -> dict[str, Any]:
    path = folder / RUN_CONFIG
    if not os.path.lexists(path):
        return {}
    content = read_yaml(path, _LARGEST)
    if not isinstance(content, dict):
        raise InputError("no section `model`", where=path)
    return content
