"""Input pipelines: real data sets, batches that resume, prefetching, augmentation."""

from .augment import augment as augment, augmentation as augmentation
from .batches import (
    Batch as Batch,
    batches as batches,
    steps_per_epoch as steps_per_epoch,
)
from .cifar10 import cifar10 as cifar10
from .dataset import Dataset as Dataset
from .digits import digits as digits
from .fashion_mnist import fashion_mnist as fashion_mnist
from .load import load as load
from .prefetch import prefetch as prefetch
from .text import text as text, windows as windows
