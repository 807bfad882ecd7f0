"""Stage `sft`: supervised fine-tuning on the training corpus."""

from __future__ import annotations

from popen import devices
from popen.params import Params
from popen.stages.artifacts import MODELS, VISION, index, samples
from popen.stages.run import stage

OUT = MODELS / "sft"


def usual(params: Params) -> int:
    """A model from scratch is small enough for two in a laptop's memory."""
    return devices.pair(params.sft.train.images) if params.model.language.name == "custom" else 1


def main() -> None:
    with stage("sft", shared=True, usual=usual) as run:
        import torch
        from safetensors.torch import load_file
        from torch import Tensor, nn

        from popen.model.batches import Batch
        from popen.model.dense import categories_of
        from popen.model.language import PROMPT, load_tokenizer, train_tokenizer
        from popen.model.losses import sft_loss
        from popen.model.segmenter import Segmenter
        from popen.stages.learning import fit, image_plan, sft_collate, validation

        params, train_samples = run.params, samples("train")
        if params.model.language.name == "custom":
            texts = (PROMPT.format(question=s.question) + " " + s.answer for s in train_samples)
            tokenizer = train_tokenizer(texts, params.model.language.vocab)
        else:
            tokenizer = load_tokenizer(params.model.language.name)
        torch.manual_seed(params.seed)
        model = Segmenter(params.model, tokenizer, categories_of(train_samples))
        if params.model.vision.untrained:
            model.load_state_dict(load_file(VISION / "model.safetensors"), strict=False)
        if params.sft.vision == 0:
            model.tower.requires_grad_(False)
        trains = sum(p.numel() for p in model.parameters() if p.requires_grad)
        workers = f"processes: {devices.count()}, threads in each: {torch.get_num_threads()}"
        run.say(f"{trains / 1e6:.2f} M parameters train; {workers}")

        def loss(model: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
            return sft_loss(model(batch), batch, params.sft.loss)

        plan = image_plan(train_samples, params.sft.questions, params.seed)
        fit(
            run,
            model,
            params.sft.train,
            plan.item,
            sft_collate(model, run, params.sft.masks, auxiliary=params.sft.loss.of_the_image),
            loss,
            validation(model, run, samples("val")),
            [VISION, index("train"), index("val")],
            [params.model, params.sft],
            lambda: model.save(OUT),
            (model.tower, params.sft.vision),
        )


if __name__ == "__main__":
    main()
