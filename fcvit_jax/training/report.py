"""What is measured of a minimum's flatness, and the report of it: as JSON to keep, as a table to read."""

import dataclasses
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fcvit_jax.errors import InputError
from fcvit_jax.training.hessian import Eigenpair, standard_error
from fcvit_jax.training.targets import LOSSES

FORMAT = 1
EIGEN = ("lanczos", "power")


def _field(default: Any, explained: str) -> Any:
    return dataclasses.field(default=default, metadata={"help": explained})


@dataclasses.dataclass(frozen=True)
class FlatnessConfig:
    """What is measured, and how. Raises InputError that names the field.

    Of no use are radii and noise that change nothing, or leave nothing of the model: with the right ones the loss rises
    from a little to about that of guessing.
    """

    limit: int = _field(160, "images, drawn at random with the seed; what does not fill a batch is left out")
    batch_size: int = _field(16, "m: sharpness is that of the loss of m images, averaged over such batches")
    seed: int = _field(0, "of the images, the noise, the probes and the directions")
    loss: str = _field("softmax", "cross-entropy against the labels alone: softmax, or sigmoid summed over classes")
    rho: tuple[float, ...] = _field((0.05, 0.2, 0.5), "worst case: radii of the perturbation")
    adaptive_rho: tuple[float, ...] = _field((0.2, 0.5, 1.0), "worst case: radii of the perturbation over |w|")
    epsilon: tuple[float, ...] = _field((1e-3, 5e-3), "Keskar's boxes: each weight moves by epsilon (|w| + 1) at most")
    ascent_steps: int = _field(5, "worst case: points of an ascent; 1 is SAM's own step")
    restarts: int = _field(0, "worst case: further ascents, from random points")
    sigma: tuple[float, ...] = _field((0.01, 0.02, 0.05), "average case: standard deviations of the noise")
    adaptive_sigma: tuple[float, ...] = _field((0.1, 0.2, 0.5), "average case: of the noise over |w|")
    draws: int = _field(8, "average case: pairs of opposite noise")
    eigen: str = _field("lanczos", "lanczos: both ends, a copy of the parameters a step; power: the largest in size")
    eigen_steps: int = _field(14, "eigenvalues: steps at most")
    tolerance: float = _field(0.05, "eigenvalues: found if the residual is at most this share of the value")
    probes: int = _field(8, "trace: random vectors")
    line_points: int = _field(21, "loss along a random line, from -1 to 1 filter norms; 0: none")
    plane_points: int = _field(7, "loss over a random plane, points to each side; 0: none")

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            name, value = field.name, getattr(self, field.name)
            if field.type is int:
                lowest = 0 if name in ("seed", "restarts", "line_points", "plane_points") else 1
                if type(value) is not int or value < lowest:
                    raise InputError(f"{name} is {value!r}: it must be a whole number, {lowest} or more")
            elif field.type is not str:
                values = value if isinstance(value, list | tuple) else (value,)
                if not values or not all(type(x) in (int, float) and 0 < x < math.inf for x in values):
                    raise InputError(f"{name} is {value!r}: it must be above 0")
                if list(values) != sorted(set(values)):
                    raise InputError(f"{name} is {value!r}: the numbers must rise")
                if field.type is not float:  # a list, as JSON has it, would not hash
                    object.__setattr__(self, name, tuple(map(float, values)))
        for name, choices in (("loss", LOSSES), ("eigen", EIGEN)):
            if getattr(self, name) not in choices:
                raise InputError(f"{name} is {getattr(self, name)!r}: choose one of {', '.join(choices)}")


@dataclasses.dataclass(frozen=True)
class Curve:
    """A measure at several radii. samples: float64 [radii, draws, batches]; the mean over the last two is the value."""

    radii: tuple[float, ...]
    samples: np.ndarray


