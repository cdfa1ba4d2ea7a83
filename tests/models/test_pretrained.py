import lzma
import struct
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from jaxeff.models import (
    BOS,
    greedy,
    greedy_cached,
    init_cache,
    load_resnet20,
    load_stories260k,
    rope_tables,
    rotate,
    Tokenizer,
)
from jaxeff.models.resnet import _torch_names

# dim, hidden, layers, heads, kv heads, vocabulary, length
SIZES = (8, 12, 2, 2, 1, 11, 5)


def _llama2c(sizes, seed=0):
    """The bytes of a random llama2.c model, and its arrays, shapes written out."""
    dim, hidden, layers, heads, kv_heads, vocab, length = sizes
    kv = dim // heads * kv_heads
    shapes = {
        "embed": (abs(vocab), dim),
        "rms_att": (layers, dim),
        "wq": (layers, dim, dim),
        "wk": (layers, kv, dim),
        "wv": (layers, kv, dim),
        "wo": (layers, dim, dim),
        "rms_ffn": (layers, dim),
        "w1": (layers, hidden, dim),
        "w2": (layers, dim, hidden),
        "w3": (layers, hidden, dim),
        "rms_final": (dim,),
        "cos": (length, dim // heads // 2),
        "sin": (length, dim // heads // 2),
        "wcls": (abs(vocab), dim) if vocab < 0 else (0,),
    }
    rng = np.random.default_rng(seed)
    arrays = {k: rng.normal(0, 0.5, s).astype("<f4") for k, s in shapes.items()}
    data = struct.pack("<7i", *sizes) + b"".join(a.tobytes() for a in arrays.values())
    return data, arrays


def _llama2c_logits(w, sizes, tokens):
    """The last token's logits as `run.c` computes them, a token at a time."""
    dim, _, layers, heads, kv_heads, *_ = sizes
    head_dim = dim // heads

    def norm(x, scale):
        return x / np.sqrt(np.mean(x * x) + 1e-5) * scale

    keys = [[] for _ in range(layers)]
    values = [[] for _ in range(layers)]
    for position, token in enumerate(tokens):
        x = w["embed"][token]
        for i in range(layers):
            y = norm(x, w["rms_att"][i])

            def turned(v, position=position):
                v = jnp.asarray(v.reshape(1, 1, -1, head_dim))
                tables = rope_tables(jnp.array([position]), head_dim)
                return np.asarray(rotate(v, *tables))[0, 0]

            q, k = turned(w["wq"][i] @ y), turned(w["wk"][i] @ y)
            keys[i].append(k)
            values[i].append((w["wv"][i] @ y).reshape(-1, head_dim))
            out = []
            for head in range(heads):
                shared = head // (heads // kv_heads)
                scores = [q[head] @ k[shared] / head_dim**0.5 for k in keys[i]]
                p = np.exp(scores - np.max(scores))
                p = p / p.sum()
                out.append(
                    sum(a * v[shared] for a, v in zip(p, values[i], strict=True))
                )
            x = x + w["wo"][i] @ np.concatenate(out)
            y = norm(x, w["rms_ffn"][i])
            gate = w["w1"][i] @ y
            x = x + w["w2"][i] @ (gate / (1 + np.exp(-gate)) * (w["w3"][i] @ y))
    x = norm(x, w["rms_final"])
    return (w["wcls"] if w["wcls"].size else w["embed"]) @ x


@pytest.mark.parametrize("scan", [False, True])
@pytest.mark.parametrize("vocab", [11, -11], ids=["tied", "untied"])
def test_a_llama2c_file_computes_what_llama2c_computes(scan, vocab, tmp_path):
    sizes = (*SIZES[:5], vocab, SIZES[6])
    data, arrays = _llama2c(sizes)
    path = tmp_path / "model.bin"
    path.write_bytes(data)
    model, variables = load_stories260k(path, scan=scan)
    tokens = [1, 5, 10, 0]
    got = jax.jit(model.apply)(variables, jnp.array([tokens]))[0, -1]
    assert np.allclose(got, _llama2c_logits(arrays, sizes, tokens), atol=1e-4)


def _with_nan(data):
    return data[:100] + struct.pack("<f", np.nan) + data[104:]


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda d: d[:10], "28 bytes of sizes; .* has 10"),
        (lambda d: d[:-4], r"has \d+ bytes; .* has \d+"),
        (lambda d: d + b"\0", r"has \d+ bytes; .* has \d+"),
        (lambda d: b"ak42" + d[4:], "7 positive sizes"),
        (lambda d: struct.pack("<7i", 8, 12, 2, 3, 1, 11, 5) + d[28:], "fit together"),
        (lambda d: bytes(28) + d[28:], "7 positive sizes"),
        (_with_nan, "1 of the 88 in params/embed/embedding .* are not"),
    ],
    ids=["header", "cut", "longer", "other version", "heads", "zeros", "nan"],
)
def test_a_broken_llama2c_file_is_refused_in_one_line(change, message, tmp_path):
    path = tmp_path / "model.bin"
    path.write_bytes(change(_llama2c(SIZES)[0]))
    with pytest.raises(ValueError, match=message) as error:
        load_stories260k(path)
    assert "\n" not in str(error.value)


