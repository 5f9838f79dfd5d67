"""The manifests of cluster/, against what Ray, KubeRay, Kubernetes and EC2 document: an unknown key is refused."""

import copy
import json
import re
from pathlib import Path

import pytest
import ray
import yaml
from jsonschema import Draft202012Validator, ValidationError
from ray._common.usage.usage_constants import USAGE_STATS_ENABLED_ENV_VAR
from ray._private.authentication.authentication_token_setup import AUTH_MODE_ENV_VAR
from ray._private.ray_constants import DEFAULT_OBJECT_STORE_MEMORY_PROPORTION
from ray.autoscaler._private.kuberay import autoscaling_config
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.scripts.scripts import start

CLUSTER = Path(__file__).resolve().parents[2] / "cluster"
KUBERAY_SCHEMA = json.loads(Path(__file__).with_name("kuberay_schema.json").read_text())
RAY_UP_SCHEMA = json.loads((Path(ray.__file__).parent / "autoscaler" / "ray-schema.json").read_text())
RAY_START_OPTIONS = {option.removeprefix("--") for parameter in start.params for option in parameter.opts}
ENVIRONMENT = {USAGE_STATS_ENABLED_ENV_VAR, AUTH_MODE_ENV_VAR}
HOME = "/home/ray"  # of user 1000, group 100, in Ray's images


def closed(**properties):
    return {"type": "object", "additionalProperties": False, "properties": properties}


# What Ray's own schema leaves open: the keys that its documentation has for AWS, and those of EC2's create_instances.
DISK = closed(VolumeSize={"type": "integer"}, VolumeType={"enum": ["gp3", "io2"]}, Encrypted={"const": True})
NODE_CONFIG = closed(
    InstanceType={"type": "string"},
    ImageId={"type": "string", "pattern": "^(ami-|resolve:ssm:/)"},
    IamInstanceProfile=closed(Name={"type": "string"}, Arn={"type": "string"}),
    InstanceMarketOptions=closed(MarketType={"const": "spot"}, SpotOptions=closed(MaxPrice={"type": "string"})),
    MetadataOptions=closed(HttpTokens={"enum": ["required", "optional"]}, HttpPutResponseHopLimit={"type": "integer"}),
    BlockDeviceMappings={"type": "array", "items": closed(DeviceName={"type": "string"}, Ebs=DISK)},
    KeyName={"type": "string"},
    SubnetIds={"type": "array"},
    SecurityGroupIds={"type": "array"},
)
NODE_TYPE = {
    "properties": {
        "node_config": {**NODE_CONFIG, "required": ["InstanceType", "ImageId", "IamInstanceProfile"]},
        "resources": closed(CPU={"type": "integer"}, GPU={"type": "integer"}, memory={"type": "integer"}),
    },
}
AWS_SCHEMA = {
    "properties": {
        "provider": closed(
            type={"const": "aws"},
            region={"type": "string"},
            availability_zone={"type": "string"},
            cache_stopped_nodes={"type": "boolean"},
            use_internal_ips={"type": "boolean"},
            security_group={"type": "object"},
        ),
        # Where Ray looks for a token.
        "file_mounts": closed(**{f"{HOME}/.ray/auth_token": {"const": "~/.ray/auth_token"}}),
        "available_node_types": closed(head=NODE_TYPE, cpu_worker=NODE_TYPE, gpu_worker=NODE_TYPE),
    },
    "required": ["max_workers", "docker", "file_mounts", "head_node_type", "available_node_types"],
}


def documents(name):
    # By way of JSON, because what one YAML anchor stands for would be one object.
    return json.loads(json.dumps(list(yaml.safe_load_all((CLUSTER / name).read_text()))))


(AWS,) = documents("aws.yaml")
STORAGE, FILES_POD = documents("kuberay/shared-storage.yaml")
(RAY_CLUSTER,) = documents("kuberay/raycluster.yaml")
(RAY_JOB,) = documents("kuberay/rayjob.yaml")
DOCUMENTS = {"aws": AWS, "storage": STORAGE, "files": FILES_POD, "raycluster": RAY_CLUSTER, "rayjob": RAY_JOB}
HEAD = RAY_CLUSTER["spec"]["headGroupSpec"]
WORKERS = {group["groupName"]: group for group in RAY_CLUSTER["spec"]["workerGroupSpecs"]}
# By name, so that a failing test says which.
PODS = {
    "files": FILES_POD["spec"],
    "submitter": RAY_JOB["spec"]["submitterPodTemplate"]["spec"],
    "head": HEAD["template"]["spec"],
    **{name: group["template"]["spec"] for name, group in WORKERS.items()},
}
RAY_PODS = {name: PODS[name] for name in ("head", *WORKERS)}


