"""Find the smallest cache that stays close to the full cache on your own prompts, and print the code that uses it.

python examples/tune_a_budget.py
"""

import argparse

from suffice.kv import tune

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--quick", action="store_true", help="use short prompts and two budgets")
arguments = parser.parse_args()

# Put your own prompts here. The more prompts, the smaller the budget that can be recommended with confidence.
codes = {"harbour": 482913, "orchard": 175220, "foundry": 650418}
filler = "The sea was calm that day, and the boats stayed in. " * (10 if arguments.quick else 60)
prompts = [
    f"{filler}The code of the {place} is {code}. {filler}What is the code of the {place}?"
    for place, code in codes.items()
]

result = tune(
    prompts,
    target_kl=0.05,  # nats per token
    policies=["capkv"],
    budgets=(0.5, 0.25) if arguments.quick else (0.75, 0.5, 0.25, 0.1),
    max_new_tokens=8 if arguments.quick else 32,
)
print(result.summary())
print(result.code())
