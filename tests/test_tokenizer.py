"""Byte pair encoding: round trips, agreement of the two libraries, and files that cannot lie."""

from __future__ import annotations

import base64
import json
import pickle
import subprocess
import sys

import numpy as np
import pytest
import rustbpe
import tiktoken
from hypothesis import given, settings
from hypothesis import strategies as st

from nanojax.errors import StorageError, UserError
from nanojax.tokenizer import PIECE_CHARS, SPECIAL_TOKENS, SPLIT_PATTERN, Tokenizer

TEXTS = [f"def f{i}(x):\n    return x + {i * 37}  # the {i}th one, née Ünïcode 中文 {'=' * (i % 9)}\n" for i in range(200)]


@pytest.fixture(scope="module")
def tok() -> Tokenizer:
    return Tokenizer.train(iter(TEXTS), 400)


@pytest.fixture
def fake_encoding(monkeypatch):
    """An encoding named 'fake' with a gap before its last special token, as cl100k_base has, and no network."""
    ranks = {bytes([i]): i for i in range(256)} | {b"he": 256, b"hello": 257}
    fake = tiktoken.Encoding("fake", pat_str=SPLIT_PATTERN, mergeable_ranks=ranks, special_tokens={"<|endoftext|>": 258, "<|odd|>": 276})
    monkeypatch.setattr(tiktoken, "list_encoding_names", lambda: ["fake", "cl100k_base", "gpt2"])
    monkeypatch.setattr(tiktoken, "get_encoding", {"fake": fake}.__getitem__)
    return fake


@given(st.text())
@settings(deadline=None)
def test_every_text_survives_the_round_trip(text):
    tok = Tokenizer("bytes", SPLIT_PATTERN, {bytes([i]): i for i in range(256)}, {s: 256 + i for i, s in enumerate(SPECIAL_TOKENS)})
    assert tok.decode(tok.encode(text)) == text


@given(st.text(alphabet=st.sampled_from("def return x+=1234 \n\té中'<|bos|>")))
@settings(deadline=None)
def test_a_trained_vocabulary_survives_the_round_trip_and_its_bytes_add_up(text):
    tok = Tokenizer.train(iter(TEXTS[:20]), 300)
    ids = tok.encode(text)
    assert tok.decode(ids) == text
    assert tok.bytes_per_token()[ids].sum() == len(text.encode())


def test_rustbpe_and_tiktoken_give_the_same_ids(tok):
    bpe = rustbpe.Tokenizer()
    bpe.train_from_iterator(iter(TEXTS), 400 - len(SPECIAL_TOKENS), pattern=SPLIT_PATTERN)
    for text in [*TEXTS, "something it has never seen: ñandú 12345\n\n  x"]:
        assert bpe.encode(text) == tok.encode(text)


def test_training_twice_gives_the_same_hash_and_another_corpus_another(tok):
    assert Tokenizer.train(iter(TEXTS), 400).sha256 == tok.sha256
    assert Tokenizer.train(iter(TEXTS[:-1] + ["zzzz zzzz zzzz zzzz"] * 50), 400).sha256 != tok.sha256


def test_the_vocabulary_has_the_size_asked_for_with_special_tokens_last_and_in_order(tok):
    assert tok.n_vocab == 400
    assert [tok.special(s) for s in SPECIAL_TOKENS] == list(range(391, 400))
    assert tok.bos == 391
    assert len(SPECIAL_TOKENS) == 9


def test_a_corpus_with_few_pairs_gives_a_smaller_vocabulary():
    small = Tokenizer.train(iter(["aaaa"]), 1000)
    assert small.n_vocab < 1000
    assert small.decode(small.encode("abc")) == "abc"


def test_special_tokens_spelled_out_are_plain_text(tok):
    text = "".join(SPECIAL_TOKENS)
    ids = tok.encode(text)
    assert max(ids) < tok.bos
    assert tok.decode(ids) == text
    assert tok.decode([tok.bos]) == "<|bos|>"


def test_lone_surrogates_become_replacement_characters(tok):
    assert tok.decode(tok.encode("a\ud800b")) == "a\ufffdb"
    assert Tokenizer.train(iter(["a\ud800b"] * 3), 270).n_vocab <= 270


def test_a_run_of_a_million_spaces_neither_panics_nor_changes(tok):
    text = " " * 1_000_000 + "x"
    assert tok.decode(tok.encode(text)) == text
    assert tok.encode_batch([text, "y"]) == [tok.encode(text), tok.encode("y")]
    Tokenizer.train(iter([text]), 300)


