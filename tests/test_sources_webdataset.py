"""The webdataset source: what comes out of tars as people write them, and as disks break them."""

import gzip
import io
import random
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import fsspec
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.coverage import Ranges
from pipeline.sources import open_source
from pipeline.sources.archive import Archive
from pipeline.sources.base import Question, Reading, Sample, Shard, Turn
from pipeline.sources.webdataset import WebDataset
from schemas.errors import (
    ConversationMalformed,
    ImageMissing,
    ImageTooLarge,
    QuestionsMalformed,
    ShardUnreadable,
    SpecError,
)
from schemas.job import SourceSpec
from tests.shards import image_bytes, json_bytes, sample_members, tar_bytes, write_shard

PNG = image_bytes()
HEADER = 512
DEEP = b'{"url": ' + b"[" * 100 + b"]" * 100 + b"}"


def zstd(data: bytes) -> bytes:
    return bytes(pa.compress(data, codec="zstd", asbytes=True))


def spec_of(path: Path | str, **options: Any) -> SourceSpec:
    return SourceSpec.model_validate({"format": "webdataset", "path": str(path), **options})


def read_all(
    source: WebDataset, shard: Shard, *, skip: Ranges | None = None
) -> tuple[list[Sample], int]:
    samples = []
    reading = source.read(shard, skip=skip or Ranges())
    while True:
        try:
            samples.append(next(reading))
        except StopIteration as end:
            return samples, end.value


def read_members(
    tmp_path: Path, members: Sequence[tuple[str, bytes]], **options: Any
) -> list[Sample]:
    source = WebDataset(spec_of(write_shard(tmp_path / "a.tar", members), **options))
    samples, rows = read_all(source, source.list()[0])
    assert rows == len(samples)
    return samples


def read_raw(tmp_path: Path, data: bytes) -> tuple[list[Sample], int]:
    (tmp_path / "raw.tar").write_bytes(data)
    return read_all(WebDataset(spec_of(tmp_path)), Shard(str(tmp_path / "raw.tar"), "x"))


def read_columns(tmp_path: Path, row: Any, /, **options: Any) -> Sample:
    members = [("a.png", PNG), ("a.json", json_bytes(row))]
    [sample] = read_members(tmp_path, members, **options)
    return sample


def noisy_members(n: int) -> list[tuple[str, bytes]]:
    """Samples of 50 kB that no compression makes smaller."""
    chance = random.Random(0)
    return [(f"{number}.png", chance.randbytes(50_000)) for number in range(n)]


def assert_breaks_at(samples: list[Sample], rows: int, index: int) -> str:
    assert [s.index for s in samples] == list(range(index + 1))
    assert rows == index + 1
    assert all(s.error is None and s.image for s in samples[:-1])
    assert isinstance(samples[-1].error, ShardUnreadable)
    assert samples[-1].image is None
    return str(samples[-1].error)


def with_claimed_size(tar: bytes, name: str, size: int) -> bytes:
    """The tar with another size in the header of a member."""
    start = tar.index(name.encode())
    info = tarfile.TarInfo(name)
    info.size = size
    return tar[:start] + info.tobuf(tarfile.GNU_FORMAT) + tar[start + HEADER :]


class TestListing:
    def test_a_folder_gives_its_tars_sorted_and_nothing_else(self, tmp_path: Path) -> None:
        for name in ("b.tar", "a.tar.gz", "sub/c.tgz", "d.tar.zst", "notes.txt"):
            write_shard(tmp_path / name, [])
        shards = WebDataset(spec_of(tmp_path)).list()
        assert [Path(s.uri).name for s in shards] == ["a.tar.gz", "b.tar", "d.tar.zst", "c.tgz"]
        assert all(s.rows is None and s.identity for s in shards)

    def test_a_missing_path_is_a_spec_error(self, tmp_path: Path) -> None:
        with pytest.raises(SpecError, match="does not exist"):
            WebDataset(spec_of(tmp_path / "no.tar")).list()

    def test_open_source_takes_the_class_by_format(self, tmp_path: Path) -> None:
        assert isinstance(open_source(spec_of(tmp_path)), WebDataset)


