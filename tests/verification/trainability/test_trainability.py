"""`verify --trainability`: what learns passes, and what is frozen, cut off or not rewarded does not."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from ckptkit import convert
from ckptkit.cli.app import app
from ckptkit.errors import UnsupportedError, UsageError
from ckptkit.sharding.grid import Parallelism
from ckptkit.verification.ranks.pool import RankPool
from ckptkit.verification.reports.report import LevelResult
from ckptkit.verification.trainability.goal import advantages_of, error_of, rewards_of
from ckptkit.verification.trainability.judging import _copies
from ckptkit.verification.trainability.level import verify_trainability
from ckptkit.verification.trainability.sampling import Completions
from tests.models import MODELS, llama_config
from tests.surgery.pairs import build_split, save_pair
from tests.verification.conftest import DEVICE

SP, PACKED, RECOMPUTE = {"sequence_parallel": True}, {"packed": True}, {"recompute": True}
SMALL = {"num_hidden_layers": 2, "vocab_size": 64, "hidden_size": 48, "intermediate_size": 96}


def fresh(folder: Path, kind: str) -> Path:
    """A model as its class initialises it: what it says is close to uniform, so that there is much to learn."""
    import torch
    import transformers

    torch.manual_seed(0)
    if kind == "llama":
        config = llama_config("gqa", **SMALL)
        model = transformers.LlamaForCausalLM(config)
    else:
        name, changes = MODELS[kind]
        config = getattr(transformers, f"{name}Config")(
            **{**SMALL, "num_attention_heads": 12, "num_key_value_heads": 4, "max_position_embeddings": 64, **changes}
        )
        model = getattr(transformers, f"{name}ForCausalLM")(config)
    model.save_pretrained(folder / kind)
    return folder / kind


@pytest.fixture(scope="session")
def learner(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Kind -> a small model that was never trained, saved once."""
    made: dict[str, Path] = {}

    def get(kind: str) -> Path:
        if kind not in made:
            made[kind] = fresh(tmp_path_factory.mktemp("fresh"), kind)
        return made[kind]

    return get


def answered(path: Path, pool: RankPool, **how: Any) -> LevelResult:
    (level,) = verify_trainability(path, pool=pool, device=DEVICE, **how).levels
    return level


def passed(answer: LevelResult) -> dict[str, bool]:
    return {check.name: check.passed for check in answer.checks}


