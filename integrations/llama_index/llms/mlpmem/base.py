"""`MLPMemLLM`: complete and chat, whole or as streams, plain or async."""

from __future__ import annotations

import pickle
from collections.abc import AsyncGenerator, Callable, Generator, Sequence
from contextlib import aclosing, closing
from pathlib import Path
from typing import Any, Self, TypeVar

import torch
from llama_index.core.base.llms.generic_utils import messages_to_prompt as plain_messages
from llama_index.core.base.llms.types import (
    ChatMessage,
    ChatResponse,
    ChatResponseAsyncGen,
    ChatResponseGen,
    CompletionResponse,
    CompletionResponseAsyncGen,
    CompletionResponseGen,
    LLMMetadata,
    MessageRole,
)
from llama_index.core.bridge.pydantic import BaseModel, ConfigDict, Field, PrivateAttr
from llama_index.core.llms.callbacks import llm_chat_callback, llm_completion_callback
from llama_index.core.llms.llm import LLM, default_completion_to_prompt
from llama_index.core.llms.loading import RECOGNIZED_LLMS
from llama_index.core.prompts import PromptTemplate
from llama_index.core.types import Model

from llama_index.llms.mlpmem.calls import decoding_of, listed, raw, warn_of_cut
from llama_index.llms.mlpmem.grammar import JsonGrammar, can_constrain
from llama_index.llms.mlpmem.loading import check_loaded, shared_model
from llama_index.llms.mlpmem.messages import asked_of, to_messages, with_system
from mlpmem_rag.decoding import Decoding
from mlpmem_rag.errors import ConfigError
from mlpmem_rag.memory_model import AnswerStream, MemoryModel

DEFAULT_NEW_TOKENS = 256
TOGETHER = 8
"""Requests in a batch, where a batch changes no answer."""
FORMS = frozenset({"json_schema", "logits_processor"})
"""Arguments of a call that sees to the form of its answer itself."""

_R = TypeVar("_R", CompletionResponse, ChatResponse)
_Respond = Callable[[str, str | None, dict[str, Any] | None], _R]
"""Makes a response of the text so far, what is new of it, and `raw` at the end."""


