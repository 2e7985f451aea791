"""The command line: options reach what they control, every end has its exit code, and stdout stays clean."""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, get_type_hints

import pytest
from typer.testing import CliRunner

import ckptkit
from ckptkit.checkpoints.source_options import SourceOptions
from ckptkit.cli import app as cli
from ckptkit.conversion import convert as conversion
from ckptkit.conversion.execution import ConversionResult
from ckptkit.errors import (
    CkptkitError,
    InputError,
    StorageError,
    UnsupportedError,
    UsageError,
    VerificationError,
)
from ckptkit.inspection import summary
from ckptkit.inspection.summary import Inspection
from ckptkit.io.world import World
from ckptkit.sharding.grid import Parallelism, StatedGrid
from ckptkit.steps import Step
from ckptkit.verification import levels
from ckptkit.verification.reports.report import LevelResult, VerificationReport
from ckptkit.verification.reports.results import Check
from fixtures.make_damaged import SOUND

RESULT = ConversionResult(
    source={
        "path": "a",
        "format": "hf",
        "family": "llama",
        "architecture": "LlamaForCausalLM",
        "grid": "TP1 x PP1",
    },
    target={"path": "b", "format": "torch", "grid": "TP3 x PP2"},
    files=[
        {"path": "release/mp_rank_00_000/model_optim_rng.pt", "bytes": 45_300_000, "tensors": 91},
        {"path": "latest_checkpointed_iteration.txt", "bytes": 7, "tensors": 0},
    ],
    bytes_total=45_300_007,
    bytes_through=40_000_000,
    bytes_rearranged=5_300_007,
    memory_needed=256 * 2**20,
    disk_needed=45_300_007,
    disk_free=10**9,
    coverage={"used": 272},
    lossy=["3 tensors are rounded (F32 -> BF16)"],
    dropped=[],
    notes=["not in Megatron's arguments: [rope] factor"],
    dry_run=True,
    seconds=0.5,
    hashes={},
)
INSPECTION = Inspection(
    path="a",
    format="hf",
    family="llama",
    architecture="LlamaForCausalLM",
    grid="TP1 x PP1",
    parameters=134_515_008,
    bytes=269_030_016,
    dtypes={"BF16": 269_030_016},
    roles=[{"role": "embedding", "tensors": 1, "parameters": 28_311_552, "bytes": 56_623_104}],
    optimizer={"tensors": 2, "nbytes": 512},
    megatron_flags=None,
    inexpressible=[],
    notes=[],
)
SAME = VerificationReport("a", "b", [LevelResult("weights", True, "5 bytes equal")])
DIFFERS = VerificationReport("a", "b", [LevelResult("weights", False, "1 tensor differs")])


@dataclass
class Callee:
    """Stands in for a function: records its arguments, then returns or raises what it was told to."""

    result: Any
    error: BaseException | None = None
    arguments: tuple[Any, ...] = ()
    options: dict[str, Any] = field(default_factory=dict)

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        self.arguments, self.options = arguments, options
        if self.error is not None:
            raise self.error
        return self.result

    def told(self) -> None:
        """Checks, and takes off, what the function is to call while it works."""
        self.options.pop("progress")(1, 2)
        self.options.pop("tell")(Step("loading"))


@pytest.fixture
def convert(monkeypatch):
    callee = Callee(RESULT)
    monkeypatch.setattr(conversion, "convert", callee)
    return callee


@pytest.fixture
def verify(monkeypatch):
    callee = Callee(SAME)
    monkeypatch.setattr(levels, "verify", callee)
    return callee


def run(*arguments: str):
    return CliRunner().invoke(cli.app, arguments, prog_name="ckptkit", catch_exceptions=False)


def test_defaults_of_convert(convert):
    assert run("convert", "a", "b", "--to", "hf").exit_code == 0
    assert convert.arguments == ("a", "b")
    assert convert.options == {
        "to": "hf",
        "grid": Parallelism(),
        "spec": "te",
        "dtype": None,
        "shard_size": None,
        "make_vocab_size_divisible_by": None,
        "hf_reference": None,
        "iteration": None,
        "stored_grid": StatedGrid(),
        "vocab_size": None,
        "strict_config": False,
        "experts": None,
        "layout": "full",
        "head": None,
        "head_init": None,
        "megatron_model": "gpt",
        "megatron_core": "0.16",
        "adapter": None,
        "adapter_layout": None,
        "part": None,
        "lora_alpha": None,
        "lossy": False,
        "quantise": None,
        "dry_run": False,
        "overwrite": False,
        "resume": False,
        "threads": None,
        "hash": False,
        "progress": None,
        "world": World(),
    }


