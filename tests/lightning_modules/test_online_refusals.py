"""Options of `OnlineConceptModule` that cannot work, and the messages that say so."""

import pytest
import torch
from helpers.causal import PackedStream, tiny_causal
from helpers.online_module import body, build
from helpers.trainer import quiet_trainer

from models.backbones.causal_lm import save_causal
from models.functional.errors import UsageError


@pytest.mark.parametrize(
    ("options", "part"),
    [
        ({"growth": "often"}, "module.growth=often is not known; type one of"),
        ({"sampler": "other"}, "module.sampler=other is not known; type one of"),
        ({"codes": 22, "sampler": "fsq"}, "module.codes=22 cannot be shared out among levels of 2 to 8"),
        ({"code_decay": 1.0}, "module.code_decay=1.0 must be at least 0 and less than 1"),
        ({"growth": "entropy", "hold_rate": False}, "type module.hold_rate=true"),
        ({"growth": "draft", "hold_rate": False}, "module.growth=draft gets its threshold"),
        ({"growth": "draft", "draft_tokens": 0}, "module.draft_tokens=0 must be at least 1"),
        (
            {"growth": "draft", "draft_tokens": 2, "compression": (1.0, 4.0)},
            "needs longer segments than drafts of module.draft_tokens=2 allow; type module.draft_tokens=8",
        ),
        ({"router_reads": "deep"}, "module.router_reads=deep is not known"),
        ({"router_reads": "whole", "growth": "fixed"}, "module.growth=fixed reads no states"),
        ({"rate_control": "price"}, "module.rate_control=price is not known"),
        ({"rate_control": "multiplier", "growth": "fixed"}, "type module.rate_control=offset"),
        ({"gate_every": 0}, "module.gate_every=0 must be at least 1"),
        ({"gate": "soft"}, "module.gate=soft is not known; type one of"),
        ({"codes": 1}, "module.codes=1 must be at least 2"),
        ({"most_nulls": 0}, "module.most_nulls=0 must be at least 1"),
        ({"compression": (0.5, 2.0)}, "module.compression=[0.5, 2.0] must be"),
        (
            {"compression": (1.0, 8.0)},
            "needs longer segments than module.most_nulls=3 allows; type module.most_nulls=16",
        ),
        ({"quantisation": (0.0, 2.0)}, "module.quantisation=[0.0, 2.0] must be"),
        ({"noise": (1.0,)}, "module.noise=[1.0] must be"),
        ({"anneal_share": 2.0}, "module.anneal_share=2.0"),
        ({"weights": {"texts": 1.0}}, "module.weights.texts is not known; the terms are text"),
        ({"weights": {"ratio": 1.0}}, "module.weights.text must be above 0"),
        ({"weights": {"text": -1.0}}, "module.weights.text=-1.0 must be at least 0"),
        ({"baseline": "nowhere"}, "module.baseline=nowhere is no folder"),
        ({"split": [2, 2, 2]}, "has 6 layers, the model 3"),
        ({"levels": 0}, "module.levels=0"),
    ],
)
def test_mistakes_get_a_sentence(options, part):
    with pytest.raises(UsageError) as found:
        build(**options)
    assert part in str(found.value)


def test_a_baseline_of_another_vocabulary_is_refused(tmp_path):
    save_causal(body(9), tmp_path / "base")
    with pytest.raises(UsageError, match="has 9 tokens, this model 7"):
        quiet_trainer(1).test(build(baseline=str(tmp_path / "base")), PackedStream(), verbose=False)


@pytest.mark.parametrize("growth", ["entropy", "draft"])
def test_surprise_needs_tokens(growth):
    torch.manual_seed(0)
    with pytest.raises(UsageError, match=rf"module.growth={growth} needs tokens"):
        build(tiny_causal(7, num_hidden_layers=5), growth=growth, split=[1, [1, 1, 1], 1])
