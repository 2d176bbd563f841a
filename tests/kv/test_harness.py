"""The model for the LM Evaluation Harness, on tasks that need no download."""

from __future__ import annotations

import json
import subprocess
import sys
import warnings

import pytest
import torch

from suffice.kv import CompressedCache
from suffice.kv.eval.fidelity import CacheConfig, evaluate
from suffice.kv.eval.tasks import make_example
from tests.kv.tiny import TOKENS, build, tokenizer

pytest.importorskip("lm_eval")
pytestmark = pytest.mark.filterwarnings("ignore")  # the harness's own libraries warn

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from lm_eval import simple_evaluate
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    from suffice.kv.eval.lm_eval import CompressedLM


@pytest.fixture(scope="module")
def model():
    return build("llama", vocab_size=TOKENS, max_position_embeddings=1024, seed=3)


def instances(kind, arguments):
    return [
        Instance(request_type=kind, doc={}, arguments=own, idx=number, metadata=("own", number, 1))
        for number, own in enumerate(arguments)
    ]


EXAMPLES = [make_example("multikey", tokenizer(), tokens=tokens, seed=tokens) for tokens in (300, 340, 420)]
CHOICES = [
    (example.document + "\n" + example.question, f" {value}")
    for example in EXAMPLES
    for value in (*example.references, *example.distractors)
]
OPEN = [(example.document + "\n" + example.question, {"until": ["e"], "max_gen_toks": 12}) for example in EXAMPLES]


def test_at_full_budget_results_equal_those_of_the_harness_model(model):
    own = CompressedLM(model, tokenizer=tokenizer(), budget=1.0, batch_size=2)
    peer = HFLM(pretrained=model, tokenizer=tokenizer(), batch_size=2)
    ours = own.loglikelihood(instances("loglikelihood", CHOICES), disable_tqdm=True)
    theirs = peer.loglikelihood(instances("loglikelihood", CHOICES), disable_tqdm=True)
    torch.testing.assert_close(torch.tensor(ours), torch.tensor(theirs), rtol=1e-4, atol=1e-3)
    requests = instances("generate_until", OPEN)
    assert own.generate_until(requests, disable_tqdm=True) == peer.generate_until(requests, disable_tqdm=True)


def test_continuations_are_scored_from_the_compressed_cache(model):
    example = EXAMPLES[0]
    parts, gold = example.prompt(tokenizer()), example.answer_ids(tokenizer())
    _, row = evaluate(model, tokenizer(), example, [CacheConfig("h2o", 0.3, "adakv")], mode="aware", answer=False)
    own = CompressedLM(model, tokenizer=tokenizer(), policy="h2o", budget=0.3, allocation="adakv")
    (found, _), again = own._loglikelihood_tokens([(None, parts.input_ids[0].tolist(), gold[0].tolist())] * 2)
    assert found == again[0] == pytest.approx(row["log_likelihood"] * gold.shape[1], rel=1e-4)
    full = CompressedLM(model, tokenizer=tokenizer(), budget=1.0)
    assert abs(full._loglikelihood_tokens([(None, parts.input_ids[0].tolist(), gold[0].tolist())])[0][0] - found) > 0.01


def test_a_context_longer_than_the_window_is_truncated_on_the_left(model):
    own = CompressedLM(model, tokenizer=tokenizer(), budget=1.0)
    generator = torch.Generator().manual_seed(0)
    long = torch.randint(1, TOKENS, (1500,), generator=generator).tolist()
    cut, whole = (own._loglikelihood_tokens([(None, ids, [5, 6, 7])])[0] for ids in (long, long[-1022:]))
    assert cut == whole


TEXTS = [("".join(f"{number} and so on. " for number in range(count)),) for count in (3, 70, 300)]


