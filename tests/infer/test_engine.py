"""The engine, held to the full forward pass that no cache is in. test_load.py and test_sample.py give it runs and exports."""

from __future__ import annotations

import functools
import gc
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from generating import BYTES, full_logits, make_model

from nanojax.errors import UserError
from nanojax.infer import decode
from nanojax.infer import engine as engine_module
from nanojax.infer.engine import Engine, Piece
from nanojax.infer.params import SamplingParams
from nanojax.infer.sampling import Controls, draw
from nanojax.ops.attention import make_attention

GREEDY = SamplingParams(temperature=0, tokens=30)
SL = dict(window=8, window_pattern="SL")
SMALL = dict(piece=16, stride=8, slots=16)  # sizes that a few tokens go through all of


@functools.cache
def engine(**model) -> Engine:
    return Engine(make_model(**model), BYTES, **SMALL)


def full(rows: list[list[int]], **model) -> list[np.ndarray]:
    return full_logits(make_model(**model), rows)


def prompt(length: int, seed: int = 0) -> list[int]:
    return [BYTES.bos, *np.random.default_rng(seed).integers(0, 256, length - 1).tolist()]


MODELS = {
    "gqa, SSSL": dict(depth=4, window=8, window_pattern="SSSL"),
    "mha, nanochat": dict(n_kv_head=4, norm="fixed", ffn="relu2", softcap=15.0),
}


@pytest.mark.parametrize("name", MODELS)
def test_every_token_is_the_likeliest_of_the_full_forward_pass(name):
    """Prompts of several lengths in one batch, the longest read in three pieces; 30 tokens wrap rings of 8 round."""
    small, batch = engine(**MODELS[name]), [prompt(34, 3), prompt(1), prompt(16, 4), prompt(17, 5)]
    made = small.generate(batch, GREEDY, stops=())
    assert [(len(piece.tokens), piece.finish) for piece in made] == [(30, "tokens")] * len(batch)
    rows = [ids + piece.tokens for ids, piece in zip(batch, made, strict=True)]
    for ids, row, logits in zip(batch, rows, full(rows, **MODELS[name]), strict=True):
        assert row[len(ids) :] == logits[len(ids) - 1 : -1].argmax(-1).tolist()


def test_logits_are_those_of_the_full_forward_pass_after_a_prompt_and_after_every_token():
    small, ids = engine(**SL), prompt(40)
    (logits,) = full([ids], **SL)
    for length in (1, 15, 16, 17, 33, 40):
        state = small._prefill([ids[:length]], [1], 0)
        # float32 logits of order 1, whose products add in another order
        np.testing.assert_allclose(state.logits_BV[0], logits[length - 1], atol=5e-5)
    (made,) = small.generate([ids[:10]], GREEDY, stops=())
    (logits,) = full([ids[:10] + made.tokens], **SL)
    asked = small._asked([GREEDY], [40], 0, set())
    state = decode.choose(small._prefill([ids[:10]], [30], 0), asked, "likeliest")
    for at in range(10, 40):
        state = small._with_slots(state, at + 1)
        with jax.set_mesh(small.mesh):
            state, _ = small._add(small.path.weights, state, asked, count=1, drawn="likeliest")
        np.testing.assert_allclose(state.logits_BV[0], logits[at], atol=5e-5)  # as above
    assert [cache.k_BKSH.shape[2] for cache in state.caches] == [8, 64], "a ring has the slots of its window"


