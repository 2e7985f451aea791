"""A custom pipeline layout: which part of the model is on which stage, as one string.

`Et*3|t||ttL` is four stages: `E` is the embedding, `t` a decoder layer, `m` a layer of multi-token prediction, `L` the
head with the loss. Stages stand in the order in which data passes them: chunk v of every pipeline rank, then chunk
v + 1. `x*n` repeats a character, `(...)*n` a group, and commas mean nothing.

Source: `PipelineParallelLayerLayout` of Megatron-Core 0.16.1, which also takes a list of lists of names.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from ckptkit.errors import UsageError

EMBEDDING, LAYER, PREDICTION, LOSS = "E", "t", "m", "L"
_NAMES = {"embedding": EMBEDDING, "decoder": LAYER, "mtp": PREDICTION, "loss": LOSS}
_GROUP = re.compile(r"\(([^)]+)\)\*([0-9]+)")
_REPEATED = re.compile(r"(.)\*([0-9]+)")
_LONGEST = 1 << 16
_HINT = "a layout reads like Et|tt|tL: E the embedding, t a layer, L the loss, | between stages, t*3 or (t|)*3 repeats"


def stages_of(layout: str) -> list[str]:
    """The stages of a layout, in the order in which data passes them: a string of `E`, `t`, `m` and `L` each.

    Raises:
        UsageError: It is no layout.
    """
    text = layout.replace(",", "")
    for pattern in (_GROUP, _REPEATED):
        text = _unrolled(text, pattern, layout)
    if unknown := sorted(set(text) - {*_NAMES.values(), "|"}):
        raise _error(layout, f"{unknown[0]!r} stands for nothing")
    parts = text.replace("|", "")
    for part, name, at in ((EMBEDDING, "the embedding", 0), (LOSS, "the loss", -1)):
        if parts.count(part) != 1 or parts[at] != part:
            where = "first" if at == 0 else "last"
            raise _error(layout, f"{name} ({part}) must stand in it once, as the {where} part")
    if LAYER in parts[parts.find(PREDICTION) :] and PREDICTION in parts:
        raise _error(layout, f"layers ({LAYER}) stand after multi-token prediction ({PREDICTION})")
    return text.split("|")


def in_letters(layout: Sequence[object]) -> str:
    """A layout that is a list of names for each stage, as a string.

    Raises:
        UsageError: It is no layout.
    """
    stages = [_letters(stage) for stage in layout]
    if None in stages:
        raise _error(str(layout), f"each stage must be a list of {', '.join(_NAMES)}")
    return "|".join(stage or "" for stage in stages)


def layers_on(stages: Sequence[str]) -> list[range]:
    """The numbers of the layers on each stage."""
    found, at = [], 0
    for stage in stages:
        start, at = at, at + stage.count(LAYER)
        found.append(range(start, at))
    return found


def _letters(stage: object) -> str | None:
    if not isinstance(stage, list | tuple):
        return None
    letters = [_NAMES.get(part.strip().lower()) if isinstance(part, str) else None for part in stage]
    return None if None in letters else "".join(letter or "" for letter in letters)


def _unrolled(text: str, pattern: re.Pattern[str], layout: str) -> str:
    """`text` with its repetitions written out, if that is not too long."""
    size = len(text)
    for match in pattern.finditer(text):
        size += len(match[1]) * int(match[2][:9])
        if size > _LONGEST or len(match[2]) > 9:
            raise _error(layout, f"it has more than {_LONGEST:,} parts")
    if size > _LONGEST:
        raise _error(layout, f"it has more than {_LONGEST:,} parts")
    return pattern.sub(lambda match: match[1] * int(match[2]), text)


def _error(layout: str, problem: str) -> UsageError:
    shown = layout if len(layout) <= 60 else f"{layout[:60]}..."
    return UsageError(f"the pipeline layout {shown!r} makes no sense: {problem}", hint=_HINT)
