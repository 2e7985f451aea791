"""The list of slow cases names tests that exist."""

from __future__ import annotations

import ast

from tests.conftest import SLOW_CASES, slow_cases


def test_every_case_is_one_of_a_test() -> None:
    """Its file has that function, and one with cases is parametrized."""
    cases = slow_cases()
    assert cases and len(cases) == len(set(cases))
    for case in cases:
        file, _, name = case.partition("::")
        function, _, parameters = name.partition("[")
        tree = ast.parse((SLOW_CASES.parents[1] / file).read_text(encoding="utf-8"))
        found = {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}
        assert function in found, case
        assert not parameters or any("parametrize" in ast.unparse(one) for one in found[function].decorator_list), case
