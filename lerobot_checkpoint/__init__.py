"""Checkpoints: LeRobot 0.3.2 and 0.4+ load them as they are, and training resumes from them.

    OUTPUT_DIR/
      checkpoint_005000/
        pretrained_model/            what LeRobot reads; copy this folder to deploy
          config.json                                               0.3.2's fields; later versions fill in theirs
          model.safetensors                                         weights, and 0.3.2's normalisation buffers
          policy_preprocessor.json                                  0.4+ normalises here ...
          policy_preprocessor_step_3_normalizer_processor.safetensors
          policy_postprocessor.json                                 ... and un-normalises here
          policy_postprocessor_step_0_unnormalizer_processor.safetensors
          train_config.json                                         the run's whole configuration
        training_state/              what a resumed run reads
          training_state.pt                                         optimizer, step, generators, ...
          manifest.json                                             size and SHA-256 of every file above; score
      checkpoint_010000/
      last -> checkpoint_010000      relative links
      best -> checkpoint_005000      the lowest score

Why both normalisations: 0.3.2 normalises inside the policy, from buffers among the weights, and 0.4+ outside it, from
the processors' files. A checkpoint read through the wrong one gives un-normalised actions and no error. So ours has
both, which no LeRobot release writes, and load_policy refuses one in which they are absent or contradict each other.

Why temporary names: a checkpoint is written under one, flushed to disk and renamed; only then does `last` move. So a
kill at any instant leaves `last` pointing at a complete checkpoint. If it was about to replace one of the same step,
that one may lie there, complete, as `checkpoint_NNNNNN.old`, which every function here finds.

Every failure is a CheckpointError: one line that says which file, what was found, what was expected, what to do.

The rooms, each importing only from those above it:

    errors.py, layout.py    the exception; the names in the tree above
    files.py                one file: to bytes, from disk, its hash
    normalisation.py        Normalizer, and which statistics can be trusted
    lerobot_writing.py      a policy as LeRobot's files, in bytes
    lerobot_reading.py      LeRobot's files as a configuration and statistics
    training_state.py       what a resumed run continues from, to bytes and back
    directory.py            list, verify, link, prune, clean: OUTPUT_DIR as a whole
    saving.py               save_checkpoint, and CheckpointSaver in the background
    loading.py              load_policy

Nothing here knows of the training loop, the bags or wandb, or imports lerobot: the tests compare it with the real
0.3.2 and 0.4.4. Outside, import from the package, not from its rooms.
"""

from .directory import (
    best_checkpoint,
    clean_leftovers,
    link_best,
    list_checkpoints,
    newest_checkpoint,
    point_link,
    prune,
    score_of,
    set_score,
    verify_checkpoint,
)
from .errors import CheckpointError
from .files import file_sha256, read_json, read_tensors
from .layout import CONFIG_FILE, PREPROCESSOR_FILE, PRETRAINED_DIR, TRAIN_CONFIG_FILE, WEIGHTS_FILE
from .lerobot_writing import buffer_names
from .loading import LoadedPolicy, find_pretrained, load_policy
from .normalisation import Normalizer, Stats, image_key, stats_shapes
from .saving import CheckpointSaver, save_checkpoint
from .training_state import load_training_state

__all__ = [
    "CONFIG_FILE",
    "PREPROCESSOR_FILE",
    "PRETRAINED_DIR",
    "TRAIN_CONFIG_FILE",
    "WEIGHTS_FILE",
    "CheckpointError",
    "CheckpointSaver",
    "LoadedPolicy",
    "Normalizer",
    "Stats",
    "best_checkpoint",
    "buffer_names",
    "clean_leftovers",
    "file_sha256",
    "find_pretrained",
    "image_key",
    "link_best",
    "list_checkpoints",
    "load_policy",
    "load_training_state",
    "newest_checkpoint",
    "point_link",
    "prune",
    "read_json",
    "read_tensors",
    "save_checkpoint",
    "score_of",
    "set_score",
    "stats_shapes",
    "verify_checkpoint",
]
