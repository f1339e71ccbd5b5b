"""Weights with all facts about them: the file, the meaning of its keys, the JSON beside it, the model's name."""

import hashlib
import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fcvit_jax.checkpoint import flat_params, load_checkpoint
from fcvit_jax.convert.downloads import locate, weight_file
from fcvit_jax.convert.geometry import Grid, infer_config
from fcvit_jax.convert.readers import WeightFile, read_weights
from fcvit_jax.convert.sidecar import Sidecar, read_sidecar
from fcvit_jax.convert.translation import Converted, Translation, translate
from fcvit_jax.data.labels import ClassNames, read_class_names
from fcvit_jax.data.preprocess import PRESETS, Preprocess, preset
from fcvit_jax.errors import InputError, naming
from fcvit_jax.models import zoo
from fcvit_jax.models.config import ViTConfig
from fcvit_jax.models.schedule import MergeSchedule

# Fields in which a file may differ from the model that it is named after: its keys decide.
_DECIDED_BY_KEYS = ("image_size", "num_classes", "pool", "fc_norm", "representation_size", "head_bias")


# Fields that neither keys nor timm's config.json show.
_NOT_SHOWN = ("num_heads", "gelu", "norm_eps", "rotary", "map_heads")


def named_model(src: str, model: str | None) -> zoo.Model | None:
    """Look up the model that a user names, or that SRC names if it is a full name of the zoo."""
    name = model or (src if "." in src and src in zoo.names() else None)
    return zoo.get(name) if name else None


def open_weights(src: str, ema: bool, sha256: str | None, key: str | None = None) -> tuple[WeightFile, Sidecar | None]:
    """Read the weights behind SRC, and the meta.json of a checkpoint of this library.

    ema, key: as in `read_weights`. Raises InputError if SRC cannot be found, downloaded or read, or has another sha256
    than `sha256` or its name says.
    """
    if src.startswith("packaged:"):
        return _open_checkpoint(src)
    local = os.path.exists(os.path.expanduser(src))

    def read(path: Path, name: str) -> WeightFile:
        weights = read_weights(path, ema, key)
        expected, found = sha256 or expected_sha256(name, local), next(iter(weights.files.values()))
        if expected and not found.startswith(expected):
            origin = "--sha256" if sha256 else "its name"
            raise InputError(
                f"{path}: its sha256 begins {found[: len(expected)]}, {origin} says {expected}: the file is damaged or "
                "another one; download it again" + ("" if sha256 else ", or pass --sha256 if you renamed it")
            )
        return weights

    path = locate(src, read, sha256)
    if path.is_dir():
        if any((path / name).is_dir() for name in ("params", "checkpoint/params")):
            return _open_checkpoint(path)
        path = weight_file(path)
    return read(path, path.name), None


def expected_sha256(name: str, local: bool) -> str | None:
    """Return the start of a file's sha256, if its name ends in it, as torch.hub's do: `x-cd65a155.pth`.

    Eight decimal digits may be a step or a date, so they count only in a name that the zoo has; so do those of a local
    file.
    """
    if not (found := re.search(r"-([0-9a-f]{8})(?:\.[A-Za-z]\w*)*$", name)):
        return None
    published = any(f"-{found[1]}." in (zoo.get(model).source or "") for model in zoo.names())
    return found[1] if published or not (local or found[1].isdecimal()) else None


def _open_checkpoint(path: str | Path) -> tuple[WeightFile, Sidecar]:
    checkpoint = load_checkpoint(path)
    checkpoint.check_correction([MergeSchedule.dense(checkpoint.config.depth)])
    arrays, meta = flat_params(checkpoint.params), checkpoint.meta
    known: Any = dict(class_names=checkpoint.class_names, provenance=meta["provenance"])
    sidecar = Sidecar("fcvit_jax", (), dict(vars(checkpoint.config)), checkpoint.preprocess, **known)
    return WeightFile(checkpoint.path, "checkpoint", arrays, meta["files"], None, ()), sidecar


