"""LLaMA: RMS norm, rotary positions, grouped-query attention, SwiGLU, no biases.

The layers are a Python loop, or one scan over stacked parameters that compiles
in the time of a single layer. Both give the same numbers, and both accept a
key/value cache, which is a value that goes in and comes out.

Source: Touvron et al. 2023, arXiv:2302.13971; grouped queries: Ainslie et al.
2023, arXiv:2305.13245; rotary positions: Su et al. 2021, arXiv:2104.09864.
"""

import dataclasses
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, DTypeLike, Float, Int

_INIT = nn.initializers.normal(0.02)


@dataclasses.dataclass(frozen=True)
class LlamaConfig:
    """The sizes of a LLaMA.

    Attributes:
        hidden: width of each SwiGLU.
        n_kv_heads: key and value heads; each serves n_heads / n_kv_heads query
            heads. None is one for each query head.
        rope: which two of a head's dims turn together. "adjacent": 2i and 2i + 1
            (Meta's and llama2.c's weights). "half": i and i + head_dim / 2 (Hugging
            Face's).
        tied: the output layer is the transpose of the embedding.
    """

    vocab_size: int
    d_model: int
    hidden: int
    n_layers: int
    n_heads: int
    n_kv_heads: int | None = None
    rope: Literal["adjacent", "half"] = "adjacent"
    rope_theta: float = 10_000.0
    norm_eps: float = 1e-5
    tied: bool = False

    def __post_init__(self):
        if self.d_model % (2 * self.n_heads):
            raise ValueError(
                f"A head's width d_model / n_heads must be a whole, even number, got "
                f"{self.d_model} / {self.n_heads}. Change n_heads or d_model."
            )
        if self.n_heads % self.kv_heads:
            raise ValueError(
                f"n_kv_heads must divide n_heads, got {self.kv_heads} and "
                f"{self.n_heads}. Choose a divisor of {self.n_heads}."
            )

    @property
    def head_dim(self) -> int:
        """Width of one head."""
        return self.d_model // self.n_heads

    @property
    def kv_heads(self) -> int:
        """Number of key and value heads."""
        return self.n_kv_heads or self.n_heads


LLAMA_7B = LlamaConfig(
    vocab_size=32_000, d_model=4096, hidden=11_008, n_layers=32, n_heads=32
)
LLAMA_70B = LlamaConfig(  # of Llama 2
    vocab_size=32_000,
    d_model=8192,
    hidden=28_672,
    n_layers=80,
    n_heads=64,
    n_kv_heads=8,
)
# Grattafiori et al. 2024, arXiv:2407.21783, table 3.
LLAMA_3_70B = dataclasses.replace(
    LLAMA_70B,
    vocab_size=128_256,
    rope="half",
    rope_theta=500_000.0,
    norm_eps=1e-5,
)
# The sizes of Llama 3.2 1B with LLaMA's vocabulary: 1.1 billion parameters.
LLAMA_1B = LlamaConfig(
    vocab_size=32_000,
    d_model=2048,
    hidden=8192,
    n_layers=16,
    n_heads=32,
    n_kv_heads=8,
    rope="half",
    rope_theta=500_000.0,
)
STORIES260K = LlamaConfig(
    vocab_size=512,
    d_model=64,
    hidden=172,
    n_layers=5,
    n_heads=8,
    n_kv_heads=4,
    tied=True,
)


class Cache(NamedTuple):
    """Keys and values of the tokens seen so far, for every layer.

    `k` and `v` are arrays, or anything with their shape, `write(new, layer, start)`
    and `read(layer)`, such as what `jaxeff.quantization.quantize_cache` puts there.
    """

    k: Any  # (layers, b, length, kv_heads, head_dim)
    v: Any
    used: Int[Array, ""]  # tokens seen so far; at most `length`


def init_cache(
    config: LlamaConfig | Any, batch: int, length: int, dtype: DTypeLike = jnp.float32
) -> Cache:
    """An empty cache with room for `length` tokens.

    Args:
        config: of a LLaMA; other models here decode without a cache.
        batch: prompts.
        length: tokens of each.
        dtype: of keys and values.

    Raises:
        ValueError: it is not that of a LLaMA.
    """
    if not isinstance(config, LlamaConfig):
        raise ValueError(
            f"keys and values are cached for LLaMA, got a {type(config).__name__}: "
            "give `model.config` of one; `greedy` decodes without a cache."
        )
    shape = (config.n_layers, batch, length, config.kv_heads, config.head_dim)
    return Cache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype), jnp.int32(0))


