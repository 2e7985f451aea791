"""The description of the model in a Megatron checkpoint: from a reference, the sidecar or `args`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ckptkit.checkpoints.config_fields import NUM_LAYERS, FieldDifference, differing_fields, in_words
from ckptkit.checkpoints.prediction import in_megatron, notes_of_prediction, with_prediction
from ckptkit.checkpoints.recognition import recognise
from ckptkit.checkpoints.sidecar_contents import check_extras, check_originals, check_sidecar
from ckptkit.checkpoints.vocabulary import Vocabulary
from ckptkit.dtypes import DType
from ckptkit.errors import CkptkitError, InputError, UsageError
from ckptkit.families import family_of
from ckptkit.formats.hf import HfFiles
from ckptkit.formats.json_files import read_json
from ckptkit.formats.sidecar import FOLDER, HEADERS, Sidecar, read_extras, read_sidecar
from ckptkit.megatron_args.contradictions import contradictions
from ckptkit.megatron_args.known import read_args
from ckptkit.megatron_args.reading import from_args, model_from_args
from ckptkit.sharding.grid import StatedGrid
from ckptkit.tables.family import Family
from ckptkit.tables.model_config import ModelConfig


@dataclass(frozen=True)
class Given:
    """Facts that the user states about a checkpoint.

    Attributes:
        reference: The Hugging Face directory that describes the model, or None.
        grid: The stored grid.
        vocab_size: The true size of the vocabulary, or None.
        lora_alpha: Alpha of a Megatron adapter, or None.
        part: `adapter` or `model`, the part that is wanted of a Megatron checkpoint that holds both; None if it holds
            one.
        dtype: The type that quantised weights are read as; None for BF16.
    """

    reference: HfFiles | None
    grid: StatedGrid
    vocab_size: int | None
    lora_alpha: float | None = None
    part: str | None = None
    dtype: DType | None = None


def complete(files: HfFiles) -> tuple[HfFiles, list[str]]:
    """A directory whose config.json describes the model by itself, and notes; older layouts leave some of it to others.

    Raises:
        InputError: Something about the model cannot be known.
    """
    family = family_of(files.config, files.path / "config.json")
    if family.directory.complete is None:
        return files, []

    def read(path: str) -> dict[str, Any] | None:
        places = (files.path / path / "config.json", Path(path) / "config.json")
        return next((read_json(place) for place in places if place.is_file()), None)

    shapes = {name: tensor.shape for name, tensor in files.tensors.items()}
    with located(files.path):
        config, notes = family.directory.complete(files.config, shapes, read)
    return replace(files, config=config), notes


@dataclass(frozen=True)
class Description:
    """The description of the model in a Megatron checkpoint."""

    family: Family
    config: ModelConfig
    sidecar: Sidecar
    notes: list[str]
    disagreements: list[str]


def describe(root: Path, args: Mapping[str, Any], names: set[str], given: Given, vocabulary: Vocabulary) -> Description:
    """The family, config and sidecar of a Megatron checkpoint: reference first, then sidecar, then `args` alone."""
    reference = given.reference
    sidecar = read_sidecar(root) if reference is None else _beside(reference, root)
    if sidecar is not None:
        family = family_of(sidecar.config, root)
        base = with_prediction(family, family.parse(sidecar.config), in_megatron, names)
        check_extras(sidecar.extras, family, base, root)
        check_originals(sidecar.originals, family, base, root)
        tokens = check_sidecar(sidecar, family, base, root) if reference is None else None
        with located(root):
            config = from_args(family, args, base)
        differences = [*_differences(config, base), *_contradictions(args, base)]
        if reference is not None:
            _check_layout(differences if "num_attention_heads" in args else _differences_of_sidecar(base, root), root)
        cut, notes = _compare_vocabulary(base.vocab_size, given.vocab_size, vocabulary)
        notes += notes_of_prediction(family, base, sidecar.config)
        if not cut and tokens not in (None, base.vocab_size) and given.vocab_size != base.vocab_size:
            cut = [f"{FOLDER}/{HEADERS} has {tokens} tokens, config.json says {base.vocab_size}"]
        if reference is None:
            return Description(family, config, sidecar, notes, [*(one.text for one in differences), *cut])
        if cut:  # a reference outranks words about the weights, not the weights
            hint = f"give one with the right vocab_size, or --vocab-size {base.vocab_size} if the others are no tokens"
            raise InputError(f"{cut[0]}: weights would be lost", where=root, hint=hint)
        notes += [f"the reference outranks the checkpoint's args: {one.text}" for one in differences]
        return Description(family, base, sidecar, notes, [])
    with located(root):
        return _describe_by_args(root, args, names, given, vocabulary)


def _beside(reference: HfFiles, root: Path) -> Sidecar:
    """A reference in place of the sidecar of a checkpoint, of which only tensors are taken."""
    extras, originals = read_extras(root)
    return replace(Sidecar.of_hf(reference, extras), originals=originals)


def _compare_vocabulary(size: int, stated: int | None, vocabulary: Vocabulary) -> tuple[list[str], list[str]]:
    """Contradictions between config.json and `args` about the number of tokens, and notes.

    Args:
        size: The number in config.json.
        stated: The number that the user states, or None.
        vocabulary: The stored rows, and the number in `args`.
    """
    in_args = vocabulary.in_args
    if in_args in (None, size):
        return [], []
    text = f"args say {vocabulary.text}, config.json says {size}"
    if in_args is not None and in_args > size:
        return ([text], []) if stated != size else ([], [f"{text}, which --vocab-size confirms"])
    return [], [f"{text}: all its rows are kept"]  # of many a released model, more than its tokenizer has tokens


def _describe_by_args(
    root: Path, args: Mapping[str, Any], names: set[str], given: Given, vocabulary: Vocabulary
) -> Description:
    """Describes a checkpoint from its args: there is no reference and no sidecar."""
    family, rows = recognise(names, args), vocabulary.rows
    if given.vocab_size is not None and not 0 < given.vocab_size <= rows:
        raise UsageError(f"--vocab-size {given.vocab_size}, but {rows} rows are stored", where=root)
    vocab_size = vocabulary.size(given.vocab_size, root)
    config = with_prediction(family, model_from_args(family, args, vocab_size), in_megatron, names)
    notes = [
        "config.json is built from the checkpoint's args; tokenizer, generation config and special token ids are"
        " unknown (--hf-reference supplies them)"
    ]
    if origin := args.get("hf_model_id"):
        notes.append(f"run_config.yaml says that it was made of {origin}")
    known = vocabulary.in_args is not None and vocabulary.counted
    if not known and given.vocab_size is None:
        notes.append(f"the true vocabulary size is unknown: all {rows} stored rows are kept (--vocab-size supplies it)")
    if known and vocabulary.in_args != args.get("vocab_size") and vocabulary.in_args == vocab_size:
        notes.append(f"args say {vocabulary.text}")
    if vocabulary.in_args not in (None, vocab_size) and given.vocab_size is not None:
        notes.append(f"--vocab-size {vocab_size} outranks the checkpoint's args, which say {vocabulary.in_args}")
    sidecar = Sidecar(family.unparse(config, {}), {})
    notes += notes_of_prediction(family, config, sidecar.config)
    return Description(family, config, sidecar, notes, [])


@dataclass(frozen=True)
class _Difference:
    """A contradiction between a checkpoint and the config.json of its model, in a sentence.

    Attributes:
        text: The sentence.
        is_layout: Whether stored bytes are cut by what differs.
    """

    text: str
    is_layout: bool


def _check_layout(differences: list[_Difference], root: Path) -> None:
    """Whether a reference leaves alone what decides how stored bytes are cut, even where all shapes would fit.

    Raises:
        InputError: It contradicts that.
    """
    if layout := [one.text for one in differences if one.is_layout]:
        raise InputError(
            f"the reference contradicts how the weights are stored: {'; '.join(layout)}",
            where=root,
            hint="give the config.json of this very model; where it is the checkpoint that is wrong, correct that",
        )


def _differences(config: ModelConfig, base: ModelConfig, who: str = "args say") -> list[_Difference]:
    """Fields in which `args`, or another source of a config, contradict config.json."""

    def sentence(field: FieldDifference) -> str:
        stored = f"{field.left} layers" if field.name == NUM_LAYERS else f"{field.name} {in_words(field.left)}"
        return f"{who} {stored}, config.json says {in_words(field.right)}"

    found = differing_fields(config, base, ignored=("dtype", "init_std"))
    return [_Difference(sentence(field), field.is_layout) for field in found]


def _differences_of_sidecar(base: ModelConfig, root: Path) -> list[_Difference]:
    """Fields in which the checkpoint's own config.json, where one can be read, contradicts that of a reference."""
    try:
        own = read_sidecar(root)
        stored = None if own is None else family_of(own.config, root).parse(own.config)
    except CkptkitError:  # a reference takes the place of a sidecar that is damaged
        return []
    return [] if stored is None else _differences(stored, base, "the checkpoint's own config.json says")


def _contradictions(args: Mapping[str, Any], base: ModelConfig) -> list[_Difference]:
    """Arguments with which Megatron-LM computes something else than the model of config.json."""
    return [
        _Difference(f"args say {one.name} {one.stored!r}, config.json means {one.expected!r}", one.is_layout)
        for one in contradictions(args, base)
    ]


@contextmanager
def located(where: Path) -> Iterator[None]:
    """Names the place in errors that do not."""
    try:
        yield
    except CkptkitError as error:
        raise type(error)(error.what, where=error.where or where, hint=error.hint) from None


def checked_args(stored: Mapping[str, Any], where: Path) -> dict[str, Any]:
    """`args` as read from a file, checked; errors name the file."""
    with located(where):
        return read_args(stored)