class TestGrouping:
    def test_members_of_one_key_are_one_sample(self, tmp_path: Path) -> None:
        samples = read_members(tmp_path, sample_members(3, columns={}))
        assert [(s.index, s.sample_id) for s in samples] == [(0, "000"), (1, "001"), (2, "002")]
        assert samples[2].image == image_bytes(color=(2, 0, 0))

    def test_the_key_ends_at_the_first_dot_of_the_base_name(self, tmp_path: Path) -> None:
        members = [("d.v1/a.png", PNG), ("d.v1/a.seg.png", b"no"), ("d.v1/a.json", b"{}")]
        [sample] = read_members(tmp_path, members)
        assert (sample.sample_id, sample.image) == ("d.v1/a", PNG)

    def test_a_key_that_comes_back_is_a_new_sample(self, tmp_path: Path) -> None:
        samples = read_members(tmp_path, [("a.png", PNG), ("b.png", PNG), ("a.json", b"{}")])
        assert [s.sample_id for s in samples] == ["a", "b", "a"]
        assert isinstance(samples[2].error, ImageMissing)

    def test_a_suffix_that_comes_twice_begins_a_new_sample(self, tmp_path: Path) -> None:
        samples = read_members(tmp_path, [("a.png", PNG), ("a.json", b"{}"), ("a.png", b"2")])
        assert [s.image for s in samples] == [PNG, b"2"]

    def test_hidden_and_bare_names_are_passed_over(self, tmp_path: Path) -> None:
        members = [("d/._a.png", b""), ("README", b"x"), ("a.png", PNG), ("d/.x.y", b"")]
        members += [("a.json", json_bytes({"questions": ["why?"]}))]
        [sample] = read_members(tmp_path, members)
        assert sample.questions == (Question("q0", "why?"),)

    def test_folders_are_passed_over(self, tmp_path: Path) -> None:
        with tarfile.open(tmp_path / "a.tar", "w") as tar:
            folder = tarfile.TarInfo("v1.0")
            folder.type = tarfile.DIRTYPE
            tar.addfile(folder)
        samples, rows = read_all(WebDataset(spec_of(tmp_path)), Shard(str(tmp_path / "a.tar"), "x"))
        assert (samples, rows) == ([], 0)

    @pytest.mark.parametrize("mode", ["w:gz", "w:bz2", "w:xz"])
    def test_compressed_tars_are_read(self, tmp_path: Path, mode: str) -> None:
        samples, rows = read_raw(tmp_path, tar_bytes(sample_members(4), mode=mode))
        assert rows == len([s for s in samples if s.image]) == 4

    def test_zstd_in_several_frames_is_read_to_its_end(self, tmp_path: Path) -> None:
        data = tar_bytes(sample_members(4))
        samples, rows = read_raw(tmp_path, zstd(data[:700]) + zstd(data[700:]))
        assert rows == len([s for s in samples if s.image]) == 4

    def test_gzip_in_several_members_is_read_to_its_end(self, tmp_path: Path) -> None:
        data = tar_bytes(sample_members(4))
        samples, _ = read_raw(tmp_path, gzip.compress(data[:700]) + gzip.compress(data[700:]))
        assert [s.error for s in samples] == [None] * 4

    def test_long_and_odd_names_become_text(self, tmp_path: Path) -> None:
        long = "é" * 200
        samples = read_members(tmp_path, [(f"{long}.png", PNG), ("b\udcff.png", PNG)])
        assert [s.sample_id for s in samples] == [long, "b\ufffd"]

    def test_a_store_without_files_of_its_own_is_read_alike(self) -> None:
        memory = fsspec.filesystem("memory")
        memory.pipe_file("/shards/a.tar", tar_bytes(sample_members(2)))
        source = WebDataset(spec_of("memory://shards/*.tar"))
        [shard] = source.list()
        assert shard.uri == "memory:///shards/a.tar"
        assert read_all(source, shard)[1] == 2


