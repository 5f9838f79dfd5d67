"""What layers inside a model are called with, and what comes back to what they gave, shown one layer after another."""

import functools
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

Show = Callable[[str, Tensor, Tensor], None]  # name of a layer, its inputs, and the gradient by its outputs


@contextmanager
def tapped(model: nn.Module, layers: Iterable[str], show: Show) -> Iterator[Tensor]:
    """Show what comes back to each of the layers while gradients by the tensor that is given are taken.

    These gradients are None; they lead to all of the layers, to nothing else, and nothing is kept for a layer that was
    shown. Both ways, forward and back, belong inside.

    Args:
        model: whose layers they are.
        layers: names.
        show: is called for one layer after another, from the last to the first.
    """
    way = torch.zeros((), requires_grad=True)

    def hook(name: str, _: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        given: Tensor = _Tap.apply(output, inputs[0].detach(), way, functools.partial(show, name))
        return given

    hooks = [model.get_submodule(name).register_forward_hook(functools.partial(hook, name)) for name in layers]
    try:
        yield way
    finally:
        for handle in hooks:
            handle.remove()


class _Tap(torch.autograd.Function):
    """The identity.

    What follows may change its output in place; the gradient is that before the change. It is not a view for autograd,
    which refuses to change such views, and no copy: no layer keeps what it gave for the way back.
    """

    @staticmethod
    def forward(
        ctx: Any, output: Tensor, inputs: Tensor, way: Tensor, show: Callable[[Tensor, Tensor], None]
    ) -> Tensor:
        ctx.save_for_backward(inputs)
        ctx.show = show
        return output.detach()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        ctx.show(*ctx.saved_tensors, *grads)
        return *grads, None, None, None