def test_every_option_of_convert_arrives(convert):
    line = (
        "convert a b --to torch --tp 4 --pp 3 --vpp 2 --ep 2 --etp 2 --spec local --dtype bfloat16"
        " --experts sequential --layout text --shard-size 5GB --hash"
        " --make-vocab-size-divisible-by 64 --hf-reference ref --strict-config"
        " --iteration 7 --vocab-size 250 --src-tp 2 --src-pp 4 --src-vpp 2 --src-ep 8 --src-etp 1"
        " --src-first-stage-layers 5 --src-last-stage-layers 3"
        " --head value --head-init normal --megatron-model hybrid --megatron-core 0.19"
        " --dry-run --overwrite --resume --threads 3"
        " --adapter lora --adapter-layout peft --part model --lora-alpha 16 --lossy --quantise like:q"
    )
    assert run(*line.split()).exit_code == 0
    assert convert.options == {
        "to": "torch",
        "grid": Parallelism(4, 3, 2, ep=2, etp=2),
        "spec": "local",
        "dtype": "bfloat16",
        "shard_size": 5_000_000_000,
        "make_vocab_size_divisible_by": 64,
        "hf_reference": "ref",
        "iteration": 7,
        "stored_grid": StatedGrid(2, 4, 2, 8, 1, 5, 3),
        "vocab_size": 250,
        "strict_config": True,
        "experts": "sequential",
        "layout": "text",
        "head": "value",
        "head_init": "normal",
        "megatron_model": "hybrid",
        "megatron_core": "0.19",
        "adapter": "lora",
        "adapter_layout": "peft",
        "part": "model",
        "lora_alpha": 16.0,
        "lossy": True,
        "quantise": "like:q",
        "dry_run": True,
        "overwrite": True,
        "resume": True,
        "threads": 3,
        "hash": True,
        "progress": None,
        "world": World(),
    }


def test_text_only_is_the_layout_text(convert):
    assert run("convert", "a", "b", "--to", "hf", "--text-only").exit_code == 0
    assert convert.options["layout"] == "text"
    assert run("convert", "a", "b", "--to", "hf", "--text-only", "--layout", "legacy").exit_code == 2


@pytest.mark.parametrize(
    ("first", "last"),
    [
        ("--decoder-first-pipeline-num-layers", "--decoder-last-pipeline-num-layers"),
        ("--num-layers-in-first-pipeline-stage", "--num-layers-in-last-pipeline-stage"),
    ],
)
def test_megatron_names_of_the_grid(convert, first, last):
    line = (
        "convert a b --to torch --tensor-model-parallel-size 2 --pipeline-model-parallel-size 4"
        f" --virtual-pipeline-model-parallel-size 2 {first} 5 {last} 3"
        " --account-for-embedding-in-pipeline-split --account-for-loss-in-pipeline-split"
    )
    assert run(*line.split()).exit_code == 0
    assert convert.options["grid"] == Parallelism(2, 4, 2, 5, 3, True, True)


def test_the_plan_as_people_read_it(convert):
    result = run("convert", "a", "b", "--to", "torch", "--dry-run")
    for text in (
        "LlamaForCausalLM (llama): hf -> torch TP3 x PP2",
        "release/mp_rank_00_000/model_optim_rng.pt",
        "45.3 MB",
        "40.0 MB (88%)",
        "5.30 MB (12%)",
        "268 MB",
        "1.00 GB free",
        "272 used",
        "lossy: 3 tensors are rounded (F32 -> BF16)",
        "note: not in Megatron's arguments: [rope] factor",
        "Nothing was written",
    ):
        assert text in result.stdout
    assert "short" not in result.stdout
    assert result.stderr == ""
    assert "\x1b" not in result.output


def test_a_full_disk_shows(convert):
    convert.result = replace(RESULT, disk_free=5_300_007)
    assert "40.0 MB short" in run("convert", "a", "b", "--to", "torch", "--dry-run").stdout