class TestSkipping:
    def test_skipped_samples_keep_their_numbers(self, tmp_path: Path) -> None:
        write_shard(tmp_path / "a.tar", sample_members(6))
        source = WebDataset(spec_of(tmp_path))
        skip = Ranges.of([(0, 2), (4, 5)])
        samples, rows = read_all(source, source.list()[0], skip=skip)
        assert [(s.index, s.sample_id) for s in samples] == [(2, "002"), (3, "003"), (5, "005")]
        assert rows == 6

    def test_an_unreadable_sample_that_is_answered_does_not_come_again(
        self, tmp_path: Path
    ) -> None:
        (tmp_path / "a.tar").write_bytes(tar_bytes(sample_members(3))[: 4 * HEADER + 10])
        source = WebDataset(spec_of(tmp_path))
        samples, rows = read_all(source, source.list()[0], skip=Ranges.of([(0, 2)]))
        assert (samples, rows) == ([], 2)


class TestImages:
    def test_the_first_member_with_a_known_suffix_is_the_image(self, tmp_path: Path) -> None:
        members = [("a.txt", b"t"), ("a.JPG", b"first"), ("a.png", b"second")]
        assert read_members(tmp_path, members)[0].image == b"first"

    @pytest.mark.parametrize("wanted", ["seg.png", ".SEG.png"])
    def test_columns_image_chooses_the_member(self, tmp_path: Path, wanted: str) -> None:
        members = [("a.png", b"first"), ("a.seg.png", b"second")]
        [sample] = read_members(tmp_path, members, columns={"image": wanted})
        assert sample.image == b"second"

    def test_no_image_names_the_sample_and_what_is_there(self, tmp_path: Path) -> None:
        members = [("a.json", json_bytes({"questions": ["why?"]})), ("a.npy", b"x")]
        [sample] = read_members(tmp_path, members)
        assert isinstance(sample.error, ImageMissing)
        message = str(sample.error)
        assert "a.tar" in message
        assert "only .json, .npy" in message
        assert "source.columns.image" in message

    def test_an_empty_image_is_left_to_decoding(self, tmp_path: Path) -> None:
        [sample] = read_members(tmp_path, [("a.png", b"")])
        assert (sample.image, sample.error) == (b"", None)

    @pytest.mark.parametrize("kind", [tarfile.LNKTYPE, tarfile.SYMTYPE])
    def test_a_link_is_a_row_that_says_so(self, tmp_path: Path, kind: bytes) -> None:
        with tarfile.open(tmp_path / "a.tar", "w") as tar:
            link = tarfile.TarInfo("a.png")
            link.type, link.linkname = kind, "other.png"
            tar.addfile(link)
        samples, rows = read_all(WebDataset(spec_of(tmp_path)), Shard(str(tmp_path / "a.tar"), "x"))
        assert rows == 1
        assert isinstance(samples[0].error, ImageMissing)
        assert "a link to 'other.png'" in str(samples[0].error)

    def test_an_image_that_is_too_large_is_not_read(self, tmp_path: Path) -> None:
        members = [("a.png", bytes(101)), ("a.json", json_bytes({"questions": ["x?"]}))]
        [large, small] = read_members(tmp_path, [*members, ("b.png", PNG)], max_image_bytes=100)
        assert large.image is None
        assert isinstance(large.image_error, ImageTooLarge)
        assert "sample 'a': member .png has 101 bytes, more than the 100" in str(large.image_error)
        assert large.questions == (Question("q0", "x?"),)
        assert (small.image, small.image_error) == (PNG, None)

    def test_a_sparse_image_is_a_row_that_says_so(self, tmp_path: Path) -> None:
        info = tarfile.TarInfo("a.png")
        info.size, info.pax_headers = 100, {"GNU.sparse.map": "0,100", "GNU.sparse.size": "9" * 18}
        file = io.BytesIO()
        with tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as tar:
            tar.addfile(info, io.BytesIO(bytes(100)))
        [sample], _ = read_raw(tmp_path, file.getvalue())
        assert "member .png is stored as a sparse file; write" in str(sample.error)


