"""Tokens that the memory decides alone: the rest of the base model's pass can wait.

With p = w p_mem + (1 - w) p_LM the base model moves at most 1 - w between any two tokens. Where the
memory's best token leads its second best by more, w (p_1 - p_2) > 1 - w, the mixture's best token
is the memory's, whatever the base model says. Its layers after the one that the memory reads, and
its head, then need not run. When a token is in doubt, they run once for all positions left out so
far.

The learned question that a request is recalled as has an answer, which the memory mostly gives
again, and which has a share of its own in the mixture (`mlpmem_rag.recollection`). Once a text has
begun like it, the rest is read at once, and its tokens are kept as far as the mixture chooses them:
speculative decoding (arXiv 2211.17192) with a draft that costs nothing.

The tokens are those of the plain way; only the base's last bits can differ, as they do whenever
positions are computed together instead of one by one.

Whether a base model can be run in two halves, a trial tells: both ways have to give the same bits.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from functools import cached_property
from operator import or_
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import DynamicCache, GenerationConfig, GenerationMixin, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from mlpmem_rag.backbone import decoder_layers, mlp_sublayer, text_config
from mlpmem_rag.few_rows import other_order
from mlpmem_rag.mixing import Share, mixture
from mlpmem_rag.model import MLPMemForCausalLM
from mlpmem_rag.recollection import Recollection, with_recollection
from mlpmem_rag.tap import tap_on

TRIAL = 8
"""Tokens of the trial."""
BY_LENGTH = ("dynamic", "longrope")
"""Rotary embeddings that differ with the length of the text: what was read cannot be kept."""
HARMLESS = frozenset(
    (
        *("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id"),
        *("max_length", "max_new_tokens", "transformers_version", "_from_model_config"),
        *("do_sample", "temperature", "top_k", "top_p", "min_p", "typical_p"),
        *("epsilon_cutoff", "eta_cutoff", "use_cache", "return_dict_in_generate"),
        *("output_attentions", "output_hidden_states", "output_scores", "output_logits"),
    )
)
"""Settings of a base model's own that change nothing where the best token is taken each time."""


class Line(Protocol):
    """One sequence of a batch, and whoever waits for it."""

    def take(self, token: int) -> bool:
        """The next token. Returns whether it was the last one."""

    def end(self) -> None:
        """Nothing more comes."""


class Halves:
    """A base model that stops after a layer and goes on from there later; weights are shared."""

    def __init__(self, base: PreTrainedModel, layer: int) -> None:
        """Look at a base model whose `layer`-th layer, counted from 0, is the last to run early."""
        self._base = base
        self._layer = layer
        self._parts = self._current()

    @property
    def usable(self) -> bool:
        """Whether greedy texts can be had from the halves as from the whole."""
        # Compiled, the whole is faster; and settings of the base model's own change the mixture.
        compiled = (part._compiled_call_impl for part in (self._base, self._base.base_model))
        if any(call is not None for call in compiled):
            return False
        parts = self._current()
        if parts != self._parts:  # modules are equal to themselves alone
            self._parts = parts  # set anew: other bits, so another trial
            for name in ("divisible", "early", "late"):
                self.__dict__.pop(name, None)
        return changes_nothing(self._base.generation_config) and self.divisible

    def _current(self) -> list[object]:
        """What the halves are made of: modules, and the implementation of attention."""
        modules = self._base.base_model._modules.values()
        return [*modules, *decoder_layers(self._base), _attention(self._base)]

    @cached_property
    def divisible(self) -> bool:
        """Whether both halves give what the whole gives."""
        layers = decoder_layers(self._base)
        attends = all(isinstance(layer, DynamicLayer) for layer in self.new_cache().layers)
        base: Any = type(self._base)  # annotated without what generates
        plain = GenerationMixin.prepare_inputs_for_generation
        rereads = base.prepare_inputs_for_generation is not plain
        turns = {str(getattr(part, "rope_type", "")) for part in self._base.modules()}
        fixed = not any(kind in turn for kind in BY_LENGTH for turn in turns)
        return attends and not rereads and fixed and self.split < len(layers) and self._agrees()

    @torch.inference_mode()
    def _agrees(self) -> bool:
        ids = torch.arange(TRIAL, device=self._base.device)[None] + 5
        ids %= int(text_config(self._base).vocab_size)
        mask = torch.ones_like(ids)
        try:
            whole = self._base(
                input_ids=ids, attention_mask=mask, logits_to_keep=torch.tensor([TRIAL - 1])
            )
            reading = Reading(self, None, mask)
            reading.read(ids)
            return torch.equal(self.head(reading.rest()), whole.logits)
        except (AttributeError, IndexError, RuntimeError, TypeError, ValueError):
            return False  # another build of model than this knows

    def new_cache(self) -> DynamicCache:
        """An empty cache of the whole model."""
        return DynamicCache(config=self._base.config)

    @property
    def split(self) -> int:
        """Number of layers that run early."""
        return self._layer + 1

    @cached_property
    def early(self) -> nn.Module:
        """Embeddings and first layers; the state after them, not normed."""
        early = self._with(slice(None, self.split))
        early._modules["norm"] = nn.Identity()
        return early

    @cached_property
    def late(self) -> nn.Module:
        """The other layers and the norm."""
        return self._with(slice(self.split, None))

    @property
    def head(self) -> nn.Module:
        """From normed states to logits."""
        head: nn.Module = self._base.get_output_embeddings()
        return head

    @property
    def tapped(self) -> nn.Module:
        """The module whose input the memory reads."""
        layer = decoder_layers(self._base)[self._layer]
        return mlp_sublayer(layer, int(text_config(self._base).hidden_size))

    def _with(self, layers: slice) -> nn.Module:
        body = copy.copy(self._base.base_model)
        body._modules = dict(body._modules)
        if not {"layers", "norm"} <= set(body._modules):
            raise AttributeError("layers and norm")
        body._modules["layers"] = nn.ModuleList(decoder_layers(self._base)[layers])
        kinds = getattr(body.config, "layer_types", None)
        if kinds is not None:  # the body looks up each layer's mask by its number
            body.config = copy.copy(body.config)
            body.config.__dict__["layer_types"] = list(kinds)[layers]
        return body