@pytest.mark.parametrize("backend", ["xla", pytest.param("reference", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", MODELS)
def test_every_position_of_a_prompt_has_the_logits_of_the_full_forward_pass(name, backend):
    """Read in three pieces, the first by training's attention; the shorter rows end in the second and in the first."""
    small, rows = engine(**MODELS[name]), [prompt(40), prompt(21, 1), prompt(9, 2)]
    tokens_BT = np.array([row + [0] * (48 - len(row)) for row in rows], np.int32)
    length_B1 = np.array([[len(row)] for row in rows])

    @jax.jit
    def logits_of(weights):
        gpt, caches, logits = decode.model_of(small.program.graph, weights), small._empty_state(len(rows), 64).caches, []
        for start in range(0, 48, 16):
            positions_BT = jnp.broadcast_to(jnp.arange(start, start + 16)[None], (len(rows), 16))
            alone = make_attention(backend, None) if start == 0 else None
            piece_BT = tokens_BT[:, start : start + 16]
            x_BTD, caches = decode.forward(gpt, piece_BT, positions_BT, positions_BT < length_B1, caches, alone)
            logits.append(gpt.logits(x_BTD))
        return jnp.concatenate(logits, axis=1)

    with jax.set_mesh(small.mesh):
        logits_BTV = np.asarray(logits_of(small.path.weights))[..., : BYTES.n_vocab]
    for row, got, want in zip(rows, logits_BTV, full(rows, **MODELS[name]), strict=True):
        np.testing.assert_allclose(got[: len(row)], want, atol=5e-5)  # as above


@pytest.mark.parametrize(("asked", "chosen"), [("auto", "xla"), ("reference", "reference")])
def test_only_the_first_piece_of_prompts_goes_through_trainings_attention(asked, chosen, monkeypatch):
    """The fastest that serves, or the one that the config names, with each layer's window."""
    calls = []

    def recorded_attention(name, documents):
        def attention(q_BTNH, k_BTKH, v_BTKH, *, window=None, segments_BT=None):
            calls.append((name, q_BTNH.shape[1], window))
            return make_attention(name, documents)(q_BTNH, k_BTKH, v_BTKH, window=window, segments_BT=segments_BT)

        return attention

    def recorded_cached(q_BTNH, *rest):
        calls.append(("cached", q_BTNH.shape[1], rest[-1]))
        return cached_attention(q_BTNH, *rest)

    cached_attention = decode.cached_attention
    monkeypatch.setattr(engine_module, "make_attention", recorded_attention)
    monkeypatch.setattr(decode, "cached_attention", recorded_cached)
    small = Engine(make_model(train=dict(attn_impl=asked), **SL), BYTES, **SMALL)
    first, later = [(chosen, 16, 8), (chosen, 16, None)], [("cached", 16, 8), ("cached", 16, None)]
    small._prefill([prompt(16)], [1], 0)
    assert calls == first
    small._prefill([prompt(40)], [1], 0)
    assert calls == first * 2 + later, "calls are those of tracing: other slots make another first piece, the later two share a program"


def test_the_draw_of_a_token_has_its_number_in_the_text_that_is_added():
    small, ids = engine(**SL), prompt(7)
    params = SamplingParams(temperature=1.0, top_k=20, seed=3, tokens=8)
    (made,) = small.generate([ids], params, stops=())
    (logits,) = full([ids + made.tokens], **SL)
    drawn = draw(jnp.asarray(logits[6:-1]), Controls.of([params] * 8), jnp.arange(8), filters=True)
    assert made.tokens == drawn.tolist()


def test_a_row_is_the_same_whatever_batch_it_is_in():
    """Greedy in float32, and drawn: alone, in batches that are filled up, beside a longer prompt that is read in pieces, in any place."""
    small = engine(**SL)
    drawn = SamplingParams(temperature=1.0, top_k=20, seed=3, tokens=12)
    free = SamplingParams(temperature=1.0, top_k=0, seed=4, tokens=12)  # with other rows' filters, and without any
    ids, short, long = prompt(7), prompt(1, 1), prompt(20, 2)
    for params in (SamplingParams(temperature=0, tokens=12), drawn, free):
        alone = small.generate([ids], params)[0]
        assert len(alone.tokens) > 5
        for at, batch in ((0, [ids, short]), (2, [short, long, ids])):
            mixed = [params if row is ids else drawn for row in batch]
            assert small.generate(batch, mixed)[at] == alone, (params, at)
    two = small.generate([ids, ids], [drawn, SamplingParams(temperature=1.0, top_k=20, seed=5, tokens=12)])
    assert two[0] != two[1], "seeds must differ"


def test_rows_end_each_on_its_own():
    small = engine()
    ids = [prompt(5), prompt(9, 1), prompt(60, 2), prompt(64, 3)]
    long = [piece.tokens for piece in small.generate(ids, GREEDY, stops=())]
    assert [len(tokens) for tokens in long] == [30, 30, 5, 1], "a context of 64 gives a token more than it holds"
    stop = long[0][6]
    assert stop not in long[1][:3] + long[2], "another row met the stop: choose another seed"
    rows = [SamplingParams(temperature=0, tokens=n) for n in (30, 3, 30, 0)]
    made = small.generate(ids, rows, stops={stop})
    assert made[0] == Piece(long[0][: long[0].index(stop)], "stop")
    assert made[1] == Piece(long[1][:3], "tokens")
    assert made[2] == Piece(long[2], "context")
    assert made[3] == Piece([], "tokens")


def test_pieces_come_as_they_are_made_and_those_of_rows_that_ended_are_empty():
    small = engine()
    rows = [SamplingParams(temperature=0, tokens=n) for n in (2, 20)]
    pieces = list(small.steps([prompt(4), prompt(4)], rows, stops=()))
    assert [[len(piece.tokens) for piece in step] for step in pieces] == [[1, 1], [1, 8], [0, 8], [0, 3]]
    assert [[piece.finish for piece in step] for step in pieces] == [[None] * 2, ["tokens", None], ["tokens", None], ["tokens"] * 2]


def test_with_a_window_in_every_layer_a_text_goes_on_beyond_seq_len():
    small = engine(window=8, n_kv_head=1)
    ids = prompt(70)
    (made,) = small.generate([ids], SamplingParams(temperature=0, tokens=100), stops=())
    assert (len(made.tokens), made.finish) == (100, "tokens")
    (logits,) = full([ids + made.tokens], window=8, n_kv_head=1)
    assert made.tokens == logits[len(ids) - 1 : -1].argmax(-1).tolist()
    state = small._prefill([ids], [1], 0)
    assert {cache.k_BKSH.shape for cache in state.caches} == {(1, 1, 8, 8)}


def test_windows_longer_than_seq_len_do_not_carry_a_text_beyond_it():
    assert engine(window=65).context == 64
    assert engine(window=64).context is None


def test_a_thousand_tokens_compile_nothing_after_a_first_time():
    long = Engine(make_model(seq_len=2048), BYTES, slots=256)
    compiled = [long._begin, long._grow, long._read, long._add]
    (first,) = long.generate([prompt(20)], SamplingParams(temperature=0, tokens=1000), stops=())
    sizes = [function._cache_size() for function in compiled]
    # Caches of 256, 512 and 1024 slots, of which the prompt needs the first.
    assert sizes == [1, 2, 0, 3], "strides in three sizes of cache"
    other = SamplingParams(temperature=0, seed=3, tokens=900)
    for params in (SamplingParams(temperature=0, tokens=1000), other):
        (again,) = long.generate([prompt(24, 1)], params, stops=())
        assert len(again.tokens) == params.tokens
    assert [function._cache_size() for function in compiled] == sizes
    assert len(first.tokens) == 1000


def test_streams_never_break_a_character(monkeypatch):
    """Tokens of single bytes, of a text that has characters of one to four."""
    text = "né 中😀 ok\n" * 4
    small = engine()
    bytes_of = list(text.encode())
    monkeypatch.setattr(small, "_steps", lambda *_: ([Piece(bytes_of[i : i + 3])] for i in range(0, len(bytes_of), 3)))
    pieces = list(small.stream("", GREEDY))
    assert "".join(pieces) == text
    assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces)


def test_a_stream_has_the_text_of_its_tokens_and_returns_how_it_ended():
    small, params = engine(), SamplingParams(temperature=1.0, top_k=0, tokens=40, seed=2)
    stream, pieces = small.stream("ab", params), []
    try:
        while True:
            pieces.append(next(stream))
    except StopIteration as end:
        finish = end.value
    (made,) = small.generate([small.encode("ab")], params)
    assert ("".join(pieces), finish) == (BYTES.decode(made.tokens), made.finish)
    assert len(pieces) > 1


def test_remat_of_training_and_padding_of_the_vocabulary_do_not_show():
    model = make_model(train=dict(remat=True))
    model.weights["head.w"] = model.weights["head.w"].at[:, BYTES.n_vocab :].set(9.0)
    ids = prompt(20)
    tokens = Engine(model, BYTES, **SMALL).generate([ids], SamplingParams(temperature=0, tokens=5), stops=())[0].tokens
    (logits,) = full_logits(model, [ids + tokens])
    assert tokens == logits[len(ids) - 1 : -1].argmax(-1).tolist()


@pytest.mark.parametrize(
    ("prompts", "params", "stops", "words"),
    [
        ([], None, None, "generation needs prompts"),
        ([[1], []], None, None, "a prompt needs a token, and prompt 1 has none; start a document with <|bos|>, 256"),
        ([[1] * 65], None, None, "a prompt must fit seq_len=64, and prompt 0 has 65 tokens; shorten it"),
        ([[1, -1]], None, None, "token ids lie in [0, 265), given -1"),
        ([[1, 265]], None, None, "token ids lie in [0, 265), given 265"),
        ([[1]], None, [300], "token ids lie in [0, 265), given 300"),
        ([[1], [2]], [GREEDY], None, "generation needs prompts, and params for all or each, given 2 and 1"),
        ([[1]], [], None, "generation needs prompts, and params for all or each, given 1 and 0"),
        ([[1]], "x", None, "params are SamplingParams, given 'x'"),
        ([[1]], 5, None, "params must be a list, given 5"),
        ([[1, 1.5]], None, None, "token ids lie in [0, 265), given 1.5 in prompt 0"),
        ([[1], [True]], None, None, "token ids lie in [0, 265), given True in prompt 1"),
        (["ab"], None, None, "token ids lie in [0, 265), given 'a' in prompt 0"),
        ([None], None, None, "prompt 0 must be a list, given None"),
        (None, None, None, "prompts must be a list, given None"),
        ([[1]], None, ["x"], "token ids lie in [0, 265), given 'x' in stops"),
        ([[1]], None, 5, "stops must be a list, given 5"),
    ],
)
def test_wrong_prompts_are_refused_in_one_line_before_anything_runs(prompts, params, stops, words):
    with pytest.raises(UserError) as refused:
        engine().generate(prompts, params, stops)
    assert str(refused.value).startswith(words)
    assert "\n" not in str(refused.value)


def test_ids_may_be_numpys():
    small, ids = engine(), prompt(7)
    params = SamplingParams(temperature=0, tokens=5)
    made = small.generate([ids], params, stops=[3])
    assert small.generate([np.array(ids)], params, stops=np.array([3])) == made
    assert small.generate(np.array([ids]), params, stops={np.int32(3)}) == made


def test_a_long_text_is_refused_before_its_stream_begins():
    with pytest.raises(UserError, match="a prompt must fit seq_len=64, and prompt 0 has 101 tokens"):
        engine().stream("a" * 100)


def test_an_engine_that_is_dropped_frees_its_weights():
    model = make_model()
    held = weakref.ref(model.weights["head.w"])
    dropped = Engine(model, BYTES, **SMALL)
    dropped.generate([prompt(3)], SamplingParams(temperature=0, tokens=2))
    del model, dropped
    gc.collect()
    assert held() is None


def test_the_engine_is_public():
    import nanojax

    assert nanojax.Engine is Engine
