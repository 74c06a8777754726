"""Tokens that the memory decides alone: the rest of the base model's pass can wait.

With p = w p_mem + (1 - w) p_LM the base model moves at most 1 - w between any two tokens. Where the
memory's best token leads its second best by more, w (p_1 - p_2) > 1 - w, the mixture's best token
is the memory's, whatever the base model says. Its layers after the one that the memory reads, and
its head, then need not run. When a token is in doubt, or the whole distribution is wanted, they run
once for all positions left out so far. The tokens are those of the plain way; only the base's last
bits can differ, as they do whenever positions are computed together instead of one by one.

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
from mlpmem_rag.mixing import Share, mixture
from mlpmem_rag.model import MLPMemForCausalLM
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
PIECE = 64
"""Positions whose distributions exist at once: each takes W numbers several times."""


class Line(Protocol):
    """One sequence of a batch, and whoever waits for it."""

    def take(self, token: int) -> bool:
        """The next token. Returns whether it was the last one."""

    def wants_distributions(self) -> bool:
        """Whether its end has to wait for the distribution of every token."""

    def end(self) -> None:
        """Nothing more comes."""


class Halves:
    """A base model that stops after a layer and goes on from there later; weights are shared."""

    def __init__(self, base: PreTrainedModel, layer: int) -> None:
        """Look at a base model whose `layer`-th layer, counted from 0, is the last to run early."""
        self._base = base
        self._layer = layer
        self._attention = _attention(base)

    @property
    def usable(self) -> bool:
        """Whether greedy texts can be had from the halves as from the whole."""
        # Compiled, the whole is faster; and settings of the base model's own change the mixture.
        compiled = (part._compiled_call_impl for part in (self._base, self._base.base_model))
        if any(call is not None for call in compiled):
            return False
        if (attention := _attention(self._base)) != self._attention:
            self._attention = attention  # set anew: other bits, so another trial
            for name in ("divisible", "early", "late"):
                self.__dict__.pop(name, None)
        return changes_nothing(self._base.generation_config) and self.divisible

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

    def read(self, token_ids: Tensor) -> Tensor:
        """The state that the memory reads, at the last position. *Shape:* (B, T) -> (B, 1, D)."""
        missing = self._early.get_seq_length() + token_ids.shape[1] - self._mask.shape[1]
        if missing > 0:
            self._mask = torch.cat([self._mask, self._mask.new_ones(len(token_ids), missing)], 1)
        tap = tap_on(self._halves.tapped)
        tap.listen()
        self._waiting.append(self._run(self._halves.early, self._early, input_ids=token_ids))
        return tap.take().reshape(*token_ids.shape, -1)[:, -1:]

    def rest(self) -> Tensor:
        """The second half's states after each `read` since this was last asked for.

        They are what the head reads. *Shape:* -> (B, N, D).
        """
        lengths = [states.shape[1] for states in self._waiting]
        states = torch.cat(self._waiting, dim=1)
        self._waiting = []
        late = self._run(self._halves.late, self._late, inputs_embeds=states)
        return torch.cat([part[:, -1:] for part in late.split(lengths, dim=1)], dim=1)

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
def generate_early(
    model: MLPMemForCausalLM,
    reading: Reading,
    token_ids: Tensor,
    query: Tensor | None,
    weight: float,
    lines: Sequence[Line],
    note: Callable[[Tensor], None] | None,
) -> None:
    """Generate greedily, until every line says that it is over.

    Args:
        model: the memory's.
        reading: where the base model begins.
        token_ids: what it reads first. *Shape:* (B, T).
        query: what is asked, recalled. *Shape:* (B, Q).
        weight: of the memory in the mixture, the same for every token.
        lines: take the tokens.
        note: takes the mixture's log-probabilities, token by token; None: nobody wants them.
            *Shape:* (B, W).
    """
    memory, temperature = model.memory, model.config.memory_temperature
    view = None if query is None else query[:, None]
    own = torch.tensor(weight, device=token_ids.device)
    head = reading.head
    over = [False] * len(lines)
    waiting: list[Tensor] = []

    def last_mixture() -> Tensor:
        log_probs, states = torch.cat(waiting, 1), reading.rest()
        waiting.clear()
        step = max(1, PIECE // len(lines))
        wanted = slice(None) if note else slice(-1, None)
        for part in range(0, states.shape[1], step)[wanted]:
            logits = head(states[:, part : part + step])[:, wanted]
            base = logits.float().log_softmax(-1)
            ours = log_probs[:, part : part + step][:, wanted]
            mixed = mixture(base, [Share(ours, memory.corpus_tokens, own)])
            if note:
                for position in range(mixed.shape[1]):
                    note(mixed[:, position])
        return mixed[:, -1]

    while True:
        log_probs = memory.log_probs(reading.read(token_ids), view, temperature)  # (B, 1, V)
        waiting.append(log_probs)
        best = best_tokens(log_probs[:, 0], memory.corpus_tokens, weight)
        tokens, decided = best.tolist()  # the host waits here, and for a token in doubt once more
        chosen = best[0]
        if not all(map(or_, over, decided)):
            chosen = last_mixture().argmax(-1)
            tokens = chosen.tolist()
        ended = []
        for number, (line, token) in enumerate(zip(lines, tokens, strict=True)):
            if not over[number] and line.take(token):
                over[number] = True
                ended.append(line)
        if waiting and any(line.wants_distributions() for line in ended):
            last_mixture()
        for line in ended:
            line.end()
        if all(over):
            return
        token_ids = chosen[:, None]


def best_tokens(log_probs: Tensor, corpus_tokens: Tensor, weight: float) -> Tensor:
    """The memory's best token, and 1 where it is the mixture's, whatever the base model says.

    *Shapes:* the memory's log-probabilities (B, V), corpus_tokens (V,) -> (2, B).
    """
    values, places = log_probs.topk(min(2, log_probs.shape[-1]))
    best, second = values.exp().tensor_split([1], -1)
    lead = best.squeeze(-1) - second.sum(-1)
    tokens = corpus_tokens[places[:, 0]]
    return torch.stack([tokens, (weight * lead > 1 - weight).to(tokens.dtype)])
