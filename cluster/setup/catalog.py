"""Tasks, models and learners by name. One line adds one."""

from __future__ import annotations

from cluster.training.asynchronous import Asynchronous
from cluster.training.policy import Policy
from cluster.training.synchronous import Synchronous
from envs.base import TaskFamily
from envs.control.locomotion import Locomotion
from envs.control.navigation import Navigation
from envs.images.data_free import DataFree
from envs.images.episodes import Episodes, ImageSource
from envs.images.pretraining import Pretraining
from envs.sinusoid import Sinusoid
from envs.sources.glyphs import Glyphs
from envs.sources.hugging_face import HuggingFace
from envs.sources.image_folder import ImageFolder
from envs.sources.labelled import Stored
from envs.sources.npz import Npz
from envs.sources.omniglot import Omniglot
from learners.algorithms.adml import ADML
from learners.algorithms.adversarial_querying import AdversarialQuerying
from learners.algorithms.baseline_plus_plus import BaselinePlusPlus
from learners.algorithms.cavia import CAVIA
from learners.algorithms.imaml import IMAML
from learners.algorithms.linear_probe import LinearProbe
from learners.algorithms.maml import MAML
from learners.algorithms.maml_plus_plus import MAMLPlusPlus
from learners.algorithms.meta_curvature import MetaCurvature
from learners.algorithms.meta_sgd import MetaSGD
from learners.algorithms.nearest_centroid import NearestCentroid
from learners.algorithms.proto_maml import ProtoMAML
from learners.algorithms.proto_net import ProtoNet
from learners.algorithms.reptile import Reptile
from learners.base import Learner, Outer
from learners.models.constructor import Constructor
from learners.models.context import ContextConv4, ContextMLP
from learners.models.networks import MLP, Conv4, GaussianMLP, ModelSpec
from learners.models.resnet import ResNet
from learners.models.resnet12 import ResNet12
from learners.models.unit import Unit
from learners.models.vit import ViT
from learners.models.wide_resnet import WideResNet
from learners.outer.descent import Descent
from learners.outer.promp import ProMP
from learners.outer.trust_region import TrustRegion
from learners.purer.calibration import DataFreeMAML
from learners.purer.outer import Purer

TASKS: dict[str, type] = {
    "sinusoid": Sinusoid, "episodes": Episodes, "navigation": Navigation, "locomotion": Locomotion,
    "data_free": DataFree, "pretraining": Pretraining,
}  # fmt: skip
SOURCES: dict[str, type] = {
    "omniglot": Omniglot, "image_folder": ImageFolder, "glyphs": Glyphs, "npz": Npz, "hugging_face": HuggingFace,
    "stored": Stored,
}  # fmt: skip
MODELS: dict[str, type] = {
    "mlp": MLP, "conv4": Conv4, "resnet": ResNet, "resnet12": ResNet12, "wide_resnet": WideResNet, "vit": ViT,
    "constructor": Constructor, "gaussian_mlp": GaussianMLP, "context_mlp": ContextMLP,
    "context_conv4": ContextConv4, "unit": Unit,
}  # fmt: skip
LEARNERS: dict[str, type] = {
    "maml": MAML, "maml_plus_plus": MAMLPlusPlus, "meta_sgd": MetaSGD, "meta_curvature": MetaCurvature, "imaml": IMAML,
    "reptile": Reptile, "adml": ADML, "adversarial_querying": AdversarialQuerying,
    "proto_net": ProtoNet, "proto_maml": ProtoMAML, "cavia": CAVIA, "linear_probe": LinearProbe,
    "baseline_plus_plus": BaselinePlusPlus, "nearest_centroid": NearestCentroid, "data_free_maml": DataFreeMAML,
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
