"""infra/kuberay and infra/cluster: valid by the schemas of those who read them, and fit for what the program does.

* Pod templates, the budget and the service account: Kubernetes' own published schemas (`kubernetes-validate` has them).
* The RayJob around them: `rayjob.schema.json`, written from the documented fields of ray.io/v1 and read against the
  operator's types (its ray-operator/apis/ray/v1, of which the CRD is made). The fields of the CRDs of KubeRay 1.6.2 and
  1.7.0 are in `crds/`, reduced by the script there, and refuse unknown fields. No API server is asked.
* The file of `ray up`: the schema in Ray itself.
"""

from __future__ import annotations

import copy
import json
import re
import subprocess
import sys
import threading
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
# like the command: a supervisor passes signals on to a fork, to which a second SIGTERM would mean to quit at once
DRIVER = """
import os, signal, sys, time
child = os.fork()
heard = []
def stop(*_):
    heard.append(1)
    if child:
        os.kill(child, signal.SIGTERM)
        sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    time.sleep(1)
    sys.exit(143 if len(heard) == 1 else 1)
signal.signal(signal.SIGTERM, stop)
if child:
    time.sleep(0.2)
    print("up", flush=True)
else:
    os.setpgid(0, 0)
time.sleep(60)
"""


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


@pytest.mark.parametrize("release", ["1.6.2", "1.7.0"])
def test_the_operators_own_crd(release: str) -> None:
    crd = json.loads((Path(__file__).parent / "crds" / f"rayjob-{release}.json").read_text())
    jsonschema.validate(rayjob(), crd)
    wrong = rayjob()
    wrong["spec"]["rayClusterSpec"]["headGroupSpec"]["rayStartParam"] = {}
    with pytest.raises(jsonschema.ValidationError, match="rayStartParam"):
        jsonschema.validate(wrong, crd)


@pytest.mark.parametrize("name", PODS)
def test_the_object_store_lies_in_memory(name: str) -> None:
    """Ray puts a store that is larger than /dev/shm on the disk and only warns; so it would by its own choice."""
    cluster = rayjob()["spec"]["rayClusterSpec"]
    groups = {"head": cluster["headGroupSpec"], **{group["groupName"]: group for group in cluster["workerGroupSpecs"]}}
    spec = template(name)["spec"]
    (shm,) = [one["emptyDir"] for one in spec["volumes"] if one["name"] == "shm"]
    limits, store = spec["containers"][0]["resources"]["limits"], groups[name]["rayStartParams"]["object-store-memory"]
    assert shm["medium"] == "Memory" and 0.85 * gib(shm["sizeLimit"]) < int(store) < gib(shm["sizeLimit"])
    assert gib(shm["sizeLimit"]) <= 0.35 * gib(limits["memory"])  # it counts as the pod's memory
    assert gib(limits["ephemeral-storage"]) >= 20 << 30


def gib(text: str) -> int:
    return int(text.removesuffix("Gi")) << 30


def test_the_head_hands_sigterm_to_the_driver_alone(tmp_path: Path) -> None:
    """It runs the manifest's own command beside a driver that takes a moment to commit."""
    head = template("head")["spec"]
    (container,) = head["containers"]
    _, *arguments = container["lifecycle"]["preStop"]["exec"]["command"]
    assert head["terminationGracePeriodSeconds"] > 45 > load_job(KUBERAY / "job.yaml").resources.grace_s
    driver = tmp_path / "img2parquet"
    driver.write_text(f"#!{sys.executable}\n{DRIVER}")
    driver.chmod(0o755)
    started = [
        subprocess.Popen([driver, command], stdout=subprocess.PIPE, start_new_session=True)
        for command in ("run", "status")
    ]
    for one in started:
        assert one.stdout is not None and one.stdout.readline() == b"up\n"
    reaper = threading.Thread(target=started[0].wait)  # as the job's supervisor
    reaper.start()
    stop = subprocess.run([sys.executable, *arguments], timeout=60)
    reaper.join(30)
    assert stop.returncode == 0 and started[0].returncode == 143 and started[1].poll() is None
    started[1].kill()
    started[1].wait()


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
    assert [document["kind"] for document in documents] == ["ServiceAccount", "PodDisruptionBudget"]
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


def test_the_budget_means_the_head_and_can_be_met() -> None:
    """A RayCluster cannot be scaled, so Kubernetes can only count pods for it: `maxUnavailable` blocks every drain."""
    spec = around()[1]["spec"]
    selector = spec["selector"]["matchLabels"]
    assert [name for name in PODS if selector.items() <= template(name)["metadata"]["labels"].items()] == ["head"]
    assert spec.keys() == {"minAvailable", "selector"} and spec["minAvailable"] == 1


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