def test_rolling_log_likelihood_at_full_budget_equals_that_of_the_harness_model(model):
    own = CompressedLM(model, tokenizer=tokenizer(), budget=1.0)
    peer = HFLM(pretrained=model, tokenizer=tokenizer())
    requests = instances("loglikelihood_rolling", TEXTS)
    assert len(own.tok_encode(TEXTS[2][0])) > own.max_length  # several windows
    ours, theirs = (each.loglikelihood_rolling(requests, disable_tqdm=True) for each in (own, peer))
    torch.testing.assert_close(torch.tensor(ours), torch.tensor(theirs), rtol=1e-5, atol=1e-2)
    assert own.loglikelihood_rolling(instances("loglikelihood_rolling", [("",)])) == [0.0]


@pytest.mark.parametrize("bits", [None, 2])
def test_rolling_log_likelihood_reads_chunks_from_what_the_cache_kept(model, bits):
    own = CompressedLM(model, tokenizer=tokenizer(), policy="h2o", budget=0.3, bits=bits)
    text = TEXTS[1][0]
    ids = torch.tensor([[own.prefix_token_id, *own.tok_encode(text)]])
    assert 512 < ids.shape[1] < 1024
    cache = CompressedCache(model, "h2o", 0.3, evict="always", bits=bits)
    expected = 0.0
    for start in range(0, ids.shape[1] - 1, 256):
        stop = min(start + 256, ids.shape[1] - 1)
        with torch.no_grad():
            log_probs = model(ids[:, start:stop], past_key_values=cache).logits[0].log_softmax(-1)
        expected += float(sum(log_probs[i, ids[0, start + i + 1]] for i in range(stop - start)))
        assert cache.report().tokens_kept <= 0.3 * stop + 1
    found = own.loglikelihood_rolling(instances("loglikelihood_rolling", [(text,)]))
    assert found == [pytest.approx(expected, rel=1e-5)]
    full = CompressedLM(model, tokenizer=tokenizer(), budget=1.0)
    assert abs(full.loglikelihood_rolling(instances("loglikelihood_rolling", [(text,)]))[0] - expected) > 0.01


def test_quantized_entries_are_read(model):
    """Continuations are scored as by `evaluate` with the same bits."""
    example = EXAMPLES[0]
    parts, gold = example.prompt(tokenizer()), example.answer_ids(tokenizer())
    config = CacheConfig("h2o", 0.5, bits=(4, 2))
    _, row = evaluate(model, tokenizer(), example, [config], mode="aware", answer=False)
    own = CompressedLM(model, tokenizer=tokenizer(), policy="h2o", budget=0.5, bits=[4, 2])
    ((found, _),) = own._loglikelihood_tokens([(None, parts.input_ids[0].tolist(), gold[0].tolist())])
    assert found == pytest.approx(row["log_likelihood"] * gold.shape[1], rel=1e-4)
    assert own._new_cache().settings.storage.bits == (4, 2)
    with pytest.raises(ValueError, match="bits must be 2, 3, 4, 5 or 8, got 7"):
        CompressedLM(model, tokenizer=tokenizer(), bits=7)


def test_the_largest_batch_whose_longest_prompt_fits_is_found(model, monkeypatch):
    batches = []
    forward = type(model).forward

    def limited(self, input_ids, **options):
        batches.append(tuple(input_ids.shape))
        if input_ids.shape[0] > 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB")
        return forward(self, input_ids=input_ids, **options)

    requests = instances("generate_until", OPEN)
    fixed = CompressedLM(model, tokenizer=tokenizer(), budget=0.3, batch_size=2)
    expected = fixed.generate_until(requests, disable_tqdm=True)
    own = CompressedLM(model, tokenizer=tokenizer(), budget=0.3, batch_size="auto")
    monkeypatch.setattr(type(model), "forward", limited)
    assert own.generate_until(requests, disable_tqdm=True) == expected
    longest = max(len(own.tok_encode(text)) for text, _ in OPEN)
    assert batches[0] == (3, longest)
    assert all(rows <= 2 for rows, _ in batches[1:])


