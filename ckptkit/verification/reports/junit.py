"""The report as JUnit XML, which continuous integration shows by itself: a suite per level, a test case per check."""

from __future__ import annotations

from xml.etree import ElementTree

from ckptkit.errors import CkptkitError
from ckptkit.printable import printable
from ckptkit.verification.reports.report import LevelResult, VerificationReport

SUITES = "ckptkit verify"


def junit_xml(report: VerificationReport) -> str:
    """The report as an XML document; levels that were not reached are skipped test cases."""
    root = ElementTree.Element("testsuites", name=SUITES)
    for level in report.levels:
        root.append(_suite(level, report))
    for name in report.not_run:
        suite = _new_suite(name, 1, skipped=1)
        case = ElementTree.SubElement(suite, "testcase", classname=f"ckptkit.verify.{name}", name=name, time="0")
        ElementTree.SubElement(case, "skipped", message="a cheaper level already says that the two differ")
        root.append(suite)
    return _document(root)


def junit_error(error: CkptkitError, reference: str, candidate: str) -> str:
    """A verification that could not be made, as an XML document with one test case in error."""
    root = ElementTree.Element("testsuites", name=SUITES)
    suite = _new_suite("verify", 1, errors=1)
    suite.append(_properties({"reference": reference, "candidate": candidate}))
    case = ElementTree.SubElement(suite, "testcase", classname="ckptkit.verify", name="verify", time="0")
    problem = ElementTree.SubElement(case, "error", type=type(error).__name__, message=_clean(error.what))
    problem.text = _clean(str(error))
    root.append(suite)
    return _document(root)


def _suite(level: LevelResult, report: VerificationReport) -> ElementTree.Element:
    failures = sum(not check.passed for check in level.checks)
    suite = _new_suite(level.name, len(level.checks), failures=failures, seconds=level.seconds)
    suite.append(_properties({"reference": report.reference, "candidate": report.candidate}))
    lines = [level.summary, *level.messages]
    # A level is timed as a whole; its time is that of its first check, so that sums are right.
    for check, seconds in zip(level.checks, [level.seconds, *[0.0] * len(level.checks)], strict=False):
        name = f"ckptkit.verify.{level.name}"
        case = ElementTree.SubElement(suite, "testcase", classname=name, name=check.name, time=f"{seconds:.3f}")
        if check.passed:
            ElementTree.SubElement(case, "system-out").text = _clean(check.summary)
        else:
            failure = ElementTree.SubElement(case, "failure", type=report.verdict, message=_clean(check.summary))
            failure.text = _clean("\n".join(lines))
    if level.messages:
        ElementTree.SubElement(suite, "system-out").text = _clean("\n".join(level.messages))
    return suite


def _new_suite(
    name: str, tests: int, *, failures: int = 0, errors: int = 0, skipped: int = 0, seconds: float = 0.0
) -> ElementTree.Element:
    counts = {"tests": tests, "failures": failures, "errors": errors, "skipped": skipped}
    numbers = {key: str(value) for key, value in counts.items()}
    return ElementTree.Element("testsuite", {"name": name, "time": f"{seconds:.3f}", **numbers})


def _properties(values: dict[str, str]) -> ElementTree.Element:
    element = ElementTree.Element("properties")
    for name, value in values.items():
        ElementTree.SubElement(element, "property", name=name, value=_clean(value))
    return element


def _clean(text: str) -> str:
    """Visible characters only: control characters, which may come out of a file name, are not XML."""
    return "\n".join(map(printable, text.split("\n")))


def _document(root: ElementTree.Element) -> str:
    ElementTree.indent(root)
    return ElementTree.tostring(root, encoding="unicode", xml_declaration=True) + "\n"