class TestSeveral:
    """Samples of several images."""

    LEFT, RIGHT = image_bytes(color=(1, 0, 0)), image_bytes(color=(2, 0, 0))
    PAIR: ClassVar = {"image": ["left.png", ".Right.PNG"]}

    def test_members_in_the_order_of_the_spec_not_of_the_tar(self, tmp_path: Path) -> None:
        members = [("a.right.png", self.RIGHT), ("a.left.png", self.LEFT), ("a.png", PNG)]
        [sample] = read_members(tmp_path, members, columns=self.PAIR)
        assert (sample.image, [*sample.more_images]) == (self.LEFT, [self.RIGHT])

    def test_one_suffix_in_a_list_is_one_suffix(self, tmp_path: Path) -> None:
        members = [("a.left.png", self.LEFT), ("a.png", PNG)]
        [sample] = read_members(tmp_path, members, columns={"image": ["left.png"]})
        assert (sample.image, [*sample.more_images]) == (self.LEFT, [])

    @pytest.mark.parametrize(("there", "number"), [("left", 2), ("right", 1)])
    def test_a_missing_member_is_a_failed_row_that_names_it(
        self, tmp_path: Path, there: str, number: int
    ) -> None:
        both = [("b.left.png", self.LEFT), ("b.right.png", self.RIGHT)]
        members = [(f"a.{there}.png", PNG), *both]
        broken, fine = read_members(tmp_path, members, columns=self.PAIR)
        missing = {"left": "right", "right": "left"}[there]
        assert isinstance(broken.error, ImageMissing)
        assert str(broken.error).startswith(f"image {number} of 2: ")
        assert f"sample 'a' has no image member (.{missing}.png)" in str(broken.error)
        assert broken.n_bytes == 0
        assert (fine.error, fine.image, [*fine.more_images]) == (None, self.LEFT, [self.RIGHT])

    def test_a_member_that_is_too_large_is_named(self, tmp_path: Path) -> None:
        members = [("a.left.png", PNG), ("a.right.png", bytes(1000))]
        [sample] = read_members(tmp_path, members, columns=self.PAIR, max_image_bytes=999)
        assert isinstance(sample.image_error, ImageTooLarge)
        assert str(sample.image_error).startswith("image 2 of 2: ")
        assert "member .right.png has 1000 bytes" in str(sample.image_error)

    @pytest.mark.parametrize("names", [[], [""], ["jpg", "jpg"], ["jpg", ""]])
    def test_each_image_is_named_once(self, names: list[str]) -> None:
        with pytest.raises(ValueError, match=r"name (each|the) image"):
            spec_of("x", columns={"image": names})


class TestColumns:
    def test_the_id_is_a_column_or_the_key(self, tmp_path: Path) -> None:
        rows = [{"uid": "x"}, {"uid": 7}, {"uid": None}, {}]
        members = []
        for number, row in enumerate(rows):
            members += [(f"{number}.png", PNG), (f"{number}.json", json_bytes(row))]
        samples = read_members(tmp_path, members, columns={"id": "uid"})
        assert [s.sample_id for s in samples] == ["x", "7", "2", "3"]

    def test_kept_columns_are_json_text(self, tmp_path: Path) -> None:
        names = ["url", "n", "tags", "none", "nan", "huge", "missing", "txt", "cls", "__key__"]
        members = [
            ("a.png", PNG),
            ("a.json", b'{"url": "\xc3\xa9", "n": 1.5, "tags": ["\\ud800"], "none": null, '
             b'"nan": NaN, "huge": {"x": [1e999]}}'),
            ("a.txt", b"a cat"),
            ("a.cls", b"3"),
        ]  # fmt: skip
        source = WebDataset(spec_of(write_shard(tmp_path / "a.tar", members), keep=names))
        assert source.keep_types() == dict.fromkeys(names, pa.string())
        [sample] = read_all(source, source.list()[0])[0]
        assert sample.keep == {
            "url": '"é"',
            "n": "1.5",
            "tags": '["\ufffd"]',
            "none": None,
            "nan": None,
            "huge": '{"x": [null]}',
            "missing": None,
            "txt": '"a cat"',
            "cls": '"3"',
            "__key__": '"a"',
        }

    @pytest.mark.parametrize("data", [b"{", b"[1]", b"\xff\xfe\xfd", b"[" * 100_000, b"", DEEP])
    def test_a_broken_json_member_leaves_the_image(self, tmp_path: Path, data: bytes) -> None:
        options = {"keep": ["url"], "columns": {"conversation": "talk", "id": "uid"}}
        [sample] = read_members(tmp_path, [("a.png", PNG), ("a.json", data)], **options)
        assert (sample.image, sample.error, sample.sample_id) == (PNG, None, "a")
        assert sample.keep == {"url": None}
        assert isinstance(sample.questions, QuestionsMalformed)
        assert isinstance(sample.conversation, ConversationMalformed)
        assert "member .json" in str(sample.questions)

    def test_only_members_that_are_asked_for_are_read(self, tmp_path: Path) -> None:
        members = [("a.npy", b"x" * 10_000), ("a.png", PNG), ("a.txt", b"t")]
        source = WebDataset(spec_of(write_shard(tmp_path / "a.tar", members)))
        assert source.suffixes == {"json"}
        assert read_all(source, source.list()[0])[0][0].image == PNG


