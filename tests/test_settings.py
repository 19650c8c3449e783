"""Writing settings into .env: all other bytes stay."""

from pathlib import Path

import pytest

from pokegemma.errors import PokegemmaError
from pokegemma.provenance import PROJECT_ROOT
from pokegemma.settings import check_settings, read_api_key, read_settings, write_settings

VALUES = {"BATCH_SIZE": "8", "GRAD_ACCUM": "2"}


def test_settings_are_written_and_read_back_and_other_lines_are_kept(tmp_path: Path) -> None:
    path = tmp_path / ".env"
    before = (PROJECT_ROOT / ".env.example").read_text(encoding="utf-8").splitlines()
    path.write_bytes((PROJECT_ROOT / ".env.example").read_bytes())
    write_settings(path, VALUES)
    after = path.read_text(encoding="utf-8").splitlines()
    changed = [(old, new) for old, new in zip(before, after, strict=True) if old != new]
    assert [new.split()[0] for _, new in changed] == ["BATCH_SIZE=8", "GRAD_ACCUM=2"]
    assert [new.partition("#")[2] for _, new in changed] == [old.partition("#")[2] for old, _ in changed]
    assert read_settings(path, {}) == VALUES


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("", "BATCH_SIZE=8\nGRAD_ACCUM=2\n"),
        ("A=1", "A=1\nBATCH_SIZE=8\nGRAD_ACCUM=2\n"),
        ("GRAD_ACCUM=1\nA='x # y'\n", "GRAD_ACCUM=2\nA='x # y'\nBATCH_SIZE=8\n"),
        ("BATCH_SIZE=4 # four\nGRAD_ACCUM=\n", "BATCH_SIZE=8 # four\nGRAD_ACCUM=2\n"),
        (
            "\n\nexport BATCH_SIZE = '4'  # a # b\n\nGRAD_ACCUM=\"1\"",
            "\n\nexport BATCH_SIZE =8  # a # b\n\nGRAD_ACCUM=2",
        ),
        ("BATCH_SIZE='1 # x' # four\nGRAD_ACCUM=1\n", "BATCH_SIZE=8 # four\nGRAD_ACCUM=2\n"),
        ("BATCH_SIZE='1 # x'# four\nGRAD_ACCUM=1\n", "BATCH_SIZE=8\nGRAD_ACCUM=2\n"),
        ("A=1\r\nBATCH_SIZE=4\r\n", "A=1\r\nBATCH_SIZE=8\r\nGRAD_ACCUM=2\r\n"),
        ("BATCH_SIZE=1\nGRAD_ACCUM=3\nBATCH_SIZE=2\n", "BATCH_SIZE=8\nGRAD_ACCUM=2\nBATCH_SIZE=8\n"),
        ("# BATCH_SIZE=1\nMY_BATCH_SIZE=3\n", "# BATCH_SIZE=1\nMY_BATCH_SIZE=3\nBATCH_SIZE=8\nGRAD_ACCUM=2\n"),
        ('A="two\nBATCH_SIZE=1\n"\n', 'A="two\nBATCH_SIZE=1\n"\nBATCH_SIZE=8\nGRAD_ACCUM=2\n'),
        ("\ufeffBATCH_SIZE=1\nÄ_B=ü\n", "\ufeffBATCH_SIZE=8\nÄ_B=ü\nGRAD_ACCUM=2\n"),
    ],
)
def test_only_the_values_change(before: str, after: str, tmp_path: Path) -> None:
    path = tmp_path / ".env"
    path.write_bytes(before.encode())
    write_settings(path, VALUES)
    assert path.read_bytes().decode() == after
    assert {name: read_settings(path, {})[name] for name in VALUES} == VALUES
    write_settings(path, VALUES)
    assert path.read_bytes().decode() == after


def test_the_mode_of_the_file_stays_and_a_new_one_is_for_its_owner_alone(tmp_path: Path) -> None:
    old, new = tmp_path / "old", tmp_path / "new"
    old.touch(mode=0o640)
    for path in (old, new):
        write_settings(path, VALUES)
    assert [path.stat().st_mode & 0o777 for path in (old, new)] == [0o640, 0o600]


def test_a_link_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "real").write_text("A=1\n")
    (tmp_path / ".env").symlink_to("real")
    write_settings(tmp_path / ".env", VALUES)
    assert (tmp_path / ".env").is_symlink()
    assert (tmp_path / "real").read_text() == "A=1\nBATCH_SIZE=8\nGRAD_ACCUM=2\n"


def test_a_line_that_is_not_a_setting_is_refused_and_left_alone(tmp_path: Path) -> None:
    path = tmp_path / ".env"
    path.write_text("A=1\nsecret\n")
    with pytest.raises(PokegemmaError, match=r"\.env:2: ") as caught:
        write_settings(path, VALUES)
    assert "secret" not in str(caught.value)
    assert path.read_text() == "A=1\nsecret\n"


def test_a_folder_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PokegemmaError, match="cannot be written"):
        check_settings(tmp_path / "missing" / ".env")
    with pytest.raises(PokegemmaError, match="cannot be"):
        check_settings(tmp_path)


def test_an_api_key_is_read_from_the_variable_that_an_option_names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SERVER_KEY", "hidden")
    assert read_api_key("--api_key_env", "SERVER_KEY") == "hidden"
    assert read_api_key("--api_key_env", None) is None
    monkeypatch.setenv("SERVER_KEY", "")
    with pytest.raises(PokegemmaError, match=r"^--api_key_env SERVER_KEY: "):
        read_api_key("--api_key_env", "SERVER_KEY")
