"""Hooks of a replay that record what attention modules read and write, and gradients with respect to it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel
from typing_extensions import Self

from suffice.kv.hf.layers import find_decoder


class _Hooks:
    """Base class of objects whose hooks exist within a `with` statement."""

    def __init__(self) -> None:
        self._handles: list[RemovableHandle] = []

    def __enter__(self) -> Self:
        self.register()
        return self

    def __exit__(self, *error: object) -> None:
        for handle in self._handles:
            handle.remove()

    def register(self) -> None:
        """Register the hooks."""


class InputNorms(_Hooks):
    """Records the norm of the input of attention modules at each token.

    Args:
        modules: the attention modules.

    """

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        super().__init__()
        self._modules = modules
        self._norms: dict[nn.Module, Tensor] = {}

    def register(self) -> None:
        """Register a hook on each module."""
        for module in self._modules:
            hook: Any = self._record
            self._handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))

    def _record(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        inputs = kwargs.get("hidden_states", args[0] if args else None)
        if not isinstance(inputs, Tensor):
            raise ValueError(
                f"policy must not need the input of the attention for {type(module).__name__}, which has no argument "
                "`hidden_states`, got one that does. Use 'kvzip'"
            )
        norms = torch.linalg.vector_norm(inputs, dim=-1, dtype=torch.float32)
        self._norms[module] = norms.clamp_min(torch.finfo(torch.float32).tiny)  # the input of padding may be 0

    def of(self, module: nn.Module) -> Tensor:
        """Return the norms in the current pass, float32 [batch, tokens]."""
        return self._norms[module]


class GradientRecorder(_Hooks):
    """Records the outputs of attention modules, and computes gradients with respect to them.

    The objective is Φ = Σ ‖h‖² over the outputs h of the last decoder layer at all tokens (KVgrad): the last one that
    runs, because Llama 3.2 Vision skips layers that read images if there are none. Within the `with` statement,
    gradients are enabled and the parameters of the model are frozen.

    Args:
        model: the model.
        modules: the attention modules.

    """

    def __init__(self, model: PreTrainedModel, modules: Sequence[nn.Module]) -> None:
        super().__init__()
        self._model, self._modules = model, modules
        self._outputs: dict[nn.Module, Tensor] = {}
        self._last: Tensor | None = None
        self._frozen = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self._grad_mode = torch.enable_grad()

    def register(self) -> None:
        """Register all hooks, freeze the parameters, and enable gradients."""
        for module in self._modules:
            self._handles.append(module.register_forward_hook(self._record))
        for layer in _decoder_layers(self._model, self._modules[-1]):
            self._handles.append(layer.register_forward_hook(self._record_last))
        embedding: Any = self._model.get_input_embeddings()
        self._handles.append(embedding.register_forward_hook(_with_gradient))
        for parameter in self._frozen:
            parameter.requires_grad_(False)
        self._grad_mode.__enter__()

    def __exit__(self, *error: object) -> None:
        self._grad_mode.__exit__(None, None, None)
        for parameter in self._frozen:
            parameter.requires_grad_(True)
        super().__exit__(*error)
        self._outputs, self._last = {}, None

    def _record(self, module: nn.Module, args: Any, output: Any) -> None:
        self._outputs[module] = output[0] if isinstance(output, tuple) else output

    def _record_last(self, module: nn.Module, args: Any, output: Any) -> None:
        self._last = output[0] if isinstance(output, tuple) else output

    def gradients(self, is_token: Tensor | None) -> dict[nn.Module, Tensor]:
        """Return the gradient with respect to the output of each module, [batch, tokens, hidden].

        Args:
            is_token: bool [batch, tokens], False for masked tokens, which do not count; None if there are none.

        """
        assert self._last is not None
        squares = self._last.float().square().sum(-1)
        objective = squares.sum() if is_token is None else squares[is_token.to(squares.device)].sum()
        gradients = torch.autograd.grad(objective, list(self._outputs.values()))
        return dict(zip(self._outputs, gradients, strict=True))


def _with_gradient(module: nn.Module, args: Any, output: Tensor) -> Tensor:
    """Return the embeddings as an input of the graph, because the parameters are frozen.

    A copy, because some models multiply their embeddings in place, which autograd does not allow for an input.
    """
    return output.detach().requires_grad_(True).clone()


def _decoder_layers(model: PreTrainedModel, attention: nn.Module) -> nn.ModuleList:
    """Return the decoder layers: the list of layers in which an attention module is."""
    for module in find_decoder(model).modules():
        if isinstance(module, nn.ModuleList) and any(attention in layer.modules() for layer in module):
            return module
    raise ValueError(
        f"policy must not need gradients for {type(model).__name__}, which has no list of decoder layers, got one that "
        "does. Use 'kvzip'"
    )
