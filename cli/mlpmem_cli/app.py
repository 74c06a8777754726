"""The command `mlpmem-rag`: its commands and its one error boundary.

Results go to stdout, progress and errors to stderr. Exit codes: 0 done, 1 failed, 2 wrong usage,
130 interrupted. `--help` imports neither torch nor faiss.
"""

from __future__ import annotations

import os
import sys
import traceback
from typing import Annotated

import typer

from mlpmem_cli.ask import ask
from mlpmem_cli.bench import bench
from mlpmem_cli.chat import chat
from mlpmem_cli.compare import compare
from mlpmem_cli.convert import convert
from mlpmem_cli.export import export
from mlpmem_cli.inspect import inspect
from mlpmem_cli.lm_eval import lm_eval
from mlpmem_cli.plan import plan
from mlpmem_cli.questions import questions
from mlpmem_cli.report import report
from mlpmem_cli.train import train
from mlpmem_cli.verify import verify
from mlpmem_rag import __version__
from mlpmem_rag.errors import MLPMemError
from mlpmem_rag.failures import is_out_of_memory

app = typer.Typer(
    name="mlpmem-rag",
    help="Train a memory on your documents; ask it without retrieval.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command()(train)
app.command()(plan)
app.command()(ask)
app.command()(chat)
app.command()(inspect)
app.command()(verify)
app.command()(questions)
app.command()(export)
app.command()(convert)
app.command("lm-eval", context_settings={"allow_extra_args": True, "ignore_unknown_options": True})(
    lm_eval
)
app.command()(compare)
app.command()(report)
app.command()(bench)

DEBUG_VARIABLE = "MLPMEM_DEBUG"


def _show_version(value: bool) -> None:
    if value:
        typer.echo(f"mlpmem-rag {__version__}")
        raise typer.Exit


@app.callback()
def options(
    debug: Annotated[
        bool, typer.Option("--debug", envvar=DEBUG_VARIABLE, help="Show a traceback on errors.")
    ] = False,
    version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version."),
    ] = False,
) -> None:
    """Train a memory on your documents; ask it without retrieval."""
    if debug:
        os.environ[DEBUG_VARIABLE] = "1"


def main() -> None:
    """Run the command; an expected error becomes one line on stderr."""
    try:
        app(prog_name="mlpmem-rag")
    except MLPMemError as error:
        fail(error, str(error))
    except BrokenPipeError:
        # The reader of a pipe has gone: nothing to report, and nothing may be flushed to it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        fail(error, "out of memory; end other programs, or use a machine with more")
    except OSError as error:
        fail(error, f"{error.strerror or error} ({error.filename or 'no file named'})")


def fail(error: Exception, message: str) -> None:
    """Print one line, or the traceback in debug mode, and exit with 1."""
    if os.environ.get(DEBUG_VARIABLE):
        traceback.print_exception(error)
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(1)
