"""Help texts and refused options come at once: nothing on the way to them imports torch, which takes seconds."""

import re
import subprocess
import sys

import pytest

import suffice
from suffice.kv.eval.task_names import TASK_NAMES
from suffice.kv.policy.names import (
    ALLOCATION_NAMES,
    DEFAULT_POLICY,
    DEFAULT_REPLAY_POLICY,
    POLICY_NAMES,
    POLICY_PAPERS,
    POLICY_USES,
)
from suffice.link.data.names import BUILT_IN_NAMES, DATASET_NAMES, OGB_NAMES, PYG_NAMES, check_dataset_name
from suffice.link.names import (
    ARM_COMPOSITIONS,
    DECODER_NAMES,
    ENCODER_NAMES,
    MODEL_NAMES,
    NORM_NAMES,
    check_arm,
)

HEAVY = ("torch", "transformers", "torch_geometric", "scipy", "numpy", "pandas", "matplotlib", "jinja2")
PROGRAM = f"""
import sys
import suffice.cli
try:
    suffice.cli.main()
finally:
    print("imported:", [name for name in {HEAVY} if name in sys.modules])
"""
COMMANDS = [
    "",
    "kv",
    *(f"kv {name}" for name in ("generate", "compare", "tune", "calibrate", "policies")),
    "link",
    *(f"link {name}" for name in ("train", "audit", "correct", "align", "reproduce")),
    "study",
    *(f"study {name}" for name in ("run", "status", "show", "export", "kinds")),
    "report",
    "demo",
]
REFUSED = {
    "kv generate --policy capkw": "policy must be one of .*capkv.* got 'capkw'. Did you mean 'capkv'?",
    "kv generate --allocation equl": "allocation must be one of .* got 'equl'. Did you mean 'equal'?",
    "kv generate --memory much": "--memory must be",
    "kv generate --budget much": "--budget must be",
    "kv generate --prompt a --max-new-tokens 0": "--max-new-tokens must be",
    "kv generate --prompt a --agnostic": "--agnostic must be given with --question, got no question",
    "kv generate --prompt-file missing.txt": "--prompt-file must be",
    "kv compare --policies capkv,nope": "policy must be one of",
    "kv compare --allocations nope": "allocation must be one of own",
    "kv generate --budget 150%": "--budget must be .*, got '150%'. The largest fraction is 1.0 or 100%",
    "kv generate --budget 1.5": "--budget must be .*, got '1.5'",
    "kv generate --budget 0": "--budget must be .*, got '0'",
    "kv generate --budget nan%": "--budget must be .*, got 'nan%'",
    "kv generate --memory 150%": "--memory must be .*, got '150%'",
    "kv generate --model ./nope": "--model must be .*, got './nope', which is no folder",
    "kv generate --model a/b/c": "--model must be .*, got 'a/b/c', which is no folder",
    "kv generate --model gemma3-270": "--model must be .*, got 'gemma3-270'. Did you mean 'gemma3-270m'?",
    "kv generate --dtype float23": "--dtype must be .*, got 'float23'. Did you mean 'float32'?",
    "kv generate --max-new-token 3": "No such option: --max-new-token. Did you mean '--max-new-tokens'?",
    "kv genrate": "No such command 'genrate'.*Did you mean 'generate'?",
    "kv compare --budgets 25%,150%": "--budgets must be .*, got '150%'",
    "kv compare --tasks text,multikye": "--tasks must be one of .*, got 'multikye'. Did you mean 'multikey'?",
    "kv compare --tasks qa:awar": "the mode of --tasks 'qa:awar' must be one of .*, got 'awar'. Did you mean 'aware'?",
    "kv compare --haystack nope.txt": "--haystack must be a text file, got 'nope.txt'",
    "kv compare --bits 6": "--bits must be",
    "kv compare --figure curve.doc": "--figure must",
    "kv tune --prompts missing.txt --target-kl 0.1": "--prompts must be",
    "link audit --data Core": "--data must be one of .* got 'Core'. Did you mean 'Cora'?",
    "link train --data nope.csv": "--data must be an existing file, got 'nope.csv'",
    "link train --data pyproject.tmol": "got 'pyproject.tmol'. Did you mean 'pyproject.toml'?",
    "link train --data README.md --features degre": "--features must be an existing file, or .*, got 'degre'",
    "link train --labels nope.csv": "--labels must be an existing file, got 'nope.csv'",
    "link train --model ncm": "--model must be one of .*, got 'ncm'. Did you mean 'ncn'?",
    "link audit --encoder sag": "--encoder must be one of .*, got 'sag'. Did you mean 'sage'?",
    "link align --decoder dit": "--decoder must be one of .*, got 'dit'. Did you mean 'dot'?",
    "link train --decoder-norm bach": "--decoder-norm must be .*, got 'bach'. Did you mean 'batch'?",
    "link train --composition nope": "--composition must be fixed:FRACTION, separate or random:LOW,HIGH, got 'nope'",
    "link train --composition seperate": "--composition must be .*, got 'seperate'. Did you mean 'separate'?",
    "link train --composition fixed:2": "--composition must be .*, got 'fixed:2' .fraction must be above 0 and below 1",
    "link train --device cpuu": "--device must be one that torch can use here, got 'cpuu'. Did you mean 'cpu'?",
    "link correct --arms fixd/batch": "--arms must be .*, got 'fixd/batch'. Did you mean 'fixed'?",
    "link correct --arms fixed/bach": "the norm of --arms 'fixed/bach' must be .*, got 'bach'. Did you mean 'batch'?",
    "link reproduce --data Core": "--data must be one of .* got 'Core'. Did you mean 'Cora'?",
    "link reproduce --models sagee": "--models must be one of .*, got 'sagee'. Did you mean 'sage'?",
    "link audit --checkpoint nope.safetensors": "--checkpoint must be an existing checkpoint, got 'nope.safetensors'",
    "link train --resume nope.safetensors": "--resume must be an existing checkpoint, got 'nope.safetensors'",
    "link train --learning-rate 0": "--learning-rate must be above 0, got 0.0",
    "link train --epochs 0": "--epochs must be at least 1, got 0",
    "link correct --patience 0": "--patience must be at least 1, got 0",
    "link align --batch-size 1": "--batch-size must be at least 2, got 1",
    "link reproduce --directions 3": "--directions must be from 1 to 2, got 3",
    "link train --hidden 0": "--hidden must be at least 1, got 0",
    "link audit --checkpoint pyproject.toml --hidden 3": "--checkpoint must be given without --hidden, got --hidden 3",
    "link train --device gpu": "--device must be one that torch can use here, got 'gpu'. Did you mean 'cuda'?",
    "kv generate --prompt-file REDME.md": "--prompt-file must be .* no such file. Did you mean 'README.md'?",
    "link train --save pyproject.toml": "--save must be a new file, got 'pyproject.toml'",
    "link train --report page.doc": "--report must",
    "study status nowhere": "nowhere",
    "report nowhere": "nowhere",
}


