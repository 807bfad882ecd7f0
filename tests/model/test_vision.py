"""Vision towers: small ones of our own, and open_clip's by a change of parameters alone."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import open_clip
import pytest
import torch
from PIL import Image
from torch import Tensor

from popen.errors import ModelError
from popen.model.losses import sft_loss
from popen.model.segmenter import Segmenter
from popen.model.vision import MEAN, STD, Tower
from popen.params import ModelParams, VisionParams
from popen.samples import Sample
from tests.conftest import CATEGORIES, WEIGHTS, mini_params
from tests.model.test_segmenter import rows

VIT = "ViT-mini-8"  # ViT-L-14-336 in small: made by the same code of open_clip


@pytest.fixture(scope="module", autouse=True)
def _vit(tmp_path_factory: pytest.TempPathFactory) -> None:
    vision = {"image_size": 32, "layers": 4, "width": 64, "patch_size": 8}
    text = {"context_length": 8, "vocab_size": 64, "width": 16, "heads": 2, "layers": 1}
    folder = tmp_path_factory.mktemp("configs")
    (folder / f"{VIT}.json").write_text(json.dumps({"embed_dim": 16, "vision_cfg": vision, "text_cfg": text}))
    open_clip.add_model_config(folder)


def vit(size: int = 48, levels: tuple[int, ...] = (2, 0), pretrained: str = "") -> VisionParams:
    return VisionParams(name=VIT, pretrained=pretrained, image_size=size, levels=list(levels), shuffle=1)


def own(size: int, *levels: int) -> VisionParams:
    name = "timm:test_resnet"
    return VisionParams(name=name, pretrained="", image_size=size, levels=list(levels), shuffle=1)


def pixels(size: int, images: int = 2) -> Tensor:
    return torch.rand(images, 3, size, size, generator=torch.Generator().manual_seed(0))


def test_levels_are_blocks_and_equal_the_whole_networks_own() -> None:
    torch.manual_seed(0)
    tower = Tower(vit())
    assert tower.widths == [64, 64]
    assert tower.grids == [6, 6]
    whole = open_clip.create_model(VIT, force_image_size=48).visual.eval()
    state = tower.net.state_dict()
    assert not any("resblocks.3" in name or "ln_post" in name for name in state)  # cut off
    whole.load_state_dict(state, strict=False)
    images = pixels(48)
    normal = (images - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    expected = whole.forward_intermediates(normal, indices=[0, 2])["image_intermediates"]
    found = tower.eval()(images)
    torch.testing.assert_close(found[0], expected[1])
    torch.testing.assert_close(found[1], expected[0])


def test_weights_come_from_a_named_file(tmp_path: Path) -> None:
    torch.manual_seed(3)
    published = open_clip.create_model(VIT)
    torch.save(published.state_dict(), tmp_path / "clip.pt")
    tower = Tower(vit(size=32, pretrained=str(tmp_path / "clip.pt")))
    name = "transformer.resblocks.1.mlp.c_fc.weight"
    torch.testing.assert_close(tower.net.state_dict()[name], published.visual.state_dict()[name])


def test_positions_are_interpolated_to_the_image_size(tmp_path: Path) -> None:
    """A checkpoint for 32 pixels (4 x 4 places) read for 48 (6 x 6); all else as in the file, and frozen."""
    torch.manual_seed(3)
    published = open_clip.create_model(VIT)
    torch.save(published.state_dict(), tmp_path / "clip.pt")
    tower = Tower(vit(size=48, pretrained=str(tmp_path / "clip.pt")))
    whole, places = published.visual.state_dict(), tower.net.positional_embedding.detach()
    grid = whole["positional_embedding"][1:].view(1, 4, 4, 64).permute(0, 3, 1, 2)
    larger = torch.nn.functional.interpolate(grid, size=(6, 6), mode="bicubic", antialias=True)
    torch.testing.assert_close(places[1:], larger[0].flatten(1).T)
    torch.testing.assert_close(places[0], whole["positional_embedding"][0])  # the class token's
    rest = {name: value for name, value in tower.net.state_dict().items() if name != "positional_embedding"}
    assert all(torch.equal(value, whole[name]) for name, value in rest.items())
    assert not any(parameter.requires_grad for parameter in tower.parameters())


def test_openais_weights_ask_for_their_activation() -> None:
    kinds = {
        pretrained: type(Tower(vit(pretrained=pretrained), False).net.transformer.resblocks[0].mlp.gelu)
        for pretrained in ("openai", "")
    }
    assert kinds == {"openai": open_clip.transformer.QuickGELU, "": torch.nn.GELU}


def test_a_tower_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    file = tmp_path / "clip.pt"
    state = open_clip.create_model(VIT).state_dict()
    torch.save({name: value for name, value in state.items() if name != "visual.conv1.weight"}, file)
    with pytest.raises(ModelError, match=r"Missing key.*visual\.conv1\.weight"):
        Tower(vit(pretrained=str(file)))
    torch.save(state, file)
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(ModelError, match=f"{VIT} with the weights '{file}' cannot be built"):
        Tower(vit(pretrained=str(file)))
    with pytest.raises(ModelError, match="not a known tag or valid file"):
        Tower(vit(pretrained="openay"))
    with pytest.raises(ModelError, match="cannot be built"):
        Tower(vit(levels=(7, 0)))
    for name, levels in (("timm:resnot", [0]), ("timm:test_resnet", [9])):
        own = VisionParams(name=name, pretrained="", image_size=32, levels=levels, shuffle=1)
        with pytest.raises(ModelError, match=f"{name} with the levels .* cannot be built"):
            Tower(own)


def test_a_named_tower_is_a_change_of_parameters_alone(
    mini_model: Segmenter, picture: Image.Image, sample: Sample, tmp_path: Path
) -> None:
    raw = mini_params().model_dump()
    raw["vision"] = vit(32, (3, 1)).model_dump()
    model = Segmenter(ModelParams.model_validate(raw), copy.deepcopy(mini_model.tokenizer), CATEGORIES)
    assert model.encoder.image_tokens == 16
    batch = model.encoder.batch([picture], rows(sample))
    output = model(batch)
    assert output.masks.shape == (3, 32, 32)
    sft_loss(output, batch, WEIGHTS)[0].backward()
    assert all(p.grad is not None for name, p in model.named_parameters() if name.startswith("tower."))
    model.eval().save(tmp_path)
    torch.testing.assert_close(Segmenter.load(tmp_path)(batch).masks, model(batch).masks)


def test_a_small_tower_of_our_own() -> None:
    tower = Tower(own(64, 2, 1))
    features = tower.eval()(pixels(64))
    assert [f.shape[-1] for f in features] == tower.grids == [8, 16]  # from coarse to fine
    assert [f.shape[1] for f in features] == tower.widths
    first, second = Tower(own(64, 1, 1)).eval()(pixels(64))
    torch.testing.assert_close(first, second)


def test_shuffled_image_tokens_hold_every_patch(mini_model: Segmenter, picture: Image.Image) -> None:
    raw = mini_params().model_dump()
    raw["vision"]["shuffle"] = 2
    model = Segmenter(ModelParams.model_validate(raw), copy.deepcopy(mini_model.tokenizer), CATEGORIES).eval()
    assert model.encoder.image_tokens == mini_model.encoder.image_tokens // 4
    features = model.tower(pixels(32, 1))[0].detach().requires_grad_()
    tokens = model.projector(features)
    assert tokens.shape == (1, 4, 32)
    tokens[0, 0].sum().backward()  # the first token is made of the four patches of its corner
    used = features.grad.abs().sum((0, 1)) > 0
    expected = torch.zeros_like(used)
    expected[:2, :2] = True
    assert torch.equal(used, expected)
