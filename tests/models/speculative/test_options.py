"""Options of q* check themselves and name the option that is wrong."""

import pytest

from models.functional.errors import UsageError
from models.speculative.decoder import TITLES
from models.speculative.options import MAX_GAMMA, DraftOptions, QStarOptions
from models.speculative.roles import roles


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss": "mse"}, "module.loss=mse"),
        ({"schemes": ("both",)}, "module.schemes=both"),
        ({"schemes": ()}, "module.schemes is empty"),
        ({"theta_weight": 3.0}, "module.theta_weight=3"),
        ({"temperature": 0.0}, "module.temperature=0"),
        ({"top_k": 0}, "module.top_k=0"),
        ({"top_p": 2.0}, "module.top_p=2"),
        ({"verify": "all"}, "module.verify=all"),
        ({"costs": "free"}, "module.costs=free"),
        ({"gamma": -2}, "module.gamma=-2"),
        ({"lora_rank": 0}, "module.lora_rank=0"),
        ({"exactness_samples": -1}, "module.exactness_samples=-1"),
        ({"alpha_points": -1}, "module.alpha_points=-1"),
        ({"alpha_points": 1}, "module.alpha_points=1 is no curve"),
    ],
)
def test_wrong_options_are_named(options, message):
    with pytest.raises(UsageError, match=f"^{message}"):
        QStarOptions(**options)


def test_schemes_may_be_a_list_as_in_yaml_and_each_has_a_title():
    options = QStarOptions(schemes=list(TITLES), drafter="drafter")
    assert options.schemes == ("naive", "theta", "target", "alternate", "ngram", "assistant", "block_drafter")
    assert options.mixture.theta_weight is None


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"draft": "theta", "cost": 4.0}, ("theta", ("target",), 4.0, "carry")),
        ({"draft": "target", "cost": 4.0}, ("target", ("theta",), 0.25, "carry")),
        ({"draft": "alternate", "cost": 1.0}, ("theta", ("target",), 1.0, "alternate")),
        ({"draft": "alternate", "cost": 4.0}, ("target", ("theta",), 0.25, "alternate")),
        ({"draft": "assistant", "cost": 0.1}, ("assistant", ("theta", "target"), 0.1, "assistant")),
    ],
)
def test_the_cheaper_model_drafts_where_they_alternate(options, expected):
    assert roles(DraftOptions(**options)) == expected


def test_the_longest_draft_is_known_beforehand():
    assert DraftOptions(gamma=3).max_gamma == 3
    assert DraftOptions(gamma="auto").max_gamma == MAX_GAMMA
