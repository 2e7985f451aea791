from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ckptkit.errors import InputError, UsageError, VerificationError
from ckptkit.megatron.run_config import RunConfig
from ckptkit.sharding.grid import Parallelism
from ckptkit.verification.ranks.jobs import LogitsJob
from ckptkit.verification.ranks.pool import RankPool
from ckptkit.verification.run_options import RunOptions
from tests.ranks import own_environment
from tests.verification.conftest import DEVICE
from tests.verification.stand_in import OPENER, edit_shard, write_stand_in

ROOT = Path(__file__).parents[3]


def on(grid: Parallelism, **how: Any) -> RunConfig:
    return RunConfig(grid, device=DEVICE, **how)


@pytest.fixture(scope="module")
def job(llama: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> LogitsJob:
    folder = tmp_path_factory.mktemp("pool")
    source = llama("gqa", num_hidden_layers=2)
    candidate = write_stand_in(source, folder / "meg", Parallelism(2))
    output = str(folder / "out.safetensors")
    return LogitsJob(str(candidate), on(Parallelism(2)), [[1, 2, 3, 4, 5]], output, opener=OPENER)


@pytest.fixture(scope="module")
def two() -> Iterator[RankPool]:
    with RankPool(2) as ranks:
        yield ranks


def pids(ranks: RankPool) -> list[int]:
    """Process ids of the ranks: on the CPU those are forked from one process, if there are several."""
    if ranks._processes is None:
        return []
    started = ranks._processes.pids
    if len(started) == ranks.world_size:
        return started
    (parent,) = started
    return [int(pid) for pid in Path(f"/proc/{parent}/task/{parent}/children").read_text().split()]


def test_an_error_of_one_rank_reaches_the_caller_and_the_ranks_stay(two: RankPool, job: LogitsJob) -> None:
    two.run(job)
    before = pids(two)
    with pytest.raises(InputError, match="rank 1's file: this shard is damaged; get another"):
        two.run(replace(job, opener="tests.verification.openers:one_bad_rank"))
    with pytest.raises(VerificationError, match="ZeroDivisionError: integer division"):
        two.run(replace(job, opener="tests.verification.openers:one_crash"))
    assert len(two.run(job)) == 2
    assert pids(two) == before


def test_a_dead_rank_is_noticed_and_replaced(two: RankPool, job: LogitsJob) -> None:
    two.run(job)
    os.kill(pids(two)[1], signal.SIGKILL)
    with pytest.raises(VerificationError, match=r"rank 1 died \(killed by signal 9\).*out of memory"):
        two.run(job)
    with pytest.raises(VerificationError, match=r"rank \d died \(exit code 3\).*this is the end"):
        two.run(replace(job, opener="tests.verification.openers:die"))
    assert len(two.run(job)) == 2


def test_silence_has_an_end(job: LogitsJob) -> None:
    with RankPool(1) as one:
        one.start(DEVICE)
        with pytest.raises(VerificationError, match=r"no answer from rank 0 within 0\.5 seconds"):
            one.run(
                replace(
                    job,
                    run=on(Parallelism()),
                    options=RunOptions(timeout=0.5),
                    opener="tests.verification.openers:hang",
                )
            )
        assert pids(one) == []
    with RankPool(1, start_timeout=0.05) as slow, pytest.raises(VerificationError, match="starting the ranks"):
        slow.start()


def test_ranks_begin_before_they_are_needed(job: LogitsJob) -> None:
    with RankPool(2) as ranks:
        begun = ranks.begin(DEVICE)
        assert ranks.begin(DEVICE) is begun
        assert len(ranks.run(job)) == 2
        assert ranks._processes is begun and len(pids(ranks)) == 2


def imports_start_threads() -> bool:
    """Whether a process of its own has several threads once it has imported what jobs need."""
    program = (
        "import os\n"
        "from ckptkit.verification.ranks.worker import _warm_up\n"
        "_warm_up('cpu')\n"
        "print(len(os.listdir('/proc/self/task')))\n"
    )
    done = subprocess.run([sys.executable, "-c", program], env=own_environment(), capture_output=True, text=True)
    return int(done.stdout.splitlines()[-1]) > 1


@pytest.mark.skipif(DEVICE != "cpu", reason="CUDA does not survive a fork")
def test_ranks_on_the_cpu_are_forked_from_one_process(two: RankPool, job: LogitsJob) -> None:
    if imports_start_threads():
        pytest.skip("an import starts a thread here, so ranks begin anew")
    two.run(job)
    assert two._processes is not None
    (parent,) = two._processes.pids
    ranks = pids(two)
    assert len(ranks) == 2 and parent not in ranks
    for pid in ranks:  # none has begun anew
        assert Path(f"/proc/{pid}/cmdline").read_text() == Path(f"/proc/{parent}/cmdline").read_text()
    with pytest.raises(InputError, match="the compiler of torch is not loaded"):  # half of the time of the imports
        two.run(replace(job, opener="tests.verification.openers:say_what_is_loaded"))


@pytest.mark.skipif(DEVICE != "cpu", reason="CUDA does not survive a fork")
def test_ranks_begin_anew_where_an_import_starts_a_thread(
    job: LogitsJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = "import threading, time", "threading.Thread(target=time.sleep, args=(99,), daemon=True).start()"
    (tmp_path / "sitecustomize.py").write_text("\n".join(lines))
    monkeypatch.syspath_prepend(tmp_path)
    with RankPool(2) as ranks:
        assert len(ranks.run(job)) == 2
        commands = [Path(f"/proc/{pid}/cmdline").read_text().split("\0") for pid in pids(ranks)]
        assert [command[-3] for command in commands] == ["0", "1"]
        os.kill(pids(ranks)[1], signal.SIGKILL)
        with pytest.raises(VerificationError, match=r"rank 1 died \(killed by signal 9\)"):
            ranks.run(replace(job, options=RunOptions(timeout=60.0)))


@pytest.mark.skipif(DEVICE != "cpu", reason="CUDA does not survive a fork")
def test_ranks_end_with_the_process_that_started_them(tmp_path: Path) -> None:
    program = (
        "import sys\n"
        "from ckptkit.verification.ranks.pool import RankPool\n"
        "with RankPool(2) as ranks:\n"
        "    print(ranks.start().pids[0], flush=True)\n"
        "    sys.stdin.read()\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT
    )
    assert process.stdin is not None and process.stdout is not None
    parent = int(process.stdout.readline())
    ranks = [int(pid) for pid in Path(f"/proc/{parent}/task/{parent}/children").read_text().split()]
    process.kill()
    process.communicate()
    deadline = time.monotonic() + 60
    while alive := [pid for pid in (parent, *ranks) if running(pid)]:
        assert time.monotonic() < deadline, alive
        time.sleep(0.05)
    assert len(ranks) == 2


def running(pid: int) -> bool:
    """Whether a process is there, and not only its number until somebody asks for its exit code."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_a_rank_that_ends_while_nobody_waits_is_reported(job: LogitsJob, monkeypatch: pytest.MonkeyPatch) -> None:
    with RankPool(2) as ranks:
        monkeypatch.setattr(sys, "executable", "/bin/false")
        ranks.begin(DEVICE)
        monkeypatch.undo()
        with pytest.raises(VerificationError, match=r"starting the ranks: rank \d died \(exit code 1\)"):
            ranks.run(job)
        assert len(ranks.run(job)) == 2  # others have taken their place


def test_ranks_import_nothing_from_the_current_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "torch.py").write_text("raise SystemExit('not this one')")
    monkeypatch.chdir(tmp_path)
    with RankPool(1) as one:
        one.start()
        assert len(pids(one)) == 1


def test_who_is_interrupted_leaves_no_answer_for_the_next(
    two: RankPool, job: LogitsJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    two.run(job)
    with monkeypatch.context() as patch:
        patch.setattr(two, "_collect", interrupted)
        with pytest.raises(KeyboardInterrupt):
            two.run(job)
        assert pids(two) == []
        with pytest.raises(KeyboardInterrupt):
            two.start(DEVICE)
        assert pids(two) == []
    assert len(two.run(replace(job, rows=[[1, 2]]))[0]["rows"][0]) == 2


def test_a_pool_refuses_what_it_cannot_hold(two: RankPool, job: LogitsJob) -> None:
    with pytest.raises(UsageError, match="TP4 x PP1 needs 4 ranks, the pool has 2"):
        two.run(replace(job, run=on(Parallelism(4))))


def test_sequence_parallelism_changes_nothing(pool: RankPool, job: LogitsJob, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    split = str(tmp_path / "split.safetensors")
    pool.run(replace(job, probes=str(tmp_path / "whole")))
    run = on(Parallelism(2), sequence_parallel=True)
    answers = pool.run(replace(job, output=split, probes=str(tmp_path / "split"), run=run))
    expected, found = load_file(job.output), load_file(split)
    assert found["logits.5"].shape == (1, 5, 250)  # 5 positions do not divide over 2 ranks
    assert (expected["logits.5"] - found["logits.5"]).abs().max() < 1e-4 * expected["logits.5"].abs().max()
    states = [load_file(tmp_path / kind / "rank_1.safetensors") for kind in ("whole", "split")]
    for name, state in states[0].items():
        assert (state - states[1][name]).abs().max() < 1e-4 * state.abs().max(), name
    assert answers[0]["feeds"]["head"] == ["output_layer.weight"]


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_replicas_that_loaded_something_else_are_named(pool: RankPool, job: LogitsJob, kind: str) -> None:
    """Both kinds make every replica a copy of the first one, so that their logits cannot tell."""
    twice = replace(job, run=on(Parallelism(2), dp=2, dp_kind=kind))
    assert len(pool.run(twice)) == 4
    with pytest.raises(VerificationError, match=r"replica 1 loaded another decoder\.final_layernorm\.weight"):
        pool.run(replace(twice, opener="tests.verification.openers:one_other"))


def test_jobs_survive_the_wire(job: LogitsJob) -> None:
    uneven = replace(job, run=on(Parallelism(2, 3, first_stage_layers=1)), greedy=3)
    assert LogitsJob.from_json(uneven.to_json()) == uneven


def test_inside_torchrun_every_process_is_its_own_rank(llama: Callable[..., Path], tmp_path: Path) -> None:
    source, grid = llama("gqa", num_hidden_layers=2), Parallelism(1, 2)
    good, bad = (write_stand_in(source, tmp_path / name, grid) for name in ("good", "bad"))
    edit_shard(bad, lambda tensors: tensors["decoder.layers.0.mlp.linear_fc2.weight"].mul_(2), pp_rank=1)
    program = (
        "import json, os, sys\n"
        "from ckptkit.verification.logits import verify_logits\n"
        "source, opener, result, *candidates = sys.argv[1:]\n"
        "found = []\n"
        "for candidate in candidates:\n"
        "    report = verify_logits((source, 'hf'), (candidate, 'megatron'), opener=opener, tolerance=1e-4, greedy=2)\n"
        "    place = None if report.location is None else report.location.place\n"
        "    found.append([report.passed, place, len(report.own_modules)])\n"
        "open(result + os.environ['RANK'], 'w').write(json.dumps(found))\n"
    )
    script = tmp_path / "script.py"
    script.write_text(program)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script)]
    arguments = [str(source), OPENER, str(tmp_path / "result"), str(good), str(bad)]
    done = subprocess.run([*command, *arguments], env=own_environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    for rank in range(2):
        (passed, nowhere, modules), (failed, place, _) = json.loads((tmp_path / f"result{rank}").read_text())
        assert passed and nowhere is None and modules > 3
        assert not failed and place == "layer 1 mlp"
