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
