"""`--model leap` beside the harness' own `hf` model, and what each kind of exported model answers or refuses."""

import json
import shutil
import subprocess
import sys
import tomllib
from dataclasses import fields
from pathlib import Path

import pytest
import torch
import yaml

pytest.importorskip("lm_eval")

import lm_eval
from helpers.dream import CONFIG, make_weights, reference_logits, write_dream
from helpers.experiment import ROOT
from helpers.harness import byte_tokenizer, requests, write_model, write_tasks
from lm_eval.config.evaluate_config import EvaluatorConfig
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from app.evaluated import EvaluationOptions, TextRequest, chosen_decoder
from app.evaluation_harness import Generation, LeapHarness, say_sentences
from datamodules.state import CorpusState
from datamodules.tokenizer import end_ids
from models.backbones.masked_from_causal import load_from_causal
from models.functional.errors import UsageError
from models.online.decoder import IncrementalForward

FIXTURES = ROOT / "tests" / "fixtures" / "first_formats"
ORACLE = "who=anna"  # words of the fixtures' vocabulary
GREEDY = {"until": [], "max_gen_toks": 4}


@pytest.fixture(autouse=True)
def _offline(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda results: None)  # lists all packages, for seconds
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module", params=[False, True], ids=["no BOS", "BOS"])
def causal(request, tmp_path_factory):
    torch.manual_seed(0)
    return write_model(tmp_path_factory.mktemp("causal") / "model", begins=request.param)


@pytest.fixture(scope="module")
def masked(tmp_path_factory):
    torch.manual_seed(0)
    return write_model(tmp_path_factory.mktemp("masked") / "model", fills_masks=True)


def leap(path, **options) -> LeapHarness:
    return LeapHarness(str(path), **({"device": "cpu"} | options))


def hf(path, batch_size: int) -> HFLM:
    return HFLM(pretrained=str(path), device="cpu", batch_size=batch_size)


# -- causal models: the numbers of the harness' own model ------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [1, 3])
def test_likelihoods_are_those_of_hf(causal, batch_size):
    ours, theirs = leap(causal, batch_size=batch_size), hf(causal, batch_size)
    (greedy,) = theirs.generate_until(requests(("ab", {"until": [], "max_gen_toks": 3})))
    asked = requests(
        ("ab", "cd"), ("hello there ", " x"), ("", "zz"), ("q" * 70, "abc"), ("many words before", "y"), ("ab", greedy)
    )
    found, wanted = ours.loglikelihood(asked), theirs.loglikelihood(asked)
    assert [log_p for log_p, _ in found] == pytest.approx([log_p for log_p, _ in wanted], abs=1e-4)
    assert [same for _, same in found] == [same for _, same in wanted]


@pytest.mark.parametrize("batch_size", [1, 2])
def test_rolling_likelihoods_are_those_of_hf(causal, batch_size):
    asked = requests(("ab" * 80,), ("x",), ("",), ("seven more",))
    models = leap(causal, batch_size=batch_size), hf(causal, batch_size)
    found, wanted = (model.loglikelihood_rolling(asked) for model in models)
    assert found == pytest.approx(wanted, abs=1e-4)


@pytest.mark.parametrize("batch_size", [1, 3])
def test_texts_are_those_of_hf(causal, batch_size):
    theirs = hf(causal, batch_size)
    prompts = ["ab", "hello there", "p" * 70, "x", "one two three"]
    whole = theirs.generate_until(requests(*((prompt, {"until": [], "max_gen_toks": 16}) for prompt in prompts)))
    stops = [*sorted({text[k] for text in whole for k in (3, 7) if len(text) > k})[:3], whole[0][2:4]]
    how = [
        {"until": stops, "max_gen_toks": 16},
        {"until": stops[0], "max_new_tokens": 5, "do_sample": False, "temperature": 0.0},
    ]
    asked = requests(*((prompt, own) for prompt in prompts for own in how))
    model = leap(causal, batch_size=batch_size)
    found = model.generate_until(asked)
    assert found == theirs.generate_until(asked)
    assert model.get_model_info()["forward_passes_per_text"] < 10  # of 16 and 5: a stop ends the generation
    assert any(text not in whole for text in found)  # some were cut


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    return write_tasks(tmp_path_factory.mktemp("tasks"))


