import dataclasses
import json
from typing import Any

import numpy as np
import pytest

from fcvit_jax.errors import InputError
from fcvit_jax.flatness.flatness_report import FlatnessConfig, FlatnessReport, RadiusCurve
from fcvit_jax.flatness.hessian import Eigenpair
from fcvit_jax.flatness.presentation import align, describe_report


def report(**changes):
    rng = np.random.default_rng(0)
    fields = dict(
        conditions={"checkpoint": "run", "dataset": "digits:train", "schedule": "dense"},
        config=FlatnessConfig(batch_size=8, rho=(0.1, 0.3), plane_points=0),
        num_params=1234,
        weight_norm=3.0,
        gradient_norm=0.25,
        resolution=1e-7,
        losses=rng.uniform(size=4),
        accuracies=np.array([1.0, 1.0, 0.5, 0.5]),
        eigenvalues={
            "largest": Eigenpair(12.5, 0.01, True, 9, rng.uniform(size=4), None),
            "smallest": Eigenpair(-1.5, 0.4, False, 9, rng.uniform(size=4), None),
        },
        trace=np.array([[1.0, 3.0, 1.0, 3.0], [4.0, 4.0, 4.0, 4.0], [6.0, 6.0, 6.0, 6.0]]),
        curves={"worst": RadiusCurve((0.1, 0.3), rng.uniform(size=(2, 1, 4)))},
        line=rng.uniform(size=21),
        plane=None,
    )
    return FlatnessReport(**dict[str, Any](fields | changes))


def test_what_is_written_is_read_back(tmp_path):
    before = report()
    before.write(tmp_path / "flatness.json")
    after = FlatnessReport.read(tmp_path / "flatness.json")
    assert [path.name for path in tmp_path.iterdir()] == ["flatness.json"]
    for field in dataclasses.fields(FlatnessReport):
        old, new = getattr(before, field.name), getattr(after, field.name)
        if isinstance(old, np.ndarray):
            np.testing.assert_array_equal(old, new)
        elif field.name not in ("curves", "eigenvalues"):
            assert old == new
    assert after.curves["worst"].radii == (0.1, 0.3)
    np.testing.assert_array_equal(after.curves["worst"].samples, before.curves["worst"].samples)
    smallest = dataclasses.replace(before.eigenvalues["smallest"], samples=after.eigenvalues["smallest"].samples)
    assert after.eigenvalues["smallest"] == smallest
    np.testing.assert_array_equal(after.eigenvalues["largest"].samples, before.eigenvalues["largest"].samples)


def test_reports_with_numbers_that_json_lacks_are_not_written(tmp_path):
    with pytest.raises(ValueError, match="JSON compliant"):
        report(weight_norm=float("nan")).write(tmp_path / "flatness.json")
    assert not list(tmp_path.iterdir())


def test_description():
    text = describe_report(report())
    assert "run on digits:train: 32 images in batches of 8, schedule dense, float32" in text
    assert "accuracy 75.00%, norm of the gradient 0.25, of the 1,234 weights 3" in text
    assert "largest eigenvalue of the Hessian 12.5 (residual 0.01, 9 products)" in text
    assert (
        "smallest eigenvalue of the Hessian -1.5 (residual 0.4, 9 products, not converged: raise --eigen_steps)" in text
    )
    assert "trace 4 (standard error 1.2, 3 probes)" in text


def test_alignment():
    assert align([("name", "x"), ("a", "10.5"), ("bcdef", "2")]) == "name      x\n-----------\na      10.5\nbcdef     2"


@pytest.mark.parametrize(
    ("content", "why"),
    [
        ("", "JSONDecodeError"),
        ("[]", "TypeError"),
        ("{}", "KeyError 'format'"),
        ('{"format": 9}', "another format"),
        ('{"format": 1}', "KeyError 'losses'"),
    ],
)
def test_other_files_are_refused_in_one_line(tmp_path, content, why):
    path = tmp_path / "flatness.json"
    path.write_text(content)
    with pytest.raises(InputError) as caught:
        FlatnessReport.read(path)
    message = str(caught.value)
    assert message.startswith(f"{path} is not a flatness.json of this version (")
    assert why in message
    assert message.isprintable()


def test_a_report_with_the_field_of_earlier_versions_is_read(tmp_path):
    path = tmp_path / "flatness.json"
    report().write(path)
    fields = json.loads(path.read_text())
    fields["config"]["eigen"] = "lanczos"
    path.write_text(json.dumps(fields))
    assert FlatnessReport.read(path).config == report().config


def test_other_fields_and_missing_files(tmp_path):
    path = tmp_path / "flatness.json"
    with pytest.raises(InputError, match=f"{path} cannot be read: No such file"):
        FlatnessReport.read(path)
    report().write(path)
    for change in (lambda x: x.update(extra=1), lambda x: x.pop("plane"), lambda x: x["config"].update(seed=-1)):
        fields = json.loads(path.read_text())
        change(fields)
        other = tmp_path / "other.json"
        other.write_text(json.dumps(fields))
        with pytest.raises(InputError, match=r"other.json is not a flatness.json of this version"):
            FlatnessReport.read(other)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"limit": 0}, "limit is 0: it must be a whole number, 1 or more"),
        ({"restarts": -1}, "restarts is -1: it must be a whole number, 0 or more"),
        ({"probes": 2.5}, "probes is 2.5: it must be a whole number"),
        ({"draws": True}, "draws is True: it must be a whole number"),
        ({"rho": ()}, "rho is (): it must be numbers, above 0, in rising order"),
        ({"rho": (0.0, 1.0)}, "rho is (0.0, 1.0): it must be numbers, above 0"),
        ({"rho": 0.1}, "rho is 0.1: it must be numbers, above 0, in rising order"),
        ({"sigma": (0.2, 0.1)}, "sigma is (0.2, 0.1): it must be numbers, above 0, in rising order"),
        ({"epsilon": (0.1, 0.1)}, "epsilon is (0.1, 0.1): it must be numbers, above 0, in rising order"),
        ({"adaptive_rho": (0.1, float("inf"))}, "adaptive_rho is (0.1, inf): it must be numbers, above 0"),
        ({"tolerance": 0}, "tolerance is 0: it must be a number, above 0"),
        ({"loss": "mse"}, "loss is 'mse': choose one of softmax, sigmoid"),
    ],
)
def test_bad_fields_are_named(fields, message):
    with pytest.raises(InputError) as caught:
        FlatnessConfig(**fields)
    assert str(caught.value).startswith(message)


def test_a_configuration_from_json_is_equal_and_hashes():
    config = FlatnessConfig(rho=(0.1, 0.2))
    again = FlatnessConfig(**json.loads(json.dumps(dataclasses.asdict(config))))
    assert again == config
    assert hash(again) == hash(config)
