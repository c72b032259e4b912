"""Files and folders appear whole or not at all, whenever the process is killed."""

import contextlib
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import tiny_model

from foundation import files
from foundation.errors import UsageError
from foundation.files import recover_folder, replacing, replacing_folder
from foundation.hub import saved
from foundation.training import checkpoints
from foundation.training.checkpoints import Checkpoint


class Killed(BaseException):
    """Stands for the end of the process."""


class Moments:
    """Counts what is done to files, and ends the process at one of these things."""

    def __init__(self, patch: pytest.MonkeyPatch, kill_at: int | None = None) -> None:
        self.count, self.kill_at, self.patch = 0, kill_at, patch
        for owner, name in (
            (Path, "mkdir"),
            (Path, "replace"),
            (Path, "write_text"),
            (shutil, "rmtree"),
            (saved, "save_file"),
            (checkpoints, "save_file"),
        ):
            self._watch(owner, name)

    def _watch(self, owner: Any, name: str) -> None:
        do = getattr(owner, name)

        def call(*given: Any, **options: Any) -> Any:
            self.count += 1
            if self.kill_at is not None and self.count > self.kill_at:
                raise Killed  # and whatever is tried after it: a dead process cleans nothing up
            return do(*given, **options)

        self.patch.setattr(owner, name, call)


def save_text(folder: Path, version: int) -> None:
    with replacing_folder(folder) as temporary:
        (temporary / "a").write_text(str(version))
        (temporary / "b").write_text(str(version))


def text_version(folder: Path) -> int:
    a, b = ((folder / name).read_text() for name in "ab")
    assert a == b
    return int(a)


def save_checkpoint(folder: Path, version: int) -> None:
    tensors = {"a": torch.full((3,), float(version))}
    checkpoints.save(folder, Checkpoint(tensors, tensors, tensors, {"step": version}))


def checkpoint_version(folder: Path) -> int:
    found = checkpoints.load(folder)
    assert all(float(tensor[0]) == found.progress["step"] for tensor in found.network.values())
    return int(found.progress["step"])


def save_model(folder: Path, version: int) -> None:
    model = tiny_model()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(version)
    saved.save_pretrained(model, folder)


def model_version(folder: Path) -> int:
    (version,) = {float(p.detach().flatten()[0]) for p in saved.load_folder(folder).parameters()}
    return int(version)


Save, Version = Callable[[Path, int], None], Callable[[Path], int]
WRITERS = {
    "text": (save_text, text_version),
    "checkpoint": (save_checkpoint, checkpoint_version),
    "model": (save_model, model_version),
}


@pytest.mark.parametrize("writer", WRITERS)
def test_a_kill_at_any_moment_leaves_a_whole_folder(writer: str, tmp_path: Path) -> None:
    save, version = WRITERS[writer]
    folder = tmp_path / "parent" / "folder"
    save(folder, 1)
    with pytest.MonkeyPatch.context() as patch:
        moments = Moments(patch)
        save(folder, 1)
    assert moments.count > 4
    seen = set()
    for moment in range(moments.count):
        with pytest.MonkeyPatch.context() as patch, contextlib.suppress(Killed):
            Moments(patch, kill_at=moment)
            save(folder, 2)
        recover_folder(folder)
        assert [path.name for path in folder.parent.iterdir()] == ["folder"]
        seen.add(version(folder))
        save(folder, 1)
    assert seen == {1, 2}


