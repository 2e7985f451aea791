"""The jobs of ranks and their answers. Both are sent as plain JSON, so this module does not need torch."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ckptkit import errors
from ckptkit.checkpoints.checkpoint import Checkpoint
from ckptkit.checkpoints.lora.megatron import MODEL
from ckptkit.checkpoints.source_options import SourceOptions
from ckptkit.megatron.run_config import RunConfig
from ckptkit.sharding.grid import Parallelism
from ckptkit.verification.run_options import RunOptions

OPENER = "ckptkit:open_checkpoint"
"""Where ranks find the function that opens a checkpoint, as `module:function`."""


@dataclass(frozen=True)
class TrainingPart:
    """What a job does that runs backwards.

    Attributes:
        folder: Directory for gradients, weights and routing (see `training.files`).
        steps: Steps of the optimizer; 0 for gradients alone.
        trained: Canonical names of the tensors that are trained, or None for all.
        attention: Transformers only: its implementation of attention.
    """

    folder: str
    steps: int = 0
    trained: list[str] | None = None
    attention: str = "eager"


@dataclass(frozen=True)
class TrainabilityPart:
    """What a job does that learns.

    Attributes:
        steps: Steps at most.
        rate: Learning rate.
        seed: Of prompts and draws.
        prompts: Prompts of a step.
        trained: Canonical names of the tensors that are trained, or None for all.
    """

    steps: int
    rate: float
    seed: int
    prompts: int
    trained: list[str] | None = None


@dataclass(frozen=True)
class AdapterJob:
    """An adapter that a job's model runs with.

    Attributes:
        path: Where it is.
        opening: Options that open it.
        beside: Whether the checkpoint of the model holds it, too.
        merged: Transformers only: whether it is put into the weights, and not beside them.
    """

    path: str
    opening: SourceOptions = SourceOptions()  # noqa: RUF009  frozen
    beside: bool = False
    merged: bool = False

    @staticmethod
    def from_json(raw: dict[str, Any] | None) -> AdapterJob | None:
        """The record that `dataclasses.asdict` made JSON types of."""
        return None if raw is None else AdapterJob(**{**raw, "opening": SourceOptions.from_json(raw["opening"])})


@dataclass(frozen=True)
class LogitsJob:
    """Run a checkpoint in megatron-core and keep its logits.

    Attributes:
        checkpoint: Path of the checkpoint.
        run: How it runs.
        rows: Token ids, one list per sequence.
        greedy: Most likely tokens to append to every row before the logits are taken.
        output: Safetensors file for the logits (see `runs.save_logits`).
        options: What else was asked for.
        again: Transformers only: file for the logits of a second run, which computes attention in another way, or None.
        probes: Directory for hidden states, or None.
        whole_layers: Keep hidden states between layers only, not within them.
        routing: Directory for what routers see and choose, or None.
        replay: Directory of another run's routing, whose experts the tokens are sent to, or None.
        opener: The function that opens the checkpoint, as `module:function`.
        opening: Options that open it.
        rounded: Name of a weight -> the type that it is rounded to before it is loaded (see `rounding.Rounding`).
        training: What to do instead, if the sides run backwards, or None.
        trainability: What to do instead, if it is to learn, or None.
        adapter: The adapter that the model runs with, or None.
        prediction: Layers of multi-token prediction, if they run, or 0 (see `Side`).
        scored: Inverse temperatures, if not logits are kept but what `rollouts.scores` makes of them; or empty.
    """

    checkpoint: str
    run: RunConfig
    rows: list[list[int]]
    output: str
    options: RunOptions = RunOptions()  # noqa: RUF009  frozen
    greedy: int = 0
    again: str | None = None
    probes: str | None = None
    whole_layers: bool = False
    routing: str | None = None
    replay: str | None = None
    opener: str = OPENER
    opening: SourceOptions = SourceOptions()  # noqa: RUF009  frozen
    rounded: dict[str, str] = field(default_factory=dict)
    training: TrainingPart | None = None
    trainability: TrainabilityPart | None = None
    adapter: AdapterJob | None = None
    prediction: int = 0
    scored: list[float] = field(default_factory=list)

    @property
    def files(self) -> dict[str, Any]:
        """Fields of a `runs.Run` that name files."""
        paths = {"logits": self.output, "again": self.again, "probes": self.probes, "routing": self.routing}
        return {name: None if path is None else Path(path) for name, path in paths.items()}

    def to_json(self) -> str:
        """One line of JSON."""
        return json.dumps(asdict(self))

    @staticmethod
    def from_json(text: str) -> LogitsJob:
        """The job that `to_json` wrote."""
        raw = json.loads(text)
        records = {
            "run": RunConfig(**{**raw["run"], "grid": Parallelism(**raw["run"]["grid"])}),
            "options": RunOptions(**raw["options"]),
            "opening": SourceOptions.from_json(raw["opening"]),
            "training": None if raw["training"] is None else TrainingPart(**raw["training"]),
            "trainability": None if raw["trainability"] is None else TrainabilityPart(**raw["trainability"]),
            "adapter": AdapterJob.from_json(raw["adapter"]),
        }
        return LogitsJob(**{**raw, **records})

    def __str__(self) -> str:
        return f"{self.checkpoint} on {self.run}"


def find(name: str) -> Callable[..., Any]:
    """The function that `module:function` names."""
    module, _, function = name.partition(":")
    found: Callable[..., Any] = getattr(importlib.import_module(module), function)
    return found


def open_model(
    opener: Callable[..., Checkpoint],
    path: str,
    opening: SourceOptions,
    adapter: AdapterJob | None,
    prediction: int = 0,
) -> Checkpoint:
    """Opens the model of a job; of a checkpoint that holds an adapter, too, the model alone.

    Layers of multi-token prediction are left out, unless the job is about them: no other logits depend on them.

    Raises:
        InputError: It has another number of them than the job.
    """
    part = {"part": MODEL} if adapter is not None and adapter.beside else {}
    checkpoint = opener(path, **opening.keywords(), **part)
    if not prediction:
        return checkpoint.without_prediction()
    if (found := checkpoint.config.mtp_layers) != prediction:
        raise errors.InputError(f"{found} layers of multi-token prediction, and {prediction} are asked for", where=path)
    return checkpoint


def encode_error(error: BaseException) -> dict[str, str | None]:
    """An exception as JSON; one that ckptkit did not raise on purpose becomes a `VerificationError`."""
    if isinstance(error, errors.CkptkitError):
        return {"type": type(error).__name__, "what": error.what, "where": error.where, "hint": error.hint}
    text = " ".join(str(error).split()) or "no message"
    return {"type": "VerificationError", "what": f"{type(error).__name__}: {text}", "where": None, "hint": None}


def decode_error(raw: dict[str, str | None]) -> errors.CkptkitError:
    """The exception that `encode_error` wrote."""
    kind: type[errors.CkptkitError] = getattr(errors, str(raw["type"]))
    return kind(str(raw["what"]), where=raw["where"], hint=raw["hint"])
