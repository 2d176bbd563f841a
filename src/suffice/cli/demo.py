"""`suffice demo`: both halves on the default model and the built-in graphs, as tables and one page."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Annotated, Any

import typer

from suffice.cli import demo_kv, demo_link
from suffice.cli.console import finite, out, print_json, progress
from suffice.report import Page, Text, save_figure

_HALVES = {
    "kv": ("KV cache", "transformers", "pip install 'suffice[kv]'"),
    "link": ("link prediction", "torch_geometric", "pip install 'suffice[graph]'"),
}


def demo(
    report: Annotated[Path, typer.Option(help="Where to write the page.")] = Path("suffice-demo.html"),
    tokens: Annotated[int, typer.Option(help="Length of the document.")] = 2000,
    epochs: Annotated[int, typer.Option(help="Epochs of every link predictor.")] = 12,
    seed: Annotated[int, typer.Option(help="Which document and facts; splits and initialisation.")] = 0,
    model: Annotated[str | None, typer.Option(help="Model id or folder; the default model without it.")] = None,
    device: Annotated[str, typer.Option(help="Torch device.")] = "cpu",
    figure: Annotated[Path | None, typer.Option(help="Also write the agnostic trade-off as a picture.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Answer from a part of a KV cache under six policies; audit and correct link predictors on two graphs."""
    if tokens < 400:
        raise ValueError(f"tokens is {tokens}; accepted: at least 400")
    if epochs < 1:
        raise ValueError(f"epochs is {epochs}; accepted: at least 1")
    missing = {half for half, (_, package, _) in _HALVES.items() if importlib.util.find_spec(package) is None}
    skipped = [
        f"Skipped: the half on {name}, which needs {package.replace('_', '-')}. Install it: {command}"
        for half, (name, package, command) in _HALVES.items()
        if half in missing
    ]
    page = Page(
        title="What information does a model keep?",
        summary="A document of real English with planted facts, each question answered from the full KV cache and from "
        "half and a quarter of it; and link predictors trained on batches of different composition, audited.",
        command=f"suffice demo --tokens {tokens} --epochs {epochs} --seed {seed}",
    )
    result: dict[str, Any] = {"seed": seed, "skipped": skipped}
    if skipped:
        page.add("Skipped", *(Text(line) for line in skipped))
    if "kv" not in missing:
        _kv(page, result, tokens, seed, model, device, figure, as_json)
    if "link" not in missing:
        _link(page, result, epochs, seed, device, as_json)
    page.save(report)
    if as_json:
        print_json(finite(result))
        return
    for line in skipped:
        out.print(line, highlight=False, markup=False, soft_wrap=True)
    out.print(f"Page: {report}", highlight=False)


def _kv(
    page: Page,
    result: dict[str, Any],
    tokens: int,
    seed: int,
    model: str | None,
    device: str,
    figure: Path | None,
    as_json: bool,
) -> None:
    from suffice.kv.eval.demo import document_report, run_demo
    from suffice.kv.eval.fidelity import CacheConfig
    from suffice.kv.hf.loading import load_model
    from suffice.kv.policy.registry import DEFAULT_POLICY

    with progress() as say:
        network, tokenizer = load_model(model, device=device, on_progress=say)
        found = run_demo(network, tokenizer, tokens=tokens, seed=seed, on_progress=say)
        config = CacheConfig(DEFAULT_POLICY, 0.25)
        report = document_report(network, tokenizer, found, config)
    demo_kv.add(page, found, config, report)
    result |= {"tokens": found.tokens, "rows": [demo_kv.row_to_dict(row) for row in found.rows]}
    if figure is not None:
        figure.parent.mkdir(parents=True, exist_ok=True)
        save_figure(demo_kv.trade_off(found, "agnostic"), str(figure))
    if not as_json:
        demo_kv.show(found)


def _link(page: Page, result: dict[str, Any], epochs: int, seed: int, device: str, as_json: bool) -> None:
    from suffice.link.study.demo import run_demo

    with progress() as say:
        examples = run_demo(epochs=epochs, seed=seed, device=device, log=say)
    demo_link.add(page, examples)
    result["link"] = [example.results.to_dict() for example in examples]
    if not as_json:
        demo_link.show(examples)
