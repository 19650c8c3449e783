"""Options of scripts as fields of dataclasses, which transformers' HfArgumentParser reads."""

import dataclasses
from typing import Any


def option(default: Any, help: str, **more: Any) -> Any:
    """Return a dataclass field that is an option with a help text.

    Args:
        default: `...` for an option that is required. Each instance gets a copy of a list.
        more: what else argparse takes, such as "choices" or "nargs", and "aliases", a list of other flags.

    Example:
        port: int = option(8000, "Port to listen on.")
    """
    metadata = {"help": help, **more}
    if isinstance(default, list):
        return dataclasses.field(default_factory=default.copy, metadata=metadata)
    return dataclasses.field(default=dataclasses.MISSING if default is ... else default, metadata=metadata)
