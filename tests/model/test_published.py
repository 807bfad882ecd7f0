"""LLaVA-1.5 from the hub's layout: the same numbers as transformers' own, and every fault named."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlavaForConditionalGeneration, LlavaProcessor

from popen.errors import ModelError
from popen.model.batches import Row
from popen.model.generate import _text
from popen.model.language import load_tokenizer
from popen.model.segmenter import Segmenter
from popen.params import ModelParams
from popen.samples import Sample
from tests.conftest import CATEGORIES
from tests.model.llava import SIZE, llava_params, write_llava, write_tower
from tests.model.test_language import same, step
from tests.model.test_segmenter import rows

Disk = tuple[Path, Path]  # folder of the LLaVA, file of its tower


@pytest.fixture(scope="module")
def disk(tmp_path_factory: pytest.TempPathFactory) -> Disk:
    folder = tmp_path_factory.mktemp("llava-1.5-mini-hf")
    return folder, write_tower(write_llava(folder), tmp_path_factory.mktemp("tower"))


def build(params: ModelParams) -> Segmenter:
    torch.manual_seed(0)
    return Segmenter(params, load_tokenizer(params.language.name), CATEGORIES)


def test_the_folder_has_the_layout_of_the_hub(disk: Disk) -> None:
    index = json.loads((disk[0] / "model.safetensors.index.json").read_text())["weight_map"]
    assert len(set(index.values())) > 2
    assert {name.split(".")[0] for name in index} == {
        "language_model",
        "multi_modal_projector",
        "vision_tower",
    }
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "processor_config.json"):
        assert (disk[0] / name).is_file()


def test_logits_are_those_of_transformers_own_llava(disk: Disk) -> None:
    """Same image, same question: the same token ids, and logits within 1e-4 at every place."""
    model = build(llava_params(*disk)).eval()
    picture = Image.fromarray(np.random.default_rng(5).integers(0, 255, (SIZE, SIZE, 3), dtype=np.uint8))
    question = "What could I drink from?"
    theirs = LlavaForConditionalGeneration.from_pretrained(disk[0]).eval()
    inputs = LlavaProcessor.from_pretrained(disk[0])(
        images=picture, text=f"USER: <image>\n{question} ASSISTANT:", return_tensors="pt"
    )
    batch = model.encoder.batch([picture], [Row(0, question)])
    assert batch.input_ids.tolist() == inputs["input_ids"].tolist()
    with torch.no_grad():
        expected = theirs(**inputs).logits
        features = model.tower(batch.images)
        found = model.causal.get_output_embeddings()(
            model.hidden(batch, model.image_tokens(features, batch.images))
        )
    known = model.encoder.first_id  # codebook rows come behind
    assert found.shape == (1, inputs["input_ids"].shape[1], len(model.tokenizer))
    assert float((found[..., :known] - expected[..., :known]).abs().max()) < 1e-4
    assert float(expected.std()) > 0.5  # far from nothing
    other = model.tower(model.encoder.batch([picture.rotate(90)], [Row(0, question)]).images)
    moved = model.causal.get_output_embeddings()(model.hidden(batch, model.image_tokens(other, batch.images)))
    assert float((moved[..., :known] - expected[..., :known]).abs().max()) > 1e-2  # the image matters


def test_answers_survive_a_tokenizer_of_llamas_kind(disk: Disk) -> None:
    model = build(llava_params(*disk))
    codebook = model.tokenizer.convert_tokens_to_ids(model.encoder.codebook)
    for answer in (
        "It is the cup {seg} and the fork {seg}.",
        "It is {seg}.",
        "Nothing.",
        "Ünknown {seg}, ok",
    ):
        *ids, end = model.encoder.answer_ids(answer)
        assert end == model.tokenizer.eos_token_id
        assert _text(model.tokenizer, ids, codebook) == answer
        assert "▁▁" not in "".join(model.tokenizer.convert_ids_to_tokens(ids)[:2])


def test_codebook_rows_leave_the_old_rows_bit_identical(disk: Disk) -> None:
    model, state = build(llava_params(*disk)), dict[str, Tensor]()
    for shard in disk[0].glob("*.safetensors"):
        state |= load_file(shard)
    known, tokens = model.encoder.first_id, len(model.encoder.codebook)
    assert len(model.tokenizer) == known + tokens  # <image> was there
    ends = {
        "language_model.model.embed_tokens.weight": model.language.get_input_embeddings(),
        "language_model.lm_head.weight": model.language.get_output_embeddings(),
    }
    for name, part in ends.items():
        assert torch.equal(part.weight[:known], state[name][:known])
        mean = state[name][:known].mean(0).expand(tokens, -1)
        torch.testing.assert_close(part.weight[known:].detach(), mean)


def test_what_trains_and_what_is_saved(
    disk: Disk, picture: Image.Image, sample: Sample, tmp_path: Path
) -> None:
    model = build(llava_params(*disk)).train()
    moved = step(model, picture, sample)
    whole = {name.split(".")[0] for name in moved} - {"language"}
    assert whole == {"projector", "codebook", "neck", "decoder"}
    language = {
        name.removeprefix("language.base_model.model.") for name in moved if name.startswith("language.")
    }
    adapters = {
        f"model.layers.{layer}.self_attn.{part}.lora_{side}.default.weight"
        for layer in (0, 1)
        for part in ("q_proj", "v_proj")
        for side in "AB"
    }
    rows_of = {
        f"{part}.token_adapter.trainable_tokens_delta.default" for part in ("model.embed_tokens", "lm_head")
    }
    assert language == adapters | rows_of
    shapes = {p.shape[0] for name, p in model.named_parameters() if "trainable_tokens_delta" in name}
    assert shapes == {len(model.encoder.codebook)}  # not the whole matrices
    model.eval().save(tmp_path)
    kept = set(load_file(tmp_path / "model.safetensors"))
    assert {name for name in kept if name.startswith("language.")} == {n for n in moved if "language." in n}
    assert not any(name.startswith("tower.") for name in kept)
    same(model, Segmenter.load(tmp_path), picture, sample)
    model.requires_grad_(False)  # what a stage freezes later is saved all the same
    model.save(tmp_path / "again")
    assert set(load_file(tmp_path / "again" / "model.safetensors")) == kept


def test_merged_weights_give_the_same_answers(disk: Disk, picture: Image.Image, sample: Sample) -> None:
    model = build(llava_params(*disk)).train()
    step(model, picture, sample)
    batch = model.eval().encoder.batch([picture], rows(sample))
    with torch.no_grad():
        hidden = model.hidden(batch, model.image_tokens(model.tower(batch.images), batch.images))
        before = model.causal.get_output_embeddings()(hidden)
        merged = model.language.merge_and_unload()
        places = (batch.attention_mask.cumsum(1) - 1).clamp(min=0)
        ids, features = batch.input_ids, model.tower(batch.images)
        after = merged(
            inputs_embeds=merged.get_input_embeddings()(ids).masked_scatter(
                (ids == model.encoder.image_id).unsqueeze(-1),
                model.projector(features[0])[batch.image_of_row],
            ),
            attention_mask=batch.attention_mask,
            position_ids=places,
        ).logits
    assert not any("lora" in name or "token_adapter" in name for name in merged.state_dict())
    seen = batch.attention_mask.bool()
    torch.testing.assert_close(after[seen], before[seen], atol=1e-4, rtol=1e-4)


def test_checkpointing_changes_no_number(disk: Disk, picture: Image.Image, sample: Sample) -> None:
    """Whole rows and blocks computed twice, against the shared prefix: the same loss gradients."""
    gradients, outputs = [], []
    for on in (False, True):
        model = build(llava_params(*disk, checkpointing=on)).train()
        assert model.causal.is_gradient_checkpointing is on
        output = model(model.encoder.batch([picture], rows(sample)))
        (output.logits.square().mean() + output.masks.square().mean()).backward()
        outputs.append(output)
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    torch.testing.assert_close(outputs[0].logits, outputs[1].logits, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(outputs[0].masks, outputs[1].masks, atol=1e-4, rtol=1e-4)
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], atol=1e-4, rtol=1e-3, msg=name)


def test_frozen_weights_in_bfloat16_and_what_trains_in_float32(
    disk: Disk, picture: Image.Image, sample: Sample
) -> None:
    model = build(llava_params(*disk, dtype="bfloat16")).train()
    kinds = {p.requires_grad: p.dtype for name, p in model.named_parameters() if name.startswith("language.")}
    assert kinds == {True: torch.float32, False: torch.bfloat16}
    assert any("lora_A" in name for name in step(model, picture, sample))
    exact = build(llava_params(*disk)).eval()
    batch = exact.encoder.batch([picture], rows(sample))
    with torch.no_grad():
        near, logits = build(llava_params(*disk, dtype="bfloat16")).eval()(batch).logits, exact(batch).logits
    assert float((near - logits).abs().max()) < 0.1 * float(logits.abs().max())


def _missing_shard(folder: Path) -> None:
    next(folder.glob("model-00002*")).unlink()


def _half_a_shard(folder: Path) -> None:
    shard = next(folder.glob("model-00002*"))
    shard.write_bytes(shard.read_bytes()[: shard.stat().st_size // 2])


def _weights_left_out(folder: Path) -> None:
    shard = next(path for path in folder.glob("model-*") if len(load_file(path)) > 1)
    state = load_file(shard)
    gone = sorted(state)[0]
    save_file({k: v for k, v in state.items() if k != gone}, shard, {"format": "pt"})
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    del index["weight_map"][gone]
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def _more_layers_in_the_files(folder: Path) -> None:
    _configure(folder, "text_config", "num_hidden_layers", 1)


def _wider_than_the_files(folder: Path) -> None:
    _configure(folder, "text_config", "intermediate_size", 96)


def _configure(folder: Path, group: str, key: str, value: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    config[group][key] = value
    (folder / "config.json").write_text(json.dumps(config))


def _no_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def _no_tokenizer(folder: Path) -> None:
    for path in folder.glob("tokenizer*"):
        path.unlink()


def _other_image_token(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"image_token_index": 7}))


@pytest.mark.parametrize(
    ("spoil", "problem"),
    [
        (_missing_shard, "the weights cannot be read"),
        (_half_a_shard, r"the weights of model-00002-of-\d+\.safetensors cannot be read"),
        (_weights_left_out, "missing keys: "),
        (_more_layers_in_the_files, "unexpected keys: .*layers"),
        (_wider_than_the_files, r"mismatched keys: .*mlp.*64"),
        (_no_config, r"no usable config\.json"),
        (_no_tokenizer, "no usable tokenizer|another model's tokenizer"),
        (_other_image_token, "another model's tokenizer"),
    ],
)
def test_a_spoilt_folder_gives_one_clear_error(
    disk: Disk, tmp_path: Path, spoil: Callable[[Path], None], problem: str
) -> None:
    folder = tmp_path / "llava"
    shutil.copytree(disk[0], folder)
    spoil(folder)
    with pytest.raises(ModelError, match=problem) as caught:
        build(llava_params(folder, disk[1]))
    assert "\n" not in str(caught.value)


def test_parameters_that_do_not_fit_llava_are_named(disk: Disk) -> None:
    params = llava_params(*disk)
    for change, problem in (
        ({"levels": [3, 1]}, r"levels must begin with 2, not 3"),
        ({"shuffle": 2}, r"set model\.vision\.shuffle to 1"),
    ):
        vision = params.vision.model_copy(update=change)
        with pytest.raises(ModelError, match=problem):
            build(params.model_copy(update={"vision": vision}))


def test_a_foreign_tokenizer_is_refused(disk: Disk) -> None:
    params = llava_params(*disk)
    tokenizer = load_tokenizer(disk[0])
    tokenizer.add_tokens([f"word{number}" for number in range(20)])  # more than the weights have rows
    with pytest.raises(ModelError, match="another model's tokenizer"):
        Segmenter(params, tokenizer, CATEGORIES)
