"""Matching what happens inside: hidden states and attention outputs, with projections where widths differ."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedConfig

from ..objectives import relative_distance, spread_layers

FILE_NAME = "projections.safetensors"


class StateMatching(nn.Module):
    """Sums of relative distances over tokens and layer pairs; its parameters project the student's states.

    Args:
        student, teacher (`PreTrainedConfig`): widths and depths.
        layer_pairs (list of pairs, *optional*): student and teacher layer, from 0; evenly spread by default.
        kinds (list of `str`): of `hidden_states` and `attention_outputs`, those to match.

    Raises:
        ValueError: a layer that does not exist.
    """

    def __init__(
        self,
        student: PreTrainedConfig,
        teacher: PreTrainedConfig,
        layer_pairs: list[tuple[int, int]] | None,
        kinds: list[str],
    ) -> None:
        super().__init__()
        depths = student.num_hidden_layers, teacher.num_hidden_layers
        self.layer_pairs = spread_layers(*depths) if layer_pairs is None else layer_pairs
        for pair in self.layer_pairs:
            for whose, layer, depth in zip(("student", "teacher"), pair, depths, strict=True):
                if not 0 <= layer < depth:
                    raise ValueError(f"layer_map names {whose} layer {layer}, expected 0 to {depth - 1}")
        self.kinds = kinds
        self.projections = nn.ModuleDict()
        if student.hidden_size != teacher.hidden_size:
            for kind in kinds:
                pairs = [nn.Linear(student.hidden_size, teacher.hidden_size, bias=False) for _ in self.layer_pairs]
                self.projections[kind] = nn.ModuleList(pairs)

    def forward(
        self, student: Mapping[str, Sequence[Tensor]], teacher: Mapping[str, Sequence[Tensor]], counts: Tensor
    ) -> dict[str, Tensor]:
        """Compare the outputs of all layers; one call for all kinds, as gradient-averaging wrappers expect.

        Args:
            student, teacher (mappings from kind to `[B, T, hidden_size]` of each layer).
            counts (`[B, T]`, bool): tokens that count.

        Returns:
            for each kind `[n]`, float32, differentiable: mean over layer pairs of the distance of each such token.
        """
        return {kind: self._distance(kind, student[kind], teacher[kind], counts) for kind in self.kinds}

    def _distance(self, kind: str, student: Sequence[Tensor], teacher: Sequence[Tensor], counts: Tensor) -> Tensor:
        distances = []
        for index, (i, j) in enumerate(self.layer_pairs):
            states = student[i][counts]
            if kind in self.projections:
                states = self.projections.get_submodule(f"{kind}.{index}")(states)
            distances.append(relative_distance(states, teacher[j][counts]))
        return torch.stack(distances).mean(0)

    def save(self, folder: str | Path) -> None:
        """Write the projections, if there are any, beside the optimizer's state: they are no part of the student."""
        if len(self.projections):
            save_file({name: p.detach().cpu() for name, p in self.state_dict().items()}, Path(folder) / FILE_NAME)

    def load(self, folder: str | Path) -> None:
        """Read what [`save`] wrote."""
        if len(self.projections):
            self.load_state_dict(load_file(Path(folder) / FILE_NAME))
