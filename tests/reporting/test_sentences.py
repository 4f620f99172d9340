"""Sentences below the table say the record's numbers; the last one says what happened, where something was compared."""

import pytest
from helpers.record import make_record, quality, row

from reporting.sentences import in_words, summary


def test_total_correlation_is_the_records_own(oracle_record, pairs_record):
    (bound,) = [s for s in in_words(oracle_record) if "Total correlation" in s]
    assert "given its prompt: 2.35 nats" in bound
    assert "closer to the corpus than KL 2.35; the product of marginals attains it" in bound
    oracle_record["data"]["conditional_total_correlation"] = 0.5
    (bound,) = [s for s in in_words(oracle_record) if "Total correlation" in s]
    assert "KL 0.50" in bound
    assert not [s for s in in_words(pairs_record) if "correlation" in s or "marginals" in s]


def test_sentences_about_the_student_use_the_rows_own_numbers(oracle_record):
    (student,) = [s for s in in_words(oracle_record) if "with the whole plan prompted" in s]
    assert student.startswith("student, greedy, one forward pass: 75.0 % valid")
    assert "37.5 % with part of it (product of marginals: 6.2 %)" in student
    assert student.endswith("; without a prompt it always generates the same text.")  # entropy 0
    for known in oracle_record["rows"]:
        known["entropy"] = 1.0
    (student,) = [s for s in in_words(oracle_record) if "with the whole plan prompted" in s]
    assert student.endswith("; 25.0 % of its texts without a prompt are distinct.")
    assert "without a prompt: 5.67 nats" in in_words(oracle_record)[0]


def test_sentences_do_without_unprompted_texts(oracle_record):
    """Where every prompt shows something, nothing is known of entropy, coverage or distinct texts."""
    for known in oracle_record["rows"]:
        known |= {"entropy": None, "distinct": None}
        known["quality"] |= {"validity_none": None, "entropy_truth": None, "coverage": None, "tv": None}
    sentences = in_words(oracle_record)
    assert [s for s in sentences if "37.5 % with part of it" in s]
    assert not [s for s in sentences if "None" in s or "without a prompt" in s]


def test_the_judges_perplexity_stands_beside_entropy(pairs_record):
    assert not [s for s in in_words(pairs_record) if s.startswith("Judge")]
    for k, known in enumerate(pairs_record["rows"]):
        known["quality"] |= {"judge_perplexity": 20.0 + k, "text_entropy": 3.5}
    (sentence,) = [s for s in in_words(pairs_record) if s.startswith("Judge")]
    one = [known["decoder"] for known in pairs_record["rows"] if known["nfe"] == 1]
    assert all(f"{decoder}, NFE 1: 2" in sentence for decoder in one)
    assert sentence.count("3.50 nats") == len(one)


# -- what happened ---------------------------------------------------------------------------------------------------


def test_few_steps_are_compared_with_the_teacher_at_fewest_and_at_most(oracle_record, pairs_record):
    assert summary(oracle_record["rows"]) == (
        "One forward pass: 75.0 % valid; the teacher with one: 10.0 %, with 16: 90.0 %."
    )
    assert summary(pairs_record["rows"]) == (
        "One forward pass: exact match 37.5 %; the teacher with one: 25.0 %, with 8: 50.0 %."
    )
    for known in pairs_record["rows"]:
        known["quality"] = {"judge_perplexity": 10.0 * known["nfe"] + 5}
    pairs_record["rows"].append(row("student", "worse", 1, {"judge_perplexity": 99.0}))
    assert summary(pairs_record["rows"]) == (
        "One forward pass: judge perplexity 15.0; the teacher with one: 15.0, with 8: 85.0."
    )


def test_a_student_of_several_steps_says_how_many():
    rows = [row("teacher", "teacher", 8, quality(validity=0.9)), row("student", "few", 2, quality(validity=0.5))]
    assert summary(rows) == "2 forward passes: 50.0 % valid; the teacher with 8: 90.0 %."


def test_drafts_are_compared_with_decoding_without():
    plain = row("student", "q*, naive", 12, {})
    fast = row("student", "q*, alternating", 8, {"g_test_p": 0.25})
    fast["cost"] |= {"acceptance": 0.9, "speedup_vs_naive": 1.5}
    plain["cost"] |= {"acceptance": None, "speedup_vs_naive": 1.0}
    teachers = [row("teacher", "model", 6, quality(validity=0.5))]
    assert summary([*teachers, plain, fast]) == (
        "q*, alternating: acceptance rate 90.0 %, 1.50 times the speed of decoding without drafts; "
        "G-test against the exact distribution: p = 0.25."
    )


def test_a_plan_has_a_price_and_a_gain():
    rows = [
        row("student", "plan greedy, text greedy", 10, quality(validity=1.0)),
        row("student", "plan sampled, text sampled", 10, quality(validity=0.6)),
        row("control", "product of marginals", 0, quality(validity=0.1)),
        row("model", "Planner", 0, {"rate_bits": 4.14, "gain_bits": 2.25, "nll_bound": 0.8, "nll_truth": 0.6}),
    ]
    assert summary(rows) == (
        "A plan costs 4.1 bits and saves 2.2 bits of its text; valid with plan sampled, text sampled: 60.0 %; "
        "product of marginals: 10.0 %."
    )
    assert summary(rows[3:]) == "A plan costs 4.1 bits and saves 2.2 bits of its text."