def evaluate(model, tasks: Path, names: list[str], **more) -> dict:
    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    return lm_eval.simple_evaluate(model=model, tasks=names, task_manager=manager, bootstrap_iters=0, **more)


@pytest.mark.parametrize("chat", [False, True])
def test_results_of_tasks_are_those_of_hf(tmp_path, tasks, chat):
    folder = write_model(tmp_path / "model", begins=True)
    names = ["tiny_answer"] if chat else ["tiny_choice", "tiny_answer", "tiny_text"]
    found = evaluate("leap", tasks, names, model_args=f"path={folder}", device="cpu", apply_chat_template=chat)
    wanted = evaluate(hf(folder, 2), tasks, names, apply_chat_template=chat)
    for name, own in wanted["results"].items():
        for metric, value in own.items():
            same = value if isinstance(value, str) else pytest.approx(value, rel=1e-4)
            assert found["results"][name][metric] == same
    texts = [[sample["resps"] for sample in result["samples"]["tiny_answer"]] for result in (found, wanted)]
    assert texts[0] == texts[1]
    assert found["config"]["leap_kind"] == "causal model"
    assert found["config"]["likelihood"] == "exact"
    assert 0 < found["config"]["forward_passes_per_text"] <= 12


# -- models that fill masks ------------------------------------------------------------------------------------------


def test_the_bound_is_the_mean_of_its_draws_and_their_number_is_recorded(masked):
    """Against the enumeration of all masks: tests/models/diffusion/test_likelihood.py."""
    model = leap(masked, mc=600, batch_size=200, greedy=False)
    ((log_p, greedy),) = model.loglikelihood(requests(("ab", "cd")))
    net, context, text = model.evaluated.fills_masks, *(model.tok_encode(part) for part in ("ab", "cd"))
    with torch.no_grad():

        def nll(*shown: int) -> torch.Tensor:
            ids = [token if k in shown else net.mask_id for k, token in enumerate(text)]
            return -net(torch.tensor([context + ids]))[0, -2:].log_softmax(-1).gather(-1, torch.tensor([text]).mT)[:, 0]

        # two orders of filling two tokens, each as likely as the other
        bound = float((nll()[0] + nll(0)[1] + nll()[1] + nll(1)[0]) / 2)
    assert log_p == pytest.approx(-bound, rel=0.05)
    assert not greedy
    assert model.get_model_info()["likelihood"] == "bound"
    assert model.get_model_info()["likelihood_draws"] == 600


def test_a_bound_does_not_depend_on_batches_and_other_requests(masked):
    asked = [("ab", "cd"), ("one two", "three"), ("", "x")]
    found = [leap(masked, mc=8, batch_size=size).loglikelihood(requests(*asked)) for size in (1, 5)]
    assert [p for p, _ in found[0]] == pytest.approx([p for p, _ in found[1]], abs=1e-4)
    alone = leap(masked, mc=8).loglikelihood(requests(asked[1]))
    assert alone[0][0] == pytest.approx(found[0][1][0], abs=1e-4)
    other = leap(masked, mc=8, seed=1).loglikelihood(requests(asked[1]))
    assert other[0][0] != pytest.approx(alone[0][0], abs=1e-4)


def test_what_a_masked_model_generates_is_greedy(masked):
    model = leap(masked, mc=1)
    how = {"until": [], "max_gen_toks": 6}
    (text,) = model.generate_until(requests(("hello", how)))
    ids = model.tok_encode(text)
    if len(ids) == 6:  # no end and no broken character among them
        assert model.loglikelihood(requests(("hello", text)))[0][1]
    assert not model.loglikelihood(requests(("hello", "abcdef")))[0][1]


def test_rolling_bounds_count_every_token_once(masked):
    model = leap(masked, mc=2, batch_size=2)
    text = "abc " * 40
    seen = []
    model._bound = lambda context, continuation, *, greedy: (
        seen.append((context, continuation)) or (-1.0 * len(continuation), greedy)
    )
    assert model.loglikelihood_rolling(requests((text,))) == [-160.0]
    assert [token for _, own in seen for token in own] == model.tok_encode(text)
    assert all(len(context) > 0 and len(context) + len(own) <= 64 for context, own in seen)


