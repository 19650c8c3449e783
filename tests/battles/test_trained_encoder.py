"""The encoder of offline reinforcement learning with LoRA: exact next to cached features, saved, resumed, played."""

import json
import shlex
from pathlib import Path

import pytest
import torch

pytest.importorskip("poke_env", reason="needs poke-env (./init.sh --with battles)")
from safetensors.torch import load_file

from pokegemma.battles.cloning.options import PolicyModelOptions
from pokegemma.battles.cloning.train import make_lora_config
from pokegemma.battles.offline_rl.features import prepare_features
from pokegemma.battles.offline_rl.model import ActorCritic, ActorCriticShape
from pokegemma.battles.offline_rl.network_files import load_actor_critic
from pokegemma.battles.offline_rl.options import OfflineRLOptions
from pokegemma.battles.offline_rl.trained_encoder import StateTokens, TrainedEncoder, make_trained_encoder
from pokegemma.battles.offline_rl.trainer import TrainableActorCritic
from pokegemma.battles.offline_rl.windows import BattleWindows, collate_windows
from pokegemma.battles.players.opening import PlayerSource
from pokegemma.battles.players.scripted import RandomBattlePlayer
from pokegemma.battles.policy.checkpoint import open_policy
from pokegemma.battles.policy.scoring import hidden_at_ends
from pokegemma.battles.trajectories.packed import PackedTrajectories
from pokegemma.errors import PokegemmaError
from tests.battles.simulated import make_specs, play
from tests.processes import call_script

LORA = PolicyModelOptions(finetuning="lora", lora_r=4, lora_dropout=0.0)


@pytest.fixture
def encoder(tiny_policy: Path) -> TrainedEncoder:
    """Return an encoder whose adapter is not the zeros that it starts with, and which works through its parts."""
    torch.manual_seed(0)
    made = make_trained_encoder(open_policy(tiny_policy), make_lora_config(LORA), batch_size=5, device="cpu")
    for name, weight in made.named_parameters():
        if weight.requires_grad and "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.1)
    return made


@pytest.fixture
def batches(packed_battles: Path, tiny_policy: Path, tmp_path) -> tuple[dict, dict]:
    """Return a batch of three windows of different lengths, with features and with tokens."""
    battles, policy = PackedTrajectories(packed_battles), open_policy(tiny_policy)
    states = (prepare_features(tmp_path / "features", battles, policy, device="cpu"), StateTokens(battles, policy))
    windows = [BattleWindows(battles, each, [0, 5], length=6, reward="binary") for each in states]
    cached, tokens = (collate_windows([each[number] for number in (0, 1, 3)]) for each in windows)
    return cached, tokens


def gradients(module: torch.nn.Module) -> torch.Tensor:
    return torch.cat([weight.grad.flatten() for weight in module.parameters() if weight.requires_grad])


def test_an_untrained_encoder_gives_the_cached_features(encoder: TrainedEncoder, batches) -> None:
    cached, tokens = batches
    features = encoder.encode_untrained(tokens["tokens"], tokens["lengths"])
    assert features.numpy() == pytest.approx(cached["features"].numpy(), abs=1e-5)
    assert (tokens["lengths"] == 0).any() and (features[tokens["lengths"] == 0] == 0).all()
    assert (encoder(tokens["tokens"], tokens["lengths"]) - features).abs().max() > 1e-2  # the adapter does something


def test_losses_and_gradients_are_those_of_cached_features(tiny_policy: Path, batches) -> None:
    """Before the first step, at which an adapter changes nothing."""
    torch.manual_seed(0)
    shape = ActorCriticShape(feature_width=64, width=16, num_layers=1, num_heads=2, max_length=6, gammas=(0.9,))
    network = ActorCritic(shape)
    encoder = make_trained_encoder(open_policy(tiny_policy), make_lora_config(LORA), batch_size=4, device="cpu")
    losses, found = [], []
    for inputs, part in zip(batches, (None, encoder), strict=True):
        network.zero_grad()
        torch.manual_seed(1)  # of the choice of critics
        loss = TrainableActorCritic(network, clone=False, encoder=part).train()(**inputs).total
        loss.backward()
        losses.append(loss.item())
        found.append(gradients(network))
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert (found[0] - found[1]).norm() <= 1e-4 * found[0].norm()
    assert gradients(encoder).norm() > 0


def test_features_and_gradients_of_parts_are_those_of_all_states_at_once(encoder: TrainedEncoder, batches) -> None:
    _, tokens = batches
    is_state = tokens["lengths"] > 0
    weights = torch.randn(int(is_state.sum()), 64)
    parts = encoder(tokens["tokens"], tokens["lengths"])[is_state]
    (parts * weights).sum().backward()
    of_parts = gradients(encoder)
    encoder.zero_grad()
    whole = hidden_at_ends(encoder.model, tokens["tokens"][is_state], tokens["lengths"][is_state] - 1)
    (whole * weights).sum().backward()
    assert parts.detach().numpy() == pytest.approx(whole.detach().numpy(), abs=1e-5)
    assert (of_parts - gradients(encoder)).norm() <= 1e-4 * of_parts.norm()


