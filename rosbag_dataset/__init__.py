"""ROS 2 bags to ACT training samples, without ROS and without a data set in between.

The way of the data, with the room (module) that does each step:

    folder -> bags         bags.py, opened by storage.py   which recordings there are, and their messages as bytes
    bag -> recording       reading.py                      one pass: topics.py takes time stamps and joint positions
                                                           out of the messages, fields.py further states, commands.py
                                                           commands, images.py and video.py pixels; faults.py
                                                           looks at these
    recording -> entry     cache.py, decoding.py           decoded once per bag, in parallel, kept on disk; or only
                                                           where each picture lies in the bag: in_place.py
    entry -> episodes      cutting.py                      what is an episode (sidecar.py: as a person wrote it down);
                                                           of each, by synchronisation.py: time grid, states, actions,
                                                           segments
    folder -> episodes     episodes.py, warm.py            all of the above for a folder, kept on disk for the next
                                                           start with these settings; training/validation split
    episode -> sample      samples.py                      at every step: state, images, a chunk of actions, padding

Beside that way: settings.py (what to read, and how), config.py (YAML and overrides into any schema), statistics.py
(means and deviations for normalisation), reports.py (what became of the bags, as text), definitions.py (message types
that only the bag knows), errors.py. Commands, which a training does not need: inspection.py (`python -m rosbag_dataset
DIR` looks at a folder, and writes a report if asked: looking.py keeps what a person is to see, findings.py judges it,
html_report.py draws it), pruning.py (`... cache DIR` looks at the cache, and removes from it), listing.py (`... list
DIR`: what has to arrive elsewhere), exporting.py and lerobot_v3.py (`... export DIR OUT`: as a LeRobot dataset).

The cache holds what is expensive and independent of the training settings: decoded, resized pixels (or their places in
the bag), their times, the joint positions and further states. Synchronisation is cheap, and kept beside it, so that
changing `data.fps`, `max_offset_ms`, `wrap_angles` or `action_mode` never reads a bag again.

The package knows bags, time and pixels; it knows no model, no checkpoint and no process group, and needs neither ROS
nor torch. Imports among its rooms run one way (tests/test_imports.py). Other packages import what `__all__` names,
from here.
"""

from .bags import Bag, find_bags
from .cache import EntryError, build_entry, cache_key, clean_cache, find_entry, load_entry, open_entry
from .commands import held as held_commands
from .config import Schema, parse_yaml, read_config, setting
from .cutting import cut, cut_settings, left_out_notes
from .decoding import available_cores
from .episodes import divide, load_episodes, split_episodes
from .errors import NO_LOCKS, BagError, SettingError, SetupError
from .faults import BLACK_BELOW, WHITE_ABOVE
from .images import COMPRESSED_TYPE, IMAGE_TYPE, MAX_PIXELS, RESIZE_INTERPOLATION, read_image, resize_image
from .in_place import PicturesInPlace, source_of
from .reading import Recording, image_sha256, read_bag
from .reports import data_notes, sync_table
from .samples import ChunkDataset, open_pixels, pixel_owners
from .settings import (
    CHOICES,
    DATASET_ACTION,
    NEXT_STATE,
    UR_JOINTS,
    BagSettings,
    action_unit,
    command_rules,
    episode_rules,
    setting_rules,
    settings_from,
    state_rules,
)
from .sidecar import sidecar_path
from .statistics import angle_references, compute_stats
from .synchronisation import Episode, no_motion, refer_angles, synchronise, wrap_to_pi
from .topics import typestore_for

__all__ = [
    "BLACK_BELOW",
    "WHITE_ABOVE",
    "available_cores",
    "COMPRESSED_TYPE",
    "DATASET_ACTION",
    "NEXT_STATE",
    "IMAGE_TYPE",
    "MAX_PIXELS",
    "NO_LOCKS",
    "RESIZE_INTERPOLATION",
    "CHOICES",
    "UR_JOINTS",
    "Bag",
    "BagError",
    "BagSettings",
    "ChunkDataset",
    "EntryError",
    "Episode",
    "PicturesInPlace",
    "Recording",
    "Schema",
    "SettingError",
    "SetupError",
    "action_unit",
    "angle_references",
    "build_entry",
    "cache_key",
    "clean_cache",
    "command_rules",
    "compute_stats",
    "cut",
    "cut_settings",
    "data_notes",
    "divide",
    "episode_rules",
    "find_bags",
    "find_entry",
    "held_commands",
    "image_sha256",
    "left_out_notes",
    "load_entry",
    "load_episodes",
    "no_motion",
    "open_entry",
    "open_pixels",
    "parse_yaml",
    "pixel_owners",
    "read_bag",
    "read_config",
    "read_image",
    "refer_angles",
    "resize_image",
    "setting",
    "setting_rules",
    "settings_from",
    "sidecar_path",
    "source_of",
    "split_episodes",
    "state_rules",
    "sync_table",
    "synchronise",
    "typestore_for",
    "wrap_to_pi",
]
