"""Logging of the shim: below vLLM's own logger, so that its handlers and level apply, and never a flood."""

import logging
import time

logger = logging.getLogger("vllm.pillion")

_EVERY_S = 60.0
_last: dict[str, tuple[float, int]] = {}  # place -> (time of the last line, lines left out since)


def log_limited(level: int, place: str, message: str, *args: object, exc_info: bool = False) -> None:
    """Logs at most one line a minute per `place`, and says how many it left out."""
    now = time.monotonic()
    last, left_out = _last.get(place, (-_EVERY_S, 0))
    if now - last < _EVERY_S:
        _last[place] = (last, left_out + 1)
        return
    _last[place] = (now, 0)
    suffix = f" ({left_out} more like it in the last minute)" if left_out else ""
    logger.log(level, "pillion: " + message + suffix, *args, exc_info=exc_info)


def log_once(level: int, place: str, message: str, *args: object) -> None:
    """Logs one line per `place` and process."""
    if place not in _last:
        _last[place] = (float("inf"), 0)
        logger.log(level, "pillion: " + message, *args)


def survivable(error: BaseException) -> bool:
    """Whether an error may become a miss (I5): all but those that ask this process or coroutine to end.

    A panic in the extension module arrives as a `BaseException` that is not an `Exception`.
    """
    return not isinstance(error, KeyboardInterrupt | SystemExit | GeneratorExit)
