"""The command line. Results go to stdout, everything else to stderr.

Each command imports what it needs when it runs, so that `--help` loads neither torch nor ray. How
errors become exit statuses is in `exits.py`.
"""

import json
import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from jobs.doctor_command import doctor
from jobs.exits import Status, StatusGroup, print_result

if TYPE_CHECKING:
    from jobs.run import Mode
    from schemas.job import JobSpec


def _options(*options: Callable[[Any], Any]) -> Callable[[Any], Any]:
    def decorate(command: Any) -> Any:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


_set = click.option(
    "--set",
    "overrides",
    metavar="KEY=VALUE",
    multiple=True,
    help="Set a key of the spec, as in generate.batch_size=8 or ask.0.prompt=...; repeatable.",
)
_limit = click.option(
    "--limit",
    type=click.IntRange(min=1),
    metavar="N",
    help="Only the first N rows; the same command without it goes on from there.",
)
_COUNT = click.IntRange(min=1)
_json = click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
_output = click.option(
    "-o", "--output", metavar="DST", required=True, help="Folder or URL for the answer table."
)
_address = click.option(
    "--address", envvar="RAY_ADDRESS", show_envvar=True, help="Ray cluster; else this machine."
)
_jobs_api = click.option(
    "--address",
    envvar=["RAY_API_SERVER_ADDRESS", "RAY_ADDRESS"],
    show_envvar=True,
    help="Ray cluster, as http://HOST:8265.  [default: http://127.0.0.1:8265]",
)
_quick = _options(
    _output,
    click.option("--model", help="Hub id, local folder or URL.  [default: the embedded model]"),
    click.option(
        "--format",
        type=click.Choice(["webdataset", "parquet", "images", "manifest"]),
        help="What SRC holds.  [default: guessed from its name]",
    ),
    click.option("--print-spec", is_flag=True, help="Print the equivalent spec; run nothing."),
    _limit,
    _set,
    _address,
    _json,
)


