"""The shape of the package, checked on its source."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import imu_ray

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "imu_ray"

# Imports run strictly downward: a module may import modules of earlier rows, and of its own row without a circle.
ORDER = [
    ["errors"],
    ["settings", "storage", "events"],
    ["config", "progress"],
    ["influence.gradients"],
    ["forget_set.base", "models", "influence.curvature.base", "influence.scores", "influence.order_statistics"],
    ["forget_set.columns", "influence.intensity"],
    ["forget_set.table", "forget_set.folder", "forget_set.dataset", "forget_set.part"],
    ["forget_set"],
    ["tasks.base"],
    ["influence.curvature.diagonal", "influence.curvature.ggn", "influence.curvature.kronecker"],
    ["influence.curvature.hessian"],
    ["influence.curvature"],
    ["influence.direction", "influence.features", "tasks.classification"],
    ["influence.extraction", "influence.score_table", "ascent.objectives", "ascent.batches", "ascent.workers"],
    ["ascent.step", "ascent.stopping", "ascent.rescoring"],
    ["ascent.measure"],
    ["ascent.loop"],
    ["checkpoint", "manifest"],
    ["audits.accuracy", "audits.membership", "audits.report"],
    ["audits.sweep_report"],
    ["distributed.session", "distributed.metrics"],
    ["distributed.task_runner"],
    ["distributed.influence_job"],
    ["distributed.ascent_job", "distributed.audit_job"],
    ["inputs"],
    ["pipeline"],
    ["api"],
    ["sweep_axes", "planning"],
    ["sweep_run"],
    ["demo", "job"],
    [""],
]
RANK = {f"imu_ray.{name}".rstrip("."): rank for rank, row in enumerate(ORDER) for name in row}
RAY_ROOMS = ("imu_ray.distributed", "imu_ray.sweep_axes", "imu_ray.sweep_run", "imu_ray.ensemble")


def modules():
    for path in sorted(PACKAGE.rglob("*.py")):
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        yield name, ast.parse(path.read_text())


def imports(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            yield from (name if name in RANK else node.module for name in names)


def test_every_module_has_its_place_in_the_order():
    packages = {"imu_ray.tasks", "imu_ray.influence", "imu_ray.ascent", "imu_ray.audits", "imu_ray.distributed"}
    assert {name for name, _ in modules()} == set(RANK) | packages


def test_imports_run_downward_without_a_circle():
    graph = {name: {target for target in imports(tree) if target.startswith("imu_ray")} for name, tree in modules()}
    for name, targets in graph.items():
        for target in targets:
            assert RANK[target] <= RANK[name], f"{name} imports {target}, which stands above it"
    done = set()

    def visit(name, path):
        assert name not in path, f"circle: {' -> '.join([*path, name])}"
        if name not in done:
            for target in graph.get(name, ()):
                visit(target, [*path, name])
            done.add(name)

    for name in graph:
        visit(name, [])


def test_ray_is_imported_only_where_things_run_on_ray():
    for name, tree in modules():
        if not name.startswith(RAY_ROOMS):
            used = [target for target in imports(tree) if target.split(".")[0] == "ray"]
            assert not used, f"{name} imports {used}"


def test_modules_and_functions_stay_readable():
    for path in sorted(PACKAGE.rglob("*.py")):
        assert len(path.read_text().splitlines()) <= 350, path
        assert path.stem not in {"utils", "util", "common", "helpers", "misc"}


def test_jobs_are_thin_and_use_public_names():
    for path in sorted((ROOT / "jobs").glob("*.py")):
        assert len(path.read_text().splitlines()) <= 40, path


def test_a_worker_of_the_scoring_imports_neither_train_nor_tune_nor_plots():
    heavy = ("matplotlib", "pandas", "ray.train", "ray.tune", "sklearn", "tensorboardX", "torchvision")
    code = f"import sys, imu_ray.distributed.influence_job; print(*(name for name in {heavy} if name in sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.strip() == ""


def test_every_public_name_is_there():
    assert all(hasattr(imu_ray, name) for name in imu_ray.__all__)
    assert set(imu_ray.__all__) <= set(dir(imu_ray))
    places = {path.stem for path in PACKAGE.iterdir()}
    assert not places & set(imu_ray.__all__), "a module of the same name would hide it once it is imported"
    with pytest.raises(AttributeError, match="has no attribute 'forget'"):
        _ = imu_ray.forget
