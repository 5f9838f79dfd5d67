"""A copy of a live model, without what training wraps around it, and only if it can be worked on."""

import copy

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.nn.parameter import is_lazy
from torch.optim.swa_utils import AveragedModel

from imu_ray.errors import ImuError, UnsupportedModelError

WRAPPERS = (nn.DataParallel, nn.parallel.DistributedDataParallel, AveragedModel)


def plain_copy(model: nn.Module) -> nn.Module:
    """A deep copy without wrappers (data parallel, averaged, compiled) at any depth, with the plain model's names.

    Raises:
        UnsupportedModelError: the model cannot be copied, or its state is not all dense tensors with values.
    """
    try:
        check_state(model)
        copies: dict[int, nn.Module] = {}
        for module in reversed(list(model.modules())):  # inner ones first
            wrapped = (
                "_orig_mod" if "_orig_mod" in module._modules else "module" if isinstance(module, WRAPPERS) else None
            )
            if wrapped:  # deepcopy takes the copy that it finds here
                copies[id(module)] = copy.deepcopy(getattr(module, wrapped), copies)
        return copy.deepcopy(model, copies)
    except ImuError:
        raise
    except Exception as error:
        raise UnsupportedModelError(
            f"{type(model).__name__} cannot be copied ({type(error).__name__}: {error}); expected a model that "
            "copy.deepcopy takes, without open files, locks and computed tensors; remove them"
        ) from None


def without_numbers(model: nn.Module) -> tuple[nn.Module, FakeTensorMode]:
    """A copy whose tensors have shapes on the CPU and no numbers, and the mode in which new ones have none either."""
    first = next(model.parameters())
    mode = first.fake_mode if isinstance(first, FakeTensor) else FakeTensorMode(allow_non_fake_inputs=True)
    memo: dict[int, object] = {}
    with mode:
        for tensor in (*model.parameters(), *model.buffers()):
            empty = torch.empty(tensor.shape, dtype=tensor.dtype)
            kept = isinstance(tensor, nn.Parameter)
            memo[id(tensor)] = nn.Parameter(empty, tensor.requires_grad) if kept else empty
        return copy.deepcopy(model, memo), mode


def has_numbers(tensor: Tensor) -> bool:
    """Whether a tensor has more than a shape."""
    return not isinstance(tensor, FakeTensor)


def to_eval(model: nn.Module) -> nn.Module:
    """The model on the CPU, in eval mode."""
    try:
        model = model.cpu()
        model.eval()
    except Exception as error:
        raise UnsupportedModelError(
            f"{type(model).__name__}.eval() raised {type(error).__name__}: {error}; expected a model that can be put "
            "in eval mode; mend it"
        ) from None
    return model


def check_state(model: nn.Module) -> None:
    """``UnsupportedModelError`` when a model's state is not all dense tensors with values."""
    for name, value in [*model.named_parameters(), *model.named_buffers(), *model.state_dict().items()]:
        if reason := unusable(value):
            expected = "expected a dense tensor with values; load or convert the model first"
            raise UnsupportedModelError(f"{name} of {type(model).__name__} is {reason}; {expected}")


def unusable(value: object) -> str | None:
    """Why a part of a model's state cannot be hashed, written and changed, if it cannot."""
    if not isinstance(value, Tensor):
        return f"a {type(value).__name__}"
    if is_lazy(value):
        return "not initialised yet"
    if value.is_meta:
        return "on the meta device"
    dense = value.layout == torch.strided and not value.is_quantized and not value.is_nested
    return None if dense else "sparse, nested or quantized"
