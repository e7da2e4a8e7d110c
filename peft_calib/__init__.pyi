"""What `peft_calib` holds, for type checkers and for its lazy loader, which reads it here."""

from . import (
    calibration,
    edits,
    hub,
    identity,
    methods,
    prediction,
    predictor,
    provenance,
    registry,
    splits,
    tuners,
    uncertainty_head,
)
from .export import export_lora
from .hub import push_to_hub
from .llama_cpp import export_gguf
from .methods.bayesian import bayesianize
from .methods.curve import (
    LossProfile,
    arc_length,
    control_polygon_length,
    curve_weights,
    lipschitz_bound,
    loss_profile,
)
from .methods.distillation import distill, distillation_of
from .methods.posterior_calibration import calibrate_posterior
from .metrics import metric_path
from .prediction import (
    GeneratedAnswers,
    LabelsPrediction,
    Prediction,
    RegressionPrediction,
    curve_at,
    draws,
    generate_answers,
    load_frozen,
    predict,
    predict_dataset,
    predict_frozen,
    sample_generate,
    score_texts,
)
from .predictor import CalibratedPrediction, Predictor, Scorer, load, predict_served, predict_to
from .provenance.splits import calibration_split
from .tuners import (
    BayesianLoraConfig,
    BayesianLoraModel,
    CurveLoraConfig,
    CurveLoraModel,
    EnsembleLoraConfig,
    EnsembleLoraModel,
    HyperLoraConfig,
    HyperLoraModel,
)
from .tuners.laws import param_groups, regularization_loss
from .tuners.objective import prepare_for_trainer
from .uncertainty_head import UncertaintyHead

__version__: str