@pytest.mark.parametrize(
    ("figures", "sentence"),
    [
        ({"nll": 0.75, "nll_truth": 0.5}, "NLL 0.750 nats a token; under the corpus' own distribution: 0.500."),
        (
            {"nll_bound": 0.75, "nll_truth": 0.5},
            "NLL at most 0.750 nats a token; under the corpus' own distribution: 0.500.",
        ),
        (
            {"nll": 2.0, "compression": 4.0, "baseline_nll": 1.5},
            "One concept for 4.0 tokens: NLL 2.000 nats a token; without concepts: 1.500.",
        ),
        ({"nll": 2.0}, "NLL of the test texts: 2.000 nats a token."),
        ({"nll_bound": 2.0, "nll": None}, "NLL of the test texts at most: 2.000 nats a token."),
        ({"nll": 2.0, "bits_per_byte": 0.5}, "NLL of the test texts: 2.000 nats a token, 0.500 bits a byte."),
        ({"probe": 0.75}, "A linear probe reads 75.0 % of the attributes from a hidden state."),
        (
            {"probe": 0.75, "probe_untrained": 0.5},
            "A linear probe reads 75.0 % of the attributes from a hidden state; without training: 50.0 %.",
        ),
        ({"rate": 2.0}, None),
    ],
)
def test_a_model_is_compared_with_what_is_known(figures, sentence):
    assert summary([row("model", "Model", 0, figures)]) == sentence


def test_drafts_without_a_decoder_beside_them_say_what_was_accepted():
    drafted = row("student", "blocks are drafted", 24.5, quality(validity=0.5))
    drafted["cost"] |= {"acceptance": 0.5, "tokens_per_verifier_forward": 1.75}
    assert summary([drafted]) == (
        "blocks are drafted: acceptance rate 50.0 %, 1.75 tokens for each forward pass of a verifier."
    )


def test_a_method_alone_says_what_it_reaches_with_fewest_and_with_most():
    rows = [row("teacher", "teacher", nfe, quality(validity=nfe / 16)) for nfe in (16, 1, 4)]
    assert summary(rows) == "Teacher, one forward pass: 6.2 % valid; teacher, 16 forward passes: 100.0 % valid."
    assert summary(rows[:1]) == "Teacher, 16 forward passes: 100.0 % valid."
    assert summary([row("teacher", "autoregressive", 20.84, quality(slot_accuracy=0.5))]) == (
        "Autoregressive, 20.8 forward passes: slot accuracy 50.0 %."
    )
    # of a greedy and a sampled decoder with the same passes the sampled one, which is the later one, beside the control
    both = [
        row("student", f"text {kind}", 1, quality(validity=share))
        for kind, share in (("greedy", 1.0), ("sampled", 0.25))
    ]
    control = row("control", "product of marginals", 0, quality(validity=0.5))
    assert summary([*both, control]) == "Text sampled, one forward pass: 25.0 % valid; product of marginals: 50.0 %."
    assert summary([*rows, row("student", "student", 16, quality(validity=0.5))]) is None  # neither is alone
    model = row("model", "Model", 0, {"nll": 0.75, "nll_truth": 0.5})
    assert summary([*rows, model]).startswith("NLL 0.750")  # what the truth is known of comes first


def test_nothing_is_said_where_nothing_was_measured():
    assert in_words(make_record([row("teacher", "teacher", 4, quality())])) == []
    assert in_words(make_record([])) == []


def test_decoders_of_several_temperatures_are_compared_at_equal_entropy():
    def judged(method, decoder, nfe, entropy, perplexity):
        return row(method, decoder, nfe, quality(judge_perplexity=perplexity, text_entropy=entropy))

    rows = [
        judged("teacher", "teacher, sampled", 1, 3.8, 800.0),
        judged("teacher", "teacher, sampled", 4, 3.8, 100.0),
        judged("teacher", "teacher, sampled at 0.8", 4, 3.4, 25.0),
        judged("teacher", "teacher, confidence ≥ 0.9", 4, 3.7, 1.0),  # no temperature of the same decoder
        judged("student", "student", 4, 3.7, 60.0),
        judged("student", "student", 1, 3.7, 90.0),  # the teacher at one forward pass has one temperature
        judged("control", "held-out text", 0, 3.6, 20.0),
    ]
    said = [sentence for sentence in in_words(make_record(rows)) if "interpolated" in sentence]
    assert said == [
        "Judge's perplexity at 3.70 nats within a text, the entropy of student, NFE 4 (60.0), interpolated between "
        "temperatures: teacher, NFE 4: 70.7.",
        "Judge's perplexity at 3.60 nats within a text, the entropy of held-out text (20.0), interpolated between "
        "temperatures: teacher, NFE 4: 50.0.",
    ]
    assert [
        s for s in in_words(make_record([r for r in rows if "0.8" not in r["decoder"]])) if "interpolated" in s
    ] == []
