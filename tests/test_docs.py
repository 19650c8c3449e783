"""README.md and the pages of docs/: their commands, flags, variables, files and links exist."""

import functools
import importlib
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from accelerate.commands.launch import launch_command_parser
from PIL import Image

from docs import make_options, make_picture
from pokegemma.errors import CheckFailedError
from pokegemma.play.players import ButtonChoice
from pokegemma.provenance import PROJECT_ROOT

DOCS = sorted((PROJECT_ROOT / "docs").glob("*.md"))
PAGES = [
    PROJECT_ROOT / "README.md",
    *DOCS,
    *(
        path
        for folder in ("docs/tutorials", "training_data", "benchmarks", "findings")
        for path in sorted((PROJECT_ROOT / folder).glob("*.md"))
    ),
]
SCRIPTS = sorted(path.stem for path in (PROJECT_ROOT / "scripts").glob("*.py"))
VARIABLES = re.findall(r"^(\w+)=", (PROJECT_ROOT / ".env.example").read_text(encoding="utf-8"), re.MULTILINE)
OTHER_PROGRAMS = {"source", "kill", "ruff", "hf", "pip", "jupyter"}
OTHER_FLAGS = {
    "--shm-size",
    "--logdir",
    "--no-skip-online",
    "--local-dir",
    "--backend-store-uri",
    "--api-key",
    "--depth",
}
OTHER_FLAGS |= {
    "--disable-chunked-mm-input",
    "--mmproj",
    "--requeue",
    "--signal",
    "--file",
    "--config",
    "--tensor-parallel-size",
}
OTHER_FLAGS |= {"--no-deps", "--only-binary", "--python-version", "--platform", "--dest", "--wheel-dir"}  # of pip
by_page = pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(PROJECT_ROOT)))


WITHOUT_MAIN = (
    "benchmarks/decision_cost.py",
    "benchmarks/made_model.py",
    "benchmarks/steps.py",
    "benchmarks/play_path.py",
)
"""Modules that a benchmark imports."""


def read(path: Path | str) -> str:
    return (PROJECT_ROOT / path).read_text(encoding="utf-8")


# --- commands


def commands_of(text: str) -> Iterator[list[str]]:
    """Yield the words of the commands in sh blocks, and of those in `code` that begin with one of our programs."""
    blocks = re.findall(r"^ *```sh\n(.*?)^ *```", text, re.MULTILINE | re.DOTALL)
    inline = re.findall(
        r"`((?:python )?(?:scripts|benchmarks|docs)/\w+\.py [^`]*|(?:\.|benchmarks)/\w+\.sh[^`]*)`", text
    )
    for line in "\n".join([*blocks, *inline]).replace("\\\n", " ").splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars="&|;")
        lexer.whitespace_split, words = True, []
        for word in [*lexer, ";"]:
            if not set(word) <= set("&|;"):
                words.append(word)
            elif words:
                yield words
                words = []


@functools.cache
def flags_of(program: str) -> frozenset[str]:
    """Return the flags that one of our programs knows."""
    if program in ("./train_gemma3.sh", "./train_gemma3n.sh", "training_configs/slurm.sbatch"):
        return flags_of("scripts/sft_pokemon_gemma3.py")
    if program == "benchmarks/on_gpu.sh":
        return flags_of("benchmarks/on_gpu.py")
    if program == "./train_battles.sh":
        return flags_of("scripts/sft_battles.py")
    if program == "scripts/model_registry.py":
        from scripts.model_registry import COMMANDS

        parsers = [make_options.parser_of("scripts.model_registry", name) for name in COMMANDS]
    elif program.endswith(".py"):
        parsers = [make_options.parser_of(program.removesuffix(".py").replace("/", "."))]
    else:
        return frozenset(re.findall(r"(?<![\w-])--[a-z][\w-]*", read(program)))
    flags = {flag for parser in parsers for action in parser._actions for flag in action.option_strings}
    return frozenset({*flags, "--config"})  # which TRL's parser reads before its other options


@functools.cache
def launch_flags() -> frozenset[str]:
    """Return the flags of `accelerate launch`."""
    return frozenset(flag for action in launch_command_parser()._actions for flag in action.option_strings)