def run(arguments):
    """Run the command line in a process of its own; return the exit status, the output, and what was imported."""
    program = [sys.executable, "-c", PROGRAM, *arguments.split()]
    result = subprocess.run(program, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)
    output, _, imported = result.stdout.rpartition("imported: ")
    return result.returncode, output + result.stderr, imported.strip()


@pytest.mark.parametrize("command", COMMANDS)
def test_help_imports_no_large_library(command):
    pytest.importorskip("transformers")
    pytest.importorskip("torch_geometric")
    status, output, imported = run(f"{command} --help")
    assert (status, imported) == (0, "[]")
    assert "Usage: suffice" in output.replace("-c", "suffice")


@pytest.mark.parametrize("arguments", REFUSED)
def test_refused_options_import_no_large_library(arguments):
    pytest.importorskip("transformers")
    pytest.importorskip("torch_geometric")
    status, output, imported = run(arguments)
    assert (status, imported) == (2, "[]"), output
    assert re.search(REFUSED[arguments], output), output


def test_policies_are_listed_at_once_on_80_columns():
    pytest.importorskip("transformers")
    status, output, imported = run("kv policies")
    assert (status, imported) == (0, "[]")
    assert max(map(len, output.splitlines())) <= 80
    for name in POLICY_NAMES:
        assert re.search(rf"│ {re.escape(name)} +│ {POLICY_USES[name].split()[0]}", output)
    assert "│ 2306.14048 " in output


def test_names_are_those_of_the_registered_policies_and_allocations():
    pytest.importorskip("transformers")
    from suffice.kv.policy.registry import allocations, policies

    assert tuple(policies()) == POLICY_NAMES
    assert {name: policy.paper for name, policy in policies().items()} == POLICY_PAPERS
    assert set(POLICY_USES) == set(POLICY_NAMES)
    assert tuple(allocations()) == ALLOCATION_NAMES
    assert POLICY_NAMES[0] == DEFAULT_POLICY
    assert DEFAULT_REPLAY_POLICY in policies(replay=True)


def test_names_are_those_of_the_data_sets():
    pytest.importorskip("torch_geometric")
    from suffice.link.data import datasets

    assert tuple(datasets._BUILT_IN) == BUILT_IN_NAMES
    assert tuple(datasets._PYG) == PYG_NAMES
    assert len(set(DATASET_NAMES)) == len(BUILT_IN_NAMES) + len(PYG_NAMES) + len(OGB_NAMES)
    assert check_dataset_name("data", "cora", "a file") == "Cora"


def test_names_are_those_of_the_models_norms_arms_and_tasks():
    pytest.importorskip("transformers")
    pytest.importorskip("torch_geometric")
    from suffice.kv.eval.tasks import TASKS
    from suffice.link.models import decoders, encoders, models
    from suffice.link.models.norms import NORMS
    from suffice.link.study.arms import _COMPOSITIONS, ARMS

    assert set(models()) == set(MODEL_NAMES)
    assert set(encoders()) == set(ENCODER_NAMES)
    assert set(decoders()) == set(DECODER_NAMES)
    assert set(NORMS.entries()) == set(NORM_NAMES)
    assert set(_COMPOSITIONS) == set(ARM_COMPOSITIONS)
    assert tuple(TASKS) == TASK_NAMES
    for arm in ARMS:
        check_arm("arm", arm.key)


def test_the_package_can_be_run_as_a_module():
    program = [sys.executable, "-m", "suffice", "--version"]
    result = subprocess.run(program, capture_output=True, text=True, check=True)
    assert result.stdout == f"suffice {suffice.__version__}\n"


def test_both_halves_are_shown_and_imported_on_first_use():
    pytest.importorskip("transformers")
    program = (
        "import sys, suffice\n"
        "assert {'kv', 'link'} <= set(dir(suffice)) and not hasattr(suffice, 'vk')\n"
        "print('torch' in sys.modules, 'compress' in dir(suffice.kv), 'audit' in dir(suffice.link))\n"
        "print('torch' in sys.modules, suffice.kv.compress.__name__, 'torch' in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout.split() == ["False", "True", "True", "False", "compress", "True"]
