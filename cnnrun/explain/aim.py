"""What is explained of an image: a direction in the scores that the network gives."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from cnnrun.base.error_lines import listed
from cnnrun.base.errors import ConfigError, printable
from cnnrun.config.messages import nearest
from cnnrun.contracts.results import Said
from cnnrun.explain.backward_rules import rectifiers
from cnnrun.explain.subject import Shown, Subject


@dataclass(frozen=True)
class Aim:
    """What is explained of each picture: a direction in what the network says, and what to call it."""

    direction_BK: Tensor
    names: list[str]
    what: str
    local: bool = False  # whether it comes from one place of the picture alone

    def of(self, values_BK: Tensor) -> Tensor:
        """How strongly the values say it: [B]."""
        return (values_BK * self.direction_BK).sum(1)

    def part(self, start: int, count: int = 1) -> Aim:
        """That of some pictures; that of one serves any number of others."""
        some = slice(start, start + count)
        return replace(self, direction_BK=self.direction_BK[some], names=self.names[some])


def aimed(said: Said, target: str | None, shown: Shown, itself: bool = False) -> Aim:
    """What to explain: `target` by name, else what each picture is said to be. Raises ConfigError.

    Where a network gives embeddings: the likeness to the picture most like it among those shown, or to `itself`.
    """
    if said.names:
        if target is not None and target not in said.names:
            near = nearest(target, said.names)
            known = f"known: {listed(said.names)}"
            raise ConfigError(f"--class {printable(target)}: the network says nothing of it{near} ({known})")
        meant = said.meant_B if target is None else torch.full_like(said.meant_B, said.names.index(target))
        direction = torch.nn.functional.one_hot(meant, len(said.names)).to(said.raw_BK.dtype)
        return Aim(direction, [said.names[each] for each in meant.tolist()], said.what, said.local)
    if target is not None:
        raise ConfigError("--class: this network gives embeddings; what is explained is a likeness between pictures")
    vectors = said.shown_BK.detach()
    if itself:
        return Aim(vectors, ["itself as it is"] * len(shown), said.what)
    if len(shown) < 2:
        raise ConfigError("this network gives embeddings: show two or more pictures, whose likeness is explained")
    likest = (vectors @ vectors.T).fill_diagonal_(-2.0).argmax(1)
    return Aim(vectors[likest], [f"like {shown.title(each)}" for each in likest.tolist()], said.what)


def other_rule(subject: Subject) -> str:
    """What a caption must add where the deconvnet's rule, or guided backpropagation's, does not apply."""
    return "" if rectifiers(subject.given.network) else " No activation here is a ReLU: each hands its own slope back."
