"""fcvit_jax.program_cache."""

import jax
import pytest

from fcvit_jax import program_cache


@pytest.fixture
def jax_cache():
    """JAX's options for compiled programs, which are restored afterwards."""
    names = ["dir", "persistent_cache_min_compile_time_secs", "persistent_cache_min_entry_size_bytes"]
    names = [f"jax_compilation_cache_{name}" if name == "dir" else f"jax_{name}" for name in names]
    before = {name: getattr(jax.config, name) for name in names}
    jax.config.update(names[0], None)
    yield lambda: jax.config.jax_compilation_cache_dir  # pyright: ignore[reportAttributeAccessIssue]
    for name, value in before.items():
        jax.config.update(name, value)


@pytest.mark.parametrize(
    ("vendor", "instructions", "kept"),
    [
        ("GenuineIntel", "avx2", True),
        ("GenuineIntel", "avx2 avx512f", False),
        ("GenuineIntel", "avx2 avx512f amx_tile", True),
        ("AuthenticAMD", "avx2 avx512f", True),
    ],
)
def test_programs_are_kept_if_xla_accepts_them_again(vendor, instructions, kept, jax_cache, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(program_cache, "cpu_info", lambda: f"vendor_id : {vendor}\nflags : {instructions}")
    program_cache.keep_programs(None)
    assert bool(jax_cache()) == (kept or jax.default_backend() != "cpu")


def test_compiled_programs_are_kept_where_they_can_be(jax_cache, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(program_cache, "cpu_info", lambda: "")
    program_cache.keep_programs(None)
    assert jax_cache() == str(tmp_path / "cache" / "fcvit_jax" / "jax")
    assert (tmp_path / "cache" / "fcvit_jax" / "jax").stat().st_mode & 0o777 == 0o700
    program_cache.keep_programs("")
    assert jax_cache() is None
    jax.config.update("jax_compilation_cache_dir", str(tmp_path / "mine"))  # as JAX_COMPILATION_CACHE_DIR does
    program_cache.keep_programs(None)
    assert jax_cache() == str(tmp_path / "mine")
    program_cache.keep_programs(str(tmp_path / "flag"))
    assert jax_cache() == str(tmp_path / "flag")
    (tmp_path / "file").write_text("")
    program_cache.keep_programs(str(tmp_path / "file" / "below"))  # cannot be made, even by root
    assert jax_cache() is None
    program_cache.keep_programs("/proc/nothing")
    assert jax_cache() is None


def test_jax_opens_a_bucket_itself(jax_cache, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    program_cache.keep_programs("gs://bucket/programs")
    assert jax_cache() == "gs://bucket/programs"
    assert list(tmp_path.iterdir()) == []
