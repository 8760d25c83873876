"""Whose work made this picture? Training data attribution for fine-tuned diffusion models."""

from influence.attribution import attribute
from influence.demo import demo
from influence.errors import (
    DatasetError,
    GradientError,
    InfluenceError,
    ModelError,
    OptionError,
    SpecMismatchError,
    StoreError,
)
from influence.gradients import ENGINES
from influence.inspection import inspect
from influence.pipeline import DEFAULT_BATCH, build, plan
from influence.projection import PROJECTIONS
from influence.repair import repair
from influence.scoring import METHODS
from influence.spec import FeatureSpec
from influence.store import Store, exclude, open_store
from influence.verification import Problem, verify

__all__ = [  # noqa: RUF022 - grouped by what they are
    # the verbs
    "attribute",
    "build",
    "demo",
    "exclude",
    "inspect",
    "open_store",
    "plan",
    "repair",
    "verify",
    # records
    "FeatureSpec",
    "Problem",
    "Store",
    # what can be chosen
    "DEFAULT_BATCH",
    "ENGINES",
    "METHODS",
    "PROJECTIONS",
    # errors
    "DatasetError",
    "GradientError",
    "InfluenceError",
    "ModelError",
    "OptionError",
    "SpecMismatchError",
    "StoreError",
]
