"""`suffice link …`: train, audit, correct and align link predictors."""

from __future__ import annotations

import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from suffice.cli.command_line import command_line
from suffice.cli.console import finite, out, print_json, progress
from suffice.cli.link_options import (
    AtTest,
    Balanced,
    BatchSize,
    Checkpoint,
    CompositionName,
    Data,
    Decoder,
    DecoderNorm,
    Device,
    Directions,
    Encoder,
    EncoderNorm,
    Epochs,
    Features,
    Folder,
    Hidden,
    Json,
    Labels,
    Largest,
    Model,
    Patience,
    Preset,
    Quiet,
    Rate,
    Report,
    Root,
    Seed,
    Seeds,
    Test,
    Validation,
    Workers,
    positive,
)
from suffice.cli.link_reproduce import reproduce
from suffice.cli.link_show import show_rows, study_table
from suffice.cli.watching import watching

if TYPE_CHECKING:
    from suffice.link.data.graph import Graph, Split, SplitConfig
    from suffice.link.models import LinkPredictor, ModelSettings
    from suffice.link.train.config import TrainConfig

app = typer.Typer(help="Audit link predictors for composition bias.", no_args_is_help=True)


@app.command()
def train(
    data: Data = "digits",
    features: Features = None,
    labels: Labels = None,
    root: Root = Path("data"),
    composition: CompositionName = "fixed:0.5",
    balanced: Balanced = False,
    model: Model = "encoder-decoder",
    encoder: Encoder = None,
    decoder: Decoder = None,
    encoder_norm: EncoderNorm = None,
    decoder_norm: DecoderNorm = None,
    hidden: Hidden = None,
    preset: Preset = False,
    epochs: Epochs = 30,
    directions: Directions = 2,
    patience: Patience = None,
    batch_size: BatchSize = 512,
    learning_rate: Rate = 5e-3,
    validation: Validation = 0.05,
    test: Test = 0.10,
    largest_component: Largest = False,
    validation_edges_at_test: AtTest = False,
    checkpoint: Checkpoint = None,
    seed: Seed = 0,
    seeds: Seeds = 1,
    device: Device = "cpu",
    as_json: Json = False,
    report: Report = None,
) -> None:
    """Train a link predictor and print its test metrics; under torchrun, on all its processes together."""
    from suffice.link.batches.composition import parse_composition
    from suffice.link.data.graph import SplitConfig
    from suffice.link.train.config import TrainConfig
    from suffice.link.train.distributed import process_group, rank_and_world_size
    from suffice.link.train.evaluate import evaluate
    from suffice.study.results import mean_interval

    options = {"encoder": encoder, "decoder": decoder, "encoder_norm": encoder_norm, "decoder_norm": decoder_norm}
    made, own = _model_settings(model, data, preset, {**options, "hidden": hidden})
    rates: dict[str, Any] = {"directions": directions, "batch_size": batch_size, "learning_rate": learning_rate}
    protocol = SplitConfig(validation, test, largest_component, validation_edges_at_test)
    graph = _graph(data, features, labels, root, protocol)
    found: list[dict[str, float]] = []
    with process_group(device) as own_device:
        for number in range(seed, seed + positive(seeds)):
            settings = TrainConfig(
                parse_composition(composition),
                balanced=balanced,
                epochs=epochs,
                patience=patience,
                seed=number,
                **{**rates, **own},
            )
            path = _numbered(checkpoint, number, seeds)
            net, parts = _train(graph, made, settings, protocol, own_device, path)
            found.append(evaluate(net, graph, parts, protocol))
        if rank_and_world_size()[0] > 0:
            return
    rows = [{"metric": name, **asdict(mean_interval([run[name] for run in found]))} for name in found[0]]
    result = {"graph": graph.name, "model": made.to_dict(), "split": asdict(protocol), "rows": rows}
    show_rows(result, rows, as_json, report, "Test metrics of a link predictor")


