"""Scripts of the repository, imported as modules without a package."""

import importlib.util
import sys


def script_module(path):
    """Returns the module that a script makes, found under its name as well."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module