def check(document):
    """Raise ``ValidationError`` for a key or value that is not documented."""
    if "kind" not in document:
        Draft202012Validator(RAY_UP_SCHEMA).validate(document)
        Draft202012Validator(AWS_SCHEMA).validate(document)
        return
    Draft202012Validator({**KUBERAY_SCHEMA, "$ref": f"#/$defs/{document['kind']}"}).validate(document)
    for path in key_paths(document):
        if path[-2:-1] == ("rayStartParams",) and path[-1] not in RAY_START_OPTIONS:
            raise ValidationError(f"ray start has no --{path[-1]}")
        if path[-1] == "env":
            unknown = {variable["name"] for variable in at(document, path)} - ENVIRONMENT
            if unknown:
                raise ValidationError(f"nothing reads {unknown}")


def key_paths(node, path=()):
    if isinstance(node, dict):
        yield from ((*path, key) for key in node)
    children = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, child in children:
        yield from key_paths(child, (*path, key))


def at(node, path):
    for key in path:
        node = node[key]
    return node


@pytest.mark.parametrize("document", DOCUMENTS.values(), ids=DOCUMENTS)
def test_manifest_has_only_documented_keys_and_values(document):
    check(document)


@pytest.mark.parametrize("document", DOCUMENTS.values(), ids=DOCUMENTS)
def test_a_misspelt_key_is_refused_wherever_it_stands(document):
    for path in key_paths(document):
        broken = copy.deepcopy(document)
        level = at(broken, path[:-1])
        level[f"{path[-1]}x"] = level.pop(path[-1])
        with pytest.raises(ValidationError):
            check(broken)


# --- AWS


def test_ray_up_accepts_the_aws_file_with_its_defaults():
    config = prepare_config(copy.deepcopy(AWS))
    validate_config(config)
    assert config["available_node_types"]["head"]["max_workers"] == 0


def test_aws_workers_start_from_zero_on_the_spot_market_and_the_head_takes_no_tasks():
    types = dict(AWS["available_node_types"])
    head = types.pop(AWS["head_node_type"])
    assert head["resources"] == {"CPU": 0}
    assert "InstanceMarketOptions" not in head["node_config"], "a lost head node is a lost cluster"
    for worker in types.values():
        assert worker["min_workers"] == 0 < worker["max_workers"] <= AWS["max_workers"]
        assert worker["node_config"]["InstanceMarketOptions"] == {"MarketType": "spot"}
        assert worker["node_config"]["IamInstanceProfile"] != head["node_config"]["IamInstanceProfile"]


def test_aws_nodes_ask_for_the_token_that_is_mounted_and_lie_in_one_region():
    assert f"-e {AUTH_MODE_ENV_VAR}=token" in AWS["docker"]["run_options"]
    names = {name for option in AWS["docker"]["run_options"] for name in re.findall(r"-e (\w+)=", option)}
    assert names <= ENVIRONMENT, "nothing reads the others"
    assert list(AWS["file_mounts"]) == [f"{HOME}/.ray/auth_token"]
    text = (CLUSTER / "aws.yaml").read_text()
    assert set(re.findall(r"\b[a-z]{2}-[a-z]+-\d\b", text)) == {AWS["provider"]["region"]}


# --- KubeRay


def test_ray_job_runs_on_the_cluster_that_raycluster_describes():
    assert RAY_JOB["spec"]["rayClusterSpec"] == RAY_CLUSTER["spec"]


def test_rays_autoscaler_reads_the_node_types_that_are_meant():
    cluster = {**RAY_CLUSTER, "metadata": {**RAY_CLUSTER["metadata"], "namespace": "default"}}
    types = autoscaling_config._derive_autoscaling_config_from_ray_cr(cluster)["available_node_types"]
    assert types["headgroup"]["resources"]["CPU"] == 0
    assert "GPU" not in types["cpu"]["resources"]
    assert types["gpu"]["resources"]["GPU"] == 1
    assert all(types[name]["min_workers"] == 0 < types[name]["max_workers"] for name in WORKERS)


