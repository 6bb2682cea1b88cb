"""The parquet source: tables as people's libraries write them, and as disks break them."""

import dataclasses
import datetime
import decimal
import functools
import http.server
import json
import random
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import datasets
import fsspec
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from pipeline.coverage import Ranges
from pipeline.read import ShardCoverage, ShardWork
from pipeline.sources import open_source
from pipeline.sources.base import Question, Sample, Shard, Turn
from pipeline.sources.columns import fitted, plain
from pipeline.sources.parquet import Parquet
from pipeline.storage import filesystem
from schemas.errors import (
    ColumnMalformed,
    ConversationMalformed,
    ImageMissing,
    QuestionsMalformed,
    ShardUnreadable,
    SpecError,
    StoreUnavailable,
)
from schemas.job import JobSpec, SourceSpec
from tests.lines import tables_read
from tests.s3 import S3Server
from tests.shards import image_bytes, saved

PNG = image_bytes()
IMAGE_STRUCT = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def spec_of(path: Path | str, **options: Any) -> SourceSpec:
    return SourceSpec.model_validate({"format": "parquet", "path": str(path), **options})


def source_of(path: Path | str, **options: Any) -> Parquet:
    source = open_source(spec_of(path, **options))
    assert isinstance(source, Parquet)
    return source


def read_all(
    source: Parquet, shard: Shard, *, skip: Ranges | None = None
) -> tuple[list[Sample], int]:
    samples = []
    reading = source.read(shard, skip=skip or Ranges())
    while True:
        try:
            samples.append(next(reading))
        except StopIteration as end:
            return samples, end.value


def write(path: Path, columns: Any, **options: Any) -> Path:
    table = columns if isinstance(columns, pa.Table) else pa.table(columns)
    pq.write_table(table, path, **options)
    return path


def read_file(path: Path | str, **options: Any) -> list[Sample]:
    """All samples of a file, which have to be all of its rows."""
    source = source_of(path, **options)
    [shard] = source.list()
    samples, rows = read_all(source, shard)
    assert [sample.index for sample in samples] == list(range(rows))
    return samples


def read_columns(tmp_path: Path, columns: Any, /, **options: Any) -> list[Sample]:
    rows = len(next(iter(columns.values())))
    return read_file(write(tmp_path / "a.parquet", {"image": [PNG] * rows, **columns}), **options)


def pictures(n: int) -> list[bytes]:
    return [image_bytes(color=(number, 0, 0)) for number in range(n)]


def noise(n: int, size: int) -> list[bytes]:
    """Bytes that no compression makes smaller."""
    chance = random.Random(0)
    return [chance.randbytes(size) for _ in range(n)]


class TestWriters:
    """Files as libraries write them that nobody here wrote."""

    def test_datasets(self, tmp_path: Path) -> None:
        images = [Image.new("RGB", (8, 6), (n, 0, 0)) for n in range(5)]
        (tmp_path / "pictures").mkdir()
        for n, image in enumerate(images):
            image.save(tmp_path / "pictures" / f"{n}.jpg", quality=90)
        features = datasets.Features(
            {
                "image": datasets.Image(),
                "caption": datasets.Value("string"),
                "questions": [
                    {"id": datasets.Value("string"), "question": datasets.Value("string")}
                ],
                "label": datasets.ClassLabel(names=["a", "b"]),
                "box": datasets.Sequence(datasets.Value("float32"), length=4),
                "seen": datasets.Value("timestamp[us]"),
            }
        )
        rows = {
            "image": [str(tmp_path / "pictures" / f"{n}.jpg") for n in range(5)],
            "caption": [f"No. {n}" for n in range(5)],
            "questions": [[{"id": "a", "question": f"{n}?"}] for n in range(5)],
            "label": [0, 1, 0, 1, None],
            "box": [[0.0, 1.0, 2.0, 3.0]] * 5,
            "seen": [datetime.datetime(2026, 1, 1)] * 5,
        }
        written = datasets.Dataset.from_dict(rows, features=features)
        with quiet_progress():
            written.to_parquet(tmp_path / "a.parquet")
        kept = ["caption", "label", "box", "seen"]
        source = source_of(tmp_path / "a.parquet", keep=kept)
        types = source.keep_types()
        assert types["label"] == pa.int64()
        assert types["box"] == pa.list_(pa.float32(), 4)
        samples, _ = read_all(source, source.list()[0])
        assert [s.image for s in samples] == [
            (tmp_path / "pictures" / f"{n}.jpg").read_bytes() for n in range(5)
        ]
        assert [s.sample_id for s in samples] == rows["image"]
        assert [s.questions for s in samples] == [(Question("a", f"{n}?"),) for n in range(5)]
        assert kept_of(samples) == [{name: rows[name][n] for name in kept} for n in range(5)]

    def test_datasets_from_memory_and_in_small_row_groups(self, tmp_path: Path) -> None:
        images = [Image.new("RGB", (8, 6), (n, 0, 0)) for n in range(10)]
        features = datasets.Features({"image": datasets.Image(), "q": datasets.Value("string")})
        written = datasets.Dataset.from_dict(
            {"image": images, "q": ["what?"] * 10}, features=features
        )
        with quiet_progress():
            written.to_parquet(tmp_path / "a.parquet", batch_size=3)
        assert pq.read_metadata(tmp_path / "a.parquet").num_row_groups == 4
        samples = read_file(tmp_path / "a.parquet", columns={"questions": "q"})
        assert [s.image for s in samples] == [saved(image, "PNG") for image in images]
        assert [s.sample_id for s in samples] == [str(n) for n in range(10)]
        assert {s.questions for s in samples} == {(Question("q0", "what?"),)}

    def test_pandas(self, tmp_path: Path) -> None:
        frame = pd.DataFrame(
            {
                "image": pictures(4),
                "uid": [7, 8, 9, 10],
                "license": pd.Categorical(["by", "cc0", "by", None]),
                "taken": pd.to_datetime(["2026-01-01 00:00:00.000000001"] * 4, utc=True),
                "tags": [["a"], [], None, ["b", "c"]],
                "more": [{"w": 1, "h": [2]}, None, {"w": None, "h": None}, {"w": 4, "h": []}],
                "questions": [["why?"], [], None, [{"question": "x?", "id": "a"}["question"]]],
            },
            index=["r0", "r1", "r2", "r3"],
        )
        frame.to_parquet(tmp_path / "a.parquet")
        kept = ["license", "taken", "tags", "more"]
        source = source_of(tmp_path, columns={"id": "uid"}, keep=kept)
        types = source.keep_types()
        assert plain(types["license"]) == types["license"]
        assert types["taken"].tz == "UTC"
        samples, _ = read_all(source, source.list()[0])
        assert [s.image for s in samples] == pictures(4)
        assert [s.sample_id for s in samples] == ["7", "8", "9", "10"]
        assert [s.questions for s in samples] == [
            (Question("q0", "why?"),),
            (),
            None,
            (Question("q0", "x?"),),
        ]
        assert kept_of(samples) == [
            {"license": a, "taken": b, "tags": c, "more": d}
            for a, b, c, d in zip(
                ["by", "cc0", "by", None],
                [pd.Timestamp("2026-01-01 00:00:00.000000001", tz="UTC")] * 4,
                [["a"], [], None, ["b", "c"]],
                [{"w": 1, "h": [2]}, None, {"w": None, "h": None}, {"w": 4, "h": []}],
                strict=True,
            )
        ]

    @pytest.mark.parametrize(
        "options",
        [
            {"compression": "zstd", "data_page_version": "2.0"},
            {"compression": "none", "use_dictionary": False},
            {"compression": "gzip", "row_group_size": 3, "write_page_index": True},
            {"store_schema": False, "data_page_size": 100, "write_page_checksum": True},
        ],
    )
    def test_pyarrow_in_many_ways(self, tmp_path: Path, options: Any) -> None:
        columns = {"image": pictures(10), "n": pa.array(range(10), pa.int16())}
        samples = read_file(write(tmp_path / "a.parquet", columns, **options), keep=["n"])
        assert [s.image for s in samples] == pictures(10)
        assert [each["n"] for each in kept_of(samples)] == list(range(10))


