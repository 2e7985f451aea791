"""The text that an adapter is fitted on, as token ids."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ckptkit.checkpoints.checkpoint import Checkpoint
from ckptkit.errors import InputError, UsageError
from ckptkit.formats.tokenizer_json import TOKENIZER
from ckptkit.io.stores.opening import must_be_on_disk

TOKENS, LENGTH = 32768, 512
"""Default number of tokens, and default length of a sequence."""
HELD_OUT = 10
"""One sequence in so many is held out: the fit does not use it, and is judged on it."""


@dataclass(frozen=True)
class Calibration:
    """The calibration text and its limits, as the user requests them.

    Attributes:
        path: A text file in UTF-8, or a `.json` file with a list of lists of token ids.
        tokens: At most so many tokens are taken, from the beginning.
        length: Tokens of a sequence; longer ones are cut into several.
        device: Where the models run: `cpu` or `cuda`.
    """

    path: Path
    tokens: int = TOKENS
    length: int = LENGTH
    device: str = "cpu"

    @classmethod
    def of(cls, options: Mapping[str, Any], name: str) -> Calibration:
        """The calibration among the options of an initialisation.

        Raises:
            UsageError: There is none, or it makes no sense.
        """
        if options.get("calibration") is None:
            raise UsageError(
                f"--adapter-init {name} is fitted to text", hint="--calibration FILE names a text or JSON token ids"
            )
        given = {key: options[key] for key in ("tokens", "length", "device") if options.get(key) is not None}
        found = cls(Path(options["calibration"]), **given)
        if found.length < 2 or found.tokens < 2:
            raise UsageError("calibration takes sequences of 2 tokens or more")
        if found.device not in ("cpu", "cuda"):
            raise UsageError(f"no device {found.device!r}", hint="choose cpu or cuda")
        return found

    @property
    def sha256(self) -> str:
        """SHA-256 of the file, in hexadecimal."""
        return hashlib.sha256(_read(self.path)).hexdigest()


def read_sequences(calibration: Calibration, model: Checkpoint) -> list[list[int]]:
    """Token ids of the calibration, sequence by sequence; each of a text begins with the model's BOS, if it has one.

    Args:
        calibration: The file and its limits.
        model: Whose tokenizer and vocabulary count.

    Raises:
        InputError: The file is not there, is damaged, or too short.
        UsageError: A text, and the model has no tokenizer.json.
    """
    data = _read(calibration.path)
    found = _ids(data, calibration, model) if calibration.path.suffix == ".json" else _encoded(data, calibration, model)
    kept, left = [], calibration.tokens
    for row in found:
        row = row[:left]
        if len(row) > 1:  # a first position alone says nothing
            kept.append(row)
            left -= len(row)
    if not kept:
        raise InputError("holds no sequence of 2 tokens or more", where=calibration.path)
    return kept


def split(sequences: list[list[int]]) -> tuple[list[list[int]], list[list[int]]]:
    """(sequences to fit, sequences held out): every `HELD_OUT`th is held out, and of several at least the last one."""
    held = set(range(HELD_OUT - 1, len(sequences), HELD_OUT)) or ({len(sequences) - 1} if len(sequences) > 1 else set())
    return (
        [row for number, row in enumerate(sequences) if number not in held],
        [row for number, row in enumerate(sequences) if number in held],
    )


def _read(path: Path) -> bytes:
    must_be_on_disk(path)
    try:
        return path.read_bytes()
    except OSError as error:
        raise InputError(f"cannot read the calibration ({error.strerror})", where=path) from None


def _ids(data: bytes, calibration: Calibration, model: Checkpoint) -> list[list[int]]:
    size = model.config.vocab_size
    try:
        rows = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise InputError(f"not JSON ({error})", where=calibration.path) from None
    if not isinstance(rows, list) or not all(isinstance(row, list) for row in rows):
        raise InputError("not a JSON list of lists of token ids", where=calibration.path)
    for number, row in enumerate(rows):
        for token in row:
            if type(token) is not int or not 0 <= token < size:
                raise InputError(
                    f"token id {token!r} in row {number} is not in the vocabulary of {size}", where=calibration.path
                )
    return [row[at : at + calibration.length] for row in rows for at in range(0, len(row), calibration.length)]


def _encoded(data: bytes, calibration: Calibration, model: Checkpoint) -> list[list[int]]:
    file = model.sidecar.small.get(TOKENIZER)
    if file is None:
        raise UsageError(
            f"{model.path} has no {TOKENIZER} to read the text with", hint="--calibration ids.json: lists of token ids"
        )
    from tokenizers import Tokenizer

    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        raise InputError(f"not a text in UTF-8 ({error})", where=calibration.path) from None
    # No token has more than a few dozen characters in running text: more of it would be cut off anyway.
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises nothing more special
        raise InputError(f"the tokenizer cannot be read ({error})", where=file) from None
    ids = tokenizer.encode(text[: 64 * calibration.tokens], add_special_tokens=False).ids
    bos = model.sidecar.config.get("bos_token_id")
    start = [bos] if type(bos) is int else []
    step = calibration.length - len(start)
    rows = [start + ids[at : at + step] for at in range(0, len(ids), step)]
    if any(token >= model.config.vocab_size for row in rows for token in row):
        raise InputError("the tokenizer gives ids beyond the vocabulary", where=file)
    return rows
