"""The checkpoint files that repetitions of a training read and write, one for each seed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from suffice.files import similar_file


@dataclass(frozen=True)
class CheckpointFiles:
    """What to read and write; at most one of the three files is given.

    With several seeds, `-SEED` is added to the stem of a file: `run-0.safetensors`, `run-1.safetensors`.

    Args:
        load: checkpoint of a trained model, which is not trained again.
        save: new file, written after each epoch.
        resume: checkpoint of a training that goes on. It is written after each further epoch.

    """

    load: Path | None = None
    save: Path | None = None
    resume: Path | None = None

    def check(self, seeds: Sequence[int], *, load: str = "load", save: str = "save", resume: str = "resume") -> None:
        """Check that files to read exist, and that a file to write does not.

        With several seeds, it is enough if one file to resume exists: the seeds after it have not begun.

        Args:
            seeds: seed of each repetition.
            load: argument or option that gave `load`, for the error.
            save: argument or option that gave `save`, for the error.
            resume: argument or option that gave `resume`, for the error.

        Raises:
            ValueError: more than one file is given, a file to read is missing, or a file to write exists.

        """
        names = {load: self.load, save: self.save, resume: self.resume}
        if len(given := [name for name, path in names.items() if path is not None]) > 1:
            raise ValueError(f"only one of {', '.join(names)} may be given, got {' and '.join(given)}")
        for name, path in names.items():
            if path is None:
                continue
            files = [file_of_seed(path, seed, seeds) for seed in seeds]
            if name == save:
                if existing := [file for file in files if file.exists()]:
                    raise ValueError(
                        f"{save} must be a new file, got {str(existing[0])!r}, which exists. Go on with its training "
                        f"with {resume}, or delete the file"
                    )
                continue
            missing = [file for file in files if not file.is_file()]
            if missing and (name == load or len(missing) == len(files)):
                raise ValueError(
                    f"{name} must be an existing checkpoint, got {str(missing[0])!r}, which is no file"
                    f"{similar_file(missing[0])}"
                )

    def training(self, seed: int, seeds: Sequence[int]) -> Path | None:
        """Return the file that the training with a seed writes, and from which it goes on; None for no file."""
        path = self.save or self.resume
        return None if path is None else file_of_seed(path, seed, seeds)


def file_of_seed(path: Path, seed: int, seeds: Sequence[int]) -> Path:
    """Return the path itself or, with several seeds, the path with `-SEED` after its stem."""
    return path if len(seeds) == 1 else path.with_name(f"{path.stem}-{seed}{path.suffix}")
