"""The three things that `verify --adapter` compares: the model, its adapter, and what should be both."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

from ckptkit.checkpoints.checkpoint import Checkpoint
from ckptkit.checkpoints.locating import find_place
from ckptkit.checkpoints.lora.megatron import ADAPTER, MODEL
from ckptkit.checkpoints.opening import open_checkpoint
from ckptkit.checkpoints.source_options import SourceOptions, options_called
from ckptkit.errors import CkptkitError, UnsupportedError, UsageError
from ckptkit.formats.hub import locate
from ckptkit.formats.peft import is_peft
from ckptkit.formats.registry import is_huggingface
from ckptkit.verification.ranks.jobs import AdapterJob
from ckptkit.verification.sides import HF

PEFT_FORMAT = "peft"


@dataclass(frozen=True)
class Candidate:
    """What is in question.

    Attributes:
        model: Its weights, or None where it is an adapter alone, which runs on the reference's.
        adapter: Its adapter, or None where that is in the weights.
        model_source: Options that open the weights.
        adapter_source: Options that open the adapter.
    """

    model: Checkpoint | None
    adapter: Checkpoint | None
    model_source: SourceOptions
    adapter_source: SourceOptions

    @property
    def checkpoint(self) -> Checkpoint:
        """The part of it that says where it is and which grid it has."""
        found = self.adapter or self.model
        assert found is not None
        return found

    @property
    def job(self) -> AdapterJob | None:
        """Its adapter, as ranks are told of it."""
        if self.adapter is None:
            return None
        return AdapterJob(str(self.adapter.path), self.adapter_source, beside=self.model is not None)


@dataclass(frozen=True)
class Opened:
    """The three.

    Attributes:
        base: The model, a Hugging Face directory.
        base_source: Options that open it.
        adapter: The adapter, a PEFT directory.
        candidate: What should be both.
    """

    base: Checkpoint
    base_source: SourceOptions
    adapter: Checkpoint
    candidate: Candidate


def open_all(
    stack: ExitStack,
    base: str | Path,
    adapter: str | Path,
    candidate: str | Path,
    base_source: SourceOptions,
    candidate_source: SourceOptions,
) -> Opened:
    """Opens the three.

    Raises:
        UsageError: The model or the adapter are of a format that peft does not load.
        InputError: One is damaged, or the adapter is for another model.
        UnsupportedError: No family converts one.
    """
    base_source = _on_disk(stack, base_source)
    with options_called("ref"):
        model = open_checkpoint(_located(stack, base), **base_source.keywords())
    if model.format != HF or model.lora is not None:
        raise UsageError(
            "with --adapter, the reference is run by transformers and peft",
            where=base,
            hint="give a Hugging Face directory for REFERENCE",
        )
    folder = _located(stack, adapter)
    if not is_peft(folder):
        hint = "`ckptkit adapter export` makes a PEFT directory of a Megatron adapter"
        raise UsageError("--adapter takes a PEFT directory, which peft loads", where=adapter, hint=hint)
    given = open_checkpoint(folder, base=model)
    candidate_source = _on_disk(stack, candidate_source)
    with options_called("cand"):
        found = _candidate(_located(stack, candidate), candidate_source, model)
    return Opened(model, replace(base_source, iteration=None), given, found)


def _located(stack: ExitStack, path: str | Path) -> Path:
    return stack.enter_context(locate(path)).path


def _on_disk(stack: ExitStack, source: SourceOptions) -> SourceOptions:
    if source.hf_reference is None:
        return source
    return replace(source, hf_reference=str(_located(stack, source.hf_reference)))


def _candidate(path: Path, source: SourceOptions, base: Checkpoint) -> Candidate:
    here = replace(source, iteration=None)
    if is_huggingface(find_place(path, source.iteration, referenced=True).folder):
        return Candidate(open_checkpoint(path, **source.keywords()), None, here, here)
    alone = replace(source, lora_alpha=None)
    try:
        found = open_checkpoint(path, base=base, **alone.keywords())
    except UnsupportedError as error:
        try:
            adapter = open_checkpoint(path, base=base, part=ADAPTER, **source.keywords())
        except CkptkitError:
            raise error from None
        model = open_checkpoint(path, part=MODEL, **alone.keywords())
        return Candidate(model, adapter, replace(here, lora_alpha=None), here)
    except CkptkitError:
        if source.lora_alpha is None:
            raise
        found = open_checkpoint(path, base=base, **source.keywords())
    if found.lora is not None:
        return Candidate(None, open_checkpoint(path, base=base, **source.keywords()), here, here)
    # A model says itself what it is: the reference's config.json must not answer for it.
    return Candidate(open_checkpoint(path, **source.keywords()), None, here, here)
