"""The networks: families of three libraries that have BatchNorm, built without any download."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import segmentation_models_pytorch as smp
import timm
import torch
from torch import Tensor, nn
from torchvision import models
from torchvision.models.detection import FasterRCNN, RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import mobilenet_backbone, resnet_fpn_backbone

#: A batch of that many samples as one forward pass's inputs, for a device and dtype.
Inputs = Callable[[int, dict[str, Any]], Any]


@dataclass(frozen=True, kw_only=True)
class Model:
    """One network of the zoo.

    Attributes:
        name: library and name, unique.
        build: makes it, without weights from anywhere.
        inputs: of a forward pass in eval mode.
        train_inputs: in train mode, where they differ.
        outputs: the submodule whose outputs are looked at; the network itself unless it selects boxes.
        meta: built on the meta device, for shapes only: too large to copy for every method.

    """

    name: str
    build: Callable[[], nn.Module]
    inputs: Inputs
    train_inputs: Inputs | None = None
    outputs: str = ""
    meta: bool = False


def noise(*shape: int) -> Inputs:
    """Return noise of that shape per sample."""

    def draw(batch: int, factory: dict[str, Any]) -> Tensor:
        return torch.randn(batch, *shape, generator=torch.Generator().manual_seed(batch)).to(**factory)

    return draw


def images(size: int) -> Inputs:
    return noise(3, size, size)


def pair(inputs: Inputs) -> Inputs:
    """Return two arguments, as optical flow takes two frames."""

    def draw(batch: int, factory: dict[str, Any]) -> tuple[Any, Any]:
        first = inputs(batch, factory)
        return first, first.flip(-1)

    return draw


def pictures(batch: int, factory: dict[str, Any]) -> list[Tensor]:
    return list(images(64)(batch, factory).sigmoid())


def annotated(batch: int, factory: dict[str, Any]) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    device = factory["device"]
    target = {
        "boxes": torch.tensor([[8.0, 8.0, 40.0, 48.0]], **factory),
        "labels": torch.tensor([1], device=device),
        "masks": torch.ones(1, 64, 64, dtype=torch.uint8, device=device),
    }
    return pictures(batch, factory), [dict(target) for _ in range(batch)]


# ---------------------------------------------------------------------------------------------------- timm

_TIMM = """
botnet26t_256 eca_botnext26ts_256 haloregnetz_b lambda_resnet26t sebotnet33ts_256 eca_resnext26ts
gcresnext26ts gernet_s mobileone_s0 regnetz_b16 regnetz_c16 repvgg_a0 resnext26ts seresnext26ts resnet32ts
test_byobnet convmixer_768_32 cpubone_b0_bfrobust cpubone_b1_dwnorm cpubone_nano cs3darknet_s darknet17
darknet53 sedarknet21 cspnext_tiny cspnext_s densenet121 dla34 dla60x_c dpn48b dpn68 efficientformer_l1
efficientformerv2_s0 efficientnet_b0 efficientnet_b1_pruned efficientnet_blur_b0 efficientnet_cc_b0_4e
efficientnet_el efficientnet_lite0 efficientnetv2_rw_t fbnetc_100 mixnet_s mnasnet_050 mnasnet_small
mobilenet_edgetpu_100 mobilenetv1_100 mobilenetv2_050 mobilenetv2_120d semnasnet_075 spnasnet_100
test_efficientnet tf_efficientnet_b0 tf_efficientnet_cc_b0_4e tf_efficientnet_el tf_efficientnet_lite0
tf_efficientnetv2_b0 tinynet_e efficientvim_m1 efficientvim_m1_dist efficientvit_b0 efficientvit_l1
efficientvit_m0 fasternet_t0 fastvit_t8 fastvit_s12 fastvit_sa12 ghostnet_050 ghostnetv2_100 hardcorenas_a
hgnet_tiny hgnetv2_b0 hrnet_w18_small iformer_t inception_next_atto inception_next_tiny inception_v3
inception_v4 lcnetv2_small levit_128 levit_128s levit_conv_128s levit_256d lowformer_b0 coatnet_pico_rw_224
coatnet_bn_0_rw_224 coatnet_nano_cc_224 maxvit_pico_rw_256 maxvit_tiny_tf_224 test_coatnet test_maxvit
lcnet_050 mobilenetv3_small_050 mobilenetv3_large_100 mobilenetv3_rw mobilenetv4_conv_small
mobilenetv4_conv_aa_medium mobilenetv4_hybrid_medium tf_mobilenetv3_small_minimal_100 mobilevit_xxs
mobilevit_s mobilevitv2_050 nextvit_small regnetx_002 regnetx_016 regnety_002 regnety_016 regnetz_005
regnetv_040 repghostnet_050 repvit_m0_9 res2net50_14w_8s res2net50d resnest14d resnest26d resnet10t resnet18
resnet18d resnet26t resnet50 resnet101 resnetblur18 resnext50_32x4d ecaresnet26t ecaresnext26t_32x4d
seresnet18 skresnet18 skresnext50_32x4d test_resnet resnetv2_18 resnetv2_18d rexnet_100 rexnetr_100
selecsls42b legacy_seresnet18 legacy_seresnext26_32x4d shvit_s1 starnet_s1 starnet_s050 swiftformer_xs
swiftformer_l1 tiny_vit_5m_224 tresnet_m vgg11_bn visformer_tiny vit_small_resnet26d_224 volo_d1_224
ese_vovnet39b vovnet39a legacy_xception xception41 xception41p xcit_nano_12_p16_224
"""

#: Where 64 pixels are too few, or the size is part of the network.
_TIMM_SIZES = {
    "haloregnetz_b": 224,
    "efficientformer_l1": 224,
    "inception_v3": 96,
    "inception_v4": 96,
}
#: Networks made for one size, which must be told another.
_TIMM_TOLD = """
botnet26t_256 eca_botnext26ts_256 lambda_resnet26t sebotnet33ts_256 efficientformerv2_s0 efficientvit_m0
levit_128 levit_128s levit_conv_128s levit_256d coatnet_pico_rw_224 coatnet_bn_0_rw_224 coatnet_nano_cc_224
maxvit_pico_rw_256 maxvit_tiny_tf_224 test_coatnet test_maxvit mobilevit_xxs mobilevit_s mobilevitv2_050
repvit_m0_9 swiftformer_xs swiftformer_l1 visformer_tiny vit_small_resnet26d_224 volo_d1_224
xcit_nano_12_p16_224
"""
#: More than 40 million parameters.
_TIMM_META = """
darknet53 efficientvit_l1 inception_v4 resnet101 vgg11_bn vit_small_resnet26d_224
"""


def _of_timm(name: str) -> Model:
    told = {"img_size": 64} if name in _TIMM_TOLD.split() else {}
    return Model(
        name=f"timm/{name}",
        build=partial(timm.create_model, name, pretrained=False, num_classes=10, **told),
        inputs=images(_TIMM_SIZES.get(name, 64)),
        meta=name in _TIMM_META.split(),
    )


# --------------------------------------------------------------------------------------------- torchvision

_CLASSIFICATION = """
densenet121 efficientnet_b0 mnasnet0_5 mnasnet1_3 mobilenet_v2 mobilenet_v3_large mobilenet_v3_small
regnet_x_400mf regnet_y_400mf resnet18 resnet34 resnet50 resnext50_32x4d shufflenet_v2_x0_5
shufflenet_v2_x1_5 vgg11_bn
"""
_SEGMENTATION = "deeplabv3_mobilenet_v3_large deeplabv3_resnet50 fcn_resnet50 lraspp_mobilenet_v3_large"
_VIDEO = "r3d_18 mc3_18 r2plus1d_18 s3d"
_DETECTION = """
fasterrcnn_mobilenet_v3_large_fpn fasterrcnn_resnet50_fpn fcos_resnet50_fpn
maskrcnn_resnet50_fpn_v2 retinanet_resnet50_fpn
retinanet_resnet50_fpn_v2
"""
_SMALL: dict[str, Any] = {"num_classes": 3, "min_size": 64, "max_size": 64}
#: Few boxes: what follows the backbone has no BatchNorm or sees one map per box.
_FEW: dict[str, Any] = {
    "rpn_pre_nms_top_n_test": 10,
    "rpn_post_nms_top_n_test": 10,
    "box_detections_per_img": 2,
}


def _torchvision(name: str, **options: Any) -> Callable[[], nn.Module]:
    return partial(models.get_model, name, weights=None, **options)


def _frozen_faster_rcnn() -> nn.Module:
    # What torchvision builds when it has weights; else it puts BatchNorm2d in FrozenBatchNorm2d's place.
    backbone = mobilenet_backbone(backbone_name="mobilenet_v3_large", weights=None, fpn=True)
    anchors = AnchorGenerator(((32, 64, 128, 256, 512),) * 3, ((0.5, 1.0, 2.0),) * 3)
    model: nn.Module = FasterRCNN(backbone, rpn_anchor_generator=anchors, **_SMALL, **_FEW)
    return model


def _frozen_retinanet() -> nn.Module:
    backbone = resnet_fpn_backbone(backbone_name="resnet18", weights=None)
    model: nn.Module = RetinaNet(backbone, **_SMALL)
    return model


class _FlowEncoders(nn.Module):
    """The encoders of RAFT, whose coordinates after them are single precision whatever the network is."""

    def __init__(self) -> None:
        super().__init__()
        raft: Any = models.optical_flow.raft_large(weights=None)
        self.feature_encoder, self.context_encoder = raft.feature_encoder, raft.context_encoder

    def forward(self, frames: Tensor, context: Tensor) -> list[Tensor]:
        return [self.feature_encoder(frames), self.context_encoder(context)]


def _of_torchvision() -> Iterator[Model]:
    small = images(64)
    for name in _CLASSIFICATION.split():
        build = _torchvision(name, num_classes=10)
        yield Model(name=f"torchvision/{name}", build=build, inputs=small, meta=name == "vgg11_bn")
    for name in ("googlenet", "inception_v3"):
        yield Model(
            name=f"torchvision/{name}",
            build=_torchvision(name, num_classes=10, init_weights=False),
            inputs=images(96),
            # The auxiliary head pools 5×5 windows of a map that has a sixteenth of the image's size.
            train_inputs=images(299) if name == "inception_v3" else None,
        )
    for name in _SEGMENTATION.split():
        build = _torchvision(name, weights_backbone=None, num_classes=3)
        yield Model(name=f"torchvision/{name}", build=build, inputs=small)
    for name in _VIDEO.split():
        # S3D pools 7×7 windows of a map that has a thirty-second of the frame's size.
        inputs = noise(3, 16, 224, 224) if name == "s3d" else noise(3, 4, 32, 32)
        build = _torchvision(name, num_classes=10)
        yield Model(name=f"torchvision/{name}", build=build, inputs=inputs, meta=name == "s3d")
    detectors = {
        name: _torchvision(name, weights_backbone=None, **_SMALL, **(_FEW if "rcnn" in name else {}))
        for name in _DETECTION.split()
    }
    detectors["ssdlite320_mobilenet_v3_large"] = _torchvision(
        "ssdlite320_mobilenet_v3_large", weights_backbone=None, num_classes=3
    )
    detectors["fasterrcnn_mobilenet_v3_large frozen"] = _frozen_faster_rcnn
    detectors["retinanet_resnet18 frozen"] = _frozen_retinanet
    for name, build in detectors.items():
        yield Model(
            name=f"torchvision/{name}",
            build=build,
            inputs=pictures,
            train_inputs=annotated,
            outputs="backbone",
        )
    yield Model(name="torchvision/raft_large encoders", build=_FlowEncoders, inputs=pair(small))


# ----------------------------------------------------------------------------- segmentation_models_pytorch

_DECODERS = {
    "Unet": """resnet18 resnext50_32x4d densenet121 vgg11_bn dpn68 se_resnet50 xception
        mobilenet_v2 efficientnet-b0 timm-efficientnet-b0 timm-skresnet18 mit_b0
        mobileone_s0 tu-regnety_002""",
    "UnetPlusPlus": "resnet18 mobilenet_v2",
    "MAnet": "resnet18 efficientnet-b0",
    "Linknet": "resnet18 mobilenet_v2",
    "FPN": "resnet18 timm-efficientnet-b0",
    "PSPNet": "resnet18 mobilenet_v2",
    "DeepLabV3": "resnet18 mobilenet_v2",
    "DeepLabV3Plus": "resnet18 efficientnet-b0",
    "PAN": "resnet18",
    "UPerNet": "resnet18 mit_b0",
    "Segformer": "resnet18 mit_b0",
    "DPT": "tu-test_vit",
}


def _of_segmentation() -> Iterator[Model]:
    for decoder, encoders in _DECODERS.items():
        for encoder in encoders.split():
            yield Model(
                name=f"smp/{decoder} {encoder}",
                build=partial(getattr(smp, decoder), encoder, encoder_weights=None),
                # PAN pools twice more than the encoder.
                inputs=images(128 if decoder == "PAN" else 64),
            )


#: Every network of the zoo by its name.
ZOO: dict[str, Model] = {
    model.name: model for model in (*map(_of_timm, _TIMM.split()), *_of_torchvision(), *_of_segmentation())
}
