import plumbing  # noqa: F401  before transformers' models: see there
