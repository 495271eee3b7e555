"""`python -m rosbag_dataset DIR` is inspection.main, `python -m rosbag_dataset cache DIR` pruning.main."""

import sys

from . import inspection, pruning

if __name__ == "__main__":
    sys.exit(pruning.main(sys.argv[2:]) if sys.argv[1:2] == ["cache"] else inspection.main())
