"""The study of layers: methods beside a retrained model, at its forget accuracy, on nets of ``nets.py``.

    python tests/benchmarks/study_layers.py --data DIR --nets DIR --out FILE.jsonl [--only NET,SET,METHOD ...]
    python tests/benchmarks/study_layers.py --out FILE.jsonl --table

``--data`` holds ``cifar10`` and ``cifar100``; ``--nets`` holds NET-SET.safetensors and .json by ``train_cifar.py``,
``NET-none`` being the original and NET ending in 100 where the data is CIFAR-100. ``--methods`` are modules with
``METHODS`` as in ``baselines.py``. A line of the file is one net, forget set and method; what is there is not run
again. ``--only`` are shell patterns.

A method is measured coarsely along its way, at epochs that grow by 1.6, and stopped when both figures, clean forget
accuracy and that on 4 fixed views, have come down past the retrained model's. Between the two neighbouring checks the
model is interpolated linearly (its parameters), until the figure is within half a point of the retrained model's:
this is the *matched* model that all columns are measured on. Of a method's settings the one whose retained rows fare
best there is reported, an oracle that no user has. Seconds are CPU seconds of the method alone. The never-trained
control is the same call on as many validation rows of the same labels, sunk by as many points; it is run for the sets
that ``--control`` names. Where a whole class is forgotten, the test rows are those of the other classes.
"""

import argparse
import copy
import importlib
import json
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import cached_property
from pathlib import Path

import torch
from safetensors.torch import load_file
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.benchmarks.baselines import Method, Problem, head_of, inputs_of
from tests.benchmarks.nets import NETS, Training
from tests.benchmarks.train_cifar import augment, forget_rows, load_split

VIEWS = 4
FORGET_ROWS, VIEW_ROWS, OTHER_ROWS, MEASURED = (
    1500,
    375,
    1000,
    2000,
)  # rows that figures are measured on; views: 4 of each row
COARSE = {"forget": 400, "views": 100}  # rows of a check
CPU_SECONDS = 30.0  # a setting that has not come down by then is given up
GROWTH, NEAR, MARGIN = 1.6, 0.005, 0.02
FLOOR = 0.005  # what counts as forgotten where the retrained model knows nothing of the rows
KEYS = ("forget", "views")
COLUMNS = (*KEYS, "retain", "test", "membership")
State = dict[str, Tensor]
Figures = dict[str, float]


@dataclass(frozen=True)
class Rows:
    """Rows to sink, and their views, that a model is measured on."""

    images: Tensor
    labels: Tensor
    crop: int

    @cached_property
    def views(self) -> Tensor:
        """``VIEWS`` fixed views of the first rows, augmented as in training: ``[VIEWS, rows, 3, 32, 32]``."""
        generator = torch.Generator().manual_seed(1234)
        return torch.stack([augment(self.images[:VIEW_ROWS], generator, self.crop) for _ in range(VIEWS)])

    def accuracy(self, model: nn.Module, key: str, coarse: bool = False) -> float:
        """``forget``, clean, or ``views``; on fewer rows where ``coarse``."""
        rows = COARSE[key] if coarse else {"forget": FORGET_ROWS, "views": VIEW_ROWS}[key]
        labels = self.labels[:rows]
        if key == "forget":
            return accuracy_of(logits_of(model, self.images[:rows]), labels)
        return accuracy_of(logits_of(model, self.views[:, :rows].flatten(0, 1)), labels.repeat(VIEWS))


