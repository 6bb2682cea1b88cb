"""The manifest source: JSON in its shapes, rows grouped by image, and what is broken in them."""

import gzip
import itertools
import json
import random
import threading
import tracemalloc
from collections import Counter
from collections.abc import Iterable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.coverage import Ranges
from pipeline.sources import open_source
from pipeline.sources.base import Question, Sample, Shard, Turn
from pipeline.sources.fetch import Unfetched
from pipeline.sources.grouping import PutAside, hash_of
from pipeline.sources.jsonvalues import json_text
from pipeline.sources.manifest import LINES_AT_ONCE, Manifest
from pipeline.storage import filesystem
from schemas.errors import (
    ConversationMalformed,
    ImageMissing,
    JobError,
    ManifestMalformed,
    QuestionsMalformed,
    ShardUnreadable,
    SpecError,
    StoreUnavailable,
)
from schemas.job import SourceSpec
from tests.s3 import S3Server

HUMAN, GPT = "human", "gpt"


def spec_of(path: Path | str | list[str], **options: Any) -> SourceSpec:
    where = path if isinstance(path, list) else str(path)
    return SourceSpec.model_validate({"format": "manifest", "path": where, **options})


def read_all(
    source: Manifest, shard: Shard, *, skip: Ranges | None = None
) -> tuple[list[Sample], int]:
    samples = []
    reading = source.read(shard, skip=skip or Ranges())
    while True:
        try:
            samples.append(next(reading))
        except StopIteration as end:
            return samples, end.value


def read_file(path: Path, **options: Any) -> list[Sample]:
    source = Manifest(spec_of(path, **options))
    samples, rows = read_all(source, source.list()[0])
    assert sorted(s.index for s in samples) == list(range(rows))
    return samples


def jsonl(rows: Iterable[Any]) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