def test_kuberay_clusters_scale_by_autoscaler_v2_and_ask_for_a_token():
    spec = RAY_CLUSTER["spec"]
    assert (spec["enableInTreeAutoscaling"], spec["autoscalerOptions"]["version"]) == (True, "v2")
    assert spec["authOptions"] == {"mode": "token"}
    assert all(pod["restartPolicy"] == "Never" for pod in RAY_PODS.values())


def test_a_ray_job_leaves_no_cluster_behind_cannot_hang_for_ever_and_survives_a_lost_head_node():
    spec = RAY_JOB["spec"]
    assert spec["shutdownAfterJobFinishes"] is True
    assert spec["ttlSecondsAfterFinished"] <= 3600
    assert 0 < spec["preRunningDeadlineSeconds"] < spec["activeDeadlineSeconds"]
    assert spec["backoffLimit"] >= 1


@pytest.mark.parametrize("name", PODS)
def test_pods_run_without_privileges_and_only_the_head_may_talk_to_kubernetes(name):
    pod = PODS[name]
    user = pod["securityContext"]
    assert (user["runAsNonRoot"], user["runAsUser"], user["runAsGroup"], user["fsGroup"]) == (True, 1000, 100, 100)
    assert user["seccompProfile"] == {"type": "RuntimeDefault"}
    assert pod.get("automountServiceAccountToken", True) is (name == "head")
    for container in pod["containers"]:
        assert container["securityContext"] == {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
        assert container["resources"]["requests"] == container["resources"]["limits"]
        on_gpu = "nvidia.com/gpu" in container["resources"]["limits"]
        assert on_gpu == (name == "gpu") == container["image"].endswith(":gpu")


@pytest.mark.parametrize("name", ["files", *RAY_PODS])
def test_all_nodes_share_the_claim_under_one_path(name):
    (container,), volumes = PODS[name]["containers"], {volume["name"]: volume for volume in PODS[name]["volumes"]}
    mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    assert set(mounts) == set(volumes)
    assert mounts["shared"] == "/shared"
    assert volumes["shared"]["persistentVolumeClaim"] == {"claimName": STORAGE["metadata"]["name"]}
    assert STORAGE["spec"]["accessModes"] == ["ReadWriteMany"]


@pytest.mark.parametrize("pod", RAY_PODS.values(), ids=RAY_PODS)
def test_the_object_store_fits_into_shared_memory_and_that_into_the_memory_limit(pod):
    (volume,) = [volume for volume in pod["volumes"] if volume["name"] == "shm"]
    assert volume["emptyDir"]["medium"] == "Memory"
    limit = pod["containers"][0]["resources"]["limits"]["memory"]
    size, limit = (int(text.removesuffix("Gi")) for text in (volume["emptyDir"]["sizeLimit"], limit))
    assert DEFAULT_OBJECT_STORE_MEMORY_PROPORTION * limit <= size <= limit / 2


def test_head_ports_are_those_that_ray_start_listens_on():
    defaults = {option: parameter.default for parameter in start.params for option in parameter.opts}
    ports = {port["name"]: port["containerPort"] for port in PODS["head"]["containers"][0]["ports"]}
    assert ports == {"gcs-server": 6379, "dashboard": defaults["--dashboard-port"]}
    assert not {"port", "dashboard-port"} & set(HEAD["rayStartParams"])


# --- all of them


FILES = sorted(path for path in CLUSTER.rglob("*") if path.is_file())


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_no_file_holds_a_credential(path):
    text = path.read_text()
    assert not re.search(r"AKIA[0-9A-Z]{16}|aws_secret_access_key|aws_access_key_id|PRIVATE KEY", text, re.IGNORECASE)
    assert not re.search(r"\b[0-9a-f]{64}\b", text), "what a token of Ray looks like"
    assert not re.search(r"(RAY_AUTH_TOKEN|auth_token)['\"]?[=:] ?['\"]?[A-Za-z0-9]", text)
