"""Write JSON records that carry a digest of themselves, so that any changed byte is found."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

SEAL = "sha256"  # the field that holds a record's own digest


def seal(values: Mapping[str, Any]) -> bytes:
    """Encode a record as JSON, with a digest of its other fields."""
    digest = hashlib.sha256(_json(values)).hexdigest()
    return _json({**values, SEAL: digest})


def is_sealed(data: bytes) -> bool:
    """Return whether a record is byte for byte as it was written."""
    try:
        values = json.loads(data)
        return bool(seal({name: value for name, value in values.items() if name != SEAL}) == data)
    except (ValueError, AttributeError, RecursionError):
        return False


def _json(values: Mapping[str, Any]) -> bytes:
    return json.dumps(values, indent=1, sort_keys=True).encode()
