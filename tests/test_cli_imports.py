"""Help texts and refused options come at once: nothing on the way to them imports torch, which takes seconds."""

import re
import subprocess
import sys

import pytest

import suffice
from suffice.kv.policy.names import ALLOCATION_NAMES, DEFAULT_POLICY, DEFAULT_REPLAY_POLICY, POLICY_NAMES
from suffice.link.data.names import BUILT_IN_NAMES, DATASET_NAMES, OGB_NAMES, PYG_NAMES, check_dataset_name

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
    "kv compare --bits 6": "--bits must be",
    "kv compare --figure curve.doc": "--figure must",
    "kv tune --prompts missing.txt --target-kl 0.1": "--prompts must be",
    "link audit --data Core": "--data must be one of .* got 'Core'. Did you mean 'Cora'?",
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


def test_names_are_those_of_the_registered_policies_and_allocations():
    pytest.importorskip("transformers")
    from suffice.kv.policy.registry import allocations, policies

    assert tuple(policies()) == POLICY_NAMES
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


def test_the_package_can_be_run_as_a_module():
    program = [sys.executable, "-m", "suffice", "--version"]
    result = subprocess.run(program, capture_output=True, text=True, check=True)
    assert result.stdout == f"suffice {suffice.__version__}\n"
