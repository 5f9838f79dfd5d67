"""cluster/Dockerfile and the commands of cluster/README.md: what they name exists, and they agree with the manifests."""

import importlib.util
import re
import shlex
import sys
import types
from pathlib import Path

import click
import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from ray._private.authentication_test_utils import _AUTH_ENV_VARS
from ray._private.ray_constants import RAY_API_SERVER_ADDRESS_ENVIRONMENT_VARIABLE
from ray.scripts.scripts import cli

from imu_ray.cli import JobConfig

ROOT = Path(__file__).resolve().parents[2]
CLUSTER = ROOT / "cluster"
PYPROJECT = (ROOT / "pyproject.toml").read_text()
DOCKERFILE = (CLUSTER / "Dockerfile").read_text()
README = (CLUSTER / "README.md").read_text()
MANIFESTS = {path.name: path.read_text() for path in sorted(CLUSTER.rglob("*.yaml"))}

# By regular expression, because Python 3.10 cannot read TOML.
DEPENDENCIES = re.findall(r'"(.+)"', re.search(r"^dependencies = \[\n(.*?)^\]", PYPROJECT, re.MULTILINE | re.DOTALL)[1])
REQUIRES_PYTHON = SpecifierSet(re.search(r'^requires-python = "(.+)"', PYPROJECT, re.MULTILINE)[1])
RAY_VERSION = re.search(r"^ARG RAY_VERSION=(\S+)", DOCKERFILE, re.MULTILINE)[1]
SPLIT_STEP = re.search(r"<<'END'\n(.*?)^END\n", DOCKERFILE, re.MULTILINE | re.DOTALL)[1]


def instructions(stage):
    """The instructions of one stage, continued lines joined."""
    text = re.sub(r"<<'END'\n.*?^END\n", "\n", DOCKERFILE, flags=re.MULTILINE | re.DOTALL)
    text = re.sub(r"^#.*\n", "", text, flags=re.MULTILINE).replace("\\\n", " ")
    (body,) = [part for part in re.split(r"^(?=FROM )", text, flags=re.MULTILINE) if re.match(rf"FROM \S+ AS {stage}\n", part)]
    return [line.split(maxsplit=1) for line in body.splitlines() if line]


def arguments(stage, keyword):
    return [argument for name, argument in instructions(stage) if name == keyword]


