"""The traced function: what every technique looks at and rewrites."""

from .leaf import (
    Conv as Conv,
    dense as dense,
    dense_size as dense_size,
    Dot as Dot,
    DotDims as DotDims,
    is_leaf as is_leaf,
    Leaf as Leaf,
    shapes as shapes,
)
from .interpret import equations as equations, Interpreter as Interpreter
from .lift import (
    lift as lift,
    lift_report as lift_report,
    LiftEntry as LiftEntry,
    unlift as unlift,
)
from .sites import Site as Site
