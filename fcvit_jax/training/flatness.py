"""The old place of a command: an error that names the new one."""

from fcvit_jax.errors import InputError, one_line_errors

if __name__ == "__main__":
    with one_line_errors():
        raise InputError("this command has moved: run python -m fcvit_jax.flatness, with the same arguments")