def rope_tables(
    positions: Int[Array, " s"], head_dim: int, theta: float = 10_000.0
) -> tuple[Float[Array, "s half"], Float[Array, "s half"]]:
    """Cosines and sines of `position * theta ** (-2i / head_dim)` for each pair i.

    Source: Su et al. 2021, arXiv:2104.09864, equation 15.
    """
    half = head_dim // 2
    # float32: bfloat16 rounds position 257 to 256.
    frequencies = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angles = positions.astype(jnp.float32)[:, None] * frequencies[None, :]
    return jnp.cos(angles), jnp.sin(angles)


def rotate(
    x: Float[Array, "b s heads head_dim"],
    cos: Float[Array, "s half"],
    sin: Float[Array, "s half"],
    *,
    pairs: Literal["adjacent", "half"] = "adjacent",
) -> Float[Array, "b s heads head_dim"]:
    """Turns each pair of every head's dims by its angle in `rope_tables`.

    Law: the dot product of two rotated vectors depends on the difference of their
    positions only.
    """
    axis = -1 if pairs == "adjacent" else -2
    half = x.shape[-1] // 2
    shape = (half, 2) if pairs == "adjacent" else (2, half)
    cos = jnp.expand_dims(cos[None, :, None, :], axis)
    sin = jnp.expand_dims(sin[None, :, None, :], axis)
    pair = x.astype(jnp.float32).reshape(*x.shape[:-1], *shape)
    a, b = jnp.split(pair, 2, axis=axis)
    pair = jnp.concatenate([a * cos - b * sin, a * sin + b * cos], axis=axis)
    return pair.reshape(x.shape).astype(x.dtype)


class Shared(NamedTuple):
    """What every layer needs and no layer changes."""

    cos: Float[Array, "s half"]
    sin: Float[Array, "s half"]
    causal: Bool[Array, "s t"]  # True where query s may see key t


class Attention(nn.Module):
    """Causal grouped-query attention."""

    config: LlamaConfig
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b s d"],
        shared: Shared,
        cache: Cache | None = None,
        layer: int | Int[Array, ""] = 0,
    ) -> tuple[Float[Array, "b s d"], Cache | None]:
        """Attends to `x` itself or, with a cache, to all the tokens in it."""
        c = self.config
        b, s, d = x.shape
        q = self._dense(c.n_heads * c.head_dim, "q")(x)
        k = self._dense(c.kv_heads * c.head_dim, "k")(x)
        v = self._dense(c.kv_heads * c.head_dim, "v")(x)
        q = q.reshape(b, s, c.n_heads, c.head_dim)
        k = k.reshape(b, s, c.kv_heads, c.head_dim)
        v = v.reshape(b, s, c.kv_heads, c.head_dim)
        q = rotate(q, shared.cos, shared.sin, pairs=c.rope)
        k = rotate(k, shared.cos, shared.sin, pairs=c.rope)
        if cache is not None:
            cache, k, v = _append(cache, k, v, layer)
        # Consecutive query heads share a key/value head.
        q = q.reshape(b, s, c.kv_heads, c.n_heads // c.kv_heads, c.head_dim)
        # float32: the softmax of long rows loses its tail in half precision.
        scores = jnp.einsum(
            "bqkgd,btkd->bkgqt", q, k, preferred_element_type=jnp.float32
        )
        visible = shared.causal[None, None, None]
        scores = jnp.where(visible, scores * c.head_dim**-0.5, -1e30)
        weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
        y = jnp.einsum("bkgqt,btkd->bqkgd", weights, v)
        y = self._dense(d, "o")(y.reshape(b, s, c.n_heads * c.head_dim))
        return y, cache

    def _dense(self, features: int, name: str) -> nn.Dense:
        return nn.Dense(
            features,
            use_bias=False,
            kernel_init=_INIT,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            name=name,
        )


class Block(nn.Module):
    """x + attention(norm(x)), then x + swiglu(norm(x))."""

    config: LlamaConfig
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self,
        carry: tuple[Float[Array, "b s d"], Cache | None],
        shared: Shared,
        layer: int | Int[Array, ""],
    ) -> tuple[tuple[Float[Array, "b s d"], Cache | None], None]:
        """One layer in the form `nn.scan` wants: carry in, (carry, None) out."""
        c = self.config
        kinds: dict[str, Any] = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        dense: dict[str, Any] = {"use_bias": False, "kernel_init": _INIT, **kinds}
        x, cache = carry
        y = nn.RMSNorm(epsilon=c.norm_eps, name="attn_norm", **kinds)(x)
        y, cache = Attention(c, name="attn", **kinds)(y, shared, cache, layer)
        x = x + y
        y = nn.RMSNorm(epsilon=c.norm_eps, name="mlp_norm", **kinds)(x)
        gate = nn.Dense(c.hidden, name="gate", **dense)(y)
        up = nn.Dense(c.hidden, name="up", **dense)(y)
        x = x + nn.Dense(c.d_model, name="down", **dense)(jax.nn.silu(gate) * up)
        return (x, cache), None


