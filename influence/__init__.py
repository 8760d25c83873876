"""Whose work made this picture? Training data attribution for fine-tuned diffusion models."""

from influence.answers import Answers, answer
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
from influence.export import Replayed, export, replay
from influence.extraction import extract
from influence.finetuning import FineTune
from influence.gradients import ENGINES
from influence.halving import halve
from influence.holdout import hold_out
from influence.inspection import inspect
from influence.loading import DEFAULT_BATCH
from influence.nearcopies import duplicate_clusters, near_copies
from influence.pipeline import build
from influence.planning import plan
from influence.projection import PROJECTIONS
from influence.repair import repair
from influence.retraining import Query, Run, Truth
from influence.royalties import ESTIMATORS
from influence.scoring import METHODS
from influence.solo import solo
from influence.spec import FeatureSpec
from influence.spreadsheet import csv_bytes
from influence.store import Store, exclude, open_store
from influence.tables import FORMATS
from influence.verdicts import VERDICTS
from influence.verification import Problem, verify
from influence.waypoints import default_method

__all__ = [  # noqa: RUF022 - grouped by what they are
    # the verbs
    "answer",
    "attribute",
    "build",
    "csv_bytes",
    "default_method",
    "demo",
    "doctor",
    "duplicate_clusters",
    "evaluate_deletion",
    "evaluate_lds",
    "evaluate_shapley",
    "exclude",
    "export",
    "extract",
    "halve",
    "hold_out",
    "inspect",
    "near_copies",
    "open_store",
    "plan",
    "repair",
    "replay",
    "score_matrix",
    "solo",
    "truth_of",
    "verify",
    # records
    "Answers",
    "FeatureSpec",
    "FineTune",
    "Problem",
    "Query",
    "Replayed",
    "Run",
    "Store",
    "Truth",
    # what can be chosen
    "DEFAULT_BATCH",
    "ENGINES",
    "ESTIMATORS",
    "FORMATS",
    "METHODS",
    "PROJECTIONS",
    "VERDICTS",
    # errors
    "DatasetError",
    "GradientError",
    "InfluenceError",
    "ModelError",
    "OptionError",
    "SpecMismatchError",
    "StoreError",
]
