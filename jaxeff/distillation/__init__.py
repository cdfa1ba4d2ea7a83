"""Distillation: a small model learns from a large one."""

from .response import (
    Answer as Answer,
    distill_loss as distill_loss,
    Forward as Forward,
    response_loss as response_loss,
    taught as taught,
)
