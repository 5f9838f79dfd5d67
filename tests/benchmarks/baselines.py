"""Methods that the study of layers stands beside the library's, each from its equations, in plain PyTorch.

A method is a generator: it moves ``problem.model`` in place and yields what it has done so far (``epochs`` over the
rows that it uses, and figures of its own) after every step, for ever if it can; who runs it measures the model and
closes it. BatchNorm statistics are frozen unless a docstring says otherwise. Batches have 256 rows, SGD has momentum
0.9. *Forget-only* methods read ``model``, ``images``, ``labels`` and ``crop``, nothing else.

Notation: z logits, p softmax, y the label, l = -log p_y, r = p - onehot(y), h the head's inputs with a 1 appended,
theta_0 the original model.
"""

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from tests.benchmarks.train_cifar import augment, normalise

BATCH = 256
Progress = Iterator[dict[str, float]]


@dataclass
class Problem:
    """A model to change in place and the rows to forget; ``train_*``: all its training rows, where needed."""

    model: nn.Module
    images: Tensor
    labels: Tensor
    crop: int
    seed: int = 0
    train_images: Tensor | None = None
    train_labels: Tensor | None = None


@dataclass(frozen=True)
class Method:
    """How a method is run: settings that are tried, what it needs, and whether it is for whole classes alone."""

    run: Callable[..., Progress]
    settings: tuple[dict[str, object], ...] = ({},)
    needs: str = "forget set"
    classes_only: bool = False


def inputs_of(images: Tensor) -> Tensor:
    """What the model is given; floats pass as they are."""
    images = images if images.is_floating_point() else normalise(images)
    return images.contiguous(memory_format=torch.channels_last)


def head_of(model: nn.Module) -> nn.Linear:
    return [module for module in model.modules() if isinstance(module, nn.Linear)][-1]


def batches(problem: Problem, augmented: bool = False, size: int = BATCH) -> Iterator[tuple[float, Tensor, Tensor]]:
    """Epochs at the end of a batch, row numbers and inputs; shuffled and, if asked for, augmented anew each epoch."""
    generator, count, seen = torch.Generator().manual_seed(problem.seed), len(problem.labels), 0
    while True:
        for rows in torch.randperm(count, generator=generator).split(size):
            images = problem.images[rows]
            seen += len(rows)
            yield seen / count, rows, inputs_of(augment(images, generator, problem.crop) if augmented else images)


@torch.no_grad()
def head_inputs(problem: Problem) -> Tensor:
    """Inputs of the head for every forget row, ``[N, D]``, under frozen statistics."""
    caught: list[Tensor] = []
    hook = head_of(problem.model).register_forward_pre_hook(lambda _module, inputs: caught.append(inputs[0]))
    problem.model.eval()
    for images in problem.images.split(500):
        problem.model(inputs_of(images))
    hook.remove()
    return torch.cat(caught)


def losses_of(logits: Tensor, labels: Tensor) -> Tensor:
    return nn.functional.cross_entropy(logits, labels, reduction="none")


# Losses that are minimised, of one batch


def ascent_loss(logits: Tensor, labels: Tensor, weights: Tensor | None = None) -> Tensor:
    """Minus the (weighted) mean cross-entropy: -sum_i w_i l_i / sum_i w_i."""
    losses = losses_of(logits, labels)
    return -losses.mean() if weights is None else -(weights * losses).sum() / weights.sum()


def npo_loss(logits: Tensor, labels: Tensor, original_losses: Tensor, beta: float) -> Tensor:
    """NPO, arXiv:2404.05868: -(2/beta) mean log sigmoid(-beta log(p_y / p_y of theta_0))."""
    log_ratio = original_losses - losses_of(logits, labels)
    return -2 / beta * nn.functional.logsigmoid(-beta * log_ratio).mean()


