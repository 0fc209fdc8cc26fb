"""Users lose no files: folders appear whole, replace only what dit-hub wrote, and vanish after a kill."""

import contextlib
import errno
import json
import os
import signal
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from dit_hub import DiTPipeline
from dit_hub.files import TakenError, check_free, locked, new_file, new_folder, remove_folder
from dit_hub.manifest import MANIFEST_FILE, note_written
from dit_hub.visualize import draw_samples

from .command_line import Command, dit_hub

TOY = "dit-toy-shapes"


def write(target: str | Path, text: str = "new", overwrite: bool = False) -> None:
    """A folder with a file, and one in a folder."""
    with new_folder(target, overwrite) as folder:
        (folder / "whole.txt").write_text(text)
        (folder / "deep").mkdir()
        (folder / "deep" / "whole.txt").write_text(text)


def content(folder: Path) -> dict[str, str]:
    """All files below a folder, hidden ones too, except manifests."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST_FILE)
    return {path.relative_to(folder).as_posix(): path.read_text() for path in files}


def whole(text: str) -> dict[str, str]:
    return {"whole.txt": text, "deep/whole.txt": text}


# --- Overwriting -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["precious.txt", "deep/precious.txt", ".precious", "photos/2019/precious.txt"])
def test_a_folder_with_files_of_others_is_not_replaced(tmp_path: Path, name: str) -> None:
    write(tmp_path / "out", "old")
    (file := tmp_path / "out" / name).parent.mkdir(parents=True, exist_ok=True)
    file.write_text("precious")
    before = content(tmp_path)
    with pytest.raises(ValueError, match=rf"did not write: {name}; move them or choose another folder"):
        write(tmp_path / "out", overwrite=True)
    assert content(tmp_path) == before
    file.unlink()
    write(tmp_path / "out", overwrite=True)
    assert content(tmp_path / "out") == whole("new")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_folder_that_dit_hub_did_not_make_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "e").mkdir()
    for number in range(5):
        (tmp_path / "e" / f"{number}.txt").write_text("precious")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "e" / "0.link").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match=r"\.dit-hub\.json: 0\.link, 0\.txt, 1\.txt and more; move them"):
        write(tmp_path / "e", overwrite=True)
    assert len(list((tmp_path / "e").iterdir())) == 6


def test_a_file_that_was_changed_since_is_not_lost(tmp_path: Path) -> None:
    write(tmp_path / "out", "old")
    (tmp_path / "out" / "whole.txt").write_text("my")  # like a card that a person edited
    with pytest.raises(ValueError, match=r"did not write: whole\.txt \(changed since\)"):
        write(tmp_path / "out", overwrite=True)
    (tmp_path / "out" / "whole.txt").write_text("old")
    write(tmp_path / "out", overwrite=True)


@pytest.mark.parametrize("size", [2**20 + 1, 5 * 2**20, 20 * 2**20])
def test_weights_that_were_trained_further_are_not_lost(tmp_path: Path, size: int) -> None:
    """They have the same size; and if only one table was trained, the rest is the same too."""
    with new_folder(tmp_path / "out") as folder:
        (folder / "model.safetensors").write_bytes(bytes(size))
    check_free(tmp_path / "out", overwrite=True)
    for start, changed in ((0, 1), (size // 2, size // 500), (size - 1, 1)):
        with (tmp_path / "out" / "model.safetensors").open("r+b") as file:
            file.seek(start)
            file.write(b"\1" * changed)
        with pytest.raises(ValueError, match=r"did not write: model\.safetensors \(changed since\)"):
            check_free(tmp_path / "out", overwrite=True)
        (tmp_path / "out" / "model.safetensors").write_bytes(bytes(size))


def test_a_folder_that_cannot_be_listed_is_not_taken_for_empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "out", "old")
    (private := tmp_path / "out" / "private").mkdir()
    real = os.scandir

    def scandir(path: Any = ".") -> Any:  # root, who may run this, can list every folder
        if Path(path) == private:
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(ValueError, match="did not write: private; move them"):
        write(tmp_path / "out", overwrite=True)
    assert private.is_dir()


def test_what_dit_hub_adds_later_is_its_own(tmp_path: Path) -> None:
    write(tmp_path / "out")
    for name in ("samples.png", "deep/model.cache"):
        (tmp_path / "out" / name).write_text("drawn")
        note_written(tmp_path / "out" / name)
    check_free(tmp_path / "out", overwrite=True)


def test_samples_that_a_push_draws_are_dit_hubs_own(tmp_path: Path) -> None:
    pipeline: Any = DiTPipeline.from_pretrained(TOY)
    with new_folder(tmp_path / "out") as folder:
        pipeline.save_pretrained(folder)
    draw_samples(pipeline, tmp_path / "out", force=True)
    check_free(tmp_path / "out", overwrite=True)


def test_the_embedded_model_can_be_made_anew() -> None:
    """`make toy` overwrites it; after a change by hand, its manifest must be updated."""
    check_free(Path(__file__).parents[1] / "src" / "dit_hub" / "assets" / TOY, overwrite=True)


def test_a_manifest_that_cannot_be_read_is_not_begun_anew(tmp_path: Path) -> None:
    """As while a process of an older release, or a person, writes it."""
    write(tmp_path / "out")
    manifest = tmp_path / "out" / MANIFEST_FILE
    manifest.write_text(half := manifest.read_text()[:40])
    (tmp_path / "out" / "samples.png").write_text("drawn")
    note_written(tmp_path / "out" / "samples.png")
    assert manifest.read_text() == half


def test_a_manifest_is_replaced_in_one_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Readers see the old one or the new one; a kill leaves the old one and nothing in the way."""
    write(tmp_path / "out")
    (tmp_path / "out" / "samples.png").write_text("drawn")
    before = (tmp_path / "out" / MANIFEST_FILE).read_text()

    def killed(*_: Any) -> None:
        assert (tmp_path / "out" / MANIFEST_FILE).read_text() == before
        raise SystemExit

    with monkeypatch.context() as patch:
        patch.setattr(os, "unlink", lambda _: None)  # a killed process removes nothing
        patch.setattr(os, "replace", killed)
        with pytest.raises(SystemExit):
            note_written(tmp_path / "out" / "samples.png")
    note_written(tmp_path / "out" / "samples.png")
    assert len(list((tmp_path / "out").glob(f"{MANIFEST_FILE}*"))) == 2
    write(tmp_path / "out", overwrite=True)
    assert not (tmp_path / "out" / "samples.png").exists()


