"""What holds for all tests: a busy machine is no failure, and what guards the main branch tries the same examples every time."""

import os

from hypothesis import HealthCheck, settings

settings.register_profile("fxgateway", deadline=None, derandomize="CI" in os.environ, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("fxgateway")
