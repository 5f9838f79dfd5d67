"""TOFU on a small scale: methods of the library beside a model that was trained without the rows to forget.

    python tests/benchmarks/tofu.py --data DIR --nets DIR --out FILE.jsonl [--rows 100] [--only METHOD ...]
    python tests/benchmarks/tofu.py --out FILE.jsonl --table

``--data`` holds TOFU's JSON lines, ``--nets`` what ``train_tofu.py`` wrote: ``full`` and ``retain90`` (forget10) or ``retain95`` (forget05). A line of
the file is one method. All see the forget set alone. A method is measured coarsely along its way until the mean probability of the forget answers
has come down to the retrained model's (or its budget is spent); between the two neighbouring checks the parameters are interpolated until it is
within ``NEAR``. At this *matched* point all figures of ``imu_ray/audits/language.py`` are measured, on ``--rows`` evenly spaced rows of each set.
Of a method's learning rates the one with the highest probability of retained answers there is reported, an oracle that no user has.
"""

import argparse
import json
import math
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from imu_ray.audits import language
from imu_ray.config import AscentConfig, ForgetSetConfig, UnlearnConfig
from imu_ray.influence.curvature import LAYER_CURVATURES
from imu_ray.influence.direction import fit_directions
from imu_ray.influence.gradients import IGNORE
from imu_ray.influence.intensity import SCHEMES
from imu_ray.influence.scores import sample_losses
from imu_ray.scopes.base import Parameters
from imu_ray.scopes.features import FeatureShard, FeatureStore
from imu_ray.scopes.layers import Layers, LayersScope
from imu_ray.scopes.workers import Workers
from imu_ray.tasks.sequence import SequenceTask
from imu_ray.updates.base import UpdateProblem
from imu_ray.updates.batches import epoch_batches
from imu_ray.updates.objectives import OBJECTIVES
from imu_ray.updates.one_step import Line
from imu_ray.updates.optimiser import Optimiser
from tests.benchmarks.train_tofu import Row, encode, read

BLOCK, BATCH, EPOCHS, GROWTH = 32, 32, 6, 1.5
NEAR = 0.02  # share of the probability that is matched
LIMIT = 128  # tokens that are generated
SCOPES = {"attention": ("q_proj", "k_proj", "v_proj", "o_proj"), "outputs": ("o_proj", "down_proj")}
FORGET = {"forget10": "retain90", "forget05": "retain95"}
Figures = dict[str, float]


def padded(rows: list[Row]) -> tuple[Tensor, Tensor]:
    """Ids ``[B, T]``, and labels of the answers' tokens, those of the next position."""
    pad = lambda parts, value: nn.utils.rnn.pad_sequence([torch.tensor(part) for part in parts], True, value)
    labels = pad([[IGNORE] * (start - 1) + ids[start:] + [IGNORE] for ids, start in rows], IGNORE)
    return pad([ids for ids, _ in rows], 0), labels


@torch.inference_mode()
def answers(model: nn.Module, rows: list[Row]) -> tuple[np.ndarray, np.ndarray]:
    """Losses and extraction strengths of the rows' answers."""
    losses, strengths = np.empty(len(rows)), np.empty(len(rows))
    order = sorted(range(len(rows)), key=lambda row: len(rows[row][0]))
    for chunk in (order[i : i + BLOCK] for i in range(0, len(order), BLOCK)):
        ids, labels = padded([rows[i] for i in chunk])
        outputs = model(input_ids=ids, use_cache=False).logits
        losses[chunk] = sample_losses(outputs.double(), labels).numpy()
        strengths[chunk] = language.extraction_strength(outputs, labels).numpy()
    return losses, strengths


def spaced(count: int, most: int) -> list[int]:
    """Evenly spaced rows."""
    return np.unique(np.linspace(0, count - 1, min(most, count)).astype(int)).tolist()


