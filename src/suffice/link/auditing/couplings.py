"""Find the modules that couple the edges of a batch: their output for an edge depends on the other edges.

No list of known layers is needed. The same probe edges are scored in two batches with different other edges. A module
couples the batch if its inputs for the probes are equal in both batches, but its outputs are not.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch_geometric.data.data import BaseData

from suffice.link.auditing.edge_set import MIN_EDGES, NumberedEdges
from suffice.link.auditing.module_state import Modes
from suffice.link.auditing.norm_layers import norm_layers
from suffice.link.auditing.snapshot import State

_MAX_OTHERS = 48  # edges that differ between the two batches
# Relative to the largest value. The tolerance for equal inputs is smaller than the one for different outputs, so that a
# module that enlarges rounding errors is not named.
_DIFFERENT = 1e-4
_EQUAL = 1e-5
_EQUAL_SUMS = 1e-10  # relative tolerance for tensors without rows for edges, such as the embeddings of all nodes
_CHUNK = 2**20  # values that are summed at once
_NOISE_FACTOR = 4.0  # times the change that a repetition of the same batch makes

FUNCTION = "function"
"""The kind of a coupling that no module causes."""


@dataclass(frozen=True)
class Coupling:
    """A module whose output for an edge depends on the other edges of the batch.

    Args:
        name: name of the module (as in `named_modules`), empty for the audited module itself. If no module couples the
            edges, but scores do depend on other edges: `score`.
        kind: name of its class; `function` if no module couples the edges.
        is_norm_layer: whether it is one of the normalization layers of the report.

    """

    name: str
    kind: str
    is_norm_layer: bool

    def __str__(self) -> str:
        """Return the name of the module and its class."""
        return f"{self.name} ({self.kind})" if self.name else self.kind


def find_couplings(edges: NumberedEdges, modes: Modes, restore: State, seed: int = 0) -> tuple[Coupling, ...]:
    """Return the first modules that couple the edges of a batch, in the order of `named_modules`.

    If a module and one of its submodules couple the edges, only the submodule is named. A module is not named if its
    input for the probes already depends on the other edges, because a module before it couples them. A container is
    named if an operation in its own `forward` couples the edges.

    The probes are the first edges of each batch, and are also scored alone. A tensor has rows for edges if its shape in
    a batch differs from its shape with the probes alone. The rows of the probes are then the first ones, or the first
    ones of each of several equal blocks. So the nodes of a graph are not mistaken for edges, and encoders that
    normalize over all nodes are not named. If each edge has a subgraph, the nodes of the subgraphs are rows. If nothing
    is found, the probes are put last, because a row may depend only on the rows before it, as with a cumulative sum.
    The submodules of scripted modules cannot be observed. A scripted module is named if the scores depend on other
    edges and no other module couples them.

    Args:
        edges: edges to draw from, and the function that scores them; at least 16 positives and 16 negatives.
        modes: how the module behind `score` is put into training mode.
        restore: restores the state of the module and of the scoring function.
        seed: seed of the random generators at the start of each pass.

    """
    half = MIN_EDGES // 2
    most = min(_MAX_OTHERS, edges.positives.size(1) - half, edges.negatives.size(1) - half)
    probes = torch.cat([edges.positives[:, :half], edges.negatives[:, :half]], dim=1)
    others = [side[:, half : half + most] for side in (edges.positives, edges.negatives)]
    found = _search(edges, modes, restore, seed, [probes, *others], at_end=False)
    return found or _search(edges, modes, restore, seed, [probes, *others], at_end=True)


def _search(
    edges: NumberedEdges, modes: Modes, restore: State, seed: int, parts_of_batches: Sequence[Tensor], *, at_end: bool
) -> tuple[Coupling, ...]:
    """Return the modules that couple probes with the other edges of two batches (see `find_couplings`).

    Args:
        edges: the function that scores edges.
        modes: how the module behind it is put into training mode.
        restore: restores the state of the module and of the scoring function.
        seed: seed of the random generators at the start of each pass.
        parts_of_batches: the probes, the other edges of the first batch, and those of the second.
        at_end: whether the probes are the last edges of each batch, not the first.

    """
    probes, *others = parts_of_batches
    batches = [torch.cat([other, probes] if at_end else [probes, other], dim=1) for other in others]
    parts = {} if modes.module is None else dict(modes.module.named_modules())
    scripted = {name: part for name, part in parts.items() if isinstance(part, torch.jit.ScriptModule)}
    parts = {name: part for name, part in parts.items() if name not in scripted}
    rows = _ProbeRows(probes.size(1), batches[0].size(1), at_end)

    def record(pairs: Tensor, alone: _Pass | None, with_scores: bool) -> _Pass:
        restore(with_scores=with_scores)
        torch.manual_seed(seed)
        found = _Pass(alone)
        with modes.training(), found.watch(parts):
            scores = edges.score(pairs)
        found.scores = scores[-rows.num_probes :] if at_end else scores[: rows.num_probes]
        return found

    for with_scores in (False, True):  # a state of the scoring function is restored only if it matters
        alone = record(probes, None, with_scores)
        first, again, second = (record(pairs, alone, with_scores) for pairs in (batches[0], batches[0], batches[1]))
        if torch.equal(first.scores, again.scores):
            break
    restore(with_scores=with_scores)
    precision = max(found.precision for found in (alone, first, again, second))
    tolerances = max(_EQUAL, precision), max(_DIFFERENT, 4 * precision)
    coupled = {name for name in parts if _couples(name, (alone, first, again, second), rows, tolerances)}
    innermost = [name for name in parts if name in coupled and not any(_is_inside(other, name) for other in coupled)]
    if innermost:
        layers = norm_layers(cast(nn.Module, modes.module))
        return tuple(dict.fromkeys(_describe(name, parts, layers) for name in innermost))
    if _differ([first.scores], [again.scores], [second.scores], tolerance=tolerances[1]):
        outermost = [name for name in scripted if not any(_is_inside(name, outer) for outer in scripted)]
        if outermost:
            return tuple(_describe(name, scripted, {}) for name in outermost)
        return (Coupling("score", FUNCTION, is_norm_layer=False),)
    return ()


def _describe(name: str, parts: Mapping[str, nn.Module], layers: Mapping[str, nn.Module]) -> Coupling:
    """Return the coupling of a module, or of the norm layer that contains it."""
    layer = next((outer for outer in layers if outer == name or _is_inside(name, outer)), None)
    part = parts[name if layer is None else layer]
    kind = getattr(part, "original_name", type(part).__name__)  # the class of a scripted module
    return Coupling(name if layer is None else layer, kind, layer is not None)


def _is_inside(name: str, outer: str) -> bool:
    return name != outer and (not outer or name.startswith(f"{outer}."))


Shapes = dict[str, torch.Size]


@dataclass
class _Call:
    """Inputs and outputs of one call of a module. Tensors are named by their paths in the arguments.

    Args:
        input_shapes: shapes of all input tensors.
        inputs: copies of the input tensors with rows for edges.
        input_sums: sums of the values of all other input tensors, such as the embeddings of all nodes.
        output_shapes: shapes of all output tensors.
        outputs: copies of the output tensors with rows for edges; None until the call has returned.

    """

    input_shapes: Shapes
    inputs: dict[str, Tensor]
    input_sums: dict[str, Tensor]
    output_shapes: Shapes = field(default_factory=dict[str, torch.Size])
    outputs: dict[str, Tensor] | None = None


class _Pass:
    """All calls of modules while a batch is scored.

    Args:
        alone: pass of the probes alone. Tensors whose shape differs from that in this pass have rows for edges.

    """

    def __init__(self, alone: _Pass | None = None) -> None:
        self.calls: dict[str, list[_Call]] = {}
        self.scores = torch.empty(0)
        self.precision = 0.0  # the coarsest relative precision of the outputs of modules
        self._alone = alone

    @contextmanager
    def watch(self, parts: Mapping[str, nn.Module]) -> Generator[None]:
        """Record the calls of modules until exit."""
        handles: list[Any] = []
        for name, part in parts.items():
            handles.append(part.register_forward_pre_hook(self._before(name), with_kwargs=True))
            handles.append(part.register_forward_hook(self._after(name), with_kwargs=True))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _before(self, name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, inputs: Sequence[object], named: Mapping[str, object]) -> None:
            calls = self.calls.setdefault(name, [])
            tensors = dict(tensors_in((inputs, named)))
            reference = self._reference(name, len(calls))
            rows = {} if reference is None else _with_rows(tensors, reference.input_shapes)
            shared = {} if reference is None else {path: tensors[path] for path in tensors.keys() - rows.keys()}
            sums = {path: _sums(tensor) for path, tensor in shared.items()}
            calls.append(_Call(_shapes(tensors), _copies(rows), sums))

        return hook

    def _after(self, name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, _inputs: object, _named: object, output: object) -> None:
            number, call = next(item for item in [*enumerate(self.calls[name])][::-1] if item[1].outputs is None)
            tensors = dict(tensors_in(output))
            reference = self._reference(name, number)
            call.output_shapes = _shapes(tensors)
            call.outputs = {} if reference is None else _copies(_with_rows(tensors, reference.output_shapes))
            precisions = [torch.finfo(each.dtype).eps for each in tensors.values() if each.is_floating_point()]
            self.precision = max([self.precision, *precisions])

        return hook

    def _reference(self, name: str, number: int) -> _Call | None:
        calls = [] if self._alone is None else self._alone.calls.get(name, [])
        return calls[number] if number < len(calls) else None


def tensors_in(value: object, path: str = "") -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors in nested containers and PyG's data objects, with their paths."""
    if isinstance(value, Tensor):
        if not value.is_meta:
            yield path, value
        return
    if isinstance(value, BaseData):
        value = value.to_dict()
    entries: Iterable[tuple[object, object]] = ()
    if isinstance(value, Mapping):
        entries = cast(Mapping[object, object], value).items()
    elif isinstance(value, (list, tuple)):
        entries = enumerate(cast(Sequence[object], value))
    for key, inner in entries:
        yield from tensors_in(inner, f"{path}.{key}")


