"""LoRA adapters on megatron-core's linears: parallel modules that add `scale * B A x` to what a linear gives.

In DoRA the sum is then scaled, row by row of the weight, to the lengths that the adapter stores. A row counts whole: of
a row-parallel linear every rank has a part of it.

The modules, and the names of their weights, are those of the three layouts (see `tables.lora`). The factors are
megatron-core's `ColumnParallelLinear` and `RowParallelLinear`; in the layout `peft`, the factor that every rank holds
whole is a `torch.nn.Linear`.

Source: `ParallelLinearAdapter` and `LoRALinearSplitQKV` of Megatron-Bridge, `LoraParallelLinear` of mcore-bridge.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.parallel_state import get_tensor_model_parallel_group
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    gather_from_tensor_model_parallel_region,
    reduce_from_tensor_model_parallel_region,
    scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.attention import SelfAttention

from ckptkit.errors import InputError, UnsupportedError
from ckptkit.megatron.compat import runs_on
from ckptkit.megatron.decoder import NormedRowParallelLinear
from ckptkit.megatron.gemma4.layer import ReplicatedLinear
from ckptkit.megatron.moe import Router
from ckptkit.tables.lora import A, B

_NAME = re.compile(
    r"(?P<linear>.+?)\.(?:adapter\.(?:adapter_(?P<part>\w+)\.)?linear_(?P<way>in|out)|lora_(?P<side>[AB])\.default)\.weight"
)
_LENGTHS = re.compile(r"(?P<linear>.+?)\.adapter\.weight_magnitude")
_PARTS = {("q", "k", "v"), ("gate", "up")}


WHOLE = (ReplicatedLinear, Router)
"""Modules whose weight every tensor parallel rank holds whole."""
LINEARS = (ColumnParallelLinear, RowParallelLinear, *WHOLE)
"""Modules that can have an adapter."""


class Pair(torch.nn.Module):
    """A and B beside one linear, divided over its tensor parallel ranks as the linear is.

    Args:
        linear: megatron-core's linear.
        rank: Rank of the factors, over all ranks.
        rows: Rows of B over all ranks.

    Attributes:
        linear_in: A.
        linear_out: B.
    """

    def __init__(self, linear: Any, rank: int, rows: int) -> None:
        super().__init__()
        self._about = _About.of(linear)
        self.linear_in, self.linear_out = self._factors(rank, rows)

    def _factors(self, rank: int, rows: int) -> tuple[torch.nn.Module, torch.nn.Module]:
        about = self._about
        if about.by_columns:
            return about.row(rank), about.column(rank, rows, about.unsplit)
        return about.column_in(rank), about.column(rank, rows, about.unsplit)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """What the linear is given -> B A of it, divided as the linear's output is."""
        about = self._about
        if not about.by_columns:
            states = about.whole_states(states)
            low = gather_from_tensor_model_parallel_region(self.linear_in(states)[0], group=about.group)
            return about.gathered(self.linear_out(about.summed_back(low))[0])
        low = self.linear_in(states)[0]
        if about.partial:  # outputs of experts are sums over ranks, which megatron-core adds up later
            low = reduce_from_tensor_model_parallel_region(low, group=about.group)
            own = self.linear_out(about.summed_back(low))[0]
            at, size = about.group.rank(), own.shape[-1]
            padded: torch.Tensor = F.pad(own, (at * size, (about.group.size() - 1 - at) * size))
            return padded
        low = about.whole_sequence(low)
        out = gather_from_tensor_model_parallel_region(self.linear_out(low)[0], group=about.group)
        if about.splits_sequence:
            out = scatter_to_sequence_parallel_region(out, group=about.group)
        whole: torch.Tensor = out
        return whole


