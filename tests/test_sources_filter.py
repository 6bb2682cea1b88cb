"""`source.where` before anything is fetched, and whatever ends a reading early."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from pipeline.coverage import Ranges
from pipeline.sources import open_source
from pipeline.sources.base import Sample
from pipeline.sources.filter import MOST_ROWS, marked
from pipeline.where import parse_where
from schemas.errors import FilterFailed, ShardUnreadable
from schemas.job import SourceSpec
from tests.shards import image_bytes, json_bytes
from tests.web import Web

ROWS = 2 * MOST_ROWS + 3


def numbered(count: int) -> Iterator[tuple[Sample, int]]:
    for number in range(count):
        yield Sample(number, "", image=b"x", fields={"n": number}), number


def test_every_sample_is_given_once_and_those_filtered_out_are_marked() -> None:
    found = [*marked(numbered(ROWS), parse_where("n < 70"))]
    assert [(sample.index, number) for sample, number in found] == [(n, n) for n in range(ROWS)]
    assert [s.skip is None and s.image == b"x" for s, _ in found] == [n < 70 for n in range(ROWS)]


def test_what_comes_before_an_error_is_given_first() -> None:
    def broken() -> Iterator[tuple[Sample, int]]:
        yield from numbered(3)
        raise ShardUnreadable("broken")

    given = marked(broken(), parse_where("n != 1"))
    assert [next(given)[0].skip is None for _ in range(3)] == [True, False, True]
    with pytest.raises(ShardUnreadable):
        next(given)


def test_a_row_of_another_type_fails_alone() -> None:
    rows = [(Sample(0, "", fields={"n": value}), None) for value in (1, "text", 3)]
    found = [sample.image_error for sample, _ in marked(rows, parse_where("n > 2"))]
    assert [type(error) for error in found] == [type(None), FilterFailed, type(None)]


def write_parquet(folder: Path, urls: list[str]) -> str:
    rows = pd.DataFrame({"image": urls, "n": range(len(urls))})
    rows.to_parquet(folder / "a.parquet")
    return str(folder / "a.parquet")


def write_manifest(folder: Path, urls: list[str]) -> str:
    rows = [{"image": url, "n": n} for n, url in enumerate(urls)]
    (folder / "a.jsonl").write_bytes(b"\n".join(map(json_bytes, rows)))
    return str(folder / "a.jsonl")


@pytest.mark.parametrize(
    ("format", "write"), [("parquet", write_parquet), ("manifest", write_manifest)]
)
def test_images_of_rows_that_are_filtered_out_are_not_fetched(
    tmp_path: Path, web: Web, format: str, write: Any
) -> None:
    web.files = {f"{n}.png": image_bytes() for n in range(3)}
    path = write(tmp_path, [web.url(f"{n}.png") for n in (0, 0, 1, 2)])
    spec = {"format": format, "path": path, "where": "n == 1 or n == 3"}
    source = open_source(SourceSpec.model_validate(spec))
    source.keep_types()
    [shard] = source.list()
    found = [*source.read(shard, skip=Ranges())]
    assert [s.skip is None for s in found] == [False, True, False, True]
    assert found[1].image == found[3].image == image_bytes()
    assert web.asked == {"0.png": 1, "2.png": 1}
