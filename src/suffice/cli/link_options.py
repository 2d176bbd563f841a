"""Groups of options that the commands of `suffice link` share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import typer

from suffice.arguments import check_choice, check_int, check_number, check_optional_int
from suffice.cli.options import split_commas
from suffice.devices import check_device
from suffice.files import check_file
from suffice.link.batches.composition import parse_composition
from suffice.link.data.names import check_dataset_name
from suffice.link.names import DECODER_NAMES, ENCODER_NAMES, MODEL_NAMES, NORM_NAMES, check_arm
from suffice.link.study.checkpoint_files import CheckpointFiles

if TYPE_CHECKING:
    from suffice.link.data.graph import Graph, SplitConfig
    from suffice.link.models import ModelSettings
    from suffice.link.study.arms import Arm
    from suffice.link.train.config import TrainConfig


def _check_device(device: str) -> str:
    return check_device("--device", device)


RootOption = Annotated[Path, typer.Option(help="Folder for downloaded data sets.")]
PresetOption = Annotated[
    bool,
    typer.Option(
        "--preset",
        help="Use the settings that the model's authors published for the data set, except the number of epochs.",
    ),
]
ARMS_HELP = (
    "Ways of training, separated by commas: COMPOSITION/NORM or COMPOSITION/ENCODER_NORM-DECODER_NORM, such as "
    "random/layer. Compositions: fixed, random, random+balanced, separate. Norms: batch, layer, graph, none, own (the "
    "model's). Default: "
)


@dataclass(frozen=True)
class GraphOptions:
    """The graph to train on."""

    panel: ClassVar[str] = "Graph"

    data: Annotated[
        str,
        typer.Option(
            help="Name of a data set (digits, block-model, Cora, CiteSeer, PubMed, CS, Physics, Computers, Photo, "
            "ogbl-collab, ogbl-ppa), or an edge list in a .csv, .txt, .tsv, .mtx, .parquet or .npz file."
        ),
    ] = "digits"
    features: Annotated[
        Path | None,
        typer.Option(
            help="File of node features for an edge list; or degree or learned, for a graph without features."
        ),
    ] = None
    labels: Annotated[Path | None, typer.Option(help="File of node classes for an edge list.")] = None
    root: RootOption = Path("data")
    header: Annotated[
        bool | None,
        typer.Option(
            "--header/--no-header",
            help="Whether a first line such as 0,1 is a header. Default: refuse such a file.",
        ),
    ] = None
    ids: Annotated[
        bool | None,
        typer.Option(
            "--ids/--no-ids",
            help="Whether the first column of features and labels holds ids. Default: decide by the file.",
        ),
    ] = None
    bipartite: Annotated[
        bool,
        typer.Option("--bipartite", help="The two columns of the edge list are the two sides of a bipartite graph."),
    ] = False

    def __post_init__(self) -> None:  # checked here, because torch, which `load` needs, takes seconds to import
        if Path(self.data).suffix:
            check_file(self.data, "--data")
        else:
            check_dataset_name("--data", self.data, "an edge list in a file with a suffix")
        if self.features is not None:
            check_file(self.features, "--features", ("degree", "learned"))
        if self.labels is not None:
            check_file(self.labels, "--labels")

    def load(self) -> Graph:
        """Load the graph."""
        from suffice.link.data.graph import SplitConfig
        from suffice.link.study.run_settings import DataSource

        features, labels = (None if file is None else str(file) for file in (self.features, self.labels))
        source = DataSource(self.data, features, labels, str(self.root), self.header, self.ids, self.bipartite)
        return source.load(Path(), SplitConfig())


@dataclass(frozen=True)
class SplitOptions:
    """How the edges are split."""

    panel: ClassVar[str] = "Split"

    validation: Annotated[float, typer.Option(help="Fraction of the edges for validation.")] = 0.05
    test: Annotated[float, typer.Option(help="Fraction of the edges for testing.")] = 0.10
    largest_component: Annotated[
        bool, typer.Option("--largest-component", help="Use only the largest connected component.")
    ] = False
    validation_edges_at_test: Annotated[
        bool,
        typer.Option("--validation-edges-at-test", help="Pass messages over the validation edges when testing."),
    ] = False

    def config(self) -> SplitConfig:
        """Return the settings of the split."""
        from suffice.link.data.graph import SplitConfig

        return SplitConfig(**asdict(self))


@dataclass(frozen=True)
class ArmModelOptions:
    """The model to train. The arms determine its norms."""

    panel: ClassVar[str] = "Model"

    model: Annotated[str, typer.Option(help="Model: encoder-decoder, neognn, ncn, ncnc, elph or buddy.")] = (
        "encoder-decoder"
    )
    encoder: Annotated[
        str | None, typer.Option(help="Encoder: gcn, sage or pure (GCN without weights). Default: gcn.")
    ] = None
    decoder: Annotated[
        str | None, typer.Option(help="Decoder of encoder-decoder: dot, hadamard or concat. Default: hadamard.")
    ] = None
    hidden: Annotated[int | None, typer.Option(help="Number of hidden channels. Default: 64.")] = None
    preset: PresetOption = False

    def __post_init__(self) -> None:  # checks what it can without importing torch, which takes seconds
        check_choice("--model", self.model, MODEL_NAMES)
        check_optional_int("--hidden", self.hidden, 1)
        if self.encoder is not None:
            check_choice("--encoder", self.encoder, ENCODER_NAMES)
        if self.decoder is not None:
            check_choice("--decoder", self.decoder, DECODER_NAMES)

    def settings(self, data: str) -> tuple[ModelSettings, dict[str, Any]]:
        """Return the settings of the model, and the training settings of the preset, if it is used.

        Args:
            data: name of the data set, for the preset.

        """
        from suffice.link.models import ModelSettings, preset

        if self.preset:
            model, training = preset(self.model, data)
            return model, {name: value for name, value in asdict(training).items() if name != "epochs"}
        options = {field.name: getattr(self, field.name) for field in fields(self)}
        name = options.pop("model")
        del options["preset"]
        given = {option: value for option, value in options.items() if value is not None}
        return ModelSettings.from_dict({"name": name, **given}), {}


@dataclass(frozen=True)
class LinkModelOptions(ArmModelOptions):
    """Which model to train."""

    encoder_norm: Annotated[
        str | None, typer.Option(help="Normalization in the encoder: batch, layer, graph or none. Default: batch.")
    ] = None
    decoder_norm: Annotated[
        str | None, typer.Option(help="Normalization in the decoder: batch, layer, graph or none. Default: batch.")
    ] = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for option, norm in (("--encoder-norm", self.encoder_norm), ("--decoder-norm", self.decoder_norm)):
            if norm is not None:
                check_choice(option, norm, NORM_NAMES)


@dataclass(frozen=True)
class ArmTrainOptions:
    """How to train. The arms determine the composition, the loss and the learning rate."""

    panel: ClassVar[str] = "Training"

    epochs: Annotated[int, typer.Option(help="Maximum number of epochs.")] = 30
    patience: Annotated[
        int | None, typer.Option(help="Stop after this many epochs without a better validation metric.")
    ] = None
    batch_size: Annotated[int, typer.Option(help="Number of edges in a mini-batch, positives plus negatives.")] = 512
    directions: Annotated[
        int,
        typer.Option(help="Uses of each undirected edge in an epoch: 2 (once in each direction) or 1."),
    ] = 2
    device: Annotated[str, typer.Option(help="Torch device, such as cpu or cuda:0.", callback=_check_device)] = "cpu"

    def __post_init__(self) -> None:  # checks what it can without importing torch, which takes seconds
        check_int("--epochs", self.epochs, 1)
        check_optional_int("--patience", self.patience, 1)
        check_int("--batch-size", self.batch_size, 2)
        check_int("--directions", self.directions, 1, 2)

    def config(self, preset: Mapping[str, Any]) -> TrainConfig:
        """Return the settings of the training.

        Args:
            preset: published settings, which replace those of the options.

        """
        from suffice.link.train.config import TrainConfig

        given = {name: value for name, value in asdict(self).items() if name != "device"}
        return TrainConfig(**{**given, **preset})


@dataclass(frozen=True)
class TrainOptions(ArmTrainOptions):
    """How to train."""

    composition: Annotated[
        str,
        typer.Option(
            help="Fraction of positives in a mini-batch: fixed:FRACTION, random:LOW,HIGH, or separate (each batch "
            "holds one class)."
        ),
    ] = "fixed:0.5"
    balanced: Annotated[
        bool, typer.Option("--balanced", help="Give both classes the same total weight in the loss of each batch.")
    ] = False
    learning_rate: Annotated[float, typer.Option(help="Learning rate of Adam.")] = 5e-3

    def __post_init__(self) -> None:
        super().__post_init__()
        parse_composition(self.composition, "--composition")
        check_number("--learning-rate", self.learning_rate, above=0)

    def config(self, preset: Mapping[str, Any]) -> TrainConfig:
        """Return the settings of the training; see `ArmTrainOptions.config`."""
        return super().config({"composition": parse_composition(self.composition), **preset})


@dataclass(frozen=True)
class SeedOptions:
    """How often to repeat the training."""

    panel: ClassVar[str] = "Repetitions"

    seed: Annotated[int, typer.Option(help="First seed.")] = 0
    seeds: Annotated[
        int, typer.Option(help="Number of seeds. Each has its own split, initial parameters and batches.", min=1)
    ] = 1

    def range(self) -> range:
        """Return the seeds."""
        return range(self.seed, self.seed + self.seeds)


@dataclass(frozen=True)
class SavedTrainingOptions:
    """Where the training is saved."""

    panel: ClassVar[str] = "Checkpoint"

    save: Annotated[
        Path | None,
        typer.Option(help="New file for the training, such as run.safetensors, written after each epoch."),
    ] = None
    resume: Annotated[
        Path | None, typer.Option(help="File of an interrupted training to go on with. It must exist.")
    ] = None

    def files(self) -> CheckpointFiles:
        """Return the files to read and write."""
        return CheckpointFiles(save=self.save, resume=self.resume)

    def check(self, seeds: SeedOptions) -> None:
        """Check that files to read exist, and that a file to write does not.

        Raises:
            ValueError: more than one file is given, a file to read is missing, or a file to write exists.

        """
        self.files().check(seeds.range(), load="--checkpoint", save="--save", resume="--resume")


@dataclass(frozen=True)
class CheckpointOptions(SavedTrainingOptions):
    """The checkpoint of a trained model, or where its training is saved."""

    checkpoint: Annotated[
        Path | None, typer.Option(help="File of a trained model, which `link train --save` wrote. It must exist.")
    ] = None

    def files(self) -> CheckpointFiles:
        """Return the files to read and write."""
        return CheckpointFiles(self.checkpoint, self.save, self.resume)

    def check_options(self, *groups: ArmModelOptions | ArmTrainOptions) -> None:
        """Check that no option is given that the checkpoint determines: the model and its training.

        Args:
            groups: options of the model and of the training. A value that equals the default is accepted.

        Raises:
            ValueError: a checkpoint is given, and so is such an option.

        """
        if self.checkpoint is None:
            return
        for group in groups:
            for field in fields(group):
                if field.name != "device" and (value := getattr(group, field.name)) != field.default:
                    option = f"--{field.name.replace('_', '-')}"
                    found = option if value is True else f"{option} {value}"
                    raise ValueError(
                        f"--checkpoint must be given without {option}, got {found}. The checkpoint determines the "
                        f"model and its training"
                    )


def check_arms(text: str) -> None:
    """Check a comma-separated list of arms, without importing torch, which takes seconds.

    Raises:
        ValueError: an arm is unknown.

    """
    for key in split_commas(text):
        check_arm("--arms", key)


def parse_arms(text: str, default: tuple[Arm, ...]) -> tuple[Arm, ...]:
    """Return the arms of a comma-separated list, or the default arms if the list is empty."""
    from suffice.link.study.arms import parse_arm

    return tuple(map(parse_arm, split_commas(text))) or default
