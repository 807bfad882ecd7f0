"""Typed parameters: `params.yaml`, read once by a stage; unknown keys are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)

Share = Annotated[float, Field(ge=0.0, le=1.0)]
Positive = Annotated[int, Field(gt=0)]
Level = Annotated[int, Field(ge=0)]


def _a_range(sides: tuple[float, float]) -> tuple[float, float]:
    if not 0.0 < sides[0] <= sides[1] <= 1.0:
        raise ValueError(f"must be 0 < low <= high <= 1, not {list(sides)}")
    return sides


def _without_nulls(roles: Any) -> Any:
    """A composition (conf/) cannot delete a role of its base, but set it to null."""
    return {k: v for k, v in roles.items() if v is not None} if isinstance(roles, dict) else roles


Sides = Annotated[tuple[float, float], AfterValidator(_a_range)]  # of a rectangle, parts of the image's side


class Group(BaseModel):
    """A frozen group of parameters that refuses unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class NoiseParams(Group):
    """How the answers and masks of the large training corpus are spoiled (scenes only)."""

    absent_mentioned: Share  # a plausible partner that is absent is named all the same
    present_dropped: Share  # one small target is left out of the answer
    mask_coarse: Share  # a mask is dilated, eroded, shifted or cut to a five-point polygon


class ScenesParams(Group):
    seed: int
    size: Positive  # pixels a side
    train: Positive  # images of each split
    preference: Positive
    val: Positive
    test: Positive  # images of each of the test splits
    noise: NoiseParams


class DataParams(Group):
    root: str
    max_pixels: Positive  # larger images are refused before they are decoded
    # role -> native splits, "muse/train" or a part "muse/train[:80%]"; a role that is null is left out
    splits: Annotated[dict[str, list[str]], BeforeValidator(_without_nulls)]


class ContractParams(Group):
    tolerated: Share  # share of broken records that go to the quarantine instead of stopping
    min_area: Positive  # pixels of the smallest target allowed
    max_kind_share: Share  # largest share of one kind of question in a split


class VisionParams(Group):
    name: str  # an open_clip model ("ViT-L-14-336"), or "timm:resnet10t": a tower of that shape, untrained
    pretrained: str  # open_clip tag ("openai") or a file; empty: `pretrain_vision` trains it
    image_size: Positive
    # intermediate features that the decoder sees, coarse to fine (ViT: blocks)
    levels: list[Level] = Field(min_length=1)
    shuffle: Positive  # image tokens given to the LM: shuffle x shuffle places become one token

    @property
    def untrained(self) -> bool:
        return not self.pretrained


class _Attention(Group):
    """A part whose heads share its width."""

    width: Positive
    heads: Positive

    @model_validator(mode="after")
    def _heads_share_the_width(self) -> Self:
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is no multiple of heads {self.heads}")
        return self


class LanguageParams(_Attention):
    name: str  # a causal LM by hub name or folder, or "custom": a Llama from the numbers below
    vocab: Positive
    layers: Positive
    intermediate: Positive
    max_length: Positive  # tokens of image, question and answer together
    lora_r: int = Field(ge=0)  # 0: the language model trains in full
    lora_alpha: Positive  # what the adapters add is multiplied by lora_alpha / lora_r
    lora_targets: list[str]
    # defaults: models saved before these two have neither
    dtype: Literal["float32", "bfloat16"] = "float32"  # of weights frozen under LoRA; what trains is float32
    checkpointing: bool = False  # training keeps each block's input alone and computes the rest again


class DecoderParams(_Attention):
    """`width` is C."""

    layers: Positive  # two-way blocks a scale
    tokens: Positive  # K, codebook tokens a scale; the number of scales S is len(vision.levels)
    detail: int = Field(ge=0)  # channels of the RGB branch; 0: none


class ModelParams(Group):
    vision: VisionParams
    language: LanguageParams
    decoder: DecoderParams
    # the image's tokens are told how many there are of what they show, and how that looks, and a question's
    # words look at them; for language models from scratch
    tally: bool = False


class TrainParams(Group):
    """What every training stage shares."""

    steps: Positive
    images: Positive  # images a micro-batch, of all devices together; a step takes images x accumulate
    accumulate: Positive
    lr: float = Field(gt=0)
    muon: float = Field(ge=0)  # learning rate of Muon for the matrices between layers; 0: AdamW for all
    warmup: Share
    weight_decay: float = Field(ge=0)
    clip: float = Field(gt=0)
    bf16: bool = False  # forward and backward in bfloat16 where the device multiplies it fast
    checkpoint_every: Positive
    eval_every: Positive


