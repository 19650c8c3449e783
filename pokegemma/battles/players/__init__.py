"""What chooses actions in battles: one interface, and players that need no model."""

from pokegemma.errors import PokegemmaError

try:
    import poke_env  # noqa: F401 (every module here needs it)
except ImportError as error:
    raise PokegemmaError(f"battles need {error.name}: ./init.sh --with battles") from error
