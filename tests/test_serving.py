"""The model as MLflow serves it: logged from code, loaded again, asked, and given bad requests."""

from __future__ import annotations

import base64
import io
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pandas as pd
import pytest
from PIL import Image

from popen.data.images import ImageError
from popen.ensemble.attention import RefinementAttention
from popen.model.segmenter import Segmenter
from popen.predict import Predictor, write_bundle
from popen.samples import Sample
from popen.serving import read_image
from popen.serving_errors import RequestError
from popen.stages.model_record import log_model
from popen.stages.run import QUIET, stage
from tests.test_predict import SCORE, settings

Data = tuple[Path, list[Sample]]


@pytest.fixture(scope="module")
def bundle(taught: Segmenter, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("bundle")
    taught.save(root / "saved")
    attention = RefinementAttention(taught.codebook.scales, taught.params.decoder.width)
    write_bundle(root / "bundle", root / "saved", None, SCORE, attention, settings())
    return root / "bundle"


@pytest.fixture(scope="module")
def served(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Recorded by a stage in a folder of its own and loaded from there, as `mlflow models serve` does."""
    root = tmp_path_factory.mktemp("clone")
    (root / ".dvc").mkdir()
    shutil.copy(Path(__file__).parents[1] / "params.yaml", root)
    with pytest.MonkeyPatch.context() as patch:
        for name in (*QUIET, "HF_HUB_OFFLINE", "MLFLOW_RUN_ID", "MLFLOW_TRACKING_URI", "POPEN_PARENT_RUN"):
            patch.setenv(name, "")  # the stage sets some of them: taken back afterwards
            patch.delenv(name)
        patch.syspath_prepend(str(root))  # MLflow puts the recorded code before it: taken back too
        patch.chdir(root)
        before = mlflow.get_tracking_uri()
        with stage("calibrate") as run:
            log_model(run, bundle)
        files = [path for path in (root / "mlartifacts").rglob("*") if path.is_file()]
        assert {"serving.py", "settings.json", "model.safetensors"} <= {path.name for path in files}
        assert not {".pkl", ".pickle", ".bin", ".pt"} & {path.suffix for path in files}
        assert run.tracker.run_id is not None
        yield mlflow.pyfunc.load_model(f"runs:/{run.tracker.run_id}/popen")
        mlflow.set_tracking_uri(before)


def ask(served: Any, image: str, question: str, **params: Any) -> dict[str, Any]:
    (answer,) = served.predict(pd.DataFrame({"image": [image], "question": [question]}), params=params)
    return dict(answer)


def test_paths_and_base64_give_the_predictors_answers(served: Any, bundle: Path, data: Data) -> None:
    root, samples = data
    predict = Predictor(bundle)
    paths = [root / sample.image for sample in samples]
    encoded = [base64.b64encode(path.read_bytes()).decode() for path in paths]
    frame = pd.DataFrame(
        {"image": [str(paths[0]), encoded[1], encoded[2]], "question": [s.question for s in samples[:3]]}
    )
    answers = served.predict(frame)
    assert len(answers) == 3
    for answer, path, sample in zip(answers, paths, samples, strict=False):
        expected = predict(Image.open(path), sample.question)
        assert answer["answer"] == expected.text == sample.answer
        assert answer["masks"] == [dict(mask) for mask in expected.masks]
        assert answer["scores"] == pytest.approx(
            {"loglik": expected.loglik, "confidence": expected.confidence}
        )
        assert answer["seconds"] > 0


def test_a_photograph_is_asked_as_it_is_seen(served: Any, bundle: Path, data: Data, tmp_path: Path) -> None:
    root, samples = data
    seen, exif = Image.open(root / samples[0].image).convert("RGB").resize((40, 20)), Image.Exif()
    exif[0x0112] = 6
    seen.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "phone.png", exif=exif)
    answer = ask(served, str(tmp_path / "phone.png"), samples[0].question)
    found = Predictor(bundle)(seen, samples[0].question)
    assert (answer["answer"], answer["masks"]) == (found.text, [dict(mask) for mask in found.masks])
    assert all(mask["size"] == [20, 40] for mask in answer["masks"])
    assert answer["masks"]


def test_parameters_reach_the_predictor(served: Any, bundle: Path, data: Data) -> None:
    root, samples = data
    path, question = root / samples[0].image, samples[0].question
    expected = Predictor(bundle)(Image.open(path), question, members=2, threshold=-1.0)
    found = ask(served, str(path), question, members=2, threshold=-1.0)
    assert (found["answer"], found["masks"]) == (expected.text, [dict(mask) for mask in expected.masks])
    assert found["masks"] != ask(served, str(path), question)["masks"]


@pytest.mark.parametrize("members", [0, 65])
def test_the_number_of_members_has_limits(served: Any, data: Data, members: int) -> None:
    root, samples = data
    with pytest.raises(Exception, match=f"members: 1 to 64, not {members}"):
        ask(served, str(root / samples[0].image), "What?", members=members)


def test_an_empty_question_is_refused(served: Any, data: Data) -> None:
    root, samples = data
    with pytest.raises(Exception, match="question: it is empty"):
        ask(served, str(root / samples[0].image), " \n")


def encode(image: Image.Image, form: str = "PNG") -> str:
    file = io.BytesIO()
    image.save(file, form)
    return base64.b64encode(file.getvalue()).decode()


@pytest.mark.parametrize("size", [(1, 1), (24, 24), (64, 48)])
def test_images_of_every_size_come_back(size: tuple[int, int]) -> None:
    """Also those whose base64 text is short enough for a path but too long for a file's name."""
    pixels = np.random.default_rng(0).integers(0, 40, (*size, 3), dtype=np.uint8)
    found = read_image(encode(Image.fromarray(pixels)))
    np.testing.assert_array_equal(np.asarray(found), pixels)
    black = encode(Image.new("RGB", (12, 12)), "BMP")
    assert max(map(len, black.split("/"))) > 255
    assert len(black) < 1024
    assert read_image(black).size == (12, 12)


def test_what_is_no_image_is_refused_in_one_line(tmp_path: Path) -> None:
    for text in ("", "no such file.png", "ä", "../../etc/passwd", "aGVsbG8=", "a" * 5000):
        with pytest.raises((RequestError, ImageError)) as caught:
            read_image(text)
        assert str(caught.value).startswith("image: ")
        assert "\n" not in str(caught.value)
    broken = encode(Image.new("RGB", (64, 64), "red"))
    with pytest.raises(ImageError, match="not a readable image"):
        read_image(base64.b64encode(base64.b64decode(broken)[:80]).decode())
    (tmp_path / "text.png").write_text("text")
    with pytest.raises(ImageError, match="not a readable image"):
        read_image(str(tmp_path / "text.png"))


@pytest.mark.parametrize("side", [7000, 15000])
def test_a_giant_is_refused_before_it_is_decoded(side: int) -> None:
    """49 million pixels are above our limit, 225 million above Pillow's own."""
    giant = encode(Image.new("1", (side, side)))
    assert len(giant) < 200_000
    with pytest.raises(ImageError, match=rf"{side} x {side} pixels are more than|far too large"):
        read_image(giant)


def test_only_formats_of_pictures_are_opened() -> None:
    """Pillow would run Ghostscript on a PostScript file."""
    script = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 4 4\n%%EndComments\nshowpage\n%%EOF\n"
    with pytest.raises(ImageError, match="not a readable image"):
        read_image(base64.b64encode(script).decode())
