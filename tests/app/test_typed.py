import pytest
from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig

from app.typed import as_typed

TYPED = ["0", "1e3", "1_000", "+5", "-0", "0.10", "True", "false", "inf", "[a, b]", "{a: 1}"]


@pytest.fixture
def composed(tmp_path):
    """The prompt that Hydra makes of what is typed, while its own configuration is that of the command line."""

    def compose_prompt(typed):
        (tmp_path / "config.yaml").write_text("prompt: null")
        with initialize_config_dir(str(tmp_path), version_base=None):
            cfg = compose("config", [f"prompt={typed}"], return_hydra_config=True)
        HydraConfig.instance().set_config(cfg)
        return cfg.prompt

    yield compose_prompt
    HydraConfig.instance().cfg = None


@pytest.mark.parametrize("typed", TYPED)
def test_a_value_is_the_text_that_was_typed(composed, typed):
    value = composed(typed)
    assert not isinstance(value, str)
    assert as_typed("prompt", value) == typed
    assert as_typed("other", 7) == as_typed("prompt", 7) == "7"  # of another configuration


@pytest.mark.parametrize(
    ("value", "text"), [(None, None), ("", ""), ("a b", "a b"), (0, "0"), (True, "true"), (0.5, "0.5")]
)
def test_without_a_command_line_a_value_is_written_out(value, text):
    assert as_typed("prompt", value) == text
