"""The hardest models of timm, torchvision and segmentation_models_pytorch, untrained and small."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import segmentation_models_pytorch as smp
import timm
import torch
from timm.layers import BatchNormAct2d, StdConv2d
from timm.models.convmixer import ConvMixer
from timm.models.resnetv2 import ResNetV2
from torch import Tensor, nn
from torchvision import models
from torchvision.models.detection import FasterRCNN, RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import mobilenet_backbone, resnet_fpn_backbone

#: A batch of that many samples, drawn with that seed, as one forward pass's inputs.
Inputs = Callable[[int, int], Any]


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One model and what is known about its BatchNorm layers at these input sizes.

    Attributes:
        name: the model's name.
        build: makes the model, without any download.
        inputs: inputs of a forward pass.
        why: what makes it hard.
        sites: number of BatchNorm layers.
        foldable: of these, how many have a producer that may be folded into.
        single: of these, how many see one element per sample and channel.
        uncalled: of these, how many an eval-mode forward pass never reaches.
        train_inputs: inputs in train mode, where they differ.
        single_in_training: a layer that sees one element, but only in train mode.
        compared: the submodule whose fp32 outputs are compared; the model itself where it is continuous.
        slow: left to the slow tests.

    """

    name: str
    build: Callable[[], nn.Module]
    inputs: Inputs
    why: str
    sites: int
    foldable: int
    single: int = 0
    uncalled: int = 0
    train_inputs: Inputs | None = None
    single_in_training: str | None = None
    compared: str = ""
    slow: bool = False


def noise(*shape: int) -> Inputs:
    """Return noise whose samples are the same in batches of any size that start at the same seed."""

    def draw(batch: int, seed: int) -> Tensor:
        generators = [torch.Generator().manual_seed(seed + index) for index in range(batch)]
        return torch.stack([torch.randn(shape, generator=generator) for generator in generators])

    return draw


def images(size: int) -> Inputs:
    return noise(3, size, size)


def frames_and_context(batch: int, seed: int) -> tuple[Tensor, Tensor]:
    return images(64)(batch, seed), images(64)(batch, seed + 1000)


def pictures(batch: int, seed: int) -> list[Tensor]:
    return list(images(64)(batch, seed).sigmoid())


def annotated(batch: int, seed: int) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    boxes, labels = torch.tensor([[8.0, 8.0, 40.0, 48.0]]), torch.tensor([1])
    return pictures(batch, seed), [{"boxes": boxes, "labels": labels} for _ in range(batch)]


def weight_standardized() -> nn.Module:
    # StdConv2d calls F.batch_norm on its own weight; here it stands beside real BatchNorm layers.
    return ResNetV2(
        layers=(1, 1, 1, 1),
        channels=(32, 64, 64, 128),
        num_classes=10,
        stem_chs=16,
        conv_layer=StdConv2d,
        norm_layer=BatchNormAct2d,
    )


class RaftEncoders(nn.Module):
    """The two encoders of RAFT, whose coordinates after them are single precision whatever the model is."""

    def __init__(self) -> None:
        super().__init__()
        raft = models.optical_flow.raft_large(weights=None)
        self.feature_encoder, self.context_encoder = raft.feature_encoder, raft.context_encoder

    def forward(self, frames: Tensor, context: Tensor) -> list[Tensor]:
        return [self.feature_encoder(frames), self.context_encoder(context)]


_SMALL_DETECTOR: dict[str, Any] = {"num_classes": 3, "min_size": 64, "max_size": 64}


def faster_rcnn() -> nn.Module:
    # What fasterrcnn_mobilenet_v3_large_320_fpn builds when it has weights; without any, torchvision
    # itself would put BatchNorm2d in the place of FrozenBatchNorm2d.
    backbone = mobilenet_backbone(backbone_name="mobilenet_v3_large", weights=None, fpn=True)
    anchors = AnchorGenerator(((32, 64, 128, 256, 512),) * 3, ((0.5, 1.0, 2.0),) * 3)
    return FasterRCNN(
        backbone,
        rpn_anchor_generator=anchors,
        rpn_pre_nms_top_n_test=20,
        rpn_post_nms_top_n_test=20,
        box_detections_per_img=10,
        # An untrained head scores everything about a third: keep the boxes, to have outputs to compare.
        box_score_thresh=0.0,
        **_SMALL_DETECTOR,
    )


def retinanet() -> nn.Module:
    backbone = resnet_fpn_backbone(
        backbone_name="resnet18", weights=None, norm_layer=nn.BatchNorm2d, trainable_layers=5
    )
    return RetinaNet(backbone, score_thresh=0.0, topk_candidates=20, **_SMALL_DETECTOR)


