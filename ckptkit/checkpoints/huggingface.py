"""Opens a Hugging Face directory: its tensors under canonical names."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from ckptkit.checkpoints.checkpoint import Checkpoint, most_common_dtype
from ckptkit.checkpoints.description import complete
from ckptkit.checkpoints.prediction import notes_of_prediction, with_prediction
from ckptkit.checkpoints.problems import UNTIED_HEAD, Problems
from ckptkit.checkpoints.recognition import refuse_trainers_parts
from ckptkit.dtypes import DTYPES, TORCH_DTYPE_NAMES
from ckptkit.errors import UnsupportedError
from ckptkit.families import family_of
from ckptkit.formats.hf import BIN_INDEX, INDEX, HfFiles
from ckptkit.formats.sidecar import Sidecar
from ckptkit.formats.wrapper_names import find_wrapping
from ckptkit.io.plan import Comparison
from ckptkit.tables.bounds import check_counts
from ckptkit.tables.config_fields import set_dtype
from ckptkit.tables.family import Family
from ckptkit.tables.prediction import count_in_hf
from ckptkit.tensors import Tensor


def open_hf_files(files: HfFiles) -> Checkpoint:
    """Opens the content of a Hugging Face directory, or of a module's state with the same names.

    Raises:
        InputError: Tensors are missing, mis-shaped or unknown.
        UnsupportedError: No family for its architecture, or the weights are quantised.
    """
    family = family_of(files.config, files.path / "config.json")
    files, wrapping = _unwrapped(files, family)
    files, notes = complete(files)
    config = with_prediction(family, family.parse(files.config), count_in_hf, files.tensors)
    check_counts(config, files.tensors.values(), files.path)
    items = {item.key: item for item in family.items(config)}
    stored, _ = family.unfuse(files.tensors, config, items.values())
    left = dict(stored)
    made = any(not item.hf for item in items.values())  # tensors of slots alone: they get the type that most have
    dtype = most_common_dtype(stored.values()) if made and stored else DTYPES["F32"]
    problems = Problems(files.path)
    tensors = {}
    for key, item in items.items():
        taken = [problems.take(left, name, shape) for name, shape in zip(item.hf, item.kind.parts, strict=True)]
        parts = [part for part in taken if part is not None]
        unused: dict[str, Tensor] = {}
        for slot in item.slots:
            if slot.hf in left and (held := problems.take(left, slot.hf, slot.shape)) is not None:
                unused[slot.hf] = held
        if len(parts) == len(taken):
            tensors[key] = item.pack(parts, unused, dtype)
    used = len(files.tensors) - len(left)
    comparisons = []
    for replica in family.copies(config):
        if replica.hf in left and replica.of in stored:
            why = "tie_word_embeddings is true" if config.tied else "multi-token prediction shares it"
            what = f"{replica.hf} repeats {replica.of} ({why})"
            comparisons.append(Comparison(left.pop(replica.hf), stored[replica.of], what, UNTIED_HEAD))
    replicas = len(comparisons)
    extras = {name: left.pop(name) for name in sorted(left) if family.is_extra(name, config)}
    _refuse_quantised(files.path, left)
    refuse_trainers_parts(left, files.path)
    problems.unknown(left)
    problems.check()
    quantised = files.quantised
    if quantised is not None and quantised.stored:
        comparisons += quantised.comparisons()
        set_dtype(files.config, TORCH_DTYPE_NAMES[quantised.dtype])
    return Checkpoint(
        path=files.path,
        format="hf",
        family=family,
        config=config,
        sidecar=Sidecar.of_hf(files, extras),
        items=items,
        tensors=tensors,
        spelling=family.spellings[0],
        padded_vocab_size=config.vocab_size,
        comparisons=tuple(comparisons),
        coverage={"used": used, "replicas": replicas, "in the sidecar": len(extras)},
        notes=(
            *wrapping,
            *notes,
            *(() if quantised is None else quantised.notes()),
            *notes_of_prediction(family, config, files.config),
            *(f"{name} is not part of the model and stays behind" for name in files.ignored),
        ),
    )


def _unwrapped(files: HfFiles, family: Family) -> tuple[HfFiles, list[str]]:
    """A directory whose tensors have the names that the model gives them, and a note if it had others.

    What then describes the shards under the stored names is left out: new ones are laid out.
    """
    wrapping = find_wrapping(files.tensors, lambda names: len(names & family.hf_ends))
    if not wrapping:
        return files, []
    small = {name: file for name, file in files.small.items() if name not in (INDEX, BIN_INDEX)}
    tensors = wrapping.removed(files.tensors, files.path)
    return replace(files, tensors=tensors, headers={}, small=small), [wrapping.note]


_QUANTISED = {
    "_scale_inv": "FP8 with block scales",
    ".weight_scale": "FP8 with scales",
    ".qweight": "GPTQ or AWQ",
    ".SCB": "bitsandbytes 8 bit",
    ".absmax": "bitsandbytes 4 bit",
}


def _refuse_quantised(path: Path, names: Iterable[str]) -> None:
    """Names the method of weights that are quantised although config.json does not say so."""
    for name in sorted(names):
        for ending, method in _QUANTISED.items():
            if name.endswith(ending):
                raise UnsupportedError(
                    f"quantised weights ({method}: {name})", where=path, hint="convert from the unquantised model"
                )
