"""Trains any of the models on any of the data sets.

    python scripts/train.py --data digits --model cnn --steps 500
    python scripts/train.py --data fashion_mnist --data-dir DIR --model mlp --epochs 5
    python scripts/train.py --data text --data-dir DIR --model gpt --steps 500 \\
        --sequence 64 --batch-size 32 --learning-rate 0.002

On two CPU cores that other work was using too: 98.6 % of the test images in 38 s;
86.6 % in 19 s; 2.05 nats per byte of unseen Shakespeare in 203 s.

A run is a folder, --output: `checkpoints` (the last three; a run that was killed goes
on from there with --resume, bit for bit), `metrics.jsonl`, `config.json`, and at the
end `model`, which `jaxeff.training.load_model` reads. Every device of every process
takes its part of each batch; with --fsdp and --tensor they share the weights too, and
what to split is found from the model.
"""

import ast
import dataclasses
import functools
import json
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import jax
import jax.random as jr
import numpy as np
import optax
from flax import linen as nn
from jax.sharding import Mesh, Sharding

from jaxeff.cost import count_parameters
from jaxeff.data import augmentation, batches, load, prefetch, text, windows
from jaxeff.models import (
    build,
    IMAGE_MODELS,
    ImageModel,
    LANGUAGE_MODELS,
    LanguageModel,
    options_of,
)
from jaxeff.parallelism import (
    average,
    batch_sharding,
    batch_share,
    fully_shard,
    make_mesh,
    replicate_rest,
    shard,
    zero,
)
from jaxeff.precision import autocast, DynamicLossScale
from jaxeff.training import (
    accuracy,
    Checkpoints,
    classification_loss,
    fit,
    forms,
    init_state,
    make_train_step,
    Metrics,
    save_model,
    saved_steps,
    TrainState,
)
from jaxeff.training.asynchronous import Asynchronous, Problem
from jaxeff.training.cli import (
    check_same_options,
    join_processes,
    main,
    option_name,
)
from jaxeff.training.language import language_loss, nats_per_token
from jaxeff.training.metrics import check_events
from jaxeff.training.results import write_json
from jaxeff.training.server import gradient

