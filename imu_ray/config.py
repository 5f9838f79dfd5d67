"""Every setting and every recipe of imu_ray: declared once, with range, unit and meaning."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from imu_ray.errors import ConfigError, nearest
from imu_ray.section import NO_RESULT, Section, in_words, merge, settings_of

# Of a size: 1 is one row, 1.0 is all rows.
Rows = Annotated[int, Field(ge=1, strict=True)]
Share = Annotated[float, Field(gt=0, le=1)]
Pixels = Annotated[int, Field(ge=1)]
Labels = Annotated[tuple[Annotated[int, Field(strict=True)], ...], Field(min_length=1)]
Names = Annotated[tuple[str, ...], Field(min_length=1)]


class ForgetSetConfig(Section):
    """Which rows to forget, and how rows become samples: of the evaluation sets too where they say nothing else."""

    prefix = "forget_set."

    ids: str | Names | Labels | None = None
    """forget only the rows with these ids: path or URI of a list (`.parquet` or `.csv` with a column that is named as
    `forget_set.id_column` or `id`, or a text file with an id on each line), or the ids themselves, which the record
    does not show. Only these rows are read"""
    missing_ids: Literal["error", "ignore"] = "error"
    """an id that no row has: stop and name it, or forget the others and count it in the manifest"""
    where: str | None = None
    """forget only the rows that meet a condition on columns: `label == 3 and site in ("x", "y")`; columns need not be
    read otherwise. It stands in the manifest as it is"""
    size: Rows | Share | Labels | Names | None = None
    """forget only a part: so many rows (`500`) or such a share of them (`0.1`), drawn at random and nested (a larger
    size contains a smaller one), or the rows of some classes: indices (`[3, 5]`), or names listed in
    `forget_set.classes` (`["0002", "0010"]`, quoted, because YAML takes 0010 for the number 8); null: all"""
    size_seed: int = Field(0, ge=0)
    """seed of that draw, apart from `seed`, so that runs with other seeds forget the same rows"""
    on_bad_row: Literal["error", "skip"] = "error"
    """a row that cannot be used: stop and name it, or leave it out and list it in the manifest"""
    image_column: str = "image"
    """column with encoded images (PNG, JPEG bytes) or with numbers"""
    label_column: str = "label"
    """column with whole-number labels, or names listed in `forget_set.classes`; with lists of numbers where
    `forget_set.target` says so"""
    target: Literal["class", "soft", "multi_label"] = "class"
    """what a label is, and which loss the model was trained with: a class; `soft`, a list with the probability of each
    class (cross-entropy); or `multi_label`, a list with 0 or 1 for each class (binary cross-entropy, the mean over the
    classes)"""
    class_weights: Annotated[tuple[Annotated[float, Field(gt=0)], ...], Field(min_length=1)] | None = None
    """weights of the classes in that loss, in the order of the model's outputs: `weight` of torch's `CrossEntropyLoss`,
    of `multi_label` `pos_weight` of `BCEWithLogitsLoss`. A mean over rows is divided by their number, not by the sum of
    their weights; null: none"""
    tokens_column: str = "tokens"
    """column with lists of token ids (task `sequence`)"""
    token_labels_column: str | None = None
    """column with a label for each token, -100 where there is none; null: each token is its own label. A token is
    predicted from those before it"""
    question_column: str = "question"
    """column with the text before an answer (task `causal_lm`)"""
    answer_column: str = "answer"
    """column with the text whose tokens are predicted"""
    prompt: str = "Question: {question}\nAnswer:"
    """what a model reads before a space and the answer; `{question}` is replaced"""
    messages_column: str | None = None
    """column with conversations, lists of `role` and `content`, in place of questions and answers: the tokenizer's chat
    template makes a text of each, and the last message is predicted"""
    paraphrased_answer_column: str = "paraphrased_answer"
    """column with the right answer in other words; sets may be without it. It is measured only, as those below are"""
    perturbed_answer_column: str = "perturbed_answer"
    """column with lists of wrong answers; sets may be without it"""
    text_column: str | None = None
    """column with texts in place of questions and answers, of which every token is predicted"""
    tokenizer: str | None = None
    """folder of a Hugging Face tokenizer; null: that of the model"""
    max_length: int | None = Field(None, ge=2)
    """tokens of the longest row; a longer one is a bad row. null: as many as the longest row of all sets has, which
    reads them"""
    id_column: str | None = None
    """column with unique sample ids; null: `id` if there is one, else the row number"""
    classes: tuple[str, ...] | None = None
    """class names in the order of the model's outputs"""
    image_mode: Literal["RGB", "L"] = "RGB"
    """decode images as colour or as grey"""
    image_size: Pixels | Annotated[tuple[Pixels, ...], Field(min_length=2, max_length=2)] | None = None
    """resize images to this many pixels square, or to height and width (`[256, 128]`); null: leave as stored"""
    transform: str | None = None
    """what makes an input of a decoded image, in place of `image_size`, `mean` and `std`: `torchvision:WEIGHTS`, as
    `torchvision:ResNet50_Weights.DEFAULT`; `timm:NAME`; `hf:FOLDER`, a folder with an image processor; `model`, the
    model's own of these; or `package.module:callable`, of a PIL image, importing which runs code"""
    mean: tuple[float, ...] | None = None
    """mean per channel, subtracted after decoded images are scaled to [0, 1] (numbers are taken as they are)"""
    std: tuple[Annotated[float, Field(gt=0)], ...] | None = None
    """standard deviation per channel, divided by after the mean"""

    def described(self) -> dict[str, Any]:
        """All settings as plain values; of ids that were listed their number alone."""
        ids = self.ids if isinstance(self.ids, str | None) else f"{len(self.ids)} ids"
        return {**self.to_dict(), "ids": ids}

    @property
    def pixels(self) -> tuple[int, ...] | None:
        """Height and width that images are resized to."""
        return (self.image_size,) * 2 if isinstance(self.image_size, int) else self.image_size

    @property
    def chosen(self) -> int | float | tuple[int, ...] | None:
        """``size`` with indices in place of names; ``ConfigError`` where a name is not listed in ``classes``."""
        if not isinstance(self.size, tuple):
            return self.size
        listed: Sequence[str | int] = self.classes or ()
        unknown = [name for name in self.size if isinstance(name, str) and name not in listed]
        if unknown:
            raise ConfigError(
                f"forget_set.size names {unknown[0]!r}, which is not among the {len(listed)} of forget_set.classes; "
                "expected names that are listed there; mend either"
            )
        return tuple(listed.index(name) if isinstance(name, str) else name for name in self.size)