@pytest.mark.parametrize(
    "arguments",
    [("convert", TOY, "e"), ("train", "toy", "--out", "e"), ("export", "onnx", TOY, "e"), ("export", "web", TOY, "e"),
     ("export", "tensorrt", TOY, "e")],
)  # fmt: skip
def test_no_command_replaces_files_of_others(tmp_path: Path, arguments: tuple[str, ...]) -> None:
    (tmp_path / "e").mkdir()
    (tmp_path / "e" / "precious.txt").touch()
    run = dit_hub(*arguments, "--overwrite", cwd=tmp_path)
    assert (run.returncode, run.stderr.count("\n")) == (2, 1), run.stderr
    assert "precious.txt; move them or choose another folder." in run.stderr
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["e", "precious.txt"]


def test_a_command_replaces_what_one_wrote(tmp_path: Path) -> None:
    for _ in range(2):
        run = dit_hub("convert", TOY, "out/", "--overwrite", cwd=tmp_path)
        assert run.returncode == 0, run.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


# --- Odd targets -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize(
    ("target", "problem"),
    [(".", "is the current folder"), ("", "is the current folder"), ("..", "holds the current folder"),
     ("../here/", "is the current folder"), ("/", "is a mount point"), ("/dev/", "is a mount point"),
     ("~", "the shell did not"), ("~/out", "the shell did not"), ("circle", "leads in a circle"),
     ("file", "is a file"), ("file/out", "is a file"), ("link-to-file", "is a file")],
)  # fmt: skip
def test_a_target_that_cannot_be_replaced_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, target: str, problem: str, overwrite: bool
) -> None:
    (here := tmp_path / "here").mkdir()
    monkeypatch.chdir(here)
    Path("circle").symlink_to("circle")
    Path("file").write_text("precious")
    Path("link-to-file").symlink_to("file")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ValueError, match=problem):
        write(target, overwrite=overwrite)
    assert sorted(tmp_path.rglob("*")) == before


