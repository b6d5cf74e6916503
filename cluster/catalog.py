"""Tasks, models and learners by name. One line adds one."""

from __future__ import annotations

from cluster.asynchronous import Asynchronous
from cluster.policies import Policy, Synchronous
from envs.base import TaskFamily
from envs.data_free import DataFree
from envs.glyphs import Glyphs
from envs.image_folder import ImageFolder
from envs.images import Episodes, ImageSource
from envs.locomotion import Locomotion
from envs.navigation import Navigation
from envs.omniglot import Omniglot
from envs.sinusoid import Sinusoid
from learners.adml import ADML
from learners.adversarial_querying import AdversarialQuerying
from learners.base import Learner, Outer
from learners.imaml import IMAML
from learners.maml import MAML
from learners.maml_plus_plus import MAMLPlusPlus
from learners.meta_curvature import MetaCurvature
from learners.meta_sgd import MetaSGD
from learners.models import MLP, Conv4, GaussianMLP, ModelSpec
from learners.outer import Descent
from learners.proto_net import ProtoNet
from learners.proximal import ProMP
from learners.purer.calibration import DataFreeMAML
from learners.purer.outer import Purer
from learners.reptile import Reptile
from learners.resnet import ResNet
from learners.trust_region import TrustRegion

TASKS: dict[str, type] = {
    "sinusoid": Sinusoid, "episodes": Episodes, "navigation": Navigation, "locomotion": Locomotion, "data_free": DataFree,
}  # fmt: skip
SOURCES: dict[str, type] = {"omniglot": Omniglot, "image_folder": ImageFolder, "glyphs": Glyphs}
MODELS: dict[str, type] = {"mlp": MLP, "conv4": Conv4, "resnet": ResNet, "gaussian_mlp": GaussianMLP}
LEARNERS: dict[str, type] = {
    "maml": MAML, "maml_plus_plus": MAMLPlusPlus, "meta_sgd": MetaSGD, "meta_curvature": MetaCurvature, "imaml": IMAML,
    "reptile": Reptile, "adml": ADML, "adversarial_querying": AdversarialQuerying,
    "proto_net": ProtoNet, "data_free_maml": DataFreeMAML,
}  # fmt: skip
OUTERS: dict[str, type] = {"descent": Descent, "trust_region": TrustRegion, "promp": ProMP, "purer": Purer}
POLICIES: dict[str, type] = {"synchronous": Synchronous, "asynchronous": Asynchronous}

CHOICES: dict[str, dict[str, type]] = {
    TaskFamily.__name__: TASKS,
    ImageSource.__name__: SOURCES,
    ModelSpec.__name__: MODELS,
    Learner.__name__: LEARNERS,
    Outer.__name__: OUTERS,
    Policy.__name__: POLICIES,
}
"""For each interface that a configuration key may hold: the classes that can stand there, by the table's `name`."""