class InfluenceConfig(Section):
    """How each sample's influence is scored."""

    prefix = "influence."

    block_rows: int = Field(256, ge=1)
    """rows per block: one forward call, one statistics sum, one scoring call; fewer where samples have outputs at many
    positions, so that the logits of a block are 16 million numbers at most"""
    blocks_per_shard: int = Field(4, ge=1, json_schema_extra=NO_RESULT)
    """blocks per task, a power of two; of layers it changes which rows curvature and first trials are taken from"""
    features: Literal["cache", "recompute"] = Field("cache", json_schema_extra=NO_RESULT)
    """keep the features in the object store; or run the forward pass again in every stage (nine and more in all), so
    that nothing is stored or spilled; the workers of an ascent then hold them all in memory"""
    feature_dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    """how features are kept (float32: float64 of a float64 model); what is computed from them is float64"""
    autocast: Literal["none", "float16", "bfloat16"] = "none"
    """type that autocast runs the forward pass in"""
    channels_last: bool = False
    """run the forward pass on images in channels-last memory format"""
    compile: bool = False
    """compile the parts of the model in front of the head (`torch.compile`), once per worker process"""
    curvature: str = "diagonal_fisher"
    """curvature whose damped inverse weights the mean gradient: `diagonal_fisher` (paper), `identity`, `kfac`,
    `hessian`"""
    refresh: Literal["once", "epoch", "step"] = "once"
    """when influence is scored: of the original head; or again, from the cached features, at the start of each epoch of
    the ascent, or within each batch; every sample is then in a batch, and those that are not kept there have no
    weight"""
    reference: Literal["forget_set", "batch"] = "forget_set"
    """what a sample is scored against: the mean gradient and the curvature of the whole forget set, or of its own batch
    alone, a block of `block_rows` rows (paper: re-identification and language models). What `forget_set.size` leaves
    out of a block is not in its batch; the manifest says how many rows the batches have"""
    unit: Literal["sample", "token"] = "sample"
    """what has an influence and an intensity: a sample, or each token that is predicted (tasks `sequence` and
    `causal_lm`). The influences of a sample's tokens add up to its own; its intensity is the mean of theirs"""
    scores: str | None = Field(None, json_schema_extra=NO_RESULT)
    """path of influence that another engine has computed, in place of our own: a folder of bergson's or kronfluence's
    scores, or Parquet with `sample_id` and `influence`. The run is known by its content, not by its path"""
    curvature_set: str = "forget"
    """samples that the curvature is fitted on: `forget`, or the name of an evaluation set"""
    damping: float = Field(0.01, gt=0)
    """lambda, added to the curvature's diagonal"""
    damping_mode: Literal["absolute", "relative"] = "absolute"
    """lambda is a number (paper), or a share of the mean of the curvature's diagonal"""
    robust: Literal["none", "clip"] = "none"
    """`clip`: no sample enters the mean gradient and the Fisher with a larger gradient norm than the quantile below"""
    clip_quantile: float = Field(0.95, gt=0, le=1)
    """quantile of the gradient norms: where `robust` clips, and what `outlier` is measured against"""

    @field_validator("scores")
    @classmethod
    def _is_absolute(cls, value: str | None) -> str | None:
        """A trial of a sweep works in another directory."""
        return value if value is None else str(Path(value).absolute())

    @field_validator("blocks_per_shard")
    @classmethod
    def _is_power_of_two(cls, value: int) -> int:
        if value & (value - 1):
            raise ValueError("a power of two (1, 2, 4, 8, ...), so that the sums do not depend on it")
        return value


