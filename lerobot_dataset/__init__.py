"""LeRobot datasets, format v3.0, without lerobot: for the evaluation, and for a training on one.

    frames.py        what an episode and a frame are, and the errors: one line each
    reading.py       the reader: metadata, rows, and pictures out of videos or tables
    recordings.py    the episodes as recordings, for rosbag_dataset's cache and all that follows (data.lerobot_dataset)

Importing the package imports none of these: frames.py needs numpy alone, the others pyarrow and av, which a training on
bags does without. OSMO's workflows train on bags, so that this package is not injected into them.
"""
