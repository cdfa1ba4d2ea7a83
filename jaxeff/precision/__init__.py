"""Mixed precision: a dtype for each operation, and loss scaling for float16."""

from .autocast import Autocast as Autocast, autocast as autocast
from .loss_scale import all_finite as all_finite, DynamicLossScale as DynamicLossScale
from .report import autocast_report as autocast_report, AutocastReport as AutocastReport