class DoraPair(Pair):
    """A pair with the lengths of the rows of what the linear and the pair compute together.

    Args:
        linear: megatron-core's linear.
        rank: Rank of the factors, over all ranks.
        rows: Rows of B over all ranks.

    Attributes:
        weight_magnitude: The lengths of this rank's rows, [rows]; all of them where ranks hold columns.

    Source: `DoraLinearLayer.forward` of peft.
    """

    def __init__(self, linear: Any, rank: int, rows: int) -> None:
        super().__init__(linear, rank, rows)
        lengths = torch.empty(linear.weight.shape[0], dtype=linear.config.params_dtype)
        self.weight_magnitude = torch.nn.Parameter(lengths)

    def ratios(self, weight: torch.Tensor, scale: float) -> torch.Tensor:
        """What each row of the sum is multiplied by to get its length, [rows].

        Args:
            weight: This rank's part of the weight.
            scale: The factor of B A.
        """
        about = self._about
        a: Any = self.linear_in.weight
        b: Any = self.linear_out.weight
        if not about.by_columns:
            a = about.all_rows(a)
        if about.by_columns or about.replicated:
            b = about.all_rows(b)
        squares: torch.Tensor = (weight + scale * (b @ a)).square().sum(dim=1)
        if about.by_columns:
            squares = reduce_from_tensor_model_parallel_region(squares, group=about.group)
        return self.weight_magnitude / squares.sqrt()

    def whole(self, rows: torch.Tensor) -> torch.Tensor:
        """A number for each of this rank's rows -> one for each column of the linear's output."""
        about = self._about
        if about.replicated or not about.gathers:
            return rows
        found: torch.Tensor = gather_from_tensor_model_parallel_region(rows, group=about.group)
        return found


class HalfWholePair(Pair):
    """A pair of which only the factor beside the divided axis of the linear is divided (the layout `peft`)."""

    def _factors(self, rank: int, rows: int) -> tuple[torch.nn.Module, torch.nn.Module]:
        about = self._about
        if about.replicated:
            return about.whole(about.input_size, rank), about.whole(rank, rows)
        if about.by_columns:
            return about.row(rank), about.whole(rank, rows)
        return about.whole(about.input_size, rank), about.column(rank, rows, about.unsplit)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """As `Pair.forward`."""
        about = self._about
        if about.by_columns:
            # Sums over ranks are added up in between, or, for experts, by megatron-core later: B is linear.
            out: torch.Tensor = self.linear_out(self.linear_in(states)[0])
            return out
        low: torch.Tensor = self.linear_in(states)
        if about.replicated:
            whole: torch.Tensor = self.linear_out(low)
            return whole
        return about.gathered(self.linear_out(about.whole_sequence(low))[0])


class _Whole(torch.nn.Linear):
    """A factor that every rank holds whole. Where each has seen a part of what it is for, their gradients are summed.

    Args:
        about: The linear that it is beside.
        into: Width of the input.
        out: Width of the output.
    """

    def __init__(self, about: _About, into: int, out: int) -> None:
        super().__init__(into, out, bias=False, dtype=about.config.params_dtype)
        self._about = about
        # megatron-core reads both marks: whose gradients it sums over tensor parallel ranks, and over which replicas.
        self.weight.sequence_parallel = about.splits_sequence  # type: ignore[attr-defined]
        self.weight.allreduce = about.replicated_over_experts  # type: ignore[attr-defined]

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """As of any linear."""
        return F.linear(states, self._about.summed_back(self.weight))


