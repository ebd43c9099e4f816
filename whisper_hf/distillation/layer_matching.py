"""Match hidden states and attention outputs of student and teacher, with projections where their widths differ.

Legend: `B` rows of `T` tokens, `n` of which count.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedConfig

from ..objectives import relative_distance, spread_layers

FILE_NAME = "projections.safetensors"


class StateMatching(nn.Module):
    """The distance between states of student and teacher, averaged over pairs of layers.

    If the hidden sizes differ, learned linear maps project the student's states to the teacher's size: one map for each
    kind and pair.

    Args:
        student, teacher (`PreTrainedConfig`): the configs, which give hidden sizes and numbers of layers.
        layer_pairs (list of pairs, *optional*): pairs of a student layer and a teacher layer, counted from 0. By
            default every student layer is paired with the teacher layer at the same relative depth.
        kinds (list of `str`): the kinds of states to match: `hidden_states`, `attention_outputs`, or both.

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
                    raise ValueError(
                        f"layer_map names {whose} layer {layer}, expected 0 to {depth - 1}; correct {list(pair)}"
                    )
        self.kinds = kinds
        self.projections = nn.ModuleDict()
        if student.hidden_size != teacher.hidden_size:
            for kind in kinds:
                maps = [nn.Linear(student.hidden_size, teacher.hidden_size, bias=False) for _ in self.layer_pairs]
                self.projections[kind] = nn.ModuleList(maps)

    def forward(
        self, student: Mapping[str, Sequence[Tensor]], teacher: Mapping[str, Sequence[Tensor]], counts: Tensor
    ) -> dict[str, Tensor]:
        """Compute the distance for each token that counts, and for each kind of states.

        One call covers all kinds, because DDP expects one forward pass per backward pass.

        Args:
            student, teacher (mappings from kind to a list of `[B, T, hidden_size]`): the states of each layer.
            counts (`[B, T]`, bool): whether a token counts.

        Returns:
            for each kind `[n]`, float32 and differentiable: the mean over layer pairs of [`relative_distance`].
        """
        return {kind: self._distance(kind, student[kind], teacher[kind], counts) for kind in self.kinds}

    def _distance(self, kind: str, student: Sequence[Tensor], teacher: Sequence[Tensor], counts: Tensor) -> Tensor:
        """Compute the distance for each token that counts, `[n]`, for one kind of states."""
        distances = []
        for index, (i, j) in enumerate(self.layer_pairs):
            states = student[i][counts]
            if kind in self.projections:
                states = self.projections.get_submodule(f"{kind}.{index}")(states)
            distances.append(relative_distance(states, teacher[j][counts]))
        return torch.stack(distances).mean(0)

    def save(self, folder: str | Path) -> None:
        """Write the projections, if there are any, to a folder of the Trainer's checkpoint.

        They are not part of the student, so they lie beside the optimizer's state.
        """
        if len(self.projections):
            save_file({name: p.detach().cpu() for name, p in self.state_dict().items()}, Path(folder) / FILE_NAME)

    def load(self, folder: str | Path) -> None:
        """Read the projections, if there are any, from a folder that [`save`] wrote."""
        if len(self.projections):
            self.load_state_dict(load_file(Path(folder) / FILE_NAME))
