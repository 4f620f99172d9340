"""Whatever an option or a data file holds, it works or it gets a sentence that names it: never a traceback from deep inside."""

import contextlib
import csv
import gzip
import io
import json
import tempfile
from pathlib import Path

import helpers.composed
import pytest
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from app import modes
from app.command_line import mistake_in, quoted
from datamodules.packed_text import PackedTextDataModule
from datamodules.pairs import PairsDataModule
from models.functional.errors import UsageError
from reporting.console import sentence_for

SHORT = [
    "experiment=objectives", "trainer.fast_dev_run=true", "logger=none", "data.size=tiny", "module.forwards=[1]",
    "trainer.accelerator=cpu", "model.hidden_size=16", "model.num_hidden_layers=1", "model.intermediate_size=16",
    "data.eval_batch_size=8",
]  # fmt: skip
# what decides where and how much a run works, and what this test sets itself
LEFT_OUT = (
    "hydra",
    "paths",
    "mode",
    "study",
    "pair",
    "teacher",
    "logger",
    "trainer.fast_dev_run",
    "trainer.devices",
    "trainer.num_nodes",
    "model.",
)
VALUES = st.one_of(
    st.integers(-3, 3),
    st.floats(-2, 2).map(lambda x: round(x, 2)),
    st.sampled_from(
        [
            "null",
            "true",
            "abc",
            "[]",
            "[x]",
            "[1,2]",
            "[null]",
            "{a:1}",
            "''",
            ".nan",
            ".inf",
            "-.inf",
            "1e9999",
            "-1e30",
            "1e-300",
        ]
    ),
)


def composed(*overrides: str, folder: str = "run"):
    places = ["paths.output_dir=out", f"paths.cache_dir={folder}/cache", f"paths.run_dir={folder}"]
    cfg = helpers.composed.composed(*places, *SHORT, *overrides)
    HydraConfig.instance().set_config(cfg)
    return cfg


def leaves(node, place: str = "") -> list[str]:
    found = []
    for name in node:
        here = f"{place}{name}"
        if here.startswith(LEFT_OUT) or name == "_target_":
            continue
        part = None if OmegaConf.is_missing(node, name) else node[name]
        found += leaves(part, f"{here}.") if OmegaConf.is_dict(part) else [here]
    return found


LEAVES = leaves(composed())


def refuses_well(option: str, value: object) -> None:
    try:
        with tempfile.TemporaryDirectory() as folder:
            try:
                cfg = composed(f"{option}={value}", folder=folder)
            except HydraException:  # its own sentence
                assume(False)
            try:
                with contextlib.redirect_stdout(io.StringIO()):
                    modes.run_mode(cfg)
            except Exception as error:
                sentence = sentence_for(error)
                if sentence is None:
                    raise
                assert option.split(".")[-1] in sentence or option.split(".")[0] in sentence, sentence
    finally:
        GlobalHydra.instance().clear()


@settings(max_examples=15)
@given(st.sampled_from(LEAVES), VALUES)
def test_options_work_or_are_named(option, value):
    refuses_well(option, value)


@pytest.mark.slow
@settings(max_examples=600)
@given(st.sampled_from(LEAVES), VALUES)
def test_many_options_work_or_are_named(option, value):
    refuses_well(option, value)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["in", "out", "x"]), inner, max_size=3),
    max_leaves=6,
)
GOOD = st.fixed_dictionaries({"in": st.text(min_size=1, max_size=8), "out": st.text(min_size=1, max_size=8)})
LINE = st.one_of(GOOD.map(json.dumps), JSON.map(json.dumps), st.text(max_size=10)).map(
    lambda s: s.encode("utf-8", "replace")
)


@pytest.mark.filterwarnings("ignore:.*unusable lines were skipped")
@settings(max_examples=150)
@given(st.lists(LINE | st.binary(max_size=6), max_size=6))
def test_data_files_work_or_are_named(lines):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "rows.jsonl")
        path.write_bytes(b"\n".join(lines))
        data = PairsDataModule(
            name="fuzz", train=str(path), val=str(path), test=str(path), prompt_field="in", response_field="out",
            tokenizer="byte", vocab_size=300, prompt_length=64, response_length=64, batch_size=1, eval_batch_size=1,
            cache_dir=folder,
        )  # fmt: skip
        try:
            data.setup("fit")
            assert len(next(iter(data.train_dataloader()))["input_ids"]) == 1
        except UsageError as error:
            sentence = str(error)
        else:
            return
        assert "rows.jsonl" in sentence or "data." in sentence


