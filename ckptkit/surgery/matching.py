"""Checks whether two Llamas can become the halves of one: settings that must match, and settings that should."""

from __future__ import annotations

import filecmp
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ckptkit.checkpoints.checkpoint import Checkpoint
from ckptkit.errors import UnsupportedError
from ckptkit.families.split_llama import HALF, incompatible
from ckptkit.formats.json_files import read_json
from ckptkit.formats.tokenizer_json import TOKENIZER, model_of, part_of, vocabulary
from ckptkit.tables.config_fields import rope_fields

SENTENCEPIECE = "tokenizer.model"


@dataclass(frozen=True)
class Differences:
    """How two models differ, as sentences.

    Attributes:
        fatal: Differences that no split Llama can have.
        risky: Differences that work, but are probably a mistake.
        notes: Other differences.
    """

    fatal: list[str]
    risky: list[str]
    notes: list[str]


def differences(first: Checkpoint, last: Checkpoint) -> Differences:
    """Differences between the narrow model `first` and the wide model `last` that matter for a split Llama.

    Raises:
        UnsupportedError: One of them is no Llama.
        InputError: A tokenizer is damaged.
    """
    for model in (first, last):
        if model.family is not HALF:
            raise UnsupportedError(f"{model.config.architecture} is no LlamaForCausalLM", where=model.path)
    fatal, risky, notes = [*incompatible(first.config, last.config)], list(_sizes(first, last)), []
    tokenizers = [model.sidecar.small.get(TOKENIZER) for model in (first, last)]
    if tokenizers[0] is not None and tokenizers[1] is not None:
        tokens, rest = _tokenizers(tokenizers[0], tokenizers[1])
        fatal += tokens
        risky += rest
    else:
        text, unknown = _sentencepiece(first, last)
        risky += text
        notes += unknown
    epsilons = [model.config.norm_eps for model in (first, last)]
    if epsilons[0] != epsilons[1]:
        notes.append(f"eps of the norms are {epsilons[0]:g} and {epsilons[1]:g}: each half keeps its own")
    widths = [model.config.hidden_size for model in (first, last)]
    if widths[0] > widths[1]:
        notes.append(f"FIRST is {widths[0]} wide and LAST {widths[1]}: are they in the right order?")
    lengths = [model.config.max_position_embeddings for model in (first, last)]
    if lengths[0] != lengths[1]:
        notes.append(f"context lengths are {lengths[0]} and {lengths[1]}: the smaller one counts")
    return Differences(fatal, risky, notes)


def _sizes(first: Checkpoint, last: Checkpoint) -> Iterator[str]:
    """Differences in settings of the cache and of the positions."""
    one, other = first.config.layers[0], last.config.layers[0]
    for name, text in (("num_kv_heads", "key/value heads"), ("head_dim", "head_dim")):
        if getattr(one, name) != getattr(other, name):
            yield f"{text} {getattr(one, name)} and {getattr(other, name)} (engines want one shape of cache)"
    if one.rope != other.rope:
        left, right = rope_fields(one.rope), rope_fields(other.rope)
        unequal = sorted(key for key in left.keys() | right.keys() if left.get(key) != right.get(key))
        yield f"rope {', '.join(f'{key} {left.get(key)} and {right.get(key)}' for key in unequal)}"
    if first.main_dtype != last.main_dtype:
        yield f"dtype {first.main_dtype} and {last.main_dtype}"


def _tokenizers(first: Path, last: Path) -> tuple[list[str], list[str]]:
    """Differences of two tokenizer.json: of the vocabularies, and of all else that decides about token ids."""
    if filecmp.cmp(first, last, shallow=False):
        return [], []
    one, other = read_json(first), read_json(last)
    left, right = part_of(vocabulary, one, first), part_of(vocabulary, other, last)
    unequal = sorted(token for token in left.keys() | right.keys() if left.get(token) != right.get(token))
    if unequal:
        token = unequal[0]
        ids = f"{token!r} is {left.get(token)} and {right.get(token)}"
        return [f"tokens: {len(unequal)} have different ids ({ids}{', ...' if len(unequal) > 1 else ''})"], []
    parts = ("added_tokens", "normalizer", "pre_tokenizer", "post_processor", "decoder")
    changed = [part for part in parts if one.get(part) != other.get(part)]
    changed += ["merges"] if part_of(_merges, one, first) != part_of(_merges, other, last) else []
    return [], [f"{TOKENIZER}: {', '.join(changed)}"] if changed else []


def _merges(tokenizer: Mapping[str, Any]) -> list[str]:
    """The merges of a BPE model; newer files keep each as a pair, older ones as a string."""
    merges = model_of(tokenizer).get("merges") or []
    return [merge if isinstance(merge, str) else " ".join(merge) for merge in merges]


def _sentencepiece(first: Checkpoint, last: Checkpoint) -> tuple[list[str], list[str]]:
    files = [model.sidecar.small.get(SENTENCEPIECE) for model in (first, last)]
    if files[0] is None or files[1] is None:
        return [], ["the tokenizers could not be compared: both models need a tokenizer.json (or tokenizer.model)"]
    same = filecmp.cmp(files[0], files[1], shallow=False)
    return ([] if same else [f"{SENTENCEPIECE} (the files differ)"]), []