def wrong_words(words: list[str]) -> list[str]:
    """Return what does not exist in a command: its program, flags, variables, accelerate configs."""
    ours = re.compile(r"^(\.|benchmarks)/\w+\.sh$|\.sbatch$|^(scripts|benchmarks|docs)/.*\.py$")
    at = next((number for number, word in enumerate(words) if ours.search(word)), None)
    if at is None:
        known = words[0] in OTHER_PROGRAMS or words[:3] == ["python", "-m", "pytest"]
        return [] if known else [words[0]]
    program = words[at]
    if not (PROJECT_ROOT / program).is_file():
        return [program]
    settings = [word.partition("=")[0] for word in words[:at] if re.match(r"[A-Z_]+=", word)]
    readers = read("init.sh") + read(program)
    wrong = [name for name in settings if name not in VARIABLES and not re.search(rf"\b{name}\b", readers)]
    wrong += [word for word in words if word.startswith("accelerate_configs/") and not (PROJECT_ROOT / word).is_file()]
    for part, known in ((words[:at], launch_flags()), (words[at + 1 :], flags_of(program))):
        wrong += [flag for word in part if (flag := word.partition("=")[0]).startswith("--") and flag not in known]
    return wrong


@by_page
def test_commands_exist(page: Path) -> None:
    wrong = {" ".join(words): found for words in commands_of(read(page)) if (found := wrong_words(words))}
    assert wrong == {}


@pytest.mark.parametrize(
    ("command", "wrong"),
    [
        ("python scripts/serve.py --engine mlx --modelpath x", "--modelpath"),
        ("python scripts/server.py --engine mlx", "scripts/server.py"),
        ("./train_gemma3.sh --lora_rank 8", "--lora_rank"),
        ("PYTHON=python3 benchmarks/on_gpu.sh --wheel wheels", "--wheel"),
        ("./init.sh && ./init.sh --extra gguf", "--extra"),
        ("BATCHSIZE=2 ./train_gemma3.sh", "BATCHSIZE"),
        ("accelerate launch --num_gpus 2 scripts/sft_pokemon_gemma3.py", "--num_gpus"),
        (
            "accelerate launch --config_file accelerate_configs/two.yaml scripts/evaluate.py",
            "accelerate_configs/two.yaml",
        ),
        ("python scripts/model_registry.py promote 1 --as champion", "--as"),
        ("pyhton scripts/x.py | tee log", "tee"),
    ],
)
def test_a_wrong_command_is_found(command: str, wrong: str) -> None:
    found = [word for words in commands_of(f"```sh\n{command}\n```\n") for word in wrong_words(words)]
    assert wrong in found
    assert [word for words in commands_of(f"see `{command}`") for word in wrong_words(words)] in ([], found)


def test_other_shell_blocks_name_no_program_of_ours() -> None:
    blocks = [block for page in PAGES for block in re.findall(r"```bash\n(.*?)```", read(page), re.DOTALL)]
    assert [block for block in blocks if re.search(r"\.py|\.sh", block)] == []


@by_page
def test_imports_of_python_blocks_exist(page: Path) -> None:
    code = "\n".join(re.findall(r"```python\n(.*?)```", read(page), re.DOTALL))
    for module, names in re.findall(r"^from (pokegemma\S+) import (.+)$", code, re.MULTILINE):
        assert [name for name in names.split(", ") if not hasattr(importlib.import_module(module), name)] == []


# --- names in the text


@by_page
def test_flags_in_the_text_exist(page: Path) -> None:
    ours = (*(f"scripts/{name}.py" for name in SCRIPTS), "./init.sh", "docs/make_picture.py", "docs/make_notebooks.py")
    ours += tuple(str(path.relative_to(PROJECT_ROOT)) for path in (PROJECT_ROOT / "benchmarks").glob("*.py"))
    known = launch_flags().union(OTHER_FLAGS, *(flags_of(name) for name in ours if name not in WITHOUT_MAIN))
    assert set(re.findall(r"(?<![\w-])--[A-Za-z][\w-]*", read(page))) - known == set()


@by_page
def test_files_in_the_text_exist(page: Path) -> None:
    folders = "pokegemma|tests|scripts|findings|benchmarks|docs|accelerate_configs|training_configs"
    named = re.findall(rf"(?<![\w/.-])(?:{folders})/[\w./]*\w", read(page))
    assert [name for name in named if not (PROJECT_ROOT / name).exists()] == []


