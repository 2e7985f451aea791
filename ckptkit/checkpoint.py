"""An opened checkpoint: whatever its format, the same canonical view, and any rank's shard of it.

Opening reads headers only. The view is one `Tensor` recipe for each item of the family's table, under Megatron's
canonical name with the global layer number and without vocabulary padding. Hugging Face tensors are packed into it,
shards are joined into it; both are slicing, so nothing is loaded.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ckptkit.errors import UsageError
from ckptkit.families.config import ModelConfig
from ckptkit.families.spelling import Spelling
from ckptkit.families.table import Family, Item
from ckptkit.formats.sidecar import Sidecar
from ckptkit.io.plan import Comparison
from ckptkit.sharding.grid import Parallelism, Rank
from ckptkit.sharding.rules import expert_home, pad_rows, padded_vocab_size
from ckptkit.sharding.stages import Stage, split_layers
from ckptkit.tensors import Tensor

if TYPE_CHECKING:
    import torch

EMBEDDING, HEAD = "embedding.word_embeddings.weight", "output_layer.weight"
DEFAULT_DIVISIBLE_BY = 128
LAYOUTS = ("full", "text")


@dataclass
class Checkpoint:
    """A checkpoint of any format, opened.

    Attributes:
        path: Where it is.
        format: `hf`, `packed` or `torch`.
        family: The family whose table it follows.
        config: What it describes; for Megatron formats stored `args` override the sidecar's config.json.
        sidecar: The Hugging Face side: config.json and small files, headers, tensors without a Megatron slot.
        items: Canonical name -> table item, in table order.
        tensors: Canonical name -> tensor without vocabulary padding.
        grid: The stored grid; 1 x 1 where nothing is sharded.
        spelling: How its Megatron names are spelled; the canonical spelling for Hugging Face.
        padded_vocab_size: Rows of the stored embedding.
        args: Megatron's `args`, empty for Hugging Face.
        comparisons: What must be equal for the view to be the whole truth (replicated shards, tied copies).
        coverage: How many stored tensors were used, are replicas, travel in the sidecar, ...
        notes: What a user should know.
        disagreements: Fields in which `args` contradict config.json, as sentences.
    """

    path: Path
    format: str
    family: Family
    config: ModelConfig
    sidecar: Sidecar
    items: dict[str, Item]
    tensors: dict[str, Tensor]
    spelling: Spelling
    grid: Parallelism = field(default_factory=Parallelism)
    padded_vocab_size: int = 0
    args: dict[str, Any] = field(default_factory=dict)
    comparisons: list[Comparison] = field(default_factory=list)
    coverage: dict[str, int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    disagreements: list[str] = field(default_factory=list)

    @property
    def parameters(self) -> int:
        """Number of parameters, each counted once; what travels in the sidecar is not counted."""
        return sum(tensor.numel for tensor in self.tensors.values())

    def chunk(
        self, stage: Stage, rank: Rank, grid: Parallelism, spelling: Spelling, divisible_by: int
    ) -> dict[str, Tensor]:
        """The tensors of one model chunk of one rank, under the rank's own layer and expert numbers.

        Args:
            stage: The chunk's stage.
            rank: The rank's places in the grid.
            grid: The grid.
            spelling: Spelling of the names.
            divisible_by: The vocabulary is padded to a multiple of this times the tensor parallel size.

        Raises:
            UsageError: A tensor does not divide over the ranks.
        """
        local = {layer: number for number, layer in enumerate(stage.layers)}
        chunk = {}
        for key, item in self.items.items():
            if not is_on(item, stage):
                continue
            home, expert = (rank.ep, None)
            if item.expert is not None:
                home, expert = expert_home(item.expert, self.config.num_experts, grid.ep)
            if home == rank.ep:
                name = item.name(None if item.layer is None else local[item.layer], expert)
                chunk[spelling.written(name)] = self._cut(key, rank, grid, divisible_by)
        if self.config.tied and stage.last and (spelling.tied_head or not stage.first):
            chunk[spelling.written(HEAD)] = self._cut(EMBEDDING, rank, grid, divisible_by)
        return chunk

    def _cut(self, key: str, rank: Rank, grid: Parallelism, divisible_by: int) -> Tensor:
        tensor, split = self.padded(key, grid.tp, divisible_by), self.items[key].row.split
        try:
            return split.cut(tensor, *((rank.etp, grid.expert_tp) if split.expert else (rank.tp, grid.tp)))
        except UsageError as error:
            raise UsageError(error.what, where=key, hint=error.hint) from None

    def padded(self, key: str, tp: int, divisible_by: int) -> Tensor:
        """The whole tensor of a canonical name, with vocabulary padding for `tp` ranks where it has a vocabulary."""
        tensor = self.tensors[key]
        if not self.items[key].row.split.padded:
            return tensor
        return pad_rows(tensor, padded_vocab_size(tensor.shape[0], divisible_by, tp))

    def shard(
        self,
        tp_rank: int = 0,
        tp: int = 1,
        pp_rank: int = 0,
        pp: int = 1,
        vp_stage: int = 0,
        vpp: int = 1,
        *,
        ep_rank: int = 0,
        ep: int = 1,
        grid: Parallelism | None = None,
        spec: str = "te",
        layout: str = "full",
        make_vocab_size_divisible_by: int = DEFAULT_DIVISIBLE_BY,
    ) -> dict[str, torch.Tensor]:
        """One rank's tensors, loaded, from any format and for any grid.

        Args:
            tp_rank: Tensor parallel rank, of `tp`.
            tp: Tensor parallel size.
            pp_rank: Pipeline rank, of `pp`.
            pp: Pipeline parallel size.
            vp_stage: Virtual stage (model chunk), of `vpp`.
            vpp: Virtual pipeline size.
            ep_rank: Expert parallel rank, of `ep`.
            ep: Expert parallel size.
            grid: The whole grid instead of the sizes, for uneven pipelines and another expert tensor parallel size.
            spec: Spelling of the names: `te`, `local`, or another that the family has.
            layout: `full`, or `text` for a multimodal model's text part under a text model's names.
            make_vocab_size_divisible_by: As Megatron-LM's option of that name.

        Returns:
            Megatron names with the rank's own layer and expert numbers -> CPU tensors in the stored dtype.

        Raises:
            UsageError: The grid cannot hold the model, or the rank is not in it.
        """
        from ckptkit.megatron.loading import load

        grid = grid or Parallelism(tp, pp, vpp, ep=ep)
        check_grid(self.config, grid)
        rank = next((r for r in grid.ranks() if (r.pp, r.tp, r.ep) == (pp_rank, tp_rank, ep_rank)), None)
        if rank is None or not 0 <= vp_stage < grid.vpp:
            raise UsageError(f"no rank tp {tp_rank}, pp {pp_rank}, ep {ep_rank}, virtual stage {vp_stage} in {grid}")
        stages = {(s.pp_rank, s.vp_stage): s for s in split_layers(self.config.num_layers, grid)}
        spelling = self.family.spelling(spec, text=layout == "text")
        chunk = self.chunk(stages[pp_rank, vp_stage], rank, grid, spelling, make_vocab_size_divisible_by)
        return {name: load(tensor) for name, tensor in chunk.items()}


def is_on(item: Item, stage: Stage) -> bool:
    """Whether a stage holds an item: layers by number, the embedding first, norm and head last."""
    if item.layer is not None:
        return item.layer in stage.layers
    return stage.first if item.key == EMBEDDING else stage.last


def check_grid(config: ModelConfig, grid: Parallelism) -> None:
    """Whether Megatron-Core can run the model on a grid.

    Raises:
        UsageError: Heads or layers do not divide over it.
    """
    for layer in set(config.layers):
        heads, groups = layer.num_heads, layer.num_kv_heads
        if heads % grid.tp:
            sizes = [size for size in range(1, heads + 1) if heads % size == 0]
            raise UsageError(
                f"{heads} attention heads do not divide over --tp {grid.tp}",
                hint=f"--tp {', '.join(map(str, sizes[:6]))} would",
            )
        if groups % grid.tp and grid.tp % groups:
            raise UsageError(f"{groups} key/value heads and --tp {grid.tp}: one must be a multiple of the other")
    if grid.ep > 1 or grid.etp is not None:
        if not config.num_experts:
            raise UsageError("--ep and --etp need a model with experts, and this one has none")
        expert_home(0, config.num_experts, grid.ep)
    split_layers(config.num_layers, grid)
