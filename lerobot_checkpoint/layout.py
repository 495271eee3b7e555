"""Names: which files make up a checkpoint, and what its directory is called.

Must not know: what is in those files, or the disk. Nothing is opened here.
"""

from __future__ import annotations

# The two folders of a checkpoint.
PRETRAINED_DIR, TRAINING_DIR = "pretrained_model", "training_state"

# Files in PRETRAINED_DIR, named as LeRobot names them. It puts the position of a step (3, 0) in the file's name.
CONFIG_FILE, WEIGHTS_FILE, TRAIN_CONFIG_FILE = "config.json", "model.safetensors", "train_config.json"
PREPROCESSOR_FILE, POSTPROCESSOR_FILE = "policy_preprocessor.json", "policy_postprocessor.json"
NORMALIZER_FILE = "policy_preprocessor_step_3_normalizer_processor.safetensors"
UNNORMALIZER_FILE = "policy_postprocessor_step_0_unnormalizer_processor.safetensors"
PRETRAINED_FILES = (
    CONFIG_FILE, WEIGHTS_FILE, PREPROCESSOR_FILE, NORMALIZER_FILE, POSTPROCESSOR_FILE, UNNORMALIZER_FILE,
    TRAIN_CONFIG_FILE,
)  # fmt: skip

# Files in TRAINING_DIR, as paths from the checkpoint on.
TRAINING_STATE_FILE, MANIFEST_FILE = f"{TRAINING_DIR}/training_state.pt", f"{TRAINING_DIR}/manifest.json"

# In the manifest beside `step` and `files`: what the checkpoint scored, the lower the better. The trainer scores by the
# L1 on the held-out episodes.
SCORE = "score"

# What every manifest has to list: all files but the manifest itself, as paths from the checkpoint on.
LISTED_FILES = (*(f"{PRETRAINED_DIR}/{name}" for name in PRETRAINED_FILES), TRAINING_STATE_FILE)


def checkpoint_name(step: int, total_steps: int | None = None) -> str:
    """The name of a step's checkpoint: "checkpoint_005000".

    In a run of more than 999,999 steps all names have more digits, so that they sort like the steps.
    """
    return f"checkpoint_{step:0{max(6, len(str(total_steps or 0)))}d}"
