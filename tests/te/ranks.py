"""A rank of Megatron-LM with Transformer Engine's modules: `python -m tests.te.ranks RANK`.

It builds a model as `pretrain_gpt.py` of Megatron-LM 0.19 does, from the command line alone, loads a checkpoint with
Megatron-LM's `load_checkpoint`, and runs megatron-core's schedules. Parameters are NaN before they are loaded. Each
rank answers with a JSON file. Without a CUDA device the same runs on the CPU, over gloo; there, modules of Transformer
Engine are built and loaded, but compute nothing.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import re
import sys
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tests.formats.megatron_ranks import cuda_is_cpu
from tests.formats.rank_pool import RankProcesses, incoming

MODULE = "tests.te.ranks"
_NUMBERS = re.compile(r"(?<=[._/])\d+(?=[._]|$)|(?<=weight)\d+$|(?<=_extra_state)\d+$")


@dataclass(frozen=True)
class Job:
    """A load of a checkpoint, and what is run with it.

    Attributes:
        flags: Megatron-LM's command line: the model, and the grid.
        folder: Where each rank leaves its answer, `RANK.json`.
        world_size: Number of ranks.
        load: The checkpoint, the folder with the tracker file; none where only keys are asked for.
        expected: A safetensors file with `tokens` [rows, length] and the right `logits` [rows, length, vocabulary].
        vocab_size: The number of tokens.
        strict: Files of ranks that are loaded with `load_state_dict(strict=True)`, too.
    """

    flags: list[str]
    folder: str
    world_size: int = 1
    load: str = ""
    expected: str = ""
    vocab_size: int = 250
    strict: list[str] = field(default_factory=list)


def run(ranks: RankProcesses, job: Job) -> list[dict[str, Any]]:
    """The answers of all ranks of a job.

    Raises:
        AssertionError: A rank failed.
    """
    problem = ranks.run(job.world_size, asdict(job), timeout=240.0)
    assert not problem, problem
    return [json.loads((Path(job.folder) / f"{rank}.json").read_text()) for rank in range(job.world_size)]


def collapsed(names: Sequence[str]) -> dict[str, int]:
    """Names without the numbers of layers, experts and shards -> how many there are of each."""
    return dict(sorted(Counter(_NUMBERS.sub("#", name) for name in names).items()))


def command_line(job: Job, cuda: bool) -> list[str]:
    """Megatron-LM's command line for a job on this machine."""
    values = {
        **({"load": job.load} if job.load else {}),
        "micro-batch-size": 1,
        "train-iters": 1,
        "lr": 0.001,
        "tokenizer-type": "NullTokenizer",
        "vocab-size": job.vocab_size - 1,
        "distributed-backend": "nccl" if cuda else "gloo",
        "moe-token-dispatcher-type": "alltoall" if cuda else "allgather",
    }
    switches = ["--no-gradient-accumulation-fusion", "--no-masked-softmax-fusion"]
    switches += ["--exit-on-missing-checkpoint"] if job.load else []
    switches += ["--no-persist-layer-norm"] if "local" in job.flags and cuda else []  # without APEX
    if not cuda:
        switches += ["--use-cpu-initialization", "--no-bias-swiglu-fusion", "--no-bias-dropout-fusion"]
        switches += ["--no-persist-layer-norm", "--no-rope-fusion"]
    return [*job.flags, *switches, *(word for name, value in values.items() for word in (f"--{name}", str(value)))]


def has_transformer_engine() -> bool:
    """Whether it is installed: then the last norm is its own in every spec."""
    return importlib.util.find_spec("transformer_engine") is not None


def let_modules_be_built() -> None:
    """Answers what modules of Transformer Engine ask about a GPU before they are built, where there is none."""
    import torch

    if has_transformer_engine():
        import transformer_engine.pytorch  # noqa: F401  it looks for itself, and must see the truth

        torch.cuda.is_available = lambda: True
        torch.cuda.device_count = lambda: 1
        torch.cuda.get_device_capability = lambda *args: (9, 0)


