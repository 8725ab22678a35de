"""Run with a wheel unpacked on PYTHONPATH: everything imports, from there, and no generic name reaches the top level."""

import importlib
import pkgutil
from pathlib import Path

import surgeon

home = Path(surgeon.__file__).resolve().parent
tops = sorted(
    path.name for path in home.parent.iterdir() if not path.name.endswith(".dist-info") and path.name != "bin"
)
assert home.parent.name == "wheel", f"surgeon comes from {home}, not from the wheel"
assert tops == ["surgeon"], f"the wheel installs {tops}"
assert (home / "py.typed").is_file()

modules = [module.name for module in pkgutil.walk_packages(surgeon.__path__, "surgeon.")]
for name in modules:
    if name != "surgeon.__main__":
        module = importlib.import_module(name)
        assert module.__file__ is not None
        assert Path(module.__file__).resolve().is_relative_to(home), f"{name} comes from {module.__file__}"
compiler = importlib.import_module("surgeon.layers.ops.native.compiler")
assert all(compiler.sources().values()), "the wheel lacks the C sources of the CPU operators"
for name in surgeon.__all__:
    getattr(surgeon, name)
print(f"{len(modules)} modules import from the wheel")