@dataclass(frozen=True)
class Case:
    """One net and forget set: the original, its retrained reference, and the rows that all methods are measured on."""

    net: str
    name: str
    how: Training
    original: nn.Module
    retrained: nn.Module
    forget: Rows
    unseen: Rows
    train: tuple[Tensor, Tensor]
    retain: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]
    others: tuple[Tensor, Tensor]
    whole_class: bool

    def measure(self, model: nn.Module) -> Figures:
        """All columns; membership is the AUC of the loss of forget rows against test rows of the same labels."""
        images, labels = self.forget.images[:FORGET_ROWS], self.forget.labels[:FORGET_ROWS]
        logits = logits_of(model, images)
        own = nn.functional.cross_entropy(logits, labels, reduction="none")
        other = nn.functional.cross_entropy(logits_of(model, self.others[0]), self.others[1], reduction="none")
        losses, member = torch.cat([own, other]).nan_to_num(1e6, 1e6), torch.arange(len(own) + len(other)) < len(own)
        return {
            "forget": accuracy_of(logits, labels),
            "views": self.forget.accuracy(model, "views"),
            "retain": self.retained(model),
            "test": self.tested(model),
            "membership": float(roc_auc_score(member, -losses)),
        }

    def tested(self, model: nn.Module) -> float:
        return accuracy_of(logits_of(model, self.test[0]), self.test[1])

    def retained(self, model: nn.Module) -> float:
        return accuracy_of(logits_of(model, self.retain[0]), self.retain[1])


@torch.inference_mode()
def logits_of(model: nn.Module, images: Tensor) -> Tensor:
    model.eval()
    return torch.cat([model(inputs_of(part)) for part in images.split(500)])


def accuracy_of(logits: Tensor, labels: Tensor) -> float:
    return float((logits.argmax(1) == labels).float().mean())


def state_of(model: nn.Module) -> State:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def between(a: State, b: State, share: float) -> State:
    return {name: torch.lerp(a[name], b[name], share) if b[name].is_floating_point() else b[name] for name in b}


@dataclass
class Check:
    """The model after some steps of a method, and coarse figures."""

    state: State
    figures: Figures
    seconds: float
    notes: Figures


def coarse(model: nn.Module, rows: Rows) -> Figures:
    return {key: rows.accuracy(model, key, coarse=True) for key in KEYS}


def trajectory(method: Method, settings: dict, problem: Problem, rows: Rows, enough: Figures) -> list[Check]:
    """The checks of one run, until all figures have come down to ``enough`` or its time is over."""
    model, seconds, due, epochs = problem.model, 0.0, 0.0, -1.0
    checks = [Check(state_of(model), coarse(model, rows), 0.0, {"epochs": 0.0})]
    steps, started = method.run(problem, **settings), time.process_time()
    for notes in steps:
        seconds += time.process_time() - started
        stop = seconds > CPU_SECONDS
        if notes["epochs"] >= due or notes["epochs"] == epochs or stop:  # equal: a strength grows instead
            due = max(due, notes["epochs"] * GROWTH)
            checks.append(Check(state_of(model), coarse(model, rows), seconds, dict(notes)))
            reached = all(min(check.figures[key] for check in checks) <= enough[key] for key in enough)
            stop |= reached or not bool(torch.isfinite(head_of(model).weight).all())
        if stop:
            break
        epochs = notes["epochs"]
        started = time.process_time()
    return checks


def matched(checks: list[Check], key: str, target: float, guess: float, model: nn.Module, rows: Rows) -> Check | None:
    """The model on the way whose figure is the target, None if it never came down; ``guess`` is the coarse target."""

    def figure(state: State) -> float:
        model.load_state_dict(state)
        return rows.accuracy(model, key)

    at = next((number for number, check in enumerate(checks) if check.figures[key] <= guess), len(checks) - 1)
    fine = {at: figure(checks[at].state)}
    while fine[at] <= target and at > 0:
        at -= 1
        fine[at] = figure(checks[at].state)
    while fine[at] > target and at + 1 < len(checks):
        at += 1
        fine[at] = fine.get(at) or figure(checks[at].state)
    if fine[at] > target or at == 0:
        return checks[0] if fine[at] <= target else None
    (low, before), (high, after), check = (checks[at - 1].state, fine[at - 1]), (checks[at].state, fine[at]), checks[at]
    state = high
    for _ in range(3):
        if abs(after - target) <= NEAR:
            break
        state = between(low, high, min(max((before - target) / (before - after), 0.05), 0.95))
        found = figure(state)
        if abs(found - target) <= NEAR:
            break
        if found > target:
            low, before = state, found
        else:
            high, after = state, found
    return Check(state, check.figures, check.seconds, check.notes)


