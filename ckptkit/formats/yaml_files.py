"""YAML as input: plain values alone, of bounded size. Nothing in it runs."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ckptkit.errors import InputError
from ckptkit.formats.torch_file.trees import check_tree
from ckptkit.io.regular import read_bounded

if TYPE_CHECKING:
    from yaml import MappingNode, SafeLoader, ScalarNode

_LONGEST_NUMBER = 64


def read_yaml(path: Path, limit: int) -> Any:
    """The value of a YAML file.

    Args:
        path: The file.
        limit: The most bytes that it may have.

    Raises:
        InputError: It is no regular file, too large, not YAML, names a key twice, or unfolds to too many values.
        StorageError: It cannot be read.
    """
    return parse_yaml(read_bounded(path, limit), path)


def parse_yaml(data: bytes, where: object) -> Any:
    """The value of YAML text.

    Raises:
        InputError: As `read_yaml`.
    """
    import yaml

    try:
        content = yaml.load(data, Loader=_loader())
    except (yaml.YAMLError, RecursionError, ValueError, OverflowError, LookupError, AttributeError) as error:
        # The last two come from a tag whose text is no value of it, as in `!!bool maybe`.
        problem = " ".join(str(error).split())[:120]
        raise InputError(f"not valid YAML ({problem})", where=where) from None
    check_tree(content, len(data), "it", where)
    return content


@cache
def _loader() -> type[SafeLoader]:
    """PyYAML's safe loader without its two slow features: merged mappings and very long numbers take endless time."""
    import yaml

    class Loader(yaml.SafeLoader):  # type: ignore[misc]
        def flatten_mapping(self, node: MappingNode) -> None:
            names = set()
            for key, _ in node.value:
                if key.tag == "tag:yaml.org,2002:merge":
                    raise yaml.constructor.ConstructorError(None, None, "a merged mapping", key.start_mark)
                if isinstance(key.value, str) and key.value in names:
                    raise yaml.constructor.ConstructorError(None, None, f"{key.value} twice", key.start_mark)
                names.add(key.value if isinstance(key.value, str) else id(key))

        def construct_yaml_int(self, node: ScalarNode) -> int:
            if len(node.value) > _LONGEST_NUMBER:
                raise yaml.constructor.ConstructorError(None, None, "a number too long to be one", node.start_mark)
            found: int = super().construct_yaml_int(node)
            return found

    Loader.add_constructor("tag:yaml.org,2002:int", Loader.construct_yaml_int)
    return Loader
