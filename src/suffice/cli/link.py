"""`suffice link …`: train, audit, correct and align link predictors."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar

import typer

from suffice.arguments import check_choice
from suffice.cli.console import command_line, out, print_json, print_table, print_text, step_progress
from suffice.cli.link_options import (
    ARMS_HELP,
    ArmModelOptions,
    ArmTrainOptions,
    CheckpointOptions,
    GraphOptions,
    LinkModelOptions,
    PresetOption,
    RootOption,
    SavedTrainingOptions,
    SeedOptions,
    SplitOptions,
    TrainOptions,
    check_arms,
    parse_arms,
)
from suffice.cli.link_tables import audit_tables, row_table, study_table, verdict_text
from suffice.cli.options import ExecutionOptions, FigureOptions, JsonOption, OutputOptions, expand_options, split_commas
from suffice.cli.study_progress import study_progress
from suffice.link.data.names import check_dataset_name
from suffice.link.names import REPRODUCED_MODELS

if TYPE_CHECKING:
    from suffice.link.study.experiment import Experiment
    from suffice.link.train.state import EpochResult

app = typer.Typer(
    help="Audit link predictors for composition bias, and correct it.", no_args_is_help=True, add_completion=False
)


@app.command()
@expand_options
def train(
    graph: GraphOptions,
    split: SplitOptions,
    model: LinkModelOptions,
    training: TrainOptions,
    seeds: SeedOptions,
    output: OutputOptions,
    files: SavedTrainingOptions,
) -> None:
    """Train a link predictor and show its test metrics.

    Under torchrun, all processes train one model together.
    """
    files.check(seeds)  # before torch is imported, which takes seconds

    from suffice.link.study.experiment import evaluate_seeds, mean_rows
    from suffice.link.study.report_sections import metrics_page
    from suffice.link.train.distributed import process_group, rank_and_world_size

    with process_group(training.device) as device, step_progress() as show_step:
        experiment = _experiment(graph, model, training, split, device)
        metrics = evaluate_seeds(
            experiment,
            seeds.range(),
            save=files.save,
            resume=files.resume,
            on_epoch=_epoch_lines(experiment, show_step),
        )
        if rank_and_world_size()[0] > 0:
            return
    rows = mean_rows(metrics)
    title = "Test metrics of a link predictor"
    # Printed first, so that results are not lost if a file cannot be written.
    if output.as_json:
        settings = {"model": experiment.model.to_dict(), "split": asdict(experiment.split)}
        print_json({"graph": experiment.graph.name, **settings, "rows": rows})
    else:
        print_table(row_table(rows, title))
    if output.report is not None:
        metrics_page(title, experiment.graph.name, rows, command_line()).save(output.report)


@app.command()
@expand_options
def audit(
    graph: GraphOptions,
    model: LinkModelOptions,
    training: TrainOptions,
    seeds: SeedOptions,
    output: OutputOptions,
    files: CheckpointOptions,
) -> None:
    """Audit a link predictor: measure how much the score of an edge depends on the rest of its batch.

    The model is loaded from the checkpoint. Without a checkpoint, a model is trained first.
    """
    files.check_options(model, training)  # before torch is imported, which takes seconds
    files.check(seeds)

    from suffice.link.study.experiment import audit_seeds
    from suffice.link.study.report_sections import audit_page

    with step_progress() as show_step:
        experiment = _experiment(graph, model, training, SplitOptions(), training.device)
        reports = audit_seeds(
            experiment,
            seeds.range(),
            checkpoint=files.checkpoint,
            save=files.save,
            resume=files.resume,
            on_epoch=_epoch_lines(experiment, show_step),
        )
    if output.as_json:
        print_json({"audits": [report.to_dict() for report in reports]})
    else:
        for report in reports:
            out.print(verdict_text(report), soft_wrap=True)
            for table in audit_tables(report):
                print_table(table)
    if output.report is not None:
        audit_page(reports[0], command_line()).save(output.report)


_FIVE_SEEDS = SeedOptions(seeds=5)


@app.command()
@expand_options
def correct(
    *,
    arms: Annotated[
        str,
        typer.Option(
            help=ARMS_HELP
            + "fixed, random+balanced and random with batch and layer, separate with batch, and fixed with none."
        ),
    ] = "",
    graph: GraphOptions,
    split: SplitOptions,
    model: ArmModelOptions,
    training: ArmTrainOptions,
    seeds: SeedOptions = _FIVE_SEEDS,
    execution: ExecutionOptions,
    output: FigureOptions,
) -> None:
    """Train a model on biased and on corrected batches, and compare the audit, Hits@K and alignment with classes.

    The figure shows the accuracy against the fraction of positives in the batch.
    """
    check_arms(arms)  # before torch is imported, which takes seconds

    from suffice.link.study.arms import ARMS
    from suffice.link.study.correct import correct, load_edge_representations
    from suffice.link.study.figures import plot_response_curves
    from suffice.link.study.report_sections import results_page
    from suffice.report import save_figure

    compared = parse_arms(arms, ARMS)
    experiment = _experiment(graph, model, training, split, training.device)
    with tempfile.TemporaryDirectory() as temporary, study_progress(execution.quiet) as on_progress:
        folder = execution.folder or Path(temporary)
        results = correct(
            experiment.graph,
            arms=compared,
            model=experiment.model,
            train=experiment.train,
            split=experiment.split,
            seeds=seeds.seeds,
            first_seed=seeds.seed,
            device=experiment.device,
            folder=folder,
            workers=execution.workers,
            on_progress=on_progress,
            command=command_line(),
        )
        page = None
        if output.report is not None:
            drawn = compared[:2] if experiment.graph.y is not None else ()
            representations = load_edge_representations(
                experiment.graph, drawn, folder, split=experiment.split, seed=seeds.seed
            )
            page = results_page(results, command_line(), representations)
    if output.as_json:
        print_json(results.to_dict())
    else:
        print_table(study_table(results))
    if page is not None and output.report is not None:
        page.save(output.report)
    if output.figure is not None:
        curves = {key: arm.response_curve() for key, arm in results.arms.items()}
        save_figure(plot_response_curves(curves, f"{results.graph}, held-out edges"), output.figure)


@app.command()
@expand_options
def align(
    graph: GraphOptions,
    model: LinkModelOptions,
    training: TrainOptions,
    seeds: SeedOptions,
    output: OutputOptions,
) -> None:
    """Measure how well a model's representations align with the node classes.

    The results are compared with those of an untrained model and of the raw features.
    """
    from suffice.link.study.experiment import align_seeds, mean_rows
    from suffice.link.study.report_sections import metrics_page

    with step_progress() as show_step:
        experiment = _experiment(graph, model, training, SplitOptions(), training.device)
        measures = align_seeds(experiment, seeds.range(), on_epoch=_epoch_lines(experiment, show_step), log=show_step)
    rows = [{"representation": name, **row} for name, values in measures.items() for row in mean_rows(values)]
    title = "Alignment with the classes"
    if output.as_json:
        print_json({"graph": experiment.graph.name, "rows": rows})
    else:
        print_table(row_table(rows, title))
    if output.report is not None:
        metrics_page(title, experiment.graph.name, rows, command_line()).save(output.report)


@dataclass(frozen=True)
class ReproductionOptions:
    """Which part of the study to run."""

    panel: ClassVar[str] = "Study"

    data: Annotated[str, typer.Option(help="Names of data sets, separated by commas.")] = "Cora,CiteSeer"
    models: Annotated[
        str,
        typer.Option(
            help="Models, separated by commas: gcn, sage, neognn, elph, buddy, ncn, ncnc. Default: all of them."
        ),
    ] = ""
    arms: Annotated[str, typer.Option(help=ARMS_HELP + "all four compositions with batch.")] = ""
    hidden: Annotated[int, typer.Option(help="Number of hidden channels.")] = 64
    preset: PresetOption = False
    seeds: Annotated[int, typer.Option(help="Number of seeds, each with its own split.", min=1)] = 5
    root: RootOption = Path("data")

    def __post_init__(self) -> None:  # checks what it can without importing torch, which takes seconds
        for name in split_commas(self.data):
            if not Path(name).suffix:
                check_dataset_name("--data", name, "an edge list in a file with a suffix")
        for name in split_commas(self.models):
            check_choice("--models", name, REPRODUCED_MODELS)
        check_arms(self.arms)


_REPRODUCTION_FOLDER = Path("reproduction")
_REPRODUCTION = ExecutionOptions(folder=_REPRODUCTION_FOLDER)


@app.command("reproduce")
@expand_options
def reproduce_study(
    *,
    study: ReproductionOptions,
    split: SplitOptions,
    training: ArmTrainOptions,
    execution: ExecutionOptions = _REPRODUCTION,
    show: Annotated[bool, typer.Option("--show", help="Show the finished runs, and execute no others.")] = False,
    markdown: Annotated[Path | None, typer.Option(help="Also write tables and findings to this Markdown file.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Run the study of arXiv 2604.25978: every model on every data set with every way of training."""
    from suffice.link.study.findings import to_markdown
    from suffice.link.study.reproduction import (
        REPRODUCED_ARMS,
        load_results,
        reproduce,
        results_to_dict,
    )

    folder = execution.folder or _REPRODUCTION_FOLDER
    if show:
        results = load_results(folder)
    else:
        with study_progress(execution.quiet) as on_progress:
            results = reproduce(
                split_commas(study.data),
                folder,
                models=split_commas(study.models) or REPRODUCED_MODELS,
                arms=parse_arms(study.arms, REPRODUCED_ARMS),
                seeds=study.seeds,
                train=training.config({}),
                split=split.config(),
                hidden=study.hidden,
                published=study.preset,
                root=study.root,
                device=training.device,
                workers=execution.workers,
                on_progress=on_progress,
                command=command_line(),
            )
    text = to_markdown(results)
    if markdown is not None:
        markdown.parent.mkdir(parents=True, exist_ok=True)
        markdown.write_text(text, encoding="utf-8")
    if as_json:
        print_json(results_to_dict(results))
        return
    print_text(text)


def _experiment(
    graph: GraphOptions, model: ArmModelOptions, training: ArmTrainOptions, split: SplitOptions, device: str
) -> Experiment:
    from suffice.link.study.experiment import Experiment

    settings, published_training = model.settings(graph.data)
    return Experiment(graph.load(), settings, training.config(published_training), split.config(), device)


def _epoch_lines(experiment: Experiment, show_step: Callable[[str], None]) -> Callable[[EpochResult], None]:
    """Return a function that shows the result of each epoch."""
    metric = experiment.train.metric

    def show(epoch: EpochResult) -> None:
        show_step(f"epoch {epoch.number}: loss {epoch.loss:.4f}, {metric} {epoch.metric:.3f}")

    return show
