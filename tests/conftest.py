"""Hypothesis profiles: a hundred histories in `make test`, two thousand in `make fuzz`."""

from hypothesis import settings

settings.register_profile("test", max_examples=100, stateful_step_count=14, deadline=None)
settings.register_profile("fuzz", max_examples=2000, stateful_step_count=14, deadline=None)
settings.load_profile("test")