def test_cutting_a_long_text_at_newlines_leaves_its_ids_alone(tok):
    text = "".join(TEXTS) * (2 * PIECE_CHARS // len("".join(TEXTS)))
    assert len(text) > PIECE_CHARS
    assert tok.encode(text) == tok._encoding.encode_ordinary(text)


def test_a_batch_equals_its_parts(tok):
    assert tok.encode_batch(TEXTS, threads=2) == [tok.encode(t) for t in TEXTS]
    assert tok.encode_batch([]) == []


def test_bytes_per_token_counts_raw_bytes_and_nothing_for_special_tokens(tok):
    lengths = tok.bytes_per_token()
    assert lengths.dtype == np.int32
    assert lengths.shape == (400,)
    assert (lengths[:256] == 1).all()  # a byte above 0x7f counts one, not the three of U+FFFD
    assert (lengths[256:391] >= 2).all()
    assert (lengths[391:] == 0).all()


def test_decoding_broken_utf8_and_unknown_ids_gives_replacement_characters(tok):
    e_acute = tok.encode("é")
    assert tok.decode([0xC3]) == "\ufffd"
    assert tok.decode_bytes(e_acute) == "é".encode()
    assert tok.decode([ord("a"), 10**6, ord("b")]) == "a\ufffdb"


def test_saving_and_loading_give_back_the_same_tokenizer(tok, tmp_path):
    path = tmp_path / "deep" / "tokenizer.json"
    tok.save(path)
    again = Tokenizer.load(path)
    assert again.sha256 == tok.sha256
    assert [again.encode(t) for t in TEXTS] == [tok.encode(t) for t in TEXTS]
    assert [p.name for p in path.parent.iterdir()] == ["tokenizer.json"]
    assert pickle.loads(pickle.dumps(tok)).encode("x = 1") == tok.encode("x = 1")


def _swap(saved):
    saved["tokens"][300], saved["tokens"][301] = saved["tokens"][301], saved["tokens"][300]


def _set(key, value):
    return lambda saved: saved.__setitem__(key, value)


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (_swap, "was altered"),
        (_set("pattern", r"\s+|\S+"), "was altered"),
        (_set("sha256", "0" * 64), "was altered"),
        (_set("sha256", None), "was altered"),
        (_set("format", "nanojax-tokenizer-0"), "format"),
        (_set("tokens", "abc"), "list"),
        (_set("special_tokens", []), "dict"),
        (_set("pattern", 3), "str"),
        (_set("extra", 1), "keys"),
        (lambda s: s.pop("pattern"), "keys"),
        (lambda s: s["tokens"].__setitem__(65, ""), "byte 65"),
        (lambda s: s["tokens"].__setitem__(300, s["tokens"][301]), "twice"),
        (lambda s: s["tokens"].__setitem__(300, "中"), "Latin-1"),
        (lambda s: s["tokens"].__setitem__(300, 7), "not text"),
        (lambda s: s["special_tokens"].pop("<|user_end|>"), "<|user_end|>"),
        (lambda s: s["special_tokens"].__setitem__("<|bos|>", 300), "taken"),
        (lambda s: s["special_tokens"].__setitem__("<|bos|>", True), "integer"),
        (lambda s: s["special_tokens"].__setitem__("<|bos|>", 10**12), "integer"),
    ],
)
def test_a_file_that_was_tampered_with_is_refused_in_one_line_that_names_it(tok, tmp_path, damage, says):
    path = tmp_path / "tokenizer.json"
    tok.save(path)
    saved = json.loads(path.read_text())
    damage(saved)
    path.write_text(json.dumps(saved))
    with pytest.raises(UserError) as refused:
        Tokenizer.load(path)
    message = str(refused.value)
    assert says in message
    assert str(path) in message
    assert "\n" not in message


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[" * 100_000, b"[]", b"null", base64.b64encode(b"pickle")])
def test_a_file_that_is_no_tokenizer_is_refused(tmp_path, content):
    path = tmp_path / "tokenizer.json"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"tokenizer\.json"):
        Tokenizer.load(path)


def test_a_missing_file_says_how_to_make_one(tmp_path):
    with pytest.raises(UserError, match="nanojax tokenizer train --out"):
        Tokenizer.resolve(str(tmp_path / "none.json"))


def test_a_folder_that_cannot_be_written_is_a_storage_error_and_leaves_nothing(tok, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError):
        tok.save(tmp_path / "file" / "tokenizer.json")
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("size", [0, 264, 2**30])
def test_a_vocabulary_that_cannot_be_is_refused_before_training(size):
    with pytest.raises(UserError, match=f"vocab_size={size}"):
        Tokenizer.train(iter(TEXTS), size)


def test_a_named_encoding_keeps_its_ids_and_takes_ours_behind_its_largest(fake_encoding, tmp_path):
    tok = Tokenizer.resolve("fake")
    assert tok.encode("hello there") == fake_encoding.encode_ordinary("hello there")
    assert [tok.special(s) for s in SPECIAL_TOKENS] == list(range(277, 286))
    assert tok.n_vocab == 286
    lengths = tok.bytes_per_token()
    assert lengths[257] == 5
    assert lengths[258:].sum() == 0
    tok.save(tmp_path / "fake.json")
    again = Tokenizer.load(tmp_path / "fake.json")
    assert (again.sha256, again.n_vocab) == (tok.sha256, 286)


def test_an_unknown_name_is_answered_with_the_nearest(fake_encoding):
    with pytest.raises(UserError, match="did you mean cl100k_base"):
        Tokenizer.resolve("cl100k")


def test_an_encoding_that_cannot_be_fetched_says_what_to_do(monkeypatch):
    def offline(name):
        raise ConnectionError("no route")

    monkeypatch.setattr(tiktoken, "get_encoding", offline)
    with pytest.raises(UserError, match="TIKTOKEN_CACHE_DIR") as refused:
        Tokenizer.named("gpt2")
    assert "\n" not in str(refused.value)


def test_neither_tokenizer_nor_data_import_jax():
    code = "import sys, nanojax.tokenizer, nanojax.data.shards, nanojax.data.download, nanojax.data.commands; print('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"
