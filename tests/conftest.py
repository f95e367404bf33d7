"""No time limit for one example: these machines are shared, and a first call may compile a kernel."""

from hypothesis import settings

settings.register_profile("zotune", deadline=None)
settings.load_profile("zotune")
