"""Whole jobs in this process, on Rays of several sizes: shards in, answers out, resumed."""

import contextlib
import io
import json
import os
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from rich.console import Console

from jobs.run import Force, Fork, Retry, run_job
from jobs.verify import verify
from pipeline.coverage import ShardCoverage
from pipeline.encode import Encode
from pipeline.generate import Generate
from pipeline.read import ShardWork
from pipeline.sources import open_source
from schemas.ask import AskPrompt
from schemas.errors import JobError, SpecError
from schemas.job import JobSpec
from tests.lines import tables_read
from tests.s3 import S3Server
from tests.shards import json_bytes, saved, write_shard
from tests.watch import wait_until
from tests.whole_jobs import Finished, answers, job_of, ray_of, run, scene, write_shapes

pytestmark = pytest.mark.slow


@pytest.fixture(scope="class")
def ray_session(s3_server: S3Server) -> Iterator[None]:
    """Started after the S3 server: Ray's workers inherit its credentials with the environment."""
    with ray_of(num_cpus=2):
        yield


@pytest.fixture(scope="class")
def talk_about_noise(
    ray_session: None, tmp_path_factory: pytest.TempPathFactory
) -> tuple[JobSpec, str]:
    """A job that goes on with a conversation about an image of noise, and what its run said."""
    folder = tmp_path_factory.mktemp("talk")
    noise = Image.effect_noise((64, 64), 90).convert("RGB")
    earlier = [
        {"role": "user", "content": "<image>\nwhat color is the shape?"},
        {"role": "assistant", "content": "red"},
    ]
    members = [("0.png", saved(noise, "PNG")), ("0.json", json_bytes({"talk": earlier}))]
    write_shard(folder / "in/0.tar", members)
    source = {
        "format": "webdataset",
        "path": str(folder / "in"),
        "columns": {"conversation": "talk"},
    }
    job = job_of(
        folder / "in",
        folder / "out",
        source=source,
        ask=[{"id": "shape", "prompt": "what shape is present?"}],
        model={"system_prompt": "Answer in a word."},
        output={"path": str(folder / "out"), "prompts": True},
    )
    _, said = run(job)
    return job, said


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of a megabyte."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("may not mount a file system")
    yield disk
    subprocess.run(["umount", "--lazy", str(disk)], check=True)


def job_on(disk: Path, *, retry_s: float) -> JobSpec:
    write_shapes(disk / "in", shards=1, images=5)
    return job_of(disk / "in", disk / "out", output={"path": str(disk / "out"), "retry_s": retry_s})


def answered_here(job: JobSpec) -> list[dict[str, Any]]:
    """The answers without Ray, a source row at a time."""
    encode, generate = Encode(job, {}), Generate(job, {}, run_id="here")
    work = [ShardWork(s, ShardCoverage(s.uri, s.identity)) for s in open_source(job.source).list()]
    tables = tables_read(job, work)
    rows = [table.slice(n, 1) for table in tables for n in range(table.num_rows)]
    found = [row for each in rows for row in generate(encode(each)).to_pylist()]
    return [row for row in found if row["source_index"] is not None]


def said(rows: Iterable[dict[str, Any]]) -> dict[tuple[Any, ...], tuple[Any, ...]]:
    """What matters of answers, by identity."""
    named = ("source_uri", "source_index", "question_id", "turn", "sample_number")
    found = {
        tuple(row[name] for name in named): (row["answer"], row["finish_reason"], row["status"])
        for row in rows
    }
    return found


@contextlib.contextmanager
def full_from_the_start_of_answers(output: Path, *, for_s: float | None) -> Iterator[None]:
    """Fill the disk when a run says that it is at work; empty it after a while, or at the end."""
    ballast = output.parent / "ballast"

    def fill() -> None:
        wait_until(lambda: any(output.glob("runs/*.json")), timeout_s=60)
        with contextlib.suppress(OSError), ballast.open("wb", buffering=0) as file:
            while file.write(bytes(4096)):
                continue
        if for_s is not None:
            time.sleep(for_s)
            ballast.unlink()

    with ThreadPoolExecutor(1) as pool:
        filling = pool.submit(fill)
        yield
        filling.result()
    ballast.unlink(missing_ok=True)


