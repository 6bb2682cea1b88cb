"""What a hostile, careless or unlucky person does: no traceback, no lost row, no untrue verify."""

import tarfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from PIL import Image

from jobs.cli import main
from jobs.load import build_spec, override
from jobs.verify import verify
from pipeline.coverage import Ranges
from pipeline.encode import Encode
from pipeline.lease import hold
from pipeline.sources import open_source
from pipeline.storage import Output
from schemas.ask import AskPrompt
from schemas.errors import SpecError
from schemas.job import JobSpec, StorageSpec
from tests.lines import sample_table, unfolded
from tests.shards import saved, tar_bytes
from tests.whole_jobs import Finished, answers, job_of, run, scene

ASK = [{"id": "a", "prompt": "what shape is present?"}]


@pytest.mark.parametrize(
    "text",
    [
        "ask.².id=x",
        "name=" + "1" * 5000,
        "name=" + "[" * 3000,
        "name=!!int abc",
        "name=!!bool maybe",
        "name=!!timestamp abc",
    ],
)
def test_set_with_a_value_that_yaml_cannot_make_is_bad_usage(text: str) -> None:
    with pytest.raises(SpecError):
        override({"ask": [{"id": "a"}]}, [text])


@pytest.mark.parametrize("longest", [2**31, 99_999_999_999])
def test_token_limit_beyond_int32_is_a_bad_spec(longest: int) -> None:
    data = {
        "source": {"format": "images", "path": "x"},
        "ask": ASK,
        "output": {"path": "y"},
        "generate": {"max_new_tokens": longest},
    }
    with pytest.raises(SpecError, match="max_new_tokens"):
        build_spec(data, origin="test")


def test_run_of_a_strange_home_is_bad_usage() -> None:
    result = CliRunner().invoke(main, ["run", "~nosuchuser/job.yaml"])
    assert (result.exit_code, result.stdout) == (2, "")


def test_source_of_a_very_long_name_is_bad_usage() -> None:
    result = CliRunner().invoke(main, ["caption", "a" * 300, "-o", "out"])
    assert (result.exit_code, result.stdout) == (2, "")


def test_bucket_without_credentials_is_bad_usage(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    output = Output("s3://nobucket/x", StorageSpec(endpoint_url="http://127.0.0.1:9"))
    with (
        pytest.raises(SpecError, match="cannot be written"),
        hold(output, run_id="run-1", timeout_s=60, say=lambda _: None),
    ):
        pass


@pytest.mark.parametrize("text", ["", "{", "[]", "{}"])
def test_verify_of_a_broken_run_record_is_no_traceback(tmp_path: Path, text: str) -> None:
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "zzz.json").write_text(text)
    result = CliRunner().invoke(main, ["verify", str(tmp_path)])
    assert result.exit_code == 2
    assert "zzz.json" in result.stderr


def test_verify_of_a_file_is_bad_usage(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert CliRunner().invoke(main, ["verify", str(tmp_path / "file")]).exit_code == 2


def test_image_too_thin_to_resize_is_one_failed_row() -> None:
    job = JobSpec.model_validate(
        {"source": {"format": "images", "path": "x"}, "ask": ASK, "output": {"path": "y"}}
    )
    thin = saved(Image.new("1", (40_000_000, 1)), "PNG")
    place = {"source_uri": "u", "source_index": 0, "shard_identity": "i", "sample_id": "s"}
    sample = sample_table([{**place, "units": ["a"], "image": thin}])
    (prompt,) = unfolded(Encode(job, {})(sample))[0]["prompts"]
    assert (prompt["status"], prompt["error"]["stage"]) == ("failed", "decode")


def test_endless_chain_of_long_names_is_one_unreadable_row(tmp_path: Path) -> None:
    info = tarfile.TarInfo("././@LongLink")
    info.size, info.type = 5, tarfile.GNUTYPE_LONGNAME
    link = info.tobuf(tarfile.GNU_FORMAT) + b"abc\0\0".ljust(512, b"\0")
    (tmp_path / "a.tar").write_bytes(link * 2000 + tar_bytes([("0.png", scene(0)[2])]))
    source = open_source(job_of(tmp_path, tmp_path / "out").source)
    (row,) = source.read(source.list()[0], skip=Ranges())
    assert type(row.error).__name__ == "ShardUnreadable"


@pytest.mark.slow
def test_table_that_was_tampered_with_does_not_verify(finished: Finished, tmp_path: Path) -> None:
    job = finished.copy(tmp_path)
    part = min((tmp_path / "out" / "answers").iterdir())
    metadata, table = pq.read_metadata(part).metadata, pq.read_table(part)
    gone = pa.nulls(table.num_rows, pa.string())
    table = table.set_column(table.schema.get_field_index("answer"), "answer", gone)
    pq.write_table(table.replace_schema_metadata(metadata), part)
    assert not verify(job).ok


@pytest.mark.slow
def test_question_added_under_the_id_of_a_rows_own_is_refused(
    finished: Finished, tmp_path: Path
) -> None:
    added = AskPrompt(id="colour", prompt="what color is the shape?")
    job = finished.copy(tmp_path).model_copy(update={"ask": (*finished.job.ask, added)})
    with pytest.raises(SpecError, match="the id 'colour' is already used by rows' own"):
        run(job)
    assert answers(tmp_path / "out") == answers(finished.job.output.path)
