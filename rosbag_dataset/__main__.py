"""`python -m rosbag_dataset DIR` is inspection.main."""

import sys

from .inspection import main

if __name__ == "__main__":
    sys.exit(main())