def test_an_empty_current_folder_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Or a shell would be in a folder that no longer exists."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"^\. is the current folder"):
        write(".")


def test_odd_targets_at_the_command_line(tmp_path: Path) -> None:
    (tmp_path / "here").mkdir()
    for target in (".", "/", ".."):
        run = dit_hub("convert", TOY, target, "--overwrite", cwd=tmp_path / "here")
        assert (run.returncode, run.stderr.count("\n")) == (2, 1), run.stderr
    assert [path.name for path in tmp_path.rglob("*")] == ["here"]


def test_a_link_stays_and_its_folder_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    write(tmp_path / "disk" / "real", "old")
    (tmp_path / "link").symlink_to("disk/real")
    write(tmp_path / "link", overwrite=True)
    assert (tmp_path / "link").readlink() == Path("disk/real")
    assert content(tmp_path / "disk") == {f"real/{name}": text for name, text in whole("new").items()}
    (tmp_path / "link-to-new").symlink_to("disk/other")
    write(tmp_path / "link-to-new")
    assert (tmp_path / "link-to-new").is_symlink()
    assert content(tmp_path / "disk" / "other") == whole("new")


def test_an_empty_folder_is_filled(tmp_path: Path) -> None:
    for overwrite in (False, True):
        (tmp_path / f"out-{overwrite}").mkdir()
        write(f"{tmp_path}/out-{overwrite}//", overwrite=overwrite)
        assert content(tmp_path / f"out-{overwrite}") == whole("new")


# --- Meanwhile -------------------------------------------------------------------------------------------------------


def write_while_filled(target: str | Path, file: str | Path, overwrite: bool = False) -> None:
    """A folder whose name another process takes by writing a file before it is ready."""
    with new_folder(target, overwrite) as folder:
        (folder / "whole.txt").write_text("new")
        Path(file).parent.mkdir(exist_ok=True)
        Path(file).write_text("precious")


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_target_that_is_filled_meanwhile_keeps_its_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, overwrite: bool
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("out-1").write_text("also mine")
    with pytest.raises(TakenError, match=r"^out was filled meanwhile; the result is in out-2\.$") as error:
        write_while_filled("out", "out/precious.txt", overwrite)
    assert error.value.kept == tmp_path / "out-2"
    assert content(tmp_path) == {"out/precious.txt": "precious", "out-1": "also mine", "out-2/whole.txt": "new"}
    check_free("out-2", overwrite=True)


def test_a_file_that_is_added_while_overwriting_is_kept(tmp_path: Path) -> None:
    write(tmp_path / "out", "old")
    with pytest.raises(TakenError, match="was filled meanwhile"):
        write_while_filled(tmp_path / "out", tmp_path / "out" / "precious.txt", overwrite=True)
    assert content(tmp_path / "out") == {**whole("old"), "precious.txt": "precious"}
    assert content(tmp_path / "out-1") == {"whole.txt": "new"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "out-1"]


def test_a_file_in_place_of_the_target_is_kept(tmp_path: Path) -> None:
    with pytest.raises(TakenError, match="was filled meanwhile"):
        write_while_filled(tmp_path / "out", tmp_path / "out")
    assert content(tmp_path) == {"out": "precious", "out-1/whole.txt": "new"}


