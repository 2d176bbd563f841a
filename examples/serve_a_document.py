"""Read a long document once, keep a quarter of its cache, and answer several questions from it.

python examples/serve_a_document.py
"""

import argparse

import torch

from suffice.kv import CompressedCache, load_model

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--quick", action="store_true", help="use a short document")
arguments = parser.parse_args()

model, tokenizer = load_model()  # or your own transformers model and tokenizer
filler = "The sea was calm that day, and the boats stayed in. " * (20 if arguments.quick else 200)
document = f"{filler}The access code of the harbour is 482913. {filler}The code of the orchard is 175220. {filler}"
questions = ["What is the access code of the harbour?", "What is the code of the orchard?"]


def tokenize(question):
    """Return the token ids [1, tokens] and the attention mask of a chat about the document."""
    chat = [{"role": "user", "content": f"{document}\n\n{question}"}]
    return tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)


# All prompts start with the same tokens: those of the document.
prompts = [tokenize(question).to(model.device) for question in questions]
first, second = (prompt["input_ids"][0] for prompt in prompts)
length = min(len(first), len(second))
num_shared = int((first[:length] == second[:length]).cumprod(0).sum())

# Read the document once and evict, before any question is known.
cache = CompressedCache(model, policy="capkv", budget=0.25, allocation="profile")
with torch.no_grad():
    model(first[None, :num_shared], past_key_values=cache)
print(cache.report())

# Answer each question from a copy of the cache. A copy shares the entries of the document.
for question, prompt in zip(questions, prompts, strict=True):
    tokens = model.generate(**prompt, past_key_values=cache.copy(), max_new_tokens=24, do_sample=False)
    answer = tokenizer.decode(tokens[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)
    print(question, "→", answer.strip())
