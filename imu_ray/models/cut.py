"""A forward pass cut in two where a scope begins: what its layers cannot change is computed once.

Shapes: B samples, F numbers of a sample that cross the cut.
"""

import math
from collections.abc import Container, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from imu_ray.models.blocks import checkpointed, run_again
from imu_ray.models.layers import detached, evaluation_mode, left_out, logits_of

Values = tuple[Tensor, ...]
SHAPE_METHODS = ("size", "dim", "ndimension", "numel")
SHAPE_ATTRIBUTES = ("shape", "ndim", "dtype", "device")
CHEAP = {
    "add", "batch_norm", "cat", "chunk", "contiguous", "dropout", "flatten", "gelu", "getitem", "hardswish",
    "layer_norm", "mul", "permute", "relu", "relu_", "reshape", "sigmoid", "silu", "squeeze", "sub",
    "transpose", "unsqueeze", "view",
}  # fmt: skip


@dataclass(frozen=True)
class Plan:
    """Where to cut a model, as plain values, so that it can be worked out once and used wherever the model is.

    Attributes:
        layers: names of the layers that may change.
        shapes: of each value that crosses, for one sample.
        dtype: of the values.
        crossing: nodes of the traced model whose values cross.
        sizes: what nodes that read a shape give; None stands for the number of samples.
        copied: whether the rest of the pass changes the values in place, and so works on a copy.
        reason: why the model's input crosses and nothing else, if so.
    """

    layers: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    dtype: torch.dtype
    crossing: tuple[str, ...] = ()
    sizes: Mapping[str, Any] = field(default_factory=dict)
    copied: bool = False
    reason: str = ""


class Cut:
    """A model in two parts, ``prefix`` and ``suffix``, which share its modules and parameters.

    The suffix calls the model's own layers: their hooks run, and it sees at once what is written into their parameters.
    Modules that hold other modules are not called by name, so hooks on those do not run. The model must be in eval
    mode, on its device, and must not be compiled before it is cut.
    """

    def __init__(self, model: nn.Module, plan: Plan) -> None:
        self.model, self.plan = model, plan
        self._parts = None if plan.reason else _split(model, plan)

    @classmethod
    def of(cls, model: nn.Module, example_inputs: Tensor, layers: Sequence[str], last: str = "") -> "Cut":
        """Cut a model at the earliest point that the layers influence, or at its input where it cannot be traced.

        Args:
            model: any module that maps ``[B, ...]`` to logits ``[B, C]``, in eval mode.
            example_inputs: a few different samples ``[B, ...]``, on which both ways are compared.
            layers: names of the layers that may change.
            last: the output layer, where the suffix will be asked for what it sees (``suffix``).
        """
        rows = torch.arange(3, device=example_inputs.device) % len(example_inputs)
        inputs = example_inputs[rows].clone()
        with _evaluation(model):
            try:
                if checkpointed(model):
                    raise _Uncut("blocks that are run again stay whole")
                cut = cls(model, _plan(model, inputs, tuple(layers)))._guarded(inputs, last)
                cut._check(inputs)
                return cut
            except (MemoryError, torch.OutOfMemoryError):
                raise
            except _Uncut as error:
                reason = str(error)
            except Exception as error:  # the tracer's, or of the model's code under it
                reason = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
            return cls(model, Plan(tuple(layers), (tuple(inputs.shape[1:]),), inputs.dtype, reason=reason))._guarded(
                inputs, last
            )

    def __reduce__(self) -> tuple[type["Cut"], tuple[nn.Module, Plan]]:
        return Cut, (self.model, self.plan)

    @property
    def trivial(self) -> bool:
        """Whether the model's input crosses and nothing else."""
        return bool(self.plan.reason)

    @property
    def reason(self) -> str:
        """Why the cut is trivial, if it is."""
        return self.plan.reason

    @property
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        """Shape of each value that crosses, for one sample."""
        return self.plan.shapes

    @property
    def dtype(self) -> torch.dtype:
        """Of all values that cross; a floating type unless the cut is trivial."""
        return self.plan.dtype

    @property
    def width(self) -> int:
        """F, the numbers of a sample that cross."""
        return sum(map(math.prod, self.shapes))

    def prefix(self, inputs: Tensor) -> Values:
        """What crosses the cut, each value ``[B, ...]``, without gradients."""
        if self._parts is None:
            return (inputs,)
        with torch.no_grad():
            values: Values = self._parts[0](inputs)
        return values

    def suffix(self, values: Values, parameters: Mapping[str, Tensor] | None = None, last: str = "") -> Tensor:
        """Logits ``[B, C]``, with ``parameters`` in place of the model's own of these names; differentiable in both.

        The model's other parameters get no gradient then, so that nothing is kept for one below the lowest of these.
        With the name of the output layer in ``last`` what that layer sees, and no logits are made.
        """
        if self.plan.copied:
            values = tuple(value.clone() for value in values)
        rest = self.model if self._parts is None else self._parts[1]
        with left_out(rest, last), run_again(self.model):
            if not parameters:
                return logits_of(rest(*values))
            return logits_of(torch.func.functional_call(rest, {**detached(rest), **parameters}, values))

    def join(self, values: Values) -> Tensor:
        """The values as one matrix ``[B, F]``."""
        return torch.cat([value.flatten(1) if value.ndim > 1 else value[:, None] for value in values], 1)

    def split(self, values_BF: Tensor) -> Values:
        """The values that were joined, in the type of the matrix."""
        parts = torch.split(values_BF, [math.prod(shape) for shape in self.shapes], 1)
        return tuple(part.reshape(-1, *shape) for part, shape in zip(parts, self.shapes, strict=True))

    def _check(self, inputs: Tensor) -> None:
        """Compare with the model bit for bit under changed parameters, of which nothing may be in the prefix."""
        own = dict(self.model.named_parameters(remove_duplicate=False))
        changed = {
            name: 0.75 * own[name].detach() + 0.01 for name in own if name.rpartition(".")[0] in self.plan.layers
        }
        for count in (len(inputs), len(inputs) - 1):
            part = inputs[:count]
            whole = logits_of(torch.func.functional_call(self.model, changed, (part.clone(),)))
            if not torch.equal(self.suffix(self.prefix(part.clone()), changed), whole):
                raise _Uncut("the two parts give other logits than the model")
        # Rows of a value must be of samples, and of no other samples: the last ones come out alike, turned round.
        values, turned = self.prefix(inputs.clone()), self.prefix(inputs[1:].flip(0))
        for value, other in zip(values, turned, strict=True):
            if not (value[1:].flip(0) - other).abs().max() <= 0.01 * value.abs().max():
                raise _Uncut("a value that crosses depends on the other samples of a batch")

    def _guarded(self, inputs: Tensor, last: str) -> "Cut":
        """The same cut, on copies if the suffix changes its values in place."""
        values = self.prefix(inputs.clone())
        before = [value.clone() for value in values]
        self.suffix(values, last=last)
        unchanged = all(map(torch.equal, values, before))
        return self if unchanged else Cut(self.model, replace(self.plan, copied=True))