class TestQuestions:
    @pytest.mark.parametrize(
        ("value", "expected"),
        [
            ([{"id": "a", "question": "x?"}], [("a", "x?")]),
            ([{"question": "x?"}, {"id": 7, "question": "y?"}], [("q0", "x?"), ("7", "y?")]),
            (["x?", "y?"], [("q0", "x?"), ("q1", "y?")]),
            ([], []),
        ],
    )
    def test_questions_are_lists_of_objects_or_texts(
        self, tmp_path: Path, value: Any, expected: list[tuple[str, str]]
    ) -> None:
        sample = read_columns(tmp_path, {"questions": value})
        assert sample.questions == tuple(Question(*pair) for pair in expected)

    @pytest.mark.parametrize("columns", [{}, {"questions": None}])
    def test_no_questions_are_none(self, tmp_path: Path, columns: Any) -> None:
        assert read_columns(tmp_path, columns).questions is None

    @pytest.mark.parametrize(
        ("value", "reason"),
        [
            ("x?", "it is text"),
            ({"a": "x?"}, "it is an object"),
            ([1], "item 0 is a number"),
            ([{"id": "a"}], "item 0 has no `question`"),
            (["x?", " "], "`question` of item 1 is empty text"),
            ([{"question": None}], "`question` of item 0 is null"),
            ([{"id": True, "question": "x?"}], "`id` of item 0 is a boolean"),
            ([{"id": "", "question": "x?"}], "`id` of item 0 is empty text"),
            ([{"id": "q1", "question": "x?"}, "y?"], "the id 'q1' is given twice"),
        ],
    )
    def test_malformed_questions_say_why(self, tmp_path: Path, value: Any, reason: str) -> None:
        sample = read_columns(tmp_path, {"ask": value}, columns={"questions": "ask"})
        assert isinstance(sample.questions, QuestionsMalformed)
        assert f"sample 'a': column 'ask': {reason}" in str(sample.questions)
        assert sample.error is None


USER = {"role": "user", "content": "hi"}
ASSISTANT = {"role": "assistant", "content": "hello"}
SYSTEM = {"role": "system", "content": "be brief"}


