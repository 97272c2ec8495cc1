"""Many prompts on many workers: `sjd2 batch`. Only `crew.py` and `run.py` know Ray, and import it when they run."""
