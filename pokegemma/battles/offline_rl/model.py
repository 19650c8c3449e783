"""Actor and critics over a battle: features of its states, numbers, a causal transformer, and heads for each gamma."""

import copy
from dataclasses import dataclass

import torch
from torch import nn

from pokegemma.battles.offline_rl import formulas
from pokegemma.battles.trajectories.actions import NUM_ACTIONS
from pokegemma.battles.trajectories.texts import NUM_NUMBERS


@dataclass(frozen=True)
class ActorCriticShape:
    """The sizes of the network.

    Attributes:
        feature_width: of the encoder's features.
        width: of the transformer over the battle.
        max_length: states in a window of a battle.
        gammas: discount factors; the last one plays.
    """

    feature_width: int
    width: int = 128
    num_layers: int = 2
    num_heads: int = 4
    max_length: int = 128
    gammas: tuple[float, ...] = formulas.GAMMAS
    num_critics: int = 6
    num_bins: int = formulas.NUM_BINS
    max_return: float = formulas.MAX_RETURN


class _Block(nn.Module):
    """A causal transformer block with its norms in front."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.attention_norm, self.norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query_key_value, self.output = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.feed_forward = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        batch, length, width = states.shape
        projected = self.query_key_value(self.attention_norm(states)).view(batch, length, 3, self.num_heads, -1)
        query, key, value = projected.permute(2, 0, 3, 1, 4)
        attended = nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        states = states + self.output(attended.transpose(1, 2).reshape(batch, length, width))
        return states + self.feed_forward(self.norm(states))


class Heads(nn.Module):
    """The actor, and critics whose logits are shared by all actions plus a difference for each action.

    With an output of its own for each action, an action that is seldom played keeps the value that it started with, and
    looks good. Here it has the state's value until it is seen: differences start at zero, and their weights decay.

    Attributes:
        shared: weights (G, C, width, K).
        difference: weights (G, C, A, width, K).
    """

    def __init__(self, shape: ActorCriticShape) -> None:
        super().__init__()
        factors, critics, width, bins = len(shape.gammas), shape.num_critics, shape.width, shape.num_bins
        self.shape = shape
        self.actor = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, factors * NUM_ACTIONS))
        self.critic_hidden = nn.Sequential(nn.Linear(width, width), nn.GELU())
        self.shared = nn.Parameter(torch.randn(factors, critics, width, bins) * width**-0.5)
        self.difference = nn.Parameter(torch.zeros(factors, critics, NUM_ACTIONS, width, bins))

    def actor_logits(self, states: torch.Tensor) -> torch.Tensor:
        """Return (..., G, A)."""
        return self.actor(states).unflatten(-1, (len(self.shape.gammas), NUM_ACTIONS))

    def played_logits(self, states: torch.Tensor, actions: torch.Tensor) -> torch.Tensor:
        """Return the critics' logits of the actions that were played, (N, G, C, K).

        Args:
            states: (N, width).
            actions: (N,) int64.
        """
        hidden = self.critic_hidden(states)
        places, logits = [], []
        for action in actions.unique().tolist():
            where = (actions == action).nonzero()[:, 0]
            weights = self.shared + self.difference[:, :, action]
            places.append(where)
            logits.append(torch.einsum("nw,gcwk->ngck", hidden[where], weights))
        return torch.cat(logits)[torch.cat(places).argsort()]

    @torch.no_grad()
    def action_values(self, states: torch.Tensor, bins: torch.Tensor, *, critics: torch.Tensor) -> torch.Tensor:
        """Return the mean of some critics' Q(s, a), (N, G, A).

        Args:
            states: (N, width).
            critics: their numbers, int64.
        """
        hidden = self.critic_hidden(states)
        values = hidden.new_zeros(len(hidden), len(self.shape.gammas), NUM_ACTIONS)
        for factor in range(len(self.shape.gammas)):
            for critic in critics.tolist():  # one by one: all logits at once would take gigabytes
                weights = self.shared[factor, critic] + self.difference[factor, critic]
                logits = torch.einsum("nw,awk->nak", hidden, weights)
                values[:, factor] += formulas.expected_value(logits, bins)
        return values / len(critics)


class ActorCritic(nn.Module):
    """The network. Its target heads follow the heads slowly, by `update_targets` after each step."""

    def __init__(self, shape: ActorCriticShape) -> None:
        super().__init__()
        self.shape = shape
        self.features = nn.Linear(shape.feature_width, shape.width)
        self.numbers = nn.Linear(NUM_NUMBERS, shape.width)
        self.positions = nn.Embedding(shape.max_length, shape.width)
        self.blocks = nn.ModuleList(_Block(shape.width, shape.num_heads) for _ in range(shape.num_layers))
        self.norm = nn.LayerNorm(shape.width)
        self.heads = Heads(shape)
        self.target_heads = copy.deepcopy(self.heads).requires_grad_(False)
        self.register_buffer("bins", formulas.make_bins(shape.num_bins, shape.max_return), persistent=False)
        self.register_buffer("gammas", torch.tensor(shape.gammas), persistent=False)

    def encode(self, features: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
        """Return what is known at each state of a battle, (B, T, width), from it and the states before.

        Args:
            features: (B, T, feature_width).
            numbers: (B, T, 48).
        """
        positions = self.positions(torch.arange(features.shape[1], device=features.device))
        states = self.features(features) + self.numbers(numbers) + positions
        for block in self.blocks:
            states = block(states)
        return self.norm(states)

    def update_targets(self) -> None:
        formulas.update_target(self.target_heads, self.heads)
