"""Says where `python -m fcvit_jax.training.flatness` moved to."""

from fcvit_jax.errors import InputError, one_line_errors

if __name__ == "__main__":
    with one_line_errors():
        raise InputError("this command has moved: run python -m fcvit_jax.flatness, with the same arguments")
