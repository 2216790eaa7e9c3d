"""The scenarios of the paper: udedup beside the kernel's KSM, on the same work at the same rate.

``demo/run NAME --against ksm`` plays one three times: with neither, with udedup, with KSM. One recorder
(``udedup.record``) looks at both from outside.
"""

from demo.scenarios.boot import Boot
from demo.scenarios.build import Build
from demo.scenarios.idle import Idle
from demo.scenarios.mixed import Mixed
from demo.scenarios.native import Native
from demo.scenarios.scenario import Scenario
from demo.scenarios.serve import Serve

SCENARIOS: dict[str, type[Scenario]] = {
    "boot": Boot,
    "build": Build,
    "serve": Serve,
    "mixed": Mixed,
    "native": Native,
    "idle": Idle,
}
"""By the name on the command line."""
