"""The toy game: what it shows, what its expert does, and how it is recorded."""

import base64
import hashlib
import io
import json
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from pokegemma.data.prompts import BUTTONS
from pokegemma.errors import PokegemmaError
from pokegemma.play.noise import replace_press
from pokegemma.play.toy.art import ARROW_PLACE, ARROW_SIZE, draw_arrow
from pokegemma.play.toy.recorder import blind_accuracies, record_sessions
from pokegemma.play.toy.rooms import LEVELS, STEPS
from pokegemma.play.toy.world import ToyWorld

DIGESTS = {1: "10058ec892a52586", 2: "5cd566a7769465b3", 3: "2b9d2655d69b6c9c"}
"""Of the frames of rooms without paint."""


def play_to_the_door(world: ToyWorld, *, max_presses: int = 400) -> list[str]:
    buttons = []
    while not world.is_done:
        assert len(buttons) < max_presses
        buttons.append(world.expert_button())
        assert world.press(buttons[-1]), f"the expert's {buttons[-1]} did nothing when {world.situation}"
    return buttons


def read_button(picture: Image.Image) -> str:
    """Tell the button from six fixed places of the picture, all within two tiles of its centre."""
    cues = {
        "b": ((120, 150), (248, 248, 240)),
        "select": ((150, 80), (120, 24, 160)),
        "start": ((120, 25), (240, 40, 40)),
        "a": ((104, 25), (0, 184, 248)),
        "up": ((106, 34), (248, 232, 40)),
        "down": ((106, 126), (248, 232, 40)),
        "left": ((74, 66), (248, 232, 40)),
        "right": ((166, 66), (248, 232, 40)),
    }
    [button] = [button for button, (place, colour) in cues.items() if picture.getpixel(place) == colour]
    return button


def read_painted_button(picture: Image.Image) -> str:
    """Tell the button on a level with a painted trail: from the arrow, else from the paint, else from a cue."""
    left, top = ARROW_PLACE
    shown = picture.crop((left, top, left + ARROW_SIZE, top + ARROW_SIZE))
    for direction in STEPS:
        expected = shown.copy()
        arrow, mask = draw_arrow(direction)
        expected.paste(arrow, None, mask)
        if shown == expected:
            return direction
    corners = {"up": (107, 35), "down": (107, 99), "left": (75, 67), "right": (139, 67)}
    painted = [name for name, place in corners.items() if picture.getpixel(place) == (248, 232, 40)]
    return painted[0] if len(painted) == 1 else read_button(picture)


@pytest.fixture(scope="module")
def recording(tmp_path_factory) -> tuple[Path, list[list[str]]]:
    folder = tmp_path_factory.mktemp("toy")
    return folder, record_sessions(folder, num_sessions=40, seed=3, num_turns=25)


def sessions_of(folder: Path) -> list[dict]:
    return [json.loads(path.read_text()) for path in sorted(folder.glob("runs/session_*/session_data.json"))]


def test_same_seed_gives_the_same_frames_and_another_seed_does_not():
    frames = [[], [], []]
    for seed, kept in zip((5, 5, 6), frames, strict=True):
        world = ToyWorld(seed)
        for _ in range(30):
            kept.append(world.render().tobytes())
            world.press(world.expert_button())
    assert frames[0] == frames[1]
    assert not set(frames[0]) & set(frames[2])


def test_a_frame_is_rgb_of_the_size_of_a_gba_screen():
    picture = ToyWorld(0).render()
    assert (picture.mode, picture.size) == ("RGB", (240, 160))


@pytest.mark.parametrize("level", [1, 2, 3, 4, 5, 6])
def test_the_expert_reaches_the_door_on_many_seeds(level):
    rung = 0
    for seed in range(60):
        buttons = play_to_the_door(ToyWorld(seed, level=level))
        assert buttons.count("a") == buttons.count("b") == {1: 2, 2: 4, 3: 4, 4: 2, 5: 4, 6: 4}[level]
        assert buttons.count("start") == buttons.count("select")
        rung += buttons.count("start")
    assert rung > 60


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 10**9), level=st.sampled_from([1, 2, 3, 4, 5, 6]), buttons=st.lists(st.sampled_from(BUTTONS))
)
def test_the_expert_finishes_after_any_buttons(seed, level, buttons):
    world = ToyWorld(seed, level=level)
    for button in buttons:
        before = world.render().tobytes()
        changed = world.press(button)
        assert changed or world.render().tobytes() == before
    play_to_the_door(world)


def test_a_route_without_a_free_cell_for_a_sign_is_grown_anew():
    play_to_the_door(ToyWorld(1928, level=5))


def test_windows_take_only_the_button_that_closes_them():
    world = ToyWorld(1)
    while world.situation != "sign":
        world.press(world.expert_button())
    assert world.press("a")
    for button in ("up", "a", "start", "select"):
        assert not world.press(button)
        assert world.situation == "dialogue"
    assert world.press("b")
    assert world.press("start")
    for button in ("left", "a", "b", "start"):
        assert not world.press(button)
        assert world.situation == "menu"
    assert world.press("select")


