"""`jobs/cli.py`, `exits.py`, `records.py`: what a person types, reads and gets as exit status."""

import json
import os
import signal
import subprocess
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import IO, Any

import click
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner, Result

from jobs.cli import main
from jobs.demo import demo_spec, showcase
from jobs.exits import StatusGroup
from jobs.load import dump_spec
from jobs.records import recorded_spec, summary
from schemas.errors import JobError, SpecError
from tests.whole_jobs import job_of

REPOSITORY = Path(__file__).parents[1]
HEAVY = {"torch", "ray", "transformers", "pyarrow", "fsspec", "pydantic", "rich", "numpy"}


def lavaflow(*args: str) -> Result:
    return CliRunner().invoke(main, args, prog_name="lavaflow")


def python(*args: str, **kwargs: Any) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    command = [sys.executable, *args]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=env, **kwargs)


# Help


def test_help_loads_nothing_heavy() -> None:
    code = (
        "import sys\nfrom jobs.cli import main\n"
        "try: main(['--help'])\nexcept SystemExit: print(*sys.modules, file=sys.stderr)"
    )
    done = python("-c", code)
    assert "Commands:" in done.stdout
    assert not HEAVY & set(done.stderr.split())


def test_help_answers_in_half_a_second() -> None:
    def seconds() -> float:
        start = time.perf_counter()
        assert python("-m", "jobs.cli", "--help").returncode == 0
        return time.perf_counter() - start

    # The quickest of a few: a busy machine says nothing about the command.
    assert min(seconds() for _ in range(5)) < 0.5


def test_a_fork_onto_itself_is_refused(tmp_path: Path) -> None:
    (tmp_path / "job.yaml").write_text(dump_spec(job_of(tmp_path / "in", tmp_path / "out")))
    arguments = ["run", str(tmp_path / "job.yaml"), "--fork", f"{tmp_path}/in/../out"]
    done = CliRunner().invoke(main, arguments)
    assert done.exit_code == 2
    assert "out: is output.path itself; name another place" in done.output


def test_commands_are_listed_in_the_order_of_use() -> None:
    listed = lavaflow("--help").stdout.partition("Commands:\n")[2]
    assert [line.split()[0] for line in listed.splitlines()] == [
        *("demo", "caption", "ask", "run", "verify", "retry", "runs", "bench", "doctor", "spec"),
        *("submit", "status", "logs", "stop"),
    ]


@pytest.mark.parametrize("command", main.commands)
def test_every_command_has_help(command: str) -> None:
    result = lavaflow(command, "--help")
    assert result.exit_code == 0
    assert main.commands[command].help


def test_the_version_is_that_of_the_package() -> None:
    try:
        installed = version("lavaflow")
    except PackageNotFoundError:
        pytest.skip("lavaflow is not installed here, only imported")
    assert lavaflow("--version").stdout == f"lavaflow {installed}\n"


# Usage errors


def test_a_misspelt_command_gets_a_suggestion() -> None:
    result = lavaflow("captoin")
    assert result.exit_code == 2
    assert "Error: No such command 'captoin'. Did you mean 'caption'?" in result.stderr


def test_a_misspelt_option_gets_a_suggestion() -> None:
    result = lavaflow("caption", "photos", "--ouput", "x")
    assert result.exit_code == 2
    assert "Error: No such option '--ouput'. Did you mean '--output'?" in result.stderr


def test_a_mistake_in_the_spec_is_one_message_and_status_2(tmp_path: Path) -> None:
    spec = tmp_path / "job.yaml"
    spec.write_text("{}")
    result = lavaflow("run", str(spec))
    assert result.exit_code == 2
    assert result.stdout == ""
    assert result.stderr == (
        f"Error: {spec}: 3 mistakes\n  source: is missing\n  ask: is missing\n"
        "  output: is missing\n"
    )


def test_a_missing_source_is_found_before_anything_starts(tmp_path: Path) -> None:
    result = lavaflow("caption", str(tmp_path / "none"), "-o", str(tmp_path / "out"))
    assert result.exit_code == 2
    assert result.stderr == (
        f"Error: source.path '{tmp_path}/none' does not exist; check the spelling and the store\n"
    )


# Specs of one line


