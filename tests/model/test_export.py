"""Exported models load back, through our path and transformers' own, and answer as before."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import LlavaForConditionalGeneration, LlavaProcessor
from typer.testing import CliRunner

from popen.cli import app
from popen.errors import ModelError
from popen.model.batches import Row
from popen.model.export import PARTS, export
from popen.model.language import load_tokenizer
from popen.model.segmenter import Segmenter
from popen.samples import Sample
from tests.conftest import CATEGORIES
from tests.model.llava import llava_params, write_llava, write_tower
from tests.model.test_language import same, step


@pytest.fixture
def trained(tmp_path: Path, picture: Image.Image, sample: Sample) -> Segmenter:
    """A few steps away from the weights that it started from, and saved in `trained`."""
    (tmp_path / "llava").mkdir()
    tower = write_tower(write_llava(tmp_path / "llava"), tmp_path)
    params = llava_params(tmp_path / "llava", tower)
    vision = params.vision.model_copy(update={"image_size": 48})  # another than LLaVA's
    torch.manual_seed(0)
    model = Segmenter(
        params.model_copy(update={"vision": vision}), load_tokenizer(tmp_path / "llava"), CATEGORIES
    )
    step(model.train(), picture, sample)
    model.eval().save(tmp_path / "trained")
    return model


def test_an_exported_model_gives_the_same_masks_and_words(
    trained: Segmenter, picture: Image.Image, sample: Sample, tmp_path: Path
) -> None:
    done = CliRunner().invoke(app, ["export", str(tmp_path / "trained"), str(tmp_path / "made")])
    assert done.exit_code == 0, done.output
    shutil.rmtree(tmp_path / "llava")  # the base model is in it
    shutil.move(tmp_path / "made", tmp_path / "moved")
    folder = tmp_path / "moved"
    same(trained, Segmenter.load(folder / PARTS), picture, sample)

    large = picture.resize((48, 48), Image.Resampling.NEAREST)
    inputs = LlavaProcessor.from_pretrained(folder)(
        images=large, text="USER: <image>\nWhat? ASSISTANT:", return_tensors="pt"
    )
    kind: Any = LlavaForConditionalGeneration
    theirs, report = kind.from_pretrained(folder, output_loading_info=True)
    assert not any(report.values())
    batch = trained.encoder.batch([large], [Row(0, "What?")])
    assert batch.input_ids.tolist() == inputs["input_ids"].tolist()
    with torch.no_grad():
        hidden = trained.hidden(batch, trained.image_tokens(trained.tower(batch.images), batch.images))
        mine = trained.causal.get_output_embeddings()(hidden)
        torch.testing.assert_close(theirs.eval()(**inputs).logits, mine, atol=1e-4, rtol=1e-4)


def test_what_is_no_llava_is_refused(mini_model: Segmenter, tmp_path: Path) -> None:
    mini_model.save(tmp_path / "small")
    with pytest.raises(ModelError, match="only a CLIP tower, shuffle 1, no tally and LoRA"):
        export(tmp_path / "small", tmp_path / "made")
    assert not (tmp_path / "made").exists()