def test_a_finished_conversion_and_its_hashes(convert):
    hashes = {"latest_checkpointed_iteration.txt": "ab" * 32}
    convert.result = replace(RESULT, dry_run=False, hashes=hashes)
    text = run("convert", "a", "b", "--to", "torch", "--hash").stdout
    assert "Wrote 45.3 MB in 0.50 s (90.6 MB/s)" in text
    assert "ab" * 32 in text


def test_the_time_of_a_fit_is_no_copying_rate(convert):
    convert.result = replace(RESULT, dry_run=False, seconds=60.5, seconds_fitting=60.0)
    text = run("convert", "a", "b", "--to", "torch").stdout
    assert "Fitted the adapter in 60.00 s. Wrote 45.3 MB in 0.50 s (90.6 MB/s)." in text


def test_convert_as_json(convert):
    result = run("convert", "a", "b", "--to", "torch", "--json")
    assert json.loads(result.stdout) == RESULT.to_dict()
    assert result.stderr == ""


@pytest.mark.parametrize(
    ("error", "code", "kind"),
    [
        (UsageError, 2, "usage"),
        (InputError, 3, "input"),
        (UnsupportedError, 4, "unsupported"),
        (StorageError, 5, "storage"),
        (VerificationError, 6, "verification"),
    ],
)
def test_an_error_is_one_line_and_a_code(convert, error: type[CkptkitError], code, kind):
    convert.error = error("is broken\nbadly", where="model.safetensors", hint="mend it")
    result = run("convert", "a", "b", "--to", "hf")
    assert (result.exit_code, result.stdout) == (code, "")
    assert result.stderr == "error: model.safetensors: is broken badly; mend it\n"
    result = run("convert", "a", "b", "--to", "hf", "--json")
    assert result.exit_code == code
    told = json.loads(result.stdout)["error"]
    assert (told["kind"], told["exit_code"], told["where"], told["hint"]) == (
        kind,
        code,
        "model.safetensors",
        "mend it",
    )


def test_an_operating_system_error_is_not_a_bug(convert):
    convert.error = PermissionError(13, "Permission denied", "a/config.json")
    result = run("convert", "a", "b", "--to", "hf")
    assert (result.exit_code, result.stderr) == (5, "error: a/config.json: Permission denied\n")


def test_a_bug_is_named_and_can_be_traced(convert, monkeypatch):
    convert.error = KeyError("weight")
    result = run("convert", "a", "b", "--to", "hf")
    assert result.exit_code == 70
    assert result.stderr == "error: internal error: KeyError: 'weight'; set CKPTKIT_TRACEBACK=1 to see where\n"
    monkeypatch.setenv("CKPTKIT_TRACEBACK", "1")
    assert "Traceback (most recent call last)" in run("convert", "a", "b", "--to", "hf").stderr


@pytest.mark.parametrize(
    "line",
    [
        "",
        "--to nonsense",
        "--to hf --tp x",
        "--to hf --threads 0",
        "--to hf --shard-size huge",
        "--to torch --tp 0",
        "--to torch --vpp 2",
        "--to hf --no-such-option",
    ],
)
def test_bad_usage(convert, line):
    result = run("convert", "a", "b", *line.split(), "--json")
    assert result.exit_code == 2
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    assert json.loads(result.stdout)["error"]["kind"] == "usage"
    assert convert.arguments == ()


def test_an_unknown_command():
    result = run("konvert")
    assert (result.exit_code, result.stdout) == (2, "")
    assert "konvert" in result.stderr


@pytest.mark.parametrize(
    ("signum", "code", "kind"), [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "terminated")]
)
def test_a_signal_names_the_command_that_resumes(monkeypatch, signum, code, kind):
    def convert(*arguments, **options):
        os.kill(os.getpid(), signum)
        time.sleep(10)
        raise AssertionError("the signal did not arrive")

    monkeypatch.setattr(conversion, "convert", convert)
    before = signal.getsignal(signum)
    result = run("convert", "a b", "c", "--to", "hf", "--json")
    assert result.exit_code == code
    assert result.stderr.endswith("continue with: ckptkit convert 'a b' c --to hf --json --resume\n")
    assert json.loads(result.stdout)["error"]["kind"] == kind
    assert signal.getsignal(signum) is before
    assert "--resume" not in run("convert", "a", "b", "--to", "hf", "--dry-run").stderr
    assert run("convert", "a", "b", "--to", "hf", "--resume").stderr.count("--resume") == 1


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("merge", "did you mean ckptkit adapter merge or ckptkit surgery merge"),
        ("average", "did you mean ckptkit surgery average"),
        ("nonsense", "see ckptkit --help"),
    ],
)
def test_a_command_of_a_group_is_named(word, said):
    result = run(word, "a")
    assert result.exit_code == 2 and result.stderr == f"error: No such command '{word}'; {said}\n"


