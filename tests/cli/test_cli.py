"""The command line: what goes where, exit codes, and errors in one line."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from mlpmem_cli.app import DEBUG_VARIABLE, main
from mlpmem_rag import MemoryModel, TrainReport, __version__, train
from mlpmem_rag.artifact import CONFIG, MANIFEST, WEIGHTS, WORK, load_manifest
from mlpmem_rag.corpus import Document
from mlpmem_rag.generation import Answer
from mlpmem_rag.plan import Plan

ROOT = Path(__file__).parents[2]
TINY = ("--device", "cpu", "--dtype", "float32")
QUESTIONS = ["Who found wild honey?", "Why?", "What was sold for 42 crowns?"]
ANSWER_KEYS = ["answer", "confidence", "seconds", "ttft_seconds", "prompt_tokens", "new_tokens"]
COMMANDS = (
    "train",
    "plan",
    "ask",
    "chat",
    "inspect",
    "verify",
    "questions",
    "export",
    "convert",
    "lm-eval",
)
COLOUR = re.compile(r"\x1b\[(?:\d+;)*(?:3[0-8]|4[0-8]|9[0-7]|10[0-7])(?:;\d+)*m")


class Result(NamedTuple):
    """What a command leaves behind."""

    code: int | str | None
    out: str
    err: str

    def error(self) -> str:
        """The one line that says what was wrong."""
        lines = [line for line in self.err.splitlines() if line.startswith("error: ")]
        assert len(lines) == 1
        assert self.err.endswith(f"{lines[0]}\n")
        assert "Traceback" not in self.err
        assert self.code == 1
        return lines[0]


Run = Callable[..., Result]


@pytest.fixture(autouse=True)
def _plain_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (DEBUG_VARIABLE, "NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE"):
        monkeypatch.setenv(name, "")  # so that a value set by the command is taken back
        monkeypatch.delenv(name)
    monkeypatch.setenv("COLUMNS", "200")


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs `mlpmem-rag` with arguments, in this process."""

    def call(*arguments: object, stdin: str = "") -> Result:
        monkeypatch.setattr(sys, "argv", ["mlpmem-rag", *map(str, arguments)])
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main()
        return Result(ended.value.code, *capsys.readouterr())

    return call


def subprocess_environment() -> dict[str, str]:
    paths = os.pathsep.join([str(ROOT), str(ROOT / "cli")])
    return os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory, tiny_documents: list[Document]) -> Path:
    """A folder of texts, and one file that is none."""
    folder = tmp_path_factory.mktemp("source")
    for document in tiny_documents:
        (folder / f"{document.id}.txt").write_text(document.text)
    (folder / "empty.txt").touch()
    return folder


@pytest.fixture(scope="module")
def memory(tmp_path_factory: pytest.TempPathFactory, source: Path, tiny_folder: Path) -> Path:
    """A trained memory, which no test changes."""
    out = tmp_path_factory.mktemp("memories") / "memory"
    train(
        source,
        out=out,
        recipe="paper",
        base_model=str(tiny_folder),
        device="cpu",
        dtype="float32",
        neighbors=8,
    )
    return out


@pytest.fixture(scope="module")
def library(memory: Path) -> MemoryModel:
    """The same memory, without the command line."""
    return MemoryModel.load(memory, device="cpu", dtype="float32")


@pytest.fixture
def train_arguments(source: Path, tiny_folder: Path, tmp_path: Path) -> list[object]:
    """Of a run into a new folder."""
    out = tmp_path / "memory"
    settings = ["--base-model", tiny_folder, "--recipe", "paper", "--neighbors", 8]
    return ["train", source, "--out", out, *settings, *TINY]


# train and plan.


