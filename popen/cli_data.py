"""`popen data`: a data tree on the command line."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(help="Data trees in the layouts of MUSE, RefCOCO, ReasonSeg and GranD_f.")


@app.callback()
def data() -> None:
    """Data trees in the layouts of MUSE, RefCOCO, ReasonSeg and GranD_f."""


@app.command()
def check(
    root: Annotated[
        Path, typer.Argument(metavar="ROOT", help="The tree's folder.", exists=True, file_okay=False)
    ],
    splits: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[SPLIT]...", help="muse, reasonseg/test, ...", show_default="all that are published"
        ),
    ] = None,
    own: Annotated[
        bool, typer.Option("--own", help="Data of your own: compare no sizes, expect no other split.")
    ] = False,
    decode: Annotated[
        bool, typer.Option("--decode", help="Decode every image; else its header is read.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything found as JSON.")] = False,
    params: Annotated[
        Path | None,
        typer.Option(help="Parameter file: data.max_pixels, contract.", show_default="params.yaml"),
    ] = None,
) -> None:
    """Say what the tree holds, what is missing and what is broken; exit with 1 where anything is."""
    import json

    from popen import params as parameters
    from popen.data.check import check, names, table
    from popen.data.tree import specs
    from popen.pipeline import find_root

    settings = parameters.load(params or find_root(Path.cwd()) / "params.yaml")
    wanted = names(root, splits or [], own)
    if not specs(root) and not as_json:
        typer.echo(f"{root}: no split of any known layout in it; is it the right folder?\n")
    found = check(root, wanted, settings.data.max_pixels, settings.contract, own, decode)
    if as_json:
        typer.echo(json.dumps([one.to_dict() for one in found], indent=1, ensure_ascii=False))
    else:
        typer.echo(table(found))
    if not found or not all(one.ok for one in found):
        raise typer.Exit(1)
