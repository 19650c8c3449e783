"""Options from defaults, YAML and flags; errors as one line and an exit code."""

import errno
import os
import signal
import subprocess
import sys
import textwrap
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest
import torch
from torch.utils.data import DataLoader
from tqdm import tqdm

from pokegemma.cli import parse_options, run
from pokegemma.errors import CheckFailedError, PokegemmaError


@dataclass
class Options:
    size: int = 3
    layout: Literal["grid", "frames"] = "grid"
    shuffle: bool = field(default=True)
    rate: float = 0.5
    sizes: list[int] = field(default_factory=lambda: [1, 2], metadata={"choices": [1, 2, 4]})


def parse(*arguments: str) -> Options:
    return parse_options(Options, description="", argv=arguments)[0]


def write_yaml(folder: Path, text: str) -> str:
    (folder / "options.yaml").write_text(text)
    return str(folder / "options.yaml")


def test_each_value_of_a_list_is_one_of_the_choices(tmp_path: Path) -> None:
    assert parse().sizes == [1, 2]
    assert parse("--config", write_yaml(tmp_path, "sizes: [4, 1]")).sizes == [4, 1]
    with pytest.raises(PokegemmaError, match="--sizes: 3 is not one of 1, 2, 4"):
        parse("--config", write_yaml(tmp_path, "sizes: [4, 3]"))


def test_a_flag_wins_over_the_file_and_the_file_over_the_default(tmp_path: Path) -> None:
    path = write_yaml(tmp_path, "size: 5\nrate: 1e-4\n")
    assert parse("--config", path, "--size", "7") == Options(size=7, rate=1e-4)


def test_config_may_be_written_with_an_equals_sign(tmp_path: Path) -> None:
    assert parse(f"--config={write_yaml(tmp_path, 'size: 5')}") == Options(size=5)


def test_a_bool_that_defaults_to_true_has_a_flag_for_false() -> None:
    assert parse("--no_shuffle") == Options(shuffle=False)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--size", "many"), "invalid int value: 'many'"),
        (("--layout", "round"), "invalid choice: 'round'"),
        (("--nosuch", "1"), r"unknown options: \['--nosuch', '1'\]"),
        (("--config",), "--config needs the path of a YAML file"),
        (("--config", "nowhere.yaml"), r"No such file or directory: 'nowhere\.yaml'"),
    ],
)
def test_mistakes_in_arguments_are_one_line(arguments: tuple[str, ...], message: str) -> None:
    with pytest.raises(PokegemmaError, match=message) as caught:
        parse(*arguments)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [("layout: round", "--layout: 'round' is not one of grid, frames"), ("nosuch: 1", "nosuch"), ("a: [", "parsing")],
)
def test_mistakes_in_the_file_are_one_line(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(PokegemmaError, match=message) as caught:
        parse("--config", write_yaml(tmp_path, text))
    assert "\n" not in str(caught.value)


def fail(error: BaseException) -> None:
    raise error


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (PokegemmaError("what and where"), 2, "error: what and where\n"),
        (CheckFailedError("too low"), 1, "error: too low\n"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
        (
            RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. "),
            2,
            "error: DataLoader worker (pid 7) is killed by signal: Killed. (out of memory?); "
            "use fewer data loader workers or a smaller batch\n",
        ),
        (
            torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 2 GiB"),
            2,
            "error: not enough memory (CUDA out of memory. Tried to allocate 2 GiB); use a smaller batch\n",
        ),
        (
            OSError(errno.ENOSPC, "No space left on device", "x.json"),
            2,
            "error: x.json could not be written, the disk is full; free some space, then repeat\n",
        ),
    ],
)
def test_errors_become_one_line_and_a_status(
    error: BaseException, status: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        run(lambda: fail(error))
    assert (caught.value.code, capsys.readouterr().err) == (status, message)


def kill_this_process(items: list[int]) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_killed_data_loader_worker_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        run(lambda: list(DataLoader(range(4), num_workers=1, collate_fn=kill_this_process)))
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: DataLoader worker (pid")
    assert error.count("\n") == 1


@pytest.mark.parametrize(("returned", "status"), [(None, 0), (0, 0), (1, 1)])
def test_what_main_returns_is_the_status(returned: int | None, status: int) -> None:
    with pytest.raises(SystemExit) as caught:
        run(lambda: returned)
    assert caught.value.code == status


@pytest.mark.parametrize("error", [ZeroDivisionError(), RuntimeError("shapes differ"), FileNotFoundError(2, "none")])
def test_a_bug_keeps_its_traceback(error: Exception) -> None:
    with pytest.raises(type(error)):
        run(lambda: fail(error))


def test_an_error_does_not_share_a_line_with_a_progress_bar(capsys: pytest.CaptureFixture[str]) -> None:
    def main() -> None:
        bar = tqdm(total=3, file=sys.stderr)
        bar.update()
        raise PokegemmaError("stopped")

    with pytest.raises(SystemExit):
        run(main)
    assert capsys.readouterr().err.endswith("\nerror: stopped\n")


def test_what_was_imported_is_left_out_of_collections_and_main_is_collected_as_usual() -> None:
    code = """
        import gc
        usual = gc.get_threshold()
        from pokegemma.cli import run
        assert gc.get_threshold() > usual
        run(lambda: print(gc.get_threshold() == usual, gc.get_freeze_count() > 10_000))
    """
    printed = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=False)
    assert printed.stdout == "True True\n", printed.stderr