def commands(text):
    """The shell lines of a Markdown text, continued ones joined, without comments."""
    blocks = re.findall(r"^```sh\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    return [line for block in blocks for line in re.sub(r" +#.*", "", block.replace("\\\n", " ")).splitlines()]


def sections():
    return {part.splitlines()[0]: part for part in README.split("\n## ")[1:]}


COMMANDS = commands(README)
WAYS = {title: text for title, text in sections().items() if re.match(r"[a-e]\. ", title)}
# After assignments, or in a container; and those in the text.
RAY_CALLS = [call for line in COMMANDS for call in re.findall(r"(?:^|-- +)(?:\w+=\S+ )*(ray .*)", line)] + re.findall(
    r"`(ray [^`]+)`", README
)


# --- the images


@pytest.mark.parametrize("target", ["cpu", "gpu"])
def test_image_is_rays_own_for_the_target_and_does_not_run_as_root(target):
    assert arguments(target, "FROM") == [f"rayproject/ray:${{RAY_VERSION}}-py311-{target} AS {target}"]
    assert arguments(target, "USER") == ["1000"]


def test_one_version_of_ray_everywhere_that_the_project_accepts():
    (ray,) = [requirement for requirement in map(Requirement, DEPENDENCIES) if requirement.name == "ray"]
    assert ray.specifier.contains(RAY_VERSION)
    named = re.findall(r'rayVersion: "(.+)"', "".join(MANIFESTS.values())) + re.findall(r"ray\[default\]==([\d.]+)", README)
    assert named == [RAY_VERSION] * 3


def test_one_version_of_python_everywhere_that_the_project_accepts():
    versions = {f"{major}.{minor}" for major, minor in re.findall(r"-py(\d)(\d+)-", DOCKERFILE)}
    versions |= set(re.findall(r"^FROM python:(\d\.\d+)-slim", DOCKERFILE, re.MULTILINE))
    assert len(versions) == 1
    assert REQUIRES_PYTHON.contains(versions.pop())


def test_the_dependencies_are_read_from_pyproject(monkeypatch, tmp_path):
    # A stand-in for the reader of TOML, which Python 3.10 lacks; the step runs in an image that has it.
    reader = types.SimpleNamespace(loads=lambda text: {"project": {"dependencies": DEPENDENCIES}} if text == PYPROJECT else {})
    monkeypatch.setitem(sys.modules, "tomllib", reader)
    monkeypatch.chdir(ROOT)
    exec(SPLIT_STEP.replace("/requirements", str(tmp_path)), {})
    torch, others = ((tmp_path / name).read_text().splitlines() for name in ("torch.txt", "others.txt"))
    assert sorted(torch + others) == sorted(DEPENDENCIES)
    assert {Requirement(line).name for line in torch} == {"torch", "torchvision"}


@pytest.mark.parametrize("target", ["cpu", "gpu"])
def test_an_image_installs_both_lists_and_names_no_dependency_itself(target):
    (install, _) = arguments(target, "RUN")
    assert {"/requirements/torch.txt", "/requirements/others.txt"} == set(re.findall(r"-r (\S+)", install))
    for requirement in map(Requirement, DEPENDENCIES):
        named = re.findall(rf"[\s\"]{requirement.name}(?:\[\S*\])?\b[^./]*?(?=[\s\"])", install)
        assert named == (['"ray==${RAY_VERSION}'] if requirement.name == "ray" else [])


def test_pytorch_for_cpus_comes_from_the_cpu_index_and_the_gpu_image_has_the_same_releases():
    (cpu, _), (gpu, _) = arguments("cpu", "RUN"), arguments("gpu", "RUN")
    assert "--index-url https://download.pytorch.org/whl/cpu -r /requirements/torch.txt " in cpu
    assert "--index-url" not in gpu
    (kept,) = re.findall(r"pip list --format=freeze > (\S+)", cpu)
    (source, constraints) = re.findall(r"from=cpu,source=(\S+),target=(\S+)", gpu)[0]
    assert source == kept
    assert f"-c {constraints} " in gpu


@pytest.mark.parametrize("target", ["requirements", "cpu", "gpu"])
def test_what_an_image_copies_exists_and_is_let_into_the_build(target):
    first, *let_in = [line for line in (CLUSTER / "Dockerfile.dockerignore").read_text().splitlines() if line and line[0] != "#"]
    assert first == "*"
    sources = [argument.split()[0] for argument in arguments(target, "COPY")]
    assert sources
    for source in sources:
        assert (ROOT / source).exists()
        assert f"!{source}" in let_in


@pytest.mark.parametrize("target", ["cpu", "gpu"])
def test_the_code_in_an_image_is_where_jobs_and_workers_look_for_it(target):
    (working_dir,) = arguments(target, "WORKDIR")
    assert arguments(target, "ENV") == [f"PYTHONPATH={working_dir}"]
    assert arguments(target, "COPY") == ["imu_ray imu_ray", "jobs jobs"]
    entrypoint = yaml.safe_load(MANIFESTS["rayjob.yaml"])["spec"]["entrypoint"]
    assert re.match(r"python jobs/\w+\.py --config /shared/job\.yaml$", entrypoint)
    assert working_dir in MANIFESTS["rayjob.yaml"]


def test_the_readme_builds_and_pushes_the_images_that_the_manifests_name():
    registry = re.search(r"^export REGISTRY=(\S+)", "\n".join(COMMANDS), re.MULTILINE)[1]
    named = set(re.findall(r"(?:image|worker_image): (\S+)", "".join(MANIFESTS.values())))
    builds = [shlex.split(line.replace("$REGISTRY", registry)) for line in COMMANDS if line.startswith("docker build")]
    built = {words[words.index("-t") + 1]: words[words.index("--target") + 1] for words in builds}
    pushed = {line.split()[-1].strip('"').replace("$REGISTRY", registry) for line in COMMANDS if line.startswith("docker push")}
    assert named == set(built) == pushed
    for image, target in built.items():
        assert image.endswith(f":{target}")
        assert arguments(target, "FROM")
    assert all(words[words.index("-f") + 1] == "cluster/Dockerfile" and words[-1] == "." for words in builds)
    for name, text in MANIFESTS.items():
        assert f'sed "s|{registry}|$REGISTRY|" {next(CLUSTER.rglob(name)).relative_to(ROOT)}' in README, (
            f"the commands leave {name} as it is"
        )
        assert registry in text


# --- the commands


def test_there_are_five_ways_of_at_most_five_commands():
    assert [title[0] for title in WAYS] == ["a", "b", "c", "d", "e"]
    for title, text in WAYS.items():
        first_block = text.split("```sh\n")[1].split("```")[0]
        assert 1 <= len(commands(f"```sh\n{first_block}```")) <= 5, title


@pytest.mark.parametrize("call", RAY_CALLS)
def test_ray_has_the_commands_and_options_of_the_readme(call):
    parse_ray(call)


@pytest.mark.parametrize(
    "call",
    ["ray start --heads", "ray up --yess x.yaml", "ray jobs list", "ray job submit --workingdir . -- python x.py", "ray get-auth-token x"],
)
def test_a_command_or_option_that_ray_does_not_have_is_noticed(call):
    with pytest.raises((click.UsageError, KeyError)):
        parse_ray(call)


def parse_ray(call):
    words = shlex.split(call.removesuffix(" &"))[1:]
    command = cli
    while isinstance(command, click.Group):
        command = command.commands[words.pop(0)]
    context = click.Context(command)
    _, left, _ = command.make_parser(context).parse_args(words)
    if left:
        raise click.UsageError(f"{left} left over")


def test_every_way_calls_ray_or_applies_a_manifest():
    assert {" ".join(call.split()[:2]) for call in RAY_CALLS} >= {"ray start", "ray up", "ray down", "ray job", "ray get-auth-token"}
    for text in WAYS.values():
        assert any(call in text for call in ("ray job submit", "cluster/kuberay/rayjob.yaml"))


def test_paths_and_entry_points_exist():
    everything = README + DOCKERFILE + "".join(MANIFESTS.values())
    paths = set(re.findall(r"\b((?:cluster|jobs|tests)/[\w./-]*\w)", everything))
    links = {(CLUSTER / link).resolve().relative_to(ROOT) for link in re.findall(r"\]\(([^)#:]+)\)", README)}
    assert "jobs/unlearn.py" in paths
    assert [str(path) for path in sorted(map(str, paths | links)) if not (ROOT / path).exists()] == []


@pytest.mark.parametrize("script", sorted(set(re.findall(r"python (jobs/\w+\.py)", README + "".join(MANIFESTS.values())))))
def test_entry_points_take_a_configuration(script, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [script, "--help"])
    spec = importlib.util.spec_from_file_location("__main__", ROOT / script)
    with pytest.raises(SystemExit, match="0"):
        spec.loader.exec_module(importlib.util.module_from_spec(spec))
    assert "--config" in capsys.readouterr().out


def test_links_within_the_page_have_their_headings():
    headings = {re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in sections()}
    assert set(re.findall(r"\]\(#([^)]+)\)", README)) <= headings


def test_environment_variables_are_those_that_ray_reads():
    known = {*_AUTH_ENV_VARS, RAY_API_SERVER_ADDRESS_ENVIRONMENT_VARIABLE}
    assert set(re.findall(r"\bRAY_\w+", README)) == known


def test_the_job_of_the_readme_is_accepted_and_its_report_is_fetched(tmp_path):
    (text,) = re.findall(r"^```yaml\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
    (tmp_path / "job.yaml").write_text(text)
    job = JobConfig.load(tmp_path / "job.yaml", ["log=json"])
    paths = [job.forget_set, job.model.checkpoint, str(job.run_dir), *job.evaluation.values()]
    assert all(path.startswith("/shared/") for path in paths)
    fetched = re.findall(r"kubectl cp imu-ray-files:(\S+)", README)
    assert fetched == [f"{job.run_dir}/report.html"] * 2


def test_the_kubernetes_objects_of_the_commands_are_those_of_the_manifests():
    cluster, job = (yaml.safe_load(MANIFESTS[name])["metadata"]["name"] for name in ("raycluster.yaml", "rayjob.yaml"))
    _, files = yaml.safe_load_all(MANIFESTS["shared-storage.yaml"])
    shell = "\n".join(COMMANDS)
    assert set(re.findall(r"\b(?:pod/|cp \S+ |cp )([\w-]+)(?=:|$)", shell, re.MULTILINE)) == {files["metadata"]["name"]}
    assert set(re.findall(r"svc/([\w-]+)", shell)) == {f"{cluster}-head-svc"}
    assert set(re.findall(r"raycluster[ /]([\w-]+)", shell)) == {cluster}
    assert set(re.findall(r"get secret (\S+)", shell)) == {cluster}
    assert set(re.findall(r"rayjob[ /]([\w-]+)", shell)) == {job}


def test_the_instance_profiles_of_the_readme_are_those_of_the_aws_file():
    types = yaml.safe_load(MANIFESTS["aws.yaml"])["available_node_types"].values()
    assert set(re.findall(r"^\| `(imu-ray-\w+)`", README, re.MULTILINE)) == {
        kind["node_config"]["IamInstanceProfile"]["Name"] for kind in types
    }
