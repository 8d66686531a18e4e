"""hlrp: robot policies from video without action labels. Import from the module that defines a name."""

import os
import sys

if "torch" not in sys.modules and "OMP_WAIT_POLICY" not in os.environ:
    # How long a thread of OpenMP spins before it sleeps, which torch's OpenMP reads once, when torch is imported. By
    # default a thread spins for milliseconds on a core that another process needs: two runs on two cores then take
    # many times as long (docs/performance.md). This is OpenMP's own number for more threads than cores.
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
