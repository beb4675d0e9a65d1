"""The classification networks of torchvision and of timm: after a rewrite no batch normalization is left of theirs."""

import copy
import itertools
from typing import Any

import pytest
import timm
import torch
import torchvision
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torchvision.models.regnet import BlockParams

from normlab import models, norms
from normlab.common.errors import UserError

TORCHVISION = torchvision.models.list_models(module=torchvision.models)
TIMM = (
    *("bat_resnext26ts", "cspresnet50", "densenet121", "dla34", "dpn48b", "efficientformerv2_s0", "efficientnet_b0"),
    *("efficientvit_b0", "efficientvit_m0", "ese_vovnet19b_dw", "fastvit_t8", "gernet_s", "ghostnet_100"),
    *("hrnet_w18_small", "inception_v3", "lambda_resnet26t", "lcnet_035", "legacy_seresnet18", "levit_128s"),
    *("maxvit_tiny_tf_224", "mixnet_s", "mnasnet_050", "mobilenetv2_035", "mobilenetv3_large_100", "mobilevit_xxs"),
    *("nasnetalarge", "nfnet_l0", "regnetx_002", "regnety_002", "repvgg_a0", "repvit_m0_9", "resnest14d", "resnet10t"),
    *("resnetv2_50", "rexnet_100", "selecsls42", "shvit_s1", "skresnet18", "starnet_s1", "tf_efficientnet_b0"),
    *("tiny_vit_5m_224", "vgg11_bn", "visformer_tiny", "vit_tiny_patch16_224", "xception41"),
)
WITHOUT_NORMS = {  # batch normalizations, that is
    *("nfnet_l0", "vit_tiny_patch16_224"),
    *(name for name in TORCHVISION if name.startswith(("alexnet", "convnext", "squeezenet", "swin", "vit"))),
    *("vgg11", "vgg13", "vgg16", "vgg19"),
}
UNTRACED = {  # their blocks branch on the size or the device of their maps, with norms inside
    *("bat_resnext26ts", "efficientvit_b0", "efficientvit_m0", "mobilevit_xxs", "tiny_vit_5m_224"),
}


def created(library: str, name: str, **options: int) -> nn.Module:
    if library == "timm":
        network: nn.Module = timm.create_model(name, num_classes=10, **options)
        return network
    auxiliary = {"aux_logits": True, "init_weights": False} if name in ("googlenet", "inception_v3") else {}
    return torchvision.models.get_model(name, num_classes=10, **auxiliary)


def parts(network: nn.Module) -> set[object]:
    """The kinds of modules of a network: class, and names without numbers and classes of the modules inside."""
    return {
        (type(module), frozenset((name.strip("0123456789"), type(each)) for name, each in module.named_children()))
        for module in network.modules()
    } | {type(network)}


@pytest.fixture
def sizes_on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """torchvision computes the sizes of RegNets by tensors, which need data on the meta device, too."""
    compute = BlockParams.from_init_params

    def on_cpu(cls: type, *args: Any, **kwargs: Any) -> BlockParams:
        with torch.device("cpu"):
            return compute(*args, **kwargs)

    monkeypatch.setattr(BlockParams, "from_init_params", classmethod(on_cpu))


@pytest.mark.slow
@pytest.mark.usefixtures("sizes_on_cpu")
@pytest.mark.parametrize("library", ["torchvision", "timm"])
def test_every_norm_of_a_library_is_replaced_or_its_network_refused(library: str) -> None:
    """Counted before and after, in turn under a variant without a layer and under one with a layer for each.

    Of networks that are made of the same kinds of modules, only deeper or wider (EfficientNets), the smallest.
    """
    names = TIMM if library == "timm" else TORCHVISION
    assert len(names) >= 40
    networks: dict[str, nn.Module] = {}
    for name in names:
        with torch.device("meta"):
            networks[name] = created(library, name)
    names = sorted(names, key=lambda name: len(list(networks[name].modules())))
    seen: set[object] = set()
    norms_in_turn = itertools.cycle(["none", "gn"])
    for name in names:
        network = networks.pop(name)
        before = sum(isinstance(module, _BatchNorm) for module in network.modules())
        assert (before == 0) == (name in WITHOUT_NORMS), name
        kinds = parts(network)
        if kinds <= seen:
            continue
        seen |= kinds
        norm = next(norms_in_turn)
        if name in WITHOUT_NORMS | UNTRACED:
            with pytest.raises(UserError, match="branch" if name in UNTRACED else "no batch normalization"):
                norms.rewrite(network, norm)
            continue
        network = norms.rewrite(network, norm, **({"groups": 1} if norm == "gn" else {}))
        assert not any(isinstance(module, _BatchNorm) for module in network.modules()), name
        if norm == "gn":
            assert sum(type(module).__name__ == "GroupNorm2d" for module in network.modules()) == before, name


