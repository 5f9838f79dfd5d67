"""Hugging Face's image classifiers and causal language models, in a folder that ``from_pretrained`` opens."""

import copy
import shutil
import warnings
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from imu_ray.errors import CheckpointError, ConfigError, ImuError
from imu_ray.models.copies import without_numbers
from imu_ray.models.downloads import download_remedy

BESIDE = (
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt",
    "*.model", "chat_template*", "preprocessor_config.json", "processor_config.json",
)  # fmt: skip
CONFIG, ADAPTER = "config.json", "adapter_config.json"
WEIGHTS = ("*.safetensors", "*.bin", "*.index.json")


def load_pretrained(path: str, **settings: Any) -> nn.Module:
    """An image classifier, or a causal language model, which keeps no keys and values of a pass, in its adapter if any.

    Args:
        path: a folder that ``save_pretrained`` wrote, or the name of a model in the local cache of Hugging Face's hub.
        settings: of ``from_pretrained``. Unless they say otherwise weights keep their type, and nothing is downloaded
            (``local_files_only``). No code is run from the folder.

    Raises:
        ConfigError: the extra is not installed, the settings ask to run code, or the model is of another kind.
        CheckpointError: there is no such model, or it cannot be read whole.
    """
    if settings.get("trust_remote_code"):
        raise ConfigError(
            "model.kwargs.trust_remote_code is true, which runs code from the model's folder; expected a model that "
            "transformers has; for another, name a factory of your own"
        )
    settings = {"dtype": "auto", "local_files_only": True, **settings, "trust_remote_code": False}
    model: Any
    try:
        folder = _local(path, settings) if settings["local_files_only"] else path
        if not (Path(folder) / ADAPTER).is_file():
            model = _load(folder, settings)
        else:
            from peft import PeftConfig, PeftModel

            base = PeftConfig.from_pretrained(folder).base_model_name_or_path
            if base is None:
                raise CheckpointError(f"{folder}/{ADAPTER} names no base model; expected base_model_name_or_path in it")
            with warnings.catch_warnings():
                warnings.filterwarnings("error", message="Found missing adapter keys")
                model = PeftModel.from_pretrained(load_pretrained(base, **settings), folder)
        model.name_or_path = str(folder)  # of a model with an adapter this is not its base's
        return cast(nn.Module, model)
    except ImportError as error:
        raise ConfigError(
            f"model.factory is 'hf:{path}', which cannot be opened: {error}; expected the extra: pip install "
            "imu-ray[hf]"
        ) from None
    except (ImuError, TypeError, MemoryError):  # TypeError: a setting that nothing takes
        raise
    except Exception as error:  # of many kinds
        remedy = None if settings["local_files_only"] else download_remedy(error)
        why = " ".join(str(error).split())
        raise CheckpointError(
            f"model.factory is 'hf:{path}', which cannot be read ({type(error).__name__}: {why}); "
            + (
                remedy
                or "expected a folder that save_pretrained wrote, or a model in the local cache; "
                "model.kwargs.local_files_only=false downloads it"
            )
        ) from None


def load_skeleton(path: str, **settings: Any) -> nn.Module | None:
    """A model of shapes without numbers; None unless its folder, or that of an adapter's base, holds settings alone."""
    model = _on_meta(path, settings)
    return None if model is None else without_numbers(model.eval())[0]


def _on_meta(path: str, settings: dict[str, Any]) -> nn.Module | None:
    folder, model = Path(path), None
    if (folder / ADAPTER).is_file():
        from peft import PeftConfig, get_peft_model

        config: Any = PeftConfig.from_pretrained(path)
        base: Any = _on_meta(config.base_model_name_or_path or "", settings)
        with torch.device("meta"):
            model = None if base is None else get_peft_model(base, config)
    elif (folder / CONFIG).is_file() and not any(any(folder.glob(pattern)) for pattern in WEIGHTS):
        from transformers import AutoConfig, AutoModelForCausalLM

        config = AutoConfig.from_pretrained(path, local_files_only=True)
        if _kind(config) is not AutoModelForCausalLM:
            return None  # what ends a classifier is told from numbers
        kind = settings.get("dtype", "auto")
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=config.dtype if kind == "auto" else kind)
        model.config.use_cache = False
    if model is not None:
        model.name_or_path = path
    return model


def save_pretrained(model: nn.Module, folder: Path, merge_adapter: bool = False) -> None:
    """Write a model of Hugging Face's as a folder that ``from_pretrained`` opens.

    The tokenizer or the preprocessing of its source lies in it too. Of a model with an adapter the adapter alone is
    written, beside the name of its base; or the base with the adapter merged into it.
    """
    source = getattr(model, "name_or_path", "")
    given: Any = model
    written = copy.deepcopy(given).merge_and_unload() if merge_adapter else copy.copy(given)
    if hasattr(written, "loaded_use_cache"):
        written.config = copy.copy(written.config)
        written.config.use_cache = written.loaded_use_cache
    written.save_pretrained(folder)
    for pattern in BESIDE if source else ():
        for path in Path(str(source)).glob(pattern):
            if path.is_file():
                shutil.copyfile(path, folder / path.name)


def _local(path: str, settings: dict[str, Any]) -> str:
    """The folder; of a name, the one in the cache."""
    if Path(path).is_dir():
        return path
    from huggingface_hub import snapshot_download

    return str(snapshot_download(path, revision=settings.get("revision"), local_files_only=True))


def _load(folder: str, settings: dict[str, Any]) -> Any:
    from transformers import AutoConfig

    where = {key: settings[key] for key in ("local_files_only", "revision") if key in settings}
    kind = _kind(AutoConfig.from_pretrained(folder, trust_remote_code=False, **where))
    model, info = kind.from_pretrained(folder, output_loading_info=True, **settings)
    if missing := sorted({*info["missing_keys"], *(name for name, *_ in info["mismatched_keys"])}):
        raise CheckpointError(
            f"{folder} holds no {', '.join(missing[:8])} of {type(model).__name__}; expected every tensor of the "
            "model, because those that are missing would be random"
        )
    if hasattr(model.config, "use_cache"):
        model.loaded_use_cache = model.config.use_cache  # which the model is saved with
        model.config.use_cache = False
    return model


def _kind(config: Any) -> Any:
    """The class that opens a model, from the architecture that its settings name."""
    from transformers import AutoModelForCausalLM, AutoModelForImageClassification
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    (name, *_) = config.architectures or [""]
    if "ForImageClassification" in name:
        return AutoModelForImageClassification
    if name.endswith("ForCausalLM") or name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values() or "For" not in name:
        return AutoModelForCausalLM
    raise ConfigError(
        f"the model's config.json names the architecture {name}; expected an image classifier "
        "(...ForImageClassification) or a causal language model (...ForCausalLM); for another, name a factory of your "
        "own"
    )