@dataclass(frozen=True)
class _About:
    """How a linear is divided, and linears that fit beside it.

    Attributes:
        config: Megatron's config.
        unsplit: The same for inputs that hold the whole sequence.
        by_columns: Whether ranks hold columns of the weight (row-parallel).
        replicated: Whether all ranks hold the whole weight.
        apart: Whether megatron-core exchanges tokens around it: outputs of a row-parallel one, and gradients of what
            goes into a column-parallel one, are sums over the ranks that are still to be added up.
        splits_sequence: Whether the sequence is divided over the ranks outside of linears.
        gathers: Whether its output has all columns.
        expert: Whether it is an expert's.
        replicated_over_experts: Whether expert parallel ranks hold copies of it.
        input_size: Width of the input over all ranks.
        output_size: Width of the output over all ranks.
        group: The tensor parallel ranks.
    """

    config: Any
    unsplit: Any
    by_columns: bool
    replicated: bool
    apart: bool
    splits_sequence: bool
    gathers: bool
    expert: bool
    replicated_over_experts: bool
    input_size: int
    output_size: int
    group: Any

    @classmethod
    def of(cls, linear: Any) -> _About:
        unsplit = copy.copy(linear.config)
        unsplit.sequence_parallel = False
        replicated, by_columns = isinstance(linear, WHOLE), isinstance(linear, RowParallelLinear)
        apart = not replicated and linear.explicit_expert_comm
        return cls(
            config=linear.config,
            unsplit=unsplit,
            by_columns=by_columns,
            replicated=replicated,
            apart=apart,
            splits_sequence=linear.config.sequence_parallel if replicated else linear.sequence_parallel and not apart,
            gathers=replicated or (not by_columns and linear.gather_output),
            expert=not replicated and linear.is_expert,
            replicated_over_experts=getattr(linear.weight, "allreduce", True),
            input_size=linear.weight.shape[1] if replicated else linear.input_size,
            output_size=linear.weight.shape[0] if replicated else linear.output_size,
            group=get_tensor_model_parallel_group() if replicated else linear.tp_group,
        )

    def column(self, into: int, out: int, config: Any, **options: Any) -> ColumnParallelLinear:
        return ColumnParallelLinear(into, out, config=config, gather_output=False, **self._common, **options)

    def column_in(self, rank: int) -> ColumnParallelLinear:
        """A column-parallel A."""
        if self.replicated and self.splits_sequence:
            return self.column(self.input_size, rank, self.unsplit, disable_grad_reduce=True)
        return self.column(self.input_size, rank, self.config)

    def whole_states(self, states: torch.Tensor) -> torch.Tensor:
        """What goes into a column-parallel A: beside a replicated linear that has a part of the sequence, the whole.

        A linear of megatron-core would gather it into a buffer that all of them share. There the dispatcher of tokens
        keeps the gradients of a router's input until those of the router are added.
        """
        if not (self.replicated and self.splits_sequence):
            return states
        whole: torch.Tensor = gather_from_sequence_parallel_region(states, group=self.group)
        return whole

    def row(self, out: int) -> RowParallelLinear:
        return RowParallelLinear(
            self.input_size, out, config=self.config, input_is_parallel=True, skip_bias_add=True, **self._common
        )

    def whole(self, into: int, out: int) -> torch.nn.Linear:
        return _Whole(self, into, out)

    @property
    def _common(self) -> dict[str, Any]:
        options = {"init_method": self.config.init_method, "bias": False}
        return {**options, "is_expert": self.expert, "tp_group": self.group}

    def all_rows(self, factor: torch.Tensor) -> torch.Tensor:
        """A factor whose rows are divided, whole."""
        whole: torch.Tensor = gather_from_tensor_model_parallel_region(factor.T, group=self.group).T
        return whole

    @property
    def partial(self) -> bool:
        """Whether its outputs are sums over the ranks that are still to be added up."""
        return self.by_columns and self.apart

    def summed_back(self, tensor: torch.Tensor) -> torch.Tensor:
        """The same; its gradients are summed over the ranks where megatron-core's linears leave that to others."""
        if not self.apart:
            return tensor
        same: torch.Tensor = copy_to_tensor_model_parallel_region(tensor, group=self.group)
        return same

    def whole_sequence(self, low: torch.Tensor) -> torch.Tensor:
        """What goes into a column-parallel factor, which sums the gradients of its input itself."""
        if not self.splits_sequence:
            return low
        whole: torch.Tensor = gather_from_sequence_parallel_region(
            low, tensor_parallel_output_grad=False, group=self.group
        )
        return whole

    def gathered(self, output: torch.Tensor) -> torch.Tensor:
        if not self.gathers:
            return output
        whole: torch.Tensor = gather_from_tensor_model_parallel_region(output, group=self.group)
        split = self.replicated and self.splits_sequence
        return scatter_to_sequence_parallel_region(whole, group=self.group) if split else whole


