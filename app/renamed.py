"""Options that have another name today: what to type instead."""

FLOWS = {
    "logit": "module=logit_flow",
    "noisy_mask": "module=noisy_mask_flow",
    "noisy_mask_text": "module=noisy_mask_flow_text",
    "step_halving": "module=step_halving",
}
# an option of before -> its name today; what an option's values became stands in a table of its own
NAMES = {
    "attention": "model.attention",
    "data.length": "data.sequence_length",
}


def instead_of(name: str, value: str | None = None) -> str | None:
    """What to type instead of `name=value`; None for a name that was never an option. value: None where it is not known."""
    if name == "flow":
        choices = ", ".join(FLOWS.values())
        return FLOWS.get(value or "", f"one of {choices}")
    if name == "module" and value == "meanflow_distill":
        return f"one of {', '.join(FLOWS.values())}"
    if name not in NAMES:
        return None
    return f"{NAMES[name]}={'<value>' if value is None else value}"