def test_train_prints_the_report_and_how_to_go_on(
    run: Run, train_arguments: list[object], tmp_path: Path
) -> None:
    result = run(*train_arguments)
    report = TrainReport.from_dict(without_distillation(tmp_path / "memory"))
    assert report.perplexity is not None
    assert result.code == 0
    shown = {
        "datastore rows": f"{report.rows:,}",
        "base model": f"{report.perplexity.base:.2f}",
        "base + kNN datastore (teacher)": f"{report.perplexity.teacher:.2f}",
        "base + memory": f"{report.perplexity.memory:.2f}",
        "written to": str(tmp_path / "memory"),
    }
    rows = {cells[0]: cells[1] for cells in table(result.out)}
    assert {name: rows[name] for name in shown} == shown
    assert {f"seconds, {stage}" for stage in report.seconds} <= rows.keys()
    assert f'Ask it: mlpmem-rag ask {tmp_path / "memory"} "…"' in result.out
    for word in ("Plan", "skipped empty.txt: empty", "base scores", "rows/s"):
        assert word in result.err
        assert word not in result.out


def test_a_memory_limit_is_planned_with_and_kept(
    run: Run, train_arguments: list[object], source: Path, tiny_folder: Path, tmp_path: Path
) -> None:
    plan = ["plan", source, "--base-model", tiny_folder, "--recipe", "paper", "--neighbors", 8]
    needs = json.loads(run(*plan, *TINY, "--json").out)
    assert needs["keys_in_memory"]
    limit = needs["memory_bytes"] - 1
    limited = json.loads(run(*plan, *TINY, "--json", "--max-memory", limit).out)
    assert (limited["keys_in_memory"], limited["max_memory"]) == (False, limit)
    assert limited["memory_bytes"] < limit
    assert run(*train_arguments, "--max-memory", limit).code == 0
    refused = run(*train_arguments, "--fresh", "--max-memory", "1MiB")
    assert refused.code == 1
    assert refused.err.strip().endswith("--size small, or fewer --neighbors")
    assert "0.00 GiB are allowed" in refused.err


def test_only_the_first_of_several_processes_tells_the_result(
    run: Run, train_arguments: list[object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "1")
    assert run(*train_arguments).out == ""


def test_train_as_json(run: Run, train_arguments: list[object], tmp_path: Path) -> None:
    result = run(*train_arguments, "--json", "--seed", 3, "--size", "small")
    assert result.code == 0
    assert json.loads(result.out) == without_distillation(tmp_path / "memory")
    training = load_manifest(tmp_path / "memory").training
    assert (training["seed"], training["size"], training["neighbors"]) == (3, "small", 8)
    again = run(*train_arguments, "--json", "--seed", 3, "--size", "small", "--resume")
    assert again.out == result.out, "a finished run is not done again"
    fresh = run(*train_arguments, "--json", "--seed", 3, "--size", "small", "--fresh")
    assert json.loads(fresh.out)["seconds"] != json.loads(result.out)["seconds"]


def table(text: str) -> list[list[str]]:
    """Cells of the rows of a printed table."""
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in text.splitlines()]
    return [row for row in rows if row]


def without_distillation(folder: Path) -> dict[str, Any]:
    figures = load_manifest(folder).figures
    return {name: value for name, value in figures.items() if name != "distillation"}


