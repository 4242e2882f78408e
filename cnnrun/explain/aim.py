"""What is explained of an image: a direction in the scores that the network gives."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from cnnrun.base.error_lines import join_names
from cnnrun.base.errors import ConfigError, escape
from cnnrun.config.messages import nearest_suggestion
from cnnrun.contracts.results import ClassScores
from cnnrun.explain.backward_rules import relu_modules
from cnnrun.explain.subject import ImagesToExplain, Subject


@dataclass(frozen=True)
class ScoreDirection:
    """What is explained of each picture: a direction in what the network says, and what to call it."""

    direction_BK: Tensor
    names: list[str]
    quantity: str
    is_local: bool = False  # whether it comes from one place of the picture alone

    def scores(self, values_BK: Tensor) -> Tensor:
        """How strongly the values say it: [B]."""
        return (values_BK * self.direction_BK).sum(1)

    def select(self, start: int, count: int = 1) -> ScoreDirection:
        """That of some pictures; that of one serves any number of others."""
        some = slice(start, start + count)
        return replace(self, direction_BK=self.direction_BK[some], names=self.names[some])


def choose_direction(
    said: ClassScores, target: str | None, shown: ImagesToExplain, compare_with_itself: bool = False
) -> ScoreDirection:
    """What to explain: `target` by name, else what each picture is said to be. Raises ConfigError.

    Where a network gives embeddings: the likeness to the picture most like it among those shown, or to `itself`.
    """
    if said.names:
        if target is not None and target not in said.names:
            near = nearest_suggestion(target, said.names)
            known = f"known: {join_names(said.names)}"
            raise ConfigError(f"--class {escape(target)}: the network says nothing of it{near} ({known})")
        meant = said.default_B if target is None else torch.full_like(said.default_B, said.names.index(target))
        direction = torch.nn.functional.one_hot(meant, len(said.names)).to(said.raw_BK.dtype)
        return ScoreDirection(direction, [said.names[each] for each in meant.tolist()], said.quantity, said.is_local)
    if target is not None:
        raise ConfigError("--class: this network gives embeddings; what is explained is a likeness between pictures")
    vectors = said.display_BK.detach()
    if compare_with_itself:
        return ScoreDirection(vectors, ["itself as it is"] * len(shown), said.quantity)
    if len(shown) < 2:
        raise ConfigError("this network gives embeddings: show two or more pictures, whose likeness is explained")
    likest = (vectors @ vectors.T).fill_diagonal_(-2.0).argmax(1)
    return ScoreDirection(vectors[likest], [f"like {shown.title(each)}" for each in likest.tolist()], said.quantity)


def no_relu_note(subject: Subject) -> str:
    """What a caption must add where the deconvnet's rule, or guided backpropagation's, does not apply."""
    return (
        "" if relu_modules(subject.trained.network) else " No activation here is a ReLU: each hands its own slope back."
    )