def gap(figures: Figures, reference: Figures) -> float:
    """Mean absolute difference over the columns, in points."""
    return 100 * sum(abs(figures[name] - reference[name]) for name in COLUMNS) / len(COLUMNS)


def shown(figures: Figures) -> str:
    return " / ".join(f"{100 * value:.1f}" for value in figures.values())


@dataclass
class Run:
    """The matched models of one run (None where it did not come down so far) and its last check."""

    settings: dict
    found: dict[str, Check | None]
    last: Check
    model: nn.Module

    def at(self, key: str) -> nn.Module:
        self.model.load_state_dict((self.found[key] or self.last).state)
        return self.model


def sink(case: Case, method: Method, settings: dict, rows: Rows, points: dict[str, tuple[float, float]]) -> Run:
    """Run a method until the figures have sunk to the targets; ``points`` gives target and coarse target."""
    problem = Problem(copy.deepcopy(case.original), rows.images, rows.labels, case.how.crop, 0, *case.train)
    enough = {key: max(low - MARGIN, FLOOR) for key, (_, low) in points.items()}
    checks = trajectory(method, settings, problem, rows, enough)
    model = problem.model.requires_grad_(False)
    found = {key: matched(checks, key, target, low, model, rows) for key, (target, low) in points.items()}
    return Run(settings, found, checks[-1], model)


def study(case: Case, method: Method, reference: Figures, nothing: Figures, with_control: bool) -> dict:
    """One method's line: its best setting at either match, and the control."""
    low = coarse(case.retrained, case.forget)
    points = {key: (max(reference[key], FLOOR), max(low[key], FLOOR)) for key in KEYS}
    runs = []
    for settings in method.settings:
        one = sink(case, method, settings, case.forget, points)
        retained = {key: case.retained(one.at(key)) if one.found[key] else -1.0 for key in KEYS}
        ended = f"{one.last.notes['epochs']:.2f} epochs, {one.last.seconds:.1f} s, {shown(one.last.figures)}"
        print(f"    {settings}: {ended} of {shown(low)}; retained {shown(retained)}", flush=True)
        runs.append((retained, one))
    line: dict = {"needs": method.needs}
    best = {key: max(runs, key=lambda pair: pair[0][key])[1] for key in KEYS}
    for key, one in best.items():
        figures, check = case.measure(one.at(key)), one.found[key] or one.last
        line[key] = {
            "reached": one.found[key] is not None, "settings": one.settings, **figures, "gap": gap(figures, reference),
            "cost": {column: figures[column] - nothing[column] for column in ("retain", "test")},
            "seconds": check.seconds, **check.notes,
        }  # fmt: skip
    if with_control:
        for one in {id(one): one for one in best.values()}.values():
            came_down = [key for key in KEYS if best[key] is one and line[key]["reached"] and line[key]["seconds"]]
            drops = {key: nothing[key] - points[key][0] for key in came_down}
            for key, cost in control(case, method, one.settings, drops).items():
                line[key]["control"] = cost
    return line


def control(case: Case, method: Method, settings: dict, drops: Figures) -> dict[str, Figures]:
    """What it costs to sink as many rows never trained on by as many points, for each figure that came down so far."""
    rows = case.unseen

    def measure(model: nn.Module, keys: Iterable[str]) -> Figures:
        own = {key: rows.accuracy(model, key) for key in keys}
        return {"retain": case.retained(model), "test": case.tested(model), **own}

    if not drops:
        return {}
    before, low = measure(case.original, drops), coarse(case.original, rows)
    points = {key: (max(before[key] - drop, FLOOR), max(low[key] - drop, FLOOR)) for key, drop in drops.items()}
    run = sink(case, method, settings, rows, points)
    after = {key: measure(run.at(key), [key]) for key in drops if run.found[key]}
    return {key: {column: figures[column] - before[column] for column in figures} for key, figures in after.items()}