def test_a_window_is_not_filled_greedily_and_a_bound_has_guidance(masked, monkeypatch):
    asked = []
    monkeypatch.setattr("app.evaluation_harness.fills_greedily", lambda *a: asked.append(a[-1]) or True)
    leap(masked, mc=2).loglikelihood_rolling(requests(("abc",)))
    assert asked == []
    (guided,), (plain,) = (leap(masked, mc=4, guidance=g).loglikelihood(requests(("ab", "c"))) for g in (1.5, 0.0))
    assert asked == [1.5, 0.0]
    assert abs(guided[0] - plain[0]) > 1e-4
    assert leap(masked)._bound([5], [], greedy=True) == (0.0, True)


def test_rolling_bounds_do_not_count_a_bos(tmp_path):
    torch.manual_seed(0)
    model = leap(write_model(tmp_path / "model", fills_masks=True, begins=True), mc=1)
    seen = []
    model._bound = lambda context, continuation, *, greedy: seen.append(continuation) or (0.0, False)
    model.loglikelihood_rolling(requests(("abc",)))
    assert [len(own) for own in seen] == [3]


@pytest.mark.parametrize(
    ("options", "passes"),
    [
        ({}, 8.0),
        ({"decoder": 2}, 2.0),
        ({"decoder": "4", "block_length": 2}, 4.0),
        ({"decoder": 2, "guidance": 0.5}, 4.0),
        ({"decoder": "confidence:0.0001"}, 1.0),
        ({"decoder": "factor:1e9"}, 1.0),
        ({"decoder": "entropy:1000", "block_length": 4}, 2.0),
        ({"decoder": "entropy:1000", "block_length": 3}, 3.0),
    ],
)
def test_forward_passes_of_a_masked_model_are_those_of_its_decoder(masked, options, passes):
    model = leap(masked, batch_size=2, **options)
    model.generate_until(requests(*((prompt, {"until": [], "max_gen_toks": 8}) for prompt in ("ab", "c", "three"))))
    assert model.get_model_info()["forward_passes_per_text"] == passes


@pytest.mark.parametrize("decoder", [2, "confidence:0.5"])
def test_end_tokens_of_a_masked_model_come_last_where_the_option_says_so(masked, decoder):
    for last in (False, True):
        model = leap(masked, decoder=decoder, ends_last=last)
        options = model.evaluated.decoder(TextRequest(8)).options
        ends = end_ids(model.tokenizer)
        if decoder == 2:
            assert options["ends_last"] == (ends if last else None)
        else:
            assert (options["end_ids"], options["ends_last"]) == (ends, last)


def test_texts_of_a_masked_model_do_not_depend_on_the_batch(masked):
    asked = requests(*((prompt, {"until": ["a"], "max_gen_toks": 8}) for prompt in ("ab", "c", "three words here")))
    assert leap(masked).generate_until(asked) == leap(masked, batch_size=3).generate_until(asked)


@pytest.mark.parametrize("separator", ["prompt", "response"])
def test_a_causal_model_that_fills_masks_has_the_likelihood_of_a_first_token(tmp_path, separator):
    """Where the separator sees the prompt alone, its prediction is the causal model's, without the mask's own share."""
    folder = write_model(tmp_path / "causal")
    converted = load_from_causal(folder, mask_token="<mask>", separator=separator).eval()
    converted.save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    model = leap(tmp_path / "model", mc=4, batch_size=3)
    assert model.evaluated.kind == "masked diffusion model"
    ids = model.tok_encode("ab"), model.tok_encode("c")
    with torch.no_grad():
        logits = converted.causal_logits(torch.tensor([ids[0]]))[0, -1]
    logits[model.tokenizer.mask_token_id] = -torch.inf
    ((log_p, greedy),) = model.loglikelihood(requests(("ab", "c")))
    assert (log_p == pytest.approx(float(logits.log_softmax(-1)[ids[1][0]]), abs=1e-4)) == (separator == "prompt")
    assert greedy == (separator == "prompt" and int(logits.argmax()) == ids[1][0])
    assert model.loglikelihood_rolling(requests(("some text",)))[0] < 0
    how = {"until": [], "max_gen_toks": 6}
    alone, together = (
        leap(tmp_path / "model", decoder=3, batch_size=size).generate_until(
            requests(("ab", how), ("a longer one", how))
        )
        for size in (1, 2)
    )
    assert alone == together