def test_nothing_moves_once_the_door_is_reached():
    world = ToyWorld(1)
    play_to_the_door(world)
    assert world.situation == "done"
    assert not any(world.press(button) for button in BUTTONS)
    assert world.expert_button() in BUTTONS


def test_an_unknown_button_or_level_is_refused():
    with pytest.raises(ValueError, match="'A' is not one of up, down"):
        ToyWorld(0).press("A")
    with pytest.raises(PokegemmaError, match="level 9 is not one of 1, 2, 3, 4, 5, 6"):
        ToyWorld(0, level=9)


@pytest.mark.parametrize("level", [number for number, level in LEVELS.items() if not level.is_privileged])
def test_the_button_can_be_read_off_the_newest_frame(level):
    read = read_painted_button if LEVELS[level].trail == "painted" else read_button
    rng = random.Random(0)
    buttons_of_frame: dict[bytes, set[str]] = {}
    for seed in range(50):
        world = ToyWorld(seed, level=level)
        while not world.is_done:
            picture, button = world.render(), world.expert_button()
            assert read(picture) == button
            buttons_of_frame.setdefault(hashlib.sha256(picture.tobytes()).digest(), set()).add(button)
            world.press(rng.choice(BUTTONS) if rng.random() < 0.3 else button)
    assert len(buttons_of_frame) > 1000
    assert {len(buttons) for buttons in buttons_of_frame.values()} == {1}


@pytest.mark.parametrize("level", [1, 2, 3])
def test_rooms_without_paint_keep_their_pixels(level):
    digest = hashlib.sha256()
    rng = random.Random(0)
    for seed in range(4):
        world = ToyWorld(seed, level=level)
        for _ in range(60):
            digest.update(world.render().tobytes())
            world.press(rng.choice(BUTTONS) if rng.random() < 0.3 else world.expert_button())
    assert digest.hexdigest()[:16] == DIGESTS[level]


def test_a_painted_trail_is_eaten_up_and_never_drawn_again():
    world = ToyWorld(0, level=5)
    before = world.painted
    for _ in range(3):
        world.press(world.expert_button())
    assert world.painted == before[3:]
    world.press({"up": "down", "down": "up", "left": "right", "right": "left"}[world.facing])
    assert world.painted == before[3:]
    assert world.situation == "off_trail"


def test_the_expert_never_sees_an_arrow_unless_a_press_goes_wrong(tmp_path):
    for seed in range(60):
        for level in (4, 5):
            world = ToyWorld(seed, level=level)
            while not world.is_done:
                assert world.situation != "off_trail"
                world.press(world.expert_button())


def test_after_wrong_presses_most_rooms_show_an_arrow():
    rng, num_strayed = random.Random(0), 0
    for seed in range(50):
        world, strayed = ToyWorld(seed, level=5), False
        while not world.is_done:
            strayed |= world.situation == "off_trail"
            world.press(replace_press(world.expert_button(), noise=0.2, rng=rng))
        num_strayed += strayed
    assert num_strayed > 40


def test_the_four_arrows_are_rotations_of_one_that_is_its_own_mirror_image():
    up, mask = draw_arrow("up")
    assert up.transpose(Image.Transpose.FLIP_LEFT_RIGHT) == up
    turned = up
    for direction in ("left", "down", "right", "up"):
        turned = turned.transpose(Image.Transpose.ROTATE_90)
        assert draw_arrow(direction) == (turned, mask)
    assert mask.transpose(Image.Transpose.ROTATE_90) == mask


def test_only_a_level_on_which_nothing_shows_the_way_is_privileged():
    assert [number for number, level in LEVELS.items() if level.is_privileged] == [3]


def test_a_fifth_of_the_presses_is_replaced_by_another_button():
    rng = random.Random(0)
    pressed = Counter(replace_press("up", noise=0.2, rng=rng) for _ in range(20_000))
    assert 0.19 < 1 - pressed["up"] / 20_000 < 0.21
    assert set(pressed) == set(BUTTONS)
    assert replace_press("up", noise=0.0, rng=rng) == "up"


def test_a_noisy_recording_corrects_exactly_the_replaced_presses(tmp_path):
    [decisions] = record_sessions(tmp_path, num_sessions=1, seed=0, num_turns=200, level=4, noise=0.2)
    [session] = sessions_of(tmp_path)
    labels, num_replaced = [], 0
    for turn in session["turns"]:
        parsed = turn["ai_analysis"]["parsed_json"]
        if parsed is None or "button_presses" not in parsed:
            assert "correction" not in turn
            continue
        [pressed], [expert] = turn["button_presses"], parsed["button_presses"]
        assert turn.get("correction") == (None if pressed == expert else {"button": expert, "by": "expert"})
        labels.append(expert)
        num_replaced += pressed != expert
    assert labels == decisions
    assert 20 < num_replaced < 60


def test_without_a_trail_no_floor_is_marked():
    world = ToyWorld(0, level=3)
    while not world.is_done:
        assert (248, 232, 40) not in {colour for _, colour in world.render().getcolors(240 * 160)}
        world.press(world.expert_button())


