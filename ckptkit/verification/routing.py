"""Which experts the tokens went to: taken from a reference, replayed, and judged by itself.

Where two experts are nearly equal, a rounding error sends a token elsewhere, and everything after it differs. So the
candidate is given the reference's choice; that its own choice would have been the same is judged from its router
logits.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from ckptkit.errors import UnsupportedError
from ckptkit.verification.comparison import MEDIAN_LIMIT, P99_LIMIT
from ckptkit.verification.reports.results import RouterLayer, RoutingReport
from ckptkit.verification.runs import Run

LOGITS, EXPERTS, OWN, SCORES, WHOLE, GROUPS = KINDS = ("logits", "experts", "own", "scores", "whole", "groups")
SOFTMAX, SIGMOID, TOPK = "softmax", "sigmoid", "topk"
"""Names of functions and methods of torch; in float64 others of the same name stand in for them."""

Experts = dict[int, torch.Tensor]
"""Layer number, from 0 -> numbers of the chosen experts, int64 [batch, sequence, experts per token]."""


class Record:
    """The inputs and choices of the routers, for rows of each length.

    Attributes:
        tensors: `logits.<layer>.<length>`, fp32 [rows, length, experts], `experts.<layer>.<length>`, int64 [rows,
            length, experts per token], and like that `own`: what would have been chosen had nothing been prescribed.
            `scores`, fp32 [rows, length, experts], are what experts are chosen by where that is not the order of
            the logits: with a bias, or with -inf for experts of groups that were not chosen. Only the reference has
            them.
    """

    def __init__(self) -> None:
        self.tensors: dict[str, torch.Tensor] = {}

    def add(self, *parts: Mapping[int, torch.Tensor]) -> None:
        """Append rows of one length: a mapping of each of `KINDS`, layer -> [rows, length, ...]."""
        for kind, found in zip(KINDS, parts, strict=False):
            for layer, tensor in found.items():
                key = f"{kind}.{layer}.{tensor.size(1)}"
                known = self.tensors.get(key)
                self.tensors[key] = tensor if known is None else torch.cat((known, tensor))

    def save(self, folder: Path, rank: int = 0) -> None:
        """Write what one rank recorded."""
        from safetensors.torch import save_file

        folder.mkdir(parents=True, exist_ok=True)
        # Clones: without a prescription two kinds are one tensor, which the format refuses.
        tensors = {key: tensor.contiguous().clone() for key, tensor in self.tensors.items()}
        save_file(tensors, str(folder / f"{rank}.routing"))


def read_experts(folder: str | Path | None) -> dict[int, Experts]:
    """Length of a row -> the experts that a recorded run chose for the rows of that length; empty without experts."""
    chosen: dict[int, Experts] = {}
    for _, layer, length, tensor in _entries(folder, EXPERTS):
        chosen.setdefault(length, {})[layer] = tensor
    return chosen


def can_replay(experts: Mapping[int, torch.Tensor], routers: Mapping[int, Any]) -> bool:
    """Whether the other side's choice can be replayed.

    A router that chooses another number of experts, or is none of the other side's, goes by its own choice.

    Args:
        experts: Layer -> experts of the other side.
        routers: Layer -> router of megatron-core.
    """
    return all(layer in experts and experts[layer].size(-1) == router.topk for layer, router in routers.items())


def read_router_logits(folder: Path | None) -> dict[int, list[torch.Tensor]]:
    """Layer -> router logits, fp32 [tokens, experts], on each rank that holds the layer; they should all be the same.

    The tokens of rows of one length follow one another, shorter rows first.
    """
    return _by_layer(folder, LOGITS)


def _by_layer(folder: Path | None, kind: str) -> dict[int, list[torch.Tensor]]:
    parts: dict[tuple[int, str], dict[int, torch.Tensor]] = {}
    for rank, layer, length, tensor in _entries(folder, kind):
        parts.setdefault((layer, rank), {})[length] = tensor.flatten(0, 1)
    copies: dict[int, list[torch.Tensor]] = {}
    for (layer, _), groups in sorted(parts.items()):
        copies.setdefault(layer, []).append(torch.cat([groups[length] for length in sorted(groups)]))
    return copies


def _entries(folder: str | Path | None, kind: str) -> Iterator[tuple[str, int, int, torch.Tensor]]:
    """Rank, layer, length of the rows, tensor."""
    from safetensors.torch import load_file

    for path in sorted(Path(folder).glob("*.routing")) if folder is not None else ():
        for key, tensor in load_file(str(path)).items():
            found, layer, length = key.split(".")
            if found == kind:
                yield path.stem, int(layer), int(length), tensor


# transformers ---------------------------------------------------------------------------------------------------------


def is_router(module: torch.nn.Module) -> bool:
    """Whether a module chooses experts; in both libraries the class says so."""
    return type(module).__name__.endswith("Router")


def decoder_layers(model: Any) -> list[Any]:
    """The decoder layers of a transformers model, first to last; a split Llama has them in two groups."""
    decoder = model.get_decoder()
    if hasattr(decoder, "layers_first"):
        return [*decoder.layers_first, *decoder.layers_last]
    return list(decoder.layers)


def hf_routers(model: Any, further: Sequence[Any] = ()) -> dict[int, torch.nn.Module]:
    """Layer number, from 0 -> router of a transformers model.

    Args:
        model: The model.
        further: Layers that follow its own ones.

    Raises:
        UnsupportedError: A layer has experts and no router that is a module of its own.
    """
    found = {}
    for number, layer in enumerate([*decoder_layers(model), *further]):
        routers = [module for module in layer.modules() if is_router(module)]
        experts = [module for module in layer.modules() if type(module).__name__.endswith("Experts")]
        if len(routers) == 1:
            found[number] = routers[0]
        elif routers or experts:
            what = f"{len(routers)} routers in layer {number} of {type(model).__name__}: its routing cannot be replayed"
            raise UnsupportedError(what, hint="--no-replay compares without")
    return found


class _RouterCall(TorchFunctionMode):
    """While a router runs: takes its logits, and puts prescribed experts in place of its choice if they are as many.

    A token with a negative number is left to the router, as in megatron-core (`moe.Router.replay`).

    Every router of transformers takes a softmax or sigmoids of its logits and calls topk, or calls topk first and takes
    a softmax of what it chose. But they return different things; what follows (renormalising, scales of experts) stays
    the router's own. A router that chooses groups first calls topk for these, too, on tensors of another shape.
    """

    def __init__(self, prescribed: torch.Tensor | None) -> None:
        super().__init__()
        self.prescribed = prescribed
        self.logits = self.experts = self.own = torch.empty(0)
        self.scores: torch.Tensor | None = None
        self.whole: torch.Tensor | None = None
        self.groups: torch.Tensor | None = None
        self._by_score = self._chosen_first = False

    def start(self, *_: Any) -> None:
        """Forward pre-hook of the router."""
        self.logits = torch.empty(0)
        super().__enter__()  # type: ignore[no-untyped-call]

    def stop(self, *_: Any) -> None:
        """Forward hook of the router."""
        super().__exit__(None, None, None)  # type: ignore[no-untyped-call]

    def __torch_function__(
        self, function: Any, types: Any, arguments: Any = (), options: dict[str, Any] | None = None
    ) -> Any:
        result = function(*arguments, **(options or {}))
        name = getattr(function, "__name__", None)
        if name == TOPK and not self.logits.numel():  # a softmax over the chosen experts alone follows
            self.logits, self._by_score, self._chosen_first = arguments[0], False, True
        if name in (SOFTMAX, SIGMOID) and not self._chosen_first:
            self.logits, self._by_score = arguments[0], name == SIGMOID
        elif name == TOPK and arguments[0].shape == self.logits.shape:
            self.own = result.indices
            self.scores = arguments[0] if self._by_score else None
            if self.prescribed is not None and self.prescribed.size(-1) == result.indices.size(-1):
                scores = arguments[0]
                experts = self.prescribed.to(scores.device).view(len(scores), -1)
                experts = torch.where((experts >= 0).all(-1, keepdim=True), experts, result.indices)
                result = torch.return_types.topk((scores.gather(-1, experts), experts))
            self.experts = result.indices
        elif name == TOPK and arguments[0].dim() == 3:  # the best of each group
            self.whole = arguments[0].flatten(1)
        elif name == TOPK and self.whole is not None:
            self.groups = arguments[0]
        return result


@contextmanager
def hf_routing(
    routers: Mapping[int, torch.nn.Module], batch: int, length: int, record: Record | None, replay: Experts | None
) -> Iterator[None]:
    """Record and prescribe the routing of one forward pass of a transformers model.

    Args:
        routers: From `hf_routers`.
        batch: Rows of the pass.
        length: Tokens of each.
        record: Where to put what was seen and chosen, or None.
        replay: Experts of the rows, or None for the routers' own choice.
    """
    calls = {layer: _RouterCall(None if replay is None else replay[layer]) for layer in routers}
    with ExitStack() as stack:
        for layer, router in routers.items():
            stack.callback(router.register_forward_pre_hook(calls[layer].start).remove)
            stack.callback(router.register_forward_hook(calls[layer].stop, always_call=True).remove)
        yield
    if record is not None:
        kinds = (
            {layer: call.logits.float() for layer, call in calls.items()},
            {layer: call.experts for layer, call in calls.items()},
            {layer: call.own for layer, call in calls.items()},
            {layer: call.scores.float() for layer, call in calls.items() if call.scores is not None},
            {layer: call.whole.float() for layer, call in calls.items() if call.whole is not None},
            {layer: call.groups.float() for layer, call in calls.items() if call.groups is not None},
        )
        record.add(
            *({layer: part.detach().cpu().view(batch, length, -1) for layer, part in kind.items()} for kind in kinds)
        )


# Judging --------------------------------------------------------------------------------------------------------------


def judge_routing(exact: Run, low: Run | None, found: Run, tolerance: float) -> RoutingReport | None:
    """Compare the routers of two runs; the candidate was given the reference's experts.

    In fp32 router logits pass as the model's logits do, within a tolerance. Below, the candidate's error in a layer is
    measured in units of the reference's own. A token for which the candidate would have chosen other experts is let
    pass only if the reference itself holds them equal within the noise: in fp32 twice the tolerance, below twice the
    reference's own largest error in that layer (two logits may be off in opposite directions). It holds them equal by
    what it chose them by, its scores where it has a bias or groups. An expert of a group that it did not choose counts
    only where it holds that group equal to one that it chose; see `Groups`.

    Args:
        exact: The reference in fp32.
        low: The reference in the candidate's dtype with the same experts, or None in fp32.
        found: The candidate.
        tolerance: Largest error in fp32, over the largest |logit| of a router.

    Returns:
        The figures, or None if neither side has experts.
    """
    expected, candidate = read_router_logits(exact.routing), read_router_logits(found.routing)
    chosen, own = _by_layer(exact.routing, EXPERTS), _by_layer(found.routing, OWN)
    layers = sorted(expected.keys() | candidate.keys())
    if not layers:
        return None
    noise = read_router_logits(low.routing) if low is not None else {}
    scores = _by_layer(exact.routing, SCORES)
    rough_scores = _by_layer(low.routing, SCORES) if low is not None else {}
    whole, groups = _by_layer(exact.routing, WHOLE), _by_layer(exact.routing, GROUPS)
    rough_groups = _by_layer(low.routing, GROUPS) if low is not None else {}
    judged = []
    for layer in layers:
        if layer in expected and layer in candidate and expected[layer][0].shape == candidate[layer][0].shape:
            rough = noise[layer][0] if low is not None else None
            order = Order(
                scores.get(layer, expected[layer])[0],
                None if low is None else rough_scores.get(layer, noise[layer])[0],
                chosen[layer][0],
                Groups(whole[layer][0], groups[layer][0], None if low is None else rough_groups[layer][0], tolerance)
                if layer in groups
                else None,
            )
            copies = [
                _judge_layer(layer, expected[layer][0], rough, copy, order, choice, tolerance)
                for copy, choice in zip(candidate[layer], own[layer], strict=True)
            ]
            judged.append(max(copies, key=lambda copy: (copy.disagreements, copy.relative_error)))
        else:  # one side has no such router
            judged.append(RouterLayer(layer, math.inf, None if low is None else math.inf, 0, 1, math.inf, 0.0))
    counts = {
        side: max((copies[0].size(-1) for copies in experts.values()), default=0)
        for side, experts in (("reference", chosen), ("candidate", own))
    }
    tokens = len(next(iter(expected.values() or candidate.values()))[0])
    return RoutingReport(tokens, counts, tolerance, MEDIAN_LIMIT, P99_LIMIT, judged)


@dataclass(frozen=True)
class Order:
    """What a reference's router chose.

    Attributes:
        exact: Fp32 [tokens, experts], by which it chose: logits or scores; -inf for an expert that it could not choose.
        low: The same in the candidate's dtype, or None in fp32.
        chosen: Its choice, [tokens, experts per token].
        groups: The groups of experts that it chose among, or None.
    """

    exact: torch.Tensor
    low: torch.Tensor | None
    chosen: torch.Tensor
    groups: Groups | None = None

    def margins(self, own: torch.Tensor, limit: float) -> torch.Tensor:
        """As `_margins` over the scale, for another choice; groups held equal have margins up to `limit`."""
        margins = _margins(self.exact, self.chosen, own) / self.scale
        if self.groups is None:
            return margins
        return torch.where(margins.isinf(), self.groups.margins(self.exact, own, self.scale, limit), margins)

    @property
    def scale(self) -> float:
        """The largest of these numbers."""
        return _largest(self.exact) or 1.0

    def limit(self, tolerance: float) -> float:
        """The largest margin between experts that it holds equal, over the largest number."""
        if self.low is None:
            return 2 * tolerance
        rounding = (self.low - self.exact).double()
        return 2 * _largest(rounding) / self.scale


@dataclass(frozen=True)
class Groups:
    """The groups of experts among which a reference's router chose first.

    Attributes:
        whole: Fp32 [tokens, experts], its scores of all experts.
        scores: Fp32 [tokens, groups], its scores of the groups.
        low: The same in the candidate's dtype, or None in fp32.
        tolerance: Largest error in fp32, over the largest of these numbers.
    """

    whole: torch.Tensor
    scores: torch.Tensor
    low: torch.Tensor | None
    tolerance: float

    def margins(self, exact: torch.Tensor, own: torch.Tensor, scale: float, limit: float) -> torch.Tensor:
        """Margins of a choice with experts of groups that the reference did not choose.

        The groups that are new take the place of the worst that the reference chose and the choice does not use. Among
        the experts of these groups the reference would have chosen otherwise, and that is what the choice must agree
        with.

        Args:
            exact: Scores [tokens, experts], -inf for experts that the reference could not choose.
            own: The other choice, [tokens, experts per token].
            scale: The largest score.
            limit: Margin over the scale up to which experts are held equal.

        Returns:
            For each token the larger of the margins of groups and experts, over the scale; that of groups in units in
            which `limit` is what separates equal ones. Infinite where more groups are used than the router may.
        """
        count = self.scores.size(-1)
        size = self.whole.size(-1) // count
        chosen = exact.isfinite().view(-1, count, size).any(-1)
        used = torch.zeros_like(chosen).scatter(-1, own // size, True)
        new, left = used & ~chosen, chosen & ~used
        # As many as are new, the worst first.
        rank = self.scores.masked_fill(~left, math.inf).argsort(-1).argsort(-1)
        lost = left & (rank < new.sum(-1, keepdim=True))
        fits = lost.sum(-1) == new.sum(-1)
        gap = self.scores.masked_fill(~lost, -math.inf).amax(-1) - self.scores.masked_fill(~new, math.inf).amin(-1)
        allowed = ((chosen & ~lost) | new).repeat_interleave(size, -1)
        alternative = self.whole.masked_fill(~allowed, -math.inf)
        margins = _margins(alternative, alternative.topk(own.size(-1)).indices, own).clamp(min=0.0) / scale
        gaps = gap.clamp(min=0.0) * (limit / self._equal if self._equal > 0 else math.inf)
        return torch.where(fits, torch.maximum(margins, gaps.nan_to_num(nan=0.0)), math.inf)

    @property
    def _equal(self) -> float:
        """The largest difference of groups that are held equal."""
        if self.low is None:
            return 2 * self.tolerance * float(self.scores.abs().max())
        return 2 * float((self.low - self.scores).double().abs().max())


def _judge_layer(
    layer: int,
    exact: torch.Tensor,
    low: torch.Tensor | None,
    found: torch.Tensor,
    order: Order,
    own: torch.Tensor,
    tolerance: float,
) -> RouterLayer:
    """One router: logits [tokens, experts] of the three runs, and the choices of reference and candidate."""
    scale = float(exact.abs().max()) or 1.0
    error = (found - exact).double().nan_to_num(nan=math.inf)
    ratio, limit = None, order.limit(tolerance)
    if low is not None:
        rounding = (low - exact).double()
        ratio = _ratio(float(error.square().mean().sqrt()), float(rounding.square().mean().sqrt()))
    margins = order.margins(own, limit)
    differ = margins[margins >= 0]
    beyond = int((~(differ <= limit)).sum())
    return RouterLayer(
        layer=layer,
        relative_error=float(error.abs().max()) / scale,
        noise_ratio=ratio,
        near_ties=len(differ) - beyond,
        disagreements=beyond,
        largest_margin=float(differ.max()) if len(differ) else 0.0,
        margin_limit=limit,
    )


def _ratio(theirs: float, own: float) -> float:
    if theirs == 0:
        return 0.0  # nothing to measure, in whatever units
    return theirs / own if own > 0 and math.isfinite(own) and math.isfinite(theirs) else math.inf


def _largest(numbers: torch.Tensor) -> float:
    """The largest magnitude of those that are finite; 0 if none is."""
    finite = numbers[numbers.isfinite()]
    return float(finite.abs().max()) if finite.numel() else 0.0


def _margins(logits: torch.Tensor, chosen: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """The margin by which a router prefers its choice to another one; -1 where both are the same.

    Args:
        logits: What it chose by, [tokens, experts].
        chosen: Its choice, [tokens, experts per token].
        other: Another choice, of any width.

    Returns:
        For each token the best expert that only `chosen` has, less the worst that only `other` has.
    """
    ours, theirs = (torch.zeros_like(logits, dtype=torch.bool).scatter(-1, part, True) for part in (chosen, other))
    best = logits.masked_fill(~(ours & ~theirs), -math.inf).amax(-1)
    worst = logits.masked_fill(~(theirs & ~ours), math.inf).amin(-1)
    margins = torch.where(best.isinf() | worst.isinf(), math.inf, (best - worst).clamp(min=0.0))
    return torch.where((ours == theirs).all(-1), -1.0, margins)