def test_a_published_dream_has_the_likelihood_of_its_own_logits(tmp_path):
    model = leap(write_dream(tmp_path), mc=4, batch_size=2)
    prompt, (word,) = model.tok_encode("he said"), model.tok_encode("x")
    mask = CONFIG["mask_token_id"]
    ids = torch.tensor([[*prompt, mask]])
    logits = reference_logits(CONFIG, make_weights(CONFIG), ids, torch.ones_like(ids).bool())[0, -2]
    ((log_p, greedy),) = model.loglikelihood(requests(("he said", "x")))
    assert log_p == pytest.approx(float(logits[:mask].log_softmax(-1)[word]), abs=1e-4)
    assert greedy == (int(logits[:mask].argmax()) == word)
    (text,) = model.generate_until(requests(("he said", {"until": [], "max_gen_toks": 6})))
    assert "<|mask|>" not in text


def test_a_masked_model_of_another_layout_is_refused_by_name(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "sdar"}))
    with pytest.raises(UsageError, match=r"holds a sdar model"):
        leap(tmp_path)


# -- every other kind ------------------------------------------------------------------------------------------------

STUDENTS = {"logit": "one-step student", "noisy_mask": "noisy-mask student", "step_halving": "step-halving student"}


def fixture_of(name: str, tmp_path: Path, **more) -> LeapHarness:
    """The model of a run of the first version."""
    if name in STUDENTS:
        return leap(FIXTURES / name / "student", teacher=str(FIXTURES / name / "teacher"), **more)
    if name == "qstar":
        theta, target = (str(FIXTURES / "qstar" / "pair" / part) for part in ("theta", "target"))
        return leap(theta, target=target, **more)
    return leap(FIXTURES / name / "model", **more)


@pytest.mark.parametrize(
    ("name", "kind", "likelihood"),
    [
        ("logit", "one-step student", "none"),
        ("noisy_mask", "noisy-mask student", "none"),
        ("step_halving", "step-halving student", "bound"),
        ("plans", "planner-executor", "none"),
        ("online", "online concept model", "exact"),
        ("qstar", "q* pair", "exact"),
    ],
)
def test_every_kind_generates_and_has_a_likelihood_or_refuses_it(tmp_path, name, kind, likelihood):
    model = fixture_of(name, tmp_path, batch_size=2, mc=4)
    info = model.get_model_info()
    assert (info["leap_kind"], info["likelihood"]) == (kind, likelihood)
    texts = model.generate_until(requests(*((prompt, GREEDY) for prompt in (ORACLE, "who=bob where=rome", ORACLE))))
    assert len(texts) == 3
    assert all(isinstance(text, str) for text in texts)
    if likelihood == "none":
        for ask in (model.loglikelihood, model.loglikelihood_rolling):
            with pytest.raises(UsageError, match=rf"is a {kind}: .*generate_until tasks work"):
                ask(requests((ORACLE, "anna")))
    else:
        ((log_p, _),) = model.loglikelihood(requests((ORACLE, " anna went")))
        assert log_p < 0
        assert model.loglikelihood_rolling(requests((ORACLE,)))[0] < 0


@pytest.mark.parametrize(
    ("name", "decoder", "passes"),
    [
        ("noisy_mask", None, 1),
        ("noisy_mask", 2, 2),
        ("noisy_mask", "renoise:3", 3),
        ("noisy_mask", "ode:4", 4),
        ("logit", 1, 1),
        ("step_halving", None, 1),
        ("step_halving", "2", 2),
        ("step_halving", "confidence:0.0001", 1),
    ],
)
def test_a_decoder_sets_the_forward_passes_of_a_student(tmp_path, name, decoder, passes):
    model = fixture_of(name, tmp_path, decoder=decoder)
    model.generate_until(requests((ORACLE, GREEDY)))
    assert model.get_model_info()["forward_passes_per_text"] == passes


