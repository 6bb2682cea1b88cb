"""The command `lavaflow doctor`; what it does is in `doctor.py`."""

import json
import os

import click

from jobs.exits import Status, print_result


@click.command()
@click.argument("model", metavar="MODEL")
@click.option("--revision", help="Branch, tag or commit of a hub id.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
@click.pass_context
def doctor(ctx: click.Context, model: str, revision: str | None, as_json: bool) -> None:
    """Examine MODEL: a hub id, a local folder, a URL or `embedded`.

    Says whether answers are right whatever else is in the batch, what dtypes, attentions and
    quantizations work here, and what memory they take. Status 1 where something is wrong.
    """
    # Read when torch loads; the generate actor has it so.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    from jobs.doctor import examine
    from jobs.doctor_text import told
    from schemas.job import ModelSpec

    spec = ModelSpec(path=model, revision=revision)
    report = examine(spec, say=lambda text: click.echo(f"{text} ...", err=True))
    if as_json:
        print_result(json.dumps(report, indent=2))
    else:
        print_result(told(report), nl=False)
    if not report["ok"]:
        ctx.exit(Status.FAILED)