@click.group(cls=StatusGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="lavaflow", message="lavaflow %(version)s")
def main() -> None:
    """Caption images and answer questions about them with LLaVA, offline, in bulk.

    \b
    Try it:              lavaflow demo
    Your own images:     lavaflow caption photos/ -o answers/ --model llava-hf/llava-1.5-7b-hf
    A job you repeat:    lavaflow run job.yaml
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")


@main.command()
@click.option(
    "-o",
    "--output",
    metavar="DST",
    default="lavaflow-demo",
    show_default=True,
    help="Folder for the answer table.",
)
@_address
@_json
def demo(output: str, address: str | None, as_json: bool) -> None:
    """Answer questions about the images that come with the package."""
    from jobs.demo import demo_spec, showcase

    job = demo_spec(output)
    _run(job, address=address, as_json=as_json, closing=showcase)


@main.command()
@click.argument("source", metavar="SRC")
@click.option("--prompt", help="What is asked of every image.  [default: Describe the image.]")
@_quick
def caption(source: str, prompt: str | None, **options: Any) -> None:
    """Caption the images in SRC: a folder, a glob, tar shards, or a URL of them."""
    from jobs.quick import CAPTION_PROMPT, caption_ask

    _run_quick(source, caption_ask(CAPTION_PROMPT if prompt is None else prompt), options)


@main.command()
@click.argument("source", metavar="SRC")
@click.option(
    "-q", "--question", "questions", multiple=True, required=True, help="A question; repeatable."
)
@_quick
def ask(source: str, questions: tuple[str, ...], **options: Any) -> None:
    """Ask one or more questions about each image in SRC."""
    from jobs.quick import question_asks

    _run_quick(source, question_asks(questions), options)


@main.command()
@click.argument("spec")
@click.option(
    "--fork",
    metavar="NEW_DST",
    help="Answer into NEW_DST, beginning with what still holds of the answers in output.path.",
)
@click.option(
    "--force",
    "is_forced",
    is_flag=True,
    help="Answer again what was answered otherwise, and replace it part by part.",
)
@_limit
@_set
@_address
@_json
def run(
    spec: str,
    fork: str | None,
    is_forced: bool,
    **options: Any,
) -> None:
    """Run the job of a spec file, or what is left of it."""
    from jobs.load import load_spec

    job = load_spec(spec, _limited(options.pop("overrides"), options.pop("limit")))
    if is_forced and (fork is not None or job.source.limit is not None):
        raise click.UsageError(
            "--force replaces the whole table: leave out --fork, --limit and source.limit"
        )
    if is_forced:
        from jobs.run import Force

        _run(job, mode=Force(), **options)
    elif fork is None:
        _run(job, **options)
    else:
        from jobs.records import with_output
        from jobs.run import Fork

        forked = with_output(job, fork)
        if forked.output.path == job.output.path:
            raise click.UsageError(f"--fork {fork}: is output.path itself; name another place")
        _run(forked, mode=Fork(job.output), **options)


@main.command()
@click.argument("output", metavar="DST")
@click.option("--spec", help="Spec file to check against.  [default: the newest run's]")
@click.pass_context
def verify(ctx: click.Context, output: str, spec: str | None) -> None:
    """Check that every input has exactly one outcome; prints JSON."""
    from jobs.records import job_of_output
    from jobs.verify import verify as verify_job

    report = verify_job(job_of_output(output, spec=spec))
    print_result(json.dumps(report.to_json(), indent=2))
    if not report.ok:
        ctx.exit(Status.FAILED)


@main.command()
@click.argument("output", metavar="DST")
@click.option(
    "--class",
    "classes",
    metavar="NAME",
    multiple=True,
    help="Only rows that failed so, as error_class says it; repeatable.  [default: all]",
)
@click.option("--spec", help="Spec file of the job.  [default: the newest run's]")
@_set
@_address
@_json
def retry(
    output: str,
    classes: tuple[str, ...],
    spec: str | None,
    overrides: tuple[str, ...],
    **options: Any,
) -> None:
    """Answer the failed rows of a table again, and put what comes in their place."""
    from jobs.records import job_of_output
    from jobs.run import Retry

    job = job_of_output(output, spec=spec, overrides=overrides)
    _run(job, mode=Retry(classes), **options)


@main.command()
@click.argument("output", metavar="DST")
@_json
def runs(output: str, as_json: bool) -> None:
    """List the runs into a table: what each added, replaced and failed."""
    from jobs.records import history, history_lines

    records = history(output)
    text = json.dumps(records, indent=2) if as_json else "\n".join(history_lines(records))
    print_result(text)


@main.command()
@click.argument("mode", type=click.Choice(["vqa", "caption"]), default="vqa")
@click.option("--model", help="Hub id, local folder or `embedded`.  [default: the embedded model]")
@click.option("--random", metavar="NAME", help="A model of random weights instead: ViT-S-135M.")
@click.option("--images", type=_COUNT, help="[default: 16 in vqa, 64 in caption]")
@click.option("--questions", type=_COUNT, help="On each image, in vqa.  [default: 10]")
@click.option(
    "--new-tokens",
    type=_COUNT,
    help="Of each answer in vqa, in the mean in caption.  [default: 3, 30]",
)
@click.option(
    "--dtype",
    type=click.Choice(["auto", "float32", "bfloat16", "float16"]),
    default="auto",
    show_default=True,
    help="auto: the checkpoint's own; of --random, bfloat16.",
)
@click.option(
    "--batch-size",
    "batch_sizes",
    type=_COUNT,
    multiple=True,
    default=(8, 16, 32),
    show_default=True,
    help="Of generate, whose best one counts; repeatable.",
)
@click.option("--rounds", type=_COUNT, default=5, show_default=True)
@click.option(
    "--check",
    "checked",
    type=_COUNT,
    default=16,
    show_default=True,
    help="Answers compared with those on the single prompts.",
)
@click.option(
    "--no-exact",
    "is_exact",
    is_flag=True,
    flag_value=False,
    default=True,
    help="Do not compare in float32 what is measured in another dtype.",
)
@click.option(
    "--jobs",
    "is_whole",
    is_flag=True,
    help="Instead: a whole job's rate over that of its engine alone.",
)
@click.option("--compile", is_flag=True, help="The engine's text model, as in a job's resources.")
@click.option("--threads", type=_COUNT, help="On the CPU.  [default: torch's own number]")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True)
def bench(mode: str, is_whole: bool, **options: Any) -> None:
    """Measure the engine against transformers' generate; prints JSON.

    \b
    vqa:      questions on each image, short answers of one length
    caption:  one answer an image, of log-normal lengths
    """
    if options["model"] and options["random"]:
        raise click.UsageError("--model and --random exclude each other")
    if mode == "caption" and options["questions"]:
        raise click.UsageError("--questions is for vqa: a caption is one answer an image")
    if is_whole and (given := _given("batch_sizes", "rounds", "checked", "is_exact", "threads")):
        raise click.UsageError(f"{given} says nothing of a whole job (--jobs)")
    # Read when torch loads; the generate actor has it so.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    from jobs.bench import Bench, measure
    from schemas.job import EMBEDDED

    if is_whole:
        from jobs.endtoend import measure_jobs as measure  # type: ignore[assignment]
    usual = {"vqa": (100 if is_whole else 16, 10, 3), "caption": (64, 1, 30)}[mode]
    for name, value in zip(("images", "questions", "new_tokens"), usual, strict=True):
        options[name] = options[name] or value
    options["model"] = options["model"] or EMBEDDED
    report = measure(
        Bench(**{"mode": mode, **options}), say=lambda text: click.echo(text, err=True)
    )
    print_result(json.dumps(report, indent=2))
    if not report["ok"]:
        click.echo("Error: the engine's answers are not those of generate: see agreement", err=True)
        click.get_current_context().exit(Status.FAILED)


main.add_command(doctor)


@main.command("spec")
@click.option("--schema", is_flag=True, help="JSON Schema instead, for editors.")
def describe_spec(schema: bool) -> None:
    """Print the reference of the job spec."""
    if schema:
        from jobs.load import json_schema

        print_result(json_schema())
    else:
        from jobs.reference import reference_page

        print_result(reference_page(), nl=False)


@main.command()
@click.argument("spec")
@_set
@_jobs_api
@click.option("--wait", is_flag=True, help="Return when the job is over, with its exit status.")
@_json
def submit(
    spec: str, overrides: tuple[str, ...], address: str | None, wait: bool, as_json: bool
) -> None:
    """Run the job of a spec file on a Ray cluster; prints the job's id."""
    from jobs.load import load_spec
    from jobs.submit import Cluster

    job = load_spec(spec, overrides)
    cluster = Cluster(address)
    job_id = cluster.submit(job)
    print_result(json.dumps({"id": job_id, "name": job.name}) if as_json else job_id)
    if not wait:
        return
    over = cluster.wait(job_id)
    click.echo(f"{job_id} {over.status}", err=True)
    if over.status != "SUCCEEDED":
        click.get_current_context().exit(over.exit_status or Status.FAILED)


