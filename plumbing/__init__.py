"""Before any module here imports transformers' models: `kernels` is this project's.

Hugging Face has a package of that name too. Where one is installed, transformers, which looks for
its version, would import ours in its place and fail. So transformers is told that there is none.
"""
from transformers.utils import import_utils

is_installed = import_utils._is_package_available


def is_installed_and_not_kernels(name: str, return_version: bool = False):
    return (False, "N/A") if name == "kernels" else is_installed(name, return_version)


import_utils._is_package_available = is_installed_and_not_kernels