@dataclasses.dataclass(frozen=True)
class FlatnessReport:
    """What `flatness.measure` found.

    conditions: JSON-able facts on parameters, data and software; "fingerprint" is the sha256 of the batches.
    losses, accuracies: float64 [batches], at the parameters. gradient_norm: of the mean loss.
    resolution: what float32's rounding alone makes of a rise; see `sharpness.resolution`.
    eigenvalues: "largest" and "smallest", or "dominant" of power iteration; without their vectors.
    trace: float64 [probes, batches].
    curves: "worst", "worst_adaptive" (the largest rise found), "one_step", "one_step_adaptive" (the rise at SAM's
      point), "keskar" (percent), "average", "average_adaptive".
    line: float64 [points]; plane: [points, points], the first direction along the rows; None where not measured.
    """

    conditions: dict[str, Any]
    config: FlatnessConfig
    num_params: int
    weight_norm: float
    gradient_norm: float
    resolution: float
    losses: np.ndarray
    accuracies: np.ndarray
    eigenvalues: dict[str, Eigenpair]
    trace: np.ndarray
    curves: dict[str, Curve]
    line: np.ndarray | None
    plane: np.ndarray | None

    @property
    def loss(self) -> float:
        return float(self.losses.mean())

    def write(self, path: Path) -> None:
        """Write it as JSON, whole or not at all."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        fields["config"] = dataclasses.asdict(self.config)
        fields["eigenvalues"] = {name: pair._asdict() for name, pair in self.eigenvalues.items()}
        fields["curves"] = {name: dataclasses.asdict(curve) for name, curve in self.curves.items()}
        text = json.dumps({"format": FORMAT, **fields}, default=np.ndarray.tolist, allow_nan=False)
        partial = path.with_name(f".{path.name}.partial")
        partial.write_text(text + "\n")
        partial.replace(path)

    @classmethod
    def read(cls, path: Path) -> "FlatnessReport":
        """The report of such a file. Raises InputError, naming it, where it is none."""
        try:
            fields = json.loads(path.read_text())
            if fields.pop("format") != FORMAT:
                raise ValueError("another format")
            for name in ("losses", "accuracies", "trace", "line", "plane"):
                fields[name] = None if fields[name] is None else np.array(fields[name])
            for pair in fields["eigenvalues"].values():
                pair["samples"] = np.array(pair["samples"])
            fields["eigenvalues"] = {name: Eigenpair(**pair) for name, pair in fields["eigenvalues"].items()}
            fields["curves"] = {
                name: Curve(tuple(curve["radii"]), np.array(curve["samples"]))
                for name, curve in fields["curves"].items()
            }
            return cls(**fields | {"config": FlatnessConfig(**fields["config"])})
        except OSError as error:
            raise InputError(f"{path} cannot be read: {error.strerror}") from None
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            why = f"{type(error).__name__} {error}"
            raise InputError(f"{path} is no flatness.json of this version ({why}): measure again") from None


def describe(report: FlatnessReport) -> str:
    """What was measured on what, and all that is not a measure at a radius; a few lines."""
    config, conditions = report.config, report.conditions
    batches = len(report.losses)
    lines = [
        f"{conditions.get('checkpoint', 'parameters')} on {conditions.get('dataset', 'given batches')}: "
        f"{batches * config.batch_size:,} images in batches of {config.batch_size}, "
        f"schedule {conditions.get('schedule', '-')}, float32",
        f"loss {report.loss:.4g}, accuracy {report.accuracies.mean():.2%}, norm of the gradient "
        f"{report.gradient_norm:.3g}, of the {report.num_params:,} weights {report.weight_norm:.4g}",
    ]
    for name, pair in report.eigenvalues.items():
        state = "" if pair.converged else ", not converged: raise --eigen_steps"
        lines.append(
            f"{name} eigenvalue of the Hessian {pair.value:.4g} (residual {pair.residual:.2g}, {pair.products} "
            f"products{state})"
        )
    error = standard_error(report.trace)
    lines.append(f"trace {report.trace.mean():.4g} (standard error {error:.2g}, {len(report.trace)} probes)")
    return "\n".join(lines)


def align(rows: Sequence[Sequence[str]]) -> str:
    """Rows of cells as a table: the first row is the head; the first column stands left, the others right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(f"{cell:<{width}}" if not i else f"{cell:>{width}}" for i, (cell, width) in enumerate(pairs)).rstrip()
        for pairs in (list(zip(row, widths, strict=True)) for row in rows)
    ]
    return "\n".join([lines[0], "-" * max(map(len, lines)), *lines[1:]])
