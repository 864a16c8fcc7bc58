"""Drafters with weights: modules that a recipe trains, that folders and hubs hold, and that the engine runs."""

from __future__ import annotations

from abc import abstractmethod

from huggingface_hub import PyTorchModelHubMixin
from torch import Tensor, nn
from transformers import PreTrainedModel

from heedful.decoding.drafter import Drafter


class TrainedDrafter(nn.Module, Drafter, PyTorchModelHubMixin):
    """Base class of drafters with weights: `from_pretrained`, `save_pretrained` and `push_to_hub` come with it.

    A folder holds ``config.json`` (the constructor's arguments) and ``model.safetensors`` (this module's parameters alone:
    the target model is never a sub-module, so none of its weights are saved or trained by accident).
    """

    @abstractmethod
    def loss(self, model: PreTrainedModel, input_ids: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The training loss on rows of text.

        Args:
            model: the target model; frozen unless the recipe says otherwise.
            input_ids: ``(B, T)``, packed rows without padding.

        Returns:
            The scalar loss, and figures to log (detached scalars: losses and accuracies by step ahead).
        """