@app.command()
def audit(
    data: Data = "digits",
    features: Features = None,
    labels: Labels = None,
    root: Root = Path("data"),
    composition: CompositionName = "fixed:0.5",
    balanced: Balanced = False,
    model: Model = "encoder-decoder",
    encoder: Encoder = None,
    decoder: Decoder = None,
    encoder_norm: EncoderNorm = None,
    decoder_norm: DecoderNorm = None,
    hidden: Hidden = None,
    preset: Preset = False,
    epochs: Epochs = 30,
    directions: Directions = 2,
    batch_size: BatchSize = 512,
    learning_rate: Rate = 5e-3,
    checkpoint: Checkpoint = None,
    seed: Seed = 0,
    seeds: Seeds = 1,
    device: Device = "cpu",
    as_json: Json = False,
    report: Report = None,
) -> None:
    """Audit a link predictor: that of a checkpoint if there is one, else one trained for it."""
    from suffice.link.auditing.trained import audit_trained
    from suffice.link.batches.composition import parse_composition
    from suffice.link.data.graph import SplitConfig, split_edges
    from suffice.link.study.report_sections import audit_page
    from suffice.link.train.checkpoint import load_trained
    from suffice.link.train.config import TrainConfig

    options = {"encoder": encoder, "decoder": decoder, "encoder_norm": encoder_norm, "decoder_norm": decoder_norm}
    made, own = _model_settings(model, data, preset, {**options, "hidden": hidden})
    rates: dict[str, Any] = {"directions": directions, "batch_size": batch_size, "learning_rate": learning_rate}
    found: list[Any] = []
    for number in range(seed, seed + positive(seeds)):
        path = _numbered(checkpoint, number, seeds)
        if path is not None and path.exists():
            net, facts = load_trained(path, device)
            protocol = SplitConfig(**facts["split"])
            graph = _graph(data, features, labels, root, protocol)
            if facts["graph"] != graph.name:
                raise ValueError(f"data must be {facts['graph']} for checkpoint {path}, got {graph.name}")
            parts, size = split_edges(graph, protocol, facts["settings"]["seed"]), facts["settings"]["batch_size"]
        else:
            protocol = SplitConfig()
            graph = _graph(data, features, labels, root, protocol)
            settings = TrainConfig(
                parse_composition(composition),
                balanced=balanced,
                epochs=epochs,
                seed=number,
                **{**rates, **own},
            )
            net, parts = _train(graph, made, settings, protocol, device, path)
            size = settings.batch_size
        found.append(audit_trained(net, graph, parts, batch_size=size, seed=number))
    if report is not None:
        audit_page(found[0], command_line()).save(report)
    if as_json:
        print_json(finite({"audits": [one.to_dict() for one in found]}))
        return
    for one in found:
        for name, part in one.parts.items():
            table = Table("statistic", "mean [95 % interval]", title=f"{name} edges")
            for key, value in part.statistics.items():
                table.add_row(key, str(value).replace("[", r"\["))
            out.print(table)
        out.print(str(one.verdict), markup=False)


@app.command()
def correct(
    data: Data = "digits",
    features: Features = None,
    labels: Labels = None,
    root: Root = Path("data"),
    model: Model = "encoder-decoder",
    encoder: Encoder = None,
    decoder: Decoder = None,
    hidden: Hidden = None,
    preset: Preset = False,
    epochs: Epochs = 30,
    directions: Directions = 2,
    batch_size: BatchSize = 512,
    validation: Validation = 0.05,
    test: Test = 0.10,
    largest_component: Largest = False,
    validation_edges_at_test: AtTest = False,
    arms: Annotated[str, typer.Option(help="Arms as NAME/NORM or NAME/ENCODER-DECODER, with commas.")] = "",
    folder: Folder = None,
    seed: Seed = 0,
    seeds: Seeds = 5,
    device: Device = "cpu",
    as_json: Json = False,
    report: Report = None,
    figure: Annotated[Path | None, typer.Option(help="Also write the response curves as a picture.")] = None,
    workers: Workers = 0,
    quiet: Quiet = False,
) -> None:
    """Train biased and corrected side by side; show audit, Hits and alignment of all."""
    from suffice.link.data.graph import SplitConfig
    from suffice.link.study.arms import ARMS, parse_arm
    from suffice.link.study.correct import correct as run
    from suffice.link.study.correct import load_edge_representations
    from suffice.link.study.figures import plot_response_curves
    from suffice.link.study.report_sections import results_page
    from suffice.link.train.config import TrainConfig
    from suffice.report import save_figure

    asked = [parse_arm(key.strip()) for key in arms.split(",")] if arms else list(ARMS)
    made, own = _model_settings(model, data, preset, {"encoder": encoder, "decoder": decoder, "hidden": hidden})
    rates: dict[str, Any] = {"directions": directions, "batch_size": batch_size}
    protocol = SplitConfig(validation, test, largest_component, validation_edges_at_test)
    graph = _graph(data, features, labels, root, protocol)
    with tempfile.TemporaryDirectory() as scratch, watching(quiet) as watch:
        home = folder or Path(scratch)
        study = run(
            graph,
            arms=asked,
            model=made,
            train=TrainConfig(epochs=epochs, **{**rates, **own}),
            split=protocol,
            seeds=seeds,
            first_seed=seed,
            device=device,
            folder=home,
            workers=workers,
            on_progress=watch,
            command=command_line(),
        )
        if report is not None:
            pair = asked[:2] if graph.y is not None else []
            maps = load_edge_representations(graph, pair, home, split=protocol, seed=seed)
            results_page(study, command_line(), maps).save(report)
    if figure is not None:
        figure.parent.mkdir(parents=True, exist_ok=True)
        curves = {key: arm.response_curve() for key, arm in study.arms.items()}
        save_figure(plot_response_curves(curves, f"{study.graph}, held-out edges"), str(figure))
    if as_json:
        print_json(finite(study.to_dict()))
        return
    out.print(study_table(study))


