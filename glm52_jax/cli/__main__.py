"""``python -m glm52_jax.cli``."""

import sys

from glm52_jax.cli.app import main

if __name__ == "__main__":
    sys.exit(main())
