"""The toy game as the Gymnasium environment `PokegemmaToy-v0`; importing this module registers it.

Example:
    >>> import gymnasium
    >>> env = gymnasium.make("pokegemma.play.toy_env:PokegemmaToy-v0", level=1)
    >>> observation, info = env.reset(seed=5)
    >>> observation.shape, info["situation"]
    ((160, 240, 3), 'navigation')
    >>> observation, reward, terminated, truncated, info = env.step(info["expert_action"])
"""

from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces

from pokegemma.data.prompts import BUTTONS
from pokegemma.play.toy.art import SCREEN_SIZE
from pokegemma.play.toy.world import ToyWorld

ENV_ID = "PokegemmaToy-v0"
MAX_EPISODE_STEPS = 200
"""An episode is truncated after so many presses; the expert needs about 30 on level 1 and 60 on level 2."""

PRESS_REWARD, DOOR_REWARD = -0.01, 1.0


class ToyEnv(gymnasium.Env[np.ndarray, np.int64]):
    """One room an episode.

    - Action: the place of a button in `prompts.BUTTONS`.
    - Observation: the screen, RGB, uint8 of shape (160, 240, 3).
    - Reward: -0.01 for each press, and 1 more for the one that leaves through the door.
    - Terminated: when the player has left through the door. Truncated: after 200 presses (`max_episode_steps`).
    - Info: `room` (its seed), `situation`, `expert_action`, and `effect`, whether the press changed anything.
    - `reset(seed=5)` starts a sequence of rooms that depends on the seed alone; `reset(options={"room": 7})` plays the
      room that `ToyWorld(7)` is.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": 4}  # noqa: RUF012  (gymnasium declares it so)

    def __init__(self, *, level: int = 1, render_mode: str | None = None):
        """Raises PokegemmaError, at the first reset, where there is no such level."""
        width, height = SCREEN_SIZE
        self.action_space = spaces.Discrete(len(BUTTONS))
        self.observation_space = spaces.Box(0, 255, (height, width, 3), np.uint8)
        self.render_mode = render_mode
        self._level = level
        self._room = 0
        self._world: ToyWorld | None = None

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Enter a room; see the class for `seed` and `options`."""
        super().reset(seed=seed)
        drawn = int(self.np_random.integers(2**31))
        self._room = (options or {}).get("room", drawn)
        self._world = ToyWorld(self._room, level=self._level)
        return self.render(), self._info(effect=False)

    def step(self, action: np.int64) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """Press a button."""
        effect = self._world.press(BUTTONS[action])
        is_done = self._world.is_done
        reward = PRESS_REWARD + DOOR_REWARD * (effect and is_done)
        return self.render(), reward, is_done, False, self._info(effect=effect)

    def render(self) -> np.ndarray:
        """Return the screen."""
        return np.array(self._world.render())

    def _info(self, *, effect: bool) -> dict[str, Any]:
        return {
            "room": self._room,
            "situation": self._world.situation,
            "expert_action": BUTTONS.index(self._world.expert_button()),
            "effect": effect,
        }


gymnasium.register(ENV_ID, entry_point=ToyEnv, max_episode_steps=MAX_EPISODE_STEPS)
