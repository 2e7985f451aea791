"""Turns checkpoints of a HybridModel into those of the GPTModel with the same tensors, which the tables know.

The stages become one. The reason: a stage of HybridModel may end in the middle of a layer of GPTModel.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ckptkit.errors import CkptkitError, InputError
from ckptkit.formats.torch_legacy import RankFile, RankKey
from ckptkit.tables.hybrid_names import gpt_args, gpt_name, is_hybrid, layer_count, pattern_of
from ckptkit.tensors import Tensor

Ranks = Mapping[RankKey, RankFile]


def holds_hybrid(ranks: Ranks) -> bool:
    """Whether the ranks of a checkpoint hold a HybridModel."""
    return is_hybrid(name for chunks in ranks.values() for chunk in chunks.values() for name in chunk)


def as_gpt(ranks: Ranks, args: Mapping[str, Any], where: Path) -> tuple[dict[RankKey, RankFile], dict[str, Any]]:
    """The ranks of one pipeline stage that holds all layers under GPTModel's names, and its `args`.

    Raises:
        InputError: Ranks have different layers, or `args` describe others.
        UnsupportedError: Layers have no counterpart in GPTModel.
    """
    try:
        merged = _merge(ranks)
        (pattern,) = {pattern_of(chunks["model"]) for chunks in merged.values()}
        return merged, gpt_args(args, pattern)
    except CkptkitError as error:
        raise type(error)(error.what, where=error.where or where, hint=error.hint) from None
    except ValueError:
        raise InputError("ranks hold different layers of a hybrid model", where=where) from None


def _merge(ranks: Ranks) -> dict[RankKey, RankFile]:
    columns: dict[tuple[int, int], list[dict[str, Tensor]]] = defaultdict(list)
    chunks = max(len(chunks) for chunks in ranks.values())
    for number in range(chunks):
        for (_, tp_rank, ep_rank), held in sorted(ranks.items()):
            columns[tp_rank, ep_rank].append(list(held.values())[number])
    return {(0, tp_rank, ep_rank): {"model": _joined(stages)} for (tp_rank, ep_rank), stages in columns.items()}


def _joined(stages: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The tensors of all stages, in the order in which data passes them."""
    found: dict[str, Tensor] = {}
    first = 0
    for stage in stages:
        for name, tensor in stage.items():
            new = gpt_name(name, first)
            if new in found:
                raise InputError(f"{new} is on two stages of the hybrid model")
            found[new] = tensor
        first += layer_count(stage)
    return found
