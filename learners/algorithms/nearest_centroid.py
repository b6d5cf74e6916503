"""Nearest centroid on pre-trained features (SimpleShot: Wang, Chao, Weinberger, van der Maaten 2019)."""

from __future__ import annotations

from dataclasses import dataclass

from learners.algorithms.proto_net import ProtoNet


@dataclass(frozen=True)
class NearestCentroid(ProtoNet):
    """At test the class whose mean feature is nearest; in training nothing adapts, and θ descends the query's loss
    under its own head.

    What is trained is as for `linear_probe`: supervised pre-training on tasks of the family `pretraining`; on episodes
    nothing useful, so that there θ comes from elsewhere (`init_from`, with `outer.lr = 0`). As it stands that is the
    paper's UN. For its L2N, a model `unit` begins from a θ that was trained without; centring on the mean of all
    training images (CL2N) is not here.
    """

    inner_steps: int = 0
    """0: θ is trained as it is. More would be `proto_net`."""

    def __post_init__(self) -> None:
        if self.inner_steps:
            raise ValueError(f"inner_steps={self.inner_steps}: 0 wanted; centroids in training are proto_net's")

    def passes(self) -> int:
        return 1
