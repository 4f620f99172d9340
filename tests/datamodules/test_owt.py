"""OpenWebText: the last documents are the test split, whichever file they stand in, and texts stay as they are."""

import gzip
import json

import pyarrow
import pyarrow.parquet
import pytest
from helpers.gpt2_bytes import gpt2_bytes

from datamodules import owt
from datamodules.documents import PASSAGE, DocumentReader
from datamodules.encoder import Encoder
from datamodules.owt import main
from datamodules.token_cache import tokenize_once
from datamodules.tokenizer import build_tokenizer, document_start

LONG = "A line\u2028of two.\n" * (PASSAGE // 8)  # read in parts
TEXTS = ["First.", "Port-au-Prince\n\nSecond \u00e9.", LONG, "Fourth.", "Fifth."]


def write_parquet(folder):
    folder.mkdir()
    for number, texts in enumerate((TEXTS[:2], TEXTS[2:])):
        pyarrow.parquet.write_table(pyarrow.table({"text": texts}), folder / f"train-0000{number}-of-00002.parquet")


def write_jsonl(folder):
    folder.mkdir()
    for number, texts in enumerate((TEXTS[:4], TEXTS[4:])):
        with gzip.open(folder / f"{number}.jsonl.gz", "wt") as file:
            file.write("\n".join(json.dumps({"text": text}) for text in texts))


@pytest.mark.parametrize("write", [write_parquet, write_jsonl])
@pytest.mark.parametrize("held_out", [1, 3])
def test_the_last_documents_are_held_out(tmp_path, monkeypatch, write, held_out):
    monkeypatch.setattr(owt, "HELD_OUT", held_out)
    write(tmp_path / "raw")
    main([str(tmp_path / "raw"), str(tmp_path / "owt")])
    for split, texts in (("train", TEXTS[:-held_out]), ("test", TEXTS[-held_out:])):
        rows = (tmp_path / "owt" / f"{split}.jsonl").read_text(encoding="utf-8").split("\n")[:-1]
        assert [json.loads(row) for row in rows] == [{"text": text} for text in texts]


def test_what_holds_no_corpus_is_refused(tmp_path, capsys, monkeypatch):
    with pytest.raises(SystemExit):
        main([str(tmp_path), str(tmp_path / "owt")])
    assert "type the folder with the files of OpenWebText" in capsys.readouterr().err
    monkeypatch.setattr(owt, "HELD_OUT", len(TEXTS))
    write_parquet(tmp_path / "raw")
    with pytest.raises(SystemExit):
        main([str(tmp_path / "raw"), str(tmp_path / "owt")])
    assert "no more than the 5 documents of the test split" in capsys.readouterr().err


def test_documents_without_text_are_left_out_and_named(tmp_path, monkeypatch):
    monkeypatch.setattr(owt, "HELD_OUT", 1)
    (tmp_path / "raw").mkdir()
    rows = ['{"text": "a"}', "{", '{"text": "b"}', '{"text": "c"}']
    (tmp_path / "raw" / "a.jsonl").write_text("\n".join(rows))
    with pytest.warns(UserWarning, match="1 documents were left out:\n.*a.jsonl:2"):
        main([str(tmp_path / "raw"), str(tmp_path / "owt")])
    assert (tmp_path / "owt" / "train.jsonl").read_text() == '{"text": "a"}\n{"text": "b"}\n'


def test_a_document_s_end_is_no_unknown_token_of_gpt2(tmp_path, recwarn):
    """Its end token is its unknown one, too."""
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "one \\u20ac"}\n{"text": "two"}\n')
    tokenizer = build_tokenizer(str(gpt2_bytes(tmp_path / "gpt2")), [], 0, tmp_path, packed=True)
    cache = tokenize_once(path, DocumentReader(), Encoder(tokenizer), document_start(tokenizer), tmp_path, "data.train")
    assert (cache.about["tokens"], cache.about["unknown"]) == (2 + 7 + 3, 0)
