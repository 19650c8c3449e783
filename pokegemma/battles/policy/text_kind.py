"""The two ways to write a state as text."""

from typing import Literal

TextKind = Literal["short", "words"]
"""short: the short text with effectiveness written out. words: metamon's 87 words."""

DEFAULT_TEXT: TextKind = "short"