def test_inspect(monkeypatch):
    monkeypatch.setattr(summary, "inspect", Callee(INSPECTION))
    text = run("inspect", "a").stdout
    for part in ("LlamaForCausalLM (llama), hf, TP1 x PP1", "134,515,008 (135 M)", "28.3 M", "56.6 MB", "BF16 269 MB"):
        assert part in text
    assert json.loads(run("inspect", "a", "--json").stdout) == INSPECTION.to_dict()


def test_families():
    expected = [json.loads(json.dumps(asdict(item))) for item in ckptkit.supported_architectures()]
    assert "LlamaForCausalLM" in {item["architecture"] for item in expected}
    assert json.loads(run("families", "--json").stdout) == expected
    assert "LlamaForCausalLM" in run("families").stdout
    for name in ("qwen3_moe", "Qwen3MoeForCausalLM"):
        found = json.loads(run("families", name, "--json").stdout)
        assert {item["architecture"] for item in found} == {"Qwen3MoeForCausalLM"}
    unknown = run("families", "qwen4")
    assert unknown.exit_code == 2 and "did you mean qwen" in unknown.stderr


def test_verify_passes_and_differs(verify):
    result = run("verify", "a", "b")
    assert result.exit_code == 0 and result.stdout.splitlines()[-1] == "same"
    assert verify.arguments == ("a", "b")
    verify.told()
    assert verify.options == {
        "level": "logits",
        "device": "cpu",
        "dtype": "float32",
        "prompts": None,
        "tokens": None,
        "tolerance": None,
        "replay": True,
        "packed": False,
        "sequence_parallel": False,
        "dp": 1,
        "cp": 1,
        "dp_kind": "ddp",
        "recompute": False,
        "capacity": 8192,
        "train_steps": 0,
        "optimizer": "adamw",
        "lr": None,
        "train_only": None,
        "save_logits": None,
        "timeout": None,
        "tp": None,
        "pp": None,
        "ep": None,
        "keep_going": False,
        "reference_source": SourceOptions(),
        "candidate_source": SourceOptions(),
        "command": "ckptkit verify a b",
        "hash": False,
    }
    verify.result = DIFFERS
    result = run("verify", "a", "b", "--json", "-")
    assert result.exit_code == 1
    assert json.loads(result.stdout) == DIFFERS.to_dict()


def test_every_option_of_verify_arrives(verify, tmp_path):
    report = tmp_path / "report.json"
    line = f"verify a b --level weights --device cuda --dtype bfloat16 --tolerance 1e-4 --save-logits l --json {report}"
    how = "--packed --sequence-parallel --dp 2 --cp 3 --dp-kind fsdp2 --timeout 60 --tp 4 --pp 2 --ep 8 --keep-going"
    how += " --recompute --capacity 4096 --train-steps 3 --optimizer sgd --lr 0.5 --train-only *a*"
    how += " --ref-iteration 3 --cand-iteration 4 --ref-hf-reference r --cand-src-tp 2 --cand-vocab-size 9"
    arguments = [*line.split(), *how.split(), "--hash", "--prompt", "one", "--prompt", "two three"]
    result = run(*arguments)
    assert result.exit_code == 0 and result.stdout.splitlines()[-1] == "same"
    verify.told()
    assert verify.options == {
        "level": "weights",
        "device": "cuda",
        "dtype": "bfloat16",
        "prompts": ["one", "two three"],
        "tokens": None,
        "tolerance": 1e-4,
        "replay": True,
        "packed": True,
        "sequence_parallel": True,
        "dp": 2,
        "cp": 3,
        "dp_kind": "fsdp2",
        "recompute": True,
        "capacity": 4096,
        "train_steps": 3,
        "optimizer": "sgd",
        "lr": 0.5,
        "train_only": "*a*",
        "save_logits": "l",
        "timeout": 60.0,
        "tp": 4,
        "pp": 2,
        "ep": 8,
        "keep_going": True,
        "reference_source": SourceOptions("r", 3),
        "candidate_source": SourceOptions(None, 4, StatedGrid(2), 9),
        "command": shlex.join(["ckptkit", *arguments]),
        "hash": True,
    }
    assert json.loads(report.read_text()) == SAME.to_dict()