@dataclass
class _Found:
    """The factors of one linear among the names of a rank's tensors.

    Attributes:
        peft: Whether they have PEFT's names.
        shapes: Word of a part, or an empty string -> side -> shape of this rank's factor.
        lengths: Whether there are lengths of rows, too (DoRA).
    """

    peft: bool
    shapes: dict[str, dict[str, Sequence[int]]] = field(default_factory=dict)
    lengths: bool = False


def is_factor(name: str) -> bool:
    """Whether a parameter of a chunk is a factor of an adapter."""
    return _NAME.fullmatch(name) is not None


def attach(
    chunk: torch.nn.Module,
    factors: Mapping[str, Sequence[int]],
    scale: float,
    device: torch.device,
    *,
    where: object = None,
) -> None:
    """Puts a pair of factors beside each linear that has one. Their weights hold no values yet: load them strictly.

    Args:
        chunk: From `model.build_chunks`.
        factors: Name of a factor of this rank, or of its lengths of rows (DoRA), in a layout of `tables.lora` -> its
            shape.
        scale: The factor of B A.
        device: Where the factors live.
        where: Name of their source in an error.

    Raises:
        InputError: A factor has no other, or its shape fits no linear.
        UnsupportedError: There is no such linear in the runtime.
    """
    modules = dict(chunk.named_modules())
    with runs_on(device):
        for name, found in _by_linear(factors, where).items():
            linear = modules.get(name)
            if not isinstance(linear, LINEARS):
                raise UnsupportedError(f"the runtime has no linear {name} that could have an adapter", where=where)
            added = _add_modules(linear, name, found, modules, where)
            _change_output(linear, _scaled_rows(linear, added, scale) if found.lengths else _sum(added, scale))
    chunk.to(device)
    chunk.eval()


def _by_linear(factors: Mapping[str, Sequence[int]], where: object) -> dict[str, _Found]:
    found: dict[str, _Found] = {}
    for name, shape in factors.items():
        if lengths := _LENGTHS.fullmatch(name):
            found.setdefault(lengths["linear"], _Found(peft=False)).lengths = True
            continue
        match = _NAME.fullmatch(name)
        if match is None or len(shape) != 2:
            raise InputError(f"{name} {list(shape)} is no factor of an adapter", where=where)
        one = found.setdefault(match["linear"], _Found(match["side"] is not None))
        side = match["side"] or {"in": A, "out": B}[match["way"]]
        one.shapes.setdefault(match["part"] or "", {})[side] = shape
    for linear, one in found.items():
        if not one.shapes or any(len(sides) < 2 for sides in one.shapes.values()):
            raise InputError(f"{linear} has only one of the two factors", where=where, hint="is the adapter complete?")
    return found


