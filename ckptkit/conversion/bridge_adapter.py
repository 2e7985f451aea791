"""Megatron-Bridge's description of an adapter: the `peft` section of `run_config.yaml`."""

from __future__ import annotations

from typing import Any

from ckptkit.checkpoints.checkpoint import Checkpoint
from ckptkit.checkpoints.lora.layouts import Record
from ckptkit.checkpoints.lora.record import Lora
from ckptkit.errors import UnsupportedError
from ckptkit.tables.lora import CANONICAL, FUSED, PEFT, is_linear

_DORA = "megatron.bridge.peft.dora.DoRA"
_CLASSES = {FUSED: "megatron.bridge.peft.lora.LoRA", CANONICAL: "megatron.bridge.peft.canonical_lora.CanonicalLoRA"}
_CANONICAL_WORDS = {
    "linear_qkv": {"q": "linear_q", "k": "linear_k", "v": "linear_v"},
    "linear_fc1": {"gate": "linear_fc1_gate", "up": "linear_fc1_up"},
}


def bridge_section(source: Checkpoint, lora: Lora, prefix: str, record: Record) -> dict[str, Any]:
    """The `peft` section of `run_config.yaml`, from which Megatron-Bridge builds the adapter.

    Args:
        source: What is written, adapter or model with adapter.
        lora: The facts about the adapter.
        prefix: What the names of the model begin with.
        record: How the adapter's ranks are made up.

    Source: `LoRA`, `CanonicalLoRA` and `DoRA` of Megatron-Bridge: their fields, and `ModuleMatcher.match`.

    Raises:
        UnsupportedError: Megatron-Bridge has no class for these names.
    """
    if record.layout == PEFT:
        raise UnsupportedError("Megatron-Bridge has no class for the names of --adapter-layout peft")
    return {
        "_target_": _DORA if lora.config.dora else _CLASSES[record.layout],
        "target_modules": target_modules(source, lora, prefix, record),
        "dim": record.rank,
        "alpha": record.alpha,
        "dropout": 0.0,
        **({} if lora.config.dora else {"share_expert_adapters": False}),
    }


def target_modules(source: Checkpoint, lora: Lora, prefix: str, record: Record) -> list[str]:
    """The last words of the names of Megatron's modules, if these include no other module; else their full names."""
    there: dict[str, str] = {}
    for linear in lora.linears.values():
        there.update(_words(linear.item.key, linear.word, record.layout))
    known: dict[str, str] = {}
    for item in source.family.items(source.config):
        if is_linear(item):
            words = _CANONICAL_WORDS.get(_module(item.key).rpartition(".")[2], {"": ""})
            for word in words if record.layout == CANONICAL else [""]:
                known.update(_words(item.key, word, record.layout))
    found = set(there.values())
    if {module for module, word in known.items() if word in found} == set(there):
        return sorted(found)
    return sorted(prefix + name for name in there)


def _words(key: str, word: str, layout: str) -> dict[str, str]:
    """The name of a target and its last word, by the name of a weight."""
    module = _module(key)
    start, _, last = module.rpartition(".")
    if layout == CANONICAL and ".experts." not in module:
        last = _CANONICAL_WORDS.get(last, {}).get(word, last)
    return {f"{start}.{last}" if start else last: last}


def _module(key: str) -> str:
    return key.rpartition(".weight")[0]