@pytest.mark.parametrize("scheme", ["naive", "theta", "target", "alternate", "ngram"])
def test_every_scheme_of_qstar_gives_the_same_greedy_text(tmp_path, scheme):
    how = {"until": [], "max_gen_toks": 6}
    texts = [fixture_of("qstar", tmp_path, decoder=d).generate_until(requests((ORACLE, how))) for d in (None, scheme)]
    assert texts[0] == texts[1]


def test_the_likelihood_of_qstar_is_that_of_its_generation(tmp_path):
    model = fixture_of("qstar", tmp_path)
    decoder = model._decoder(Generation((), 5, 1.0), 5)
    rows = model._rows([model.tok_encode(ORACLE)], 5)
    tokens = decoder(rows, torch.Generator().manual_seed(0))[0]
    out = decoder.outputs[0]
    length = int(out.lengths[0])
    ((log_p, _),) = model._exact([(model.tok_encode(ORACLE), tokens[:length].tolist())])
    assert log_p == pytest.approx(float(out.log_q[0, :length].sum()), abs=1e-5)
    one_model = leap(FIXTURES / "qstar" / "pair" / "theta")
    assert log_p != pytest.approx(
        one_model._exact([(model.tok_encode(ORACLE), tokens[:length].tolist())])[0][0], abs=1e-5
    )


def test_the_target_of_a_pair_is_found_in_its_run(tmp_path):
    theta, target = (FIXTURES / "qstar" / "pair" / part for part in ("theta", "target"))
    shutil.copytree(theta, tmp_path / "run" / "theta")
    with pytest.raises(UsageError, match="target=auto: no run says"):
        leap(tmp_path / "run" / "theta", target="auto")
    CorpusState(folder=tmp_path, tokenizer=byte_tokenizer()).save(tmp_path / "run" / "data")
    (tmp_path / "run" / "made_with.json").write_text(
        json.dumps({"models": {"theta": str(theta), "target": str(target)}})
    )
    found = [leap(path, target=other) for path, other in ((tmp_path / "run" / "theta", "auto"), (theta, str(target)))]
    asked = requests((ORACLE, " anna went"))
    assert found[0].loglikelihood(asked) == found[1].loglikelihood(asked)


def test_the_likelihood_of_an_online_concept_model_is_that_of_its_generation(tmp_path):
    model = fixture_of("online", tmp_path, batch_size=2)
    context, text = model.tok_encode(ORACLE), model.tok_encode(" anna went home")
    forward = IncrementalForward(model.evaluated.network)
    logits, total = forward.prefill(torch.tensor([context])), 0.0
    for token in text:
        total += float(logits.log_softmax(-1)[0, token])
        logits = forward.step(torch.tensor([token]))
    beside = (context[:1], text[:1])  # a shorter row in the batch
    assert model._exact([(context, text), beside])[0][0] == pytest.approx(total, abs=1e-4)


# -- tokens ----------------------------------------------------------------------------------------------------------


def test_a_model_of_block_diffusion_generates_and_refuses_likelihoods(masked, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(masked, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"block_causal": True, "block_length": 4}))
    model = leap(folder)
    assert len(model.generate_until(requests(("1+2=", {"until": [], "max_gen_toks": 8})))) == 1
    with pytest.raises(UsageError, match=r"its bound, block by block, is what mode=test of its run measures"):
        model.loglikelihood(requests(("1+2=", "3")))
    with pytest.raises(UsageError, match=r"block_length=2: this model was trained by block diffusion"):
        leap(folder, block_length=2).generate_until(requests(("1+2=", {"until": [], "max_gen_toks": 8})))


def test_special_tokens_in_texts_stay_text(masked):
    model = leap(masked)
    special = set(model.tokenizer.all_special_ids)
    assert not special & set(model.tok_encode("a <mask> b <eos>"))
    ids = model._encode_pair("say <mask>", " <eos>")
    assert not special & {*ids[0], *ids[1]}
    # in turns of a chat those of the template alone are special
    turns = model.apply_chat_template([{"role": "user", "content": "say <eos> or <mask>"}])
    found = model.tok_encode(turns)
    assert [token for token in found if token in special] == [
        model.tokenizer.bos_token_id,
        model.tokenizer.eos_token_id,
    ]
    assert model.tokenizer.decode(found) == "<bos><user>say <eos> or <mask><eos><assistant>"
    context, continuation = model._encode_pair(turns, "<eos>")
    assert context == found
    assert not special & set(continuation)


