"""transformers' Trainer for the offline actor-critic."""

from collections.abc import Callable
from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR, LRScheduler
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from pokegemma.battles.offline_rl import formulas
from pokegemma.battles.offline_rl.kl_damping import KLController
from pokegemma.battles.offline_rl.losses import BattleBatch, Losses, compute_losses, judge_batch
from pokegemma.battles.offline_rl.model import ActorCritic
from pokegemma.battles.offline_rl.trained_encoder import TrainedEncoder
from pokegemma.battles.offline_rl.windows import collate_windows
from pokegemma.errors import PokegemmaError
from pokegemma.training.run_folder import WholeCheckpoints

_DIFFERENCE = "heads.difference"
_FIGURES = ("actor_loss", "critic_loss", "share_passed", "value")


class TrainableActorCritic(torch.nn.Module):
    """The network, whose forward pass returns the losses of a batch: what DistributedDataParallel wraps.

    Args:
        encoder: trained with the network; None: batches have features.
        reference: another network, which is frozen here, and near which KL damping keeps the policy; None: no damping.
            Its features are those of the encoder before it was trained.
        controller: of the damping.
    """

    def __init__(
        self,
        network: ActorCritic,
        *,
        clone: bool,
        td_lambda: float = formulas.TD_LAMBDA,
        encoder: TrainedEncoder | None = None,
        reference: ActorCritic | None = None,
        controller: KLController | None = None,
    ) -> None:
        super().__init__()
        self.network, self._clone, self._td_lambda, self.encoder = network, clone, td_lambda, encoder
        self.reference = None if reference is None else reference.requires_grad_(False)
        self.controller = None if reference is None else controller or KLController()

    def forward(self, **inputs: torch.Tensor) -> Losses:
        """Return the losses of what `collate_windows` returned."""
        features = None
        if self.encoder is not None and self.reference is not None:
            features = self.encoder.encode_untrained(inputs["tokens"], inputs["lengths"])
        return compute_losses(
            self.network,
            self.make_batch(**inputs),
            clone=self._clone,
            td_lambda=self._td_lambda,
            reference=self.reference,
            reference_features=features,
            kl_weight=0.0 if self.controller is None else self.controller.k,
        )

    def make_batch(
        self, *, tokens: torch.Tensor | None = None, lengths: torch.Tensor | None = None, **fields: torch.Tensor
    ) -> BattleBatch:
        """Return the batch, whose features are computed here where the encoder is trained."""
        if self.encoder is not None:
            fields["features"] = self.encoder(tokens, lengths)
        return BattleBatch(**fields)


