"""Batches hold every row once, in order, within their bounds; packing changes nothing."""

import pyarrow as pa
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.batches import batches_of, packed, unpacked
from schemas.tables import SAMPLE, table_of

SIZES = st.lists(st.lists(st.integers(0, 50), max_size=6), max_size=6)


def table(sizes: list[int]) -> pa.Table:
    """A row with an image of each size."""
    rows = [
        {"source_uri": "a.tar", "image": bytes(size), "lines": [{"sample_id": str(size)}]}
        for size in sizes
    ]
    return table_of(rows, SAMPLE)


def images(tables: list[pa.Table]) -> list[int]:
    return [len(image) for each in tables for image in each["image"].to_pylist()]


@settings(deadline=None)
@given(SIZES, st.integers(1, 7), st.sampled_from([1, 300, 10**6]))
def test_each_row_is_in_one_batch_within_the_bounds(
    tables: list[list[int]], rows: int, n_bytes: int
) -> None:
    batches = list(batches_of(map(table, tables), rows=rows, n_bytes=n_bytes))
    assert images(batches) == [size for sizes in tables for size in sizes]
    assert all(0 < len(batch) <= rows for batch in batches)
    for batch in batches[:-1]:
        assert len(batch) == rows or batch.nbytes >= n_bytes


def test_a_large_image_ends_its_batch() -> None:
    tables = [table([1, 2]), table([10**6]), table([3]), table([4])]
    batches = list(batches_of(tables, rows=16, n_bytes=10**6))
    assert [images([batch]) for batch in batches] == [[1, 2, 10**6], [3, 4]]


@settings(deadline=None)
@given(SIZES.filter(any))
def test_unpacking_undoes_packing(tables: list[list[int]]) -> None:
    batches = [pa.concat_tables([table(sizes), table([7])]) for sizes in tables]
    together = pa.concat_tables([packed(batch) for batch in batches])
    assert len(together) == len(batches)
    assert unpacked(together).equals(pa.concat_tables(batches))
    assert unpacked(together.slice(1)).equals(pa.concat_tables(batches[1:] or [table([])]))


def test_packing_and_unpacking_copies_no_image() -> None:
    batch = table([10**6, 10**6])
    before = pa.total_allocated_bytes()
    kept = unpacked(packed(batch))
    assert pa.total_allocated_bytes() - before < 10**5
    assert images([kept]) == [10**6, 10**6]
