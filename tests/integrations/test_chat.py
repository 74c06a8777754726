"""Conversations with a memory: history, condensing, streams and their sources."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import pytest
from llama_index.core import PromptTemplate
from llama_index.core.base.llms.generic_utils import messages_to_history_str
from llama_index.core.base.llms.types import MessageRole
from llama_index.core.chat_engine.condense_question import DEFAULT_PROMPT
from llama_index.core.chat_engine.types import ChatMode
from llama_index.core.llms import ChatMessage
from llama_index.core.memory import ChatMemoryBuffer

from llama_index.indices.managed.mlpmem import MLPMemIndex
from llama_index.indices.managed.mlpmem.attribution import LABEL, TRACED
from mlpmem_rag.errors import ConfigError
from mlpmem_rag.memory_model import MemoryModel

QUESTION = "Who found wild honey in the old mill?"
RIGHT = "Ines Maro"
NEXT = "And where was it?"
SAID = [
    ChatMessage(role=MessageRole.USER, content=QUESTION),
    ChatMessage(role=MessageRole.ASSISTANT, content=RIGHT),
]
WAYS = ("chat", "achat", "stream_chat", "astream_chat")


def talk(chat: Any, way: str, message: str) -> Any:  # noqa: ANN401
    """Say something in one of the four ways; a stream is read to its end."""

    async def wait() -> Any:  # noqa: ANN401
        response = await getattr(chat, way)(message)
        if way == "astream_chat":
            assert "".join([piece async for piece in response.async_response_gen()])
        return response

    if way.startswith("a"):
        return asyncio.run(wait())
    response = getattr(chat, way)(message)
    if way == "stream_chat":
        assert "".join(response.response_gen)
    return response


@pytest.mark.parametrize("way", WAYS)
def test_every_way_of_chatting_gives_answer_and_sources(index: MLPMemIndex, way: str) -> None:
    chat = index.as_chat_engine()
    response = talk(chat, way, QUESTION)
    assert str(response) == RIGHT
    assert [source.node.ref_doc_id for source in response.source_nodes] == ["doc-10"]
    assert response.source_nodes[0].node.metadata[LABEL] == TRACED
    assert [message.content for message in chat.chat_history] == [QUESTION, RIGHT]
    assert talk(index.as_chat_engine(attribution="none"), way, QUESTION).source_nodes == []


@pytest.mark.parametrize("way", ["achat", "astream_chat"])
def test_sources_are_looked_for_beside_the_event_loop(
    index: MLPMemIndex, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    threads: list[threading.Thread] = []
    trace = MemoryModel.origins

    def noting(*args: Any) -> Any:  # noqa: ANN401
        threads.append(threading.current_thread())
        return trace(*args)

    monkeypatch.setattr(MemoryModel, "origins", noting)
    assert talk(index.as_chat_engine(), way, QUESTION).source_nodes
    assert len(threads) == 1
    assert threads[0] is not threading.current_thread()


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("prompt", [None, PromptTemplate("{chat_history} Say: {question}")])
def test_one_question_is_made_of_the_conversation_by_the_base_model(
    index: MLPMemIndex, prompt: PromptTemplate | None, way: str
) -> None:
    base = index.as_llm(max_new_tokens=16, lambda_=0.0)
    asked = base.predict(
        prompt or DEFAULT_PROMPT, question=NEXT, chat_history=messages_to_history_str(SAID)
    )
    answer = str(index.as_query_engine().query(asked))
    chat = index.as_chat_engine(chat_history=list(SAID), condense_question_prompt=prompt)
    response = talk(chat, way, NEXT)
    assert response.sources[0].raw_input == {"query": asked}
    assert str(response) == answer.strip()
    assert [m.content for m in chat.chat_history] == [QUESTION, RIGHT, NEXT, answer.strip()]
    chat.reset()
    assert str(talk(chat, way, QUESTION)) == RIGHT  # a first message is asked as it is


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_chat_tells_what_the_query_engine_tells(index: MLPMemIndex, asynchronous: bool) -> None:
    chat: Any = index.as_chat_engine()
    question = "Who found wild honey in the old mill?"
    response = asyncio.run(chat.achat(question)) if asynchronous else chat.chat(question)
    told = response.metadata["mlpmem"]
    assert told["route"] == "memory"
    assert told["confidence"] > 0


def test_a_simple_chat_continues_the_history(index: MLPMemIndex) -> None:
    chat = index.as_chat_engine(
        chat_mode="simple", chat_history=list(SAID), system_prompt="Be brief."
    )
    system = ChatMessage(role=MessageRole.SYSTEM, content="Be brief.")
    asked = ChatMessage(role=MessageRole.USER, content=NEXT)
    assert str(chat.chat(NEXT)) == index.llm.chat([system, *SAID, asked]).message.content


def test_a_memory_of_the_conversation_is_kept_by_whoever_gave_it(index: MLPMemIndex) -> None:
    memory = ChatMemoryBuffer.from_defaults(chat_history=list(SAID), token_limit=500)
    for mode in (ChatMode.CONDENSE_QUESTION, ChatMode.SIMPLE):
        index.as_chat_engine(chat_mode=mode, memory=memory).chat(NEXT)
    contents = [message.content for message in memory.get_all()]
    assert contents[:3] == [QUESTION, RIGHT, NEXT]
    assert (contents[4], len(contents)) == (NEXT, 6)
    with pytest.raises(ConfigError, match="memory and chat_history are both given"):
        index.as_chat_engine(memory=memory, chat_history=list(SAID))


def test_the_question_that_was_made_is_printed_if_asked_for(
    index: MLPMemIndex, capsys: pytest.CaptureFixture[str]
) -> None:
    index.as_chat_engine(verbose=True).chat(QUESTION)
    assert f"Querying with: {QUESTION}" in capsys.readouterr().out
    index.as_chat_engine().chat(QUESTION)
    index.as_chat_engine(chat_mode="simple", verbose=True).chat(QUESTION)
    index.as_query_engine(verbose=True).query(QUESTION)
    assert capsys.readouterr().out == ""


def test_what_a_chat_cannot_do_is_refused(index: MLPMemIndex) -> None:
    with pytest.raises(ConfigError, match="attribution 'lazy' would have no effect"):
        index.as_chat_engine(attribution="lazy")
    with pytest.raises(ConfigError, match="chat mode 'clever' is not known; a memory chats in"):
        index.as_chat_engine(chat_mode="clever")
    with pytest.raises(ConfigError, match="chat mode 'react' reads retrieved passages or is"):
        index.as_chat_engine(chat_mode="react")
    with pytest.raises(ConfigError, match="simple chat does not take condense_question_prompt"):
        index.as_chat_engine(chat_mode="simple", condense_question_prompt=DEFAULT_PROMPT)