def _add_modules(
    linear: Any, name: str, found: _Found, modules: Mapping[str, torch.nn.Module], where: object
) -> Callable[[torch.Tensor], torch.Tensor]:
    """The modules under the names that a layout gives them. Returns what they compute together."""
    about = _About.of(linear)
    size = about.group.size()
    divides_a = not (found.peft or about.by_columns)
    divides_b = not (found.peft and (about.by_columns or about.replicated))
    kind = DoraPair if found.lengths else HalfWholePair if found.peft else Pair
    if found.lengths and linear.weight is None:
        raise UnsupportedError(f"{name} takes its weight from elsewhere, and the runtime has no DoRA for it")
    pairs: dict[str, Pair] = {}
    for part, sides in found.shapes.items():
        rank, rows = sides[A][0] * (size if divides_a else 1), sides[B][0] * (size if divides_b else 1)
        if not part and rows != about.output_size:
            raise InputError(f"B of {name} has {rows} rows, the linear has {about.output_size}", where=where)
        pairs[part] = kind(linear, rank, rows)
    if "" in pairs:
        if len(pairs) > 1:
            raise InputError(f"{name} has an adapter for the whole and for parts", where=where)
        pair = pairs[""]
        if found.peft:
            linear.lora_A = torch.nn.ModuleDict({"default": pair.linear_in})
            linear.lora_B = torch.nn.ModuleDict({"default": pair.linear_out})
        else:
            linear.adapter = pair
        return pair
    linear.adapter = torch.nn.ModuleDict({f"adapter_{part}": pair for part, pair in pairs.items()})
    return _joined(linear, name, pairs, modules)


def _joined(
    linear: Any, name: str, pairs: Mapping[str, Pair], modules: Mapping[str, torch.nn.Module]
) -> Callable[[torch.Tensor], torch.Tensor]:
    """The outputs of the adapters of parts, in the order in which the linear's rows have the parts."""
    words = next((words for words in _PARTS if pairs.keys() <= set(words)), None)
    if words is None:
        raise UnsupportedError(
            f"adapters for {', '.join(pairs)} of {name}, which no library has: one for the whole of it runs",
            hint="convert it with --adapter-layout fused",
        )
    attention = modules[name.rpartition(".")[0]]
    if words[0] == "q":
        if not isinstance(attention, SelfAttention):
            raise UnsupportedError(f"{name} is no linear of an attention, and has adapters of q, k and v")
        groups, width = attention.num_query_groups_per_partition, attention.hidden_size_per_attention_head
        heads = attention.num_attention_heads_per_partition
        if heads * width + 2 * groups * width != linear.output_size_per_partition:
            raise UnsupportedError(f"{name} has more rows than q, k and v, and adapters of these")
        rows = {"q": heads * width, "k": groups * width, "v": groups * width}
    else:
        groups, rows = 1, dict.fromkeys(words, linear.output_size_per_partition // 2)

    def outputs(states: torch.Tensor) -> torch.Tensor:
        found = {part: pair(states) for part, pair in pairs.items()}
        some = next(iter(found.values()))
        parts = [found[word] if word in found else some.new_zeros((*some.shape[:-1], rows[word])) for word in words]
        blocks = [part.unflatten(-1, (groups, -1)) for part in parts]
        return torch.cat(blocks, dim=-1).flatten(-2)

    return outputs


Change = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""What a linear gives, and what it was given -> what it gives with its adapter."""


def _sum(added: Callable[[torch.Tensor], torch.Tensor], scale: float) -> Change:
    return lambda output, states: output + scale * added(states)


def _scaled_rows(linear: Any, pair: Any, scale: float) -> Change:
    """The change of DoRA. A bias is not scaled."""

    def change(output: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
        ratios: torch.Tensor = pair.whole(pair.ratios(linear.weight, scale))
        bias = None if getattr(linear, "skip_bias_add", True) or linear.bias is None else pair.whole(linear.bias)
        total: torch.Tensor = (output if bias is None else output - bias) + scale * pair(states)
        return total * ratios if bias is None else total * ratios + bias

    return change


def _change_output(linear: torch.nn.Module, change: Change) -> None:
    if isinstance(linear, NormedRowParallelLinear | Router):
        linear.adapted = change
        return

    def hook(module: torch.nn.Module, inputs: tuple[Any, ...], output: Any) -> Any:
        if isinstance(output, torch.Tensor):
            return change(output, inputs[0])
        return change(output[0], inputs[0]), output[1]

    linear.register_forward_hook(hook, prepend=True)  # before the cap of the logits, which is a hook, too
