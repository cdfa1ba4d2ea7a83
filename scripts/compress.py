"""Train a model, compress it in several ways, and show what each costs and saves.

    python scripts/compress.py
    python scripts/compress.py --data cifar10 --data-dir DIR --load resnet20.safetensors

Makes the dense model, then: shrunk (half of the channels, fine-tuned), shrunk and
distilled, low-rank, int8, int4, and the chain (shrunk, distilled, int8). Prints a
table and writes to `--output`: `report.html`, its plot as `plot.svg`, `results.json`,
and each model as a checkpoint that `jaxeff.training.load_model` reads. `--resume`
continues a run that was stopped.
"""

import dataclasses
import functools
import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import jax.random as jr
import optax
from flax import linen as nn
from flax.errors import FlaxError
from rich.console import Console

from jaxeff import cost, data, models, parallelism
from jaxeff.distillation import response_loss, taught
from jaxeff.lowrank import energy, factorize
from jaxeff.program import is_original, like
from jaxeff.pruning import shrink_in_rounds
from jaxeff.quantization import int4, int8, quantize, w8a8
from jaxeff.training import (
    accuracy,
    Checkpoints,
    classification_loss,
    classifier,
    fit,
    forms,
    init_state,
    load_meta,
    load_model,
    make_train_step,
    save_model,
)
from jaxeff.training.cli import check_same_options, join_processes, main
from jaxeff.training.report import plot_svg, write_report
from jaxeff.training.results import about, write_json

# How the trained ResNet-20 wants its input: the usual statistics of ImageNet.
RESNET20_INPUT = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is trained, and for how long."""

    model: str
    epochs: int
    finetune_epochs: int
    batch_size: int


# What suits each data set on two CPU cores.
DEFAULTS = {
    "digits": Plan("cnn", 20, 60, 64),
    "fashion_mnist": Plan("cnn", 3, 2, 128),
    "cifar10": Plan("resnet20", 30, 5, 128),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Train a model, compress it in several ways, show what each costs and saves."""

    data: Literal["digits", "fashion_mnist", "cifar10"] = "digits"
    """Data set; digits are part of the package."""
    data_dir: Path | None = None
    """Folder with the files of the data set."""
    model: models.ImageModel | None = None
    """Model to train; by default one that suits the data."""
    load: Path | None = None
    """Start from this trained model instead: the dense checkpoint of an earlier run
    (a folder), or the ResNet-20 for CIFAR-10 as .safetensors (extra `export`)."""
    output: Path = Path("runs/compress")
    """Folder for the report, the results and the models."""
    resume: bool = False
    """Continue the run in --output, made with the same options."""
    epochs: int | None = None
    """Passes over the data to train the dense model."""
    finetune_epochs: int | None = None
    """Passes over the data after shrinking; half as many after factorising."""
    batch_size: int | None = None
    """Images per training step, over all devices."""
    learning_rate: float = 3e-3
    """Of AdamW for the dense model, at its peak."""
    finetune_learning_rate: float = 2e-3
    """Of AdamW when fine-tuning, at its peak."""
    keep: float = 0.5
    """Fraction of each coupling's channels that stay, in (0, 1)."""
    rounds: int = 1
    """Shrink a little and fine-tune so often, instead of once."""
    retained_energy: float = 0.7
    """Fraction of each kernel's squared singular values that low-rank keeps."""
    temperature: float = 4.0
    """Of distillation: above 1 the teacher's answers are softer."""
    latency_batch: int = 32
    """Images per call when latency and energy are measured."""
    usd_per_hour: float = 0.10
    """Price of this machine, in US dollars per hour."""
    place: str = "world"
    """Whose electricity is counted: a country by its name or ISO code of three letters
    (France, FRA), a Google Cloud region (gcp/europe-west9), or world."""
    seed: int = 0
    """Of the weights, the shuffles and the augmentation."""

    def plan(self) -> Plan:
        """What was said, and what suits the data where nothing was."""
        said = {f.name: getattr(self, f.name) for f in dataclasses.fields(Plan)}
        said = {k: v for k, v in said.items() if v is not None}
        return dataclasses.replace(DEFAULTS[self.data], **said)


@dataclasses.dataclass(frozen=True)
class Version:
    """One version of the model."""

    name: str
    fn: Callable
    params: Any
    train_seconds: float = 0.0


