"""How a command ends: the one place where exceptions become exit statuses.

    0    complete
    1    the job failed (JobError), `verify`, `bench` or `doctor` found a fault, or the result could
         not be written
    2    bad usage or spec (SpecError, click's UsageError)
    3    complete, but more rows failed than `max_failed_fraction`
    75   another run holds the output (OutputHeld); nothing was changed
    130  interrupted (Ctrl-C), 143 terminated (SIGTERM)

An error is one message on stderr; only what nobody foresaw keeps its traceback.
"""

import contextlib
import signal
import sys
from collections.abc import Callable
from enum import IntEnum
from types import FrameType
from typing import Any

import click

from schemas.errors import JobError, LavaflowError, OutputHeld, SpecError


class Status(IntEnum):
    COMPLETE = 0
    FAILED = 1
    BAD_USAGE = 2
    TOO_MANY_FAILED = 3
    OUTPUT_HELD = 75
    INTERRUPTED = 130
    TERMINATED = 143


class Terminated(BaseException):
    """SIGTERM arrived. Not an Exception: nothing but clean-up stands in its way."""


def terminate(signum: int, frame: FrameType | None) -> None:
    """Signal handler for SIGTERM; `run` has its own (`stop.py`)."""
    raise Terminated


def status_of(error: LavaflowError) -> Status:
    if isinstance(error, SpecError):
        return Status.BAD_USAGE
    return Status.OUTPUT_HELD if isinstance(error, OutputHeld) else Status.FAILED


def print_result(text: str, *, nl: bool = True) -> None:
    """Write to stdout. Raises JobError where that fails; a closed pipe is left to click."""
    try:
        click.echo(text, nl=nl)
    except BrokenPipeError:
        raise
    except OSError as error:
        # What is left in its buffer would fail once more when Python ends.
        with contextlib.suppress(OSError):
            sys.stdout.close()
        raise JobError(f"cannot write the result: {error}") from error


class StatusGroup(click.Group):
    """A group whose errors end as the module says, and whose commands are listed as defined."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)

    def main(self, *args: Any, **extra: Any) -> Any:
        run: Callable[..., Any] = super().main
        if not extra.pop("standalone_mode", True):
            return run(*args, standalone_mode=False, **extra)
        before = signal.signal(signal.SIGTERM, terminate)
        try:
            returned = run(*args, standalone_mode=False, **extra)
            status = returned if isinstance(returned, int) else Status.COMPLETE
        except click.ClickException as error:
            error.show()
            status = error.exit_code
        except LavaflowError as error:
            # Imported here: pyarrow and fsspec, which an error of click's does not need.
            from jobs.secrets import without_secrets

            click.echo(f"Error: {without_secrets(str(error))}", err=True)
            status = status_of(error)
        except click.Abort:
            click.echo("Interrupted; the same command goes on from here.", err=True)
            status = Status.INTERRUPTED
        except Terminated:
            click.echo("Terminated; the same command goes on from here.", err=True)
            status = Status.TERMINATED
        finally:
            signal.signal(signal.SIGTERM, before)
        sys.exit(int(status))