class Rank:
    """One rank's part in the jobs."""

    def __init__(self, rank: int) -> None:
        import torch

        self.rank = rank
        self.cuda = torch.cuda.is_available()
        if self.cuda:
            torch.cuda.set_device(rank)
        else:
            cuda_is_cpu(setattr)
            let_modules_be_built()

    def run(self, job: Job, store: str) -> dict[str, Any]:
        """One job in process groups of its own, which meet in a file."""
        import torch
        from megatron.core import parallel_state, tensor_parallel
        from megatron.training.arguments import parse_and_validate_args
        from megatron.training.global_vars import unset_global_variables

        os.environ.update(RANK=str(self.rank), WORLD_SIZE=str(job.world_size), LOCAL_RANK=str(self.rank))
        os.environ["CUDA_DEVICE_MAX_CONNECTIONS"] = "1"
        sys.argv = ["pretrain_gpt.py", *command_line(job, self.cuda)]
        args = parse_and_validate_args()
        torch.distributed.init_process_group(
            args.distributed_backend,
            store=torch.distributed.FileStore(store, job.world_size),
            rank=self.rank,
            world_size=job.world_size,
        )
        try:
            with contextlib.nullcontext() if self.cuda else on_cpu():
                parallel_state.initialize_model_parallel(
                    args.tensor_model_parallel_size,
                    args.pipeline_model_parallel_size,
                    args.virtual_pipeline_model_parallel_size,
                    expert_model_parallel_size=args.expert_model_parallel_size,
                )
                tensor_parallel.random.initialize_rng_tracker(inference_rng_tracker=not self.cuda)
                if self.cuda:
                    tensor_parallel.model_parallel_cuda_manual_seed(1)
                answer = self.answer(job, args)
            torch.distributed.barrier()
        finally:
            unset_global_variables()
            parallel_state.destroy_model_parallel()
            torch.distributed.destroy_process_group()
        return answer

    def answer(self, job: Job, args: Any) -> dict[str, Any]:
        """What a rank sees of a job."""
        import torch
        from megatron.training.checkpointing import load_checkpoint

        chunks = build(args)
        if not job.load:
            return {"torch_dist": keys(chunks), "torch": [name for chunk in chunks for name in chunk.state_dict()]}
        forget(chunks)
        for number, (file, chunk) in enumerate(zip(job.strict, chunks, strict=False)):
            content = torch.load(file, map_location="cpu", weights_only=False)
            chunk.load_state_dict(content["model" if len(chunks) == 1 else f"model{number}"], strict=True)
            assert not unloaded([chunk])
        forget(chunks)
        iteration, _ = load_checkpoint(chunks, None, None, strict=True)
        answer = {"iteration": iteration, "unloaded": unloaded(chunks), "modules": modules(chunks)}
        computes = self.cuda or not has_transformer_engine()
        if job.expected and computes and not answer["unloaded"]:
            answer |= self.compare(job, chunks)
        return answer

    def compare(self, job: Job, chunks: list[Any]) -> dict[str, float]:
        """The largest difference of logits and their RMS, on the ranks of the last stage, relative to the logits'."""
        import torch
        from megatron.core import parallel_state
        from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region as gather
        from safetensors.torch import load_file

        file = load_file(job.expected)
        tokens, expected = file["tokens"], file["logits"].double()
        with torch.no_grad():
            found = forward(chunks, tokens.to("cuda" if self.cuda else "cpu"))
            if not parallel_state.is_pipeline_last_stage(ignore_virtual=True):
                return {}
            logits = torch.cat([gather(part.contiguous()) for part in found]).cpu()[..., : job.vocab_size].double()
        difference = logits - expected
        return {
            "max": (difference.abs().max() / expected.abs().max()).item(),
            "rms": difference.square().mean().sqrt().item(),
        }


def keys(chunks: list[Any]) -> list[str]:
    """The keys that modules ask for in a distributed checkpoint."""
    from megatron.core.dist_checkpointing.mapping import ShardedBase, ShardedObject

    leaves = [leaf for chunk in chunks for leaf in flat(chunk.sharded_state_dict()) if isinstance(leaf, ShardedBase)]
    return sorted({leaf.unique_key if isinstance(leaf, ShardedObject) else leaf.key for leaf in leaves})


def flat(state: Any) -> Iterator[Any]:
    """The leaves of nested dictionaries and lists."""
    values = state.values() if isinstance(state, dict) else state if isinstance(state, list) else None
    if values is None:
        yield state
        return
    for value in values:
        yield from flat(value)