def test_plan_prints_what_train_would_need_and_writes_nothing(
    run: Run,
    source: Path,
    tiny_folder: Path,
    memory: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = ["plan", source, "--base-model", tiny_folder, *TINY]
    result = run(*arguments, "--json")
    found = json.loads(result.out)
    assert list(found) == [field.name for field in fields(Plan)]
    made = load_manifest(memory).figures
    assert (found["rows"], found["tokens"]) == (made["rows"], made["tokens"])
    human = run(*arguments)
    assert ["datastore rows", f"{made['rows']:,}"] in table(human.out)
    assert "skipped empty.txt" in human.err
    assert result.code == human.code == 0
    assert list(tmp_path.iterdir()) == []


def test_links_in_a_corpus_are_followed_when_asked(
    run: Run, source: Path, memory: Path, train_arguments: list[object], tmp_path: Path
) -> None:
    linked = tmp_path / "linked"
    linked.mkdir()
    for path in source.iterdir():
        (linked / path.name).symlink_to(path)
    train_arguments[1] = linked
    assert "symbolic link, not followed" in run(*train_arguments).err
    plan = ["plan", linked, *train_arguments[4:], "--follow-links", "--json"]
    assert json.loads(run(*plan).out)["rows"] == load_manifest(memory).figures["rows"]
    assert run(*train_arguments, "--follow-links").code == 0
    assert load_manifest(tmp_path / "memory").run == load_manifest(memory).run
    assert run("questions", linked, "--follow-links").code == 0


@pytest.mark.parametrize("command", ["plan", "train"])
def test_a_small_disk_fails_with_the_numbers(
    run: Run,
    source: Path,
    tiny_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    command: str,
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=2**20))
    result = run(
        command, source, "--out", tmp_path / "m", "--base-model", tiny_folder, *TINY, "--json"
    )
    assert re.search(r"needs \d+\.\d\d GiB of disk, 0\.00 GiB are free", result.error())
    assert bool(result.out) == (command == "plan")


