"""What the property tests share: no deadline, since how long an example takes says nothing of what is claimed."""

from hypothesis import settings

settings.register_profile("unit", deadline=None, max_examples=100)
settings.load_profile("unit")