def test_caption_prints_the_equivalent_spec(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = lavaflow(
        *("caption", "shards/{00..03}.tar", "-o", "out", "--print-spec"),
        *("--model", "llava-hf/llava-1.5-7b-hf", "--set", "ask.0.max_new_tokens=8"),
    )
    assert result.exit_code == 0, result.output
    assert result.stdout == (
        "source:\n"
        "  format: webdataset\n"
        f"  path: {tmp_path}/shards/{{00..03}}.tar\n"
        "ask:\n"
        "- id: caption\n"
        "  prompt: Describe the image.\n"
        "  max_new_tokens: 8\n"
        "model:\n"
        "  path: llava-hf/llava-1.5-7b-hf\n"
        "output:\n"
        f"  path: {tmp_path}/out\n"
    )


def test_ask_prints_a_spec_with_every_question() -> None:
    result = lavaflow(
        *("ask", "/photos", "-q", "Is it red?", "-q", "What is it?", "-o", "/out"),
        *("--format", "images", "--print-spec"),
    )
    assert result.stdout == (
        "source:\n"
        "  format: images\n"
        "  path: /photos\n"
        "ask:\n"
        "- id: is-it-red\n"
        "  prompt: Is it red?\n"
        "- id: what-is-it\n"
        "  prompt: What is it?\n"
        "output:\n"
        "  path: /out\n"
    )


def test_a_printed_spec_runs_as_it_is(tmp_path: Path) -> None:
    printed = lavaflow("caption", str(tmp_path / "none"), "-o", "out", "--print-spec").stdout
    (tmp_path / "job.yaml").write_text(printed)
    result = lavaflow("run", str(tmp_path / "job.yaml"))
    assert "does not exist" in result.stderr


def test_an_empty_prompt_is_a_mistake_and_not_the_default() -> None:
    result = lavaflow("caption", "/photos", "-o", "/out", "--prompt", "", "--print-spec")
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr == (
        "Error: command line: ask.0.prompt: '' should have at least 1 character\n"
    )


def test_the_schema_is_json_that_knows_every_part() -> None:
    schema = json.loads(lavaflow("spec", "--schema").stdout)
    assert set(schema["required"]) == {"source", "ask", "output"}
    assert "from" in schema["$defs"]["AskRow"]["properties"]


# Exit statuses


@click.group(cls=StatusGroup)
def endings() -> None:
    """Commands that end in one way each."""


@endings.command()
@click.argument("kind")
def end(kind: str) -> None:
    errors: dict[str, BaseException] = {
        "spec": SpecError("a bad spec"),
        "job": JobError("a bad job"),
        "interrupt": KeyboardInterrupt(),
        "bug": ZeroDivisionError("nobody foresaw this"),
    }
    if kind == "terminate":
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(10)
    raise errors[kind]


@pytest.mark.parametrize(
    ("kind", "status", "told"),
    [
        ("spec", 2, "Error: a bad spec\n"),
        ("job", 1, "Error: a bad job\n"),
        ("interrupt", 130, "Interrupted; the same command goes on from here.\n"),
        ("terminate", 143, "Terminated; the same command goes on from here.\n"),
    ],
)
def test_each_ending_has_its_status_and_one_message(kind: str, status: int, told: str) -> None:
    result = CliRunner().invoke(endings, ["end", kind])
    assert result.exit_code == status
    assert result.stdout == ""
    assert result.stderr.lstrip("\n") == told


def test_a_bug_keeps_its_traceback() -> None:
    result = CliRunner().invoke(endings, ["end", "bug"])
    assert result.exit_code == 1
    assert isinstance(result.exception, ZeroDivisionError)


def schema_into(stdout: IO[str]) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "jobs.cli", "spec", "--schema"]
    return subprocess.run(
        command, stdout=stdout, stderr=subprocess.PIPE, text=True, check=False, cwd=REPOSITORY
    )


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no /dev/full here")
def test_a_result_that_cannot_be_written_is_one_message_and_status_1() -> None:
    with open("/dev/full", "w") as full:
        done = schema_into(full)
    assert done.returncode == 1
    assert done.stderr == ("Error: cannot write the result: [Errno 28] No space left on device\n")


def test_a_reader_that_has_gone_ends_a_command_in_silence() -> None:
    reads, writes = os.pipe()
    os.close(reads)
    with open(writes, "w") as closed:
        done = schema_into(closed)
    assert (done.returncode, done.stderr) == (1, "")


def test_the_handler_of_sigterm_is_put_back() -> None:
    before = signal.getsignal(signal.SIGTERM)
    CliRunner().invoke(endings, ["end", "spec"])
    assert signal.getsignal(signal.SIGTERM) is before


# Records


RECORD: dict[str, Any] = {
    "table": "/out/answers",
    "elapsed_s": 200.0,
    "new": {"ok": 980, "failed": 20, "skipped": 0},
    "counts": {"ok": 1980, "failed": 20, "skipped": 0},
    "failures": {
        "PromptTooLong": {
            "count": 2,
            "example": {"uri": "/a.tar", "index": 7, "message": "5000 tokens, 4096 fit"},
        },
        "ImageCorrupt": {
            "count": 18,
            "example": {"uri": "/a.tar", "index": 3, "message": "cat.jpg: broken data stream"},
        },
    },
}
OPENING = (
    "It is in /out/answers; open it with one of\n"
    f'  {sys.executable} -c "import pyarrow.dataset as d; '
    "print(d.dataset('/out/answers').to_table().to_pandas())\"\n"
    "  duckdb -c \"from '/out/answers/*.parquet'\"\n"
)


def test_the_summary_counts_and_shows_one_example_of_each_failure() -> None:
    assert summary(RECORD) == (
        "This run: 1,000 answers: 980 ok, 20 failed, 0 skipped, in 3 min 20 s (5.0 a second)\n"
        "Table: 2,000 answers: 1,980 ok, 20 failed, 0 skipped\n"
        "  18 ImageCorrupt, such as: cat.jpg: broken data stream\n"
        "    in /a.tar, row 3\n"
        "  2 PromptTooLong, such as: 5000 tokens, 4096 fit\n"
        "    in /a.tar, row 7\n" + OPENING
    )


