"""Megatron-Core's `GroupedMLP`, which up to 0.16 kept all experts of a rank in two matrices: read as single experts.

`weight1` is [hidden, experts * 2 * width] and `weight2` [experts * width, hidden], but these shapes mean little: as the
forward pass takes them, the bytes are [experts, hidden, 2 * width] (gate, then up, of this rank) and [experts, width,
hidden], so every expert is a matrix of its own, transposed. Distributed checkpoints hold them like those of any other
experts.

Source: `GroupedMLP.forward` and `.sharded_state_dict` of megatron-core 0.16.1.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from ckptkit.errors import InputError
from ckptkit.formats.torch_legacy import RankFile, RankKey
from ckptkit.io.transposed import transposed
from ckptkit.tensors import Tensor

_MOST = 10_000  # experts of a rank
_WEIGHT = re.compile(r"(.*\.mlp)\.experts\.weight([12])")


def ungrouped_experts(ranks: Mapping[RankKey, RankFile]) -> dict[RankKey, RankFile]:
    """Ranks whose experts are tensors of their own, `experts.linear_fc1.weight0`, ...: the rank's own, counted from 0.

    Raises:
        InputError: The shapes do not fit together, or there is no router to count the experts by.
    """
    ep = 1 + max(ep_rank for _, _, ep_rank in ranks)
    return {
        rank: {chunk: _ungrouped(tensors, ep) for chunk, tensors in chunks.items()} for rank, chunks in ranks.items()
    }


def _ungrouped(tensors: dict[str, Tensor], ep: int) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        match = _WEIGHT.fullmatch(name)
        if match is None:
            found[name] = tensor
            continue
        block, number = match[1], match[2]
        router = tensors.get(f"{block}.router.weight")
        if router is None:
            raise InputError(f"{name} holds grouped experts, but there is no {block}.router.weight to count them by")
        for expert, weight in enumerate(_experts(name, tensor, number == "1", router.shape, ep)):
            found[f"{block}.experts.linear_fc{number}.weight{expert}"] = weight
    return found


def _experts(name: str, tensor: Tensor, first: bool, router: tuple[int, ...], ep: int) -> list[Tensor]:
    """Each expert's weight, [2 * width, hidden] or [hidden, width]."""
    total, hidden = router if len(router) == 2 else (0, 0)
    count, rest = divmod(total, ep)
    hidden_axis, width_axis = (0, 1) if first else (1, 0)
    fits = len(tensor.shape) == 2 and tensor.shape[hidden_axis] == hidden and not rest and 0 < count <= _MOST
    if not fits or tensor.shape[width_axis] % count:
        raise InputError(
            f"{name} is {list(tensor.shape)}, which is not {total} experts of {hidden} hidden over {ep} ranks"
        )
    width = tensor.shape[width_axis] // count
    height, row = (hidden, width) if first else (width, hidden)
    stacked = tensor.reshape((count * height, row))
    return [transposed(stacked.rows(number * height, (number + 1) * height)) for number in range(count)]
