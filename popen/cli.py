"""The command `popen`. Heavy imports are made by the commands that need them: `--help` answers at once."""

from __future__ import annotations

import contextlib
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from popen import cli_corrections, cli_data, cli_models
from popen.errors import explain
from popen.pipeline import CloneError, find_root
from popen.stages.artifacts import BUNDLE

if TYPE_CHECKING:
    from popen.evaluation.prediction import Prediction

app = typer.Typer(
    help="Reasoning segmentation with preference alignment: ask about an image, get words and masks.\n\n"
    "`make repro` trains and benchmarks the models; `popen predict` uses them.",
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
app.add_typer(cli_data.app, name="data")
app.add_typer(cli_models.app, name="models")
app.add_typer(cli_corrections.app, name="corrections")


class UsageError(ValueError):
    """What was asked for cannot be done; the message says why and what to do."""


@app.command()
def scenes(
    out: Annotated[Path, typer.Argument(help="Folder to make; it must not exist or be empty.")],
    params: Annotated[
        Path | None,
        typer.Option(help="Parameter file; its group `scenes` is used.", show_default="params.yaml"),
    ] = None,
) -> None:
    """Draw table-top scenes and write them in the layouts of MUSE, RefCOCO, ReasonSeg and GranD_f."""
    from popen import params as parameters
    from popen.data.scenes.export import write_tree

    _must_be_new(out)
    write_tree(out, parameters.load(params or find_root(Path.cwd()) / "params.yaml").scenes)
    typer.echo(f"wrote {out}")


@app.command()
def export(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="A trained model on LLaVA-1.5.")],
    folder: Annotated[
        Path, typer.Argument(metavar="FOLDER", help="Folder to make; it must not exist or be empty.")
    ],
) -> None:
    """Write MODEL as a LLaVA-1.5 in the hub's layout, adapters merged, with its masks' part beside it."""
    from popen.stages.run import quiet

    _must_be_new(folder)
    quiet()

    from popen.model.export import PARTS
    from popen.model.export import export as write

    write(model / "model" if (model / "settings.json").is_file() else model, folder)
    typer.echo(f"wrote {folder} (words) and {folder / PARTS} (masks; popen predict --model reads it)")


def _must_be_new(folder: Path) -> None:
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UsageError(f"{folder} exists and is not an empty folder; name another one or remove it")


@app.command()
def plan(
    model: Annotated[
        str | None,
        typer.Option(
            metavar="NAME", help="A model of conf/model, such as llava-7b.", show_default="params.yaml"
        ),
    ] = None,
) -> None:
    """Say how many parameters a configuration has and which train, and what memory a step of SFT takes.

    Takes half a minute for a large one, and downloads nothing.
    """
    from popen import params as parameters
    from popen.stages.run import quiet

    quiet()
    root = find_root(Path.cwd())
    chosen = parameters.compose(root / "conf", [f"model={model}"] if model else [])

    from popen.footprint import table

    typer.echo(table(chosen))


@app.command()
def predict(
    image: Annotated[Path, typer.Argument(metavar="IMAGE", help="JPEG, PNG, WebP, BMP, TIFF or GIF file.")],
    question: Annotated[
        str, typer.Argument(metavar="QUESTION", help='For example: "what would i need to eat soup?"')
    ],
    model: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="A trained model.", show_default=str(BUNDLE)),
    ] = None,
    ensemble: Annotated[
        int, typer.Option(min=1, metavar="N", help="Members of the preference ensemble; 1: one answer.")
    ] = 1,
    out: Annotated[
        Path | None,
        typer.Option(metavar="FILE.png", help="Picture of the answer.", show_default="<image>_answer.png"),
    ] = None,
    json_file: Annotated[
        Path | None,
        typer.Option(
            "--json", metavar="FILE.json", help="Masks and scores.", show_default="<image>_answer.json"
        ),
    ] = None,
    threshold: Annotated[
        float | None,
        typer.Option(
            metavar="LOGIT",
            help="Above it a pixel belongs to a mask.",
            show_default="calibrated on validation",
        ),
    ] = None,
) -> None:
    """Answer QUESTION about IMAGE: print the words, write the masks as a picture and as JSON.

    A photograph is turned as its EXIF data says, and the masks are of the turned one.
    """
    from popen.data.images import MAX_PIXELS, open_image
    from popen.stages.run import quiet

    quiet()

    if not question.strip():
        raise UsageError(
            'the question is empty; ask one, for example "where is the second cup from the left?"'
        )
    if model is None:  # that of the clone, from whichever of its folders
        with contextlib.suppress(CloneError):
            model = find_root(Path.cwd()) / BUNDLE
        model = model or BUNDLE
    if not any((model / name).is_file() for name in ("settings.json", "config.json")):
        raise UsageError(f"{model}: no model there; run `make repro` first or name another one with --model")
    path = image.resolve()
    opened = open_image(path.parent, path.name, MAX_PIXELS)
    picture = out or Path(f"{image.stem}_answer.png")
    record = json_file or Path(f"{image.stem}_answer.json")
    for file in (picture, record):
        if not file.parent.is_dir():
            raise UsageError(f"{file}: the folder {file.parent} does not exist; make it first")

    from popen.predict import Predictor

    prediction = Predictor(model)(opened, question, ensemble, threshold)

    from popen.evaluation.overlay import overlay
    from popen.masks import decode

    typer.echo(spoken(prediction))
    masks = [decode(rle) for rle in prediction.masks]
    overlay(opened, masks, prediction.text, question, size=960).save(picture, format="PNG")
    record.write_text(to_json(prediction, image, question), encoding="utf-8")
    typer.echo(f"wrote {shown(picture)} and {shown(record)}", err=True)


def shown(path: Path) -> str:
    """A path as text; of a name that is not UTF-8 the odd bytes are replaced."""
    return os.fsencode(path).decode("utf-8", "replace")


def spoken(prediction: Prediction) -> str:
    """The answer in words alone: "the cup {seg}." -> "the cup."."""
    from popen.evaluation.overlay import pieces

    return " ".join("".join(words for words, _ in pieces(prediction.text)).split())


def to_json(prediction: Prediction, image: Path, question: str) -> str:
    """A prediction as JSON: answer, one {name, rle, area} a mask (RLE and pixels), and the scores."""
    import json

    from popen.evaluation.overlay import pieces
    from popen.masks import area

    names = {target: words for words, target in pieces(prediction.text) if target is not None}
    masks = [
        {"name": names.get(index, ""), "rle": rle, "area": area(rle)}
        for index, rle in enumerate(prediction.masks)
    ]
    scores = {"loglik": prediction.loglik, "confidence": prediction.confidence}
    record = {
        "image": shown(image),
        "question": question,
        "answer": prediction.text,
        "masks": masks,
        "scores": scores,
        "seconds": prediction.seconds,
    }
    return json.dumps(record, indent=1, ensure_ascii=False) + "\n"


def main() -> None:
    """Run the command line; errors that are written to be read are printed as one line, with code 1."""
    try:
        app()
    except Exception as error:
        text = explain(error)
        if text is None and isinstance(error, OSError) and error.filename:
            text = f"{error.filename}: {(error.strerror or 'cannot be used').lower()}; name another place"
        if text is None or os.environ.get("POPEN_DEBUG"):
            raise
        print(f"popen: error: {text}", file=sys.stderr)
        raise SystemExit(1) from None
