"""Whole runs: the jitted step, the loop, checkpoints that resume, metrics, progress."""

from .checkpoint import (
    Checkpoints as Checkpoints,
    load_meta as load_meta,
    load_params as load_params,
    save_params as save_params,
    saved_steps as saved_steps,
)
from .classifier import (
    accuracy_of as accuracy_of,
    classification_loss as classification_loss,
    classifier as classifier,
    forms as forms,
)
from .evaluate import accuracy as accuracy
from .loop import fit as fit, NonFiniteLoss as NonFiniteLoss
from .metrics import Metrics as Metrics, read_metrics as read_metrics
from .progress import Progress as Progress
from .saved_models import load_model as load_model, save_model as save_model
from .step import (
    Aux as Aux,
    init_state as init_state,
    make_train_step as make_train_step,
    TrainState as TrainState,
)
