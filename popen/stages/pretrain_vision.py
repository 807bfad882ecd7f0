"""Stage `pretrain_vision`: an own tower learns to name and paint every pixel; a named one needs none."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from popen.stages.artifacts import VISION, index, samples
from popen.stages.run import Run, stage


def pretrain(run: Run) -> None:
    import torch
    from safetensors.torch import save_file
    from torch import Tensor, nn

    from popen.data.images import open_image
    from popen.model.dense import (
        DenseTower,
        Pixels,
        categories_of,
        dense_accuracy,
        dense_labels,
        dense_loss,
        image_array,
        paint_loss,
    )
    from popen.model.tally import centre_labels, centre_loss, count_accuracy
    from popen.samples import Sample
    from popen.stages.learning import fit, image_plan

    params, train_samples = run.params, samples("train")
    categories = categories_of(train_samples)
    root, size = Path(params.data.root), params.model.vision.image_size
    torch.manual_seed(params.seed)
    model = DenseTower(params.model, categories)

    def collate(items: Sequence[list[Sample]]) -> Pixels:
        opened = [open_image(root, item[0].image, params.data.max_pixels) for item in items]
        labels = [dense_labels(item[0], categories, size) for item in items]
        centres = [centre_labels(item[0], categories, model.tower.grids[-1]) for item in items]
        return Pixels.of([image_array(image, size) for image in opened], labels, centres)

    def loss(model: nn.Module, batch: Pixels) -> tuple[Tensor, dict[str, Tensor]]:
        logits, painted, centres = model(batch.images)
        parts = {
            "dense": dense_loss(logits, batch.labels),
            "paint": paint_loss(painted, batch.images),
            "centres": centre_loss(centres, batch.centres),
        }
        total = torch.stack(list(parts.values())).sum()
        return total, {name: part.detach() for name, part in parts.items()}

    annotated = [sample for sample in train_samples if sample.objects]
    held_out = image_plan([sample for sample in samples("val") if sample.objects], 1, params.seed)
    batch = collate([held_out.item(i) for i in range(min(len(held_out.groups), 128))])

    def evaluate() -> dict[str, float]:
        seen = batch.to(next(model.parameters()).device)
        with torch.no_grad():
            logits, painted, centres = model(seen.images)
            every, things = dense_accuracy(logits, seen.labels)
            missed = float(paint_loss(painted, seen.images))
            counted = count_accuracy(centres, seen.centres)
        return {
            "val/pixel_accuracy": every,
            "val/thing_accuracy": things,
            "val/paint": missed,
            "val/count_accuracy": counted,
        }

    plan = image_plan(annotated, 1, params.seed)
    inputs = [index("train"), index("val")]
    fit(
        run,
        model,
        params.pretrain_vision,
        plan.item,
        collate,
        loss,
        evaluate,
        inputs,
        [params.model],
        lambda: save_file(model.shared(), VISION / "model.safetensors"),
    )


def main() -> None:
    with stage("pretrain_vision") as run:
        VISION.mkdir(parents=True, exist_ok=True)
        if run.params.model.vision.untrained:
            pretrain(run)
        else:
            (VISION / "skipped.txt").write_text(
                f"the tower {run.params.model.vision.name} has weights of its own\n"
            )


if __name__ == "__main__":
    main()