def test_turns_without_special_tokens_are_encoded_as_apply_chat_template_does(masked):
    model = leap(masked)
    turns = [{"role": "user", "content": "one"}, {"role": "assistant", "content": "two"}]
    wanted = model.tokenizer.apply_chat_template(turns, add_generation_prompt=True)
    assert model.tok_encode(model.apply_chat_template(turns)) == wanted["input_ids"]


@pytest.mark.parametrize("layout", ["run", "plain"])
def test_prompts_end_as_in_the_run_of_the_model(masked, tmp_path, layout):
    run = tmp_path / "run"
    shutil.copytree(masked, run / "model")
    own = {"template": "plain", "prompt_suffix": " =>", "mark_prompt_end": True}
    tokenizer = byte_tokenizer()
    CorpusState(
        folder=run / "data",
        tokenizer=tokenizer,
        kind="PairsDataModule",
        options=own,
        prompt_length=8,
        response_length=16,
    ).save(run / "data")
    model = leap(run / "model", layout=layout)
    plain = [model.tok_encode(part) for part in ("ab", " cd")]
    ended = [*model.tok_encode("ab =>"), tokenizer.eos_token_id]
    assert model._encode_pair("ab", " cd") == ((ended, plain[1]) if layout == "run" else (plain[0], plain[1]))
    assert model._prompt("ab", 32) == (ended if layout == "run" else plain[0])
    assert model.max_gen_toks == (16 if layout == "run" else 256)


# -- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"mc": 0}, "mc=0 must be at least 1"),
        ({"mc": "many"}, "mc=many should be a valid integer"),
        ({"mc": 1.5}, "mc=1.5 should be a valid integer"),
        ({"mc": True}, "mc=true should be a valid integer"),
        ({"guidance": "much"}, "guidance=much should be a valid number"),
        ({"ends_last": "perhaps"}, "ends_last=perhaps should be a valid boolean"),
        ({"greedy": 0}, "greedy=0 should be a valid boolean; type true or false"),
        ({"decoder": "confidance:0.9"}, "decoder=confidance:0.9 is not known.*decoder=confidence:0.9"),
        ({"decoder": "confidence:2"}, "decoder=confidence:2.0 must lie above 0"),
        ({"decoder": 0}, "decoder=0 is not known"),
        ({"seed": 2**70}, "seed=1180591620717411303424 must be at most"),
        ({"seed": -1}, "seed=-1 must be at least 0"),
        ({"guidance": float("nan")}, "guidance=nan is not a number"),
        ({"remasking": "best"}, "remasking=best is not known"),
        ({"theta_weight": 0.5}, "theta_weight=0.5: a masked diffusion model has no such option"),
        ({"steps": 4}, "--model_args: got an unexpected keyword argument 'steps'"),
        ({"batch_size": "auto"}, "--batch_size auto: .* takes a number"),
        ({"device": "gpu"}, "device=gpu"),
    ],
)
def test_options_that_cannot_work_are_refused(masked, options, sentence):
    with pytest.raises(UsageError, match=sentence):
        leap(masked, **options)


@pytest.mark.parametrize(
    "option", [{"decoder": 4}, {"block_length": 4}, {"ends_last": True}, {"guidance": 1.0}, {"theta_weight": 0.5}]
)
def test_a_causal_model_refuses_options_of_others(causal, option):
    with pytest.raises(UsageError, match=f"{next(iter(option))}=.*: a causal model has no such option"):
        leap(causal, **option)


@pytest.mark.parametrize(
    ("gen_kwargs", "sentence"),
    [
        ({"max_gen_toks": 64}, "leaves no room for a prompt in the 64 positions"),
        ({"do_sample": True, "top_p": 0.9}, "--gen_kwargs top_p=0.9"),
        ({"num_beams": 4}, "--gen_kwargs num_beams=4"),
        ({"repetition_penalty": 1.2}, "--gen_kwargs repetition_penalty=1.2"),
    ],
)
def test_requests_that_cannot_be_answered_are_refused(causal, gen_kwargs, sentence):
    with pytest.raises(UsageError, match=sentence):
        leap(causal).generate_until(requests(("ab", {"until": []} | gen_kwargs)))


