"""`img2parquet run` on a Ray cluster of two nodes on this machine: `python -m tests.chaos.two_nodes JOB ...`."""

from __future__ import annotations

import sys

from ray.cluster_utils import Cluster

from pipeline.cli import main

if __name__ == "__main__":
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    cluster.add_node(num_cpus=2)
    sys.exit(main(["run", *sys.argv[1:], "--address", cluster.address]))
