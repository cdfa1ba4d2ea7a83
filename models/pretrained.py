"""Trained weights from files: a CIFAR ResNet and a llama2.c language model.

A loader returns `(model, variables)`, or raises one clear line: it checks the
size, shape and finiteness of what it reads before it returns any of it.
"""

import math
import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .llama import Llama, LlamaConfig, unstack_layers
from .resnet import params_from_torch, ResNet


def load_resnet20(path: str | os.PathLike) -> tuple[ResNet, dict[str, Any]]:
    """A trained CIFAR ResNet-20 from a safetensors file with PyTorch's names.

    Its input is RGB in [0, 1], normalised with mean (0.485, 0.456, 0.406) and
    standard deviation (0.229, 0.224, 0.225).

    Raises:
        ImportError: the package safetensors is missing.
        FileNotFoundError: no such file.
        ValueError: it is cut short, corrupt, or another network's.
    """
    try:
        import safetensors
        import safetensors.numpy
    except ImportError:
        raise ImportError(
            "Reading safetensors files needs the package safetensors. "
            "Install it with `pip install jaxeff[export]`.",
            name="safetensors",
        ) from None
    data = _read(path)
    try:
        tensors = safetensors.numpy.load(data)
    # The reader's own names for a bad header, a dtype NumPy lacks, a bad length.
    except (safetensors.SafetensorError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"A safetensors file is a header and the tensors it lists; {path} of "
            f"{len(data)} bytes is not ({error}). Fetch the file again."
        ) from None
    variables = params_from_torch(tensors, depth=20)
    _check_finite(variables, path)
    head = variables["params"]["head"]["bias"]
    width = variables["params"]["conv1"]["kernel"].shape[-1]
    return ResNet(depth=20, width=width, classes=head.shape[0]), variables


def load_stories260k(
    path: str | os.PathLike, *, scan: bool = False
) -> tuple[Llama, dict[str, Any]]:
    """A language model from llama2.c's first ("legacy") file format.

    stories260k and its larger siblings are of that format. Seven little-endian
    int32 (dim, hidden, layers, heads, kv heads, vocabulary, sequence length; the
    vocabulary negative where the output layer is not the embedding), then float32
    arrays, each kind for all layers together, matrices as (out, in).

    Args:
        scan: whether the model scans over stacked layers or loops.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it is cut short, corrupt, or of another format.

    Source: github.com/karpathy/llama2.c, `export.py` (`legacy_export`).
    """
    data = _read(path)
    way_out = "Fetch the file again, or export it with llama2.c's `--version 0`."
    if len(data) < 28:
        raise ValueError(
            f"A llama2.c model starts with 28 bytes of sizes; {path} has {len(data)} "
            f"in all. {way_out}"
        )
    header = [int(n) for n in np.frombuffer(data, "<i4", 7)]
    dim, hidden, n_layers, n_heads, n_kv_heads, vocab, seq_len = header
    tied, vocab = vocab > 0, abs(vocab)
    # 2**24 of anything, layers included, is more than this format was used for.
    if not all(0 < n < 2**24 for n in (*header[:5], vocab, seq_len)) or (
        dim % n_heads or n_heads % n_kv_heads or dim // n_heads % 2
    ):
        raise ValueError(
            f"A llama2.c model starts with 7 positive sizes (dim, hidden, layers, "
            f"heads, kv heads, vocabulary, length) that fit together; {path} starts "
            f"with {header}. {way_out}"
        )
    head_dim = dim // n_heads
    kv_dim = n_kv_heads * head_dim
    shapes = {
        "embed": (vocab, dim),
        "attn_norm": (n_layers, dim),
        "q": (n_layers, dim, dim),
        "k": (n_layers, kv_dim, dim),
        "v": (n_layers, kv_dim, dim),
        "o": (n_layers, dim, dim),
        "mlp_norm": (n_layers, dim),
        "gate": (n_layers, hidden, dim),
        "down": (n_layers, dim, hidden),
        "up": (n_layers, hidden, dim),
        "norm": (dim,),
        "rope": (2, seq_len, head_dim // 2),  # cosines and sines: not needed here
    }
    if not tied:
        shapes["head"] = (vocab, dim)
    need = 28 + 4 * sum(math.prod(shape) for shape in shapes.values())
    if len(data) != need:
        raise ValueError(
            f"A llama2.c model of sizes {header} has {need} bytes; {path} has "
            f"{len(data)}. {way_out}"
        )

    arrays, at = {}, 28
    for name, shape in shapes.items():
        array = np.frombuffer(data, "<f4", math.prod(shape), at).reshape(shape)
        arrays[name] = jnp.asarray(array, jnp.float32)
        at += array.nbytes
    kernel = {
        name: {"kernel": arrays[name].mT}  # (out, in) -> (in, out)
        for name in ("q", "k", "v", "o", "gate", "up", "down", "head")
        if name in arrays
    }
    scale = {name: {"scale": arrays[name]} for name in ("attn_norm", "mlp_norm")}
    params: dict[str, Any] = {
        "embed": {"embedding": arrays["embed"]},
        "layers": {
            "attn_norm": scale["attn_norm"],
            "attn": {name: kernel[name] for name in "qkvo"},
            "mlp_norm": scale["mlp_norm"],
            **{name: kernel[name] for name in ("gate", "up", "down")},
        },
        "norm": {"scale": arrays["norm"]},
    }
    if not tied:
        params["head"] = kernel["head"]
    variables: dict[str, Any] = {"params": params}
    _check_finite(variables, path)
    config = LlamaConfig(
        vocab_size=vocab,
        d_model=dim,
        hidden=hidden,
        n_layers=n_layers,
        n_heads=n_heads,
        n_kv_heads=n_kv_heads,
        rope="adjacent",
        tied=tied,
    )
    return Llama(config, scan=scan), variables if scan else unstack_layers(variables)


def _read(path: str | os.PathLike) -> bytes:
    if not Path(path).is_file():
        raise FileNotFoundError(f"No weights file {path}. Check the path.")
    return Path(path).read_bytes()


def _check_finite(variables: dict[str, Any], path: str | os.PathLike) -> None:
    for key, leaf in jax.tree_util.tree_leaves_with_path(variables):
        bad = int(np.sum(~np.isfinite(leaf)))
        if bad:
            name = jax.tree_util.keystr(key, simple=True, separator="/")
            raise ValueError(
                f"Weights must be finite numbers; {bad} of the {leaf.size} in {name} "
                f"of {path} are not. Fetch the file again."
            )
