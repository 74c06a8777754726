"""What every base model with memories beside it shares: forward, generation, the query vector.

Knows how the base model runs and where the request comes from; what the memories are, and how
their distributions are mixed with the base's, is up to the children.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    Cache,
    GenerationMixin,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.tokenization_utils_base import PreTrainedTokenizerBase
from transformers.utils.generic import can_return_tuple

from mlpmem_rag.asked import Marks, asked_question, question_marks
from mlpmem_rag.backbone import decoder_layers, mlp_sublayer, text_config
from mlpmem_rag.errors import ConfigError
from mlpmem_rag.few_rows import other_order, quicken
from mlpmem_rag.mixing import check_lambda
from mlpmem_rag.query_cache import cached_query, keep_query
from mlpmem_rag.recollection import RecollectionProcessor
from mlpmem_rag.tap import Tap, tap_on

MINE = ("memory_lambda", "query_vector", "recall")
"""What `generate` hands to every forward pass and the base model does not know."""
PIECE = 64
"""Positions that are mixed at once where there may be many."""


class AugmentedLM(PreTrainedModel, GenerationMixin):
    """A base language model whose next-token distribution is mixed with that of memories."""

    base: Any
    base_model_prefix = "base"
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    # The base model decides how it attends; these only let the question through to it.
    _supports_sdpa = _supports_flash_attn = _supports_flex_attn = True
    _supports_attention_backend = True

    def __init__(self, config: PreTrainedConfig, base: PreTrainedModel) -> None:
        super().__init__(config)
        self.base = base
        quicken(base)
        self.generation_config = base.generation_config
        self.tokenizer: PreTrainedTokenizerBase | None = None
        self._taps: dict[int, Tap] = {}
        self._marks: tuple[PreTrainedTokenizerBase, Marks | None] | None = None
        self._encoded: tuple[tuple[str, ...], Tensor] | None = None
        self._recalled: tuple[Tensor, int | Tensor, Tensor] | None = None

    # What a child adds.

    @property
    def query_size(self) -> int:
        """Q, width of the query vectors; 0 where no memory reads one."""
        raise NotImplementedError

    @property
    def request_size(self) -> int:
        """R, width of the query vectors with their tokens; Q where no memory compares words."""
        raise NotImplementedError

    def encode_queries(self, texts: Sequence[str]) -> Tensor:
        """Query vectors of texts, and their tokens'. *Shape:* B texts -> (B, R)."""
        raise NotImplementedError

    def recall(self, query: Tensor) -> Tensor:
        """What the memories take requests for. *Shape:* (B, Q) or (B, R) -> (B, P)."""
        raise NotImplementedError

    def place(self, query: Tensor) -> Tensor:
        """As `recall` lays them out, taken as they are. *Shape:* (B, Q) or (B, R) -> (B, P)."""
        raise NotImplementedError

    def mixed(
        self,
        logits: Tensor,
        states: Mapping[int, Tensor],
        query: Tensor | None,
        lambda_: float,
        *,
        asked: bool,
    ) -> Tensor:
        """Log-probabilities of base model and memories together.

        Args:
            logits: the base model's. *Shape:* (B, T, W).
            states: of each tapped layer. *Shape:* (B, T, D).
            query: what is asked, recalled, or the text before; a row of zeros where nothing is.
                *Shape:* (B, P).
            lambda_: mixing weight, above 0.
            asked: whether `query` is of questions.
        """
        raise NotImplementedError

    def mixes(self, lambda_: float) -> bool:
        """Whether a memory has any weight at this one."""
        return lambda_ > 0

    def processors(self, query: Tensor, begins: Tensor, lambda_: float) -> list[LogitsProcessor]:
        """What `generate` does to the scores of answers to these requests, before what it is given.

        `begins` tells where a prompt ends with the beginning of one. *Shapes:* (B, R), (B,).
        """
        raise NotImplementedError

    # The mixing weight.

    @property
    def memory_lambda(self) -> float:
        """Mixing weight: 0 is the base model alone, 1 the memory alone where its gate is open."""
        return float(self.config.memory_lambda)

    @memory_lambda.setter
    def memory_lambda(self, value: float) -> None:
        self.config.memory_lambda = check_lambda(value)

    # Running.

    @can_return_tuple  # type: ignore[untyped-decorator]
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        memory_lambda: float | None = None,
        query_vector: Tensor | None = None,
        query_text: str | Sequence[str] | None = None,
        recall: bool = True,
        **kwargs: Any,  # noqa: ANN401
    ) -> CausalLMOutputWithPast:
        """Log-probabilities of the mixture as `logits` (the base's own logits at lambda 0).

        What is asked is looked for in this order: `query_vector` or `query_text`; what an earlier
        pass left in the cache; at prefill, the last user message in the ids. Found nowhere, no
        request is known.

        Args:
            input_ids: *Shape:* (B, T).
            attention_mask: as the base takes it.
            position_ids: as the base takes it.
            past_key_values: the base's cache; the query vectors travel in it.
            inputs_embeds: instead of ids. *Shape:* (B, T, D).
            labels: token ids to predict, -100 where none; gives a loss. *Shape:* (B, T).
            use_cache: whether to return a cache.
            logits_to_keep: as in transformers; the memory, too, runs on these positions only.
            memory_lambda: mixing weight of this call instead of the model's.
            query_vector: what is asked, as `encode_queries` gives it, or its query vector alone; a
                row of zeros where nothing is. *Shape:* (B, R) or (B, Q).
            query_text: what is asked, in words; one text for all rows or one for each.
            recall: False: what is given is no question but the text before: it is not taken for
                a question that was learned, and the memory has no more say than where nothing is
                asked.
            **kwargs: everything else the base model takes, and what the loss takes.

        Raises:
            ConfigError: lambda outside 0..1, or query vectors of another number or width.
        """
        lambda_ = self.memory_lambda if memory_lambda is None else check_lambda(memory_lambda)
        given: Any = input_ids if inputs_embeds is None else inputs_embeds
        query_vector = self._given_query(query_vector, query_text, len(given))
        query, asked = None, recall
        if query_vector is None and self.query_size and lambda_ > 0:
            query, asked = cached_query(past_key_values)
            if query is None:
                query_vector = self._asked_in(input_ids, past_key_values)
        if query_vector is not None and self.query_size:
            query, asked = self.told(self._checked(query_vector, len(given)), recall=recall), recall
        loss_kwargs = {n: kwargs.pop(n) for n in ("num_items_in_batch",) if n in kwargs}
        taps = self._taps if self.mixes(lambda_) else {}
        if taps or self.base.dtype == torch.bfloat16:  # there, the base's own bits stay the same
            logits_to_keep = _named(logits_to_keep, given)
        for tap in taps.values():
            tap.listen()
        with other_order() if taps and not torch.compiler.is_compiling() else nullcontext():
            output = self.base(
                input_ids=input_ids,
                attention_mask=attention_mask,
                position_ids=position_ids,
                past_key_values=past_key_values,
                inputs_embeds=inputs_embeds,
                use_cache=use_cache,
                logits_to_keep=logits_to_keep,
                **kwargs,
            )
        logits = output.logits
        if taps:
            states = {
                layer: _kept(tap.take(), len(logits), logits_to_keep) for layer, tap in taps.items()
            }
            logits = self._mixed_in_pieces(logits, states, query, lambda_, asked=asked)
        if query is not None:
            keep_query(output.past_key_values, query, asked=asked)
        loss = None
        if labels is not None:
            vocabulary = logits.shape[-1]
            loss = self.loss_function(logits, labels, vocab_size=vocabulary, **loss_kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=output.past_key_values,
            hidden_states=output.hidden_states,
            attentions=output.attentions,
        )

    def _mixed_in_pieces(
        self,
        logits: Tensor,
        states: Mapping[int, Tensor],
        query: Tensor | None,
        lambda_: float,
        *,
        asked: bool,
    ) -> Tensor:
        """`mixed`, some positions at a time where no gradient is asked for.

        Its several copies of the logits, in float32 and of a whole text, would be gigabytes.
        """
        batch, length, _ = logits.shape
        step = max(1, PIECE // batch)
        whole = torch.is_grad_enabled() or torch.compiler.is_compiling()
        if whole or length <= step:
            return self.mixed(logits, states, query, lambda_, asked=asked)
        out: Tensor | None = None
        for start in range(0, length, step):
            part = slice(start, start + step)
            inside = {layer: state[:, part] for layer, state in states.items()}
            piece = self.mixed(logits[:, part], inside, query, lambda_, asked=asked)
            if out is None:
                out = piece.new_empty(logits.shape)
            out[:, part] = piece
        assert out is not None
        return out

    def generate(
        self,
        inputs: Tensor | None = None,
        *args: Any,  # noqa: ANN401
        query_text: str | Sequence[str] | None = None,
        query_vector: Tensor | None = None,
        **kwargs: Any,  # noqa: ANN401
    ) -> Any:  # noqa: ANN401
        """As in transformers, and what is asked; without it, the last user message in the ids.

        Where a prompt ends with the beginning of an answer, that which was taught to the recalled
        question has its share; see `mlpmem_rag.recollection`.

        Args:
            inputs: token ids. *Shape:* (B, T).
            *args: as in transformers.
            query_text: what is asked, in words; one text for all rows or one for each.
            query_vector: what is asked, as `encode_queries` gives it, or its query vector alone.
                *Shape:* (B, R) or (B, Q).
            **kwargs: as in transformers, and `memory_lambda`.

        Raises:
            ConfigError: lambda outside 0..1, or query vectors of another number or width.
        """
        ids = inputs if inputs is not None else kwargs.get("input_ids")
        # Once for all steps, and as a tensor, which transformers repeats for beams and samples.
        given = kwargs.get("inputs_embeds") if ids is None else ids
        count = 1 if given is None else len(given)
        query_vector = self._given_query(query_vector, query_text, count)
        own = kwargs.get("memory_lambda")
        lambda_ = self.memory_lambda if own is None else check_lambda(own)
        mixes = self.mixes(lambda_)
        if query_vector is None and self.query_size and ids is not None and mixes:
            query_vector = self.queries_in(ids)
        if query_vector is not None and query_vector.is_inference():
            # As others are, it tells without a look at its numbers that they are still the same.
            with torch.inference_mode(False):
                query_vector = query_vector.clone()
        if query_vector is not None and self.query_size and mixes and kwargs.get("recall", True):
            query_vector = self._checked(query_vector, count)
            begins = self._begins_answers(ids)
            mine: list[LogitsProcessor] = []
            if bool(begins.any()):
                mine = self.processors(query_vector, begins, lambda_)
            if mine and len(args) > 1:  # by its place
                args = (args[0], LogitsProcessorList([*mine, *(args[1] or ())]), *args[2:])
            elif mine:
                given = kwargs.pop("logits_processor", None) or ()
                kwargs["logits_processor"] = LogitsProcessorList([*mine, *given])
        parent: Any = super()  # annotated for other classes
        return parent.generate(inputs, *args, query_vector=query_vector, **kwargs)

    def _known_marks(self) -> Marks | None:
        """How prompts show a question; None: that is not known."""
        if self.tokenizer is None or torch.compiler.is_compiling():
            return None
        known = self._marks
        if known is None or known[0] is not self.tokenizer:
            self._marks = known = self.tokenizer, question_marks(self.tokenizer)
        return known[1]

    def _begins_answers(self, token_ids: Tensor | None) -> Tensor:
        """Whether prompts end where an answer begins; those that have begun it do not.

        *Shape:* (B, T) -> (B,), of nothing where there are no ids or no marks.
        """
        marks = self._known_marks()
        if marks is None or self.tokenizer is None or token_ids is None:
            return torch.zeros(0, dtype=torch.bool, device=self.device)
        texts = self.tokenizer.batch_decode(token_ids, clean_up_tokenization_spaces=False)
        return torch.tensor([marks.ends(text) for text in texts], device=self.device)

    def queries_in(self, token_ids: Tensor) -> Tensor | None:
        """Vectors of the questions that prompts ask; None where none does. *Shape:* (B, T)."""
        marks = self._known_marks()
        if marks is None or self.tokenizer is None:
            return None
        found = [asked_question(self.tokenizer, marks, row) for row in token_ids.tolist()]
        texts = tuple(dict.fromkeys(text for text in found if text is not None))
        if not texts:
            return None
        encoded = self._encoded  # another thread may put its own there
        if encoded is None or encoded[0] != texts:  # without a cache, every step asks
            self._encoded = encoded = (texts, self.encode_queries(texts))
        vectors = encoded[1]
        rows = [
            torch.zeros_like(vectors[0]) if t is None else vectors[texts.index(t)] for t in found
        ]
        return torch.stack(rows)

    def _given_query(
        self, vector: Tensor | None, text: str | Sequence[str] | None, batch: int
    ) -> Tensor | None:
        if text is None or not self.query_size:
            return vector
        if vector is not None:
            raise ConfigError("query_vector and query_text were both given; give one of them")
        return self.encode_queries([text] * batch if isinstance(text, str) else text)

    def _asked_in(self, input_ids: Tensor | None, cache: Cache | None) -> Tensor | None:
        if input_ids is None or torch.compiler.is_compiling():
            return None
        prefill = cache is None or int(cache.get_seq_length()) == 0
        return self.queries_in(input_ids) if prefill else None

    def told(self, query: Tensor, *, recall: bool) -> Tensor:
        """What the memories read, of a question or of text that goes on. *Shape:* -> (B, P)."""
        return self.recalled(query) if recall else self.place(query)

    def recalled(self, query: Tensor) -> Tensor:
        """`recall`, once for the tensor that generation hands to every step of its own."""
        if torch.compiler.is_compiling():
            return self.recall(query)
        last = self._recalled
        if last is None or last[0] is not query or not _holds(query, last[1]):
            self._recalled = last = (query, _content(query), self.recall(query))
        return last[2]

    def _checked(self, query_vector: Tensor, batch: int) -> Tensor:
        """The vectors, of the right shape and on the right device. *Shape:* (B, Q) or (B, R)."""
        allowed = sorted({(batch, self.query_size), (batch, self.request_size)})
        if tuple(query_vector.shape) not in allowed:
            raise ConfigError(
                f"query_vector has shape {tuple(query_vector.shape)}; this memory takes "
                f"{' or '.join(map(str, allowed))}, one vector for each sequence"
            )
        return query_vector.to(self.device)

    # What transformers asks of a model that generates.

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        *args: Any,  # noqa: ANN401
        inputs_embeds: Tensor | None = None,  # by name: `generate` looks whether it is there
        **kwargs: Any,  # noqa: ANN401
    ) -> dict[str, Any]:
        """The base's, since every architecture has its own needs."""
        mine = {name: kwargs.pop(name) for name in MINE if name in kwargs}
        inputs: dict[str, Any] = self.base.prepare_inputs_for_generation(
            input_ids, *args, inputs_embeds=inputs_embeds, **kwargs
        )
        return {**inputs, **mine}

    def _get_candidate_generator(self, **kwargs: Any) -> Any:  # type: ignore[override]  # noqa: ANN401
        """An assistant without a memory is not told what is asked."""
        assistant = kwargs.get("assistant_model")
        if assistant is not None and not isinstance(assistant, AugmentedLM):
            model_kwargs = kwargs["model_kwargs"]
            kwargs["model_kwargs"] = {n: v for n, v in model_kwargs.items() if n not in MINE}
        if kwargs.get("assistant_tokenizer") is not None:  # it counts in other tokens
            given = kwargs["logits_processor"]
            others = [p for p in given if not isinstance(p, RecollectionProcessor)]
            kwargs["logits_processor"] = LogitsProcessorList(others)
        parent: Any = super()  # annotated for other classes
        return parent._get_candidate_generator(**kwargs)

    def get_input_embeddings(self) -> nn.Module:
        """The base's."""
        embeddings: nn.Module = self.base.get_input_embeddings()
        return embeddings

    def set_input_embeddings(self, value: nn.Module) -> None:
        """The base's."""
        self.base.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        """The base's."""
        embeddings: nn.Module = self.base.get_output_embeddings()
        return embeddings

    def set_output_embeddings(self, value: nn.Module) -> None:
        """The base's."""
        self.base.set_output_embeddings(value)

    def _tap_layers(self, *layers: int) -> None:
        """Read the hidden states of these decoder layers from now on."""
        stack, width = decoder_layers(self.base), int(text_config(self.base).hidden_size)
        if others := [layer for layer in layers if not 0 <= layer < len(stack)]:
            raise ConfigError(f"layer {others[0]}: the base model has {len(stack)}, counted from 0")
        self._taps = {layer: tap_on(mlp_sublayer(stack[layer], width)) for layer in layers}


def _content(query: Tensor) -> int | Tensor:
    """What tells later whether a tensor has been written to: its version, else a copy."""
    return query.clone() if query.is_inference() else query._version


def _holds(query: Tensor, content: int | Tensor) -> bool:
    """Whether a tensor is still what `_content` has noted."""
    if isinstance(content, int):
        return query._version == content
    return torch.equal(query, content)


def _named(logits_to_keep: int | Tensor, given: Tensor) -> int | Tensor:
    """The last n positions by their numbers; a tensor, and 0 for all, stay as they are.

    A slice of the last positions is not contiguous, and on CPUs torch then copies the output
    matrix once for each sequence of the batch: gigabytes.
    """
    if isinstance(logits_to_keep, Tensor) or logits_to_keep == 0:
        return logits_to_keep
    length = given.shape[1]
    return torch.arange(max(0, length - logits_to_keep), length, device=given.device)


def _kept(state: Tensor, batch: int, logits_to_keep: int | Tensor) -> Tensor:
    """The positions whose logits are asked for. *Shape:* (B, T, D) or (B*T, D) -> (B, T', D)."""
    kept = logits_to_keep if isinstance(logits_to_keep, Tensor) else slice(None)
    return state.reshape(batch, -1, state.shape[-1])[:, kept]