GRIDS: list[Any] = [
    ("llama", {"pp": 2, "lr": 6e-3, **PACKED}),
    pytest.param("llama", {"tp": 2, "pp": 2, **SP, **PACKED}, marks=pytest.mark.slow),
    pytest.param("llama", {"dp": 2, "dtype": "bfloat16"}, marks=pytest.mark.slow),
    pytest.param("llama", {"tp": 2, "cp": 2, **SP, **PACKED}, marks=pytest.mark.slow),
    pytest.param("llama", {"pp": 2, "dp": 2, **RECOMPUTE}, marks=pytest.mark.slow),
    pytest.param("llama", {"cp": 2, "pp": 2}, marks=pytest.mark.slow),
    pytest.param("qwen3_moe", {"tp": 2, "ep": 2, **SP, **PACKED}, marks=pytest.mark.slow),
    pytest.param("qwen3_moe", {"pp": 2, "ep": 2, **RECOMPUTE}, marks=pytest.mark.slow),
    pytest.param("gpt_oss", {"tp": 2, "ep": 2, **SP, **PACKED}, marks=pytest.mark.slow),
    pytest.param("mistral", {"tp": 2, "dtype": "float64"}, marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("kind", "how"), GRIDS, ids=str)
def test_it_learns(learner: Callable[[str], Path], pool: RankPool, kind: str, how: dict[str, Any]) -> None:
    answer = answered(learner(kind), pool, **how)
    assert answer.passed, answer.summary
    found = answer.details
    assert found["initial_error"] >= 4.0 and found["final_error"] <= found["target_error"] == found["initial_error"] / 2
    assert 0 < len(found["errors"]) <= found["steps_limit"]
    ran = found["candidate_ran"]
    asked = (how.get("packed", False), how.get("sequence_parallel", False), how.get("cp", 1), how.get("dp", 1))
    assert (ran["packed"], ran["sequence_parallel"], ran["context_parallel"], ran["replicas"]) == asked
    assert any(name.startswith("megatron.") for name in found["megatron_modules"])


@pytest.mark.slow
def test_a_part_learns_alone(tmp_path: Path, pool: RankPool) -> None:
    """A split Llama by its adapter, from a Megatron checkpoint on a grid of its own."""
    split = build_split(tmp_path / "split", save_pair(tmp_path / "pair", dtype="float32"), "mlp", num_last=2)
    convert(split, tmp_path / "meg", to="torch", grid=Parallelism(1, 2, first_stage_layers=2))
    answer = answered(tmp_path / "meg", pool, train_only="*adapter*", lr=1e-3, train_steps=1)
    assert passed(answer)["frozen"] and passed(answer)["gradients"] and passed(answer)["moved"]


@pytest.mark.slow
def test_it_is_the_same_again(learner: Callable[[str], Path], pool: RankPool) -> None:
    runs = [answered(learner("llama"), pool, train_steps=2, seed=seed).details["errors"] for seed in (1, 1, 2)]
    assert runs[0] == runs[1] != runs[2]


def in_this_job(change: Callable[[Any], None]) -> None:
    """Changes the chunks of a rank before it learns, until its job is done."""
    import torch.distributed as dist

    if not dist.is_initialized():  # the first process opens checkpoints, too
        return
    from ckptkit.verification.trainability import candidate

    if candidate.learn.__name__ == "once":  # a rank opens its checkpoint twice
        return
    learn = candidate.learn

    def once(job: Any, part: Any, pipeline: Any, *others: Any) -> Any:
        for chunk in pipeline.chunks:
            change(chunk)
        try:
            return learn(job, part, pipeline, *others)
        finally:
            candidate.learn = learn

    candidate.learn = once


def opened(path: str, **options: Any) -> Any:
    from ckptkit import open_checkpoint

    return open_checkpoint(path, **options)


def frozen(path: str) -> Any:
    """A matrix that is not trained."""
    in_this_job(lambda chunk: chunk.decoder.layers[0].mlp.linear_fc2.weight.requires_grad_(False))
    return opened(path)


def detached(path: str) -> Any:
    """A branch whose output no gradient goes through."""

    def cut(module: Any, inputs: Any, output: Any) -> Any:
        return output[0].detach(), output[1]

    in_this_job(lambda chunk: chunk.decoder.layers[0].self_attention.register_forward_hook(cut))
    return opened(path)


def restless(path: str) -> Any:
    """A matrix that moves although it is not trained."""
    import torch

    def change(chunk: Any) -> None:
        def nudge(*args: Any) -> None:
            if torch.is_grad_enabled():
                with torch.no_grad():
                    chunk.decoder.layers[1].mlp.linear_fc2.weight.view(-1)[0] += 1e-3

        chunk.decoder.layers[0].register_forward_pre_hook(nudge)

    in_this_job(change)
    return opened(path)


def infinite(path: str) -> Any:
    """Logits that are no numbers."""
    import torch

    def change(chunk: Any) -> None:
        with torch.no_grad():
            chunk.decoder.final_layernorm.weight.fill_(float("nan"))

    in_this_job(change)
    return opened(path)


FAULTS: dict[str, tuple[dict[str, Any], str, str]] = {
    # opener -> how it runs, the check that fails, and what it says
    "frozen": ({}, "gradients", "no gradient ever reached decoder.layers.0.mlp.linear_fc2.weight"),
    "detached": ({}, "gradients", "decoder.layers.0.self_attention.linear_proj.weight"),
    "restless": ({"train_only": "*layers.0.*"}, "frozen", "without being trained: decoder.layers.1.mlp.linear_fc2"),
    "infinite": ({}, "finite", "no number"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_seen(learner: Callable[[str], Path], pool: RankPool, fault: str) -> None:
    how, check, words = FAULTS[fault]
    answer = answered(learner("llama"), pool, opener=f"{__name__}:{fault}", train_steps=1, **how)
    assert not answer.passed and not passed(answer)[check]
    assert words in answer.summary


def apart(path: str) -> Any:
    """A norm that is another one on each tensor parallel rank."""
    import torch.distributed as dist

    def change(chunk: Any) -> None:
        chunk.decoder.layers[0].pre_mlp_layernorm.weight.data *= 1 + 1e-3 * dist.get_rank()

    in_this_job(change)
    return opened(path)


def test_copies_that_part_are_seen(learner: Callable[[str], Path], pool: RankPool) -> None:
    answer = answered(learner("llama"), pool, opener=f"{__name__}:apart", train_steps=1, tp=2)
    assert not passed(answer)["copies"]
    assert "other copies of decoder.layers.0." in answer.summary


def test_what_is_rewarded_alike_learns_nothing(learner: Callable[[str], Path], pool: RankPool) -> None:
    """No end token is ever likely: all completions are as long as can be."""
    answer = answered(learner("llama"), pool, opener=f"{__name__}:endless", train_steps=1)
    assert passed(answer)["finite"] and not passed(answer)["signal"] and not passed(answer)["learns"]
    assert "rewarded alike" in answer.summary
    assert set(answer.details["varied"]) == {0.0}


def endless(path: str) -> Any:
    """A head that gives end tokens no chance."""
    import torch

    def change(chunk: Any) -> None:
        def forbid(module: Any, inputs: Any, output: Any) -> Any:
            ends = torch.arange(output[0].size(-1)) % 16 == 0
            return output[0].masked_fill(ends, -1e4), output[1]

        chunk.output_layer.register_forward_hook(forbid)

    in_this_job(change)
    return opened(path)


def test_requests_that_make_no_sense(learner: Callable[[str], Path], tmp_path: Path) -> None:
    path = learner("llama")
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"kind": "style"}, "nothing is learnt called"),
        ({"seed": -1}, "--seed must be"),
        ({"prompts": 0}, "prompts must be"),
        ({"optimizer": "sgd"}, "steps with adamw"),
        ({"save_logits": "x"}, "--save-logits"),
        ({"tolerance": 1e-3}, "--tolerance"),
        ({"replay": False}, "--no-replay"),
        ({"sequence_parallel": True}, "needs a candidate at TP 2"),
        ({"train_only": "nothing"}, "matches no parameter"),
        ({"dp": 2, "dp_kind": "fsdp2"}, "DistributedDataParallel"),
    ]
    for how, words in wrong:
        with pytest.raises(UsageError, match=words):
            verify_trainability(path, **how)
    convert(path, tmp_path / "meg", to="torch", grid=Parallelism(2))
    with pytest.raises(UsageError, match="without a grid of its own"):
        verify_trainability(tmp_path / "meg", tp=2)
    convert(path, tmp_path / "value", to="hf", head="value", head_init="normal")
    with pytest.raises(UnsupportedError, match="value model"):
        verify_trainability(tmp_path / "value")


