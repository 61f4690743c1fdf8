"""A Ray cluster of several raylets on this machine, in a process of its own: commands in, one line out for each.

python -m tests.harness.multinode.serve     -> {"address": ..., "jobs": "http://127.0.0.1:<port>"}
{"add": {"num_cpus": 2}}            -> {"node": id}
{"remove": id}                      -> {}; the node is lost at once, as a machine that dies
the end of stdin                    everything is stopped
"""

from __future__ import annotations

import atexit
import functools
import json
import shutil
import socket
import sys
import tempfile
from collections.abc import Callable
from typing import Any

from ray.cluster_utils import Cluster

TRIES = 4


def serve() -> None:
    cluster = _patiently(_start)
    nodes: dict[str, Any] = {}
    try:
        _say({"address": cluster.address, "jobs": f"http://{cluster.webui_url}"})
        for line in sys.stdin:
            command = json.loads(line)
            if "add" in command:
                node = _patiently(functools.partial(cluster.add_node, **command["add"], **_own_agent()))
                nodes[node.node_id] = node
                _say({"node": node.node_id})
            else:
                cluster.remove_node(nodes.pop(command["remove"]), allow_graceful=False)
                _say({})
    finally:
        cluster.shutdown()


def _start() -> Cluster:
    """A head without CPUs of its own, as infra/kuberay's: it holds the driver."""
    head = {"num_cpus": 0, "include_dashboard": True, "dashboard_host": "127.0.0.1", "dashboard_port": _free_port()}
    # a job finds its cluster by a file in this folder: in the usual one by that of whichever cluster came last
    folder = tempfile.mkdtemp(prefix="fleet-")  # short: sockets lie below it
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Cluster(initialize_head=True, head_node_args={**head, **_own_agent(), "temp_dir": folder})


def _own_agent() -> dict[str, int]:
    """A port of its own for a node's agent, who begins jobs: Ray's is fixed, and whoever comes second has none."""
    return {"dashboard_agent_listen_port": _free_port()}


def _patiently(do: Callable[[], Any]) -> Any:
    """Again where Ray gives up on a raylet after its 30 s, as on a machine that has much else to do."""
    for _ in range(TRIES - 1):
        try:
            return do()
        except Exception as error:
            print(error, file=sys.stderr)
    return do()


def _say(values: dict[str, Any]) -> None:
    print(f"serve: {json.dumps(values)}", flush=True)


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
        return port


if __name__ == "__main__":
    serve()
