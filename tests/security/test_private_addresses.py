"""Nobody but the user sends us to an address that is not public: no redirect, no list, no name that resolves there."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from img2parquet.errors import AccessDenied, InputError, PrivateAddress
from img2parquet.read.table import Table
from img2parquet.schema import Reject, Row
from img2parquet.storage import Store
from img2parquet.storage.http_client import Reach, is_public
from img2parquet.storage.uri_secrets import given
from tests.read.test_table import read
from tests.security.servers import Answer, Web, redirect, web
from tests.support.small_job import jpeg

PRIVATE = [
    "127.0.0.1", "127.9.9.9", "0.0.0.0", "10.0.0.1", "172.16.0.1", "172.31.255.255", "192.168.1.1", "169.254.169.254",
    "100.64.0.1", "100.100.100.200", "168.63.129.16", "224.0.0.1", "255.255.255.255", "192.0.2.1", "240.0.0.1",
    "::", "::1", "fe80::1", "fe80::1%eth0", "fc00::1", "fd00:ec2::254", "ff02::1", "::ffff:127.0.0.1",
    "::ffff:169.254.169.254", "::ffff:a00:1", "2002:7f00:1::", "2002:a9fe:a9fe::1", "64:ff9b::7f00:1",
    "64:ff9b::a9fe:a9fe", "2001:db8::1",
]  # fmt: skip
PUBLIC = ["1.1.1.1", "8.8.8.8", "172.32.0.1", "2606:4700::1111", "::ffff:8.8.8.8", "64:ff9b::808:808"]


@pytest.mark.parametrize("address", PRIVATE)
def test_what_is_not_public(address: str) -> None:
    assert not is_public(address)


@pytest.mark.parametrize("address", PUBLIC)
def test_what_is(address: str) -> None:
    assert is_public(address)


@pytest.fixture
def inside() -> Iterator[Web]:
    """A server that only the user may send us to."""
    with web(lambda path: Answer(body=b"the secret of the inside")) as site:
        yield site


@pytest.fixture
def resolved(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[str]]:
    """Names to the addresses that they resolve to, one after the other, the last for ever."""
    names: dict[str, list[str]] = {}

    async def resolve(self: Any, host: str, port: int = 0, family: int = socket.AF_INET) -> list[dict[str, Any]]:
        found = names[host].pop(0) if len(names[host]) > 1 else names[host][0]
        return [{"hostname": host, "host": found, "port": port, "family": socket.AF_INET, "proto": 0, "flags": 0}]

    monkeypatch.setattr(aiohttp.DefaultResolver, "resolve", resolve)
    return names


def test_what_the_user_names_himself_may_be_private(inside: Web) -> None:
    assert Store().read(inside.url + "/a") == b"the secret of the inside"
    assert Store(given=given([inside.url + "/a"])).read(inside.url + "/a") == b"the secret of the inside"


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "[::ffff:127.0.0.1]", "127.1", "2130706433", "0x7f000001"])
def test_a_redirect_to_another_origin_is_refused_before_anything_is_asked(host: str, inside: Web) -> None:
    with web(lambda path: redirect(f"http://{host}:{inside.port}/a")) as outside:
        for store in (Store(), Store(given=given([outside.url + "/x"]))):
            with pytest.raises((PrivateAddress, InputError)):
                store.read(outside.url + "/x")
            with pytest.raises((PrivateAddress, InputError)):
                store.stat(outside.url + "/x")
    assert inside.asked == []


def test_a_redirect_within_the_users_own_server_is_followed() -> None:
    with web(lambda path: redirect("/b") if path == "/a" else Answer(body=b"b")) as site:
        assert Store(given=given([site.url + "/a"])).read(site.url + "/a") == b"b"


def test_an_origin_that_the_user_named_is_no_way_in_for_another(inside: Web) -> None:
    """Also not over the connection that his own request has left open."""
    with web(lambda path: redirect(inside.url + "/delete-everything")) as outside:
        store = Store(given=given([inside.url + "/a", outside.url + "/x"]))
        store.read(inside.url + "/a")
        with pytest.raises(PrivateAddress):
            store.read(outside.url + "/x")
    assert "/delete-everything" not in inside.asked


def test_a_metadata_service_is_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[Any] = []
    connect = socket.socket.connect
    monkeypatch.setattr(socket.socket, "connect", lambda self, to: tried.append(to) or connect(self, to))
    with (
        web(lambda path: redirect("http://169.254.169.254/latest/meta-data/iam")) as outside,
        pytest.raises(PrivateAddress, match=r"169\.254\.169\.254 is not a public"),
    ):
        Store().read(outside.url + "/x")
    assert {to[0] for to in tried if isinstance(to, tuple)} == {"127.0.0.1"}


def test_a_name_that_resolves_inside_is_refused(
    inside: Web, resolved: dict[str, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before a connection is tried."""
    tried: list[Any] = []
    monkeypatch.setattr(socket.socket, "connect", lambda self, to: tried.append(to))
    resolved["rebound.example"] = ["127.0.0.1"]
    store = Store(given=given([]))
    with pytest.raises(PrivateAddress):
        store.read(f"http://rebound.example:{inside.port}/a")
    assert inside.asked == tried == []


