"""What `python run.py` prints when nothing is asked of it."""

WELCOME = """Leap: language models that generate with fewer forward passes.

Name an experiment:

    python run.py experiment=meanflow_llada          the main job, on the embedded corpus: train a teacher, distil
                                                     a student that generates in one forward pass, compare both

    python run.py experiment=concept_oracle          discrete plans: a planner, an executor that reads its plan
    python run.py experiment=concept_online_oracle   concepts in the middle layers of a causal model
    python run.py experiment=qstar_oracle            exact samples of q*, the model between two models

Your own data:

    python run.py experiment=meanflow_e2e data.train=FILE.jsonl data.prompt_field=ask data.response_field=answer
    python run.py experiment=next_token_text data.train=FILE.txt

Every run leaves a table, a figure and record.json in outputs/<experiment>/<time>.

    python run.py --help                             all experiments, modes and choices
    python run.py experiment=NAME --cfg job          every option of an experiment with its value
"""