def sensitivities(logits: Tensor, inputs: Tensor, classes: Tensor) -> Tensor:
    """|d z_c / d x|^2 of each row for its c of ``classes``; differentiable. Rows must not mix (frozen statistics)."""
    (gradient,) = torch.autograd.grad(logits.gather(1, classes[:, None]).sum(), inputs, create_graph=True)
    return gradient.flatten(1).square().sum(1)


def influence_weights(inputs: Tensor, logits: Tensor, labels: Tensor, damping: float = 0.01) -> Tensor:
    r"""Weight of each row, 0 where its influence is not negative.

    With g_i = r_i (x) h_i, F = mean g_i^2 and gbar = mean g_i: I_i = -g_i^T (F + damping)^-1 gbar; w_i = sqrt(|I_i|),
    cut at its 0.93-quantile. IMU, arXiv:2508.01620.
    """
    h = torch.cat([inputs, torch.ones_like(inputs[:, :1])], 1).double()
    r = logits.double().softmax(1) - nn.functional.one_hot(labels, logits.shape[1])
    fisher, mean = (r.square().T @ h.square()) / len(h), (r.T @ h) / len(h)
    influence = -torch.einsum("nc,cd,nd->n", r, mean / (fisher + damping), h)
    roots = influence.abs().sqrt()
    kept = influence < 0
    limit = roots[kept].quantile(0.93) if kept.any() else 0.0
    return torch.where(kept, roots.clamp(max=limit), 0.0).to(inputs.dtype)


def dampen(parameter: Tensor, forget: Tensor, train: Tensor, alpha: float, strength: float) -> Tensor:
    """SSD, arXiv:2308.07707: theta <- min(strength F_train / F_forget, 1) theta where F_forget > alpha F_train."""
    factor = (strength * train / forget.clamp(min=torch.finfo(forget.dtype).tiny)).clamp(max=1)
    return torch.where(forget > alpha * train, factor * parameter, parameter)


def diagonal_fisher(model: nn.Module, images: Tensor, labels: Tensor, rows_at_once: int = 32) -> dict[str, Tensor]:
    """Mean over rows of the squared gradient of the log-likelihood, one gradient per row."""
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    buffers = dict(model.named_buffers())

    def loss(parameters: dict[str, Tensor], image: Tensor, label: Tensor) -> Tensor:
        logits = torch.func.functional_call(model, (parameters, buffers), (image[None],))
        return nn.functional.cross_entropy(logits, label[None])

    per_row = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))
    sums = {name: torch.zeros_like(p) for name, p in parameters.items()}
    model.eval()
    for x, y in zip(images.split(rows_at_once), labels.split(rows_at_once), strict=True):
        with sdpa_kernel(SDPBackend.MATH):
            for name, gradient in per_row(parameters, inputs_of(x), y).items():
                sums[name] += gradient.square().sum(0)
    return {name: total / len(labels) for name, total in sums.items()}


# Methods


def ascend(problem: Problem, lr: float, augmented: bool = False) -> Progress:
    """Gradient ascent on all parameters: theta <- theta + lr grad mean l. Forget-only."""
    model, optimiser = problem.model, sgd(problem.model.parameters(), lr)
    for epochs, rows, inputs in batches(problem, augmented):
        model.eval()
        step(optimiser, ascent_loss(model(inputs), problem.labels[rows]))
        yield {"epochs": epochs}


def negative_preference(problem: Problem, lr: float, beta: float, augmented: bool = False) -> Progress:
    """NPO on all parameters (arXiv:2404.05868, ``npo_loss``); p of theta_0 is of the same inputs. Forget-only."""
    model, reference = problem.model, copy.deepcopy(problem.model).eval()
    optimiser = sgd(model.parameters(), lr)
    for epochs, rows, inputs in batches(problem, augmented):
        with torch.no_grad():
            original = losses_of(reference(inputs), problem.labels[rows])
        model.eval()
        step(optimiser, npo_loss(model(inputs), problem.labels[rows], original, beta))
        yield {"epochs": epochs}


