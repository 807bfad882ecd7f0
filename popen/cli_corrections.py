"""`popen corrections`: answers for people to correct."""

from __future__ import annotations

import os

import typer

app = typer.Typer(help="Corrections of sampled answers by people (text_preferences.source: people).")


@app.callback()
def corrections() -> None:
    """With a callback, a group of one command keeps that command's name."""


@app.command()
def export() -> None:
    """Sample the answers that the stage `text_preferences` samples; write them to the file that it reads."""
    from pathlib import Path

    from popen import params as parameters
    from popen.pipeline import find_root
    from popen.stages.run import quiet

    os.chdir(find_root(Path.cwd()))
    quiet()
    params = parameters.load()

    from popen.preference.people import FOLDER, CorrectionsError, Export
    from popen.stages.artifacts import index, samples
    from popen.stages.text_preferences import MODEL, make

    if params.text_preferences.people is None:
        raise CorrectionsError("text_preferences.people.file is not set in params.yaml; name a file there")
    path = FOLDER / params.text_preferences.people.file
    if path.exists():
        raise CorrectionsError(f"{path} exists; name another file in text_preferences.people.file")
    for needed in (MODEL, index("preference")):
        if not needed.exists():
            raise CorrectionsError(f"{needed} is not there; run `dvc repro sft` first")
    source = Export()
    make(params, samples("preference"), source)
    source.write(path)
    typer.echo(f"wrote {len(source.lines)} answers to {path}")