class _Uncut(Exception):
    """Why a model cannot be cut."""


class _Tracer(fx.Tracer):
    """Traces the forward pass for the first argument, the others at their defaults; the scope's layers stay whole."""

    def __init__(self, layers: tuple[str, ...]) -> None:
        super().__init__()
        self.layers = layers

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return module_qualified_name in self.layers or super().is_leaf_module(m, module_qualified_name)

    def create_args_for_root(self, root_fn: Any, is_module: bool, concrete_args: Any = None) -> Any:
        return super().create_args_for_root(lambda root, inputs: root_fn(root, inputs), is_module, concrete_args)


@contextmanager
def _evaluation(model: nn.Module) -> Iterator[None]:
    """Eval mode without gradients, but with tensors that gradients can be taken through later."""
    with evaluation_mode(model), torch.inference_mode(False), torch.no_grad():
        yield


def _trace(model: nn.Module, layers: tuple[str, ...]) -> tuple[fx.Graph, set[fx.Node]]:
    """The forward pass as a graph, and the nodes that the layers influence."""
    with _evaluation(model):
        graph = _Tracer(layers).trace(model)
    influenced: set[fx.Node] = set()
    for node in graph.nodes:
        target = f"{node.target}."
        own = (node.op == "call_module" and any(f"{name}.".startswith(target) for name in layers)) or (
            node.op == "get_attr" and any(target.startswith(f"{name}.") for name in layers)
        )
        if own or not influenced.isdisjoint(node.all_input_nodes):
            influenced.add(node)
    return graph, influenced


class _Record(fx.Interpreter):
    """Runs a traced model and keeps what its nodes give, of a tensor its shape and type."""

    def __init__(self, model: nn.Module, graph: fx.Graph) -> None:
        super().__init__(model, graph=graph)
        self.shapes: dict[fx.Node, torch.Size] = {}
        self.others: dict[fx.Node, Any] = {}  # types of tensors too

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if isinstance(value, Tensor):
            self.shapes[n] = value.shape
        self.others[n] = value.dtype if isinstance(value, Tensor) else value
        return value


