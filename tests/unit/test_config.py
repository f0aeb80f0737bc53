"""What a user may write, and what the error says otherwise."""

from typing import Any

import pytest

from pillion.vllm.config import GIB, Settings, parse


def test_defaults() -> None:
    settings = parse(None)
    assert settings == Settings() == parse({})
    assert settings.launch and settings.tenant == "default" and settings.max_hold_fraction == 0.10


def test_values_are_taken() -> None:
    settings = parse({"socket": "/run/x.sock", "launch": False, "max_hold_fraction": 0.25, "layout": "any"})
    assert (settings.socket, settings.launch, settings.max_hold_fraction) == ("/run/x.sock", False, 0.25)


def test_load_deadline_grows_with_the_load() -> None:
    assert Settings().load_deadline(0) == 2000
    assert Settings().load_deadline(GIB) == 3000
    assert Settings().load_deadline(GIB // 2) == 2500
    assert Settings(load_deadline_ms=70).load_deadline(GIB) == 70


def test_unknown_keys_are_named_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"unknown key 'sokcet'.*known keys: socket, launch, tenant"):
        parse({"sokcet": "/x"})


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("socket", ""),
        ("socket", 7),
        ("launch", "no"),
        ("tenant", None),
        ("layout", "NHD"),
        ("cache_mode", "write-back"),
        ("cache_mode", 1),
        ("load_deadline_ms", 0),
        ("load_deadline_ms", 1.5),
        ("save_deadline_ms", True),
        ("max_hold_fraction", 0),
        ("max_hold_fraction", 0.6),
        ("max_hold_fraction", "10%"),
        ("lookup_wait_us", 1001),
        ("lookup_deadline_ms", -1),
        ("start_wait_ms", 200_000),
    ],
)
def test_wrong_values_name_the_key_and_what_came(key: str, value: Any) -> None:
    with pytest.raises(ValueError, match=key) as raised:
        parse({key: value})
    assert repr(value) in str(raised.value)