def suppress_sensitivity(problem: Problem, lr: float) -> Progress:
    """MU-Mis on all parameters, arXiv:2402.15109: minimise mean(|dz_y/dx|^2 - |dz_c/dx|^2). Forget-only.

    From the abstract and summaries: the difference of the target's and irrelevant classes' sensitivities. That norms
    are squared and c is one random class other than y, drawn for each row and step, is our reading. The authors' rule
    to stop, by the irrelevant classes' sensitivity against its start, is not applied: ``irrelevant_ratio`` reports it,
    root of the mean over a batch against the first batch's. Batches of 64: a step costs as much as seven of ascent.
    """
    model, optimiser = problem.model, sgd(problem.model.parameters(), lr)
    count, generator, first = head_of(model).out_features, torch.Generator().manual_seed(problem.seed), 0.0
    for epochs, rows, inputs in batches(problem, size=64):
        model.eval()
        labels = problem.labels[rows]
        others = (labels + torch.randint(1, count, labels.shape, generator=generator)) % count
        with sdpa_kernel(SDPBackend.MATH):  # the fused kernels have no second derivative
            logits = model(inputs.requires_grad_())
            target, irrelevant = (sensitivities(logits, inputs, classes) for classes in (labels, others))
            step(optimiser, (target - irrelevant).mean())
        mean = irrelevant.mean().item()
        first = first or mean
        yield {"epochs": epochs, "irrelevant_ratio": (mean / first) ** 0.5}


def project_class(problem: Problem) -> Progress:
    """POUR-P for one class, arXiv:2511.19339: an orthogonal projection of the features. Forget-only.

    From the abstract: features h -> (I - s v v^T) h, here folded into the head's weights; v is the class's vertex of
    the simplex, read off the centred head weights by the self-duality of neural collapse. How the authors estimate v
    was not established. s grows to 1, the projection, so that it can be stopped.
    """
    head, label = head_of(problem.model), int(problem.labels[0])
    original = head.weight.detach().clone()
    direction = nn.functional.normalize(original[label] - original.mean(0), dim=0)
    for strength in (0.2, 0.4, 0.6, 0.8, 1.0):
        with torch.no_grad():
            head.weight.copy_(original - strength * torch.outer(original @ direction, direction))
        yield {"epochs": 0.0, "strength": strength}


def dampen_synapses(problem: Problem, strength: float = 1.0, rows: int = 2000) -> Progress:
    """SSD (arXiv:2308.07707, ``dampen``); alpha falls. *Needs the training set*, here ``rows`` of it.

    Fishers are means of squared gradients of single rows; the authors' code squares gradients of batches.
    """
    if problem.train_images is None or problem.train_labels is None:
        raise ValueError("train_images is None; SSD needs rows of the training set: give them")
    model, generator = problem.model, torch.Generator().manual_seed(problem.seed)
    chosen = [
        torch.randperm(count, generator=generator)[:rows] for count in (len(problem.train_labels), len(problem.labels))
    ]
    train = diagonal_fisher(model, problem.train_images[chosen[0]], problem.train_labels[chosen[0]])
    forget = diagonal_fisher(model, problem.images[chosen[1]], problem.labels[chosen[1]])
    original = {name: p.detach().clone() for name, p in model.named_parameters()}
    epochs = len(chosen[1]) / len(problem.labels)
    for alpha in torch.logspace(2, -1, 16).tolist():
        with torch.no_grad():
            for name, p in model.named_parameters():
                p.copy_(dampen(original[name], forget[name], train[name], alpha, strength))
        yield {"epochs": epochs, "alpha": alpha}


