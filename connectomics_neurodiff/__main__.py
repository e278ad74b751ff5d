"""``python -m connectomics_neurodiff`` is the command ``neurodiff``."""

import sys

from .cli import main

sys.exit(main())
