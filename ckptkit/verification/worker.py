"""One rank: `python -m ckptkit.verification.worker` imports megatron-core once, then takes jobs from standard input.

A job is a line of JSON with a rank and a meeting point; the answer is a line of JSON on standard output. Whatever
libraries print goes to standard error.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any, TextIO

from ckptkit.checkpoint import EMBEDDING, HEAD
from ckptkit.verification.jobs import LogitsJob, decode_error, encode_error, find
from ckptkit.verification.report import installed_versions

if TYPE_CHECKING:
    import torch
    import torch.distributed as dist

    from ckptkit.megatron.pipeline import Pipeline


def execute(job: LogitsJob, rank: int, store: dist.Store) -> dict[str, Any]:
    """Do one rank's part of a job.

    Args:
        job: The job, the same on all its ranks.
        rank: Global rank, below `job.world_size`.
        store: A fresh store on which the ranks meet.

    Returns:
        The fields of `runs.Run` that a rank knows, as JSON types.

    Raises:
        CkptkitError: The checkpoint cannot be loaded, the same error on every rank.
    """
    import torch

    from ckptkit.megatron import parallel

    device = parallel.device_of(job.device, rank)
    torch.set_float32_matmul_precision("highest")
    try:
        parallel.initialize(job.grid, rank, store=store, device=device, timeout_seconds=job.timeout)
        return _run(job, rank, device)
    finally:
        parallel.finalize()
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()


def _run(job: LogitsJob, rank: int, device: torch.device) -> dict[str, Any]:
    from ckptkit.verification.probes import Recorder, megatron_head, megatron_sites
    from ckptkit.verification.runs import run_by_length, save_logits, save_probes

    start = time.monotonic()
    pipeline = _together(job, rank, device)
    loaded = time.monotonic()
    recorder = Recorder(megatron_sites(pipeline.chunks) if job.probes else {})

    def forward(tokens: torch.Tensor) -> torch.Tensor | None:
        with recorder.over(tokens.size(1)):
            return pipeline.forward(tokens)

    rows, groups = run_by_length(job.rows, lambda tokens: pipeline.greedy(tokens, job.greedy), forward)
    if rank == job.world_size - job.grid.stage_size:  # the first rank of the last stage
        save_logits(job.output, groups)
    if job.probes:
        save_probes(Path(job.probes), recorder.states, rank)
    return {
        "rows": rows,
        "feeds": {place: site.feeds for place, site in recorder.sites.items()} | _head(megatron_head(pipeline.chunks)),
        "modules": _modules(pipeline.chunks),
        "versions": installed_versions(),
        "seconds": {"load": loaded - start, "run": time.monotonic() - loaded},
    }


def _together(job: LogitsJob, rank: int, device: torch.device) -> Pipeline:
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

    checkpoint = find(job.opener)(job.checkpoint)
    here = list(job.grid.ranks())[rank]
    shards = [
        checkpoint.shard(
            grid=job.grid,
            pp_rank=here.pp,
            tp_rank=here.tp,
            ep_rank=here.ep,
            vp_stage=vp_stage,
            spec="local",
            layout="text",
        )
        for vp_stage in range(job.grid.vpp)
    ]
    chunks = build_chunks(
        checkpoint.config,
        job.grid,
        _padded_vocab_size(shards, job.grid.tp, checkpoint.padded_vocab_size),
        dtype=getattr(torch, job.dtype),
        device=device,
        sequence_parallel=job.sequence_parallel,
    )
    for vp_stage, (chunk, shard) in enumerate(zip(chunks, shards, strict=True)):
        place = f"tensor rank {here.tp}, pipeline rank {here.pp}, expert rank {here.ep}, virtual stage {vp_stage}"
        where = f"{job.checkpoint} ({place})"
        load_strict(chunk, shard, where=where)
        shard.clear()
    return Pipeline(chunks, job.grid, device, checkpoint.config.vocab_size)


def _padded_vocab_size(shards: list[dict[str, torch.Tensor]], tp: int, stated: int) -> int:
    """Rows of the whole embedding, from the shard's own rows; as stated on ranks that hold no part of it."""
    for shard in shards:
        for name in (EMBEDDING, HEAD):
            if name in shard:
                return int(shard[name].shape[0]) * tp
    return stated


def _head(names: list[str]) -> dict[str, list[str]]:
    return {"head": names} if names else {}


def _modules(chunks: list[Any]) -> dict[str, int]:
    """Classes of megatron-core and of ckptkit among the modules -> how many."""
    counts: dict[str, int] = {}
    for chunk in chunks:
        for module in chunk.modules():
            name = f"{type(module).__module__}.{type(module).__qualname__}"
            if name.startswith(("megatron.", "ckptkit.")):
                counts[name] = counts.get(name, 0) + 1
    return counts


def _answer(line: str) -> dict[str, Any]:
    """What to reply to a line of standard input."""
    import torch.distributed as dist

    message = json.loads(line)
    job = LogitsJob.from_json(message["job"])
    try:
        store = dist.FileStore(message["meeting_point"], job.world_size)
        return {"result": execute(job, message["rank"], store)}
    except Exception as error:
        traceback.print_exc()
        return {"error": encode_error(error)}


def _lines(source: TextIO) -> Iterator[str]:
    """Lines of `source`. The process ends with its parent, even while it waits for ranks that are gone."""
    queue: SimpleQueue[str] = SimpleQueue()

    def read() -> None:
        for line in source:
            queue.put(line)
        os._exit(0)

    threading.Thread(target=read, daemon=True).start()
    while True:
        yield queue.get()


def main() -> None:
    """Serve jobs until standard input ends."""
    replies = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    start = time.monotonic()
    from ckptkit.megatron import compat

    compat.import_megatron()
    print(json.dumps({"ready": time.monotonic() - start}), file=replies, flush=True)
    for line in _lines(sys.stdin):
        print(json.dumps(_answer(line)), file=replies, flush=True)


if __name__ == "__main__":
    main()