def chosen_rows(labels: Tensor, wanted: Tensor, limit: int) -> Tensor:
    """Numbers of rows of ``labels`` with the same labels as ``wanted``, as many of each, about ``limit`` at most."""
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    share = min(1.0, limit / len(wanted))
    rows = [
        order[labels[order] == label][: max(1, round(share * count))]
        for label, count in zip(*(part.tolist() for part in wanted.unique(return_counts=True)), strict=True)
    ]
    return torch.cat(rows).sort().values


def load(nets: Path, name: str, how: Training, classes: int) -> nn.Module:
    model = how.make(classes)
    model.load_state_dict(load_file(nets / f"{name}.safetensors"))
    return model.to(memory_format=torch.channels_last).eval()


def case_of(nets: Path, name: str, train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor]) -> Case:
    """The case of NET-SET, from its files and the data."""
    net, _, chosen = name.partition("-")
    record = json.loads((nets / f"{name}.json").read_text())
    how, classes = NETS[record["net"]], int(train[1].max()) + 1
    images, labels = (part[: how.rows] for part in train)
    unseen_images, unseen_labels = (part[how.rows :] for part in train)
    mask = forget_rows(labels, record["without"])
    order = torch.randperm(how.rows, generator=torch.Generator().manual_seed(0))
    retain = order[~mask[order]][:MEASURED]
    unseen = chosen_rows(unseen_labels, labels[mask], how.rows)
    others = chosen_rows(test[1], labels[mask], OTHER_ROWS)
    whole_class = record["without"].startswith("class:")
    known = (~torch.isin(test[1], labels[mask]) if whole_class else torch.ones_like(test[1])).nonzero()[:MEASURED, 0]
    return Case(
        net, chosen, how, load(nets, f"{net}-none", how, classes), load(nets, name, how, classes),
        Rows(images[mask], labels[mask], how.crop), Rows(unseen_images[unseen], unseen_labels[unseen], how.crop),
        (images, labels), (images[retain], labels[retain]), (test[0][known], test[1][known]),
        (test[0][others], test[1][others]), whole_class,
    )  # fmt: skip


def lines_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def run(options: argparse.Namespace) -> None:
    """Run what is missing, in the order of the patterns."""
    methods: dict[str, Method] = {}
    for module in options.methods:
        methods |= importlib.import_module(module).METHODS
    splits: dict[str, tuple] = {}
    for net_pattern, set_pattern, method_pattern in (pattern.split(",", 2) for pattern in options.only):
        for path in sorted(options.nets.glob("*.json")):
            net, _, chosen = path.stem.partition("-")
            if chosen == "none" or not (fnmatch(net, net_pattern) and fnmatch(chosen, set_pattern)):
                continue
            present = {line["method"] for line in lines_of(options.out) if (line["net"], line["set"]) == (net, chosen)}
            wanted = {
                name: method
                for name, method in methods.items()
                if name not in present and fnmatch(name, method_pattern)
            }
            if not wanted or not (options.nets / f"{net}-none.json").exists():
                continue
            data = options.data / ("cifar100" if net.endswith("100") else "cifar10")
            if data.name not in splits:
                splits = {data.name: (load_split(data, "train"), load_split(data, "test"))}
            run_case(case_of(options.nets, path.stem, *splits[data.name]), wanted, options)


