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
from popen.model.look import Look
from popen.model.published import check_llava, read_config
from popen.model.tally import FACTS, Centres, census, facts
from popen.model.vision import Tower
from popen.params import ModelParams

COUNTED = 3  # of a kind, up to which number the inventory counts
PARTS = 3  # of a batch's rows, sorted by length; a GPU loses more by launching than by padding


@dataclass(frozen=True)
class Output:
    logits: Tensor  # (A, V): one row a token of the answers (a label that is not IGNORED), in reading order
    embeddings: Tensor  # (N, S, C)
    masks: Tensor  # (N, H, W) logits
    dense: Tensor | None = None  # (B, 1 + categories, h, w) logits
    described: Tensor | None = None  # (N, S, 1 + categories + 3), see `describe_loss`
    looked: Tensor | None = None  # (N, S, h w) logits, see `point_loss`
    inventory: Tensor | None = None  # (R, categories, COUNTED) logits, see `inventory_loss`
    centres: Tensor | None = None  # (B, categories, h', w') logits, see `centre_loss`
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
        self.language, projector = build_language(
            params.language, tokenizer, tokenizer.convert_tokens_to_ids(names), pretrained
        )
        hidden = self.causal.config.hidden_size
        self.projector = Projector(self.tower.widths[0], params.vision.shuffle, hidden)
        if projector is not None:
            image_id = tokenizer.convert_tokens_to_ids(IMAGE)
            check_llava(read_config(params.language.name), params.vision, self.tower.widths[0], image_id)
            self.projector.load_state_dict(projector)
        self.codebook = Codebook(scales, params.decoder.tokens, hidden, width, self.tower.widths[0])
        self.neck = Neck(self.tower.widths, self.tower.grids, width)
        self.decoder = PixelDecoder(params.decoder, scales, params.vision.image_size)
        self.dense = dense_head(width, len(categories))
        self.describe = nn.Linear(width, 1 + len(categories) + 3)
        self.inventory = nn.Linear(hidden, len(categories) * COUNTED)
        self.centres = Centres(self.tower.widths, len(categories)) if params.tally else None
        self.tell = nn.Linear(FACTS, hidden) if params.tally else None
        self.look = Look(hidden) if params.tally else None
        self.encoder = Encoder(
            tokenizer,
            names,
            (self.tower.grids[0] // params.vision.shuffle) ** 2,
            params.vision.image_size,
            categories,
            self.tower.grids[-1],
        )
        # a named base model provides what it brought and nothing trains, whatever a stage freezes later
        trains = {name for name, p in self.named_parameters(remove_duplicate=False) if p.requires_grad}
        own = {"language.": params.language.name == "custom", "tower.": params.vision.untrained}
        base = tuple(part for part, ours in own.items() if not ours)
        self.provided = {name for name in self.state_dict() if name.startswith(base)} - trains

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

    def image_tokens(self, features: list[Tensor]) -> Tensor:
        """Features of B images -> what the LM reads of them (B, P, D)."""
        tokens: Tensor = self.projector(features[0])
        return tokens if self.tell is None else tokens + self.tell(self.facts(features))

    @torch.no_grad()
    def facts(self, features: list[Tensor]) -> Tensor:
        """What tokens are told of the kinds that they show (B, P, FACTS), see `popen.model.tally`."""
        assert self.centres is not None
        with torch.autocast(features[0].device.type, enabled=False):
            features = [level.float() for level in features]
            shows = self.dense(self.neck(features)[-1]).softmax(1)[:, 1:]
            grid = features[0].shape[-1] // self.params.vision.shuffle
            shares = F.adaptive_avg_pool2d(shows, grid).flatten(2)
            return facts(census(self.centres(features)), shares)

    def embed(
        self, input_ids: Tensor, image: Tensor, image_of_row: Tensor, asked: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Token ids (R, T) and `image_tokens` (B, P, D) -> embeddings (R, T, D), the image's in their places.

        The words of a question look at the image; `asked` (R,) is the place of its last, and without it no
        answer follows. The second result is where the tokens behind the image's would look (R, T', P + 1).
        """
        embeds: Tensor = self.language.get_input_embeddings()(input_ids)
        own = image.to(embeds.dtype)[image_of_row]
        embeds = embeds.masked_scatter((input_ids == self.encoder.image_id).unsqueeze(-1), own)
        n = len(self.encoder.prefix_ids)
        behind = embeds[:, n:]
        if self.look is None or not behind.shape[1]:
            return embeds, None
        read, looked = self.look(behind, own)
        if asked is not None:
            question = torch.arange(n, embeds.shape[1], device=asked.device) <= asked[:, None]
            read = torch.where(question.unsqueeze(-1), read, behind)
        return torch.cat([embeds[:, :n], read.to(embeds.dtype)], dim=1), looked

    def hidden(self, batch: Batch, features: list[Tensor]) -> Tensor:
        """Last hidden states of the LM (R, T, D)."""
        image = self.image_tokens(features)
        embeds, _ = self.embed(batch.input_ids, image, batch.image_of_row, batch.asked)
        return self._hidden(batch, image, embeds)

    def _hidden(self, batch: Batch, image: Tensor, embeds: Tensor) -> Tensor:
        """Image tokens (B, P, D) and all embeddings (R, T, D) -> last hidden states (R, T, D).

        Rows that share an image share its tokens' pass: the prefix runs once an image, and its keys and
        values are handed to the rows. Those run in parts of about equal length, without the padding that
        the batch's longest row asks of all. The same numbers as a pass over whole rows, for less work.
        Under gradient checkpointing there is no cache to share, and training passes over whole rows.
        """
        from transformers import DynamicCache

        places = (batch.attention_mask.cumsum(1) - 1).clamp(min=0)
        if self.training and self.params.language.checkpointing:
            whole = self.causal.base_model(
                inputs_embeds=embeds,
                attention_mask=batch.attention_mask,
                position_ids=places,
                use_cache=False,
            )
            return cast(Tensor, whole.last_hidden_state)
        n, images = len(self.encoder.prefix_ids), len(image)
        everywhere = torch.arange(images, device=places.device)
        prefix = self.causal.base_model(
            inputs_embeds=self.embed(batch.input_ids[:1, :n].expand(images, n), image, everywhere)[0],
            position_ids=places[:1, :n].expand(images, n),
            use_cache=True,
        )
        seen = [(layer.keys, layer.values) for layer in prefix.past_key_values.layers]
        lengths = batch.attention_mask[:, n:].sum(1)
        order = lengths.argsort()
        done: list[Tensor] = []
        for rows in order.chunk(1 if order.is_cuda else PARTS):
            start = batch.input_ids.shape[1] - int(lengths[rows].max())
            image_of = batch.image_of_row[rows]
            rest = self.causal.base_model(
                inputs_embeds=embeds[rows, start:],
                attention_mask=torch.cat(
                    [batch.attention_mask[rows, :n], batch.attention_mask[rows, start:]], dim=1
                ),
                position_ids=places[rows, start:],
                cache=DynamicCache(
                    [(k.index_select(0, image_of), v.index_select(0, image_of)) for k, v in seen]
                ),
                use_cache=True,
            )
            done.append(F.pad(rest.last_hidden_state, (0, 0, start - n, 0)))
        behind = torch.cat(done).index_select(0, order.argsort())
        return torch.cat([prefix.last_hidden_state.index_select(0, batch.image_of_row), behind], dim=1)

    def segmentation_embeddings(
        self, hidden: Tensor, batch: Batch, features: list[Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Hidden states (R, T, D) -> embeddings of the batch's targets (N, S, C), and where they looked."""
        chosen = hidden[batch.row_of_target[:, None], batch.positions]
        states = chosen.unflatten(1, (self.codebook.scales, self.codebook.tokens)).float()
        return self.codebook(states, features[0], batch.image_of_target)

    def decode(self, embeddings: Tensor, features: list[Tensor], images: Tensor, image_of: Tensor) -> Tensor:
        """Embeddings (N, S, C) and the images' features -> mask logits (N, H, W)."""
        if not len(embeddings):
            return embeddings.sum() + images.new_zeros((0, self.decoder.size, self.decoder.size))
        return self.decoder(embeddings, self.neck(features), images, image_of)

    def forward(self, batch: Batch, features: list[Tensor] | None = None) -> Output:
        """`features` may be given where the tower is frozen and they are cached."""
        if features is None:
            features = self.tower(batch.images)
        image = self.image_tokens(features)
        embeds, sought = self.embed(batch.input_ids, image, batch.image_of_row, batch.asked)
        hidden = self._hidden(batch, image, embeds)
        embeddings, looked = self.segmentation_embeddings(hidden, batch, features)
        return Output(
            logits=self.causal.get_output_embeddings()(hidden[:, :-1][batch.answered]),
            embeddings=embeddings,
            masks=self.decode(embeddings, features, batch.images, batch.image_of_target),
            dense=None if batch.dense is None else self.dense(self.neck(features)[-1]),
            described=None if batch.dense is None else self.describe(embeddings),
            looked=looked,
            inventory=None if batch.inventory is None else self.take_inventory(hidden, batch),
            centres=None if batch.dense is None or self.centres is None else self.centres(features),
            sought=sought,
        )

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
                f"{folder}: no model here (config.json is missing); run `make repro` or pass --model"
            )
        try:
            config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
            params, categories = ModelParams.model_validate(config["model"]), config["categories"]
        except (ValueError, KeyError) as error:
            reason = str(error).splitlines()[0]
            raise ModelError(f"{folder / 'config.json'} cannot be used ({reason}); train it again") from error
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
