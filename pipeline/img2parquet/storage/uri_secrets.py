"""Separate logins and signatures from URIs: they are used in requests, and never written anywhere.

* `name_of` is a file's name in plans, part ids, rows and messages: its URI without logins and signatures. Two
  signatures of one object have one name, so a job resumes with URLs that were signed again.
* Secret parameters are known by name: those of S3, GCS, Azure, CloudFront and similar services, and any that is called
  token, signature, password or the like. A secret in the path cannot be recognized.
* `key=` may be an API key or the name of an object, so the name has a digest of it.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from urllib.parse import unquote, urlsplit

from img2parquet.errors import InputError
from img2parquet.storage.backend import CONTAINER_BEFORE_AT, LITERAL_QUERY, redact, scheme_of

WEB = ("http", "https")
URL = re.compile(r"[A-Za-z][A-Za-z0-9+.\-]*://[^\s'\"<>`)\]}]+")
PARAMETER = re.compile(r"[?&]([\w.%~-]+)=[^\s&'\"<>`)\]}]*")
DEFAULT_PORTS = {"http": 80, "https": 443}
SECRET_NAME = re.compile(
    r"""x-(amz|goog|oss|cos|tos|obs|ms|bz)-.*      # what S3, GCS and their relatives sign with
    | (aws|goog|google|oss|obs)?access(key)?_?id   # AWSAccessKeyId, GoogleAccessId
    | q-(sign-algorithm|ak|sign-time|key-time|header-list|url-param-list|signature)
    | (.*[-_.])?(sig|sign|signature|hmac|jwt|sas|auth|authorization|secret|passwd|password|pwd|credentials?|token)
    | .*(signature|token|password|secret|api-?_?key|access-?_?key) | hdnts | hdnea | __token__ | __gda__
    | session(id)? | phpsessid | .*[-_]sessionid""",
    re.IGNORECASE | re.VERBOSE,
)
BESIDE_A_SECRET = {  # times, rights and ids that a signature covers; alone they are words like any other
    "exp", "expires", "expiry", "hash-algorithm", "key-pair-id", "policy", "saoid", "scid", "sdd", "se", "ses", "sip",
    "ske", "skoid", "sks", "skt", "sktid", "skv", "sp", "spr", "sr", "srt", "ss", "st", "suoid", "sv",
}  # fmt: skip


@dataclass(frozen=True)
class UriSecrets:
    """Logins and signatures of the URIs that the user wrote. origins: the web servers among them."""

    urls: dict[str, str] = field(default_factory=dict, repr=False)  # by name, where name and URL differ
    logins: dict[str, str] = field(default_factory=dict, repr=False)  # `sftp://host` -> `sftp://user:password@host`
    origins: frozenset[str] = frozenset()

    def address_of(self, name: str) -> str:
        """Return the URL to request for a name; an unknown name stays as it is."""
        url = self.urls.get(name)
        if url or not self.logins:
            return url or name
        scheme, _, rest = name.partition("://")
        authority, slash, path = rest.partition("/")
        return self.logins.get(f"{scheme}://{authority}", f"{scheme}://{authority}") + slash + path


def given(uris: Iterable[str]) -> UriSecrets:
    """Collect the secrets of a job's URIs. Raises InputError when two URIs differ in nothing but a secret."""
    urls: dict[str, str] = {}
    logins: dict[str, str] = {}
    origins: set[str] = set()
    for uri in uris:
        name = name_of(uri)
        if scheme_of(uri) in WEB:
            origins.add(origin_of(uri))
        if name != uri:
            _add(urls, name, uri)
            head, login = _authority(name), _authority(uri)
            if head != login:
                _add(logins, head, login)
    return UriSecrets(urls, logins, frozenset(origins))


def _add(table: dict[str, str], name: str, uri: str) -> None:
    if table.setdefault(name, uri) != uri:
        raise InputError(
            f"{redact(name)} is named twice, with two signatures or logins; without them the two are one file",
            hint="name it once; a parameter that tells two files apart must not be called token, signature or the like",
        )


def name_of(uri: str) -> str:
    """Remove user, password and secret parameters from a URI; one without them stays as it is."""
    scheme = scheme_of(uri)
    if not scheme:
        return uri
    head, _, rest = uri.partition("://")
    cut = re.search(r"[?#]" if scheme not in LITERAL_QUERY else r"$^", rest)
    rest, tail = (rest[: cut.start()], rest[cut.start() :]) if cut else (rest, "")
    authority, slash, path = rest.partition("/")
    if scheme not in CONTAINER_BEFORE_AT:
        authority = authority.rpartition("@")[2]
    query, _, fragment = tail.removeprefix("?").partition("#")
    asked, shown = _without_secrets(query), _without_secrets(fragment)
    if (asked, shown) != (query, fragment):
        tail = (f"?{asked}" if asked else "") + (f"#{shown}" if shown else "")
    return f"{head}://{authority}{slash}{path}{tail}"


def names_in(text: str) -> str:
    """Replace each URL in a message by its name, and drop secret parameters elsewhere in it."""
    return PARAMETER.sub(
        lambda found: "" if SECRET_NAME.fullmatch(unquote(found[1]).lower()) else found[0],
        URL.sub(lambda found: name_of(found[0]), text),
    )


def holds_secret(uri: str) -> bool:
    return name_of(uri) != uri


def origin_of(url: str) -> str:
    """Return `https://host:443` for `https://user@Host/x`, and an empty string for a malformed URL."""
    try:
        parts = urlsplit(url)
        port = parts.port or DEFAULT_PORTS.get(parts.scheme, 0)
    except ValueError:  # a port that is no number
        return ""
    return f"{parts.scheme.lower()}://{(parts.hostname or '').lower()}:{port}"


def _without_secrets(query: str) -> str:
    parameters = query.split("&") if query else []
    names = [unquote(parameter.partition("=")[0]).strip().lower() for parameter in parameters]
    secret = [bool(SECRET_NAME.fullmatch(name)) for name in names]
    dropped = [
        is_secret or (any(secret) and name in BESIDE_A_SECRET) for name, is_secret in zip(names, secret, strict=True)
    ]
    kept = [_digested(text, name) for text, name, drop in zip(parameters, names, dropped, strict=True) if not drop]
    return "&".join(kept)


def _digested(parameter: str, name: str) -> str:
    if name != "key":
        return parameter
    return f"key=sha256-{hashlib.sha256(parameter.partition('=')[2].encode('utf-8', 'surrogatepass')).hexdigest()[:16]}"


def _authority(uri: str) -> str:
    scheme, _, rest = uri.partition("://")
    return f"{scheme}://{re.split('[/?#]', rest, maxsplit=1)[0]}"