def test_token_ids_from_a_file(verify, tmp_path):
    tokens = tmp_path / "tokens.json"
    tokens.write_text("[[1, 2], [3]]")
    assert run("verify", "a", "b", "--tokens", str(tokens)).exit_code == 0
    assert verify.options["tokens"] == [[1, 2], [3]]
    tokens.write_text("no json")
    verify.arguments = ()
    result = run("verify", "a", "b", "--tokens", str(tokens))
    assert result.exit_code == 2
    assert str(tokens) in result.stderr
    assert verify.arguments == ()


def test_prompt_and_tokens_exclude_each_other(verify, tmp_path):
    assert run("verify", "a", "b", "--prompt", "x", "--tokens", str(tmp_path / "t")).exit_code == 2
    assert verify.arguments == ()


def test_the_report_has_a_place_to_go_before_the_work_starts(verify, tmp_path):
    result = run("verify", "a", "b", "--json", str(tmp_path / "missing" / "report.json"))
    assert result.exit_code == 2
    assert verify.arguments == ()


def test_a_failed_verification_run_is_in_the_json_file(verify, tmp_path):
    verify.error = VerificationError("a rank died")
    report = tmp_path / "report.json"
    result = run("verify", "a", "b", "--json", str(report))
    assert (result.exit_code, result.stdout) == (6, "")
    assert json.loads(report.read_text())["error"]["kind"] == "verification"


def test_markdown_on_stdout_is_alone_there(verify, tmp_path):
    verify.result = DIFFERS
    report = tmp_path / "report.json"
    result = run("verify", "a", "b", "--markdown", "-", "--json", str(report))
    assert result.exit_code == 1
    assert result.stdout.startswith("## ") and result.stdout.count("The models differ") == 1
    assert "differs\n" not in result.stdout and json.loads(report.read_text()) == DIFFERS.to_dict()
    verify.error = VerificationError("a rank died")
    assert "could not be run" in run("verify", "a", "b", "--markdown", "-").stdout
    verify.arguments = ()
    assert run("verify", "a", "b", "--markdown", "-", "--json", "-").exit_code == 2
    assert verify.arguments == ()


def test_failed_checks_are_annotations_in_github_actions(verify, monkeypatch):
    monkeypatch.setenv("GITHUB_ACTIONS", "true")
    assert "::error" not in run("verify", "a", "b").stderr
    level = LevelResult("weights", False, "", {"messages": ["100 %"]}, [Check("bytes", False, "a, b")])
    verify.result = VerificationReport("a", "b", [level])
    result = run("verify", "a", "b", "--json", "-")
    assert result.stderr.splitlines() == ["::error title=ckptkit verify%3A weights::a, b%0A100 %25"]
    assert json.loads(result.stdout)["verdict"] == "differs"
    verify.error = VerificationError("a rank died")
    assert "::error title=ckptkit::a rank died" in run("verify", "a", "b").stderr.splitlines()