class IntensityConfig(Section):
    """How scores become weights of the ascent."""

    prefix = "intensity."

    scheme: str = "uniform"
    """how weights are made: `imu` (paper), `loss`, or a control (`uniform`, `permuted`)"""
    keep_fraction: float = Field(1.0, gt=0, le=1)
    """share of the samples with negative influence kept, the strongest first (`imu`, `permuted`)"""
    clip_quantile: float = Field(0.93, gt=0, le=1)
    """quantile of the kept weights at which they are clipped (`imu`, `permuted`)"""


class StopConfig(Section):
    """When the ascent has done its work: at the first target that is met, or when steps or epochs run out."""

    prefix = "ascent.stop."

    targets: dict[str, float | Literal["auto"] | None] = Field({})
    """when the samples count as forgotten, by metric: `forget.accuracy: 0.8`, or any other metric of the task
    (`forget.loss`, `forget.bounded_loss`, `forget.margin`), or `membership.auc`; the first that is met ends the run.
    `auto`: the mean over samples of `evaluation['test']` with the same labels. Empty: `forget.bounded_loss: auto`, the
    loss counted up to that of a uniform guess; with `ascent.views`, `forget_views.bounded_loss: auto`"""
    tolerance: float = Field(0.005, gt=0)
    """how far past a target a run may end, in the target's unit; an overshoot is bisected back"""
    every_steps: int = Field(10, ge=1)
    """steps between checks"""
    max_epochs: int = Field(10, ge=1, json_schema_extra=NO_RESULT)
    """passes over the kept rows at most; a run that ended `not_reached` continues when this is larger"""
    max_steps: int | None = Field(None, ge=1, json_schema_extra=NO_RESULT)
    """steps at most; null: as many as the epochs have"""

    @property
    def limits(self) -> dict[str, int | None]:
        """What a run that ended ``not_reached`` may continue with more of."""
        return {"max_epochs": self.max_epochs, "max_steps": self.max_steps}

    def but(self, targets: Mapping[str, float | str]) -> "StopConfig":
        """The same with other targets."""
        return self.model_copy(update={"targets": dict(targets)})


class GuardConfig(Section):
    """What must not happen on the way; the head goes back to the last good check and ends `stopped_by_guard`."""

    prefix = "ascent.guard."

    max_forget_loss: float = Field(100.0, gt=0)
    """mean forget loss (nats) above which the ascent counts as exploded"""
    max_parameter_drift: float | None = Field(None, gt=0)
    """largest change of the parameters, as a share of their norm; null: any"""
    limits: dict[str, float] = Field({})
    """worst value allowed of a metric of a sample set: `test.accuracy: 0.8`"""


