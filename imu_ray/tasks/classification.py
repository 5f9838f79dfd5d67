"""Image (or array) classification, with a class, soft or several labels a sample (``forget_set.target``)."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from typing_extensions import Self

from imu_ray.config import ForgetSetConfig
from imu_ray.data import Fields, Rows, Source, View
from imu_ray.data.columns import image_fields
from imu_ray.data.labels import check_labels
from imu_ray.errors import ConfigError, ForgetSetError, NonFiniteError, UnsupportedModelError
from imu_ray.influence import targets
from imu_ray.influence.gradients import output_gradient
from imu_ray.influence.scores import margins, membership_signals, relative_losses, sample_losses
from imu_ray.models.copies import unusable
from imu_ray.models.head import find_ending, head_layers, head_sizes
from imu_ray.models.layers import logits_of
from imu_ray.tasks.base import Batch, Metric, Outputs, UnusableError, leave_out
from imu_ray.tasks.images import ARRAY, decode_array, decode_image, image_of, pixels_of
from imu_ray.tasks.preprocessing import check_alone, prepare
from imu_ray.tasks.transforms import augment

AGAIN = 4  # times that a preprocessing is run again, to find one that draws random numbers


@dataclass(frozen=True)
class ClassificationTask:
    """Softmax cross-entropy on a classifier's logits; of several labels a sample the mean of their binary ones.

    Attributes:
        config: how rows are decoded, what a label is, and class weights.
        head: name of the head in the model; empty where what it ends in is not linear in kept features.
        num_classes: outputs of the model.
        dtype: floating type of the model's inputs.
        shape: shape of a sample; None before it is known.
    """

    config: ForgetSetConfig
    head: str = ""
    num_classes: int = 0
    dtype: torch.dtype = torch.float32
    shape: tuple[int, ...] | None = None
    scope: ClassVar[str] = "head"
    augmented: ClassVar[bool] = True
    retrieval_sets: ClassVar[tuple[str, ...]] = ()
    positions: ClassVar[int] = 0

    @classmethod
    def fields(cls, config: ForgetSetConfig) -> Fields:
        """An image and its label."""
        return image_fields(config)

    @classmethod
    def for_model(
        cls, model: nn.Module, sources: Mapping[str, Source], config: ForgetSetConfig, head: str | None = None
    ) -> "ClassificationTask":
        """Find the model's head with the first usable row of ``forget``."""
        samples = sources["forget"]
        settings = [config, *(source.row_settings for source in sources.values() if source.row_settings is not None)]
        for each in settings:
            _check_size(each)
            check_alone(each)
        parameter = next((p for p in model.parameters() if p.is_floating_point()), torch.zeros(()))
        task = cls(config.with_overrides({"on_bad_row": "skip"}), dtype=parameter.dtype)
        for row in range(samples.num_rows):
            first = samples.placed(samples.read(row, row + 1), row)
            batch = task.collate(first)
            if batch.ids:
                break
        else:
            raise ForgetSetError(
                f"no row of {samples.name} can be used (the last: {batch.bad_rows[0].reason}); expected at least one "
                "that decodes to finite numbers; see forget_set.image_column"
            )
        if config.transform is not None and any(
            not torch.equal(task.collate(first).inputs, batch.inputs) for _ in range(AGAIN)
        ):
            raise ConfigError(
                f"forget_set.transform {config.transform!r} gives another input for the same image when it is run "
                "again; expected one without random numbers; augmentations are named in ascent.view_transform"
            )
        ending = find_ending(model, batch.inputs.to(parameter.device), head)
        name, outputs = ending.layer if ending.linear else "", ending.classes
        for classes in (each.classes for each in settings if each.classes is not None):
            if len(classes) != outputs or len(set(classes)) != outputs:
                raise ConfigError(
                    f"forget_set.classes lists {len(classes)} names ({len(set(classes))} different) for a model with "
                    f"{outputs} outputs; expected every class once, in the order of the outputs"
                )
        if config.class_weights is not None and len(config.class_weights) != outputs:
            raise ConfigError(
                f"forget_set.class_weights has {len(config.class_weights)} numbers for a model with {outputs} outputs; "
                "expected one for each, in the order of the outputs; mend it"
            )
        return cls(config, name, outputs, parameter.dtype, tuple(batch.inputs.shape[1:]))

    def reading(self, config: ForgetSetConfig) -> Self:
        """The same task under other settings of the rows."""
        return replace(self, config=config)

    @property
    def of_classes(self) -> bool:
        """Whether a sample has one class, rather than soft or several labels."""
        return self.config.target == "class"

    @property
    def metrics(self) -> Mapping[str, Metric]:
        """Loss, the same bounded by that of a uniform guess, and how often the model is right (``sample_metrics``)."""
        several = self.config.target == "multi_label"
        guess = 1 / (2 if several else max(self.num_classes, 1))
        losses = {
            "loss": Metric(rises=True, chance=None if self.config.class_weights else -math.log(guess), least=0),
            "bounded_loss": Metric(rises=True, chance=-math.log(guess), least=0, most=-math.log(guess)),
        }
        if several:
            right = Metric(rises=False, chance=guess, least=0, most=1)
            return {**losses, "label_accuracy": right, "f1": Metric(rises=False, least=0, most=1)}
        accuracy = {"accuracy": Metric(rises=False, counted=True, chance=guess, least=0, most=1)}
        return {**losses, **accuracy, **({"margin": Metric(rises=False)} if self.config.target == "class" else {})}

    def target(self, labels: Tensor) -> Tensor:
        """What the loss is of: classes, or labels with the class weights in them (``targets.target_of``)."""
        return targets.target_of(labels, self.config.target, self.config.class_weights)

    def sample_metrics(self, outputs: Tensor, labels: Tensor) -> dict[str, Tensor]:
        r"""Of each sample, ``[B]``, ``loss`` :math:`\ell` in nats, with the class weights in it, and more.

        ``bounded_loss``: :math:`\min(\ell / s, \ln C)`, with the sample's scale s (``targets.scales``) so that weights
        do not say when a sample is forgotten; of several labels with :math:`\ln 2`. ``accuracy``: 1 where the likeliest
        class is the label, or that of a soft label; and of a class the ``margin``.

        Of several labels ``label_accuracy``: the share that is right (1 minus the Hamming loss), a label being
        predicted where its logit is above 0; and ``f1``: twice the labels that are predicted and true, over those that
        are predicted and those that are true; 1 where there is none of either.
        """
        target, kind = self.target(labels), self.config.target
        guess = targets.guess_loss(target, self.num_classes)
        found = {
            "loss": sample_losses(outputs, target),
            "bounded_loss": relative_losses(outputs, target).clamp_max(guess),
        }
        if kind == "multi_label":
            predicted, true = outputs > 0, labels > 0
            both, each = 2 * (predicted & true).sum(1), predicted.sum(1) + true.sum(1)
            found["label_accuracy"] = (predicted == true).double().mean(1)
            return {**found, "f1": torch.where(each > 0, both / each.clamp_min(1), 1.0).double()}
        own = labels if kind == "class" else labels.argmax(1)
        found["accuracy"] = (outputs.argmax(1) == own).double()
        return {**found, "margin": margins(outputs, labels)} if kind == "class" else found

    def signals(self, outputs: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """``confidence``, ``entropy``, ``modified_entropy``, ``margin`` (float64) and ``predicted`` (int64).

        None where a sample has no one class.
        """
        return membership_signals(outputs, labels) if self.config.target == "class" else {}

    def output_gradient(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """``p - onehot(y)``, or that of another target, exact for confident samples."""
        return output_gradient(outputs, self.target(labels))

    def collate(self, rows: Rows) -> Batch:
        """Decode, scale to [0, 1], augment (a ``View``), standardise and stack; or as ``forget_set.transform`` does.

        Raises:
            ConfigError: the transform of the rows, or of the views, cannot be used.
            ForgetSetError: a row does not decode, or its label is outside the classes.
            NonFiniteError: a row holds NaN or infinity.
        """
        inputs, kept, bad = [], [], []
        decoded: dict[int, Tensor] = {}
        check_labels(rows.labels, self.num_classes, self.config, rows.name_of)
        for place in range(len(rows.ids)):
            value = rows.inputs[place]
            try:
                if isinstance(value, View):
                    numbers = self._drawn(value, decoded)
                elif self.config.transform is not None:
                    numbers = prepare(self._image(value), self.config.transform).to(self.dtype)
                else:
                    numbers = self._numbers(value)
                numbers = self._standardise(numbers)
                self._check_shape(numbers)
                inputs.append(numbers)
                kept.append(place)
            except UnusableError as error:
                bad.append(leave_out(self.config, rows, place, str(error)))
        stacked = torch.stack(inputs) if inputs else torch.empty(0)
        # Once for the block: a check of every row would cost more than reading it.
        finite = torch.isfinite(stacked).reshape(len(stacked), -1).all(1) if inputs else torch.empty(0)
        if not finite.all():
            bad += [
                leave_out(self.config, rows, kept[at], "the input holds NaN or infinity", NonFiniteError)
                for at in (~finite).nonzero()[:, 0].tolist()
            ]
            stacked, kept = (
                stacked[finite],
                [place for place, usable in zip(kept, finite.tolist(), strict=True) if usable],
            )
        return Batch(stacked, torch.from_numpy(rows.labels[kept]), [rows.ids[place] for place in kept], bad)

    def _numbers(self, value: Any) -> Tensor:
        """An image as pixels in [0, 1], or an array, as it is given."""
        if value is None:
            raise UnusableError("the input is missing")
        if isinstance(value, bytes) and value.startswith(ARRAY):
            value = decode_array(value)
        if isinstance(value, bytes | Image.Image):
            value = self._pixels(value)
        try:
            if not isinstance(value, Tensor):
                array = np.asarray(value)
                # A copy as torch takes it: not mirrored, read-only or of the other byte order.
                value = torch.from_numpy(array.astype(array.dtype.newbyteorder("="), order="C"))
        except (TypeError, ValueError, RuntimeError):
            raise UnusableError(
                f"the input is a {type(value).__name__}, not an image or an array of numbers (see "
                "forget_set.image_column)"
            ) from None
        reason = unusable(value) or ("complex" if value.is_complex() else None if value.numel() else "empty")
        if reason:
            raise UnusableError(f"the input is {reason}")
        numbers: Tensor = value.detach().to(self.dtype)
        return numbers

    def _check_shape(self, numbers: Tensor) -> None:
        if self.shape and not numbers.ndim:
            raise UnusableError("the input is one number, not an image or an array (see forget_set.image_column)")
        if self.shape is not None and tuple(numbers.shape) != self.shape:
            raise UnusableError(
                f"its shape is {list(numbers.shape)}, that of the first sample {list(self.shape)} (see "
                "forget_set.image_size)"
            )

    def _pixels(self, image: bytes | Image.Image) -> Tensor:
        """A decoded image ``[channels, height, width]`` in [0, 1]."""
        image = decode_image(image, self.config.image_mode)
        if self.config.pixels:
            height, width = self.config.pixels
            image = image.resize((width, height), Image.Resampling.BILINEAR)
        return pixels_of(image, self.dtype)

    def _drawn(self, value: View, decoded: dict[int, Tensor]) -> Tensor:
        """A view of a sample, of whose views ``decoded`` keeps what they are drawn from."""
        name = self.config.transform
        if id(value.input) not in decoded:
            if name is None:
                numbers = self._numbers(value.input)
                self._check_shape(numbers)
            else:
                numbers = pixels_of(self._image(value.input), torch.float32)
            decoded.clear()  # views of a sample stand together
            decoded[id(value.input)] = numbers
        drawn = augment(decoded[id(value.input)], value.transform, value.draw)
        return drawn if name is None else prepare(image_of(drawn), name).to(self.dtype)

    def _image(self, value: Any) -> Image.Image:
        """What ``forget_set.transform`` is given."""
        if not isinstance(value, bytes | Image.Image):
            what = "missing" if value is None else f"a {type(value).__name__}"
            raise UnusableError(f"the input is {what}; forget_set.transform takes images")
        return decode_image(value, self.config.image_mode)

    def _standardise(self, numbers: Tensor) -> Tensor:
        for name, sign in (("mean", -1), ("std", 1)):
            values = getattr(self.config, name)
            if values is None:
                continue
            if numbers.ndim == 0 or len(values) not in (1, numbers.shape[0]):
                raise ConfigError(
                    f"forget_set.{name} has {len(values)} values for a sample of shape {list(numbers.shape)}; expected "
                    "one per channel"
                )
            per_channel = torch.tensor(values, dtype=self.dtype).reshape(-1, *[1] * (numbers.ndim - 1))
            numbers = numbers - per_channel if sign < 0 else numbers / per_channel
        return numbers

    def forward(self, model: nn.Module, batch: Batch) -> Outputs:
        """One forward pass; the head's input is caught on the way."""
        caught: list[Tensor] = []
        layer, rows = head_layers(model)[self.head], len(batch.labels_B)
        hook = layer.register_forward_pre_hook(lambda _module, inputs: caught.append(inputs[0]))
        try:
            logits = logits_of(model(batch.inputs))
        finally:
            hook.remove()
        if len(caught) != 1:
            raise UnsupportedModelError(
                f"the head {self.head!r} was called {len(caught)} times in a forward pass; expected once"
            )
        features = caught[0].flatten(1) if caught[0].ndim > 2 else caught[0]  # of a convolution, at one position
        shapes, (outputs, inputs) = [tuple(found.shape) for found in (features, logits)], head_sizes(layer)
        if shapes != [(rows, inputs), (rows, outputs)]:
            raise UnsupportedModelError(
                f"{type(model).__name__} gave head inputs {shapes[0]} and outputs {shapes[1]} for {rows} samples; "
                "expected a row for each"
            )
        return Outputs(logits, batch.labels_B, features)


def _check_size(config: ForgetSetConfig) -> None:
    limit = Image.MAX_IMAGE_PIXELS
    if limit is not None and math.prod(config.pixels or ()) > limit:
        raise ConfigError(
            f"forget_set.image_size is {config.image_size}; expected at most {math.isqrt(limit)} square, Pillow's "
            "limit for an image"
        )
