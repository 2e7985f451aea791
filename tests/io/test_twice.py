"""Which bytes several outputs take."""

from __future__ import annotations

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from ckptkit.io.twice import overlaps

SPANS = st.lists(st.tuples(st.integers(0, 40), st.integers(1, 10)).map(lambda pair: (pair[0], sum(pair))), max_size=12)


@given(SPANS)
def test_overlaps(spans: list[tuple[int, int]]) -> None:
    counts = Counter(at for start, stop in spans for at in range(start, stop))
    found = [at for start, stop in overlaps(spans) for at in range(start, stop)]
    assert sorted(found) == sorted(at for at, count in counts.items() if count > 1)
    assert len(found) == len(set(found))