@pytest.mark.parametrize(
    "options",
    [
        ["a", "b", "--trainability", "length"],
        ["a", "--trainability", "style"],
        ["a", "--trainability", "length", "--rollouts", "r"],
        ["a", "--trainability", "length", "--level", "weights"],
        ["a", "b", "--seed", "1"],
    ],
)
def test_commands_that_make_no_sense(options: list[str]) -> None:
    assert CliRunner().invoke(app, ["verify", *options]).exit_code == 2


def test_the_command_writes_every_report(
    learner: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, pool: RankPool, tmp_path: Path
) -> None:
    from ckptkit.verification.trainability import level

    monkeypatch.setattr(level, "_own_ranks", lambda how: nullcontext(pool))
    files = {name: tmp_path / f"r.{name}" for name in ("json", "junit", "html", "markdown")}
    options = [str(part) for name, file in files.items() for part in (f"--{name}", file)]
    command = ["verify", str(learner("llama")), "--trainability", "length", "--train-steps", "1", *options]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 1, result.output
    assert "does not learn" in result.output
    document = json.loads(files["json"].read_text())
    assert document["verdict"] == "does not learn" and document["sides"].keys() == {"candidate"}
    (found,) = document["levels"]
    assert found["name"] == "trainability" and found["details"]["steps_limit"] == 1
    assert "Error by step" in files["html"].read_text() and "The model does not learn" in files["html"].read_text()
    assert "does not learn" in files["markdown"].read_text()
    assert '<testsuite name="trainability"' in files["junit"].read_text()


@pytest.mark.parametrize(
    ("others", "passed"),
    [
        ([1.0, 10.0], True),
        ([1.0, 3.0], False),
        ([4.0, 10.0], False),
        ([math.nan, 10.0], False),
        ([1.0, math.nan], False),
    ],
)
def test_copies_are_compared_by_sum_and_norm(others: list[float], passed: bool) -> None:
    answers: list[dict[str, Any]] = [{"prints": [["w", 0, *values]]} for values in ([1.0, 10.0], others)]
    assert _copies(answers).passed == passed