def test_forward_passes_that_do_not_fill_the_blocks_are_refused(masked):
    for decoder, length in ((3, 8), (16, 8)):
        with pytest.raises(UsageError, match=f"decoder={decoder} must be a multiple of the 2 blocks and at most the 8"):
            leap(masked, decoder=decoder, block_length=4).generate_until(requests(("ab", {"max_gen_toks": length})))


def test_a_continuation_that_fills_the_context_is_refused(masked):
    with pytest.raises(UsageError, match="a continuation of 64 tokens does not fit the 64 positions"):
        leap(masked, mc=1).loglikelihood(requests(("ab", "c" * 64)))


def test_greedy_requests_may_name_options_of_sampling():
    assert Generation.of_task({"until": "\n", "do_sample": False, "temperature": 0.7, "top_p": 0.9}) == Generation(
        ("\n",), None, 0.0
    )
    assert Generation.of_task({"num_beams": 1, "temperature": 0.5}).temperature == 0.5
    assert Generation.of_task({"do_sample": True}).temperature == 1.0
    assert Generation.of_task({"max_new_tokens": 3, "max_gen_toks": 2}).length == 2


def test_folders_without_a_model_are_refused(causal, tmp_path):
    with pytest.raises(UsageError, match="path=/no/such/folder: this folder does not exist"):
        leap("/no/such/folder")
    for option in ("target", "teacher"):
        with pytest.raises(UsageError, match=f"{option}=2026"):
            leap(FIXTURES / "logit" / "student" if option == "teacher" else causal, **{option: 2026})
    with pytest.raises(UsageError, match="holds no exported model"):
        leap(tmp_path)
    (tmp_path / "run").mkdir()
    shutil.copytree(causal, tmp_path / "run" / "model")
    with pytest.raises(UsageError, match=r"holds no exported model .*type path=.*run/model"):
        leap(tmp_path / "run")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "run" / "model" / name).unlink()
    with pytest.raises(UsageError, match="holds no tokenizer"):
        leap(tmp_path / "run" / "model")


def test_a_student_without_its_teacher_says_what_to_type(masked):
    with pytest.raises(UsageError, match="teacher"):
        leap(FIXTURES / "logit" / "student")
    with pytest.raises(UsageError, match=r"another base model than the one given; type teacher=<the folder"):
        leap(FIXTURES / "logit" / "student", teacher=masked)
    with pytest.raises(UsageError, match=r"decoder=4: this student takes one forward pass; type decoder=1"):
        leap(FIXTURES / "logit" / "student", teacher=FIXTURES / "logit" / "teacher", decoder=4)


@pytest.mark.parametrize("weight", [2, -0.5])
def test_a_weight_of_q_star_outside_its_range_is_refused(causal, weight):
    with pytest.raises(UsageError, match=f"^theta_weight={weight} must lie between 0 and 1"):
        leap(causal, target=causal, theta_weight=weight)


def test_a_damaged_tokenizer_is_said_to_be_that_of_the_path(causal, tmp_path):
    shutil.copytree(causal, tmp_path / "model")
    (tmp_path / "model" / "tokenizer.json").write_text("{")
    with pytest.raises(UsageError, match=r"^the tokenizer of path=.*no tokenizer could be read"):
        leap(tmp_path / "model")


def test_a_model_of_another_vocabulary_is_refused(causal, tmp_path):
    shutil.copytree(FIXTURES / "online" / "model", tmp_path / "model")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(causal / name, tmp_path / "model" / name)
    with pytest.raises(UsageError, match="the tokenizer of this model has 260 tokens, its embedding table"):
        leap(tmp_path / "model")