def test_a_checkpoint_has_the_adapter_and_no_other_weight_of_the_encoder(encoder: TrainedEncoder, tiny_policy) -> None:
    shape = ActorCriticShape(feature_width=64, width=16, num_layers=1, num_heads=2, max_length=6, gammas=(0.9,))
    model = TrainableActorCritic(ActorCritic(shape), clone=False, encoder=encoder)
    weights = model.state_dict()
    of_encoder = [name for name in weights if name.startswith("encoder.")]
    assert len(of_encoder) == 2 * 3 * 7 and all("lora_" in name for name in of_encoder)
    other = make_trained_encoder(open_policy(tiny_policy), make_lora_config(LORA), batch_size=5, device="cpu")
    loaded = TrainableActorCritic(ActorCritic(shape), clone=False, encoder=other).load_state_dict(weights, strict=False)
    assert loaded.missing_keys == loaded.unexpected_keys == []
    assert all(torch.equal(weight, other.state_dict()[name]) for name, weight in encoder.state_dict().items())
    del weights[of_encoder[0]]
    assert model.load_state_dict(weights, strict=False).missing_keys == [of_encoder[0]]


def test_an_adapter_cannot_get_another_one(tiny_policy: Path, encoder: TrainedEncoder, tmp_path) -> None:
    encoder.save(tmp_path / "adapter", open_policy(tiny_policy))
    with pytest.raises(PokegemmaError, match="is an adapter"):
        make_trained_encoder(open_policy(tmp_path / "adapter"), make_lora_config(LORA), batch_size=5, device="cpu")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"lora_r": 8}, "--lora_r needs --encoder_training lora"),
        ({"encoder_training": "lora", "features_dir": "x"}, "--features_dir: with --encoder_training lora"),
        ({"kl_start": 0.2}, "--kl_start needs --reference"),
        ({"encoder_batch_size": 0}, "--encoder_batch_size 0"),
    ],
)
def test_options_that_would_do_nothing_are_refused(options: dict, words: str) -> None:
    with pytest.raises(PokegemmaError, match=words):
        OfflineRLOptions(trajectories_dir="x", encoder="x", **options)


TRAINING = shlex.split(
    "--eval_fraction 0.3 --report_to none --logging_steps 1 --eval_steps 2 --save_steps 2 --warmup_steps 0 --width 16 "
    "--num_heads 2 --num_layers 1 --gammas 0.9 --num_critics 2 --window 6 --per_device_train_batch_size 4 "
    "--learning_rate 1e-2 --encoder_batch_size 16"
)
WITH_LORA = ("--encoder_training", "lora", "--lora_r", 4)


def train(packed: Path, encoder: Path, output: Path, *more: object) -> dict:
    options = ("--trajectories_dir", packed, "--encoder", encoder, "--output_dir", output)
    done = call_script("rl_battles", *options, *TRAINING, *more)
    assert done.returncode == 0, done.stderr
    return json.loads((output / "run.json").read_text())


@pytest.mark.slow(20)
def test_training_with_lora_resumes_exactly_and_its_result_plays(
    simulator, packed_battles: Path, tiny_policy: Path, tmp_path
) -> None:
    inputs = (packed_battles, tiny_policy)
    record = train(*inputs, tmp_path / "whole", *WITH_LORA, "--max_steps", 4)
    train(*inputs, tmp_path / "part", *WITH_LORA, "--max_steps", 2)
    train(*inputs, tmp_path / "part", *WITH_LORA, "--max_steps", 4, "--resume_from_checkpoint")
    assert not (tmp_path / "whole_features").exists()
    names = ("actor_critic.safetensors", "encoder_adapter/adapter_model.safetensors")
    for name in names:
        whole, part = (load_file(tmp_path / folder / name) for folder in ("whole", "part"))
        assert all(torch.equal(weight, part[key]) for key, weight in whole.items()) and len(whole) > 10
    assert record["num_trained_weights"] > sum(weight.numel() for weight in whole.values())
    trained_b = [weight for key, weight in whole.items() if "lora_B" in key]
    assert all(weight.abs().max() > 0 for weight in trained_b)
    _, policy = load_actor_critic(tmp_path / "whole")
    assert policy.adapter is not None and policy.path == str(tiny_policy)
    source = PlayerSource.parse(f"rl={tmp_path / 'whole'}")
    (result,) = play(simulator, make_specs(1), (source.open(), RandomBattlePlayer()), max_turns=3).values()
    assert result.problem == "" and len(result.seats[0].steps) >= 3
    before = source.fingerprint()
    (tmp_path / "whole" / names[1]).write_bytes(b"another adapter")
    assert source.fingerprint() != before


@pytest.mark.slow(10)
def test_a_reference_keeps_the_features_that_it_learned_with(packed_battles: Path, tiny_policy: Path, tmp_path) -> None:
    inputs = (packed_battles, tiny_policy)
    train(*inputs, tmp_path / "before", "--max_steps", 1)
    train(*inputs, tmp_path / "near", *WITH_LORA, "--reference", tmp_path / "before", "--max_steps", 3)
    lines = (tmp_path / "near" / "metrics.csv").read_text().splitlines()
    place = lines[0].split(",").index("kl")
    divergences = [float(line.split(",")[place]) for line in lines[1:] if line.split(",")[place]]
    assert abs(divergences[0]) < 1e-6 < divergences[1]