def run_case(case: Case, methods: dict[str, Method], options: argparse.Namespace) -> None:
    """Append a line for each method; the first ones are the retrained model and doing nothing."""

    def write(name: str, line: dict) -> dict:
        with options.out.open("a") as file:
            file.write(json.dumps({"net": case.net, "set": case.name, "method": name, **line}) + "\n")
        return line

    present = {
        line["method"]: line for line in lines_of(options.out) if (line["net"], line["set"]) == (case.net, case.name)
    }
    if "do nothing" not in present:
        reference, nothing = case.measure(case.retrained), case.measure(case.original)
        present["retrained"] = write("retrained", {"figures": reference, "rows": len(case.forget.labels)})
        present["do nothing"] = write("do nothing", {"figures": nothing, "gap": gap(nothing, reference)})
    reference, nothing = (present[name]["figures"] for name in ("retrained", "do nothing"))
    for name, method in methods.items():
        if case.whole_class or not method.classes_only:
            print(f"{time.strftime('%H:%M:%S')} {case.net}, {case.name}: {name}", flush=True)
            write(name, study(case, method, reference, nothing, fnmatch(case.name, options.control)))


def table(lines: list[dict]) -> str:
    """Markdown for each net and forget set."""
    made = []
    percent = lambda figures: [f"{100 * figures[name]:.1f}" for name in COLUMNS]
    pair = lambda figures: f"{100 * figures['retain']:+.1f} / {100 * figures['test']:+.1f}" if figures else "-"
    for net, chosen in dict.fromkeys((line["net"], line["set"]) for line in lines):
        part = {line["method"]: line for line in lines if (line["net"], line["set"]) == (net, chosen)}
        head = ["method", "matched on", *COLUMNS, "gap", "cost retain / test", "the same, never trained", "seconds"]
        head += ["epochs", "setting"]
        rows = [
            ["retrained", "", *percent(part["retrained"]["figures"]), "0.0", *[""] * 5],
            ["do nothing", "", *percent(part["do nothing"]["figures"]), f"{part['do nothing']['gap']:.1f}", *[""] * 5],
        ]
        for key, label in (("forget", "clean"), ("views", "views")):
            matched = [(name, line[key], line["needs"]) for name, line in part.items() if key in line]
            for name, at, needs in sorted(matched, key=lambda row: (not row[1]["reached"], row[1]["gap"])):
                settings = ", ".join(f"{k} {v:g}" for k, v in at["settings"].items() if not isinstance(v, bool))
                rows.append([
                    name + ("" if needs == "forget set" else f" ({needs})"),
                    label if at["reached"] else f"{label}: not reached",
                    *percent(at), f"{at['gap']:.1f}", pair(at["cost"]), pair(at.get("control")),
                    f"{at['seconds']:.1f}", f"{at['epochs']:.1f}", settings,
                ])  # fmt: skip
        made += [
            f"\n**{net}, {chosen}**, {part['retrained']['rows']:,} rows\n",
            *("| " + " | ".join(row) + " |" for row in [head, ["---"] * 13, *rows]),
        ]
    return (
        "Methods are matched to the retrained model's forget accuracy, clean or on views: the model is interpolated\n"
        "linearly between the two neighbouring checks. Settings are chosen by the retained rows there, which favours\n"
        "the methods. Gap: mean absolute difference to the retrained model over the five columns, in points. Cost:\n"
        "change from doing nothing, in points; never trained: of the same call on as many validation rows, sunk as far.\n"
        + "\n".join(made)
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--nets", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", nargs="+", default=["*,*,*"], help="shell patterns NET,SET,METHOD, in this order")
    parser.add_argument(
        "--control", default="random_0_1_1", help="shell pattern of the sets that the never-trained control is run for"
    )
    parser.add_argument("--methods", nargs="+", default=["tests.benchmarks.baselines"], help="modules with METHODS")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--table", action="store_true", help="print what is in the file, run nothing")
    options = parser.parse_args()
    if options.table:
        print(table(lines_of(options.out)))
        return
    if not (options.data and options.nets):
        parser.error("--data and --nets are needed to run")
    torch.set_num_threads(options.threads)
    run(options)


if __name__ == "__main__":
    main()