class AscentConfig(Section):
    """The weighted ascent: what moves, along which direction, and how far."""

    prefix = "ascent."

    scope: str | Annotated[tuple[str, ...], Field(min_length=1)] = "auto"
    """what may move: `auto`, which is `head` for a classifier (`last:1` where it ends in a convolution with more after
    it, as SqueezeNet does) and `usable` for sequences and persons; `head`; `last:N`, the N last linear and
    convolutional layers in order of execution, the head included; `all` such layers, or all that are `usable`;
    `adapters` (LoRA); or a list of module names and globs (`[layer4]`, `["*.q_proj"]`)"""
    views: int = Field(0, ge=0)
    """augmented views of every row to forget, which gradient and curvature are taken over; 0: the rows as they are"""
    view_transform: str = "crop_flip"
    """how a view is drawn: `crop_flip`, `flip`, or `package.module:callable`, the model's own training augmentation of
    a decoded image; importing it runs code"""

    update: str = "one_step"
    """`one_step`: one gradient of the whole forget set, and a search for the length of the step; `iterative`: steps
    over batches with an optimiser"""
    objective: str = "bounded_ascent"
    """what a step does to the logits: `ascent`, `bounded_ascent`, `npo`, `renormalise`, `row_mask`, `uniform_target`"""
    preconditioner: str = "auto"
    """curvature that steers the step: of the head `none`, `feature_second_moment`, `block_ggn`, `full_ggn`; of layers
    `none` or `kfac` (the head among them has `block_ggn` where there is room); `auto`: `block_ggn` of the head, `kfac`
    of layers"""
    preconditioner_sets: tuple[str, ...] = ("forget", "test")
    """sample sets whose inputs that curvature is summed over; of `test` no label is used, and it is left out when it
    was not given. A few rows alone say nothing of the directions that other samples need"""
    preconditioner_damping: float = Field(0.01, gt=0)
    """damping of the preconditioner, as a share of its mean eigenvalue"""
    preconditioner_rows: int = Field(4096, ge=1)
    """rows of each set, evenly spaced, that the curvature of layers is summed over; the head's takes all"""
    preconditioner_memory: float = Field(2.0, gt=0, json_schema_extra=NO_RESULT)
    """GiB that the preconditioner may take in one process"""
    bundle: str | None = Field(None, json_schema_extra=NO_RESULT)
    """path or URI of a curvature bundle (`imu-ray remember`), whose sums over the training set steer the step in place
    of those over `preconditioner_sets`; those of the rows to forget are among them and are not subtracted. It serves
    `block_ggn` and `feature_second_moment` of the head, and `kfac` of layers. The run is known by the bundle's content,
    not by its path"""
    optimizer: Literal["sgd", "adamw"] = "sgd"
    """optimiser"""
    learning_rate: float = Field(0.01, gt=0)
    """step size"""
    schedule: Literal["constant", "cosine", "step"] = "constant"
    """learning rate over the steps: constant; cosine to 0; or a tenth after each of half and three quarters"""
    momentum: float = Field(0.9, ge=0, le=1)
    """momentum of SGD; first beta of AdamW"""
    weight_decay: float = Field(0.0, ge=0)
    """L2 penalty on the head, added to the gradient (AdamW: decoupled); a preconditioner amplifies it"""
    l1: float = Field(0.0, ge=0)
    """alpha, weight of the L1 norm of the head"""
    anchor: float = Field(0.0, ge=0)
    """mu, pull back to the original head: mu (W - W0) is added to the gradient"""
    max_gradient_norm: float | None = Field(None, gt=0)
    """largest norm of a step's gradient over all layers, before curvature and penalties; a larger one is scaled down;
    null: any"""
    batch_size: int = Field(256, ge=1)
    """kept rows per global step, whatever the number of workers"""
    microbatch_rows: Annotated[int, Field(ge=1)] | Literal["auto"] = "auto"
    """rows per piece of a batch that is dealt to one worker, of sequences at most a block; a worker beyond the pieces
    of a batch has nothing to do; `auto`: 32 of the head, 128 of layers"""
    window_blocks: int = Field(64, ge=1)
    """blocks within which rows are shuffled; reads stay sequential beyond"""
    keep: Literal["last", "best", "all"] = "last"
    """parameters kept: the last; those of the check nearest the first target; or the last, with those of every check in
    `checks/`"""
    state_every_checks: int = Field(1, ge=1, json_schema_extra=NO_RESULT)
    """checks between saved states"""
    max_change: dict[str, float] = Field({})
    """trust region: largest change of a metric of the forget set in one step (`forget.accuracy: 0.1`); a step that
    changes more is halved until it does not"""
    stop: StopConfig = Field(default_factory=StopConfig)
    guard: GuardConfig = Field(default_factory=GuardConfig)

    @field_validator("bundle")
    @classmethod
    def _is_absolute(cls, value: str | None) -> str | None:
        """A trial of a sweep works in another directory."""
        return value if value is None or "://" in value else str(Path(value).absolute())

    @property
    def deep(self) -> bool:
        """Whether more may move than a head on its kept inputs."""
        return self.scope not in ("auto", "head")

    @property
    def piece_rows(self) -> int:
        """The rows of a piece: layers near the end of a network need many before their products are fast."""
        automatic = 128 if self.deep else 32
        return automatic if self.microbatch_rows == "auto" else self.microbatch_rows

    @property
    def curvature(self) -> str:
        """The preconditioner that is meant."""
        automatic = "kfac" if self.deep else "block_ggn"
        return automatic if self.preconditioner == "auto" else self.preconditioner


