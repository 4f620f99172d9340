"""The One Billion Word Benchmark: spaces around punctuation go, words stay, splits are the right files."""

import json

import pytest

from datamodules import lm1b
from datamodules.lm1b import detokenize, main


@pytest.mark.parametrize(
    ("published", "text"),
    [
        ('He said , " it \'s over . "', 'He said, "it\'s over."'),
        ("Is it ? Yes ! No ; well : maybe .", "Is it? Yes! No; well: maybe."),
        ("What ?", "What?"),
        ("a ; : b , ; c", "a ;: b,; c"),
        ("Stop !", "Stop!"),
        ("See http : / / a.org and https : / / b.org now .", "See http://a.org and https://b.org now."),
        ("It cost $ 5 ( about £ 3 ) and / or more [ sic ] .", "It cost $5 (about £3) and/or more [sic] ."),
        ("The ' best ' of them", "The 'best' of them"),
        ("Mr. Smith went to the U.S. in 1.5 hours", "Mr. Smith went to the U.S. in 1.5 hours"),
    ],
)
def test_spaces_around_punctuation_are_removed(published, text):
    assert detokenize(published) == text


def test_splits_are_written_a_sentence_a_line(tmp_path):
    names = {"train": ("news.en-00001-of-00100", "news.en-00002-of-00100"), "test": ("news.en.heldout-00000-of-00050",)}
    for split, files in names.items():
        folder = tmp_path / "raw" / lm1b.FILES[split].split("/")[0]
        folder.mkdir(parents=True)
        for name in files:
            (folder / name).write_text(f"In {name} , first .\nA line\u2028of two \u00e9 .\n", encoding="utf-8")
    main([str(tmp_path / "raw"), str(tmp_path / "lm1b")])
    for split, files in names.items():
        rows = (tmp_path / "lm1b" / f"{split}.jsonl").read_text(encoding="utf-8").split("\n")[:-1]
        read = [json.loads(row)["text"] for row in rows]
        assert read == [text for name in files for text in (f"In {name}, first.", "A line\u2028of two \u00e9.")]


def test_a_folder_without_the_files_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit):
        main([str(tmp_path), str(tmp_path / "lm1b")])
    assert "type the folder that the benchmark's archive was unpacked to" in capsys.readouterr().err