def ascend_head(problem: Problem, lr: float, influence: bool = False, l1: float = 0.0, decay: float = 0.0) -> Progress:
    """Ascent on the head, statistics frozen: uniform, or by IMU's weights plus L1 (arXiv:2508.01620). Forget-only."""
    head, features = head_of(problem.model), head_inputs(problem)
    weights = influence_weights(features, head(features).detach(), problem.labels) if influence else None
    optimiser = sgd(head.parameters(), lr, decay)
    for epochs, rows, _ in batches(kept(problem, weights)):
        rows = rows if weights is None else weights.nonzero()[:, 0][rows]
        loss = ascent_loss(head(features[rows]), problem.labels[rows], None if weights is None else weights[rows])
        step(optimiser, loss + l1 * norm_of(head))
        yield {"epochs": epochs}


def published_imu(
    problem: Problem, lr: float, everything: bool = False, l1: float = 5e-4, decay: float = 5e-4
) -> Progress:
    """IMU as its authors' code runs it, arXiv:2508.01620: weighted ascent plus L1 of the head. Forget-only.

    Their code sets ``requires_grad`` on the head alone: only its parameters move. The model is in train mode, so that
    BatchNorm statistics drift to the forget set, twice a step (the batch is run again to print an accuracy). Rows are
    augmented as in training; weight decay is 5e-4. ``everything`` moves all parameters instead. Not followed: the
    weights are those of the equation (the code overwrites the first row's gradient), from clean rows (not one view).
    """
    model, head, features = problem.model, head_of(problem.model), head_inputs(problem)
    weights = influence_weights(features, head(features).detach(), problem.labels)
    chosen = weights.nonzero()[:, 0]
    model.requires_grad_(everything)
    head.requires_grad_()
    optimiser = sgd((p for p in model.parameters() if p.requires_grad), lr, decay)
    for epochs, rows, inputs in batches(kept(problem, weights), augmented=True):
        model.train()
        step(
            optimiser,
            ascent_loss(model(inputs), problem.labels[chosen[rows]], weights[chosen[rows]]) + l1 * norm_of(head),
        )
        with torch.no_grad():
            model(inputs)
        yield {"epochs": epochs}


def kept(problem: Problem, weights: Tensor | None) -> Problem:
    """The problem without the rows of weight 0."""
    if weights is None:
        return problem
    rows = weights > 0
    return Problem(problem.model, problem.images[rows], problem.labels[rows], problem.crop, problem.seed)


def norm_of(head: nn.Linear) -> Tensor:
    return sum((p.abs().sum() for p in head.parameters()), torch.zeros(()))


def sgd(parameters: Iterator[Tensor], lr: float, decay: float = 0.0) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=lr, momentum=0.9, weight_decay=decay)


def step(optimiser: torch.optim.Optimizer, loss: Tensor) -> None:
    optimiser.zero_grad()
    loss.backward()
    optimiser.step()


def grid(**settings: tuple[object, ...]) -> tuple[dict[str, object], ...]:
    """Every combination of the settings' values."""
    made: list[dict[str, object]] = [{}]
    for name, values in settings.items():
        made = [{**one, name: value} for one in made for value in values]
    return tuple(made)


IMU = {"influence": (True,), "l1": (5e-4,), "decay": (5e-4,)}
METHODS = {
    "gradient ascent": Method(ascend, grid(lr=(6e-4, 2e-3))),
    "gradient ascent, augmented": Method(ascend, grid(lr=(6e-4, 2e-3), augmented=(True,))),
    "NPO": Method(negative_preference, ({"lr": 1e-3, "beta": 0.1}, {"lr": 4e-3, "beta": 4.0})),
    "MU-Mis": Method(suppress_sensitivity, grid(lr=(3e-4, 1e-3))),
    "POUR-P": Method(project_class, classes_only=True),
    "SSD": Method(dampen_synapses, grid(strength=(1.0, 0.5)), needs="training set"),
    "IMU, published code": Method(published_imu, grid(lr=(1e-3, 1e-2))),
    "IMU, all parameters": Method(published_imu, grid(lr=(3e-4, 1e-3), everything=(True,))),
    "IMU, head": Method(ascend_head, grid(lr=(1e-3, 1e-2), **IMU)),
    "uniform, head": Method(ascend_head, grid(lr=(1e-3, 1e-2))),
}
