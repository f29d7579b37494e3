"""The cluster configurations are what Ray's launcher and KubeRay take, and their commands are ones that exist."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

CONFIGS = Path(__file__).parent.parent / "configs/cluster"
pytestmark = pytest.mark.filterwarnings("ignore")

STRING, COUNT = {"type": "string", "minLength": 1}, {"type": "integer", "minimum": 0}
QUANTITIES = {"type": "object", "additionalProperties": {"type": "string", "pattern": r"^\d+(\.\d+)?(m|[KMGT]i)?$"}}


def shape(required: str, **properties: Any) -> dict[str, Any]:
    """An object of these fields and no others."""
    return {"type": "object", "required": required.split(), "properties": properties, "additionalProperties": False}


def array(items: dict[str, Any]) -> dict[str, Any]:
    return {"type": "array", "minItems": 1, "items": items}


# The fields of KubeRay's RayJob (ray.io/v1) that this job may use, and Kubernetes' own for the pods.
START = {"type": "object", "additionalProperties": {"type": "string"}}
CONTAINER = shape(
    "name image resources",
    name=STRING,
    image=STRING,
    ports=array(shape("containerPort name", containerPort=COUNT, name={"type": "string", "maxLength": 15})),
    env=array(shape("name", name=STRING, value=STRING)),
    envFrom=array(shape("secretRef", secretRef=shape("name", name=STRING))),
    resources=shape("limits requests", limits=QUANTITIES, requests=QUANTITIES),
)
POD = shape("spec", metadata={"type": "object"}, spec=shape("containers", containers=array(CONTAINER)))
WORKERS = shape(
    "groupName rayStartParams template replicas minReplicas maxReplicas",
    groupName=STRING,
    replicas=COUNT,
    minReplicas=COUNT,
    maxReplicas=COUNT,
    rayStartParams=START,
    template=POD,
)
CLUSTER = shape(
    "headGroupSpec workerGroupSpecs",
    rayVersion=STRING,
    enableInTreeAutoscaling={"type": "boolean"},
    headGroupSpec=shape("rayStartParams template", rayStartParams=START, template=POD),
    workerGroupSpecs=array(WORKERS),
)
RAYJOB = shape(
    "apiVersion kind metadata spec",
    apiVersion={"const": "ray.io/v1"},
    kind={"const": "RayJob"},
    metadata=shape("name", name={"type": "string", "pattern": "^[a-z]([-a-z0-9]*[a-z0-9])?$", "maxLength": 47}),
    spec=shape(
        "entrypoint rayClusterSpec",
        entrypoint=STRING,
        runtimeEnvYAML=STRING,
        shutdownAfterJobFinishes={"type": "boolean"},
        ttlSecondsAfterFinished=COUNT,
        backoffLimit=COUNT,
        activeDeadlineSeconds=COUNT,
        submissionMode={"enum": ["K8sJobMode", "HTTPMode", "SidecarMode", "InteractiveMode"]},
        rayClusterSpec=CLUSTER,
    ),
)


def load(name: str) -> Any:
    return yaml.safe_load((CONFIGS / name).read_text())


def test_the_job_for_kuberay() -> None:
    job = load("rayjob.yaml")
    jsonschema.validate(job, RAYJOB)
    for broken in ("entrypoint", "rayClusterSpec"):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate({**job, "spec": {k: v for k, v in job["spec"].items() if k != broken}}, RAYJOB)
    import ray

    cluster = job["spec"]["rayClusterSpec"]
    assert cluster["rayVersion"] == ray.__version__
    (workers,) = cluster["workerGroupSpecs"]
    assert workers["minReplicas"] <= workers["replicas"] <= workers["maxReplicas"]


def test_the_cluster_of_the_launcher() -> None:
    import ray
    from ray.autoscaler._private.util import prepare_config, validate_config

    cluster = load("cluster.yaml")
    schema = json.loads((Path(ray.__file__).parent / "autoscaler/ray-schema.json").read_text())
    jsonschema.validate(cluster, schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({**cluster, "max_worker": 3}, schema)
    validate_config(prepare_config(cluster))
    assert set(cluster["available_node_types"]) == {cluster["head_node_type"], "worker"}


@pytest.mark.parametrize("name", ["rayjob.yaml", "cluster.yaml"])
def test_their_commands_exist(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Up to the run, which is not there: the verb and its options are understood."""
    from lightning_acc.cli import main

    commands = re.findall(r"lightning-acc (score .*)", (CONFIGS / name).read_text())
    assert commands
    for command in commands:
        words = [str(tmp_path / "missing") if word.startswith("s3://") else word for word in shlex.split(command)]
        with pytest.raises(SystemExit) as ended:
            main(words)
        assert ended.value.code == 1
        assert "no run directory" in capsys.readouterr().err