def changes_nothing(settings: GenerationConfig) -> bool:
    """Whether a model's own settings leave a greedy text as it is."""
    return set(settings.to_diff_dict()) <= HARMLESS


def _attention(base: PreTrainedModel) -> str | None:
    """Name of the implementation."""
    name: str | None = getattr(text_config(base), "_attn_implementation", None)
    return name


class Reading:
    """Sequences that are read by the first half at once, and by the second when it is asked."""

    def __init__(self, halves: Halves, cache: DynamicCache | None, mask: Tensor) -> None:
        """Begin, or go on after what a cache holds.

        Args:
            halves: the base model.
            cache: of the whole base model; taken over.
            mask: 1 for tokens, 0 for padding: what the cache holds, and what is read first.
                *Shape:* (B, T).
        """
        self._halves = halves
        self.head = halves.head
        self._mask = mask
        self._padded = not bool(mask.all())
        whole = halves.new_cache() if cache is None else cache
        self._early, self._late = DynamicCache(), _LateCache(halves.split)
        self._early.layers = whole.layers[: halves.split]
        self._late.layers = whole.layers[halves.split :]
        self._waiting: list[Tensor] = []

    def read(self, token_ids: Tensor, last: int = 1) -> Tensor:
        """The states that the memory reads, at the last N places. *Shape:* (B, T) -> (B, N, D)."""
        missing = self._early.get_seq_length() + token_ids.shape[1] - self._mask.shape[1]
        if missing > 0:
            self._mask = torch.cat([self._mask, self._mask.new_ones(len(token_ids), missing)], 1)
        tap = tap_on(self._halves.tapped)
        tap.listen()
        self._waiting.append(self._run(self._halves.early, self._early, input_ids=token_ids))
        return tap.take().reshape(*token_ids.shape, -1)[:, -last:]

    def rest(self, last: int = 1) -> Tensor:
        """What the head reads, at the last N places of the last `read`. *Shape:* -> (B, N, D).

        The second half runs over all that was read since this was last asked for.
        """
        states = torch.cat(self._waiting, dim=1)
        self._waiting = []
        return self._run(self._halves.late, self._late, inputs_embeds=states)[:, -last:]

    def can_forget(self, count: int) -> bool:
        """Whether so many positions could be taken back after they were read.

        A layer that sees only the tokens near it has no longer what a full window has pushed out.
        """
        end = self._early.get_seq_length() + count
        layers = (*self._early.layers, *self._late.layers)
        windows = [getattr(layer, "sliding_window", None) for layer in layers]
        return all(window is None or end < window for window in windows)

    def forget(self, count: int) -> None:
        """Take back the last positions of the last `read`; some of it has to be left."""
        if count == 0:
            return
        self._early.crop(-count)
        self._mask = self._mask[:, :-count]
        if self._waiting:
            self._waiting[-1] = self._waiting[-1][:, :-count]
        else:  # the second half has read them too
            self._late.crop(-count)

    def _run(self, half: nn.Module, cache: DynamicCache, **given: Tensor) -> Tensor:
        (sequence,) = given.values()
        start = cache.get_seq_length()
        end = start + sequence.shape[1]
        mask = self._mask[:, :end]
        positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, start:]
        output: Any = half(
            **given,
            # Given one, transformers has the host look for padding at every token.
            attention_mask=mask if self._padded else None,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
        )
        states: Tensor = output.last_hidden_state
        return states