def test_under_torchrun_only_rank_zero_reports(verify, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    assert run("verify", "a", "b").stdout == ""
    monkeypatch.setenv("RANK", "0")
    assert run("verify", "a", "b").stdout.splitlines()[-1] == "same"


@pytest.mark.parametrize("command", ["convert", "inspect", "diff", "validate", "hash", "verify", "families"])
def test_help_has_examples_and_explains_every_option(command):
    result = run(command, "--help")
    assert result.exit_code == 0
    assert f"Examples:\n    ckptkit {command}" in result.stdout
    parameters = cli.typer.main.get_command(cli.app).commands[command].params
    assert [parameter.name for parameter in parameters if not parameter.help] == []


def test_options_are_named_where_their_metavar_is_their_name():
    """Typer 0.27 takes `--DTYPE` for the option of a parameter `dtype` with that metavar, if nothing names it."""
    commands = cli.typer.main.get_command(cli.app).commands.values()
    callbacks = [command.callback for group in commands for command in getattr(group, "commands", {"": group}).values()]
    unnamed = 0
    for callback in callbacks:
        for name, hint in get_type_hints(callback, include_extras=True).items():
            for info in getattr(hint, "__metadata__", ()):
                if not isinstance(info, cli.typer.models.OptionInfo):
                    continue
                if not str(info.default).startswith("-"):  # the first name of an annotated option is stored there
                    assert info.metavar != name.upper(), (callback.__name__, name)
                    unnamed += 1
    assert len(callbacks) > 7 and unnamed > 5


def test_help_is_complete_on_a_narrow_screen(monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    text = run("convert", "--help").stdout
    assert "--num-layers-in-first-pipeline-stage" in text
    assert "--virtual-pipeline-model-parallel-size" in text


def test_version_and_no_command():
    assert run("--version").stdout == f"ckptkit {ckptkit.__version__}\n"
    result = run()
    assert result.exit_code == 0
    assert "Commands:" in result.stdout
    assert "Exit codes:" in result.stdout


def command_line(*arguments: str) -> subprocess.CompletedProcess[str]:
    root = Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env=environment, timeout=60)


def test_help_and_headers_stay_light():
    heavy = "{'torch', 'transformers', 'megatron', 'numpy'} & set(sys.modules)"
    done = command_line("-c", f"import sys, ckptkit, ckptkit.cli.app; assert not {heavy}, {heavy}")
    assert done.returncode == 0, done.stderr
    code = (
        "import sys, ckptkit.cli.app, ckptkit.cli.rendering, ckptkit.conversion.convert, ckptkit.verification\n"
        "assert not {'torch', 'transformers', 'megatron'} & set(sys.modules)"
    )
    done = command_line("-c", code)
    assert done.returncode == 0, done.stderr


def test_help_answers_at_once():
    """Nothing is imported for it that takes longer than all the rest: arrays, formats, other commands."""
    code = (
        "import sys; sys.argv = ['ckptkit', '--help']\n"
        "from ckptkit.__main__ import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "heavy = {'numpy', 'yaml', 'ckptkit.formats', 'ckptkit.families', 'ckptkit.conversion.convert'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)"
    )
    done = command_line("-c", code)
    assert done.returncode == 0, done.stderr
    assert "Usage: " in done.stdout


def test_a_crash_before_the_command_line_is_no_difference(tmp_path):
    (tmp_path / "typer.py").write_text("raise RuntimeError('half installed')")
    root = Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}:{root}"}
    command = [sys.executable, "-m", "ckptkit", "families"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60)
    assert (done.returncode, done.stdout) == (70, "")
    assert "half installed" in done.stderr and done.stderr.count("\n") == 1


def test_a_reader_that_goes_away_is_no_difference_and_no_bug():
    reader, writer = os.pipe()
    os.close(reader)
    root = Path(__file__).parents[2]
    command = [sys.executable, "-m", "ckptkit", "families", "--json"]
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, cwd=root, timeout=60)
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, "")


@pytest.mark.parametrize(
    ("step", "stands", "told"),
    [
        ("sync", "old", "the destination is as it was; continue with: ckptkit convert"),
        ("drop-journal", "old", "the destination is as it was; continue with: ckptkit convert"),
        ("rename", "old", "the destination is as it was; continue with: ckptkit convert"),
        ("between-renames", None, "nothing is at {} for now; run again with --resume, which moves the old model back"),
        ("clean-up", "new", "the new model is complete at {}; run again with --resume, or remove"),
    ],
)
@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_says_which_model_stands_there(monkeypatch, tmp_path, step, stands, told, signum):
    from ckptkit.io import commit

    old, out = SOUND / "torch", tmp_path / "out"
    shutil.copytree(old, out)
    if step == "between-renames":  # a system that cannot exchange two directories
        monkeypatch.setattr(commit, "exchange", lambda *_: False)
    monkeypatch.setattr(commit.faults, "step", lambda name: os.kill(os.getpid(), signum) if name == step else None)
    line = ["convert", str(SOUND / "hf"), str(out), "--to", "packed", "--overwrite"]
    result = run(*line)
    assert result.exit_code == 128 + signum
    assert told.format(out) in result.stderr and result.stderr.count("\n") == 1
    found = "new" if (out / "model.safetensors").is_file() else "old" if (out / "release").is_dir() else None
    assert found == stands
    monkeypatch.undo()
    result = run(*line, "--resume")  # what the message says to do
    assert result.exit_code == 0, result.stderr
    assert (out / "model.safetensors").is_file() and not (out / "release").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