def quiet_progress() -> Any:
    datasets.disable_progress_bars()
    return warnings.catch_warnings()


def kept_of(samples: Iterable[Sample]) -> list[dict[str, Any]]:
    return [
        {
            name: value.as_py() if isinstance(value, pa.Scalar) else value
            for name, value in k.items()
        }
        for k in (sample.keep for sample in samples)
    ]


class TestImages:
    @pytest.mark.parametrize(
        "kind",
        [pa.binary(), pa.large_binary(), pa.binary_view(), pa.dictionary(pa.int8(), pa.binary())],
    )
    def test_binary_columns(self, tmp_path: Path, kind: pa.DataType) -> None:
        column = pa.array([PNG, b"", None, PNG], pa.binary()).cast(kind)
        samples = read_file(write(tmp_path / "a.parquet", {"anything": column}))
        assert [s.image for s in samples] == [PNG, b"", None, PNG]
        assert [type(s.image_error) for s in samples] == [type(None)] * 2 + [
            ImageMissing,
            type(None),
        ]
        assert [s.sample_id for s in samples] == ["0", "1", "2", "3"]
        assert {type(s.error) for s in samples} == {type(None)}

    def test_fixed_size_binary_where_it_is_named(self, tmp_path: Path) -> None:
        column = pa.array([b"abcd"], pa.binary(4))
        path = write(tmp_path / "a.parquet", {"x": column, "image": [PNG]})
        assert read_file(path)[0].image == PNG
        assert read_file(path, columns={"image": "x"})[0].image == b"abcd"

    def test_structs_hold_bytes_or_a_path(self, tmp_path: Path) -> None:
        (tmp_path / "far.png").write_bytes(b"far")
        rows = [
            {"bytes": PNG, "path": "a/b.png"},
            {"bytes": None, "path": "far.png"},
            {"bytes": PNG, "path": None},
            {"bytes": None, "path": None},
            None,
            {"bytes": None, "path": "gone.png"},
        ]
        path = write(tmp_path / "a.parquet", {"photo": pa.array(rows, IMAGE_STRUCT)})
        samples = read_file(path)
        assert [s.image for s in samples] == [PNG, b"far", PNG, None, None, None]
        assert [s.sample_id for s in samples] == ["a/b.png", "far.png", "2", "3", "4", "gone.png"]
        assert [type(s.image_error).__name__ for s in samples[3:]] == ["ImageMissing"] * 3
        assert "row 3: column 'photo' holds no image and no path" in str(samples[3].image_error)
        assert f"{tmp_path}/gone.png: there is no such file" in str(samples[5].image_error)

    def test_text_columns_are_paths(self, tmp_path: Path) -> None:
        (tmp_path / "images").mkdir()
        for n in range(100):
            (tmp_path / "images" / f"{n}.png").write_bytes(b"%d" % n)
        names = [f"{n}.png" for n in range(100)]
        path = write(tmp_path / "a.parquet", {"file_name": names, "width": range(100)})
        samples = read_file(path, image_root=str(tmp_path / "images"))
        assert [s.image for s in samples] == [b"%d" % n for n in range(100)]
        assert [s.sample_id for s in samples] == names

    def test_a_signed_url_is_named_without_its_signature(self, tmp_path: Path) -> None:
        url = "http://127.0.0.1:1/a.png?X-Amz-Signature=secret"
        [sample] = read_file(write(tmp_path / "a.parquet", {"url": [url], "n": [1]}))
        assert sample.sample_id == "http://127.0.0.1:1/a.png"
        assert "secret" not in str(sample.image_error)

    def test_text_that_is_no_utf8_is_an_outcome(self, tmp_path: Path) -> None:
        text = pa.array([b"\xff.png", b"a"], pa.binary()).view(pa.string())
        path = write(tmp_path / "a.parquet", {"path": text, "t": text})
        samples = read_file(path, columns={"id": "t", "questions": "t"}, keep=["t"])
        assert samples[0].sample_id == "\ufffd.png"
        assert isinstance(samples[0].image_error, ColumnMalformed)
        assert isinstance(samples[1].image_error, ImageMissing)

    @pytest.mark.parametrize(
        ("columns", "taken"),
        [
            ({"image": [PNG], "embedding": [b"x"]}, PNG),
            ({"x": [PNG], "url": ["u"], "path": ["p"]}, PNG),
            ({"x": pa.array([{"bytes": PNG, "path": ""}], IMAGE_STRUCT), "y": ["t"]}, PNG),
            ({"caption": ["t"], "JPG": [PNG]}, PNG),
        ],
    )
    def test_the_column_that_alone_can_be_meant_is_the_image(
        self, tmp_path: Path, columns: Any, taken: bytes
    ) -> None:
        assert read_file(write(tmp_path / "a.parquet", columns))[0].image == taken

    @pytest.mark.parametrize(
        ("columns", "asked", "named"),
        [
            ({"a": [PNG], "b": [PNG]}, None, "may be any of a, b"),
            ({"url": ["x"], "path": ["y"]}, None, "may be any of url, path"),
            ({"caption": ["x"], "n": [1]}, None, "there are caption (string), n (int64)"),
            ({"images": [["x"]]}, None, "is none that is known"),
            ({"images": [[PNG]], "others": [[PNG]]}, None, "may be any of images, others"),
            ({"image": [[[PNG]]]}, "image", "several are a list of these"),
            ({"n": [1]}, "n", "column 'n' is int64; an image is binary"),
            ({"image": [PNG]}, "imgae", "there is no column 'imgae'; there are image (binary)"),
        ],
    )
    def test_where_it_is_not_clear_the_columns_are_named(
        self, tmp_path: Path, columns: Any, asked: str | None, named: str
    ) -> None:
        path = write(tmp_path / "a.parquet", columns)
        with pytest.raises(SpecError) as error:
            source_of(path, columns={"image": asked}).keep_types()
        assert str(error.value).startswith(f"source.columns.image: {path}: ")
        assert named in str(error.value)