def _shapes(tensors: Mapping[str, Tensor]) -> Shapes:
    return {path: tensor.shape for path, tensor in tensors.items()}


def _with_rows(tensors: Mapping[str, Tensor], alone: Shapes) -> dict[str, Tensor]:
    """Return the tensors that have as many dimensions as in the pass of the probes alone, but another shape."""
    return {
        path: tensor
        for path, tensor in tensors.items()
        if path in alone and len(alone[path]) == tensor.ndim and alone[path] != tensor.shape
        if tensor.layout == torch.strided
    }


def _copies(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {path: tensor.detach().clone() for path, tensor in tensors.items()}


def _sums(tensor: Tensor) -> Tensor:
    """Return a few numbers that change if values change, int64 [3] for integers and float64 [3] for others."""
    values = tensor.detach()
    if values.layout != torch.strided:
        is_coo = values.layout == torch.sparse_coo
        values = values._values() if is_coo else values.values()  # pyright: ignore[reportPrivateUsage]
    is_integer = not (values.is_floating_point() or values.is_complex())
    dtype = torch.int64 if is_integer else torch.float64
    sums = torch.zeros(3, dtype=dtype)
    for chunk in values.flatten().split(_CHUNK):
        numbers = chunk.abs() if chunk.is_complex() else chunk.to(dtype)
        weights = torch.arange(numbers.numel(), device=numbers.device) % 7 + 1  # so that the order matters, too
        sums += torch.stack([numbers.sum(), numbers.abs().sum(), (numbers * weights).sum()]).cpu().to(dtype)
    return sums


@dataclass(frozen=True)
class _ProbeRows:
    """Where the rows of the probes are in tensors with rows for edges.

    Args:
        num_probes: number of probes.
        num_edges: number of edges in a batch.
        at_end: whether the probes come last in a batch.

    """

    num_probes: int
    num_edges: int
    at_end: bool


def _couples(name: str, passes: tuple[_Pass, ...], rows: _ProbeRows, tolerances: tuple[float, float]) -> bool:
    """Return whether a module couples edges in at least one of its calls."""
    calls = [found.calls.get(name, []) for found in passes]
    if len({len(of_pass) for of_pass in calls}) != 1:
        return False
    return any(_call_couples(of_passes, rows, tolerances) for of_passes in zip(*calls, strict=True))


def _call_couples(calls: tuple[_Call, ...], rows: _ProbeRows, tolerances: tuple[float, float]) -> bool:
    """Return whether other edges in the batch change the outputs of one call for the probes, but not the inputs.

    Args:
        calls: the call with the probes alone, with the first batch, with the first batch again, and with the second.
        rows: where the rows of the probes are.
        tolerances: relative tolerances of the inputs and of the outputs.

    """
    alone, *in_batches = calls
    if any(call.outputs is None for call in calls):
        return False
    if _differ(*([*call.input_sums.values()] for call in in_batches), tolerance=_EQUAL_SUMS):
        return False
    for in_blocks in (False, True):
        inputs = ([*_of_probes(call.inputs, alone.input_shapes, rows, in_blocks)] for call in in_batches)
        if not _differ(*inputs, tolerance=tolerances[0]):
            outputs = ([*_of_probes(call.outputs or {}, alone.output_shapes, rows, in_blocks)] for call in in_batches)
            return _differ(*outputs, tolerance=tolerances[1])
    return False


def _of_probes(
    tensors: Mapping[str, Tensor], alone: Shapes, of_probes: _ProbeRows, in_blocks: bool
) -> Iterator[Tensor]:
    """Yield the rows of the probes in each tensor.

    Args:
        tensors: tensors with rows for edges.
        alone: their shapes in the pass of the probes alone.
        of_probes: where the rows of the probes are.
        in_blocks: whether a dimension of several times as many rows consists of blocks for the batch, such as the
            source nodes of all edges and then their targets. Else, the rows of the probes are the first or last ones.

    """
    num_probes, num_edges = of_probes.num_probes, of_probes.num_edges
    for path, tensor in tensors.items():
        rows = tensor
        for dimension, (size, size_alone) in enumerate(zip(tensor.shape, alone[path], strict=True)):
            if size == size_alone:
                continue
            if in_blocks and size % num_edges == 0 and size // num_edges * num_probes == size_alone:
                start = num_edges - num_probes if of_probes.at_end else 0
                blocks = torch.arange(start, size, num_edges, device=tensor.device)[:, None]
                chosen = (blocks + torch.arange(num_probes, device=tensor.device)).flatten()
                rows = rows.index_select(dimension, chosen)
            else:
                count = min(size, size_alone)
                rows = rows.narrow(dimension, size - count if of_probes.at_end else 0, count)
        yield rows


def _differ(first: list[Tensor], again: list[Tensor], second: list[Tensor], *, tolerance: float) -> bool:
    """Return whether a tensor differs between two passes by more than rounding, and more than in a repetition."""
    if len(first) != len(second) or len(first) != len(again):
        return True
    for tensors in zip(first, again, second, strict=True):
        if len({tensor.ndim for tensor in tensors}) > 1:
            return True
        # With subgraphs, batches have different numbers of rows.
        sizes = [min(of_each) for of_each in zip(*(tensor.shape for tensor in tensors), strict=True)]
        one, repeated, two = (tensor[tuple(slice(0, size) for size in sizes)] for tensor in tensors)
        if not one.numel() or (torch.equal(one, two) and torch.equal(one, repeated)):
            continue
        if not one.is_floating_point() and not one.is_complex():
            return True
        one, two, repeated = _numbers(one), _numbers(two), _numbers(repeated)
        largest = float(torch.maximum(one.abs(), two.abs()).max())
        noise = float((one - repeated).abs().max())
        if float((one - two).abs().max()) > tolerance * largest + _NOISE_FACTOR * noise:
            return True
    return False


def _numbers(values: Tensor) -> Tensor:
    """Return values as float64, with 0 instead of NaN and infinities, such as those of a mask."""
    values = torch.view_as_real(values) if values.is_complex() else values
    return values.double().nan_to_num(0.0, 0.0, 0.0)