class AuditConfig(Section):
    """What is measured before and after."""

    prefix = "audit."

    membership_min_rows: int = Field(20, ge=8)
    """fewest rows per side for a membership-inference figure"""
    permutations: int = Field(200, ge=20)
    """label permutations behind the membership band"""
    distance: Literal["cosine", "euclidean"] = "cosine"
    """between embeddings, where persons are looked up (task `reid`)"""
    generate: bool = False
    """let a language model answer every question, the likeliest token at each place, for ROUGE-L and model utility: a
    pass for each token"""
    generated_tokens: int = Field(200, ge=1)
    """most tokens of such an answer"""
    choice_sets: tuple[str, ...] = ("real_authors", "world_facts")
    """sample sets of multiple choice: the probability of an answer is its share among the right and wrong ones"""
    retain_log: str | None = None
    """open-unlearning's log of a model trained without the forget set (`TOFU_EVAL.json`): what forget quality compares
    with"""
    reference: str | None = None
    """a model of the same kind that was trained without the forget set, to compare with: path or URI of its checkpoint,
    or a folder that `save_pretrained` wrote"""
    recovery: tuple[Literal["probe", "relearn", "quantise", "lora"], ...] = ("probe",)
    """what is tried to bring the forgotten answers back, of the model before, after and of the reference: `probe`, a
    new head on a few labelled rows; `relearn`, a few steps on some of the rows; `quantise` to 8 and 4 bit; `lora`, such
    steps of adapters (language models)"""
    recovery_rows: int = Field(10, ge=1)
    """labelled rows of each class that `probe` and the steps are given, at most half of those in the forget set"""
    recovery_steps: int = Field(20, ge=1)
    """steps of `relearn` and `lora`, each over all of these rows"""
    recovery_learning_rate: float = Field(0.01, gt=0)
    """of the plain SGD of `relearn`; `lora` takes AdamW at 0.001"""
    views: int = Field(0, ge=0)
    """augmented views of every row to forget and of every row of `test`, drawn anew as `ascent.view_transform` says and
    by no step of the update: measured before and after as the sets `forget_fresh_views` and `test_fresh_views`; 0:
    none"""
    control: bool = False
    """unlearn as many rows of `test`, which were never trained on, by as much, and tell what either costs on other
    rows; a second update of the same model"""
    checks: bool = False
    """measure the figures at every check of the update too, once it has ended; needs `ascent.keep: all`"""
    report: bool = Field(True, json_schema_extra=NO_RESULT)
    """write report.html"""
    samples: int = Field(0, ge=0, json_schema_extra=NO_RESULT)
    """show so many of the samples to forget, those with the highest influence and those least forgotten: pictures, or
    the beginning of texts, in `report_with_samples.html`; `report.html`, which an export holds, never shows one"""

    @field_validator("retain_log", "reference")
    @classmethod
    def _is_absolute(cls, value: str | None) -> str | None:
        """A trial of a sweep works in another directory."""
        return value if value is None or "://" in value else str(Path(value).absolute())


