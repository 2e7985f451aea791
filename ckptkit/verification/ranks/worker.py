"""One rank, or several: `python -m ckptkit.verification.ranks.worker DEVICE FOLDER NUMBER DESCRIPTOR...`.

It imports megatron-core once, then takes jobs from the socket with that descriptor. Of several sockets, each goes to a
process of its own, which is forked then.

A job is a line of JSON with a rank and a meeting point; the answer is a line of JSON, too. Whatever libraries print
goes to standard error.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any, TextIO

from ckptkit.checkpoints.checkpoint import EMBEDDING, HEAD, Checkpoint
from ckptkit.steps import Counted, Step, Tell, nobody
from ckptkit.verification.ranks.adapters import LaidOut, open_laid_out
from ckptkit.verification.ranks.forking import fork_each
from ckptkit.verification.ranks.jobs import OPENER, LogitsJob, decode_error, encode_error, find, open_model
from ckptkit.verification.reports.report import installed_versions

if TYPE_CHECKING:
    import torch
    import torch.distributed as dist

    from ckptkit.megatron.packed_inputs.batch import PackedBatch
    from ckptkit.megatron.pipeline import Pipeline
    from ckptkit.sharding.grid import Parallelism, Rank


def execute(
    job: LogitsJob,
    rank: int,
    store: dist.Store,
    failed: Callable[[Exception], None] = lambda error: None,
    tell: Tell = nobody,
) -> dict[str, Any]:
    """Do one rank's part of a job.

    Args:
        job: The job, the same on all its ranks.
        rank: Global rank, below `job.run.world_size`.
        store: A fresh store on which the ranks meet.
        failed: Told of an error before the group is left, which may wait for ranks that never come.
        tell: Told what the first rank is at.

    Returns:
        The fields of `runs.Run` that a rank knows, as JSON types.

    Raises:
        CkptkitError: The checkpoint cannot be loaded, the same error on every rank.
    """
    import torch

    from ckptkit.megatron import parallel
    from ckptkit.verification.double_precision import precision

    run = job.run
    device = parallel.device_of(run.device, rank)
    torch.set_float32_matmul_precision("highest")
    try:
        parallel.initialize(
            run.grid,
            rank,
            store=store,
            device=device,
            timeout_seconds=job.options.timeout,
            replicas=run.copies,
            cp=run.cp,
        )
        with precision(run.dtype):
            return _run(job, rank, device, nobody if rank else tell)
    except Exception as error:
        failed(error)
        raise
    finally:
        parallel.finalize()
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()


def _run(job: LogitsJob, rank: int, device: torch.device, tell: Tell) -> dict[str, Any]:
    from ckptkit.megatron.replicas import check_alike, check_same_weights, replica_group, replicate
    from ckptkit.verification.probes import megatron_head
    from ckptkit.verification.ranks.what_ran import count_modules
    from ckptkit.verification.runs import tokens_to_run

    start = time.monotonic()
    tell(Step("loading"))
    pipeline = load_together(job, rank, device)
    group = replica_group(job.run.grid, job.run.copies, rank) if job.run.copies > 1 else None
    if group is not None:
        check_same_weights(pipeline.chunks, group)
    if job.training is not None:
        from ckptkit.verification.training.candidate import train

        return train(job, job.training, pipeline, rank)
    if job.trainability is not None:
        from ckptkit.verification.trainability.candidate import learn

        return learn(job, job.trainability, pipeline, rank, tell)
    if group is not None and job.run.dp > 1:
        pipeline = replace(pipeline, replicated=replicate(job.run.dp_kind, pipeline.chunks, group, device))
    loaded = time.monotonic()
    counted = Counted("running", tokens_to_run(job.rows, job.greedy, again=job.run.packed), "tokens", tell)
    runner = _RankRun(job, replace(pipeline, passed=counted.add))
    rows, groups = runner.run()
    if group is not None:
        for logits in groups.values():
            check_alike(logits, group, device)
    runner.save(rank, groups)
    feeds = {place: site.feeds for place, site in runner.recorder.sites.items()}
    return {
        "rows": rows,
        "feeds": feeds | _head(megatron_head(pipeline.chunks)),
        "modules": count_modules(pipeline.chunks),
        "seen": [runner.observer.seen],
        "versions": installed_versions(),
        "seconds": {"load": loaded - start, "run": time.monotonic() - loaded},
    }


class _RankRun:
    """A rank's part of the model, and what to keep of its run."""

    def __init__(self, job: LogitsJob, pipeline: Pipeline) -> None:
        from ckptkit.megatron.moe import routers
        from ckptkit.verification.probes import Recorder, megatron_sites
        from ckptkit.verification.ranks.what_ran import Observer
        from ckptkit.verification.routing import Record, read_experts

        self.observer = Observer(pipeline)
        self.job, self.pipeline = job, pipeline
        self.recorder = Recorder(megatron_sites(pipeline.chunks) if job.probes else {}, job.whole_layers)
        self.record, self.experts = Record(), read_experts(job.replay)
        self.routers = routers(pipeline.chunks)

    def run(self) -> tuple[list[list[int]], dict[int, torch.Tensor]]:
        """The rows with their greedy continuation, and the logits by length on the ranks of the last stage."""
        from ckptkit.verification.packing import run_packed
        from ckptkit.verification.runs import run_by_length

        job, pipeline = self.job, self.pipeline
        with self.observer.watching():
            rows, groups = run_by_length(job.rows, lambda tokens: pipeline.greedy(tokens, job.greedy), self._forward)
            if not job.run.packed:
                return rows, groups
            replay = self.experts if all(map(self._fits, self.experts.values())) else {}
            return rows, run_packed(rows, self._forward_packed, replay, pipeline.tokens_per_pass)

    def _forward_packed(self, batch: PackedBatch, *, replay: Mapping[int, torch.Tensor] | None) -> torch.Tensor | None:
        """What is kept of the logits of a packed batch."""
        return self._kept(self.pipeline.forward_packed(batch, replay=replay), batch.input_ids)

    def _kept(self, logits: torch.Tensor | None, tokens: torch.Tensor) -> torch.Tensor | None:
        """Logits, or their scores for the tokens that follow; after the last of a row follows none that counts."""
        if logits is None or not self.job.scored:
            return logits
        from ckptkit.verification.rollouts.scores import score

        return score(logits, tokens.roll(-1, -1), self.job.scored)

    def _forward(self, tokens: torch.Tensor) -> torch.Tensor | None:
        """What is kept of the logits of rows of one length."""
        import torch

        from ckptkit.megatron.moe import record_routing

        experts, length = self.experts.get(tokens.size(1)), tokens.size(1)
        replay = experts if self._fits(experts) else None
        self.observer.expect(length)
        with self.recorder.over(length), record_routing(self.pipeline.chunks, length) as routing:
            kept = [
                self._kept(self.pipeline.forward(tokens[part], replay=_part(replay, part)), tokens[part])
                for part in self._parts(len(tokens), length)
            ]
        self.record.add(routing.logits, routing.experts, routing.own)
        found = [part for part in kept if part is not None]
        return torch.cat(found) if found else None

    def _parts(self, rows: int, length: int) -> list[slice]:
        """Rows that go through at a time: all of them, unless only scores of their logits are kept."""
        size = max(1, self.pipeline.tokens_per_pass // length) if self.job.scored else max(1, rows)
        return [slice(at, at + size) for at in range(0, max(1, rows), size)]

    def _fits(self, experts: Mapping[int, torch.Tensor] | None) -> bool:
        from ckptkit.verification.routing import can_replay

        return experts is not None and can_replay(experts, self.routers)

    def save(self, rank: int, groups: Mapping[int, torch.Tensor]) -> None:
        """Write this rank's logits and records. Only the first of the replicas writes: all of them are equal."""
        from ckptkit.megatron.replicas import seat
        from ckptkit.verification.runs import save_logits, save_probes

        job, grid = self.job, self.job.run.grid
        sits = seat(grid, job.run.copies, rank)
        if sits.replica:
            return
        if sits.number == grid.world_size - grid.stage_size:  # the first rank of the last stage
            save_logits(job.output, groups)
        if job.probes:
            save_probes(Path(job.probes), self.recorder.states, rank)
        if job.routing:
            self.record.save(Path(job.routing), rank)


def _part(experts: Mapping[int, torch.Tensor] | None, rows: slice) -> dict[int, torch.Tensor] | None:
    """The experts of some rows."""
    return None if experts is None else {layer: found[rows] for layer, found in experts.items()}


def load_together(job: LogitsJob, rank: int, device: torch.device) -> Pipeline:
    """The loaded model; if any rank cannot load its part, all ranks raise that rank's error."""
    from ckptkit.megatron import parallel

    pipeline, problem = None, None
    try:
        pipeline = _load(job, rank, device)
    except Exception as error:
        traceback.print_exc()
        problem = json.dumps(encode_error(error))
    problems = parallel.agree(problem)
    if problems or pipeline is None:
        raise decode_error(json.loads(problems[0][1]))
    return pipeline


def _load(job: LogitsJob, rank: int, device: torch.device) -> Pipeline:
    import torch

    from ckptkit.megatron.model import build_chunks, load_strict
    from ckptkit.megatron.pipeline import Pipeline
    from ckptkit.megatron.replicas import seat

    opener, run, grid = find(job.opener), job.run, job.run.grid
    checkpoint = open_model(opener, job.checkpoint, job.opening, job.adapter, job.prediction)
    if job.rounded:
        checkpoint = _rounded(checkpoint, job.rounded)
    adapter = None if job.adapter is None else open_laid_out(job.adapter, checkpoint, grid, opener)
    here = seat(grid, run.copies, rank).place
    shards = [
        checkpoint.shard(
            grid=grid,
            pp_rank=here.pp,
            tp_rank=here.tp,
            ep_rank=here.ep,
            vp_stage=vp_stage,
            spec="local",
            layout="text",
        )
        for vp_stage in range(grid.vpp)
    ]
    value_head = checkpoint.config.value_head
    chunks = build_chunks(
        checkpoint.config,
        grid,
        _padded_vocab_size(
            shards, grid.tp, checkpoint.padded_vocab_size, [EMBEDDING] if value_head else [EMBEDDING, HEAD]
        ),
        dtype=getattr(torch, run.dtype),
        device=device,
        sequence_parallel=run.sequence_parallel,
        recompute=run.recompute,
        cp=run.cp,
    )
    for vp_stage, (chunk, shard) in enumerate(zip(chunks, shards, strict=True)):
        place = f"tensor rank {here.tp}, pipeline rank {here.pp}, expert rank {here.ep}, virtual stage {vp_stage}"
        where = f"{job.checkpoint} ({place})"
        if adapter is not None:
            shard.update(_attached(adapter, chunk, grid, here, vp_stage, device))
        load_strict(chunk, shard, where=where)
        shard.clear()
    outputs = 1 if value_head else checkpoint.config.vocab_size
    return Pipeline(chunks, grid, device, outputs, run.capacity)


def _attached(
    adapter: LaidOut, chunk: torch.nn.Module, grid: Parallelism, here: Rank, vp_stage: int, device: torch.device
) -> dict[str, torch.Tensor]:
    """This rank's factors, for which the chunk has got modules."""
    from ckptkit.megatron.lora import attach

    factors = adapter.checkpoint.shard(
        grid=grid, pp_rank=here.pp, tp_rank=here.tp, ep_rank=here.ep, vp_stage=vp_stage, spec="local", layout="text"
    )
    shapes = {name: tuple(factor.shape) for name, factor in factors.items()}
    attach(chunk, shapes, adapter.scale, device, where=adapter.checkpoint.path)
    return factors


def _rounded(checkpoint: Checkpoint, dtypes: Mapping[str, str]) -> Checkpoint:
    """The checkpoint with casts put before its weights are read; the model then widens what it gets."""
    from ckptkit.dtypes import DTYPES_BY_TORCH_NAME
    from ckptkit.verification.rounding import EVERY

    tensors = dict(checkpoint.tensors)
    for key, tensor in tensors.items():
        name = dtypes.get(key, dtypes.get(EVERY))
        if name is not None and tensor.dtype.is_float:
            tensors[key] = tensor.astype(DTYPES_BY_TORCH_NAME[name])
    return replace(checkpoint, tensors=tensors)


def _padded_vocab_size(shards: list[dict[str, torch.Tensor]], tp: int, stated: int, names: list[str]) -> int:
    """Rows of the whole of `names`, from the shard's own rows; as stated on ranks that hold no part of them."""
    for shard in shards:
        for name in names:
            if name in shard:
                return int(shard[name].shape[0]) * tp
    return stated


def _head(names: list[str]) -> dict[str, list[str]]:
    return {"head": names} if names else {}


def _serve(line: str, reply: Callable[[dict[str, Any]], None]) -> None:
    """Does what a line asks for, and replies once, after the steps that it goes through."""
    import torch.distributed as dist

    message, replied = json.loads(line), False

    def failed(error: Exception) -> None:
        nonlocal replied
        if not replied:
            traceback.print_exception(error)
            reply({"error": encode_error(error)})
        replied = True

    try:
        job = LogitsJob.from_json(message["job"])
        store = dist.FileStore(message["meeting_point"], job.run.world_size)
        result = execute(job, message["rank"], store, failed, lambda step: reply({"step": asdict(step)}))
    except Exception as error:
        failed(error)
    else:
        reply({"result": result})


def _lines(source: TextIO) -> Iterator[str]:
    """Lines of `source`. The process ends with it, even while it waits for ranks that are gone."""
    queue: SimpleQueue[str] = SimpleQueue()

    def read() -> None:
        with contextlib.suppress(OSError):
            for line in source:
                queue.put(line)
        os._exit(0)

    threading.Thread(target=read, daemon=True).start()
    while True:
        yield queue.get()


_NEEDED = (
    "ckptkit.megatron.model",
    "ckptkit.megatron.pipeline",
    "ckptkit.megatron.replicas",
    "ckptkit.verification.packing",
    "ckptkit.verification.probes",
    "ckptkit.verification.ranks.what_ran",
    "ckptkit.verification.routing",
    "ckptkit.verification.runs",
    "megatron.core.distributed",
    "safetensors.torch",
    "torch.distributed.tensor",
)
"""Modules that every job imports."""


def _warm_up(device: str) -> None:
    """Import what jobs need. Nothing here may start a thread or CUDA: the process may be forked."""
    from ckptkit.megatron import compat

    compat.import_megatron(eager=device == "cpu")
    for name in _NEEDED:
        importlib.import_module(name)
    find(OPENER)


def _serve_all(channel: socket.socket, seconds: float) -> None:
    """Serve jobs until the channel ends."""
    replies = channel.makefile("w", buffering=1, encoding="utf-8")

    def reply(answer: dict[str, Any]) -> None:
        print(json.dumps(answer), file=replies, flush=True)

    reply({"ready": seconds})
    for line in _lines(channel.makefile("r", encoding="utf-8")):
        _serve(line, reply)


def main(device: str, folder: str, number: str, *descriptors: str) -> None:
    """Serve jobs until the pool ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the pool's process too, which ends this one
    start = time.monotonic()
    _warm_up(device)
    seconds = time.monotonic() - start
    channels = [socket.socket(fileno=int(descriptor)) for descriptor in descriptors]
    if len(channels) == 1:
        os.dup2(2, 1)
        _serve_all(channels[0], seconds)
        return
    again = [sys.executable, "-P", "-m", "ckptkit.verification.ranks.worker", device, folder]
    fork_each(channels, Path(folder), lambda channel: _serve_all(channel, seconds), again)


if __name__ == "__main__":
    main(*sys.argv[1:])
