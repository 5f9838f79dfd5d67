"""What an import of the package brings with it."""

import subprocess
import sys
from pathlib import Path

import pytest

import imu_ray

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "imu_ray"


def test_a_worker_of_the_scoring_imports_neither_train_nor_tune_nor_plots():
    heavy = ("matplotlib", "pandas", "ray.train", "ray.tune", "sklearn", "tensorboardX", "torchvision")
    code = f"import sys, imu_ray.distributed.feature_job; print(*(name for name in {heavy} if name in sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.strip() == ""


def test_a_process_that_runs_a_model_for_the_audits_imports_no_scikit_learn_and_no_statistics():
    code = "import sys, imu_ray.distributed.audit_job; print(*({'sklearn', 'scipy.stats'} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.strip() == ""


def test_only_the_head_scope_and_the_mathematics_know_a_heads_matrix():
    homes = (PACKAGE / "scopes" / "head.py", PACKAGE / "influence")
    others = (path for path in PACKAGE.rglob("*.py") if not any(path == home or home in path.parents for home in homes))
    assert not [path for path in others if "matrix_CD" in path.read_text()]


def test_every_public_name_is_there():
    assert all(hasattr(imu_ray, name) for name in imu_ray.__all__)
    assert set(imu_ray.__all__) <= set(dir(imu_ray))
    places = {path.stem for path in PACKAGE.iterdir()}
    assert not places & set(imu_ray.__all__), "a module of the same name would hide it once it is imported"
    with pytest.raises(AttributeError, match="has no attribute 'forget'"):
        _ = imu_ray.forget