def test_a_run_that_found_nothing_to_do_says_so() -> None:
    idle = {**RECORD, "new": {"ok": 0, "failed": 0, "skipped": 0}, "failures": {}}
    assert summary(idle) == (
        "This run: nothing left to do\n"
        "Table: 2,000 answers: 1,980 ok, 20 failed, 0 skipped\n" + OPENING
    )


def write_record(output: Path, number: int, **keys: Any) -> None:
    spec = {
        "source": {"format": "images", "path": "/photos"},
        "ask": [{"from": "questions"}],
        "output": {"path": "/where/it/was"},
        **keys,
    }
    (output / "runs").mkdir(exist_ok=True)
    (output / "runs" / f"{number}.json").write_text(json.dumps({"spec": spec}))


def test_the_newest_record_tells_the_spec_of_a_table_even_after_it_moved(tmp_path: Path) -> None:
    for number, name in enumerate(["old", "new"]):
        write_record(tmp_path, number, name=name)
    job = recorded_spec(str(tmp_path))
    assert job.name == "new"
    assert job.output.path == str(tmp_path)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"spec": 1}', "\udc80", "[" * 100_000])
def test_a_record_without_a_spec_leaves_it_to_the_one_before(tmp_path: Path, text: str) -> None:
    write_record(tmp_path, 0, name="whole")
    (tmp_path / "runs" / "1.json").write_bytes(text.encode(errors="surrogateescape"))
    assert recorded_spec(str(tmp_path)).name == "whole"


def test_a_table_that_was_asked_one_thing_after_another_holds_both(tmp_path: Path) -> None:
    first, second = {"id": "a", "prompt": "A?"}, {"id": "b", "prompt": "B?", "max_new_tokens": 3}
    write_record(tmp_path, 0, ask=[first], generate={"max_new_tokens": 7})
    write_record(tmp_path, 1, ask=[second, {"from": "questions"}])
    write_record(tmp_path, 2, ask=[second])
    job = recorded_spec(str(tmp_path))
    assert job.units == ("b", "questions", "a")
    assert [job.decoding(ask).max_new_tokens for ask in job.ask] == [3, 64, 7]


def test_answers_that_were_drawn_keep_their_number_beside_questions_that_came_later(
    tmp_path: Path,
) -> None:
    drawn, chosen = {"id": "a", "prompt": "A?"}, {"id": "b", "prompt": "B?", "choices": ["x", "y"]}
    write_record(tmp_path, 0, ask=[drawn, chosen], generate={"temperature": 1.0, "n": 3})
    write_record(tmp_path, 1, ask=[{"from": "questions"}])
    job = recorded_spec(str(tmp_path))
    assert job.units == ("questions", "a", "b")
    assert [job.samples(ask) for ask in job.ask] == [1, 3, 1]


def test_records_without_any_spec_are_named(tmp_path: Path) -> None:
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "zzz.json").write_text("{}")
    result = lavaflow("verify", str(tmp_path))
    assert result.exit_code == 2
    assert result.stderr == (
        f"Error: {tmp_path}: none of runs/zzz.json holds a spec (runs/*.json); "
        "name the spec with --spec\n"
    )


@pytest.mark.parametrize("name", ["a\0b", "file"])
def test_an_output_that_cannot_be_read_is_bad_usage(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(SpecError, match=r"cannot be read \(.*\); check the path and the creden"):
        recorded_spec(str(tmp_path / name))


def test_a_bucket_that_cannot_be_reached_asks_for_its_server(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in {
        "AWS_ENDPOINT_URL": "http://127.0.0.1:9",
        "AWS_ACCESS_KEY_ID": "x",
        "AWS_SECRET_ACCESS_KEY": "x",
        "AWS_MAX_ATTEMPTS": "1",
    }.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SpecError, match=r"cannot be read .* --spec, or the server in AWS_ENDPOINT"):
        recorded_spec("s3://nobucket/x")


def test_verifying_what_was_never_run_into_asks_for_the_spec(tmp_path: Path) -> None:
    result = lavaflow("verify", str(tmp_path))
    assert result.exit_code == 2
    assert result.stderr == (
        f"Error: {tmp_path}: holds no run record (runs/*.json); name the spec with --spec\n"
    )


def test_the_demo_shows_answers_beside_a_file_of_somebody_else(tmp_path: Path) -> None:
    drawn = {"colour": '"red"', "shape": '"circle"'}
    place = {"source_uri": "a.tar", "source_index": 0, "sample_id": "s"}
    row = {**place, **drawn, "question": "what?", "answer": "it", "error_message": None}
    (tmp_path / "answers").mkdir()
    (tmp_path / "answers" / "notes.txt").write_text("mine")
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / "answers" / "part-0.parquet")
    assert "s: a red circle\n    what? " in showcase(demo_spec(str(tmp_path)))
