"""Tokenizers of models that are merged: no row of an embedding moves, so tokens must have the same ids."""

from __future__ import annotations

import filecmp
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from ckptkit.checkpoints.checkpoint import Checkpoint
from ckptkit.editing.inputs import Input
from ckptkit.errors import UnsupportedError
from ckptkit.formats.tokenizer_json import FILES, TOKENIZER, tokens_in


def with_tokenizer(model: Checkpoint, donor: Input, inputs: Sequence[Input]) -> Checkpoint:
    """A model with the tokenizer of one of the models that it is made of.

    Args:
        model: The model.
        donor: The model whose tokenizer it gets.
        inputs: All models that it is made of.

    Raises:
        UnsupportedError: Their tokens have other ids, or cannot be compared.
        InputError: A tokenizer is damaged.
    """
    for one in inputs:
        check_same_tokens(donor, one)
    small = {name: path for name, path in model.sidecar.small.items() if name not in FILES}
    own = {name: path for name, path in donor.model.sidecar.small.items() if name in FILES}
    return replace(model, sidecar=replace(model.sidecar, small={**small, **own}))


def check_same_tokens(donor: Input, one: Input) -> None:
    """Whether every token has the same id in two models.

    Raises:
        UnsupportedError: It does not, or this cannot be seen.
        InputError: A tokenizer is damaged.
    """
    left, right = _file(donor), _file(one)
    if left is None or right is None:
        lacking = donor if left is None else one
        raise UnsupportedError(f"no {TOKENIZER} to compare the tokens by", where=lacking.name)
    if filecmp.cmp(left, right, shallow=False):
        return
    tokens, others = tokens_in(left), tokens_in(right)
    unequal = sorted(token for token in tokens.keys() | others.keys() if tokens.get(token) != others.get(token))
    if unequal:
        token = unequal[0]
        raise UnsupportedError(
            f"{len(unequal)} tokens have other ids than in {donor.name}: {token!r} is {others.get(token)}, and"
            f" {tokens.get(token)} there",
            where=one.name,
            hint="resize-vocab gives a model the tokenizer of another",
        )


def _file(one: Input) -> Path | None:
    small: Mapping[str, Path] = one.model.sidecar.small
    return small.get(TOKENIZER)
