"""What is secret in a job reaches nothing that is written down or told."""

import gzip
import io
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from rich.console import Console

from jobs.cli import main
from jobs.records import recorded_spec
from jobs.run import run_job
from jobs.secrets import recorded, without_secrets
from jobs.verify import verify
from pipeline.commit import write_run_record
from pipeline.ledger import LEDGER
from pipeline.storage import Output
from schemas.errors import SpecError
from schemas.job import StorageSpec
from tests.s3 import SECRET_KEY, S3Server
from tests.scenes import s3_of
from tests.shards import json_bytes
from tests.web import Web
from tests.whole_jobs import job_of, ray_of, scene

SIGNATURE = "c0ffee5ec2e7"
IMAGES = 20
SIGNED = f"X-Amz-Signature={SIGNATURE}&X-Amz-Credential=someone"


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (f"a https://h/x.tar?{SIGNED}: not found", "a https://h/x.tar not found"),
        (f"'https://me:pw@h:8/x?{SIGNED}' is", "'https://h:8/x' is"),
        ("s3://key:pw@bucket/a?b.tar", "s3://bucket/a?b.tar"),
        ("/a?b.tar and a@b.c: C:\\x", "/a?b.tar and a@b.c: C:\\x"),
    ],
)
def test_a_text_is_told_without_the_secrets_of_its_urls(text: str, told: str) -> None:
    assert without_secrets(text) == told


def test_a_spec_is_written_down_without_secrets_and_says_which_keys_lack_them() -> None:
    source = {"format": "webdataset", "path": [f"https://h/x.tar?{SIGNED}", "/y.tar"]}
    ask = [{"id": "a", "prompt": "What is on https://h/?page=1"}]
    job = job_of("", "/out", source=source, ask=ask)
    spec, withheld = recorded(job)
    assert spec["source"]["path"] == ["https://h/x.tar", "/y.tar"]
    assert spec["ask"] == [{**ask[0]}]
    assert withheld == ["source.path"]
    assert recorded(job_of("/in", "/out"))[1] == []


def test_a_record_that_lacks_secrets_asks_for_the_spec(tmp_path: Path) -> None:
    source = {"format": "webdataset", "path": f"https://h/x.tar?{SIGNED}"}
    spec, withheld = recorded(job_of("", tmp_path, source=source))
    record = {"run_id": "a", "spec": spec, "withheld": withheld}
    write_run_record(Output(str(tmp_path), StorageSpec()), "a", record)
    with pytest.raises(SpecError, match=r"what is secret in source.path is not written .*--spec"):
        recorded_spec(str(tmp_path))


def test_an_error_is_told_without_secrets() -> None:
    url = f"http://127.0.0.1:1/x.tar?{SIGNED}"
    done = CliRunner().invoke(main, ["caption", url, "-o", "out"])
    assert done.exit_code == 2
    assert "http://127.0.0.1:1/x.tar" in done.output
    assert SIGNATURE not in done.output


@contextmanager
def copied(server: S3Server, place: str) -> Iterator[dict[str, bytes]]:
    """Whatever lies below a place while the block runs, and after it."""
    fs, found, is_over = s3_of(server), {}, threading.Event()

    def look() -> None:
        for name in fs.find(place):
            try:
                found[name] = fs.cat_file(name)
            except FileNotFoundError:
                continue

    def watch() -> None:
        while not is_over.wait(0.1):
            look()

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield found
    finally:
        is_over.set()
        watcher.join()
        look()


def text_of(name: str, data: bytes) -> str:
    """All that a file says, its compressed parts too."""
    if name.endswith(".parquet"):
        table = pq.read_table(pa.BufferReader(data))
        return f"{table.to_pylist()} {table.schema.metadata} {data!r}"
    return repr(gzip.decompress(data) if name.endswith(LEDGER) else data)


@pytest.mark.slow
def test_nothing_that_a_run_writes_or_says_holds_a_secret(s3_server: S3Server, web: Web) -> None:
    import ray

    own = [{"id": "own", "question": "what color is the shape?"}]
    rows = [
        {"image": web.url(f"{name}?{SIGNED}"), "questions": own}
        for name in ("gone.png", *(f"{n}.png" for n in range(IMAGES)))
    ]
    web.files = {f"{n}.png?{SIGNED}": scene(n)[2] for n in range(IMAGES)}
    web.files[f"in.jsonl?{SIGNED}"] = b"\n".join(map(json_bytes, rows))
    storage = {"endpoint_url": s3_server.endpoint_url}
    place = s3_server.url("secrets/out")
    job = job_of(
        "",
        "",
        source={"format": "manifest", "path": web.url(f"in.jsonl?{SIGNED}")},
        output={"path": place, "storage": storage, "commit_interval_s": 0},
        # Many staged parts, which are there for a while before they are folded.
        resources={"generate": {"batch_size": 1}},
        max_failed_fraction=1.0,
    )
    said = io.StringIO()
    with copied(s3_server, place) as written, ray_of(num_cpus=2):
        record = run_job(job, address=None, console=Console(file=said, width=200)).record
        logs = Path(ray._private.worker._global_node.get_session_dir_path(), "logs")
        told = [path.read_text(errors="replace") for path in logs.rglob("*") if path.is_file()]
    assert record["counts"] == {"ok": 2 * IMAGES, "failed": 2, "skipped": 0}
    folders = {name.removeprefix(place.removeprefix("s3://")).split("/")[1] for name in written}
    assert folders >= {"answers", "staging", "runs", "lease", LEDGER}
    everything = [said.getvalue(), json.dumps(record), *told]
    everything += [text_of(name, data) for name, data in written.items()]
    assert "in.jsonl" in " ".join(everything)
    assert "gone.png" in said.getvalue() or "gone.png" in json.dumps(record)
    for secret in (SIGNATURE, SECRET_KEY):
        assert not [text[:300] for text in everything if secret in text]
    assert verify(job).ok
