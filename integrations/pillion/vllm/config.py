"""What a user may write in `kv_connector_extra_config`.

A wrong key or value is an error of the person who typed it and stops the engine at its start, with the list
of what is possible. Everything that can go wrong later is a cache miss.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

GIB = 1 << 30
LAYOUTS = ("BLHNC", "any")
CACHE_MODES = ("write_back", "write_through", "write_around", "read_only")


@dataclass(frozen=True)
class Settings:
    """Parsed `kv_connector_extra_config`; times in the unit of their name."""

    socket: str | None = None
    launch: bool = True
    tenant: str = "default"
    model_id: str | None = None
    layout: str = "BLHNC"
    load_deadline_ms: int | None = None
    save_deadline_ms: int = 30_000
    max_hold_fraction: float = 0.10
    lookup_wait_us: int = 200
    lookup_deadline_ms: int = 500
    start_wait_ms: int = 10_000
    other_tp_sizes: bool = True
    cache_mode: str | None = None

    def load_deadline(self, load_bytes: int) -> int:
        """Milliseconds that a load of this size may take: 2 s and 1 s for each GiB, unless configured."""
        if self.load_deadline_ms is not None:
            return self.load_deadline_ms
        return 2000 + 1000 * load_bytes // GIB


_TEXT = ("socket", "tenant", "model_id", "layout", "cache_mode")
_CHOICES = {"layout": LAYOUTS, "cache_mode": CACHE_MODES}
_LIMITS: dict[str, tuple[int, int]] = {
    "load_deadline_ms": (1, 600_000),
    "save_deadline_ms": (1, 600_000),
    "lookup_wait_us": (0, 1000),  # I5: no call from a step blocks more than 1 ms
    "lookup_deadline_ms": (0, 60_000),
    "start_wait_ms": (0, 120_000),
}


def parse(extra: Mapping[str, Any] | None) -> Settings:
    """Checks and converts `kv_connector_extra_config`.

    Raises `ValueError` that names the key, what was expected, and what came.
    """
    given = dict(extra or {})
    known = [field.name for field in fields(Settings)]
    unknown = sorted(set(given) - set(known))
    if unknown:
        raise ValueError(
            f"pillion: unknown key {', '.join(map(repr, unknown))} in kv_connector_extra_config; "
            f"known keys: {', '.join(known)}"
        )
    return Settings(**{key: _value(key, value) for key, value in given.items()})


def _value(key: str, value: Any) -> Any:
    if key in _TEXT:
        return _text(key, value)
    if key in ("launch", "other_tp_sizes"):
        if not isinstance(value, bool):
            raise _wrong(key, "true or false", value)
        return value
    if key == "max_hold_fraction":
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= 0.5:
            raise _wrong(key, "a number above 0 and at most 0.5", value)
        return float(value)
    low, high = _LIMITS[key]
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise _wrong(key, f"a whole number from {low} to {high}", value)
    return value


def _text(key: str, value: Any) -> Any:
    if value is None and key in ("socket", "model_id", "cache_mode"):
        return None
    if not isinstance(value, str) or not value:
        raise _wrong(key, "a text that is not empty", value)
    if key in _CHOICES and value not in _CHOICES[key]:
        raise _wrong(key, " or ".join(map(repr, _CHOICES[key])), value)
    return value


def _wrong(key: str, expected: str, came: Any) -> ValueError:
    return ValueError(f"pillion: kv_connector_extra_config[{key!r}] must be {expected}, got {came!r}")