def test_the_same_seed_records_the_same_bytes(tmp_path):
    contents = []
    for name in ("one", "two"):
        record_sessions(tmp_path / name, num_sessions=5, seed=7, num_turns=12)
        files = sorted(path for path in (tmp_path / name).rglob("*") if path.is_file())
        contents.append([(str(path.relative_to(tmp_path / name)), path.read_bytes()) for path in files])
    assert contents[0] == contents[1]
    assert len(contents[0]) == 5 * (1 + 2 * 12)


def test_every_button_has_its_share_of_the_decisions(recording):
    counts = Counter(button for buttons in recording[1] for button in buttons)
    assert set(counts) == set(BUTTONS)
    assert min(counts.values()) / counts.total() >= 0.05


def test_no_guess_without_a_picture_is_right_half_of_the_time(recording):
    accuracies = blind_accuracies(recording[1])
    assert max(accuracies.values()) < 0.55
    assert accuracies["repeat_previous"] <= 0.35


def test_blind_accuracies_of_two_short_sessions():
    accuracies = blind_accuracies([["up", "up", "a"], ["up", "a", "b"]])
    assert accuracies == {"majority": 3 / 6, "repeat_previous": 1 / 6, "markov": 5 / 6}


def test_sessions_have_the_keys_and_files_of_eevee_v1(recording):
    folder, _ = recording
    session_dir = folder / "runs" / "session_20250205_080000"
    session = json.loads((session_dir / "session_data.json").read_text())
    assert list(session) == ["session_metadata", "session_id", "goal", "start_time", "turns", "enhanced_turns"]
    assert list(session["session_metadata"]) == [
        "session_id",
        "goal",
        "start_time",
        "status",
        "total_turns",
        "successful_turns",
        "fine_tuning_eligible",
    ]
    assert (session["session_id"], session["start_time"]) == ("20250205_080000", "2025-02-05T08:00:00")
    turn = session["turns"][0]
    assert list(turn) == [
        "turn",
        "timestamp",
        "ai_analysis",
        "button_presses",
        "action_result",
        "screenshot_path",
        "execution_time",
        "template_used",
        "template_version",
        "visual_analysis",
        "strategic_context",
        "memory_context",
    ]
    assert list(turn["ai_analysis"]) == ["parsed_json", "raw_text", "parsing_success"]
    assert list(turn["ai_analysis"]["parsed_json"]) == [
        "button_presses",
        "reasoning",
        "observations",
        "context_detected",
        "confidence",
    ]
    assert turn["button_presses"] == turn["ai_analysis"]["parsed_json"]["button_presses"]
    assert (turn["turn"], turn["timestamp"], turn["screenshot_path"]) == (1, "2025-02-05T08:00:03", "screenshot_1.png")
    with Image.open(session_dir / "sshots" / "step_0001_grid.png") as picture:
        assert (picture.mode, picture.size) == ("RGB", (240, 160))
    assert (session_dir / "step_0025_visual_analysis.txt").is_file()


def test_recorded_buttons_can_be_read_off_the_recorded_frames(recording):
    folder, decisions = recording
    seen = []
    for session_dir in sorted(folder.glob("runs/session_*")):
        for turn in json.loads((session_dir / "session_data.json").read_text())["turns"]:
            parsed = turn["ai_analysis"]["parsed_json"]
            if parsed is not None and "button_presses" in parsed:
                with Image.open(session_dir / "sshots" / f"step_{turn['turn']:04d}_grid.png") as picture:
                    assert [read_button(picture)] == turn["button_presses"]
                seen += turn["button_presses"]
    assert seen == [button for buttons in decisions for button in buttons]


def test_some_turns_hold_no_decision_as_in_real_recordings(recording):
    turns = [turn for session in sessions_of(recording[0]) for turn in session["turns"]]
    failed = [turn for turn in turns if not turn["ai_analysis"]["parsing_success"]]
    found_path = [turn for turn in turns if "pathfinding_action" in (turn["ai_analysis"]["parsed_json"] or {})]
    assert 0.01 < (len(failed) + len(found_path)) / len(turns) < 0.06
    assert {tuple(turn["button_presses"]) for turn in failed} == {("b",)}
    assert {turn["ai_analysis"]["raw_text"][:10] for turn in failed} == {"I would fo", "API Error:"}
    assert {tuple(turn["button_presses"]) for turn in found_path} == {()}


def test_every_fourth_session_holds_its_raw_frames(recording):
    sessions = sessions_of(recording[0])
    assert [len(session["enhanced_turns"]) for session in sessions] == [0, 0, 0, 25] * 10
    raw = base64.b64decode(sessions[3]["enhanced_turns"][0]["screenshot_base64"])
    assert Image.open(io.BytesIO(raw)).size == (240, 160)


def test_the_toy_game_loads_no_torch():
    code = "import sys, pokegemma.play.toy.recorder; print('torch' in sys.modules)"
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert answer.stdout == "False\n"