@contextlib.contextmanager
def unreadable(shard: Path) -> Iterator[None]:
    """The same file to whoever lists it, and nothing but zeros to whoever opens it."""
    data, stat = shard.read_bytes(), shard.stat()
    shard.write_bytes(bytes(len(data)))
    os.utime(shard, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    yield
    shard.write_bytes(data)
    os.utime(shard, ns=(stat.st_atime_ns, stat.st_mtime_ns))


@pytest.mark.usefixtures("ray_session")
class TestOnTwoCores:
    def test_every_question_is_answered_right(self, finished: Finished) -> None:
        rows = answers(finished.job.output.path)
        expected = [word for colour, shape in finished.drawn for word in (colour, shape)]
        assert [row["answer"] for row in rows] == expected
        assert finished.record["counts"] == {"ok": 48, "failed": 0, "skipped": 0}
        assert "WARNING" not in finished.said
        assert verify(finished.job).ok

    def test_a_complete_run_leaves_answers_its_record_ledger_and_lease(
        self, finished: Finished
    ) -> None:
        out = Path(finished.job.output.path)
        files = [path.relative_to(out) for path in out.rglob("*.*")]
        folders = Counter(file.parts[0] for file in files if file.parts[0] != ".tmp")
        assert folders == {"answers": 3, "runs": 1, "lease": 1, "ledger.json.gz": 1}
        record = json.loads((out / f"runs/{finished.record['run_id']}.json").read_text())
        assert record["ended"] == "complete"
        assert record["new"] == {"ok": 48, "failed": 0, "skipped": 0}

    def test_a_record_tells_how_long_each_stage_was_at_work(self, finished: Finished) -> None:
        seconds = finished.record["seconds"]
        stages = {"plan", "open", "read", "prepare", "generate", "write", "fold"}
        assert seconds.keys() == stages
        assert all(0 < seconds[stage] < finished.record["elapsed_s"] * 4 for stage in stages)

    def test_a_second_run_has_nothing_to_do(self, finished: Finished, tmp_path: Path) -> None:
        job = finished.copy(tmp_path)
        before = answers(tmp_path / "out")
        result, said = run(job)
        assert "starting Ray" not in said
        assert sum(result.record["new"].values()) == 0
        assert answers(tmp_path / "out") == before

    def test_what_is_missing_and_a_question_added_later_and_only_that_is_answered(
        self, finished: Finished, tmp_path: Path
    ) -> None:
        added = AskPrompt(id="added", prompt="what color is the shape?")
        job = finished.copy(tmp_path).model_copy(update={"ask": (*finished.job.ask, added)})
        min((tmp_path / "out/answers").iterdir()).unlink()
        kept = answers(tmp_path / "out")
        result, _ = run(job)
        assert 0 < len(kept) < 48
        assert result.record["new"] == {"ok": 48 - len(kept) + 24, "failed": 0, "skipped": 0}
        assert all(row in answers(tmp_path / "out") for row in kept)
        assert verify(job).ok

    def test_a_question_changed_under_its_id_is_refused(
        self, finished: Finished, tmp_path: Path
    ) -> None:
        changed = AskPrompt(id="shape", prompt="what shape is in the image?")
        job = finished.copy(tmp_path).model_copy(update={"ask": (changed,)})
        with pytest.raises(SpecError, match=r"question 'shape': was .*, is now"):
            run(job)

    def test_a_source_that_has_changed_is_followed_and_what_is_unchanged_not_opened(
        self, tmp_path: Path
    ) -> None:
        shards = tmp_path / "in"
        write_shapes(shards, shards=3, images=2)
        run(job_of(shards, tmp_path / "out"))
        same, changed, gone = (shards / f"shapes-00{number}.tar" for number in range(3))
        before = [r for r in answers(tmp_path / "out") if r["source_uri"] == str(same)]
        gone.rename(shards / "moved.tar")
        write_shapes(tmp_path / "other", shards=1, images=3)
        (tmp_path / "other/shapes-000.tar").rename(changed)
        job = job_of(shards, tmp_path / "out")
        with unreadable(same):
            result, said = run(job)
        assert "8 answers are removed, about shards that have changed since or are gone" in said
        assert result.record["new"] == {"ok": 10, "failed": 0, "skipped": 0}
        assert result.record["removed"] == {"ok": 8, "failed": 0, "skipped": 0}
        assert [r for r in answers(tmp_path / "out") if r["source_uri"] == str(same)] == before
        assert verify(job).ok

    def test_a_fork_begins_with_what_still_holds(self, finished: Finished, tmp_path: Path) -> None:
        changed = AskPrompt(id="shape", prompt="what shape is in the image?")
        ask = (changed, *finished.job.ask[1:])
        output = finished.job.output.model_copy(update={"path": str(tmp_path / "new")})
        job = finished.job.model_copy(update={"ask": ask, "output": output})
        console = Console(file=io.StringIO(), width=200)
        result = run_job(job, address=None, console=console, mode=Fork(finished.job.output))
        assert result.record["taken"] == {"ok": 24, "failed": 0, "skipped": 0}
        assert result.record["new"] == {"ok": 24, "failed": 0, "skipped": 0}
        rows = answers(tmp_path / "new")
        runs = {row["question_id"]: row["run_id"] for row in rows}
        assert runs == {
            "colour": finished.record["run_id"],
            "shape": result.record["run_id"],
        }
        assert verify(job).ok
        assert verify(finished.job).ok

    def test_force_answers_again_what_was_answered_otherwise(
        self, finished: Finished, tmp_path: Path
    ) -> None:
        changed = AskPrompt(id="shape", prompt="what shape is in the image?")
        job = finished.copy(tmp_path)
        job = job.model_copy(update={"ask": (changed, *finished.job.ask[1:])})
        names = sorted(os.listdir(tmp_path / "out/answers"))
        console = Console(file=io.StringIO())
        result = run_job(job, address=None, console=console, mode=Force())
        assert result.record["new"] == {"ok": 48, "failed": 0, "skipped": 0}
        assert {row["run_id"] for row in answers(tmp_path / "out")} == {result.record["run_id"]}
        assert sorted(os.listdir(tmp_path / "out/answers")) == names
        assert verify(job).ok

    def test_after_a_fault_is_mended_what_it_failed_is_answered_again(self, tmp_path: Path) -> None:
        for number in range(4):
            (tmp_path / f"{number}.png").write_bytes(scene(number)[2])
        (tmp_path / "0.png").write_bytes(b"no image")
        (tmp_path / "1.png").rename(tmp_path / "hidden")
        own = [{"id": "own", "question": "what color is the shape?"}]
        rows = [{"image": f"{number}.png", "questions": own} for number in range(4)]
        (tmp_path / "in.jsonl").write_bytes(b"\n".join(map(json_bytes, rows)))
        source = {"format": "manifest", "path": str(tmp_path / "in.jsonl"), "limit": 3}
        job = job_of("", tmp_path / "out", source=source, max_failed_fraction=1.0)
        assert run(job)[0].record["new"] == {"ok": 2, "failed": 4, "skipped": 0}
        names = os.listdir(tmp_path / "out/answers")
        before = answers(tmp_path / "out")
        (tmp_path / "hidden").rename(tmp_path / "1.png")

        retry = Retry(("ImageMissing",))
        result = run_job(job, address=None, console=Console(file=io.StringIO()), mode=retry)
        assert result.record["new"] == {"ok": 2, "failed": 0, "skipped": 0}
        assert result.record["retried"] == 2
        assert result.record["counts"] == {"ok": 4, "failed": 2, "skipped": 0}
        after = answers(tmp_path / "out")
        assert [r for r in after if r["source_index"] != 1] == [
            r for r in before if r["source_index"] != 1
        ]
        again = [r for r in after if r["source_index"] == 1]
        assert [r["answer"] for r in again] == list(scene(1)[:2])
        assert [r["attempts"] for r in again] == [2, 2]
        assert os.listdir(tmp_path / "out/answers") == names
        assert verify(job).ok

        result = run_job(job, address=None, console=Console(file=io.StringIO()), mode=Retry())
        assert result.record["new"] == {"ok": 0, "failed": 2, "skipped": 0}
        failed = [r["attempts"] for r in answers(tmp_path / "out") if r["status"] == "failed"]
        assert failed == [2, 2]
        said = io.StringIO()
        run_job(job, address=None, console=Console(file=said), mode=retry)
        assert "starting Ray" not in said.getvalue()
        assert verify(job).ok

    def test_a_trial_of_the_first_rows_is_the_start_of_the_run(self, tmp_path: Path) -> None:
        write_shapes(tmp_path / "in", shards=3, images=4)
        whole = job_of(tmp_path / "in", tmp_path / "out")
        source = whole.source.model_copy(update={"limit": 6, "where": "__key__ != '001'"})
        trial = whole.model_copy(update={"source": source})
        result, said = run(trial)
        assert "The first 6 rows of 3 shards" in said
        assert result.record["counts"] == {"ok": 8, "failed": 0, "skipped": 4}
        assert [row["source_index"] for row in answers(tmp_path / "out")][::2] == [0, 1, 2, 3, 0, 1]
        assert verify(trial).ok
        rest = trial.model_copy(update={"source": source.model_copy(update={"limit": None})})
        assert verify(rest).missing.count == 12
        result, _ = run(rest)
        assert sum(result.record["new"].values()) == 12
        assert verify(rest).ok
        assert verify(trial).ok

    def test_samples_choices_and_talks_are_the_same_for_any_actors_batches_and_after_a_resume(
        self, tmp_path: Path
    ) -> None:
        write_shapes(tmp_path / "in", shards=2, images=5)
        ask = [
            {"id": "caption", "prompt": "Describe the image.", "temperature": 2.0, "n": 5},
            {"from": "questions", "choices": ["red", "green", "blue", "brown"]},
            {"id": "shape", "prompt": "what shape is in the image?"},
            {"id": "talk", "turns": ["what shape is present?", "what color is the shape?"]},
            {
                "id": "blue",
                "prompt": "is there a blue {{ answers.shape }} in {{ __key__ }}?",
                "when": "shape != 'circle'",
            },
        ]
        whole = job_of(tmp_path / "in", tmp_path / "out", ask=ask)
        alone = answered_here(whole)
        source = whole.source.model_copy(update={"limit": 3})
        run(whole.model_copy(update={"source": source}))
        generate = whole.resources.generate.model_copy(
            update={"actors": 2, "cpus": 0.4, "batch_size": 3, "kv_budget_bytes": 2**20}
        )
        resources = whole.resources.model_copy(update={"generate": generate})
        result, _ = run(whole.model_copy(update={"resources": resources}))
        assert sum(result.record["new"].values()) == 7 * (6 + 4)
        assert said(answers(tmp_path / "out")) == said(alone)
        assert len({row["answer"] for row in alone}) > 20
        skipped = {row["answer"] for row in alone if row["question_id"] == "shape"} - {None}
        assert {row["status"] for row in alone if row["question_id"] == "blue"} == (
            {"ok", "skipped"} if "circle" in skipped else {"ok"}
        )
        assert verify(whole).ok

    def test_a_run_that_can_no_longer_be_good_enough_ends_early(self, tmp_path: Path) -> None:
        images, questions = 150, 80
        (tmp_path / "in").mkdir()
        for number in range(images):
            (tmp_path / f"in/{number:03}.png").write_bytes(b"no image")
        job = job_of(
            tmp_path / "in",
            tmp_path / "out",
            source={"format": "images", "path": str(tmp_path / "in")},
            ask=[{"id": f"q{number}", "prompt": "what?"} for number in range(questions)],
            output={"path": str(tmp_path / "out"), "commit_interval_s": 0},
        )
        said = io.StringIO()
        with pytest.raises(JobError, match=r"stopped early: .* than max_failed_fraction 0\.05"):
            run_job(job, address=None, console=Console(file=said, width=200))
        rows = answers(tmp_path / "out")
        assert 1000 <= len(rows) < images * questions
        assert {row["error_class"] for row in rows} == {"ImageUnidentified"}
        assert f"{len(rows):,} ImageUnidentified, such as: " in said.getvalue()
        lenient = job.model_copy(update={"max_failed_fraction": 1.0})
        result, _ = run(lenient)
        assert result.record["counts"] == {"ok": 0, "failed": images * questions, "skipped": 0}
        assert verify(lenient).ok

    @pytest.mark.parametrize(
        ("keys", "told"),
        [
            (
                {"ask": [{"id": "a", "prompt": "<image>\nWhat is it?"}]},
                r"ask\.0\.prompt: .* holds <image>; leave it out",
            ),
            (
                {"ask": [{"id": "a", "prompt": "What?", "choices": ["a", "an <image>"]}]},
                r"ask\.0\.choices\.1: .* holds <image>",
            ),
            (
                {"ask": [{"id": "a", "prompt": "What?", "json_schema": {"type": "objec"}}]},
                r"json_schema: llguidance cannot hold an answer to it: Invalid type: objec",
            ),
            ({"generate": {"max_new_tokens": 5000}}, r"max_new_tokens: 5000 is no less than"),
            ({"model": {"path": "/none"}}, r"model\.path '/none' does not exist"),
            (
                {"source": {"format": "images", "path": "/"}},
                r"\{from: questions\}: format `images` has no questions",
            ),
        ],
    )
    def test_what_would_fail_in_every_row_is_refused_before(
        self, tmp_path: Path, keys: dict[str, Any], told: str
    ) -> None:
        write_shapes(tmp_path / "in", shards=1, images=1)
        with pytest.raises(SpecError, match=told):
            run(job_of(tmp_path / "in", tmp_path / "out", **keys))
        assert not (tmp_path / "out").exists()

    def test_an_earlier_conversation_is_part_of_the_prompt(
        self, talk_about_noise: tuple[JobSpec, str]
    ) -> None:
        job, _ = talk_about_noise
        (row,) = answers(job.output.path)
        assert row["prompt"] == (
            "Answer in a word. USER: <image>\nwhat color is the shape? ASSISTANT: red</s>"
            "USER: what shape is present? ASSISTANT:"
        )
        assert row["status"] == "ok"

    def test_other_images_than_shapes_bring_a_loud_warning(
        self, talk_about_noise: tuple[JobSpec, str]
    ) -> None:
        _, said = talk_about_noise
        assert "WARNING: the embedded model knows one coloured shape" in said

    def test_a_machine_that_cannot_load_the_model_ends_the_job_with_the_reason(
        self, tmp_path: Path
    ) -> None:
        write_shapes(tmp_path / "in", shards=1, images=1)
        job = job_of(tmp_path / "in", tmp_path / "out", model={"device": "cuda"})
        with pytest.raises(JobError) as caught:
            run(job)
        assert str(caught.value) == (
            "model.device is cuda, but this actor sees no GPU: set resources.generate.gpus, or "
            "model.device to auto"
        )
        (record,) = (tmp_path / "out/runs").iterdir()
        assert json.loads(record.read_text())["ended"].startswith("JobError: model.device is cuda")

    def test_a_disk_that_is_full_for_a_while_costs_no_answer(self, small_disk: Path) -> None:
        job = job_on(small_disk, retry_s=120)
        with full_from_the_start_of_answers(small_disk / "out", for_s=12):
            result, _ = run(job)
        assert result.record["ended"] == "complete"
        assert result.record["new"]["ok"] == 10
        assert verify(job).ok

    def test_a_disk_that_stays_full_ends_the_run_and_the_next_one_goes_on(
        self, small_disk: Path
    ) -> None:
        job = job_on(small_disk, retry_s=1)
        with (
            full_from_the_start_of_answers(small_disk / "out", for_s=None),
            pytest.raises(JobError, match=r"the store failed: .*No space left.*: it goes on"),
        ):
            run(job)
        result, _ = run(job)
        assert result.record["new"]["ok"] == 10
        assert verify(job).ok

    def test_shards_and_answers_on_s3_where_a_truncated_shard_costs_one_failed_row(
        self, s3_server: S3Server, tmp_path: Path
    ) -> None:
        import s3fs

        write_shapes(tmp_path / "in", shards=3, images=4)
        cut = tmp_path / "in/shapes-001.tar"
        cut.write_bytes(cut.read_bytes()[:3100])
        storage = {"endpoint_url": s3_server.endpoint_url}
        fs = s3fs.S3FileSystem(endpoint_url=s3_server.endpoint_url, use_listings_cache=False)
        fs.put(str(tmp_path / "in"), s3_server.url("job/in"), recursive=True)
        job = job_of(
            "unused",
            "unused",
            source={
                "format": "webdataset",
                "path": s3_server.url("job/in/shapes-{000..002}.tar"),
                "storage": storage,
            },
            output={"path": s3_server.url("job/out"), "storage": storage},
            max_failed_fraction=1.0,
        )
        result, _ = run(job)
        table = s3_server.url("job/out").removeprefix("s3://")
        rows = answers(table, filesystem=fs)
        whole = [row for row in rows if "001" not in row["source_uri"]]
        assert [row["status"] for row in whole] == ["ok"] * 16
        *read, unread = [row["status"] for row in rows if "001" in row["source_uri"]]
        assert set(read) == {"ok"}
        assert unread == "failed"
        assert result.record["counts"] == {"ok": 16 + len(read), "failed": 1, "skipped": 0}
        assert set(result.record["failures"]) == {"ShardUnreadable"}
        assert verify(job).ok
        assert sum(run(job)[0].record["new"].values()) == 0


def test_a_cluster_that_does_not_answer_is_named_at_once(tmp_path: Path) -> None:
    write_shapes(tmp_path / "in", shards=1, images=1)
    job = job_of(tmp_path / "in", tmp_path / "out")
    with pytest.raises(JobError, match=r"cannot reach Ray at 127\.0\.0\.1:1: .*--address"):
        run_job(job, address="127.0.0.1:1", console=Console(file=io.StringIO()))


def test_one_core_does_not_hang(tmp_path: Path) -> None:
    write_shapes(tmp_path / "in", shards=3, images=3)
    job = job_of(tmp_path / "in", tmp_path / "out")
    with ray_of(num_cpus=1):
        result, _ = run(job)
    assert result.record["counts"]["ok"] == 18
    assert verify(job).ok


def test_each_generate_actor_claims_a_gpu_of_its_own(tmp_path: Path) -> None:
    import ray

    write_shapes(tmp_path / "in", shards=4, images=6)
    resources = {"generate": {"actors": 2, "batch_size": 2}}
    job = job_of(tmp_path / "in", tmp_path / "out", resources=resources)
    free: list[float] = []
    over = threading.Event()

    def watch() -> None:
        while not over.is_set():
            free.append(ray.available_resources().get("GPU", 0.0))
            time.sleep(0.1)

    with ray_of(num_cpus=5, num_gpus=3):
        watcher = threading.Thread(target=watch)
        watcher.start()
        try:
            result, _ = run(job)
        finally:
            over.set()
            watcher.join()
    assert min(free) == 1.0
    resolved: dict[str, Any] = dict(result.record["resources"])
    assert (resolved["generate_actors"], resolved["generate_gpus"]) == (2, 1.0)
    assert verify(job).ok