def test_of_many_at_once_one_gets_the_name_and_none_is_lost(tmp_path: Path) -> None:
    count = 8
    together, taken = threading.Barrier(count), []

    def make(number: int) -> None:
        try:
            with new_folder(tmp_path / "out") as folder:
                (folder / "number").write_text(str(number))
                together.wait()
        except TakenError as error:
            taken.append(error)

    threads = [threading.Thread(target=make, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(taken) == count - 1
    places = [tmp_path / "out", *(error.kept for error in taken)]
    assert sorted((place / "number").read_text() for place in places) == [str(number) for number in range(count)]
    assert sorted(tmp_path.iterdir()) == sorted(places)


def test_a_command_whose_target_is_filled_meanwhile_says_where_its_result_is(tmp_path: Path) -> None:
    command = Command("convert", TOY, "out", cwd=tmp_path)
    while command.running() and not list(tmp_path.iterdir()):
        time.sleep(0.001)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious.txt").touch()
    run = command.wait()
    assert (run.returncode, run.stderr) == (2, "error: out was filled meanwhile; the result is in out-1.\n")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["precious.txt"]
    assert (tmp_path / "out-1" / "transformer" / "model.safetensors").is_file()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "out-1"]


# --- Killed ----------------------------------------------------------------------------------------------------------


def start(script: str, cwd: Path) -> subprocess.Popen[bytes]:
    """A Python process of its own, once it has reported that it is ready."""
    script = f"import os, sys, time\nfrom dit_hub.files import locked, new_folder\nfrom pathlib import Path\n{script}"
    process = subprocess.Popen([sys.executable, "-c", script], cwd=cwd, stdout=subprocess.PIPE)
    assert process.stdout
    assert process.stdout.readline() == b"ready\n"
    return process


def kill(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    wait_for_kill(process)


def wait_for_kill(process: subprocess.Popen[bytes]) -> None:
    assert process.wait() == -signal.SIGKILL
    assert process.stdout
    process.stdout.close()


BUILDING = """
with new_folder("out") as folder:
    (folder / "half").write_text("half")
    print("ready", flush=True)
    time.sleep(600)
"""


def test_what_a_killed_process_left_goes_with_the_next_command(tmp_path: Path) -> None:
    dead, alive = start(BUILDING, tmp_path), start(BUILDING, tmp_path)
    kill(dead)
    assert len(list(tmp_path.glob(".out-*"))) == 2
    (mine := tmp_path / ".out-archived").mkdir()  # a user's folder with a similar name
    (mine / "precious.txt").touch()
    check_free(tmp_path / "out")
    left = [path for path in tmp_path.glob(".out-*") if path != mine]
    assert len(left) == 1  # that of the process that still runs
    assert (left[0] / "new" / "half").is_file()
    kill(alive)
    write(tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == [mine.name, "out"]
    assert (mine / "precious.txt").is_file()


def test_an_image_that_a_killed_process_left_goes_with_the_next_command(tmp_path: Path) -> None:
    drawing = """
from dit_hub.files import new_file
with new_file("grid.png") as file:
    file.write_text("half")
    print("ready", flush=True)
    time.sleep(600)
"""
    dead, alive = start(drawing, tmp_path), start(drawing, tmp_path)
    kill(dead)
    with new_file(tmp_path / "grid.png") as file:
        file.write_text("whole")
        assert len(list(tmp_path.glob(".grid.png-*"))) == 2  # this one, and that of the process that still runs
    kill(alive)
    write(tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["grid.png", "out"]


# Ends as soon as it has a hidden folder, before it locks it.
BEGUN = """
import signal
print("ready", flush=True)
def at_the_lock(event, arguments):
    if event == "open" and str(arguments[0]).endswith(".lock"):
        os.kill(os.getpid(), signal.SIGKILL)
sys.addaudithook(at_the_lock)
with new_folder("out"):
    pass
"""


def test_an_empty_folder_that_a_killed_process_left_goes_too(tmp_path: Path) -> None:
    wait_for_kill(start(BEGUN, tmp_path))
    (left,) = tmp_path.iterdir()
    assert not list(left.iterdir())
    check_free(tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_what_another_machine_left_on_a_shared_disk_stays(tmp_path: Path) -> None:
    kill(start(BUILDING, tmp_path))
    (lock,) = tmp_path.glob(".out-*/*.lock")
    lock.rename(lock.with_name("another-machine.lock"))
    check_free(tmp_path / "out")
    assert len(list(tmp_path.glob(".out-*"))) == 1


# Ends at the last moment: the old folder has been moved away, and the new one does not have its name yet.
BETWEEN = """
import signal
print("ready", flush=True)
def at_the_end(event, arguments):
    if event == "os.rename" and Path(arguments[0]).name == "new":
        END
sys.addaudithook(at_the_end)
with new_folder("out", overwrite=True) as folder:
    (folder / "whole.txt").write_text("new")
"""


def test_a_folder_that_was_being_replaced_comes_back(tmp_path: Path) -> None:
    write(tmp_path / "out", "old")
    wait_for_kill(start(BETWEEN.replace("END", "os.kill(os.getpid(), signal.SIGKILL)"), tmp_path))
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match="is not empty"):
        check_free(tmp_path / "out")
    assert content(tmp_path) == {f"out/{name}": text for name, text in whole("old").items()}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_ctrl_c_while_a_folder_is_being_replaced_keeps_the_old_one(tmp_path: Path) -> None:
    write(tmp_path / "out", "old")
    process = start(BETWEEN.replace("END", "raise KeyboardInterrupt"), tmp_path)
    assert process.wait() != 0
    assert content(tmp_path) == {f"out/{name}": text for name, text in whole("old").items()}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


# --- Small things ----------------------------------------------------------------------------------------------------


def test_a_folder_is_locked_for_one_process(tmp_path: Path) -> None:
    script = "with locked(Path('run'), ''):\n    Path('run/file').touch(); print('ready', flush=True); time.sleep(600)"
    process = start(script, tmp_path)
    with pytest.raises(ValueError, match="someone is at it"), locked(tmp_path / "run", "someone is at it"):
        pass
    kill(process)
    with locked(tmp_path / "run", ""), locked(tmp_path / "run", ""):
        pass
    assert (tmp_path / "run" / "file").exists()
    with locked(tmp_path / "one" / "two", ""):
        pass
    assert not (tmp_path / "one").exists()  # nothing was put in


def test_a_folder_is_removed_but_for_what_others_added(tmp_path: Path) -> None:
    for name in ("own", "shared"):
        write(tmp_path / name)
    (tmp_path / "shared" / "deep" / "precious.txt").write_text("precious")
    for name in ("own", "shared"):
        remove_folder(tmp_path / name)
    assert content(tmp_path) == {"shared/deep/precious.txt": "precious"}
    assert [path.name for path in tmp_path.iterdir()] == ["shared"]


def test_a_system_that_opens_no_folders_is_not_asked_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows opens no folders, and syncs only files opened for writing."""
    opened, synced, real_open, real_sync = {}, [], os.open, os.fsync

    def windows_open(path: Any, flags: int, *arguments: Any, **options: Any) -> int:
        if os.path.isdir(path) and not options:
            raise PermissionError(13, "Permission denied", str(path))
        descriptor = real_open(path, flags, *arguments, **options)
        opened[descriptor] = flags
        return descriptor

    def windows_sync(descriptor: int) -> None:
        assert opened[descriptor] & (os.O_RDWR | os.O_WRONLY)
        synced.append(descriptor)
        real_sync(descriptor)

    monkeypatch.setattr(os, "open", windows_open)
    monkeypatch.setattr(os, "fsync", windows_sync)
    write(tmp_path / "out")
    assert len(synced) == 3  # the manifest too
    assert content(tmp_path / "out") == whole("new")


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP, errno.ENOSPC, errno.EIO])
def test_a_disk_that_syncs_no_folders_takes_them_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """Some network disks answer so; a full or broken disk reports it here too."""
    real, asked = os.fsync, []

    def sync(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            asked.append(descriptor)
            raise OSError(number, os.strerror(number))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", sync)
    lost = number in (errno.ENOSPC, errno.EIO)
    with pytest.raises(OSError, match=r"disk is full|Input/output") if lost else contextlib.nullcontext():
        write(tmp_path / "out")
    assert asked
    assert content(tmp_path) == ({} if lost else {f"out/{name}": text for name, text in whole("new").items()})


def test_a_manifest_lists_files_by_relative_path(tmp_path: Path) -> None:
    write(tmp_path / "out")
    assert set(json.loads((tmp_path / "out" / MANIFEST_FILE).read_text())["files"]) == {"whole.txt", "deep/whole.txt"}