@main.command()
@click.argument("job_id", metavar="ID")
@_jobs_api
@_json
def status(job_id: str, address: str | None, as_json: bool) -> None:
    """Say how a submitted job is."""
    from jobs.submit import Cluster

    found = Cluster(address).status(job_id)
    if as_json:
        print_result(json.dumps(found.to_json()))
        return
    print_result(f"{found.id} {found.status}" + (f" ({found.name})" if found.name else ""))
    if found.message:
        print_result(found.message.strip())


@main.command()
@click.argument("job_id", metavar="ID")
@click.option("-f", "--follow", is_flag=True, help="Go on until the job is over.")
@_jobs_api
def logs(job_id: str, follow: bool, address: str | None) -> None:
    """Print what a submitted job has written."""
    from jobs.submit import Cluster

    cluster = Cluster(address)
    for text in cluster.follow(job_id) if follow else [cluster.logs(job_id)]:
        print_result(text, nl=False)


@main.command()
@click.argument("job_id", metavar="ID")
@_jobs_api
@_json
def stop(job_id: str, address: str | None, as_json: bool) -> None:
    """Stop a submitted job; submitting it again resumes it."""
    from jobs.submit import Cluster

    stopped = Cluster(address).stop(job_id)
    if as_json:
        print_result(json.dumps({"id": job_id, "stopped": stopped}))
    else:
        print_result(f"{job_id} {'is stopping' if stopped else 'was not running'}")


def _given(*names: str) -> str:
    """The first of these options that was given, as it is written; else the empty string."""
    ctx = click.get_current_context()
    written = {option.name: option.opts[0] for option in ctx.command.params}
    given = (n for n in names if ctx.get_parameter_source(n) is ParameterSource.COMMANDLINE)
    return next((written[name] for name in given), "")


def _limited(overrides: tuple[str, ...], limit: int | None) -> tuple[str, ...]:
    return overrides if limit is None else (*overrides, f"source.limit={limit}")


def _run_quick(source: str, asks: list[dict[str, str]], options: dict[str, Any]) -> None:
    """Run the job of one line; `options` are those of `_quick`."""
    from jobs.load import build_spec, dump_spec
    from jobs.quick import quick_spec

    data = quick_spec(
        source, options["output"], asks, model=options["model"], format=options["format"]
    )
    overrides = _limited(options["overrides"], options["limit"])
    job = build_spec(data, overrides, origin="command line")
    if options["print_spec"]:
        print_result(dump_spec(job), nl=False)
    else:
        _run(job, address=options["address"], as_json=options["as_json"])


def _run(
    job: "JobSpec",
    *,
    address: str | None,
    as_json: bool,
    mode: "Mode | None" = None,
    closing: Callable[["JobSpec"], str] | None = None,
) -> None:
    """Run the job, print what came of it, exit with 3 where too many rows failed."""
    from rich.console import Console

    from jobs.records import summary
    from jobs.run import run_job

    result = run_job(job, address=address, console=Console(stderr=True), mode=mode)
    if as_json:
        print_result(json.dumps(result.record, indent=2))
    else:
        print_result(summary(result.record), nl=False)
        if closing:
            print_result(closing(job), nl=False)
    if result.too_many_failed:
        click.get_current_context().exit(Status.TOO_MANY_FAILED)


if __name__ == "__main__":
    main(prog_name="lavaflow")