def _plan(model: nn.Module, inputs: Tensor, layers: tuple[str, ...]) -> Plan:
    """Work out what crosses from runs of the traced model over two numbers of samples."""
    graph, influenced = _trace(model, layers)
    all_rows, fewer_rows = _Record(model, graph), _Record(model, graph)
    for record, count in ((all_rows, len(inputs)), (fewer_rows, len(inputs) - 1)):
        record.run(inputs[:count].clone())
    crossing = _crossing(model, graph, influenced)
    if all(node.op == "placeholder" for node in crossing):
        raise _Uncut("nothing crosses but the model's input")
    for node in crossing:
        shape, fewer = all_rows.shapes.get(node), fewer_rows.shapes.get(node)
        if shape is None or not all_rows.others[node].is_floating_point:
            raise _Uncut(f"{node.name}, which crosses, is no tensor of floating-point numbers")
        if fewer is None or shape[:1] != (len(inputs),) or fewer != (len(inputs) - 1, *shape[1:]):
            raise _Uncut(f"the first dimension of {node.name}, which crosses, is not the samples")
    types = {all_rows.others[node] for node in crossing}
    if len(types) > 1:
        raise _Uncut("values of several types cross")
    sizes = {
        node.name: _size(all_rows.others[node], fewer_rows.others[node], len(inputs))
        for node in _made_again(influenced, {node.name for node in crossing})
        if _reads_shape(node)
    }
    shapes = tuple(tuple(all_rows.shapes[node][1:]) for node in crossing)
    return Plan(layers, shapes, types.pop(), tuple(node.name for node in crossing), sizes)


def _crossing(model: nn.Module, graph: fx.Graph, influenced: set[fx.Node]) -> list[fx.Node]:
    """Nodes whose values must cross: made of the input, and neither influenced nor cheap to make again from others."""
    of_input: set[fx.Node] = set()
    crossing: list[fx.Node] = []
    again: set[fx.Node] = set()
    for node in graph.nodes:
        sources = [source for source in node.all_input_nodes if source in of_input]
        if node in influenced or _reads_shape(node) or not (sources or node.op == "placeholder"):
            continue
        of_input.add(node)
        if sources and again.union(crossing).issuperset(sources) and _cheap(model, node, again.issuperset(sources)):
            again.add(node)
        elif not influenced.isdisjoint(node.users):
            crossing.append(node)
    return crossing


def _made_again(influenced: set[fx.Node], crossing: Container[str]) -> set[fx.Node]:
    """Nodes that the suffix needs and makes for itself; what a shape is read from is not needed for that."""
    again: set[fx.Node] = set()
    asked = [source for node in influenced for source in node.all_input_nodes]
    while asked:
        node = asked.pop()
        if node not in influenced and node not in again and node.name not in crossing:
            again.add(node)
            asked += [] if _reads_shape(node) else node.all_input_nodes
    return again


def _reads_shape(node: fx.Node) -> bool:
    if node.op == "call_method":
        return node.target in SHAPE_METHODS
    return node.op == "call_function" and node.target is getattr and node.args[1] in SHAPE_ATTRIBUTES


def _cheap(model: nn.Module, node: fx.Node, in_place: bool) -> bool:
    """Whether a node costs less than what it would take to keep its value."""
    if node.op == "call_module":
        module = model.get_submodule(str(node.target))
        small = all(parameter.ndim < 2 for parameter in module.parameters()) and not list(module.children())
        return small and (in_place or not getattr(module, "inplace", False))
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    return name in CHEAP and (in_place or not any(value is True for value in (*node.args, *node.kwargs.values())))


def _size(value: Any, fewer: Any, count: int) -> Any:
    """What a node that reads a shape gives, with None for the number of samples."""
    if isinstance(value, tuple):
        return tuple(_size(*pair, count) for pair in zip(value, fewer, strict=True))
    if value != fewer and (value, fewer) != (count, count - 1):
        raise _Uncut(f"the forward pass reads a size, {value}, that is neither fixed nor the number of samples")
    return value if value == fewer else None


def _split(model: nn.Module, plan: Plan) -> tuple[fx.GraphModule, fx.GraphModule]:
    """The two parts of a model as modules that share its parameters, buffers and layers."""
    graph, influenced = _trace(model, plan.layers)
    before: dict[fx.Node, fx.Node] = {}
    prefix = fx.Graph()
    for node in graph.nodes:
        if node not in influenced:
            before[node] = prefix.node_copy(node, before.__getitem__)
    nodes = {node.name: node for node in graph.nodes}
    prefix.output(tuple(before[nodes[name]] for name in plan.crossing))

    suffix = fx.Graph()
    after: dict[fx.Node, Any] = {nodes[name]: suffix.placeholder(name) for name in plan.crossing}
    first = after[nodes[plan.crossing[0]]]
    samples = suffix.call_method("size", (first, 0))

    def value_of(size: Any) -> Any:
        if isinstance(size, torch.device):  # the one that the suffix runs on, which may be another
            return suffix.call_function(getattr, (first, "device"))
        return tuple(map(value_of, size)) if isinstance(size, tuple) else samples if size is None else size

    again = _made_again(influenced, plan.crossing)
    for node in graph.nodes:
        if node.name in plan.sizes:
            after[node] = value_of(plan.sizes[node.name])
        elif node in influenced or node in again:
            after[node] = suffix.node_copy(node, after.__getitem__)
    return fx.GraphModule(model, prefix, "Prefix"), fx.GraphModule(model, suffix, "Suffix")
