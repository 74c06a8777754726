"""The examples, run as a person runs them, on tiny models."""

from __future__ import annotations

import asyncio
import difflib
import importlib.util
import re
import shlex
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import httpx
import pytest
import torch
import transformers
import typer
import uvicorn
from llama_index.core import Document, Settings
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
from typer.testing import CliRunner

from llama_index.indices.managed.mlpmem import MLPMemIndex

from .fakes import ScriptedLLM

EXAMPLES = Path(__file__).parents[2] / "examples"
SCRIPTS = sorted(EXAMPLES.glob("*.py"))
QUESTION = "Who found wild honey in the old mill?"
RIGHT = "Ines Maro"
SURE = "Did Ines Maro find a map of the tunnels?"


def example(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[module.__name__] = module
    spec.loader.exec_module(module)
    return module


def command(name: str) -> typer.Typer:
    app = typer.Typer()
    app.command()(example(name).main)
    return app


def run(name: str, *arguments: str | Path) -> str:
    """What a script prints."""
    result = CliRunner().invoke(command(name), [str(a) for a in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


@pytest.fixture(scope="session")
def texts(documents: list[Document], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sixteen texts as files."""
    folder = tmp_path_factory.mktemp("texts")
    for document in documents:
        (folder / f"{document.doc_id}.txt").write_text(document.text)
    return folder


@pytest.fixture(scope="session")
def embedding(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sentence encoder on the tiny Llama."""
    folder = tmp_path_factory.mktemp("models") / "embedding"
    reader = Transformer(str(tiny_folder))
    SentenceTransformer(modules=[reader, Pooling(32)], device="cpu").save(str(folder))
    return folder


@pytest.fixture
def tiny(
    training: dict[str, Any], wide_folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Trainings are of half a second, and what is not named is written here."""
    settings = {**training, "base_model": str(wide_folder)}
    quickly = partial(MLPMemIndex.from_documents, **settings)
    monkeypatch.setattr(MLPMemIndex, "from_documents", quickly)
    monkeypatch.setattr(Settings, "_llm", None)
    monkeypatch.setattr(Settings, "_embed_model", None)
    monkeypatch.chdir(tmp_path)


def expected(folder: Path) -> str:
    index = MLPMemIndex.load(folder, device="cpu", dtype="float32")
    return index.llm.model.answer(QUESTION, max_new_tokens=256).text


@pytest.mark.usefixtures("tiny")
def test_quickstart(texts: Path, tmp_path: Path) -> None:
    first = run("quickstart", texts, tmp_path / "index", QUESTION)
    again = run("quickstart", texts, tmp_path / "index", QUESTION)
    assert first == again
    answer, *sources, confidence = first.splitlines()
    assert answer == expected(tmp_path / "index")
    assert sources
    assert all(s.startswith("- doc-") and s.endswith(".txt (training rows)") for s in sources)
    assert confidence == "None"  # the paper's recipe gives none


def test_the_swap_is_one_import_and_one_name() -> None:
    before, after = ((EXAMPLES / f"swap_{name}.py").read_text() for name in ("before", "after"))
    lines = difflib.ndiff(before.splitlines(), after.splitlines())
    changed = [line for line in lines if line[0] in "+-"]
    assert [line for line in changed if "import" in line] == [
        "- from llama_index.core.indices import VectorStoreIndex",
        "+ from llama_index.indices.managed.mlpmem import MLPMemIndex",
    ]
    used = [line for line in changed if "import" not in line]
    assert len(used) == 2
    assert used[0][1:].replace("VectorStoreIndex", "MLPMemIndex") == used[1][1:]


@pytest.mark.usefixtures("tiny", "open_loop")
@pytest.mark.parametrize("name", ["swap_before", "swap_after"])
def test_both_sides_of_the_swap_run(
    name: str, texts: Path, wide_folder: Path, embedding: Path, tmp_path: Path
) -> None:
    told = run(name, texts, QUESTION, "--llm", wide_folder, "--embedding", embedding)
    found = re.fullmatch(r"answer: (.*?)\n((?:source: doc-\d+\.txt\n)+)chat: (.*)\n", told, re.S)
    assert found is not None
    if name == "swap_after":
        (memory,) = tmp_path.iterdir()
        assert found[1] == found[3] == expected(memory)


@pytest.mark.usefixtures("tiny")
def test_hybrid(taught: Path, embedding: Path) -> None:
    asked = [SURE, "Who is the king?"]
    told = run("hybrid", taught, *asked, "--threshold", "0.3", "--embedding", embedding)
    sure, unsure = told.split("Who is the king?\n")
    assert sure.split("\n  ") == [SURE, "yes", "from memory\n"]
    assert "\n  from rag confidence 0." in unsure


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.usefixtures("open_loop")
def test_agent(index: MLPMemIndex, capsys: pytest.CaptureFixture[str]) -> None:
    planner = ScriptedLLM(
        texts=[
            f'Thought: I look it up.\nAction: documents\nAction Input: {{"input": "{QUESTION}"}}',
            "Thought: I can answer.\nAnswer: It was Ines Maro.",
        ]
    )
    asyncio.run(example("agent").ask(index, planner, "And the honey?"))
    called, answer = capsys.readouterr().out.splitlines()
    assert called == f"documents {{'input': '{QUESTION}'}} -> {RIGHT}"
    assert answer == "It was Ines Maro."


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.usefixtures("open_loop")
def test_an_agents_own_model_is_loaded(index: MLPMemIndex, wide_folder: Path) -> None:
    # It writes at random, and what calls no tool is an agent's answer.
    (answer,) = run("agent", index.memory_folder, QUESTION, "--llm", wide_folder).splitlines()
    assert answer


def test_continue_text(chat_memory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transformers.logging, "set_verbosity_error", lambda: None)
    monkeypatch.setattr(transformers.logging, "disable_progress_bar", lambda: None)
    text, base, memory = run("continue_text", chat_memory).splitlines()
    llm = MLPMemIndex.from_memory(chat_memory).llm
    assert text == f"  {example('continue_text').TEXT} …"
    for line, lambda_ in ((base, 0.0), (memory, llm.mixing_weight)):
        said = llm.complete(text[2:-2], formatted=True, lambda_=lambda_, max_tokens=32).text
        shown = line.removeprefix(f"  λ = {lambda_:.2f}: … ")
        assert shown != line
        assert shown.removesuffix("</s>").strip() == " ".join(said.split())


def test_service(index: MLPMemIndex) -> None:
    app = example("service").service(index)
    asked = [{"question": QUESTION}, {"question": SURE}]
    engine = index.as_query_engine()
    expected = [str(engine.query(a["question"])) for a in asked]

    async def together() -> None:
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            posts = [client.post(p, json=a) for p in ("/answer", "/stream") for a in asked]
            answers = await asyncio.gather(*posts)
            assert [a.json()["answer"] for a in answers[:2]] == expected
            assert all(0 < a.json()["confidence"] <= 1 for a in answers[:2])
            assert [a.text for a in answers[2:]] == expected
            for path in ("/answer", "/stream"):
                refused = await client.post(path, json={"question": " "})
                assert (refused.status_code, refused.json()) == (
                    422,
                    {"detail": "the question is empty; ask something"},
                )

    asyncio.run(together())


@contextmanager
def served(app: Any) -> Iterator[str]:  # noqa: ANN401
    """Address of a web server in a thread of its own."""
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_config=None))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    try:
        yield "http://127.0.0.1:{1}".format(*server.servers[0].sockets[0].getsockname())
    finally:
        server.should_exit = True
        thread.join()


async def hang_up(address: str, passes: list[int]) -> None:
    """Ask, and leave when a few tokens have been generated."""
    async with httpx.AsyncClient(timeout=60) as client:
        asked = asyncio.create_task(client.post(address, json={"question": QUESTION}))
        while len(passes) < 5 and not asked.done():
            await asyncio.sleep(0.01)
        assert asked.cancel()


@pytest.mark.parametrize("path", ["/answer", "/stream"])
def test_what_a_client_who_hangs_up_has_asked_is_given_up(
    taught: Path,
    before_forward: Callable[[torch.nn.Module, Callable[[int], object]], None],
    path: str,
) -> None:
    index = MLPMemIndex.load(taught, device="cpu", lambda_=0.0, max_new_tokens=300)
    passes: list[int] = []

    def slowly(number: int) -> None:
        passes.append(number)
        time.sleep(0.01)

    before_forward(index.llm.model.model.base, slowly)
    with served(example("service").service(index)) as address:
        asyncio.run(hang_up(address + path, passes))
        index.llm.complete("Who?", max_tokens=1)  # served when the other has ended
    assert len(passes) < 150


def test_the_service_starts(taught: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answers: list[httpx.Response] = []

    def serve(app: Any, **settings: Any) -> None:  # noqa: ANN401
        """As uvicorn does, for one request."""
        assert settings == {"host": "127.0.0.1", "port": 8123}
        with served(app) as address:
            answers.append(httpx.post(f"{address}/answer", json={"question": QUESTION}, timeout=60))

    monkeypatch.setattr(uvicorn, "run", serve)
    run("service", taught, "--port", "8123")
    assert [answer.json()["answer"] for answer in answers] == [RIGHT]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_every_script_takes_the_command_that_it_tells(script: Path) -> None:
    lines = re.findall(rf"^python examples/{script.name} (.+)$", script.read_text(), re.MULTILINE)
    assert lines
    for line in lines:
        parsed = typer.main.get_command(command(script.stem))
        parsed.make_context(script.name, shlex.split(line))  # raises on what it does not take
