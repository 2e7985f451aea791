"""A forward pass through all stages of the pipeline, without a training schedule."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from megatron.core import parallel_state

from ckptkit.megatron import parallel
from ckptkit.megatron.compat import runs_on
from ckptkit.megatron.model import CausalModel
from ckptkit.sharding.grid import Parallelism

TOKENS_PER_PASS = 8192
"""Tokens that go through the model at a time; at least one sequence."""


@dataclass(frozen=True)
class Pipeline:
    """What one rank holds of a model, ready to run together with the other ranks.

    Attributes:
        chunks: This rank's model chunks, one per virtual stage.
        grid: The grid that they were built for.
        device: Where they live.
        vocab_size: Entries of the vocabulary; the padding after it is cut off.
        tokens_per_pass: Upper bound of the tokens in flight, unless one sequence is longer.
    """

    chunks: list[CausalModel]
    grid: Parallelism
    device: torch.device
    vocab_size: int
    tokens_per_pass: int = TOKENS_PER_PASS

    def forward(self, tokens: torch.Tensor) -> torch.Tensor | None:
        """Logits of every position.

        All ranks call this with the same tokens; expert parallel ranks, which share experts like data parallel ones,
        compute the rest each for itself. Rows go through the pipeline a few at a time; with virtual stages the
        activations go round the pipeline ranks once per virtual stage.

        Args:
            tokens: Token ids, int64 [batch, sequence].

        Returns:
            fp32 [batch, sequence, vocab_size] in host memory on the ranks of the last pipeline stage; None elsewhere.
        """
        length = tokens.size(1)
        tokens = F.pad(tokens, (0, -length % self._sequence_split))  # causal: what is added at the end is not seen
        rows = max(1, self.tokens_per_pass // max(1, length))
        with torch.no_grad(), runs_on(self.device):
            parts = [self._pass(part.to(self.device), length) for part in tokens.split(rows)]
        logits = [part for part in parts if part is not None]
        return torch.cat(logits) if logits else None

    def greedy(self, tokens: torch.Tensor, steps: int) -> torch.Tensor:
        """`tokens` [batch, sequence] with the `steps` most likely tokens appended to every row, on every rank.

        The whole row runs again for each token: nothing is cached, so nothing but the forward pass is involved.
        """
        for _ in range(steps):
            logits = self.forward(tokens)
            chosen = torch.zeros(tokens.size(0), dtype=torch.int64) if logits is None else logits[:, -1].argmax(-1)
            chosen = parallel.broadcast(chosen.to(self.device), self.grid.world_size - 1).cpu()
            tokens = torch.cat((tokens, chosen[:, None]), dim=1)
        return tokens

    @property
    def _sequence_split(self) -> int:
        return self.grid.tp if self.chunks[0].config.sequence_parallel else 1

    def _pass(self, tokens: torch.Tensor, length: int) -> torch.Tensor | None:
        """One batch [batch, sequence] through every chunk of this rank, virtual stage after virtual stage."""
        logits = None
        for chunk in self.chunks:
            output = self._run(chunk, tokens)
            if chunk.post_process:
                logits = parallel.gather_over_tensor_ranks(output[:, :length].float(), dim=-1)
            else:
                parallel.send(output, parallel_state.get_pipeline_model_parallel_next_rank())
        return None if logits is None else logits[..., : self.vocab_size].cpu()

    def _run(self, chunk: CausalModel, tokens: torch.Tensor) -> torch.Tensor:
        """One batch through one chunk: [sequence / split, batch, hidden], or logits [batch, sequence, entries / tp]."""
        batch, length = tokens.shape
        if not chunk.pre_process:
            shape = (length // self._sequence_split, batch, chunk.config.hidden_size)
            dtype = chunk.config.params_dtype
            before = parallel_state.get_pipeline_model_parallel_prev_rank()
            chunk.set_input_tensor(parallel.receive(shape, dtype, self.device, before))
        positions = torch.arange(length, device=self.device).expand(batch, length)
        output: torch.Tensor = chunk(tokens, positions, None)
        return output