@dataclass(frozen=True)
class WeightSource:
    """A weight file, the meaning of its keys, the JSON beside it, and the named model that it holds, if any."""

    weights: WeightFile
    translation: Translation
    sidecar: Sidecar
    model: zoo.Model | None

    @classmethod
    def understand(
        cls,
        weights: WeightFile,
        sidecar: Sidecar | None,
        model: zoo.Model | None,
        pixels: bool = True,
        num_classes: int | None = None,
    ) -> "WeightSource":
        """Find the layout of the keys, and read the JSON that belongs to it; `pixels` as in `read_sidecar`.

        Raises InputError if the keys are not those of a supported model, or the JSON is damaged or unsupported.
        """
        try:
            with naming(weights.path):
                translation = translate(weights.arrays, num_classes)
        except InputError:
            if not sidecar:
                read_sidecar(weights.path, ("huggingface",), pixels=False)  # may refuse the model by its name
            raise
        if not sidecar:
            kind = translation.layout.config_json
            sidecar = read_sidecar(weights.path, (kind,) if kind else (), pixels)
        return cls(weights, translation, sidecar, model)

    def infer(self, asked: Mapping[str, Any]) -> tuple[ViTConfig, Grid | None]:
        """Infer the configuration, and the grid of the file's position embedding; `asked` as in `infer_config`."""
        stated = {}
        if self.model:
            fields = vars(self.model.config)
            stated[f"a {self.model.name}"] = {name: fields[name] for name in fields if name not in _DECIDED_BY_KEYS}
        if self.sidecar.kind:
            # config.json names an architecture, and states or leaves to the keys what differs from it.
            named = zoo.ARCHITECTURES.get(self.sidecar.architecture or "")
            usual = {name: getattr(named, name) for name in _NOT_SHOWN} if named else {}
            described = usual | self.sidecar.fields
            if self.model and self.sidecar.kind == "timm":  # whose names of CLIP imply a GELU, and share their files
                described.pop("gelu", None)
            stated["what config.json describes"] = described
        if self.model and not self.model.config.learned_positions:
            # No leaf shows the image size, and no key that timm pools DINOv3 by the mean of its patches.
            unseen = ("image_size", "pool") if self.translation.layout.config_json == "timm" else ("image_size",)
            stated = {"its name": {name: getattr(self.model.config, name) for name in unseen}} | stated
        with naming(self.weights.path):
            return infer_config(self.translation, stated, asked)

    def preprocess(self, asked: str | None, config: ViTConfig) -> Preprocess:
        """Find the preprocessing: from `asked` (a preset), the model's name or the JSON beside the file, in this order.

        Raises InputError if none states it, or states it for another image size.
        """
        if asked:
            return preset(asked, config.image_size)
        origin, known = "the preprocessing beside the weights", self.sidecar.preprocess
        if self.model and self.model.preprocess:
            origin, known = self.model.name, self.model.preprocess
        if not known:
            name = self.model.name if self.model else ""
            tags = (tagged for tagged in zoo.names() if name and tagged.startswith(f"{name}."))
            tag = next((tag for tag in tags if zoo.get(tag).config.image_size == config.image_size), None)
            raise InputError(
                f"{self.weights.path}: the normalisation cannot be inferred from the file (timm's ViT and DeiT have "
                f"the same keys): pass {f'--model {tag} or ' if tag else ''}--preprocess {'|'.join(PRESETS)} "
                "(docs/conversion.md has their values; fields can follow, as in timm/dinov2,crop_pct=0.875)"
            )
        if known.image_size != config.image_size:
            height, width = known.image_size
            raise InputError(
                f"{origin} is for {height}x{width} pixels ({known}), the model for {config.image_size[0]}x"
                f"{config.image_size[1]}: pass --image_size {height}x{width}, or --preprocess"
            )
        return known

    def class_names(self, asked: str | Path | Sequence[str] | None, num_classes: int) -> ClassNames | None:
        """Read the class names from `asked`, as `read_class_names` does, or by default from the JSON."""
        if asked is not None:
            return read_class_names(asked, num_classes)
        names = self.sidecar.class_names
        return names if isinstance(names, str) or (names and len(names) == num_classes) else None

    def assumptions(self, config: ViTConfig, num_heads: int | None) -> tuple[str, ...]:
        """Warn of assumptions, for facts that neither the file nor a name nor JSON states."""
        kind, pixels = self.sidecar.kind, self.sidecar.preprocess
        cropped = kind == "huggingface" and pixels is not None and pixels.crop_mode == "center"
        assumed = not (self.model or kind or self.translation.num_heads or num_heads)
        remarks = {
            "transformers cuts the centre one pixel further up or left where a margin is odd; here as timm": cropped,
            f"{config.num_heads} heads, GELU {config.gelu} and epsilon {config.norm_eps:g} are assumed, as is usual: "
            "pass --model, or --num_heads, --gelu and --norm_eps, if they are others": assumed,
        }
        return (*(remark for remark, holds in remarks.items() if holds), *self._assumed_grid(config))

    def _assumed_grid(self, config: ViTConfig) -> tuple[str, ...]:
        """Warn if the grid of the position embedding is neither stated nor the only one with as many entries."""
        rows, columns = config.grid
        if rows == columns or "image_size" in self.sidecar.fields or "embed/pos_embed" not in self.translation.leaves:
            return ()
        entries, patches = self.translation.shape("embed/pos_embed", 3)[1], rows * columns
        side = math.isqrt(patches)
        if entries - patches not in range(config.num_prefix_tokens + 1):
            otherwise = "pass the --image_size of the weights, and convert the result to the size that you want"
            return (f"the position embedding is assumed to be of a square grid; if it is not, {otherwise}",)
        if side * side != patches:
            return ()
        otherwise = "convert without --image_size, and then the result with it"
        return (
            f"the position embedding is assumed to be of a {rows}x{columns} grid, which fits --image_size exactly; "
            f"if it is of {side}x{side}, {otherwise}",
        )

    def provenance(self, converted: Converted) -> dict[str, Any]:
        """Return the provenance that meta.json keeps."""
        weights = self.weights
        digests = list(weights.files.values())
        return {
            "source": weights.path.name,
            # For several files, the digest of their digests: one string that identifies these weights.
            "sha256": digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest(),
            "files": weights.files,
            "from": self.sidecar.provenance,
            "format": weights.format,
            "layout": self.translation.layout.name,
            "wrapper": ", ".join(filter(None, (weights.wrapper, self.translation.prefix))) or None,
            "left_aside": weights.skipped,
            "model": self.model.name if self.model else self.sidecar.architecture,
            "beside": self.sidecar.files,
            "keys": [key._asdict() for key in converted.keys],
            "dropped": converted.dropped,
            "remarks": converted.remarks,
        }
