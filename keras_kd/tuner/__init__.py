"""Which student, loss and compression are best? KerasTuner searches over all of this library, on one machine or many."""

# isort: off
from keras_kd.tuner import _needed  # noqa: F401  # first: says how to install what is missing

# isort: on
from keras_kd.tuner.compression import CompressionHyperModel
from keras_kd.tuner.distributed import check_chief
from keras_kd.tuner.fronts import Candidate, ParetoFront, hypervolume, pareto_front
from keras_kd.tuner.hypermodels import DistillationHyperModel
from keras_kd.tuner.objectives import Score
from keras_kd.tuner.oracles import ParetoOracle
from keras_kd.tuner.resuming import resume
from keras_kd.tuner.trials import fit_trial

__all__ = [
    "Candidate",
    "CompressionHyperModel",
    "DistillationHyperModel",
    "ParetoFront",
    "ParetoOracle",
    "Score",
    "check_chief",
    "fit_trial",
    "hypervolume",
    "pareto_front",
    "resume",
]
