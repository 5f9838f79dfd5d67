"""The low-rank adapters (LoRA) of a model that PEFT wrapped: pairs of layers beside a layer of the base model.

No name of PEFT is needed for that: a wrapped layer holds ``base_layer``, and ``lora_A`` and ``lora_B`` with a layer per
adapter.
"""

from torch import nn

HALVES = ("lora_A", "lora_B")


def adapter_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The layers of the active adapters by name; none of a model without."""
    return {
        f"{name}.{half}.{adapter}": getattr(wrapper, half)[adapter]
        for name, wrapper in model.named_modules()
        if isinstance(getattr(wrapper, "lora_A", None), nn.ModuleDict)
        for half in HALVES
        for adapter in wrapper.active_adapters
        if adapter in getattr(wrapper, half)
    }


def pair_of(name: str) -> set[str]:
    """Both layers of the adapter that a layer belongs to; of any other layer, itself."""
    *path, half, adapter = ["", "", *name.split(".")]
    return {".".join([*path[2:], each, adapter]) for each in HALVES} if half in HALVES else {name}


def moving_base(model: nn.Module, name: str) -> bool:
    """Whether the layer that an adapter stands beside would be trained as well."""
    wrapper = model.get_submodule(name.rpartition(".")[0].rpartition(".")[0])
    weight = getattr(getattr(wrapper, "base_layer", None), "weight", None)
    return weight is not None and bool(weight.requires_grad)
