"""`python -m rosbag_dataset DIR` is inspection.main; with cache, list or export before DIR it is another command."""

import sys

from . import exporting, inspection, listing, pruning

OTHERS = {"cache": pruning.main, "list": listing.main, "export": exporting.main}

if __name__ == "__main__":
    other = OTHERS.get(sys.argv[1] if len(sys.argv) > 1 else "")
    sys.exit(other(sys.argv[2:]) if other else inspection.main())