class TestSeveral:
    """Rows of several images."""

    FIELD = pa.list_(IMAGE_STRUCT)

    def test_columns_in_the_order_of_the_spec(self, tmp_path: Path) -> None:
        a, b = pictures(2)
        for names, expected in ((["left", "right"], (a, [b])), (["right", "left"], (b, [a]))):
            columns = {"left": [a], "right": [{"bytes": b, "path": "b.png"}]}
            path = write(tmp_path / "a.parquet", columns)
            [sample] = read_file(path, columns={"image": names})
            assert (sample.image, [*sample.more_images]) == expected

    @pytest.mark.parametrize("asked", [None, "pictures"])
    def test_a_column_of_lists_of_any_length(self, tmp_path: Path, asked: str | None) -> None:
        images = pictures(3)
        structs = [{"bytes": image, "path": None} for image in images]
        for kind, cells in ((pa.list_(pa.binary()), images), (self.FIELD, structs)):
            lists = pa.array([cells, cells[:1], cells[:2]], kind)
            path = write(tmp_path / "a.parquet", {"pictures": lists, "url": ["x", "y", "z"]})
            columns = {"image": asked} if asked else {}
            path = write(path, {"pictures": lists}) if asked is None else path
            samples = read_file(path, columns=columns)
            assert [s.image for s in samples] == images[:1] * 3
            assert [[*s.more_images] for s in samples] == [images[1:], [], images[1:2]]

    def test_paths_are_fetched_and_what_is_in_the_row_is_not(self, tmp_path: Path) -> None:
        a, b, c = pictures(3)
        (tmp_path / "b.png").write_bytes(b)
        (tmp_path / "c.png").write_bytes(c)
        mixed = [{"bytes": a, "path": "gone.png"}, {"bytes": None, "path": "b.png"}]
        columns = {"own": pa.array([mixed], self.FIELD), "other": ["c.png"]}
        path = write(tmp_path / "a.parquet", columns)
        [sample] = read_file(path, columns={"image": ["own", "other"]})
        assert (sample.image, [*sample.more_images]) == (a, [b, c])

    def test_an_image_that_is_missing_is_named(self, tmp_path: Path) -> None:
        a, b = pictures(2)
        columns = {"left": [a, a, None], "right": [b, None, b]}
        path = write(tmp_path / "a.parquet", columns)
        fine, *broken = read_file(path, columns={"image": ["left", "right"]})
        assert (fine.image, [*fine.more_images], fine.image_error) == (a, [b], None)
        for sample, number in zip(broken, (2, 1), strict=True):
            assert isinstance(sample.image_error, ImageMissing)
            assert f"image {number} of 2: " in str(sample.image_error)
            assert "columns 'left' and 'right' hold no image" in str(sample.image_error)
            assert (sample.image, [*sample.more_images]) == (None, [])

    @pytest.mark.parametrize("cell", [[], None, [None]])
    def test_a_list_without_an_image_is_a_failed_row(self, tmp_path: Path, cell: Any) -> None:
        column = pa.array([cell, pictures(2)], pa.list_(pa.binary()))
        path = write(tmp_path / "a.parquet", {"images": column})
        empty, fine = read_file(path)
        assert isinstance(empty.image_error, ImageMissing)
        assert len(fine.more_images) == 1

    def test_one_that_cannot_be_fetched_fails_its_row_alone(self, tmp_path: Path) -> None:
        (tmp_path / "a.png").write_bytes(PNG)
        lists = [["a.png", "gone.png", "a.png"], ["a.png", "a.png"]]
        path = write(tmp_path / "a.parquet", {"images": lists})
        broken, fine = read_file(path, columns={"image": "images"})
        assert "image 2 of 3: " in str(broken.image_error)
        assert "gone.png" in str(broken.image_error)
        assert (fine.image, [*fine.more_images]) == (PNG, [PNG])

    def test_rows_that_are_filtered_out_bring_none(self, tmp_path: Path) -> None:
        columns = {"images": [pictures(2), pictures(2)], "n": [1, 2]}
        path = write(tmp_path / "a.parquet", columns)
        out, kept = read_file(path, where="n > 1")
        assert (out.n_bytes, kept.n_bytes) == (0, sum(map(len, pictures(2))))
        assert out.skip

    @pytest.mark.parametrize(
        ("names", "told"),
        [
            (["left", "rihgt"], "there is no column 'rihgt'"),
            (["left", "n"], "column 'n' is int64"),
        ],
    )
    def test_each_column_has_to_be_one_of_images(
        self, tmp_path: Path, names: list[str], told: str
    ) -> None:
        path = write(tmp_path / "a.parquet", {"left": [PNG], "right": [PNG], "n": [1]})
        with pytest.raises(SpecError, match=told):
            source_of(path, columns={"image": names}).keep_types()


