from __future__ import annotations

from pathlib import Path
from xml.etree import ElementTree

import pytest

from ckptkit.errors import VerificationError
from ckptkit.verification.reports.junit import junit_error, junit_xml
from ckptkit.verification.reports.report import LevelResult, VerificationReport
from ckptkit.verification.reports.results import Check
from tests.verification.reports.samples import report


def suites(text: str) -> dict[str, ElementTree.Element]:
    root = ElementTree.fromstring(text)
    assert root.tag == "testsuites"
    return {str(suite.get("name")): suite for suite in root}


@pytest.mark.parametrize("passed", [True, False])
def test_a_suite_per_level_and_a_case_per_check(passed: bool) -> None:
    found = suites(junit_xml(report(passed)))
    assert list(found) == ["weights", "logits", "packed"]
    logits = found["logits"]
    assert [case.get("name") for case in logits.iter("testcase")] == ["finite", "error"]
    assert {case.get("classname") for case in logits.iter("testcase")} == {"ckptkit.verify.logits"}
    assert (logits.get("tests"), logits.get("failures"), logits.get("time")) == ("2", str(int(not passed)), "3.500")
    assert sum(float(str(case.get("time"))) for case in logits.iter("testcase")) == 3.5
    failures = list(logits.iter("failure"))
    assert len(failures) == int(not passed)
    for failure in failures:
        assert failure.get("message") == 'largest <error> "1" & more'
        assert "the models part at <layer 1> mlp" in str(failure.text)
    properties = {item.get("name"): item.get("value") for item in logits.iter("property")}
    assert properties == {"reference": "hf <model> & more", "candidate": 'out/"meg"'}


def test_levels_that_were_not_reached_are_skipped() -> None:
    packed = suites(junit_xml(report(False)))["packed"]
    assert (packed.get("tests"), packed.get("skipped")) == ("1", "1")
    assert len(list(packed.iter("skipped"))) == 1


def test_counts_agree_with_cases() -> None:
    for suite in suites(junit_xml(report(False))).values():
        cases = list(suite.iter("testcase"))
        assert suite.get("tests") == str(len(cases))
        for kind in ("failure", "error", "skipped"):
            plural = {"failure": "failures", "error": "errors"}.get(kind, kind)
            assert suite.get(plural) == str(len(list(suite.iter(kind))))


def test_a_verification_that_could_not_be_made_is_an_error() -> None:
    problem = VerificationError("rank 1 died", where="m <&>", hint="look\x00here")
    (suite,) = suites(junit_error(problem, "a", "b")).values()
    assert (suite.get("errors"), suite.get("failures")) == ("1", "0")
    error = next(suite.iter("error"))
    assert error.get("type") == "VerificationError" and error.get("message") == "rank 1 died"
    assert r"look\x00here" in str(error.text)


def test_what_is_not_xml_is_escaped(tmp_path: Path) -> None:
    level = LevelResult("weights", False, "s", {}, [Check("bytes", False, "a\x1b[31mb\udc80")])
    text = junit_xml(VerificationReport("a\x01", "b", [level]))
    (tmp_path / "out.xml").write_text(text, encoding="utf-8")
    assert r"a\x1b[31mb\udc80" in str(next(ElementTree.parse(tmp_path / "out.xml").iter("failure")).get("message"))
