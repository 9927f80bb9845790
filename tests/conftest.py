"Settings that every test shares: no network, quiet libraries, properties that do not depend on luck or on the clock."
import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("MPLBACKEND", "agg")

from hypothesis import settings  # noqa: E402  (after the environment: it may pull in the libraries that read it)

settings.register_profile("course", deadline=None, derandomize=True, database=None)
settings.load_profile("course")
