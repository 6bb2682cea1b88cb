"""The images source: every file a shard of one row."""

import gzip
import time
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pytest

from pipeline.coverage import Ranges
from pipeline.sources import open_source
from pipeline.sources.base import Sample, Shard
from pipeline.sources.images import Images
from schemas.errors import ImageMissing, SpecError, StoreUnavailable
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
    assert isinstance(sample.image_error, ImageMissing)


def test_a_store_that_does_not_answer_is_asked_for_one_image_only() -> None:
    source = source_of("http://127.0.0.1:1/a.png", image_timeout_s=0.5)
    shards = [Shard(f"http://127.0.0.1:1/{name}.png", "x", rows=1) for name in "abc"]
    source.expect(shards)
    started = time.monotonic()
    with pytest.raises(StoreUnavailable):
        next(source.read(shards[0], skip=Ranges()))
    first_s = time.monotonic() - started
    for shard in shards[1:]:
        with pytest.raises(StoreUnavailable):
            next(source.read(shard, skip=Ranges()))
    assert time.monotonic() - started - first_s < first_s / 2


def test_what_is_expected_is_read_whatever_is_left_out(tmp_path: Path) -> None:
    source = source_of(str(folder_of(tmp_path, *(f"{n}.png" for n in range(5)))))
    shards = source.list()
    source.expect(shards)
    for number in (1, 2, 4, 0):
        [sample] = source.read(shards[number], skip=Ranges())
        assert (sample.sample_id, sample.image) == (f"{number}.png", PNG)


class TestListFiles:
    def shards(self, path: Path, lines: bytes, **options: Any) -> tuple[Images, list[Shard]]:
        path.write_bytes(lines)
        source = source_of(str(path), **options)
        return source, list(source.list())

    def test_each_line_is_an_image_below_the_folder_of_the_list(self, tmp_path: Path) -> None:
        folder = folder_of(tmp_path, "a/1.png", "2.png", "3.png")
        lines = f"a/1.png\r\n\n{folder}/2.png\na/1.png\n 4.png \n".encode()
        source, shards = self.shards(folder / "some.txt", lines)
        assert [s.uri for s in shards] == [f"{folder}/{n}" for n in ("2.png", "4.png", "a/1.png")]
        found = [sample for s in shards for sample in source.read(s, skip=Ranges())]
        assert [(s.sample_id, s.image) for s in found] == [
            ("2.png", PNG),
            ("4.png", None),
            ("a/1.png", PNG),
        ]
        assert isinstance(found[1].image_error, ImageMissing)

    def test_a_file_that_changes_is_another_version_of_its_shard(self, tmp_path: Path) -> None:
        folder = folder_of(tmp_path, "1.png", "2.png")
        _, before = self.shards(folder / "l.lst", b"1.png\n2.png\n3.png")
        (folder / "2.png").write_bytes(PNG + b" ")
        _, after = self.shards(folder / "l.lst", b"1.png\n2.png\n3.png")
        assert [a == b for a, b in zip(before, after, strict=True)] == [True, False, True]

    def test_relative_names_are_below_the_image_root(self, tmp_path: Path) -> None:
        folder = folder_of(tmp_path, "images/1.png")
        options = {"image_root": str(folder / "images")}
        source, [shard] = self.shards(folder / "l.txt.gz", gzip.compress(b"1.png"), **options)
        [sample] = source.read(shard, skip=Ranges())
        assert (sample.sample_id, sample.image) == ("1.png", PNG)

    def test_what_is_secret_in_a_url_is_not_in_the_name_of_its_shard(self, tmp_path: Path) -> None:
        signed = "https://user:pass@example.org/a.png?sig=secret"
        _, [shard] = self.shards(tmp_path / "l.txt", signed.encode())
        assert (shard.uri, shard.location) == ("https://example.org/a.png", signed)

    def test_images_that_differ_in_their_query_are_told_apart(self, tmp_path: Path) -> None:
        urls = [f"https://example.org/image?id={number}" for number in (1, 2)]
        _, shards = self.shards(tmp_path / "l.txt", "\n".join(urls).encode())
        assert {shard.location for shard in shards} == set(urls)
        assert len({shard.uri for shard in shards}) == 2
        assert not any("id=" in shard.uri for shard in shards)

    @pytest.mark.parametrize(
        ("name", "content", "reason"),
        [
            ("l.txt", b" \n", "names no image"),
            ("l.txt", b"\xff\xfe\xff", "cannot be read as a list"),
            ("l.lst.gz", gzip.compress(b"1.png", mtime=0)[:-9], "cannot be read as a list"),
            ("l.txt.gz", b"1.png", "cannot be read as a list"),
        ],
    )
    def test_a_list_that_names_nothing_is_refused(
        self, tmp_path: Path, name: str, content: bytes, reason: str
    ) -> None:
        with pytest.raises(SpecError, match=reason) as error:
            self.shards(tmp_path / name, content)
        assert name in str(error.value)

    def test_a_list_that_is_not_there_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(SpecError, match="does not exist"):
            source_of(str(tmp_path / "gone.txt")).list()


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