def of_timm(name: str, **options: Any) -> Callable[[], nn.Module]:
    return partial(timm.create_model, name, pretrained=False, num_classes=10, **options)


def of_segmentation(model: type[nn.Module]) -> Callable[[], nn.Module]:
    return partial(model, "resnet18", encoder_weights=None)


ZOO = (
    Entry(
        name="densenet121",
        build=of_timm("densenet121"),
        inputs=images(64),
        why="norm and activation in one module, before the convolution; features read by many layers",
        sites=121,
        foldable=59,
    ),
    Entry(
        name="levit_128s",
        build=of_timm("levit_128s", img_size=64),
        inputs=images(64),
        why="BatchNorm1d on tokens flattened to (N·L, C)",
        sites=52,
        foldable=4,
        single=48,
    ),
    Entry(
        name="shvit_s1",
        build=of_timm("shvit_s1"),
        inputs=images(64),
        why="fused conv + norm blocks, maps of one element, BatchNorm1d before the classifier",
        sites=74,
        foldable=73,
        single=31,
    ),
    Entry(
        name="mixnet_s",
        build=of_timm("mixnet_s"),
        inputs=images(64),
        why="norm after several concatenated convolutions",
        sites=49,
        foldable=15,
    ),
    Entry(
        name="convmixer_96_32",
        build=partial(ConvMixer, dim=96, depth=32, kernel_size=9, patch_size=7, num_classes=10),
        inputs=images(28),
        why="convolution, activation, then norm: nothing to fold into",
        sites=65,
        foldable=0,
    ),
    Entry(
        name="rexnet_100",
        build=of_timm("rexnet_100"),
        inputs=images(64),
        why="odd channel counts, norm on 1×1 maps inside squeeze-and-excite",
        sites=62,
        foldable=62,
        single=13,
    ),
    Entry(
        name="nextvit_small",
        build=of_timm("nextvit_small"),
        inputs=images(64),
        why="BatchNorm1d on (N, C, L), norms with a method that fuses them",
        sites=61,
        foldable=33,
        slow=True,
    ),
    Entry(
        name="tf_efficientnet_b0",
        build=of_timm("tf_efficientnet_b0"),
        inputs=images(64),
        why="eps 1e-3, padding that depends on the shape",
        sites=49,
        foldable=49,
    ),
    Entry(
        name="weight_standardized",
        build=weight_standardized,
        inputs=images(64),
        why="F.batch_norm on weights, which is no site, beside BatchNormAct2d",
        sites=13,
        foldable=0,
    ),
    Entry(
        name="skresnext50_32x4d",
        build=of_timm("skresnext50_32x4d"),
        inputs=images(64),
        why="selective kernels: BatchNorm2d on 1×1 maps beside BatchNormAct2d",
        sites=85,
        foldable=85,
        single=16,
        slow=True,
    ),
    Entry(
        name="repvit_m0_9",
        build=of_timm("repvit_m0_9"),
        inputs=images(64),
        why="Sequential subclasses with a method that reads running statistics",
        sites=108,
        foldable=83,
        single=2,
        slow=True,
    ),
    Entry(
        name="repvgg_a0",
        build=of_timm("repvgg_a0"),
        inputs=images(64),
        why="identity branches that are a norm alone",
        sites=61,
        foldable=44,
    ),
    Entry(
        name="fastvit_t8",
        build=of_timm("fastvit_t8"),
        inputs=images(64),
        why="reparameterizable branches, norms without a convolution before them",
        sites=70,
        foldable=46,
        slow=True,
    ),
    Entry(
        name="mobilenetv3_small_050",
        build=of_timm("mobilenetv3_small_050"),
        inputs=images(64),
        why="eight channels, hard-swish inside the norm module",
        sites=34,
        foldable=34,
    ),
    Entry(
        name="resnetblur18",
        build=of_timm("resnetblur18"),
        inputs=images(64),
        why="buffers outside the state dict",
        sites=20,
        foldable=20,
    ),
    Entry(
        name="dpn48b",
        build=of_timm("dpn48b"),
        inputs=images(64),
        why="inputs in tuples, norm before the convolution",
        sites=54,
        foldable=33,
    ),
    Entry(
        name="hrnet_w18_small",
        build=of_timm("hrnet_w18_small"),
        inputs=images(64),
        why="parallel branches that exchange features",
        sites=91,
        foldable=91,
        slow=True,
    ),
    Entry(
        name="mobilevit_xxs",
        build=of_timm("mobilevit_xxs"),
        inputs=images(64),
        why="branches on shapes: torch.fx cannot trace it",
        sites=32,
        foldable=0,
    ),
    Entry(
        name="tiny_vit_5m_224",
        build=of_timm("tiny_vit_5m_224"),
        inputs=images(64),
        why="norms inside a transformer that torch.fx cannot trace",
        sites=27,
        foldable=0,
        slow=True,
    ),
    Entry(
        name="efficientvit_m0",
        build=of_timm("efficientvit_m0"),
        inputs=images(64),
        why="113 norms in cascaded attention, maps of one element",
        sites=113,
        foldable=0,
        single=24,
        slow=True,
    ),
    Entry(
        name="xcit_nano_12_p16_224",
        build=of_timm("xcit_nano_12_p16_224"),
        inputs=images(64),
        why="BatchNorm2d on tokens laid out as images, LayerNorm beside it",
        sites=16,
        foldable=4,
    ),
    Entry(
        name="googlenet",
        build=partial(models.googlenet, weights=None, init_weights=False, num_classes=10),
        inputs=images(96),
        why="auxiliary heads that run in train mode only",
        sites=59,
        foldable=57,
        uncalled=2,
    ),
    Entry(
        name="inception_v3",
        build=partial(models.inception_v3, weights=None, init_weights=False, num_classes=10),
        inputs=images(75),
        # The auxiliary head pools 5×5 windows of a map that has a sixteenth of the image's size.
        train_inputs=images(299),
        single_in_training="AuxLogits.conv1.bn",
        why="an auxiliary head in train mode, eps 1e-3, maps of one element",
        sites=96,
        foldable=94,
        single=20,
        uncalled=2,
        slow=True,
    ),
    Entry(
        name="shufflenet_v2_x0_5",
        build=partial(models.shufflenet_v2_x0_5, weights=None, num_classes=10),
        inputs=images(64),
        why="channel shuffles between the norms",
        sites=56,
        foldable=56,
    ),
    Entry(
        name="deeplabv3_mobilenet_v3_large",
        build=partial(
            models.segmentation.deeplabv3_mobilenet_v3_large,
            weights=None,
            weights_backbone=None,
            num_classes=3,
        ),
        inputs=images(64),
        why="a pooling branch of one element, outputs in a dict, eps 1e-3",
        sites=53,
        foldable=53,
        single=1,
    ),
    Entry(
        name="lraspp_mobilenet_v3_large",
        build=partial(
            models.segmentation.lraspp_mobilenet_v3_large, weights=None, weights_backbone=None, num_classes=3
        ),
        inputs=images(64),
        why="two resolutions, outputs in a dict",
        sites=47,
        foldable=47,
    ),
    Entry(
        name="fasterrcnn_mobilenet_v3_large",
        build=faster_rcnn,
        inputs=pictures,
        train_inputs=annotated,
        compared="backbone",
        why="FrozenBatchNorm2d with buffers for γ and β; lists of images",
        sites=46,
        foldable=0,
        slow=True,
    ),
    Entry(
        name="retinanet_resnet18",
        build=retinanet,
        inputs=pictures,
        train_inputs=annotated,
        compared="backbone",
        why="lists of images; torch.fx cannot trace it",
        sites=20,
        foldable=0,
        slow=True,
    ),
    Entry(
        name="raft_encoders",
        build=RaftEncoders,
        inputs=frames_and_context,
        why="two arguments, InstanceNorm2d of its own beside BatchNorm2d, outputs in a list",
        sites=15,
        foldable=15,
    ),
    Entry(
        name="r3d_18",
        build=partial(models.video.r3d_18, weights=None, num_classes=10),
        inputs=noise(3, 4, 32, 32),
        why="BatchNorm3d after subclasses of Conv3d",
        sites=20,
        foldable=4,
        slow=True,
    ),
    Entry(
        name="unet_resnet18",
        build=of_segmentation(smp.Unet),
        inputs=images(64),
        why="skip connections, a check of the input's shape",
        sites=30,
        foldable=30,
    ),
    Entry(
        name="pspnet_resnet18",
        build=of_segmentation(smp.PSPNet),
        inputs=images(64),
        why="norms that no forward pass reaches",
        sites=24,
        foldable=0,
        uncalled=10,
    ),
    Entry(
        name="deeplabv3plus_resnet18",
        build=of_segmentation(smp.DeepLabV3Plus),
        inputs=images(64),
        why="a pooling branch of one element, dilated convolutions",
        sites=29,
        foldable=0,
        single=1,
    ),
)

#: Models that normalize their weights by F.batch_norm and have no BatchNorm layer.
WITHOUT_SITES = ("nf_regnet_b0", "resnetv2_50x1_bit")