class _LateCache(DynamicCache):
    """Keys and values of the layers from `first` on."""

    def __init__(self, first: int) -> None:
        super().__init__()
        self._first = first

    def update(
        self,
        key_states: Tensor,
        value_states: Tensor,
        layer_idx: int,
        *args: Any,  # noqa: ANN401
        **kwargs: Any,  # noqa: ANN401
    ) -> tuple[Tensor, Tensor]:
        """As in transformers, a layer's number being that in the whole model."""
        return super().update(key_states, value_states, layer_idx - self._first, *args, **kwargs)


@torch.inference_mode()
@other_order()
def generate_early(
    model: MLPMemForCausalLM,
    reading: Reading,
    token_ids: Tensor,
    query: Tensor | None,
    weight: float,
    lines: Sequence[Line],
    note: Callable[[Tensor, Tensor], None] | None,
    answers: Sequence[Sequence[int]] = (),
    share: float = 0.0,
) -> None:
    """Generate greedily, until every line says that it is over.

    Args:
        model: the memory's.
        reading: where the base model begins.
        token_ids: what it reads first. *Shape:* (B, T).
        query: what is asked, recalled. *Shape:* (B, Q).
        weight: of the memory in the mixture, the same for every token.
        lines: take the tokens.
        note: takes the memory's log-probabilities and the token chosen, place by place; None:
            nobody wants them. *Shapes:* (B, V), (B,).
        answers: of each line: how that to the question begins that it is recalled as. A single
            line may well say the same, and is read ahead.
        share: of the answers' next tokens in the mixture.
    """
    memory, temperature = model.memory, model.config.memory_temperature
    corpus_tokens = memory.corpus_tokens
    view = None if query is None else query[:, None]
    recollection = Recollection(answers) if any(answers) else None
    draft = answers[0] if len(answers) == 1 else ()
    own = torch.tensor(weight, device=token_ids.device)
    over = [False] * len(lines)
    ahead: list[int] = []  # of the draft, read together with the token before
    while True:
        count = 1 + len(ahead)
        log_probs = memory.log_probs(reading.read(token_ids, count), view, temperature)  # (B, N, V)
        told, part = log_probs, own
        if recollection is not None:
            expected = token_ids.new_tensor(recollection.expected(count))
            told, part = with_recollection(log_probs, corpus_tokens, weight, expected, share)
        best = best_tokens(told, corpus_tokens, part)
        tokens, decided = best.tolist()  # the host waits here, and for a token in doubt once more
        mixed: Tensor | None = None
        for place in range(count):
            chosen, given = best[0, :, place], [line[place] for line in tokens]
            if mixed is None and not all(map(or_, over, (line[place] for line in decided))):
                base = reading.head(reading.rest(count)).float().log_softmax(-1)
                mixed = mixture(base, [Share(told, corpus_tokens, part)])
            if mixed is not None:
                chosen = mixed[:, place].argmax(-1)
                given = chosen.tolist()
            if note:
                note(log_probs[:, place], chosen)
            if recollection is not None:
                recollection.take(given)
            for number, (line, token) in enumerate(zip(lines, given, strict=True)):
                if not over[number] and line.take(token):
                    over[number] = True
                    line.end()
            if all(over):
                return
            if ahead[place : place + 1] != given:
                break
        reading.forget(count - place - 1)
        begun = list(draft[:1]) == given and reading.can_forget(len(draft))
        ahead = list(draft[1:-1]) if begun else []
        draft = ()
        token_ids = chosen[:, None]
        if ahead:
            token_ids = torch.cat([token_ids, token_ids.new_tensor([ahead])], dim=1)


def best_tokens(log_probs: Tensor, corpus_tokens: Tensor, weight: float | Tensor) -> Tensor:
    """The memory's best token, and 1 where it is the mixture's, whatever the base model says.

    *Shapes:* the memory's log-probabilities (..., V), corpus_tokens (V,), weight () or (..., 1)
    -> (2, ...).
    """
    values, places = log_probs.topk(min(2, log_probs.shape[-1]))
    best, second = values.exp().tensor_split([1], -1)
    lead = best - second.sum(-1, keepdim=True)
    tokens = corpus_tokens[places[..., 0]]
    decided = (weight * lead > 1 - weight).squeeze(-1)
    return torch.stack([tokens, decided.to(tokens.dtype)])
