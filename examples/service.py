"""A web service that answers from a memory, whole or as a stream.

python examples/service.py demo/memory
curl localhost:8000/answer --json '{"question": "Which constellation is Vega in?"}'
curl -N localhost:8000/stream --json '{"question": "Which constellation is Vega in?"}'

Any number of clients may ask at once: requests wait for their turn on the one model, those that
wait are generated together, and the event loop never waits. What a client who hangs up has asked
is given up: FastAPI sees to it for streams, `while_connected` for whole answers.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

import typer
import uvicorn
from fastapi import FastAPI, HTTPException, Request
from fastapi.responses import StreamingResponse
from llama_index.core.base.response.schema import AsyncStreamingResponse
from pydantic import BaseModel

from llama_index.indices.managed.mlpmem import MLPMemIndex
from mlpmem_rag.errors import MLPMemError


class Question(BaseModel):
    question: str


class Answer(BaseModel):
    answer: str
    confidence: float | None


def service(index: MLPMemIndex) -> FastAPI:
    app = FastAPI(title="Ask the documents")
    whole = index.as_query_engine(attribution="none")
    streaming = index.as_query_engine(attribution="none", streaming=True)

    @app.post("/answer")
    async def answer(asked: Question, request: Request) -> Answer:
        response = await while_connected(request, query(whole, asked))
        told = (response.metadata or {})["mlpmem"]
        return Answer(answer=str(response), confidence=told["confidence"])

    @app.post("/stream")
    async def stream(asked: Question) -> StreamingResponse:
        response = await query(streaming, asked)
        assert isinstance(response, AsyncStreamingResponse)
        return StreamingResponse(response.response_gen, media_type="text/plain")

    return app


async def while_connected(request: Request, work: Coroutine[Any, Any, Any]) -> Any:  # noqa: ANN401
    task = asyncio.create_task(work)
    try:
        while not (await asyncio.wait([task], timeout=0.1))[0]:
            if await request.is_disconnected():
                raise HTTPException(499, "the client has hung up")
        return task.result()
    finally:
        task.cancel()


async def query(engine: Any, asked: Question) -> Any:  # noqa: ANN401
    try:
        return await engine.aquery(asked.question)
    except MLPMemError as error:
        raise HTTPException(422, str(error)) from error


def main(memory: Path, host: str = "127.0.0.1", port: int = 8000, batch_size: int = 8) -> None:
    index = MLPMemIndex.from_memory(memory, batch_size=batch_size)
    uvicorn.run(service(index), host=host, port=port)


if __name__ == "__main__":
    typer.run(main)
