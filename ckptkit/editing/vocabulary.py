"""Models with another vocabulary: rows of the embedding and of the head are copied, left out, or made."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ckptkit.checkpoints.checkpoint import Checkpoint
from ckptkit.checkpoints.config_fields import differing_fields
from ckptkit.editing.inputs import Input
from ckptkit.errors import InputError, UnsupportedError, UsageError
from ckptkit.formats.hf import BIN_INDEX, INDEX
from ckptkit.formats.json_files import read_json
from ckptkit.formats.tokenizer_json import FILES, TOKENIZER, tokens_in
from ckptkit.io.castable import CASTABLE
from ckptkit.io.computed import Once, as_matrix, blocks, computed, numbers, tiles
from ckptkit.tables.dims import VP
from ckptkit.tables.family import Family
from ckptkit.tables.items import Item
from ckptkit.tables.model_config import ModelConfig
from ckptkit.tensors import Tensor, vstack

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from ckptkit.io.computed import Values

MEAN, PIECES, ZEROS, NORMAL = "mean", "pieces", "zeros", "normal"
KINDS = (MEAN, PIECES, ZEROS, NORMAL)
MOST_ROWS = 1 << 24
"""Rows of a vocabulary, at most: each is looked at by itself."""

GENERATION = "generation_config.json"
_IDS = ("_token_id", "_token_index")
"""Endings of the keys of config.json that hold ids of tokens."""
_LISTS = (
    *("suppress_tokens", "begin_suppress_tokens", "bad_words_ids", "force_words_ids", "forced_decoder_ids"),
    "sequence_bias",
)
"""Keys of generation_config.json that hold ids of tokens inside of lists."""


@dataclass(frozen=True)
class Rows:
    """The rows of a new vocabulary.

    Attributes:
        old: For each new row the number of the old row that it is a copy of, or None for one that is made.
        pieces: New row -> old rows whose mean it is; other rows that are made follow `kind`.
        kind: `mean`, `pieces`, `zeros` or `normal`.
        seed: Seed of random rows.
    """

    old: tuple[int | None, ...]
    pieces: Mapping[int, tuple[int, ...]]
    kind: str
    seed: int = 0

    @property
    def made(self) -> int:
        """Number of rows that are made."""
        return sum(row is None for row in self.old)


def rows_of_size(size: int, old: int, kind: str, seed: int) -> Rows:
    """The rows of a vocabulary that is longer or shorter at its end.

    Raises:
        UsageError: The new rows would be made of pieces of tokens that nobody knows.
    """
    if kind == PIECES:
        raise UsageError("--new-rows pieces needs the texts of new tokens", hint="add --tokenizer")
    return Rows(tuple(row if row < old else None for row in range(size)), {}, kind, seed)


def rows_by_token(
    old: Path, new: Path, stored: int, size: int | None, kind: str, seed: int
) -> tuple[Rows, dict[int, int]]:
    """The rows of another tokenizer's tokens, and old id -> new id of the tokens that both have.

    A token that the old tokenizer has keeps its row, whatever its new id. An id that no token of either tokenizer has
    keeps its row, too.

    Args:
        old: tokenizer.json of the model.
        new: tokenizer.json to get.
        stored: Rows of the model.
        size: Number of new rows, or None for as many as the ids of the tokens ask for.
        kind: How other rows are made.
        seed: Seed of random rows.

    Raises:
        InputError: A tokenizer is damaged, or the model has no rows for its own tokens.
        UsageError: The tokens need more rows.
    """
    before, after = tokens_in(old), tokens_in(new)
    if not after:
        raise InputError("no tokens in it", where=new)
    if len(set(after.values())) < len(after):
        raise InputError("two tokens have one id", where=new)
    needed = max(after.values()) + 1
    if needed > MOST_ROWS:
        raise InputError(f"a token has the id {needed - 1:,}", where=new)
    if size is not None and size < needed:
        raise UsageError(f"--size {size}: the tokens need {needed} rows", hint="drop --size")
    if before and max(before.values()) >= stored:
        raise InputError(f"a token has the id {max(before.values()):,}, and the model has {stored:,} rows", where=old)
    rows: list[int | None] = [None] * (needed if size is None else size)
    taken, given = set(before.values()), set(after.values())
    for row in range(min(len(rows), stored)):
        if row not in taken and row not in given:
            rows[row] = row
    moved: dict[int, int] = {}
    for token, number in after.items():
        if token in before:
            rows[number] = before[token]
            moved[before[token]] = number
    pieces = {}
    if kind == PIECES:
        wanted = [number for number in given if rows[number] is None]
        pieces = _pieces(old, new, sorted(wanted))
    return Rows(tuple(rows), pieces, kind, seed), moved


def _pieces(old: Path, new: Path, wanted: Sequence[int]) -> dict[int, tuple[int, ...]]:
    """New token -> the tokens that the old tokenizer makes of its text; without those that have no text."""
    from tokenizers import Tokenizer

    try:
        before, after = (Tokenizer.from_file(str(path)) for path in (old, new))
        texts = {number: after.decode([number], skip_special_tokens=False) for number in wanted}
        found = {number: tuple(before.encode(text, add_special_tokens=False).ids) for number, text in texts.items()}
    except Exception as error:  # tokenizers raises no other class
        raise InputError(f"the tokenizers cannot be used ({error})", where=new) from None
    return {number: ids for number, ids in found.items() if ids}


def with_rows(one: Input, rows: Rows) -> Checkpoint:
    """A model with other rows in its embedding, in its head, and in its per-layer embedding.

    Raises:
        UnsupportedError: Its config.json cannot describe the vocabulary, or rows cannot be made in its type.
    """
    model = one.model
    config, raw = config_of_size(model.family, model.config, model.sidecar.config, len(rows.old), one.name)
    items = {item.key: item for item in model.family.items(config)}
    tensors = {
        key: _resized(model.tensors[key], rows, f"{key} of {one.name}") if has_vocabulary(item) else model.tensors[key]
        for key, item in items.items()
    }
    small = {name: file for name, file in model.sidecar.small.items() if name not in (INDEX, BIN_INDEX)}
    sidecar = replace(model.sidecar, config=raw, headers={}, small=small)
    copied = sum(not has_vocabulary(item) for item in items.values())
    return replace(
        model,
        config=config,
        items=items,
        tensors=tensors,
        sidecar=sidecar,
        padding={},
        coverage={"resized": len(items) - copied, "copied": copied},
    )


def config_of_size(
    family: Family, config: ModelConfig, raw: Mapping[str, Any], size: int, where: object
) -> tuple[ModelConfig, dict[str, Any]]:
    """A model and its config.json with another number of rows.

    Args:
        family: Its family.
        config: The model.
        raw: Its config.json.
        size: The number of rows.
        where: Its name, for messages.

    Raises:
        UnsupportedError: Its config.json cannot describe the vocabulary.
    """
    changes: dict[str, Any] = {"vocab_size": size}
    if config.per_layer_vocab_size:
        changes["per_layer_vocab_size"] = size
    config = replace(config, **changes)
    raw = family.unparse(config, raw)
    if found := differing_fields(config, family.parse(raw), ignored=("dtype", "init_std", "mtp_layers")):
        raise UnsupportedError(f"config.json cannot describe it: {found[0].name}", where=where)
    return config, raw


def has_vocabulary(item: Item) -> bool:
    """Whether a tensor has a row for each token."""
    return item.row.split.padded or any(shape[:1] == (VP,) for shape in item.row.hf.values())


def _resized(table: Tensor, rows: Rows, what: str) -> Tensor:
    """A table with other rows: copies in runs, and rows that are made."""
    made = _Made(table, rows, what)
    pieces: list[Tensor] = []
    for start, stop in _runs(rows.old):
        first = rows.old[start]
        pieces.append(made.rows(start, stop) if first is None else table.rows(first, first + stop - start))
    return vstack(pieces)


def _runs(old: Sequence[int | None]) -> Iterator[tuple[int, int]]:
    """Runs of new rows that are copies of successive old ones, or all made: (first, the one after the last)."""
    start = 0
    for at in range(1, len(old) + 1):
        before = old[at - 1]
        if at == len(old) or old[at] != (None if before is None else before + 1):
            yield start, at
            start = at


class _Made:
    """The rows of a table that are made: computed when they are written, from sums of all old rows where needed."""

    def __init__(self, table: Tensor, rows: Rows, what: str) -> None:
        self.table, self.wanted, self.what = table, rows, what
        self.sums = Once(self._sums)

    def rows(self, start: int, stop: int) -> Tensor:
        """New rows `start` to `stop`."""
        kind, dtype = self.wanted.kind, self.table.out_dtype
        shape = (stop - start, self.table.shape[1])
        if kind == ZEROS:
            zeros = Tensor.full(self.table.dtype, shape)
            return zeros if self.table.cast is None else zeros.astype(self.table.cast)
        if self.table.cast is not None or dtype.name not in CASTABLE:
            raise UnsupportedError(f"no rows of {dtype} can be made", where=self.what, hint="--new-rows zeros")

        def values(first: int, last: int) -> Values:
            import numpy as np

            return np.stack([self._row(start + number) for number in range(first, last)])

        what = ("rows", kind, self.wanted.seed, start, sorted(self.wanted.pieces.items()), self.what)
        return computed(dtype, shape, [self.table], what, values)

    def _row(self, number: int) -> NDArray[np.float64]:
        import numpy as np

        if pieces := self.wanted.pieces.get(number):
            found = [numbers(self.table.rows(piece, piece + 1), double=True)[0] for piece in pieces]
            return np.asarray(np.mean(found, axis=0), np.float64)
        mean, deviation = self.sums()
        if self.wanted.kind != NORMAL:
            return mean
        seed = hashlib.sha256(f"{self.wanted.seed} {number} {self.what.partition(' ')[0]}".encode()).digest()
        stream = np.random.Generator(np.random.Philox(key=int.from_bytes(seed[:16], "little")))
        return np.asarray(mean + deviation * stream.standard_normal(len(mean)), np.float64)

    def _sums(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Mean and standard deviation of every column of the old table."""
        import numpy as np

        table = as_matrix(self.table)
        count, width = table.shape
        total, squares = np.zeros(width), np.zeros(width)
        for start, stop in tiles(table.shape):
            for _, (found,) in blocks([table], start, stop, double=True, size=(stop - start) * width):
                rows = found.reshape(-1, width)
                total += rows.sum(axis=0)
                squares += (rows * rows).sum(axis=0)
        mean = total / count
        return mean, np.sqrt(np.maximum(squares / count - mean * mean, 0))