def test_advantages() -> None:
    assert advantages_of([1.0] * 16) == [0.0] * 16
    found = advantages_of([-1.0, *[-3.0] * 7, *[-2.0] * 8])
    assert found[0] > 0 > found[1] and found[8:] == [0.0] * 8
    assert sum(found) == pytest.approx(0.0) and sum(value**2 for value in found) == pytest.approx(16.0)
    assert rewards_of([3, 4, 1]) == [0.0, -1.0, -2.0] and error_of([3, 4, 1]) == 1.0


def test_what_counts_of_a_completion() -> None:
    found = Completions([[1, 2, 3, 7, 8], [4, 5, 6, 9]], [3, 3])
    assert found.lengths == [2, 1]
    assert found.weighted([0.5, -1.0]) == [[None, None, 0.5, 0.5, None], [None, None, -1.0, None]]


def witness(path: str) -> Any:
    """Keeps what the first step sampled, its advantages, and the gradients of the norms."""
    import torch
    import torch.distributed as dist

    if not dist.is_initialized():
        return opened(path)
    from ckptkit.verification.trainability import candidate

    original, rank = candidate._Learner, dist.get_rank()
    if original.__name__ == "Witness":
        return opened(path)

    class Witness(original):  # type: ignore[misc]
        def _batches(self, found: Any, advantages: list[float]) -> Any:
            self.seen = {"rows": found.rows, "weights": found.weighted(advantages)}
            return super()._batches(found, advantages)

        def _look(self, loss: float) -> None:
            gradients = self.training.gradients(0)
            norms = {self.names[0][name]: gradient.clone() for name, gradient in gradients.items() if "norm" in name}
            torch.save({**self.seen, "loss": loss, "gradients": norms}, Path(path) / f"seen.{rank}.pt")
            super()._look(loss)

        def run(self) -> Any:
            candidate._Learner = original  # type: ignore[misc]
            return super().run()

    candidate._Learner = Witness  # type: ignore[misc]
    return opened(path)


@pytest.mark.parametrize(
    "how",
    [
        {"tp": 2, **SP, **PACKED},
        pytest.param({"pp": 2}, marks=pytest.mark.slow),
        pytest.param({"dp": 2, "cp": 2, **PACKED, **RECOMPUTE}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_against_the_policy_gradient_of_transformers(tmp_path: Path, pool: RankPool, how: dict[str, Any]) -> None:
    """REINFORCE, written out: what each sampled token's log-probability gets is the advantage of its completion."""
    import torch

    from ckptkit.verification.reference import load_model

    path = fresh(tmp_path, "llama")
    answered(path, pool, opener=f"{__name__}:witness", train_steps=1, **how)
    seen = [torch.load(file) for file in sorted(path.glob("seen.*.pt"))]
    model = load_model(path, torch.float32).train()
    total, count = torch.zeros(()), 0
    for row, weights in zip(seen[0]["rows"], seen[0]["weights"], strict=True):
        start = next(at for at, weight in enumerate(weights) if weight is not None)
        scores = model(input_ids=torch.tensor([row])).logits[0, start:-1].log_softmax(-1)
        total = total - weights[start] * scores.gather(1, torch.tensor(row[start + 1 :])[:, None]).sum()
        count += len(row) - 1 - start
    loss = total / count
    loss.backward()
    assert seen[0]["loss"] == pytest.approx(float(loss.detach()), abs=1e-5)
    theirs = {
        "decoder.layers.0.self_attention.linear_qkv.layer_norm_weight": model.model.layers[0].input_layernorm.weight,
        "decoder.layers.1.mlp.linear_fc1.layer_norm_weight": model.model.layers[1].post_attention_layernorm.weight,
        "decoder.final_layernorm.weight": model.model.norm.weight,
    }
    for name, weight in theirs.items():
        assert weight.grad is not None
        found = [one["gradients"][name] for one in seen if name in one["gradients"]]
        assert found
        for gradient in found:
            torch.testing.assert_close(gradient, weight.grad, rtol=1e-3, atol=1e-4 * float(weight.grad.abs().max()))
