"""Find the smallest budget that keeps your own prompts close to the full cache, and print the code for it.

python examples/tune_a_budget.py
"""

import argparse

from suffice.kv.eval.run_options import RunOptions
from suffice.kv.eval.tune import tune

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--quick", action="store_true", help="short prompts and two budgets")
arguments = parser.parse_args()

# Your own prompts, as they will be sent; the more, the surer.
facts = {"harbour": 482913, "orchard": 175220, "foundry": 650418}
filler = "The sea was calm that day, and the boats stayed in. " * (10 if arguments.quick else 60)
ask = "What is the code of the {name}?"
prompts = [f"{filler}The code of the {name} is {code}. {filler}{ask.format(name=name)}" for name, code in facts.items()]

result = tune(
    prompts,
    target_kl=0.05,
    policies=["capkv"],
    budgets=(0.5, 0.25) if arguments.quick else (0.75, 0.5, 0.25, 0.1),
    max_new_tokens=8 if arguments.quick else 32,
    run=RunOptions(folder="tuned"),  # a second call measures only what is missing
)
print(result.summary())
print(result.code())