class TestConversation:
    @pytest.mark.parametrize("value", [[SYSTEM, USER, ASSISTANT], [USER, ASSISTANT] * 2, []])
    def test_turns_alternate_and_end_with_the_assistant(self, tmp_path: Path, value: Any) -> None:
        sample = read_columns(tmp_path, {"talk": value}, columns={"conversation": "talk"})
        assert sample.conversation == tuple(Turn(t["role"], t["content"]) for t in value)

    def test_a_row_without_one_has_none(self, tmp_path: Path) -> None:
        sample = read_columns(tmp_path, {}, columns={"conversation": "talk"})
        assert sample.conversation is None

    @pytest.mark.parametrize(
        ("value", "reason"),
        [
            ("hi", "it is text"),
            ([USER], "the last turn is of the user"),
            ([SYSTEM], "the last turn is of the system"),
            ([ASSISTANT], "item 0 is of the assistant where the user is due"),
            ([SYSTEM, ASSISTANT], "item 1 is of the assistant where the user is due"),
            ([USER, USER], "item 1 is of the user where the assistant is due"),
            ([USER, ASSISTANT, SYSTEM], "item 2 is of the system where the user is due"),
            (["hi"], "item 0 is text"),
            ([{"from": "human", "value": "hi"}], "`role` of item 0 is None"),
            ([{"role": ["user"], "content": "x"}], "`role` of item 0 is ['user']"),
            ([{"role": "user", "content": [1]}], "`content` of item 0 is a list"),
        ],
    )
    def test_a_malformed_conversation_says_why(
        self, tmp_path: Path, value: Any, reason: str
    ) -> None:
        sample = read_columns(tmp_path, {"talk": value}, columns={"conversation": "talk"})
        assert isinstance(sample.conversation, ConversationMalformed)
        assert f"column 'talk': {reason}" in str(sample.conversation)
        assert sample.image == PNG


