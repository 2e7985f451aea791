"""A run that did not do what was asked for is no verification."""

from __future__ import annotations

from typing import Any

import pytest

from ckptkit.errors import VerificationError
from ckptkit.verification.ranks.what_ran import check_ran

ASKED: dict[str, Any] = {"packed": True, "sequence_parallel": True, "context_parallel": 2, "replication": "fsdp2"}


def test_all_ranks_ran_as_asked() -> None:
    check_ran(ASKED, [{**ASKED, "device": "cpu"}, {"replication": "fsdp2", "device": "cpu"}])


def test_somebody_must_have_seen_it() -> None:
    with pytest.raises(VerificationError, match="no rank saw what went through its layers"):
        check_ran(ASKED, [{"replication": "fsdp2", "device": "cpu"}])


@pytest.mark.parametrize(
    "other",
    [
        {"packed": False},
        {"sequence_parallel": False},
        {"context_parallel": 1},
        {"replication": None},
        {"replication": "ddp"},
    ],
)
def test_one_rank_that_did_not_is_named(other: dict[str, Any]) -> None:
    (name,) = other
    with pytest.raises(VerificationError, match=rf"rank 1 ran with {name} .*, asked for was"):
        check_ran(ASKED, [ASKED, {**ASKED, **other}])
    with pytest.raises(VerificationError, match="rank 0"):
        check_ran({**ASKED, **other}, [ASKED])