class Run:
    """The state of one run of this script: its options, its data, its folder."""

    def __init__(self, config: Config):
        self.config, self.plan = config, config.plan()
        file = config.load
        if file is not None and file.suffix != ".safetensors":
            file = None
        trained = None
        if file is not None:
            if config.model is not None:
                raise ValueError(
                    f"a .safetensors file is a ResNet-20, but --model is "
                    f"{config.model}. Leave --model out."
                )
            if config.data != "cifar10":
                raise ValueError(
                    f"a .safetensors file is a ResNet-20 for cifar10, but --data is "
                    f"{config.data}. Pass --data cifar10 with its --data-dir."
                )
            trained = models.load_resnet20(file)
        norm = {} if file is None else RESNET20_INPUT
        if config.load is not None and file is None:
            # A model is asked what it was trained on, and how that was normalised.
            norm = _dense_meta(config.load).get("input", {})
        self.train, self.test = data.load(config.data, config.data_dir, **norm)
        self.input = {"mean": self.train.mean, "std": self.train.std}
        self.example = jnp.asarray(self.train.images[:1])
        self.mesh = parallelism.make_mesh()
        self.sharding = parallelism.batch_sharding(self.mesh, self.plan.batch_size)
        # Raises where there are too few images for a batch.
        data.batches(self.train, self.plan.batch_size)
        self.console = Console()
        self.loaded: Version | None = None
        model, self.variables = trained or self._untrained()
        self.eval_fn, self.train_fn = forms(model, self.variables)
        if file is not None:
            self.loaded = Version("dense", self.eval_fn, self.variables)
        elif config.load is not None:
            fn, params, meta = load_model(config.load, self.eval_fn, self.variables)
            seconds = meta.get("train_seconds", 0.0)
            self.loaded = Version("dense", fn, params, seconds)
        if self.loaded is not None:
            self._check_answers(self.loaded)

    def _untrained(self) -> tuple[nn.Module, Any]:
        model = models.build(self.plan.model, classes=len(self.train.classes))
        return model, model.init(jr.key(self.config.seed), self.example)

    def _check_answers(self, v: Version) -> None:
        """Refuses a loaded model that is not one for these images."""
        shape, classes = self.example.shape[1:], len(self.train.classes)
        try:
            logits = jax.eval_shape(v.fn, v.params, self.example).shape
        except (FlaxError, TypeError):
            logits = None
        if logits != (1, classes):
            raise ValueError(
                f"a model for {self.config.data} takes images of shape {shape} and "
                f"gives {classes} logits, but {self.config.load} "
                f"{'does not take them' if logits is None else f'gives {logits[1:]}'}. "
                "Choose the --data it was trained on."
            )

    def path(self, *parts: str) -> Path:
        """A path in the output folder."""
        return self.config.output.joinpath(*parts)

    def accuracy(self, v: Version) -> float:
        """On all test images."""
        return accuracy(v.fn, v.params, self.test, 500)

    def fit(
        self,
        name: str,
        params: Any,
        train_fn: Callable,
        *,
        epochs: float,
        learning_rate: float,
        teacher: Version | None = None,
    ) -> tuple[Any, float]:
        """Trains, or goes on from the last checkpoint.

        Returns:
            The weights, and the seconds of all steps; of a run that was resumed those
            of its last part, in proportion.
        """
        config, batch_size = self.config, self.plan.batch_size
        began = time.perf_counter()
        per_epoch = data.steps_per_epoch(self.train, batch_size)
        steps = max(1, round(epochs * per_epoch))
        schedule = optax.warmup_cosine_decay_schedule(
            0.0, learning_rate, max(1, steps // 20), max(2, steps)
        )
        tx = optax.adamw(schedule, weight_decay=1e-3)
        state = init_state(params, tx, jr.key(config.seed), trainable="params/**")
        state = parallelism.replicate(state, self.mesh)
        forward = classifier(train_fn, augment=self.augment)
        if teacher is None:
            loss = classification_loss(train_fn, augment=self.augment)
            step = make_train_step(loss, tx, trainable="params/**")
        else:
            loss = response_loss(forward, teacher.fn, temperature=config.temperature)
            step = make_train_step(loss, tx, trainable="params/**")
            step = taught(step, parallelism.replicate(teacher.params, self.mesh))
        self.console.print(f"[bold]{name}[/bold]: {steps} steps of {batch_size}")
        with Checkpoints(self.path("steps", _slug(name)), keep=1) as checkpoints:
            if checkpoints.latest() is not None:
                state = checkpoints.restore(state)
            first = int(state.step)
            batches = data.batches(
                self.train, batch_size, seed=config.seed, start_step=first
            )
            state = fit(
                step,
                state,
                data.prefetch(batches, self.sharding),
                steps=steps,
                checkpoint=checkpoints,
                checkpoint_every=max(1, steps // 4),
            )
        seconds = time.perf_counter() - began
        return state.params, seconds * steps / max(1, steps - first)

    @functools.cached_property
    def augment(self) -> Callable | None:
        """Shifts and mirror images, where they are still the same thing."""
        return data.augmentation(self.train)

    def version(self, name: str, make: Callable[[], Version]) -> Version:
        """Makes a version and saves it; reads it back if the run is resumed."""
        folder = self.path("models", _slug(name))
        if folder.exists():
            fn, params, meta = load_model(folder, self.eval_fn, self.variables)
            self.console.print(f"[bold]{name}[/bold]: from {folder}")
            return Version(name, fn, params, meta["train_seconds"])
        made = make()
        meta = {
            "name": name,
            "train_seconds": made.train_seconds,
            "input": self.input,
        }
        save_model(folder, made.fn, made.params, meta)
        return made

    def dense(self) -> Version:
        """The model to be compressed: loaded, or trained here."""

        def make() -> Version:
            if self.loaded is not None:
                return self.loaded
            params, seconds = self.fit(
                "dense",
                self.variables,
                self.train_fn,
                epochs=self.plan.epochs,
                learning_rate=self.config.learning_rate,
            )
            return Version("dense", self.eval_fn, params, seconds)

        return self.version("dense", make)


def _dense_meta(folder: Path) -> dict[str, Any]:
    """What a dense model was saved with; refuses one that was compressed."""
    about = load_meta(folder)
    if not is_original(about.get("compression", {"rewrites": [], "weights": {}})):
        raise ValueError(
            f"this compresses a dense model, but {folder} holds one that was "
            "compressed already. --load the dense one of that run, models/dense."
        )
    return about.get("user", {})


def _slug(name: str) -> str:
    return (
        "".join(c if c.isalnum() else "-" for c in name).strip("-").replace("--", "-")
    )


def compress(run: Run) -> list[Version]:
    """The dense model and every compressed version of it."""
    config, x = run.config, run.example
    dense = run.dense()
    fn, params = dense.fn, dense.params

    def shrunk_by(name: str, distilled: bool) -> Version:
        seconds = 0.0

        def finetune(n: int, small_fn: Callable, small: Any) -> Any:
            nonlocal seconds
            small, more = run.fit(
                name if config.rounds == 1 else f"{name}, round {n + 1}",
                small,
                like(small_fn, run.train_fn),
                teacher=dense if distilled else None,
                epochs=run.plan.finetune_epochs / config.rounds,
                learning_rate=config.finetune_learning_rate,
            )
            seconds += more
            return small

        options = {"keep": config.keep, "rounds": config.rounds}
        small_fn, small = shrink_in_rounds(fn, params, x, finetune=finetune, **options)
        return Version(name, small_fn, small, seconds)

    def low_rank(name: str) -> Version:
        ranks = {"params/**/kernel": energy(config.retained_energy)}
        low_fn, low = factorize(fn, params, x, ranks=ranks)
        low, seconds = run.fit(
            name,
            low,
            like(low_fn, run.train_fn),
            epochs=run.plan.finetune_epochs / 2,
            learning_rate=config.finetune_learning_rate / 4,
        )
        return Version(name, low_fn, low, seconds)

    def quantized(name: str, of: Version, format: Any) -> Version:
        q_fn, q = quantize(of.fn, of.params, x, formats={"params/**/kernel": format})
        return Version(name, q_fn, q, of.train_seconds)

    shrunk = run.version("shrunk", lambda: shrunk_by("shrunk", False))
    distilled = run.version(
        "shrunk + distilled", lambda: shrunk_by("shrunk + distilled", True)
    )
    return [
        dense,
        shrunk,
        distilled,
        run.version("low-rank", lambda: low_rank("low-rank")),
        run.version("int8 (w8a8)", lambda: quantized("int8 (w8a8)", dense, w8a8)),
        run.version("int4", lambda: quantized("int4", dense, int4)),
        run.version("chain", lambda: quantized("chain", distilled, int8)),
    ]


def measure(
    run: Run, versions: list[Version]
) -> tuple[list[cost.Profile], list[dict[str, Any]]]:
    """All costs, measured interleaved; and a row of figures for each version."""
    config = run.config
    batch = jnp.asarray(run.test.images[: config.latency_batch])
    run.console.print("[bold]measuring[/bold] latency and energy, interleaved")
    profiles = cost.compare(
        {v.name: (v.fn, v.params) for v in versions},
        (batch,),
        examples=len(batch),
        max_seconds=60,
        progress=run.console.is_terminal,
    )
    rows = []
    for v, profile in zip(versions, profiles, strict=True):
        row = profile.row(usd_per_hour=config.usd_per_hour, place=config.place)
        row |= {
            "accuracy": run.accuracy(v),
            "train_seconds": v.train_seconds,
            "checkpoint": f"models/{_slug(v.name)}",
        }
        rows.append(row)
    return profiles, rows


def results(
    run: Run, versions: list[Version], rows: list[dict[str, Any]]
) -> dict[str, Any]:
    """Everything the run found, as plain data."""
    config, x = run.config, run.example
    machine, intensity = about(), cost.intensity(config.place)
    return {
        "title": f"{run.plan.model}, compressed ({config.data})",
        "date": machine["date"],
        "device": f"{machine['devices']} x {machine['device']} "
        f"({machine['processor']}, {machine['cores']} cores)",
        "versions": machine["versions"],
        "data": {
            "name": config.data,
            "train": len(run.train),
            "test": len(run.test),
        },
        "options": json.loads(_json(_identity(config))),
        "rows": rows,
        "layers": {
            v.name: cost.layer_costs(v.fn, v.params, x)
            for v in (versions[0], versions[-1])
        },
        "methods": {
            "latency": rows[0]["latency_method"],
            "energy": rows[0]["energy_method"],
            "memory": rows[0]["memory_method"],
            "money": f"latency at {config.usd_per_hour} USD per hour of this machine",
            "carbon": f"energy at {intensity}",
        },
        "notes": [
            f"shrunk: {config.keep:.0%} of the channels of each coupling stay, "
            "fine-tuned. chain: shrunk, distilled from the dense model, then int8.",
            f"Latency is of one call with {config.latency_batch} images; energy, FLOPs "
            "and carbon are per image.",
        ],
    }


def _json(value: Any) -> str:
    return json.dumps(value, indent=1, default=str)


def prepare(config: Config) -> None:
    """Makes the folder of the run, unless the run is resumed."""
    if not config.resume:
        config.output.mkdir(parents=True, exist_ok=True)
        (config.output / "options.json").write_text(_json(_identity(config)))


def _check_folder(config: Config) -> None:
    marker = config.output / "options.json"
    if config.resume and not marker.exists():
        raise ValueError(
            f"--resume continues a run, but {config.output} holds none. Leave it out "
            "to start one."
        )
    if config.resume:
        now = json.loads(_json(_identity(config)))
        check_same_options(json.loads(marker.read_text()), now, config.output)
    if config.resume or not config.output.exists():
        return
    if not config.output.is_dir() or any(config.output.iterdir()):
        raise ValueError(
            f"a run starts in an empty folder, but {config.output} is not. Choose "
            "another --output, or go on with the run in it with --resume."
        )


def _identity(config: Config) -> dict[str, Any]:
    """The options that decide what a run computes."""
    options = dataclasses.asdict(config) | dataclasses.asdict(config.plan())
    return {k: v for k, v in options.items() if k not in ("resume", "output")}


def check(config: Config) -> None:
    """Refuses what can be seen to be wrong before anything is read."""
    if join_processes():
        raise ValueError(
            "this measures one machine, so it runs as one process, on all its "
            "devices. Train on several machines with scripts/train.py, then --load."
        )
    for name in ("keep", "retained_energy"):
        value = getattr(config, name)
        if not 0 < value < 1:
            raise ValueError(
                f"--{name.replace('_', '-')} is a fraction in (0, 1), got {value}. 0.5 "
                "is half."
            )
    counts = ("rounds", "epochs", "finetune_epochs", "batch_size", "latency_batch")
    amounts = ("learning_rate", "finetune_learning_rate", "temperature")
    for name in (*counts, *amounts, "usd_per_hour"):
        value = getattr(config, name)
        if value is not None and value <= 0:
            raise ValueError(
                f"--{name.replace('_', '-')} is above 0, got {value}. Leave it out for "
                "what suits the data."
            )
    if config.load is not None and not config.load.exists():
        raise ValueError(f"--load {config.load}: there is no such file or folder.")
    cost.intensity(config.place)
    _check_folder(config)


def run(config: Config) -> Mapping[str, Any]:
    """The whole run: check, read, train, compress, measure, write."""
    check(config)
    state = Run(config)
    prepare(config)
    versions = compress(state)
    profiles, rows = measure(state, versions)
    found = results(state, versions, rows)
    write_json(state.path("results.json"), found)
    state.path("plot.svg").write_text(plot_svg(found))
    write_report(state.path("report.html"), found)
    table = cost.comparison_table(
        profiles,
        title=found["title"],
        first={"accuracy": [f"{row['accuracy']:.2%}" for row in rows]},
        last={"USD per\nmillion": [f"{row['usd_per_million']:.2g}" for row in rows]},
    )
    state.console.print(table)
    state.console.print(f"Report: {state.path('report.html')}")
    return found


if __name__ == "__main__":
    main(run, Config)
