"""Calibrated LoRA fine-tuning as a plugin of PEFT: importing it registers the methods.

A law over LoRA factors, an engine that predicts with it, and an honest measure of the result.

Example:
    >>> import peft_calib
    >>> peft_calib.HyperLoraConfig(r=8, target_modules=["query", "value"]).peft_type.value
    'HYPERLORA'
"""

from .classes import name_classes_of_adapters
from .export import export_lora
from .registry import check_peft_version

check_peft_version()
name_classes_of_adapters()

from .methods.bayesian import bayesianize  # noqa: E402
from .methods.curve import (  # noqa: E402
    LossProfile,
    arc_length,
    control_polygon_length,
    curve_weights,
    lipschitz_bound,
    loss_profile,
)
from .methods.posterior_calibration import calibrate_posterior  # noqa: E402
from .prediction import (  # noqa: E402
    Prediction,
    RegressionPrediction,
    curve_at,
    draws,
    load_frozen,
    predict,
    predict_dataset,
    predict_frozen,
    predict_served,
    sample_generate,
    score_texts,
)
from .provenance.splits import calibration_split  # noqa: E402
from .tuners import (  # noqa: E402  (a PEFT that cannot work is refused first)
    BayesianLoraConfig,
    BayesianLoraModel,
    CurveLoraConfig,
    CurveLoraModel,
    EnsembleLoraConfig,
    EnsembleLoraModel,
    HyperLoraConfig,
    HyperLoraModel,
)
from .tuners.laws import param_groups, regularization_loss  # noqa: E402
from .tuners.objective import prepare_for_trainer  # noqa: E402

__version__ = "0.1.0"


def metric_path(name: str = "calibration") -> str:
    """Folder of one of the `evaluate` modules that ship with the package.

    Args:
        name: `"calibration"`, or another folder below `metrics/`.

    Returns:
        Absolute path for `evaluate.load`.

    Raises:
        ValueError: If there is no such module.

    Example:
        >>> metric_path("calibration").endswith("calibration")
        True
    """
    from .metrics import metric_path as find

    return find(name)


__all__ = [
    "BayesianLoraConfig",
    "BayesianLoraModel",
    "CurveLoraConfig",
    "CurveLoraModel",
    "EnsembleLoraConfig",
    "EnsembleLoraModel",
    "HyperLoraConfig",
    "HyperLoraModel",
    "LossProfile",
    "Prediction",
    "RegressionPrediction",
    "arc_length",
    "bayesianize",
    "calibrate_posterior",
    "control_polygon_length",
    "curve_at",
    "curve_weights",
    "calibration_split",
    "draws",
    "export_lora",
    "lipschitz_bound",
    "load_frozen",
    "loss_profile",
    "metric_path",
    "param_groups",
    "predict",
    "predict_dataset",
    "predict_frozen",
    "predict_served",
    "prepare_for_trainer",
    "regularization_loss",
    "sample_generate",
    "score_texts",
]
