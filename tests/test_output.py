"""One run at a time, told apart by name, and failures of the machine in words."""

from __future__ import annotations

import errno
import json
import os
import resource
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from mlpmem_eval.folder import report_folder
from mlpmem_rag.artifact import MANIFEST, WORK
from mlpmem_rag.errors import ConfigError, OutputError, ResourceError
from mlpmem_rag.lock import LOCK, OWNER, read_owner
from mlpmem_rag.output import KIND, output_folder
from mlpmem_rag.storage import allocate_array, replace_file, save_array, write_json

HOLDER = """
import sys
from collections.abc import Callable
from pathlib import Path
from mlpmem_rag.output import output_folder
with output_folder(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "memory"


def hold(out: Path) -> subprocess.Popen[str]:
    """Another process that holds the lock until its stdin ends."""
    command = [sys.executable, "-c", HOLDER, str(out)]
    process = subprocess.Popen(command, stdin=-1, stdout=-1, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


# Who writes.


def test_a_second_run_is_refused_with_the_name_of_the_first_until_that_is_killed(
    out: Path,
) -> None:
    with hold(out) as holder:
        owner = read_owner(out / WORK)
        assert owner is not None
        assert (owner.pid, owner.host) == (holder.pid, socket.gethostname())
        said = rf"process {holder.pid} on {owner.host}, since {owner.since[:19]}.*; wait for it"
        with pytest.raises(OutputError, match=said.replace("+", r"\+")), output_folder(out):
            pass
        assert read_owner(out / WORK) == owner
        holder.send_signal(signal.SIGKILL)
        holder.wait()
        assert read_owner(out / WORK) == owner, "it had no time to take its name away"
        with output_folder(out) as work:
            new = read_owner(work)
            assert new is not None
            assert new.pid == os.getpid()
        assert read_owner(out / WORK) is None


def test_a_lock_held_on_another_machine_can_be_mended(
    out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(socket, "gethostname", lambda: "elsewhere")
        with output_folder(out):
            patch.undo()
            said = rf"on elsewhere, .* no longer runs it, delete {out / WORK / LOCK}"
            with pytest.raises(OutputError, match=said), output_folder(out):
                pass


@pytest.mark.parametrize("note", ["", "{}", "[]", '{"pid": 1}'])
def test_a_lock_without_a_readable_name_is_one_too(out: Path, note: str) -> None:
    with output_folder(out) as work:
        (work / OWNER).write_text(note)
        with pytest.raises(OutputError, match="another run is writing"), output_folder(out):
            pass


def test_a_run_that_ended_before_it_had_begun_can_be_repeated(out: Path) -> None:
    (out / WORK).mkdir(parents=True)
    with output_folder(out) as work:
        assert (work / LOCK).is_file()


def test_a_work_folder_with_something_in_it_is_someone_elses(out: Path) -> None:
    (out / WORK / "thesis").mkdir(parents=True)
    with pytest.raises(OutputError, match=r"holds no memory \(work\)"), output_folder(out):
        pass


def test_a_folder_stays_of_the_kind_that_it_is(out: Path) -> None:
    with output_folder(out):
        pass
    with output_folder(out):  # a memory whose training is to go on
        pass
    with (
        pytest.raises(OutputError, match=r"is the folder of a memory, not of a comparison"),
        report_folder(out),
    ):
        pass


# What the machine fails at.


def allocate_too_much() -> None:
    torch.empty(1 << 60, dtype=torch.uint8)


@pytest.mark.parametrize(
    "failure",
    [
        allocate_too_much,
        lambda: bytearray(1 << 62),
        lambda: os.read(os.open(__file__, os.O_RDONLY), 1 << 62),
    ],
    ids=["torch", "python", "system"],
)
def test_too_little_memory_is_told_with_what_is_kept(
    out: Path, failure: Callable[[], object]
) -> None:
    said = rf"out of memory \(.+\); finished stages are kept in {out / WORK}.*--size"
    with pytest.raises(ResourceError, match=said), output_folder(out):
        failure()


@pytest.mark.parametrize(
    ("number", "kind", "said"),
    [
        (errno.ENOSPC, ResourceError, "the disk of .* is full; .* Free some space and run the"),
        (errno.EDQUOT, ResourceError, "the disk of .* is full"),
        (errno.EROFS, OutputError, r"no longer be written \(Read-only.* Make it writable and run"),
        (errno.EACCES, OutputError, r"no longer be written \(Permission denied\)"),
        (errno.EIO, ResourceError, r"no longer be written \(Input/output.* Check the disk and run"),
    ],
)
@pytest.mark.parametrize("named", [False, True])
def test_a_failing_disk_is_told_with_what_is_kept(
    out: Path, number: int, kind: type[Exception], said: str, named: bool
) -> None:
    failing = str(out / WORK / "keys.npy") if named else None
    with pytest.raises(kind, match=said) as caught, output_folder(out):
        raise OSError(number, os.strerror(number), failing)
    assert f"kept in {out / WORK}" in str(caught.value)
    assert str(out / WORK / "keys.npy") in str(caught.value) or not named or "full" in said


@pytest.mark.parametrize(
    "failure",
    [
        OSError(errno.EACCES, "Permission denied", "/elsewhere"),
        OSError(errno.ENOENT, "No such file", None),
        RuntimeError("the power is gone"),
        ConfigError("wrong"),
    ],
)
def test_other_failures_stay_what_they_are(out: Path, failure: Exception) -> None:
    with pytest.raises(type(failure)) as caught, output_folder(out):
        raise failure
    assert caught.value is failure


WRITERS: dict[str, Callable[[Path], object]] = {
    "json": lambda path: write_json(path, {"text": "x" * 300_000}),
    "array": lambda path: save_array(path, torch.zeros(300_000).numpy()),
    "allocation": lambda path: allocate_array(path, "f4", (300_000,)),
    "tensors": lambda path: replace_file(path, save_zeros),
}


def save_zeros(path: Path) -> None:
    from safetensors.torch import save_file

    save_file({"x": torch.zeros(300_000)}, path)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="limits are set in a process of its own")
@pytest.mark.parametrize("name", WRITERS)
def test_a_quota_that_is_reached_is_a_full_disk_and_keeps_the_file_before(
    out: Path, name: str
) -> None:
    """The kernel refuses to write beyond the first 200 kB of a file."""
    out.mkdir()
    (out / MANIFEST).write_text("before")
    pid = os.fork()
    if pid == 0:
        try:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
            with output_folder(out):
                WRITERS[name](out / MANIFEST if name != "allocation" else out / "keys.npy")
        except ResourceError as error:
            os._exit(42 if "is full; finished stages are kept in" in str(error) else 43)
        except BaseException:
            os._exit(44)
        os._exit(45)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 42
    assert (out / MANIFEST).read_text() == "before"
    assert sorted(p.name for p in out.glob(".*")) == []


def test_a_note_that_finds_no_room_leaves_the_telling_to_others(
    out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("mlpmem_rag.lock.write_json", full)
    with output_folder(out) as work:
        assert read_owner(work) is None
    assert json.dumps(sorted(p.name for p in work.iterdir())) == json.dumps([LOCK, KIND])
