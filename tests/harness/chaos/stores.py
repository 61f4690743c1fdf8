"""An S3 server, and a faulty proxy before it, each in a process of its own."""

from __future__ import annotations

import os
import signal
import time
from collections import Counter
from collections.abc import Sequence
from multiprocessing.connection import Connection, Pipe

from tests.harness.chaos.forks import fork, result_of
from tests.support.s3_proxy import Fault, FaultProxy

BUCKET = "s3://chaos"


class Server:
    """moto with one bucket, until `close`. Keeps everything in memory."""

    def __init__(self) -> None:
        self.pipe, theirs = Pipe()
        self.pid = fork(lambda: _serve(theirs))
        theirs.close()
        self.url: str = self.pipe.recv()
        result_of(lambda: _make_bucket(self.url))

    def close(self) -> None:
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)


class Proxy:
    """Before a server; `set` replaces its faults, `close` tells how many requests met which."""

    def __init__(self, upstream: str, rules: Sequence[Fault], seed: int) -> None:
        self.pipe, theirs = Pipe()
        self.pid = fork(lambda: _stand_before(upstream, seed, theirs))
        theirs.close()
        self.url: str = self.pipe.recv()
        self.set(rules)

    def set(self, rules: Sequence[Fault]) -> None:
        self.pipe.send(list(rules))
        self.pipe.recv()

    def close(self) -> Counter[str]:
        self.pipe.send(None)
        fired: Counter[str] = self.pipe.recv()
        os.waitpid(self.pid, 0)
        self.pipe.close()
        return fired


def _serve(pipe: Connection) -> None:
    import logging

    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    pipe.send(f"http://{host}:{port}")
    while os.getppid() != 1:  # and not for ever, should the parent be killed
        time.sleep(1)


def _make_bucket(url: str) -> None:
    import boto3  # type: ignore[import-untyped, unused-ignore]

    client = boto3.client("s3", endpoint_url=url, aws_access_key_id="testing", aws_secret_access_key="testing")
    client.create_bucket(Bucket=BUCKET.removeprefix("s3://"))


def _stand_before(upstream: str, seed: int, pipe: Connection) -> None:
    fired: Counter[str] = Counter()
    with FaultProxy(upstream, seed=seed) as proxy:
        pipe.send(proxy.url)
        while (rules := pipe.recv()) is not None:
            fired.update(kind for _, _, kind in list(proxy.log) if kind)
            proxy.set(*rules)
            pipe.send(None)
        fired.update(kind for _, _, kind in list(proxy.log) if kind)
        pipe.send(fired)