@by_page
def test_variables_in_the_text_exist(page: Path) -> None:
    suffixes = (".py", ".sh", ".yaml", ".sbatch", ".example")
    folders = ("pokegemma", "scripts", "benchmarks", "training_configs", "accelerate_configs", ".")
    files = [path for folder in folders for path in (PROJECT_ROOT / folder).glob("*" if folder == "." else "**/*")]
    code = "".join(path.read_text(encoding="utf-8") for path in files if path.suffix in suffixes)
    named = set(re.findall(r"(?<![\w{])[A-Z]+_[A-Z_]+(?!\w)", read(page))) - {"RAY_AUTH_MODE", "Z_RLE"}
    assert [name for name in sorted(named) if not re.search(rf"\b{name}\b", code)] == []


def test_every_script_is_described() -> None:
    text = "".join(map(read, DOCS))
    assert [name for name in SCRIPTS if f"scripts/{name}.py" not in text] == []


def test_options_page_is_up_to_date() -> None:
    assert sorted(make_options.SCRIPTS) == SCRIPTS
    page = read("docs/options.md")
    assert make_options.write_page(page) == page, "run: python docs/make_options.py"
    assert [name for name in VARIABLES if f"`{name}`" not in page] == []


# --- shape and links


def test_readme_is_a_first_page() -> None:
    lines = read("README.md").splitlines()
    assert len(lines) <= 80
    assert {"./train_gemma3.sh", "./init.sh"} <= {words[0] for words in commands_of("\n".join(lines))}


@pytest.mark.parametrize("page", DOCS, ids=lambda path: path.name)
def test_a_page_opens_with_a_command(page: Path) -> None:
    assert re.match(r"# .+\n\n```sh\n", read(page))


def anchors_of(text: str) -> set[str]:
    """Return the anchors that GitHub gives to the headings of a page."""
    headings = re.findall(r"^#+ +(.*)$", re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def dead_links(page: Path, text: str) -> list[str]:
    """Return the links of a page, with that text, whose file or anchor does not exist."""
    dead = []
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        target, _, anchor = link.partition("#")
        file = page.parent / target if target else page
        if "://" in link or (file.exists() and not anchor):
            continue
        if not file.is_file() or anchor not in anchors_of(text if file == page else read(file)):
            dead.append(link)
    return dead


@by_page
def test_links_are_alive(page: Path) -> None:
    assert dead_links(page, read(page)) == []


@pytest.mark.parametrize("link", ["docs/dta.md", "docs/data.md#samples", "#nothing", "docs/toy.gif"])
def test_a_dead_link_is_found(link: str) -> None:
    assert dead_links(PROJECT_ROOT / "README.md", f"# Page\n\n[a](docs/data.md#a-sample) [b](#page) ![c]({link})") == [
        link
    ]


# --- the picture of README.md


def test_the_picture_colours_the_pressed_button() -> None:
    probabilities = np.array([0.7, 0.3, 0, 0, 0, 0, 0, 0])
    picture = make_picture.draw_turn(Image.new("RGB", (240, 160), "blue"), ButtonChoice("up", probabilities))
    colours = {colour: count for count, colour in picture.getcolors(100_000)}
    assert picture.size == (720, 320)
    assert colours[0, 0, 255] == 480 * 320
    assert colours[make_picture.CHOSEN] > colours[make_picture.BAR] > 0


def test_a_model_that_does_not_leave_the_room_makes_no_picture(tiny_model: Path) -> None:
    pytest.importorskip("stable_retro", reason="needs stable-retro (./init.sh --with play)")
    options = make_picture.PictureOptions(model_path=str(tiny_model), num_turns=2)
    with pytest.raises(CheckFailedError, match="2 turns"):
        make_picture.play(options)


def test_the_picture_shows_what_moves_between_two_screens() -> None:
    colours = [1] * 9 + list(range(2, 18)) + [17] * 4
    film = [Image.new("RGB", (2, 2), (colour, 0, 0)) for colour in colours]
    assert [frame.getpixel((0, 0))[0] for frame in make_picture.moving(film)] == [9]
    assert make_picture.moving(film[:9]) == []


def test_the_picture_is_small() -> None:
    assert (PROJECT_ROOT / "docs" / "toy_game.gif").stat().st_size < 600 * 1024
