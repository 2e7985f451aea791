"""The output of a conversion: its format, and every fact that its files share, resolved once."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any

from ckptkit.checkpoints.checkpoint import EMBEDDING, Checkpoint, check_grid, most_common_dtype, vocabulary_multiple
from ckptkit.checkpoints.lora.layouts import Record
from ckptkit.checkpoints.lora.megatron import is_adapter_name
from ckptkit.checkpoints.lora.record import Lora
from ckptkit.checkpoints.run_config import run_config
from ckptkit.checkpoints.sidecar_contents import originals_of
from ckptkit.conversion.bridge_adapter import bridge_section
from ckptkit.conversion.options import TEXT, Options
from ckptkit.conversion.quantising import QuantisedOutput, names_for, quantise
from ckptkit.dtypes import TORCH_DTYPE_NAMES
from ckptkit.errors import UnsupportedError, UsageError
from ckptkit.formats.json_files import read_json
from ckptkit.formats.sidecar import OF_ADAPTER, Sidecar
from ckptkit.formats.torch_dist import FOLDER
from ckptkit.io.plan import OutputFile
from ckptkit.megatron_args.fields import delta_of
from ckptkit.megatron_args.flags import megatron_flags
from ckptkit.megatron_args.writing import to_args
from ckptkit.sharding.grid import Parallelism
from ckptkit.sharding.rules import padded_vocab_size
from ckptkit.sharding.stages import Stage, split_layers
from ckptkit.tables.hybrid_names import GPT, HYBRID, hybrid_args, inexpressible_as_hybrid
from ckptkit.tables.model_config import ModelConfig
from ckptkit.tables.prediction import CORE_0_19
from ckptkit.tables.spelling import Spelling
from ckptkit.version import __version__

_NULL_TOKENIZER = "NullTokenizer"
"""Without a run_config.yaml, Megatron-Bridge asks `args` for a tokenizer, by which it counts tokens: one more than
`vocab_size`, since this tokenizer has an end of its own."""

OF_MEGATRON_LM = ("te", "local", "te_fused")
"""Spellings whose names are those of Megatron-LM's own models."""


@dataclass(frozen=True)
class WritableFormat:
    """A format that can be written: a module of `conversion/targets/` holds one.

    Attributes:
        name: Its value of `--to`.
        lay_out: Target -> output files.
        takes: Fields of `Options` that the format takes, beyond the fields that every format takes.
        fits: Spelling of Megatron's names -> whether the format can be written with it.
        notes: Target -> notes for the user about this output.
        any_grid: Whether an output loads on any grid, whatever grid it was written for.
    """

    name: str
    lay_out: Callable[[Target], list[OutputFile]]
    takes: frozenset[str] = frozenset()
    fits: Callable[[Spelling], bool] = lambda spelling: True
    notes: Callable[[Target], list[str]] = lambda target: []
    any_grid: bool = False

    @property
    def megatron(self) -> bool:
        """Whether it holds Megatron's names and `args`, and a sidecar for the way back."""
        return "spec" in self.takes

    @property
    def sharded(self) -> bool:
        """Whether it is sharded over the ranks of a grid."""
        return "grid" in self.takes


@dataclass(frozen=True)
class NoRunConfig:
    """The reason why an output gets no `run_config.yaml`."""

    reason: str


@dataclass(frozen=True)
class Adapted:
    """The adapter of an output, in a layout of Megatron.

    Attributes:
        record: How its ranks are made up.
        lora: The facts about it.
        sidecar: Its Hugging Face side, where it stands beside the weights of its model; None if it stands alone.
    """

    record: Record
    lora: Lora
    sidecar: Sidecar | None = None


