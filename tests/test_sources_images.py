"""The images source: every file a shard of one row."""

from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pytest

from pipeline.coverage import Ranges
from pipeline.sources import open_source
from pipeline.sources.base import Sample, Shard
from pipeline.sources.images import Images
from schemas.errors import ShardUnreadable, SpecError
from schemas.job import SourceSpec
from tests.shards import image_bytes

PNG = image_bytes()


def source_of(path: Any, **options: Any) -> Images:
    spec = SourceSpec.model_validate({"format": "images", "path": path, **options})
    source = open_source(spec)
    assert isinstance(source, Images)
    return source


def folder_of(tmp_path: Path, *names: str) -> Path:
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(PNG)
    return tmp_path


def samples_of(source: Images) -> list[Sample]:
    return [s for shard in source.list() for s in source.read(shard, skip=Ranges())]


def test_every_image_of_a_folder_is_a_shard_of_one_row(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, "b.JPG", "a.png", "cats/c.webp", "notes.txt")
    source = source_of(str(folder))
    assert [(s.uri, s.rows) for s in source.list()] == [
        (str(folder / name), 1) for name in ("a.png", "b.JPG", "cats/c.webp")
    ]
    samples = samples_of(source)
    assert [s.sample_id for s in samples] == ["a.png", "b.JPG", "cats/c.webp"]
    assert all((s.index, s.image, s.questions, s.error) == (0, PNG, None, None) for s in samples)


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("cats/*.png", ["1.png", "2.png"]),
        ("*/1.png", ["cats/1.png", "dogs/1.png"]),
        ("{cats,dogs}/1.png", ["cats/1.png", "dogs/1.png"]),
        ("cats/1.png", ["1.png"]),
    ],
)
def test_a_name_is_what_lies_below_the_folder_of_the_pattern(
    tmp_path: Path, pattern: str, names: list[str]
) -> None:
    folder = folder_of(tmp_path, "cats/1.png", "cats/2.png", "dogs/1.png")
    assert [s.sample_id for s in samples_of(source_of(f"{folder}/{pattern}"))] == names


def test_a_relative_path_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder_of(tmp_path, "d/1.png"))
    assert [s.sample_id for s in samples_of(source_of("*/1.png"))] == ["d/1.png"]


def test_other_stores_are_read_alike() -> None:
    fsspec.filesystem("memory").pipe_file("/pictures/x/1.png", PNG)
    [sample] = samples_of(source_of("memory://pictures"))
    assert (sample.sample_id, sample.image) == ("x/1.png", PNG)


def test_a_row_that_is_answered_is_not_read(tmp_path: Path) -> None:
    source = source_of(str(folder_of(tmp_path, "a.png")))
    reading = source.read(source.list()[0], skip=Ranges.of([(0, 1)]))
    with pytest.raises(StopIteration) as end:
        next(reading)
    assert end.value.value == 1


def test_a_file_that_is_gone_is_one_failed_row(tmp_path: Path) -> None:
    source = source_of(str(folder_of(tmp_path, "a.png")))
    [sample] = source.read(Shard(str(tmp_path / "gone.png"), "x", rows=1), skip=Ranges())
    assert (sample.index, sample.sample_id, sample.image) == (0, "gone.png", None)
    assert isinstance(sample.error, ShardUnreadable)
    assert "it is gone" in str(sample.error)


def test_the_name_can_be_kept(tmp_path: Path) -> None:
    source = source_of(str(folder_of(tmp_path, "a.png")), keep=["__key__"])
    assert source.keep_types() == {"__key__": pa.string()}
    assert samples_of(source)[0].keep == {"__key__": '"a.png"'}


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"keep": ["url"]}, "source.keep: 'url'"),
        ({"columns": {"id": "uid"}}, "source.columns.id: 'uid'"),
        ({"columns": {"questions": "ask"}}, "source.columns.questions: 'ask'"),
        ({"columns": {"image": "jpg"}}, "source.columns.image: 'jpg'"),
    ],
)
def test_columns_are_refused_by_name(tmp_path: Path, options: Any, named: str) -> None:
    with pytest.raises(SpecError) as error:
        source_of(str(tmp_path), **options)
    assert named in str(error.value)
