"""What a configuration needs before it is run: parameters, and memory of a training step.

The model is built on torch's `meta` device, where tensors have shapes and no values, so that 13 billion
parameters cost nothing; a named language model is built from the sizes in its parameters, without network.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from popen.model.language import IMAGE
from popen.model.segmenter import Segmenter
from popen.params import LanguageParams, ModelParams, Params

CATEGORIES = 1203  # of LVIS, which MUSE's annotations come from; they size the auxiliary heads
TEXT, TARGETS = 192, 4  # tokens of a question with its answer, and targets of an answer: what MUSE asks for
ROOM = 0.9  # of a device's memory that may be filled: the allocator and the context take the rest
GB = 1024**3


@dataclass(frozen=True)
class Memory:
    """Bytes on one device."""

    weights: int
    gradients: int
    optimizer: int
    activations: int

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.activations


@dataclass(frozen=True)
class Devices:
    count: int
    size: int  # GB each
    sharded: bool  # FSDP: weights, gradients and optimizer are split; else DDP: every device has them whole

    def __str__(self) -> str:
        kind = "" if self.count == 1 else ", FSDP" if self.sharded else ", DDP"
        return f"{self.count} x {self.size} GB{kind}"


MACHINES = [Devices(1, 24, False), Devices(1, 80, False), Devices(8, 80, False), Devices(8, 80, True)]


def on_meta(params: ModelParams) -> Segmenter:
    """The Segmenter of these parameters without weights, as training would build it."""
    from tokenizers import Tokenizer, models
    from transformers import LlamaConfig, PreTrainedTokenizerFast

    language = params.language
    names = ["<unk>", "<s>", "</s>", "<pad>", IMAGE, *(str(number) for number in range(language.vocab - 5))]
    words = models.WordLevel({name: number for number, name in enumerate(names)}, unk_token="<unk>")
    special = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(words), **special)
    with tempfile.TemporaryDirectory() as folder, torch.device("meta"):
        if language.name != "custom":
            LlamaConfig(
                vocab_size=language.vocab,
                hidden_size=language.width,
                num_hidden_layers=language.layers,
                num_attention_heads=language.heads,
                intermediate_size=language.intermediate,
                max_position_embeddings=language.max_length,
            ).save_pretrained(folder)
            params = params.model_copy(update={"language": language.model_copy(update={"name": folder})})
        kinds = [str(number) for number in range(CATEGORIES)]
        return Segmenter(params, tokenizer, kinds, pretrained=False)


def parts(model: nn.Module) -> dict[str, tuple[int, int]]:
    """Part of the model -> its parameters, and how many of them train; shared ones count once.

    Of the language model, LoRA and the codebook's rows are parts of their own.
    """
    found: dict[str, tuple[int, int]] = {}
    for name, parameter in model.named_parameters():
        part = name.partition(".")[0]
        if part == "language":
            part = "LoRA" if "lora_" in name else "codebook rows" if "tokens_delta" in name else part
        size, trains = found.get(part, (0, 0))
        count = parameter.numel()
        found[part] = (size + count, trains + count * parameter.requires_grad)
    return found


def held(model: nn.Module) -> tuple[int, int, int]:
    """Bytes of weights and buffers, of gradients, and of AdamW's two moments.

    A gradient and a moment are as large as their weight, and only weights that train have them:
    bytes = sum over weights, + sum over those that train, + 2 x the latter.
    """
    weights = sum(t.nbytes for t in [*model.parameters(), *model.buffers()])
    gradients = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    return weights, gradients, 2 * gradients


def block_bytes(language: LanguageParams) -> int:
    """Bytes that one Llama block keeps for its backward pass, a token, in bfloat16 with frozen weights.

    With width D and intermediate width F: 8 D (both norms keep their input in float32), 8 D (queries, keys,
    values and their mix; attention without its T x T matrix, as SDPA's fused kernels have it), 6 F (gate, up,
    and the gate's activation), and 2 D for the input of each LoRA adapter. Terms without D or F are left out.
    """
    return (16 + 2 * len(language.lora_targets)) * language.width + 6 * language.intermediate


def language_bytes(language: LanguageParams, tokens: int, answer: int) -> int:
    """Bytes that the language model keeps for `tokens` tokens, of which `answer` are predicted.

    Without checkpointing L blocks keep `block_bytes`; with it each keeps its input (2 D), and one at a time
    all of it. Logits of V words: 2 V in bfloat16, and 8 V for their float32 copy and its softmax.
    """
    kept = block_bytes(language)
    inputs = language.layers * 2 * language.width
    blocks = inputs + kept if language.checkpointing else language.layers * kept
    return tokens * blocks + answer * 10 * language.vocab


def saved_bytes(compute: Callable[[], Tensor], model: nn.Module) -> int:
    """Bytes of all that autograd keeps of `compute()` for the backward pass, `model`'s weights left out."""
    own = {t.untyped_storage()._cdata for t in [*model.parameters(), *model.buffers()]}
    kept: dict[int, Tensor] = {}  # tensors stay alive, so that no storage's number is given twice

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()._cdata
        if storage not in own:
            kept.setdefault(storage, tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        compute()
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def activations(model: Segmenter, rows: int) -> int:
    """Bytes kept in a training step of `rows` questions, each about an image of its own.

    The language model's by `language_bytes`; those of projector, neck and decoder as autograd keeps them on
    `meta`, in float32 (autocast keeps less). A frozen tower keeps none.
    """
    params = model.params
    tokens = len(model.encoder.prefix_ids) + TEXT

    def rest() -> Tensor:
        features = [
            torch.zeros(rows, width, grid, grid, device="meta")
            for width, grid in zip(model.tower.widths, model.tower.grids, strict=True)
        ]
        size = params.vision.image_size
        images = torch.zeros(rows, 3, size, size, device="meta")
        image_of = torch.zeros(rows * TARGETS, dtype=torch.long, device="meta")
        scales, width = model.codebook.scales, params.decoder.width
        embeddings = torch.zeros(rows * TARGETS, scales, width, device="meta", requires_grad=True)
        return model.projector(features[0]).sum() + model.decode(embeddings, features, images, image_of).sum()

    return language_bytes(params.language, rows * tokens, rows * TEXT) + saved_bytes(rest, model)


def memory(model: Segmenter, devices: Devices, rows: int) -> Memory:
    """One device's share of a training step with `rows` questions on each.

    DDP keeps the gradients a second time, in the buckets that it sends. FSDP gives each device 1 / count of
    weights, gradients and moments; two blocks' weights are gathered whole at a time, and what lies outside
    the language model's blocks all the step long, with its gradients.
    """
    weights, gradients, optimizer = held(model)
    if devices.count > 1 and devices.sharded:
        blocks = model.causal.base_model.layers
        inside, inside_gradients, _ = held(blocks)
        outside, outside_gradients = weights - inside, gradients - inside_gradients
        weights, gradients, optimizer = (n // devices.count for n in (weights, gradients, optimizer))
        weights += outside + 2 * sum(p.nbytes for p in blocks[0].parameters())
        gradients += outside_gradients
    elif devices.count > 1:
        gradients *= 2
    return Memory(weights, gradients, optimizer, activations(model, rows))


def table(params: Params) -> str:
    """The plan as text: parameters by part, then memory on each machine with the largest batch that fits."""
    model = on_meta(params.model)
    lines = [f"{'part':<16}{'parameters':>16}{'of these train':>16}"]
    counts = parts(model)
    whole = [sum(numbers) for numbers in zip(*counts.values(), strict=True)]
    for part, (size, trains) in [*counts.items(), ("all", whole)]:
        lines.append(f"{part:<16}{size:>16,}{trains:>16,}")
    asked = params.sft.train.images * params.sft.questions
    lines += [
        "",
        f"a micro-batch of SFT, {asked} questions asked for on all devices together "
        f"({len(model.encoder.prefix_ids)} tokens of prompt and image, {TEXT} of text, {TARGETS} targets "
        "each); GB a device",
        "",
        f"{'machine':<18}{'on each':>10}" + "".join(f"{name:>13}" for name in (*_COLUMNS, "sum")),
    ]
    for devices in MACHINES:
        share = -(-asked // devices.count)
        rows = next((n for n in range(share, 0, -1) if _fits(memory(model, devices, n), devices)), 0)
        found = memory(model, devices, rows or 1)
        figures = [getattr(found, name) for name in (*_COLUMNS, "total")]
        fits = f"{rows:>10}" if rows else "  1: no fit"
        lines.append(f"{devices!s:<18}{fits:>10}" + "".join(f"{figure / GB:>13.1f}" for figure in figures))
    return "\n".join(lines)


def _fits(found: Memory, devices: Devices) -> bool:
    return found.total <= ROOM * devices.size * GB


_COLUMNS = ("weights", "gradients", "optimizer", "activations")
