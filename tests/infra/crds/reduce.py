"""Reduce KubeRay's CRD of RayJobs to the schema of its own fields, as the test data beside this file.

    git -C KUBERAY show v1.7.0:ray-operator/config/crd/bases/ray.io_rayjobs.yaml | python reduce.py > rayjob-1.7.0.json

Pod templates, which are Kubernetes' own matter and most of the file, become any object; descriptions and the status are
left out. An API server that is asked strictly, as kubectl asks it, refuses unknown fields, so none are allowed here.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import yaml

KEPT = ("type", "enum", "format", "minimum", "maximum", "default", "required", "pattern", "x-kubernetes-int-or-string")
OBJECTS = ("template", "submitterPodTemplate")


def reduced(schema: dict[str, Any], name: str = "") -> dict[str, Any]:
    made = {key: schema[key] for key in KEPT if key in schema}
    if name in OBJECTS or schema.get("x-kubernetes-preserve-unknown-fields"):
        return {"type": "object"}
    if made.pop("x-kubernetes-int-or-string", False):
        return {"type": ["integer", "string"]}
    if "properties" in schema:
        made["properties"] = {key: reduced(one, key) for key, one in schema["properties"].items() if key != "status"}
        made["additionalProperties"] = False
    elif isinstance(schema.get("additionalProperties"), dict):
        made["additionalProperties"] = reduced(schema["additionalProperties"])
    if "items" in schema:
        made["items"] = reduced(schema["items"])
    return made


if __name__ == "__main__":
    crd = yaml.safe_load(sys.stdin)
    served = next(version for version in crd["spec"]["versions"] if version["name"] == "v1")
    schema = reduced(served["schema"]["openAPIV3Schema"])
    schema["properties"]["metadata"] = {"type": "object"}
    json.dump(schema, sys.stdout, separators=(",", ":"), sort_keys=True)
    print()