class RecordConfig(Section):
    """What the record says of the ids to forget."""

    prefix = "record."

    key: str | None = Field(None, json_schema_extra=NO_RESULT)
    """path of a file with a secret of 16 bytes or more, under which the record keeps a fingerprint of the ids to forget
    (HMAC-SHA256), and one of each id: who has the secret can test whether an id was among them. null: the record says
    nothing of ids"""

    @field_validator("key")
    @classmethod
    def _is_absolute(cls, value: str | None) -> str | None:
        """A trial of a sweep works in another directory."""
        return value if value is None else str(Path(value).absolute())


class ResourcesConfig(Section):
    """What a run takes of the cluster."""

    prefix = "resources."

    workers: Annotated[int, Field(ge=1)] | Literal["auto"] = Field("auto", json_schema_extra=NO_RESULT)
    """parallel tasks; `auto`: as many as the cluster has room for"""
    ascent_workers: Annotated[int, Field(ge=1)] | Literal["auto"] = Field("auto", json_schema_extra=NO_RESULT)
    """processes of the ascent; `auto`: one, unless the kept features do not fit one node's object store"""
    cpus_per_worker: int = Field(1, ge=1)
    """CPU threads of a worker"""
    gpus_per_worker: float = Field(0.0, ge=0)
    """GPUs of a worker; fractions share a GPU"""
    autoscaling: bool | Literal["auto"] = Field("auto", json_schema_extra=NO_RESULT)
    """wait for nodes when the workers do not fit on those that are there; `auto`: where Ray's autoscaler is known to
    run (`ray up`, autoscaler v2)"""
    max_retries: int = Field(2, ge=0, json_schema_extra=NO_RESULT)
    """times a killed task or worker group is started again"""

    @property
    def tasks(self) -> int:
        """Parallel tasks, once ``ray_session`` has counted the room of the cluster."""
        if self.workers == "auto":
            raise ConfigError("resources.workers is 'auto' outside of a Ray session; expected what ray_session gives")
        return self.workers

    @field_validator("gpus_per_worker")
    @classmethod
    def _is_fraction_or_whole(cls, value: float) -> float:
        if value > 1 and not value.is_integer():
            raise ValueError("a fraction of one, or a whole number")
        return value


class UnlearnConfig(Section):
    """All settings of a run. Make one with ``from_recipe`` and ``with_overrides``."""

    seed: int = Field(0, ge=0)
    """seed of every random choice"""
    recipe: str = "auto"
    """named set of settings that this configuration started from; chosen with `from_recipe` or a job's `recipe:`"""
    log: Literal["text", "json"] = Field("text", json_schema_extra=NO_RESULT)
    """how a job writes its log: a line of text, or of JSON, per event"""
    tracking: Literal["mlflow", "wandb"] | None = Field(None, json_schema_extra=NO_RESULT)
    """where a run, or the trials of a sweep, are shown beside the run directory (extras `mlflow`, `wandb`): settings,
    trajectory and figures, no sample and no id. Address and project are said by the tracker's own environment variables
    (`MLFLOW_TRACKING_URI`, `WANDB_MODE`, ...)"""
    forget_set: ForgetSetConfig = Field(default_factory=ForgetSetConfig)
    influence: InfluenceConfig = Field(default_factory=InfluenceConfig)
    intensity: IntensityConfig = Field(default_factory=IntensityConfig)
    ascent: AscentConfig = Field(default_factory=AscentConfig)
    audit: AuditConfig = Field(default_factory=AuditConfig)
    record: RecordConfig = Field(default_factory=RecordConfig)
    resources: ResourcesConfig = Field(default_factory=ResourcesConfig)

    @classmethod
    def from_recipe(cls, name: str) -> "UnlearnConfig":
        """The settings of a recipe (``RECIPES``); ``ConfigError`` names the nearest one when there is none."""
        return cls(**merge(cls, recipe_settings(name)))

    def identity(self) -> str:
        """As of any section, with what counts at times: a bundle, scores, limits of a schedule, shards of layers."""
        ascent, digest = self.ascent, super().identity()
        digest += "-bundle" if ascent.bundle else ""
        digest += "-scores" if self.influence.scores else ""
        if ascent.deep:  # evenly spaced shards stand for all rows in the curvature and in the first trials
            digest += f"-{self.influence.blocks_per_shard}"
        return digest if ascent.schedule == "constant" else f"{digest}-{ascent.stop.max_epochs}-{ascent.stop.max_steps}"

    def with_overrides(self, overrides: Mapping[str, Any]) -> "UnlearnConfig":
        """As of any section; the recipe stays."""
        changed = super().with_overrides(overrides)
        if changed.recipe != self.recipe:
            raise ConfigError(
                f"recipe cannot be overridden (now {self.recipe!r}, wanted {changed.recipe!r}); expected "
                "UnlearnConfig.from_recipe(name), which sets everything that the recipe stands for, and overrides "
                "after it"
            )
        return changed