class TestColumns:
    @pytest.mark.parametrize(
        ("options", "named"),
        [
            ({"columns": {"id": "uuid"}}, "source.columns.id"),
            ({"columns": {"questions": "ask"}}, "source.columns.questions"),
            ({"columns": {"conversation": "talk"}}, "source.columns.conversation"),
            ({"keep": ["__key__", "licence"]}, "source.keep"),
        ],
    )
    def test_a_column_that_is_not_there_is_a_spec_error(
        self, tmp_path: Path, options: Any, named: str
    ) -> None:
        path = write(tmp_path / "a.parquet", {"image": [PNG], "license": ["by"]})
        with pytest.raises(SpecError, match=f"{named}: .*there are image") as error:
            source_of(path, **options).keep_types()
        assert ("did you mean license?" in str(error.value)) == (named == "source.keep")

    def test_only_columns_that_are_needed_are_read(self) -> None:
        n = 20
        columns = {"image": noise(n, 10_000), "junk": noise(n, 100_000)}
        spent = bytes_read(columns)
        assert 200_000 < spent < 300_000

    def test_the_id_is_a_column_or_the_rows_own_name(self, tmp_path: Path) -> None:
        ids = pa.array(["x", None, "\u00e9"])
        samples = read_columns(tmp_path, {"uid": ids}, columns={"id": "uid"})
        assert [s.sample_id for s in samples] == ["x", "1", "\u00e9"]
        days = [datetime.date(2026, 1, 2), None]
        samples = read_columns(tmp_path, {"day": days}, columns={"id": "day"})
        assert [s.sample_id for s in samples] == ['"2026-01-02"', "1"]

    def test_the_key_can_be_kept(self, tmp_path: Path) -> None:
        assert kept_of(read_columns(tmp_path, {"n": [5]}, keep=["__key__"])) == [{"__key__": "0"}]
        samples = read_columns(tmp_path, {"__key__": ["k"]}, keep=["__key__"])
        assert [(s.sample_id, k) for s, k in zip(samples, kept_of(samples), strict=True)] == [
            ("k", {"__key__": "k"})
        ]

    @pytest.mark.parametrize(
        "values",
        [
            pa.array([1, None], pa.uint8()),
            pa.array([1.5, float("nan")], pa.float32()),
            pa.array([decimal.Decimal("1.50"), None], pa.decimal128(10, 2)),
            pa.array([1, None], pa.timestamp("ns", "Europe/Berlin")),
            pa.array([1, None], pa.time64("ns")),
            pa.array([1, None], pa.duration("us")),
            pa.array([np.float16(1.5), None], pa.float16()),
            pa.array([b"ab", None], pa.binary(2)),
            pa.array([[("a", 1)], None], pa.map_(pa.string(), pa.int32())),
            pa.array([[1, None], None], pa.list_(pa.int8(), 2)),
            pa.array([["a", None], None], pa.large_list(pa.large_string())),
            pa.array([{"a": {"b": [{"c": 1}]}}, None]),
            pa.array([None, None], pa.null()),
            pa.array(["x", None]).dictionary_encode(),
            pa.array([["x"], None], pa.list_(pa.dictionary(pa.int32(), pa.string()))),
            pa.array(["x", None], pa.string_view()),
            pa.array([b"0" * 16, None], pa.uuid()),
        ],
        ids=lambda values: str(values.type),
    )
    def test_kept_columns_keep_their_type_into_the_tables(
        self, tmp_path: Path, values: pa.Array
    ) -> None:
        path = write(tmp_path / "a.parquet", {"image": [PNG] * 2, "x": values})
        source = source_of(path, keep=["x"])
        types = source.keep_types()
        assert types == {"x": plain(pq.read_schema(path).field("x").type)}
        [table] = tables_read(job_of(path, keep=["x"]), work_of(source), keep=types)
        assert table.schema.field("keep.x").type == pa.list_(types["x"])
        stored = pq.read_table(path)["x"].combine_chunks()
        stored = stored.storage if isinstance(stored, pa.ExtensionArray) else stored
        expected = stored.cast(types["x"]).to_pylist()
        assert repr(pc.list_flatten(table["keep.x"]).to_pylist()) == repr(expected)

    def test_another_file_may_have_another_type_where_nothing_is_lost(self, tmp_path: Path) -> None:
        write(tmp_path / "1.parquet", {"image": [PNG], "x": pa.array([1], pa.int32())})
        write(tmp_path / "2.parquet", {"image": [PNG] * 2, "x": pa.array([2, 2**40], pa.int64())})
        write(tmp_path / "3.parquet", {"image": [PNG] * 3, "x": [3.0, 3.5, float("nan")]})
        write(tmp_path / "4.parquet", {"image": [PNG] * 2, "x": ["4", "four"]})
        write(tmp_path / "5.parquet", {"image": [PNG]})
        write(tmp_path / "6.parquet", {"image": [PNG], "x": pa.array([None], pa.null())})
        source = source_of(tmp_path, keep=["x"])
        assert source.keep_types() == {"x": pa.int32()}
        samples = [s for shard in source.list() for s in read_all(source, shard)[0]]
        assert [each["x"] for each in kept_of(samples)] == [
            1, 2, None, 3, None, None, 4, None, None, None
        ]  # fmt: skip
        failed = [n for n, sample in enumerate(samples) if sample.image_error]
        assert failed == [2, 4, 5, 7]
        assert all(isinstance(samples[n].image_error, ColumnMalformed) for n in failed)
        assert "2.parquet: row 1: column 'x' is no int32" in str(samples[2].image_error)

    def test_a_file_of_nulls_leaves_the_type_to_the_next(self, tmp_path: Path) -> None:
        write(tmp_path / "1.parquet", {"image": [PNG], "x": pa.array([None], pa.null())})
        write(tmp_path / "2.parquet", {"image": [PNG], "x": [["a"]]})
        source = source_of(tmp_path, keep=["x"])
        assert source.keep_types() == {"x": pa.list_(pa.string())}

    def test_who_was_told_the_types_opens_no_other_file(self, tmp_path: Path) -> None:
        path = write(tmp_path / "2.parquet", {"image": [PNG], "x": pa.array([2], pa.int64())})
        [shard] = source_of(path).list()
        (tmp_path / "1.parquet").write_bytes(b"damaged")
        told = open_source(spec_of(tmp_path, keep=["x"]), keep={"x": pa.int8()})
        [sample] = told.read(shard, skip=Ranges())
        assert sample.keep == {"x": pa.scalar(2, pa.int8())}

    def test_maps_whose_fields_are_called_otherwise_fit(self) -> None:
        theirs = pa.map_(pa.field("k", pa.string(), nullable=False), pa.field("v", pa.int8()))
        ours = pa.map_(pa.string(), pa.int8())
        value = fitted(pa.array([[("a", 1)]], theirs), ours)
        assert pa.array([value, None], ours).to_pylist() == [[("a", 1)], None]

    @pytest.mark.parametrize("kind", [pa.float32(), pa.int8(), pa.bool_(), pa.struct([])])
    def test_a_value_that_would_change_does_not_fit(self, kind: pa.DataType) -> None:
        assert isinstance(fitted(pa.array([1234.1]), kind), Exception)


