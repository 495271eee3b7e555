"""ACT (Action Chunking with Transformers): the network, its loss and its temporal ensembler.

From the robot's joint state and one image per camera, ACT predicts the next `chunk_size` actions at once
(Zhao et al. 2023, arXiv 2304.13705). This file knows tensors only.

                       training only
                  [CLS, state, actions]                      batch["observation.images.<camera>"]
                            |                                              |
                      vae_encoder                                  backbone (ResNet, layer4)
                            | output at CLS                                |
                     mu, log(sigma^2)                             1x1 convolution, 2-D positions
                            |                                              |
                   latent z ~ N(mu, sigma^2)     state           h*w tokens for each camera
                   (zeros at inference)            |                       |
                            +-----------------+----+-----------------------+
                                              |
                                [latent, state, *image tokens]
                                              |
         chunk_size zeros                  encoder
                |                             |
             decoder  <--- cross-attention ---+
                |
           action_head  --->  actions (B, chunk_size, action_dim)

Attribute names, and therefore state-dict keys, are those of LeRobot's `ACTPolicy.model`: they are the file
format. tests/test_act_parity.py holds outputs, losses and gradients to LeRobot 0.3.2 and 0.4.4.

In shape comments: B batch, S tokens, D dim_model, L latent_dim, h and w the feature map's height and width.
Transformers here run sequence-first, (S, B, D), as nn.MultiheadAttention does inside: (B, S, D) was 15 %
slower on a CPU.
"""

from __future__ import annotations

import contextlib
import math
import re
from collections import OrderedDict
from collections.abc import Generator, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torchvision.ops import FrozenBatchNorm2d

ACTION, ACTION_IS_PAD, STATE, IMAGE_PREFIX = "action", "action_is_pad", "observation.state", "observation.images."

ACTIVATIONS = {"relu": F.relu, "gelu": F.gelu}
BACKBONE_CHANNELS = {"resnet18": 512, "resnet34": 512, "resnet50": 2048}  # of layer4's features


@dataclass(frozen=True)
class ACTConfig:
    """What fixes the network's shape. Fields are named as in LeRobot's ACTConfig; the defaults live in train.py.

    Raises ValueError, in one line, for a value that LeRobot or the network could not run.
    """

    state_dim: int  # joints observed
    action_dim: int
    cameras: tuple[str, ...]  # the feature is "observation.images.<camera>"
    chunk_size: int  # actions predicted at once
    dim_model: int
    n_heads: int
    dim_feedforward: int
    feedforward_activation: str
    n_encoder_layers: int
    n_decoder_layers: int
    n_vae_encoder_layers: int
    use_vae: bool
    latent_dim: int
    dropout: float
    pre_norm: bool
    vision_backbone: str
    replace_final_stride_with_dilation: bool

    def __post_init__(self) -> None:
        def require(field: str, holds: bool, expected: str) -> None:
            if not holds:
                raise ValueError(f"ACTConfig.{field} is {getattr(self, field)!r}; expected {expected}")

        for field in (
            "state_dim", "action_dim", "chunk_size", "dim_model", "n_heads", "dim_feedforward",
            "n_encoder_layers", "n_decoder_layers", "n_vae_encoder_layers", "latent_dim",
        ):  # fmt: skip
            value = getattr(self, field)
            require(field, type(value) is int and value > 0, "a positive integer")
        for field in ("use_vae", "pre_norm", "replace_final_stride_with_dilation"):
            require(field, isinstance(getattr(self, field), bool), "true or false")
        require(
            "dropout",
            isinstance(self.dropout, int | float) and not isinstance(self.dropout, bool) and 0 <= self.dropout < 1,
            "a number in [0, 1)",
        )
        require("dim_model", self.dim_model % self.n_heads == 0, f"a multiple of n_heads ({self.n_heads})")
        # The 2-D position embedding holds a sine and a cosine for y and for x.
        require("dim_model", self.dim_model % 4 == 0, "a multiple of 4")
        # LeRobot also names "glu", but F.glu halves the features that linear2 expects: it never runs there.
        require("feedforward_activation", self.feedforward_activation in ACTIVATIONS, f"one of {list(ACTIVATIONS)}")
        require("vision_backbone", self.vision_backbone in BACKBONE_CHANNELS, f"one of {list(BACKBONE_CHANNELS)}")
        # torchvision's basic block, of which resnet18 and resnet34 are made, has no dilation.
        require(
            "replace_final_stride_with_dilation",
            not self.replace_final_stride_with_dilation or self.vision_backbone == "resnet50",
            f"false with {self.vision_backbone} (torchvision dilates only resnet50 of these)",
        )
        require(
            "cameras",
            isinstance(self.cameras, tuple) and len(self.cameras) > 0 and len(set(self.cameras)) == len(self.cameras),
            "a tuple of at least one camera name, each once",
        )
        # LeRobot 0.3.2 turns "." into "_" in its buffers' names, so that a name with a dot would be ambiguous.
        require(
            "cameras",
            all(isinstance(name, str) and re.fullmatch(r"[A-Za-z0-9_-]+", name) for name in self.cameras),
            "names of letters, digits, '_' and '-'",
        )


