"""Who asks S3, by what a job's options say: a role, a profile, nobody, whoever pays; each side its own.

The server is ours and remembers who signed: moto would accept anyone."""

from __future__ import annotations

import logging
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs

import pytest

from img2parquet.errors import AccessDenied, InputError
from img2parquet.storage import Store
from img2parquet.storage.s3_client import S3Options

ROLE = "arn:aws:iam::123456789012:role/reader"
CREDENTIALS = """<AssumeRoleResponse xmlns="https://sts.amazonaws.com/doc/2011-06-15/"><AssumeRoleResult>
<Credentials><AccessKeyId>AKROLE{n}</AccessKeyId><SecretAccessKey>PLANTED</SecretAccessKey>
<SessionToken>token-{n}</SessionToken><Expiration>2099-01-01T00:00:00Z</Expiration></Credentials>
<AssumedRoleUser><AssumedRoleId>A:img2parquet</AssumedRoleId><Arn>arn:aws:sts::123456789012:assumed-role/r/s</Arn>
</AssumedRoleUser></AssumeRoleResult></AssumeRoleResponse>"""
DENIED = (
    "<ErrorResponse><Error><Type>Sender</Type><Code>AccessDenied</Code><Message>no</Message></Error></ErrorResponse>"
)


@dataclass
class Seen:
    url: str = ""
    gets: list[dict[str, str]] = field(default_factory=list)
    roles: list[dict[str, list[str]]] = field(default_factory=list)
    denies: bool = False

    @property
    def signers(self) -> list[str]:
        """The access keys that signed GETs; `` for an unsigned one."""
        found = (re.search(r"Credential=([^/]+)/", head.get("authorization", "")) for head in self.gets)
        return [match[1] if match else "" for match in found]


@contextmanager
def _store_and_sts() -> Iterator[Seen]:
    seen = Seen()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            form = parse_qs(self.rfile.read(int(self.headers["Content-Length"])).decode())
            signer = re.search(r"Credential=([^/]+)/", self.headers["Authorization"])
            seen.roles.append({**form, "signer": [signer[1] if signer else ""]})
            body = DENIED if seen.denies else CREDENTIALS.format(n=len(seen.roles))
            self._say(403 if seen.denies else 200, body.encode(), "text/xml")

        def do_GET(self) -> None:
            seen.gets.append({name.lower(): value for name, value in self.headers.items()})
            self._say(200, b"bytes", "binary/octet-stream")

        def _say(self, status: int, body: bytes, kind: str) -> None:
            self.send_response(status)
            for name, value in {"Content-Type": kind, "Content-Length": str(len(body)), "ETag": '"1"'}.items():
                self.send_header(name, value)
            if status == 200 and self.headers.get("Range"):
                self.send_header("Content-Range", f"bytes 0-{len(body) - 1}/{len(body)}")
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    seen.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    try:
        yield seen
    finally:
        server.shutdown()
        server.server_close()


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Seen]:
    config = tmp_path / "config"
    config.write_text(
        "[profile other]\naws_access_key_id = AKOTHER\naws_secret_access_key = x\n"
        f"[profile assumes]\nrole_arn = {ROLE}\nsource_profile = other\n"
    )
    with _store_and_sts() as server:
        monkeypatch.setenv("AWS_ENDPOINT_URL", server.url)
        monkeypatch.setenv("AWS_CONFIG_FILE", str(config))
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKENV")
        yield server


def test_the_environment_signs_where_nothing_is_said(seen: Seen) -> None:
    assert Store().read("s3://bucket/key") == b"bytes"
    assert seen.signers == ["AKENV"] and not seen.roles
    assert "x-amz-request-payer" not in seen.gets[0]


def test_a_public_bucket_is_asked_without_a_signature(seen: Seen) -> None:
    assert Store({"anon": True}).read("s3://bucket/key") == b"bytes"
    assert seen.signers == [""]


def test_a_requester_pays(seen: Seen) -> None:
    assert Store({"requester_pays": True}).read("s3://bucket/key") == b"bytes"
    assert seen.gets[0]["x-amz-request-payer"] == "requester"


def test_a_profile_signs(seen: Seen) -> None:
    assert Store({"profile": "other"}).read("s3://bucket/key") == b"bytes"
    assert seen.signers == ["AKOTHER"]


def test_a_profile_that_assumes_a_role(seen: Seen) -> None:
    assert Store({"profile": "assumes"}).read("s3://bucket/key") == b"bytes"
    assert seen.signers == ["AKROLE1"] and seen.roles[0]["signer"] == ["AKOTHER"]


@pytest.mark.parametrize("profile, signer", [("", "AKENV"), ("other", "AKOTHER")])
def test_a_role_is_assumed_once_and_used(
    seen: Seen, profile: str, signer: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    store = Store({"role_arn": ROLE, "external_id": "customer-7", **({"profile": profile} if profile else {})})
    assert {store.read("s3://bucket/key") for _ in range(3)} == {b"bytes"}
    assert seen.signers == ["AKROLE1"] * 3
    assert seen.gets[0]["x-amz-security-token"] == "token-1"
    (asked,) = seen.roles
    assert (asked["signer"], asked["RoleArn"], asked["ExternalId"]) == ([signer], [ROLE], ["customer-7"])
    assert "PLANTED" not in caplog.text and "token-1" not in caplog.text


def test_each_side_has_its_own(seen: Seen) -> None:
    """As `input.storage_options` and `output.storage_options` are two stores."""
    Store({"role_arn": ROLE}).read("s3://bucket/key")
    Store({"profile": "other"}).read("s3://bucket/key")
    Store().read("s3://bucket/key")
    assert seen.signers == ["AKROLE1", "AKOTHER", "AKENV"]


def test_a_role_that_is_refused_is_told(seen: Seen) -> None:
    seen.denies = True
    with pytest.raises(AccessDenied, match="s3://bucket/key: access denied"):
        Store({"role_arn": ROLE}).read("s3://bucket/key")
    assert len(seen.roles) == 1 and not seen.gets


@pytest.mark.parametrize(
    "options, told",
    [
        ({"role_arn": "reader"}, "expected arn:aws:iam::"),
        ({"external_id": "x"}, "needs `role_arn`"),
        ({"role_arn": ROLE, "anon": True}, "`anon`"),
        ({"profile": "other", "anon": True}, "`anon`"),
    ],
)
def test_options_that_contradict_are_refused(options: dict[str, object], told: str) -> None:
    with pytest.raises(InputError, match=told):
        Store(options)


def test_an_unknown_profile_is_told(seen: Seen) -> None:
    with pytest.raises(AccessDenied, match=r"(?s)ProfileNotFound.*no such profile"):
        Store({"profile": "nobody"}).read("s3://bucket/key")


def test_a_new_role_in_the_environment_is_a_new_client(seen: Seen, monkeypatch: pytest.MonkeyPatch) -> None:
    from img2parquet.storage.s3_client import _client_key

    before = _client_key(S3Options())
    monkeypatch.setenv("AWS_ROLE_ARN", ROLE)
    assert _client_key(S3Options()) != before