def test_a_name_that_resolves_elsewhere_the_second_time(
    inside: Web, resolved: dict[str, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rebinding between the look and the connection: what counts is where the connection ends."""
    from img2parquet.storage import http_client as client

    monkeypatch.setattr(client._Resolver, "resolve", lambda self, *a, **k: self.system.resolve(*a, **k))
    resolved["rebound.example"] = ["127.0.0.1"]
    with pytest.raises(PrivateAddress):
        Store(given=given([])).read(f"http://rebound.example:{inside.port}/a")
    assert inside.asked == []


def test_an_option_allows_it(inside: Web) -> None:
    allowed = {"http": {"allow_private_addresses": True}}
    with web(lambda path: redirect(inside.url + "/a")) as outside:
        assert Store(allowed, given([])).read(outside.url + "/x") == b"the secret of the inside"
    with pytest.raises(InputError, match="must be true or false"):
        Store({"https": {"allow_private_addresses": "yes"}})


def test_a_list_is_data_of_others(inside: Web, tmp_path: Path) -> None:
    """Rows that name private servers are rejects that say what to do; those of the list's own server are read."""
    inside.answer = lambda path: Answer(body=jpeg(1))
    (tmp_path / "list.csv").write_text(f"uri\n{inside.url}/a.jpg\n")
    [reject] = read(Table(uris=(str(tmp_path / "list.csv"),)))
    assert isinstance(reject, Reject) and reject.reason == "unsupported"
    assert "allow_private_addresses: true" in reject.message
    assert inside.asked == []
    [row] = read(Table(uris=(f"{tmp_path}/list.csv",), storage_options={"http": {"allow_private_addresses": True}}))
    assert isinstance(row, Row)

    served = f"uri\n/b.jpg\nb.jpg\nftp://10.0.0.1/b.jpg\nfile:///etc/hostname\n{inside.url}/b.jpg\n".encode()
    inside.answer = lambda path: Answer(body=served if "list" in path else jpeg(1))
    items = read(Table(uris=(f"{inside.url}/list.csv",)))
    assert [getattr(item, "message", "row") for item in items] == [
        "a list from the web may not name a file of this machine",
        "row",
        "a list may not ask for the driver `ftp://`; where it is wanted, set storage_options: {ftp: {}}",
        "a list from the web may not name a file of this machine",
        "row",
    ]


def test_the_reach_of_a_request() -> None:
    reach = Reach(frozenset({"http://a:80"}))
    assert reach.covers("http://a/x", "http://A:80/y")
    assert not reach.covers("http://b/x", "http://a/y")
    assert not reach.covers("http://b/x", "http://b/y")
    assert not reach.covers("http://a/x", "https://a/y")
    assert Reach(None).covers("http://b/x", "http://b/y")
    assert not Reach(None).covers("http://b/x", "http://b:8080/y")
    assert Reach(everywhere=True).covers("http://b/x", "http://c/y")


def test_a_refusal_is_not_tried_again(inside: Web) -> None:
    with web(lambda path: redirect(inside.url)) as outside, pytest.raises(AccessDenied):
        Store().read(outside.url + "/x")
    assert len(outside.asked) == 1
    assert inside.asked == []