class TestBrokenArchives:
    def test_an_empty_tar_has_no_samples(self, tmp_path: Path) -> None:
        assert read_raw(tmp_path, tar_bytes([])) == ([], 0)

    @pytest.mark.parametrize(
        "data",
        [b"", b"no tar", b"<html>" * 500, b"\x1f\x8b", b"\x1f\x8b" + b"x" * 600],
    )
    def test_what_is_no_tar_is_unreadable_from_its_first_row(
        self, tmp_path: Path, data: bytes
    ) -> None:
        samples, rows = read_raw(tmp_path, data)
        message = assert_breaks_at(samples, rows, 0)
        assert "raw.tar" in message
        assert "write the shard again" in message

    def test_a_file_that_is_gone_is_unreadable_from_its_first_row(self, tmp_path: Path) -> None:
        shard = Shard(str(tmp_path / "gone.tar"), "x")
        samples, rows = read_all(WebDataset(spec_of(tmp_path)), shard)
        assert "gone since it was listed" in assert_breaks_at(samples, rows, 0)

    def test_a_path_that_cannot_be_opened_is_unreadable(self, tmp_path: Path) -> None:
        samples, rows = read_all(WebDataset(spec_of(tmp_path)), Shard(str(tmp_path), "x"))
        assert_breaks_at(samples, rows, 0)

    @pytest.mark.parametrize(
        "cut",
        [2 * HEADER * 2 + HEADER + 30, 2 * HEADER * 2 + 100, 2 * HEADER * 2],
        ids=["in a member", "in a header", "between members"],
    )
    def test_a_cut_tar_gives_the_samples_before_the_last_one_there(
        self, tmp_path: Path, cut: int
    ) -> None:
        samples, rows = read_raw(tmp_path, tar_bytes(sample_members(5))[:cut])
        # A tar cut between two members: its last sample may lack members, so it is not trusted.
        message = assert_breaks_at(samples, rows, 1 if cut == 4 * HEADER else rows - 1)
        assert f"byte {2 * HEADER if rows == 2 else 4 * HEADER}" in message

    def test_a_broken_header_is_not_the_end_of_the_shard(self, tmp_path: Path) -> None:
        data = bytearray(tar_bytes(sample_members(5)))
        data[6 * HEADER + 20] ^= 0xFF
        samples, rows = read_raw(tmp_path, bytes(data))
        assert "no tar header is here" in assert_breaks_at(samples, rows, 2)

    def test_a_hole_of_zeros_is_not_the_end_of_the_shard(self, tmp_path: Path) -> None:
        data = bytearray(tar_bytes(sample_members(5)))
        data[4 * HEADER : 6 * HEADER] = bytes(2 * HEADER)
        samples, rows = read_raw(tmp_path, bytes(data))
        assert "follows the end-of-archive mark" in assert_breaks_at(samples, rows, 1)

    def test_a_cut_gzip_gives_the_samples_before(self, tmp_path: Path) -> None:
        data = tar_bytes(noisy_members(9), mode="w:gz")
        samples, rows = read_raw(tmp_path, data[: len(data) * 2 // 3])
        assert_breaks_at(samples, rows, 5)

    @pytest.mark.parametrize(("kept", "more"), [(2 / 3, b""), (1, b"rubbish")])
    def test_a_broken_zstd_gives_the_samples_before(
        self, tmp_path: Path, kept: float, more: bytes
    ) -> None:
        noise = random.Random(0)
        tar = tar_bytes([(f"{n}.png", noise.randbytes(40_000)) for n in range(9)])
        frames = [zstd(tar[start : start + 10_000]) for start in range(0, len(tar), 10_000)]
        data = b"".join(frames)
        samples, rows = read_raw(tmp_path, data[: int(len(data) * kept)] + more)
        assert_breaks_at(samples, rows, 5 if kept < 1 else 8)

    def test_a_wrong_gzip_checksum_is_found(self, tmp_path: Path) -> None:
        data = bytearray(tar_bytes(noisy_members(5), mode="w:gz"))
        data[-8] ^= 0xFF
        samples, rows = read_raw(tmp_path, bytes(data))
        assert "CRC" in assert_breaks_at(samples, rows, 4)

    @pytest.mark.timeout(20)
    @pytest.mark.parametrize("size", [2**40, 2**62])
    def test_a_header_that_claims_more_than_there_is_breaks_the_shard_at_once(
        self, tmp_path: Path, size: int
    ) -> None:
        members = [*sample_members(2), ("001.bin", b"not asked for")]
        for name in ("000.png", "001.png", "001.bin"):
            data = with_claimed_size(tar_bytes(members), name, size)
            samples, rows = read_raw(tmp_path, data)
            assert "bytes are missing" in assert_breaks_at(samples, rows, int(name[:3]))

    def test_a_name_of_gigabytes_is_not_taken_into_memory(self, tmp_path: Path) -> None:
        info = tarfile.TarInfo("././@LongLink")
        info.type, info.size = tarfile.GNUTYPE_LONGNAME, 2**30
        data = info.tobuf(tarfile.GNU_FORMAT) + bytes(2**20)
        samples, rows = read_raw(tmp_path, tar_bytes(sample_members(1))[: 2 * HEADER] + data)
        assert "claims to go on for" in assert_breaks_at(samples, rows, 0)

    @settings(max_examples=150, deadline=None)
    @given(data=st.data())
    def test_no_byte_can_make_reading_raise_or_repeat_an_index(
        self, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
    ) -> None:
        pack = data.draw(st.sampled_from([bytes, gzip.compress, zstd]))
        long = [("d/" + "x" * 150 + ".png", PNG)]
        raw = bytearray(pack(tar_bytes(sample_members(3, columns={}) + long)))
        for _ in range(data.draw(st.integers(1, 8))):
            raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
        cut = data.draw(st.integers(0, len(raw)) | st.just(len(raw)))
        folder = tmp_path_factory.mktemp("fuzz", numbered=True)
        samples, rows = read_raw(folder, bytes(raw[:cut]))
        assert [s.index for s in samples] == list(range(rows))


def test_memory_does_not_grow_with_the_number_of_members(tmp_path: Path) -> None:
    with tarfile.open(fileobj=io.BytesIO(tar_bytes(sample_members(50))), mode="r|*") as tar:
        archive = Archive(tar)
        for _ in archive.members():
            assert len(tar.members) <= 1  # type: ignore[attr-defined]


def test_what_lies_beyond_the_last_wanted_row_is_not_read(tmp_path: Path) -> None:
    write_shard(tmp_path / "a.tar", sample_members(3))
    source = open_source(spec_of(tmp_path / "a.tar"))
    [shard] = source.list()
    for most, rows_total in ((0, None), (2, None), (3, 3), (4, 3)):
        reading = Reading(source.read(shard, skip=Ranges.starting(most)))
        assert [sample.index for sample in reading] == list(range(min(most, 3)))
        assert reading.rows_total == rows_total