def with_tokens(
    model: Checkpoint, folder: Path, old: Path, moved: Mapping[int, int]
) -> tuple[Checkpoint, dict[str, bytes], list[str]]:
    """A model with another tokenizer: its files, and the ids in config.json and generation_config.json.

    Args:
        model: The model with its new rows.
        folder: The folder of the new tokenizer.
        old: tokenizer.json of the model.
        moved: Old id -> new id of the tokens that both tokenizers have.

    Returns:
        The model, changed small files, and notes about tokens that are gone.

    Raises:
        UnsupportedError: An id whose token moves is part of a tower's config.
    """
    model, made, notes = with_ids(model, tokens_in(old), moved)
    small = {name: path for name, path in model.sidecar.small.items() if name not in FILES}
    small |= {name: folder / name for name in FILES if (folder / name).is_file()}
    return replace(model, sidecar=replace(model.sidecar, small=small)), made, notes


def with_ids(
    model: Checkpoint, tokens: Mapping[str, int], moved: Mapping[int, int]
) -> tuple[Checkpoint, dict[str, bytes], list[str]]:
    """A model whose config.json and generation_config.json name the ids of another tokenizer.

    Args:
        model: The model.
        tokens: Token -> id of its own tokenizer.
        moved: Old id -> new id of the tokens that both tokenizers have.

    Returns:
        The model, generation_config.json if there is one, and notes about tokens that are gone.

    Raises:
        UnsupportedError: An id whose token moves is part of a tower's config.
    """
    sidecar = model.sidecar
    ids = _Ids({number: token for token, number in tokens.items()}, moved, model.family.sizes_in)
    made = {}
    if GENERATION in sidecar.small:
        before = read_json(sidecar.small[GENERATION])
        content = ids.renumbered(before, GENERATION)
        if content != before:
            made[GENERATION] = json.dumps(content, indent=2).encode() + b"\n"
    config = ids.renumbered(sidecar.config, "config.json")
    return replace(model, sidecar=replace(sidecar, config=config)), made, ids.notes