@dataclass(frozen=True)
class Questions:
    """A set to measure: its rows with the answer, right answers in other words, wrong ones, and the rows whose answers are generated."""

    texts: list[str]
    rows: list[Row]
    paraphrased: list[Row]
    wrong: list[list[Row]]
    spoken: list[int]

    @classmethod
    def of(cls, path: Path, tokenizer: Any, most: int, spoken: int) -> "Questions":
        found = read(path)
        found = [found[i] for i in spaced(len(found), most)]
        of = lambda texts: encode(tokenizer, [{**row, "answer": text} for row, text in zip(found, texts, strict=True)])
        rows = encode(tokenizer, found)
        wrong = [of(texts) for texts in zip(*(row["perturbed_answer"] for row in found), strict=False)]
        other = "paraphrased_answer" in found[0]
        paraphrased = of([row["paraphrased_answer"] for row in found]) if other else rows
        texts = [row["answer"] for row in found]
        return cls(texts, rows, paraphrased, wrong, spaced(len(rows), spoken))

    def measure(self, model: nn.Module, tokenizer: Any, chosen: bool) -> dict[str, Any]:
        """Figures of a model; ``chosen``: the probability is that among the choices."""
        losses, strengths = answers(model, self.rows)
        right = losses if self.paraphrased is self.rows else answers(model, self.paraphrased)[0]
        wrong = np.stack([answers(model, rows)[0] for rows in self.wrong], 1)
        prompts = [self.rows[i][0][: self.rows[i][1]] for i in self.spoken]
        said = language.greedy_answers(model, prompts, tokenizer.eos_token_id, LIMIT)
        rouge = language.rouge_l_recall(tokenizer.batch_decode(said), [self.texts[i] for i in self.spoken])
        own = language.choice_probability(losses, wrong) if chosen else language.answer_probability(losses)
        return {
            "probability": float(own.mean()),
            "rouge": float(rouge.mean()),
            "ratios": language.truth_ratio(right, wrong),
            "extraction": float(strengths.mean()),
        }


@dataclass(frozen=True)
class Case:
    """The original model, the rows to forget, and the sets that are measured."""

    model: nn.Module
    tokenizer: Any
    forget: list[Row]
    sets: dict[str, Questions]

    @classmethod
    def load(cls, data: Path, folder: Path, name: str, most: int, spoken: int) -> "Case":
        tokenizer = AutoTokenizer.from_pretrained(folder)
        files = {"forget": f"{name}_perturbed"} | {group: f"{group}_perturbed" for group in language.UTILITY_SETS}
        sets = {key: Questions.of(data / f"{file}.jsonl", tokenizer, most, spoken) for key, file in files.items()}
        return cls(load(folder), tokenizer, encode(tokenizer, read(data / f"{name}.jsonl")), sets)

    def coarse(self, model: nn.Module) -> float:
        """Mean probability of the forget answers."""
        return float(language.answer_probability(answers(model, self.sets["forget"].rows)[0]).mean())

    def measure(self, model: nn.Module, reference: np.ndarray | None) -> tuple[Figures, np.ndarray]:
        """All figures, and the forget set's truth ratios."""
        found = {
            name: questions.measure(model, self.tokenizer, chosen=name in ("real_authors", "world_facts"))
            for name, questions in self.sets.items()
        }
        ratios = found["forget"].pop("ratios")
        for name in language.UTILITY_SETS:
            found[name]["truth_ratio"] = language.true_better(found[name].pop("ratios"))
        figures = {f"{name}.{key}": value for name, each in found.items() for key, value in each.items()}
        figures["forget.truth_ratio"] = language.closer_to_1_better(ratios)
        figures["utility"] = language.model_utility(found)
        # Of the retained rows alone: a small model knows nothing of real authors and world facts.
        own = [found["retain"][name] for name in language.UTILITY_FIGURES]
        figures["retain utility"] = len(own) / sum(1 / max(value, 1e-12) for value in own)
        figures["quality"] = language.forget_quality(ratios, ratios if reference is None else reference)
        return figures, ratios


def load(folder: Path) -> nn.Module:
    return AutoModelForCausalLM.from_pretrained(folder).eval()