def test_a_model_trained_both_ways_is_refused(causal, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(causal, run / "model")
    CorpusState(folder=run / "data", tokenizer=byte_tokenizer()).save(run / "data")
    record = json.loads((FIXTURES / "next_token" / "record.json").read_text())
    (run / "record.json").write_text(json.dumps(record))
    assert leap(run / "model").evaluated.kind == "causal model"
    record["config"]["module"]["objective"]["_target_"] = "models.objectives.span_corruption.SpanCorruption"
    (run / "record.json").write_text(json.dumps(record))
    with pytest.raises(UsageError, match="SpanCorruption, whose model does not read texts from left to right"):
        leap(run / "model")


def test_a_denoiser_without_a_student_needs_a_number_of_steps(tmp_path):
    run = tmp_path / "run"
    shutil.copytree(FIXTURES / "noisy_mask" / "student", run / "model")
    shutil.copytree(FIXTURES / "noisy_mask" / "teacher", run / "model" / "teacher")
    CorpusState(folder=run / "data", tokenizer=byte_tokenizer()).save(run / "data")
    record = json.loads((FIXTURES / "next_token" / "record.json").read_text())
    record["config"]["module"]["objective"]["_target_"] = "models.flow.denoiser_objective.ContinuousDiffusion"
    (run / "record.json").write_text(json.dumps(record))
    with pytest.raises(UsageError, match="type decoder=ode:32"):
        leap(run / "model")
    assert leap(run / "model", decoder="ode:3").evaluated.likelihood == "none"


def test_the_name_that_lm_eval_looks_up_is_that_of_the_class():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    named = project["entry-points"]["lm_eval.models"]
    assert named == {"leap": f"{LeapHarness.__module__}:{LeapHarness.__name__}"}


def test_an_error_of_the_user_is_shown_as_a_sentence(capsys, monkeypatch):
    shown = []
    monkeypatch.setattr(sys, "excepthook", lambda *error: shown.append(error))
    say_sentences()
    say_sentences()
    sys.excepthook(UsageError, UsageError("type this"), None)
    assert "error: type this" in capsys.readouterr().err
    defect = ValueError("ours")
    sys.excepthook(ValueError, defect, None)
    assert shown == [(ValueError, defect, None)]


PUBLISHED = sorted((ROOT / "docs" / "evaluation").glob("*.yaml"))


@pytest.mark.parametrize("path", PUBLISHED, ids=lambda path: path.stem)
def test_settings_of_published_evaluations_are_options_that_exist(path):
    found = EvaluatorConfig.load_yaml_config(path)
    assert found.keys() <= {option.name for option in fields(EvaluatorConfig)}
    assert found["model"] == "leap"
    options = EvaluationOptions(**found["model_args"])
    name, forwards = chosen_decoder(options.decoder, ("forwards",))
    if "gen_kwargs" in found:
        length = Generation.of_task(found["gen_kwargs"]).length
        assert (name, forwards, length % options.block_length) == ("forwards", length, 0)
    else:
        assert options.mc % found["batch_size"] == 0  # as LLaDA's own code demands


@pytest.mark.slow
def test_tasks_of_published_evaluations_exist():
    named = {task for path in PUBLISHED for task in yaml.safe_load(path.read_text())["tasks"]}
    assert named <= set(TaskManager().all_tasks)


@pytest.mark.slow
def test_the_command_runs_tasks_and_a_wrong_path_gets_a_sentence(masked, tasks, tmp_path):
    def run(path: Path) -> subprocess.CompletedProcess:
        typed = [
            "--model",
            "leap",
            "--model_args",
            f"path={path}",
            "--tasks",
            "tiny_choice",
            "--include_path",
            str(tasks),
        ]
        command = [sys.executable, "-m", "app.evaluation_harness", *typed, "--output_path", str(tmp_path / "out")]
        return subprocess.run(command, capture_output=True, text=True, cwd=ROOT)

    done = run(masked)
    assert done.returncode == 0, done.stderr
    assert "tiny_choice" in done.stdout
    (results,) = (tmp_path / "out").glob("**/results_*.json")
    assert json.loads(results.read_text())["config"]["likelihood_draws"] == 128
    wrong = run(tmp_path / "nowhere")
    assert wrong.returncode != 0
    assert "Traceback" not in wrong.stderr
    assert f"error: path={tmp_path / 'nowhere'}: this folder does not exist" in wrong.stderr