CELL = st.text(st.characters(exclude_categories=["Cs"]), max_size=6)
ENCODINGS = ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32", "latin-1", "cp1252"]
COLUMNS = ["in", "my in", "in.put", "вход", "In", " in ", '"in"', "in,out", "0", "null"]


@contextlib.contextmanager
def said(*names: str):
    """What is inside works, or raises a UsageError that has one of the names."""
    sentence = None
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    except UsageError as error:
        sentence = str(error)
    assert sentence is None or any(name in sentence for name in names), sentence


def rows_as(kind: str, columns: tuple[str, str], rows: list[tuple[str, str]]) -> str:
    if kind == ".csv":
        out = io.StringIO()
        csv.writer(out).writerows([columns, *rows])
        return out.getvalue()
    return "\n".join(json.dumps(dict(zip(columns, row, strict=True)), ensure_ascii=False) for row in rows)


@pytest.mark.filterwarnings("ignore:.*unusable lines were skipped")
@settings(max_examples=80)
@given(
    kind=st.sampled_from([".csv", ".jsonl"]), column=st.sampled_from(COLUMNS), encoding=st.sampled_from(ENCODINGS),
    rows=st.lists(st.tuples(CELL, CELL), max_size=4), pack=st.sampled_from([None, "gz", "cut", "plain"]),
    name=st.sampled_from(["rows", "ä b's [1] {x}", "a=b,c", "-x"]), linked=st.booleans(),
)  # fmt: skip
def test_tables_of_any_spelling_work_or_are_named(kind, column, encoding, rows, pack, name, linked):
    with tempfile.TemporaryDirectory() as folder:
        content = rows_as(kind, (column, "out"), rows).encode(encoding, "replace")
        # as it is, zipped, zipped and cut off, or with the name of a zipped file alone
        zipped = {"gz": gzip.compress(content), "cut": gzip.compress(content)[:-9]}.get(pack or "", content)
        path = Path(folder, f"{name}{kind}{'.gz' if pack else ''}")
        path.write_bytes(zipped)
        if linked:
            link = Path(folder, "link" + "".join(path.suffixes[-2:] if pack else path.suffixes[-1:]))
            link.symlink_to(path)
            path = link
        data = PairsDataModule(
            name="fuzz", train=str(path), val=str(path), test=str(path), prompt_field=column, response_field="out",
            tokenizer="byte", vocab_size=300, prompt_length=64, response_length=64, batch_size=1, eval_batch_size=1,
            cache_dir=folder,
        )  # fmt: skip
        with said(path.name, "data."):
            data.setup("fit")
            kept = [data.decode_responses(row.unsqueeze(0))[0] for row in [data.rows["train"][0]["input_ids"][64:]]]
            if encoding.startswith("utf-8"):
                assert kept[0] in {row[1] for row in rows}


@settings(max_examples=60)
@given(
    st.one_of(
        st.sampled_from(
            ["", "~", "~nobody here/x", "/dev/null", ".", "..", "a" * 5000, "*", "[", "**", "https://x.y/z.csv"]
        ),
        st.text(max_size=12),
    ),
    st.sampled_from([PairsDataModule, PackedTextDataModule]),
)
def test_paths_of_any_spelling_are_named(path, kind):
    """None of them is a file of rows."""
    own = {"name": "fuzz", "train": path, "val": None, "test": None, "vocab_size": 300, "batch_size": 1}
    if kind is PairsDataModule:
        own |= {"prompt_field": "in", "response_field": "out", "prompt_length": 4, "response_length": 4}
    else:
        own |= {"sequence_length": 4}
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder), pytest.raises(UsageError, match=r"data\."):
        kind(**own, tokenizer="byte", eval_batch_size=1, cache_dir=folder).setup("fit")


@settings(max_examples=60)
@given(
    st.text(max_size=20)
    | st.sampled_from(["-x", "  ", "%s %d", "$HOME ${x} ${oc.env:HOME}", "\\", "\\'", "a\nb", "🙂=['\"]"])
)
def test_prompts_of_any_spelling_are_read_as_typed_or_named(text):
    """As an argument of the command line, which no shell changes."""
    (argument,) = quoted([f"prompt={text}"])
    sentence = mistake_in(["experiment=objectives", argument])
    if sentence is not None:
        assert sentence.startswith("prompt=")
        return
    override = OverridesParser.create().parse_override(argument)
    if isinstance(override.value(), str) and text[:1] not in ("'", '"') and "\\" not in text and "${" not in text:
        assert override.value() == text.strip() or override.value() == text
