"""Text from a model at speed: prompts are read in pieces, tokens made by one compiled loop over a cache of keys and values.

B batch, T tokens, N tokens of a stride, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Collection, Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from nanojax.checks import require_positive
from nanojax.errors import UserError
from nanojax.infer import fused
from nanojax.infer.decode import NO_TOKEN, Asked, Path, State, add, choose, model_of, plain_path, read
from nanojax.infer.load import Model
from nanojax.infer.params import SamplingParams
from nanojax.infer.sampling import Controls
from nanojax.infer.text import utf8_stream
from nanojax.mesh import replicated
from nanojax.model import GPT
from nanojax.ops.attention import PROMPT_ORDER, AttentionFn, make_attention, resolve
from nanojax.ops.cache import Cache, empty_cache, grow
from nanojax.run_kind import USUAL
from nanojax.site import DTYPES, attention_told
from nanojax.tokenizer import Tokenizer

Arrays = TypeVar("Arrays")
PIECE = 2048  # tokens of a prompt that are read at once, at most
STRIDE = 32  # tokens that are made between two looks of the host
SLOTS = 256  # of the smallest cache; a longer one has twice as many, and so on
SHORTEST = 16  # piece of a prompt


@dataclass(frozen=True)
class Piece:
    """What one row has added, since the last piece or in all."""

    tokens: list[int]
    """Without the stop that ended it."""
    finish: str | None = None
    """None: there is more to come. Or stop, tokens (as many as were asked for), context (seq_len is full)."""


class Engine:
    """Continues prompts, many at once. Shapes come in few sizes, so that after a while nothing is compiled any more.

    A row's tokens depend on no other row, but for rounding: with other sizes of batch, piece or cache, XLA may add in another order.
    """

    def __init__(
        self, model: Model, tokenizer: Tokenizer, *, piece: int = PIECE, stride: int = STRIDE, slots: int = SLOTS, path: Path | None = None
    ) -> None:
        """For a model on one device. `piece`, `stride` and `slots`, powers of two, are the sizes named above.

        `path` is the faster of those that this device has. The kernels' takes the weights over, and leaves the model without.
        """
        for name, size in (("piece", piece), ("stride", stride), ("slots", slots)):
            require_positive(name, size)
        program = model.program
        if program.mesh.size != 1:
            raise UserError(f"the engine runs on one device, and the model is on {program.mesh.size}; load it with jax.devices()[:1]")
        self.program, self.tokenizer, self.mesh = program, tokenizer, program.mesh
        self.config, self.dtype = program.config.model, DTYPES[program.compute]
        self.piece, self.stride, self.smallest = piece, stride, slots
        windows, seq_len = self.config.windows, self.config.seq_len
        self.context = None if all(window and window <= seq_len for window in windows) else seq_len
        """Tokens that a row may have in its caches; None, with a window in every layer: any number."""
        self.path = path or best_path(model)
        options = USUAL.options(program.platform) or None
        jit = functools.partial(jax.jit, out_shardings=replicated(self.mesh), compiler_options=options)
        self._grow = jit(self._grown, static_argnums=1)
        self._begin = jit(self._begun, static_argnums=(4, 5))
        self._read = jit(lambda weights, *rest: read(self._gpt(weights), *rest), donate_argnums=1)
        self._first = jit(choose, donate_argnums=0, static_argnums=2)
        self._add = jit(
            functools.partial(add, self.path.one_token, early=program.platform == "cpu"),
            donate_argnums=1,
            static_argnames=("count", "drawn"),
        )

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        stops: Collection[int] | None = None,
    ) -> list[Piece]:
        """What each prompt is continued with; arguments as of `steps`."""
        rows = zip(*self.steps(prompts, params, stops), strict=True)
        return [Piece([token for piece in row for token in piece.tokens], row[-1].finish) for row in rows]

    def steps(
        self,
        prompts: Sequence[Sequence[int]],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        stops: Collection[int] | None = None,
    ) -> Iterator[list[Piece]]:
        """New tokens of every prompt as they come, first one, then a stride at once, until all have ended.

        `params` are for all, or one for each; `stops` end a row, by default <|bos|>. A row that has ended gets empty pieces.
        Raises UserError, at once, on a prompt that is empty, longer than the context or of ids that are none, and on stops that are none.
        """
        read = [self._ids(prompt, f"prompt {i}") for i, prompt in enumerate(listed(prompts, "prompts"))]
        params = SamplingParams() if params is None else params
        rows = [params] * len(read) if isinstance(params, SamplingParams) else listed(params, "params")
        ends = {self.tokenizer.bos} if stops is None else set(self._ids(stops, "stops"))
        self._check(read, rows)
        return self._steps(read, rows, ends)

    def stream(self, prompt: str, params: SamplingParams | None = None) -> Generator[str, None, str | None]:
        """Text that continues a text, or with an empty one starts a document, as it comes. Returns how it ended, as Piece.finish.

        A character comes whole. Raises UserError, at once, on a prompt that is longer than the context.
        """
        return self._stream(self.steps([self.encode(prompt)], params))

    def _stream(self, steps: Iterator[list[Piece]]) -> Generator[str, None, str | None]:
        finish = None

        def decoded() -> Iterator[bytes]:
            nonlocal finish
            for (piece,) in steps:
                finish = piece.finish
                yield self.tokenizer.decode_bytes(piece.tokens)

        yield from utf8_stream(decoded())
        return finish

    def encode(self, prompt: str) -> list[int]:
        """The ids of a text that starts a document."""
        return [self.tokenizer.bos, *self.tokenizer.encode(prompt)]

    def _ids(self, tokens: Any, what: str) -> list[int]:
        """Token ids, numpy's too, as Python's. Raises UserError on anything else."""
        ids, n_vocab = listed(tokens, what), self.tokenizer.n_vocab
        if bad := [i for i in ids if isinstance(i, bool) or not isinstance(i, int | np.integer) or not 0 <= i < n_vocab]:
            raise UserError(f"token ids lie in [0, {n_vocab}), given {bad[0]!r:.40} in {what}; encode text with the model's own tokenizer")
        return list(map(int, ids))

    def _check(self, prompts: list[list[int]], rows: list[SamplingParams]) -> None:
        if not prompts or len(rows) != len(prompts):
            raise UserError(f"generation needs prompts, and params for all or each, given {len(prompts)} and {len(rows)}; give one or more")
        if strange := [row for row in rows if not isinstance(row, SamplingParams)]:
            raise UserError(f"params are SamplingParams, given {strange[0]!r:.40}; try SamplingParams(temperature=0.8)")
        for i, prompt in enumerate(prompts):
            if not prompt:
                raise UserError(f"a prompt needs a token, and prompt {i} has none; start a document with <|bos|>, {self.tokenizer.bos}")
            if self.context and len(prompt) > self.context:
                raise UserError(f"a prompt must fit seq_len={self.context}, and prompt {i} has {len(prompt)} tokens; shorten it")

    def _steps(self, prompts: list[list[int]], rows: list[SamplingParams], stops: set[int]) -> Iterator[list[Piece]]:
        """`steps` of what is checked."""
        lengths = [len(prompt) for prompt in prompts]
        # A full context still gives one token, which is not read again.
        room = [self.context - length + 1 if self.context else row.tokens for length, row in zip(lengths, rows, strict=True)]
        budgets = [min(row.tokens, n) for row, n in zip(rows, room, strict=True)]
        idle = power_of_two(len(rows)) - len(rows)  # rows that fill the batch up
        asked = self._asked(rows, budgets, idle, stops)
        state = self._prefill(prompts, budgets, idle)
        drawn = "filtered" if any(row.filters for row in rows) else "free" if any(row.temperature for row in rows) else "likeliest"

        with jax.set_mesh(self.mesh):
            state = self._first(state, asked, drawn)
        made, finishes = [0] * len(rows), [""] * len(rows)
        due, coming = [min(1, most) for most in budgets], [state.token_B[:, None]]  # tokens, on the device or on their way
        while True:
            pieces = []
            for row, tokens_N in enumerate(np.asarray(coming.pop(0))[: len(rows)].tolist()):
                new = [token for token in tokens_N if token != NO_TOKEN]
                made[row] += len(new)
                stopped = bool(new) and new[-1] in stops
                if not finishes[row] and (stopped or made[row] == budgets[row]):
                    finishes[row] = "stop" if stopped else "tokens" if made[row] == rows[row].tokens else "context"
                pieces.append(Piece(new[: len(new) - stopped], finishes[row] or None))
            yield pieces
            if all(finishes):
                return
            # Two strides: the device goes on while the host reads. Where all rows stop in one, the other was for nothing.
            while len(coming) < 2 and any(n < most and not end for n, most, end in zip(due, budgets, finishes, strict=True)):
                due = [min(n + self.stride, most) for n, most in zip(due, budgets, strict=True)]
                # The last token of each is not in its caches yet.
                state = self._with_slots(
                    state, max(length + n - 1 for length, n, end in zip(lengths, due, finishes, strict=True) if not end)
                )
                with jax.set_mesh(self.mesh):
                    state, tokens_BN = self._add(self.path.weights, state, asked, count=self.stride, drawn=drawn)
                coming.append(tokens_BN)

    def _asked(self, rows: list[SamplingParams], budgets: list[int], idle: int, stops: set[int]) -> Asked:
        controls = Controls.of(rows + [SamplingParams(temperature=0)] * idle)
        stop_V = np.zeros(self.tokenizer.n_vocab, bool)
        stop_V[list(stops)] = True
        arrays: Any = (np.array(budgets + [0] * idle, np.int32), stop_V)
        return self._put(Asked(controls, *arrays))

    def _prefill(self, prompts: list[list[int]], budgets: list[int], idle: int) -> State:
        """The state in which all prompts are read."""
        longest = max(map(len, prompts))
        size = min(self.piece, max(SHORTEST, power_of_two(longest)))
        tokens_BT = np.zeros((len(prompts) + idle, -(-longest // size) * size), np.int32)
        for row, prompt in enumerate(prompts):
            tokens_BT[row, : len(prompt)] = prompt
        length_B = np.array([*map(len, prompts), *[0] * idle], np.int32)
        done_B = np.array([budget == 0 for budget in budgets] + [True] * idle)
        with jax.set_mesh(self.mesh):
            first = self._put((tokens_BT[:, :size], length_B, done_B))
            attention = self._attention(len(tokens_BT), size)
            state = self._begin(self.path.weights, *first, self._capacity(longest + 1), attention)
            for start in range(size, longest, size):
                piece_BT = self._put(tokens_BT[:, start : start + size])
                state = self._read(self.path.weights, state, piece_BT, np.int32(start))
        return state

    def _attention(self, rows: int, tokens: int) -> AttentionFn:
        """That of the first piece of prompts: the fastest there is for its shape, or the one that the config names."""
        request = dataclasses.replace(self.program.request, rows=rows, tokens=tokens, documents=None)
        with attention_told():
            name, _ = resolve(self.program.config.train.attn_impl, request, order=PROMPT_ORDER)
        return make_attention(name, None)

    def _put(self, arrays: Arrays) -> Arrays:
        return jax.device_put(arrays, replicated(self.mesh))

    def _gpt(self, weights: Any) -> GPT:
        return model_of(self.program.graph, self.path.plain(weights))

    def _begun(self, weights: Any, tokens_BT: Array, length_B: Array, done_B: Array, slots: int, attention: AttentionFn) -> State:
        state = dataclasses.replace(self._empty_state(len(tokens_BT), slots), length_B=length_B, done_B=done_B)
        return read(self._gpt(weights), state, tokens_BT, jnp.zeros((), jnp.int32), attention)

    def _capacity(self, tokens: int) -> int:
        """Slots that a layer without a window gets for rows of so many tokens."""
        most = self.context or max(window for window in self.config.windows if window)
        return min(most, max(self.smallest, power_of_two(tokens)))

    def _with_slots(self, state: State, tokens: int) -> State:
        """The state with caches for rows of so many tokens. Those that have gone round have their window's slots, and stay."""
        if max(cache.k_BKSH.shape[2] for cache in state.caches) >= (slots := self._capacity(tokens)):
            return state
        with jax.set_mesh(self.mesh):
            return dataclasses.replace(state, caches=self._grow(state.caches, slots))

    def _slots(self, slots: int) -> list[int]:
        return [min(window or slots, slots) for window in self.config.windows]

    def _grown(self, caches: tuple[Cache, ...], slots: int) -> tuple[Cache, ...]:
        return tuple(map(grow, caches, self._slots(slots)))

    def _empty_state(self, batch: int, slots: int) -> State:
        caches = tuple(empty_cache(batch, self.config.kv_heads, n, self.config.head_dim, self.dtype) for n in self._slots(slots))
        none_B = jnp.zeros(batch, jnp.int32)
        # The vocabulary of the tokenizer: logits beyond it are padding, and go no further.
        return State(caches, jnp.zeros((batch, self.tokenizer.n_vocab)), none_B, none_B, none_B, none_B > 0)


def best_path(model: Model) -> Path:
    """The kernels of infer/fused.py where they serve, else the model's own products."""
    config = model.program.config.model
    if reason := fused.refusal(model.program.request):
        return plain_path(model.program.graph, model.weights, f"{model.precision}, by XLA's products: {reason}")
    with jax.set_mesh(model.program.mesh):
        return fused.path(model.weights, config, words=f"{model.precision}, by {fused.WORDS}")


def listed(values: Any, what: str) -> list[Any]:
    """Raises UserError on what cannot be listed."""
    try:
        return list(values)
    except TypeError:
        raise UserError(f"{what} must be a list, given {values!r:.40}; write [...]") from None


def power_of_two(n: int) -> int:
    """The smallest at least n."""
    return 1 << (n - 1).bit_length()
