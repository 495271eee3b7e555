"""What real LeRobot computes. The tests import this under 0.3.2 and run it as a script under 0.4.4.

    python reference.py FOLDER      runs every job in FOLDER/jobs.json, a list of [function, arguments]

The two versions' interpreters exchange safetensors files only. Each function names the LeRobot calls that a user
of that version makes; where the versions differ, `OLD` says which is running.
"""

import json
import os
import sys
from importlib.metadata import version
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

os.environ["HF_HUB_OFFLINE"] = "1"  # read when huggingface_hub is imported

from lerobot.configs.types import FeatureType, NormalizationMode, PolicyFeature  # noqa: E402
from lerobot.policies.act.configuration_act import ACTConfig  # noqa: E402
from lerobot.policies.act.modeling_act import ACTPolicy  # noqa: E402

OLD = version("lerobot").startswith("0.3.")  # normalises inside the policy; 0.4+ in processors around it
STATE, ACTION = "observation.state", "action"


def make_config(settings: dict, image_shapes: dict) -> ACTConfig:
    """settings: our ACTConfig's fields. Built offline: no pretrained backbone."""
    settings = dict(settings)
    state_dim, action_dim = settings.pop("state_dim"), settings.pop("action_dim")
    features = {STATE: PolicyFeature(FeatureType.STATE, (state_dim,))}
    for camera in settings.pop("cameras"):
        features[f"observation.images.{camera}"] = PolicyFeature(FeatureType.VISUAL, (3, *image_shapes[camera]))
    return ACTConfig(
        input_features=features,
        output_features={ACTION: PolicyFeature(FeatureType.ACTION, (action_dim,))},
        normalization_mapping={kind: NormalizationMode.MEAN_STD for kind in ("VISUAL", "STATE", "ACTION")},
        device="cpu",
        pretrained_backbone_weights=None,
        n_action_steps=settings["chunk_size"],
        **settings,
    )


def identity_stats(config: ACTConfig) -> dict:
    """Mean 0 and std 1: (x - 0) / (1 + 1e-8) is x itself in float32, so that 0.3.2's policy adds nothing."""
    shapes = {k: (3, 1, 1) if f.type is FeatureType.VISUAL else f.shape for k, f in config.input_features.items()}
    shapes[ACTION] = config.action_feature.shape
    return {key: dict(mean=torch.zeros(shape), std=torch.ones(shape)) for key, shape in shapes.items()}


def forward_backward(weights: dict, batch: dict, meta: dict) -> dict[str, torch.Tensor]:
    """One case of test_act_parity: actions in eval mode; loss and gradients in training mode.

    `meta` has our ACTConfig's fields as settings, image_shapes, kl_weight and seed.
    """
    config = make_config(meta["settings"], meta["image_shapes"])
    config.kl_weight = meta["kl_weight"]
    policy = ACTPolicy(config, dataset_stats=identity_stats(config))
    policy.model.load_state_dict(weights, strict=True)

    results = {"actions": policy.predict_action_chunk(batch)}
    policy.train()
    torch.manual_seed(meta["seed"])  # the latent noise is the first and, with dropout 0, the only draw
    loss, terms = policy.forward(batch)
    loss.backward()
    results |= {"loss": loss.detach(), "l1": torch.tensor(terms["l1_loss"])}
    results["kl"] = torch.tensor(terms.get("kld_loss", 0.0))
    for name, parameter in policy.model.named_parameters():
        results[f"grad/{name}"] = parameter.grad
    return results


def forward_backward_file(case: str, out: str) -> None:
    """The same for a file that holds "weights/<key>", "batch/<key>" and, as metadata, `meta`."""
    with safe_open(case, "pt") as file:
        meta = {key: json.loads(value) for key, value in file.metadata().items()}
    split: dict = dict(weights={}, batch={})
    for key, tensor in load_file(case).items():
        kind, _, name = key.partition("/")
        split[kind][name] = tensor
    save_file(forward_backward(**split, meta=meta), out)


def act(pretrained: str, observation: str, out: str) -> None:
    """Load a directory as its user would; save the chunk and select_action's first action, un-normalised."""
    policy = ACTPolicy.from_pretrained(pretrained)
    save_actions(policy, *(load_processors(policy, pretrained)), observation, out)


def load_processors(policy, pretrained: str):
    if OLD:
        return (lambda x: x), (lambda x: x)
    from lerobot.policies.factory import make_pre_post_processors

    return make_pre_post_processors(policy.config, pretrained_path=pretrained)


def save_actions(policy, preprocess, postprocess, observation: str, out: str) -> None:
    chunk = postprocess(policy.predict_action_chunk(preprocess(load_file(observation))))
    policy.reset()
    first = postprocess(policy.select_action(preprocess(load_file(observation))))
    save_file({"chunk": chunk.contiguous(), "first": first.contiguous()}, out)


def write(pretrained: str, settings: dict, image_shapes: dict, stats: str, observation: str, out: str) -> None:
    """Save a randomly initialised policy as this LeRobot does, and the actions it gives."""
    flat = load_file(stats)  # "<feature>.<mean or std>"
    by_feature: dict = {}
    for key, tensor in flat.items():
        by_feature.setdefault(key.rpartition(".")[0], {})[key.rpartition(".")[2]] = tensor
    torch.manual_seed(0)
    config = make_config(settings, image_shapes)
    policy = ACTPolicy(config, dataset_stats=by_feature).eval()
    policy.save_pretrained(pretrained)
    processors = load_processors(policy, "") if OLD else make_processors(config, by_feature)
    if not OLD:
        for processor in processors:
            processor.save_pretrained(pretrained)
    save_actions(policy, *processors, observation, out)


def make_processors(config: ACTConfig, stats: dict):
    from lerobot.policies.factory import make_pre_post_processors

    return make_pre_post_processors(config, dataset_stats=stats)


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    for function, arguments in json.loads((folder / "jobs.json").read_text()):
        globals()[function](**arguments)
