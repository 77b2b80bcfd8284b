"""What may lie where a folder is wanted."""

import pathlib

import pytest

from ssrl_jax.files import check_folder, whole


def test_folders_and_what_can_become_one_are_let_pass(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  (tmp_path / "there").mkdir()
  (tmp_path / "link").symlink_to(tmp_path / "there")
  for path in (".", "there", "there/new/er", "link/new", "new", tmp_path / "new", "/"):
    check_folder(pathlib.Path(path), "--workdir")
  assert sorted(p.name for p in tmp_path.iterdir()) == ["link", "there"]


@pytest.mark.parametrize("path", ["file", "file/a/b"])
def test_a_file_in_the_way_is_named(path, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  (tmp_path / "file").write_text("")
  message = rf"^--out={path}: (.*/)?file is a file, no folder; name a folder$"
  with pytest.raises(NotADirectoryError, match=message):
    check_folder(pathlib.Path(path), "--out")


def test_a_link_that_leads_nowhere_is_named(tmp_path):
  (tmp_path / "link").symlink_to("nowhere")
  with pytest.raises(NotADirectoryError, match="link is a link that leads nowhere, no folder"):
    check_folder(tmp_path / "link", "--workdir")


def test_what_could_not_be_written_is_named_and_leaves_nothing(tmp_path):
  (tmp_path / "there").mkdir()
  with (
    pytest.raises(OSError, match=r"Is a directory: '[^']*/there'$"),
    whole(tmp_path / "there") as partial,
  ):
    partial.write_text("x")
  with pytest.raises(ZeroDivisionError), whole(tmp_path / "file") as partial:
    partial.write_text(str(1 / 0))
  assert [p.name for p in tmp_path.iterdir()] == ["there"]
