"""A small file of commands and answers."""

import json

import torch

COMMANDS = {"jump": "J", "walk twice": "W W", "run left": "L R", "look right": "T L", "jump thrice": "J J J"}
ROWS = [
    {"q": f"{prompt} and {other}", "a": f"{a} {b}"} for prompt, a in COMMANDS.items() for other, b in COMMANDS.items()
]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def respond(datamodule, texts):
    """Texts as responses (N, R), padded with end-of-text."""
    responses = torch.full((len(texts), datamodule.response_length), datamodule.tokenizer.eos_token_id)
    for row, text in enumerate(texts):
        ids = datamodule.tokenizer.encode(text, add_special_tokens=False)
        responses[row, : len(ids)] = torch.tensor(ids)
    return responses
