"""The measures of a minimum's flatness, and their report, stored as JSON."""

import copy
import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np

from fcvit_jax.errors import InputError
from fcvit_jax.files import write_whole
from fcvit_jax.flatness.hessian import Eigenpair
from fcvit_jax.losses import LOSSES
from fcvit_jax.settings import check_settings, setting

FORMAT = 1


def _radii(*default: float, help: str) -> Any:
    return setting(default, above=0, rising=True, help=help)


@dataclasses.dataclass(frozen=True)
class FlatnessConfig:
    """What to measure, and how. Radii and noise should let the loss rise from a little to about that of guessing."""

    limit: int = setting(160, low=1, help="images, drawn at random with the seed; an incomplete batch is left out")
    batch_size: int = setting(16, low=1, help="m: sharpness is that of the loss of m images, averaged over batches")
    seed: int = setting(0, low=0, help="of the images, the noise, the probes and the directions")
    loss: str = setting("softmax", choices=LOSSES, help="cross-entropy: softmax, or sigmoid summed over classes")
    rho: tuple[float, ...] = _radii(0.05, 0.2, 0.5, help="worst case: radii of the perturbation")
    adaptive_rho: tuple[float, ...] = _radii(0.2, 0.5, 1.0, help="worst case: radii of the perturbation over |w|")
    epsilon: tuple[float, ...] = _radii(1e-3, 5e-3, help="Keskar's boxes: each weight moves by epsilon (|w| + 1)")
    ascent_steps: int = setting(5, low=1, help="worst case: points of an ascent; 1 is SAM's own step")
    restarts: int = setting(0, low=0, help="worst case: further ascents, from random points")
    sigma: tuple[float, ...] = _radii(0.01, 0.02, 0.05, help="average case: standard deviations of the noise")
    adaptive_sigma: tuple[float, ...] = _radii(0.1, 0.2, 0.5, help="average case: of the noise over |w|")
    draws: int = setting(8, low=1, help="average case: pairs of opposite noise")
    eigen_steps: int = setting(14, low=1, help="eigenvalues: steps at most; each keeps a copy of the parameters")
    tolerance: float = setting(0.05, above=0, help="eigenvalues: found if the residual is at most this share of them")
    probes: int = setting(8, low=1, help="trace: random vectors")
    line_points: int = setting(21, low=0, help="loss along a random line, from -1 to 1 filter norms; 0: none")
    plane_points: int = setting(7, low=0, help="loss over a random plane, points to each side; 0: none")

    def __post_init__(self) -> None:
        check_settings(self)


@dataclasses.dataclass(frozen=True)
class RadiusCurve:
    """A measure at several radii. samples: float64 [radii, draws, batches]; the mean over the last two is the value."""

    radii: tuple[float, ...]
    samples: np.ndarray


@dataclasses.dataclass(frozen=True)
class FlatnessReport:
    """The result of `measure`; arrays are float64.

    curves: "worst", "worst_adaptive" (the largest rise found), "one_step", "one_step_adaptive" (the rise at SAM's
      point), "keskar" (percent), "average", "average_adaptive".
    """

    conditions: dict[str, Any]  # facts on parameters, data and software; "fingerprint": sha256 of the batches
    config: FlatnessConfig
    num_params: int
    weight_norm: float
    gradient_norm: float  # of the mean loss
    resolution: float  # how much of a rise is float32's rounding
    losses: np.ndarray  # [batches], at the parameters
    accuracies: np.ndarray  # [batches]
    eigenvalues: dict[str, Eigenpair]  # "largest" and "smallest", without their vectors
    trace: np.ndarray  # [probes, batches]
    curves: dict[str, RadiusCurve]
    line: np.ndarray | None  # [points]
    plane: np.ndarray | None  # [points, points], the first direction along the rows

    @property
    def loss(self) -> float:
        return float(self.losses.mean())

    def to_dict(self) -> dict[str, Any]:
        """Return what `from_dict` takes, of JSON's types."""
        fields = {"format": FORMAT, **dataclasses.asdict(self)}
        return json.loads(json.dumps(fields, default=np.ndarray.tolist, allow_nan=False))

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> "FlatnessReport":
        """Make a report from what `to_dict` returns. Raises ValueError, KeyError, TypeError or AttributeError."""
        fields = copy.deepcopy(fields)
        if fields.pop("format") != FORMAT:
            raise ValueError("another format")
        for name in ("losses", "accuracies", "trace", "line", "plane"):
            fields[name] = None if fields[name] is None else np.array(fields[name])
        pairs, curves = fields["eigenvalues"], fields["curves"]
        for each in (*pairs.values(), *curves.values()):
            each["samples"] = np.array(each["samples"])
        fields["eigenvalues"] = {name: Eigenpair(**pair) for name, pair in pairs.items()}
        fields["curves"] = {name: RadiusCurve(tuple(x["radii"]), x["samples"]) for name, x in curves.items()}
        fields["config"].pop("eigen", None)  # of earlier versions
        fields["config"] = FlatnessConfig(**fields["config"])
        return cls(**fields)

    def write(self, path: Path) -> None:
        """Write it as JSON."""
        write_whole(path, f"{json.dumps(self.to_dict())}\n".encode())

    @classmethod
    def read(cls, path: Path) -> "FlatnessReport":
        """Read a report's file. Raises InputError for any other file."""
        try:
            return cls.from_dict(json.loads(path.read_text()))
        except OSError as error:
            raise InputError(f"{path} cannot be read: {error.strerror}") from None
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            why = f"{type(error).__name__} {error}"
            raise InputError(f"{path} is not a flatness.json of this version ({why}): measure again") from None
