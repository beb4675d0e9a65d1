"""Sites: the (convolution, norm, activation) places of a network that a variant rewrites."""

from dataclasses import dataclass

from torch import fx, nn

from normlab.errors import UserError

_ACTIVATIONS = (nn.ReLU, nn.ReLU6, nn.SiLU, nn.Hardswish, nn.LeakyReLU, nn.GELU)


@dataclass(frozen=True)
class Site:
    """One BatchNorm2d of a network by the names of its parts, as in `Module.get_submodule`."""

    norm: str
    convolution: str | None  # feeds the norm and nothing else
    activation: str | None  # the module that alone takes the norm's output


def find_sites(network: nn.Module) -> list[Site]:
    """Every BatchNorm2d of `network` in order of execution, with its neighbours.

    Raises:
        UserError: if the network's forward pass cannot be traced, or it holds no BatchNorm2d.
    """
    try:
        graph = fx.symbolic_trace(network).graph
    except Exception as error:
        raise UserError(
            f"{type(network).__name__} cannot be traced by torch.fx, so its normalisation layers cannot be found:\n"
            f"{str(error).splitlines()[0] if str(error) else type(error).__name__}.\n"
            "Its forward pass must not branch on the values of tensors."
        ) from error
    modules = dict(network.named_modules())

    def called(node: object, kind: type[nn.Module] | tuple[type[nn.Module], ...]) -> str | None:
        if isinstance(node, fx.Node) and node.op == "call_module" and isinstance(modules[str(node.target)], kind):
            return str(node.target)
        return None

    sites: dict[str, Site] = {}
    for node in graph.nodes:
        norm = called(node, nn.BatchNorm2d)
        if norm is None:
            continue
        before, after = node.all_input_nodes[0], list(node.users)
        sites[norm] = Site(
            norm,
            convolution=called(before, nn.Conv2d) if len(before.users) == 1 else None,
            activation=called(after[0], _ACTIVATIONS) if len(after) == 1 else None,
        )
    if not sites:
        raise UserError(
            f"{type(network).__name__} has no BatchNorm2d layer, so there is nothing for norm=... to rewrite.\n"
            "Build it with nn.BatchNorm2d where a normaliser belongs."
        )
    return list(sites.values())


class Variant:
    """One choice of `norm`: says what each part of a site becomes. The base changes nothing.

    A variant is made once per network with the options of its YAML file, and called per site.
    """

    def __init__(self, *, norm_batch: int | None = None) -> None:
        self.norm_batch = norm_batch  # images that share statistics; None: all of the batch

    def norm(self, norm: nn.BatchNorm2d) -> nn.Module:
        """What replaces the site's BatchNorm2d."""
        return norm

    def convolution(self, convolution: nn.Conv2d) -> nn.Module:
        """What replaces the convolution before it."""
        return convolution


def rewrite(network: nn.Module, variant: Variant) -> nn.Module:
    """Rewrite every site of `network` in place, after construction.

    (torchvision's constructors initialise `weight` of every BatchNorm2d, which would crash on layers
    without one and overwrite a variant's own start.)
    """
    for site in find_sites(network):
        norm = network.get_submodule(site.norm)
        assert isinstance(norm, nn.BatchNorm2d)
        if site.convolution:
            convolution = network.get_submodule(site.convolution)
            assert isinstance(convolution, nn.Conv2d)
            network.set_submodule(site.convolution, variant.convolution(convolution))
        network.set_submodule(site.norm, variant.norm(norm))
    return network
