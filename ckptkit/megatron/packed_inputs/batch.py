"""Packed inputs: sequences of different lengths one after the other, without padding between them.

A batch is `input_ids` (total_nnz,), `cu_seqlens` (batch + 1,) with the first token of each sequence and the end of the
last one, and `max_seqlen`. A padded batch (batch, sequence) with an `attention_mask` becomes one, and what comes out is
padded again.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from functools import cached_property

import torch
from megatron.core.packed_seq_params import PackedSeqParams

from ckptkit.errors import UsageError


@dataclass(frozen=True, eq=False)
class PackedBatch:
    """Sequences in one row.

    Attributes:
        input_ids: Token ids, int64 (total_nnz,).
        cu_seqlens: Bounds of the sequences, (batch + 1,), from 0 to total_nnz; two alike bound an empty one. May be
            given as int32 or int64, and is kept as int32, which kernels take.
        max_seqlen: Length of the longest sequence, or more.

    Raises:
        UsageError: The three do not describe a batch.
    """

    input_ids: torch.Tensor
    cu_seqlens: torch.Tensor
    max_seqlen: int

    def __post_init__(self) -> None:
        if self.input_ids.dim() != 1:
            raise UsageError(f"packed input_ids have one axis, not the shape {list(self.input_ids.shape)}")
        whole = self.cu_seqlens.dtype in (torch.int32, torch.int64)
        if self.cu_seqlens.dim() != 1 or not whole or not len(self.cu_seqlens):
            raise UsageError(
                "cu_seqlens must be int32 or int64 (batch + 1,),"
                f" not {self.cu_seqlens.dtype} {list(self.cu_seqlens.shape)}"
            )
        bounds, total = self.bounds, len(self.input_ids)
        if bounds[0] != 0 or bounds[-1] != total or sorted(bounds) != bounds:
            raise UsageError(f"cu_seqlens must rise from 0 to the number of tokens, {total}; they are {_some(bounds)}")
        if self.longest > self.max_seqlen:
            raise UsageError(f"max_seqlen is {self.max_seqlen}, but a sequence has {self.longest} tokens")
        object.__setattr__(self, "cu_seqlens", self.cu_seqlens.to(torch.int32))  # which holds all values, as checked

    @classmethod
    def of_rows(cls, rows: list[list[int]], device: torch.device | None = None) -> PackedBatch:
        """Lists of token ids, packed."""
        lengths = [len(row) for row in rows]
        tokens = torch.tensor([token for row in rows for token in row], dtype=torch.int64, device=device)
        return cls(tokens, _cumulated(torch.tensor(lengths, dtype=torch.int32, device=device)), max(lengths, default=0))

    @cached_property
    def bounds(self) -> list[int]:
        """`cu_seqlens` in host memory."""
        bounds: list[int] = self.cu_seqlens.tolist()
        return bounds

    @property
    def lengths(self) -> list[int]:
        """Length of each sequence."""
        return [end - start for start, end in zip(self.bounds, self.bounds[1:], strict=False)]

    @property
    def longest(self) -> int:
        """Length of the longest sequence."""
        return max(self.lengths, default=0)

    @property
    def total(self) -> int:
        """Number of tokens, `total_nnz`."""
        return len(self.input_ids)

    @property
    def positions(self) -> torch.Tensor:
        """Position of each token in its sequence, int64 (total_nnz,)."""
        lengths = self.cu_seqlens.diff()
        starts = torch.repeat_interleave(self.cu_seqlens[:-1], lengths, output_size=self.total)
        return torch.arange(self.total, device=self.input_ids.device) - starts

    def to(self, device: torch.device) -> PackedBatch:
        """The same batch on another device."""
        return PackedBatch(self.input_ids.to(device), self.cu_seqlens.to(device), self.max_seqlen)

    def filled(self, multiple: int) -> PackedBatch:
        """With a sequence of token 0 at the end where that makes the number of tokens a positive multiple.

        As a sequence of its own it is seen by no other.
        """
        missing = max(multiple, -(-self.total // multiple) * multiple) - self.total
        if not missing:
            return self
        end = self.cu_seqlens.new_tensor([self.total + missing])
        return PackedBatch(
            torch.cat((self.input_ids, self.input_ids.new_zeros(missing))),
            torch.cat((self.cu_seqlens, end)),
            max(self.max_seqlen, missing),
        )

    def each_filled(self, multiple: int) -> tuple[PackedBatch, torch.Tensor]:
        """With token 0 behind every sequence whose length is no multiple, which no token before it sees.

        Returns:
            The batch, and where the tokens of this one are in it, int64 (total_nnz,).
        """
        lengths = [-(-length // multiple) * multiple for length in self.lengths]
        bounds = [0, *itertools.accumulate(lengths)]
        shifts = [new - old for new, old in zip(bounds, self.bounds, strict=True)][:-1]
        device = self.input_ids.device
        places = torch.arange(self.total, device=device) + torch.repeat_interleave(
            torch.tensor(shifts, dtype=torch.int64, device=device), self.cu_seqlens.diff(), output_size=self.total
        )
        tokens = self.input_ids.new_zeros(bounds[-1]).index_copy(0, places, self.input_ids)
        return PackedBatch(tokens, torch.tensor(bounds, device=device), max(lengths, default=0)), places

    def params(self) -> PackedSeqParams:
        """The parameters of megatron-core's attention for packed sequences.

        megatron-core reads the bounds of its rotary embedding in every layer, and prefers the `padded` ones for that:
        those are in host memory, so that no layer waits for the device. Kernels read the others.
        """
        here, host = self.cu_seqlens, torch.tensor(self.bounds, dtype=torch.int32)
        return PackedSeqParams(
            qkv_format="thd",
            cu_seqlens_q=here,
            cu_seqlens_kv=here,
            cu_seqlens_q_padded=host,
            cu_seqlens_kv_padded=host,
            max_seqlen_q=self.longest,
            max_seqlen_kv=self.longest,
        )


def unpad(input_ids: torch.Tensor, attention_mask: torch.Tensor | None) -> tuple[PackedBatch, torch.Tensor]:
    """Leave out what the mask hides.

    Padding may be on the left, on the right, or between tokens: hidden tokens are as if they were not there, and
    positions count visible ones only. A row of nothing but padding is an empty sequence.

    Args:
        input_ids: Token ids, int64 (batch, sequence).
        attention_mask: 1 or True where a token counts, 0 where it is padding, (batch, sequence); None if all count.

    Returns:
        The packed batch, and where its tokens were: int64 (total_nnz,), counted over all rows.

    Raises:
        UsageError: The shapes differ, or the mask holds something else.
    """
    if input_ids.dim() != 2:
        raise UsageError(f"padded input_ids have the axes (batch, sequence), not the shape {list(input_ids.shape)}")
    if attention_mask is None:
        attention_mask = torch.ones_like(input_ids, dtype=torch.bool)
    if attention_mask.shape != input_ids.shape:
        raise UsageError(
            f"attention_mask is {list(attention_mask.shape)}, input_ids are {list(input_ids.shape)}",
            hint="pass the mask of the tokenizer, one number for each token",
        )
    visible = attention_mask.bool()
    if not torch.equal(visible.to(attention_mask.dtype), attention_mask):
        raise UsageError("attention_mask must hold 0 and 1 only", hint="pass the mask of the tokenizer")
    places = visible.flatten().nonzero().flatten()
    lengths = visible.sum(dim=1, dtype=torch.int32)
    longest = int(lengths.max()) if len(lengths) else 0
    return PackedBatch(input_ids.flatten()[places], _cumulated(lengths), longest), places


def pad(values: torch.Tensor, places: torch.Tensor, batch: int, length: int) -> torch.Tensor:
    """Undo `unpad` for what was computed from its tokens.

    Args:
        values: (total_nnz, ...).
        places: From `unpad`.
        batch: Number of rows.
        length: Length of the rows.

    Returns:
        (batch, length, ...), 0 where the padding is.
    """
    whole = values.new_zeros(batch * length, *values.shape[1:]).index_copy(0, places, values)
    return whole.view(batch, length, *values.shape[1:])


def _cumulated(lengths: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))


def _some(bounds: list[int]) -> str:
    return str(bounds if len(bounds) <= 8 else [*bounds[:4], "...", *bounds[-2:]])
