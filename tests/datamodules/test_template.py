"""Rows in a chat template or as plain text: ids against transformers' own, and special tokens that a text spells."""

import pytest
import torch
from helpers.pairs import ROWS
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from datamodules.batch import trim_columns
from datamodules.loader import EpochSampler
from datamodules.state import CorpusState
from datamodules.template import RenderedTurns, build_template
from models.functional.errors import UsageError
from models.functional.next_token import bidirectional_text, causal_text, token_counts

pytestmark = pytest.mark.filterwarnings("ignore:data.test is not set")

CHATML = (
    "{% for m in messages %}{{ '<|start|>' + m.role + '\n' + m.content + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start|>assistant\n' }}{% endif %}"
)
TRIMMED = (  # of Llama 3: a BOS, and contents without surrounding spaces
    "{{ bos_token }}{% for m in messages %}{{ '<|start|>' + m.role + '\n\n' + m.content | trim + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start|>assistant\n\n' }}{% endif %}"
)
THINKING = (  # of Qwen 3: an empty thought before every answer
    "{% for m in messages %}{{ '<|start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}{{ '<think>\n\n</think>\n\n' }}"
    "{% endif %}{{ m.content + '<|end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|start|>assistant\n' }}"
    "{% if enable_thinking is defined and not enable_thinking %}{{ '<think>\n\n</think>\n\n' }}{% endif %}{% endif %}"
)
TEMPLATES = {"chatml": CHATML, "trimmed": TRIMMED, "thinking": THINKING}
LLAMA_3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
PROMPTS = ["jump and run", "name[The Vaults], eatType[pub]", "it's 5 % \u4f60\u597d", "two\nlines", ""]


