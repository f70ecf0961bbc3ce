"""Hugging Face has a package `kernels` too. If it is installed, transformers looks for its version,
imports this project's `kernels` instead, and fails. So this module tells transformers that there is
no such package. It must run before transformers' models are imported.
"""
from transformers.utils import import_utils

is_installed = import_utils._is_package_available


def is_installed_and_not_kernels(name: str, return_version: bool = False):
    return (False, "N/A") if name == "kernels" else is_installed(name, return_version)


import_utils._is_package_available = is_installed_and_not_kernels
