"""How OpenMP's threads wait for each other in processes that compute. It is read once, when torch is loaded.

Knows no torch. Users who set one of these variables themselves keep their choice.
"""

from __future__ import annotations

import os
from collections.abc import MutableMapping

# Threads that wait spin for some microseconds, then sleep. Spinning on, as is the default, makes every wait last a time
# slice when somebody else needs a core, and a server's front end does; sleeping at once costs a wake-up per operation.
# Milliseconds per token of plain torch on 2 cores, quiet / beside a busy process: libgomp's default 4.9-5.8 / 14, 2000
# spins 6.2-6.4 / 11, none 6.7-8.2 / 7.
SPINS = "2000"
_VARIABLES = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")


def bound_spinning(environment: MutableMapping[str, str] = os.environ) -> None:
    """Set what torch's OpenMP will read, unless the user has. Without effect once torch is loaded."""
    if not any(name in environment for name in _VARIABLES):
        environment["GOMP_SPINCOUNT"] = SPINS
