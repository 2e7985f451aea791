"""How many rows of a stored vocabulary are tokens: padding is cut off, and nothing else may be."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ckptkit.checkpoints.checkpoint import DEFAULT_DIVISIBLE_BY, EMBEDDING
from ckptkit.errors import InputError
from ckptkit.formats.torch_legacy import RankFile, RankKey
from ckptkit.sharding.rules import padded_vocab_size
from ckptkit.tables.spelling import VERL
from ckptkit.tensors import Tensor

_NULL, _NULL_MULTIMODAL, _TIKTOKEN = "NullTokenizer", "NullMultimodalTokenizer", "TikTokenizer"
_EOD = "null_tokenizer_eod_id"
_EMBEDDINGS = (EMBEDDING, VERL.written(EMBEDDING))


@dataclass(frozen=True)
class Vocabulary:
    """A stored vocabulary.

    Attributes:
        rows: Rows of the embedding over all tensor parallel ranks, padding included.
        multiple: They were padded to a multiple of this.
        in_args: How many of them are tokens by `args`; None if these do not record it.
        counted: Whether the writer made the vocabulary by that number; for other tokenizers, it is at best the least.
        text: What `args` say of it, for messages.
    """

    rows: int
    multiple: int
    in_args: int | None
    counted: bool = True
    text: str = ""

    def padded(self, size: int) -> int:
        """Rows that a vocabulary of this size has at most."""
        return padded_vocab_size(size, self.multiple, 1)

    def size(self, stated: int | None, where: Path) -> int:
        """Its size where no config.json says it: as `args` say, if padding explains the rows beyond, or as stated.

        Args:
            stated: The number of tokens that the user states, or None.
            where: The checkpoint.

        Raises:
            InputError: `args` give fewer rows than are stored, and the user does not say how many are tokens.
        """
        if self.in_args is None or not self.counted:
            return stated or self.rows
        if self.rows <= self.padded(self.in_args):
            return self.in_args
        if stated is None:
            raise InputError(
                f"the checkpoint's args say {self.text}, but {self.rows} rows are stored, which is more than padding"
                " explains",
                where=where,
                hint=f"--vocab-size N says how many are tokens ({self.rows} keeps them all)",
            )
        return stated


def stored_vocabulary(ranks: Mapping[RankKey, RankFile], args: Mapping[str, Any]) -> Vocabulary:
    """The vocabulary in the files of all ranks.

    Args:
        ranks: (pp_rank, tp_rank, ep_rank) -> chunk -> written name -> tensor.
        args: Stored arguments.
    """
    shards: dict[int, Tensor] = {}
    for (_, tp_rank, _), chunks in ranks.items():
        for chunk in chunks.values():
            shards.update((tp_rank, tensor) for name, tensor in chunk.items() if name.endswith(_EMBEDDINGS))
    rows = sum(size for shard in shards.values() for size in shard.shape[:1])
    # Without a record of the padding, assume a multiple of Megatron-LM's 128 times the ranks that wrote it. A
    # distributed checkpoint has one piece for each of these ranks. Fewer rows than one such step may be padding.
    pieces = sum(len(shard.bands) for shard in shards.values())
    divisible_by = args.get("make_vocab_size_divisible_by") or DEFAULT_DIVISIBLE_BY
    multiple = divisible_by * (args.get("tensor_model_parallel_size") or max(pieces, 1))
    return Vocabulary(rows, multiple, *_tokens(args))


def _tokens(args: Mapping[str, Any]) -> tuple[int | None, bool, str]:
    """`in_args`, `counted` and `text` of a `Vocabulary`: what `vocab_size` counts, by the tokenizer and its release.

    Source: `build_tokenizer` and the two null tokenizers of Megatron-LM, releases 0.12 to 0.19. NullTokenizer adds a
    token for the end of a document until 0.17; since 0.18, which records `null_tokenizer_eod_id`, it is one of those
    that are counted. Tokenizers read from files count for themselves, whatever `vocab_size` says.
    """
    size, tokenizer = args.get("vocab_size") or None, args.get("tokenizer_type")
    text = f"vocab_size {size}"
    if size is None or tokenizer is None:
        return size, True, text
    before_0_18 = tokenizer == _NULL and _EOD not in args
    if before_0_18 or tokenizer == _NULL_MULTIMODAL:
        return size + 1, True, f"{text}, to which {tokenizer} adds one: {size + 1} tokens"
    return size, tokenizer in (_NULL, _TIKTOKEN), text
