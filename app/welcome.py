"""What `python run.py` prints when nothing is asked of it."""

WELCOME = """Leap: language models that generate with fewer forward passes.

Name an experiment:

    python run.py experiment=tutorial_meanflow       under a minute: a student of one forward pass
    python run.py experiment=meanflow_llada          the main job, ten minutes: train a teacher and
                                                     distil a student of it, compare both

    python run.py experiment=concept_oracle          plans of a few discrete concepts
    python run.py experiment=concept_online_oracle   concepts in the middle layers
    python run.py experiment=qstar_oracle            exact texts between two models

Your own data:

    python run.py experiment=meanflow_e2e data.train=FILE.jsonl   lines {"slots": ..., "text": ...}
    python run.py experiment=next_token_text data.train=FILE.txt  documents

Every run leaves a table, a figure and record.json in outputs/<experiment>/<time>.

    python run.py --list                             all experiments, a line each
    python run.py --help                             modes, choices and examples
    python run.py experiment=NAME --cfg job          every option of an experiment with its value
"""
