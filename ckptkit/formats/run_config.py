"""`run_config.yaml`, by which Megatron-Bridge knows the model of a distributed checkpoint: it lies beside `.metadata`.

The `model` section names a class (`_target_`) and its arguments; a value that YAML has no form for is the name of a
Python object that is not called (`_call_: false`). Here it is read and written as plain data, so nothing in it runs.

Source: `load_model_config` and `read_run_config` of Megatron-Bridge 0.6.2, `instantiate_utils` and `yaml_utils` of
`megatron.training.config` 0.19.2.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ckptkit.errors import InputError
from ckptkit.formats.torch_file.trees import check_tree
from ckptkit.io.plan import OutputFile
from ckptkit.io.regular import read_bounded

if TYPE_CHECKING:
    from yaml import MappingNode, SafeLoader, ScalarNode

RUN_CONFIG = "run_config.yaml"
_LARGEST = 512 << 10
_LONGEST_NUMBER = 64

# For a run that continues from the checkpoint: there is no optimizer state, and no state of random numbers.
_CHECKPOINT = {
    "ckpt_format": "torch_dist",
    "fully_parallel_save": True,
    "save_optim": False,
    "save_rng": False,
}


def reference(name: str) -> dict[str, Any]:
    """A Python object (`torch.bfloat16`, a function) as a value: its dotted name."""
    return {"_target_": name, "_call_": False}


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


@cache
def _loader() -> type[SafeLoader]:
    """PyYAML's safe loader without its two slow features: merged mappings and very long numbers take endless time."""
    import yaml

    class Loader(yaml.SafeLoader):  # type: ignore[misc]
        def flatten_mapping(self, node: MappingNode) -> None:
            for key, _ in node.value:
                if key.tag == "tag:yaml.org,2002:merge":
                    raise yaml.constructor.ConstructorError(None, None, "a merged mapping", key.start_mark)

        def construct_yaml_int(self, node: ScalarNode) -> int:
            if len(node.value) > _LONGEST_NUMBER:
                raise yaml.constructor.ConstructorError(None, None, "a number too long to be one", node.start_mark)
            found: int = super().construct_yaml_int(node)
            return found

    Loader.add_constructor("tag:yaml.org,2002:int", Loader.construct_yaml_int)
    return Loader


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
    import yaml

    data = read_bounded(path, _LARGEST)
    try:
        content = yaml.load(data, Loader=_loader())
    except (yaml.YAMLError, RecursionError, ValueError, OverflowError) as error:
        problem = " ".join(str(error).split())[:120]
        raise InputError(f"not valid YAML ({problem})", where=path) from None
    check_tree(content, len(data), "it", path)
    if not isinstance(content, dict):
        raise InputError("no section `model`", where=path)
    return content