class SftWeights(Group):
    """Weights of the SFT loss; PixelLM has ce 1, bce 2, dice 0.5 (params.yaml says where ours differ)."""

    ce: float
    bce: float
    dice: float
    refine: float  # extra weight of pixels that two targets claim
    dense: float  # per-pixel class, auxiliary
    describe: float  # kind and place of a target, read off its embedding, auxiliary
    point: float  # where the embedding looks back at the image, auxiliary
    inventory: float  # what the answer will name, read off the prompt's last state, auxiliary
    centres: float = 0.0  # where things have their centres, for the model's tally, auxiliary
    aim: float = 0.0  # where the answer looks before it names a target, for the model's tally, auxiliary
    match: float = 0.0  # which cells a question's words fit, for the model's tally, auxiliary
    look: float = 0.0  # where a question's words look, for the model's tally, auxiliary

    @property
    def of_the_image(self) -> bool:
        """Whether a term asks for more of the image than the targets' masks."""
        return any((self.dense, self.describe, self.inventory, self.centres, self.aim, self.look))


class SftParams(Group):
    train: TrainParams
    questions: Positive  # of an image, asked in a step
    masks: Positive  # of these questions, for how many the masks are drawn (what costs most)
    loss: SftWeights
    vision: Share  # the tower's learning rate as a share of train.lr; 0 keeps it frozen


class JudgeParams(Group):
    """A model that corrects answers. Its key is in the environment, OPENAI_API_KEY, and nowhere else."""

    model: str  # as the endpoint calls it
    base_url: str  # of an endpoint that speaks OpenAI's chat completions
    requests: Positive  # at most; with `tokens` the budget, which counts what an earlier try has paid for
    tokens: Positive  # at most, prompts and replies, as the endpoint counts them
    retries: Level  # of a request, with growing pauses
    timeout: float = Field(gt=0)  # seconds a request


class PeopleParams(Group):
    file: str = Field(pattern=r"^[^/\\]+$")  # in the folder corrections/; docs/preferences.md has its format


class TextPreferenceParams(Group):
    samples: Positive  # answers sampled a question
    temperature: float = Field(gt=0)
    source: Literal["rule", "judge", "people"] = "rule"  # of the corrections
    judge: JudgeParams | None = None
    people: PeopleParams | None = None

    @model_validator(mode="after")
    def _source_is_described(self) -> Self:
        if self.source == "judge" and not (self.judge and self.judge.model and self.judge.base_url):
            raise ValueError("source: judge needs judge.model and judge.base_url")
        if self.source == "people" and not self.people:
            raise ValueError("source: people needs people.file")
        return self


class MaskPreferenceParams(Group):
    perturbed: int = Field(ge=3)  # K images a question; three masks make the ranks high, medium and low
    rectangles: Positive
    sigma: float = Field(gt=0)  # of the pixel range
    side: Sides
    margin: Share  # smallest IoU between the ranks of a pair
    area_ratio: float = Field(ge=1)  # largest ratio of areas inside a pair


class AlignParams(Group):
    """L_pre = L_t + L_s + anchor x SFT loss (the curriculum runs it twice)."""

    train: TrainParams
    text: float  # weight of L_t; 0 leaves it out
    beta_t: float = Field(gt=0)  # DPO's beta of L_t
    gamma: float = Field(gt=0)  # weight of the changed tokens
    fewer: bool  # L_t learns from pairs whose corrected answer names fewer things, too
    mask: float  # weight of L_s
    mask_form: Literal["embedding", "mask"]  # what L_s compares: embeddings' distances, or masks' pixels
    beta_s: float = Field(gt=0)  # DPO's beta of L_s, on a scale of its own in each form
    anchor: float  # of the SFT loss on the corrected answers and their masks


class ControlParams(Group):
    rate: float = Field(gt=0)  # learning rates of SFT trained on, as a share of align.train's


class CalibrateParams(Group):
    thresholds: list[float] = Field(min_length=1)  # logits tried on validation
    questions: Positive  # of `val`, at most: spread for thresholds, the first for the score