def test_an_interrupted_train_says_how_to_go_on(
    run: Run, train_arguments: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("mlpmem_rag.training.build_targets", interrupt)
        result = run(*train_arguments)
    assert (result.code, result.out) == (130, "")
    assert f"kept in {tmp_path / 'memory'}, run the same command to go on" in result.err
    assert "Traceback" not in result.err
    again = run(*train_arguments)
    assert again.code == 0
    assert not re.search(r"^datastore ", again.err, re.MULTILINE)


def test_a_missing_extra_is_named_with_its_command(
    run: Run, train_arguments: list[object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "faiss", None)
    assert "pip install 'mlpmem-rag[cpu]'" in run(*train_arguments).error()


# ask.


def test_ask_prints_the_answer_alone(run: Run, memory: Path, library: MemoryModel) -> None:
    expected = library.answer(QUESTIONS[0], max_new_tokens=12)
    result = run("ask", memory, QUESTIONS[0], "--max-new-tokens", 12, *TINY)
    assert result.code == 0
    assert result.out.strip() == expected.text
    assert f"{expected.prompt_tokens} + {expected.new_tokens} tokens" in result.err


@pytest.mark.parametrize("lambda_", [None, 0.0, 1.0])
def test_ask_as_json(run: Run, memory: Path, library: MemoryModel, lambda_: float | None) -> None:
    expected = library.answer(QUESTIONS[0], max_new_tokens=12, lambda_=lambda_)
    options = [] if lambda_ is None else ["--lambda", lambda_]
    result = run("ask", memory, QUESTIONS[0], "--max-new-tokens", 12, *options, *TINY, "--json")
    assert (result.code, result.err) == (0, "")
    found = json.loads(result.out)
    assert list(found) == ANSWER_KEYS
    assert found["answer"] == expected.text
    assert (found["prompt_tokens"], found["new_tokens"]) == (
        expected.prompt_tokens,
        expected.new_tokens,
    )
    assert 0 <= found["ttft_seconds"] <= found["seconds"]


@pytest.mark.parametrize("piped", [False, True])
def test_several_questions_are_answered_in_order(
    run: Run, memory: Path, library: MemoryModel, monkeypatch: pytest.MonkeyPatch, piped: bool
) -> None:
    loads: list[object] = []
    load = MemoryModel.load
    monkeypatch.setattr(
        MemoryModel,
        "load",
        lambda folder, **options: loads.append(folder) or load(folder, **options),  # type: ignore[func-returns-value]
    )
    expected = [library.answer(question, max_new_tokens=8).text for question in QUESTIONS]
    asked = {"stdin": "\n\n".join(QUESTIONS)} if piped else {}
    arguments = ["ask", memory, *([] if piped else QUESTIONS), "--max-new-tokens", 8, *TINY]
    result = run(*arguments, "--json", **asked)
    lines = result.out.splitlines()
    assert [json.loads(line)["answer"] for line in lines] == expected
    assert loads == [memory]
    human = run(*arguments, **asked)
    assert [line.strip() for line in human.out.splitlines()] == expected
    assert [line for line in human.err.splitlines() if line in QUESTIONS] == QUESTIONS


# chat.


def test_chat_remembers_until_it_is_told_to_forget(
    run: Run, memory: Path, library: MemoryModel
) -> None:
    def reply(*texts: str) -> str:
        names = ("user", "assistant")
        talk = [{"role": names[n % 2], "content": text} for n, text in enumerate(texts)]
        return library.answer(talk, max_new_tokens=8).text

    first = reply("Who?")
    second = reply("Who?", first, "Where?")
    assert second != reply("Where?")
    said = "Who?\n\nWhere?\n/reset\nWhere?\n/exit\nWho?\n"
    result = run("chat", memory, "--max-new-tokens", 8, *TINY, stdin=said)
    assert result.code == 0
    assert [line.strip() for line in result.out.splitlines()] == [first, second, reply("Where?")]
    assert result.err == ""


def test_chat_ends_with_its_input(run: Run, memory: Path) -> None:
    assert run("chat", memory, *TINY) == (0, "", "")


def test_an_interrupted_reply_does_not_end_the_chat(
    run: Run, memory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = MemoryModel.stream
    calls: list[object] = []

    class Interrupted:
        answer = Answer("partly", 0.0, 0.0, 1, 1)

        def __iter__(self) -> Any:  # noqa: ANN401
            yield "partly"
            raise KeyboardInterrupt

    def first_interrupted(self: MemoryModel, messages: Any, **options: Any) -> Any:  # noqa: ANN401
        calls.append(list(messages))
        return Interrupted() if len(calls) == 1 else stream(self, messages, **options)

    monkeypatch.setattr(MemoryModel, "stream", first_interrupted)
    result = run("chat", memory, "--max-new-tokens", 4, *TINY, stdin="Who?\nWhere?\n")
    assert result.code == 0
    assert result.out.splitlines()[0] == "partly …"
    assert len(result.out.splitlines()) == 2
    assert calls[1][1]["content"] == "partly"  # type: ignore[index]


# inspect.


def test_inspect_shows_the_manifest(run: Run, memory: Path) -> None:
    result = run("inspect", memory, "--json")
    assert (result.code, result.err) == (0, "")
    found = json.loads(result.out)
    manifest = json.loads((memory / MANIFEST).read_text())
    config = json.loads((memory / "config.json").read_text())
    assert {name: found[name] for name in manifest} == manifest
    assert found["settings"] == {name: config[name] for name in found["settings"]}
    assert found["settings"].keys() == config.keys() - {"model_type"}
    assert found["work_bytes"] == sum(
        path.stat().st_size for path in (memory / WORK).rglob("*") if path.is_file()
    )
    human = run("inspect", memory)
    rows = {cells[0]: cells[1] for cells in table(human.out)}
    assert human.code == 0
    assert rows["base model"] == config["base"]["name"]
    assert rows["layer"] == "3"
    assert rows[WEIGHTS].endswith("intact")
    assert f"rows: {manifest['figures']['rows']}" in human.out


def test_inspect_works_without_the_training_files(run: Run, memory: Path, tmp_path: Path) -> None:
    shutil.copytree(memory, tmp_path / "memory", ignore=shutil.ignore_patterns(WORK))
    assert json.loads(run("inspect", tmp_path / "memory", "--json").out)["work_bytes"] == 0


# Errors.


def test_export_with_the_base_inside_needs_no_base_model(
    run: Run, memory: Path, library: MemoryModel, tiny_folder: Path, tmp_path: Path
) -> None:
    """The base model is taken away: the copy answers all the same, in each command."""
    base = Path(shutil.copytree(tiny_folder, tmp_path / "base"))
    whole = tmp_path / "whole"
    found = run("export", memory, "--out", whole, "--merge-base", "--base-model", base)
    assert found.code == 0, found.err
    assert re.search(rf"\d kB\. Ask it: mlpmem-rag ask {whole}", found.out)
    shutil.rmtree(base)
    config = json.loads((whole / "config.json").read_text())
    assert config["base"]["name"] == str(tiny_folder)
    asked = run("ask", whole, QUESTIONS[0], "--max-new-tokens", 8, *TINY)
    assert asked.out == f"{library.answer(QUESTIONS[0], max_new_tokens=8).text}\n"
    shown = json.loads(run("inspect", whole, "--json").out)
    assert set(shown["files"]) >= {"tokenizer.json", "model.safetensors"}
    assert shown["settings"]["layer"] == library.model.config.layer
    alone = run("export", whole, "--out", tmp_path / "alone", "--name-base")
    assert alone.code == 0, alone.err
    assert (tmp_path / "alone" / WEIGHTS).read_bytes() == (memory / WEIGHTS).read_bytes()
    assert not (tmp_path / "alone" / WORK).exists()
    assert "the memory itself" in run("export", memory, "--out", memory).error()


@pytest.mark.parametrize("command", ["ask", "chat", "inspect"])
@pytest.mark.parametrize("damage", ["missing", "changed"])
def test_a_damaged_memory_is_one_line(
    run: Run, memory: Path, tmp_path: Path, command: str, damage: str
) -> None:
    folder = tmp_path / "memory"
    if damage == "changed":
        shutil.copytree(memory, folder)
        (folder / WEIGHTS).write_bytes((memory / WEIGHTS).read_bytes()[:-8])
    question = ["Who?"] if command == "ask" else []
    result = run(command, folder, *question)
    said = "is not a memory" if damage == "missing" else "was changed or is damaged"
    assert said in result.error()
    assert str(folder) in result.error()
    assert (result.out, result.err.count("\n")) == ("", 1)


def test_verify_says_what_is_intact_and_names_every_changed_file(
    run: Run, memory: Path, tmp_path: Path
) -> None:
    result = run("verify", memory)
    assert result.code == 0
    assert "3 files and the memory's tensors are intact (full)" in " ".join(result.out.split())
    damaged = Path(shutil.copytree(memory, tmp_path / "damaged"))
    with (damaged / CONFIG).open("a") as file:
        file.write(" ")
    content = bytearray((damaged / WEIGHTS).read_bytes())
    content[-1] ^= 1
    (damaged / WEIGHTS).write_bytes(content)
    result = run("verify", damaged)
    assert (result.code, result.out) == (1, "")
    assert f"{damaged / CONFIG} was changed or is damaged: it has" in result.err
    assert f"error: {damaged / WEIGHTS} was changed or is damaged: its SHA-256" in result.err
    found = json.loads(run("verify", damaged, "--json", "--verify", "fast").out)
    assert (found["intact"], found["verify"]) == (False, "fast")
    assert len(found["problems"]) == 2
    assert set(found["files"]) == {CONFIG, WEIGHTS, "README.md"}


def test_a_strangers_manifest_says_nothing_to_the_terminal(
    run: Run, memory: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(memory, tmp_path / "memory"))
    said = json.loads((folder / MANIFEST).read_text())
    evil = "[bold]\x1b]0;owned\x07[/no-such]"
    (folder / MANIFEST).write_text(json.dumps({**said, "created": evil, "corpus": {"x": evil}}))
    out = run("inspect", folder).out
    assert "\x1b" not in out
    assert "\x07" not in out
    assert out.count("[bold]\N{REPLACEMENT CHARACTER}]0;owned") == 2


def test_another_base_model_is_one_line(run: Run, memory: Path, bare_folder: Path) -> None:
    result = run("ask", memory, "Who?", "--base-model", bare_folder, *TINY)
    assert "this memory was trained on" in result.error()
    assert str(bare_folder) in result.error()


@pytest.mark.parametrize(
    ("question", "options", "said"),
    [
        ("", [], "the question is empty"),
        ("Who?", ["--max-new-tokens", 96], "context window has 96 tokens"),
        ("Who?", ["--base-model", "no/such-model"], "'no/such-model' cannot be loaded"),
    ],
)
def test_what_cannot_be_asked_is_one_line(
    run: Run, memory: Path, question: str, options: list[object], said: str
) -> None:
    result = run("ask", memory, question, *TINY, *options)
    assert said in result.error()
    assert (result.out, result.err.count("\n")) == ("", 1)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--base-model", "no/such-model"], "'no/such-model' cannot be loaded"),
        (["--neighbors", 5000], "neighbors = 5000: allowed are 1 to 1024"),
        (["--tau", -1], "tau = -1.0: allowed"),
        (["--layer", 99], "layer 99 does not exist: the base model has 4 decoder layers"),
        (["--strict"], "empty.txt: empty"),
        (["--out", __file__], "is a file; give a new folder"),
        (["--out", Path(__file__).parent], "is not empty and holds no memory"),
    ],
)
def test_what_cannot_be_trained_is_one_line(
    run: Run, train_arguments: list[object], tmp_path: Path, options: list[object], said: str
) -> None:
    result = run(*train_arguments, *options)
    assert said in result.error()
    assert result.out == ""
    assert not (tmp_path / "memory" / MANIFEST).exists()


@pytest.mark.parametrize("command", ["train", "plan"])
@pytest.mark.parametrize(
    ("text", "said"),
    [(None, "doesn't exist"), ("", "No document can be read"), ("One sentence.", "are needed")],
)
def test_a_corpus_that_will_not_do_is_one_line(
    run: Run, tiny_folder: Path, tmp_path: Path, command: str, text: str | None, said: str
) -> None:
    corpus = tmp_path / "corpus.txt"
    if text is not None:
        corpus.write_text(text)
    result = run(command, corpus, "--out", tmp_path / "m", "--base-model", tiny_folder, *TINY)
    assert said in result.error()
    assert result.out == ""


@pytest.mark.parametrize(
    ("failure", "said"),
    [
        (PermissionError(13, "Permission denied", "/closed"), "Permission denied (/closed)"),
        (MemoryError(), "out of memory"),
    ],
)
def test_what_the_system_refuses_is_one_line(
    run: Run, memory: Path, monkeypatch: pytest.MonkeyPatch, failure: Exception, said: str
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise failure

    monkeypatch.setattr(MemoryModel, "load", fail)
    assert said in run("ask", memory, "Who?").error()


def test_interrupting_a_question_exits_with_130(
    run: Run, memory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(MemoryModel, "load", interrupt)
    result = run("ask", memory, "Who?")
    assert result.code == 130
    assert "Traceback" not in result.err


@pytest.mark.parametrize("by_variable", [False, True])
def test_debug_shows_where_an_error_comes_from(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, by_variable: bool
) -> None:
    if by_variable:
        monkeypatch.setenv(DEBUG_VARIABLE, "1")
    option = [] if by_variable else ["--debug"]
    result = run(*option, "inspect", tmp_path)
    assert result.code == 1
    assert "Traceback" in result.err
    assert "load_manifest" in result.err
    assert result.err.splitlines()[-1].startswith("error: ")


@pytest.mark.parametrize(
    "arguments",
    [
        ["nonsense"],
        ["train"],
        ["train", "corpus"],
        ["train", "corpus", "--out", "x", "--size", "huge"],
        ["train", "corpus", "--out", "x", "--device", "tpu"],
        ["train", "corpus", "--out", "x", "--neighbors", "many"],
        ["ask"],
        ["ask", "memory"],
        ["ask", "memory", "Who?", "--lambda", "1.5"],
        ["ask", "memory", "Who?", "--max-new-tokens", "0"],
        ["chat", "memory", "--lambda", "-0.1"],
        ["inspect", "memory", "--nonsense"],
    ],
)
def test_wrong_usage_exits_with_2(run: Run, arguments: list[str]) -> None:
    result = run(*arguments)
    assert (result.code, result.out) == (2, "")
    assert re.search("Usage: .*mlpmem-rag", result.err)
    assert "Traceback" not in result.err


def test_a_terminal_without_a_question_is_wrong_usage(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr(io, "StringIO", Terminal)
    result = run("ask", "memory")
    assert result.code == 2
    assert "give a question" in result.err


# Terminals, pipes, start-up.


def test_pipes_get_no_escape_codes(run: Run, train_arguments: list[object], memory: Path) -> None:
    ask = ["ask", memory, "Who?", "--max-new-tokens", 4, *TINY]
    for arguments in (train_arguments, ["inspect", memory], ask):
        result = run(*arguments)
        assert result.code == 0
        assert "\x1b" not in result.out + result.err


def test_a_narrow_pipe_loses_nothing(
    run: Run, train_arguments: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    out = tmp_path / ("a_long_name_" * 6) / "memory"
    result = run(*train_arguments, "--out", out)
    assert re.sub(r"[\s│]", "", result.out).count(str(out)) == 2, "in the table and below it"


@pytest.mark.parametrize("no_color", [False, True])
def test_no_color_is_honoured_in_a_terminal(
    run: Run, train_arguments: list[object], monkeypatch: pytest.MonkeyPatch, no_color: bool
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich then takes anything for a terminal
    if no_color:
        monkeypatch.setenv("NO_COLOR", "1")
    result = run(*train_arguments)
    assert result.code == 0
    assert bool(COLOUR.search(result.out + result.err)) != no_color


@pytest.mark.parametrize("command", [[], *([name] for name in COMMANDS)])
def test_every_command_has_help(run: Run, command: list[str]) -> None:
    result = run(*command, "--help")
    assert result.code == 0
    assert re.search("Usage: .*mlpmem-rag", result.out)
    assert result.err == ""


@pytest.mark.parametrize(
    ("command", "defaults"),
    [
        ("train", ["smollm2-135m-instruct", "self-study", "at 55 %", "rules", "all-minilm-l6-v2"]),
        ("ask", ["as the memory names it", "set in training"]),
        ("compare", ["as the memory names it", "the best on questions"]),
    ],
)
def test_help_tells_the_defaults(
    run: Run, monkeypatch: pytest.MonkeyPatch, command: str, defaults: list[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "400")
    words = re.sub(r"[\s│]+", " ", run(command, "--help").out)
    for default in defaults:
        assert re.search(rf"default: \({default}", words), default


def test_version(run: Run) -> None:
    assert run("--version") == (0, f"mlpmem-rag {__version__}\n", "")


def test_help_imports_nothing_heavy() -> None:
    code = """
import sys
from mlpmem_cli.app import main
for command in ([], *([name] for name in sys.argv[1:])):
    sys.argv = ["mlpmem-rag", *command, "--help"]
    try:
        main()
    except SystemExit as end:
        assert end.code == 0
heavy = {"torch", "transformers", "faiss", "llama_index", "sentence_transformers", "numpy"}
print("imported:", sorted(heavy & set(sys.modules)))
"""
    done = subprocess.run(
        [sys.executable, "-c", code, *COMMANDS],
        env=subprocess_environment(),
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.splitlines()[-1] == "imported: []"


def test_a_reader_that_has_gone_is_no_error(memory: Path) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [sys.executable, "-c", "from mlpmem_cli.app import main; main()", "inspect", str(memory)],
        env=subprocess_environment(),
        stdout=writer,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    os.close(writer)
    assert (done.returncode, done.stderr) == (1, "")
