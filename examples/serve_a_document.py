"""Read a long document once, keep a quarter of its cache, and answer many questions from it.

python examples/serve_a_document.py
"""

import argparse

from suffice.kv import CompressedCache, load_model
from suffice.kv.eval.generation import fill_cache, greedy_generate
from suffice.kv.eval.prompt import tokenize_prompt

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--quick", action="store_true", help="a short document")
arguments = parser.parse_args()

model, tokenizer = load_model()  # or your own transformers model and tokenizer
filler = "The sea was calm that day, and the boats stayed in. " * (20 if arguments.quick else 200)
document = f"{filler}The access code of the harbour is 482913. {filler}The code of the orchard is 175220. {filler}"
questions = ["What is the access code of the harbour?", "What is the code of the orchard?"]

prompts = [tokenize_prompt(tokenizer, document, question) for question in questions]
cache = CompressedCache(model, policy="capkv", budget=0.25, allocation="profile")
fill_cache(model, prompts[0].document, cache)  # once, before any question is known
print(cache.report())
for question, prompt in zip(questions, prompts, strict=True):
    tokens = greedy_generate(model, prompt.input_ids, cache.copy(), 24)  # a copy shares the document's entries
    print(question, "→", str(tokenizer.decode(tokens.flatten(), skip_special_tokens=True)).strip())