class SweepConfig(Section):
    """How the trials of a sweep are made, run and chosen."""

    prefix = "sweep."

    samples: int = Field(1, ge=1)
    """draws of the axes that are distributions, for each point of the others"""
    scheduler: Literal["grid", "asha"] = "grid"
    """run every trial to its end, or stop early those whose forget accuracy falls slowest (one size at a time)"""
    choose_by: Literal["auto", "output_change", "parameter_drift", "retain", "test"] = "auto"
    """best trial of a size, among those that reached their target: highest accuracy on an evaluation set (`retain`,
    `test`), or, without retain data, least change of the outputs or of the head; `auto`: `retain` where `evaluation`
    has it, else `output_change` for sets of a few classes and `parameter_drift` for mixed ones"""
    max_retries: int = Field(1, ge=0, json_schema_extra=NO_RESULT)
    """times a failed trial is started again"""


class EnsembleConfig(Section):
    """How many models an ensemble has, how they are trained, and what is done to them."""

    prefix = "ensemble."

    train_fn: str | None = None
    """`package.module:callable` that trains a model in place: `train_fn(model, inputs, labels, seed)`, with decoded
    inputs and labels; importing it runs code"""
    models: int = Field(64, ge=2)
    """originals, and as many models retrained without the forget set; more are added to those that are there"""
    methods: dict[str, Any] = Field({})
    """name (without a dot) to settings of a run (`{recipe: samples}`), or to `{call: "package.module:callable"}` with
    arguments; none: the recipe `samples`"""
    control: bool = True
    """run every method on the retrained models too: never trained on the rows, and unlearned alike"""
    retain_points: int = Field(500, ge=20)
    """retained rows, evenly spaced, at which models are compared"""


# recipe -> what it changes. `samples` is the default of every setting: bounded ascent in one step, steered by the
# curvature of the forget set and of unseen samples as a stand-in for that of the retain set.
RECIPES: dict[str, dict[str, Any]] = {
    # The same settings, after a look at the labels: rows that may be a class are asked about.
    "auto": {},
    "samples": {},
    # As `samples`, over augmented views of the rows: the picture is forgotten, not its pixels.
    "views": {"ascent.views": 6, "audit.views": 1},
    # Whole classes: push down the true-class logit and nothing else, until the class is gone.
    "classes": {
        "ascent.update": "iterative",
        "ascent.objective": "row_mask",
        "ascent.preconditioner": "none",
        "ascent.weight_decay": 5e-4,
        "ascent.max_change": {"forget.accuracy": 0.1, "forget.loss": 0.5},
        "ascent.stop.every_steps": 1,
        "ascent.stop.max_epochs": 100,
        "ascent.stop.targets": {"forget.accuracy": 0.01},
    },
    # arXiv:2508.01620, with frozen BatchNorm statistics and a stop rule.
    "paper": {
        "intensity.scheme": "imu",
        "ascent.update": "iterative",
        "ascent.objective": "ascent",
        "ascent.preconditioner": "none",
        "ascent.weight_decay": 5e-4,
        "ascent.l1": 5e-4,
    },
}


def recipe_settings(name: Any) -> dict[str, Any]:
    """What a recipe changes, and its name; ``ConfigError`` names the nearest one when there is none."""
    if not isinstance(name, str) or name not in RECIPES:
        raise ConfigError(f"recipe is {name!r}; {nearest(str(name), RECIPES)}")
    return {"recipe": name, **RECIPES[name]}


def settings_table(section: type[Section] = UnlearnConfig) -> str:
    """All settings of a section as a Markdown table, in the order of their declaration."""
    rows = ["| setting | default | values | meaning |", "|---|---|---|---|"]
    for key, schema in settings_of(section).items():
        default = schema.get("default")
        default = default if isinstance(default, str) else json.dumps(default)
        rows.append(f"| `{section.prefix}{key}` | `{default}` | {in_words(schema)} | {schema['description']} |")
    return "\n".join(rows) + "\n"
