"""What is done to an image before a model sees it, by name: as torchvision, timm or Hugging Face do, or one's own."""

import functools
from collections.abc import Callable
from typing import Any

from PIL import Image
from torch import Tensor, nn

from imu_ray.config import ForgetSetConfig
from imu_ray.errors import ConfigError, nearest
from imu_ray.models.copies import unusable
from imu_ray.models.spec import ModelSpec, import_path
from imu_ray.tasks.transforms import own_code

SETTING = "forget_set.transform"
MODEL, TORCHVISION, TIMM, HF = "model", "torchvision:", "timm:", "hf:"
EXPECTED = (
    "expected 'torchvision:ResNet50_Weights.DEFAULT' or other weights, 'timm:NAME', 'hf:FOLDER', "
    "'package.module:callable', or 'model'"
)
Preprocessing = Callable[[Image.Image], Tensor]


@functools.lru_cache(maxsize=16)
def find_preprocessing(name: str) -> Preprocessing:
    """What makes an input ``[C, H, W]`` of an image; made once per process.

    Raises:
        ConfigError: there is none of that name, an extra is missing, or it cannot be read or imported.
    """
    for prefix, make in ((TORCHVISION, _of_torchvision), (TIMM, _of_timm), (HF, _of_hugging_face)):
        if name.startswith(prefix):
            return make(name.removeprefix(prefix))
    if ":" not in name:
        raise ConfigError(f"{SETTING} is {name!r}; {EXPECTED}")
    found = import_path(SETTING, name)
    if not callable(found):
        raise ConfigError(f"{SETTING} {name!r} is a {type(found).__name__}; expected a callable PIL image -> tensor")
    return found  # type: ignore[no-any-return]


def prepare(image: Image.Image, name: str) -> Tensor:
    """The input that a preprocessing makes of an image.

    Raises:
        ConfigError: it does not take the image, or gives no dense floating tensor.
    """
    transform = find_preprocessing(name)
    size = f"{image.width} x {image.height} pixels"
    given = f"an image of mode {image.mode} and {size}; expected one that takes it; see forget_set.image_mode"
    with own_code(SETTING, name, given):
        made = transform(image)
    if unusable(made) or not made.is_floating_point():
        gave = f"{made.dtype}" if isinstance(made, Tensor) else f"a {type(made).__name__}"
        raise ConfigError(f"{SETTING} {name!r} gave {gave}; expected a dense floating tensor [channels, height, width]")
    return made.detach().cpu()


def check_alone(config: ForgetSetConfig) -> None:
    """Refuse settings that a preprocessing takes the place of."""
    beside = [name for name in ("image_size", "mean", "std") if getattr(config, name) is not None]
    if config.transform is not None and beside:
        raise ConfigError(
            f"{SETTING} is {config.transform!r}, with {', '.join(beside)} beside it; expected it alone, because it "
            "resizes and standardises itself; leave them out"
        )


def named_for(config: ForgetSetConfig, spec: ModelSpec | None, model: nn.Module) -> ForgetSetConfig:
    """The settings with the model's own preprocessing by its name, where ``model`` is asked for.

    Raises:
        ConfigError: the model does not say what it is.
    """
    if config.transform != MODEL:
        return config
    return config.with_overrides({"transform": _own(spec, model)})


def _own(spec: ModelSpec | None, model: Any) -> str:
    factory = spec.factory if spec is not None and isinstance(spec.factory, str) else ""
    if factory and ":" not in factory and (weights := (spec.kwargs if spec else {}).get("weights")) is not None:
        import torchvision

        known = torchvision.models.get_model_weights(factory)
        found = weights if isinstance(weights, known) else known[str(weights).rpartition(".")[2]]
        return f"{TORCHVISION}{known.__name__}.{found.name}"
    if isinstance(described := getattr(model, "pretrained_cfg", None), dict):
        return _timm_name(model, described)
    if folder := getattr(model, "name_or_path", ""):
        return f"{HF}{folder}"
    raise ConfigError(
        f"{SETTING} is 'model', but {type(model).__name__} does not say what its preprocessing is; expected a model of "
        "timm or of Hugging Face's, or a torchvision factory with model.kwargs.weights; name it: " + EXPECTED
    )


def _timm_name(model: Any, described: dict[str, Any]) -> str:
    """The name that timm has for a model's data settings."""
    import timm

    name = ".".join(filter(None, (described.get("architecture"), described.get("tag"))))
    own = timm.data.resolve_model_data_config(model)
    if not timm.models.is_model(name) or _timm_settings(name) != own:
        raise ConfigError(
            f"{SETTING} is 'model', but the data settings of this model are not those that timm has for {name!r}; "
            "expected those; name a callable of your own ('package.module:callable')"
        )
    return f"{TIMM}{name}"


def _timm_settings(name: str) -> dict[str, Any]:
    import timm

    described = timm.get_pretrained_cfg(name)
    if described is None:
        raise ConfigError(f"{SETTING} is 'timm:{name}'; {nearest(name, timm.list_models())}")
    return dict(timm.data.resolve_data_config(pretrained_cfg=described.to_dict()))


def _of_torchvision(name: str) -> Preprocessing:
    import torchvision

    try:
        weights = torchvision.models.get_weight(name)
    except (ValueError, KeyError):
        kinds = map(torchvision.models.get_model_weights, torchvision.models.list_models(module=torchvision.models))
        names = [f"{kind.__name__}.{weights.name}" for kind in kinds for weights in kind]
        raise ConfigError(f"{SETTING} is 'torchvision:{name}'; {nearest(name, names)}") from None
    return weights.transforms()  # type: ignore[no-any-return]


def _of_timm(name: str) -> Preprocessing:
    try:
        import timm
    except ImportError:
        raise ConfigError(f"{SETTING} is 'timm:{name}'; expected the extra: pip install imu-ray[timm]") from None
    return timm.data.create_transform(**_timm_settings(name), is_training=False)  # type: ignore[no-any-return]


def _of_hugging_face(folder: str) -> Preprocessing:
    try:
        from transformers import AutoImageProcessor
    except ImportError:
        raise ConfigError(f"{SETTING} is 'hf:{folder}'; expected the extra: pip install imu-ray[hf]") from None
    try:
        processor = AutoImageProcessor.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # of many kinds
        raise ConfigError(
            f"{SETTING} is 'hf:{folder}', from which no image processor can be read ({type(error).__name__}); expected "
            "a folder that processor.save_pretrained wrote (preprocessor_config.json)"
        ) from None
    return lambda image: processor(images=image, return_tensors="pt")["pixel_values"][0]
