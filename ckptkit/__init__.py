"""Model checkpoints between Hugging Face and Megatron layouts: converted byte for byte, and verified.

The names below are resolved on first use, so that `import ckptkit` costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ckptkit.checkpoints.opening import open_checkpoint
    from ckptkit.conversion.architectures import supported_architectures
    from ckptkit.conversion.convert import convert
    from ckptkit.deltas.apply import apply_delta
    from ckptkit.deltas.make import make_delta
    from ckptkit.inspection.differences import diff
    from ckptkit.inspection.hashing import hash_checkpoint
    from ckptkit.inspection.summary import inspect
    from ckptkit.inspection.validation import validate
    from ckptkit.megatron.live.loading import load_hf
    from ckptkit.megatron.live.saving import save_hf
    from ckptkit.megatron.live.slices import state_dict_of
    from ckptkit.megatron.moe import record_routing, replay_routing
    from ckptkit.megatron.packed_inputs.convert import convert_to_packed
    from ckptkit.megatron.packed_inputs.model import shard
    from ckptkit.sharding.grid import Parallelism
    from ckptkit.verification.levels import verify
    from ckptkit.verification.ranks.live import load_megatron

from ckptkit.version import __version__

__all__ = [
    "Parallelism",
    "__version__",
    "apply_delta",
    "convert",
    "convert_to_packed",
    "diff",
    "hash_checkpoint",
    "inspect",
    "load_hf",
    "load_megatron",
    "make_delta",
    "open_checkpoint",
    "record_routing",
    "replay_routing",
    "save_hf",
    "shard",
    "state_dict_of",
    "supported_architectures",
    "validate",
    "verify",
]

_HOMES = {
    "Parallelism": "ckptkit.sharding.grid",
    "apply_delta": "ckptkit.deltas.apply",
    "convert": "ckptkit.conversion.convert",
    "convert_to_packed": "ckptkit.megatron.packed_inputs.convert",
    "diff": "ckptkit.inspection.differences",
    "hash_checkpoint": "ckptkit.inspection.hashing",
    "inspect": "ckptkit.inspection.summary",
    "load_hf": "ckptkit.megatron.live.loading",
    "load_megatron": "ckptkit.verification.ranks.live",
    "make_delta": "ckptkit.deltas.make",
    "open_checkpoint": "ckptkit.checkpoints.opening",
    "record_routing": "ckptkit.megatron.moe",
    "replay_routing": "ckptkit.megatron.moe",
    "save_hf": "ckptkit.megatron.live.saving",
    "shard": "ckptkit.megatron.packed_inputs.model",
    "state_dict_of": "ckptkit.megatron.live.slices",
    "supported_architectures": "ckptkit.conversion.architectures",
    "validate": "ckptkit.inspection.validation",
    "verify": "ckptkit.verification.levels",
}


def __getattr__(name: str) -> Any:
    """Imports the module that defines a public name (PEP 562)."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """The public names, loaded or not."""
    return sorted({*globals(), *__all__})
