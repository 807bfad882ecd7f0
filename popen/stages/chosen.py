"""Stage `chosen`: cross-entropy and mask loss on the winners of the very same preference data, same steps."""

from __future__ import annotations

from pathlib import Path

from popen.stages.artifacts import MODELS, TEXT_PAIRS
from popen.stages.run import stage

MODEL, OUT = MODELS / "sft", MODELS / "chosen"


def main() -> None:
    with stage("chosen", shared=True) as run:
        from torch import Tensor, nn

        from popen.model.batches import Batch
        from popen.model.losses import sft_loss
        from popen.model.segmenter import Segmenter
        from popen.preference.alignment import collate_chosen
        from popen.preference.records import read_text_pairs
        from popen.stages.learning import both_stages, fit, pair_plan

        params = run.params
        model = Segmenter.load(MODEL)
        model.tower.requires_grad_(False)

        def loss(model: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
            return sft_loss(model(batch), batch, params.sft.loss)

        plan = pair_plan(list(read_text_pairs(TEXT_PAIRS)), params.seed)
        fit(
            run,
            model,
            both_stages(params.align.train),
            plan,
            collate_chosen(model, Path(params.data.root), params.data.max_pixels),
            loss,
            None,
            [MODEL, TEXT_PAIRS],
            [params.sft.loss],
            lambda: model.save(OUT),
        )


if __name__ == "__main__":
    main()