def scope_of(case: Case, kinds: tuple[str, ...]) -> LayersScope:
    """The linear layers of these kinds in all blocks, on the rows to forget."""
    names = [
        name for name, module in case.model.named_modules() if isinstance(module, nn.Linear) and name.endswith(kinds)
    ]
    ids, labels = padded(case.forget)
    task = SequenceTask(ForgetSetConfig(), ids.shape[1], case.model.config.vocab_size)
    part = Layers.of_names(case.model, task, names, ids[:2], UnlearnConfig())
    sizes = tuple(len(rows) for rows in ids.split(BLOCK))
    shard = FeatureShard(ids.float().numpy(), labels.numpy(), pa.array([f"row{i}" for i in range(len(ids))]), sizes)
    return part.scope({"forget": FeatureStore([shard])}, Workers())


def imu_weights(on: LayersScope) -> np.ndarray:
    """The paper's intensities from the influence of all layers of the scope under the diagonal Fisher."""
    (shard,), part = on.sets["forget"].shards, on.part
    config = UnlearnConfig.from_recipe("paper")
    reduce = lambda statistics: part.statistics(shard, dict.fromkeys(part.parameters, statistics)).parts
    directions, _ = fit_directions(config.influence, list(part.parameters), reduce, None, lambda level: 0.0)
    table = part.scores(shard, directions)
    return SCHEMES["imu"](table["influence"].to_numpy(), table["loss"].to_numpy(), config.intensity, 0)


def iterative(on: LayersScope, objective: str, scheme: str, lr: float) -> Iterator[tuple[float, Parameters]]:
    """AdamW over batches; epochs and parameters after each step."""
    settings = AscentConfig(
        update="iterative",
        objective=objective,
        optimizer="adamw",
        learning_rate=lr,
        batch_size=BATCH,
        microbatch_rows=BLOCK,
    )
    weights = np.ones(on.rows) if scheme == "uniform" else imu_weights(on)
    kept, optimiser, done = np.flatnonzero(weights > 0), Optimiser(on.parameters(), settings, {}), 0
    for epoch in range(EPOCHS):
        for batch in epoch_batches(kept, on.block_starts, settings, 0, epoch):
            optimiser.step(on.batch_gradient(optimiser.parameters, batch, weights, OBJECTIVES[objective], BLOCK), lr)
            done += len(batch)
            yield done / on.rows, {name: tensor.clone() for name, tensor in optimiser.parameters.items()}


def one_step(on: LayersScope, objective: str, damping: float = 0.01) -> Iterator[tuple[float, Parameters]]:
    """One direction under K-FAC of the forget set; the length grows."""
    (shard,) = on.sets["forget"].shards
    kfac = LAYER_CURVATURES["kfac"]
    sums = on.part.statistics(shard, dict.fromkeys(on.part.parameters, kfac.statistics)).parts
    fitted = {name: kfac.solve(each, damping) for name, each in sums.items()}
    settings = AscentConfig(objective=objective, microbatch_rows=BLOCK)
    line = Line.of(on, UpdateProblem(np.ones(on.rows), settings, 0, preconditioners=fitted), on.parameters())
    length = 1e-2 * math.sqrt(sum(float(tensor.square().sum()) for tensor in line.origin.values()))
    for _ in range(25):
        yield length, line.at(length)
        length *= GROWTH


METHODS: dict[str, tuple[Any, dict[str, Any]]] = {
    "uniform ascent": (iterative, {"objective": "ascent", "scheme": "uniform"}),
    "IMU-weighted ascent": (iterative, {"objective": "ascent", "scheme": "imu"}),
    "NPO": (iterative, {"objective": "npo", "scheme": "uniform"}),
    "SimNPO": (iterative, {"objective": "simnpo", "scheme": "uniform"}),
    "one step, K-FAC": (one_step, {"objective": "bounded_ascent"}),
}


