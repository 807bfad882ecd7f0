"""The whole model: one forward for training, saved as a folder of safetensors, config and tokenizer."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self, cast

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from popen.errors import ModelError as ModelError
from popen.model.batches import Batch, Encoder
from popen.model.codebook import Codebook, token_names
from popen.model.decoder import Neck, PixelDecoder
from popen.model.dense import dense_head
from popen.model.language import IMAGE, build_language, load_tokenizer
from popen.model.look import Aim, Look, Match
from popen.model.published import check_llava, read_config
from popen.model.states import last_states
from popen.model.tally import FACTS, Centres, observed
from popen.model.vision import Tower
from popen.params import ModelParams

AT_ONCE = 128  # masks that are decoded at once: more take memory and gain nothing
COUNTED = 3  # of a kind, up to which number the inventory counts


@dataclass(frozen=True)
class Output:
    logits: Tensor  # (A, V): one row a token of the answers (a label that is not IGNORED), in reading order
    embeddings: Tensor  # (N, S, C)
    masks: Tensor  # (N, H, W) logits; of the drawn targets alone where the batch says which
    dense: Tensor | None = None  # (B, 1 + categories, h, w) logits
    described: Tensor | None = None  # (N, S, 1 + categories + 3), see `describe_loss`
    looked: Tensor | None = None  # (N, S, h w) logits, see `point_loss`
    inventory: Tensor | None = None  # (R, categories, COUNTED) logits, see `inventory_loss`
    centres: Tensor | None = None  # (B, categories, h', w') logits, see `centre_loss`
    aimed: Tensor | None = None  # (R, 1 + T', P + 1) logits, see `aim_loss`
    fits: Tensor | None = None  # (R, P) logits, see `match_loss`
    sought: Tensor | None = None  # (R, T', P + 1) logits of the T' tokens behind the image, see `look_loss`


class Projector(nn.Module):
    """Deepest features (B, width, h, w) -> image tokens (B, P, D), P = h w / shuffle^2, no patch dropped."""

    def __init__(self, width: int, shuffle: int, hidden: int) -> None:
        super().__init__()
        self.shuffle = shuffle
        self.mlp = nn.Sequential(nn.Linear(width * shuffle**2, hidden), nn.GELU(), nn.Linear(hidden, hidden))

    def forward(self, features: Tensor) -> Tensor:
        return self.mlp(F.pixel_unshuffle(features, self.shuffle).flatten(2).transpose(1, 2))


class Segmenter(nn.Module):
    """Answers questions about images in words and masks.

    Args:
        params: sizes and names of the parts.
        tokenizer: without our special tokens; they are added here.
        categories: kinds of the dense auxiliary loss.
        pretrained: load the weights of a named LM and tower (False: theirs start at random).

    A tower with published weights is frozen; of a language model with LoRA only what `build_language` says
    trains. Raises ModelError where a named part cannot be used.
    """

    def __init__(
        self, params: ModelParams, tokenizer: Any, categories: list[str], pretrained: bool = True
    ) -> None:
        super().__init__()
        self.params, self.tokenizer, self.categories = params, tokenizer, categories
        scales, width = len(params.vision.levels), params.decoder.width
        names = token_names(scales, params.decoder.tokens)
        tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE, *names]})
        self.tower = Tower(params.vision, pretrained)
        grid, shuffle = self.tower.grids[0], params.vision.shuffle
        if grid % shuffle:
            raise ModelError(
                f"model.vision.shuffle: {shuffle} does not divide the tower's {grid} places a side"
            )
        self.language, projector = build_language(
            params.language, tokenizer, tokenizer.convert_tokens_to_ids(names), pretrained
        )
        hidden = self.causal.config.hidden_size
        self.projector = Projector(self.tower.widths[0], params.vision.shuffle, hidden)
        if projector is not None:
            image_id = tokenizer.convert_tokens_to_ids(IMAGE)
            check_llava(read_config(params.language.name), params.vision, self.tower.widths[0], image_id)
            self.projector.load_state_dict(projector)
        self.codebook = Codebook(
            scales, params.decoder.tokens, hidden, width, self.tower.widths[0], told=params.tally
        )
        self.neck = Neck(self.tower.widths, self.tower.grids, width)
        self.decoder = PixelDecoder(params.decoder, scales, params.vision.image_size)
        self.dense = dense_head(width, len(categories))
        self.describe = nn.Linear(width, 1 + len(categories) + 3)
        self.inventory = nn.Linear(hidden, len(categories) * COUNTED)
        self.centres = Centres(self.tower.widths, len(categories)) if params.tally else None
        self.tell = nn.Linear(FACTS, hidden) if params.tally else None
        self.look = Look(hidden) if params.tally else None
        self.aim = Aim(hidden) if params.tally else None
        self.match = Match(hidden) if params.tally else None
        self.encoder = Encoder(
            tokenizer,
            names,
            (self.tower.grids[0] // params.vision.shuffle) ** 2,
            params.vision.image_size,
            categories,
            self.tower.grids[-1],
        )
        self.to(memory_format=torch.channels_last)  # convolutions of few channels take a third of the time
        # a named base model provides what it brought and nothing trains, whatever a stage freezes later
        trains = {name for name, p in self.named_parameters(remove_duplicate=False) if p.requires_grad}
        own = {"language.": params.language.name == "custom", "tower.": params.vision.untrained}
        base = tuple(part for part, ours in own.items() if not ours)
        self.provided = {name for name in self.state_dict() if name.startswith(base)} - trains

    def train(self, mode: bool = True) -> Self:
        """The tower keeps the batch statistics of its own training, also where its weights learn: they are
        known by all processes of a training, and what is trained is what answers."""
        super().train(mode)
        self.tower.eval()
        return self

    @property
    def causal(self) -> Any:
        """The causal LM itself, below a LoRA wrapper where there is one."""
        return self.language.get_base_model() if self.params.language.lora_r else self.language

    @property
    def device(self) -> torch.device:
        return self.decoder.bias.device

    @property
    def room(self) -> int:
        """Tokens of question and answer together that the language model can read behind an image."""
        return int(self.causal.config.max_position_embeddings) - len(self.encoder.prefix_ids)

    def image_tokens(self, features: list[Tensor], images: Tensor) -> Tensor:
        """B images (B, 3, H, W) and their features -> what the LM reads of them (B, P, D)."""
        dense = None if self.centres is None else self.dense(self.neck(features)[-1])
        return self._tokens(features, images, dense, self.find(features))

    def find(self, features: list[Tensor]) -> Tensor | None:
        """Features of B images -> the map of the things' centres (B, categories, h, w), where there is a
        tally."""
        return None if self.centres is None else cast(Tensor, self.centres(features))

    def _tokens(
        self, features: list[Tensor], images: Tensor, dense: Tensor | None, centres: Tensor | None
    ) -> Tensor:
        tokens: Tensor = self.projector(features[0])
        if self.tell is None or dense is None or centres is None:
            return tokens
        grid = self.tower.grids[0] // self.params.vision.shuffle
        return tokens + self.tell(observed(images, dense, centres, grid))

    def prefix(self, image: Tensor) -> Tensor:
        """`image_tokens` (B, P, D) -> embeddings of what opens every prompt, the image's last (B, n, D)."""
        ids = self.encoder.prefix_ids[: -self.encoder.image_tokens]
        before = self.language.get_input_embeddings()(
            torch.tensor(ids, device=image.device, dtype=torch.long)
        )
        return torch.cat([before.expand(len(image), -1, -1), image.to(before.dtype)], dim=1)

    def read(
        self, input_ids: Tensor, image: Tensor, image_of_row: Tensor, asked: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Token ids (R, T) and `image_tokens` (B, P, D) -> embeddings of what stands behind the image
        (R, T', D), and where those tokens would look (R, T', P + 1).

        The words of a question look at the image; `asked` (R,) is the place of its last, and without it no
        answer follows.
        """
        n = len(self.encoder.prefix_ids)
        words = self.language.get_input_embeddings()(input_ids[:, n:])
        if self.look is None or not words.shape[1]:
            return words, None
        looking, looked = self.look(words, image.to(words.dtype), image_of_row)
        if asked is not None:
            question = torch.arange(n, input_ids.shape[1], device=asked.device) <= asked[:, None]
            looking = torch.where(question.unsqueeze(-1), looking, words)
        return looking.to(words.dtype), looked

    def hidden(self, batch: Batch, image: Tensor) -> Tensor:
        """Last hidden states of the LM (R, T, D), of `image_tokens` (B, P, D)."""
        behind, _ = self.read(batch.input_ids, image, batch.image_of_row, batch.asked)
        return self._hidden(batch, self.prefix(image), behind)

    def _hidden(self, batch: Batch, before: Tensor, behind: Tensor) -> Tensor:
        whole = self.training and self.params.language.checkpointing
        return last_states(self.causal, batch, before, behind, whole)

    def tell_cells(self, batch: Batch, behind: Tensor, image: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """What the questions' words tell the image's tokens (R, P, D) and how well these fit (R, P), from the
        last hidden states behind the image (R, T', D) and `image_tokens` (B, P, D); see `Match`."""
        if self.match is None:
            return None, None
        n = len(self.encoder.prefix_ids)
        words = self.language.get_input_embeddings()(batch.input_ids[:, n:])
        places = torch.arange(n, batch.input_ids.shape[1], device=behind.device)
        question = (places <= batch.asked[:, None]) & (batch.attention_mask[:, n:] > 0)
        told, fits = self.match(words, behind, question, image.to(behind.dtype), batch.image_of_row)
        return told, fits

    def embed(self, batch: Batch, features: list[Tensor]) -> Tensor:
        """Segmentation embeddings (N, S, C) of the batch's targets, in a pass over its words."""
        image = self.image_tokens(features, batch.images)
        hidden = self.hidden(batch, image)
        told, _ = self.tell_cells(batch, hidden[:, len(self.encoder.prefix_ids) :], image)
        return self._embeddings(hidden, batch, features, told)[0]

    def _embeddings(
        self, hidden: Tensor, batch: Batch, features: list[Tensor], told: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Hidden states (R, T, D) -> embeddings of the batch's targets (N, S, C), and where they looked."""
        chosen = hidden[batch.row_of_target[:, None], batch.positions]
        states = chosen.unflatten(1, (self.codebook.scales, self.codebook.tokens)).float()
        by_target = None if told is None else told.index_select(0, batch.row_of_target)
        return self.codebook(states, features[0], batch.image_of_target, by_target)

    def decode(self, embeddings: Tensor, features: list[Tensor], images: Tensor, image_of: Tensor) -> Tensor:
        """Embeddings (N, S, C) and the images' features -> mask logits (N, H, W)."""
        levels, parts = (
            self.neck(features),
            zip(embeddings.split(AT_ONCE), image_of.split(AT_ONCE), strict=True),
        )
        return torch.cat([self._masks(part, levels, images, shown) for part, shown in parts]).float()

    def _masks(self, embeddings: Tensor, levels: list[Tensor], images: Tensor, image_of: Tensor) -> Tensor:
        if not len(embeddings):
            return embeddings.sum() + images.new_zeros((0, self.decoder.size, self.decoder.size))
        return self.decoder(embeddings, levels, images, image_of)

    def forward(self, batch: Batch) -> Output:
        features = self.tower(batch.images)
        levels = self.neck(features)
        supervised = batch.dense is not None
        dense = self.dense(levels[-1]) if supervised or self.centres is not None else None
        centres = self.find(features)
        image = self._tokens(features, batch.images, dense, centres)
        behind, sought = self.read(batch.input_ids, image, batch.image_of_row, batch.asked)
        before = self.prefix(image)
        hidden = self._hidden(batch, before, behind)
        told, fits = self.tell_cells(batch, hidden[:, before.shape[1] :], image)
        embeddings, looked = self._embeddings(hidden, batch, features, told)
        first = before.shape[1] - 1  # its state may already be what an answer begins with
        spoken, aimed = self.speak(
            hidden[:, first:],
            image,
            batch.image_of_row,
            F.pad(batch.labels[:, first + 1 :] == self.encoder.first_id, (0, 1)),
            told,
        )
        return Output(
            logits=self.causal.get_output_embeddings()(spoken[:, :-1][batch.answered[:, first:]]),
            embeddings=embeddings,
            masks=self._masks(
                batch.of_drawn(embeddings), levels, batch.images, batch.of_drawn(batch.image_of_target)
            ),
            dense=dense,
            described=self.describe(embeddings) if supervised else None,
            looked=looked,
            inventory=None if batch.inventory is None else self.take_inventory(hidden, batch),
            centres=centres,
            sought=sought,
            aimed=aimed,
            fits=fits,
        )

    def speak(
        self, hidden: Tensor, image: Tensor, image_of_row: Tensor, naming: Tensor, told: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Last hidden states (R, t, D), image tokens (B, P, D), where a target's first token comes next
        (R, t) and what `tell_cells` told -> what the head makes words of (R, t, D), and where they looked
        for it (R, t, P + 1)."""
        if self.aim is None:
            return hidden, None
        looking, looked = self.aim.pass_by(hidden, image.to(hidden.dtype), image_of_row, naming, told)
        return looking.to(hidden.dtype), looked

    def take_inventory(self, hidden: Tensor, batch: Batch) -> Tensor:
        """Hidden states (R, T, D) -> logits (R, categories, COUNTED), read where the answer begins."""
        states = hidden[torch.arange(len(hidden), device=hidden.device), batch.asked]
        return self.inventory(states.float()).unflatten(1, (len(self.categories), COUNTED))

    # -- saving: what a named base model provides and nothing trains is not written again

    def _kept(self) -> dict[str, Tensor]:
        kept, seen = {}, set[int]()
        for name, tensor in self.state_dict().items():
            if name in self.provided or tensor.data_ptr() in seen:
                continue
            seen.add(tensor.data_ptr())
            kept[name] = tensor.detach().contiguous()
        return kept

    def save(self, folder: Path) -> None:
        """Write config.json, model.safetensors and the tokenizer."""
        folder.mkdir(parents=True, exist_ok=True)
        config = {"model": self.params.model_dump(mode="json"), "categories": self.categories}
        (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
        self.tokenizer.save_pretrained(folder)
        save_file(self._kept(), folder / "model.safetensors")

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Read what `save` wrote. Raises ModelError for a missing, broken or unfitting file."""
        if not (folder / "config.json").is_file():
            raise ModelError(
                f"{folder}: no model here (config.json is missing); run `make repro`, or name the folder of "
                "a trained model"
            )
        try:
            config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
            params, categories = ModelParams.model_validate(config["model"]), config["categories"]
        except (ValueError, KeyError, TypeError) as error:
            reason = f"no {error}" if isinstance(error, KeyError) else str(error).splitlines()[0]
            raise ModelError(
                f"{folder / 'config.json'} is not of a model of popen's, or damaged ({reason}); name another "
                "folder or train it again"
            ) from error
        if params.language.name == "..":  # of an exported model, which may have been moved
            language = params.language.model_copy(update={"name": str(folder.resolve().parent)})
            params = params.model_copy(update={"language": language})
        model = cls(params, load_tokenizer(folder), categories)
        try:
            state = load_file(folder / "model.safetensors")
        except Exception as error:
            raise ModelError(
                f"{folder / 'model.safetensors'} cannot be read ({error}); train it again"
            ) from error
        expected = model._kept()
        if set(state) != set(expected):
            odd = sorted(set(state) ^ set(expected))[:5]
            raise ModelError(
                f"{folder / 'model.safetensors'} does not fit config.json; keys that differ: {odd}"
            )
        try:
            model.load_state_dict(state, strict=False)
        except RuntimeError as error:
            raise ModelError(f"{folder / 'model.safetensors'} does not fit config.json: {error}") from error
        return model.eval()
