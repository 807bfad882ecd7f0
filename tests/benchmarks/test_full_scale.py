"""The benchmark at miniature size, in the shape it has at full size: a bf16 language model with LoRA."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.flops import Flops
from benchmarks.full_scale import run
from benchmarks.measuring import table
from benchmarks.setting import PIXELLM, Scale, build, draw, llava_7b
from popen.ensemble.attention import RefinementAttention
from popen.ensemble.members import Ensemble
from popen.ensemble.score import FEATURES, Score
from popen.params import load
from popen.preference.alignment import align_loss, collate

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def scale(tmp_path_factory: pytest.TempPathFactory) -> Scale:
    """The 7B configuration with every number made small."""
    from transformers import LlamaConfig

    folder = tmp_path_factory.mktemp("config")
    full = llava_7b(folder).model
    config = LlamaConfig.from_pretrained(folder)
    sizes = {"hidden_size": 64, "intermediate_size": 1024, "num_hidden_layers": 2, "num_attention_heads": 4}
    config.update(sizes | {"vocab_size": 500, "num_key_value_heads": 4, "head_dim": 16})
    config.save_pretrained(folder)
    vision = full.vision.model_copy(update={"name": "timm:test_resnet", "image_size": 32, "levels": [2, 1]})
    language = full.language.model_copy(update={"vocab": 500})
    decoder = full.decoder.model_copy(update={"width": 16, "heads": 2})
    model = full.model_copy(update={"vision": vision, "language": language, "decoder": decoder})
    return Scale(model, images=(2,), answers=3, asked=2, alone=2, words=20, steps=2)


def test_every_part_is_measured(scale: Scale, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    records = run(scale, CPU, ("sft", "align", "generate", "ensemble"), 1e9, out, tmp_path)
    assert [r["name"] for r in records if "failed" in r] == []
    assert [json.loads(line) for line in out.read_text().splitlines()] == records
    by_name = {record["name"]: record for record in records}
    assert by_name["sft (2 images)"]["rows"] == 4
    assert all(r["seconds"] > 0 for r in records if "seconds" in r)
    written = [r for r in records if "targets" in r]
    assert len(written) == 5
    assert all(r["targets"] >= 1 * r["answers"] for r in written)  # the random model writes targets
    assert sum("ratio" in r for r in records) == 5
    assert len(table(records).splitlines()) == 2 + len(records)


def test_a_failing_measurement_is_told_and_the_rest_go_on(scale: Scale, tmp_path: Path) -> None:
    broken = dataclasses.replace(scale, words=0)
    records = run(broken, CPU, ("generate", "sft"), 1e9, tmp_path / "out.jsonl", tmp_path)
    assert [r["name"] for r in records if "failed" not in r] == ["build", "sft (2 images)"]
    late = run(scale, CPU, ("sft",), 0.0, tmp_path / "out.jsonl", tmp_path)
    assert late[-1]["failed"] == "no time left"


def test_bf16_forward_backward_and_ensemble(scale: Scale, tmp_path: Path) -> None:
    model = build(scale, CPU)
    assert model.causal.lm_head.weight.dtype == torch.bfloat16
    work, params = draw(model, tmp_path, 2), load()
    batch = collate(model, tmp_path, 10**8, work.masks)(work.pairs)
    model.train()
    with torch.autocast("cpu", torch.bfloat16):
        for form in ("embedding", "mask"):
            wanted = params.align.model_copy(update={"mask_form": form})
            loss, _ = align_loss(wanted, PIXELLM)(model, batch)
            loss.backward()
            assert torch.isfinite(loss)
    learnt = {name.split(".")[0] for name, p in model.named_parameters() if p.grad is not None}
    assert {"language", "projector", "codebook", "neck", "decoder"} <= learnt
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)
    attention = RefinementAttention(model.codebook.scales, model.params.decoder.width)
    score = Score(FEATURES, (0.0,) * 3, (1.0,) * 3, (1.0, 0.0, 0.0))
    with torch.autocast("cpu", torch.bfloat16):
        for mode in ("attention", "mean", "best", "probability"):
            settings = params.ensemble.model_copy(update={"mode": mode})
            system = Ensemble(model.eval(), None, score, attention, settings, 0.0)
            said = system.answer(work.images, work.questions, 3, 20, 0)
            assert all(torch.isfinite(answer.masks).all() and len(answer.masks) for answer in said)


def test_the_formula_against_torchs_counter(scale: Scale, tmp_path: Path) -> None:
    """Torch counts padding and the half of the attention that causality leaves out, a few per cent here."""
    model = build(scale, CPU)
    work = draw(model, tmp_path, 2)
    batch = collate(model, tmp_path, 10**8, work.masks)(work.pairs).batch
    flops, prefix = Flops.of(model), len(model.encoder.prefix_ids)
    features = model.tower(batch.images)
    rests = batch.attention_mask[:, prefix:].sum(1).tolist()
    # the head, the projector and the tower are not the blocks'
    blocks = dataclasses.replace(flops, head=0, projector=0.0, tower=0.0)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.hidden(batch, model.image_tokens(features, batch.images))
    forward = counter.get_flop_counts()["LlamaModel"]
    assert sum(forward.values()) == pytest.approx(blocks.forward(2, prefix, rests, 0), rel=0.15)
    with FlopCounterMode(display=False) as counter:
        model.hidden(batch, model.image_tokens(features, batch.images)).float().square().mean().backward()
    step = counter.get_flop_counts()["LlamaModel"]
    assert sum(step.values()) == pytest.approx(blocks.step(batch, prefix), rel=0.15)