class _Ids:
    """Ids of tokens in JSON, which follow their tokens.

    Attributes:
        notes: What is left out.
    """

    def __init__(self, names: Mapping[int, str], moved: Mapping[int, int], text: str | None) -> None:
        self.names, self.moved, self.text = names, moved, text
        self.unmoved = all(moved.get(number) == number for number in names)
        self.notes: list[str] = []

    def renumbered(self, raw: Mapping[str, Any], where: str) -> dict[str, Any]:
        """An object of JSON with the new ids. Those in towers may be of other vocabularies: they must stay."""
        found = dict(raw)
        for key, value in raw.items():
            if isinstance(value, dict):
                inside = f"{where}: {key}"
                if key in ("text_config", self.text):
                    found[key] = self.renumbered(value, inside)
                else:
                    self._check(value, inside)
            elif key in _LISTS and value and not self.unmoved:
                self.notes.append(f"{where}: {key} names ids of the old tokenizer, and is left out")
                del found[key]
            elif (ids := _ids_in(key, value)) is not None:
                kept = [self.moved[number] for number in ids if number in self.moved]
                self._tell(key, ids, where)
                if kept:
                    found[key] = kept if isinstance(value, list) else kept[0]
                else:
                    del found[key]
        return found

    def _tell(self, key: str, ids: Sequence[int], where: str) -> None:
        for number in ids:
            if number not in self.moved:
                token = self.names.get(number, "no token")
                self.notes.append(f"{where}: {key} {number} ({token}) is not in the new tokenizer, and is left out")

    def _check(self, raw: Mapping[str, Any], where: str) -> None:
        for key, value in raw.items():
            if isinstance(value, dict):
                self._check(value, f"{where}: {key}")
            for number in _ids_in(key, value) or ():
                if number in self.names and self.moved.get(number) != number:
                    what = f"{key} {number} ({self.names[number]}) moves, if it is an id of the tokenizer"
                    hint = "keep the ids of such tokens, or take the key out of config.json and put it back by hand"
                    raise UnsupportedError(f"{where}: {what}", hint=hint)


def _ids_in(key: str, value: Any) -> list[int] | None:
    """The ids of tokens that a key of config.json holds, or None if it holds none."""
    ids = value if isinstance(value, list) else [value]
    return ids if key.endswith(_IDS) and all(type(number) is int for number in ids) else None


def tokenizer_of(one: Input) -> Path:
    """tokenizer.json of a model.

    Raises:
        UnsupportedError: It has none.
    """
    found = one.model.sidecar.small.get(TOKENIZER)
    if found is None:
        hint = "tokens are matched by it; --size changes the number of rows alone"
        raise UnsupportedError(f"the model has no {TOKENIZER}", where=one.name, hint=hint)
    return found
