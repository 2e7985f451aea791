from __future__ import annotations

import io
import json
import math
import subprocess
import sys

from rich.console import Console

from ckptkit.cli.rendering import verification
from ckptkit.verification.reports.report import LevelResult, LogitsReport, VerificationReport
from ckptkit.verification.reports.results import Agreement, Location


def text_of(report: VerificationReport) -> str:
    out = io.StringIO()
    verification(report, Console(file=out, width=140))
    return out.getvalue()


def test_one_failing_level_decides() -> None:
    good, bad = LevelResult("structure", True, "291 tensors"), LevelResult("weights", False, "[1] differs")
    assert VerificationReport("a", "b", [good]).verdict == "same"
    report = VerificationReport("a", "b", [good, bad], messages=["a [note]"])
    assert report.verdict == "differs" and report.to_dict()["verdict"] == "differs"
    assert not VerificationReport("a", "b", []).passed
    text = text_of(report)
    assert "[1] differs" in text and "a [note]" in text and "b against a" in text


def test_reports_are_json_even_when_numbers_are_not() -> None:
    agreement = Agreement(math.inf, 1.0, math.inf, (0, 1), 0.5, math.nan, math.inf, {"candidate": 3}, [[0.0, math.inf]])
    place = Location("layer 3 mlp", math.inf, 1e-7, ["decoder.layers.3.mlp.linear_fc1.weight"])
    logits = LogitsReport(
        False, "bad", "cpu", "float32", 1e-4, [[1, 2]], agreement, location=place, messages=[str(place)]
    )
    raw = json.loads(json.dumps(VerificationReport("a", "b", [logits.level()]).to_dict(), allow_nan=False))
    details = raw["levels"][0]["details"]
    assert details["agreement"]["per_position"] == [[0.0, None]]
    assert details["location"]["place"] == "layer 3 mlp"
    assert "linear_fc1.weight" in text_of(VerificationReport("a", "b", [logits.level()]))


def test_importing_the_entry_points_does_not_import_torch() -> None:
    program = (
        "import sys, ckptkit.verification.logits, ckptkit.verification.ranks.pool\n"
        "import ckptkit.verification.reports.report\n"
        "sys.exit(any(name in sys.modules for name in ('torch', 'transformers', 'megatron.core', 'rich')))\n"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


def test_versions_name_our_own_distribution() -> None:
    import ckptkit
    from ckptkit.verification.reports.report import installed_versions

    found = installed_versions()
    assert found["ckptkit-megatron"] == ckptkit.__version__
    assert {"python", "torch", "transformers", "megatron-core"} <= found.keys()