def write_images(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(name.encode())


def read_lines(tmp_path: Path, *rows: Any, **options: Any) -> list[Sample]:
    (tmp_path / "m.jsonl").write_bytes(jsonl(rows))
    return read_file(tmp_path / "m.jsonl", **options)


def read_row(tmp_path: Path, row: Any, /, **options: Any) -> Sample:
    write_images(tmp_path, "a.png")
    [sample] = read_lines(tmp_path, {"image": "a.png", **row}, **options)
    return sample


def read_bytes(tmp_path: Path, data: bytes, name: str = "m.json", **options: Any) -> list[Sample]:
    (tmp_path / name).write_bytes(data)
    return read_file(tmp_path / name, **options)


def by_index(samples: Iterable[Sample]) -> list[Sample]:
    return sorted(samples, key=lambda sample: sample.index)


class TestListing:
    def test_a_folder_gives_its_manifests_sorted_and_nothing_else(self, tmp_path: Path) -> None:
        for name in ("b.jsonl", "a.jsonl.gz", "c/d.json", "e.ndjson", "notes.txt", "a.png"):
            write_images(tmp_path, name)
        shards = Manifest(spec_of(tmp_path)).list()
        names = [Path(shard.uri).name for shard in shards]
        assert names == ["a.jsonl.gz", "b.jsonl", "d.json", "e.ndjson"]
        assert all(s.rows is None and s.identity and s.piece == (0, 1) for s in shards)

    def test_open_source_takes_the_class_by_format(self, tmp_path: Path) -> None:
        assert isinstance(open_source(spec_of(tmp_path)), Manifest)

    def test_a_missing_path_is_a_spec_error(self, tmp_path: Path) -> None:
        with pytest.raises(SpecError, match="does not exist"):
            Manifest(spec_of(tmp_path / "no.jsonl")).list()

    def test_large_files_are_listed_in_pieces(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("pipeline.sources.manifest.PIECE_BYTES", 10)
        (tmp_path / "a.jsonl").write_bytes(b"x" * 25)
        (tmp_path / "b.jsonl").write_bytes(b"x" * 1000)
        shards = Manifest(spec_of(tmp_path)).list()
        assert [s.piece for s in shards[:3]] == [(0, 3), (1, 3), (2, 3)]
        assert [s.piece for s in shards[3:]] == [(n, 16) for n in range(16)]
        assert len({(s.uri, s.identity) for s in shards}) == 2


class TestLines:
    @pytest.mark.parametrize("pack", [bytes, gzip.compress])
    def test_a_line_is_a_row(self, tmp_path: Path, pack: Any) -> None:
        write_images(tmp_path, "a.png", "b/c.png")
        rows = [{"image": "a.png", "questions": ["x?"]}, {"image": "b/c.png"}]
        samples = read_bytes(tmp_path, pack(jsonl(rows)), "m.jsonl")
        assert [(s.index, s.sample_id, s.image) for s in samples] == [
            (0, "a.png", b"a.png"),
            (1, "b/c.png", b"b/c.png"),
        ]
        assert [s.questions for s in samples] == [(Question("q0", "x?"),), None]

    def test_blank_lines_are_no_rows_and_messages_name_the_line(self, tmp_path: Path) -> None:
        data = b'\xef\xbb\xbf\n{"image": "a.png"}\r\n\n  \n{"image": 7}\n\n{broken'
        write_images(tmp_path, "a.png")
        samples = by_index(read_bytes(tmp_path, data, "m.jsonl"))
        assert samples[0].image == b"a.png"
        assert "m.jsonl: line 5: column 'image' names no image" in str(samples[1].image_error)
        assert "m.jsonl: line 7: it is no JSON" in str(samples[2].error)

    @pytest.mark.parametrize(
        ("line", "reason"),
        [
            (b"{", "it is no JSON: Expecting property name"),
            (b"[1]", "it holds list, not an object"),
            (b'"a.png"', "it holds str, not an object"),
            (b"\xff\xfe", "it is no UTF-8: invalid start byte at byte 0"),
            (b'{"image": "\xe9.png"}', "it is no UTF-8"),
            (b"[" * 100_000, "it cannot be read"),
            (b'{"a": ' + b"9" * 5000 + b"}", "it cannot be read"),
            (b"\0\1\2", "it is no JSON"),
        ],
    )
    def test_a_malformed_line_is_one_failed_row(
        self, tmp_path: Path, line: bytes, reason: str
    ) -> None:
        write_images(tmp_path, "a.png")
        good = b'{"image": "a.png"}'
        samples = by_index(read_bytes(tmp_path, b"\n".join([good, line, good]), "m.jsonl"))
        assert [s.image for s in samples] == [b"a.png", None, b"a.png"]
        assert isinstance(samples[1].error, ManifestMalformed)
        assert f"m.jsonl: line 2: {reason}" in str(samples[1].error)
        assert len(str(samples[1].error)) < 300

    def test_a_line_without_end_is_not_held_in_memory(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("pipeline.sources.jsonrows.MOST_ROW_BYTES", 10_000)
        monkeypatch.setattr("pipeline.sources.jsonrows.BUFFER_BYTES", 10_000)
        write_images(tmp_path, "a.png")
        with (tmp_path / "m.jsonl").open("wb") as file:
            file.write(b'{"image": "')
            file.writelines([b"x" * 100_000] * 300)
            file.write(b'"}\n{"image": "a.png"}\n')
        spec = spec_of(tmp_path)
        source = Manifest(spec, fetcher=Unfetched(spec))
        tracemalloc.start()
        samples, rows = read_all(source, source.list()[0])
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 5_000_000
        assert isinstance(samples[0].error, ManifestMalformed)
        assert "line 1: it is longer than 10,000 bytes" in str(samples[0].error)
        assert (samples[1].sample_id, rows) == ("a.png", 2)

    def test_an_empty_file_has_no_rows(self, tmp_path: Path) -> None:
        assert read_bytes(tmp_path, b"", "m.jsonl") == []
        assert read_bytes(tmp_path, b"\n \n", "m.jsonl") == []
        assert read_bytes(tmp_path, b"[]", "m.json") == []


class TestImages:
    @pytest.mark.parametrize("name", ["image", "image_path", "file_name", "url", "img"])
    def test_the_column_is_known_by_its_name(self, tmp_path: Path, name: str) -> None:
        write_images(tmp_path, "a.png")
        [sample] = read_lines(tmp_path, {"x": 1, name: "a.png"})
        assert sample.image == b"a.png"

    def test_the_first_row_with_an_image_decides_for_the_file(self, tmp_path: Path) -> None:
        write_images(tmp_path, "a.png", "b.png")
        rows = [{"n": 1}, {"url": "a.png", "image": None}, {"url": "b.png", "image": "a.png"}]
        samples = by_index(read_lines(tmp_path, *rows))
        assert [s.image for s in samples] == [None, b"a.png", b"b.png"]

    def test_it_decides_where_it_is_answered_already_too(self, tmp_path: Path) -> None:
        write_images(tmp_path, "a.png", "b.png")
        rows = [{"url": "a.png"}, {"url": "b.png", "image": "a.png"}]
        (tmp_path / "m.jsonl").write_bytes(jsonl(rows))
        source = Manifest(spec_of(tmp_path / "m.jsonl"))
        samples, _ = read_all(source, source.list()[0], skip=Ranges.of([(0, 1)]))
        assert [s.image for s in samples] == [b"b.png"]

    def test_columns_image_chooses_it(self, tmp_path: Path) -> None:
        write_images(tmp_path, "a.png")
        row = {"image": "no.png", "photo": ["a.png"]}
        [sample] = read_lines(tmp_path, row, columns={"image": "photo"})
        assert (sample.image, sample.sample_id) == (b"a.png", "a.png")

    @pytest.mark.parametrize(
        ("value", "told"),
        [
            (None, "names no image"),
            ("", "names no image"),
            (7, "names no image"),
            ({"bytes": None}, "names no image"),
            ([], "names no image"),
            (["a.png", ""], "names no image at place 2 of 2"),
        ],
    )
    def test_a_row_without_an_image_keeps_its_questions(
        self, tmp_path: Path, value: Any, told: str
    ) -> None:
        row = {"image": value, "questions": ["x?", "y?"], "n": 1}
        [sample] = read_lines(tmp_path, row, columns={"image": "image"}, keep=["n"])
        assert isinstance(sample.image_error, ImageMissing)
        assert f"line 1: column 'image' {told} (the row has image, questions, n)" in str(
            sample.image_error
        )
        assert (sample.error, sample.image) == (None, None)
        assert len(sample.questions or ()) == 2
        assert sample.keep == {"n": "1"}

    def test_an_image_that_is_gone_fails_each_of_its_rows_alike(self, tmp_path: Path) -> None:
        samples = read_lines(tmp_path, *[{"image": "gone.png", "n": n} for n in range(3)])
        assert {s.image_error for s in samples} == {samples[0].image_error}
        assert "gone.png: there is no such file" in str(samples[0].image_error)

    def test_relative_paths_are_below_image_root(self, tmp_path: Path) -> None:
        write_images(tmp_path, "root/a.png", "a.png")
        [sample] = read_lines(tmp_path, {"image": "a.png"}, image_root=str(tmp_path / "root"))
        assert sample.image == b"root/a.png"

    def test_labels_and_messages_hold_no_secret(self, tmp_path: Path) -> None:
        url = "https://me:pw@127.0.0.1:1/a.png?X-Amz-Signature=secret"
        source = Manifest(spec_of(tmp_path))
        (tmp_path / "m.jsonl").write_bytes(jsonl([{"image": url}]))
        [sample], _ = read_all(source, source.list()[0])
        assert sample.sample_id == "https://127.0.0.1:1/a.png"
        assert "secret" not in str(sample.image_error)


class TestSeveral:
    """Rows of several images."""

    def test_a_list_and_columns_in_their_order(self, tmp_path: Path) -> None:
        write_images(tmp_path, "a.png", "b.png", "c.png")
        a, b, c = (f"{name}.png".encode() for name in "abc")
        for asked, row in (
            (None, {"image": ["a.png", "b.png", "c.png"]}),
            (None, {"images": ["a.png", "b.png", "c.png"]}),
            (["x", "y"], {"y": ["b.png", "c.png"], "x": "a.png"}),
        ):
            columns = {"image": asked} if asked else {}
            [sample] = read_lines(tmp_path, row, columns=columns)
            assert (sample.image, [*sample.more_images]) == (a, [b, c])
            assert sample.sample_id == "a.png"

    def test_rows_of_the_same_images_are_given_together_and_hold_the_same(
        self, tmp_path: Path
    ) -> None:
        write_images(tmp_path, "a.png", "b.png")
        lists = [["a.png", "b.png"], ["a.png"], ["b.png", "a.png"], ["a.png", "b.png"], ["a.png"]]
        samples = read_lines(tmp_path, *({"image": each} for each in lists))
        assert [sample.index for sample in samples] == [0, 3, 1, 4, 2]
        assert [sample.image for sample in samples] == [b"a.png"] * 4 + [b"b.png"]
        assert [[*s.more_images] for s in samples] == [[b"b.png"]] * 2 + [[]] * 2 + [[b"a.png"]]
        assert samples[0].more_images[0] is samples[1].more_images[0]

    def test_one_that_is_gone_fails_its_rows_alone(self, tmp_path: Path) -> None:
        write_images(tmp_path, "a.png")
        lists = [["a.png", "gone.png"], ["a.png", "a.png"]]
        gone, fine = read_lines(tmp_path, *({"image": each} for each in lists))
        assert isinstance(gone.image_error, ImageMissing)
        assert str(gone.image_error).startswith("image 2 of 2: ")
        assert "gone.png" in str(gone.image_error)
        assert gone.n_bytes == 0
        assert (fine.image, [*fine.more_images]) == (b"a.png", [b"a.png"])

    def test_a_column_without_an_image_is_named(self, tmp_path: Path) -> None:
        write_images(tmp_path, "a.png")
        rows = [{"x": "a.png", "y": ""}, {"x": "a.png", "y": "a.png"}]
        broken, fine = by_index(read_lines(tmp_path, *rows, columns={"image": ["x", "y"]}))
        assert "column 'y' names no image" in str(broken.image_error)
        assert len(fine.more_images) == 1

    def test_rows_that_are_filtered_out_bring_no_error(self, tmp_path: Path) -> None:
        write_images(tmp_path, "a.png", "b.png")
        rows = [{"image": ["a.png", "b.png"], "n": n} for n in range(3)]
        rows += [{"image": ["gone.png", "b.png"], "n": 0}]
        samples = read_lines(tmp_path, *rows, where="n == 1")
        assert [s.skip is None for s in samples] == [False, True, False, False]
        assert [s.image_error for s in samples] == [None] * 4
        assert samples[1].n_bytes == 10


class TestColumns:
    def test_the_id_is_a_column_or_the_rows_own_id_or_its_image(self, tmp_path: Path) -> None:
        rows = [
            {"image": "a.png", "uid": "u"},
            {"image": "a.png", "uid": 7},
            {"image": "a.png", "id": "i"},
            {"image": "a.png"},
        ]
        samples = read_lines(tmp_path, *rows, columns={"id": "uid"})
        assert [s.sample_id for s in samples] == ["u", "7", "i", "a.png"]

    def test_kept_columns_are_json_text(self, tmp_path: Path) -> None:
        names = ["url", "n", "tags", "none", "nan", "huge", "missing", "__key__", "image"]
        source = Manifest(spec_of(tmp_path, keep=names))
        assert source.keep_types() == dict.fromkeys(names, pa.string())
        (tmp_path / "m.jsonl").write_bytes(
            b'{"image": "a.png", "url": "\xc3\xa9", "n": 1.5, "tags": ["\\ud800"], "none": null, '
            b'"nan": NaN, "huge": [1e999, {"x": -Infinity}]}'
        )
        [sample], _ = read_all(source, source.list()[0])
        assert sample.keep == {
            "url": '"é"',
            "n": "1.5",
            "tags": '["\ufffd"]',
            "none": None,
            "nan": None,
            "huge": '[null, {"x": null}]',
            "missing": None,
            "__key__": '"a.png"',
            "image": '"a.png"',
        }


class TestQuestions:
    @pytest.mark.parametrize(
        ("row", "expected"),
        [
            ({"questions": [{"id": "a", "question": "x?"}, "y?"]}, [("a", "x?"), ("q1", "y?")]),
            ({"questions": "x?"}, [("q0", "x?")]),
            ({"questions": []}, []),
            ({"question": "x?"}, [("q0", "x?")]),
            ({"question_id": 7, "question": "x?"}, [("7", "x?")]),
            ({"question_id": "a/7", "text": "<image>\nx?", "category": "d"}, [("a/7", "x?")]),
            ({"question_id": 7, "text": " x? "}, [("7", " x? ")]),
            ({"questions": ["x?"], "question_id": 7, "text": "y?"}, [("q0", "x?")]),
        ],
    )
    def test_questions_are_known_by_their_shape(
        self, tmp_path: Path, row: Any, expected: list[tuple[str, str]]
    ) -> None:
        sample = read_row(tmp_path, row)
        assert sample.questions == tuple(Question(*pair) for pair in expected)
        assert sample.image == b"a.png"

    @pytest.mark.parametrize("row", [{}, {"questions": None}, {"text": "a caption"}])
    def test_a_row_without_questions_has_none(self, tmp_path: Path, row: Any) -> None:
        assert read_row(tmp_path, row).questions is None

    @pytest.mark.parametrize(
        ("row", "reason"),
        [
            ({"questions": {"a": 1}}, "column 'questions': it is an object"),
            ({"question": 7}, "column 'question': it is a number"),
            ({"question_id": 7}, "column 'text': `question` of item 0 is null"),
            ({"question_id": 1.5, "text": "x?"}, "`id` of item 0 is a number"),
            ({"question_id": 7, "text": "<image>"}, "`question` of item 0 is empty text"),
        ],
    )
    def test_malformed_questions_say_why(self, tmp_path: Path, row: Any, reason: str) -> None:
        sample = read_row(tmp_path, row)
        assert isinstance(sample.questions, QuestionsMalformed)
        assert "m.jsonl: line 1: " in str(sample.questions)
        assert reason in str(sample.questions)
        assert sample.image == b"a.png"

    def test_a_column_that_is_named_is_the_only_one(self, tmp_path: Path) -> None:
        options: dict[str, Any] = {"columns": {"questions": "ask"}}
        row = {"question_id": 7, "text": "x?"}
        assert read_row(tmp_path, row, **options).questions is None
        assert read_row(tmp_path, {**row, "ask": "y?"}, **options).questions == (
            Question("q0", "y?"),
        )


def talk(*said: str) -> list[dict[str, str]]:
    return [{"from": (HUMAN, GPT)[n % 2], "value": text} for n, text in enumerate(said)]


class TestConversations:
    def test_what_the_human_says_are_the_questions(self, tmp_path: Path) -> None:
        row = {"id": "33471", "conversations": talk("<image>\nx?", "X.", "y?", "Y.", "z?\n<image>")}
        sample = read_row(tmp_path, row, keep=["conversations"])
        assert sample.questions == (
            Question("q0", "x?"),
            Question("q1", "y?"),
            Question("q2", "z?"),
        )
        assert sample.sample_id == "33471"
        assert sample.conversation is None
        assert json.loads(str(sample.keep["conversations"])) == row["conversations"]

    def test_a_list_of_them_is_llavas_instruction_file(self, tmp_path: Path) -> None:
        write_images(tmp_path, "coco/1.jpg", "coco/2.jpg")
        rows = [
            {"id": f"{n}", "image": f"coco/{n}.jpg", "conversations": talk(f"<image>\n{n}?", "X")}
            for n in (1, 2)
        ]
        samples = read_bytes(tmp_path, json.dumps(rows, indent=2).encode())
        assert [(s.sample_id, s.image) for s in samples] == [
            ("1", b"coco/1.jpg"),
            ("2", b"coco/2.jpg"),
        ]
        assert [s.questions for s in samples] == [(Question("q0", f"{n}?"),) for n in (1, 2)]

    def test_named_as_the_conversation_it_is_what_questions_continue(self, tmp_path: Path) -> None:
        row = {"conversations": talk("<image>\nx?", "X.")}
        sample = read_row(tmp_path, row, columns={"conversation": "conversations"})
        assert sample.conversation == (Turn("user", "x?"), Turn("assistant", "X."))
        assert sample.questions is None

    def test_where_the_human_has_the_last_word_that_is_the_question(self, tmp_path: Path) -> None:
        row = {"conversations": talk("<image>\nx?", "X.", "y?")}
        sample = read_row(tmp_path, row, columns={"conversation": "conversations"})
        assert sample.conversation == (Turn("user", "x?"), Turn("assistant", "X."))
        assert sample.questions == (Question("q0", "y?"),)

    def test_turns_as_other_sources_have_them_are_read_too(self, tmp_path: Path) -> None:
        turns = [{"role": "user", "content": "x?"}, {"role": "assistant", "content": "X."}]
        row = {"talk": turns, "questions": ["y?"]}
        sample = read_row(tmp_path, row, columns={"conversation": "talk"})
        assert sample.conversation == (Turn("user", "x?"), Turn("assistant", "X."))
        assert sample.questions == (Question("q0", "y?"),)

    @pytest.mark.parametrize(
        ("value", "reason"),
        [
            ([7, *talk("x?")], "item 0 is a number"),
            ([{"from": HUMAN}], "`question` of item 0 is null or missing"),
            ([{"from": [1], "value": 1}, {"from": HUMAN, "value": 1}], "item 0 is a number"),
        ],
    )
    def test_a_malformed_talk_says_why(self, tmp_path: Path, value: Any, reason: str) -> None:
        asked = read_row(tmp_path, {"conversations": value})
        assert isinstance(asked.questions, QuestionsMalformed)
        assert reason in str(asked.questions)
        columns = {"conversation": "conversations"}
        continued = read_row(tmp_path, {"conversations": value}, columns=columns)
        understood = (continued.conversation, continued.questions)
        assert any(isinstance(e, ConversationMalformed | QuestionsMalformed) for e in understood)


def vqa(n_images: int, *, per_image: int = 2, **header: Any) -> dict[str, Any]:
    ids = [(image, number) for image in range(1, n_images + 1) for number in range(per_image)]
    random.Random(0).shuffle(ids)
    questions = [
        {"image_id": image, "question": f"{image}.{number}?", "question_id": image * 1000 + number}
        for image, number in ids
    ]
    return {
        "info": {"version": "2.0", "questions": 3},
        "data_type": "mscoco",
        "data_subtype": "val2014",
        **header,
        "questions": questions,
    }


def annotations_of(questions: dict[str, Any]) -> dict[str, Any]:
    rows = [
        {
            "question_id": row["question_id"],
            "image_id": row["image_id"],
            "multiple_choice_answer": f"answer {row['question_id']}",
            "answers": [{"answer": "yes", "answer_id": 1}],
        }
        for row in reversed(questions["questions"])
    ]
    return {"annotations": rows, "data_subtype": questions["data_subtype"]}


def write_json(path: Path, value: Any, **options: Any) -> Path:
    path.write_text(json.dumps(value, **options))
    return path


class TestVqa:
    @pytest.mark.parametrize("indent", [None, 1])
    @pytest.mark.parametrize("is_header_first", [True, False])
    def test_questions_know_their_images(
        self, tmp_path: Path, indent: int | None, is_header_first: bool
    ) -> None:
        names = [f"images/COCO_val2014_{number:012}.jpg" for number in (1, 2, 3)]
        write_images(tmp_path, *names)
        document = vqa(3)
        if not is_header_first:
            document = dict(reversed(document.items()))
        path = write_json(tmp_path / "q.json", document, indent=indent)
        samples = read_file(path, image_root=str(tmp_path / "images"))
        assert len(samples) == 6
        for sample, row in zip(by_index(samples), document["questions"], strict=True):
            assert sample.image == names[row["image_id"] - 1].encode()
            assert sample.questions == (Question(str(row["question_id"]), row["question"]),)
            assert sample.sample_id == f"COCO_val2014_{row['image_id']:012}.jpg"

    @pytest.mark.parametrize(
        ("header", "name"),
        [
            ({"data_subtype": "test-dev2015"}, "COCO_test2015_000000000001.jpg"),
            ({"data_type": "abstract_v002"}, "abstract_v002_val2014_000000000001.png"),
        ],
    )
    def test_the_header_says_which_images_are_meant(
        self, tmp_path: Path, header: dict[str, str], name: str
    ) -> None:
        write_images(tmp_path, name)
        [sample] = read_file(write_json(tmp_path / "q.json", vqa(1, per_image=1, **header)))
        assert sample.image == name.encode()

    @pytest.mark.parametrize(
        ("change", "reason"),
        [
            ({"data_subtype": None}, "item 0: the file does not say which images it means"),
            ({"questions": [{"image_id": "x", "question_id": 1, "question": "x?"}]}, "image_id"),
            ({"questions": [{"image_id": "9" * 5000, "question_id": 1, "question": "x?"}]}, "no n"),
        ],
    )
    def test_images_that_cannot_be_named_are_missing(
        self, tmp_path: Path, change: dict[str, Any], reason: str
    ) -> None:
        document = {**vqa(1, per_image=1), **change}
        [sample] = read_file(write_json(tmp_path / "q.json", document))
        assert isinstance(sample.image_error, ImageMissing)
        assert reason in str(sample.image_error)
        assert sample.questions

    def test_a_column_of_images_is_taken_where_there_is_one(self, tmp_path: Path) -> None:
        write_images(tmp_path, "a.png")
        question = {"image": "a.png", "image_id": 5, "question_id": 1, "question": "x?"}
        [sample] = read_bytes(tmp_path, json.dumps({"questions": [question]}).encode())
        assert sample.image == b"a.png"

    def test_annotations_given_too_can_be_kept(self, tmp_path: Path) -> None:
        questions = vqa(3)
        write_json(tmp_path / "v2_val2014_questions.json", questions)
        write_json(tmp_path / "v2_val2014_annotations.json", annotations_of(questions))
        options: dict[str, Any] = {"keep": ["multiple_choice_answer", "answers", "question_id"]}
        source = Manifest(spec_of(tmp_path, **options))
        annotated, asked = source.list()
        assert read_all(source, annotated) == ([], 0)
        samples, rows = read_all(source, asked)
        assert rows == len(samples) == 6
        for sample in samples:
            id = str(sample.keep["question_id"])
            assert sample.keep["multiple_choice_answer"] == f'"answer {id}"'
            assert sample.keep["answers"] == '[{"answer": "yes", "answer_id": 1}]'
            assert sample.questions
            assert not isinstance(sample.questions, QuestionsMalformed)
            assert sample.questions[0].id == id

    def test_other_annotations_are_other_answers_where_they_are_kept(self, tmp_path: Path) -> None:
        questions = vqa(1)
        write_json(tmp_path / "questions.json", questions)
        write_json(tmp_path / "annotations.json", annotations_of(questions))
        kept = [s.identity for s in Manifest(spec_of(tmp_path, keep=["answers"])).list()]
        plain = [s.identity for s in Manifest(spec_of(tmp_path)).list()]
        write_json(tmp_path / "annotations.json", {"annotations": []})
        changed = [s.identity for s in Manifest(spec_of(tmp_path, keep=["answers"])).list()]
        assert kept[1] != changed[1]
        assert plain[1] == Manifest(spec_of(tmp_path)).list()[1].identity

    def test_annotations_alone_are_an_error(self, tmp_path: Path) -> None:
        path = write_json(tmp_path / "annotations.json", annotations_of(vqa(1)))
        [sample] = read_file(path)
        assert isinstance(sample.error, ManifestMalformed)
        assert "no file of its questions" in str(sample.error)

    def test_broken_annotations_alone_are_one_failed_row(self, tmp_path: Path) -> None:
        data = json.dumps(annotations_of(vqa(1))).encode()
        [sample] = read_bytes(tmp_path, data[:-40])
        assert isinstance(sample.error, ShardUnreadable)

    def test_broken_annotations_are_a_failed_row_of_their_own(self, tmp_path: Path) -> None:
        questions = vqa(3)
        write_json(tmp_path / "questions.json", questions)
        whole = json.dumps(annotations_of(questions))
        (tmp_path / "annotations.json").write_text(whole[: len(whole) // 2])
        source = Manifest(spec_of(tmp_path, keep=["multiple_choice_answer"]))
        annotated, asked = source.list()
        [sample], rows = read_all(source, annotated)
        assert (sample.index, rows) == (0, 1)
        assert isinstance(sample.error, ShardUnreadable)
        known = [s.keep["multiple_choice_answer"] is not None for s in read_all(source, asked)[0]]
        assert 0 < sum(known) < 6

    def test_a_plain_list_named_annotations_has_rows(self, tmp_path: Path) -> None:
        path = write_json(tmp_path / "annotations.json", [{"image": "a.png"}])
        assert len(read_file(path)) == 1


class TestBrokenLists:
    @pytest.mark.parametrize(
        ("data", "whole", "reason"),
        [
            (b'[{"image": "a.png"}', 1, "the file ends where , is due"),
            (b'[{"image": "a.png"} {"image": "a.png"}]', 1, "'{' stands where , is due"),
            (b'[{"image": "a.png"}, {"image"]', 1, "Expecting ':' delimiter"),
            (b'[{"image": "a.png"}, {"image": "a.p', 1, "Unterminated string"),
            (b'[{"image": "a.png"}]]', 1, "more follows after the end"),
            (b'[{"image": "a.png"}]\xe2\x82', 1, "more follows after the end"),
            (b"[" * 100_000, 0, "maximum recursion depth"),
            (b"[", 0, "no JSON value can be read"),
            (b'{\n"a": {"image": "a.png"}}', 0, "it holds one object, over several lines"),
            (b'{"a": {"image":\n"a.png"}}', 0, "it holds one object, over several lines"),
        ],
    )
    def test_what_comes_before_the_break_is_read(
        self, tmp_path: Path, data: bytes, whole: int, reason: str
    ) -> None:
        write_images(tmp_path, "a.png")
        *samples, last = read_bytes(tmp_path, data)
        assert [s.image for s in samples] == [b"a.png"] * whole
        assert isinstance(last.error, ShardUnreadable)
        assert last.index == whole
        assert reason in str(last.error)
        assert "m.json: cannot be read on: " in str(last.error)
        assert f"row {whole} and what follows it are lost" in str(last.error)

    def test_items_that_are_no_rows_cost_themselves(self, tmp_path: Path) -> None:
        write_images(tmp_path, "a.png")
        data = b'[7, {"image": "\xe9"}, null, {"image": "a.png"}, NaN, 12]'
        samples = by_index(read_bytes(tmp_path, data))
        assert [type(s.error) for s in samples] == [
            *[ManifestMalformed] * 3,
            type(None),
            *[ManifestMalformed] * 2,
        ]
        assert "m.json: item 1: it is no UTF-8" in str(samples[1].error)

    def test_items_of_any_size_are_read_whatever_is_read_at_once(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        write_images(tmp_path, "a.png")
        rows = [{"image": "a.png", "n": n, "é": "é\u2028" * (n % 40)} for n in range(200)]
        data = json.dumps([*rows, 12345, "x"], ensure_ascii=False).encode("utf-8-sig")
        for size in (1, 2, 7, 1000):
            monkeypatch.setattr("pipeline.sources.jsonrows.BUFFER_BYTES", size)
            samples = read_bytes(tmp_path, data, keep=["n", "é"])
            *whole, number, text = by_index(samples)
            assert [s.keep["n"] for s in whole] == [str(n) for n in range(200)]
            assert "item 200: it holds int" in str(number.error)
            assert "item 201: it holds str" in str(text.error)

    def test_an_item_without_end_is_not_held_in_memory(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("pipeline.sources.jsonrows.MOST_ROW_BYTES", 10_000)
        monkeypatch.setattr("pipeline.sources.jsonrows.BUFFER_BYTES", 10_000)
        with (tmp_path / "m.json").open("wb") as file:
            file.write(b'[{"image": "')
            file.writelines([b"x" * 100_000] * 300)
        tracemalloc.start()
        [sample] = read_file(tmp_path / "m.json")
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 5_000_000
        assert isinstance(sample.error, ShardUnreadable)


class TestBrokenGzip:
    def rows(self) -> bytes:
        chance = random.Random(0)
        rows = [{"image": "a.png", "n": n, "x": chance.randbytes(40).hex()} for n in range(2000)]
        return gzip.compress(jsonl(rows))

    def test_a_cut_gzip_gives_the_lines_before(self, tmp_path: Path) -> None:
        write_images(tmp_path, "a.png")
        data = self.rows()
        *samples, last = read_bytes(tmp_path, data[: len(data) // 2], "m.jsonl.gz")
        assert 900 < len(samples) < 1100
        assert all(s.image == b"a.png" for s in samples)
        assert isinstance(last.error, ShardUnreadable)
        assert last.index == len(samples)

    def test_a_wrong_checksum_is_found(self, tmp_path: Path) -> None:
        write_images(tmp_path, "a.png")
        data = bytearray(self.rows())
        data[-8] ^= 0xFF
        *samples, last = read_bytes(tmp_path, bytes(data), "m.jsonl.gz")
        assert len(samples) == 2000
        assert "CRC" in str(last.error)

    @pytest.mark.parametrize("data", [b"\x1f\x8b", b"\x1f\x8b" + b"x" * 600])
    def test_what_is_no_gzip_is_one_failed_row(self, tmp_path: Path, data: bytes) -> None:
        [sample] = read_bytes(tmp_path, data, "m.jsonl.gz")
        assert isinstance(sample.error, ShardUnreadable)


def test_a_file_that_is_gone_is_one_failed_row(tmp_path: Path) -> None:
    [sample], rows = read_all(Manifest(spec_of(tmp_path)), Shard(str(tmp_path / "gone.jsonl"), "x"))
    assert rows == 1
    assert "gone since it was listed" in str(sample.error)


class Web(ThreadingHTTPServer):
    """Serves `files`, and at any other path the path itself; `asked`: how often for each."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.asked: Counter[str] = Counter()
        self.files: dict[str, bytes] = {}
        self.lock = threading.Lock()
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()

    def url(self, path: str) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/{path}"


class Answer(BaseHTTPRequestHandler):
    server: Web

    def do_GET(self) -> None:
        name = self.path.strip("/")
        with self.server.lock:
            self.server.asked[name] += 1
        data = self.server.files.get(name, name.encode())
        self.send_response(int(name.removeprefix("status/")) if "status/" in name else 200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data)

    do_HEAD = do_GET

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def web() -> Iterator[Web]:
    server = Web()
    yield server
    server.shutdown()
    server.server_close()


def shuffled(n_images: int, *, per_image: int = 5) -> list[dict[str, Any]]:
    rows = [
        {"image": f"{image}.png", "question_id": f"{image}-{n}", "text": f"{image}: {n}?"}
        for image in range(n_images)
        for n in range(per_image)
    ]
    random.Random(1).shuffle(rows)
    return rows


def runs_of(samples: Iterable[Sample]) -> list[str]:
    """The images in the order in which they come, each once for all that follow each other."""
    found: list[str] = []
    for sample in samples:
        name = (sample.image or b"").decode()
        if not found or found[-1] != name:
            found.append(name)
    return found


class TestGrouping:
    def test_each_image_is_fetched_once_and_its_rows_come_together(
        self, tmp_path: Path, web: Web
    ) -> None:
        rows = shuffled(60)
        samples = read_lines(tmp_path, *rows, image_root=web.url(""))
        assert len(web.asked) == 60
        assert set(web.asked.values()) == {1}
        for sample in samples:
            row = rows[sample.index]
            assert sample.image == row["image"].encode()
            assert sample.questions == (Question(row["question_id"], row["text"]),)
        for before, after in itertools.pairwise(samples):
            assert (before.image == after.image) == (before.image is after.image)
        in_order = list(dict.fromkeys(row["image"] for row in rows))
        assert runs_of(samples) == in_order
        indexes = [[s.index for s in samples if s.image == name.encode()] for name in in_order]
        assert all(each == sorted(each) for each in indexes)

    def test_an_image_with_more_rows_than_are_held_is_fetched_once(
        self, tmp_path: Path, web: Web
    ) -> None:
        rows = [
            {"image": name}
            for name in [["a.png"], "a.png", *["b.png"] * (3 * LINES_AT_ONCE), "c.png"]
        ]
        samples = read_lines(tmp_path, *rows, image_root=web.url(""))
        assert runs_of(samples) == ["a.png", "b.png", "c.png"]
        assert dict(web.asked) == {"a.png": 1, "b.png": 1, "c.png": 1}
        assert len({id(s.image) for s in samples}) == 3

    def test_rows_that_are_answered_are_not_given_nor_their_images_fetched(
        self, tmp_path: Path, web: Web
    ) -> None:
        rows = shuffled(10)
        (tmp_path / "m.jsonl").write_bytes(jsonl(rows))
        source = Manifest(spec_of(tmp_path / "m.jsonl", image_root=web.url("")))
        done = [n for n, row in enumerate(rows) if row["image"] < "5"]
        samples, total = read_all(source, source.list()[0], skip=Ranges.of_indexes(done))
        assert total == 50
        assert sorted([*done, *(s.index for s in samples)]) == list(range(50))
        assert all(name >= "5" for name in web.asked)

    def test_pieces_share_the_images_out(self, tmp_path: Path, web: Web) -> None:
        rows = [*shuffled(40), {"n": 1}, 7, {"image": 5}]
        path = tmp_path / "m.jsonl"
        path.write_bytes(jsonl(rows) + b"{broken")
        source = Manifest(spec_of(path, image_root=web.url("")))
        pieces = [read_all(source, Shard(str(path), "x", piece=(n, 3))) for n in range(3)]
        assert {total for _, total in pieces} == {204}
        assert sorted(s.index for samples, _ in pieces for s in samples) == list(range(204))
        assert all(len(samples) > 20 for samples, _ in pieces)
        assert len(web.asked) == 40
        assert set(web.asked.values()) == {1}

    def test_pieces_of_a_broken_file_tell_the_break_once(self, tmp_path: Path) -> None:
        path = tmp_path / "m.json"
        path.write_bytes(json.dumps(shuffled(20)).encode()[:-10])
        source = Manifest(spec_of(path))
        pieces = [read_all(source, Shard(str(path), "x", piece=(n, 4))) for n in range(4)]
        samples = [s for some, _ in pieces for s in some]
        assert sorted(s.index for s in samples) == list(range(100))
        assert sum(isinstance(s.error, ShardUnreadable) for s in samples) == 1
        assert {total for _, total in pieces} == {100}

    def test_who_only_counts_fetches_nothing(self, tmp_path: Path, web: Web) -> None:
        (tmp_path / "m.jsonl").write_bytes(jsonl(shuffled(5)))
        spec = spec_of(tmp_path, image_root=web.url(""))
        source = open_source(spec, fetcher=Unfetched(spec))
        assert isinstance(source, Manifest)
        assert len(read_all(source, source.list()[0])[0]) == 25
        assert not web.asked

    def test_a_store_of_images_that_is_gone_is_no_failed_row(self, tmp_path: Path) -> None:
        web = Web()
        web.shutdown()
        web.server_close()
        with pytest.raises(StoreUnavailable):
            read_lines(tmp_path, *shuffled(20), image_root=web.url(""), image_timeout_s=0.3)

    def test_rows_are_not_held_in_memory(self, tmp_path: Path) -> None:
        path = tmp_path / "m.jsonl"
        with path.open("wb") as file:
            for n in range(20_000):
                file.write(b'{"image": "%d.png", "x": "%s"}\n' % (n % 5000, b"x" * 1500))
        spec = spec_of(path)
        source = Manifest(spec, fetcher=Unfetched(spec))
        tracemalloc.start()
        assert sum(1 for _ in source.read(Shard(str(path), "x"), skip=Ranges())) == 20_000
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 10_000_000


class TestPutAside:
    @settings(max_examples=50, deadline=None)
    @given(st.lists(st.tuples(st.text(max_size=2), st.integers())))
    def test_keys_come_by_their_first_record_and_each_in_order(
        self, records: list[tuple[str, int]]
    ) -> None:
        with PutAside() as aside:
            for key, number in records:
                aside.add(key, (key, number))
            keys = list(dict.fromkeys(key for key, _ in records))
            assert list(aside.grouped()) == [each for k in keys for each in records if each[0] == k]
            first = dict(reversed(records))
            assert {key: aside.get(key)[1] for key in keys} == first
            assert aside.get("not there") is None

    def test_hashes_are_the_same_in_every_process(self) -> None:
        assert hash_of("a.png") == 6266261796961190882

    def test_keys_whose_hashes_meet_are_told_apart(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("pipeline.sources.grouping.hash_of", lambda key: len(key))
        with PutAside() as aside:
            for number, key in enumerate(["a", "bb", "c", "a"]):
                aside.add(key, (key, number))
            assert [n for _, n in aside.grouped()] == [0, 2, 3, 1]
            assert aside.get("c") == ("c", 2)
            assert aside.get("d") is None

    def test_a_disk_that_is_full_ends_the_job_with_the_remedy(self) -> None:
        with PutAside() as aside:
            aside._file.close()
            aside._file = Path("/dev/full").open("r+b", buffering=0)  # type: ignore[assignment] # noqa: SIM115
            with pytest.raises(JobError, match="TMPDIR"):
                aside.add("a", 1)


class TestStores:
    def test_memory_is_a_store_like_others(self) -> None:
        memory = fsspec.filesystem("memory")
        memory.pipe_file("/manifests/m.jsonl", jsonl([{"image": "i/a.png"}]))
        memory.pipe_file("/manifests/i/a.png", b"a")
        source = Manifest(spec_of("memory://manifests/m.jsonl"))
        [shard] = source.list()
        assert shard.uri == "memory:///manifests/m.jsonl"
        [sample], _ = read_all(source, shard)
        assert sample.image == b"a"

    def test_a_manifest_on_the_web_is_read(self, web: Web) -> None:
        web.files["in/m.jsonl"] = jsonl([{"image": "a.png"}])
        source = Manifest(spec_of(web.url("in/m.jsonl")))
        [sample], _ = read_all(source, source.list()[0])
        assert sample.image == b"in/a.png"

    @pytest.mark.parametrize("name", ["m.jsonl", "m.jsonl.gz", "m.json"])
    def test_s3_is_read_and_cut_into_pieces(
        self, s3_server: S3Server, name: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("pipeline.sources.manifest.PIECE_BYTES", 2000)
        storage = {"endpoint_url": s3_server.endpoint_url}
        folder = s3_server.url(f"manifest-{name}")
        spec = spec_of(f"{folder}/{name}", storage=storage, image_root=f"{folder}/images")
        fs, inner = filesystem(folder, spec.storage)
        rows = [{**row, "x": random.Random(0).randbytes(30).hex()} for row in shuffled(12)]
        data = json.dumps(rows).encode() if name == "m.json" else jsonl(rows)
        fs.pipe_file(f"{inner}/{name}", gzip.compress(data) if name.endswith("gz") else data)
        for row in rows:
            fs.pipe_file(f"{inner}/images/{row['image']}", row["image"].encode())
        source = Manifest(spec)
        shards = source.list()
        assert len(shards) > (0 if name.endswith("gz") else 1)
        samples = [s for shard in shards for s in read_all(source, shard)[0]]
        assert sorted(s.index for s in samples) == list(range(60))
        assert all(s.image == rows[s.index]["image"].encode() for s in samples)

    def test_a_store_that_is_gone_is_unavailable(self) -> None:
        source = Manifest(spec_of("http://127.0.0.1:1/m.jsonl"))
        with pytest.raises(StoreUnavailable, match="the store failed") as error:
            read_all(source, Shard("http://127.0.0.1:1/m.jsonl?key=secret", "x"))
        assert "secret" not in str(error.value)

    def test_a_manifest_that_a_server_does_not_have_is_gone(self, web: Web) -> None:
        samples, rows = read_all(Manifest(spec_of("x.jsonl")), Shard(web.url("status/404"), "x"))
        assert rows == 1
        assert "gone since it was listed" in str(samples[0].error)

    @pytest.mark.parametrize("status", [500, 503, 429])
    def test_a_server_that_fails_is_unavailable(self, web: Web, status: int) -> None:
        with pytest.raises(StoreUnavailable):
            read_all(Manifest(spec_of("x.jsonl")), Shard(web.url(f"status/{status}"), "x"))


NAMES = (
    *("image", "question_id", "image_id", "text", "question", "questions", "conversations"),
    *("from", "value", "id", "annotations", "data_subtype", "human", "x"),
)
KEYS = st.sampled_from(NAMES)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=4),
    max_leaves=6,
)
ROWS = st.dictionaries(KEYS, VALUES, max_size=5)


def assert_outcomes(folder: Path, data: bytes, name: str) -> None:
    (folder / name).write_bytes(data)
    options: dict[str, Any] = {"keep": ["x", "id", "__key__"]}
    for columns in ({}, {"conversation": "conversations", "id": "id"}):
        spec = spec_of(folder / name, columns=columns, **options)
        source = Manifest(spec, fetcher=Unfetched(spec))
        whole = read_all(source, Shard(str(folder / name), "x"))
        parts = [read_all(source, Shard(str(folder / name), "x", piece=(n, 2))) for n in range(2)]
        assert {total for _, total in parts} == {whole[1]}
        for samples in (whole[0], [s for some, _ in parts for s in some]):
            assert sorted(s.index for s in samples) == list(range(whole[1]))
            for sample in samples:
                assert sum(map(bool, (sample.image is not None, sample.image_error, sample.error)))
                pa.array([sample.sample_id, *sample.keep.values()], pa.string())
                for kept in filter(None, sample.keep.values()):
                    json.loads(str(kept), parse_constant=pytest.fail)


@pytest.mark.parametrize("form", ["{}", '{{"x": {}}}'])
def test_a_row_that_is_nested_too_deep_fails_alone(tmp_path: Path, form: str) -> None:
    """The limit is far from where Python's stack ends, so that nobody who asks meets that first."""
    for depth, is_read in ((99, True), (101, False), (600, False), (5000, False)):
        deep = form.format('{"x":' * depth + "1" + "}" * depth)
        (tmp_path / "m.jsonl").write_text(f'{deep}\n{{"image": "a.png"}}\n')
        [one, two] = read_file(tmp_path / "m.jsonl", keep=["x"])
        assert two.error is None
        assert is_read or "nested more than 100 levels deep" in str(one.error)
        assert (one.error is None) == is_read


class TestFuzz:
    @settings(max_examples=120, deadline=None)
    @given(rows=st.lists(ROWS | VALUES, max_size=4), layout=st.sampled_from(["l", "[", "q", "a"]))
    def test_any_json_has_outcomes(
        self, tmp_path_factory: pytest.TempPathFactory, rows: list[Any], layout: str
    ) -> None:
        asked = [{"question_id": 1, "image_id": 2}, *rows]
        documents = {"[": rows, "q": {"questions": asked}, "a": {"annotations": asked}}
        data = jsonl(rows) if layout == "l" else json.dumps(documents[layout]).encode()
        assert_outcomes(tmp_path_factory.mktemp("fuzz"), data, "questions-annotations.json")

    @settings(max_examples=120, deadline=None)
    @given(data=st.data())
    def test_any_bytes_have_outcomes(
        self, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
    ) -> None:
        rows = [{"image": "a.png", "x": {"y": [1, "é"]}}, {"image": "b.png", "text": "x"}] * 3
        kinds = [jsonl(rows), json.dumps(rows, indent=1).encode(), json.dumps(vqa(3)).encode()]
        raw = bytearray(data.draw(st.sampled_from([*kinds, *map(gzip.compress, kinds)])))
        for _ in range(data.draw(st.integers(1, 8))):
            raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
        cut = data.draw(st.integers(0, len(raw)) | st.just(len(raw)))
        assert_outcomes(tmp_path_factory.mktemp("fuzz"), bytes(raw[:cut]), "m.json")

    @settings(max_examples=100, deadline=None)
    @given(VALUES)
    def test_any_value_is_kept_as_json(self, value: Any) -> None:
        text = json_text(value)
        assert (text is None) == (value is None)
        if text is not None:
            text.encode()
            json.loads(text, parse_constant=pytest.fail)
