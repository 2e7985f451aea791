"""A forward pass through all stages of the pipeline, without a training schedule."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core import parallel_state

from ckptkit.megatron import parallel
from ckptkit.megatron.compat import runs_on
from ckptkit.megatron.context_parallel.share import Share, filled_up, multiple_of
from ckptkit.megatron.model import CausalModel
from ckptkit.megatron.moe import replay_routing
from ckptkit.megatron.packed_inputs.batch import PackedBatch, pad, unpad
from ckptkit.sharding.grid import Parallelism

TOKENS_PER_PASS = 8192
"""Tokens that go through the model at a time; at least one sequence."""


@dataclass(frozen=True)
class Pipeline:
    """One rank's part of a model, ready to run together with the other ranks.

    Attributes:
        chunks: This rank's model chunks, one per virtual stage.
        grid: The grid that they were built for.
        device: Where they live.
        vocab_size: Outputs per token: entries of the vocabulary, the padding after it is cut off; 1 of a value model.
        tokens_per_pass: Upper bound of the tokens in flight, unless one sequence is longer.
        replicated: The modules that run instead of the chunks under data parallelism (`replicas.replicate`), or empty.
        passed: Called with the number of tokens of a batch that has gone through this rank's part.
    """

    chunks: list[CausalModel]
    grid: Parallelism
    device: torch.device
    vocab_size: int
    tokens_per_pass: int = TOKENS_PER_PASS
    replicated: Sequence[Callable[..., torch.Tensor]] = ()
    passed: Callable[[int], None] = lambda tokens: None

    def forward(self, tokens: torch.Tensor, *, replay: Mapping[int, torch.Tensor] | None = None) -> torch.Tensor | None:
        """Logits of every position.

        All ranks call this with the same tokens; expert parallel ranks, which share experts like data parallel ones,
        compute the rest each for itself. Context parallel ranks compute each its part of every row. Rows go through the
        pipeline a few at a time; with virtual stages the activations go round the pipeline ranks once per virtual
        stage.

        Args:
            tokens: Token ids, int64 [batch, sequence].
            replay: Global layer number -> experts that the tokens are routed to, int64 [batch, sequence, experts per
                token], or None for the routers' own choice.

        Returns:
            fp32 [batch, sequence, vocab_size] in host memory on the ranks of the last pipeline stage; None elsewhere.
        """
        return self._plain(tokens, replay, slice(tokens.size(1)))

    def next_logits(self, tokens: torch.Tensor) -> torch.Tensor | None:
        """Logits of the token after each row. As `forward`, but fp32 [batch, vocab_size]: no others leave the device.

        Args:
            tokens: Token ids, int64 [batch, sequence], at least one a row.
        """
        logits = self._plain(tokens, None, slice(tokens.size(1) - 1, tokens.size(1)))
        return None if logits is None else logits[:, 0]

    def _plain(
        self, tokens: torch.Tensor, replay: Mapping[int, torch.Tensor] | None, kept: slice
    ) -> torch.Tensor | None:
        """`forward`, for the positions that are kept."""
        length = tokens.size(1)
        multiple = multiple_of(self._sequence_split)
        tokens = F.pad(tokens, (0, -length % multiple))  # causal: what is added at the end is not seen
        rows = max(1, self.tokens_per_pass // max(1, length))
        parts = []
        for at in range(0, max(1, tokens.size(0)), rows):
            parts.append(self._pass(tokens[at : at + rows], _rows(replay, at, at + rows), kept=kept))
            self.passed(len(tokens[at : at + rows]) * length)
        logits = [part for part in parts if part is not None]
        return torch.cat(logits) if logits else None

    def forward_packed(
        self, batch: PackedBatch, *, replay: Mapping[int, torch.Tensor] | None = None
    ) -> torch.Tensor | None:
        """Logits of every token of a packed batch, which goes through the pipeline in one piece.

        All ranks call this with the same batch. Under sequence parallelism it is filled up to a multiple of the tensor
        parallel size with a sequence that no other one sees, and that is cut off again. Under context parallelism every
        sequence is filled up behind its end.

        Args:
            batch: The sequences.
            replay: As for `forward`, [1, total_nnz, experts per token].

        Returns:
            fp32 [total_nnz, vocab_size] in host memory on the ranks of the last pipeline stage; None elsewhere.
        """
        filled, places = filled_up(batch, self._sequence_split)
        chosen = None
        if replay is not None:
            chosen = {layer: _spread(experts, places, filled.total) for layer, experts in replay.items()}
        logits = self._pass(filled.input_ids[None], chosen, filled)
        self.passed(batch.total)
        return None if logits is None else logits[0, places]

    def forward_padded(self, tokens: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor | None:
        """Logits of a padded batch, computed without its padding.

        Args:
            tokens: Token ids, int64 [batch, sequence].
            attention_mask: 1 where a token counts, 0 where it is padding, [batch, sequence]; see `packed.unpad`.

        Returns:
            As `forward`, 0 where the padding is.

        Raises:
            UsageError: The mask does not fit.
        """
        batch, places = unpad(tokens, attention_mask)
        logits = self.forward_packed(batch)
        return None if logits is None else pad(logits, places.cpu(), *tokens.shape)

    def greedy(self, tokens: torch.Tensor, steps: int) -> torch.Tensor:
        """`tokens` [batch, sequence] with the `steps` most likely tokens appended to every row, on every rank.

        The whole row runs again for each token: nothing is cached, so nothing but the forward pass is involved.
        """
        for _ in range(steps):
            logits = self.forward(tokens)
            chosen = torch.zeros(tokens.size(0), dtype=torch.int64) if logits is None else logits[:, -1].argmax(-1)
            chosen = parallel.broadcast(chosen.to(self.device), dist.get_world_size() - 1).cpu()
            tokens = torch.cat((tokens, chosen[:, None]), dim=1)
        return tokens

    @property
    def _sequence_split(self) -> int:
        return self.grid.tp if self.chunks[0].config.sequence_parallel else 1

    def _pass(
        self,
        tokens: torch.Tensor,
        replay: dict[int, torch.Tensor] | None,
        packed: PackedBatch | None = None,
        kept: slice = slice(None),
    ) -> torch.Tensor | None:
        """One batch [batch, sequence] through every chunk of this rank, virtual stage after virtual stage.

        Returns:
            Logits of the positions that are kept, in host memory, on the ranks of the last stage.
        """
        with torch.no_grad(), runs_on(self.device):
            return self._through(tokens, replay, Share.of(self.chunks, tokens.size(1), packed, self.device), kept)

    def _through(
        self, tokens: torch.Tensor, replay: dict[int, torch.Tensor] | None, share: Share, kept: slice
    ) -> torch.Tensor | None:
        logits, own = None, share.part(tokens).to(self.device)
        chosen = None if replay is None else share.experts(replay, tokens.size(1))
        for number, chunk in enumerate(self.chunks):
            with contextlib.nullcontext() if chosen is None else replay_routing([chunk], chosen):
                output = self._run(number, own, share)
            if chunk.post_process:
                logits = output.float()
                if not chunk.value_head:
                    logits = parallel.gather_over_tensor_ranks(logits, dim=-1)
            else:
                parallel.send(output, parallel_state.get_pipeline_model_parallel_next_rank())
        return None if logits is None else share.whole(logits[..., : self.vocab_size])[:, kept].cpu()

    def _run(self, number: int, tokens: torch.Tensor, share: Share) -> torch.Tensor:
        """One batch through one chunk: [sequence / split, batch, hidden], or logits [batch, sequence, entries / tp].

        Args:
            number: Virtual stage of the chunk.
            tokens: This rank's.
            share: The share that they are.
        """
        chunk, (batch, length) = self.chunks[number], tokens.shape
        if not chunk.pre_process:
            shape = (length // self._sequence_split, batch, chunk.input_width)
            dtype = chunk.config.params_dtype
            before = parallel_state.get_pipeline_model_parallel_prev_rank()
            chunk.set_input_tensor(parallel.receive(shape, dtype, self.device, before))
        positions = torch.arange(length, device=self.device).expand(batch, length)
        run = self.replicated[number] if self.replicated else chunk
        output: torch.Tensor = run(tokens, positions, None, packed_seq_params=share.params)
        return output


def _spread(experts: torch.Tensor, places: slice | torch.Tensor, total: int) -> torch.Tensor:
    """Experts of the tokens at some places [1, tokens, experts per token] in a row of `total`; -1 elsewhere."""
    whole = experts.new_full((1, total, experts.size(2)), -1)
    whole[:, places] = experts
    return whole


def _rows(replay: Mapping[int, torch.Tensor] | None, start: int, end: int) -> dict[int, torch.Tensor] | None:
    return None if replay is None else {layer: experts[start:end] for layer, experts in replay.items()}
