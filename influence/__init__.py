"""Whose work made this picture? Training data attribution for fine-tuned diffusion models."""

from influence.attribution import attribute
from influence.demo import demo
from influence.doctor import doctor
from influence.errors import (
    DatasetError,
    GradientError,
    InfluenceError,
    ModelError,
    OptionError,
    SpecMismatchError,
    StoreError,
)
from influence.evaluation import (
    evaluate_deletion,
    evaluate_lds,
    evaluate_shapley,
    score_matrix,
    truth_of,
)
from influence.extraction import extract
from influence.finetuning import FineTune
from influence.gradients import ENGINES
from influence.inspection import inspect
from influence.nearcopies import duplicate_clusters, near_copies
from influence.pipeline import DEFAULT_BATCH, build
from influence.planning import plan
from influence.projection import PROJECTIONS
from influence.repair import repair
from influence.retraining import Query, Run, Truth
from influence.scoring import METHODS
from influence.spec import FeatureSpec
from influence.store import Store, exclude, open_store
from influence.verification import Problem, verify

__all__ = [  # noqa: RUF022 - grouped by what they are
    # the verbs
    "attribute",
    "build",
    "demo",
    "doctor",
    "duplicate_clusters",
    "evaluate_deletion",
    "evaluate_lds",
    "evaluate_shapley",
    "exclude",
    "extract",
    "inspect",
    "near_copies",
    "open_store",
    "plan",
    "repair",
    "score_matrix",
    "truth_of",
    "verify",
    # records
    "FeatureSpec",
    "FineTune",
    "Problem",
    "Query",
    "Run",
    "Store",
    "Truth",
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