def test_adapters_are_loaded_and_wrapped_models_accepted(model, tmp_path):
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    config = peft.LoraConfig(target_modules=["q_proj", "v_proj"], r=2, init_lora_weights=False, task_type="CAUSAL_LM")
    base = build("llama", vocab_size=TOKENS, max_position_embeddings=1024, seed=3)
    wrapped = peft.get_peft_model(base, config).eval()
    wrapped.save_pretrained(tmp_path)
    fresh = build("llama", vocab_size=TOKENS, max_position_embeddings=1024, seed=3)
    models = (
        CompressedLM(wrapped, tokenizer=tokenizer(), policy="h2o"),
        CompressedLM(fresh, tokenizer=tokenizer(), policy="h2o", peft=str(tmp_path)),
        CompressedLM(model, tokenizer=tokenizer(), policy="h2o"),
    )
    requests = instances("loglikelihood", CHOICES[:2])
    scores = [[score for score, _ in each.loglikelihood(requests, disable_tqdm=True)] for each in models]
    assert scores[0] == pytest.approx(scores[1], rel=1e-5)
    assert scores[0] != pytest.approx(scores[2], rel=1e-3)


def task(folder):
    """A multiple-choice task and a generation task that read a file."""
    rows = [
        {
            "prompt": f"{example.document}\n{example.question}",
            "choices": [*example.distractors[:1], *example.references],
            "gold": 1,
            "answer": example.references[0],
        }
        for example in EXAMPLES
    ]
    file = folder / "own.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    common = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(file)}},
        "test_split": "test",
        "doc_to_text": "{{prompt}}",
    }
    return [
        {
            **common,
            "task": "own_choice",
            "output_type": "multiple_choice",
            "doc_to_target": "{{gold}}",
            "doc_to_choice": "{{choices}}",
            "metric_list": [{"metric": "acc"}],
        },
        {
            **common,
            "task": "own_open",
            "output_type": "generate_until",
            "doc_to_target": "{{answer}}",
            "generation_kwargs": {"until": ["\n"], "max_gen_toks": 8},
            "metric_list": [{"metric": "exact_match"}],
        },
    ]


def test_tasks_run_from_python(model, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    own = CompressedLM(model, tokenizer=tokenizer(), policy="capkv", budget=0.3, batch_size=2)
    found = simple_evaluate(
        model=own, tasks=task(tmp_path), task_manager=TaskManager(include_defaults=False), bootstrap_iters=0
    )
    scored = own.loglikelihood(
        instances(
            "loglikelihood",
            [
                (f"{example.document}\n{example.question}", f" {value}")
                for example in EXAMPLES
                for value in (example.distractors[0], example.references[0])
            ],
        ),
        disable_tqdm=True,
    )
    right = [scored[2 * place + 1][0] > scored[2 * place][0] for place in range(len(EXAMPLES))]
    assert found["results"]["own_choice"]["acc,none"] == pytest.approx(sum(right) / len(right))
    assert 0 <= found["results"]["own_open"]["exact_match,none"] <= 1


def test_the_command_line_registers_the_model():
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "suffice.kv.eval.lm_eval", "--model", "suffice", "--model_args",
         "policy=h3o", "--tasks", "arc_easy"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode
    assert "Did you mean 'h2o'" in done.stderr


def test_invalid_arguments_are_rejected(model):
    with pytest.raises(ValueError, match="tokenizer must be given if pretrained is a model, got None"):
        CompressedLM(model)
    with pytest.raises(ValueError, match=r"budget must be .*, got 1\.5"):
        CompressedLM(model, tokenizer=tokenizer(), budget=1.5)
    with pytest.raises(ValueError, match=r"options must be among peft, .*'max_lenght'\. Did you mean 'max_length'"):
        CompressedLM(model, tokenizer=tokenizer(), max_lenght=4)
    with pytest.raises(ValueError, match=r"options must be among .*, got 'revision'"):
        CompressedLM(model, tokenizer=tokenizer(), revision="old")
    own = CompressedLM(model, tokenizer=tokenizer())
    with pytest.raises(ValueError, match=r"of request 0 must have at least 1 token each.*, got 0 and 1"):
        own._loglikelihood_tokens([(None, [], [3])])
