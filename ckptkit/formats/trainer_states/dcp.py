"""The state of a module in the container of torch.distributed.checkpoint, as FSDP2 training saves it.

Keys are the names of the module's parameters behind whatever the trainer put before them; there may be an optimizer's
beside them. There is nothing else.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from ckptkit.formats.dcp.reading import archives_of_dcp, checks_of_dcp, is_dcp, open_dcp
from ckptkit.formats.format import Format
from ckptkit.formats.torch_dist import optimizer_state
from ckptkit.formats.trainer_states.module_state import ModuleState

_OPTIMIZER = re.compile(r"(?:(?:app|state_dict)\.)*(?:optim|optimizer|optimizers)\.")


def open_dcp_state(path: Path, wanted: Callable[[str], bool] = lambda key: True) -> ModuleState:
    """Opens a checkpoint; reads metadata and the headers of the model's chunks.

    Args:
        path: The folder.
        wanted: Key -> whether its tensor is taken. Nothing of other keys is read, not even headers.

    Raises:
        InputError: Files are missing or damaged.
        UnsupportedError: Elements of a type without an equal here, or compressed bytes.
    """
    files = open_dcp(path)
    optimizer = {key for key in files.tensors if _OPTIMIZER.match(key)}
    keys = [key for key in files.tensors if key not in optimizer and wanted(key)]
    files.expect(keys)
    tensors = {key: files.tensor(key) for key in keys}
    return ModuleState(path, "dcp", tensors, optimizer=optimizer_state(files, optimizer))


DCP = Format("dcp", is_dcp, checks_of_dcp, archives_of_dcp, bare=True)