class TestQuestions:
    @pytest.mark.parametrize(
        "value",
        [
            pa.array([[{"id": "a", "question": "x?"}, {"id": None, "question": "y?"}]]),
            pa.array([[{"id": "a", "question": "x?"}, {"question": "y?"}]]),
            ['[{"id": "a", "question": "x?"}, "y?"]'],
            pa.array([{"id": ["a", None], "question": ["x?", "y?"]}]),
        ],
    )
    def test_questions_are_lists_or_json(self, tmp_path: Path, value: Any) -> None:
        [sample] = read_columns(tmp_path, {"questions": value})
        assert sample.questions == (Question("a", "x?"), Question("q1", "y?"))

    @pytest.mark.parametrize("value", [["what?"], pa.array([["what?"]])])
    def test_text_is_a_question(self, tmp_path: Path, value: Any) -> None:
        [sample] = read_columns(tmp_path, {"q": value}, columns={"questions": "q"})
        assert sample.questions == (Question("q0", "what?"),)

    @pytest.mark.parametrize("value", [["[{"], ["{}"], [7], [" "], ["[" * 100_000], [[1]]])
    def test_malformed_ones_say_where(self, tmp_path: Path, value: Any) -> None:
        [sample] = read_columns(tmp_path, {"questions": value})
        assert isinstance(sample.questions, QuestionsMalformed)
        assert "a.parquet: row 0: column 'questions': " in str(sample.questions)
        assert (sample.image, sample.error) == (PNG, None)

    def test_conversations_are_lists_or_json(self, tmp_path: Path) -> None:
        talk = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
        for value in (pa.array([talk]), [json.dumps(talk)]):
            [sample] = read_columns(tmp_path, {"t": value}, columns={"conversation": "t"})
            assert sample.conversation == (Turn("user", "hi"), Turn("assistant", "hello"))

    def test_a_conversation_in_plain_text_is_malformed(self, tmp_path: Path) -> None:
        [sample] = read_columns(tmp_path, {"t": ["hi"]}, columns={"conversation": "t"})
        assert isinstance(sample.conversation, ConversationMalformed)


