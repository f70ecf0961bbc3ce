"""Commands above repo.py, run as `python -m companions.NAME`. README.md lists them."""
import plumbing  # noqa: F401  before transformers' models: see there
