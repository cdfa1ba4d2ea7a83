"""The traced function: what every technique looks at and rewrites."""

from .calibrate import (
    calibrate as calibrate,
    change_parts as change_parts,
    gram as gram,
    squares as squares,
)
from .call import Call as Call, Rewritten as Rewritten
from .chain import (
    Chain as Chain,
    Crossing as Crossing,
    Piece as Piece,
    WeightPart as WeightPart,
)
from .columns import change_columns as change_columns
from .costs import Cost as Cost, Costs as Costs
from .couplings import Coupling as Coupling, Couplings as Couplings
from .cuts import Cut as Cut, Cuts as Cuts
from .files import write_file as write_file
from .functional import functional as functional
from .given import check_batches as check_batches, check_values as check_values
from .halves import Halves as Halves, halves as halves
from .interpret import (
    bind as bind,
    Interpreter as Interpreter,
    is_inexact as is_inexact,
    rebuilt as rebuilt,
)
from .leaf import (
    coded as coded,
    Conv as Conv,
    dense as dense,
    dense_size as dense_size,
    Dot as Dot,
    dot_of as dot_of,
    DotDims as DotDims,
    is_leaf as is_leaf,
    keep as keep,
    Leaf as Leaf,
    relative_error as relative_error,
    shapes as shapes,
    take_places as take_places,
)
from .lift import (
    lift as lift,
    lift_report as lift_report,
    Lifted as Lifted,
    LiftEntry as LiftEntry,
    Lifting as Lifting,
    unlift as unlift,
)
from .memory import Memory as Memory
from .observe import observe as observe, Observed as Observed
from .opened import opened as opened
from .owners import owners as owners
from .reach import data_reaches as data_reaches, gradients_reach as gradients_reach
from .resize import (
    like as like,
    make_plan as make_plan,
    Plan as Plan,
    resize as resize,
)
from .rules import is_elementwise as is_elementwise
from .saved import (
    describe as describe,
    is_original as is_original,
    rebuild as rebuild,
)
from .scalings import scale_weights as scale_weights, Scaling as Scaling
from .sites import reshape_groups as reshape_groups, Site as Site
from .slicing import (
    Keep as Keep,
    keep_in_state as keep_in_state,
    keep_indices as keep_indices,
    zero_indices as zero_indices,
)
from .table import notes as notes, table as table
from .trace import Program as Program, trace as trace
from .uses import Candidate as Candidate, find_uses as find_uses, Part as Part
from .walk import bodies as bodies, equations as equations, Where as Where
