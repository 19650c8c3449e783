"""Send llama.cpp's messages to our log, and keep its last error for the code that is running."""

import contextlib
import ctypes
import logging
from collections.abc import Iterator
from dataclasses import dataclass

import llama_cpp
from llama_cpp import mtmd_cpp

logger = logging.getLogger(__name__)

_ERROR = 4  # GGML_LOG_LEVEL_ERROR


@dataclass(eq=False)  # two instances without an error are not the same
class LastError:
    """The last error line, empty where there was none."""

    last: str = ""


_waiting: list[LastError] = []


@llama_cpp.llama_log_callback
def _take(level: int, text: bytes, _: ctypes.c_void_p) -> None:
    line = text.decode(errors="replace").strip()
    if level == _ERROR and line:
        for error in _waiting:
            error.last = line
    if line:
        logger.debug("%s", line)


def take_log() -> None:
    """Send what llama.cpp and its vision part say to this module's logger, at level debug, instead of stderr."""
    for set_callback in (llama_cpp.llama_log_set, mtmd_cpp.mtmd_log_set, mtmd_cpp.mtmd_helper_log_set):
        set_callback(_take, ctypes.c_void_p(0))


@contextlib.contextmanager
def captured_log() -> Iterator[LastError]:
    """Yield what will hold the last error that llama.cpp says within the block."""
    take_log()
    error = LastError()
    _waiting.append(error)
    try:
        yield error
    finally:
        _waiting.remove(error)
