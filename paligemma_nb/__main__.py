"`python -m paligemma_nb`: the command `paligemma-nb`"
import sys

from .inference import main

sys.exit(main())