class EnsembleParams(Group):
    members: Positive  # M
    mode: Literal["attention", "mean", "best", "probability"]  # what is made of the members' embeddings
    score: Literal["calibrated", "reward"]  # fitted on validation, or log pi - log pi_ref
    temperature: float = Field(gt=0)  # of the words that the members sample
    sigma: float = Field(ge=0)  # noise in the members' images, in parts of the pixel range
    side: Sides
    steps: Positive  # training of the attention


class EvaluateParams(Group):
    batch: Positive  # questions at once
    max_new_tokens: Positive
    bootstrap: Positive  # resamples
    bf16: bool = False  # answers in bfloat16, where the device multiplies it fast; the bundle keeps to it


Metric = Literal["gIoU", "cIoU", "gIoU_matched", "chair_i", "chair_s", "missing"]  # have a better side


class GateParams(Group):
    """What a new model must show before it becomes the champion; both answer the same questions."""

    benchmark: str  # one of `benchmarks`; never a test set, for what is selected on is no test any more
    system: Literal["popen", "popen+ensemble"]
    gain: dict[Metric, Share] = Field(min_length=1)  # the gain's interval must lie above this
    tolerated: dict[Metric, Share]  # largest loss of each other metric, as measured


System = Literal["sft", "control", "chosen", "popen", "popen+ensemble"]


class Params(Group):
    seed: int  # of every stage's randomness; the scenes have their own
    data: DataParams
    scenes: ScenesParams
    contract: ContractParams
    benchmarks: list[str] = Field(min_length=1)  # roles that are evaluated
    systems: list[System] = Field(min_length=1)  # which answer them
    model: ModelParams
    pretrain_vision: TrainParams
    sft: SftParams
    text_preferences: TextPreferenceParams
    mask_preferences: MaskPreferenceParams
    align: AlignParams
    control: ControlParams
    calibrate: CalibrateParams
    ensemble: EnsembleParams
    evaluate: EvaluateParams
    gate: GateParams

    @model_validator(mode="after")
    def _published_towers_are_frozen(self) -> Self:
        if self.sft.vision > 0 and not self.model.vision.untrained:
            raise ValueError("sft.vision must be 0: weights that model.vision.pretrained names are frozen")
        return self

    @model_validator(mode="after")
    def _benchmarks_are_roles(self) -> Self:
        for name in self.benchmarks:
            if name not in self.data.splits:
                known = ", ".join(self.data.splits)
                raise ValueError(f"benchmarks: data.splits has no role {name!r}; it has {known}")
        return self


class ParamsError(ValueError):
    """`params.yaml` cannot be used; the message names the key and what is wrong with it."""


def load(path: Path = Path("params.yaml")) -> Params:
    """Read and check a parameter file. Raises ParamsError, which names each bad key."""
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ParamsError(f"{path}: no such file; name another one, or run inside a clone") from None
    except yaml.YAMLError as error:
        raise ParamsError(f"{path} is not valid YAML: {error}") from None
    return _checked(raw, str(path))


def compose(conf: Path, choices: list[str]) -> Params:
    """params.yaml with choices of conf/ ("model=llava-7b"), as `dvc exp run -S` composes it. Raises
    ParamsError for a choice that is not there, and for keys that do not fit."""
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.errors import HydraException
    from omegaconf import OmegaConf

    try:
        with initialize_config_dir(str(conf.resolve()), version_base=None):
            raw = OmegaConf.to_object(hydra_compose("config", overrides=choices))
    except HydraException as error:
        for group, _, name in (choice.partition("=") for choice in choices):
            known = sorted(path.stem for path in (conf / group).glob("*.yaml"))
            if known and name not in known:
                raise ParamsError(f"{conf / group} has no {name!r}; it has {', '.join(known)}") from None
        raise ParamsError(f"{conf}, {' '.join(choices)}: {' '.join(str(error).split())}") from None
    return _checked(raw, " with ".join(["params.yaml", *choices]))


def _checked(raw: object, where: str) -> Params:
    if not isinstance(raw, dict):
        raise ParamsError(f"{where} holds no parameters; `git checkout params.yaml` brings the default back")
    try:
        return Params.model_validate(raw)
    except ValidationError as error:
        said = {"extra_forbidden": "there is no such parameter", "missing": "is missing"}
        lines = [
            "  " + ": ".join([*filter(None, [".".join(map(str, e["loc"]))]), said.get(e["type"], e["msg"])])
            for e in error.errors()
        ]
        lines = [line.replace("Value error, ", "", 1) for line in lines]
        raise ParamsError(f"{where} does not fit:\n" + "\n".join(lines)) from None