def _resnet_tensors(depth=20):
    """Random tensors under PyTorch's names; values of no use, shapes right."""
    rng = np.random.default_rng(0)
    tensors = {}
    for name, path in _torch_names(depth).items():
        stage = int(path[1][5]) if path[1].startswith("stage") else 1
        channels = 16 * 2 ** (stage - 1)
        first = path[1].endswith("block0") and path[2] == "conv1" and stage > 1
        shape = {
            "kernel": (channels, channels // 2 if first else channels, 3, 3),
        }.get(path[-1], (channels,))
        if name == "conv1.weight":
            shape = (16, 3, 3, 3)
        elif name.startswith("linear"):
            shape = (10, 64) if name.endswith("weight") else (10,)
        tensors[name] = rng.uniform(0.1, 1, shape).astype(np.float32)
    return tensors


def test_a_resnet20_file_gives_the_model_and_its_tensors(tmp_path):
    tensors = _resnet_tensors()
    path = tmp_path / "resnet.safetensors"
    path.write_bytes(safetensors.numpy.save(tensors))
    model, variables = load_resnet20(path)
    head = variables["params"]["head"]["kernel"]
    assert np.array_equal(head, tensors["linear.weight"].T)
    logits = jax.eval_shape(model.apply, variables, jnp.zeros((2, 32, 32, 3)))
    assert logits.shape == (2, 10)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: b"", "of 0 bytes is not"),
        (lambda: b"not a tensor file at all", "of 24 bytes is not"),
        (lambda: safetensors.numpy.save(_resnet_tensors())[:-5], "bytes is not"),
        (lambda: safetensors.numpy.save(_resnet_tensors(32)), "ResNet-20 has 97"),
        (
            lambda: safetensors.numpy.save(
                {**_resnet_tensors(), "linear.bias": np.full(10, np.inf, np.float32)}
            ),
            "10 of the 10 in params/head/bias .* are not",
        ),
    ],
    ids=["empty", "foreign", "cut", "another network", "infinite"],
)
def test_a_broken_resnet_file_is_refused_in_one_line(make, message, tmp_path):
    path = tmp_path / "resnet.safetensors"
    path.write_bytes(make())
    with pytest.raises(ValueError, match=message) as error:
        load_resnet20(path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("load", [load_resnet20, load_stories260k])
def test_a_missing_file_is_named(load, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"No weights file .*none\.bin"):
        load(tmp_path / "none.bin")
    with pytest.raises(FileNotFoundError, match="No weights file"):
        load(tmp_path)


def test_without_safetensors_the_error_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(ImportError, match=r"pip install jaxeff\[export\]"):
        load_resnet20(tmp_path / "resnet.safetensors")


STORY = (
    "Once upon a time, there was a little girl named Lily. She loved to play "
    "outside in the park. One day, she saw a big, red ball. She wanted to play "
    "with it, but it was too high."
)


def test_stories260k_tells_the_documented_story(data_dir):
    folder = data_dir("stories260k")
    model, variables = load_stories260k(folder / "stories260K.bin", scan=True)
    tokenizer = Tokenizer.load(folder / "tok512.bin")
    prompt = jnp.array([[BOS]])
    steps = len(tokenizer.encode(STORY)) - 1
    cache = init_cache(model.config, batch=1, length=steps)
    cached = jax.jit(greedy_cached, static_argnums=(0, 3))(
        model.apply, variables, prompt, steps, cache
    )
    assert tokenizer.decode(cached[0]) == STORY
    # The story was made of the tokens that encoding it gives.
    assert cached[0].tolist() == tokenizer.encode(STORY)
    whole = jax.jit(greedy, static_argnums=(0, 3))(
        model.apply, variables, prompt, steps
    )
    assert jnp.array_equal(whole, cached)


@pytest.mark.slow
def test_resnet20_is_right_on_9173_of_the_10000_test_images(data_dir):
    weights = data_dir("resnet20_cifar10") / "resnet20.safetensors"
    with lzma.open(data_dir("cifar10") / "test_batch.bin.xz") as file:
        records = np.frombuffer(file.read(), np.uint8).reshape(-1, 3073)
    model, variables = load_resnet20(weights)

    @jax.jit
    def right(records):
        x = records[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1) / 255
        mean = jnp.array([0.485, 0.456, 0.406])[None, None, None]
        std = jnp.array([0.229, 0.224, 0.225])[None, None, None]
        logits = model.apply(variables, (x - mean) / std)
        return jnp.sum(jnp.argmax(logits, axis=-1) == records[:, 0])

    batches = np.split(records, 20)
    assert sum(int(right(jnp.asarray(batch))) for batch in batches) == 9173