class Llama(nn.Module):
    """A LLaMA language model.

    Attributes:
        scan: one scan over stacked layers ("layers", leading dim n_layers) in place
            of a Python loop ("layer_0", "layer_1" ...). `stack_layers` and
            `unstack_layers` turn the parameters of one into those of the other.
        remat: recompute each layer in the backward pass rather than keep its
            activations.
        dtype: of the computation; None follows the parameters.
    """

    config: LlamaConfig
    scan: bool = False
    remat: bool = False
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, tokens: Int[Array, "b s"], cache: Cache | None = None) -> Any:
        """Logits (b, s, vocab_size) of the token that follows each position.

        With a cache, `tokens` continue what the cache has seen, and the result is
        (logits, cache). Where the cache has no room for them, the logits are NaN.
        """
        c = self.config
        if cache is not None and tokens.shape[1] > cache.k.shape[2]:
            raise ValueError(
                f"The cache must hold all {tokens.shape[1]} tokens of a call, got room "
                f"for {cache.k.shape[2]}. Call init_cache with a larger length."
            )
        kinds: dict[str, Any] = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        embed = nn.Embed(
            c.vocab_size, c.d_model, embedding_init=_INIT, name="embed", **kinds
        )
        x = embed(tokens)
        positions = keys = jnp.arange(tokens.shape[1])
        if cache is not None:
            positions = cache.used + positions
            keys = jnp.arange(cache.k.shape[2])
        # With a cache, this also hides the part of it that is not yet written.
        causal = positions[:, None] >= keys[None, :]
        shared = Shared(*rope_tables(positions, c.head_dim, c.rope_theta), causal)
        # Inside a scan the compiler cannot undo the recomputation anyway.
        block = nn.remat(Block, prevent_cse=not self.scan) if self.remat else Block
        carry = (x, cache)
        if self.scan:
            layers = nn.scan(
                block,
                variable_axes={"params": 0},
                split_rngs={"params": True},
                in_axes=(nn.broadcast, 0),
                length=c.n_layers,
            )(c, name="layers", **kinds)
            carry, _ = layers(carry, shared, jnp.arange(c.n_layers))
        else:
            for i in range(c.n_layers):
                carry, _ = block(c, name=f"layer_{i}", **kinds)(carry, shared, i)
        x, cache = carry
        x = nn.RMSNorm(epsilon=c.norm_eps, name="norm", **kinds)(x)
        if c.tied:
            logits = embed.attend(x)
        else:
            logits = nn.Dense(
                c.vocab_size, use_bias=False, kernel_init=_INIT, name="head", **kinds
            )(x)
        if cache is None:
            return logits
        cache = cache._replace(used=cache.used + tokens.shape[1])
        # A full cache would overwrite its last tokens: better no answer than that.
        return jnp.where(cache.used <= cache.k.shape[2], logits, jnp.nan), cache


def stack_layers(variables: dict[str, Any]) -> dict[str, Any]:
    """The variables of `Llama(scan=True)` from those of `Llama(scan=False)`."""
    params = dict(variables["params"])
    n_layers = sum(name.startswith("layer_") for name in params)
    layers = [params.pop(f"layer_{i}") for i in range(n_layers)]
    params["layers"] = jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers)
    return {**variables, "params": params}


def unstack_layers(variables: dict[str, Any]) -> dict[str, Any]:
    """The variables of `Llama(scan=False)` from those of `Llama(scan=True)`."""
    params = dict(variables["params"])
    layers = params.pop("layers")
    for i in range(jax.tree.leaves(layers)[0].shape[0]):
        params[f"layer_{i}"] = jax.tree.map(lambda leaf, i=i: leaf[i], layers)
    return {**variables, "params": params}


def _append(
    cache: Cache,
    k: Float[Array, "b s kv_heads head_dim"],
    v: Float[Array, "b s kv_heads head_dim"],
    layer: int | Int[Array, ""],
) -> tuple[Cache, Array, Array]:
    """Writes one layer's new keys and values; also returns that layer's whole."""
    ks = _write(cache.k, k, layer, cache.used)
    vs = _write(cache.v, v, layer, cache.used)
    return cache._replace(k=ks, v=vs), _read(ks, layer), _read(vs, layer)


def _write(tokens: Any, new: Array, layer: Any, start: Any) -> Any:
    if hasattr(tokens, "write"):
        return tokens.write(new, layer, start)
    new, at = new[None].astype(tokens.dtype), (layer, 0, start, 0, 0)
    return jax.lax.dynamic_update_slice(tokens, new, at)


def _read(tokens: Any, layer: Any) -> Array:
    if hasattr(tokens, "read"):
        return tokens.read(layer)
    return jax.lax.dynamic_index_in_dim(tokens, layer, keepdims=False)
