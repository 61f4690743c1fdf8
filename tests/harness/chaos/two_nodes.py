"""`img2parquet run` on a Ray cluster of two nodes on this machine: `python -m tests.harness.chaos.two_nodes JOB ...`.

CHAOS_NODE names what befalls the second one once the job has committed a part:

    drain      it is announced that it goes in a few seconds (as a cloud's notice of preemption is), and then it goes
    terminate  its raylet gets SIGTERM, as a preempted machine's does
    add        nothing; a third one joins, and is used
    replace    it is lost, and a third one joins
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from unittest import mock

import ray
from ray.cluster_utils import Cluster

from img2parquet.cli import main
from img2parquet.engine import scheduler
from img2parquet.runners import ray_data as graphs
from tests.harness.chaos.processes import descendants

NOTICE_S = 5
OURS = "MapWorker"  # in the title of an actor of Ray Data's


def befall(what: str, cluster: Cluster, node: object, out: Path) -> None:
    while not list(out.glob("model=*/part-*.parquet")):
        time.sleep(0.02)
    if what == "drain":
        _ray("drain-node", f"--address={cluster.address}", f"--node-id={node.node_id}",  # type: ignore[attr-defined]
             "--reason=DRAIN_NODE_REASON_PREEMPTION", "--reason-message=chaos",
             f"--deadline-remaining-seconds={NOTICE_S}")  # fmt: skip
        time.sleep(NOTICE_S)
        cluster.remove_node(node, allow_graceful=False)
    if what == "terminate":
        os.kill(_raylet(node), signal.SIGTERM)
    if what == "replace":
        cluster.remove_node(node, allow_graceful=False)
    if what in ("add", "replace"):
        with mock.patch("ray._private.utils.set_sigterm_handler"):  # only the main thread may set one
            added = cluster.add_node(num_cpus=2)
        _watch_use(_raylet(added))
    print(f"chaos: {what} done", flush=True)


def _watch_use(raylet: int) -> None:
    """Say so when an actor of ours runs there."""
    while not any(OURS in title for _, title in descendants(raylet)):
        time.sleep(0.1)
    print("chaos: the new node is used", flush=True)


def _raylet(node: object) -> int:
    pid: int = node.all_processes["raylet"][0].process.pid  # type: ignore[attr-defined]
    return pid


def _ray(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "ray.scripts.scripts", *arguments], check=True, stdout=subprocess.DEVNULL)


if __name__ == "__main__":
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    second = cluster.add_node(num_cpus=2)
    if what := os.environ.get("CHAOS_NODE"):
        graphs.GROWN_FOR_S, scheduler.CHECK_S = 1.0, 0.5
        arguments = (what, cluster, second, Path(os.environ["CHAOS_OUT"]))
        threading.Thread(target=befall, args=arguments, daemon=True).start()
    code = main(["run", *sys.argv[1:], "--address", cluster.address])
    ray.shutdown()  # before the cluster's own end, which would take the driver's raylet from it: exit code 1
    sys.exit(code)
