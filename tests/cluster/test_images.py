"""cluster/Dockerfile: its versions, dependencies and what it copies agree with the project and the manifests."""

import re
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

ROOT = Path(__file__).resolve().parents[2]
CLUSTER = ROOT / "cluster"
DOCKERFILE = (CLUSTER / "Dockerfile").read_text()
MANIFESTS = "".join(path.read_text() for path in CLUSTER.rglob("*.yaml"))

# By regular expression, because Python 3.10 cannot read TOML.
PYPROJECT = (ROOT / "pyproject.toml").read_text()
DEPENDENCIES = re.findall(r'"(.+)"', re.search(r"^dependencies = \[\n(.*?)^\]", PYPROJECT, re.MULTILINE | re.DOTALL)[1])


def arguments(stage, keyword):
    """Arguments of a stage's instructions of one kind, continued lines joined."""
    stages = re.split(r"^(?=FROM )", DOCKERFILE.replace("\\\n", " "), flags=re.MULTILINE)
    (body,) = [part for part in stages if re.match(rf"FROM \S+ AS {stage}\n", part)]
    return re.findall(rf"^{keyword} (.+)", body, re.MULTILINE)


def test_images_and_manifests_name_one_version_of_ray_that_the_project_accepts():
    versions = re.findall(r"^ARG RAY_VERSION=(\S+)", DOCKERFILE, re.MULTILINE)
    versions = {*versions, *re.findall(r'rayVersion: "(.+)"', MANIFESTS)}
    (ray,) = [requirement for requirement in map(Requirement, DEPENDENCIES) if requirement.name == "ray"]
    (version,) = versions
    assert ray.specifier.contains(version)


def test_all_images_have_one_version_of_python_that_the_project_accepts():
    versions = {f"{major}.{minor}" for major, minor in re.findall(r"-py(\d)(\d+)-", DOCKERFILE)}
    (version,) = versions | set(re.findall(r"^FROM python:(\d\.\d+)-slim", DOCKERFILE, re.MULTILINE))
    assert SpecifierSet(re.search(r'^requires-python = "(.+)"', PYPROJECT, re.MULTILINE)[1]).contains(version)


def test_every_image_that_a_manifest_names_is_a_stage_of_the_dockerfile():
    targets = set(re.findall(r"image: \S+/imu-ray:(\w+)", MANIFESTS))
    assert targets == {"cpu", "gpu"}
    for target in targets:
        assert arguments(target, "FROM") == [f"rayproject/ray:${{RAY_VERSION}}-py311-{target} AS {target}"]
        assert arguments(target, "USER") == ["1000"]


@pytest.mark.parametrize("target", ["cpu", "gpu"])
def test_an_image_installs_the_dependencies_of_the_project_and_names_none_itself(target):
    install = arguments(target, "RUN")[0]
    assert set(re.findall(r"-r (\S+)", install)) == {"/requirements/torch.txt", "/requirements/others.txt"}
    assert re.findall(r'"(\S+==\S+)"', install) == ["ray==${RAY_VERSION}"]


@pytest.mark.parametrize("target", ["requirements", "cpu", "gpu"])
def test_what_an_image_copies_exists_and_is_let_into_the_build(target):
    let_in = (CLUSTER / "Dockerfile.dockerignore").read_text().splitlines()
    for source in (argument.split()[0] for argument in arguments(target, "COPY")):
        assert (ROOT / source).exists()
        assert f"!{source}" in let_in


def test_the_entry_point_of_the_rayjob_is_in_the_image():
    entry = re.search(r"entrypoint: python (\S+)", MANIFESTS)[1]
    assert (ROOT / entry).exists()
    assert "jobs jobs" in arguments("cpu", "COPY")