def build(args: Any) -> list[Any]:
    """The model chunks of this rank, as `gpt_builders.py` of Megatron-LM 0.19 builds them."""
    from megatron.core import parallel_state
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import (
        get_gpt_decoder_block_spec,
        get_gpt_layer_local_spec,
        get_gpt_layer_with_transformer_engine_spec,
    )
    from megatron.training.arguments import core_transformer_config_from_args

    config, te = core_transformer_config_from_args(args), args.transformer_impl == "transformer_engine"
    virtual = args.virtual_pipeline_model_parallel_size or 1
    pp_rank, pp = parallel_state.get_pipeline_model_parallel_rank(), args.pipeline_model_parallel_size
    chunks = []
    for number in range(virtual):
        vp_stage = number if virtual > 1 else None
        if args.num_experts:
            spec = get_gpt_decoder_block_spec(config, te, normalization=args.normalization, vp_stage=vp_stage)
        elif te:
            spec = get_gpt_layer_with_transformer_engine_spec(qk_layernorm=args.qk_layernorm)
        else:
            spec = get_gpt_layer_local_spec(qk_layernorm=args.qk_layernorm, normalization=args.normalization)
        model = GPTModel(
            config=config,
            transformer_layer_spec=spec,
            vocab_size=args.padded_vocab_size,
            max_sequence_length=args.max_position_embeddings,
            pre_process=pp_rank == 0 and number == 0,
            post_process=pp_rank == pp - 1 and number == virtual - 1,
            parallel_output=True,
            share_embeddings_and_output_weights=not args.untie_embeddings_and_output_weights,
            position_embedding_type=args.position_embedding_type,
            rotary_percent=args.rotary_percent,
            rotary_base=args.rotary_base,
            rope_scaling=args.use_rope_scaling,
            vp_stage=vp_stage,
        )
        chunks.append(model.cuda().eval())
    return chunks


def forget(chunks: list[Any]) -> None:
    """Leaves nothing in the parameters that could pass for loaded."""
    import torch

    with torch.no_grad():
        for chunk in chunks:
            for parameter in chunk.parameters():
                parameter.fill_(float("nan"))


def unloaded(chunks: list[Any]) -> list[str]:
    """The parameters that nothing was loaded into."""
    return [name for chunk in chunks for name, value in chunk.named_parameters() if value.isnan().any()]


def modules(chunks: list[Any]) -> list[str]:
    """The classes of the modules that have parameters."""
    return sorted(
        {type(module).__name__ for chunk in chunks for module in chunk.modules() if [*module.parameters(recurse=False)]}
    )


def forward(chunks: list[Any], tokens: Any) -> list[Any]:
    """The logits of rows, each of them a microbatch, on the last stage."""
    import torch
    from megatron.core.pipeline_parallel import get_forward_backward_func

    def step(rows: Iterator[Any], chunk: Any, *rest: Any) -> tuple[Any, Callable[..., Any]]:
        row = next(rows)
        return chunk(row, torch.arange(row.size(1), device=row.device)[None], None), lambda logits, **how: logits

    found: list[Any] = get_forward_backward_func()(
        forward_step_func=step,
        data_iterator=[iter(tokens.split(1)) for _ in chunks],
        model=chunks,
        num_microbatches=len(tokens),
        seq_length=tokens.size(1),
        micro_batch_size=1,
        forward_only=True,
        collect_non_loss_data=True,
    )
    return found


@contextlib.contextmanager
def on_cpu() -> Iterator[None]:
    """Makes Megatron-LM and the schedules run where there is no GPU."""
    from tests.formats.megatron_lm import _cuda_is_cpu
    from tests.surgery.stage_training import schedule_on_cpu

    with _cuda_is_cpu(), schedule_on_cpu():
        yield


def main(rank: int) -> int:
    """Runs jobs until there are no more, or one fails."""
    warnings.simplefilter("ignore")
    os.environ["NVIDIA_TF32_OVERRIDE"] = "0"  # Transformer Engine multiplies fp32 in TF32 unless cuBLAS is told not to
    import megatron.training.arguments
    import megatron.training.checkpointing  # noqa: F401

    here = Rank(rank)
    for content, store in incoming():
        try:
            answer = here.run(Job(**content), store)
            (Path(content["folder"]) / f"{rank}.json").write_text(json.dumps(answer))
        except BaseException:
            traceback.print_exc()
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1])))