@pytest.mark.slow
@pytest.mark.parametrize(
    ("library", "name"),
    [
        *(
            ("timm", "rexnet_100"),
            ("timm", "ghostnet_100"),
            ("timm", "lcnet_035"),
            ("timm", "tf_mobilenetv3_small_075"),
        ),
        *(("timm", "skresnet18"), ("timm", "shvit_s1"), ("torchvision", "shufflenet_v2_x0_5")),
    ],
)
def test_bn_is_the_network_as_its_library_has_it(library: str, name: str) -> None:
    """Bit for bit, in training and in evaluation by the averages of that, with the network's eps and momentum."""
    torch.manual_seed(0)
    reference = created(library, name)
    first = next(module for module in reference.modules() if isinstance(module, _BatchNorm))
    for module in reference.modules():  # one of both for all sites, as a variant has
        if isinstance(module, _BatchNorm):
            module.eps, module.momentum = first.eps, first.momentum
    network = norms.rewrite(copy.deepcopy(reference), "bn", eps=first.eps, momentum=first.momentum)
    images = torch.randn(2, 3, 32, 32)
    outputs = []
    for each in (reference, network):
        torch.manual_seed(1)  # of dropout
        each.train()
        training = each(images)
        outputs.append((training.detach(), each.eval()(images).detach()))
    torch.testing.assert_close(outputs[1], outputs[0], rtol=0, atol=0)


def test_a_layer_that_is_norm_and_activation_is_both_where_a_variant_replaces_both() -> None:
    network = created("timm", "efficientnet_b0")
    stem = network.bn1
    assert type(stem).__name__ == "BatchNormAct2d"
    sites = norms.find_sites(network)
    assert network.bn1 is stem
    assert (sites[0].norm, sites[0].convolution, sites[0].activation) == ("bn1.norm", "conv_stem", "bn1.act")
    rewritten = norms.rewrite(network, "evonorm_b0")
    kinds = [type(module).__name__ for module in rewritten.modules()]
    assert kinds.count("EvoNorm2dB0") == 33  # an activation after the expansion and the depthwise part of each block
    assert "SiLU" not in {
        type(rewritten.get_submodule(site.activation)).__name__
        for site in sites
        if site.activation and site.activation in dict(rewritten.named_modules())
    }


@pytest.mark.parametrize("norm", ["bn", "none", "wn", "frn"])
def test_a_network_of_timm_is_built_by_its_name(make, norm: str) -> None:
    network = models.build(make("model=timm", "model.name=resnet10t", f"norm={norm}"), num_classes=7, image_size=32)
    assert network(torch.zeros(2, 3, 32, 32)).shape == (2, 7)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (("model.name=ResNet10",), "Did you mean model.name=resnet10t?"),
        (("model.name=nothing_like_it_at_all",), "is no network of timm"),
        (("model.name=vit_tiny_patch16_224",), "has no batch normalization layer"),
        (("model.name=resnet10t", "+model.kwargs.pretrained=true"), "model.kwargs.pretrained is set already"),
        (("model.name=resnet10t", "+model.kwargs.width=2"), "cannot be made with model.kwargs={'width': 2}"),
    ],
)
def test_a_network_that_timm_cannot_make_is_a_sentence(make, settings: tuple[str, ...], says: str) -> None:
    with pytest.raises(UserError) as error, torch.device("meta"):
        models.build(make("model=timm", *settings), num_classes=10, image_size=32)
    assert says in str(error.value)
    assert len(str(error.value).splitlines()) <= 5