class OfflineRLTrainer(WholeCheckpoints, Trainer):
    """Trains an `ActorCritic`.

    Log entries have four more values: `actor_loss`, `critic_loss`, `share_passed` (of the decisions, those that the
    binary filter lets the actor learn from) and `value`, the mean Q(s, a) of the last factor. Evaluation logs
    `eval_rank_of_played`, the share of the other legal actions that the critics put below the one played (1/2 for
    critics that have learned nothing), `eval_action_accuracy`, and `eval_uniform_accuracy`, that of a uniform choice
    among the legal actions. With KL damping log entries also have `kl` (the mean since the last entry, nats a
    decision), `kl_weight` and `lr_factor` of the controller, by which the scheduled learning rate is multiplied.

    Args:
        difference_decay: weight decay of the critics' differences; other weights have that of the options, but for
            biases and norms, which have none.
    """

    def __init__(self, model: TrainableActorCritic, *args: Any, difference_decay: float, **options: Any) -> None:
        self._difference_decay = difference_decay
        super().__init__(model, *args, data_collator=collate_windows, **options)
        self._figures: list[torch.Tensor] = []
        self._results: list[torch.Tensor] = []
        self._controller: KLController | None = model.controller
        self._divergences: list[torch.Tensor] = []  # of the optimizer step that is being computed
        self.add_callback(_TargetUpdater())
        if self._controller is not None:
            self.add_callback(_AfterOptimizerStep(self._adapt))

    def create_optimizer(self, model: torch.nn.Module | None = None) -> torch.optim.Optimizer:
        """Return transformers' optimizer, as the options have it, with another weight decay of the differences."""
        if self.optimizer is None:
            optimizer = super().create_optimizer(model)
            apart = [weight for name, weight in self.model.named_parameters() if _is_trained_difference(name, weight)]
            ids = set(map(id, apart))
            for group in optimizer.param_groups:
                group["params"] = [weight for weight in group["params"] if id(weight) not in ids]
            optimizer.add_param_group({"params": apart, "weight_decay": self._difference_decay})
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> LRScheduler:
        is_new = self.lr_scheduler is None
        scheduler = super().create_scheduler(num_training_steps, optimizer)
        if self._controller is not None and is_new:
            if not isinstance(scheduler, LambdaLR):
                raise PokegemmaError(
                    f"--lr_scheduler_type {self.args.lr_scheduler_type}: with --reference the learning rate is adapted "
                    "already; choose another"
                )
            scheduler.lr_lambdas = [self._damped(each) for each in scheduler.lr_lambdas]
        return scheduler

    def _damped(self, schedule: Callable[[int], float]) -> Callable[[int], float]:
        return lambda step: schedule(step) * self._controller.lr_factor

    def _adapt(self) -> None:
        """Show the controller the mean divergence of an optimizer step, over all processes."""
        mean = torch.stack(self._divergences).mean()
        self._divergences.clear()
        self._controller.record(self.accelerator.gather(mean).mean().item())

    def compute_loss(
        self, model: torch.nn.Module, inputs: dict[str, torch.Tensor], return_outputs: bool = False, **options: Any
    ) -> torch.Tensor:
        losses = model(**inputs)
        figures = [losses.actor, losses.critic, losses.passed, losses.value, losses.kl]
        self._figures.append(torch.stack(figures).detach().cpu())
        if self._controller is not None:
            self._divergences.append(losses.kl.detach())
        return losses.total

    def log(self, logs: dict[str, float], *args: Any, **options: Any) -> None:
        if "loss" in logs and self._figures:
            *means, kl = torch.stack(self._figures).mean(0).tolist()
            logs |= dict(zip(_FIGURES, means, strict=True))
            if self._controller is not None:
                logs |= {"kl": kl, "kl_weight": self._controller.k, "lr_factor": self._controller.lr_factor}
            self._figures.clear()
        super().log(logs, *args, **options)

    def prediction_step(
        self,
        model: torch.nn.Module,
        inputs: dict[str, torch.Tensor],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[torch.Tensor, None, None]:
        bare = self.accelerator.unwrap_model(model)
        with torch.no_grad():
            batch = bare.make_batch(**self._prepare_inputs(inputs))
        sums = judge_batch(bare.network, batch).sum(0, keepdim=True)
        self._results.append(self.accelerator.gather(sums).cpu())
        return torch.zeros(len(batch.actions), device=sums.device), None, None

    def evaluation_loop(self, *args: Any, **options: Any) -> Any:
        self._results = []
        output = super().evaluation_loop(*args, **options)
        prefix = options.get("metric_key_prefix", "eval")
        rank, num_ranked, hits, uniform, decisions = torch.cat(self._results).double().sum(0).tolist()
        output.metrics.pop(f"{prefix}_loss", None)
        output.metrics[f"{prefix}_rank_of_played"] = rank / max(num_ranked, 1)
        output.metrics[f"{prefix}_action_accuracy"] = hits / max(decisions, 1)
        output.metrics[f"{prefix}_uniform_accuracy"] = uniform / max(decisions, 1)
        return output


def _is_trained_difference(name: str, weight: torch.Tensor) -> bool:
    return name.endswith(_DIFFERENCE) and weight.requires_grad


class _TargetUpdater(TrainerCallback):
    """Moves the target heads after each step."""

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        kwargs["model"].network.update_targets()


class _AfterOptimizerStep(TrainerCallback):
    """Calls a function after each optimizer step, before the learning rate of the next one is set."""

    def __init__(self, function: Callable[[], None]) -> None:
        self._function = function

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._function()