def matched(
    case: Case, on: LayersScope, steps: Iterator[tuple[float, Parameters]], aim: float, budget: float
) -> tuple[nn.Module, Figures]:
    """The model at the point of a way where the forget answers are as likely as under the retrained model, and what it took."""
    before, started = on.parameters(), time.process_time()
    model_of = lambda parameters: on.part.changed(parameters).apply(case.model)
    value, effort, spent = case.coarse(case.model), 0.0, 0.0
    for effort, after in steps:
        spent = time.process_time() - started
        model = model_of(after)
        value = case.coarse(model)
        if not value > aim * (1 + NEAR):
            break
        before = after
        if spent > budget:
            return model, {"reached": False, "effort": effort, "seconds": spent}
    low, high = 0.0, 1.0
    for _ in range(10):
        if abs(value - aim) <= NEAR * aim:
            break
        share = (low + high) / 2
        model = model_of({name: torch.lerp(before[name], after[name], share) for name in after})
        value = case.coarse(model)
        low, high = (share, high) if value > aim else (low, share)
    return model, {"reached": abs(value - aim) <= NEAR * aim, "effort": effort, "seconds": spent}


def run(options: argparse.Namespace) -> None:
    """Measure what is not in the file yet."""
    done = {line["method"] for line in read(options.out)} if options.out.exists() else set()
    case = Case.load(options.data, options.nets / "full", options.forget, options.rows, options.spoken)
    retrained = load(options.nets / FORGET[options.forget])
    figures, reference = case.measure(retrained, None)
    aim = figures["forget.probability"]

    def write(method: str, figures: Figures, **notes: Any) -> None:
        line = {
            "method": method,
            "forget": options.forget,
            "rows": options.rows,
            "spoken": options.spoken,
            **notes,
            **figures,
        }
        with options.out.open("a") as file:
            file.write(json.dumps(line) + "\n")
        print(json.dumps(line), flush=True)

    if "retrained" not in done:
        write("retrained", figures)
    if "do nothing" not in done:
        write("do nothing", case.measure(case.model, reference)[0])
    kept = case.sets["retain"].rows
    for kind in options.scopes:
        on = scope_of(case, SCOPES[kind])
        for name, (way, fixed) in METHODS.items():
            method = f"{name}, {kind}"
            if method in done or (options.only and name not in options.only):
                continue
            tries = []
            for each in [{}] if way is one_step else [{"lr": lr} for lr in options.rates]:
                model, notes = matched(case, on, way(on, **fixed, **each), aim, options.budget)
                tries.append((notes["reached"], -answers(model, kept)[0].mean(), len(tries), model, notes | each))
            *_, model, notes = max(tries)
            write(method, case.measure(model, reference)[0], **notes)


COLUMNS = {
    "forget.probability": "forget P", "forget.rouge": "ROUGE", "forget.truth_ratio": "truth ratio", "forget.extraction": "extraction",
    "quality": "forget quality", "retain.probability": "retain P", "retain.rouge": "retain ROUGE", "retain utility": "retain utility",
    "utility": "model utility",
}  # fmt: skip


def table(lines: list[dict[str, Any]]) -> str:
    """The figures as Markdown."""
    rows = [["method", *COLUMNS.values(), "seconds"], ["---"] * (len(COLUMNS) + 2)]
    for line in lines:
        figures = [f"{line[key]:.2g}" if key == "quality" else f"{line[key]:.3f}" for key in COLUMNS]
        note = "" if line.get("reached", True) else " (not matched)"
        rows.append([line["method"] + note, *figures, f"{line['seconds']:.0f}" if "seconds" in line else ""])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def main() -> None:
    """Run, or print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--nets", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--forget", choices=FORGET, default="forget10")
    parser.add_argument("--rows", type=int, default=400, help="rows of each set that figures are measured on")
    parser.add_argument(
        "--spoken", type=int, default=400, help="rows of each set whose answers are generated, for ROUGE"
    )
    parser.add_argument("--scopes", nargs="*", choices=SCOPES, default=list(SCOPES))
    parser.add_argument("--only", nargs="*", choices=METHODS)
    parser.add_argument("--rates", nargs="*", type=float, default=[1e-3, 3e-3], help="learning rates that are tried")
    parser.add_argument("--budget", type=float, default=60.0, help="CPU seconds after which a setting is given up")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--table", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if not options.table:
        run(options)
    print(table(read(options.out)))


if __name__ == "__main__":
    main()