# What may differ when a run goes on; the other options are what the run is.
MAY_CHANGE = {"data_dir", "steps", "epochs", "output", "resume", "tensorboard"} | {
    "checkpoint_every",
    "log_every",
    "eval_every",
    "timeout",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """A run; every option has a default."""

    model: ImageModel | LanguageModel = "cnn"
    """gpt and llama take text, the others images."""
    sizes: tuple[str, ...] = ()
    """Options of the model as name=value, such as d_model=512 n_layers=8."""
    data: Literal["digits", "fashion_mnist", "cifar10", "text"] = "digits"
    """Digits are part of the package, the others are read from --data-dir."""
    data_dir: Path | None = None
    """Folder of the data set's files; for text a file, or a folder with one *.txt."""
    steps: int = 1000
    """Updates of the weights in the whole run, those before --resume included."""
    epochs: int | None = None
    """Passes over the training images, in place of --steps."""
    batch_size: int = 128
    """Examples per step, over all devices together."""
    accumulate: int = 1
    """Parts of each device's share of a batch that are computed one after another, for
    less memory; the devices add up once. Statistics of a batch are those of a part."""
    fsdp: int = 1
    """Devices that share the batch and keep a part of every weight each."""
    tensor: int = 1
    """Devices that share each layer; as many as are left over share the batch."""
    zero: bool = False
    """The devices that share the batch keep a part of the optimizer's state each."""
    sequence: int = 128
    """Bytes of text per example."""
    learning_rate: float = 1e-3
    """Of AdamW, per step, at its highest: after the first 5 % of the steps, from where
    it falls to 0 as a cosine."""
    weight_decay: float = 0.01
    """Of AdamW, per step and unit of learning rate."""
    clip: float = 1.0
    """Largest norm of all gradients together."""
    augment: bool = True
    """Shift and mirror images where that keeps their class (not digits)."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Of the products; weights stay float32, and float16 scales the loss."""
    seed: int = 0
    """Of the first weights, the order of the data and the augmentation."""
    output: Path = Path("runs/train")
    """Folder of the run."""
    resume: bool = False
    """Go on from the last checkpoint in --output, if there is one."""
    checkpoint_every: int = 500
    """Steps between two checkpoints; one is made at the end in any case."""
    log_every: int = 50
    """Steps between two lines of metrics.jsonl."""
    eval_every: int | None = None
    """Steps between two evaluations; one is made at the end in any case."""
    timeout: float = 600
    """Seconds without a finished step after which a process of several ends, as another
    is stuck or gone; with --workers, seconds that each may take for a batch. The first
    may take ten times as long."""
    workers: int = 0
    """Asynchronous: so many processes take whole batches by themselves, on Ray; 0 is
    synchronous, all devices in each step."""
    staleness: int | None = None
    """Most updates that a gradient of a worker may be behind; twice the workers."""
    tensorboard: bool = False
    """Write TensorBoard events too, into --output/tensorboard."""


@dataclasses.dataclass(frozen=True)
class Task:
    """What the data ask of a run."""

    about: str  # in words
    example: np.ndarray  # what the model takes, one of it
    answers: int  # classes, or tokens: how many there are
    steps_per_epoch: int | None
    batches: Callable[[int], Iterator[Any]]  # from a step on
    loss: Callable[[Callable], Callable]  # of the model as trained
    evaluate: Callable[[Callable, Any], Mapping[str, float]]  # of fn and params


@dataclasses.dataclass(frozen=True)
class Share:
    """What this process loads of each batch, and where the examples go."""

    index: int = 0
    count: int = 1
    to: Sharding | None = None

    @property
    def part(self) -> dict[str, int]:
        """As the functions of data take it."""
        return {"process_index": self.index, "process_count": self.count}


def images(c: Config, share: Share) -> Task:
    """Classification, judged by accuracy on the test images."""
    train, test = load(c.data, c.data_dir)
    options = {"seed": c.seed, **share.part}
    change = augmentation(train) if c.augment else None
    return Task(
        about=f"{c.data} ({len(train):,} training and {len(test):,} test images)",
        example=train.images[:1],
        answers=len(train.classes),
        steps_per_epoch=max(1, len(train) // c.batch_size),
        batches=lambda n: batches(train, c.batch_size, start_step=n, **options),
        loss=lambda fn: classification_loss(fn, augment=change),
        evaluate=lambda fn, params: {
            "test_accuracy": accuracy(fn, params, test, c.batch_size, to=share.to)
        },
    )


def language(c: Config, share: Share) -> Task:
    """Prediction of the next byte, judged by nats per byte of unseen text."""
    path = text_file(c.data_dir)
    train, unseen = text(path)
    options = {"seed": c.seed, **share.part}
    draw = functools.partial(windows, train, c.batch_size, c.sequence, **options)
    if len(unseen) <= c.sequence:
        raise ValueError(
            f"the last tenth of a text is kept for evaluation and holds at least "
            f"sequence + 1 = {c.sequence + 1} bytes, but that of {path} has "
            f"{len(unseen)}. Choose a shorter --sequence or a longer text."
        )
    return Task(
        about=f"{path} ({len(train):,} bytes to train on and {len(unseen):,} unseen)",
        example=np.zeros((1, c.sequence), np.int32),
        answers=1 + int(max(train.max(), unseen.max())),
        steps_per_epoch=None,
        batches=lambda step: draw(start_step=step),
        loss=language_loss,
        evaluate=lambda fn, params: {
            "unseen_nats_per_byte": nats_per_token(
                fn, params, unseen, c.sequence, c.batch_size, to=share.to
            )
        },
    )


def text_file(path: Path | None) -> Path:
    """The text: the file given, or the only one in the folder given."""
    if path is None:
        raise ValueError("text is not part of the package: name it with --data-dir.")
    if not path.is_dir():
        return path
    found = sorted(p for end in ("", ".gz", ".xz") for p in path.glob(f"*.txt{end}"))
    if len(found) != 1:
        raise ValueError(
            f"a folder of text holds one *.txt (plain, .gz or .xz), but {path} has "
            f"{len(found)}: {', '.join(p.name for p in found) or 'none'}. Name the "
            "file itself with --data-dir."
        )
    return found[0]


def make_model(c: Config) -> nn.Module:
    """The model by its name and sizes."""
    fit_for = LANGUAGE_MODELS if c.data == "text" else IMAGE_MODELS
    if c.model not in fit_for:
        raise ValueError(
            f"--model {c.model} does not take --data {c.data}. Choose one of "
            f"{', '.join(fit_for)}, or other data."
        )
    options: dict[str, Any] = {}
    if "max_len" in options_of(c.model):  # it learns a position for each token
        options["max_len"] = max(c.sequence, 256)
    return build(c.model, **options | sizes(c.sizes))


def sizes(given: tuple[str, ...]) -> dict[str, Any]:
    """`("d_model=512",)` as `{"d_model": 512}`."""
    found = {}
    for item in given:
        name, _, value = item.partition("=")
        try:
            found[name] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            raise ValueError(
                f"--sizes takes name=value with a number, a tuple, True or False, got "
                f"{item!r}. Write it as in d_model=512."
            ) from None
    return found


def check_answers(fn: Callable, variables: Any, task: Task) -> None:
    """Refuses a model with fewer logits than there are classes or tokens."""
    logits = jax.eval_shape(fn, variables, task.example).shape[-1]
    if logits < task.answers:
        raise ValueError(
            f"a model has a logit for every class or token, but this one has {logits} "
            f"and the data {task.answers}. Leave vocab_size or classes out of --sizes, "
            f"or let it be {task.answers} at least."
        )


def optimizer(c: Config, steps: int) -> optax.GradientTransformation:
    """AdamW on clipped gradients; its rate rises, then falls as a cosine."""
    warmup = max(1, steps // 20)
    rate = optax.warmup_cosine_decay_schedule(
        c.learning_rate / warmup, c.learning_rate, warmup, max(steps, warmup + 1)
    )
    return optax.chain(
        optax.clip_by_global_norm(c.clip),
        optax.adamw(rate, weight_decay=c.weight_decay),
    )


def check_numbers(c: Config) -> None:
    """Refuses numbers that no run can have."""
    counts = ("steps", "epochs", "batch_size", "accumulate", "sequence")
    counts += ("fsdp", "tensor")
    intervals = ("checkpoint_every", "log_every", "eval_every")
    for name in (*counts, *intervals):
        if (value := getattr(c, name)) is not None and value < 1:
            raise ValueError(f"{option_name(name)} is 1 or more, got {value}.")
    for name in ("learning_rate", "clip", "timeout"):
        if not (value := getattr(c, name)) > 0:
            raise ValueError(f"{option_name(name)} is above 0, got {value}.")
    whole = c.fsdp == c.tensor == 1 and not c.zero
    if not whole and (c.workers or c.accumulate > 1):
        raise ValueError(
            "--workers and --accumulate are for devices that hold everything, but "
            f"--fsdp is {c.fsdp}, --tensor {c.tensor} and --zero {c.zero}. Leave one "
            "or the other out."
        )
    if c.workers < 0:
        raise ValueError(f"--workers is 0 or more, got {c.workers}.")
    alone = c.dtype != "float16" and c.eval_every is None and c.accumulate == 1
    if c.workers and not alone:
        raise ValueError(
            "with --workers nobody adjusts the loss scale of float16, the run is "
            "evaluated at its end, and each takes whole batches. Use bfloat16, no "
            "--eval-every, and a smaller --batch-size in place of --accumulate."
        )
    if c.staleness is not None and not c.workers:
        raise ValueError(
            f"--staleness bounds how far --workers drift apart, got {c.staleness} "
            "without them."
        )
    if c.staleness is not None and c.staleness < 0:
        raise ValueError(f"--staleness is 0 or more, got {c.staleness}.")
    if c.epochs is not None and c.data == "text":
        raise ValueError(
            f"a text has no epochs, its windows are drawn, but --epochs is {c.epochs}. "
            "Give --steps."
        )


def check_folder(c: Config) -> None:
    """Refuses a folder that holds a run, unless it is this one and to be resumed."""
    path, now = c.output / "config.json", as_json(c)
    if not saved_steps(c.output / "checkpoints"):
        return
    if not c.resume:
        raise ValueError(
            f"a new run needs a new folder, but {c.output} holds checkpoints. Go on "
            "from the last one with --resume, or name another folder with --output."
        )
    # The record of which batches were seen is as long as the run.
    fixed = {"steps", "epochs"} if c.workers else set()
    check_same_options(before_of(path), now, c.output, MAY_CHANGE - fixed)


def before_of(path: Path) -> dict[str, Any]:
    """The options a run began with, where its folder tells."""
    return json.loads(path.read_text()) if path.is_file() else {}


def as_json(c: Config) -> dict[str, Any]:
    """The options as JSON gives them back."""
    return json.loads(json.dumps(dataclasses.asdict(c), default=str))


def say_schedule(c: Config, first: int, steps: int) -> None:
    """Tells where more or fewer steps mean another learning rate from here on."""
    before = before_of(c.output / "config.json")
    if first and any(before.get(k) != getattr(c, k) for k in ("steps", "epochs")):
        print(
            f"the run began with other --steps or --epochs: from step {first} on its "
            f"learning rate is that of a run of {steps} steps"
        )


@dataclasses.dataclass(frozen=True)
class Made:
    """A run before its first step."""

    task: Task
    model: nn.Module
    eval_fn: Callable
    problem: Problem
    steps: int


def make(c: Config, share: Share) -> Made:
    """Everything from the options, the same in every process but for its share."""
    model = make_model(c)
    task = language(c, share) if c.data == "text" else images(c, share)
    steps = c.steps
    if c.epochs is not None and task.steps_per_epoch is not None:
        steps = c.epochs * task.steps_per_epoch
    # Initialised as one program: eagerly it is hundreds of small ones.
    variables = jax.jit(model.init)(jr.key(c.seed), task.example)
    eval_fn, train_fn = forms(model, variables)
    check_answers(eval_fn, variables, task)
    if c.dtype != "float32":
        eval_fn = autocast(eval_fn, c.dtype)
        train_fn = autocast(train_fn, c.dtype)
    problem = Problem(
        loss=task.loss(train_fn),
        tx=optimizer(c, steps),
        params=variables,
        batch=lambda n: next(task.batches(n)),
        key=jr.key(c.seed + 1),
        trainable="params/**",
    )
    return Made(task, model, eval_fn, problem, steps)


def problem_of(c: Config) -> Problem:
    """What a worker needs."""
    return make(c, Share()).problem


def run(c: Config) -> None:
    """The whole run."""
    began = time.monotonic()
    check_numbers(c)
    if c.tensorboard:
        check_events()
    check_folder(c)
    join_processes()
    if c.workers:
        made = make(c, Share())
        state = with_workers(c, made)
    else:
        mesh = make_mesh(fsdp=c.fsdp, tensor=c.tensor)
        share = Share(*batch_share(mesh), batch_sharding(mesh, c.batch_size))
        made = make(c, share)
        state = in_step(c, made, mesh)
    if state is None:
        return
    steps = made.steps
    about = {"model": c.model, "data": c.data, "sizes": sizes(c.sizes), "steps": steps}
    path = c.output / "model"
    save_model(path, made.model.apply, state.params, about, overwrite=True)
    if jax.process_index() == 0:
        print(f"{c.output}: {steps} steps, {time.monotonic() - began:.0f} s")


def begins(c: Config, made: Made, first: int, who: str) -> bool:
    """Says what begins, at which step; whether there is anything to do."""
    steps = made.steps
    if first > steps:
        raise ValueError(
            f"the run in {c.output} is at step {first}, past the {steps} steps "
            "asked for. Ask for more, or name another folder with --output."
        )
    done = first == steps and (c.output / "model").exists()
    if jax.process_index() != 0:
        return not done
    if done:
        print(
            f"{c.output}: nothing to do, its {steps} steps are done and its "
            "model is saved. Ask for more --steps to go on."
        )
        return False
    say_schedule(c, first, steps)
    write_json(c.output / "config.json", as_json(c))
    print(
        f"{c.model}, {count_parameters(made.problem.params['params']):,} parameters, "
        f"{c.dtype}; {made.task.about}; {who}; steps {first} to {steps}"
    )
    return True


def in_step(c: Config, made: Made, mesh: Mesh) -> TrainState | None:
    """Every device of every process takes its part of each batch."""
    p, to = made.problem, batch_sharding(mesh, c.batch_size)
    tx, apart = p.tx, None
    if c.accumulate > 1:
        tx, apart = optax.chain(average(devices=mesh.shape["data"]), tx), mesh
    scaler = DynamicLossScale() if c.dtype == "float16" else None
    _, processes = batch_share(mesh)
    whole = lambda x: jax.ShapeDtypeStruct((processes * len(x), *x.shape[1:]), x.dtype)
    batch = jax.tree.map(whole, p.batch(0))
    loss, params = shard(p.loss, p.params, batch, p.key, mesh=mesh)
    loss, params = fully_shard(loss, params, batch, p.key, mesh=mesh)
    if c.zero:
        tx = zero(tx, mesh=mesh)
    state = init_state(params, tx, p.key, trainable=p.trainable, scaler=scaler)
    state = replicate_rest(state, mesh)
    step = make_train_step(
        loss, tx, trainable=p.trainable, accumulate=c.accumulate, per_device=apart
    )
    # Whatever does not fit together shows here, before anything is written.
    jax.eval_shape(step, state, batch)
    with Checkpoints(c.output / "checkpoints") as checkpoints:
        if checkpoints.latest() is not None:
            state = checkpoints.restore(state)
        first = int(state.step)
        who = f"{jax.device_count()} device(s) of {jax.process_count()} process(es)"
        if not begins(c, made, first, who):
            return None
        with Metrics(c.output, start_step=first, tensorboard=c.tensorboard) as metrics:
            return fit(
                step,
                state,
                prefetch(made.task.batches(first), to),
                steps=made.steps,
                log_every=c.log_every,
                metrics=metrics,
                checkpoint=checkpoints,
                checkpoint_every=c.checkpoint_every,
                eval_fn=functools.partial(made.task.evaluate, made.eval_fn),
                eval_every=c.eval_every,
                timeout=c.timeout if jax.process_count() > 1 else None,
            )


def with_workers(c: Config, made: Made) -> TrainState | None:
    """Each of --workers processes takes whole batches, and none waits for another."""
    if jax.process_count() > 1:
        raise ValueError(
            f"--workers are processes of Ray, but this is a job of "
            f"{jax.process_count()}. Start it once."
        )
    p, folder = made.problem, c.output / "checkpoints"
    # Whatever does not fit together shows here, before anything is written.
    jax.eval_shape(gradient(p.loss, p.trainable), p.params, p.batch(0), p.key)
    first = max(saved_steps(folder), default=0)
    if not begins(c, made, first, f"{c.workers} worker(s), asynchronous"):
        return None
    with Metrics(c.output, start_step=first, tensorboard=c.tensorboard) as metrics:
        state = Asynchronous(
            functools.partial(problem_of, c),
            steps=made.steps,
            workers=c.workers,
            staleness=c.staleness,
            lease=c.timeout,
            folder=folder,
            checkpoint_every=c.checkpoint_every,
        ).wait(metrics=metrics, log_every=c.log_every)
        values = made.task.evaluate(made.eval_fn, state.params)
        metrics.write(made.steps, values)
    print("  ".join(f"{name} {value:.4g}" for name, value in values.items()))
    return state


if __name__ == "__main__":
    main(run, Config, description=__doc__)
