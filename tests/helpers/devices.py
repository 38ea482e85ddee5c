"""Another profile of a device type, for one test."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from requant.runtime.device import PROFILES


def set_profile(monkeypatch: pytest.MonkeyPatch, device_type: str = "cpu", **changes: Any) -> None:
    monkeypatch.setitem(PROFILES, device_type, replace(PROFILES[device_type], **changes))
