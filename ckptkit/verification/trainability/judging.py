"""Whether a checkpoint has learnt: the questions, with their answers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from ckptkit.verification.reports.results import Check
from ckptkit.verification.trainability.goal import SHARE, TARGET
from ckptkit.verification.training.figures import some

APART = 1e-4
"""Copies of a parameter may differ in their sums by this share of the norm: kernels that add in any order may round a
gradient otherwise on each rank. What is not reduced at all differs by steps of the optimizer."""
LEAST = 1.0
"""Tokens that the initial error must have at least: of less nothing could be learnt."""


def judge(answers: Sequence[Mapping[str, Any]], trained: str | None) -> list[Check]:
    """The questions about a run.

    Args:
        answers: Of all ranks (see `candidate.learn`).
        trained: Pattern of what is trained, or None.
    """
    first = answers[0]
    finite = Check(
        "finite",
        first["finite"],
        "logits, losses and gradients are numbers" if first["finite"] else "a logit, a loss or a gradient is no number",
    )
    return [finite, _signal(first), *_parts(answers, trained), _copies(answers), _learns(first)]


def _signal(first: Mapping[str, Any]) -> Check:
    """Was there anything to learn from?"""
    varied, initial = first["varied"], first["initial_error"]
    if not any(varied):
        return Check(
            "signal", False, "all completions of each prompt were rewarded alike: there is nothing to learn from"
        )
    if initial < LEAST:
        return Check(
            "signal", False, f"the error is {initial:.2f} tokens before the first step: nothing is left to learn"
        )
    share = sum(varied) / len(varied)
    return Check("signal", True, f"completions of {100 * share:.0f} % of the prompts differ in their reward")


def _parts(answers: Sequence[Mapping[str, Any]], trained: str | None) -> list[Check]:
    """Is every part connected, stepped, and nothing else?"""
    if not answers[0]["losses"]:
        return [Check(name, False, "no step was taken") for name in ("gradients", "moved", "frozen")]
    silent, still, moved = (union(answers, kind) for kind in ("silent", "still", "moved"))
    silent = [key for key in silent if not _of_vocabulary(key) or _everywhere(answers, key)]
    where = f"outside of {trained!r} " if trained else ""
    return [
        Check(
            "gradients",
            not silent,
            f"no gradient ever reached {some(silent)}" if silent else "every tensor that is trained had a gradient",
        ),
        Check("moved", not still, f"not moved by any step: {some(still)}" if still else "all of them moved"),
        Check("frozen", not moved, f"moved without being trained: {some(moved)}" if moved else f"nothing {where}moved"),
    ]


def _of_vocabulary(key: str) -> bool:
    """Whether a shard may lack a gradient for good reason: none of its rows was looked up, or all are padding."""
    return key.startswith(("embedding.", "output_layer."))


def _everywhere(answers: Sequence[Mapping[str, Any]], key: str) -> bool:
    """Whether a tensor has no gradient on any of the ranks that hold a part of it."""
    holders = [answer for answer in answers if any(key == name for name, *_ in answer["prints"])]
    return all(key in answer["silent"] for answer in holders)


def _copies(answers: Sequence[Mapping[str, Any]]) -> Check:
    """Do all ranks that hold one parameter hold the same?"""
    prints: dict[tuple[str, int], list[tuple[float, float]]] = {}
    for answer in answers:
        for key, shard, total, norm in answer["prints"]:
            prints.setdefault((key, shard), []).append((total, norm))
    copies = sum(len(found) - 1 for found in prints.values())
    apart = {key for (key, _), found in prints.items() if not _alike(found)}
    if apart:
        return Check("copies", False, f"ranks hold other copies of {some(sorted(apart))}")
    return Check("copies", True, f"{copies} copies on several ranks are alike" if copies else "no rank holds a copy")


def _alike(prints: Sequence[tuple[float, float]]) -> bool:
    """Whether sums and norms of copies are numbers, and equal but for the order of additions."""
    if not all(math.isfinite(value) for found in prints for value in found):
        return False
    room = APART * max(max(norm for _, norm in prints), 1e-30)
    return all(max(values) - min(values) <= room for values in zip(*prints, strict=True))


def _learns(first: Mapping[str, Any]) -> Check:
    """Is the error small enough?"""
    initial, final, steps = first["initial_error"], first["final_error"], len(first["errors"])
    wanted = SHARE * initial
    if final is None:
        return Check("learns", False, f"the error was {initial:.2f} tokens before the first step; the run did not end")
    text = (
        f"the error of completions that are to have {TARGET} tokens went from {initial:.2f} to {final:.2f} tokens in"
        f" {steps} step{'s' * (steps != 1)}, at most {wanted:.2f} was wanted"
    )
    return Check("learns", final <= wanted and final < initial, text)


def union(answers: Sequence[Mapping[str, Any]], kind: str) -> list[str]:
    """Names that any rank has in a list."""
    return sorted({name for answer in answers for name in answer[kind]})