# ---- Position embeddings -------------------------------------------------------------------------------------


def sinusoidal_positions_1d(n_positions: int, dim: int) -> Tensor:
    """Interleaved sines and cosines of "Attention Is All You Need": (n_positions, dim) float32."""
    position = torch.arange(n_positions, dtype=torch.float64).unsqueeze(1)
    wavelength = 10000 ** (torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    angle = position / wavelength  # (n_positions, dim / 2)
    return torch.stack((angle.sin(), angle.cos()), dim=-1).flatten(1).float()


def sinusoidal_positions_2d(height: int, width: int, dim: int, device: torch.device | None = None) -> Tensor:
    """DETR's position embedding of a feature map: (height, width, dim) float32, the first half y, the second x.

    Positions count from 1 and are scaled so that the last one lies at 2 pi (LeRobot's
    ACTSinusoidalPositionEmbedding2d, whose float32 arithmetic this repeats step by step).
    """

    def angles(n: int) -> Tensor:
        position = torch.arange(1, n + 1, dtype=torch.float32, device=device)
        position = position / (position[-1:] + 1e-6) * (2 * math.pi)
        half = dim // 2
        wavelength = 10000 ** (2 * (torch.arange(half, dtype=torch.float32, device=device) // 2) / half)
        angle = position.unsqueeze(1) / wavelength  # (n, dim / 2), each wavelength twice
        return torch.stack((angle[:, 0::2].sin(), angle[:, 1::2].cos()), dim=-1).flatten(1)  # interleaved

    y = angles(height).unsqueeze(1).expand(-1, width, -1)
    x = angles(width).unsqueeze(0).expand(height, -1, -1)
    return torch.cat((y, x), dim=-1)


# ---- Transformer ---------------------------------------------------------------------------------------------
# As in DETR, position embeddings are added to queries and keys in every layer, never to values.
# need_weights=False: by default nn.MultiheadAttention returns its weights and so avoids the fused kernels.


class Dropout(nn.Module):
    """nn.Dropout with cheaper random numbers on a CPU.

    torch draws a CPU's Bernoulli variables one by one on one core, a quarter of ACT's step on two. Here four elements
    share one draw of 64 bits; the probability is rounded to 1/65536.
    """

    def __init__(self, p: float):
        super().__init__()
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        """In training, set each element of x (any shape) to 0 with probability p and divide the others by 1 - p."""
        if x.device.type != "cpu" or not self.training or self.p == 0 or torch.compiler.is_compiling():
            return F.dropout(x, self.p, self.training)
        bits = torch.empty((x.numel() + 3) // 4, dtype=torch.int64).random_(-(2**63), None)
        keep = bits.view(torch.int16)[: x.numel()].view(x.shape) >= round(self.p * 2**16) - 2**15
        return x * keep.to(x.dtype).mul_(1 / (1 - self.p))


class TransformerLayer(nn.Module):
    """What encoder and decoder layers share. Dropout has no state, so that one module serves every place."""

    def __init__(self, config: ACTConfig):
        super().__init__()
        self.self_attn = nn.MultiheadAttention(config.dim_model, config.n_heads, dropout=config.dropout)
        self.linear1 = nn.Linear(config.dim_model, config.dim_feedforward)
        self.linear2 = nn.Linear(config.dim_feedforward, config.dim_model)
        self.norm1 = nn.LayerNorm(config.dim_model)
        self.norm2 = nn.LayerNorm(config.dim_model)
        self.dropout = Dropout(config.dropout)
        self.activation = ACTIVATIONS[config.feedforward_activation]
        self.pre_norm = config.pre_norm

    def attend_self(self, x: Tensor, positions: Tensor, key_padding_mask: Tensor | None = None) -> Tensor:
        """Attention of the tokens to each other, without the residual; shapes as in Encoder.forward."""
        query = x + positions
        out, _ = self.self_attn(query, query, x, key_padding_mask=key_padding_mask, need_weights=False)
        return self.dropout(out)

    def feed_forward(self, x: Tensor) -> Tensor:
        """The two linear layers, applied to each token alone, without the residual: (S, B, D) -> (S, B, D)."""
        return self.dropout(self.linear2(self.dropout(self.activation(self.linear1(x)))))


class EncoderLayer(TransformerLayer):
    """Self-attention and feed-forward, each with a residual and a LayerNorm before (pre_norm) or after it."""

    def forward(self, x: Tensor, positions: Tensor, key_padding_mask: Tensor | None) -> Tensor:
        """One layer of Encoder.forward, with the same shapes."""
        if self.pre_norm:
            x = x + self.attend_self(self.norm1(x), positions, key_padding_mask)
            return x + self.feed_forward(self.norm2(x))
        x = self.norm1(x + self.attend_self(x, positions, key_padding_mask))
        return self.norm2(x + self.feed_forward(x))


class DecoderLayer(TransformerLayer):
    """An encoder layer with cross-attention to the encoder's output between its two parts."""

    def __init__(self, config: ACTConfig):
        super().__init__(config)
        self.multihead_attn = nn.MultiheadAttention(config.dim_model, config.n_heads, dropout=config.dropout)
        self.norm3 = nn.LayerNorm(config.dim_model)

    def attend_memory(self, x: Tensor, positions: Tensor, memory: Tensor, memory_positions: Tensor) -> Tensor:
        """Attention of x to the encoder's output `memory`, without the residual; shapes as in Decoder.forward."""
        query, key = x + positions, memory + memory_positions
        return self.dropout(self.multihead_attn(query, key, memory, need_weights=False)[0])

    def forward(self, x: Tensor, positions: Tensor, memory: Tensor, memory_positions: Tensor) -> Tensor:
        """One layer of Decoder.forward, with the same shapes."""
        if self.pre_norm:
            x = x + self.attend_self(self.norm1(x), positions)
            x = x + self.attend_memory(self.norm2(x), positions, memory, memory_positions)
            return x + self.feed_forward(self.norm3(x))
        x = self.norm1(x + self.attend_self(x, positions))
        x = self.norm2(x + self.attend_memory(x, positions, memory, memory_positions))
        return self.norm3(x + self.feed_forward(x))


class Encoder(nn.Module):
    """A stack of encoder layers. ACT has two: one reads the observation, one (the VAE's) the recorded actions."""

    def __init__(self, config: ACTConfig, n_layers: int):
        super().__init__()
        self.layers = nn.ModuleList(EncoderLayer(config) for _ in range(n_layers))
        # Post-norm layers end in a LayerNorm of their own, so that only pre-norm needs a final one.
        self.norm = nn.LayerNorm(config.dim_model) if config.pre_norm else nn.Identity()

    def forward(self, x: Tensor, positions: Tensor, key_padding_mask: Tensor | None = None) -> Tensor:
        """Tokens x (S, B, D) -> (S, B, D); positions (S, 1, D); key_padding_mask (B, S) bool, True where padded."""
        for layer in self.layers:
            x = layer(x, positions, key_padding_mask)
        return self.norm(x)


class Decoder(nn.Module):
    """A stack of decoder layers, which turns the encoder's output into one token per action of the chunk."""

    def __init__(self, config: ACTConfig):
        super().__init__()
        self.layers = nn.ModuleList(DecoderLayer(config) for _ in range(config.n_decoder_layers))
        self.norm = nn.LayerNorm(config.dim_model)  # always, as in DETR, whatever pre_norm says

    def forward(self, x: Tensor, positions: Tensor, memory: Tensor, memory_positions: Tensor) -> Tensor:
        """Tokens x (chunk, B, D) -> (chunk, B, D).

        `memory` (S, B, D) is the encoder's output; positions are (chunk, 1, D) and memory_positions (S, 1, D).
        """
        for layer in self.layers:
            x = layer(x, positions, memory, memory_positions)
        # The last layer's output. The authors' code took the first of a stack of seven, and so six layers never
        # trained (github.com/tonyzhaozh/act, issue 25): hence LeRobot's default of one decoder layer.
        return self.norm(x)


# ---- Image backbone ------------------------------------------------------------------------------------------


class FrozenBatchNorm(FrozenBatchNorm2d):
    """torchvision's frozen batch norm, except that bfloat16 stays bfloat16, in one fused operation.

    torchvision multiplies by float32 buffers, which doubles the memory of every feature map and has the next
    convolution round it again. Training in float32 is left as it is: fused, it rounds differently, and a ReLU that
    flips somewhere moves some gradients by half a percent.
    """

    weight: Tensor  # (C,) buffers of torchvision's class; nn.Module alone would call them Tensor or Module
    bias: Tensor
    running_mean: Tensor
    running_var: Tensor

    def forward(self, x: Tensor) -> Tensor:
        """Scale and shift each channel of x (B, C, H, W) by the stored statistics."""
        if x.dtype == torch.float32 and self.training:
            return super().forward(x)
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)


# ---- The network ---------------------------------------------------------------------------------------------


class ACT(nn.Module):
    """The network drawn above. Parameters have LeRobot's names and, but for the random draws, its initialisation."""

    vae_encoder_pos_enc: Tensor  # a buffer

    def __init__(self, config: ACTConfig):
        super().__init__()
        self.config = config
        D, L = config.dim_model, config.latent_dim

        if config.use_vae:
            self.vae_encoder = Encoder(config, config.n_vae_encoder_layers)
            self.vae_encoder_cls_embed = nn.Embedding(1, D)
            self.vae_encoder_robot_state_input_proj = nn.Linear(config.state_dim, D)
            self.vae_encoder_action_input_proj = nn.Linear(config.action_dim, D)
            self.vae_encoder_latent_output_proj = nn.Linear(D, 2 * L)  # mu, log(sigma^2)
            # CLS, state and the chunk. A persistent buffer, because LeRobot stores it.
            positions = sinusoidal_positions_1d(2 + config.chunk_size, D)
            self.register_buffer("vae_encoder_pos_enc", positions.unsqueeze(0))  # (1, 2 + chunk, D)

        # Batch norm is frozen (DETR's choice: batches are too small for statistics), all weights train.
        resnet = getattr(torchvision.models, config.vision_backbone)(
            weights=None,  # never a download: load_backbone takes pretrained weights
            norm_layer=FrozenBatchNorm,
            replace_stride_with_dilation=[False, False, config.replace_final_stride_with_dilation],
        )
        up_to_layer4 = [(name, child) for name, child in resnet.named_children() if name not in ("avgpool", "fc")]
        self.backbone = nn.Sequential(OrderedDict(up_to_layer4))

        self.encoder = Encoder(config, config.n_encoder_layers)
        self.decoder = Decoder(config)
        self.encoder_robot_state_input_proj = nn.Linear(config.state_dim, D)
        self.encoder_latent_input_proj = nn.Linear(L, D)
        self.encoder_img_feat_input_proj = nn.Conv2d(BACKBONE_CHANNELS[config.vision_backbone], D, kernel_size=1)
        self.encoder_1d_feature_pos_embed = nn.Embedding(2, D)  # latent, state
        self.decoder_pos_embed = nn.Embedding(config.chunk_size, D)  # learned, like DETR's object queries
        self.action_head = nn.Linear(D, config.action_dim)

        # As in LeRobot, Xavier for encoder and decoder only; the VAE encoder keeps torch's own initialisation.
        for module in (self.encoder, self.decoder):
            for parameter in module.parameters():
                if parameter.dim() > 1:
                    nn.init.xavier_uniform_(parameter)

        self._image_positions: dict[tuple, Tensor] = {}  # by feature size and device; not in the state dict

    def forward(self, batch: Mapping[str, Tensor]) -> tuple[Tensor, tuple[Tensor, Tensor] | tuple[None, None]]:
        """Predict a chunk of actions from one observation; everything is normalised already.

        Takes "observation.state" (B, state_dim) and "observation.images.<camera>" (B, 3, H, W) for each camera,
        whose sizes may differ; in training with the VAE also "action" (B, chunk, action_dim) and
        "action_is_pad" (B, chunk) bool, True past the end of the episode.

        Returns actions (B, chunk, action_dim) and, in training with the VAE, (mu, log_sigma_x2), each (B, L),
        else (None, None). The latent is drawn from torch's global generator.
        """
        state = batch[STATE]
        B = state.shape[0]

        posterior: tuple[Tensor, Tensor] | tuple[None, None] = (None, None)
        if self.config.use_vae and self.training:
            mu, log_sigma_x2 = posterior = self.encode_actions(state, batch[ACTION], batch[ACTION_IS_PAD])
            latent = mu + (log_sigma_x2 / 2).exp() * torch.randn_like(mu)
        else:
            latent = state.new_zeros(B, self.config.latent_dim)

        tokens = [
            self.encoder_latent_input_proj(latent).unsqueeze(0),  # (1, B, D)
            self.encoder_robot_state_input_proj(state).unsqueeze(0),  # (1, B, D)
        ]
        positions = [self.encoder_1d_feature_pos_embed.weight.unsqueeze(1)]  # (2, 1, D)
        # Attention sees a set and every camera gets the same positions, so that cameras differ by what they show
        # alone, never by their order. So it is in the paper's code and in LeRobot.
        for camera in self.config.cameras:
            features = self.encoder_img_feat_input_proj(self.backbone(batch[IMAGE_PREFIX + camera]))  # (B, D, h, w)
            tokens.append(features.flatten(2).permute(2, 0, 1))  # (h * w, B, D), row by row
            positions.append(self.image_positions(*features.shape[-2:], features.device))  # (h * w, 1, D)
        tokens, positions = torch.cat(tokens), torch.cat(positions)  # (S, B, D), (S, 1, D)

        memory = self.encoder(tokens, positions)
        # The decoder starts from zeros: what tells its outputs apart is decoder_pos_embed alone.
        chunk = memory.new_zeros(self.config.chunk_size, B, self.config.dim_model)
        chunk = self.decoder(chunk, self.decoder_pos_embed.weight.unsqueeze(1), memory, positions)

        # The last projection runs in the weights' own precision, also under autocast: bfloat16 has three decimal
        # digits, and rounding a joint angle to them costs more than a good policy's whole error.
        with torch.autocast(chunk.device.type, enabled=False):
            chunk = chunk.transpose(0, 1).to(self.action_head.weight.dtype)  # (B, chunk, D)
            actions = self.action_head(chunk)  # (B, chunk, action_dim)
        return actions, posterior

    def encode_actions(self, state: Tensor, actions: Tensor, action_is_pad: Tensor) -> tuple[Tensor, Tensor]:
        """The VAE's posterior of the chunk that was really performed: mu and log(sigma^2), each (B, L)."""
        B = state.shape[0]
        tokens = torch.cat(
            [
                self.vae_encoder_cls_embed.weight.expand(B, -1).unsqueeze(0),  # (1, B, D)
                self.vae_encoder_robot_state_input_proj(state).unsqueeze(0),  # (1, B, D)
                self.vae_encoder_action_input_proj(actions).transpose(0, 1),  # (chunk, B, D)
            ]
        )
        # Padded actions are hidden; CLS and the state never are.
        key_padding_mask = F.pad(action_is_pad, (2, 0), value=False)  # (B, 2 + chunk)
        out = self.vae_encoder(tokens, self.vae_encoder_pos_enc.transpose(0, 1), key_padding_mask)
        mu, log_sigma_x2 = self.vae_encoder_latent_output_proj(out[0]).chunk(2, dim=-1)  # out[0]: at CLS, (B, D)
        return mu, log_sigma_x2

    def image_positions(self, height: int, width: int, device: torch.device) -> Tensor:
        """The image tokens' position embedding, (height * width, 1, D) float32, computed once for each size."""
        key = (height, width, device)
        if torch.compiler.is_compiling():  # a cache that fills would make it compile twice
            return sinusoidal_positions_2d(height, width, self.config.dim_model, device).flatten(0, 1).unsqueeze(1)
        if key not in self._image_positions:
            with torch.inference_mode(False):  # an ordinary tensor, which a later training step may use too
                positions = sinusoidal_positions_2d(height, width, self.config.dim_model, device)
                self._image_positions[key] = positions.flatten(0, 1).unsqueeze(1)
        return self._image_positions[key]

    def load_backbone(self, state_dict: Mapping[str, Tensor]) -> None:
        """Load a torchvision ResNet's state dict, in place.

        `fc.*` has no counterpart here and frozen batch norm has no `num_batches_tracked`: both are left out.
        Raises ValueError naming the keys if anything else does not match.
        """
        found = {
            key: value
            for key, value in state_dict.items()
            if not key.startswith("fc.") and not key.endswith("num_batches_tracked")
        }
        if mismatch := describe_mismatch(self.backbone.state_dict(), found):
            raise ValueError(f"backbone weights do not fit {self.config.vision_backbone}: {mismatch}")
        self.backbone.load_state_dict(found)

    def other_parameters(self) -> list[nn.Parameter]:
        """All parameters outside the backbone: the first of LeRobot's two optimizer groups (get_optim_params)."""
        return [p for name, p in self.named_parameters() if not name.startswith("backbone.")]

    def backbone_parameters(self) -> list[nn.Parameter]:
        """The backbone's parameters: LeRobot's second optimizer group, with a learning rate of its own."""
        return list(self.backbone.parameters())


@contextlib.contextmanager
def full_float32() -> Generator[None]:
    """Inside, NVIDIA GPUs compute float32 products in float32 and not in TF32; elsewhere nothing changes.

    For validation and for the robot, so that one number is behind a policy wherever it runs.
    """
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32
    matmul.allow_tf32 = cudnn.allow_tf32 = False
    try:
        yield
    finally:
        matmul.allow_tf32, cudnn.allow_tf32 = before


def describe_mismatch(expected: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> str:
    """Say in one line how the keys and shapes of `found` differ from `expected`; "" if they do not."""

    def listed(items: list[str]) -> str:
        return ", ".join(items[:4]) + (f" and {len(items) - 4} more" if len(items) > 4 else "")

    missing = [key for key in expected if key not in found]
    unexpected = [key for key in found if key not in expected]
    reshaped = [
        f"{key} {tuple(found[key].shape)} instead of {tuple(tensor.shape)}"
        for key, tensor in expected.items()
        if key in found and found[key].shape != tensor.shape
    ]
    kinds = (("missing", missing), ("unexpected", unexpected), ("other shapes:", reshaped))
    return "; ".join(f"{what} {listed(items)}" for what, items in kinds if items)


# ---- Loss ----------------------------------------------------------------------------------------------------


def valid_elements(actions: Tensor, action_is_pad: Tensor) -> Tensor:
    """How many numbers of actions (B, chunk, action_dim) are no padding, as a scalar (int64); pad (B, chunk) bool."""
    return (~action_is_pad).sum() * actions.shape[-1]


def loss_terms(
    actions_hat: Tensor, actions: Tensor, action_is_pad: Tensor, mu: Tensor | None, log_sigma_x2: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss as sums: under DDP they have to be divided by counts over the *global* batch.

    actions_hat and actions (B, chunk, action_dim), action_is_pad (B, chunk) bool, mu and log_sigma_x2 (B, L) or
    None. Returns scalars: the sum of |error| over actions that are not padding, the number of those elements
    (int64), and KL(N(mu, sigma^2) || N(0, 1)) summed over the latent and the batch (Kingma & Welling, arXiv
    1312.6114, appendix B; 0 without a posterior). All in float32, whatever the precision of the forward pass.
    """
    is_pad = action_is_pad.unsqueeze(-1)  # (B, chunk, 1)
    l1_sum = (actions_hat.float() - actions.float()).abs().masked_fill(is_pad, 0).sum()
    n_valid_elements = valid_elements(actions, action_is_pad)
    if mu is None:
        return l1_sum, n_valid_elements, l1_sum.new_zeros(())
    assert log_sigma_x2 is not None  # both or neither
    mu, log_sigma_x2 = mu.float(), log_sigma_x2.float()
    kl_sum = -0.5 * (1 + log_sigma_x2 - mu.square() - log_sigma_x2.exp()).sum()
    return l1_sum, n_valid_elements, kl_sum


# ---- Inference -----------------------------------------------------------------------------------------------


class TemporalEnsembler:
    """Average all predictions made for the present step (arXiv 2304.13705, algorithm 2), online.

    Weights are exp(-m * i), where i = 0 is the *oldest* prediction: with m > 0 older ones count for more.
    Needs a new chunk at every control step.
    """

    def __init__(self, m: float = 0.01):
        self.m = m
        self.reset()

    def reset(self) -> None:
        """Forget all predictions: call at the start of every episode."""
        self.weighted_sum: Tensor | None = None

    def update(self, chunk: Tensor) -> Tensor:
        """Take this step's chunk (B, chunk, action_dim); return the ensembled action (B, action_dim) for now."""
        if self.weighted_sum is None:
            self.weighted_sum = torch.zeros_like(chunk, dtype=torch.float32)
            # One row for each future step: how many predictions it has, and the sum of their weights.
            self.count = self.weighted_sum.new_zeros(chunk.shape[1], 1)
            self.total_weight = torch.zeros_like(self.count)
        weight = torch.exp(-self.m * self.count)  # (chunk, 1): a step's i-th prediction weighs exp(-m * i)
        self.weighted_sum = self.weighted_sum + weight * chunk
        self.total_weight = self.total_weight + weight
        self.count = self.count + 1
        action = self.weighted_sum[:, 0] / self.total_weight[0]
        # Time moves on one step: the present row leaves, an empty one enters at the far end.
        self.weighted_sum = F.pad(self.weighted_sum[:, 1:], (0, 0, 0, 1))
        self.total_weight = F.pad(self.total_weight[1:], (0, 0, 0, 1))
        self.count = F.pad(self.count[1:], (0, 0, 0, 1))
        return action
