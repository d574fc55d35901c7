"""`nanojax tokenizer` and `nanojax data`: results on stdout, the log on stderr, one line for a wrong call."""

from __future__ import annotations

import json

import pytest

from nanojax.data import commands
from nanojax.data.commands import data_main, tokenizer_main
from nanojax.errors import UserError
from nanojax.tokenizer import Tokenizer


@pytest.fixture
def where(tmp_path) -> list[str]:
    folder = tmp_path / "corpus"
    folder.mkdir()
    rows = [json.dumps({"text": f"Document {i} says hello to document {i + 1}.\n" * 3}) for i in range(50)]
    (folder / "rows.jsonl").write_text("\n".join(rows))
    return ["--data.path", str(folder), "--data.cache", str(tmp_path / "cache")]


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    def offline(name):
        raise UserError(f"tokenizer {name} could not be fetched")

    monkeypatch.setattr(Tokenizer, "named", offline)


def test_a_tokenizer_is_trained_and_written(where, tmp_path, capsys):
    out = tmp_path / "tokenizer.json"
    tokenizer_main(["train", "--vocab-size", "300", *where, "--out", str(out)])
    assert Tokenizer.load(out).n_vocab == 300
    assert Tokenizer.load(out).sha256 in capsys.readouterr().out


def test_compression_is_a_table_on_stdout_and_what_is_missing_a_line_on_stderr(where, capsys):
    tokenizer_main(["eval", "--vocab-size", "300", *where])
    out, err = capsys.readouterr()
    header, *rows = out.splitlines()
    assert header.split() == ["bytes", "per", "token", "trained"]
    ratios = {row.split()[0]: float(row.split()[-1].replace(",", "")) for row in rows}
    assert set(ratios) == {*commands.SAMPLES, "train", "val", "vocabulary"}
    assert ratios["train"] > ratios["news"] >= 1  # it learned from the one and never saw the other
    assert ratios["Korean"] == 1  # no merge of the corpus applies: every byte is a token
    assert sum(line.startswith("without ") for line in err.splitlines()) == 2


def test_others_stand_beside_ours_when_they_can_be_had(where, capsys, monkeypatch):
    other = Tokenizer.train(iter(["ab"]), 265)
    monkeypatch.setattr(Tokenizer, "named", lambda name: other)
    tokenizer_main(["eval", "--vocab-size", "300", *where])
    out, err = capsys.readouterr()
    assert out.splitlines()[0].split()[3:] == ["trained", "gpt2", "cl100k_base"]
    assert out.splitlines()[1].split()[-2:] == ["1.00", "1.00"]
    assert "without" not in err


def test_preparing_prints_counts_hashes_and_bytes_per_token(where, capsys):
    data_main(["prepare", "--vocab-size", "300", *where])
    out, err = capsys.readouterr()
    assert [line.split()[:2] for line in out.splitlines()[1:3]] == [["train", "49"], ["val", "1"]]
    assert "bytes per token: " in out
    assert "fingerprint" in err
    data_main(["prepare", "--vocab-size", "300", *where])
    assert capsys.readouterr().out == out


@pytest.mark.parametrize(
    ("main", "argv", "says"),
    [
        (tokenizer_main, [], "needs one of train, eval"),
        (tokenizer_main, ["trian"], "did you mean train"),
        (tokenizer_main, ["train", "--vocab-sise", "3"], "did you mean --vocab-size"),
        (tokenizer_main, ["train", "--vocab-size", "3"], "vocab_size=3"),
        (tokenizer_main, ["train", "--tokenizer", "gpt2"], "drop it"),
        (data_main, ["--out", "x"], "needs one of download, prepare"),
        (data_main, ["prepaer"], "did you mean prepare"),
        (data_main, ["prepare", "--data.path", "/nonexistent/folder"], "does not exist"),
        (data_main, ["download"], "needs a name"),
        (data_main, ["download", "fineweb"], "did you mean fineweb-edu"),
        (data_main, ["download", "climbmix", "-n", "0"], "given -n 0"),
        (data_main, ["download", "climbmix", "-n", "6543"], "try -n 6542"),
        (data_main, ["download", "climbmix", "-n", "many"], "--n"),
        (data_main, ["download", "climbmix", "--workers", "0"], "workers=0"),
    ],
)
def test_a_wrong_call_is_answered_in_one_line(main, argv, says):
    with pytest.raises(UserError) as refused:
        main(argv)
    assert says in str(refused.value)
    assert "\n" not in str(refused.value)


def test_help_lists_the_commands(capsys):
    for main, words in ((tokenizer_main, ("train", "eval")), (data_main, ("download", "prepare"))):
        main(["--help"])
        out = capsys.readouterr().out
        assert all(word in out for word in words)


def test_download_is_called_with_what_was_asked(monkeypatch, capsys):
    calls = []
    monkeypatch.setattr(commands, "download", lambda *args: calls.append(args[:4]) or args[2])
    data_main(["download", "fineweb-edu", "-n", "3", "--out", "somewhere"])
    data_main(["download", "climbmix"])
    assert calls == [("fineweb-edu", 3, "somewhere", 4), ("climbmix", 8, "climbmix", 4)]
    assert "--data.path somewhere" in capsys.readouterr().out
