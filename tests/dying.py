"""Trainings that end by SIGKILL at a chosen moment, one forked process each.

Reads one JSON request a line: how to train, where to, and when to die. Answers with one line: how
the process ended, and what it had entered by then. Forking a process in which everything is
imported takes milliseconds, starting one takes seconds.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

from mlpmem_rag import calibrate, pipeline, schedule, training
from mlpmem_rag.config import TrainConfig
from mlpmem_rag.distill import DistillConfig
from mlpmem_rag.errors import ResourceError
from mlpmem_rag.stages import enter_stage

START, SAVE, REFUSED = "start", "save", "refused"


class Fate:
    """Counts what happens in each stage, and ends the process when its moment has come.

    `event` is the number of a Python call or return in `stage`, `rename` that of a file that is
    about to be put in place: half of it is lost, as if it had not been written to its end. Where
    the disk becomes `full` in a stage, the process ends by itself.
    """

    def __init__(self, pipe: int, when: dict[str, Any]) -> None:
        self._pipe = pipe
        self._when = when
        self._stage = START
        self._events = 0
        self._renames = 0

    def enter(self, stage: str) -> None:
        self._tell(self._stage, self._events)
        self._stage, self._events = stage, 0

    def watch(self) -> None:
        self._rename = Path.replace
        path: Any = Path
        path.replace = lambda path, target: self._on_rename(path, target)
        if self._when.keys() & {"event", "count"}:
            sys.setprofile(self._on_event)

    def fill_disk(self) -> None:
        """From now on no file may grow beyond 100 bytes, as if the disk had no room for more."""
        if self._stage == self._when.get("full"):
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))

    def end(self) -> None:
        sys.setprofile(None)
        self.enter("end")
        self._tell("renames", self._renames)

    def _on_event(self, frame: FrameType, event: str, argument: object) -> None:
        self._events += 1
        if self._stage == self._when.get("stage") and self._events == self._when.get("event"):
            self._die()

    def _on_rename(self, path: Path, target: Path) -> Path:
        self._renames += 1
        if self._renames == self._when.get("rename"):
            os.truncate(path, path.stat().st_size // 2)
            self._die()
        return self._rename(path, target)

    def _die(self) -> None:
        self._tell(self._stage, self._events)
        os.kill(os.getpid(), signal.SIGKILL)

    def _tell(self, what: str, count: int) -> None:
        os.write(self._pipe, f"{what} {count}\n".encode())


def run(request: dict[str, Any], pipe: int) -> None:
    """Train, until the end or until the moment has come."""
    fate = Fate(pipe, request["when"])

    def enter(folder: Path, key: str) -> bool:
        fate.enter(folder.name)
        done = enter_stage(folder, key)
        fate.fill_disk()
        return done

    def save(*arguments: Any) -> None:  # noqa: ANN401
        fate.enter(SAVE)
        fate.fill_disk()
        save_artifact(*arguments)

    stages: Any = training
    ending: Any = pipeline
    save_artifact = ending.save_artifact
    stages.enter_stage, ending.save_artifact = enter, save
    distillation = DistillConfig(**request["config"].pop("distill"))
    config = TrainConfig(distill=distillation, **request["config"])
    fate.watch()
    pipeline.train(request["corpus"], out=request["out"], config=config)
    fate.end()


def fork(request: dict[str, Any]) -> dict[str, Any]:
    """Run a request in a process of its own; how it ended, and what it told."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        with suppress(BaseException):
            os.close(reader)
            try:
                run(request, writer)
                os._exit(0)
            except ResourceError as error:
                os.write(writer, f"{REFUSED} {'kept in' in str(error):d}\n".encode())
            except BaseException:
                traceback.print_exc()
        os._exit(1)
    os.close(writer)
    if "seconds" in request["when"]:
        time.sleep(request["when"]["seconds"])
        os.kill(pid, signal.SIGKILL)  # a process that has ended is there until it is waited for
    with os.fdopen(reader) as lines:
        told = [line.split() for line in lines]
    _, status = os.waitpid(pid, 0)
    counts: Counter[str] = Counter()
    for what, count in told:
        counts[what] += int(count)
    return {"exit": os.waitstatus_to_exitcode(status), "counts": counts}


def requests() -> Iterator[dict[str, Any]]:
    for line in sys.stdin:
        yield json.loads(line)


def main() -> None:
    calibrate.HELD_OUT_QUESTIONS = 0.2
    schedule.MIN_STEPS = schedule.ENOUGH_STEPS = 1
    for request in requests():
        print(json.dumps(fork(request)), flush=True)


if __name__ == "__main__":
    main()