@app.command()
def align(
    data: Data = "digits",
    features: Features = None,
    labels: Labels = None,
    root: Root = Path("data"),
    composition: CompositionName = "fixed:0.5",
    balanced: Balanced = False,
    model: Model = "encoder-decoder",
    encoder: Encoder = None,
    decoder: Decoder = None,
    encoder_norm: EncoderNorm = None,
    decoder_norm: DecoderNorm = None,
    hidden: Hidden = None,
    preset: Preset = False,
    epochs: Epochs = 30,
    directions: Directions = 2,
    seed: Seed = 0,
    seeds: Seeds = 1,
    device: Device = "cpu",
    as_json: Json = False,
    report: Report = None,
) -> None:
    """Measure what a training keeps of the classes, against raw features and an untrained model."""
    from suffice.link.batches.composition import parse_composition
    from suffice.link.data.graph import SplitConfig
    from suffice.link.train.alignment import alignment, feature_alignment
    from suffice.link.train.config import TrainConfig
    from suffice.study.results import mean_interval

    options = {"encoder": encoder, "decoder": decoder, "encoder_norm": encoder_norm, "decoder_norm": decoder_norm}
    made, own = _model_settings(model, data, preset, {**options, "hidden": hidden})
    protocol, rates = SplitConfig(), dict[str, Any](directions=directions)
    graph = _graph(data, features, labels, root, protocol)
    runs: dict[str, list[dict[str, float]]] = {"trained": [], "untrained": [], "raw features": []}
    for number in range(seed, seed + positive(seeds)):
        settings = TrainConfig(
            parse_composition(composition), balanced=balanced, epochs=epochs, seed=number, **{**rates, **own}
        )
        net, parts = _train(graph, made, settings, protocol, device, None)
        fresh = made.build(graph.x.size(1), number).to(device)
        runs["trained"].append(alignment(net, graph, parts, seed=number))
        runs["untrained"].append(alignment(fresh, graph, parts, seed=number))
        runs["raw features"].append(feature_alignment(graph, seed=number))
    rows = [
        {"of": name, "metric": metric, **asdict(mean_interval([one[metric] for one in found]))}
        for name, found in runs.items()
        for metric in found[0]
    ]
    show_rows({"graph": graph.name, "rows": rows}, rows, as_json, report, "Alignment with the classes")


def _model_settings(
    model: str, data: str, published: bool, options: dict[str, Any]
) -> tuple[ModelSettings, dict[str, Any]]:
    """Return the settings of a model, and the options of the training that come with a preset, except its epochs.

    Args:
        model: name of the model.
        data: name of the data set.
        published: take the settings that the model's authors published for the data set.
        options: options of the model; None for the default. They have no effect with `published`.

    """
    from suffice.link.models import ModelSettings, preset

    if not published:
        given = {name: value for name, value in options.items() if value is not None}
        return ModelSettings.from_dict({"name": model, **given}), {}
    made, training = preset(model, data)
    return made, {name: value for name, value in asdict(training).items() if name != "epochs"}


def _graph(data: str, features: Path | None, labels: Path | None, root: Path, protocol: SplitConfig) -> Graph:
    from suffice.link.data.datasets import load_graph
    from suffice.link.data.files import read_graph
    from suffice.link.data.graph import prepare_graph

    own = Path(data).suffix in (".csv", ".parquet", ".npz")
    return prepare_graph(read_graph(data, features, labels) if own else load_graph(data, root), protocol)


def _train(
    graph: Graph,
    model: ModelSettings,
    settings: TrainConfig,
    protocol: SplitConfig,
    device: str,
    path: Path | None,
) -> tuple[LinkPredictor, Split]:
    from suffice.link.data.graph import split_edges
    from suffice.link.train.memory import reuse_freed_memory
    from suffice.link.train.trainer import fit

    reuse_freed_memory(graph.num_nodes, model.hidden)
    parts = split_edges(graph, protocol, settings.seed)
    net = model.build(graph.x.size(1), settings.seed).to(device)
    facts: dict[str, Any] = {"model": model.to_dict(), "split": asdict(protocol), "graph": graph.name}
    facts |= {"in_channels": graph.x.size(1)}
    with progress() as say:
        fit(
            net,
            graph,
            parts,
            settings,
            checkpoint=path,
            metadata=facts,
            progress=lambda epoch: say(
                f"epoch {epoch.number}: loss {epoch.loss:.4f}, {settings.metric} {epoch.metric:.3f}"
            ),
        )
    return net, parts


def _numbered(path: Path | None, seed: int, seeds: int) -> Path | None:
    return path if path is None or seeds == 1 else path.with_name(f"{path.stem}-{seed}{path.suffix}")


# The last of the commands; it has a file of its own.
app.command()(reproduce)
