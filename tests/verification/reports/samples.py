"""Reports made by hand, with every field filled, for the tests of what is made of them."""

from __future__ import annotations

import math
from dataclasses import asdict, replace

from ckptkit.sharding.grid import Parallelism
from ckptkit.verification.reports.placement import SideReport, placement
from ckptkit.verification.reports.report import LevelResult, LogitsReport, VerificationReport
from ckptkit.verification.reports.results import (
    Agreement,
    CandidateRan,
    Check,
    Greedy,
    Location,
    NoiseFloor,
    RouterLayer,
    RoutingReport,
    StateError,
    TensorDifference,
)
from ckptkit.verification.training.figures import TensorError, by_place

PLACES = ["embedding", "layer 0", "layer 1", "final norm", "head"]


def side(name: str, grid: Parallelism, layers: int = 2, experts: int = 0) -> SideReport:
    sizes = {"tp": grid.tp, "pp": grid.pp, "vpp": grid.vpp, "ep": grid.ep, "etp": grid.expert_tp}
    ranks = placement(layers, experts, grid)
    moe = [1] if experts else []
    return SideReport(name, "torch", "MixtralForCausalLM", layers, moe, 123456, {"name": str(grid), **sizes}, ranks)


def logits_report(passed: bool = True, dtype: str = "float32") -> LogitsReport:
    """A logits level with experts; one that failed has parted in layer 1, with a logit that is not finite."""
    low = dtype != "float32"
    error = 1e-6 if passed else math.inf
    layer = RouterLayer(1, 1e-6, 1.0 if low else None, 1, 0 if passed else 2, 1e-5, 2e-4)
    return LogitsReport(
        passed=passed,
        summary="what was found <&>",
        device="cpu",
        dtype=dtype,
        tolerance=1e-4,
        rows=[[1, 2], [3, 4, 5]],
        agreement=Agreement(
            error, 20.0, error, (1, 2), 0.9, 1e-9, 1e-8, {"reference": 0}, [[1e-7, 0.0], [0.0, 1e-7, error]]
        ),
        greedy=Greedy([[2], [5]], 2, 2, 0),
        noise=NoiseFloor(1.0, 1.5, 1.25, 2.0, 2, 1.1, 1.9) if low else None,
        routing=RoutingReport(5, {"reference": 2, "candidate": 2}, 1e-4, 1.25, 2.0, [layer]),
        hidden_states=[StateError(place, 10.0**-at, 1e-3, 2e-3 if low else None) for at, place in enumerate(PLACES)],
        checks=[Check("finite", True, "all logits are finite"), Check("error", passed, 'largest <error> "1" & more')],
        location=None if passed else Location("layer 1 mlp", math.inf, 1e-7, ["decoder.layers.1.mlp.<fc1>.weight"]),
        messages=[] if passed else ["first seen in row 1 at position 2", "the models part at <layer 1> mlp"],
        megatron_modules={"megatron.core.transformer.mlp.MLP": 2},
        own_modules={"ckptkit.megatron.norms.RMSNorm": 5},
        versions={"python": "3.12", "torch": "2.11"},
        candidate_ran=CandidateRan(True, True, 2, 2, "ddp", ["cpu"]),
        seconds={"reference.load": 1.5, "candidate.run": 2.5},
    )


def weights_that_differ() -> LevelResult:
    """A level at which two tensors differ, each on one of the ranks of `report`."""
    differences = [
        TensorDifference("decoder.layers.1.mlp.<fc2>.weight", 1, 3, 1024, 0.5, [5, 7]),
        TensorDifference("embedding.word_embeddings.weight", None, 1, 2048, 1e-3, [0, 1]),
    ]
    details = {"bytes": 5, "differences": [asdict(difference) for difference in differences]}
    return LevelResult("weights", False, "2 tensors differ", details, [Check("bytes", False, "they differ")], 0.25)


def gradients_level(passed: bool = True, dtype: str = "float32") -> LevelResult:
    """A level gradients; in one that failed a tensor of layer 1 is off, and worse than all others."""
    noise = None if dtype == "float32" else 1e-3
    tensors = [
        TensorError(name, 1e-6, 1e-3, noise, 0.5, 0.1, 96)
        for name in ("model.embed_tokens.<weight>", "model.layers.0.mlp.<down>.weight", "model.norm.<weight>")
    ]
    tensors.insert(
        0, TensorError("model.layers.1.mlp.<down>.weight", 1e-6 if passed else 0.5, 1e-3, noise, 0.5, 0.1, 96)
    )
    details = {
        "dtype": dtype,
        "tolerance": 1e-4,
        "tensors": len(tensors),
        "worst": [asdict(tensor) for tensor in tensors],
        "places": [asdict(place) for place in by_place(tensors)],
        "differing": [] if passed else [tensors[0].name],
        "missing": [],
        "surplus": [],
        "messages": [],
    }
    return LevelResult("gradients", passed, "what <was> found", details, [Check("gradients", passed, "found <&>")], 4.5)


def report(passed: bool = True, dtype: str = "float32", grid: Parallelism | None = None) -> VerificationReport:
    grid = grid or Parallelism(2, 2, ep=2)
    weights = LevelResult("weights", True, "5 bytes equal", {"bytes": 5}, [Check("bytes", True, "equal")], 0.25)
    if not passed:
        weights = weights_that_differ()
    return VerificationReport(
        reference="hf <model> & more",
        candidate='out/"meg"',
        levels=[weights, replace(logits_report(passed, dtype).level(), seconds=3.5)],
        messages=["a <note>"],
        sides={
            "reference": side("hf", Parallelism(), experts=4),
            "candidate": replace(side("meg", grid, experts=4), sha256="ab" * 32),
        },
        not_run=["packed"],
        command="ckptkit verify 'hf <model> & more' 'out/\"meg\"'",
        started="2026-11-29T12:00:00+00:00",
        versions={"python": "3.12", "torch": "2.11"},
    )


def hostile(found: VerificationReport, text: str) -> VerificationReport:
    """The report with a text in every place that files or the command line fill."""
    data = found.to_dict()

    def spoiled(value: object, key: str = "") -> object:
        if isinstance(value, dict):
            return {name: spoiled(item, name) for name, item in value.items()}
        if isinstance(value, list):
            return [spoiled(item, key) for item in value]
        fixed = key in ("verdict", "dtype", "name", "started", "place", "non_finite")
        return value if not isinstance(value, str) or fixed else value + text

    raw = spoiled(data)

    class Spoiled(VerificationReport):
        def to_dict(self) -> dict[str, object]:
            return raw  # type: ignore[return-value]

    assert isinstance(raw, dict)
    return Spoiled(found.reference + text, found.candidate + text, found.levels)
