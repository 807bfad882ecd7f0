"""`popen models`: the registry on the command line."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient

app = typer.Typer(help="The registered models: which one is the champion, where each comes from.")


def _client() -> MlflowClient:
    from popen.pipeline import find_home, find_root
    from popen.promotion.registry import connect
    from popen.stages.run import quiet

    quiet()
    return connect(find_home(find_root(Path.cwd())))


@app.callback(invoke_without_command=True)
def models(context: typer.Context) -> None:
    """Alone: list the registered models with their lineage and what the gate said."""
    if context.invoked_subcommand is None:
        list_versions()


@app.command("list")
def list_versions() -> None:
    """List the registered models with their lineage and what the gate said."""
    from popen.promotion.listing import table

    typer.echo(table(_client()))


@app.command()
def rollback() -> None:
    """Make the previous champion the champion again (and once more: back to where it was)."""
    from popen.promotion.registry import rollback

    now, before = rollback(_client())
    typer.echo(f"the champion is version {now} again; version {before} is kept as previous")