class MLPMemLLM(LLM):
    """A memory mixed into its base model, wherever LlamaIndex takes an LLM.

    `lambda_=0` is the base model exactly. Objects of the same folder share one loaded model. Calls
    take `max_tokens` (or `max_new_tokens`), `temperature`, `top_p`, `stop`, `seed`, `lambda_`,
    `logits_processor`, `json_schema` (a pydantic class or a schema that the answer keeps to) and
    `asked` (what the memory is asked, where it is not the user's last message), and refuse
    anything else.

    Example:
        llm = MLPMemLLM("./memory")
        print(llm.complete("What does the warranty cover?"))

    Raises:
        ArtifactError: the folder is missing, damaged, or belongs to another base model.
        BaseModelError: the base model cannot be loaded.
        ConfigError: a setting outside what is allowed.
    """

    model_config = ConfigDict(extra="forbid")

    memory: str = Field(description="Folder written by `mlpmem-rag train`.")
    base_model: str | None = Field(
        default=None, description="Where the base model is now, if not where it was in training."
    )
    device: str = Field(default="auto", description="auto, cpu or cuda.")
    dtype: str = Field(default="auto", description="auto, float32, bfloat16 or float16.")
    lambda_: float | None = Field(
        default=None,
        description="Mixing weight, 0 (base model) to 1 (memory); None: the trained one.",
    )
    max_new_tokens: int | None = Field(
        default=None, description="Most tokens to generate; None: 256, or half a small window."
    )
    temperature: float = Field(default=0.0, description="0: greedy.")
    top_p: float = Field(default=1.0, description="Share of the probability that is drawn from.")
    stop: list[str] = Field(default_factory=list, description="Strings that end the text.")
    seed: int | None = Field(default=None, description="Of the draws; None: another each time.")
    batch_size: int | None = Field(
        default=None,
        description="Most waiting requests of equal settings that are generated together; None: 8 "
        "in float32, else 1, since in bfloat16 an unsure answer can then come out otherwise.",
    )
    is_chat_model: bool = Field(
        default=True,
        description="Whether query engines send messages (in the form the memory was taught) "
        "or formatted text.",
    )
    logits_processor: Any = Field(
        default=None,
        exclude=True,
        description="transformers LogitsProcessor, or several: a grammar, say.",
    )

    _model: MemoryModel = PrivateAttr()

    def __init__(self, memory: str | Path | MemoryModel, **fields: Any) -> None:  # noqa: ANN401
        given = memory if isinstance(memory, MemoryModel) else None
        folder = memory if given is None else given.folder or ""
        super().__init__(**{"memory": str(folder), **fields})
        self._check(given)
        self._model = given or shared_model(
            self.memory, base_model=self.base_model, device=self.device, dtype=self.dtype
        )
        if self.max_new_tokens is None:
            self.max_new_tokens = min(DEFAULT_NEW_TOKENS, self._model.context_window // 2)
        self._model.room_for_prompt(self._decoding.max_new_tokens)

    @classmethod
    def from_model(cls, memory_model: MemoryModel, **fields: Any) -> Self:  # noqa: ANN401
        """An LLM on a memory that is loaded already, shared with others.

        Raises:
            ConfigError: a setting outside what is allowed, or another `device` or `dtype` than
                the memory was loaded with.
        """
        return cls(memory_model, **fields)

    @property
    def model(self) -> MemoryModel:
        """The memory on its base model."""
        return self._model

    @property
    def mixing_weight(self) -> float:
        """Lambda in use: the one set here, else the trained one."""
        return self._model.model.memory_lambda if self.lambda_ is None else self.lambda_

    @classmethod
    def class_name(cls) -> str:
        """Name in serialised form."""
        return "MLPMemLLM"

    @property
    def metadata(self) -> LLMMetadata:
        """What the model can do."""
        return LLMMetadata(
            context_window=self._model.context_window,
            num_output=self._decoding.max_new_tokens,
            is_chat_model=self.is_chat_model,
            is_function_calling_model=False,
            model_name=self._name,
        )

    # The eight calls.

    @llm_completion_callback()
    def complete(
        self,
        prompt: str,
        formatted: bool = False,
        **kwargs: Any,  # noqa: ANN401
    ) -> CompletionResponse:
        """Answer a prompt; with `formatted`, continue the text as it stands."""
        return self._whole(self._completing(prompt, formatted, kwargs), _completion)

    @llm_chat_callback()
    def chat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponse:  # noqa: ANN401
        """Continue a conversation."""
        return self._whole(self._chatting(messages, kwargs), _reply)

    @llm_completion_callback()
    def stream_complete(
        self,
        prompt: str,
        formatted: bool = False,
        **kwargs: Any,  # noqa: ANN401
    ) -> CompletionResponseGen:
        """Like `complete`, piece by piece. Leaving the loop stops the generation."""
        return self._parts(self._completing(prompt, formatted, kwargs), _completion)

    @llm_chat_callback()
    def stream_chat(
        self,
        messages: Sequence[ChatMessage],
        **kwargs: Any,  # noqa: ANN401
    ) -> ChatResponseGen:
        """Like `chat`, piece by piece."""
        return self._parts(self._chatting(messages, kwargs), _reply)

    @llm_completion_callback()
    async def acomplete(
        self,
        prompt: str,
        formatted: bool = False,
        **kwargs: Any,  # noqa: ANN401
    ) -> CompletionResponse:
        """Like `complete`; the event loop stays free."""
        return await self._awhole(self._completing(prompt, formatted, kwargs), _completion)

    @llm_chat_callback()
    async def achat(
        self,
        messages: Sequence[ChatMessage],
        **kwargs: Any,  # noqa: ANN401
    ) -> ChatResponse:
        """Like `chat`; the event loop stays free."""
        return await self._awhole(self._chatting(messages, kwargs), _reply)

    @llm_completion_callback()
    async def astream_complete(
        self,
        prompt: str,
        formatted: bool = False,
        **kwargs: Any,  # noqa: ANN401
    ) -> CompletionResponseAsyncGen:
        """Like `stream_complete`; the event loop stays free."""
        return self._aparts(self._completing(prompt, formatted, kwargs), _completion)

    @llm_chat_callback()
    async def astream_chat(
        self,
        messages: Sequence[ChatMessage],
        **kwargs: Any,  # noqa: ANN401
    ) -> ChatResponseAsyncGen:
        """Like `stream_chat`; the event loop stays free."""
        return self._aparts(self._chatting(messages, kwargs), _reply)

    # Objects: programs say the schema in the prompt, and where a grammar can be had, it is kept to.
    # The memory is asked the prompt alone.

    def structured_predict(
        self,
        output_cls: type[Model],
        prompt: PromptTemplate,
        llm_kwargs: dict[str, Any] | None = None,
        **prompt_args: Any,  # noqa: ANN401
    ) -> Model:
        """Answer with an object."""
        own, kept = self._in_form(output_cls, prompt, llm_kwargs, prompt_args)
        made: Model = super().structured_predict(output_cls, own, kept, **prompt_args)
        return made

    async def astructured_predict(
        self,
        output_cls: type[Model],
        prompt: PromptTemplate,
        llm_kwargs: dict[str, Any] | None = None,
        **prompt_args: Any,  # noqa: ANN401
    ) -> Model:
        """Like `structured_predict`; the event loop stays free."""
        own, kept = self._in_form(output_cls, prompt, llm_kwargs, prompt_args)
        made: Model = await super().astructured_predict(output_cls, own, kept, **prompt_args)
        return made

    def _structured_stream_call(
        self,
        output_cls: type[Model],
        prompt: PromptTemplate,
        llm_kwargs: dict[str, Any] | None = None,
        **prompt_args: Any,  # noqa: ANN401
    ) -> Generator[Any, None, None]:
        own, kept = self._in_form(output_cls, prompt, llm_kwargs, prompt_args)
        return super()._structured_stream_call(output_cls, own, kept, **prompt_args)

    async def _structured_astream_call(
        self,
        output_cls: type[Model],
        prompt: PromptTemplate,
        llm_kwargs: dict[str, Any] | None = None,
        **prompt_args: Any,  # noqa: ANN401
    ) -> AsyncGenerator[Any, None]:
        own, kept = self._in_form(output_cls, prompt, llm_kwargs, prompt_args)
        return await super()._structured_astream_call(output_cls, own, kept, **prompt_args)

    # What they share.

    def _check(self, given: MemoryModel | None) -> None:
        """Refuse what would have no effect."""
        if given is not None:
            check_loaded(given, device=self.device, dtype=self.dtype)
        elif not self.memory:
            raise ConfigError(
                "memory is empty: this LLM was made from a loaded model without a folder; give "
                "the folder of a memory, or use MLPMemLLM.from_model"
            )
        if self.query_wrapper_prompt is not None:
            raise ConfigError(
                "query_wrapper_prompt is not taken: LlamaIndex applies it to some calls only; "
                "give completion_to_prompt and messages_to_prompt"
            )

    def _in_form(
        self,
        output_cls: type[BaseModel],
        prompt: PromptTemplate,
        llm_kwargs: dict[str, Any] | None,
        prompt_args: dict[str, Any],
    ) -> tuple[PromptTemplate, dict[str, Any]]:
        """Prompt and arguments of a call that has to give an object.

        The prompt is a copy: programs set their output parser, which writes the schema, on it.
        """
        own = prompt.model_copy(update={"output_parser": None})
        given = {name: value for name, value in (llm_kwargs or {}).items() if value is not None}
        given.setdefault("asked", asked_of(own.format_messages(llm=self, **prompt_args)))
        tokenizer = self._model.tokenizer
        free = self.logits_processor is None and FORMS.isdisjoint(given)
        if free and can_constrain(tokenizer):
            given["logits_processor"] = JsonGrammar(tokenizer, output_cls, lenient=True)
        return own, given

    @property
    def _decoding(self) -> Decoding:
        count, together = self.max_new_tokens, self.batch_size
        if together is None:
            together = TOGETHER if self._model.model.dtype == torch.float32 else 1
        return Decoding(
            max_new_tokens=DEFAULT_NEW_TOKENS if count is None else count,
            lambda_=self.lambda_,
            temperature=self.temperature,
            top_p=self.top_p,
            stop=tuple(self.stop),
            seed=self.seed,
            logits_processors=()
            if self.logits_processor is None
            else listed(self.logits_processor),
            batch_size=together,
        )

    @property
    def _name(self) -> str:
        return f"mlpmem:{Path(self.memory).name or 'memory'}"

    def _completing(self, prompt: str, formatted: bool, kwargs: dict[str, Any]) -> AnswerStream:
        decoding, asked = decoding_of(self._decoding, kwargs, self._model.tokenizer)
        if formatted:
            if asked is None and not self.is_chat_model:  # how prompts of templates come then
                asked = prompt
            return self._model.continue_text(prompt, decoding, asked=asked)
        messages = [ChatMessage(role=MessageRole.USER, content=prompt)]
        to_prompt = self.completion_to_prompt
        if to_prompt is None or to_prompt is default_completion_to_prompt:
            return self._reply_to(messages, decoding, asked)
        question = asked_of(messages)
        text = to_prompt(self._extend_prompt(prompt))
        return self._model.continue_text(text, decoding, asked=asked or question, strip=True)

    def _chatting(self, messages: Sequence[ChatMessage], kwargs: dict[str, Any]) -> AnswerStream:
        decoding, asked = decoding_of(self._decoding, kwargs, self._model.tokenizer)
        return self._reply_to(messages, decoding, asked)

    def _reply_to(
        self, messages: Sequence[ChatMessage], decoding: Decoding, asked: str | None
    ) -> AnswerStream:
        question = asked_of(messages)
        conversation = with_system(messages, self.system_prompt)
        to_prompt = self.messages_to_prompt
        if to_prompt is None or to_prompt is plain_messages:  # the model's own form is better
            return self._model.reply(to_messages(conversation), decoding, asked=asked or question)
        text = to_prompt(conversation)
        return self._model.continue_text(text, decoding, asked=asked or question, strip=True)

    def _whole(self, stream: AnswerStream, as_response: _Respond[_R]) -> _R:
        for _ in stream:
            pass
        return as_response(stream.answer.text, None, self._raw(stream))

    async def _awhole(self, stream: AnswerStream, as_response: _Respond[_R]) -> _R:
        async with aclosing(aiter(stream)) as pieces:
            async for _ in pieces:
                pass
        return as_response(stream.answer.text, None, self._raw(stream))

    def _parts(self, stream: AnswerStream, as_response: _Respond[_R]) -> Generator[_R, None, None]:
        text = ""
        with closing(iter(stream)) as pieces:
            for piece in pieces:
                if piece:
                    text += piece
                    yield as_response(text, piece, None)
        yield as_response(text, "", self._raw(stream))

    async def _aparts(
        self, stream: AnswerStream, as_response: _Respond[_R]
    ) -> AsyncGenerator[_R, None]:
        text = ""
        async with aclosing(aiter(stream)) as pieces:
            async for piece in pieces:
                if piece:
                    text += piece
                    yield as_response(text, piece, None)
        yield as_response(text, "", self._raw(stream))

    def _raw(self, stream: AnswerStream) -> dict[str, Any]:
        answer = stream.answer
        warn_of_cut(answer, self._model.context_window)
        return raw(answer, model=self._name)

    # Copies share the loaded model; what is pickled loads it again.

    def __deepcopy__(self, memo: dict[int, Any] | None = None) -> Self:
        """Copy the settings, not the model."""
        memo = {} if memo is None else memo
        memo[id(self._model)] = self._model
        return super().__deepcopy__(memo)

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        """Keep the settings, and of them what can be pickled."""
        return _unpickled, (type(self), {k: v for k, v in self.__dict__.items() if _picklable(v)})


def _unpickled(cls: type[MLPMemLLM], fields: dict[str, Any]) -> MLPMemLLM:
    return cls(**fields)


def _picklable(value: Any) -> bool:  # noqa: ANN401
    """LlamaIndex leaves out what is not: handlers of callbacks, functions defined in place."""
    try:
        pickle.dumps(value)
    except Exception:
        return False
    return True


def _completion(text: str, delta: str | None, raw: dict[str, Any] | None) -> CompletionResponse:
    return CompletionResponse(text=text, delta=delta, raw=raw)


def _reply(text: str, delta: str | None, raw: dict[str, Any] | None) -> ChatResponse:
    message = ChatMessage(role=MessageRole.ASSISTANT, content=text)
    return ChatResponse(message=message, delta=delta, raw=raw)


RECOGNIZED_LLMS[MLPMemLLM.class_name()] = MLPMemLLM