@pytest.fixture
def large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file of 10 row groups of 10 rows that is listed in several pieces."""
    monkeypatch.setattr("pipeline.sources.parquet.PIECE_BYTES", 300_000)
    columns = {"image": noise(100, 10_000), "n": range(100)}
    return write(tmp_path / "large.parquet", columns, row_group_size=10)


class TestPieces:
    def test_a_large_file_is_listed_in_pieces_from_the_listing_alone(self, large: Path) -> None:
        large.write_bytes(b"x" * 1_000_001)
        shards = source_of(large).list()
        assert [shard.piece for shard in shards] == [(0, 4), (1, 4), (2, 4), (3, 4)]
        assert len({(shard.uri, shard.identity) for shard in shards}) == 1

    def test_pieces_give_every_row_once_and_all_know_the_rows(self, large: Path) -> None:
        source = source_of(large)
        read = [read_all(source, shard) for shard in source.list()]
        assert [rows for _, rows in read] == [100] * 4
        assert [len(samples) for samples, _ in read] == [20, 30, 20, 30]
        samples = [sample for samples, _ in read for sample in samples]
        assert [(s.index, s.image) for s in samples] == list(enumerate(noise(100, 10_000)))

    @pytest.mark.parametrize("pieces", [1, 2, 3, 7, 10, 25])
    def test_any_number_of_pieces_is_the_whole(self, large: Path, pieces: int) -> None:
        source = source_of(large)
        shard = source.list()[0]
        indexes = [
            sample.index
            for number in range(pieces)
            for sample in read_all(source, dataclasses.replace(shard, piece=(number, pieces)))[0]
        ]
        assert indexes == list(range(100))

    def test_row_groups_that_are_answered_are_not_read(self) -> None:
        columns = {"image": noise(100, 10_000)}
        all_of_it = bytes_read(columns, row_group_size=10)
        some = bytes_read(columns, row_group_size=10, skip=Ranges.of([(0, 50), (55, 100)]))
        assert all_of_it > 1_000_000
        assert some < 170_000

    def test_skipped_rows_keep_their_numbers(self, large: Path) -> None:
        source = source_of(large)
        whole = dataclasses.replace(source.list()[0], piece=(0, 1))
        samples, rows = read_all(source, whole, skip=Ranges.of([(0, 12), (13, 38), (39, 99)]))
        assert ([s.index for s in samples], rows) == ([12, 38, 99], 100)

    def test_skipped_images_are_not_fetched(self, tmp_path: Path) -> None:
        (tmp_path / "1.png").write_bytes(b"1")
        source = source_of(write(tmp_path / "a.parquet", {"path": ["0.png", "1.png"]}))
        [sample] = read_all(source, source.list()[0], skip=Ranges.of([(0, 1)]))[0]
        assert (sample.index, sample.image) == (1, b"1")


class CountingFile:
    """Counts what is read of a file, and fails where it is told to."""

    def __init__(self, file: Any) -> None:
        self._file = file

    def read(self, n: int = -1) -> bytes:
        data: bytes = self._file.read(n)
        CountingFileSystem.bytes_read += len(data)
        if CountingFileSystem.fails is None:
            return data
        try:
            return CountingFileSystem.fails(data)
        except ZeroDivisionError as error:
            raise OSError("the disk is on fire") from error

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def __enter__(self) -> "CountingFile":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()


class CountingFileSystem(fsspec.get_filesystem_class("memory")):  # type: ignore[misc]
    """The memory store, with a count of what is read. `fails`: what becomes of it."""

    protocol = "counting"
    bytes_read = 0
    fails: Callable[[bytes], bytes] | None = None

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return super()._strip_protocol(path.replace("counting://", "memory://"))

    def open(self, path: str, mode: str = "rb", **options: Any) -> Any:
        return CountingFile(super().open(path, mode, **options))


fsspec.register_implementation("counting", CountingFileSystem, clobber=True)


def store_table(columns: Any, **options: Any) -> None:
    with fsspec.filesystem("memory").open("/counted/a.parquet", "wb") as file:
        pq.write_table(pa.table(columns), file, **options)


def bytes_read(columns: Any, *, skip: Ranges | None = None, **options: Any) -> int:
    store_table(columns, **options)
    source = source_of("counting://counted/a.parquet")
    [shard] = source.list()
    CountingFileSystem.bytes_read = 0
    read_all(source, shard, skip=skip)
    return CountingFileSystem.bytes_read


def test_one_large_row_group_is_not_read_as_a_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.sources.rowgroups.BUFFER_BYTES", 100_000)
    store_table({"image": noise(300, 20_000)}, data_page_size=50_000, write_batch_size=5)
    source = source_of("counting://counted/a.parquet")
    [shard] = source.list()
    reading = source.read(shard, skip=Ranges())
    CountingFileSystem.bytes_read = 0
    next(reading)
    assert CountingFileSystem.bytes_read < 2_000_000
    reading.close()


def damaged(path: Path, change: Callable[[bytearray], Any]) -> Path:
    data = bytearray(path.read_bytes())
    change(data)
    path.write_bytes(data)
    return path


def page_starts(path: Path, group: int, column: str) -> int:
    chunks = pq.read_metadata(path).row_group(group)
    [chunk] = [
        chunk
        for chunk in map(chunks.column, range(chunks.num_columns))
        if chunk.path_in_schema == column
    ]
    return int(chunk.data_page_offset)


@pytest.fixture
def small_pages(tmp_path: Path) -> Path:
    """40 rows of a few a page, of which that with row 20 is damaged."""
    images = noise(40, 1000)
    options = {"data_page_size": 3000, "write_batch_size": 1, "write_page_checksum": True}
    path = write(tmp_path / "a.parquet", {"image": images}, use_dictionary=False, **options)
    at = path.read_bytes().index(images[20][100:200])
    return damaged(path, lambda data: data.__setitem__(at, data[at] ^ 1))


class TestDamage:
    @pytest.mark.parametrize("data", [b"", b"PAR1", b"hello, world", b"PAR1" * 10, b"\0" * 1000])
    def test_what_is_no_parquet_file_is_one_failed_row(self, tmp_path: Path, data: bytes) -> None:
        (tmp_path / "a.parquet").write_bytes(data)
        [sample] = read_file(tmp_path / "a.parquet")
        assert (sample.index, sample.image) == (0, None)
        assert isinstance(sample.error, ShardUnreadable)
        assert f"{tmp_path}/a.parquet: is no whole Parquet file" in str(sample.error)

    def test_a_truncated_file_is_one_failed_row_of_its_first_piece(self, large: Path) -> None:
        damaged(large, lambda data: data.__delitem__(slice(-5, None)))
        source = source_of(large)
        read = [read_all(source, shard) for shard in source.list()]
        assert [(len(samples), rows) for samples, rows in read] == [(1, 1), (0, 1), (0, 1), (0, 1)]
        assert read_all(source, source.list()[0], skip=Ranges.of([(0, 1)])) == ([], 1)

    def test_a_file_that_is_gone_is_one_failed_row(self, tmp_path: Path) -> None:
        source = source_of(write(tmp_path / "a.parquet", {"image": [PNG]}))
        [shard] = source.list()
        (tmp_path / "a.parquet").unlink()
        [sample], rows = read_all(source, shard)
        assert rows == 1
        assert "gone since it was listed" in str(sample.error)

    def test_a_damaged_row_group_loses_its_own_rows_only(self, large: Path) -> None:
        start = page_starts(large, 4, "image")
        damaged(large, lambda data: data.__setitem__(slice(start, start + 50), b"\xff" * 50))
        source = source_of(large)
        read = [read_all(source, shard) for shard in source.list()]
        assert {rows for _, rows in read} == {100}
        samples = [sample for samples, _ in read for sample in samples]
        assert [s.index for s in samples] == list(range(100))
        lost = [s.index for s in samples if s.error]
        assert lost == list(range(40, 50))
        assert all(isinstance(samples[n].error, ShardUnreadable) for n in lost)
        assert "row group 4 is damaged: its rows 40 to 49 are lost" in str(samples[40].error)
        assert [s.image for s in samples if not s.error] == [
            image for n, image in enumerate(noise(100, 10_000)) if n not in lost
        ]

    def test_rows_before_a_damaged_page_are_answered(self, small_pages: Path) -> None:
        images = noise(40, 1000)
        samples = read_file(small_pages)
        lost = [s.index for s in samples if s.error]
        assert 10 < lost[0] <= 20
        assert lost == list(range(lost[0], 40))
        assert [s.image for s in samples[: lost[0]]] == images[: lost[0]]

    @pytest.mark.parametrize("pairs", [[(0, 30)], [(1, 17), (20, 22)], [(5, 39)], [(0, 18)]])
    def test_lost_rows_are_the_same_whatever_is_skipped(
        self, small_pages: Path, pairs: list[tuple[int, int]]
    ) -> None:
        lost = {s.index for s in read_file(small_pages) if s.error}
        source, skip = source_of(small_pages), Ranges.of(pairs)
        samples, rows = read_all(source, source.list()[0], skip=skip)
        assert rows == 40
        assert {s.index for s in samples if s.error} == {n for n in lost if n not in skip}

    def test_a_file_without_rows_is_empty(self, tmp_path: Path) -> None:
        assert read_file(write(tmp_path / "a.parquet", {"image": pa.array([], pa.binary())})) == []

    def test_another_file_without_the_image_column_fails_row_by_row(self, tmp_path: Path) -> None:
        write(tmp_path / "1.parquet", {"image": [PNG]})
        write(tmp_path / "2.parquet", {"caption": ["x", "y"]})
        source = source_of(tmp_path)
        source.keep_types()
        samples, rows = read_all(source, source.list()[1])
        assert rows == 2
        assert [type(s.image_error) for s in samples] == [ImageMissing] * 2
        assert "2.parquet: row 1: " in str(samples[1].image_error)

    def test_where_the_first_file_is_damaged_the_next_tells_the_types(self, tmp_path: Path) -> None:
        (tmp_path / "1.parquet").write_bytes(b"PAR1")
        write(tmp_path / "2.parquet", {"image": [PNG], "n": [1]})
        assert source_of(tmp_path, keep=["n"]).keep_types() == {"n": pa.int64()}
        (tmp_path / "2.parquet").unlink()
        assert source_of(tmp_path).keep_types() == {}
        with pytest.raises(SpecError, match=r"source.keep: 'n'"):
            source_of(tmp_path, keep=["n"]).keep_types()

    @pytest.mark.parametrize("fails", [lambda _: 1 / 0, lambda data: data[:-1]])
    def test_a_store_that_fails_is_no_damage(
        self, monkeypatch: pytest.MonkeyPatch, fails: Callable[[bytes], bytes]
    ) -> None:
        store_table({"image": noise(20, 1_000_000)}, row_group_size=5)
        source = source_of("counting://counted/a.parquet")
        [shard] = source.list()
        reading = source.read(shard, skip=Ranges())
        next(reading)
        monkeypatch.setattr(CountingFileSystem, "fails", fails)
        with pytest.raises(
            StoreUnavailable, match=r"a.parquet: the store failed while it was read"
        ):
            list(reading)
        with pytest.raises(StoreUnavailable, match="the store failed"):
            list(source.read(shard, skip=Ranges()))


@functools.cache
def victim() -> bytes:
    file = pa.BufferOutputStream()
    table = pa.table(
        {
            "image": pa.array([{"bytes": PNG, "path": f"{n}.png"} for n in range(6)], IMAGE_STRUCT),
            "questions": [[{"id": "a", "question": f"{n}?"}] for n in range(6)],
            "x": pa.array(["a", "b"] * 3).dictionary_encode(),
            "t": pa.array(range(6), pa.timestamp("ns")),
        }
    )
    pq.write_table(table, file, row_group_size=3)
    return file.getvalue().to_pybytes()


def read_bytes(data: bytes) -> None:
    fsspec.filesystem("memory").pipe_file("/fuzzed/a.parquet", data)
    job = job_of("memory://fuzzed/a.parquet", keep=["x", "t"])
    source = open_source(job.source)
    try:
        keep = source.keep_types()
    except SpecError:
        keep = {"x": pa.string(), "t": pa.timestamp("ns")}
    [shard] = source.list()
    source = open_source(job.source, keep=keep)
    samples = list(source.read(shard, skip=Ranges()))
    assert [s.index for s in samples] == list(range(len(samples)))
    tables = tables_read(job, [work(shard)], keep=keep)
    rows = [row for table in tables for row in table.to_pylist()]
    indexes = [line["source_index"] for row in rows for line in row["lines"] or ()]
    assert indexes == [sample.index for sample in samples]
    assert rows[-1]["rows_total"] == len(samples)


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=200))
def test_any_bytes_have_an_outcome(data: bytes) -> None:
    read_bytes(data)
    read_bytes(b"PAR1" + data + len(data).to_bytes(4, "little") + b"PAR1")


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_any_change_of_a_file_has_an_outcome(data: st.DataObject) -> None:
    changed = bytearray(victim())
    places = st.integers(0, len(changed) - 1)
    for place in data.draw(st.lists(places, min_size=1, max_size=4)):
        changed[place] = data.draw(st.integers(0, 255))
    if data.draw(st.booleans()):
        start, stop = sorted((data.draw(places), data.draw(places)))
        del changed[start : start + (stop - start) % 50]
    read_bytes(bytes(changed))


def job_of(path: Path | str, **options: Any) -> JobSpec:
    return JobSpec.model_validate(
        {
            "source": {"format": "parquet", "path": str(path), **options},
            "ask": [{"id": "caption", "prompt": "What?"}],
            "output": {"path": "/nowhere"},
        }
    )


def work(shard: Shard) -> ShardWork:
    return ShardWork(shard, ShardCoverage(shard.uri, shard.identity))


def work_of(source: Parquet) -> list[ShardWork]:
    return [work(shard) for shard in source.list()]


class WithoutRanges(http.server.BaseHTTPRequestHandler):
    """Serves the same table under every name, always from its start."""

    def do_HEAD(self) -> None:
        self.send(200, web_table(), "")

    def do_GET(self) -> None:
        self.send(200, web_table(), "")
        self.wfile.write(web_table())

    def send(self, status: int, data: bytes, part: str) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        if part:
            self.send_header("Content-Range", part)
        self.end_headers()

    def log_message(self, *_: Any) -> None:
        pass


class WithRanges(WithoutRanges):
    def do_GET(self) -> None:
        first, last = map(int, self.headers["Range"].removeprefix("bytes=").split("-"))
        data = web_table()[first : last + 1]
        self.send(206, data, f"bytes {first}-{first + len(data) - 1}/{len(web_table())}")
        self.wfile.write(data)


@functools.cache
def web_table() -> bytes:
    file = pa.BufferOutputStream()
    columns = {"image": [PNG] * 6, "x": ["a"] * 6, "junk": noise(6, 50_000)}
    pq.write_table(pa.table(columns), file, row_group_size=2)
    return file.getvalue().to_pybytes()


@contextmanager
def serving(handler: type[http.server.BaseHTTPRequestHandler]) -> Iterator[str]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


class TestStores:
    def test_memory_is_a_store_like_others(self) -> None:
        fsspec.filesystem("memory").pipe_file("/tables/a.parquet", victim())
        fsspec.filesystem("memory").pipe_file("/tables/b.parquet", victim())
        source = source_of("memory://tables")
        assert [shard.uri for shard in source.list()] == [
            "memory:///tables/a.parquet",
            "memory:///tables/b.parquet",
        ]
        assert [s.image for s in read_all(source, source.list()[0])[0]] == [PNG] * 6

    def test_a_web_server_with_ranges(self) -> None:
        with serving(WithRanges) as url:
            source = source_of(f"{url}/a.parquet", keep=["x"])
            assert source.keep_types() == {"x": pa.string()}
            samples, rows = read_all(source, source.list()[0])
        assert rows == 6
        assert [s.image for s in samples] == [PNG] * 6

    def test_a_web_server_without_ranges_is_not_taken_for_damage(self) -> None:
        with serving(WithoutRanges) as url:
            source = source_of(f"{url}/a.parquet")
            with pytest.raises(SpecError, match="range requests"):
                source.keep_types()
            with pytest.raises(StoreUnavailable, match="range requests"):
                list(source.read(source.list()[0], skip=Ranges()))

    def test_s3(self, s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("pipeline.sources.parquet.PIECE_BYTES", 1_000_000)
        options = {"storage": {"endpoint_url": s3_server.endpoint_url}}
        source = source_of(s3_server.url("tables"), keep=["n"], **options)
        fs, folder = filesystem(s3_server.url("tables"), spec_of("x", **options).storage)
        images = noise(60, 50_000)
        rows = [
            {"bytes": image, "path": None} if n % 3 else {"bytes": None, "path": f"{n}.jpg"}
            for n, image in enumerate(images)
        ]
        for n in range(0, 60, 3):
            fs.pipe_file(f"{folder}/{n}.jpg", images[n])
        with fs.open(f"{folder}/a.parquet", "wb") as file:
            table = pa.table({"image": pa.array(rows, IMAGE_STRUCT), "n": range(60)})
            pq.write_table(table, file, row_group_size=8)
        shards = source.list()
        assert len(shards) > 1
        assert source.keep_types() == {"n": pa.int64()}
        samples = [sample for shard in shards for sample in read_all(source, shard)[0]]
        assert [s.image for s in samples] == images
        assert [each["n"] for each in kept_of(samples)] == list(range(60))