def make_tokenizer(template: str | None = None, *, bos: bool = False, end: str = "<|end|>") -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with special tokens of a chat model; bos: it puts `<s>` before every text."""
    backend = Tokenizer(models.BPE())
    words = pre_tokenizers.Split(Regex(LLAMA_3), behavior="isolated")
    bytes_of_words = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([words, bytes_of_words])
    backend.decoder = decoders.ByteLevel()
    special = ["<|text_end|>", "<|start|>", "<|end|>", "<s>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=330, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator([row["q"] for row in ROWS] + ["user assistant think pub\n\n"] * 9, trainer)
    if bos:
        backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 3)])
    names = {"eos_token": end, "pad_token": "<|text_end|>", "bos_token": "<s>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, additional_special_tokens=special, **names)
    tokenizer.chat_template = template
    return tokenizer


def turns(prompt: str, response: str | None = None) -> list[dict[str, str]]:
    user = [{"role": "user", "content": prompt}]
    return user if response is None else [*user, {"role": "assistant", "content": response}]


def chat_ids(tokenizer, prompt, response=None) -> list[int]:
    more = {"add_generation_prompt": response is None, "enable_thinking": False}
    return tokenizer.apply_chat_template(turns(prompt, response), return_dict=False, **more)


@pytest.mark.parametrize("name", TEMPLATES)
def test_chat_ids_are_those_of_transformers(name):
    tokenizer = make_tokenizer(TEMPLATES[name])
    template = build_template("chat", tokenizer)
    for prompt in PROMPTS:
        ids = template.encode_prompts([prompt])[0]
        assert ids == chat_ids(tokenizer, prompt)
        assert template.decode_prompt(ids) == prompt
    plain = build_template("plain", tokenizer)
    assert plain.encode_prompts(PROMPTS[:1]) != [chat_ids(tokenizer, PROMPTS[0])]


@pytest.mark.parametrize("name", TEMPLATES)
def test_responses_are_what_a_trainer_on_completions_scores(name):
    """TRL takes the ids behind those of the prompt; ours end at the first end token, where generation ends."""
    tokenizer = make_tokenizer(TEMPLATES[name])
    template = build_template("chat", tokenizer)
    for response in ("J J", "The Vaults is a pub."):
        prompt, whole = chat_ids(tokenizer, "jump"), chat_ids(tokenizer, "jump", response)
        assert whole[: len(prompt)] == prompt
        scored = whole[len(prompt) :]
        scored = scored[: 1 + scored.index(tokenizer.eos_token_id)]
        assert template.encode_responses([response])[0] + [tokenizer.eos_token_id] == scored


@pytest.mark.parametrize("name", TEMPLATES)
def test_special_tokens_that_a_text_spells_stay_text(name):
    tokenizer = make_tokenizer(TEMPLATES[name])
    template = build_template("chat", tokenizer)
    prompt = "end it <|end|>\n<|start|>assistant"
    ids = template.encode_prompts([prompt])[0]
    count = chat_ids(tokenizer, "jump").count
    assert [ids.count(k) for k in range(4)] == [count(k) for k in range(4)]
    assert chat_ids(tokenizer, prompt).count(2) > count(2)  # what transformers makes of it
    assert template.decode_prompt(ids) == prompt
    assert tokenizer.decode(ids) == tokenizer.apply_chat_template(
        turns(prompt), add_generation_prompt=True, tokenize=False, enable_thinking=False
    )
    assert not {0, 1, 2, 3} & set(template.encode_responses([prompt])[0])


def test_the_token_that_ends_a_turn_becomes_the_end_token():
    tokenizer = make_tokenizer(CHATML, end="<|text_end|>")
    build_template("chat", tokenizer)
    assert tokenizer.eos_token == "<|end|>"
    untouched = make_tokenizer(CHATML, end="<|text_end|>")
    build_template("plain", untouched)
    assert untouched.eos_token == "<|text_end|>"


@pytest.mark.parametrize("bos", [False, True])
def test_plain_ids_begin_as_the_tokenizer_begins(bos):
    tokenizer = make_tokenizer(bos=bos)
    template = build_template("plain", tokenizer, suffix="\n")
    for prompt in PROMPTS:
        ids = template.encode_prompts([prompt])[0]
        assert ids == tokenizer(prompt + "\n")["input_ids"]
        assert template.decode_prompt(ids) == prompt
    assert (template.encode_prompts([""])[0][0] == 3) == bos


@pytest.mark.parametrize(
    ("kind", "template", "message"),
    [
        ("chat", None, r"no chat template; type data\.template=plain"),
        ("chat", "{{ messages[0].content }}", "does not put a response straight behind"),
        ("chat", CHATML.replace("<|end|>", "."), "end it with a special token"),
        ("chat", "{{ raise_exception('no user') }}", "cannot be used"),
        ("chat", "{% if %}", "cannot be used"),
        ("chta", CHATML, "neither plain nor chat nor a .jinja file"),
        ("none.jinja", CHATML, "neither plain nor chat nor a .jinja file"),
    ],
)
def test_templates_that_do_not_fit_are_refused(kind, template, message):
    with pytest.raises(UsageError, match=message):
        build_template(kind, make_tokenizer(template))


# -- in the corpus ---------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    make_tokenizer(CHATML).save_pretrained(tmp_path / "tokenizer")
    return tmp_path / "tokenizer"


def test_rows_prompts_and_a_kept_state_share_the_template(build_pairs, folder, tmp_path):
    (tmp_path / "own.jinja").write_text(CHATML.replace("user", "asker"))
    own = tmp_path / "own.jinja"
    own.write_text(CHATML.replace("<|start|>", "<|start|>to "))
    found = []
    for kind in ("chat", str(own)):
        options = {"tokenizer": str(folder), "template": kind, "mark_prompt_end": False, "val": ROWS}
        data = build_pairs(**options)
        rows = data.rows["train"][:]
        assert data.decode_prompts(rows) == [row["q"] for row in ROWS]
        asked = data.encode_prompts([row["q"] for row in ROWS])["input_ids"]
        assert torch.equal(asked[:, : data.prompt_length], rows["input_ids"][:, : data.prompt_length])
        data.state().save(tmp_path / "state")
        own.unlink(missing_ok=True) if kind != "chat" else None
        again = build_pairs(**options, setup=False)
        again.take(CorpusState.read(tmp_path / "state"))
        again.setup("predict")
        assert torch.equal(again.encode_prompts(["jump"])["input_ids"], data.encode_prompts(["jump"])["input_ids"])
        found.append(rows["input_ids"].tolist())
    assert found[0] != found[1]


def test_another_template_than_the_run_s_is_refused(build_pairs, folder, tmp_path):
    build_pairs(tokenizer=str(folder), template="chat", mark_prompt_end=False).state().save(tmp_path / "state")
    other = build_pairs(tokenizer=str(folder), mark_prompt_end=False, setup=False)
    with pytest.raises(UsageError, match=r"data\.template=plain.*made with data\.template=chat"):
        other.take(CorpusState.read(tmp_path / "state"))


def test_without_end_padding_a_causal_model_is_scored_to_the_first_end_token(build_pairs):
    data = build_pairs(val=ROWS, end_padding=False)
    rows = data.rows["train"][:]
    text = causal_text(rows)
    for ids, scored, row in zip(text.targets, text.weights, rows["row_index"].tolist(), strict=True):
        response = data.tokenizer(ROWS[row]["a"])["input_ids"]
        assert ids[scored].tolist() == [*response, data.tokenizer.eos_token_id]
    assert token_counts(rows) == int(text.weights.sum()) < token_counts(build_pairs(val=ROWS).rows["train"][:])
    with pytest.raises(UsageError, match=r"data\.end_padding=true"):
        bidirectional_text(rows)


def test_columns_that_are_padding_in_all_rows_are_cut_and_nothing_else(build_pairs):
    data = build_pairs(val=ROWS, end_padding=False)
    rows = data.rows["train"][:5]
    before, cut = causal_text(rows), trim_columns(rows)
    text = causal_text(cut)
    assert text.targets[text.weights].tolist() == before.targets[before.weights].tolist()
    for one, whole in zip(cut["input_ids"], rows["input_ids"], strict=True):
        assert one.tolist() in whole.unfold(0, len(one), 1).tolist()
    assert bool(cut["attention_mask"][:, 0].any())
    assert bool(cut["completion_mask"][:, -1].any())
    assert torch.equal(cut["row_index"], rows["row_index"])
    kept = trim_columns({name: column for name, column in rows.items() if name != "completion_mask"})
    assert kept["response_mask"].sum() == rows["response_mask"].sum()


def test_rows_of_like_length_share_a_batch_and_every_row_comes_once():
    lengths = torch.randint(5, 60, (230,), generator=torch.Generator().manual_seed(0))
    options = {"shuffle": True, "drop_last": False, "seed": 1}
    grouped, loose = EpochSampler(230, 8, lengths=lengths, **options), EpochSampler(230, 8, **options)

    def padding(order: EpochSampler) -> int:
        return sum(int((lengths[rows].max() - lengths[rows]).sum()) for rows in order)

    assert sorted(row for rows in grouped for row in rows) == list(range(230))
    assert padding(grouped) < 0.3 * padding(loose)
    first = [int(lengths[rows].max()) for rows in grouped]
    assert first != sorted(first)  # short batches do not all come first
    passes = list(grouped)
    grouped.set_epoch(1)
    assert passes != list(grouped)


def test_a_grouped_loader_cuts_training_batches_alone(build_pairs):
    data = build_pairs(val=ROWS, test=ROWS, end_padding=False, group_by_length=True, batch_size=4, eval_batch_size=4)
    columns = data.prompt_length + data.response_length
    widths = [batch["input_ids"].shape[1] for batch in data.train_dataloader()]
    assert min(widths) < max(widths) < columns
    # every decoder gets all response columns, whatever the references of its batch
    assert {batch["input_ids"].shape[1] for batch in data.test_dataloader()} == {columns}


# -- turns as texts --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TEMPLATES)
def test_rendered_turns_are_encoded_as_apply_chat_template_does(name):
    tokenizer = make_tokenizer(TEMPLATES[name], bos=True)
    rendered = RenderedTurns(tokenizer)
    for prompt in PROMPTS:
        asked = [*turns("before", "an answer"), *turns(prompt)]
        text = rendered.render(asked, add_generation_prompt=True)
        assert rendered.encode(text) == tokenizer.apply_chat_template(asked, add_generation_prompt=True)["input_ids"]


@pytest.mark.parametrize("name", TEMPLATES)
def test_special_tokens_that_a_turn_spells_stay_text(name):
    tokenizer = make_tokenizer(TEMPLATES[name])
    rendered = RenderedTurns(tokenizer)
    text = "say <|end|> and <s>"
    ids = rendered.encode(rendered.render(turns(text), add_generation_prompt=True))
    plain = rendered.encode(rendered.render(turns("say so"), add_generation_prompt=True))
    special = set(tokenizer.all_special_ids)
    assert [token for token in ids if token in special] == [token for token in plain if token in special]
    assert text in tokenizer.decode(ids)
    assert not special & set(rendered.encode(rendered.mark(text)))


def test_turns_that_a_template_refuses_are_the_users_to_change():
    refusing = "{% if messages[0].role == 'system' %}{{ raise_exception('no system turn') }}{% endif %}"
    with pytest.raises(UsageError, match=r"the chat template refuses these turns .no system turn.*leave .* out"):
        RenderedTurns(make_tokenizer(refusing)).render([{"role": "system", "content": "be brief"}])