@pytest.mark.parametrize("writer", WRITERS)
def test_the_next_writer_recovers_too(writer: str, tmp_path: Path) -> None:
    save, version = WRITERS[writer]
    folder = tmp_path / "folder"
    save(folder, 1)
    folder.replace(tmp_path / ".folder.old")  # a kill between the two renames
    shutil.copytree(tmp_path / ".folder.old", tmp_path / ".folder.new")
    save(folder, 2)
    assert version(folder) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_after_an_error_the_earlier_folder_stays(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    save_text(folder, 1)
    with pytest.raises(ZeroDivisionError), replacing_folder(folder) as temporary:
        (temporary / "a").write_text("half")
        1 / 0  # noqa: B018
    assert text_version(folder) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_a_failing_rename_puts_the_earlier_folder_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "folder"
    save_text(folder, 1)
    rename = Path.replace

    def refuse_new(self: Path, target: Path) -> Path:
        if self.name.endswith(".new"):
            raise OSError("no space")
        return rename(self, target)

    monkeypatch.setattr(Path, "replace", refuse_new)
    with pytest.raises(OSError, match="no space"):
        save_text(folder, 2)
    assert text_version(folder) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_a_file_is_never_replaced_by_a_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UsageError, match="is a file, where a folder is to be written"):
        save_text(tmp_path / "file", 1)
    assert (tmp_path / "file").read_text() == "mine"


def test_a_link_to_a_folder_stays_a_link(tmp_path: Path) -> None:
    save_text(tmp_path / "real", 1)
    (tmp_path / "link").symlink_to("real")
    save_text(tmp_path / "link", 2)
    assert (tmp_path / "link").is_symlink() and text_version(tmp_path / "real") == 2
    assert {path.name for path in tmp_path.iterdir()} == {"link", "real"}


def test_recovery_leaves_others_alone(tmp_path: Path) -> None:
    save_text(tmp_path / "folder", 1)
    save_text(tmp_path / "folder2", 1)
    (tmp_path / ".folder").mkdir()
    recover_folder(tmp_path / "folder")
    recover_folder(tmp_path / "nowhere")
    assert {path.name for path in tmp_path.iterdir()} == {"folder", "folder2", ".folder"}


def test_a_file_appears_whole(tmp_path: Path) -> None:
    path = tmp_path / "new" / "a.json"
    with replacing(path) as temporary:
        temporary.write_text(json.dumps([1]))
        assert temporary.suffix == ".json" and not path.exists()
    with pytest.raises(ZeroDivisionError), replacing(path) as temporary:
        temporary.write_text("half")
        1 / 0  # noqa: B018
    assert path.read_text() == "[1]" and [p.name for p in path.parent.iterdir()] == ["a.json"]


def test_names_of_files(tmp_path: Path) -> None:
    assert (
        files.nifti_stem(Path("a/ct.NII.gz")) == "ct" and files.nifti_stem(Path("ct.nii")) == "ct"
    )
    assert files.nifti_stem(Path("ct.nrrd")) is None
    (tmp_path / "a").write_bytes(b"")
    assert files.file_sha256(tmp_path / "a").startswith("e3b0c44298fc1c14")


def test_names_that_every_system_can_have() -> None:
    for name in ("case 1", "é", "a.b", "CONTRAST", "com", ".hidden", "lpt10"):
        assert files.portable_name(name) == name
    for name, safe in {
        **{"a:b": "a_b", "what?": "what_", "x\ty": "x_y", "dot.": "dot_", "ends  ": "ends__"},
        **{"CON": "_CON", "nul": "_nul", "Com1.x": "_Com1.x", 'a<>"|*\\/b': "a_______b"},
    }.items():
        assert files.portable_name(name) == safe
        assert files.portable_name(safe) == safe


def test_lines_of_several_processes_stay_whole(tmp_path: Path) -> None:
    path = tmp_path / "lines"
    script = (
        "import sys\nfrom pathlib import Path\nfrom foundation.files import append_text\n"
        "for n in range(30): append_text(Path(sys.argv[1]), sys.argv[2] * 3000 + '\\n')\n"
    )
    running = [subprocess.Popen([sys.executable, "-c", script, str(path), each]) for each in "ab"]
    assert [process.wait() for process in running] == [0, 0]
    lines = path.read_text().splitlines()
    assert sorted(lines) == ["a" * 3000] * 30 + ["b" * 3000] * 30
