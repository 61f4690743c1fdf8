"""infra/kuberay and infra/cluster: valid by the schemas of those who read them, and fit for what the program does.

* Pod templates, the budget and the service account: Kubernetes' own published schemas (`kubernetes-validate` has them).
* The RayJob around them: `rayjob.schema.json`, written from the documented fields of ray.io/v1 and read against the
  operator's types (its ray-operator/apis/ray/v1, of which the CRD is made). Where KUBERAY_CRD names the operator's
  released CRD (`ray.io_rayjobs.yaml`), that one is asked too.
* The file of `ray up`: the schema in Ray itself.
"""

from __future__ import annotations

import copy
import json
import os
import re
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from img2parquet.cli.console import build_parser
from img2parquet.job import load_job

INFRA = Path(__file__).parents[2] / "infra"
KUBERAY, AWS = INFRA / "kuberay", INFRA / "cluster" / "aws.yaml"
SCHEMA = json.loads(Path(__file__).with_name("rayjob.schema.json").read_text())
PODS = ["head", "cpu", "gpu"]


def rayjob() -> dict[str, Any]:
    document: dict[str, Any] = yaml.safe_load((KUBERAY / "rayjob.yaml").read_text())
    return document


def around() -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((KUBERAY / "around.yaml").read_text()))


def template(name: str) -> dict[str, Any]:
    cluster = rayjob()["spec"]["rayClusterSpec"]
    groups = {group["groupName"]: group for group in cluster["workerGroupSpecs"]}
    found: dict[str, Any] = (groups[name] if name in groups else cluster["headGroupSpec"])["template"]
    return found


def kubernetes(document: dict[str, Any]) -> None:
    """Raises a ValidationError; unknown fields are errors."""
    import kubernetes_validate

    kubernetes_validate.validate(document, "1.31", strict=True)


def test_the_rayjob_has_the_fields_it_may_have() -> None:
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    jsonschema.validate(rayjob(), SCHEMA)


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (("spec", "entrypiont"), "x"),
        (("spec", "backoffLimit"), "3"),
        (("spec", "submissionMode"), "Mode"),
        (("spec", "rayClusterSpec", "autoscalerOptions", "upscalingMode"), "Fast"),
        (("spec", "rayClusterSpec", "authOptions", "mode"), "none"),
        (("spec", "rayClusterSpec", "headGroupSpec", "rayStartParams", "num-cpus"), 0),
        (("spec", "rayClusterSpec", "workerGroupSpecs", 0, "maxReplicas"), -1),
    ],
)
def test_the_schema_finds_what_is_wrong(place: tuple[Any, ...], value: object) -> None:
    document = copy.deepcopy(rayjob())
    at: Any = document
    for step in place[:-1]:
        at = at[step]
    at[place[-1]] = value
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(document, SCHEMA)


@pytest.mark.skipif("KUBERAY_CRD" not in os.environ, reason="KUBERAY_CRD: a file ray.io_rayjobs.yaml of a release")
def test_the_operators_own_crd() -> None:
    crd = yaml.safe_load(Path(os.environ["KUBERAY_CRD"]).read_text())
    served = next(version for version in crd["spec"]["versions"] if version["name"] == "v1")
    jsonschema.validate(rayjob(), served["schema"]["openAPIV3Schema"])


@pytest.mark.parametrize("name", PODS)
def test_pods_are_kubernetes_pods(name: str) -> None:
    pod = {"apiVersion": "v1", "kind": "Pod", **template(name)}
    pod["metadata"] = {"name": name, **pod["metadata"]}
    kubernetes(pod)
    pod["spec"]["containers"][0]["resuorces"] = {}
    with pytest.raises(Exception, match="resuorces"):
        kubernetes(pod)


def test_what_is_around_is_kubernetes_too() -> None:
    documents = around()
    assert [document["kind"] for document in documents] == ["ServiceAccount", *["PodDisruptionBudget"] * 2]
    for document in documents:
        kubernetes(document)


@pytest.mark.parametrize("name", PODS)
def test_pods_are_no_root_hold_no_secret_and_leave_in_peace(name: str) -> None:
    spec, grace_s = template(name)["spec"], load_job(KUBERAY / "job.yaml").resources.grace_s
    (container,) = spec["containers"]
    assert spec["securityContext"]["runAsNonRoot"] and not container["securityContext"]["allowPrivilegeEscalation"]
    assert spec["terminationGracePeriodSeconds"] > grace_s + 30
    assert "env" not in container and container["envFrom"] == [
        {"secretRef": {"name": "img2parquet-storage", "optional": True}}
    ]
    assert spec["serviceAccountName"] == around()[0]["metadata"]["name"]
    if name != "head":
        assert "ray stop" in container["lifecycle"]["preStop"]["exec"]["command"][-1]
        assert (
            spec["nodeSelector"]
            and {"key": "spot", "operator": "Exists", "effect": "NoSchedule"} in spec["tolerations"]
        )
    wanted, most = (container["resources"][kind].get("nvidia.com/gpu") for kind in ("requests", "limits"))
    assert wanted == most == ("1" if name == "gpu" else None)


@pytest.mark.parametrize(("budget", "pods"), [(1, ["head"]), (2, ["cpu", "gpu"])])
def test_each_budget_means_its_pods(budget: int, pods: list[str]) -> None:
    selector = around()[budget]["spec"]["selector"]

    def fits(labels: dict[str, str]) -> bool:
        expressions = selector.get("matchExpressions", [])
        return selector["matchLabels"].items() <= labels.items() and all(
            labels[one["key"]] in one["values"] for one in expressions
        )

    assert [name for name in PODS if fits(template(name)["metadata"]["labels"])] == pods


def test_the_rayjob_runs_the_job_beside_it() -> None:
    spec = rayjob()["spec"]
    command, *arguments = spec["entrypoint"].split()
    parsed = build_parser().parse_args(arguments)
    (volume,) = [one for one in template("head")["spec"]["volumes"] if one["name"] == "job"]
    (mount,) = [one for one in template("head")["spec"]["containers"][0]["volumeMounts"] if one["name"] == "job"]
    assert command == "img2parquet" and parsed.job == f"{mount['mountPath']}/job.yaml" and parsed.runner == "ray"
    assert volume["configMap"]["name"] == "img2parquet-job"
    job, environment = load_job(KUBERAY / "job.yaml"), yaml.safe_load(spec["runtimeEnvYAML"])
    assert int(environment["env_vars"]["RAY_JOB_STOP_WAIT_TIME_S"]) > job.resources.grace_s
    assert spec["backoffLimit"] >= 1 and spec["shutdownAfterJobFinishes"]  # a lost driver is resumed by a new cluster


def test_versions_are_the_ones_that_are_tested() -> None:
    pinned = dict(re.findall(r"^([\w.-]+)==(\S+)$", (INFRA / "constraints.txt").read_text(), re.MULTILINE))
    assert rayjob()["spec"]["rayClusterSpec"]["rayVersion"] == pinned["ray"]


def test_ray_up_takes_the_file() -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    document = yaml.safe_load(AWS.read_text())
    validate_config(prepare_config(document))
    types = document["available_node_types"]
    assert document["head_node_type"] in types and types["gpu"]["resources"]["GPU"] == 1
    assert "InstanceMarketOptions" not in types["head"]["node_config"]
    assert all(types[name]["node_config"]["InstanceMarketOptions"] == {"MarketType": "spot"} for name in ("cpu", "gpu"))
    with pytest.raises(jsonschema.ValidationError):
        validate_config(prepare_config({**document, "docker": {**document["docker"], "imgae": "x"}}))