@dataclass(frozen=True)
class Target:
    """The output of a conversion.

    Each property is resolved once, on first use, so all files share one value. The properties about Megatron (spelling,
    stages, padding, `args`, ...) stay unused by a Hugging Face output.

    Attributes:
        source: The model, after all changes.
        options: The requested output.
        format: The format.
        adapter: The adapter in a layout of Megatron, alone or beside the model; None for a model alone, and for an
            adapter in another format.
    """

    source: Checkpoint
    options: Options
    format: WritableFormat
    adapter: Adapted | None = None

    @cached_property
    def dtype(self) -> str:
        """The element type that most bytes of the model have, or of an adapter that stands alone, as torch names it."""
        tensors = self.source.tensors
        of_model = [tensor for key, tensor in tensors.items() if not is_adapter_name(key)]
        return TORCH_DTYPE_NAMES[most_common_dtype(of_model or tensors.values())]

    @property
    def grid(self) -> Parallelism:
        """The grid, of one rank where the format is not sharded."""
        return self.options.grid

    @cached_property
    def spelling(self) -> Spelling:
        """The spelling of Megatron's names that `--spec`, `--experts` and `--megatron-model` ask for.

        Raises:
            UsageError: The family, the format or the Megatron model does not have these names.
        """
        options = self.options
        if options.megatron_model == HYBRID and self.source.config.adapter is not None:
            raise UsageError("--megatron-model hybrid has layers of one width", hint="use --megatron-model gpt")
        config = self.source.config
        if options.megatron_model == HYBRID and (what := _not_in_hybrid(config)):
            raise UsageError(f"--megatron-model hybrid: {what} is not in it here", hint="use --megatron-model gpt")
        spelling = self.source.family.spelling(options.spec, options.experts, text=options.layout == TEXT)
        if not self.format.fits(spelling):
            raise UsageError(f"--spec {options.spec} exists only as per-rank files", hint="use --to torch")
        fused = self.source.family.quirks.fused  # which 0.16 does not have
        since = options.megatron_core == CORE_0_19 or (fused is not None and spelling.name == fused.spelling.name)
        return replace(spelling, hybrid=options.megatron_model == HYBRID, of_0_19=since)

    @cached_property
    def stages(self) -> list[Stage]:
        """The pipeline stages, ordered by (pp_rank, vp_stage).

        Raises:
            UsageError: The grid cannot hold the model.
        """
        check_grid(self.source.config, self.grid)
        return split_layers(self.source.config.num_layers, self.grid)

    @cached_property
    def divisible_by(self) -> int:
        """The vocabulary is padded to a multiple of this number times TP.

        A format that is not sharded pads only if the option is given.

        Raises:
            UsageError: The option does not fit the model, or this spelling does not pad.
        """
        asked = self.options.make_vocab_size_divisible_by
        if asked is None and not self.format.sharded:
            return 1
        return vocabulary_multiple(self.source.config.vocab_size, self.grid.tp, self.spelling, asked)

    @cached_property
    def args(self) -> dict[str, Any]:
        """Megatron-LM's `args`, as plain values."""
        source, spelling = self.source, self.spelling
        tokens = source.tensors[EMBEDDING].shape[0] if EMBEDDING in source.tensors else source.config.vocab_size
        rows = padded_vocab_size(tokens, self.divisible_by, self.grid.tp)
        config = replace(source.config, dtype=self.dtype)
        local = spelling.name == "local" or source.family.quirks.local_only(source.config)
        args = to_args(source.family, config, self.grid, rows, self.divisible_by, spelling.experts, local=local)
        fused = source.family.quirks.fused
        if fused is not None and fused.spelling.name == spelling.name:
            args[fused.args] = True
        if self.format.any_grid and isinstance(self.run_config, NoRunConfig):
            args |= {"tokenizer_type": _NULL_TOKENIZER, "vocab_size": args["vocab_size"] - 1}
        if not spelling.hybrid:
            return args
        stages = sorted(self.stages, key=lambda stage: (stage.vp_stage, stage.pp_rank))
        return hybrid_args(args, [layer.moe for layer in config.layers], [stage.layers for stage in stages])

    @cached_property
    def megatron_flags(self) -> list[str] | None:
        """The words after `pretrain_gpt.py` with which Megatron-LM builds this model, or None where no words do."""
        ropes = [layer.rope.kind for layer in self.source.config.layers]
        if self.spelling.name not in OF_MEGATRON_LM or (self.spelling.hybrid and inexpressible_as_hybrid(ropes)):
            return None
        fixed = None if self.format.any_grid else self.grid
        return megatron_flags(self.source.family, self.source.config, self.args, fixed)

    @cached_property
    def run_config(self) -> OutputFile | NoRunConfig:
        """The `run_config.yaml` from which Megatron-Bridge builds the model, or the reason why there is none."""
        if self.spelling.hybrid:
            return NoRunConfig("a run_config.yaml can describe GPTModel only")
        text = self.options.layout == TEXT
        try:
            peft = None if self.adapter is None else self._peft_section(self.adapter)
            return run_config(self.source, self.grid, self.divisible_by, self.spelling, FOLDER, text=text, peft=peft)
        except UnsupportedError as error:
            return NoRunConfig(error.what)

    def _peft_section(self, adapter: Adapted) -> dict[str, Any]:
        return bridge_section(self.source, adapter.lora, self.spelling.prefix, adapter.record)

    @cached_property
    def quantised(self) -> QuantisedOutput | None:
        """The tensors of a Hugging Face output with quantised weights, or None if `--quantise` does not ask for them.

        Raises:
            InputError: The reference is another model.
            UnsupportedError: The scheme has no tensors in this model.
        """
        wanted = self.options.quantise
        if wanted is None:
            return None
        return quantise(self.source, self.source.hf_tensors(names_for(self.source, wanted)), wanted)

    @cached_property
    def config_json(self) -> OutputFile:
        """config.json: a copy of the source's file, unless a change has altered its content."""
        if self.quantised is not None:
            return self.quantised.config_json
        path, config = self.source.sidecar.small.get("config.json"), self.source.sidecar.config
        if path is not None and read_json(path) == config:
            return OutputFile.copy("config.json", str(path), path.stat().st_size)
        return OutputFile.small("config.json", json.dumps(config, indent=2).encode() + b"\n")

    @cached_property
    def sidecar(self) -> list[OutputFile]:
        """The files of the sidecar: everything that the way back to Hugging Face needs, and a manifest."""
        source, spelling = self.source, self.spelling
        manifest = {
            "tool": f"ckptkit {__version__}",
            "format": self.format.name,
            "family": source.family.name,
            "architecture": source.config.architecture,
            "spec": spelling.name,
            "experts": spelling.experts,
            "megatron_model": HYBRID if spelling.hybrid else GPT,
            "prefix": spelling.prefix,
            "grid": asdict(self.grid),
            "make_vocab_size_divisible_by": self.divisible_by,
            **({"megatron_flags": self.megatron_flags} if self.format.sharded else {}),
        }
        sidecar = replace(source.sidecar, originals=originals_of(source.items, source.tensors))
        files = sidecar.lay_out(manifest, self.config_json)
        if self.adapter is not None and self.adapter.sidecar is not None:
            files += self.adapter.sidecar.lay_out(manifest, folder=OF_ADAPTER)
        return files


def _not_in_hybrid(config: ModelConfig) -> str | None:
    """A feature of the model for which no HybridModel is written, or None."""
    found = {
        "a DeltaNet": delta_of(config) is not None,
        "multi-token prediction": config.mtp_layers > 0,
    }
    return next((feature for feature, present in found.items() if present), None)
