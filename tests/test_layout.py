"""Facts about the tree that other packages, or the layering, depend on."""

from pathlib import Path

from importlinter.cli import lint_imports

ROOT = Path(__file__).parent.parent


def test_kernels_is_a_source_root_and_no_package() -> None:
    """Transformers probes for a top-level package of this name and would execute ours instead."""
    assert not (ROOT / "kernels" / "__init__.py").exists()
    assert (ROOT / "kernels" / "distserve_kernels" / "__init__.py").exists()


def test_import_contracts_hold() -> None:
    assert lint_imports(config_filename=str(ROOT / "pyproject.toml"), cache_dir=None) == 0


def test_no_compiled_module_is_older_than_its_source() -> None:
    """``make fast`` leaves modules that Python prefers to their sources, also after an edit."""
    stale = [
        str(source.relative_to(ROOT))
        for package in ("distserve/core", "simulator")
        for source in (ROOT / package).rglob("*.py")
        for compiled in source.parent.glob(f"{source.stem}.*.so")
        if compiled.stat().st_mtime < source.stat().st_mtime
    ]
    assert not stale, f"compiled before the last edit, run `make fast` or `make pure`: {', '.join(stale)}"
