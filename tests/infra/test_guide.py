"""The guide to clusters: its commands parse, the files it names exist, and the jobs it names load."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
import yaml

from img2parquet.cli.console import build_parser
from img2parquet.job import load_job

ROOT = Path(__file__).parents[2]
GUIDE = (ROOT / "infra" / "docs" / "clusters.md").read_text()
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", GUIDE, re.DOTALL)
COMMANDS = [line for kind, text in BLOCKS if kind == "sh" for line in text.splitlines() if line.strip()]
OURS = [line for line in COMMANDS if line.startswith("img2parquet ")]
PROGRAMS = {"img2parquet", "kubectl", "helm", "docker", "ray", "sbatch"}


@pytest.mark.parametrize("line", OURS)
def test_our_commands_parse(line: str) -> None:
    arguments = build_parser().parse_args(shlex.split(line)[1:])
    if hasattr(arguments, "job"):
        load_job(ROOT / arguments.job, arguments.set)


@pytest.mark.parametrize("line", COMMANDS)
def test_files_that_commands_name_are_there(line: str) -> None:
    words = shlex.split(line)
    assert words[0] in PROGRAMS
    named = [word.rpartition("=")[2] for word in words if re.search(r"(^|=)infra/", word)]
    assert all((ROOT / path).is_file() for path in named)


def test_the_steps_are_all_there() -> None:
    steps = re.findall(r"^## (\d)\. ", GUIDE, re.MULTILINE)
    assert steps == list("123456") and len(OURS) >= 9
    for path in re.findall(r"`((?:infra|tests)/[\w/.]+\.\w+)`", GUIDE):
        assert (ROOT / path).is_file(), path


def test_names_agree_with_the_manifests() -> None:
    rayjob = yaml.safe_load((ROOT / "infra/kuberay/rayjob.yaml").read_text())
    images = set(re.findall(r"image: (\S+)", (ROOT / "infra/kuberay/rayjob.yaml").read_text()))
    built = {shlex.split(line)[shlex.split(line).index("-t") + 1] for line in COMMANDS if "docker build" in line}
    assert images == built and f"kubectl get rayjob {rayjob['metadata']['name']}" in COMMANDS
    secret = rayjob["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]["containers"][0]["envFrom"][0]
    assert any(f"secret generic {secret['secretRef']['name']} " in line for line in COMMANDS)
    (policy,) = [json.loads(text) for kind, text in BLOCKS if kind == "json"]
    output = load_job(ROOT / "infra/kuberay/job.yaml").output.uri.removeprefix("s3://")
    assert policy["Statement"][2]["Resource"] == f"arn:aws:s3:::{output}/*"
