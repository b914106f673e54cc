"""What a study contains: params files and notebook parameters, validated before anything runs."""

from qreg_utils.study.experiment import Classification, Detection, Experiment
from qreg_utils.study.grid import ClusterResources, Study, load_study, params_text, write_params
from qreg_utils.study.messages import StudyError

__all__ = [
    "Classification",
    "ClusterResources",
    "Detection",
    "Experiment",
    "Study",
    "StudyError",
    "load_study",
    "params_text",
    "write_params",
]
