"""`python run.py --list`: every experiment of conf/experiment by route, a line each. Reads no library."""

from pathlib import Path

FOLDER = Path(__file__).parents[1] / "conf" / "experiment"
WIDTH = 100  # characters of a line
OTHERS = "Others"

ROUTES = {
    "Start: under a minute each": {
        "tutorial_meanflow": "a small teacher, and a student that generates in one forward pass",
        "tutorial_qstar": "exact texts between two small models",
        "tutorial_concept": "texts from a plan of four concepts",
        "tutorial_text": "a small causal model of a file of your own",
    },
    "Fewer steps: the whole text in one forward pass, or in a few": {
        "meanflow_llada": "the main job: a masked teacher and its one-pass student, compared",
        "meanflow_noisy_mask": "the same job under a name of its own, for single stages",
        "meanflow_frozen": "the main job on a frozen base: what trains is 5 % of its size",
        "meanflow_scan": "SCAN: the prompt determines the answer",
        "meanflow_e2e": "E2E: restaurant descriptions from slots",
        "meanflow_text": "rows of real text without a prompt",
        "meanflow_from_causal": "a student of a teacher that was made from a causal model",
        "masked_from_causal": "that teacher: a pretrained causal model learns to fill masks",
        "llada_oracle": "a masked teacher alone, at 1 to 16 forward passes",
        "baseline_step_halving": "baseline: the teacher's steps halved until one is left (SDTT)",
        "baseline_logit_flow": "baseline: mean flow of logits, which stays at the product of marginals",
        "baseline_uncoupled": "control: noise that is independent of its text",
        "flow_lm1b": "LM1B at 128 tokens, as papers report it (needs GPUs)",
        "flow_owt": "OpenWebText at 1,024 tokens, as papers report it (needs GPUs)",
        "mdlm_owt": "MDLM's published model, sampled and judged, without training",
    },
    "Fewer sequential calls: exact texts of q*, the distribution between two models": {
        "qstar_oracle": "two causal models with different habits, and texts between them",
        "qstar_qwen": "two pretrained causal models on prompts of your own",
        "qstar_gaussian": "where q* of two known distributions lies; seconds, no training",
        "block_draft_oracle": "a drafter of eight tokens in one forward pass, for q*",
        "block_draft_causal": "the same for one pretrained causal model",
    },
    "Fewer positions: a plan of a few discrete concepts": {
        "concept_oracle": "a planner, and an executor that reads its plan alone",
        "concept_signals": "types of concepts that must predict what the text tells",
        "concept_rate": "bits of text that a bit of plan saves, beside codes that nobody learns",
        "concept_dropout": "what happens when concepts are hidden from the executor",
        "plan_write_oracle": "a plan, then every word in one forward pass",
        "plan_write_e2e": "the same for restaurant descriptions (E2E)",
        "plan_write_qwen": "the same with a pretrained causal model",
        "mixture_oracle": "baseline: a uniform index of as many bits instead of a plan",
        "concept_e2e": "plans of E2E descriptions: which concept finds which slot",
        "concept_e2e_signals": "a type of concepts for each slot",
        "concept_e2e_code": "plans that nobody learns, for comparison",
        "concept_e2e_baseline": "no plan, for comparison",
        "concept_qwen": "a pretrained causal model as planner and executor",
        "concept_qwen_e2e": "the same on E2E: a type of concepts for each slot, known plans",
    },
    "Fewer positions: concepts in the middle layers": {
        "concept_online_oracle": "on texts with known likelihoods",
        "concept_online_wikitext2": "on documents of your own, from scratch",
        "concept_online_plain": "the same model without concepts, for comparison",
        "concept_online_qwen": "in a pretrained causal model",
    },
    "What to predict, and plain language models": {
        "objectives": "training objectives compared at equal tokens",
        "objectives_flops": "the same at equal FLOPs",
        "next_token_text": "a small causal model of documents of your own",
        "next_token_qwen": "a pretrained causal model adapted to documents or prompts",
    },
}


def listed(folder: Path = FOLDER) -> dict[str, dict[str, str]]:
    """{route: {experiment: what it is}} of the files in `folder`; one that no route names has its own header's first line."""
    there = {path.stem: path for path in sorted(folder.glob("*.yaml"))}
    found = {route: {name: line for name, line in own.items() if name in there} for route, own in ROUTES.items()}
    known = {name for own in ROUTES.values() for name in own}
    found[OTHERS] = {name: _header(path) for name, path in there.items() if name not in known}
    return {route: own for route, own in found.items() if own}


def experiment_list(folder: Path = FOLDER) -> str:
    """What `--list` prints: no line is longer than WIDTH."""
    routes = listed(folder)
    column = max((len(name) for own in routes.values() for name in own), default=0) + 2
    lines = []
    for route, own in routes.items():
        lines += [route, *(_shortened(f"  {name:{column}}{line}") for name, line in own.items()), ""]
    return "\n".join([*lines, "python run.py experiment=NAME; its options with their values: add --cfg job"])


def _header(path: Path) -> str:
    """The first line of comment of a file."""
    lines = path.read_text(encoding="utf-8").splitlines()
    comments = [line.removeprefix("#").strip() for line in lines if line.startswith("#") and "@package" not in line]
    return next(filter(None, comments), "")


def _shortened(line: str) -> str:
    return line if len(line) <= WIDTH else line[: WIDTH - 3].rstrip() + "..."
